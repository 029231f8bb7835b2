"""The training loop, in plain sight."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from hybrid_lm.config.schema import RunConfig, TrainConfig
from hybrid_lm.data import IGNORE, Batch
from hybrid_lm.files import DiskError
from hybrid_lm.layers.base import Auxiliary
from hybrid_lm.model.balance import rebalance
from hybrid_lm.model.lm import LMLoss
from hybrid_lm.terminal import Terminal
from hybrid_lm.train import checkpoint as checkpoints
from hybrid_lm.train import optim
from hybrid_lm.train import run as runs
from hybrid_lm.train.auxiliary import detached, measures
from hybrid_lm.train.evaluate import to_tensors, validate
from hybrid_lm.train.log import Log, open_log, read_metrics
from hybrid_lm.train.process import Signals, own_randomness, peak_memory, seed_step

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
    """The last training record and the last validation, by their names in metrics.jsonl."""
    stopped: str
    """done | accuracy (`stop_at_accuracy` was reached) | the signal's name, SIGINT or SIGTERM."""


@dataclass
class Window:
    """Sums over the steps since the last training record; skipped steps are left out."""

    nll: float = 0.0
    objective: float = 0.0
    labels: int = 0
    tokens: int = 0
    steps: int = 0
    data_s: float = 0.0
    seconds: float = 0.0
    auxiliary: dict[str, float] = field(default_factory=dict)


@dataclass
class Counters:
    """All that a run knows besides its weights, the optimizer's moments and its configuration."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    tokens: int = 0
    """Tokens read."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    accuracy: float | None = None
    """At the last validation, of the setting that was answered worst; None: text, or none was made."""
    window: Window = field(default_factory=Window)


class Outcome(NamedTuple):
    """What one optimizer step measured."""

    nll: float
    """Sum over the labelled tokens, in nats."""
    objective: float
    """Sum over the labelled tokens of what is minimised: label smoothing, z-loss and the layers' own losses
    included."""
    labels: int
    grad_norm: float
    """Before clipping. Not finite: the step was skipped."""
    auxiliary: dict[str, float]
    """The layers' own losses, without their factors, and how evenly experts were used."""


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

    Raises ValueError for anything wrong with configuration, data, folder or disk, before the first step;
    Diverged (a ValueError) after ten steps in a row without a finite gradient; DiskError (an OSError and a
    ValueError) if the last save fails.
    """
    console = console or Terminal(stderr=True)
    path = Path(run_dir)
    if path.is_symlink() or not path.name:
        path = path.resolve()
    if resume and overwrite:
        raise ValueError("resume goes on with a run and overwrite replaces it: say one of them")
    with ExitStack() as held:
        if resume and runs.is_run(path):
            held.enter_context(runs.locked(path))
        if resume:
            setup = runs.resume(config, path, console=console)
        else:
            setup = runs.start(config, path, overwrite=overwrite, console=console)
            held.enter_context(runs.locked(path))
        held.enter_context(own_randomness(setup.device))
        signals = held.enter_context(Signals())
        optimizer = optim.make_optimizer(setup.model, setup.config.train.optimizer)
        counters = restore(setup, optimizer)
        log = open_log(setup.config, setup.path, setup.run_id, console, counters.step)
        try:
            return fit(setup, optimizer, counters, log, signals)
        finally:
            log.close()


def fit(
    setup: runs.Setup, optimizer: torch.optim.Optimizer, counters: Counters, log: Log, signals: Signals
) -> Result:
    """From the counters' step to the end of the run."""
    model, source, c = setup.model, setup.source, setup.config.train
    model.gradient_checkpointing = c.gradient_checkpointing
    # Without CUDA graphs: the gradients of `accumulate` batches would be added up in memory that the next
    # replay of a graph writes over. `bench gpu` measures what graphs would bring.
    token_loss = torch.compile(model.token_loss) if c.compile else model.token_loss
    stopped = "accuracy" if reached(counters.accuracy, c.stop_at_accuracy) else ""
    metrics = last_metrics(setup.path) if stopped or counters.step == c.steps else {}
    while counters.step < c.steps and not stopped:
        begin = time.perf_counter()
        batches = [source.batch(counters.step, micro) for micro in range(c.accumulate)]
        data_s = time.perf_counter() - begin
        seed_step(c.seed, counters.step)
        rate = optim.learning_rate(counters.step + 1, c)
        optim.set_learning_rate(optimizer, rate)
        outcome = optimizer_step(model, optimizer, token_loss, batches, setup.device, c)
        count(counters, outcome, batches, data_s, time.perf_counter() - begin)
        check_finite(counters, log, setup.path)

        step, last = counters.step, counters.step == c.steps
        if (last or step % c.log_every_steps == 0) and counters.window.steps:
            record = report(counters, outcome, rate, setup.device)
            log.record("train", step, **record)
            metrics |= record
        if last or (c.eval_every_steps and step % c.eval_every_steps == 0):
            # The last validation is short and is finished; any other gives way to a signal.
            stop = (lambda: False) if last else (lambda: bool(signals.name))
            found = validate(model, source, n_batches=c.eval_batches, bf16=c.precision == "bf16", stop=stop)
            if found:
                log.record("eval", step, **found)
                metrics |= found
                counters.accuracy = worst(found)
            if reached(counters.accuracy, c.stop_at_accuracy):
                stopped = "accuracy"
                log.event(step, f"accuracy {c.stop_at_accuracy} reached on every setting")
        stopped = stopped or signals.name or ("done" if last else "")
        if stopped or (c.save_every_steps and step % c.save_every_steps == 0):
            save(setup, optimizer, counters, log, last=bool(stopped))
    if stopped == "done":
        check_result(metrics, setup.path)
    if signals.name:
        text = (
            f"{signals.name}: saved at step {counters.step}; `hybrid-lm train --resume {setup.path}` goes on"
        )
        log.event(counters.step, text)
    return Result(setup.path, counters.step, metrics, stopped or "done")


def optimizer_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    token_loss: Callable[..., LMLoss],
    batches: list[Batch],
    device: torch.device,
    c: TrainConfig,
) -> Outcome:
    """One step on the mean over all labelled tokens of all batches, and on the layers' own losses.

    Accumulating changes the memory and not the gradient: every batch is divided by the labels of all. What
    the layers add is a mean of the batches: the balance of experts is asked of each of them.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    n = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
    sums, passes = torch.zeros(2, device=device), list[Auxiliary]()
    for batch in batches:
        tokens, labels, doc_ids = to_tensors(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=c.precision == "bf16"):
            loss = token_loss(
                tokens, labels, doc_ids=doc_ids, label_smoothing=c.label_smoothing, z_loss=c.z_loss
            )
        added = loss.auxiliary.objective / len(batches)
        (loss.objective.sum() / max(1, n) + added).backward()
        passes.append(detached(loss.auxiliary))
        sums += torch.stack([loss.nll.detach().sum(), loss.objective.detach().sum()])
        sums[1] += n * passes[-1].objective / len(batches)
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    grad_norm = norm.item()
    if math.isfinite(grad_norm):
        if c.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, c.clip_norm, norm)
        optimizer.step()
        rebalance(passes)
    found = measures(passes)
    nll, objective, *values = torch.stack([*sums, *found.values()]).tolist()
    return Outcome(nll, objective, n, grad_norm, dict(zip(found, values, strict=True)))


def count(counters: Counters, outcome: Outcome, batches: list[Batch], data_s: float, seconds: float) -> None:
    """Adds a step to the counters."""
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
    for name, value in outcome.auxiliary.items():
        w.auxiliary[name] = w.auxiliary.get(name, 0.0) + value


def check_finite(counters: Counters, log: Log, run_dir: Path) -> None:
    """Tells of a skipped step; raises Diverged after too many."""
    n = counters.skipped_in_a_row
    if not n:
        return
    log.event(counters.step, f"WARNING: step skipped, its gradient is not finite ({n} in a row)")
    if n == MAX_SKIPPED:
        saved = checkpoints.step_folders(run_dir)
        kept = f"the newest checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"
        raise Diverged(
            f"step {counters.step}: the gradient was not finite {n} steps in a row; {kept}. Lower "
            "train.optimizer.lr, raise train.schedule.warmup_steps, or use train.precision: float32"
        )


def check_result(metrics: dict[str, Any], run_dir: Path) -> None:
    """Raises Diverged if the last validation found no number."""
    wrong = [key for key, value in metrics.items() if key.startswith(("nll", "bits")) and value != value]
    if wrong or not any(key.startswith(("nll", "bits")) for key in metrics):
        raise Diverged(
            f"{run_dir}: trained to the end, but the held-out {wrong[0] if wrong else 'loss'} is no finite "
            "number; lower train.optimizer.lr or raise train.schedule.warmup_steps"
        )


def report(counters: Counters, outcome: Outcome, rate: float, device: torch.device) -> dict[str, Any]:
    """The training record of the window, which begins anew.

    loss, objective: nats per labelled token, means over the window; balance, router_z, max_load (see
    `train.auxiliary`): means over its steps; grad_norm, lr: of the last step; tokens: read since the
    beginning; step_s: seconds per step, validation and saving not counted; data_share: part of
    them spent on data; memory_mb: peak of the process, or of the GPU; skipped: steps since the beginning.
    """
    w, counters.window = counters.window, Window()
    return {
        "loss": w.nll / max(1, w.labels),
        "objective": w.objective / max(1, w.labels),
        **{name: value / w.steps for name, value in w.auxiliary.items()},
        "grad_norm": outcome.grad_norm,
        "lr": rate,
        "tokens": counters.tokens,
        "tokens_per_s": w.tokens / w.seconds,
        "step_s": w.seconds / w.steps,
        "data_share": w.data_s / w.seconds,
        "memory_mb": peak_memory(device) / 1e6,
        "skipped": counters.skipped,
    }


def save(
    setup: runs.Setup, optimizer: torch.optim.Optimizer, counters: Counters, log: Log, *, last: bool
) -> None:
    """Saves a checkpoint. One that fails on the way costs a warning; the `last` one raises DiskError."""
    form = optim.implementation(setup.device)
    state = {"identity": setup.identity, "optimizer": form, "counters": asdict(counters)}
    weights, moments = checkpoints.weights(setup.model), optim.moments(optimizer)
    try:
        checkpoints.save(setup.path, counters.step, weights, moments, state, keep=setup.config.train.keep)
    except DiskError as error:
        if last:
            raise
        # The older checkpoint is still there, and the disk may have room again by the next save.
        log.event(counters.step, f"WARNING: not saved, training goes on: {error}")


def restore(setup: runs.Setup, optimizer: torch.optim.Optimizer) -> Counters:
    """Puts a checkpoint's weights and moments in place; returns its counters."""
    stored, setup.checkpoint = setup.checkpoint, None  # three times the model, and not needed again
    if stored is None:
        return Counters()
    checkpoints.load_weights(setup.model, stored.model, stored.path)
    optim.load_moments(optimizer, stored.optimizer)
    counters = stored.state["counters"]
    return Counters(**{**counters, "window": Window(**counters["window"])})


def worst(metrics: dict[str, float]) -> float | None:
    """The least accuracy of the tested settings; None for text."""
    return min((value for key, value in metrics.items() if key.startswith("accuracy/")), default=None)


def reached(accuracy: float | None, threshold: float | None) -> bool:
    """Whether the run is as accurate as asked."""
    return accuracy is not None and threshold is not None and accuracy >= threshold


def last_metrics(run_dir: Path) -> dict[str, Any]:
    """What a complete run has on record."""
    found: dict[str, Any] = {}
    for record in read_metrics(run_dir):
        if record["kind"] in ("train", "eval"):
            found |= {key: value for key, value in record.items() if key not in ("kind", "step")}
    return found
