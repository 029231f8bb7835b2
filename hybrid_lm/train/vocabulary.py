"""The vocabulary that a configuration will have, where that can be known without reading any data."""

from __future__ import annotations

from hybrid_lm import probes
from hybrid_lm.config.schema import ProbeData, RunConfig
from hybrid_lm.data import ByteTokenizer, TokenStore, is_store, make_tokenizer
from hybrid_lm.model.build import with_vocabulary
from hybrid_lm.train.source import product


def filled(config: RunConfig) -> RunConfig:
    """`config` with `model.vocab_size` set. ValueError if only a tokenizer trained on the text can tell."""
    if config.model.vocab_size is not None:
        return config
    data = config.data
    if isinstance(data, ProbeData):
        settings = product("train_params", data.train_params)
        found = [probes.get(data.probe, data.preset, **{**data.params, **s}).vocab_size for s in settings]
        return with_vocabulary(config, max(found))
    if is_store(data.path):
        return with_vocabulary(config, TokenStore.open(data.path).vocab_size)
    if data.tokenizer.kind == "bytes":
        return with_vocabulary(config, ByteTokenizer().vocab_size)
    if data.tokenizer.kind == "huggingface" and data.tokenizer.path:
        return with_vocabulary(config, make_tokenizer(data.tokenizer).vocab_size)
    if data.tokenizer.vocab_size is not None:
        return with_vocabulary(config, data.tokenizer.vocab_size)
    raise ValueError(
        "model.vocab_size is not known before the tokenizer is trained; set data.tokenizer.vocab_size"
    )
