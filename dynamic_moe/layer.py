# SPDX-License-Identifier: Apache-2.0
"""The layer: a router, its experts, and optionally an expert that all tokens share."""

import inspect
from typing import Literal, Self, overload

import torch
from torch import Tensor, nn

from dynamic_moe._checks import check_positive, flatten_mask, flatten_tokens
from dynamic_moe.collect import record_routing
from dynamic_moe.experts import SharedExpert, SwiGLUExperts
from dynamic_moe.routers import TopPRouter
from dynamic_moe.routing import Routing, mark_missing_gradient


class DynamicMoE(nn.Module):
    r"""Mixture-of-Experts layer in which each token gets as many experts as its router decides.

    :math:`y = \sum_{i \in S(x)} w_i(x) E_i(x)`, plus the shared expert if there is one. No token is dropped unless the
    routing rule drops it, and a token without an expert gets 0 from the routed experts.

    Parameters
    ----------
    hidden_size, intermediate_size, num_experts : int
        H, I and E. ``intermediate_size`` is None where ``experts`` are given.
    top_p : float, optional
        Route by :class:`~dynamic_moe.TopPRouter` with this p; 0.4 where no router is given. For other options of the
        rule, pass a router.
    router : Module, optional
        Any module whose ``forward(x, token_mask)``, x ``[T, H]`` and token_mask bool ``[T]`` or None, returns a
        :class:`~dynamic_moe.Routing` over E experts.
    experts : Module, optional
        Any module whose ``forward(x, expert_ids, expert_weights)``, x ``[T, H]``, the others ``[T, K]`` as in
        :class:`~dynamic_moe.Routing`, returns ``[T, H]``: the weighted sum of the outputs of each token's experts.
        Default: :class:`~dynamic_moe.experts.SwiGLUExperts`.
    shared_intermediate_size : int, optional
        Width of a :class:`~dynamic_moe.experts.SharedExpert`. Default: no shared expert.
    shared_gated : bool, default False
        Whether the shared expert has a sigmoid gate.
    row_capacity : int, optional
        On CUDA, never wait for the device: buffers hold this many rows, at most T * K, whatever the router decides, and
        a CUDA graph can hold the layer. What does not fit is dropped, each token's last experts first; see
        :func:`dynamic_moe.ops.permute`. Also needed under ``torch.func.vmap``, as for gradients of each sample, and on
        the meta device. Default: exactly the rows that there are, and nothing is dropped.
    static_rows : bool, default False
        Deprecated: a row capacity of T * K. Give the router a cap of experts per token (``max_experts``), as K is E
        without one.
    init_std : float, default 0.02
        Weights start as N(0, init_std^2).
    device, dtype : optional
        Of the weights. A router or experts that are passed in keep their own.

    Attributes
    ----------
    router : Module
        Its weight is ``router.weight [E, H]`` in the state dict.
    experts : Module
        By default ``experts.gate_up_proj [E, 2I, H]`` and ``experts.down_proj [E, H, I]``.
    shared_expert : SharedExpert or None
        ``shared_expert.gate_up_proj [2I', H]``, ``shared_expert.down_proj [H, I']`` and, if gated,
        ``shared_expert.gate [1, H]``.

    Raises
    ------
    ValueError
        If a size is not positive, both ``top_p`` and ``router`` or both ``experts`` and an option of theirs are given,
        or the router or the experts are not a module or were built for other sizes.

    Examples
    --------
    >>> layer = DynamicMoE(hidden_size=64, intermediate_size=128, num_experts=8, top_p=0.4)
    >>> y, routing = layer(torch.randn(2, 5, 64), return_routing=True)
    >>> y.shape, routing.tokens_per_expert.shape
    (torch.Size([2, 5, 64]), torch.Size([8]))
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int | None,
        num_experts: int,
        *,
        top_p: float | None = None,
        router: nn.Module | None = None,
        experts: nn.Module | None = None,
        shared_intermediate_size: int | None = None,
        shared_gated: bool = False,
        row_capacity: int | None = None,
        static_rows: bool = False,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_size = self.hidden_size = check_positive("hidden_size", hidden_size)
        num_experts = self.num_experts = check_positive("num_experts", num_experts)
        if router is None:
            p = 0.4 if top_p is None else top_p
            router = TopPRouter(hidden_size, num_experts, p, init_std=init_std, device=device, dtype=dtype)
        elif top_p is not None:
            raise ValueError(f"top_p must be None where a router is given, got {top_p!r}")
        _check_part("router", router, ("x", "token_mask"), "a Routing", hidden_size, num_experts)
        self.router = router
        if experts is None:
            experts = SwiGLUExperts(
                num_experts,
                hidden_size,
                check_positive("intermediate_size", intermediate_size),
                row_capacity=row_capacity,
                static_rows=static_rows,
                init_std=init_std,
                device=device,
                dtype=dtype,
            )
        else:
            for name, option, default in (
                ("intermediate_size", intermediate_size, None),
                ("row_capacity", row_capacity, None),
                ("static_rows", static_rows, False),
            ):
                if option != default:
                    raise ValueError(f"{name} must be {default} where experts are given, got {option!r}")
            _check_part("experts", experts, ("x", "expert_ids", "expert_weights"), "a Tensor", hidden_size, num_experts)
        self.experts = experts
        self.intermediate_size: int | None = getattr(experts, "intermediate_size", None)
        self.shared_expert: SharedExpert | None = None
        if shared_intermediate_size is not None:
            self.shared_expert = SharedExpert(
                hidden_size,
                check_positive("shared_intermediate_size", shared_intermediate_size),
                gated=shared_gated,
                init_std=init_std,
                device=device,
                dtype=dtype,
            )
        elif shared_gated:
            raise ValueError("shared_gated must be False where shared_intermediate_size is None, got True")

    def reset_parameters(self) -> None:
        """Draw all weights anew; a router without ``reset_parameters`` keeps its own."""
        for module in self.children():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()

    def prepack(self) -> Self:
        """Pack the weights of the experts, and of the shared expert, for inference on the CPU.

        The packed copy is used under ``torch.no_grad()`` or ``torch.inference_mode()``; a pass that computes gradients
        of the weights, a step of an optimizer that holds them, and ``train()`` drop it. See
        :meth:`SwiGLUExperts.prepack <dynamic_moe.experts.prepack.Prepackable.prepack>` for what it costs and which
        changes are not noticed.

        Returns
        -------
        DynamicMoE
            This layer.

        Raises
        ------
        ValueError
            If the weights are float64, not on the CPU, or could change without the copy being dropped: quantized,
            sharded, offloaded, parametrized, shared with other processes, or inference tensors. Or if the experts are
            of another kind, which has no ``prepack()``.

        Examples
        --------
        >>> layer = DynamicMoE(hidden_size=64, intermediate_size=128, num_experts=8).eval().prepack()
        >>> with torch.no_grad():
        ...     y = layer(torch.randn(5, 64))
        """
        prepack = getattr(self.experts, "prepack", None)
        if not callable(prepack):
            raise ValueError(f"experts must have a method prepack() to be packed, got {type(self.experts).__name__}")
        prepack()
        if self.shared_expert is not None:
            self.shared_expert.prepack()
        return self

    @overload
    def forward(
        self, x: Tensor, *, token_mask: Tensor | None = None, return_routing: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, *, token_mask: Tensor | None = None, return_routing: Literal[True]
    ) -> tuple[Tensor, Routing]: ...

    @overload
    def forward(
        self, x: Tensor, *, token_mask: Tensor | None = None, return_routing: bool
    ) -> Tensor | tuple[Tensor, Routing]: ...

    def forward(
        self, x: Tensor, *, token_mask: Tensor | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """Apply the layer to every token of ``x``.

        Parameters
        ----------
        x : Tensor
            ``[..., H]``, in the dtype of the weights: float32, bfloat16, float16 or float64; any under autocast.
        token_mask : Tensor, optional
            bool ``[...]``, the leading shape of x. A token with False, such as padding, goes to no routed expert and
            enters no statistic and no loss; its output is 0, plus the shared expert's.
        return_routing : bool, default False
            Also return the routing, for losses and statistics. To collect it from all layers of a model, see
            :class:`~dynamic_moe.collect_routing`.

        Returns
        -------
        Tensor, or (Tensor, Routing)
            ``[..., H]`` in the dtype of x (of autocast, under autocast).

        Raises
        ------
        ValueError
            If x is not a dense tensor, its width or dtype or the mask does not fit, or the router returns something
            else than a routing over E experts, or the experts something else than ``[T, H]``.
        """
        x_TH = flatten_tokens(x, self.hidden_size)
        routing: Routing = self.router(x_TH, flatten_mask(token_mask, x))
        if not isinstance(routing, Routing) or routing.tokens_per_expert.shape[0] != self.num_experts:
            _refuse_routing(routing, self.num_experts)
        record_routing(self, routing)
        y_TH: Tensor = self.experts(x_TH, routing.expert_ids, routing.expert_weights)
        if not isinstance(y_TH, Tensor) or y_TH.shape != x_TH.shape:
            _refuse_output(y_TH, x_TH)
        if self.shared_expert is not None:
            y_TH = y_TH + self.shared_expert(x_TH)
        y = y_TH.reshape(x.shape)
        return (y, mark_missing_gradient(self, routing)) if return_routing else y

    def extra_repr(self) -> str:
        """Sizes."""
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"num_experts={self.num_experts}"
        )


def _check_part(
    role: str, part: nn.Module, arguments: tuple[str, ...], result: str, hidden_size: int, num_experts: int
) -> None:
    """Raise a ValueError unless a router or experts are a module that can be called so, made for these sizes."""
    if isinstance(part, type):
        name = part.__name__
        raise ValueError(f"{role} must be a module, got the class {name}: pass an instance, {name}(...)")
    if not isinstance(part, nn.Module):
        raise ValueError(f"{role} must be a torch.nn.Module that returns {result}, got {type(part).__name__}")
    try:
        inspect.signature(part.forward).bind(*arguments)
    except TypeError:
        raise ValueError(
            f"{role} must take ({', '.join(arguments)}) and return {result}, got {type(part).__name__} with "
            f"forward{inspect.signature(part.forward)}"
        ) from None
    except ValueError:  # the signature is not known, as of scripted modules
        pass
    for name, expected in (("hidden_size", hidden_size), ("num_experts", num_experts)):
        value = getattr(part, name, expected)
        if value != expected:
            were = "were" if role == "experts" else "was"
            raise ValueError(f"{role} {were} built with {name}={value}, but the layer has {name}={expected}")


def _refuse_routing(routing: object, num_experts: int) -> None:
    if not isinstance(routing, Routing):
        raise ValueError(
            f"router must return a dynamic_moe.Routing, got {type(routing).__name__}: Routing.from_selection makes one"
        )
    raise ValueError(
        f"router must return a Routing over num_experts={num_experts}, got one over {routing.num_experts} experts"
    )


def _refuse_output(y_TH: object, x_TH: Tensor) -> None:
    got = list(y_TH.shape) if isinstance(y_TH, Tensor) else type(y_TH).__name__
    raise ValueError(f"experts must return a Tensor of the shape of x, {list(x_TH.shape)}, got {got}")
