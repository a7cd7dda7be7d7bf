# SPDX-License-Identifier: Apache-2.0
"""The color scale of the report: one expert to many, on a light and on a dark page."""

from collections.abc import Sequence

# The lightness falls (rises) evenly, so that the scale can be read without color vision too.
LIGHT_SCALE = ("#fff6e0", "#fedd9a", "#fdb768", "#f58a51", "#dd5a55", "#b23472", "#7a1f7e", "#431473")
DARK_SCALE = ("#1d1930", "#3c1d5c", "#65207a", "#932b80", "#c43c75", "#ec6360", "#fba465", "#fdebac")
LEVELS = len(LIGHT_SCALE)
INKS = ("#14161b", "#ffffff")


def level_of(value: float, low: float, high: float) -> int:
    """Return the step of the scale for a value, where ``low`` is the first step and ``high`` the last."""
    return max(0, min(LEVELS - 1, round((value - low) / (high - low) * (LEVELS - 1))))


def scale_css() -> str:
    """Return the style rules of the scale: fills, backgrounds, and an ink that can be read on each."""
    return f"{_rules(LIGHT_SCALE)}\n@media (prefers-color-scheme: dark) {{\n{_rules(DARK_SCALE)}\n}}"


def _rules(scale: Sequence[str]) -> str:
    lines = []
    for level, color in enumerate(scale):
        ink = readable_ink(color)
        lines.append(f".fill{level} {{ fill: {color}; }} .back{level} {{ background: {color}; }}")
        lines.append(f".ink{level} {{ color: {ink}; }} .chart .ink{level} {{ fill: {ink}; }}")
    return "\n".join(lines)


def readable_ink(color: str) -> str:
    """Return the darker or the lighter ink, whichever stands out more on a color ``#rrggbb``."""
    return max(INKS, key=lambda ink: contrast(ink, color))


def contrast(first: str, second: str) -> float:
    """Return the contrast ratio of two colors as the Web Content Accessibility Guidelines define it, 1 to 21."""
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
