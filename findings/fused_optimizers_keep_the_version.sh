#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# torch 2.13.0, CPU: the fused optimizers change parameters in place and do not raise their version counter, which the
# other implementations raise. Whoever keeps something computed from a weight and trusts Tensor._version keeps it for
# too long. Seen: version 0 after one step of AdamW(fused=True), Adam and SGD alike; above 0 without fused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch

for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
    versions = {}
    for fused in (True, False):
        weight = torch.nn.Parameter(torch.ones(4))
        weight.grad = torch.ones(4)
        kind([weight], lr=0.1, fused=fused).step()
        assert not torch.equal(weight, torch.ones(4))
        versions[fused] = weight._version
    print(f"torch {torch.__version__}: {kind.__name__}: version {versions[True]} fused, {versions[False]} otherwise")
    assert versions[True] == 0 < versions[False], "the behaviour has changed"
PYTHON
