#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# torch 2.13.0, CPU: torch.compile traces a graph twice, before its first run, where an input is a float64 tensor without
# dimensions on the CPU and an operator of a library takes it: the tensor is taken for a Python float that was wrapped,
# and the analysis starts again. With a tensor of one element it is traced once.
# Seen: the backend is called 2 times for shape (), once for shape (1,).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/count.py" <<'PYTHON'
import torch
from torch._dynamo.backends.debugging import aot_eager


@torch.library.custom_op("finding::scale", mutates_args=())
def scale(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return x * factor


scale.register_fake(lambda x, factor: torch.empty_like(x))
calls = {(): 0, (1,): 0}
for shape in calls:

    def backend(graph, inputs, shape=shape):
        calls[shape] += 1
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    function = torch.compile(lambda x, factor: scale(x, factor), backend=backend, fullgraph=True)
    function(torch.randn(3), torch.full(shape, 0.5, dtype=torch.float64))
print(f"torch {torch.__version__}: calls of the backend by shape {calls}")
assert calls == {(): 2, (1,): 1}, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/count.py"
