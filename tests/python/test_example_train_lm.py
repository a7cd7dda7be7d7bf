# SPDX-License-Identifier: Apache-2.0
"""The demo: training, resuming, what it says on errors, and the page that it writes."""

import dataclasses
import functools
import io
import json
import math
import re
import signal
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_lm
from byte_lm import progress as progress_module
from byte_lm.charts import Series, apart, line_chart, log_ticks, smoothed, thinned, ticks
from byte_lm.colors import DARK_SCALE, LIGHT_SCALE, contrast, level_of, readable_ink
from byte_lm.corpus import SEPARATOR, Batches, Corpus, TextFile, load_corpus, validation_batches
from byte_lm.evaluation import BYTE_CLASSES, Evaluation, Inference, byte_classes, figures_by_class
from byte_lm.model import ByteLM, moe_layers, parameter_counts
from byte_lm.outcome import choose_excerpt
from byte_lm.progress import Progress, sparkline
from byte_lm.reading import text_section, text_views
from byte_lm.settings import Settings, complete
from byte_lm.training import FINAL_LR, Trainer, load_checkpoint, schedule

pytestmark = pytest.mark.level_independent

TINY = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_experts": 4,
    "context": 32,
    "batch_size": 4,
    "eval_interval": 10,
    "eval_sequences": 4,
    "sample_bytes": 8,
    "lr": 1e-2,
    "device": "cpu",
}
SECTIONS = ("loss", "experts", "layers", "load", "reading", "classes", "sample", "settings")
VOID_ELEMENTS = {"meta", "br"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of text that a tiny model learns something about at once."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(12):
        lines = [f"def function_{i}_{j}(value):\n    return value + {j}\n\n" for j in range(8)]
        (folder / f"module_{i}.py").write_text("".join(lines))
    return folder


def tiny(text: Path, **changes: object) -> Settings:
    return Settings(**(TINY | {"name": "tiny", "data": str(text), "steps": 12} | changes))


def make_trainer(settings: Settings, folder: Path, checkpoint: dict | None = None) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(settings, load_corpus(settings.data, settings.context), folder, checkpoint)


def run_main(folder: Path, text: Path, *arguments: str, **options: object) -> int:
    flags = []
    for name, value in (TINY | {"data": text, "runs_dir": folder / "runs", "name": "tiny"} | options).items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    return train_lm.main([*flags, *arguments])


class Elements(HTMLParser):
    """Checks that elements are closed in order, and gathers ids, addresses and data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._attributes(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]


@pytest.mark.parametrize(
    ("router", "dtype"), [("top_p", "auto"), ("top_p", "float32"), ("top_k", "bfloat16"), ("dense", "auto")]
)
def test_a_run_learns_and_reports(
    router: str, dtype: str, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run_main(tmp_path, text, "--steps", "40", router=router, dtype=dtype) == 0

    folder = tmp_path / "runs" / "tiny"
    result = json.loads((folder / "result.json").read_text())
    assert result["finished"]
    assert result["steps"] == 40
    assert result["tokens"] == 40 * 4 * 32
    assert result["validation_bits_per_byte"] < 5.5  # from 8
    if router == "dense":
        assert result["mean_experts_per_byte"] is None
        assert result["active_parameters"] == result["total_parameters"]
    else:
        assert 1 <= result["mean_experts_per_byte"] <= 4
        assert len(result["experts_per_layer"]) == 2
        assert result["active_parameters"] < result["total_parameters"]
    if router == "top_k":
        assert result["experts_per_layer"] == [2, 2]

    page = (folder / "report.html").read_text()
    elements = Elements(page)
    expected = ("loss", "sample", "settings") if router == "dense" else SECTIONS
    assert [name for name in elements.ids if name in SECTIONS] == list(expected)
    assert len(set(elements.ids)) == len(elements.ids)
    assert not elements.addresses
    assert not re.search(r"https?://|@import|url\(", page)
    assert f"{result['validation_bits_per_byte']:.3f}" in page

    output = capsys.readouterr().out
    assert "\x1b" not in output  # plain lines where the output is not a terminal
    assert "step 40 | loss" in output
    assert "validation loss" in output
    assert str(folder / "report.html") in output


def test_everything_on_the_page_is_escaped(tmp_path: Path) -> None:
    text = tmp_path / "text.html"
    text.write_text("<script>alert('&amp;')</script></pre>\n" * 200)
    assert run_main(tmp_path, text, "--steps", "3", prompt="<b>&") == 0
    page = (tmp_path / "runs" / "tiny" / "report.html").read_text()
    Elements(page)
    assert "<script>alert" not in page
    assert "<b>&lt;b&gt;&amp;</b>" in page


def test_tensorboard_gets_every_curve_once(tmp_path: Path, text: Path) -> None:
    assert run_main(tmp_path, text, "--steps", "20", log_interval=5) == 0
    events = EventAccumulator(str(tmp_path / "runs" / "tiny" / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/bits_per_byte", "train/learning_rate", "validation/bits_per_byte", "router/entropy"} <= tags
    assert {"experts/layer_1", "experts/layer_2", "validation/experts_layer_2"} <= tags
    assert [event.step for event in events.Scalars("train/bits_per_byte")] == [5, 10, 15, 20]
    assert [event.step for event in events.Scalars("validation/bits_per_byte")] == [10, 20]


# Training


@pytest.mark.parametrize("router", ["top_p", "top_k", "dense"])
def test_a_resumed_run_equals_one_that_never_stopped_to_the_bit(router: str, tmp_path: Path, text: Path) -> None:
    settings = tiny(text, router=router, eval_interval=4, batch_size=16)  # 12 steps are more than one pass
    whole = make_trainer(settings, tmp_path / "whole")
    whole.run(lambda trainer: True)

    first = make_trainer(settings, tmp_path / "parts")
    first.run(lambda trainer: trainer.step < 7)
    first.save()
    torch.randn(100)  # whatever else draws random numbers
    second = make_trainer(settings, tmp_path / "parts", load_checkpoint(tmp_path / "parts"))
    assert second.step == 7
    second.run(lambda trainer: True)

    assert second.step == whole.step == 12
    assert_equal(whole.model.state_dict(), second.model.state_dict())
    assert_equal(whole.optimizer.state_dict(), second.optimizer.state_dict())
    for column in ("step", "bits", "experts", "gradient_norm", "lr", "eval_step", "eval_bits", "eval_experts"):
        assert getattr(whole.history, column) == getattr(second.history, column), column


def assert_equal(first: object, second: object) -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert_equal(value, second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert first == second


def test_another_seed_is_another_run(tmp_path: Path, text: Path) -> None:
    runs = [make_trainer(tiny(text, seed=seed), tmp_path / str(seed)) for seed in (0, 1)]
    for run in runs:
        run.run(lambda trainer: trainer.step < 2)
    assert runs[0].history.bits != runs[1].history.bits


def test_evaluating_does_not_change_the_training(tmp_path: Path, text: Path) -> None:
    runs = [make_trainer(tiny(text, eval_interval=interval), tmp_path / str(interval)) for interval in (1, 100)]
    for run in runs:
        run.run(lambda trainer: True)
    assert runs[0].history.bits == runs[1].history.bits


def test_every_weight_learns(tmp_path: Path, text: Path) -> None:
    trainer = make_trainer(tiny(text), tmp_path / "run")
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.run(lambda trainer: True)
    for name, value in trainer.model.named_parameters():
        assert not torch.equal(value, before[name]), name


def test_the_time_limit_ends_a_run(tmp_path: Path, text: Path) -> None:
    trainer = make_trainer(tiny(text, steps=0, minutes=0.005), tmp_path / "run")
    assert trainer.seconds_left == math.inf
    trainer.run(lambda trainer: True)
    assert trainer.progress == 1
    assert 0.3 <= trainer.seconds < 30
    assert trainer.history.lr[-1] < trainer.settings.lr


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, text: Path) -> None:
    trainer = make_trainer(tiny(text), tmp_path / "run")
    with torch.no_grad():
        trainer.model.head.weight.fill_(math.nan)
    with pytest.raises(RuntimeError, match=r"loss is nan at step 1: try a smaller --lr than 0\.01"):
        trainer.run(lambda trainer: True)


def test_a_compiled_run_equals_an_eager_one(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The default backend builds C++ code for minutes; what can break here is the tracing of model and routing.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    runs = [make_trainer(tiny(text, compile=each, dtype="float32"), tmp_path / str(each)) for each in (False, True)]
    for run in runs:
        run.run(lambda trainer: trainer.step < 3)
    assert runs[1].history.bits == pytest.approx(runs[0].history.bits, abs=1e-3)
    assert runs[1].history.experts[0] == pytest.approx(runs[0].history.experts[0], abs=0.05)


def test_the_schedule_rises_then_falls() -> None:
    values = [schedule(i / 100, 0.1) for i in range(101)]
    top = values.index(max(values))
    assert values[top] == 1
    assert top == 10
    assert 0 < values[0] < values[5] < 1
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[-1] == pytest.approx(FINAL_LR)


def test_active_parameters_count_the_experts_of_a_byte(text: Path) -> None:
    model = ByteLM(tiny(text))
    experts = sum(p.numel() for layer in moe_layers(model) for p in layer.experts.parameters())
    total, active = parameter_counts(model, 1.5)
    assert total == sum(p.numel() for p in model.parameters())
    assert total - active == experts * 2.5 / 4


# Stopping and resuming from the command line


def test_ctrl_c_leaves_a_checkpoint_and_a_report(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    show = Progress.__call__

    def show_and_interrupt(self: Progress, trainer: Trainer) -> None:
        show(self, trainer)
        if trainer.step == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "__call__", show_and_interrupt)
    before = signal.getsignal(signal.SIGINT)
    assert run_main(tmp_path, text, "--steps", "15") == 130
    assert signal.getsignal(signal.SIGINT) is before
    folder = tmp_path / "runs" / "tiny"
    assert load_checkpoint(folder)["step"] == 5
    assert "stopped before its end" in (folder / "report.html").read_text()
    assert "--resume goes on from here" in capsys.readouterr().out

    assert train_lm.main(["--runs-dir", str(tmp_path / "runs"), "--name", "tiny", "--resume"]) == 0
    result = json.loads((folder / "result.json").read_text())
    assert (result["steps"], result["finished"]) == (15, True)
    assert "resumed" in capsys.readouterr().out
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/bits_per_byte")] == [10]


def test_a_second_ctrl_c_is_not_held_back() -> None:
    # A shell has the programs that it starts in the background ignore the signal, and the tests may be one of them.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with train_lm.StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_a_finished_run_can_be_given_more_steps(tmp_path: Path, text: Path) -> None:
    assert run_main(tmp_path, text, "--steps", "4") == 0
    assert train_lm.main(["--runs-dir", str(tmp_path / "runs"), "--name", "tiny", "--resume", "--steps", "6"]) == 0
    assert load_checkpoint(tmp_path / "runs" / "tiny")["step"] == 6


def test_an_earlier_run_of_the_same_name_is_kept(tmp_path: Path, text: Path) -> None:
    for steps in (1, 2, 3):
        assert run_main(tmp_path, text, "--steps", str(steps)) == 0
    runs = tmp_path / "runs"
    assert [load_checkpoint(runs / name)["step"] for name in ("tiny.1", "tiny.2", "tiny")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "nowhere"}, "--data must be an existing file or folder, got 'nowhere'"),
        ({"lr": 0}, "--lr must be finite and above 0, got 0.0"),
        ({"lr": "nan"}, "--lr must be finite and above 0, got nan"),
        ({"top_p": 1.5}, "--top-p must be in (0, 1], got 1.5"),
        ({"top_k": 5}, "--top-k must be at most --num-experts 4, got 5"),
        ({"hidden_size": 30}, "--hidden-size must be a multiple of 2 * --num-heads = 4, got 30"),
        ({"context": 4}, "--context must be at least 8, got 4"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"warmup": 1}, "--warmup must be in [0, 1), got 1.0"),
        ({"minutes": -1}, "--minutes must be finite and at least 0, got -1.0"),
        ({"device": "quantum"}, "--device must be auto, cpu, cuda or cuda:N, got 'quantum'"),
        ({"device": "meta"}, "--device must be auto, cpu, cuda or cuda:N, got 'meta'"),
        ({"name": "../up"}, "--name must be a plain folder name, got '../up'"),
        ({"prompt": ""}, "--prompt must be at least one character, got ''"),
        ({"context": 8192}, "--data must hold more than --context 8192 bytes of training text, got"),
    ],
)
def test_wrong_options_are_named(
    options: dict, message: str, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run_main(tmp_path, text, "--steps", "1", **options) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_unknown_options_are_refused(capsys: pytest.CaptureFixture) -> None:
    for arguments in (["--router", "random"], ["--dtype", "int8"], ["--steps", "many"], ["--unknown"]):
        with pytest.raises(SystemExit):
            train_lm.main(arguments)
        assert "usage: train_lm.py" in capsys.readouterr().err


def test_resume_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert train_lm.main(["--resume"]) == 2
    assert "--resume needs --name" in capsys.readouterr().err
    assert train_lm.main(["--resume", "--name", "none", "--runs-dir", str(tmp_path)]) == 2
    assert "--resume needs a checkpoint, found none at" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_keeps_what_it_is() -> None:
    saved = dataclasses.asdict(Settings(name="run", steps=5, num_layers=3))
    assert complete({"resume": True, "steps": 9, "device": "cpu"}, saved).num_layers == 3
    assert complete({"resume": True, "steps": 9}, saved).steps == 9
    with pytest.raises(ValueError, match="--num-layers must be 3 as in the run that is resumed, got 4"):
        complete({"resume": True, "num_layers": 4}, saved)


def test_a_run_without_limits_takes_four_minutes_and_a_name() -> None:
    settings = complete({"router": "top_k"})
    assert settings.minutes == 4
    assert re.fullmatch(r"top_k-\d{8}-\d{6}", settings.name)
    assert complete({"steps": 3, "name": "x"}).minutes == 0


# Text


def test_the_split_is_by_file_and_always_the_same(text: Path) -> None:
    (text / "image.bin").write_bytes(b"\xff\xfe\x00")
    (text / ".hidden").write_text("hidden")
    (text / "empty.py").write_text("")
    first, second = (load_corpus(str(text), 16) for _ in range(2))
    assert torch.equal(first.train, second.train)
    names = [file.name for file in first.train_files], [file.name for file in first.validation_files]
    assert not set(names[0]) & set(names[1])
    assert sorted(names[0] + names[1]) == sorted(f"module_{i}.py" for i in range(12))
    assert names[1]
    assert len(first.train) > 5 * len(first.validation)
    assert bytes(first.validation.tolist()) == b"\0" + b"\0".join(file.content for file in first.validation_files)


def test_one_large_file_among_small_ones_is_for_training(tmp_path: Path) -> None:
    (tmp_path / "large.txt").write_text("large\n" * 10_000)
    (tmp_path / "small.txt").write_text("small\n" * 20)
    corpus = load_corpus(str(tmp_path), 16)
    assert [file.name for file in corpus.train_files] == ["large.txt"]
    assert [file.name for file in corpus.validation_files] == ["small.txt"]


def test_a_single_file_is_split_at_a_line(tmp_path: Path) -> None:
    path = tmp_path / "poem.txt"
    path.write_text("".join(f"line {i} of the poem\n" for i in range(100)))
    corpus = load_corpus(str(path), 16)
    parts = corpus.train_files[0].content, corpus.validation_files[0].content
    assert b"".join(parts) == path.read_bytes()
    assert parts[1].startswith(b"line ")
    assert 0.08 < len(parts[1]) / len(path.read_bytes()) < 0.13


def test_text_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data must hold UTF-8 text, found none"):
        load_corpus(str(tmp_path), 16)
    (tmp_path / "a").write_text("a" * 100)
    (tmp_path / "b").write_text("b" * 10)
    with pytest.raises(ValueError, match="more than --context 16 bytes of validation text, got 11"):
        load_corpus(str(tmp_path), 16)


def test_the_standard_library_is_found_without_its_tests() -> None:
    corpus = load_corpus("", 256)
    names = {file.name for file in corpus.train_files + corpus.validation_files}
    assert {"ast.py", "json/decoder.py"} <= names
    assert not any(name.startswith(("test/", "site-packages/", "encodings/")) for name in names)
    assert len(corpus.train) > 2_000_000


def test_a_pass_takes_every_sequence_once_and_the_position_is_all_that_counts() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    batches = Batches(text, context=8, batch_size=4, seed=3)
    per_pass = (len(text) - 1) // 8 - 1
    firsts = []
    for position in range(0, per_pass, 4):
        inputs, targets = batches.at(position)
        assert inputs.shape == targets.shape == (4, 8)
        assert torch.equal(targets, inputs + 1)
        firsts += inputs[:, 0].tolist()
    firsts = firsts[:per_pass]
    assert len({first // 8 for first in firsts}) == per_pass  # no two overlap
    again = Batches(text, context=8, batch_size=4, seed=3)
    assert torch.equal(again.at(9)[0], batches.at(9)[0])
    assert not torch.equal(Batches(text, 8, 4, seed=4).at(0)[0], batches.at(0)[0])


def test_validation_sequences_are_spread_over_the_text() -> None:
    text = torch.arange(101, dtype=torch.uint8)
    batches = validation_batches(text, context=10, sequences=10, batch_size=4)
    assert [len(inputs) for inputs, _ in batches] == [4, 4, 2]
    inputs = torch.cat([inputs for inputs, _ in batches])
    assert inputs[:, 0].tolist() == list(range(0, 100, 10))
    assert torch.equal(torch.cat([targets for _, targets in batches]), inputs + 1)


# Evaluation


@pytest.fixture
def inference(text: Path) -> Inference:
    torch.manual_seed(0)
    model = ByteLM(tiny(text))
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return Inference(model, torch.device("cpu"), torch.float32, context=32)


def test_an_evaluation_counts_experts_and_costs(inference: Inference) -> None:
    tokens = torch.randint(1, 128, (3, 33))
    result = inference.evaluate([(tokens[:2, :-1], tokens[:2, 1:]), (tokens[2:, :-1], tokens[2:, 1:])])
    logits = inference.model(tokens[:, :-1])
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert result.bits_per_byte == pytest.approx(nats.item() / math.log(2), rel=1e-5)
    assert result.experts.shape == (2, 96)
    assert result.rows.sum(1).tolist() == result.experts.long().sum(1).tolist()
    assert [sum(layer) for layer in result.load] == pytest.approx([1, 1])
    assert result.tokens.tolist() == tokens[:, :-1].flatten().tolist()
    assert result.previous.view(3, 32)[:, 1:].tolist() == tokens[:, :-2].tolist()
    assert inference.model.training


def test_a_trace_follows_text_longer_than_the_context(inference: Inference) -> None:
    for length in (1, 15, 32, 33, 48, 49, 100):
        content = bytes(32 + i % 64 for i in range(length))
        trace = inference.trace(content)
        assert bytes(trace.tokens.tolist()) == content
        assert trace.experts.shape == (2, length)
        assert trace.bits.shape == trace.previous.shape == (length,)
        assert trace.bits[-1] == 0
        head = torch.tensor(list(content[:32]))[None]
        alone = inference.evaluate([(head, head)])
        assert torch.equal(trace.experts[:, : head.shape[1]], alone.experts)


def test_a_sample_follows_from_its_seed_and_ends_with_the_file(inference: Inference) -> None:
    first, second = (list(inference.write(b"def ", 40, 1.0, seed=7)) for _ in range(2))
    assert first == second
    assert len(first) <= 40
    assert first != list(inference.write(b"def ", 40, 1.0, seed=8))
    with torch.no_grad():
        inference.model.head.weight.zero_()
    assert list(inference.write(b"def ", 40, 0.0, seed=7)) == []  # all alike: the first is the end of a file


def evaluation_of(content: bytes, experts: list[list[int]]) -> Evaluation:
    tokens = torch.tensor(list(content), dtype=torch.uint8)
    return Evaluation(
        tokens=tokens,
        previous=torch.cat((torch.tensor([SEPARATOR], dtype=torch.uint8), tokens[:-1])),
        bits=torch.arange(len(content)).float(),
        experts=torch.tensor(experts, dtype=torch.uint8),
        rows=torch.ones(len(experts), 4, dtype=torch.int64),
    )


def test_bytes_are_classified() -> None:
    content = b"if a_1:\n    x = 2 \xc3"
    names = [BYTE_CLASSES[i] for i in byte_classes(evaluation_of(content, [[1] * len(content)])).tolist()]
    first, later, space, indent = (
        "start of a word",
        "inside a word",
        "space",
        "indentation",
    )
    assert names == [first, later, space, first, later, "digit", "punctuation", "line end"] + [indent] * 4 + [
        first, space, "punctuation", space, "digit", space, "other"
    ]  # fmt: skip


def test_figures_by_class_are_means() -> None:
    figures = {each.name: each for each in figures_by_class(evaluation_of(b"ab1", [[1, 2, 3], [3, 2, 1]]))}
    assert figures.keys() == {"start of a word", "inside a word", "digit"}
    assert [each.experts for each in figures.values()] == [2, 2, 2]
    assert figures["digit"].bits == 2
    assert sum(each.share for each in figures.values()) == pytest.approx(1)


def test_characters_of_several_bytes_are_shown_as_one() -> None:
    content = "aé\t\x01b".encode() + b"\xff"
    trace = evaluation_of(content, [[1, 2, 4, 1, 1, 3, 2], [1, 1, 1, 1, 1, 1, 1]])
    characters, views = text_views(TextFile("x", content), trace)
    assert characters == ["a", "é", "\t", "\ufffd", "b", "\ufffd"]
    assert [view.name for view in views] == ["mean", "layer 1", "layer 2", "bits"]
    assert views[0].values == [1, 2, 1, 1, 2, 1.5]
    assert views[1].values == [1, 3, 1, 1, 3, 2]
    assert views[3].values == [0, 0 + 1, 2, 3, 4, 5]
    section = text_section(TextFile("x", content), trace)
    data = json.loads(re.search(r'<script type="application/json" id="text-data">(.*?)</script>', section)[1])
    assert [len(view["values"]) for view in data["views"]] == [6] * 4
    assert section.count('<span class="ink') == 6


def test_the_excerpt_is_the_beginning_of_a_file_of_middle_size() -> None:
    files = [TextFile(name, b"line\n" * count) for name, count in (("c", 1000), ("a", 10), ("b", 700))]
    excerpt = choose_excerpt(files)
    assert excerpt.name == "b"
    assert excerpt.content == b"line\n" * 560


# Drawing


def test_text_can_be_read_on_every_color() -> None:
    for scale in (LIGHT_SCALE, DARK_SCALE):
        assert all(contrast(color, readable_ink(color)) >= 4.5 for color in scale)
    brightness = [contrast(color, "#000000") for color in LIGHT_SCALE]
    assert brightness == sorted(brightness, reverse=True)
    brightness = [contrast(color, "#000000") for color in DARK_SCALE]
    assert brightness == sorted(brightness)
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_levels_stay_on_the_scale() -> None:
    assert [level_of(value, 1, 8) for value in (-5, 1, 2, 8, 99)] == [0, 0, 1, 7, 7]


def test_labels_are_kept_apart_in_their_order() -> None:
    places = apart([50, 52, 51, 200], 15, 0, 300)
    assert places[0] + 14.5 <= places[2] <= places[1] - 14.5
    assert places[3] == 200


def test_curves_are_smoothed_and_thinned() -> None:
    assert smoothed([3.0] * 5, 10) == pytest.approx([3.0] * 5)
    assert smoothed([1.0, 2.0], 1) == [1.0, 2.0]
    series = thinned(Series("a", range(1000), [2 * x for x in range(1000)], "red"))
    assert len(series.x) <= 241
    assert (series.x[-1], series.y[-1]) == (999, 1998)
    assert all(y == pytest.approx(2 * x) for x, y in zip(series.x, series.y, strict=True))


def test_ticks_are_round_numbers_over_the_range() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(1.3, 2.1)[0] <= 1.3
    assert ticks(5, 5)
    assert log_ticks(1.8, 8.0) == [1.5, 2, 3, 4, 6, 8]


def test_a_chart_of_one_point_is_drawn() -> None:
    svg = line_chart([Series("a", [1], [8.0], "red", "points")], title="t", x_label="x", y_label="y", log=True)
    Elements(svg)
    assert "nan" not in svg
    assert "inf" not in svg


def test_the_live_panel_shows_the_run(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "REFRESH_SECONDS", 0.0)
    out = io.StringIO()
    trainer = make_trainer(tiny(text, steps=10, eval_interval=5), tmp_path / "run")
    with Progress(Console(file=out, force_terminal=True, width=100)) as show:

        def after_step(trainer: Trainer) -> bool:
            show(trainer)
            return True

        trainer.run(after_step)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    for words in (
        "tiny",
        "100%",
        "step 10",
        "validation",
        "bytes per second",
        "experts per byte",
        "layer 2",
        "0:00 left",
    ):
        assert words in shown


def test_sparklines_span_their_range() -> None:
    assert sparkline([8, 7, 1], 3) == "█▇▁"
    assert sparkline([2, 2], 5) == "▁▁"
    assert len(sparkline(list(range(100)), 30)) <= 30


def test_a_corpus_of_its_own_can_be_trained_on(tmp_path: Path) -> None:
    content = b"ab" * 500
    corpus = Corpus(
        "ab", [TextFile("ab", content)], [TextFile("ab", content)], *2 * [torch.tensor(list(content)).byte()]
    )
    trainer = Trainer(Settings(**(TINY | {"steps": 25})), corpus, tmp_path)
    trainer.run(lambda trainer: True)
    assert trainer.evaluate().bits_per_byte < 0.5
