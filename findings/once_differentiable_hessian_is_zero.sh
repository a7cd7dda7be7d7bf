#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# torch 2.13.0, CPU: an autograd.Function whose backward is decorated with @once_differentiable raises when its gradient
# is differentiated by backward(), but autograd.grad(..., allow_unused=True) and torch.autograd.functional.hessian, which
# is built on it, give None and 0 without an error. The node that should raise has no edge to the inputs, so a search
# from the inputs never meets it, also where the incoming gradient depends on x (the square of the cube).
# Exact second derivatives at 2 of x ** 3 + x and x ** 6 + x: 12 and 480. Seen: 0 and 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.autograd.function import once_differentiable


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return dy * 3 * x**2


x = torch.tensor(2.0)
hessian = torch.autograd.functional.hessian(lambda x: Cube.apply(x) + x, x)
squared = torch.autograd.functional.hessian(lambda x: Cube.apply(x).square() + x, x)
exact = torch.autograd.functional.hessian(lambda x: x**3 + x, x)
print(f"torch {torch.__version__}: hessian {hessian.item()}, of the square {squared.item()}, exact {exact.item()}")
assert (hessian.item(), exact.item()) == (0.0, 12.0), "the behaviour has changed"
assert squared.item() == 0.0, "the behaviour has changed"  # exact: (x ** 6)'' = 30 x ** 4 = 480
PYTHON
