"""Zamba2: Mamba-2 layers, and two Transformer blocks in turn that some of them share. Glorioso et al. 2024,
arXiv:2411.15242; the class is `Zamba2ForCausalLM` of transformers."""

import math
from typing import Any

from hybrid_lm.hf.families.injected import Hybrid, Injected, Tied, half_scale
from hybrid_lm.hf.families.llama import ACTS
from hybrid_lm.hf.fields import Choice, ConversionError, Derived, Fields, Options, Rope, Rule, Same, Whole
from hybrid_lm.hf.weights import DEPTHWISE, linear, row


class StepSizes(Rule):
    """`time_step_min`, both the smallest step size there is and the smallest at the start."""

    theirs = ("time_step_min",)

    def read(self, fields: Fields, ours: Options) -> None:
        ours["mamba2.dt_limit"] = (fields["time_step_min"], math.inf)
        ours["mamba2.dt_min"] = fields["time_step_min"]

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        low, high = ours["mamba2.dt_limit"]
        if high != math.inf:
            raise ConversionError(f"mamba2.dt_limit is {low}, {high}, it has no upper limit")
        fields["time_step_min"] = low


class MemoryRope(Rope):
    """Rotary positions where `use_mem_rope` says so."""

    theirs = ("use_mem_rope", *Rope.theirs)

    def read(self, fields: Fields, ours: Options) -> None:
        if fields["use_mem_rope"]:
            super().read(fields, ours)

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        fields["use_mem_rope"] = ours["attention.rope"] is not None
        if fields["use_mem_rope"]:
            super().write(ours, fields)


FAMILY = Injected(
    name="zamba2",
    class_name="Zamba2ForCausalLM",
    layout=Hybrid("mamba2"),
    rules=(
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "d_model"),
        Same("rms_norm_eps", "block.eps"),
        Same("mamba_d_state", "mamba2.d_state"),
        Same("mamba_ngroups", "mamba2.n_groups"),
        Same("mamba_d_conv", "mamba2.d_conv"),
        Derived("mamba2.d_inner", lambda f: f["mamba_expand"] * f["hidden_size"]),
        Derived("mamba2.head_dim", lambda f: f["mamba_expand"] * f["hidden_size"] // f["n_mamba_heads"]),
        Whole("mamba_expand", lambda ours: ours["mamba2.d_inner"] / ours["d_model"]),
        Whole("n_mamba_heads", lambda ours: ours["mamba2.d_inner"] / ours["mamba2.head_dim"]),
        StepSizes(),
        Same("time_step_max", "mamba2.dt_max"),
        Same("time_step_floor", "mamba2.dt_floor"),
        Same("chunk_size", "mamba2.chunk"),
        Same("add_bias_linear", "mamba2.bias", "mlp.bias"),
        Same("num_mem_blocks", "inject.copies"),
        Same("use_shared_attention_adapter", "inject.attention_adapters"),
        Same("adapter_rank", "inject.adapter_rank"),
        Same("num_attention_heads", "attention.n_heads"),
        Same("num_key_value_heads", "attention.n_kv_heads", default=lambda f: f["num_attention_heads"]),
        Derived("attention.head_dim", lambda f: f["attention_head_dim"]),
        Derived("attention.scale", half_scale),
        Same("attention_dropout", "attention.dropout"),
        MemoryRope(),
        Same("intermediate_size", "mlp.d_ff"),
        Choice("hidden_act", "mlp.act", ACTS),
        Tied(),
    ),
    # What the class works out from other fields, whatever these say: sizes of heads, the length
    # (use_long_context). It has a bias in the convolution and no upper limit of step sizes in any case. The
    # rest is about kernels and the logits of a prompt.
    ignored=frozenset(
        [
            "attention_head_dim",
            "attention_hidden_size",
            "hybrid_layer_ids",
            "kv_channels",
            "mamba_headdim",
            "num_logits_to_keep",
            "num_query_groups",
            "time_step_limit",
            "use_conv_bias",
            "use_long_context",
            "use_mamba_kernels",
            "use_mem_eff_path",
        ]
    ),
    rows=(
        row("model.embed_tokens.weight", "embed.weight"),
        row("model.final_layernorm.weight", "final_norm.weight"),
        row("lm_head.weight", "lm_head.weight"),
    ),
    # With a cache, step sizes of single tokens have no lower limit.
    cached_differs=lambda fields: fields["time_step_min"] > 0,
    mamba="mamba2",
    mixer=(
        row("input_layernorm.weight", "pre_norm.weight"),
        *linear("mamba.in_proj", "layer.in_proj"),
        row("mamba.conv1d.weight", "layer.conv_weight", how=DEPTHWISE),
        row("mamba.conv1d.bias", "layer.conv_bias"),
        row("mamba.dt_bias", "layer.dt_bias"),
        row("mamba.A_log", "layer.A_log"),
        row("mamba.D", "layer.D"),
        row("mamba.norm.weight", "layer.norm_weight"),
        *linear("mamba.out_proj", "layer.out_proj"),
    ),
)
