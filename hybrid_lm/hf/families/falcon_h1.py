"""Falcon-H1: attention and Mamba-2 beside each other in every layer, with factors everywhere. Zuo et al.
2025, arXiv:2507.22448."""

from typing import Any

from hybrid_lm.hf.attention_rules import Rope
from hybrid_lm.hf.families.bamba import (
    ATTENTION_ROWS,
    ENDS,
    HEADS,
    MAMBA2,
    MAMBA2_ROWS,
    MLP_ROWS,
    clamps,
)
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Must, Rule, Same, Whole
from hybrid_lm.hf.layouts import Uniform
from hybrid_lm.hf.options import ConversionError, Fields, Options
from hybrid_lm.hf.weights import row


class GatedNorm(Rule):
    """Whether the scan's output is normed, and on which side of the gate."""

    theirs = ("mamba_rms_norm", "mamba_norm_before_gate")

    def read(self, fields: Fields, ours: Options) -> None:
        order = "norm_gate" if fields["mamba_norm_before_gate"] else "gate_norm"
        ours["mamba2.norm"] = order if fields["mamba_rms_norm"] else "gate"

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        fields["mamba_rms_norm"] = ours["mamba2.norm"] != "gate"
        fields["mamba_norm_before_gate"] = ours["mamba2.norm"] != "gate_norm"


class Biases(Rule):
    """Biases of Mamba-2's input and output projections, one option here."""

    theirs = ("mamba_proj_bias", "projectors_bias")

    def read(self, fields: Fields, ours: Options) -> None:
        one, other = (fields[name] for name in self.theirs)
        if one != other:
            raise ConversionError(f"mamba_proj_bias = {one} with projectors_bias = {other}: only both alike")
        ours["mamba2.bias"] = one

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        fields |= dict.fromkeys(self.theirs, ours["mamba2.bias"])


class MLPFactors(Rule):
    """The factors on an MLP's gate and on its output."""

    theirs = ("mlp_multipliers",)

    def read(self, fields: Fields, ours: Options) -> None:
        ours["mlp.gate_multiplier"], ours["mlp.out_multiplier"] = fields["mlp_multipliers"]

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        fields["mlp_multipliers"] = [ours["mlp.gate_multiplier"], ours["mlp.out_multiplier"]]


FAMILY = Family(
    name="falcon_h1",
    class_name="FalconH1ForCausalLM",
    layout=Uniform("attention+mamba2 mlp"),
    rules=(
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "d_model"),
        Same("intermediate_size", "mlp.d_ff"),
        Same("rms_norm_eps", "block.eps", "mamba2.norm_eps"),
        Same("tie_word_embeddings", "embedding.tied"),
        Same("mlp_bias", "mlp.bias"),
        *HEADS,
        Same("attention_bias", "attention.qkv_bias", "attention.out_bias"),
        Rope(),
        *MAMBA2,
        Whole("mamba_d_ssm", lambda ours: ours["mamba2.d_inner"]),
        Biases(),
        GatedNorm(),
        Same("embedding_multiplier", "embedding.multiplier"),
        Same("lm_head_multiplier", "head.multiplier"),
        Same("attention_in_multiplier", "attention.in_multiplier"),
        Same("key_multiplier", "attention.key_multiplier"),
        Same("attention_out_multiplier", "attention.out_multiplier"),
        Same("ssm_in_multiplier", "mamba2.in_multiplier"),
        Same("ssm_multipliers", "mamba2.multipliers"),
        Same("ssm_out_multiplier", "mamba2.out_multiplier"),
        MLPFactors(),
        # The activation of the convolution too.
        Must("hidden_act", "silu", "swish"),
        Must("mamba_use_mlp", True),
    ),
    # The inner width is that of the heads; the first three are read by nothing, the last by `generate`.
    ignored=frozenset(
        [
            "mlp_expansion_factor",
            "time_step_floor",
            "time_step_max",
            "time_step_min",
            "time_step_rank",
            "mamba_expand",
            "num_logits_to_keep",
        ]
    ),
    rows=(
        *ENDS,
        row("model.layers.#.input_layernorm.weight", "attention:pre_norm.weight"),
        *MAMBA2_ROWS,
        *ATTENTION_ROWS,
        *MLP_ROWS,
    ),
    cached_differs=clamps,
)
