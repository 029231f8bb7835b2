"""What a run says while it trains: a JSONL file always, the terminal, and Weights & Biases if asked.

A record is flat: `{"kind": "train", "step": 10, "loss": 5.1, ...}`. Kinds: train, eval, event (`text` says
what happened). A place to log that fails is given up with one warning; the run goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from hybrid_lm.config.schema import RunConfig, WandbConfig
from hybrid_lm.files import finite, replace_text

Record = dict[str, Any]
METRICS = "metrics.jsonl"


class Sink(Protocol):
    """A place that records go to."""

    name: str

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Log:
    """Hands every record to every sink."""

    def __init__(self, console: Console, sinks: list[Sink]):
        self.console, self.sinks = console, sinks

    def record(self, kind: str, step: int, **metrics: Any) -> None:
        """One line of numbers; what is not finite becomes null."""
        self._send({"kind": kind, "step": step, **finite(metrics)})

    def event(self, step: int, text: str) -> None:
        """Something a person should know of: a failed save, a skipped step, the end."""
        self._send({"kind": "event", "step": step, "text": text})

    def _send(self, record: Record) -> None:
        for sink in list(self.sinks):
            try:
                sink.write(record)
            except Exception as error:
                self._give_up(sink, error)

    def _give_up(self, sink: Sink, error: Exception) -> None:
        self.sinks.remove(sink)
        self._warn(f"warning: no more logging to {sink.name}: {type(error).__name__}: {error}")

    def _warn(self, text: str) -> None:
        # The terminal may be the one that is gone.
        with suppress(OSError):
            print_line(self.console, text)

    def add(self, name: str, make: Any) -> None:
        """Adds the sink that `make()` returns; if it cannot be made, that is one warning too."""
        try:
            self.sinks.append(make())
        except Exception as error:
            self._warn(f"warning: no logging to {name}: {type(error).__name__}: {error}")

    def close(self) -> None:
        for sink in list(self.sinks):
            try:
                sink.close()
            except Exception as error:
                self._give_up(sink, error)


class JsonlSink:
    """`metrics.jsonl`: one record per line, out of our hands at once, on the disk at every validation."""

    name = METRICS

    def __init__(self, path: Path):
        self.file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if record["kind"] != "train":
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


class ConsoleSink:
    """On a terminal a progress bar, and above it a line now and then; every record as a line elsewhere.

    Raises OSError where nobody reads any more: a closed pipe, a terminal that is gone.
    """

    name = "the terminal"

    def __init__(self, console: Console, steps: int, step: int):
        self.console, self.width = console, len(str(steps))
        self.steps, self.tenth = steps, 10 * step // steps
        self.progress = None
        if console.is_terminal:
            # All of it fits into 80 columns, beside steps of seven digits too.
            self.progress = Progress(
                BarColumn(bar_width=12),
                TextColumn("step {task.completed}/{task.total}"),
                TextColumn("{task.description}"),
                TextColumn("eta"),
                TimeRemainingColumn(compact=True),
                console=console,
                # rich's 30 seconds hold no two records of a slow run.
                speed_estimate_period=600,
            )
            self.task = self.progress.add_task("", total=steps, completed=step)
            with as_error():
                self.progress.start()

    def write(self, record: Record) -> None:
        step = record["step"]
        if self.progress is not None and record["kind"] == "train":
            self.progress.update(self.task, completed=step, description=brief(record))
            before, self.tenth = self.tenth, 10 * step // self.steps
            if self.tenth == before:
                return
        print_line(self.console, f"step {step:>{self.width}}/{self.steps}  {summary(record)}")

    def close(self) -> None:
        if self.progress is not None:
            with as_error():
                self.progress.stop()


def print_line(console: Console, text: str) -> None:
    """A line as it is. Raises OSError where nobody reads any more."""
    with as_error():
        console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def as_error() -> Iterator[None]:
    """rich makes SystemExit of a broken pipe (`| head`): a reader that leaves must not end a training."""
    try:
        yield
    except SystemExit:
        raise BrokenPipeError("nobody reads it any more") from None


class WandbSink:
    """Weights & Biases. The run's id is stored, so that a resumed run goes on in the same curve."""

    name = "wandb"

    def __init__(self, config: WandbConfig, run_dir: Path, run_id: str, settings: dict[str, Any]):
        import wandb

        assert config.mode != "off"
        self.run = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            id=run_id,
            name=run_dir.name,
            resume="allow",
            dir=str(run_dir),
            config=settings,
            # Numbers only: no terminal output, code, host name or git state leaves the machine.
            settings=wandb.Settings(
                init_timeout=20,
                console="off",
                silent=True,
                x_disable_stats=True,
                x_disable_meta=True,
                disable_git=True,
                disable_code=True,
            ),
        )

    def write(self, record: Record) -> None:
        if record["kind"] == "event":
            return
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        self.run.log(
            {f"{record['kind']}/{key}": value for key, value in numbers.items()}, step=record["step"]
        )

    def close(self) -> None:
        self.run.finish()


def summary(record: Record) -> str:
    """A record as a few words for a line."""
    if record["kind"] == "event":
        return record["text"]
    if record["kind"] == "eval":
        shown = {key: x for key, x in record.items() if isinstance(x, float) and key != "seconds"}
        if "accuracy" in shown:
            shown = {key: x for key, x in shown.items() if not key.startswith("nll/")}
        return "eval  " + "  ".join(f"{key} {x:.4f}" for key, x in shown.items())
    parts = {"loss": "{:.4f}", "balance": "{:.3f}", "max_load": "{:.2f}", "lr": "{:.2e}"}
    parts |= {"grad_norm": "{:.2f}", "tokens_per_s": "{:,.0f} tokens/s"}
    words = [
        form.format(record[key]) if "tokens/s" in form else f"{key} {form.format(record[key])}"
        for key, form in parts.items()
        if record.get(key) is not None
    ]
    return "  ".join(words) + (f"  skipped {record['skipped']}" if record.get("skipped") else "")


def brief(record: Record) -> str:
    """A training record in less than 30 columns, for beside a bar."""
    speed = record.get("tokens_per_s")
    loss = "" if record.get("loss") is None else f"loss {record['loss']:.4f}"
    return "  ".join(filter(None, [loss, speed and f"{short(speed)} tok/s"]))


def short(x: float) -> str:
    """12,345 as 12.3k."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= scale:
            x /= scale
            return f"{x:.0f}{unit}" if x >= 100 else f"{x:.3g}{unit}"
    return f"{x:.0f}"


def read_metrics(run_dir: str | Path) -> list[Record]:
    """The records of a run in order; a last line that was cut off by a crash is left out."""
    path = Path(run_dir) / METRICS
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def drop_after(run_dir: Path, step: int) -> None:
    """Takes the records of later steps out of a run's file: the run will write them again."""
    kept = [record for record in read_metrics(run_dir) if record["step"] <= step]
    replace_text(run_dir / METRICS, "".join(json.dumps(record) + "\n" for record in kept))


def open_log(config: RunConfig, run_dir: Path, run_id: str, console: Console, step: int) -> Log:
    """The log of a run that goes on after `step`, without records of steps that are to be done again."""
    drop_after(run_dir, step)
    log = Log(console, [])
    log.add(METRICS, lambda: JsonlSink(run_dir / METRICS))
    log.add("the terminal", lambda: ConsoleSink(console, config.train.steps, step))
    wandb = config.train.wandb
    if wandb.mode != "off":
        settings = config.model_dump(mode="json")
        log.add("wandb", lambda: WandbSink(wandb, run_dir, run_id, settings))
    return log
