"""Text to batches: readers, tokenizers, the memory-mapped token store, the stateless sampler. No torch."""

from hybrid_lm.data.batch import IGNORE, Batch
from hybrid_lm.data.build import open_or_prepare, prepare
from hybrid_lm.data.sampler import Windows
from hybrid_lm.data.store import Split, StoreError, TokenStore, is_store
from hybrid_lm.data.text import Document, documents
from hybrid_lm.data.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    HFTokenizer,
    Tokenizer,
    load_tokenizer,
    make_tokenizer,
    train_bpe,
)

__all__ = [
    "IGNORE",
    "BPETokenizer",
    "Batch",
    "ByteTokenizer",
    "Document",
    "HFTokenizer",
    "Split",
    "StoreError",
    "TokenStore",
    "Tokenizer",
    "Windows",
    "documents",
    "is_store",
    "load_tokenizer",
    "make_tokenizer",
    "open_or_prepare",
    "prepare",
    "train_bpe",
]
