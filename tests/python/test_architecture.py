# SPDX-License-Identifier: Apache-2.0
"""Imports point downwards only, and docs/architecture.md names every part."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import ROOT, Document

pytestmark = pytest.mark.level_independent

# What each part may use of the others. A part may only use parts above it, so there is no circle.
CSRC = {
    "common": set(),
    "float32_linear": {"common"},
    "gating": {"common"},
    "permutation": {"common"},
    "grouped_matmul": {"common"},
    "expert_mlp": {"common", "grouped_matmul", "permutation"},
    "bindings": {"common", "float32_linear", "gating", "permutation", "grouped_matmul", "expert_mlp"},
}
PACKAGE = {
    "_C": set(),
    "_checks": set(),
    "info": {"_C"},
    "ops": {"_C"},
    "float32_linear": {"ops"},
    "reference": {"ops"},
    "routing": {"_checks", "ops"},
    "losses": {"routing"},
    "collect": {"routing"},
    "routers": {"_checks", "float32_linear", "ops", "routing"},
    "experts": {"_checks", "float32_linear", "ops"},
    "layer": {"_checks", "collect", "experts", "routers", "routing"},
    "integrations": {"layer", "ops", "routers", "routing"},
    "models": {"collect", "experts", "integrations", "layer", "losses", "routers", "routing"},
    "convert": {"integrations", "models"},
}


def included(path: Path) -> list[str]:
    """What a C++ file includes, ``"common/types.h"`` or ``<vector>``, without the quotes."""
    return re.findall(r'^\s*#include ["<](.+)[">]', path.read_text(), re.MULTILINE)


def imported(source: str) -> Iterator[str]:
    """Parts of the package that a Python file imports, also within functions and for types alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield "a relative import"
        elif isinstance(node, ast.ImportFrom) and node.module == "dynamic_moe":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from part_of(node.module or "")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield from part_of(alias.name)


def part_of(module: str) -> list[str]:
    parts = module.split(".")
    return ([*parts, "all of it"][1:2]) if parts[0] == "dynamic_moe" else []


@pytest.mark.parametrize("parts", [CSRC, PACKAGE], ids=["csrc", "package"])
def test_the_tables_have_no_circle(parts: dict[str, set[str]]) -> None:
    seen: set[str] = set()
    for part, uses in parts.items():
        assert uses <= seen, part
        seen.add(part)


def test_the_tables_name_every_part() -> None:
    assert set(CSRC) == {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    paths = (ROOT / "dynamic_moe").iterdir()
    found = {path.name.partition(".")[0] for path in paths if path.suffix in {"", ".py", ".pyi"}}
    assert set(PACKAGE) == found - {"__init__", "__pycache__", "py"}


@pytest.mark.parametrize("part", CSRC)
def test_includes_point_downwards(part: str) -> None:
    files = [path for path in (ROOT / "csrc" / part).rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert files
    for path in files:
        used = {name.partition("/")[0] for name in included(path)} & set(CSRC)
        assert used <= CSRC[part] | {part}, path


def test_torch_and_python_stay_in_the_bindings() -> None:
    files = {path: included(path) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    users = {
        path.parent.name
        for path, names in files.items()
        if any(re.match(r"torch/|pybind11/|c10/|ATen/|Python\.h", name) for name in names)
    }
    assert users == {"bindings"}


def test_products_choose_their_level_by_dtype_and_one_file_asks_for_tiles() -> None:
    """``isa_for`` falls back where tiles are refused; a dispatcher that asks for the level alone would not."""
    sources = {path: path.read_text() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    users = {path.parent.name for path, text in sources.items() if re.search(r"\bcurrent_isa\(", text)}
    assert users == {"common", "bindings", "gating", "permutation"}
    assert {path.parent.name for path, text in sources.items() if "isa_for(" in text} == {
        *("common", "bindings", "grouped_matmul", "expert_mlp")
    }
    assert [path.name for path, text in sources.items() if "SYS_arch_prctl" in text] == ["tile_permission.cpp"]


def test_no_source_file_is_included() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert not [name for name in included(path) if name.endswith(".cpp")], path


@pytest.mark.parametrize("part", [part for part in PACKAGE if part != "_C"])
def test_imports_point_downwards(part: str) -> None:
    place = ROOT / "dynamic_moe" / part
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    for path in files:
        assert set(imported(path.read_text())) <= PACKAGE[part] | {part}, path


def test_an_import_upwards_is_noticed() -> None:
    code = [
        "def f():",
        "    from dynamic_moe import layer",
        "import dynamic_moe.ops._gating as g",
        "from .routing import Routing",
    ]
    assert set(imported("\n".join(code))) == {"layer", "ops", "a relative import"}
    assert set(imported("import dynamic_moe\nimport torch\n")) == {"all of it"}


def test_the_page_names_every_part() -> None:
    words = set(Document(ROOT / "docs" / "architecture.md").code_words())
    wanted = {f"csrc/{part}" for part in CSRC}
    folders = {part for part in PACKAGE if (ROOT / "dynamic_moe" / part).is_dir()}
    wanted |= {
        f"dynamic_moe/{part}" if part in folders else f"dynamic_moe/{part}.py" for part in PACKAGE if part != "_C"
    }
    assert wanted - words == set()


def test_the_page_says_who_may_use_whom() -> None:
    helpers = {"_checks", "float32_linear"}
    tables = {f"csrc/{part}": uses for part, uses in CSRC.items() if part != "bindings"}
    tables |= {f"dynamic_moe/{part}": uses - helpers for part, uses in PACKAGE.items() if part not in helpers | {"_C"}}
    said = {}
    for row in re.findall(r"^\| (`.*) \|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE):
        parts, _, uses = row.split("|")
        for part in re.findall(r"`((?:csrc|dynamic_moe)/\w+)(?:\.py)?`", parts):
            said[part] = {word.partition(".")[0] for word in re.findall(r"`([\w.]+)`", uses)}
    assert said.pop("csrc/bindings") == {"csrc"}
    assert said == tables
