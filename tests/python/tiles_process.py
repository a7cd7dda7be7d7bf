# SPDX-License-Identifier: Apache-2.0
"""What a process finds out about AMX tiles, as JSON: their state after each step, the error of the bfloat16 step, and
why tiles were refused. A program of its own, because a process asks once. ``refuse``: Linux will refuse them, because
the thread has an alternate signal stack of 4 KiB.
"""

import ctypes
import json
import sys

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode


class Stack(ctypes.Structure):
    """``stack_t`` of sigaltstack."""

    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


SIGNAL_STACK = ctypes.create_string_buffer(4096)
if sys.argv[1] == "refuse":
    stack = Stack(ctypes.addressof(SIGNAL_STACK), 0, len(SIGNAL_STACK))
    assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0

from dynamic_moe import _C, info, ops  # noqa: E402
from dynamic_moe.ops._common import raw  # noqa: E402

TOKENS = 40  # more than a group of few rows, which has no tiles


def products(dtype: torch.dtype) -> list[Tensor]:
    """Run every product of the layer, and see that what is packed is read and has the size that tracing expects."""
    x = torch.ones(TOKENS, 8, dtype=dtype, requires_grad=True)
    gate_up, down = torch.ones(1, 6, 8, dtype=dtype), torch.ones(1, 8, 3, dtype=dtype)
    ids, weights = torch.zeros(TOKENS, 1, dtype=torch.int32), torch.ones(TOKENS, 1)
    y = ops.expert_mlp(x, gate_up, down, ids, weights)
    results = [y, *torch.autograd.grad(y.sum(), x)]
    results.append(ops.grouped_matmul(x, gate_up, torch.tensor([0, TOKENS], dtype=torch.int32)))
    with torch.no_grad():
        packed = ops.prepack_experts(gate_up, down)
        assert torch.equal(ops.expert_mlp_prepacked(x, packed, ids, weights), y)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(each) for each in (gate_up, down)]
        assert raw.prepack_experts.default(*fakes).shape == packed.data.shape
    return [each.detach() for each in results]


def main() -> None:
    states = [info.collect()["amx_tiles"]["state"]]
    ops.top_p_gating(torch.randn(TOKENS, 4).bfloat16(), 0.5)
    products(torch.float32)
    products(torch.float16)
    states.append(info.collect()["amx_tiles"]["state"])
    error = results = None
    try:
        results = products(torch.bfloat16)
    except RuntimeError as caught:
        error = str(caught)
    tiles = info.collect()["amx_tiles"]
    if results is not None and tiles["state"] == "refused":
        _C.set_cpu_isa(tiles["bfloat16_isa_when_refused"])
        assert all(map(torch.equal, products(torch.bfloat16), results))
    print(json.dumps([[*states, tiles["state"]], error, tiles["reason"]]))


if __name__ == "__main__":
    main()
