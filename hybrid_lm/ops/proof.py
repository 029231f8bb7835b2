"""A kernel is tried on a kind of GPU before it is trusted there: once, and the answer is kept on disk.

What compiles for a GPU may still compute something else on it than where it was tested. So the first time
that a native or Triton kernel is asked for on a GPU, it and the PyTorch form get the same small inputs
(`trials.py`); where they differ by more than rounding, or the kernel fails, the backend cannot run there, and
says what differed and by how much. `auto` then takes the next one.

The answer depends on the op, the backend, the GPU's model, the versions of PyTorch and Triton, and the
sources of the kernels: a file for each such set lies in the cache (`native/library.py` says where that is),
in `proofs`. HYBRID_LM_PROOF=0 trusts all kernels.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_lm.files import replace_text
from hybrid_lm.ops.backend import CHECKS

# Device types on which kernels are tried. Those of the CPU have run wherever the tests have.
DEVICES = {"cuda"}
TYPES = (torch.float32, torch.bfloat16)
# Roundings in a row behind a result of a trial, at most: along some 150 tokens there and back, over 128
# states and as many channels, and over all tokens and sequences for what every one of them adds to.
CHAIN = 2**12


class Trial(NamedTuple):
    """Inputs that reach some part of a kernel.

    inputs     for every backend, on the CPU, floats in float64
    kept       names of those that stay float32 where x is bfloat16
    summed     names of those whose gradients every token adds to
    gradients  whether the gradients of all floats are compared, too
    plain      what the PyTorch form gets beside `inputs`
    """

    name: str
    inputs: Mapping[str, Any]
    kept: frozenset[str] = frozenset()
    summed: frozenset[str] = frozenset()
    gradients: bool = True
    plain: Mapping[str, Any] = {}


Run = Callable[..., Any]
# How many trials are going on. Not a thread's own, for gradients come from another one.
_TRYING = [0]
_VERDICTS: dict[tuple[str, str, str], str | None] = {}


def why_not(op: str, backend: str, device: str, run: Run, plain: Run) -> str | None:
    """None where a backend does what the PyTorch form of its op does, or where that is not asked; else what
    is wrong, in words. The first call on a kind of GPU takes seconds."""
    if device not in DEVICES or backend not in IDENTITIES:
        return None
    key = (op, backend, device)
    if key not in _VERDICTS:
        trials = _trials(op)
        if not trials or os.environ.get("HYBRID_LM_PROOF") == "0":
            _VERDICTS[key] = None
        elif device == "cuda" and torch.cuda.is_current_stream_capturing():
            # nothing can be compared now, and nothing is remembered
            return "it has not been tried on this GPU, and cannot be while a CUDA graph is recorded"
        else:
            _VERDICTS[key] = _verdict(op, backend, device, run, plain, trials)
    return _VERDICTS[key]


def trying() -> bool:
    """Whether a trial is going on: then nothing is worth measuring."""
    return _TRYING[0] > 0


def _trials(op: str) -> tuple[Callable[[], Trial], ...]:
    # the module of the trials needs that of the backends, which needs this one
    return import_module("hybrid_lm.ops.trials").TRIALS.get(op, ())


def _verdict(
    op: str, backend: str, device: str, run: Run, plain: Run, trials: tuple[Callable[[], Trial], ...]
) -> str | None:
    """The answer on disk, or that of a trial, which is then kept."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else device
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(_file(op, backend, gpu).read_text(encoding="utf-8"))["why_not"]
        if found is None or isinstance(found, str):
            return found
    print(f"hybrid_lm: trying the {backend} kernels of {op} on this device, {gpu}, once", file=sys.stderr)
    here = torch.cuda.current_device() if device == "cuda" else None

    def attempt() -> tuple[str | None, bool]:
        if here is not None:
            torch.cuda.set_device(here)
        # Whose fault that is, this kernel or one before it, nobody knows: the next process tries again.
        if (trouble := _trouble(device)) is not None:
            return trouble, False
        try:
            reason = differences(run, plain, trials, device)
        # Out of memory says nothing of the kernel: the next process tries again.
        except torch.OutOfMemoryError as error:
            return f"no memory to try it on this GPU: {_first_line(error)}", False
        # A kernel may fail in any way: a compiler's error, one of the driver, one of PyTorch.
        except Exception as error:
            return f"it fails on this device, {gpu}: {type(error).__name__}: {_first_line(error)}", True
        return reason and f"it does not agree with PyTorch on this device, {gpu}: {reason}", True

    # A thread of its own has no autocast, no inference mode, no default device, no tensors without data.
    _TRYING[0] += 1
    try:
        with ThreadPoolExecutor(1) as thread:
            reason, known = thread.submit(attempt).result()
    finally:
        _TRYING[0] -= 1
    if known:
        # A cache that cannot be written is no reason to stop: this process knows.
        with suppress(OSError):
            path = _file(op, backend, gpu)
            path.parent.mkdir(parents=True, exist_ok=True)
            about = {"op": op, "backend": backend, "device": gpu, "torch": torch.__version__}
            replace_text(path, json.dumps(about | {"why_not": reason}, indent=1))
    return reason


def _trouble(device: str) -> str | None:
    """Why a device cannot even hold a number: after an illegal access every call in this process fails."""
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:
        return f"this device does not answer, and nothing can be tried: {_first_line(error)}"
    return None


def differences(run: Run, plain: Run, trials: tuple[Callable[[], Trial], ...], device: str) -> str | None:
    """What a backend computes otherwise than the PyTorch form on the CPU in float64; None if nothing."""
    for make in trials:
        trial = make()
        for dtype in TYPES:
            simple = partial(plain, **trial.plain)
            exact = _results(simple, trial, dtype, "cpu", exact=True)
            near = _results(simple, trial, dtype, "cpu")
            for (name, actual), (_, e), (_, n) in zip(
                _results(run, trial, dtype, device), exact, near, strict=True
            ):
                # as in the tests of the ops: roundings of the type that sums are kept in; in a narrow type
                # twice the error of plain PyTorch (as flash-attention allows), and half of a last place
                limit = CHAIN * torch.finfo(torch.float32).eps
                if dtype != torch.float32:
                    limit += 2 * _error(n, e) + torch.finfo(dtype).eps / 2 * _cancelling(trial, name)
                error = _error(actual, e)
                # not `error > limit`: NaN is above no limit
                if not error <= limit:
                    what = f"the gradient of {name}" if name in trial.inputs else name
                    return (
                        f"{trial.name} in {str(dtype).removeprefix('torch.')}: {what} is off by {error:.1e} "
                        f"of the largest value, and {limit:.1e} would be rounding"
                    )
    return None


def _results(
    run: Run, trial: Trial, dtype: torch.dtype, device: str, exact: bool = False
) -> list[tuple[str, Tensor]]:
    """Outputs, and gradients under the names of their inputs. `exact`: in float64, of the inputs that `dtype`
    has rounded."""
    inputs: dict[str, Any] = {}
    for name, v in trial.inputs.items():
        if isinstance(v, Tensor):
            if v.is_floating_point():
                v = v.to(torch.float32 if name in trial.kept else dtype)
                v = v.to(device, torch.float64 if exact else v.dtype, copy=True)
                v.requires_grad_(trial.gradients)
            else:
                v = v.to(device)
        inputs[name] = v
    with torch.enable_grad() if trial.gradients else torch.no_grad():
        # the first by its place, as ops are called
        first = next(iter(signature(run).parameters))
        made = run(inputs[first], **{k: v for k, v in inputs.items() if k != first})
        outputs = [made] if isinstance(made, Tensor) else list(made)
        found = [(f"output {k + 1}", v.detach()) for k, v in enumerate(outputs)]
        if trial.gradients:
            # whole numbers: the same in every type
            g = torch.Generator("cpu").manual_seed(1)
            given = [torch.randint(-2, 3, v.shape, generator=g, device="cpu").to(v) for v in outputs]
            leaves = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}
            grads = torch.autograd.grad(outputs, list(leaves.values()), given)
            found += [(k, v) for k, v in zip(leaves, grads, strict=True)]
    return found


def _cancelling(trial: Trial, name: str) -> float:
    """How much larger than the rounding of a number that of a sum may be: terms of both signs, a token each,
    cancel as in a random walk, and their roundings do not."""
    first = next(iter(trial.inputs.values()))
    return math.sqrt(first.shape[0] * first.shape[1]) if name in trial.summed else 1.0


def _error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value, or to 1 for small ones."""
    a, e = actual.cpu().double(), expected.cpu().double()
    return float((a - e).abs().max() / e.abs().max().clamp(min=1))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    # triton's compiler begins with the place, line by line, and says what is wrong at the end
    return lines[-1] if lines[0].startswith("at ") else lines[0]


def _file(op: str, backend: str, gpu: str) -> Path:
    """Where an answer is kept: another GPU, version or source is another file."""
    # that package enters its kernels in the table of backends, which needs this module
    folder = import_module("hybrid_lm.ops.native.library").cache_folder().with_name("proofs")
    trials = Path(__file__).with_name("trials.py").read_bytes() + Path(__file__).read_bytes()
    key = hashlib.sha256(f"{gpu}\n{torch.__version__}\n{torch.version.cuda}\n".encode())
    key.update(IDENTITIES[backend]().encode())
    key.update(trials)
    return folder / f"{op}-{backend}-{key.hexdigest()[:16]}.json"


@cache
def _native() -> str:
    """Which library it is: what it was made of, or itself where it stands alone."""
    path = import_module("hybrid_lm.ops.native.library").loaded("cuda")
    if path is None:
        return "none"
    return hashlib.sha256(path.read_bytes()).hexdigest() + _python("native")


@cache
def _triton() -> str:
    """Triton's version and the sources of the kernels and of what launches them."""
    return f"{import_module('triton').__version__} {_python('triton')}"


def _python(package: str) -> str:
    key = hashlib.sha256()
    for path in sorted(Path(__file__).with_name(package).glob("*.py")):
        key.update(f"\n{path.name}\n".encode() + path.read_bytes())
    return key.hexdigest()


# Backends that are tried, and what an answer depends on beside the device: their versions and sources.
IDENTITIES: dict[str, Callable[[], str]] = {"native": _native, "triton": _triton}
CHECKS.append(why_not)
