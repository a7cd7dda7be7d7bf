# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models on our kernels.

Importing this package registers ``experts_implementation="dynamic_moe"``, and has models that are built from now on
route by the p that :func:`set_top_p` left in their configuration. It needs transformers 5; ``import dynamic_moe`` alone
does not import it.
"""

from dynamic_moe.integrations._requirements import require, warn_if_untested

warn_if_untested(require("transformers", "dynamic_moe.integrations").__version__)

from dynamic_moe.integrations.calibration import Calibration, calibrate_top_p, evaluate_top_p  # noqa: E402
from dynamic_moe.integrations.callback import RoutingStatisticsCallback  # noqa: E402
from dynamic_moe.integrations.experts import register  # noqa: E402
from dynamic_moe.integrations.top_p import set_top_p, unset_top_p  # noqa: E402
from dynamic_moe.integrations.trade_off import TradeOff, top_p_trade_off  # noqa: E402

register()

__all__ = [
    "Calibration",
    "RoutingStatisticsCallback",
    "TradeOff",
    "calibrate_top_p",
    "evaluate_top_p",
    "register",
    "set_top_p",
    "top_p_trade_off",
    "unset_top_p",
]
