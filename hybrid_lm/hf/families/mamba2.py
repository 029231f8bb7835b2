"""Mamba-2: one SSD layer after the other. Dao & Gu 2024, arXiv:2405.21060."""

import math

from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Agrees, Derived, Must, Same, Whole
from hybrid_lm.hf.layouts import Uniform
from hybrid_lm.hf.options import Fields
from hybrid_lm.hf.weights import DEPTHWISE, linear, row


def clamps(fields: Fields) -> bool:
    """Whether step sizes are limited, which their decoding step forgets."""
    return tuple(fields["time_step_limit"]) != (0.0, math.inf)


FAMILY = Family(
    name="mamba2",
    class_name="Mamba2ForCausalLM",
    layout=Uniform("mamba2"),
    rules=(
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "d_model"),
        Same("state_size", "mamba2.d_state"),
        Same("head_dim", "mamba2.head_dim"),
        Same("n_groups", "mamba2.n_groups"),
        Same("conv_kernel", "mamba2.d_conv"),
        Derived("mamba2.d_inner", lambda f: f["num_heads"] * f["head_dim"]),
        Whole("expand", lambda ours: ours["mamba2.d_inner"] / ours["d_model"]),
        Whole("num_heads", lambda ours: ours["mamba2.d_inner"] / ours["mamba2.head_dim"]),
        Same("use_bias", "mamba2.bias"),
        Same("use_conv_bias", "mamba2.conv_bias"),
        Same("layer_norm_epsilon", "block.eps", "mamba2.norm_eps"),
        Same("time_step_limit", "mamba2.dt_limit"),
        Same("time_step_min", "mamba2.dt_min"),
        Same("time_step_max", "mamba2.dt_max"),
        Same("time_step_floor", "mamba2.dt_floor"),
        Same("chunk_size", "mamba2.chunk"),
        Same("tie_word_embeddings", "embedding.tied"),
        Must("hidden_act", "silu", "swish"),
        # In what transformers 4 wrote.
        Agrees("rms_norm", lambda f: True),
    ),
    # time_step_rank is Mamba-1's; residual_in_fp32 is a matter of rounding; the class gates before the norm
    # whatever norm_before_gate says, which transformers 4 wrote as true; the other is about starting values.
    ignored=frozenset(["norm_before_gate", "rescale_prenorm_residual", "residual_in_fp32", "time_step_rank"]),
    rows=(
        row("backbone.embeddings.weight", "embed.weight"),
        row("backbone.layers.#.norm.weight", "mamba2:pre_norm.weight"),
        *linear("backbone.layers.#.mixer.in_proj", "mamba2:layer.in_proj"),
        row("backbone.layers.#.mixer.conv1d.weight", "mamba2:layer.conv_weight", how=DEPTHWISE),
        row("backbone.layers.#.mixer.conv1d.bias", "mamba2:layer.conv_bias"),
        row("backbone.layers.#.mixer.dt_bias", "mamba2:layer.dt_bias"),
        row("backbone.layers.#.mixer.A_log", "mamba2:layer.A_log"),
        row("backbone.layers.#.mixer.D", "mamba2:layer.D"),
        row("backbone.layers.#.mixer.norm.weight", "mamba2:layer.norm_weight"),
        *linear("backbone.layers.#.mixer.out_proj", "mamba2:layer.out_proj"),
        row("backbone.norm_f.weight", "final_norm.weight"),
        row("lm_head.weight", "lm_head.weight"),
    ),
    cached_differs=clamps,
)
