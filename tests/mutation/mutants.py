# SPDX-License-Identifier: Apache-2.0
"""The mutants: one line of the product replaced by a wrong one, and the tests that must notice.

``old`` must stand exactly once in the file. When a kernel changes, run.py says which mutants no longer apply: give them
the new text, or replace them by a mutant of the same kind.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A fault."""

    what: str
    file: str
    old: str
    new: str
    tests: str  # a folder of tests/cpp, or what to give to pytest
    needs: str = "scalar"  # the lowest CPU level at which the fault can show

    @property
    def is_native(self) -> bool:
        return self.file.startswith("csrc/")


MUTANTS = [
    # ---- gating ----
    Mutant(
        "gating: the two threshold rules are exchanged",
        "csrc/gating/select.h",
        "p.rule == ThresholdRule::kPaper ?",
        "p.rule == ThresholdRule::kReleased ?",
        "gating",
    ),
    Mutant(
        "gating: renormalized weights are not divided by the mass",
        "csrc/gating/select.h",
        "L::store(weights, L::div(L::load(weights), mass));",
        "L::store(weights, L::load(weights));",
        "gating",
    ),
    Mutant(
        "gating: the entropy lacks its second term",
        "csrc/gating/group.h",
        "const auto entropy = L::fma(q, scale, log_s);",
        "const auto entropy = L::fma(q, L::zero(), log_s);",
        "gating",
    ),
    Mutant(
        "gating backward: the gradient of the mass is left out",
        "csrc/gating/backward.h",
        "g[ids[k]] = (d_weights[k] - dot / mass) / mass;",
        "g[ids[k]] = d_weights[k] / mass;",
        "gating",
    ),
    # ---- permutation and combine ----
    Mutant(
        "permute: every row has the first slot of its token",
        "csrc/permutation/permute.h",
        "p.row_slot[row] = static_cast<int32_t>(slot);",
        "p.row_slot[row] = static_cast<int32_t>(token * p.max_experts);",
        "permutation",
    ),
    Mutant(
        "permute: blocks of tokens write over each other",
        "csrc/permutation/permutation_cpu.cpp",
        "      row += count;",
        "      row += 0 * count;",
        "permutation",
    ),
    Mutant(
        "combine: rows are added without their weights",
        "csrc/permutation/combine.h",
        "L::mul(weight, load(row + i * kLanes, left - i * kLanes))",
        "L::mul(L::broadcast(Real(1)), load(row + i * kLanes, left - i * kLanes))",
        "permutation",
    ),
    Mutant(
        "combine backward: unused slots keep what was in their gradient",
        "csrc/permutation/combine.h",
        "for (int64_t slot = token * k; slot < (token + 1) * k; ++slot) d_weights[slot] = 0;",
        "d_weights[token * k] = 0;",
        "permutation",
    ),
    # ---- products: packing, tiles, blocks ----
    Mutant(
        "Y, dX: sums of earlier blocks of the inner dimension are thrown away",
        "csrc/grouped_matmul/products.h",
        "pitch, b > 0);",
        "pitch, false);",
        "grouped_matmul",
    ),
    Mutant(
        "dW: sums of earlier blocks of rows are thrown away",
        "csrc/grouped_matmul/products.h",
        "(words, packed, panel, c, C::kColumns, block > 0);",
        "(words, packed, panel, c, C::kColumns, false);",
        "grouped_matmul",
    ),
    Mutant(
        "dX: a token keeps its last row alone",
        "csrc/grouped_matmul/products.h",
        "Simd::fma(v, factors, load_some<C>(out + column, columns))",
        "Simd::mul(v, factors)",
        "grouped_matmul",
    ),
    Mutant(
        "packing: columns behind the last one are read from behind the matrix",
        "csrc/grouped_matmul/tile.h",
        "row[n] = matrix + smaller(v * kLanes + n, columns - 1) * pitch;",
        "row[n] = matrix + static_cast<int64_t>(v * kLanes + n) * pitch;",
        "grouped_matmul",
        needs="avx2",
    ),
    Mutant(
        "packing: the last row of an odd number takes its neighbor's elements into its pairs",
        "csrc/grouped_matmul/tile.h",
        "const bool in_place = C::kInPlace && elements % C::kPerWord == 0;",
        "const bool in_place = C::kInPlace;",
        "grouped_matmul",
        needs="avx512_bf16",
    ),
    Mutant(
        "dot products of few rows: the last elements are dropped",
        "csrc/grouped_matmul/tile.h",
        "  if (k < elements) {",
        "  if (k < elements && false) {",
        "grouped_matmul",
        needs="avx2",
    ),
    Mutant(
        "dispatch: float16 is taken for bfloat16",
        "csrc/grouped_matmul/level.h",
        "return run(Config<Simd, Float16, kIsa>{});",
        "return run(Config<Simd, BFloat16, kIsa>{});",
        "grouped_matmul",
    ),
    Mutant(
        "dispatch: dW of float64 goes to the float32 kernel",
        "csrc/grouped_matmul/grouped_matmul_cpu.cpp",
        "if (params.dtype == DType::kFloat64) return plain::grouped_matmul_dw<double>(params);",
        "",
        "grouped_matmul",
    ),
    # ---- the expert pass ----
    Mutant(
        "expert pass: the slope of SiLU lacks its second term",
        "csrc/expert_mlp/activation.h",
        "Simd::fma(silu, Simd::sub(Simd::broadcast(1.0f), s), s)",
        "Simd::fma(Simd::zero(), Simd::sub(Simd::broadcast(1.0f), s), s)",
        "expert_mlp",
    ),
    Mutant(
        "expert pass: a row takes the weight of another slot",
        "csrc/expert_mlp/passes.h",
        "static_cast<const float*>(expert_weights)[row_slot[row]]",
        "static_cast<const float*>(expert_weights)[row]",
        "expert_mlp",
    ),
    Mutant(
        "expert pass: d_down_proj without the weights",
        "csrc/expert_mlp/passes.h",
        "Simd::mul(gradient.activation, scale)",
        "gradient.activation",
        "expert_mlp",
    ),
    Mutant(
        "expert pass: the gradient of a weight is that of its last columns",
        "csrc/expert_mlp/passes.h",
        "dot = Simd::fma(d_scaled, gradient.activation, dot);",
        "dot = Simd::mul(d_scaled, gradient.activation);",
        "expert_mlp",
    ),
    Mutant(
        "expert pass: a chunk of experts forgets what those before it added",
        "csrc/expert_mlp/passes.h",
        "      if (e0 == 0) zero_columns",
        "      zero_columns",
        "expert_mlp",
    ),
    Mutant(
        "prepacked experts: the panels of up are read from those of the gate",
        "csrc/grouped_matmul/packed_panels.h",
        "(2 * gate_column + (is_up ? padded : 0))",
        "2 * gate_column",
        "expert_mlp",
    ),
    # ---- common ----
    Mutant(
        "levels: DYNAMIC_MOE_CPU_ISA may name a level that the machine lacks",
        "csrc/common/isa.cpp",
        "  if (!isa_supported(isa)) throw_unsupported(kVariable, isa);\n",
        "",
        "common",
    ),
    Mutant(
        "bfloat16: rounds half up instead of to even",
        "csrc/common/half.h",
        "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16",
        "(bits + 0x8000u) >> 16",
        "common",
    ),
    # ---- the Python layer ----
    Mutant(
        "losses: the mean over layers is a sum",
        "dynamic_moe/losses.py",
        'return total / len(routings) if reduction == "mean" else total',
        "return total",
        "test_losses.py",
    ),
    Mutant(
        "losses: Q is not divided by the number of tokens",
        "dynamic_moe/losses.py",
        "layer.probability_sum / num_tokens",
        "layer.probability_sum",
        "test_worked_numbers.py",
    ),
    Mutant(
        "ops: the paper's rule is called released",
        "dynamic_moe/ops/_gating.py",
        'threshold_rule == "released"',
        'threshold_rule == "paper"',
        "test_worked_numbers.py",
    ),
    Mutant(
        "ops: a frozen gate_up_proj takes down_proj's gradient along",
        "dynamic_moe/ops/_expert_mlp.py",
        "need_gate_up or need_down",
        "need_gate_up",
        "test_ops_rows.py",
    ),
    Mutant(
        "ops: int64 expert ids wrap around",
        "dynamic_moe/ops/_permutation.py",
        "expert_ids.clamp(-1, num_experts).to(torch.int32)",
        "expert_ids.to(torch.int32)",
        "test_ops_rows.py",
    ),
    Mutant(
        "ops: combine's backward pass forgets the weights",
        "dynamic_moe/ops/_permutation.py",
        "(dy, rows, weights, slot_row, need_rows, need_weights)",
        "(dy, rows, None, slot_row, need_rows, need_weights)",
        "test_numerics_rows.py",
    ),
]
