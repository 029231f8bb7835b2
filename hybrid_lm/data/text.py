"""Documents of text from a file, a folder, or Python's own sources."""

from __future__ import annotations

import itertools
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import NamedTuple

from hybrid_lm.data.optional import need

STDLIB = "stdlib"
# Tests of the library are not in every installation, and site-packages is not the library.
STDLIB_WITHOUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
# So many that the held-out twentieth is some ten documents, which paired statistics can work with.
PIECES, MIN_PIECE, MAX_PIECE = 200, 1_000, 100_000


class Document(NamedTuple):
    """One text that belongs together: no window of an isolated run reads across its end."""

    name: str
    """Unique in its corpus: path inside the corpus, with a line, row or byte number where one file holds
    many.
    """
    text: str


class BinaryFile(ValueError):
    """A file that is not UTF-8 text."""


def documents(path: str | Path, skipped: Counter[str] | None = None) -> Iterator[Document]:
    """Yields the non-empty documents of a corpus in an order that depends on names only.

    path: one of
    - `stdlib`: the .py files of the running Python's standard library without its tests, one document each
      (about 12 MB; write ./stdlib for a folder of that name);
    - a .jsonl file: the string field `text` of each line; a .parquet file: the string column `text`;
    - a folder: its files, recursively, sorted by path; .jsonl and .parquet as above, any other file is one
      document;
    - any other file: UTF-8 text, cut at line ends into some 200 documents, so that a held-out part can be
      split off by document: each at most a 200th of the file, but that may be 1 kB, and never over 100 kB,
      unless a single line is longer. A file of less than 2 kB is cut into halves.

    skipped: counts what is left out: hidden names, files in a folder that are not UTF-8 text, things that are
        no files, empty documents.

    Raises ValueError (with file and line, row or byte) for a path that does not exist, a binary file named
    directly, a line or row without `text`, and a corpus without any text; MissingPackage for Parquet without
    pyarrow.
    """
    skipped = Counter() if skipped is None else skipped
    empty = True
    for document in _read(path, skipped):
        if document.text:
            empty = False
            yield document
        else:
            skipped["empty"] += 1
    if empty:
        left_out = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items())) or "nothing"
        raise ValueError(
            f"{path}: no text found (left out: {left_out}); give UTF-8 text, .jsonl, .parquet or a folder"
        )


def is_cut(path: str | Path) -> bool:
    """Whether `documents` cuts what is at `path` into pieces: a single file of text."""
    return str(path) != STDLIB and Path(path).is_file() and Path(path).suffix not in _READERS


def _read(path: str | Path, skipped: Counter[str]) -> Iterator[Document]:
    if str(path) == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        return _folder(
            root, [p for p in _walk(root, Counter(), STDLIB_WITHOUT) if p.suffix == ".py"], skipped
        )
    path = Path(path)
    if path.is_dir():
        return _folder(path, _walk(path, skipped), skipped)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; the built-in corpus is called {STDLIB}")
    if not path.is_file():
        raise ValueError(f"{path}: neither a file nor a folder")
    return _READERS.get(path.suffix, _pieces)(path, path.name)


def _walk(root: Path, skipped: Counter[str], without: AbstractSet[str] = frozenset()) -> list[Path]:
    """Files under a folder, sorted by their path inside it. Links to folders are not followed, so there are
    no cycles.
    """
    files = []
    for folder, subfolders, names in os.walk(root):
        hidden = sum(name.startswith(".") for name in subfolders + names)
        if hidden:
            skipped["hidden"] += hidden
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in without]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(files, key=lambda file: file.relative_to(root).parts)


def _folder(root: Path, files: list[Path], skipped: Counter[str]) -> Iterator[Document]:
    for file in files:
        # A named pipe in the folder would block the reader for ever.
        if not file.is_file():
            skipped["not a file"] += 1
            continue
        name = file.relative_to(root).as_posix()
        if file.suffix in _READERS:
            yield from _READERS[file.suffix](file, name)
            continue
        try:
            text = _decode(file.read_bytes(), file)
        except BinaryFile:
            skipped["not UTF-8 text"] += 1
        else:
            yield Document(name, text)


def _pieces(path: Path, name: str) -> Iterator[Document]:
    n_bytes = path.stat().st_size
    # Half of a short file: one with two lines is two documents.
    size = min(max(n_bytes // PIECES, MIN_PIECE), MAX_PIECE, n_bytes // 2)
    offset, lines, length = 0, [], 0
    with path.open("rb") as file:
        for line in itertools.chain(file, [b""]):
            if lines and (length + len(line) > size or not line):
                yield Document(f"{name}@{offset}", _decode(b"".join(lines), path, offset))
                offset, lines, length = offset + length, [], 0
            lines.append(line)
            length += len(line)


def _jsonl(path: Path, name: str) -> Iterator[Document]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            text = _decode(line, path, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: not a JSON object with a field 'text'")
            if "text" not in row:
                raise ValueError(f"{where}: no field 'text'; its fields: {', '.join(row) or 'none'}")
            yield Document(f"{name}:{number}", _string(row["text"], where))


def _parquet(path: Path, name: str) -> Iterator[Document]:
    need("pyarrow", f"reading {path}")
    parquet = need("pyarrow.parquet", f"reading {path}")
    number = 0
    try:
        file = parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names) or "none"
            raise ValueError(f"no column 'text'; its columns: {names}")
        for batch in file.iter_batches(columns=["text"]):
            for value in batch.column(0).to_pylist():
                yield Document(f"{name}:{number}", _string(value, f"row {number}"))
                number += 1
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: 'text' is {type(value).__name__}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: 'text' is not Unicode: half a surrogate pair at character {error.start}"
        ) from error
    return value


def _decode(data: bytes, path: Path, offset: int = 0) -> str:
    """UTF-8 text, or BinaryFile with the byte's place in the file; `offset` is the place of `data`."""
    hint = "UTF-8 text is needed (iconv converts other encodings)"
    nul = data.find(b"\0")
    if nul >= 0:
        raise BinaryFile(f"{path}: a NUL byte at offset {offset + nul}: a binary file? {hint}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise BinaryFile(
            f"{path}: not UTF-8: byte 0x{byte:02x} at offset {offset + error.start}; {hint}"
        ) from error


_READERS = {".jsonl": _jsonl, ".parquet": _parquet}
