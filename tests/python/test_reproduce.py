# SPDX-License-Identifier: Apache-2.0
"""The reproduction: tasks that are what they claim, comparable models, right statistics, runs that resume."""

import collections
import dataclasses
import itertools
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from byte_lm.corpus import Corpus
from byte_lm.model import ByteLM, parameter_counts
from byte_lm.training import CHECKPOINT, Trainer
from reproduce import analysis, page, published
from reproduce import run as command
from reproduce.analysis import Comparison, t_interval
from reproduce.measure import TEXT, measure
from reproduce.mixture import BLOCK, PERIOD, fingerprint, load_mixture, mix
from reproduce.plan import BASE, DENSE, DYNAMIC, SEEDS, SWEEP, TOP_1, TOP_2, VARIANTS, WITHOUT_LOSS, Run, plan
from reproduce.results import read_result, rounded, write_result
from reproduce.tasks import COPY_LETTERS, COUNT_LENGTH, SUM_DIGITS, TASKS, Task, draw_lines
from reproduce.training import train_run

pytestmark = pytest.mark.level_independent

TINY = BASE | {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_experts": 4,
    "context": 32,
    "batch_size": 2,
    "steps": 6,
    "eval_interval": 2,
    "eval_sequences": 4,
}


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(8):
        (folder / f"module_{i}.py").write_text(f"def function_{i}(value):\n    return value + {i}\n\n" * 20)
    return load_mixture(str(folder), TINY["context"], 3 * PERIOD * BLOCK, PERIOD * BLOCK)


def train(run: Run, corpus: Corpus, folder: Path, after_step: Callable[[Trainer], bool] = lambda trainer: True) -> dict:
    result = train_run(run, TINY, corpus, folder / "runs", folder / "results", after_step, 32)
    assert result is not None
    return result


# Tasks


def answer_of(question: str) -> str:
    """The oracle: it reads the question, and knows nothing of how it was drawn."""
    if question.startswith("#"):
        return str(sum(letter == "x" for letter in question))
    return str(eval(question) % 3) if question[0].isdigit() else question


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_answers_are_right(task: Task) -> None:
    generator = random.Random(7)
    for _ in range(300):
        problem = task.draw(generator)
        assert problem.answer == answer_of(problem.question)
        assert problem.line == f"{problem.question}={problem.answer}\n".encode()
        assert problem.question.count("+") == task.depth


def test_chance_is_that_of_the_best_constant_guess() -> None:
    def best(answers: list[int]) -> float:
        return max(collections.Counter(answers).values()) / len(answers)

    for task in TASKS:
        if task.depth:
            digits = itertools.product(map(int, SUM_DIGITS), repeat=task.depth + 1)
            assert task.chance == pytest.approx(best([sum(each) % 3 for each in digits]), rel=1e-12)
    assert TASKS[0].chance == 1 / len(COPY_LETTERS)
    words = itertools.product((0, 1), repeat=COUNT_LENGTH)
    assert TASKS[1].chance == best([sum(word) for word in words])


def test_lines_say_what_every_byte_is() -> None:
    lines = draw_lines(5000, 1)
    assert len(lines.content) == len(lines.task) == len(lines.answer) == len(lines.start) == 5000
    begin = 0
    for line in lines.content.decode().split("\n")[:-1]:
        end = begin + len(line) + 1
        question, _, answer = line.partition("=")
        assert answer == answer_of(question)
        (index,) = set(lines.task[begin:end])
        assert TASKS[index].depth == question.count("+")
        marked = [lines.content[place : place + 1].decode() for place in range(begin, end) if lines.answer[place]]
        assert "".join(marked) == answer
        assert set(lines.start[begin:end]) == {begin}
        begin = end
    counts = collections.Counter(lines.task[place] for place in set(lines.start))
    assert counts.keys() == set(range(len(TASKS)))
    assert draw_lines(5000, 1) == lines
    assert draw_lines(5000, 2).content != lines.content


def test_the_mixture_holds_text_and_problems() -> None:
    text = torch.full((3 * BLOCK,), ord("!"), dtype=torch.uint8)
    mixture = mix(text, 3 * PERIOD * BLOCK, 1).view(3, PERIOD, BLOCK)
    assert (mixture[:, -1] == ord("!")).all()
    assert bytes(mixture[:, :-1].reshape(-1).tolist()) == draw_lines(3 * (PERIOD - 1) * BLOCK, 1).content


def test_the_data_are_always_the_same_and_have_a_fingerprint(corpus: Corpus, tmp_path: Path) -> None:
    again = load_mixture(str(tmp_path / "text"), TINY["context"], 3 * PERIOD * BLOCK, PERIOD * BLOCK)
    assert torch.equal(again.train, corpus.train)
    assert fingerprint(again) == fingerprint(corpus)
    other = dataclasses.replace(corpus, train=corpus.train.clone())
    other.train[5] += 1
    assert fingerprint(other) != fingerprint(corpus)


# Plan


def test_all_moes_have_the_same_parameters_and_dense_activates_what_top_2_does() -> None:
    models = {variant.name: ByteLM(Run(variant, 0).settings(BASE, "runs")) for variant in VARIANTS}
    totals = {name: parameter_counts(model, 2)[0] for name, model in models.items()}
    assert totals["top-1"] == totals["top-2"] == totals["dynamic"] == totals["without-dynamic-loss"]
    router = BASE["num_layers"] * BASE["num_experts"] * BASE["hidden_size"]
    assert totals["dense"] == parameter_counts(models["top-2"], 2)[1] - router


def test_the_variants_differ_in_what_they_are_named_for() -> None:
    settings = {
        variant.name: Run(variant, 0, variant.changes.get("top_p")).settings(BASE, "runs") for variant in VARIANTS
    }
    assert [settings[variant.name].router for variant in VARIANTS] == ["dense", "top_k", "top_k", "top_p", "top_p"]
    assert [settings[variant.name].top_k for variant in (TOP_1, TOP_2)] == [1, 2]
    assert [settings[variant.name].dynamic for variant in (DYNAMIC, WITHOUT_LOSS)] == [1e-4, 0.0]
    for each in settings.values():
        assert (each.steps, each.batch_size, each.context, each.balance) == tuple(
            BASE[name] for name in ("steps", "batch_size", "context", "balance")
        )


def test_the_plan_compares_all_seeds_and_sweeps_once() -> None:
    runs = plan()
    assert len({run.name for run in runs}) == len(runs) == len(SEEDS) * len(VARIANTS) + len(SWEEP) - 1
    assert [run.variant for run in runs[: len(VARIANTS)]] == list(VARIANTS)
    dynamic = [run.top_p for run in runs if run.variant is DYNAMIC and run.seed == SEEDS[0]]
    assert sorted(dynamic) == list(SWEEP)
    assert BASE["steps"] % BASE["eval_interval"] == 0  # so that the last checkpoint is of the last step


def test_the_router_of_top_1_learns_from_the_text() -> None:
    model = ByteLM(Run(TOP_1, 0).settings(TINY, "runs"))
    torch.nn.init.normal_(model.head.weight)  # it starts at 0, where nothing before it has a gradient
    model(torch.arange(32)[None]).square().sum().backward()
    gradient = model.blocks[0].feed_forward.router.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


# Statistics


def test_the_interval_is_students() -> None:
    interval = t_interval([1.0, 2.0, 4.0])
    # s = sqrt(7/3), t(0.975, 2) = 4.302653, so half = 4.302653 sqrt(7/3) / sqrt(3).
    assert interval.mean == pytest.approx(7 / 3)
    assert interval.half == pytest.approx(4.302652729911275 * math.sqrt(7) / 3, rel=1e-9)
    assert interval.sign == 0
    assert t_interval([1.0, 1.1, 1.2]).sign == 1
    assert t_interval([-1.0, -1.1, -1.2]).sign == -1


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = random.Random(0)
    intervals = [t_interval([generator.gauss(3.0, 2.0) for _ in range(4)]) for _ in range(4000)]
    covered = sum(each.low <= 3.0 <= each.high for each in intervals) / len(intervals)
    assert covered == pytest.approx(0.95, abs=0.014)  # 4 standard errors


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    interval = t_interval([2.5])
    assert (interval.mean, interval.sign) == (2.5, 0)
    assert math.isnan(interval.half)
    assert page.judge(interval, 1) == "one seed: open"
    with pytest.raises(ValueError, match="values must hold at least one value, got none"):
        t_interval([])


@pytest.mark.parametrize(
    ("values", "expected", "verdict"),
    [
        ([1.0, 1.1], 1, "**supported**"),
        ([1.0, 1.1], -1, "**contradicted**"),
        ([-1.0, 1.1], 1, "not resolved"),
    ],
)
def test_a_verdict_needs_an_interval_on_one_side(values: list[float], expected: int, verdict: str) -> None:
    assert page.judge(t_interval([*values, *values]), expected) == verdict


# Results made up so that every figure is known.


def made_up(variant: analysis.Variant, seed: int, top_p: float | None) -> dict:
    layers = [] if variant is DENSE else [2.0 + seed, 1.0 + seed]
    slope = 0.25

    def figures(index: int) -> dict:
        counts = [count + slope * index for count in layers]
        return {"tokens": 10, "bits": 0.1 * index, "correct": 0.5, "experts": counts, "line_experts": counts}

    tasks = {task.name: figures(index) for index, task in enumerate(TASKS)} | {TEXT: figures(0)}
    return {
        "format": 1,
        "run": Run(variant, seed, top_p).name,
        "variant": variant.name,
        "seed": seed,
        "top_p": top_p,
        "settings": dataclasses.asdict(Run(variant, seed, top_p).settings(TINY, "runs")),
        "corpus": {"text": "text", "bytes": 1000, "fingerprint": "f"},
        "steps": 6,
        "tokens": 384,
        "parameters": {"total": 1100, "shared": 100, "expert": 0 if variant is DENSE else 125, "layers": len(layers)},
        "history": {
            "step": [2, 4, 6],
            "validation_bits": [4.0, 3.0, 2.0],
            "train_bits": [4.0, 3.0, 2.0],
            "train_experts": [[3.0, 3.0], [2.0, 2.0], [1.0, 1.0]] if layers else [[], [], []],
        },
        "measured": {
            "tasks": tasks,
            "validation_bits": 2.0 + 0.1 * seed + (0.5 if variant is DYNAMIC else 0.0),
            "validation_experts": layers,
            "experts_and_bits": 0.3 if layers else None,
        },
        "environment": {"date": "2024-03-12", "processor": "an <abacus>"},
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    for run in plan(seeds=(0, 1), sweep=(0.1, 0.4)):
        write_result(made_up(run.variant, run.seed, run.top_p), folder)
    return folder


def test_figures_follow_from_results(results: Path) -> None:
    comparison = Comparison.read(plan(), results)
    one, other = comparison.of(DYNAMIC)
    assert (one["seed"], other["seed"]) == (0, 1)
    assert analysis.experts(one) == 1.5
    assert analysis.experts(comparison.of(DENSE)[0]) == 0
    assert analysis.expert_parameters(one) == 1.5 * 125 * 2
    assert analysis.active_parameters(one) == 100 + 1.5 * 125 * 2
    assert analysis.active_parameters(comparison.of(DENSE)[0]) == 1100
    assert analysis.depth_slope(one) == pytest.approx(0.25)
    assert analysis.difficulty_correlation(one) == pytest.approx(1)
    assert analysis.training_experts(one) == 2
    assert comparison.interval(DYNAMIC, analysis.validation_bits).mean == pytest.approx(2.55)
    difference = comparison.difference(DYNAMIC, TOP_2, analysis.validation_bits)
    assert (difference.mean, difference.count) == (pytest.approx(0.5), 2)
    assert [result["top_p"] for result in comparison.sweep()] == [0.1, 0.4]


def test_results_of_different_trainings_are_not_compared(results: Path) -> None:
    path = results / "dense-seed0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": 7}))
    with pytest.raises(ValueError, match="steps must be the same in all results in"):
        Comparison.read(plan(), results)


def test_results_of_another_format_are_refused(results: Path) -> None:
    path = results / "dense-seed0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    with pytest.raises(ValueError, match=r"dense-seed0\.json must have format 1, got 0"):
        read_result(Run(DENSE, 0), results)


def test_floats_are_rounded_wherever_they_stand() -> None:
    assert rounded({"a": [1 / 3, 2], "b": 123456789.0}) == {"a": [0.333333, 2], "b": 123457000.0}


# The page


def test_the_page_is_made_of_the_results(results: Path, tmp_path: Path) -> None:
    target, images = tmp_path / "docs" / "page.md", tmp_path / "docs" / "images"
    page.write_page(plan(), results, target, images)
    text = target.read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        "The paper's claims, one by one",
        "Loss and activated parameters",
        "By task",
        "Over training",
        "By layer",
        "The threshold",
        "What was trained, and how to do it again",
    ]
    # A difference of 0.5 without any spread, against the paper's claim.
    assert "| loss +0.500 ± 0.000 bits per byte | **contradicted** |" in text
    assert "| +0.250 ± 0.000 per operation | **supported** |" in text
    assert f"{len(plan()) - 11} planned runs are not in yet." in text
    assert "published, not reproduced" in text
    for value in published.EXPERTS.values():
        assert f"| {value:.2f} |" in text
    assert "an <abacus>" in text
    assert "nan" not in text
    shown = set(re.findall(r"\]\(images/(\w+\.svg)\)", text))
    assert (
        shown
        == {path.name for path in images.iterdir()}
        == {f"{name}.svg" for name in ("loss", "training", "tasks", "layers", "sweep")}
    )
    first = {path: path.read_bytes() for path in [target, *images.iterdir()]}
    page.write_page(plan(), results, target, images)
    assert {path: path.read_bytes() for path in first} == first


def test_the_page_of_one_seed_claims_nothing(tmp_path: Path) -> None:
    for run in plan(seeds=(0,), sweep=(0.4,)):
        write_result(made_up(run.variant, run.seed, run.top_p), tmp_path / "results")
    page.write_page(plan(), tmp_path / "results", tmp_path / "page.md", tmp_path / "images")
    text = (tmp_path / "page.md").read_text()
    assert "**supported**" not in text
    assert "**contradicted**" not in text
    assert "nan" not in text


def test_the_page_needs_every_variant(results: Path, tmp_path: Path) -> None:
    for path in results.glob("dense*"):
        path.unlink()
    with pytest.raises(ValueError, match="found none of dense in"):
        page.write_page(plan(), results, tmp_path / "page.md", tmp_path / "images")
    with pytest.raises(ValueError, match="results must hold at least one result, found none in"):
        page.write_page(plan(), tmp_path / "nowhere", tmp_path / "page.md", tmp_path / "images")


def test_the_committed_page_says_what_the_committed_results_say() -> None:
    comparison = Comparison.read(plan(), command.records.FOLDER)
    images = page.IMAGES.relative_to(page.PAGE.parent).as_posix()
    assert page.PAGE.read_text() == page.compose(comparison, len(plan()), images)


def test_the_committed_results_were_trained_as_the_program_would() -> None:
    for result in Comparison.read(plan(), command.records.FOLDER).results:
        assert {name: result["settings"][name] for name in BASE if name != "dynamic"} == {
            name: value for name, value in BASE.items() if name != "dynamic"
        }


# Training


@pytest.mark.parametrize("variant", [DENSE, TOP_1, DYNAMIC], ids=lambda variant: variant.name)
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(
    variant: analysis.Variant, corpus: Corpus, tmp_path: Path
) -> None:
    run = Run(variant, 3, variant.changes.get("top_p"))
    whole = train(run, corpus, tmp_path / "whole")

    class KilledError(Exception):
        pass

    def kill(trainer: Trainer) -> bool:
        if trainer.step == 3:  # one after the checkpoint
            raise KilledError
        return True

    with pytest.raises(KilledError):
        train(run, corpus, tmp_path / "parts", kill)
    folder = tmp_path / "parts" / "runs" / run.name
    assert torch.load(folder / CHECKPOINT, weights_only=True)["step"] == 2
    (folder / "checkpoint.part").write_bytes(b"half a checkpoint")  # a kill while it was written
    torch.randn(100)
    steps = []
    resumed = train(run, corpus, tmp_path / "parts", lambda trainer: bool(steps.append(trainer.step)) or True)

    assert steps == [3, 4, 5, 6]
    for name in ("measured", "history", "parameters", "tokens"):
        assert resumed[name] == whole[name], name
    weights = [
        torch.load(tmp_path / part / "runs" / run.name / CHECKPOINT, weights_only=True)["model"]
        for part in ("whole", "parts")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_stopped_run_has_a_checkpoint_and_no_result(corpus: Corpus, tmp_path: Path) -> None:
    run = Run(TOP_2, 0)
    arguments = (run, TINY, corpus, tmp_path / "runs", tmp_path / "results")
    assert train_run(*arguments, lambda trainer: trainer.step < 3, 32) is None
    assert torch.load(tmp_path / "runs" / run.name / CHECKPOINT, weights_only=True)["step"] == 3
    assert read_result(run, tmp_path / "results") is None


def test_a_checkpoint_of_something_else_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    run = Run(TOP_2, 0)
    train(run, corpus, tmp_path)
    arguments = (tmp_path / "runs", tmp_path / "results", lambda trainer: True, 32)
    with pytest.raises(ValueError, match=r"lr must be 1\.0 as planned, but the checkpoint in .* has 0\.003"):
        train_run(run, TINY | {"lr": 1.0}, corpus, *arguments)
    other = dataclasses.replace(corpus, train=corpus.train.flip(0))
    with pytest.raises(ValueError, match="the data must be that of the checkpoint in"):
        train_run(run, TINY, other, *arguments)


def test_a_result_says_what_was_trained(corpus: Corpus, tmp_path: Path) -> None:
    run = Run(DYNAMIC, 1, 0.4)
    result = train(run, corpus, tmp_path)
    assert read_result(run, tmp_path / "results") == rounded(result)
    assert (result["steps"], result["tokens"]) == (6, 6 * 2 * 32)
    parameters = result["parameters"]
    assert parameters["expert"] == 3 * 16 * 16
    assert parameters["total"] == parameters["shared"] + 2 * 4 * parameters["expert"]
    assert result["history"]["step"] == [2, 4, 6]
    assert [len(layers) for layers in result["history"]["train_experts"]] == [2, 2, 2]
    assert {"date", "processor", "torch", "python"} <= result["environment"].keys()


def test_measuring_counts_whole_questions_only(corpus: Corpus, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    trainer = Trainer(Run(TOP_2, 0).settings(TINY, str(tmp_path)), corpus, folder)
    sequences, context = 32, TINY["context"]
    measured = measure(trainer, sequences)
    content = draw_lines(sequences * context + 1, 3).content
    expected: collections.Counter = collections.Counter()
    begin = 0
    for line in content.split(b"\n")[:-1]:
        question, _, answer = line.decode().partition("=")
        for place in range(begin + len(question) + 1, begin + len(line)):
            if begin // context * context == (place - 1) // context * context:  # the input before it sees the question
                expected[next(t.name for t in TASKS if kind(t) == kind_of(question))] += 1
        begin += len(line) + 1
        assert answer == answer_of(question)
    assert {task.name: measured["tasks"][task.name]["tokens"] for task in TASKS} == dict(expected)
    assert all(figures["experts"] == [2, 2] for figures in measured["tasks"].values())
    assert measured["experts_and_bits"] is None  # every token has two
    # An untrained head is 0, so that every byte is equally likely: 8 bits.
    assert measured["validation_bits"] == pytest.approx(8)


def kind(task: Task) -> str:
    return task.name if not task.depth else f"sum {task.depth}"


def kind_of(question: str) -> str:
    if question.startswith("#"):
        return "count"
    return f"sum {question.count('+')}" if question[0].isdigit() else "copy"


# The command line


def test_the_command_trains_what_is_missing(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(command, "BASE", TINY)
    monkeypatch.setattr(command, "MEASURED_SEQUENCES", 32)
    monkeypatch.setattr(command, "plan", lambda: plan(seeds=(0,), sweep=(0.4,)))
    monkeypatch.setattr(command, "load_mixture", lambda *arguments: corpus)
    monkeypatch.setattr(command, "PAGE", tmp_path / "docs" / "page.md")
    monkeypatch.setattr(command, "IMAGES", tmp_path / "docs" / "images")
    threads = torch.get_num_threads()
    arguments = [
        "--runs-dir",
        str(tmp_path / "runs"),
        "--results",
        str(tmp_path / "results"),
        "--threads",
        str(threads),
    ]
    assert command.main(["--page", *arguments]) == 2
    assert "results must hold at least one result" in " ".join(capsys.readouterr().err.split())

    assert command.main(arguments) == 0
    output = capsys.readouterr().out
    assert "0 of 5 runs have a result." in output
    assert "dynamic-seed0: " in output
    assert "\x1b" not in output
    assert (tmp_path / "docs" / "page.md").exists()

    assert command.main(arguments) == 0
    assert "5 of 5 runs have a result." in capsys.readouterr().out
