# SPDX-License-Identifier: Apache-2.0
"""Finds the p of each layer for a wanted mean number of experts per token, and what that does to the loss."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from dynamic_moe.integrations.routers import cap_of, cumulative_mass, find_routers
from dynamic_moe.integrations.top_p import set_top_p

Batch = Tensor | Mapping[str, Any]


@dataclass(frozen=True)
class Calibration:
    """A p for each router, and what was measured with it.

    Attributes
    ----------
    p : dict of str to float
        By the name of the router, in the order of the model.
    experts_per_token : dict of str to float
        Mean over the tokens of the data.
    loss : float
        Mean cross-entropy of the next token, in nats.
    """

    p: dict[str, float]
    experts_per_token: dict[str, float]
    loss: float

    @property
    def mean_experts_per_token(self) -> float:
        """Mean over tokens and layers."""
        return sum(self.experts_per_token.values()) / len(self.experts_per_token)


def calibrate_top_p(
    model: nn.Module,
    data: Iterable[Batch],
    target_experts: float | Sequence[float],
    *,
    max_experts: int | None = None,
    per_layer: bool = True,
    tolerance: float = 0.02,
    max_passes: int = 4,
) -> Calibration:
    """Find the p with which tokens get ``target_experts`` experts on average; the model is left as it was.

    A pass over the data gives the mass of every token's best 1, 2, ... experts in each layer, and with it, exactly, the
    p for which the mean is the target. Fewer experts change what later layers see, so passes are repeated with the p
    found until the mean of every layer (of the model, without ``per_layer``) is within the tolerance. Nothing is drawn
    at random.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model; see :class:`set_top_p` for which.
    data : iterable of batches
        ``input_ids [B, S]``, or dicts of the model's arguments. Tokens with 0 in ``attention_mask`` do not count.
        Labels default to the inputs. An iterator is kept in memory, for it is read several times.
    target_experts : float or sequence of float
        Mean experts per token, in [1, K]; one for all layers or, with ``per_layer``, one for each.
    max_experts : int, optional
        K; default: the k of the model.
    per_layer : bool, default True
        Give each layer a p of its own, so that each meets the target. Otherwise one p for all: then the mean over
        layers meets it, and layers may differ.
    tolerance : float, default 0.02
        How far the measured mean may be off, in experts.
    max_passes : int, default 4
        Most corrections of p. The closest result is returned, with what was measured: where many tokens have the very
        same probabilities, no p may meet the target.

    Returns
    -------
    Calibration
        ``set_top_p(model, [*calibration.p.values()])`` applies it.

    Raises
    ------
    ValueError
        If a target or a bound is out of range, or there are no data.
    """
    routers = find_routers(model)
    caps = [max_experts or cap_of(router) for router in routers.values()]
    targets = _targets(target_experts, caps, per_layer)
    if max_passes < 1:
        raise ValueError(f"max_passes must be at least 1, got {max_passes}")
    batches = list(data) if isinstance(data, Iterator) else data
    ps = [1.0] * len(routers)
    masses = _measure(model, batches, routers, ps, max_experts, caps).masses
    best: tuple[float, Calibration] | None = None
    for _ in range(max_passes):
        ps = _solve(masses, targets, per_layer)
        measured = _measure(model, batches, routers, ps, max_experts, caps)
        means = [_mean_experts(mass, p) for mass, p in zip(measured.masses, ps, strict=True)]
        found = Calibration(
            p=dict(zip(routers, ps, strict=True)),
            experts_per_token=dict(zip(routers, means, strict=True)),
            loss=measured.loss,
        )
        if per_layer:
            off = max(abs(mean - target) for mean, target in zip(means, targets, strict=True))
        else:
            off = abs(found.mean_experts_per_token - targets[0])
        if best is None or off < best[0]:
            best = (off, found)
        if off <= tolerance:
            break
        masses = measured.masses
    assert best is not None
    return best[1]


def evaluate_top_p(
    model: nn.Module, data: Iterable[Batch], p: float | Sequence[float], *, max_experts: int | None = None
) -> Calibration:
    """Measure experts per token and loss for given p; arguments as in `set_top_p` and `calibrate_top_p`."""
    routers = find_routers(model)
    ps = [float(p)] * len(routers) if isinstance(p, int | float) else list(p)
    caps = [max_experts or cap_of(router) for router in routers.values()]
    measured = _measure(model, data, routers, ps, max_experts, caps)
    means = [_mean_experts(mass, value) for mass, value in zip(measured.masses, ps, strict=True)]
    return Calibration(dict(zip(routers, ps, strict=True)), dict(zip(routers, means, strict=True)), measured.loss)


@dataclass
class _Measurement:
    masses: list[Tensor]  # of each router, [T, K - 1] on the CPU: what its tokens' best 1, ..., K - 1 experts have
    loss: float


def _targets(target: float | Sequence[float], caps: list[int], per_layer: bool) -> list[float]:
    targets = [float(target)] * len(caps) if isinstance(target, int | float) else [float(value) for value in target]
    if len(targets) != len(caps):
        raise ValueError(f"target_experts must be one number or {len(caps)}, one for each router, got {len(targets)}")
    if not per_layer and len(set(targets)) > 1:
        raise ValueError("target_experts must be one number where per_layer is False, got several")
    for value, cap in zip(targets, caps, strict=True):
        if not 1.0 <= value <= cap:
            raise ValueError(f"target_experts must be in [1, {cap}], got {value!r}")
    return targets


def _measure(
    model: Any,
    data: Iterable[Batch],
    routers: dict[str, nn.Module],
    ps: list[float],
    max_experts: int | None,
    caps: list[int],
) -> _Measurement:
    """Run all data once with these p."""
    masses: list[list[Tensor]] = [[] for _ in routers]
    kept: list[Tensor | None] = [None]  # the tokens of the running batch that count, [T]
    loss_sum, num_labels = 0.0, 0

    def watch(layer: int, cap: int) -> Any:
        def hook(router: Any, args: tuple[Any, ...], output: Any) -> None:
            mass = cumulative_mass(router, args[0], cap)[:, : cap - 1]
            mask = kept[0]
            masses[layer].append((mass if mask is None else mass[mask.to(mass.device)]).float().cpu())

        return hook

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_evaluating(model))
        stack.enter_context(set_top_p(model, ps, max_experts=max_experts))
        for layer, (router, cap) in enumerate(zip(routers.values(), caps, strict=True)):
            stack.callback(router.register_forward_hook(watch(layer, cap)).remove)
        for batch in logging.tqdm(data, desc="Routing", unit="batch"):
            inputs, labels = _inputs(model, batch)
            mask = inputs.get("attention_mask")
            kept[0] = None if mask is None or mask.dim() != 2 else mask.reshape(-1).bool()
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            wanted = labels[:, 1:].to(logits.device)
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="sum")
            loss_sum += loss.item()
            num_labels += int((wanted != -100).sum())
    if num_labels == 0:
        raise ValueError("data must hold at least one token to predict, got none")
    return _Measurement([torch.cat(mass) for mass in masses], loss_sum / num_labels)


def _inputs(model: Any, batch: Batch) -> tuple[dict[str, Any], Tensor]:
    """The model's arguments on its device, and the labels, -100 where there is nothing to predict."""
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    inputs = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    labels = inputs.pop("labels", None)
    if labels is None:
        labels = inputs["input_ids"]
        if inputs.get("attention_mask") is not None:
            labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs, labels


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _mean_experts(masses: Tensor, p: float) -> float:
    """Mean over tokens of the fewest experts that reach p."""
    return 1.0 + (masses < p).sum().item() / max(1, masses.shape[0])


def _solve(masses: list[Tensor], targets: list[float], per_layer: bool) -> list[float]:
    if per_layer:
        return [_threshold(mass, target) for mass, target in zip(masses, targets, strict=True)]
    # Layers have the same tokens, so that one mean over all of them is the mean over layers.
    rows = sum(mass.shape[0] for mass in masses) / len(masses)
    values = torch.cat([mass.flatten() for mass in masses])
    p = _quantile(values, round((targets[0] - 1.0) * rows * len(masses)))
    return [p] * len(masses)


def _threshold(masses: Tensor, target: float) -> float:
    return _quantile(masses.flatten(), round((target - 1.0) * masses.shape[0]))


def _quantile(values: Tensor, below: int) -> float:
    """A p in (0, 1] with ``below`` of the values under it, half way to the next one."""
    if below >= values.numel():
        return 1.0
    values = values.double()
    after = values.kthvalue(below + 1).values.item()
    before = values.kthvalue(below).values.item() if below > 0 else 0.0
    return min(1.0, max((before + after) / 2, 1e-9))
