# SPDX-License-Identifier: Apache-2.0
"""The operators: typed functions over the native kernels in ``torch.ops.dynamic_moe``.

Every function here checks its arguments (``ValueError``), works in eager mode, under ``torch.compile(fullgraph=True)``
with dynamic token counts, in ``torch.export``, under autocast and under activation checkpointing, and has a first
derivative in reverse mode. Second derivatives and forward-mode differentiation raise an error, also through
``torch.ops.dynamic_moe`` and in exported programs: a derivative that does not exist is never zero or a part.

Shapes are named as in the whole package: T tokens, E experts, K most experts of a token, H hidden size, I
intermediate size, R live rows. `dynamic_moe.reference` holds the same functions in plain PyTorch.
"""

from dynamic_moe.ops._common import checked_mode, sac_save_ops, set_checked_mode
from dynamic_moe.ops._expert_mlp import expert_mlp
from dynamic_moe.ops._gating import Gating, top_k_gating, top_p_gating
from dynamic_moe.ops._grouped_matmul import grouped_matmul
from dynamic_moe.ops._permutation import Permutation, combine, permute
from dynamic_moe.ops._prepack import PackedExperts, expert_mlp_prepacked, prepack_experts

__all__ = [
    "Gating",
    "PackedExperts",
    "Permutation",
    "checked_mode",
    "combine",
    "expert_mlp",
    "expert_mlp_prepacked",
    "grouped_matmul",
    "permute",
    "prepack_experts",
    "sac_save_ops",
    "set_checked_mode",
    "top_k_gating",
    "top_p_gating",
]
