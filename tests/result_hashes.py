# SPDX-License-Identifier: Apache-2.0
"""Hashes of every operator's and the layer's results, to show that a reordering of the code changes none of them.

``python tests/result_hashes.py`` compares with ``result_hashes.json`` at every CPU level of this machine, ``--record``
writes it. A hash covers outputs and gradients; a level that the file does not know is only said to be new.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

RECORD = Path(__file__).with_suffix(".json")
# T, E, K, H, I, share of slots in use: ragged, empty experts, odd sizes, one row, more experts than tokens.
PROBLEMS = [
    (1, 1, 1, 1, 1, 1.0),
    (1, 8, 2, 33, 17, 1.0),
    (5, 3, 3, 64, 48, 0.5),
    (7, 16, 4, 65, 129, 0.7),
    (32, 4, 1, 100, 36, 0.9),
    (63, 8, 8, 31, 130, 0.3),
    (64, 16, 2, 128, 64, 1.0),
    (130, 7, 3, 130, 77, 0.6),
    (257, 40, 5, 48, 96, 0.5),
    (300, 2, 2, 256, 512, 0.8),
    (513, 130, 6, 72, 40, 0.4),
    (1100, 4, 2, 160, 200, 0.7),
]


def hashes(level: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the hash of every problem's results at the level that is forced in this process."""
    import torch

    from dynamic_moe import DynamicMoE, TopKRouter, losses, ops

    def digest(*tensors: torch.Tensor | None) -> str:
        sha = hashlib.sha256()
        for tensor in tensors:
            if tensor is not None:
                sha.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
                sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()[:16]

    for number, (tokens, experts, slots, hidden, intermediate, used) in enumerate(PROBLEMS):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            generator = torch.Generator().manual_seed(number)

            def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
                values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale  # noqa: B023
                return values.to(dtype)  # noqa: B023

            name = f"{level} {str(dtype).removeprefix('torch.')} {number}"
            x = random(tokens, hidden).requires_grad_()
            gate_up = random(experts, 2 * intermediate, hidden, scale=hidden**-0.5).requires_grad_()
            down = random(experts, hidden, intermediate, scale=intermediate**-0.5).requires_grad_()
            ids = torch.stack([torch.randperm(experts, generator=generator)[:slots] for _ in range(tokens)]).int()
            ids[torch.rand(ids.shape, generator=generator) >= used] = -1
            ids[ids == experts // 2] = -1  # an empty expert, where there is one more
            accumulator = torch.float64 if dtype == torch.float64 else torch.float32
            weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64).to(accumulator).requires_grad_()
            dy = random(tokens, hidden)
            mask = torch.rand(tokens, generator=generator) < 0.9
            logits = (2 * random(tokens, experts)).requires_grad_()

            for static in (False, True):
                permutation = ops.permute(ids, experts, static_rows=static)
                y = ops.expert_mlp(x, gate_up, down, ids, weights, permutation)
                grads = torch.autograd.grad(y, (x, gate_up, down, weights), dy)
                yield f"{name} expert_mlp static={static}", digest(*permutation[:3], y, *grads)
                rows = ops.grouped_matmul(x, gate_up, permutation.expert_offsets, permutation.row_token)
                live = int(permutation.expert_offsets[-1])
                grads = torch.autograd.grad(rows[:live].square().sum(), (x, gate_up))
                yield f"{name} grouped_matmul static={static}", digest(rows[:live], *grads)
                rows = random(permutation.row_token.shape[0], hidden).requires_grad_()
                y = ops.combine(rows, weights, permutation.slot_row)
                d_rows, d_weights = torch.autograd.grad(y, (rows, weights), dy)
                yield f"{name} combine static={static}", digest(y, d_rows[:live], d_weights)
            with torch.no_grad():
                yield f"{name} inference", digest(ops.expert_mlp(x, gate_up, down, ids, weights))
                if dtype != torch.float64:
                    packed = ops.prepack_experts(gate_up, down)
                    yield f"{name} prepacked", digest(ops.expert_mlp_prepacked(x, packed, ids, weights))
            if number == 0 or number % 2:
                gatings = {
                    "top_p": ops.top_p_gating(logits, 0.6, token_mask=mask),
                    "top_p renormalize": ops.top_p_gating(logits, 0.6, renormalize=True, max_experts=slots),
                    "top_p released": ops.top_p_gating(logits, 0.6, threshold_rule="released", temperature=1.5),
                    "top_k": ops.top_k_gating(logits, slots, token_mask=mask),
                    "top_k plain": ops.top_k_gating(logits, slots, renormalize=False, temperature=0.7),
                }
                for rule, gating in gatings.items():
                    loss = gating.expert_weights.square().sum() + gating.entropy.sum() + gating.logsumexp.sum()
                    loss = loss + gating.probability_sum.square().sum() + gating.probabilities.square().sum()
                    yield f"{name} {rule}", digest(*gating, *torch.autograd.grad(loss, logits))
            torch.manual_seed(number)
            for rule in ("top_p", "top_k"):
                options = {"top_p": 0.5} if rule == "top_p" else {"router": TopKRouter(hidden, experts, slots)}
                layer = DynamicMoE(hidden, intermediate, experts, **options).to(dtype)
                y, routing = layer(x, return_routing=True, token_mask=mask)
                loss = (y * dy).sum() + losses.load_balancing(routing) + losses.router_z(routing)
                loss = loss + losses.dynamic(routing)
                grads = torch.autograd.grad(loss, (x, *layer.parameters()))
                yield f"{name} layer {rule}", digest(y, loss, *grads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the file, for the levels of this machine")
    parser.add_argument("--level", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.level:
        json.dump(dict(hashes(options.level)), sys.stdout)
        return 0
    known: dict[str, dict[str, str]] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    failures = 0
    listing = "import dynamic_moe._C as c; print(*c.supported_cpu_isas(True))"
    levels = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True).stdout.split()
    for level in levels:
        environment = os.environ | {
            "DYNAMIC_MOE_CPU_ISA": level,
            "OMP_NUM_THREADS": "1",
        }  # torch's sums depend on threads
        command = [sys.executable, __file__, "--level", level]
        found = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
        if options.record or level not in known:
            print(f"{level}: {len(found)} results, {'recorded' if options.record else 'not on record'}")
            known[level] = found
            continue
        different = sorted(name for name in known[level] if found.get(name) != known[level][name])
        print(f"{level}: {len(found)} results, {len(different)} differ", *different[:20], sep="\n  ")
        failures += len(different)
    if options.record:
        RECORD.write_text(json.dumps(known, indent=0, sort_keys=True) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
