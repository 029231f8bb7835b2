"""Zamba: Mamba layers with several heads, and one Transformer block that some of them share. Glorioso et al.
2024, arXiv:2405.16712; the class is `ZambaForCausalLM` of transformers."""

import torch

from hybrid_lm.hf.families.injected import Hybrid, Injected, Tied, half_scale
from hybrid_lm.hf.families.llama import ACTS
from hybrid_lm.hf.fields import Agrees, Choice, Derived, Must, Same, Whole
from hybrid_lm.hf.weights import DEPTHWISE, Transform, each, linear, row

ALTERNATING = each(
    "alternating",
    lambda x: torch.cat([x[0::2], x[1::2]]),
    lambda x: torch.stack(x.chunk(2), 1).flatten(0, 1),
)
"""Rows of u and z in turn; here all of u, then all of z."""
BY_MAMBA_HEAD = Transform(
    "by_mamba_head",
    lambda theirs, shapes, o: [theirs[0].flatten(0, 1)],
    lambda ours, o: [ours[0].unflatten(0, (o["mamba.n_heads"], -1))],
)
"""(h p ...) of the heads, here (d ...) of the channels."""
HEAD_MATRICES = Transform(
    "head_matrices",
    lambda theirs, shapes, o: [theirs[0].reshape(shapes[0])],
    lambda ours, o: [ours[0].unflatten(0, (1, -1)) if o["mamba.n_heads"] == 1 else ours[0]],
)
"""A matrix per head (h d_out d_in); here without an axis for it if there is one head."""

FAMILY = Injected(
    name="zamba",
    class_name="ZambaForCausalLM",
    layout=Hybrid("mamba"),
    rules=(
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "d_model"),
        Same("rms_norm_eps", "block.eps"),
        Same("mamba_d_state", "mamba.d_state"),
        Same("mamba_d_conv", "mamba.d_conv"),
        Same("mamba_dt_rank", "mamba.dt_rank"),
        Same("n_mamba_heads", "mamba.n_heads"),
        Derived("mamba.d_inner", lambda f: f["mamba_expand"] * f["hidden_size"]),
        Whole("mamba_expand", lambda ours: ours["mamba.d_inner"] / ours["d_model"]),
        Same("mamba_conv_bias", "mamba.conv_bias"),
        Same("mamba_proj_bias", "mamba.bias"),
        Same("time_step_min", "mamba.dt_min"),
        Same("time_step_max", "mamba.dt_max"),
        Same("time_step_floor", "mamba.dt_floor"),
        Must("hidden_mamba_act", "silu", "swish"),
        Same("num_attention_heads", "attention.n_heads"),
        Same("num_key_value_heads", "attention.n_kv_heads"),
        Same("attention_head_dim", "attention.head_dim"),
        Agrees("attention_hidden_size", lambda f: 2 * f["hidden_size"]),
        Derived("attention.scale", lambda f: half_scale(f["attention_head_dim"])),
        Same("attention_dropout", "attention.dropout"),
        Same("intermediate_size", "mlp.d_ff"),
        Choice("hidden_act", "mlp.act", ACTS),
        Tied(),
    ),
    fixed={"inject.copies": 1, "inject.adapter_rank": 0, "inject.attention_adapters": False},
    # The class has no positions, and reads the list of layers where it is given, which it always is after it
    # has made its configuration. The rest is about kernels and the logits of a prompt.
    ignored=frozenset(
        [
            "attn_layer_offset",
            "attn_layer_period",
            "max_position_embeddings",
            "num_logits_to_keep",
            "use_associative_scan",
            "use_mamba_kernels",
        ]
    ),
    rows=(
        row("model.embed_tokens.weight", "embed.weight"),
        row("model.final_layernorm.weight", "final_norm.weight"),
        row("lm_head.weight", "lm_head.weight"),
    ),
    mamba="mamba",
    mixer=(
        row("input_layernorm.weight", "pre_norm.weight"),
        row("mamba.in_proj.weight", "layer.in_proj.weight", how=ALTERNATING),
        row("mamba.in_proj.bias", "layer.in_proj.bias", how=ALTERNATING),
        row("mamba.conv1d.weight", "layer.conv_weight", how=DEPTHWISE),
        row("mamba.conv1d.bias", "layer.conv_bias"),
        row("mamba.x_proj_weight", "layer.x_proj.weight", how=HEAD_MATRICES),
        row("mamba.dt_proj_weight", "layer.dt_proj.weight", how=HEAD_MATRICES),
        row("mamba.dt_proj_bias", "layer.dt_bias", how=BY_MAMBA_HEAD),
        row("mamba.A_log", "layer.A_log", how=BY_MAMBA_HEAD),
        row("mamba.D", "layer.D", how=BY_MAMBA_HEAD),
        *linear("mamba.out_proj", "layer.out_proj"),
    ),
    shared="shared_transf",
    fused=False,
)
