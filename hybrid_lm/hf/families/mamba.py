"""Mamba: one selective state-space layer after the other. Gu & Dao 2023, arXiv:2312.00752."""

from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Agrees, Must, Rule, Same
from hybrid_lm.hf.layouts import Uniform
from hybrid_lm.hf.weights import DEPTHWISE, linear, row

RULES: tuple[Rule, ...] = (
    Same("vocab_size", "vocab_size"),
    Same("hidden_size", "d_model"),
    Same("state_size", "mamba.d_state"),
    Same("intermediate_size", "mamba.d_inner"),
    Same("conv_kernel", "mamba.d_conv"),
    Same("time_step_rank", "mamba.dt_rank"),
    Same("use_bias", "mamba.bias"),
    Same("use_conv_bias", "mamba.conv_bias"),
    Same("layer_norm_epsilon", "block.eps"),
    Same("time_step_min", "mamba.dt_min"),
    Same("time_step_max", "mamba.dt_max"),
    Same("time_step_floor", "mamba.dt_floor"),
    Same("tie_word_embeddings", "embedding.tied"),
    Must("hidden_act", "silu", "swish"),
    # What checkpoints keep of the authors' own configuration.
    Agrees("rms_norm", lambda f: True),
    Agrees("ssm_cfg", lambda f: {}),
)
# The class reads intermediate_size, whatever expand says; residual_in_fp32 is a matter of rounding; the rest
# is about kernels, starting values and other implementations' names for the sizes.
IGNORED = frozenset(
    [
        "d_inner",
        "d_model",
        "expand",
        "fused_add_norm",
        "n_layer",
        "pad_vocab_size_multiple",
        "rescale_prenorm_residual",
        "residual_in_fp32",
        "time_step_init_scheme",
        "time_step_scale",
        "use_associative_scan",
        "use_mambapy",
    ]
)
ROWS = (
    row("backbone.embeddings.weight", "embed.weight"),
    row("backbone.layers.#.norm.weight", "mamba:pre_norm.weight"),
    *linear("backbone.layers.#.mixer.in_proj", "mamba:layer.in_proj"),
    row("backbone.layers.#.mixer.conv1d.weight", "mamba:layer.conv_weight", how=DEPTHWISE),
    row("backbone.layers.#.mixer.conv1d.bias", "mamba:layer.conv_bias"),
    row("backbone.layers.#.mixer.x_proj.weight", "mamba:layer.x_proj.weight"),
    row("backbone.layers.#.mixer.dt_proj.weight", "mamba:layer.dt_proj.weight"),
    row("backbone.layers.#.mixer.dt_proj.bias", "mamba:layer.dt_bias"),
    row("backbone.layers.#.mixer.A_log", "mamba:layer.A_log"),
    row("backbone.layers.#.mixer.D", "mamba:layer.D"),
    *linear("backbone.layers.#.mixer.out_proj", "mamba:layer.out_proj"),
    row("backbone.norm_f.weight", "final_norm.weight"),
    row("lm_head.weight", "lm_head.weight"),
)

FAMILY = Family(
    name="mamba",
    class_name="MambaForCausalLM",
    layout=Uniform("mamba"),
    rules=RULES,
    ignored=IGNORED,
    rows=ROWS,
)
