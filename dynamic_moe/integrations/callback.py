# SPDX-License-Identifier: Apache-2.0
"""Logs what routers do while transformers' Trainer trains, to wherever ``report_to`` says."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from dynamic_moe.integrations.routers import convention_of
from dynamic_moe.layer import DynamicMoE
from dynamic_moe.routing import Routing


class RoutingStatisticsCallback(TrainerCallback):
    """Adds routing statistics to the training logs of a Trainer.

    ::

        trainer = Trainer(model, args, train_dataset=data)
        RoutingStatisticsCallback().attach(trainer)
        trainer.train()

    Every router adds to sums that stay on its device. They are read, once and for all layers together, when the
    Trainer logs: no step waits for the device. Figures are means since the last log, over the training tokens that this
    process saw. Padding counts where the model does not tell its routers of it, as Hugging Face models do not.

    ==============================  ====================================================================================
    ``routing/experts_per_token``   mean over tokens, and over layers
    ``routing/entropy``             of the router's probabilities, in nats; mean over tokens, and over layers
    ``routing/load_imbalance``      rows of the busiest expert divided by the mean over experts; mean over layers
    ==============================  ====================================================================================

    Parameters
    ----------
    per_layer : bool, default False
        Also log each figure for each router, as ``routing/<figure>/<name of the router>``.
    """

    def __init__(self, per_layer: bool = False) -> None:
        self.per_layer = per_layer
        self._sums: dict[str, _Sums] = {}
        self._hooks: list[Any] = []

    def attach(self, trainer: Any) -> Self:
        """Put this callback before those of ``report_to``: they log what it adds.

        Parameters
        ----------
        trainer : Trainer
            ``callbacks=[...]`` would put it behind them.

        Returns
        -------
        RoutingStatisticsCallback
            This callback.
        """
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Watch the routers of the model.

        Raises
        ------
        ValueError
            If it has none that we know.
        """
        self._remove_hooks()  # of a training that was interrupted
        self._sums = {}
        for name, router in watched_routers(model).items():
            sums = self._sums[name] = _Sums()
            self._hooks.append(router.register_forward_hook(sums.add))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the statistics to a training log, and start anew."""
        if logs is None or "loss" not in logs or not self._hooks:
            return
        figures = self._read()
        logs.update(figures)
        if state.log_history:  # its entry was copied from the logs before the callbacks were asked
            state.log_history[-1].update(figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the routers alone."""
        self._remove_hooks()

    def _read(self) -> dict[str, float]:
        measured = {name: sums.take() for name, sums in self._sums.items() if sums.values is not None}
        if not measured:
            return {}
        device = next(iter(measured.values())).device
        rows = torch.stack([values.to(device) for values in measured.values()]).tolist()  # the only wait
        names = ("experts_per_token", "entropy", "load_imbalance")
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        figures = {f"routing/{name}": mean for name, mean in zip(names, means, strict=True)}
        if self.per_layer:
            for router, row in zip(measured, rows, strict=True):
                figures |= {f"routing/{name}/{router}": value for name, value in zip(names, row, strict=True)}
        return figures

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def watched_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of :class:`~dynamic_moe.DynamicMoE` layers and the Hugging Face routers that we know, by name.

    Raises
    ------
    ValueError
        If there is none.
    """
    own = {layer.router for layer in model.modules() if isinstance(layer, DynamicMoE)}
    routers = {name: m for name, m in model.named_modules() if m in own or convention_of(m) is not None}
    if not routers:
        raise ValueError(f"model must have DynamicMoE layers or routers of a known kind, got {type(model).__name__}")
    return routers


class _Sums:
    """Sums over the tokens of one router, float64 ``[E + 2]``: rows of each expert, tokens, entropy."""

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def add(self, router: Any, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook. Does not wait for the device."""
        if not router.training:
            return
        with torch.no_grad():
            rows_E, tokens, entropy = (
                _from_routing(output) if isinstance(output, Routing) else _from_tuple(router, output)
            )
            new = torch.cat([rows_E.double(), tokens.double().reshape(1), entropy.double().reshape(1)])
            self.values = new if self.values is None else self.values + new

    def take(self) -> Tensor:
        """``[3]``: the figures; the sums start anew."""
        assert self.values is not None
        rows_E, tokens, entropy = self.values[:-2], self.values[-2].clamp(min=1), self.values[-1]
        self.values = None
        total = rows_E.sum()
        imbalance = rows_E.max() * rows_E.shape[0] / total.clamp(min=1)
        return torch.stack([total / tokens, entropy / tokens, imbalance])


def _from_routing(routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    if routing.scores is None:  # no softmax, so no entropy
        return routing.tokens_per_expert, routing.num_tokens, routing.expert_weights.new_full((), torch.nan)
    return routing.tokens_per_expert, routing.num_tokens, routing.scores.entropy.sum()


def _from_tuple(router: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    logits_TE, _, ids_TK = output
    num_tokens, num_experts = logits_TE.shape
    # An unused slot holds E, or the id of the first slot where what runs the experts knows no unused slots.
    ids_TK = torch.cat([ids_TK[:, :1], ids_TK[:, 1:].masked_fill(ids_TK[:, 1:] == ids_TK[:, :1], num_experts)], dim=1)
    ids = ids_TK.reshape(-1)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add(0, ids, torch.ones_like(ids))[:num_experts]  # the last one: unused slots
    convention = convention_of(router)
    logits_TE = logits_TE.float()
    if convention is not None and convention.mass == "selected":
        logits_TE = nn.functional.logsigmoid(logits_TE)  # softmax of this: each sigmoid's share
    log_TE = logits_TE.log_softmax(-1)
    entropy = -(log_TE.exp() * log_TE).sum()
    return counts, logits_TE.new_full((), num_tokens), entropy
