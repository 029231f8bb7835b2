"""Which of a few ways to launch a kernel is fastest here: measured once, and kept on disk.

One file of the cache (`ops/native/library.py` says where that is) holds the choices of one GPU model, of
one version of triton and of these sources. The first call with a new shape takes seconds longer: every
candidate is compiled. While a CUDA graph is captured nothing can be measured, and while the kernels are tried
(`ops/proof.py`) nothing is worth it: the first candidate that fits is taken, and not kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_lm.files import replace_text
from hybrid_lm.ops.native.library import cache_folder
from hybrid_lm.ops.proof import trying


class Choice(NamedTuple):
    """How one kernel is launched: the largest tile of channels and of states, warps, and pipeline stages."""

    BP: int = 64
    BN: int = 64
    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        """What triton is told beside a kernel's arguments."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# The first is taken where nothing can be measured. By what a kernel has on chip: "_wide" for more than 64
# channels of a head, "_deep" for more than 128 states; "_exact" for factors of four bytes, "_double" for
# float64. Left out is what the compiler has no good code for: fewer than 64 rows cannot go to the tensor
# cores of Hopper, and tiles larger than these spill.
CANDIDATES: dict[str, tuple[Choice, ...]] = {
    "ssd_outputs": (
        Choice(64, num_warps=4, num_stages=2),
        Choice(64, num_warps=4, num_stages=3),
        Choice(64, num_warps=4, num_stages=1),
    ),
    "ssd_outputs_wide": (
        Choice(128, num_warps=8, num_stages=2),
        Choice(128, num_warps=8, num_stages=3),
        Choice(64, num_warps=4, num_stages=2),
    ),
    "ssd_outputs_deep": (
        Choice(64, num_warps=4, num_stages=1),
        Choice(64, num_warps=4, num_stages=2),
    ),
    "ssd_outputs_exact": (
        Choice(64, num_warps=8, num_stages=2),
        Choice(64, num_warps=4, num_stages=2),
    ),
    "ssd_outputs_double": (
        Choice(64, num_warps=8, num_stages=1),
        Choice(64, num_warps=4, num_stages=1),
    ),
    "ssd_states": (
        Choice(64, 128, num_warps=4, num_stages=3),
        Choice(64, 128, num_warps=4, num_stages=2),
        Choice(64, 64, num_warps=4, num_stages=3),
    ),
    "ssd_states_exact": (
        Choice(64, 64, num_warps=4, num_stages=2),
        Choice(32, 64, num_warps=4, num_stages=2),
    ),
    # one program has a multiprocessor for itself, and room for what is read ahead
    "ssd_gradients": (
        Choice(num_warps=8, num_stages=3),
        Choice(num_warps=8, num_stages=2),
    ),
    "ssd_gradients_deep": (Choice(num_warps=8, num_stages=1),),
    "ssd_gradients_exact": (Choice(num_warps=8, num_stages=1),),
}


Launch = Callable[[Choice], Sequence[Tensor]]
"""Runs a kernel one way, to the same result as often as it runs; returns all that it writes, without gaps."""
# Numbers of each result that are compared, and how far they may be apart, of the largest: some last places of
# bfloat16. What a compiler gets wrong is as large as the result.
COMPARED, APART = 2**22, 8 * torch.finfo(torch.bfloat16).eps


MENDED: list[str] = []
"""Who has mended Triton's interpreter: three of its answers are not those of a GPU. The tests do."""


def interpreted() -> bool:
    """Whether triton runs its kernels in Python, on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def testable() -> bool:
    """Whether it does so and comes to what a GPU would."""
    return interpreted() and bool(MENDED)


def best(kernel: str, launch: Launch, tensor: Tensor, shape: tuple[object, ...]) -> None:
    """Runs a kernel the fastest way. `tensor` says which device; `shape` is all that another choice might
    depend on."""
    candidates = CANDIDATES[kernel]
    with on_device_of(tensor):
        number = _chosen(kernel, candidates, launch, tensor, shape)
        if number is None:
            _first_that_fits(candidates, launch)
        else:
            launch(candidates[number])


def _first_that_fits(candidates: tuple[Choice, ...], launch: Launch) -> None:
    """Runs the first candidate that the device has room for."""
    from triton.runtime.errors import OutOfResources

    for choice in candidates[:-1]:
        with suppress(OutOfResources):
            launch(choice)
            return
    launch(candidates[-1])


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Where triton launches: it takes the current device, not that of its arguments."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def _chosen(
    kernel: str,
    candidates: tuple[Choice, ...],
    launch: Launch,
    tensor: Tensor,
    shape: tuple[object, ...],
) -> int | None:
    """The number of the fastest candidate; None where nothing can be measured now."""
    if tensor.device.type != "cuda":
        return 0
    key = f"{kernel} {tensor.dtype} {' '.join(map(str, shape))}"
    device = tensor.device.index or 0
    table = _table(device)
    if key not in table:
        if trying() or torch.cuda.is_current_stream_capturing():
            return None
        table[key] = _measure(candidates, launch)
        _keep(device)
    return table[key]


def _measure(candidates: tuple[Choice, ...], launch: Launch) -> int:
    """The number of the fastest candidate. Out is one that the device has no room for, and one that comes to
    another result than the first that it has: only that one has been tried before."""
    from triton.runtime.errors import OutOfResources

    times: list[float] = []
    expected: list[Tensor] | None = None
    for choice in candidates:
        try:
            took = _milliseconds(lambda choice=choice: launch(choice))
            # what another one has left there would be taken for its own
            for v in launch(choice):
                v.fill_(torch.nan)
            found = [v.flatten()[:COMPARED].to(torch.float32, copy=True) for v in launch(choice)]
        except OutOfResources:
            times.append(float("inf"))
            continue
        expected = found if expected is None else expected
        times.append(took if all(map(_near, found, expected)) else float("inf"))
    return times.index(min(times))


def _near(a: Tensor, b: Tensor) -> bool:
    return not a.numel() or bool((a - b).abs().max() <= APART * b.abs().max())


def _milliseconds(run: Callable[[], object]) -> float:
    """The shortest of five runs, after two that compile and warm up."""
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times[2:])


@cache
def _table(device: int) -> dict[str, int]:
    """The choices that are known for a device; what cannot be read is measured again."""
    try:
        found = json.loads(_file(device).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if v < len(CANDIDATES.get(k.split()[0], ()))}


def _keep(device: int) -> None:
    """Writes the choices; a cache that cannot be written is no reason to stop."""
    with suppress(OSError):
        _file(device).parent.mkdir(parents=True, exist_ok=True)
        replace_text(_file(device), json.dumps(_table(device), indent=1, sort_keys=True))


@cache
def _file(device: int) -> Path:
    import triton

    key = hashlib.sha256(f"{torch.cuda.get_device_name(device)} {triton.__version__} {CANDIDATES}".encode())
    key.update(Path(__file__).with_name("ssd_kernels.py").read_bytes())
    return cache_folder().with_name("triton") / f"{key.hexdigest()[:16]}.json"
