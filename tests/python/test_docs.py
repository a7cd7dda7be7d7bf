# SPDX-License-Identifier: Apache-2.0
"""The documents do not rot: their links resolve, what they name exists, and the example of CONTRIBUTING.md runs."""

import json
import re
import struct
import sys
import types
import xml.etree.ElementTree as ElementTree
from dataclasses import fields
from pathlib import Path

import pytest
from documents import ROOT, Document, documents

import dynamic_moe
from byte_lm.settings import Settings

pytestmark = pytest.mark.level_independent

FOLDERS = "build_support|benchmarks|cmake|csrc|docs|dynamic_moe|examples|requirements|tests"
# How a program is called, and the file that defines its options.
PROGRAMS = {
    r"make demo|examples/train_lm\.py": "examples/byte_lm/settings.py",
    r"make test|tests/run_all\.py": "tests/run_all.py",
    r"make bench|python -m benchmarks(?!\.)": "benchmarks/cli.py",
    r"python -m benchmarks\.report": "benchmarks/report.py",
    r"python -m dynamic_moe\.info": "dynamic_moe/info.py",
    r"examples/top_p_trade_off\.py": "examples/top_p_trade_off.py",
    r"examples/reproduce/run\.py": "examples/reproduce/run.py",
    r"tests/mutation/run\.py": "tests/mutation/run.py",
}


@pytest.fixture(params=documents(), ids=lambda document: str(document.path.relative_to(ROOT)))
def document(request: pytest.FixtureRequest) -> Document:
    found: Document = request.param
    return found


def broken_links(document: Document) -> list[str]:
    broken = []
    for link in document.links():
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = document.path.parent / name if name else document.path
        if not target.exists() or (anchor and anchor not in Document(target).anchors()):
            broken.append(link)
    return broken


def missing_files(document: Document) -> list[str]:
    """Files in code type that do not exist. ``csrc/<name>/<name>.h`` is fine if some file is called so."""
    missing = []
    for word in document.code_words():
        match = re.fullmatch(rf"((?:{FOLDERS})/[\w./*<>-]*)", word)
        if match and not any(ROOT.glob(re.sub(r"<\w+>", "*", match[1].rstrip("/")))):
            missing.append(word)
    return missing


def unknown_to_make(document: Document) -> set[str]:
    makefile = (ROOT / "Makefile").read_text()
    known = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    known |= set(re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE))
    commands = [command for command in document.commands() if re.match(r"make\b", command)]
    return {
        word
        for command in commands
        for word in re.findall(r"^make ([\w-]+)|\b([A-Z_]+)=", command)
        for word in word
        if word
    } - known


def unknown_presets(document: Document) -> set[str]:
    presets = json.loads((ROOT / "CMakePresets.json").read_text())
    unknown = set()
    for kind, program in {"configure": "cmake", "build": "cmake --build", "test": "ctest"}.items():
        known = {preset["name"] for preset in presets[f"{kind}Presets"] if not preset.get("hidden")}
        for command in document.commands():
            unknown |= set(re.findall(rf"\b{program} --preset (\S+)", command)) - known
    return unknown


def options_of(file: str) -> set[str]:
    """The options of one of our programs."""
    if file == "examples/byte_lm/settings.py":
        return {f"--{field.name.replace('_', '-')}" for field in fields(Settings)} | {"--help"}
    return set(re.findall(r'add_argument\("(--[a-z-]+)"', (ROOT / file).read_text())) | {"--help"}


def wrong_commands(document: Document) -> list[str]:
    """Commands that run a file that is not there, or give one of our programs an option that it does not have."""
    wrong = []
    for command in document.commands():
        script = re.search(r"python[\d.]* ([\w/]+\.py)", command)
        if script and not (ROOT / script[1]).exists():
            wrong.append(command)
        files = [file for pattern, file in PROGRAMS.items() if re.search(pattern, command)]
        options = re.findall(r"(?<![\w-])--[a-z-]+", command)
        if files and set(options) - options_of(files[0]):
            wrong.append(command)
    return wrong


def test_every_document_is_looked_at() -> None:
    names = {str(each.path.relative_to(ROOT)) for each in documents()}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md", "benchmarks/README.md"} <= names
    assert "benchmarks/results/README.md" in names


def test_links_resolve(document: Document) -> None:
    assert broken_links(document) == []


def test_files_that_are_named_exist(document: Document) -> None:
    assert missing_files(document) == []


def test_commands_can_be_typed(document: Document) -> None:
    assert unknown_to_make(document) == set()
    assert unknown_presets(document) == set()
    assert wrong_commands(document) == []


ROTTEN = """# A heading
[gone](gone.md), [no such part](#another-heading), [fine](#a-heading), [fine](https://example.org)
`csrc/gone/gone.h`, `csrc/<name>/<name>.h`, `make everything`, `make demo DEMO_ARGS="--minuts 1"`, `make demo SPEED=2`
```sh
cmake --preset fast && ctest --preset release  # make nothing
python tests/gone.py
python -m benchmarks --quick
```
"""


def test_rot_is_noticed(tmp_path: Path) -> None:
    rotten = Document(tmp_path / "rotten.md")
    rotten.path.write_text(ROTTEN)
    assert broken_links(rotten) == ["gone.md", "#another-heading"]
    assert missing_files(rotten) == ["csrc/gone/gone.h"]
    assert unknown_to_make(rotten) == {"everything", "SPEED"}
    assert unknown_presets(rotten) == {"fast"}
    assert wrong_commands(rotten) == ["python tests/gone.py", 'make demo DEMO_ARGS="--minuts 1"']


def test_a_make_command_for_every_target_is_known_to_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)) == set(phony.split())


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.svg")), ids=lambda path: path.name)
def test_figures_are_drawn_for_light_and_dark_pages(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    names = {element.tag.partition("}")[2] for element in root.iter()}
    assert root.get("viewBox")
    assert "script" not in names
    if "Matplotlib" in path.read_text():  # a plot brings its white paper with it
        assert "fill: #ffffff" in path.read_text()
    else:
        assert {"title", "desc", "style"} <= names
        assert "prefers-color-scheme: dark" in path.read_text()


def test_pictures_are_small_enough_for_a_page() -> None:
    for path in (ROOT / "docs").rglob("*.png"):
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n", path
        width, _ = struct.unpack(">II", content[16:24])
        assert 600 <= width <= 3000, path
        assert len(content) < 1 << 20, path


def test_the_example_of_contributing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    contributing = Document(ROOT / "CONTRIBUTING.md")
    source, tests = contributing.blocks("python")
    name = source.comment.removeprefix("runs as: ")
    assert name == "dynamic_moe.routers.min_p"
    module = types.ModuleType(name)
    contributing.run(source, vars(module))
    monkeypatch.setitem(sys.modules, name, module)
    assert tests.comment == "runs as: tests"
    names: dict[str, object] = {}
    contributing.run(tests, names)
    found = [test for key, test in names.items() if key.startswith("test_") and callable(test)]
    assert len(found) == 3
    for test in found:
        test()


def test_the_changelog_has_the_version() -> None:
    version = dynamic_moe.__version__
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
