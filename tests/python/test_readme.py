# SPDX-License-Identifier: Apache-2.0
"""The examples of the README run as a reader types them, and its figures are those of the results."""

import importlib
import re
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from documents import ROOT, Document

from dynamic_moe import DynamicMoE, Routing

pytestmark = pytest.mark.level_independent

README = Document(ROOT / "README.md")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Loops of tiny steps: threads that find no free core would cost more than all the rest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_examples_run_and_do_what_the_text_says(capsys: pytest.CaptureFixture[str]) -> None:
    train, rule, collect = README.blocks("python")
    names: dict[str, object] = {}

    README.run(train, names)
    printed = capsys.readouterr().out
    match = re.fullmatch(r"loss (\d\.\d{3}), (\d\.\d\d) experts per token\n", printed)
    assert match, printed
    y, routing, layer, x = names["y"], names["routing"], names["layer"], names["x"]
    assert isinstance(y, torch.Tensor)
    assert isinstance(x, torch.Tensor)
    assert isinstance(routing, Routing)
    assert y.shape == x.shape
    untrained = x.sin().square().mean()
    assert float(match[1]) < 0.5 * untrained  # it learns
    assert 1 <= float(match[2]) <= 8

    README.run(rule, names)
    layer = names["layer"]
    assert isinstance(layer, DynamicMoE)
    _, routing = layer(x, return_routing=True)
    selected = routing.probabilities >= 1 / 8
    assert torch.equal(routing.experts_per_token, selected.sum(-1))

    README.run(collect, names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1"]
    assert all(1 <= float(line.split()[1]) <= 8 for line in lines)
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.abs().sum() > 0


def test_the_first_example_is_short() -> None:
    lines = [line for line in README.blocks("python")[0].code.splitlines() if line and not line.startswith("print")]
    assert len(lines) <= 12


def test_the_two_commands_come_first() -> None:
    commands = [line.split("#")[0].strip() for line in README.blocks("sh")[0].code.splitlines()]
    assert commands == ["make demo", "make test"]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.report")


def test_speed_is_a_short_table_of_the_results_that_shows_where_others_are_ahead(report: ModuleType) -> None:
    results = report.Results.read(report.RESULTS / "latest.json")
    speed = README.text.partition("\n## Speed\n")[2].partition("\n## ")[0]
    _, block, after = re.split(r"<!-- benchmark:(?:begin|end) -->\n", speed)
    assert block == report.readme_block(results) + "\n"
    assert len(report.README_WORKS) <= 6
    leads: dict[tuple[str, str], list[float]] = {}
    for result in results.cases:
        ours, peer = result.best(ours=True), result.best(ours=False)
        if result.kind == "experts" and ours and peer:
            lead = result.spread(peer).median / result.spread(ours).median
            leads.setdefault((result.passes, result.dtype), []).append(lead)
    worst = [f"{min(leads['forward', dtype]):.2f}" for dtype in ("float32", "bfloat16")]
    assert re.findall(r"at worst (\d\.\d+)", after) == worst
    assert all(f"| {figure} (" in block for figure in worst)  # what is worst is not left out of the table
    assert "training was ahead" in after
    assert min(leads["forward+backward", "float32"] + leads["forward+backward", "bfloat16"]) > 1


def test_the_page_of_results_quotes_them(report: ModuleType) -> None:
    _, *sections = re.split(r"^## ", (report.RESULTS / "README.md").read_text(), flags=re.MULTILINE)
    for section in sections:
        (folder,) = re.findall(r"\]\(([\w/]*)latest\.md\)", section)
        results = report.Results.read(report.RESULTS / folder / "latest.json")
        measured = [1.76]  # experts per token: an input
        for verdict in report.judge(results):
            measured += [value for value in (verdict.reached, verdict.lead, verdict.target.bound) if value]
        for result in results.cases:
            if result.kind == "gating":
                measured.append(1e3 * result.spread(result.best(ours=True)).median)
        for figure in re.findall(r"(?<![\w.])\d+\.\d+", section):
            assert figure in {f"{value:.{len(figure.partition('.')[2])}f}" for value in measured}, figure
        if said := re.search(r"Clean commit: (\d+) of the (\d+) cases", section):
            clean = sum(not result.commit.endswith("-dirty") for result in results.cases)
            assert [int(number) for number in said.groups()] == [clean, len(results.cases)]
