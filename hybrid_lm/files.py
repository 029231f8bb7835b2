"""Writing so that a power cut or a full disk leaves the old or the new, and never something between.

What is new is written beside, synced, and renamed: under its own name a file or folder is whole or not there.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class DiskError(OSError, ValueError):
    """A disk that is full, read-only or not ours; `str()` is one sentence for people."""


@contextmanager
def disk(what: str) -> Iterator[None]:
    """Turns an OSError into a DiskError that begins with `what`: "cannot write ...". `errno` stays."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        told = DiskError(f"{what}: {error.strerror or error}")
        told.errno = error.errno
        raise told from error


@contextmanager
def new_folder(out: Path, what: str) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its place when the block ends, and vanishes if the block fails.

    A folder that is at `out` is replaced: whether it may be is for the caller to ask. It is deleted last, and
    comes back if the new one cannot take its place.

    what: begins the message of a DiskError: "cannot write ...". The block's own errors pass as they are.
    """
    # Beside the folder that a link points to; random, for two processes may want to write the same one.
    out = out.resolve()
    tag = f"{out.name}-{secrets.token_hex(4)}"
    new, old = out.with_name(f".new-{tag}"), out.with_name(f".trash-{tag}")
    try:
        with disk(what):
            new.mkdir(parents=True)
        yield new
        with disk(what):
            for path in new.rglob("*"):
                sync(path)
            sync(new)
            try:
                if out.exists():
                    out.rename(old)
                new.rename(out)
            except BaseException:
                if old.exists():
                    old.rename(out)
                raise
            sync(out.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Writes a whole small file in the place of the old one, if any."""
    new = path.with_name(f".{path.name}.new")
    with disk(f"cannot write {path}"):
        try:
            new.write_text(text, encoding="utf-8")
            sync(new)
            os.replace(new, path)
        except OSError:
            new.unlink(missing_ok=True)
            raise
        sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some file systems cannot sync a folder; a rename in it is atomic all the same.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def discard(folder: Path) -> None:
    """Deletes a folder: renamed first, so that nobody ever sees half of it under its name."""
    trash = folder.with_name(f".trash-{folder.name}-{secrets.token_hex(4)}")
    with suppress(OSError):
        folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def check_space(folder: Path, n_bytes: int, what: str, remedy: str) -> None:
    """Raises DiskError if the file system of `folder` has less than `n_bytes` free for `what`."""
    with disk(f"cannot look at the disk of {folder}"):
        free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise DiskError(
            f"{folder}: {what} needs {n_bytes / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free; {remedy}"
        )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite(value: Any) -> Any:
    """`value` with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
