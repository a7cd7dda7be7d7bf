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
    "_gpu_record": set(),
    "info": {"_C", "_gpu_record"},
    "ops": {"_C", "_checks", "_gpu_record"},
    "float32_linear": {"ops"},
    "reference": {"_checks", "ops"},
    "routing": {"_checks", "ops"},
    "losses": {"routing"},
    "collect": {"ops", "routing"},
    "routers": {"_checks", "float32_linear", "ops", "routing"},
    "experts": {"_checks", "float32_linear", "ops"},
    "layer": {"_checks", "collect", "experts", "routers", "routing"},
    "integrations": {"_checks", "layer", "ops", "routers", "routing"},
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
    assert users == {
        "common",
        "bindings",
        "float32_linear",
        "gating",
        "permutation",
    }  # products of float32 need no tiles
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


# Names with an underscore that the package uses and does not define, outside ops/_torch_private.py.
PRIVATE_NAMES_ALLOWED = {
    "_apply_gate",  # transformers': the experts that it lets a class of its own exchange
    "_fields",  # of named tuples: documented
    "_getframe",  # of sys: documented
    "_make",  # of named tuples: documented
    "_replace",  # of named tuples: documented
    "_version",  # of tensors: what autograd counts changes by; without it prepack() fails at once, and nothing else
}


def private_names_of_torch(source: str) -> Iterator[str]:
    """Private modules and names that a file takes from torch."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        yield from (name for name in names if re.match(r"torch\.(.*\.)?_(?!_)", name))


def private_attributes(source: str) -> set[str]:
    """Attributes with an underscore that a file reads, of whatever objects."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if re.match(r"_(?!_|dynamic_moe)", node.attr)}


def defined_names(source: str) -> Iterator[str]:
    """Names and attributes that a file gives a value."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def test_private_names_of_torch_are_in_one_file() -> None:
    package = {path: path.read_text() for path in (ROOT / "dynamic_moe").rglob("*.py")}
    others = {path: text for path, text in package.items() if path.name != "_torch_private.py"}
    assert {path: names for path, text in others.items() if (names := list(private_names_of_torch(text)))} == {}
    known = {name for text in package.values() for name in defined_names(text)} | {path.stem for path in package}
    assert {name for text in others.values() for name in private_attributes(text)} - known == PRIVATE_NAMES_ALLOWED
    code = "import torch._ops\nfrom torch._C import a\nfrom torch.autograd import _b\ntorch._C._x()\ntorch.a.b\n"
    assert {"torch._ops", "torch._C.a", "torch.autograd._b", "torch._C._x"} <= set(private_names_of_torch(code))
    assert "torch.a.b" not in set(private_names_of_torch(code))


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
    helpers = {"_checks", "_gpu_record", "float32_linear"}
    tables = {f"csrc/{part}": uses for part, uses in CSRC.items() if part != "bindings"}
    tables |= {f"dynamic_moe/{part}": uses - helpers for part, uses in PACKAGE.items() if part not in helpers | {"_C"}}
    said = {}
    for row in re.findall(r"^\| (`.*) \|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE):
        parts, _, uses = row.split("|")
        for part in re.findall(r"`((?:csrc|dynamic_moe)/\w+)(?:\.py)?`", parts):
            said[part] = {word.partition(".")[0] for word in re.findall(r"`([\w.]+)`", uses)}
    assert said.pop("csrc/bindings") == {"csrc"}
    assert said == tables


def test_the_glossary_is_short() -> None:
    glossary = (ROOT / "docs" / "architecture.md").read_text().partition("\n## Glossary\n")[2]
    terms = re.findall(r"^- \*\*([\w -]+)\*\*: ((?:.|\n  )+)$", glossary, re.MULTILINE)
    assert 20 <= len(terms) <= 30
    assert [term for term, meaning in terms if meaning.count(".") != 1] == []  # one sentence each
