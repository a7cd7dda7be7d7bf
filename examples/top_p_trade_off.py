# SPDX-License-Identifier: Apache-2.0
"""Trains a tiny Mixtral on the standard library's source, then lets top-p choose its experts.

Writes the loss against experts per token, as a table and a plot: python examples/top_p_trade_off.py --minutes 1
"""

import argparse
import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from dynamic_moe.integrations import top_p_trade_off

LENGTH = 128


def standard_library() -> Tensor:
    """Bytes of the modules, files in order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def draw(data: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """``[batch, LENGTH]`` windows."""
    starts = torch.randint(len(data) - LENGTH, (batch,), generator=generator)
    return torch.stack([data[start : start + LENGTH] for start in starts.tolist()]).long()


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="training time")
    parser.add_argument("--output", type=Path, default=Path("runs/top_p_trade_off.png"), help="where the plot goes")
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    data = standard_library()
    split = len(data) * 9 // 10
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=4,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        experts_implementation="dynamic_moe",
    )
    model = MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    end, steps = time.monotonic() + 60 * options.minutes, 0
    while time.monotonic() < end:
        tokens = draw(data[:split], 16, generator)
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        steps += 1
    print(f"{steps} steps of {16 * LENGTH} bytes")

    generator.manual_seed(1)
    trade_off = top_p_trade_off(model, [draw(data[split:], 16, generator) for _ in range(8)])
    print(trade_off.table())
    options.output.parent.mkdir(parents=True, exist_ok=True)
    trade_off.plot(options.output)
    print(f"plot: {options.output}")


if __name__ == "__main__":
    main()
