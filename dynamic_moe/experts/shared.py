# SPDX-License-Identifier: Apache-2.0
"""The shared expert: a SwiGLU network that every token goes through."""

import torch
from torch import Tensor, nn

from dynamic_moe import ops
from dynamic_moe._checks import check_positive, check_std, check_weight_dtype, flatten_tokens
from dynamic_moe.experts.prepack import Prepackable
from dynamic_moe.experts.swiglu import check_same_dtype
from dynamic_moe.float32_linear import float32_linear


class SharedExpert(Prepackable):
    r"""One expert for all tokens (Dai et al. 2024, eq. 9), optionally scaled by a sigmoid gate (Qwen1.5-MoE).

    Runs on the same fused operator as the routed experts, as one expert that is always selected: the gate is the
    expert's weight, so its gradient needs no stored output.

    Parameters
    ----------
    hidden_size, intermediate_size : int
        H and I.
    gated : bool, default False
        Multiply the output by :math:`\sigma(w_g x)`, computed in float32 (float64 for float64).
    init_std : float, default 0.02
        The weights start as N(0, init_std^2).
    device, dtype : optional
        Of the weights.

    Attributes
    ----------
    gate_up_proj : Parameter
        ``[2I, H]``: the I gate rows, then the I up rows.
    down_proj : Parameter
        ``[H, I]``.
    gate : Parameter or None
        ``[1, H]``.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        gated: bool = False,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = check_positive("hidden_size", hidden_size)
        self.intermediate_size = check_positive("intermediate_size", intermediate_size)
        self.gated = gated
        self.init_std = check_std(init_std)
        check_weight_dtype(dtype)
        hidden_size, intermediate_size = self.hidden_size, self.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(2 * intermediate_size, hidden_size, device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(hidden_size, intermediate_size, device=device, dtype=dtype))
        self.gate: nn.Parameter | None
        if gated:
            self.gate = nn.Parameter(torch.empty(1, hidden_size, device=device, dtype=dtype))
        else:
            self.register_parameter("gate", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=self.init_std)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., H]`` for ``x [..., H]``, in the dtype of x (of autocast, under autocast).

        Raises
        ------
        ValueError
            If x is not a dense tensor of width H, or its dtype is not that of the weights outside autocast.
        """
        x_TH = flatten_tokens(x, self.hidden_size)
        check_same_dtype(x, self.gate_up_proj)
        ids_T1 = torch.zeros(x_TH.shape[0], 1, dtype=torch.int32, device=x.device)
        weights_T1 = self._weights(x_TH)
        packed = self._packed_for(x_TH, weights_T1)
        if packed is not None:
            y_TH = ops.expert_mlp_prepacked(x_TH, packed, ids_T1, weights_T1)
        else:
            # Every slot is used, so the static buffers are exact and need not be counted.
            y_TH = ops.expert_mlp(x_TH, *self._stacked_weights(), ids_T1, weights_T1, static_rows=True)
        return y_TH.reshape(x.shape)

    def _stacked_weights(self) -> tuple[Tensor, Tensor]:
        return self.gate_up_proj.unsqueeze(0), self.down_proj.unsqueeze(0)

    def _weights(self, x_TH: Tensor) -> Tensor:
        dtype = torch.promote_types(x_TH.dtype, torch.float32)
        if self.gate is None:
            return torch.ones(x_TH.shape[0], 1, dtype=dtype, device=x_TH.device)
        return float32_linear(x_TH, self.gate).sigmoid().to(dtype)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, gated={self.gated}"
