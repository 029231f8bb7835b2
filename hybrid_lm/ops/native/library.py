"""Finding and loading the native libraries that `build.py` left in the cache. Nothing compiles or raises.

There are two, for the CPU and for CUDA. The cache is $HYBRID_LM_CACHE, else $XDG_CACHE_HOME/hybrid_lm, else
~/.cache/hybrid_lm:

    native/cpu-<key>/            one build: the library, and manifest.json, which says how it was made
    native/cpu-<sources>.built   the name of the folder that was built last from these sources

A build's own key holds the compiler and its flags, and to know them a compiler must be asked. What is looked
up here is the second name: a hash of the sources, of `build.py`, of torch's ABI target and of the machine.

HYBRID_LM_NATIVE=0 switches the native backend off; HYBRID_LM_NATIVE=FILE loads that library for the CPU,
whatever it was made of (one with sanitizers, say), and HYBRID_LM_NATIVE_CUDA=FILE that one for CUDA.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from hybrid_lm.files import DiskError

# TORCH_TARGET_VERSION of torch's stable ABI: a library made for 2.10 serves 2.10 and everything later.
ABI_TARGET = "0x020a000000000000"
SOURCES = frozenset({".h", ".cpp", ".cuh", ".cu"})
BUILD = "run `hybrid-lm build-native`"
FOLDERS = {"cpu": "cpu", "cuda": "cuda", "emulated": "cuda"}
"""Where in csrc the sources of a target lie, beside those of include."""


class Library(NamedTuple):
    """The library that this process uses, or why it uses none."""

    path: Path | None
    why_not: str | None


def why_not(device: str) -> str | None:
    """None if the native library for a device type is loaded, else the reason in words.

    The first call looks for the library and loads it; the answer then stays for the life of the process.
    """
    if device == "cuda":
        return cuda_library().why_not
    # A tensor of the meta device stands for one that is to come: the operators have shapes for it.
    if device not in ("cpu", "meta"):
        return f"this version has native kernels for the CPU and for CUDA, not for {device}"
    return library().why_not


def why_not_on_cpu(device: str) -> str | None:
    """The same for an op whose native kernels are the CPU's alone."""
    return "this version has no CUDA kernel for it" if device == "cuda" else why_not(device)


def loaded(device: str = "cpu") -> Path | None:
    """The library that this process uses; None without one."""
    return (cuda_library() if device == "cuda" else library()).path


def isa() -> str | None:
    """The instruction set whose kernels run on this processor; None without a library that says so."""
    try:
        return torch.ops.hybrid_lm_native.isa() if loaded() else None
    # The operator is declared in Python; that a library has it is another matter.
    except NotImplementedError:
        return None


@cache
def library() -> Library:
    """Finds and loads the CPU library, once for a process."""
    return load("cpu", "HYBRID_LM_NATIVE")


@cache
def cuda_library() -> Library:
    """Finds and loads the CUDA library, once for a process, if the GPUs of this machine can run it."""
    if torch.version.cuda is None:
        return Library(None, "this PyTorch is built without CUDA")
    if not torch.cuda.is_available():
        return Library(None, "PyTorch finds no GPU here")
    return load("cuda", "HYBRID_LM_NATIVE_CUDA")


def load(target: str, variable: str) -> Library:
    """Loads the library for a target; an environment variable may name it."""
    if os.environ.get("HYBRID_LM_NATIVE") == "0":
        return Library(None, "switched off by HYBRID_LM_NATIVE=0")
    wish = os.environ.get(variable, "")
    try:
        found = Library(Path(wish), None) if wish else find(target)
        if found.path is not None:
            reason = uncovered(found.path) if target == "cuda" else None
            if reason is not None:
                return Library(None, reason)
            torch.ops.load_library(found.path)
    # OSError: the loader's word on a library, or the disk's on the cache; RuntimeError: torch's word on what
    # a library registers.
    except (OSError, RuntimeError) as error:
        # torch names the file, and the loader beneath it what is wrong.
        said = [str(e).splitlines()[0] for e in (error, error.__cause__) if e is not None and str(e)]
        why = f"cannot be loaded: {': '.join(said)}"
        return Library(
            None, f"{variable}={wish} {why}" if wish else f"{why}; {build_by(target)} with --force"
        )
    return found


def uncovered(path: Path) -> str | None:
    """Why a CUDA library cannot run on every GPU of this machine; None if it can.

    Machine code runs on GPUs of its own major version, from its minor version on; PTX on everything from its
    version on, compiled by the driver when the library is first used.
    """
    try:
        covers = json.loads(path.with_name("manifest.json").read_text(encoding="utf-8"))["covers"]
    # A library that the user named may stand alone; the driver has the last word then.
    except (FileNotFoundError, KeyError):
        return None
    codes, ptx = [tuple(code) for code in covers["code"]], tuple(covers["ptx"])
    for k in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_capability(k)
        if gpu < ptx and not any(gpu[0] == code[0] and gpu >= code for code in codes):
            covered = ", ".join(f"{major}.{minor}" for major, minor in codes)
            return (
                f"built for compute capability {covered}, and {ptx[0]}.{ptx[1]} and newer; GPU {k}, "
                f"{torch.cuda.get_device_name(k)}, has {gpu[0]}.{gpu[1]}: {build_by('cuda')}"
            )
    return None


def build_by(target: str) -> str:
    """The words on how to build for a target."""
    return BUILD if target == "cpu" else f"{BUILD[:-1]} {target}`"


def find(target: str) -> Library:
    """The newest build for a target of the sources that are here."""
    sources = csrc()
    if sources is None:
        return Library(None, "this installation has no csrc, the sources of the kernels")
    folder = cache_folder()
    try:
        path = folder / pointer(target, sources).read_text(encoding="utf-8") / file_name(target)
    except FileNotFoundError:
        path = None
    if path is not None and path.is_file():
        return Library(path, None)
    if any(folder.glob(f"{target}-*.built")):
        return Library(None, f"built for another version of the sources: {build_by(target)}")
    return Library(None, f"not built: {build_by(target)}")


def csrc() -> Path | None:
    """The sources of the kernels: inside the installed package, or beside it in a checkout; None without."""
    for above in Path(__file__).resolve().parents[2:4]:
        if (above / "csrc" / "include" / "hybrid_lm").is_dir():
            return above / "csrc"
    return None


def cache_folder() -> Path:
    """Where builds lie, existing or not."""
    named = os.environ.get("HYBRID_LM_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named).absolute() / "native"
    try:
        return (Path(shared) if shared else Path.home() / ".cache").absolute() / "hybrid_lm" / "native"
    except RuntimeError:
        raise DiskError("this user has no home folder to cache in") from None


def file_name(target: str) -> str:
    """The library's file name."""
    return f"hybrid_lm_{target}{'.dylib' if sys.platform == 'darwin' else '.so'}"


def pointer(target: str, sources: Path) -> Path:
    """The file that names, relative to the cache, the folder that was built last from these sources."""
    return cache_folder() / f"{target}-{sources_key(target, sources)[:16]}.built"


def sources_key(target: str, sources: Path) -> str:
    """SHA-256, in hexadecimal, of all that decides what a library is, save the compiler and its flags."""
    key = hashlib.sha256(f"{target} {ABI_TARGET} {sys.platform} {platform.machine()}".encode())
    for part in ("include", FOLDERS[target]):
        for path in sorted((sources / part).rglob("*")):
            if path.suffix in SOURCES:
                key.update(_entry(path.relative_to(sources).as_posix(), path))
    for name in ("build.py",) if target == "cpu" else ("build.py", "build_cuda.py"):
        key.update(_entry(name, Path(__file__).with_name(name)))
    return key.hexdigest()


def _entry(name: str, path: Path) -> bytes:
    """A file with its name and length, so that no two lists of files look alike."""
    content = path.read_bytes()
    return f"\n{name} {len(content)}\n".encode() + content
