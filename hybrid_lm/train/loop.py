"""The training loop, in plain sight."""

from __future__ import annotations

import hashlib
import math
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console

from hybrid_lm.config.schema import RunConfig, TrainConfig
from hybrid_lm.data import IGNORE, Batch
from hybrid_lm.ops import TokenLoss
from hybrid_lm.train import checkpoint as checkpoints
from hybrid_lm.train import optim
from hybrid_lm.train import run as runs
from hybrid_lm.train.disk import DiskError
from hybrid_lm.train.evaluate import to_tensors, validate
from hybrid_lm.train.log import METRICS, ConsoleSink, JsonlSink, Log, WandbSink, drop_after, read_metrics

MAX_SKIPPED = 10
"""Steps in a row without a finite gradient after which a run is lost."""


class Diverged(ValueError):
    """Training that came to nothing but infinities and NaNs."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    run_dir: Path
    step: int
    metrics: dict[str, Any]
    """The last validation and the last training record, by the names in metrics.jsonl."""
    stopped: str
    """done | accuracy (`stop_at_accuracy` was reached) | the signal's name, SIGINT or SIGTERM."""


@dataclass
class Window:
    """Sums over the steps since the last record."""

    nll: float = 0.0
    objective: float = 0.0
    labels: int = 0
    tokens: int = 0
    steps: int = 0
    data_s: float = 0.0
    seconds: float = 0.0


@dataclass
class Counters:
    """All that a run knows besides weights, moments and its configuration."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    window: Window = field(default_factory=Window)


class StepOutcome(NamedTuple):
    """What one optimizer step measured."""

    nll: float
    """Sum over the labelled tokens."""
    objective: float
    labels: int
    grad_norm: float
    """Before clipping; not finite: the step was skipped."""


def train(
    config: RunConfig,
    run_dir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Result:
    """Trains a model and leaves everything in `run_dir`; the layout is in `train.checkpoint`.

    Args:
        run_dir: where the run is put; an existing run there needs `resume` or `overwrite`.
        resume: go on from the newest checkpoint, on the same machine exactly as if it had never stopped.
        overwrite: replace the run that is there, once everything about the new one has been checked.
        console: for progress; standard error by default, `Console(quiet=True)` for none.

    SIGINT and SIGTERM end it after the current step, with a checkpoint; a second one ends it at once.

    Raises ValueError for anything wrong with configuration, data, folder or disk, before the first step; Diverged (a ValueError)
    after ten steps in a row without a finite gradient; DiskError (an OSError and a ValueError) if the last save fails.
    """
    console = console or Console(stderr=True)
    path = Path(run_dir)
    if resume and overwrite:
        raise ValueError("resume goes on with a run and overwrite replaces it: say one of them")
    if resume:
        setup = runs.resume(config, path, console=console)
    else:
        setup = runs.start(config, path, overwrite=overwrite, console=console)
    with own_randomness(setup.device), Signals() as signals:
        return fit(setup, console, signals)


def fit(setup: runs.Setup, console: Console, signals: Signals) -> Result:
    """From the setup's step to the end of the run."""
    model, source, device, c = setup.model, setup.source, setup.device, setup.config.train
    form = optim.implementation(device)
    optimizer = optim.make_optimizer(model, c.optimizer, form)
    counters = restore(setup, optimizer)
    token_loss = torch.compile(model.token_loss) if c.compile else model.token_loss
    log = open_log(setup, console, counters.step)
    metrics: dict[str, Any] = {}
    stopped = "done"

    def save(*, last: bool) -> None:
        state = {"identity": setup.identity, "optimizer": form, "counters": asdict(counters)}
        try:
            weights, moments = checkpoints.weights(model), optim.moments(optimizer)
            checkpoints.save(setup.path, counters.step, weights, moments, state, keep=c.keep)
        except DiskError as error:
            if last:
                raise
            # The older checkpoint is still there, and the disk may have room again by the next save.
            log.event(counters.step, f"WARNING: not saved, training goes on: {error}")

    try:
        while counters.step < c.steps:
            begin = time.perf_counter()
            batches = [source.batch(counters.step, micro) for micro in range(c.accumulate)]
            data_s = time.perf_counter() - begin
            seed_step(c.seed, counters.step)
            optim.set_learning_rate(optimizer, rate := optim.learning_rate(counters.step + 1, c))
            outcome = optimizer_step(model, optimizer, token_loss, batches, device, c)
            count(counters, outcome, batches, data_s, time.perf_counter() - begin)
            step, last = counters.step, counters.step == c.steps
            if counters.skipped_in_a_row:
                log.event(
                    step, f"WARNING: step skipped, gradient not finite ({counters.skipped_in_a_row} in a row)"
                )
                if counters.skipped_in_a_row == MAX_SKIPPED:
                    raise diverged(setup.path, step)
            if (last or step % c.log_every_steps == 0) and counters.window.steps:
                record = report(counters, outcome, rate, device)
                log.record("train", step, **record)
                metrics |= record
            if last or (c.eval_every_steps and step % c.eval_every_steps == 0):
                found = validate(
                    model, source, n_batches=c.eval_batches, bf16=c.precision == "bf16", stop=signals.received
                )
                if found:
                    log.record("eval", step, **found)
                    metrics |= found
                if reached(found, c.stop_at_accuracy):
                    stopped, last = "accuracy", True
                    log.event(step, f"accuracy {c.stop_at_accuracy} reached on every setting")
            if signals.name:
                stopped, last = signals.name, True
            if last or (c.save_every_steps and step % c.save_every_steps == 0):
                save(last=last)
            if last:
                break
        if signals.name:
            text = f"{signals.name}: saved at step {counters.step}; `hybrid-lm train --resume {setup.path}` goes on"
            log.event(counters.step, text)
    finally:
        log.close()
    return Result(setup.path, counters.step, metrics or last_metrics(setup.path), stopped)


def optimizer_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    token_loss: Callable[..., TokenLoss],
    batches: list[Batch],
    device: torch.device,
    c: TrainConfig,
) -> StepOutcome:
    """One step on the mean over all labelled tokens of all batches: accumulating changes the memory, not the gradient."""
    model.train()
    optimizer.zero_grad(set_to_none=True)
    n = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
    sums = torch.zeros(2, device=device)
    for batch in batches:
        tokens, labels, doc_ids = to_tensors(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=c.precision == "bf16"):
            loss = token_loss(
                tokens, labels, doc_ids=doc_ids, label_smoothing=c.label_smoothing, z_loss=c.z_loss
            )
        objective = loss.objective.sum() / max(1, n)
        objective.backward()
        sums += torch.stack([loss.nll.detach().sum(), loss.objective.detach().sum()])
    gradients = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in gradients if p.grad is not None])
    grad_norm = norm.item()
    if math.isfinite(grad_norm):
        if c.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(gradients, c.clip_norm, norm)
        optimizer.step()
    nll, objective_sum = sums.tolist()
    return StepOutcome(nll, objective_sum, n, grad_norm)


def count(
    counters: Counters, outcome: StepOutcome, batches: list[Batch], data_s: float, seconds: float
) -> None:
    """Adds a step to the counters; the losses of a skipped one are left out of the means."""
    tokens = sum(batch.tokens.size for batch in batches)
    counters.step += 1
    counters.tokens += tokens
    if not math.isfinite(outcome.grad_norm):
        counters.skipped += 1
        counters.skipped_in_a_row += 1
        return
    counters.skipped_in_a_row = 0
    w = counters.window
    w.nll += outcome.nll
    w.objective += outcome.objective
    w.labels += outcome.labels
    w.tokens += tokens
    w.steps += 1
    w.data_s += data_s
    w.seconds += seconds


def report(counters: Counters, outcome: StepOutcome, rate: float, device: torch.device) -> dict[str, Any]:
    """The training record of the window, which begins anew.

    loss, objective: nats per labelled token, means over the window; grad_norm, lr: of the last step; step_s: seconds per
    step; data_share: part of the time spent on data; memory_mb: peak of the process, or of the GPU.
    """
    w, counters.window = counters.window, Window()
    return {
        "loss": w.nll / max(1, w.labels),
        "objective": w.objective / max(1, w.labels),
        "grad_norm": outcome.grad_norm,
        "lr": rate,
        "tokens": counters.tokens,
        "tokens_per_s": w.tokens / w.seconds,
        "step_s": w.seconds / w.steps,
        "data_share": w.data_s / w.seconds,
        "memory_mb": peak_memory(device) / 1e6,
        "skipped": counters.skipped,
    }


def restore(setup: runs.Setup, optimizer: torch.optim.Optimizer) -> Counters:
    """Puts a checkpoint's weights and moments in place; returns its counters."""
    if setup.checkpoint is None:
        return Counters()
    checkpoints.load_weights(setup.model, setup.checkpoint.model, setup.checkpoint.path)
    optim.load_moments(optimizer, setup.checkpoint.optimizer)
    stored = setup.checkpoint.state["counters"]
    # The tensors are no longer needed, and are three times the model.
    setup.checkpoint = None
    return Counters(**{**stored, "window": Window(**stored["window"])})


def open_log(setup: runs.Setup, console: Console, step: int) -> Log:
    """The run's log, without records of steps that are to be done again."""
    c = setup.config.train
    drop_after(setup.path, step)
    log = Log(console, [])
    log.add(METRICS, lambda: JsonlSink(setup.path / METRICS))
    log.add("the terminal", lambda: ConsoleSink(console, c.steps, step))
    if c.wandb.mode != "off":
        settings = setup.config.model_dump(mode="json")
        log.add("wandb", lambda: WandbSink(c.wandb, setup.path, setup.run_id, settings))
    return log


def reached(metrics: dict[str, float], threshold: float | None) -> bool:
    """Whether every tested setting is at least as accurate as asked."""
    accuracies = [value for key, value in metrics.items() if key.startswith("accuracy/")]
    return threshold is not None and bool(accuracies) and min(accuracies) >= threshold


def last_metrics(run_dir: Path) -> dict[str, Any]:
    """What a run that was already complete has on record."""
    found: dict[str, Any] = {}
    for record in read_metrics(run_dir):
        if record["kind"] in ("train", "eval"):
            found |= {key: value for key, value in record.items() if key not in ("kind", "step")}
    return found


def diverged(run_dir: Path, step: int) -> Diverged:
    saved = checkpoints.step_folders(run_dir)
    kept = f"the newest checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"
    return Diverged(
        f"step {step}: the gradient was not finite {MAX_SKIPPED} steps in a row; {kept}. Lower train.optimizer.lr, raise "
        "train.schedule.warmup_steps, or use train.precision: float32"
    )


def seed_step(seed: int, step: int) -> None:
    """Seeds every global generator from (seed, step): what a step draws does not depend on the steps before it.

    That is why checkpoints hold no generator states, and why a resumed run has the dropout of one that never stopped.
    """
    word = int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:4])
    torch.manual_seed(word)
    random.seed(word)
    np.random.seed(word)


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Gives the global generators back to the caller as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that the GPU, or else this process, has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


class Signals:
    """Remembers SIGINT or SIGTERM for the loop to see; a second one does what it always did.

    Outside of the main thread Python gives signals to nobody else, and this does nothing.
    """

    def __init__(self) -> None:
        self.name = ""
        self.before: dict[int, Any] = {}

    def received(self) -> bool:
        return bool(self.name)

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self.before = {
                number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self.restore()
