"""Zamba2: Mamba-2 layers, and two Transformer blocks in turn that some of them share. Glorioso et al. 2024,
arXiv:2411.15242; the class is `Zamba2ForCausalLM` of transformers."""

import math
from typing import Any

from hybrid_lm.hf.attention_rules import Rope
from hybrid_lm.hf.families.injected import Hybrid, Injected, Tied, half_scale
from hybrid_lm.hf.families.llama import ACTS
from hybrid_lm.hf.fields import Agrees, Choice, Derived, Rule, Same, Whole
from hybrid_lm.hf.options import ConversionError, Fields, Options
from hybrid_lm.hf.weights import DEPTHWISE, linear, row


def mamba_head_dim(fields: Fields) -> int:
    """Channels of a head of Mamba-2."""
    return fields["mamba_expand"] * fields["hidden_size"] // fields["n_mamba_heads"]


def head_dim(fields: Fields) -> int:
    """Width of a head of attention, which reads the stream and the embeddings."""
    return 2 * fields["hidden_size"] // fields["num_attention_heads"]


class StepSizes(Rule):
    """`time_step_min`, both the smallest step size there is and the smallest at the start."""

    theirs = ("time_step_min",)

    def read(self, fields: Fields, ours: Options) -> None:
        low = fields["time_step_min"]
        if low <= 0:
            raise ConversionError(f"time_step_min = {low}: the class takes its logarithm")
        ours["mamba2.dt_limit"] = (low, math.inf)
        ours["mamba2.dt_min"] = min(low, fields["time_step_max"])

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        low, high = ours["mamba2.dt_limit"]
        if low <= 0 or high != math.inf:
            raise ConversionError(
                f"mamba2.dt_limit is {low}, {high}, it has a lower limit above 0 and no upper one"
            )
        fields["time_step_min"] = low


class AttentionAdapters(Rule):
    """`use_shared_attention_adapter`: additions to queries, keys and values, all as wide as the input."""

    theirs = ("use_shared_attention_adapter",)

    def read(self, fields: Fields, ours: Options) -> None:
        ours["inject.attention_adapters"] = fields["use_shared_attention_adapter"]

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        there, wide = ours["inject.attention_adapters"], 2 * ours["d_model"]
        if there and (keys := ours["attention.n_kv_heads"] * ours["attention.head_dim"]) != wide:
            raise ConversionError(f"per_call.lora on keys of width {keys}, it has additions of {wide}")
        fields["use_shared_attention_adapter"] = there


def hybrids(fields: Fields) -> list[int]:
    """Numbers of the layers with a shared block."""
    return [i for i, kind in enumerate(fields["layers_block_type"]) if kind == "hybrid"]


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
        Derived("mamba2.head_dim", mamba_head_dim),
        Agrees("mamba_headdim", mamba_head_dim),
        Whole("mamba_expand", lambda ours: ours["mamba2.d_inner"] / ours["d_model"]),
        Whole("n_mamba_heads", lambda ours: ours["mamba2.d_inner"] / ours["mamba2.head_dim"]),
        StepSizes(),
        Same("time_step_max", "mamba2.dt_max"),
        Same("time_step_floor", "mamba2.dt_floor"),
        Same("chunk_size", "mamba2.chunk"),
        Same("add_bias_linear", "mamba2.bias", "mlp.bias"),
        Same("num_mem_blocks", "inject.copies"),
        Agrees("hybrid_layer_ids", hybrids),
        AttentionAdapters(),
        Same("adapter_rank", "inject.adapter_rank"),
        Same("num_attention_heads", "attention.n_heads"),
        Same("num_key_value_heads", "attention.n_kv_heads", default=lambda f: f["num_attention_heads"]),
        Derived("attention.head_dim", head_dim),
        Agrees("attention_head_dim", head_dim),
        Agrees("attention_hidden_size", lambda f: 2 * f["hidden_size"]),
        Derived("attention.scale", lambda f: half_scale(head_dim(f))),
        Same("attention_dropout", "attention.dropout"),
        MemoryRope(),
        Same("intermediate_size", "mlp.d_ff"),
        Agrees("ffn_hidden_size", lambda f: f["intermediate_size"]),
        Agrees("gated_linear_unit", lambda f: True),
        Agrees("use_shared_mlp_adapter", lambda f: True),
        Choice("hidden_act", "mlp.act", ACTS),
        Tied(),
    ),
    # use_long_context only sets the length, which is read. In any case the class has a bias in the
    # convolution and no upper limit of step sizes; it does not read the widths of keys. The rest is about
    # kernels and the logits of a prompt.
    ignored=frozenset(
        [
            "kv_channels",
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
    cached_differs=lambda fields: True,
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
