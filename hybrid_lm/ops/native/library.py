"""Finding and loading the native library that `build.py` left in the cache. Nothing here compiles or raises.

The cache is $HYBRID_LM_CACHE, else $XDG_CACHE_HOME/hybrid_lm, else ~/.cache/hybrid_lm:

    native/cpu-<key>/            one build: the library, and manifest.json, which says how it was made
    native/cpu-<sources>.built   the name of the folder that was built last from these sources

A build's own key holds the compiler and its flags, and to know them a compiler must be asked. What is looked
up here is the second name: a hash of the sources, of `build.py`, of torch's ABI target and of the machine.

HYBRID_LM_NATIVE=0 switches the native backend off; HYBRID_LM_NATIVE=FILE loads that library, whatever it was
made of (one with sanitizers, say).
"""

from __future__ import annotations

import hashlib
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


class Library(NamedTuple):
    """The library that this process uses, or why it uses none."""

    path: Path | None
    why_not: str | None


def why_not(device: str) -> str | None:
    """None if the native library for a device type is loaded, else the reason in words.

    The first call looks for the library and loads it; the answer then stays for the life of the process.
    """
    if device == "cuda":
        return "this version has no CUDA kernels"
    # A tensor of the meta device stands for one that is to come: the operators have shapes for it.
    if device not in ("cpu", "meta"):
        return f"this version has native kernels for the CPU, not for {device}"
    return library().why_not


def loaded() -> Path | None:
    """The library that this process uses; None without one."""
    return library().path


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
    wish = os.environ.get("HYBRID_LM_NATIVE", "")
    if wish == "0":
        return Library(None, "switched off by HYBRID_LM_NATIVE=0")
    try:
        found = Library(Path(wish), None) if wish else find("cpu")
        if found.path is not None:
            torch.ops.load_library(found.path)
    # OSError: the loader's word on a library, or the disk's on the cache; RuntimeError: torch's word on what
    # a library registers.
    except (OSError, RuntimeError) as error:
        why = f"cannot be loaded: {str(error).splitlines()[0]}"
        return Library(None, f"HYBRID_LM_NATIVE={wish} {why}" if wish else f"{why}; {BUILD} with --force")
    return found


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
        return Library(None, f"built for another version of the sources: {BUILD}")
    return Library(None, f"not built: {BUILD}")


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
    for part in ("include", target):
        for path in sorted((sources / part).rglob("*")):
            if path.suffix in SOURCES:
                key.update(_entry(path.relative_to(sources).as_posix(), path))
    key.update(_entry("build.py", Path(__file__).with_name("build.py")))
    return key.hexdigest()


def _entry(name: str, path: Path) -> bytes:
    """A file with its name and length, so that no two lists of files look alike."""
    content = path.read_bytes()
    return f"\n{name} {len(content)}\n".encode() + content
