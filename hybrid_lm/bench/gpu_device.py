"""The GPU that a benchmark runs on: what it is, what it can do at best, and how work on it is timed."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import torch

from hybrid_lm.bench.machine import installed, machine

PEERS = ("triton", "mamba-ssm", "causal-conv1d", "flash-linear-attention", "fla-core")
AHEAD = 2_000_000
"""Clock cycles, a millisecond, that the device waits before the first event: the processor has queued the
work by then, and what is timed is the device's."""
QUERY = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,power.limit"

Work = Callable[[], Any]


def no_gpu() -> str | None:
    """Why nothing can be measured here, in words; None where there is a GPU."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for the CPU alone; bench gpu needs a torch with CUDA"
    return None if torch.cuda.is_available() else "torch finds no GPU on this machine; bench gpu needs one"


def description(device: torch.device) -> dict[str, Any]:
    """Device, clocks as they are found, and versions."""
    found = machine(torch.get_num_threads())
    found["versions"] |= {name: installed(name) for name in PEERS}
    found["versions"]["cuda"] = torch.version.cuda
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": about.name,
            "capability": [about.major, about.minor],
            "processors": about.multi_processor_count,
            "memory_gib": round(about.total_memory / 2**30, 1),
            "now": clocks(),
        }
    return found


def clocks() -> dict[str, str] | None:
    """What nvidia-smi says of clocks, temperature and power; None without it. Nothing is changed."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(QUERY.split(","), (word.strip() for word in said.split(",")), strict=False))


def ceilings(device: torch.device, megabytes: int = 1024, n: int = 8192) -> dict[str, float]:
    """Copying in TB/s read and written, a bf16 matrix product in TFLOP/s, and with triton exponentials in
    10^12 per second; medians of ten."""
    source = torch.randn(megabytes << 18, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    copy = statistics.median(times(lambda: target.copy_(source), device, 10))
    product = statistics.median(times(lambda: torch.mm(a, b, out=out), device, 10))
    found = {"copy_tb_s": 8e-9 * source.numel() / copy, "matmul_tflop_s": 2e-9 * n**3 / product}
    # Where triton is without a C compiler, say, it cannot start anything: the rest is measured all the same.
    with suppress(Exception):
        found["exp_t_s"] = 1e-12 * import_module("hybrid_lm.bench.gpu_exp").exp_rate(device)
    return found


def times(work: Work, device: torch.device, count: int) -> list[float]:
    """Milliseconds of `count` runs after one that is not timed."""
    return times_after(lambda: None, lambda _: work(), device, count)


def times_after(before: Work, run: Callable[[Any], Any], device: torch.device, count: int) -> list[float]:
    """The same of `run`, which is given what `before` returns; `before` is not timed."""
    run(before())
    if device.type != "cuda":
        return [_on_this_processor(run, before()) for _ in range(count)]
    found = []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        given = before()
        torch.cuda._sleep(AHEAD)
        start.record()
        run(given)
        end.record()
        torch.cuda.synchronize(device)
        found.append(start.elapsed_time(end))
    return found


def _on_this_processor(run: Callable[[Any], Any], given: Any) -> float:
    begun = time.perf_counter()
    run(given)
    return (time.perf_counter() - begun) * 1e3


def graph_times(work: Work, device: torch.device, count: int) -> list[float]:
    """Milliseconds of `count` replays of `work` captured in a CUDA graph."""
    if device.type != "cuda":
        return times(work, device, count)
    # A graph is captured on another stream, and what allocates at its first call has done so before.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return times(graph.replay, device, count)


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, fresh memory of every tensor is NaN: an output that a kernel does not write is seen."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switch: Any = torch.utils.deterministic
    fill = switch.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switch.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            # What a peer's operators say of their order is no news here.
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        switch.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
