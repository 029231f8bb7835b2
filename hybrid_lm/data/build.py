"""From text to a token store: read twice, encode in parallel, write beside, rename at the end.

The first reading finds every fault of the corpus and fixes the split before anything is written; the second
encodes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_lm.config.schema import TextData, TokenizerConfig
from hybrid_lm.data.encode import encode_all, worker_count
from hybrid_lm.data.store import FORMAT, SPLITS, StoreError, TokenStore, is_store
from hybrid_lm.data.text import documents, is_cut
from hybrid_lm.data.tokenizer import Tokenizer, make_tokenizer
from hybrid_lm.files import DiskError, disk, new_folder, sha256_of

Progress = Callable[[int, int], None]
"""Called with the bytes of text that are done and those that there are."""
VAL_FRACTION = 0.05
MIN_HELD_OUT = 100
"""Bytes of held-out text below which its bits per byte say nothing."""


def prepare(
    path: str | Path,
    out: str | Path,
    tokenizer: Tokenizer | TokenizerConfig,
    *,
    val_fraction: float = VAL_FRACTION,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TokenStore:
    """Turns a corpus (see `documents`) into a token store at `out`; the same bytes for any number of workers.

    val_fraction: the share of documents held out: those whose text has the smallest SHA-256. Equal texts are
        on one side.
    tokenizer: a config of `kind: bpe` is trained on the training documents only.
    workers: processes that encode; None: one for bytes, which are free, else one per core. Scripts that use
        more than one need the `if __name__ == "__main__":` of multiprocessing.
    overwrite: replace an existing token store. Anything else at `out` is never replaced.

    Raises ValueError for a bad corpus, one with less than two different documents, and one of which less than
    100 bytes would be held out, StoreError if `out` is in use, DiskError if the disk is full or read-only.
    Whatever happens, `out` is a whole store or what it was before.
    """
    out = Path(out)
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction = {val_fraction}: it must lie between 0 and 1")
    _check_free(path, out, overwrite)
    corpus = survey(path, val_fraction)
    config = tokenizer if isinstance(tokenizer, TokenizerConfig) else None
    if isinstance(tokenizer, TokenizerConfig):
        # Held-out text must not shape the vocabulary that is judged on it.
        texts = (text for (_, text), held in zip(documents(path), corpus.held_out, strict=False) if not held)
        tokenizer = make_tokenizer(tokenizer, texts)
    origin = {
        "source": Path(path).name,
        "n_documents": len(corpus.held_out),
        "n_bytes": corpus.n_bytes,
        "sha256": corpus.sha256,
        "cut": is_cut(path),
        "skipped": corpus.skipped,
        "val_fraction": val_fraction,
        "tokenizer_config": config and config.model_dump(),
    }
    workers = workers or (1 if tokenizer.kind == "bytes" else worker_count(corpus.n_bytes))
    with new_folder(out, _cannot(out)) as folder:
        _build(folder, path, corpus, tokenizer, origin, workers, progress or (lambda done, total: None))
    return TokenStore.open(out)


def open_or_prepare(
    data: TextData, folder: str | Path, *, workers: int | None = None, progress: Progress | None = None
) -> TokenStore:
    """The store that a run reads: `data.path` itself if it is one, else one made from it at `folder`.

    A store already at `folder` is used if it holds the same text under the same tokenizer, and replaced if
    not.

    Raises ValueError where `data` asks for another tokenizer than the one of the store `data.path`, and
    whatever `prepare` and `TokenStore.open` raise.
    """
    if is_store(data.path):
        store = TokenStore.open(data.path)
        _check_tokenizer(store, data)
        return store
    if is_store(folder):
        # A damaged store is one that does not hold the text: it is made again.
        with suppress(StoreError, KeyError):
            store = TokenStore.open(folder)
            if _made_from(store, data):
                return store
    return prepare(data.path, folder, data.tokenizer, workers=workers, overwrite=True, progress=progress)


def _check_tokenizer(store: TokenStore, data: TextData) -> None:
    """Raises ValueError if `data` asks for a tokenizer, the default apart, that is not the store's."""
    asked, has = data.tokenizer, store.meta["tokenizer"]
    made_by = (store.meta["corpus"].get("tokenizer_config") or {}).get("vocab_size")
    same_size = asked.kind != "bpe" or made_by in (None, asked.vocab_size)
    if asked == TokenizerConfig() or (asked.kind == has["kind"] and same_size):
        return
    wanted = f"bpe-{asked.vocab_size}" if asked.kind == "bpe" else f"{asked.kind} {asked.path or ''}".strip()
    raise ValueError(
        f"data.tokenizer asks for {wanted}, but data.path = {data.path} is a token store made with "
        f"{has['name']}; leave data.tokenizer out, or prepare the text again with the other tokenizer"
    )


def _made_from(store: TokenStore, data: TextData) -> bool:
    origin, config = store.meta["corpus"], data.tokenizer
    if config.kind == "bpe":
        same = origin["tokenizer_config"] == config.model_dump()
    else:
        same = store.meta["tokenizer"]["fingerprint"] == make_tokenizer(config).fingerprint
    corpus = survey(data.path, VAL_FRACTION)
    return same and (origin["sha256"], origin["val_fraction"]) == (corpus.sha256, VAL_FRACTION)


@dataclass(frozen=True)
class Corpus:
    """What the first reading found."""

    held_out: list[bool]
    """Per document, in order."""
    n_bytes: int
    sha256: str
    """Over the SHA-256 of every document's text, in order."""
    skipped: dict[str, int]


def survey(path: str | Path, val_fraction: float) -> Corpus:
    """Reads a corpus once and splits it by the hash of each document's text, whatever its name and place."""
    skipped: Counter[str] = Counter()
    sizes: list[tuple[bytes, int]] = []
    for document in documents(path, skipped):
        data = document.text.encode("utf-8")
        sizes.append((hashlib.sha256(data).digest(), len(data)))
    different = sorted({digest for digest, _ in sizes})
    if len(different) < 2:
        raise ValueError(
            f"{path}: {len(sizes)} document(s), {len(different)} different; a train and a val split need "
            "at least 2 different ones: give more text, text with line breaks (where a file is cut), or a "
            "folder of files"
        )
    n_val = min(max(1, math.floor(val_fraction * len(different) + 0.5)), len(different) - 1)
    val = set(different[:n_val])
    n_bytes, n_held_out = sum(n for _, n in sizes), sum(n for digest, n in sizes if digest in val)
    if n_held_out < MIN_HELD_OUT:
        raise ValueError(
            f"{path}: {n_held_out} of {n_bytes} bytes would be held out, too few to judge a model on; give "
            "more text, or hold out more of it (hybrid-lm prepare --val-fraction)"
        )
    return Corpus(
        held_out=[digest in val for digest, _ in sizes],
        n_bytes=n_bytes,
        sha256=hashlib.sha256(b"".join(digest for digest, _ in sizes)).hexdigest(),
        skipped=dict(sorted(skipped.items())),
    )


def _build(
    folder: Path,
    path: str | Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    origin: dict[str, Any],
    workers: int,
    progress: Progress,
) -> None:
    """Writes a whole store into `folder`."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    with disk(_cannot(folder)):
        tokenizer.save(folder / "tokenizer")
    parts = {name: _Part(folder, name, dtype, tokenizer.eot_id) for name in SPLITS}
    digests, done = hashlib.sha256(), 0
    held_out = iter(corpus.held_out)
    try:
        for encoded in encode_all(documents(path), tokenizer, folder / "tokenizer", workers):
            for ids, n_bytes, digest in encoded:
                parts["val" if next(held_out, False) else "train"].append(ids, n_bytes)
                digests.update(digest)
                done += n_bytes
            progress(done, corpus.n_bytes)
        splits = {name: part.close() for name, part in parts.items()}
    finally:
        for part in parts.values():
            with suppress(OSError):
                part.file.close()
    if digests.hexdigest() != corpus.sha256:
        raise ValueError(f"{path}: the text changed while it was read; prepare it again")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    meta = {
        "format": FORMAT,
        "dtype": dtype.str,
        "tokenizer": {
            "kind": tokenizer.kind,
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "eot_id": tokenizer.eot_id,
            "pad_id": tokenizer.pad_id,
            "fingerprint": tokenizer.fingerprint,
        },
        "corpus": origin,
        "splits": splits,
        "files": {
            file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
            for file in files
        },
    }
    with disk(_cannot(folder)):
        (folder / "store.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


class _Part:
    """The files of one split while they grow."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, eot_id: int):
        self.folder, self.name = folder, name
        self.eot = np.array([eot_id], dtype=dtype)
        self.index: list[tuple[int, int]] = []
        self.n_tokens = 0
        with disk(_cannot(folder)):
            self.file = (folder / f"{name}.bin").open("wb")

    def append(self, ids: np.ndarray, n_bytes: int) -> None:
        self.index.append((self.n_tokens, n_bytes))
        self.n_tokens += 1 + len(ids)
        with disk(_cannot(self.folder)):
            self.file.write(self.eot.tobytes())
            self.file.write(ids.astype(self.eot.dtype).tobytes())

    def close(self) -> dict[str, int]:
        with disk(_cannot(self.folder)):
            self.file.write(self.eot.tobytes())
            self.file.close()
            index = np.array(self.index, dtype=np.int64)
            np.save(self.folder / f"{self.name}.idx.npy", index)
        return {"n_documents": len(index), "n_tokens": self.n_tokens + 1, "n_bytes": int(index[:, 1].sum())}


def _check_free(path: str | Path, out: Path, overwrite: bool) -> None:
    """Refuses a place that holds something else, before any work."""
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out}: a file is in the way; a token store is a folder")
    if out.is_dir() and any(out.iterdir()):
        if not is_store(out):
            raise StoreError(f"{out}: the folder is not empty and no token store; choose another place")
        if not overwrite:
            raise StoreError(f"{out}: a token store is already there; choose another place, or say overwrite")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise StoreError(f"{out}: {above} is a file; choose another place")
    if not os.access(above, os.W_OK):
        raise DiskError(
            f"cannot write a token store in {above}: read-only or not yours; choose another place"
        )
    source = Path(path).resolve()
    if source.is_dir() and source in out.resolve().parents:
        raise StoreError(
            f"{out}: inside the corpus {path}; a store must lie outside of the text it is made from"
        )


def _cannot(folder: Path) -> str:
    return f"cannot write a token store in {folder.parent}"
