"""The machine that a benchmark ran on: what it is, and what it can do at best."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hybrid_lm import __version__
from hybrid_lm.bench.measure import clock_of

PACKAGES = ("torch", "transformers", "mambapy", "numpy", "opt_einsum")


def new_document(bench: str, threads: int, repeat: int) -> dict[str, Any]:
    """What every benchmark's file begins with; its cases are added."""
    return {
        "bench": bench,
        "machine": machine(threads),
        "clock": clock_of(threads)[0],
        "repeat": repeat,
        "cases": [],
    }


def machine(threads: int) -> dict[str, Any]:
    """Processor, threads and versions."""
    return {
        "cpu": processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {"hybrid_lm": __version__} | {name: installed(name) for name in PACKAGES},
    }


def processor() -> str:
    """The name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def installed(package: str) -> str | None:
    """The version of a package, None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextmanager
def one_thread(threads: int) -> Iterator[None]:
    """One thread inside, `threads` again afterwards."""
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def yardsticks(clock: Callable[[], float], threads: int = 1, repeat: int = 5) -> dict[str, float]:
    """The best of a few rounds: float32 matrix product in GFLOP/s, copying in GB/s read and written; how many
    times one thread's these are."""
    found = rates(clock, repeat)
    if threads > 1:
        with one_thread(threads):
            alone = rates(clock, repeat)
        found |= {f"{what}_speedup": found[rate] / alone[rate] for what, rate in RATES.items()}
    return found


RATES = {"matmul": "matmul_gflop_s", "copy": "copy_gb_s"}


def rates(clock: Callable[[], float], repeat: int) -> dict[str, float]:
    """A large matrix product and a large copy."""
    n, m = 1024, 1 << 23
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    source, target = torch.ones(m), torch.zeros(m)
    product = best(lambda: torch.mm(a, b, out=out), clock, repeat)
    copy = best(lambda: target.copy_(source), clock, repeat)
    return {"matmul_gflop_s": 2e-9 * n**3 / product, "copy_gb_s": 8e-9 * m / copy}


def best(work: Callable[[], Any], clock: Callable[[], float], repeat: int) -> float:
    """Seconds of the fastest run, after one that warms up."""
    work()
    times = []
    for _ in range(repeat):
        start = clock()
        work()
        times.append(clock() - start)
    return min(times)
