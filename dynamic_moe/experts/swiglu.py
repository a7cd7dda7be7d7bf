# SPDX-License-Identifier: Apache-2.0
"""The routed experts: E SwiGLU networks in two stacked tensors."""

import torch
from torch import Tensor, nn

from dynamic_moe import ops
from dynamic_moe._checks import check_dense, check_positive, check_std, check_weight_dtype, flatten_tokens
from dynamic_moe.experts.prepack import Prepackable
from dynamic_moe.ops._permutation import check_row_capacity


class SwiGLUExperts(Prepackable):
    r"""E experts, each :math:`W_d (\operatorname{silu}(W_g x) \odot W_u x)` (Shazeer 2020), without biases.

    Usable on its own: ``forward`` is called as the experts of Hugging Face Transformers are, and the weights have the
    layout of theirs.

    Parameters
    ----------
    num_experts, hidden_size, intermediate_size : int
        E, H and I.
    row_capacity : int, optional
        Use buffers of this many rows, so that the host never waits for a CUDA device and a CUDA graph can hold the
        call. (Token, expert) pairs that do not fit are dropped; see :func:`dynamic_moe.ops.permute`, which also counts
        them. Default: exactly the rows that there are.
    static_rows : bool, default False
        Deprecated: a row capacity of T * K, which drops nothing.
    init_std : float, default 0.02
        The weights start as N(0, init_std^2).
    device, dtype : optional
        Of the weights.

    Attributes
    ----------
    gate_up_proj : Parameter
        ``[E, 2I, H]``: the I rows of :math:`W_g`, then the I rows of :math:`W_u`.
    down_proj : Parameter
        ``[E, H, I]``.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        row_capacity: int | None = None,
        static_rows: bool = False,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = check_positive("num_experts", num_experts)
        self.hidden_size = check_positive("hidden_size", hidden_size)
        self.intermediate_size = check_positive("intermediate_size", intermediate_size)
        self.row_capacity = check_row_capacity(row_capacity, static_rows)
        self.static_rows = static_rows
        self.init_std = check_std(init_std)
        check_weight_dtype(dtype)
        num_experts, hidden_size, intermediate_size = self.num_experts, self.hidden_size, self.intermediate_size
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size, device=device, dtype=dtype)
        )
        self.down_proj = nn.Parameter(
            torch.empty(num_experts, hidden_size, intermediate_size, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.normal_(self.gate_up_proj, std=self.init_std)
        nn.init.normal_(self.down_proj, std=self.init_std)

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """Send every token through its experts and add up their outputs, each times its weight.

        Parameters
        ----------
        x : Tensor
            ``[..., H]``, in the dtype of the weights (any float dtype under autocast).
        expert_ids : Tensor
            int32 or int64 ``[..., K]``, different experts for each token; E marks an unused slot.
        expert_weights : Tensor
            ``[..., K]``, any float dtype; applied in float32 (float64 for float64 x).

        Returns
        -------
        Tensor
            ``[..., H]``, in the dtype of x (of autocast, under autocast). 0 for a token without an expert.

        Raises
        ------
        ValueError
            If a shape or a dtype is not as above, or a tensor is not dense.
        """
        x_TH = flatten_tokens(x, self.hidden_size)
        _check_slots(x, expert_ids, expert_weights)
        check_same_dtype(x, self.gate_up_proj)
        num_slots = expert_ids.shape[-1]
        ids_TK, weights_TK = expert_ids.reshape(-1, num_slots), expert_weights.reshape(-1, num_slots)
        permutation = None
        if self.row_capacity is not None or self.static_rows:
            permutation = ops.permute(
                ids_TK, self.num_experts, row_capacity=self.row_capacity, static_rows=self.static_rows
            )
        packed = self._packed_for(x_TH, weights_TK)
        if packed is not None:
            y_TH = ops.expert_mlp_prepacked(x_TH, packed, ids_TK, weights_TK, permutation)
        else:
            y_TH = ops.expert_mlp(x_TH, self.gate_up_proj, self.down_proj, ids_TK, weights_TK, permutation)
        return y_TH.reshape(x.shape)

    def _stacked_weights(self) -> tuple[Tensor, Tensor]:
        return self.gate_up_proj, self.down_proj

    def extra_repr(self) -> str:
        """Sizes."""
        capacity = "" if self.row_capacity is None else f", row_capacity={self.row_capacity}"
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}{', static_rows=True' if self.static_rows else capacity}"
        )


def check_same_dtype(x: Tensor, weight: Tensor) -> None:
    """Raise a ValueError unless x has the dtype of the weights, or autocast will see to it."""
    # The meta device has no autocast to ask for.
    if x.dtype != weight.dtype and (x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type)):
        raise ValueError(f"x must have the dtype of the weights, {weight.dtype}, outside autocast; got {x.dtype}")


def _check_slots(x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> None:
    try:
        shape = expert_ids.shape
        fits = expert_ids.dtype in (torch.int32, torch.int64) and shape[:-1] == x.shape[:-1] and shape[-1] > 0
        fits = fits and expert_weights.shape == shape and expert_weights.is_floating_point()
        fits = fits and expert_ids.layout is torch.strided and expert_weights.layout is torch.strided
    except (AttributeError, IndexError, RuntimeError, TypeError):  # no tensor, a scalar, or a nested tensor
        fits = False
    if not fits:
        _refuse_slots(x, expert_ids, expert_weights)


def _refuse_slots(x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> None:
    check_dense("expert_ids", expert_ids)
    check_dense("expert_weights", expert_weights)
    if expert_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expert_ids must be an int32 or int64 tensor, got {expert_ids.dtype}")
    if expert_ids.dim() != x.dim() or expert_ids.shape[:-1] != x.shape[:-1] or expert_ids.shape[-1] == 0:
        raise ValueError(
            f"expert_ids must have shape {[*x.shape[:-1], 'K']} with K >= 1, like x, got {list(expert_ids.shape)}"
        )
    raise ValueError(
        f"expert_weights must be a floating-point {list(expert_ids.shape)} tensor like expert_ids, "
        f"got {expert_weights.dtype} {list(expert_weights.shape)}"
    )
