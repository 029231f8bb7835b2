"""Peak memory of one forward + backward of one candidate, in a process of its own.

    python -m hybrid_lm.bench.memory scan transformers_mambapy 1024 1

The peak is a process's, and torch's allocator keeps what others have used: hence the fresh process.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import torch

from hybrid_lm.bench.cases import CASES, Case, gradients
from hybrid_lm.bench.measure import Candidate

STATUS = Path("/proc/self/status")


def peak_mb(case: str, candidate: str, length: int, threads: int) -> tuple[float | None, str | None]:
    """MiB by which the resident memory grows, or None and the reason."""
    if not STATUS.exists():
        return None, "memory: /proc is needed (Linux)"
    command = [sys.executable, "-m", "hybrid_lm.bench.memory", case, candidate, str(length), str(threads)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"}
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return None, f"memory: the process ended with {done.returncode} {last}".rstrip()
    return float(done.stdout.split()[-1]), None


def growth(case: Case, candidate: Candidate, length: int) -> float:
    """MiB by which the resident memory of this process grows during one forward + backward."""
    run = candidate.load()
    # A call first: imports, compilation and library start-up are not the op's memory. A compiled graph is for
    # one length.
    first = case.inputs(length if candidate.compiled else 8)
    gradients(run, first, torch.ones_like(case.output(first)))
    del first
    inputs = case.inputs(length)
    dy = torch.ones_like(case.output(inputs))
    give_back()
    Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    gradients(run, inputs, dy)
    return (kib("VmHWM") - before) / 1024


def give_back() -> None:
    """Returns freed memory to the system, where the C library can: what is kept would hide growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def kib(field: str) -> int:
    """One line of this process's status."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    name, chosen, tokens, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    (found,) = (c for c in CASES[name].candidates() if c.name == chosen)
    print(growth(CASES[name], found, int(tokens)))
