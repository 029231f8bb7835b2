"""Several runs at once, one thread each, with their progress on one screen.

On a few cores that is faster than one run on all of them, for small models do little work between two
meetings of their threads; and when another program takes a core, one run slows down and the others do not
wait.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from hybrid_lm.train.log import read_metrics

POLL_S = 0.5
PLAIN_S = 15.0
"""Seconds between two lines about each job where there is no terminal."""


@dataclass
class Job:
    """Commands of the command line, one after another in processes of their own."""

    name: str
    commands: Sequence[Sequence[str]]
    """Each without the leading `hybrid-lm`."""
    run: Path
    """The folder of the run that they train."""
    steps: int
    """Of that run."""
    log: Path
    """Where their output goes."""
    done: int = field(default=0, init=False)
    """Commands that have ended."""
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    output: IO[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        """Starts the next command."""
        if self.output is None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.output = self.log.open("wb")
        words = self.commands[self.done]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hybrid_lm.cli", *words],
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env=env,
        )

    def ended(self) -> bool:
        """Whether all commands have ended; starts the next one when one has. ValueError if one failed."""
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            return False
        if code:
            last = self.log.read_text(errors="replace").strip().splitlines()[-8:]
            raise ValueError(
                f"{self.name}: hybrid-lm {' '.join(self.commands[self.done])} failed\n" + "\n".join(last)
            )
        self.done += 1
        if self.done < len(self.commands):
            self.start()
            return False
        self.close()
        return True

    def close(self) -> None:
        """Ends what is still running: it saves and goes."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
            self.process.kill()
        if self.output is not None:
            self.output.close()

    def state(self) -> tuple[int, str]:
        """Steps done, and what is going on in words."""
        if self.process is None:
            return 0, "waiting"
        if self.done == len(self.commands):
            return self.steps, "done"
        records = read_metrics(self.run) if self.run.is_dir() else []
        step = max((record["step"] for record in records), default=0)
        if step >= self.steps:
            return self.steps, "measuring"
        losses = [record["loss"] for record in records if record["kind"] == "train"]
        return step, f"step {step}/{self.steps}" + (f"  loss {losses[-1]:.3f}" if losses else "")


def run_jobs(jobs: Sequence[Job], *, console: Console, workers: int | None = None) -> None:
    """Runs all jobs, at most `workers` (by default one per core) at a time, in the order given.

    Raises ValueError with the last lines of its output if a job fails; the others are ended then, as they are
    when this is interrupted, and a run can go on from where it was.
    """
    workers = workers or len(os.sched_getaffinity(0))
    waiting, running = list(jobs), list[Job]()
    screen = Screen(jobs, console)
    try:
        with screen.bars, ended_by(signal.SIGTERM, signal.SIGHUP):
            while waiting or running:
                while waiting and len(running) < workers:
                    running.append(waiting.pop(0))
                    running[-1].start()
                time.sleep(POLL_S)
                running = [job for job in running if not job.ended()]
                screen.show()
    finally:
        for job in running:
            job.close()


@contextmanager
def ended_by(*signals: signal.Signals) -> Iterator[None]:
    """These signals interrupt the block, as Ctrl-C does, instead of leaving its jobs behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Screen:
    """A bar per job on a terminal, a line per job now and then elsewhere."""

    def __init__(self, jobs: Sequence[Job], console: Console):
        self.console, self.jobs, self.told = console, jobs, time.monotonic()
        self.words: dict[str, str] = {}
        self.bars = Progress(
            TextColumn("{task.fields[name]}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {
            job.name: self.bars.add_task("waiting", total=job.steps, name=job.name, start=False)
            for job in jobs
        }

    def show(self) -> None:
        """Brings the screen up to date."""
        due = time.monotonic() - self.told >= PLAIN_S
        for job in self.jobs:
            step, words = job.state()
            if words != "waiting":
                self.bars.start_task(self.tasks[job.name])
            self.bars.update(self.tasks[job.name], completed=step, description=words)
            if words == "done":
                self.bars.stop_task(self.tasks[job.name])
            changed = words != self.words.get(job.name)
            # The end of a job is told at once, its way there now and then.
            if not self.console.is_terminal and changed and words != "waiting" and (due or words == "done"):
                self.console.print(f"{job.name}: {words}", markup=False, highlight=False)
                self.words[job.name] = words
        if due:
            self.told = time.monotonic()
