#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# torch 2.13.0, CPU: an operator with a reverse-mode formula (torch.library.register_autograd) and no forward-mode one
# drops tangents without an error: torch.func.jvp and forward_ad give a derivative that lacks the operator's part.
# Seen for f(x) = op(x) + x with op(x) = x ** 2 at 3: reverse mode 7, forward mode 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch


@torch.library.custom_op("finding::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


square.register_autograd(
    lambda ctx, dy: 2 * dy * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
x = torch.tensor(3.0)
leaf = x.clone().requires_grad_()
reverse = torch.autograd.grad(square(leaf) + leaf, leaf)[0].item()
_, forward = torch.func.jvp(lambda x: square(x) + x, (x,), (torch.ones_like(x),))
print(f"torch {torch.__version__}: reverse mode {reverse}, forward mode {forward.item()}")
assert (reverse, forward.item()) == (7.0, 1.0), "the behaviour has changed"
PYTHON
