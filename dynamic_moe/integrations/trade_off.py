# SPDX-License-Identifier: Apache-2.0
"""The loss of a model against its experts per token: by top-p, and by fixed numbers of experts, side by side."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike

from torch import nn

from dynamic_moe.integrations._requirements import require
from dynamic_moe.integrations.calibration import Batch, Calibration, calibrate_top_p, evaluate_top_p
from dynamic_moe.integrations.routers import cap_of, find_routers


@dataclass(frozen=True)
class TradeOff:
    """Measurements, in order of experts per token.

    Attributes
    ----------
    top_k : list of Calibration
        With 1, 2, ..., k experts for every token.
    top_p : list of Calibration
        With a p for each layer, calibrated to the targets.
    """

    top_k: list[Calibration]
    top_p: list[Calibration]

    def table(self) -> str:
        """A Markdown table."""
        lines = ["| routing | p (lowest to highest layer) | experts per token | loss |", "|---|---|---|---|"]
        for rule, points in (("top-k", self.top_k), ("top-p", self.top_p)):
            for point in points:
                ps = point.p.values()
                span = "" if rule == "top-k" else f"{min(ps):.3f} to {max(ps):.3f}"
                lines.append(f"| {rule} | {span} | {point.mean_experts_per_token:.2f} | {point.loss:.4f} |")
        return "\n".join(lines)

    def plot(self, path: str | PathLike[str]) -> None:
        """Write the two curves to an image file, in the format that its name ends in.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        figure = require("matplotlib.figure", "TradeOff.plot").Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for label, points, marker in (("fixed top-k", self.top_k, "s"), ("top-p", self.top_p, "o")):
            axes.plot([x.mean_experts_per_token for x in points], [x.loss for x in points], marker=marker, label=label)
        axes.set_xlabel("experts per token (mean over layers)")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=150)


def top_p_trade_off(
    model: nn.Module, data: Iterable[Batch], targets: Sequence[float] | None = None, *, per_layer: bool = True
) -> TradeOff:
    """Measure the loss at several mean numbers of experts per token; the model is left as it was.

    Parameters
    ----------
    model, data, per_layer
        As in :func:`calibrate_top_p`.
    targets : sequence of float, optional
        Mean numbers of experts, in [1, k]. Default: from 1 to k in steps of 0.5.

    Returns
    -------
    TradeOff
        Top-p at the targets, and top-1 to top-k to compare with.

    Raises
    ------
    ValueError
        As in :func:`calibrate_top_p`.
    """
    k = min(cap_of(router) for router in find_routers(model).values())
    if targets is None:
        targets = [1.0 + step / 2 for step in range(2 * k - 1)]
    batches = list(data) if isinstance(data, Iterator) else data
    return TradeOff(
        top_k=[evaluate_top_p(model, batches, 1.0, max_experts=count) for count in range(1, k + 1)],
        top_p=[calibrate_top_p(model, batches, target, per_layer=per_layer) for target in sorted(targets)],
    )
