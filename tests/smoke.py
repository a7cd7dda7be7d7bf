# SPDX-License-Identifier: Apache-2.0
"""A layer runs forward and backward from an installed package; run from a folder that does not hold the sources."""

import torch

from dynamic_moe import DynamicMoE


def main() -> None:
    torch.manual_seed(0)
    layer = DynamicMoE(hidden_size=32, intermediate_size=48, num_experts=4, top_p=0.4)
    x = torch.randn(3, 5, 32, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    if y.shape != x.shape or not all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients):
        raise SystemExit("the layer's output or gradients are not what they should be")
    print("forward and backward work")


if __name__ == "__main__":
    main()
