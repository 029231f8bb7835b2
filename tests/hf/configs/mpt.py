"""Configurations of mpt that together set every field off its default."""

from native_sizes import IDS

MPT = {"vocab_size": 257, "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 96, **IDS}
MPT |= {"initializer_range": 0.08, "use_cache": True}

CONFIGS = [
    {**MPT, "layer_norm_epsilon": 1e-2},
    # Six heads: their slopes are not those of a power of two.
    {**MPT, "d_model": 72, "n_heads": 6, "tie_word_embeddings": False},
    {**MPT, "attn_config": {"softmax_scale": 0.4}, "max_seq_len": 112},
]
REWORDED = ("attn_config",)
"""It says again in which type the weights are."""
