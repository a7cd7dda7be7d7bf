# SPDX-License-Identifier: Apache-2.0
"""The expert pass on a CUDA device, this library's and others', against the device's own ceilings.

``python -m benchmarks.gpu --json results.json``; ``make gpu-check`` runs it and puts the table into its report. Times
are medians of runs between two events on the device, after a warm-up, everybody on the same inputs. The ceilings are
measured beside: a square product of the dtype, and a copy. Where there is no device it says so and ends.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.torch_grouped_mm import grouped_mm_pass
from benchmarks.peers.torch_loop import loop_over_experts
from benchmarks.shapes import SHAPES, Shape

ExpertPass = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
NO_DEVICE = "no device"


@dataclass(frozen=True)
class Result:
    """One contender in one case.

    Attributes
    ----------
    shape, dtype, name : str
    tokens : int
    training : bool
        Forward and backward, or forward alone.
    milliseconds : float or None
        None if it did not run; `note` says why.
    of_matmul, of_copy : float or None
        Fractions of the ceilings: arithmetic done, and the least bytes moved, per second.
    """

    shape: str
    dtype: str
    tokens: int
    training: bool
    name: str
    milliseconds: float | None
    of_matmul: float | None
    of_copy: float | None
    note: str = ""


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["A", "B"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[32, 1024, 16384])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["bfloat16", "float32"])
    parser.add_argument("--runs", type=int, default=30)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(NO_DEVICE)
        return 0
    results = []
    for dtype in options.dtypes:
        flops, bandwidth = matmul_ceiling(getattr(torch, dtype), options.runs), copy_ceiling(options.runs)
        print(f"{torch.cuda.get_device_name()}, {dtype}: {flops / 1e12:.1f} TFLOP/s, copy {bandwidth / 1e9:.0f} GB/s")
        for name in options.shapes:
            for tokens in options.tokens:
                for training in (False, True):
                    case = measure_case(SHAPES[name], tokens, dtype, training, flops, bandwidth, options.runs)
                    for result in case:
                        print(row(result), flush=True)
                        results.append(result)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    return 0


def milliseconds(call: Callable[[], Any], runs: int) -> float:
    """Return the median time of a call on the device."""
    for _ in range(3):
        call()
    times = []
    for _ in range(runs):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def matmul_ceiling(dtype: torch.dtype, runs: int, size: int = 8192) -> float:
    """Return the FLOP/s of torch's product of two square matrices."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * size**3 / (milliseconds(lambda: a @ b, runs) / 1e3)


def copy_ceiling(runs: int, size: int = 2**30) -> float:
    """Return the bytes per second of a copy; a copied byte counts twice."""
    a, b = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * size / (milliseconds(lambda: a.copy_(b), runs) / 1e3)


def measure_case(
    shape: Shape, tokens: int, dtype: str, training: bool, flops: float, bandwidth: float, runs: int
) -> Iterator[Result]:
    """Measure everybody in one case. One that fails does not end the rest."""
    torch.manual_seed(0)
    k = max(1, round(shape.mean_experts))
    options: dict[str, Any] = {"device": "cuda", "dtype": getattr(torch, dtype), "requires_grad": training}
    hidden, intermediate, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    x = torch.randn(tokens, hidden, **options)
    with torch.no_grad():
        gate_up = torch.randn(experts, 2 * intermediate, hidden, **options) / hidden**0.5
        down = torch.randn(experts, hidden, intermediate, **options) / intermediate**0.5
    gate_up.requires_grad_(training)
    down.requires_grad_(training)
    scores, ids = torch.randn(tokens, experts, device="cuda").softmax(-1).topk(k)
    ids, scores = ids.to(torch.int32), scores.requires_grad_(training)
    dy = torch.randn_like(x)
    work = shape.flops(tokens * k, training)
    moved = (3 if training else 1) * x.element_size() * (experts * shape.expert_values + 2 * tokens * hidden)
    for name, make in contenders(shape, k).items():
        try:
            expert_pass = make()

            def step(expert_pass: ExpertPass = expert_pass) -> None:
                for leaf in (x, gate_up, down, scores):
                    leaf.grad = None
                y = expert_pass(x, gate_up, down, ids, scores)
                if training:
                    y.backward(dy)  # also into weights that a module has of its own

            with torch.set_grad_enabled(training):
                time = milliseconds(step, runs)
        except Exception as error:
            note = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            yield Result(shape.name, dtype, tokens, training, name, None, None, None, note)
            continue
        seconds = time / 1e3
        of_matmul, of_copy = work / seconds / flops, moved / seconds / bandwidth
        yield Result(shape.name, dtype, tokens, training, name, time, of_matmul, of_copy)


def contenders(shape: Shape, k: int) -> dict[str, Callable[[], ExpertPass]]:
    """Return who is measured: a function that makes the expert pass, and fails where a package is missing."""
    return {
        "dynamic_moe": lambda: this_library(static_rows=False),
        "dynamic_moe, static rows": lambda: this_library(static_rows=True),
        "torch grouped_mm": lambda: grouped_mm_pass,
        "cuBLAS loop": lambda: loop_over_experts,
        "Hugging Face grouped_mm": lambda: hugging_face(shape, "grouped_mm"),
        "Hugging Face sonicmoe": lambda: hugging_face(shape, "sonicmoe", needs="sonicmoe"),
        "ScatterMoE": lambda: scatter_moe(shape, k),
        "MegaBlocks dMoE, with its router": lambda: megablocks(shape, k),
    }


def need(package: str) -> None:
    """Raise an ImportError unless a package is installed."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{package} is not installed")


def this_library(static_rows: bool) -> ExpertPass:
    """Return this library's expert pass."""
    from dynamic_moe import ops

    def expert_pass(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return ops.expert_mlp(x, gate_up, down, ids, weights, static_rows=static_rows)

    return expert_pass


def hugging_face(shape: Shape, implementation: str, needs: str = "transformers") -> ExpertPass:
    """Return the experts of Transformers' Mixtral around given weights."""
    need("transformers")
    need(needs)
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_local_experts=shape.num_experts,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts: Any = MixtralExperts(config)
    for name in ("gate_up_proj", "down_proj"):
        delattr(experts, name)

    def expert_pass(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        experts.gate_up_proj, experts.down_proj = gate_up, down
        y: Tensor = experts(x, ids.long(), weights.to(x.dtype))
        return y

    return expert_pass


def scatter_moe(shape: Shape, k: int) -> ExpertPass:
    """Return ScatterMoE's gated experts, on weights of its own."""
    need("scattermoe")
    from scattermoe.mlp import GLUMLP

    module = GLUMLP(shape.hidden_size, shape.intermediate_size, shape.num_experts, k).cuda()

    def expert_pass(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = module.to(x.dtype)(x, weights.to(x.dtype), ids.long())
        return y

    return expert_pass


def megablocks(shape: Shape, k: int) -> ExpertPass:
    """Return MegaBlocks' dropless layer, on weights of its own; its router cannot be left out."""
    need("megablocks")
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    arguments = Arguments(
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.intermediate_size,
        moe_num_experts=shape.num_experts,
        moe_top_k=k,
        mlp_type="glu",
        activation_fn=torch.nn.functional.silu,
        mlp_impl="grouped",
        bias=False,
        return_bias=False,
    )
    module = dMoE(arguments).cuda()

    def expert_pass(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = module.to(x.dtype)(x[None])
        y: Tensor = (out[0] if isinstance(out, tuple) else out)[0]
        return y

    return expert_pass


def row(result: Result) -> str:
    """Lay a result out as a line of a Markdown table."""
    what = "training" if result.training else "forward"
    start = f"| {result.shape} | {result.dtype} | {result.tokens} | {what} | {result.name} |"
    if result.milliseconds is None or result.of_matmul is None or result.of_copy is None:
        return f"{start} {result.note} | | |"
    return f"{start} {result.milliseconds:.3f} ms | {result.of_matmul:.0%} | {result.of_copy:.0%} |"


if __name__ == "__main__":
    sys.exit(main())
