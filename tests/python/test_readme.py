# SPDX-License-Identifier: Apache-2.0
"""The examples of the README run one after the other, as a reader types them."""

import re
from collections.abc import Iterator

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


def test_there_is_one_place_for_the_benchmarks() -> None:
    begin, end = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
    assert README.text.count(begin) == README.text.count(end) == 1
    assert README.text.index(begin) < README.text.index(end)
