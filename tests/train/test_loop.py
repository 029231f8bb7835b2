"""The loop: exact resume, exact accumulation, steps that are skipped, signals, and runs that learn."""

from __future__ import annotations

import functools
import io
import os
import random
import signal

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.checkpoint import checkpoint

from hybrid_lm.data import Batch
from hybrid_lm.files import DiskError
from hybrid_lm.layers.block import Residual
from hybrid_lm.train import checkpoint as checkpoints
from hybrid_lm.train import loop, optim
from hybrid_lm.train import run as runs
from hybrid_lm.train.evaluate import validate
from hybrid_lm.train.log import read_metrics
from hybrid_lm.train.loop import Diverged, train
from hybrid_lm.train.source import open_source

DROPOUT = ("model.block.dropout=0.2", "model.embedding.dropout=0.1", "train.accumulate=2")
TIMES = ("tokens_per_s", "step_s", "data_share", "memory_mb", "seconds")


def content(run_dir, step):
    """Weights, moments and counters of a checkpoint, and the run's records, without times."""
    found = checkpoints.read(run_dir / "checkpoints" / checkpoints.step_name(step))
    records = [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(run_dir)]
    return found.model, found.optimizer, records


def assert_equal(one, two):
    for x, y in zip(one[:2], two[:2], strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert torch.equal(x[name], y[name]), name
    assert one[2] == two[2]


def test_five_steps_and_five_more_are_ten_bit_for_bit(make_config, tmp_path, quiet):
    options = (*DROPOUT, "train.save_every_steps=5", "train.eval_every_steps=2", "train.log_every_steps=2")
    # A constant rate: with fewer steps in all, another schedule would be another curve.
    options += ("train.schedule.kind=constant",)
    train(make_config(*options, pattern="m a f"), tmp_path / "whole", console=quiet)

    class Stop(Exception):
        pass

    def stop_at_six(step, *args, **kwargs):
        if step == 6:
            raise Stop
        return rate(step, *args, **kwargs)

    rate, optim.learning_rate = optim.learning_rate, stop_at_six
    try:
        with pytest.raises(Stop):
            train(make_config(*options, pattern="m a f"), tmp_path / "parts", console=quiet)
    finally:
        optim.learning_rate = rate
    torch.rand(3), random.random(), np.random.rand()  # the caller's own random numbers do not matter
    result = train(make_config(*options, pattern="m a f"), tmp_path / "parts", resume=True, console=quiet)
    assert result.step == 10
    assert_equal(content(tmp_path / "whole", 10), content(tmp_path / "parts", 10))


def test_training_leaves_the_callers_random_numbers_alone(make_config, tmp_path, quiet):
    def draw():
        return torch.rand(2).tolist(), random.random(), np.random.rand()

    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = draw()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    train(make_config(*DROPOUT, "train.steps=1"), tmp_path / "run", console=quiet)
    assert draw() == expected


def test_more_steps_may_be_asked_for_and_a_complete_run_stays(make_config, tmp_path, quiet):
    first = train(make_config("train.steps=2"), tmp_path / "run", console=quiet)
    again = train(make_config("train.steps=2"), tmp_path / "run", resume=True, console=quiet)
    assert (again.step, again.stopped) == (2, "done")
    assert again.metrics == first.metrics
    more = train(make_config("train.steps=3"), tmp_path / "run", resume=True, console=quiet)
    assert more.step == 3
    assert "steps: 3" in (tmp_path / "run" / "config.yaml").read_text()
    history = runs.read_manifest(tmp_path / "run")["history"]
    assert [entry["resumed_at_step"] for entry in history] == [2, 2]


def test_resume_passes_over_a_damaged_checkpoint(make_config, tmp_path, quiet):
    config = make_config("train.save_every_steps=2", "train.steps=6")
    train(config, tmp_path / "run", console=quiet)
    whole = content(tmp_path / "run", 6)
    newest = tmp_path / "run" / "checkpoints" / "step-00000006"
    (newest / "optimizer.safetensors").write_bytes(b"junk")
    with pytest.warns(UserWarning, match=r"step-00000006/optimizer\.safetensors: 4 bytes"):
        train(config, tmp_path / "run", resume=True, console=quiet)
    assert_equal(content(tmp_path / "run", 6), whole)


def one_step(config, source, n_batches):
    """Loss and, per parameter, gradient of one optimizer step without clipping."""
    setup_model = runs.build_model(runs.with_vocabulary(config, source.vocab_size))
    optimizer = torch.optim.SGD([{"params": list(setup_model.parameters())}], lr=0.0)
    batches = [source.batch(0, micro) for micro in range(n_batches)]
    outcome = loop.optimizer_step(
        setup_model, optimizer, setup_model.token_loss, batches, torch.device("cpu"), config.train
    )
    loss = outcome.nll / outcome.labels
    return loss, {name: parameter.grad for name, parameter in setup_model.named_parameters()}


def test_accumulating_is_one_large_batch_even_with_different_numbers_of_labels(make_probe, tmp_path):
    config = make_probe("train.clip_norm=null")
    source = open_source(config, tmp_path)
    parts = [source.batch(step, 0) for step in range(4)]
    assert len({int((part.labels != -100).sum()) for part in parts}) > 1
    large = Batch(*(np.concatenate([part[i] for part in parts]) for i in range(2)), None)

    class Fixed:
        vocab_size = source.vocab_size

        def __init__(self, batches):
            self.batches = batches

        def batch(self, step, micro):
            return self.batches[micro]

    (_, one), (_, four) = one_step(config, Fixed([large]), 1), one_step(config, Fixed(parts), 4)
    for name, expected in one.items():
        # Sums of 4 * 4 rows * 32 tokens in another order: 512 additions of float32 rounding at most.
        bound = 512 * torch.finfo(torch.float32).eps * expected.abs().max()
        assert (four[name] - expected).abs().max() <= bound, name


def test_a_step_without_a_finite_gradient_changes_nothing(make_config, tmp_path, quiet, monkeypatch):
    real, steps = loop.optimizer_step, []

    def poisoned(model, optimizer, token_loss, *args):
        steps.append({name: x.detach().clone() for name, x in model.named_parameters()})

        def nan_at_third(*inputs, **options):
            loss = token_loss(*inputs, **options)
            return loss._replace(objective=loss.objective * (float("nan") if len(steps) == 3 else 1.0))

        return real(model, optimizer, nan_at_third, *args)

    monkeypatch.setattr(loop, "optimizer_step", poisoned)
    train(make_config("train.steps=5"), tmp_path / "run", console=quiet)
    before, after = steps[2], steps[3]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(steps[3][name], steps[4][name]) for name in before)
    records = read_metrics(tmp_path / "run")
    assert [record["skipped"] for record in records if record["kind"] == "train"] == [0, 0, 1, 1]
    (event,) = [record for record in records if record["kind"] == "event"]
    assert event["step"] == 3
    assert "not finite (1 in a row)" in event["text"]


def test_ten_bad_steps_in_a_row_end_the_run(make_config, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(
        loop,
        "optimizer_step",
        lambda *args: loop.Outcome(1.0, 1.0, 1, float("nan") if calls() > 4 else 1.0, {}),
    )
    count = iter(range(1, 100))
    calls = count.__next__
    with pytest.raises(
        Diverged, match=r"step 14: .*10 steps in a row; the newest checkpoint is .*step-00000012"
    ):
        train(make_config("train.steps=30", "train.save_every_steps=4"), tmp_path / "run", console=quiet)


class Tripwire(io.StringIO):
    """Sends a signal to this process the first time that a text is printed."""

    def __init__(self, text: str, number: int):
        super().__init__()
        self.text, self.number = text, number

    def write(self, text: str) -> int:
        if self.text in text:
            self.text = "\0"  # once
            os.kill(os.getpid(), self.number)
        return super().write(text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_next_step_and_says_how_to_go_on(make_config, tmp_path, quiet, number):
    handlers = [signal.getsignal(known) for known in (signal.SIGINT, signal.SIGTERM)]
    out = Tripwire("step  3/10", number)
    config = make_config(*DROPOUT)
    result = train(config, tmp_path / "run", console=Console(file=out, width=200))
    assert result.stopped == number.name
    assert result.step == 3
    assert f"{number.name}: saved at step 3; `hybrid-lm train --resume" in out.getvalue()
    assert [signal.getsignal(known) for known in (signal.SIGINT, signal.SIGTERM)] == handlers

    train(config, tmp_path / "run", resume=True, console=quiet)
    train(config, tmp_path / "whole", console=quiet)
    one, two = content(tmp_path / "run", 10), content(tmp_path / "whole", 10)
    assert_equal((*one[:2], [r for r in one[2] if r["kind"] != "event"]), two)


def test_a_failed_save_on_the_way_is_a_warning_and_the_last_one_an_error(
    make_config, tmp_path, monkeypatch, quiet
):
    real = checkpoints.save

    def failing(run_dir, step, *args, **kwargs):
        if step in bad:
            raise DiskError("cannot write: No space left on device")
        return real(run_dir, step, *args, **kwargs)

    monkeypatch.setattr(checkpoints, "save", failing)
    config, bad = make_config("train.save_every_steps=3"), {6}
    train(config, tmp_path / "one", console=quiet)
    assert [path.name for path in checkpoints.step_folders(tmp_path / "one")] == [
        "step-00000009",
        "step-00000010",
    ]
    (event,) = [record for record in read_metrics(tmp_path / "one") if record["kind"] == "event"]
    assert event["step"] == 6
    assert "not saved, training goes on: cannot write: No space left" in event["text"]
    bad = {10}
    with pytest.raises(DiskError, match="No space left"):
        train(config, tmp_path / "two", console=quiet)
    assert checkpoints.newest(tmp_path / "two").name == "step-00000009"


def test_text_is_learned(make_config, tmp_path, quiet):
    options = ("train.steps=40", "train.optimizer.lr=0.01", "train.batch_size=8", "train.eval_every_steps=20")
    result = train(make_config(*options), tmp_path / "run", console=quiet)
    first, second = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "eval"]
    # A uniform guess among 258 entries has log2(258) = 8.01 bits; letter frequencies alone give less than 5.
    assert second["bits_per_byte"] < first["bits_per_byte"] < 8.01
    assert result.metrics["bits_per_byte"] == second["bits_per_byte"] < 5.0
    assert second["bits_per_byte"] == pytest.approx(second["nll"] / np.log(2))
    train_records = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert train_records[-1]["tokens"] == 40 * 8 * 16
    assert 0 <= train_records[-1]["data_share"] <= 1


def test_a_probe_ends_at_the_accuracy_asked_for(make_probe, tmp_path, quiet):
    config = make_probe("train.eval_every_steps=2", "train.stop_at_accuracy=0.0")
    result = train(config, tmp_path / "run", console=quiet)
    assert (result.step, result.stopped) == (2, "accuracy")
    assert checkpoints.newest(tmp_path / "run").name == "step-00000002"
    accuracies = [value for key, value in result.metrics.items() if key.startswith("accuracy/")]
    assert len(accuracies) == 4
    assert result.metrics["accuracy"] == pytest.approx(sum(accuracies) / 4)
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_a_run_that_ended_at_its_accuracy_is_complete_until_more_is_asked(make_probe, tmp_path, quiet):
    options = ("train.eval_every_steps=2", "train.optimizer.lr=1e-9")
    config = make_probe(*options, "train.stop_at_accuracy=0.0")
    first = train(config, tmp_path / "run", console=quiet)
    assert (first.step, first.stopped) == (2, "accuracy")
    again = train(config, tmp_path / "run", resume=True, console=quiet)
    assert (again.step, again.stopped) == (2, "accuracy")
    assert again.metrics == first.metrics
    more = make_probe(*options, "train.stop_at_accuracy=0.9")
    assert train(more, tmp_path / "run", resume=True, console=quiet).step == 4


def test_accuracy_is_of_the_labelled_positions(make_probe, tmp_path):
    config = make_probe()
    source = open_source(config, tmp_path)
    model = runs.build_model(runs.with_vocabulary(config, source.vocab_size))
    found = validate(model, source)
    right, scored = 0, 0
    for name, batch in source.eval_batches():
        if name == "n_pairs=4,seq_len=32":
            guesses = model(torch.from_numpy(batch.tokens)).logits.argmax(-1).numpy()
            right += int(((guesses == batch.labels) & (batch.labels != -100)).sum())
            scored += int((batch.labels != -100).sum())
    assert scored == 5 * 4
    assert found["accuracy/n_pairs=4,seq_len=32"] == right / scored
    assert validate(model, source, stop=lambda: True) == {}


def test_layers_that_are_computed_again_train_the_same(make_config, tmp_path, quiet, monkeypatch):
    seen = []
    again = functools.partial(checkpoint, use_reentrant=False)
    watched = staticmethod(lambda *args: seen.append(1) or again(*args))
    monkeypatch.setattr(Residual, "_gradient_checkpointing_func", watched)
    options = (*DROPOUT, "train.steps=3")
    train(make_config(*options, pattern="m a f"), tmp_path / "kept", console=quiet)
    assert not seen
    more = "train.gradient_checkpointing=true"
    train(make_config(*options, more, pattern="m a f"), tmp_path / "again", console=quiet)
    assert len(seen) == 3 * 2 * 3  # layers, passes of a step, steps
    # The same operations on the same numbers, dropout included.
    assert_equal(content(tmp_path / "kept", 3), content(tmp_path / "again", 3))


def test_bf16_is_float32_but_for_its_roundings(make_config, tmp_path):
    def measured(precision):
        config = make_config(f"train.precision={precision}", "train.clip_norm=null", pattern="m a f")
        return one_step(config, open_source(config, tmp_path), 1)

    (loss, plain), (rounded_loss, rounded) = measured("float32"), measured("bf16")
    assert loss != rounded_loss
    # Nine products follow one another (two of the SSM, four of attention, two of the MLP, the logits); each
    # rounds two factors and a result by at most u, relative; going back, the same again.
    u, roundings = torch.finfo(torch.bfloat16).eps / 2, 2 * 9 * 3
    # All in one direction: the worst case, in each parameter.
    for name, expected in plain.items():
        assert (rounded[name] - expected).norm() <= roundings * u * expected.norm(), name
    # Independent ones add like a random walk: so they are in the gradient as a whole.
    whole, other = (torch.cat([x.flatten() for x in found.values()]) for found in (plain, rounded))
    assert (other - whole).norm() <= roundings**0.5 * u * whole.norm()
    # A token's loss moves by at most twice what its logits do, which are below 1 in an untrained model.
    assert abs(rounded_loss - loss) <= 2 * (roundings / 2) ** 0.5 * u
    assert loss == pytest.approx(np.log(258), abs=1.0)


def test_objective_options_train(make_config, tmp_path, quiet):
    options = ("train.label_smoothing=0.1", "train.z_loss=0.01")
    result = train(make_config(*options, "train.steps=3", pattern="m a f"), tmp_path / "run", console=quiet)
    plain = train(make_config("train.steps=3", pattern="m a f"), tmp_path / "plain", console=quiet)
    assert np.isfinite(result.metrics["loss"])
    assert result.metrics["loss"] != plain.metrics["loss"]
    assert result.metrics["objective"] > result.metrics["loss"]


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler about its own parts
def test_a_compiled_model_trains_as_an_eager_one(make_config, tmp_path, quiet, monkeypatch):
    # Traced and differentiated as always, but not turned into C++, which would take half a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled, eager = (
        train(make_config(f"train.compile={on}", "train.steps=2"), tmp_path / on, console=quiet).metrics[
            "loss"
        ]
        for on in ("true", "false")
    )
    # Two float32 programs of the same sums; the longest is over 32 features: a few hundred roundings in all.
    assert compiled == pytest.approx(eager, rel=512 * torch.finfo(torch.float32).eps)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler about its own parts
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_a_compiled_run_compiles_once_and_in_one_piece(
    checkpointing, make_config, tmp_path, quiet, monkeypatch
):
    compile_ = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile_)
    options = (
        "train.compile=true",
        "train.steps=3",
        "train.accumulate=2",
        "train.eval_every_steps=1",
        "train.precision=bf16",
        f"train.gradient_checkpointing={checkpointing}",
    )
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        result = train(make_config(*options, pattern="m f m"), tmp_path / "run", console=quiet)
    torch.compiler.reset()
    assert result.step == 3
