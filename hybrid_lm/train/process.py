"""What training takes from the process it runs in: signals, global random generators, memory."""

from __future__ import annotations

import hashlib
import random
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch


def seed_step(seed: int, step: int) -> None:
    """Seeds every global generator from (seed, step): what a step draws does not depend on earlier steps.

    That is why checkpoints hold no generator states, and why a resumed run has the dropout of one that never
    stopped.
    """
    word = int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:4])
    torch.manual_seed(word)
    random.seed(word)
    np.random.seed(word)


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Gives the global generators back to the caller as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
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


# SIGHUP comes when the terminal is gone: a closed window or ssh session.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Remembers SIGINT, SIGTERM or SIGHUP for the loop to see; a second one does what it always did.

    A signal that this process was told to ignore stays ignored: `nohup` does so with SIGHUP.
    Python lets only the main thread handle signals; in another one this does nothing.
    """

    def __init__(self) -> None:
        self.name = ""
        """Of the signal that came; empty: none did."""
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self.restore()
