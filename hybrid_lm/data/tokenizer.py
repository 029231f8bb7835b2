"""Text <-> token ids.

Every tokenizer here keeps one promise that the store and the packing stand on: text never yields a special
id. A document that contains the characters `<|endoftext|>` gets the ids of those characters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hybrid_lm.config.schema import TokenizerConfig
from hybrid_lm.data.optional import need

EOT = "<|endoftext|>"
PAD = "<|pad|>"
KIND_FILE = "hybrid_lm.json"


class Tokenizer(Protocol):
    """What the rest of the toolkit asks of a tokenizer."""

    kind: str
    """bytes | bpe | huggingface."""
    name: str
    """For people: bytes, bpe-4096, openai-community/gpt2."""
    vocab_size: int
    """Entries of the vocabulary, specials included."""
    eot_id: int
    """Stands before every document and after the last."""
    pad_id: int
    """Fills unused positions."""
    fingerprint: str
    """SHA-256 of what defines the mapping from text to ids."""

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, (t) unsigned integers, none of them special."""
        ...

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of some ids; special ids are left out and broken UTF-8 becomes U+FFFD."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes what `load_tokenizer` reads."""
        ...

    def to_hf(self, max_length: int) -> Any:
        """The same mapping as a `transformers.PreTrainedTokenizerFast` whose `model_max_length` is
        `max_length` tokens.
        """
        ...


class ByteTokenizer:
    """One id per UTF-8 byte (0..255), then `<|endoftext|>` 256 and `<|pad|>` 257; nothing to train."""

    kind = "bytes"
    name = "bytes"
    vocab_size = 258
    eot_id = 256
    pad_id = 257
    fingerprint = hashlib.sha256(f"utf-8 bytes, {EOT} 256, {PAD} 257".encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """(t) uint8. A lone surrogate has no UTF-8 form and raises UnicodeEncodeError, a ValueError."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        ids = as_ids(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        write_kind(folder, self)

    def to_hf(self, max_length: int) -> Any:
        tokenizers = need("tokenizers", "the Hugging Face form of a tokenizer")
        # A BPE without merges maps each byte-level character to its byte. The specials are part of this
        # vocabulary: as added tokens only, `vocab_size` would say 256 while `len` says 258.
        vocab = {char: byte for byte, char in enumerate(byte_level_alphabet())}
        vocab |= {EOT: self.eot_id, PAD: self.pad_id}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        return wrap(backend, max_length)


class BackendTokenizer:
    """A tokenizer of the `tokenizers` package with an end-of-text id.

    Raises ValueError if the end-of-text or padding id comes out of a text, which a vocabulary that lists its
    specials as ordinary pieces can do.
    """

    kind: str
    name: str

    def __init__(self, backend: Any, eot_id: int, pad_id: int):
        # A copy: a tokenizer.json may carry truncation or padding, which would silently cut documents.
        tokenizers = need("tokenizers", f"a {self.kind} tokenizer")
        self.backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        self.eot_id, self.pad_id = eot_id, pad_id
        self.vocab_size = 1 + max(self.backend.get_vocab(with_added_tokens=True).values())
        defined = json.dumps([json.loads(self.backend.to_str()), eot_id, pad_id], sort_keys=True)
        self.fingerprint = hashlib.sha256(defined.encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        ids = np.array(self.backend.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
        special = ids[(ids == self.eot_id) | (ids == self.pad_id)]
        if special.size:
            token = self.backend.id_to_token(int(special[0]))
            raise ValueError(
                f"tokenizer {self.name}: it reads the characters {token!r} of a text as its special token"
            )
        return ids

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        ids = as_ids(ids)
        return self.backend.decode(
            ids[(ids != self.eot_id) & (ids != self.pad_id)].tolist(), skip_special_tokens=True
        )


class BPETokenizer(BackendTokenizer):
    """A byte-level BPE of our own training (`train_bpe`), stored as tokenizer.json."""

    kind = "bpe"

    def __init__(self, backend: Any):
        super().__init__(backend, backend.token_to_id(EOT), backend.token_to_id(PAD))
        self.name = f"bpe-{self.vocab_size}"

    def save(self, folder: str | Path) -> None:
        write_kind(folder, self)
        (Path(folder) / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")

    def to_hf(self, max_length: int) -> Any:
        return wrap(self.backend, max_length)


class HFTokenizer(BackendTokenizer):
    """Any fast Hugging Face tokenizer: a local folder, or a hub name, sought in the local cache first. Remote
    code is never run.

    Raises ValueError where there is no tokenizer, it has no fast form, or it has no end-of-sequence token.
    """

    kind = "huggingface"

    def __init__(self, path: str | Path, name: str | None = None):
        transformers = need("transformers", f"the tokenizer {path}")
        self.name = name or (Path(path).resolve().name if Path(path).exists() else str(path))
        try:
            hf = _pretrained(transformers, path)
        except (OSError, ValueError, KeyError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ValueError(f"tokenizer {path}: {reason}") from error
        if not hf.is_fast:
            raise ValueError(
                f"tokenizer {path}: it has no fast (tokenizer.json) form, which this toolkit needs"
            )
        if hf.eos_token_id is None:
            raise ValueError(
                f"tokenizer {path}: it has no eos_token, which separates documents; set one and save it"
            )
        super().__init__(hf.backend_tokenizer, hf.eos_token_id, first(hf.pad_token_id, hf.eos_token_id))
        self._hf = hf

    def save(self, folder: str | Path) -> None:
        write_kind(folder, self)
        self._hf.save_pretrained(str(folder))

    def to_hf(self, max_length: int) -> Any:
        self._hf.model_max_length = max_length
        return self._hf


def _pretrained(transformers: Any, path: str | Path) -> Any:
    """The tokenizer of a folder or hub name. At most one attempt to reach the hub."""

    def load(local_files_only: bool) -> Any:
        found = transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=local_files_only)
        # How it was found is no property of it, and would be saved with it.
        for key in ("is_local", "local_files_only"):
            found.init_kwargs.pop(key, None)
        return found

    if Path(path).exists():
        return load(local_files_only=True)
    # A hub name has at most one slash, and nobody's folder before it.
    owner, slash, rest = str(path).partition("/")
    if owner in ("", ".", "..", "~") or "/" in rest or (slash and Path(owner).is_dir()):
        raise ValueError("no such folder")
    with suppress(OSError, ValueError, KeyError):
        return load(local_files_only=True)
    try:
        # transformers would try each of its files for half a minute.
        need("huggingface_hub", "a hub name").HfApi().model_info(str(path), timeout=10)
    # What its HTTP client raises is of no common type.
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"no such folder, and not to be had from the Hugging Face hub: {reason}") from error
    return load(local_files_only=False)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Trains a byte-level BPE. Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2.

    `vocab_size` counts the 256 bytes and the two specials, so it is at least 258 (ValueError). A small corpus
    may hold fewer frequent pairs than asked for: `vocab_size` of the result says how many entries there are.
    """
    if vocab_size < 258:
        raise ValueError(f"tokenizer.vocab_size = {vocab_size}: 256 bytes and 2 specials need at least 258")
    tokenizers = need("tokenizers", "training a BPE tokenizer")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT, PAD],
        initial_alphabet=byte_level_alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return BPETokenizer(backend)


def make_tokenizer(config: TokenizerConfig, texts: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer that a run asks for; `texts` are read only by `kind: bpe`, which is trained on them.

    Raises ValueError where an option is missing or does not belong to the kind.
    """
    wanted = {"bytes": None, "huggingface": "path", "bpe": "vocab_size"}[config.kind]
    for option in ("path", "vocab_size"):
        given = getattr(config, option) is not None
        if given != (option == wanted):
            raise ValueError(
                f"tokenizer.{option}: kind {config.kind} {'does not take it' if given else 'needs it'}"
            )
    if config.kind == "bpe":
        return train_bpe(texts, config.vocab_size or 0)
    if config.kind == "bytes":
        return ByteTokenizer()
    path = config.path or ""
    # The folder in which a run keeps its tokenizer says itself what it is.
    return load_tokenizer(path) if (Path(path) / KIND_FILE).is_file() else HFTokenizer(path)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads what `Tokenizer.save` wrote. Raises ValueError if the folder holds no saved tokenizer."""
    folder = Path(folder)
    try:
        saved = json.loads((folder / KIND_FILE).read_text())
        kind, name = saved["kind"], saved["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not a saved tokenizer: {KIND_FILE} is missing or damaged") from error
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "huggingface":
        return HFTokenizer(folder, name)
    if kind != "bpe":
        raise ValueError(f"{folder}/{KIND_FILE}: unknown kind {kind!r}; known: bpe, bytes, huggingface")
    tokenizers = need("tokenizers", f"the tokenizer {folder}")
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        return BPETokenizer(tokenizers.Tokenizer.from_str(text))
    # The Rust side raises plain Exception for every fault of the file.
    except Exception as error:
        raise ValueError(f"{folder}/tokenizer.json: missing or damaged: {error}") from error


def write_kind(folder: str | Path, tokenizer: Tokenizer) -> None:
    """Makes the folder and the file that tells `load_tokenizer` which class to use."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    saved = {"kind": tokenizer.kind, "name": tokenizer.name, "fingerprint": tokenizer.fingerprint}
    (Path(folder) / KIND_FILE).write_text(json.dumps(saved, indent=1) + "\n")


def wrap(backend: Any, max_length: int) -> Any:
    """A `tokenizers` object as a `PreTrainedTokenizerFast` in which text stays text."""
    transformers = need("transformers", "the Hugging Face form of a tokenizer")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=EOT,
        eos_token=EOT,
        pad_token=PAD,
        model_max_length=max_length,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def byte_level_alphabet() -> list[str]:
    """The 256 printable characters by which GPT-2's byte-level BPE writes bytes 0..255, in order of the byte.

    Radford et al. 2019: bytes that print as themselves in Latin-1 keep their character, the others take the
    next free character from U+0100 on.
    """
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(0x100, 0x200))
    return [chr(byte if byte in prints else next(free)) for byte in range(256)]


def as_ids(ids: Iterable[int] | np.ndarray) -> np.ndarray:
    """(t) int64 of a list, an array or a one-dimensional CPU tensor of ids."""
    return np.asarray(ids if hasattr(ids, "__len__") else list(ids), dtype=np.int64)


def first(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value
