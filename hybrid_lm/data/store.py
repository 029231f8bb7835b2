"""The token store: a folder of memory-mapped token streams that any number of runs read and none changes.

- train.bin, val.bin: EOT doc1 EOT doc2 ... EOT docN EOT, little-endian uint16 (uint32 if vocab_size > 65,536)
- train.idx.npy, val.idx.npy: (N 2) int64: place of each document's EOT in the stream, bytes of its text
- tokenizer/: what `load_tokenizer` reads
- store.json: counts, where the text came from, SHA-256 of every other file
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_lm.data.tokenizer import Tokenizer, load_tokenizer
from hybrid_lm.files import sha256_of

FORMAT = 1
SPLITS = ("train", "val")


class StoreError(ValueError):
    """A token store that is missing, damaged, or in the way."""


@dataclass(frozen=True)
class Split:
    """One part of a store: a stream of tokens and where its documents stand."""

    name: str
    """train or val."""
    tokens: np.ndarray
    """(t) uint16 or uint32, memory-mapped: EOT doc1 EOT doc2 ... EOT docN EOT."""
    starts: np.ndarray
    """(documents) int64: places of the EOTs that open a document."""
    doc_bytes: np.ndarray
    """(documents) int64: bytes of UTF-8 text."""
    eot_id: int
    pad_id: int
    fingerprint: str
    """SHA-256 of the stream's file."""

    @property
    def n_bytes(self) -> int:
        """Bytes of UTF-8 text, EOTs not counted: the divisor of bits per byte."""
        return int(self.doc_bytes.sum())

    @property
    def n_tokens(self) -> int:
        """Length of the stream, EOTs included."""
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        return len(self.starts)

    def documents(self) -> Iterator[np.ndarray]:
        """Yields each document's tokens (t) without its EOT, as views of the file."""
        ends = [*self.starts[1:], len(self.tokens) - 1]
        for start, end in zip(self.starts, ends, strict=True):
            yield self.tokens[start + 1 : end]

    def chosen(self, rows: Sequence[int]) -> Split:
        """The documents of these numbers in this order, as a split in memory."""
        documents = list(self.documents())
        eot = np.array([self.eot_id], dtype=self.tokens.dtype)
        tokens = np.concatenate([part for row in rows for part in (eot, documents[row])] + [eot])
        sizes = np.array([1 + len(documents[row]) for row in rows], dtype=np.int64)
        return replace(
            self,
            tokens=tokens,
            starts=np.cumsum(sizes) - sizes,
            doc_bytes=self.doc_bytes[list(rows)],
            fingerprint=hashlib.sha256(tokens.tobytes()).hexdigest(),
        )


class TokenStore:
    """An opened store; `prepare` makes one, `open` reads one."""

    def __init__(self, folder: Path, meta: Mapping[str, Any]):
        self.folder = folder
        self.meta = meta
        """What store.json says."""

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> TokenStore:
        """Opens a store after comparing the size of every file with the record; `verify` compares the SHA-256
        too.

        Raises StoreError with the file and the fault.
        """
        folder = Path(folder)
        meta = _read_meta(folder)
        try:
            for name, record in meta["files"].items():
                _check_file(folder, name, record["bytes"], record["sha256"] if verify else None)
            store = cls(folder, meta)
            for name in SPLITS:
                store.split(name)
        except (KeyError, TypeError, AttributeError, OSError) as error:
            raise StoreError(f"{folder}/store.json: damaged: {error!r}; prepare the store again") from error
        return store

    def split(self, name: str) -> Split:
        """`train` or `val`."""
        if name not in SPLITS:
            raise StoreError(f"{self.folder}: no split {name!r}; a token store has {' and '.join(SPLITS)}")
        counts, tokenizer = self.meta["splits"][name], self.meta["tokenizer"]
        path = self.folder / f"{name}.bin"
        if self.meta["dtype"] not in ("<u2", "<u4"):
            raise StoreError(f"{self.folder}/store.json: dtype {self.meta['dtype']!r} is neither <u2 nor <u4")
        dtype = np.dtype(self.meta["dtype"])
        if path.stat().st_size != counts["n_tokens"] * dtype.itemsize:
            raise StoreError(
                f"{path}: {path.stat().st_size} bytes do not hold {counts['n_tokens']} {dtype} tokens"
            )
        try:
            index = np.load(self.folder / f"{name}.idx.npy", mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise StoreError(
                f"{self.folder}/{name}.idx.npy: damaged: {error}; prepare the store again"
            ) from error
        if index.shape != (counts["n_documents"], 2) or index.dtype != np.int64:
            raise StoreError(
                f"{self.folder}/{name}.idx.npy: {index.dtype} {index.shape} is not the index of this split"
            )
        return Split(
            name=name,
            tokens=np.memmap(path, dtype=dtype, mode="r"),
            starts=index[:, 0],
            doc_bytes=index[:, 1],
            eot_id=tokenizer["eot_id"],
            pad_id=tokenizer["pad_id"],
            fingerprint=self.meta["files"][f"{name}.bin"]["sha256"],
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the store. Raises StoreError if it is not the one on record."""
        tokenizer = load_tokenizer(self.folder / "tokenizer")
        if tokenizer.fingerprint != self.meta["tokenizer"]["fingerprint"]:
            raise StoreError(
                f"{self.folder}/tokenizer: not the tokenizer that made this store; prepare it again"
            )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, specials included; needs no tokenizer package."""
        return self.meta["tokenizer"]["vocab_size"]

    @property
    def notes(self) -> list[str]:
        """What people should know of how the text became documents, one sentence each; often none."""
        corpus, said = self.meta["corpus"], []
        if corpus.get("cut"):
            said.append(
                f"{corpus['source']} is one file: it was cut at line ends into {corpus['n_documents']:,} "
                "documents, of which some are held out"
            )
        if corpus["skipped"]:
            counts = ", ".join(f"{n:,} {reason}" for reason, n in corpus["skipped"].items())
            said.append(f"left out of {corpus['source']}: {counts}")
        return said

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the digests of all files: equal for equal tokens, splits and tokenizer files."""
        digests = {name: record["sha256"] for name, record in self.meta["files"].items()}
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def is_store(path: str | Path) -> bool:
    """Whether a path is a folder with the record of a token store."""
    return (Path(path) / "store.json").is_file()


def _read_meta(folder: Path) -> Mapping[str, Any]:
    if not folder.is_dir():
        raise StoreError(f"{folder}: no such token store; hybrid-lm prepare makes one")
    try:
        meta = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        version = meta["format"]
    except FileNotFoundError:
        raise StoreError(
            f"{folder}: not a token store: it has no store.json; hybrid-lm prepare makes one"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"{folder}/store.json: damaged: {error}; prepare the store again") from error
    if version != FORMAT:
        raise StoreError(
            f"{folder}/store.json: format {version}, this version reads format {FORMAT}; prepare it again"
        )
    return meta


def _check_file(folder: Path, name: str, size: int, sha256: str | None) -> None:
    path = folder / name
    # The record may come from anyone: it names files inside the store, nothing else.
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise StoreError(f"{folder}/store.json: file name {name!r} leads out of the store")
    if not path.is_file():
        raise StoreError(f"{path}: missing; prepare the store again")
    if path.stat().st_size != size:
        raise StoreError(f"{path}: {path.stat().st_size} bytes, {size} on record; prepare the store again")
    if sha256 is not None and sha256_of(path) != sha256:
        raise StoreError(
            f"{path}: its SHA-256 is not the one on record: the file was changed; prepare the store again"
        )
