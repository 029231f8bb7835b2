"""OLMo Hybrid: Gated DeltaNet with norms before its layers, and attention as in OLMo 2 with norms behind. The
class is `OlmoHybridForCausalLM` of transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid_lm.hf.attention_rules import Rope
from hybrid_lm.hf.families.llama import ATTENTION, ENDS, MLP, head_dim
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Must, Rule, Same
from hybrid_lm.hf.layouts import Listed
from hybrid_lm.hf.options import Fields, Options
from hybrid_lm.hf.weights import Transform, Values, row


class NormsByLayer(Rule):
    """Norms before the layers of a block with Gated DeltaNet, and behind those of one with attention."""

    def read(self, fields: Fields, ours: Options) -> None:
        for kind, placement in (("gated_deltanet", "pre"), ("attention", "post")):
            for _, layer in ours.each(kind):
                layer[f"{kind}.residual.placement"] = layer["mlp.residual.placement"] = placement

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        pass


class RopeOrNone(Rope):
    """Rotary positions, or none where `rope_theta` is null."""

    def read(self, fields: Fields, ours: Options) -> None:
        if (fields["rope_parameters"] or {"rope_theta": None}).get("rope_theta", 0.0) is None:
            ours["attention.rope"] = None
        else:
            super().read(fields, ours)

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        if ours["attention.rope"] is None:
            fields["rope_parameters"] = {"rope_type": "default", "rope_theta": None}
        else:
            super().write(ours, fields)


class Range(Rule):
    """Two fields that are the ends of one range."""

    def __init__(self, low: str, high: str, ours: str):
        self.theirs, self.ours = (low, high), ours

    def read(self, fields: Fields, ours: Options) -> None:
        ours[self.ours] = tuple(fields[name] for name in self.theirs)

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        fields.update(zip(self.theirs, ours[self.ours], strict=True))


def _taps_together(theirs: Sequence[Tensor], shapes: Sequence[torch.Size], o: Values) -> list[Tensor]:
    return [torch.cat([taps.squeeze(1) for taps in theirs])]


def _taps_apart(ours: Sequence[Tensor], o: Values) -> list[Tensor]:
    keys = o["gated_deltanet.n_heads"] * o["gated_deltanet.head_dim"]
    values = o["gated_deltanet.n_v_heads"] * o["gated_deltanet.v_head_dim"]
    return [taps.unsqueeze(1) for taps in ours[0].split([keys, keys, values])]


CONVOLUTIONS = Transform("convolutions", _taps_together, _taps_apart)
"""The taps of queries, keys and values, each as (d 1 w). When transformers saves a model it cuts them in
three equal parts, whatever the widths; put together they are the same."""

DELTA = {**{f"{x}_proj": f"{x}_proj" for x in "qkvabo"}, "g_proj": "z_proj"}

FAMILY = Family(
    name="olmo_hybrid",
    class_name="OlmoHybridForCausalLM",
    layout=Listed(
        "layer_types", {"linear_attention": "gated_deltanet mlp", "full_attention": "attention mlp"}
    ),
    rules=(
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "d_model"),
        Same("intermediate_size", "mlp.d_ff"),
        Same("num_attention_heads", "attention.n_heads"),
        Same("num_key_value_heads", "attention.n_kv_heads", default=lambda f: f["num_attention_heads"]),
        Same("head_dim", "attention.head_dim", default=head_dim),
        Same("attention_bias", "attention.qkv_bias", "attention.out_bias"),
        Same("attention_dropout", "attention.dropout"),
        # That of Gated DeltaNet's own norm is 1e-5, as our default is.
        Same("rms_norm_eps", "block.eps", "attention.qk_norm_eps"),
        Same("linear_num_key_heads", "gated_deltanet.n_heads"),
        Same("linear_num_value_heads", "gated_deltanet.n_v_heads"),
        Same("linear_key_head_dim", "gated_deltanet.head_dim"),
        Same("linear_value_head_dim", "gated_deltanet.v_head_dim"),
        Same("linear_conv_kernel_dim", "gated_deltanet.d_conv"),
        Same("linear_allow_neg_eigval", "gated_deltanet.negative_eigenvalues"),
        Same("linear_dt_min", "gated_deltanet.dt_min"),
        Same("linear_dt_max", "gated_deltanet.dt_max"),
        Same("linear_dt_init_floor", "gated_deltanet.dt_floor"),
        Range("linear_a_log_min", "linear_a_log_max", "gated_deltanet.A_range"),
        Same("tie_word_embeddings", "embedding.tied"),
        # The activation behind the convolution too, which is always silu here.
        Must("hidden_act", "silu", "swish"),
        RopeOrNone(),
        NormsByLayer(),
    ),
    fixed={"attention.qk_norm": "full"},
    rows=(
        *ENDS,
        row("model.layers.#.attention_layer_norm.weight", "gated_deltanet:pre_norm.weight"),
        *(
            row(f"model.layers.#.linear_attn.{theirs}.weight", f"gated_deltanet:layer.{ours}.weight")
            for theirs, ours in DELTA.items()
        ),
        row(
            [f"model.layers.#.linear_attn.{x}_conv1d.weight" for x in "qkv"],
            "gated_deltanet:layer.conv_weight",
            how=CONVOLUTIONS,
        ),
        row("model.layers.#.linear_attn.dt_bias", "gated_deltanet:layer.dt_bias"),
        row("model.layers.#.linear_attn.A_log", "gated_deltanet:layer.A_log"),
        row("model.layers.#.linear_attn.o_norm.weight", "gated_deltanet:layer.norm_weight"),
        *ATTENTION,
        row("model.layers.#.self_attn.q_norm.weight", "attention:layer.q_norm.weight"),
        row("model.layers.#.self_attn.k_norm.weight", "attention:layer.k_norm.weight"),
        # One key with two meanings: behind attention, and before the MLP of a block with Gated DeltaNet.
        row("model.layers.#.feedforward_layer_norm.weight", "attention:post_norm.weight"),
        row("model.layers.#.feedforward_layer_norm.weight", "mlp:pre_norm.weight"),
        *MLP,
        row("model.layers.#.post_feedforward_layernorm.weight", "mlp:post_norm.weight"),
    ),
    unread=("mtp.",),
    # The published models have the first for attention; both are the names in memory.
    spelled={
        ".post_attention_layernorm.": ".feedforward_layer_norm.",
        ".input_layernorm.": ".attention_layer_norm.",
    },
)
