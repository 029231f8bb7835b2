"""Sizes that the tiny models of the tests have in common."""

IDS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
SIZES = {"vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 3, "initializer_range": 0.08, **IDS}
DECODER = {
    **SIZES,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attention_dropout": 0.1,
}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_type": "llama3", "rope_theta": 500.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 16}
GPT2 = {"vocab_size": 257, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 96, **IDS}
MAMBA = {**SIZES, "state_size": 8, "time_step_min": 0.01, "time_step_max": 0.5, "time_step_floor": 0.02}
MAMBA2 = {**SIZES, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8}

NEOX = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
