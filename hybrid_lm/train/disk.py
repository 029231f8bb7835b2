"""Writing so that a power cut or a full disk leaves the old or the new, and never something between."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class DiskError(OSError, ValueError):
    """A disk that is full, read-only or not ours; `str()` is one sentence for people."""


@contextmanager
def disk(what: str) -> Iterator[None]:
    """Turns an OSError into a DiskError that begins with `what`: "cannot write ..."."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        raise DiskError(f"{what}: {error.strerror or error}") from error


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


def replace_text(path: Path, text: str) -> None:
    """Writes a whole small file in the place of the old one, if any."""
    new = path.with_name(f".{path.name}.new")
    with disk(f"cannot write {path}"):
        new.write_text(text, encoding="utf-8")
        sync(new)
        os.replace(new, path)
        sync(path.parent)


def check_space(folder: Path, n_bytes: int, what: str) -> None:
    """Raises DiskError if the file system of `folder` has less than `n_bytes` free."""
    with disk(f"cannot look at the disk of {folder}"):
        free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise DiskError(
            f"{folder}: {what} needs {n_bytes / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free; make room, "
            "or lower train.keep"
        )


def discard(folder: Path) -> None:
    """Deletes a folder: renamed first, so that nobody ever sees half of it under its name."""
    trash = folder.with_name(f".trash-{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    with suppress(OSError):
        folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)
