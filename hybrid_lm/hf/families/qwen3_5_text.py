"""Qwen3.5, its language model: Gated DeltaNet, with gated attention in every fourth layer. Yang et al. 2024,
arXiv:2412.06464; the class is `Qwen3_5ForCausalLM` of transformers."""

from typing import Any

from hybrid_lm.hf.attention_rules import Rope
from hybrid_lm.hf.families.llama import ENDS, MLP
from hybrid_lm.hf.families.nemotron_h import WithAttention
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Agrees, Must, Rule, Same
from hybrid_lm.hf.options import Fields, Options
from hybrid_lm.hf.weights import BY_HEAD, DEPTHWISE, FUSED, fused, linear, row


class TextRope(Rope):
    """`mrope_section` says which wavelengths turn with which of three positions, of time, height and width;
    those of text are all one. It is written as the published models have it, in thirds."""

    def __init__(self) -> None:
        super().__init__(partial=True)

    def read(self, fields: Fields, ours: Options) -> None:
        given = dict(fields["rope_parameters"] or {})
        for key in ("mrope_section", "mrope_interleaved"):
            given.pop(key, None)
        super().read({**fields, "rope_parameters": given}, ours)

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        super().write(ours, fields)
        half = int(ours["attention.head_dim"] * ours["attention.rope"]["fraction"]) // 2
        fields["rope_parameters"]["mrope_section"] = [(half + 2 - axis) // 3 for axis in range(3)]


SIZES: tuple[Rule, ...] = (
    Same("vocab_size", "vocab_size"),
    Same("hidden_size", "d_model"),
    Same("intermediate_size", "mlp.d_ff"),
    Same("num_attention_heads", "attention.n_heads"),
    Same("num_key_value_heads", "attention.n_kv_heads"),
    Same("head_dim", "attention.head_dim"),
    Same("attention_bias", "attention.qkv_bias", "attention.out_bias"),
    Same("attention_dropout", "attention.dropout"),
    Same("rms_norm_eps", "block.eps", "attention.qk_norm_eps", "gated_deltanet.norm_eps"),
    Same("linear_num_key_heads", "gated_deltanet.n_heads"),
    Same("linear_num_value_heads", "gated_deltanet.n_v_heads"),
    Same("linear_key_head_dim", "gated_deltanet.head_dim"),
    Same("linear_value_head_dim", "gated_deltanet.v_head_dim"),
    Same("linear_conv_kernel_dim", "gated_deltanet.d_conv"),
    Same("tie_word_embeddings", "embedding.tied"),
    # The activation behind the convolution too, which is always silu here.
    Must("hidden_act", "silu", "swish"),
)
"""The fields that Qwen3-Next has as well."""

FIXED = {
    "block.unit_offset": True,
    "attention.qk_norm": "head",
    "attention.qk_norm_unit_offset": True,
    "attention.out_gate": "element",
}
NORMS = tuple(
    row(f"model.layers.#.{theirs}.weight", f"{kind}:pre_norm.weight")
    for theirs, kinds in (
        ("input_layernorm", ("gated_deltanet", "attention")),
        ("post_attention_layernorm", ("mlp", "moe")),
    )
    for kind in kinds
)
ATTENTION = (
    # The rows of a head's query and then those of its gate.
    *fused(
        "model.layers.#.self_attn.q_proj", "attention:layer.q_proj", "attention:layer.gate_proj", how=BY_HEAD
    ),
    *linear("model.layers.#.self_attn.k_proj", "attention:layer.k_proj"),
    *linear("model.layers.#.self_attn.v_proj", "attention:layer.v_proj"),
    *linear("model.layers.#.self_attn.o_proj", "attention:layer.o_proj"),
    row("model.layers.#.self_attn.q_norm.weight", "attention:layer.q_norm.weight"),
    row("model.layers.#.self_attn.k_norm.weight", "attention:layer.k_norm.weight"),
)
DELTA = (
    row("model.layers.#.linear_attn.conv1d.weight", "gated_deltanet:layer.conv_weight", how=DEPTHWISE),
    row("model.layers.#.linear_attn.dt_bias", "gated_deltanet:layer.dt_bias"),
    row("model.layers.#.linear_attn.A_log", "gated_deltanet:layer.A_log"),
    row("model.layers.#.linear_attn.norm.weight", "gated_deltanet:layer.norm_weight"),
    row("model.layers.#.linear_attn.out_proj.weight", "gated_deltanet:layer.o_proj.weight"),
)
"""What Qwen3-Next has as well of Gated DeltaNet."""

ROUGH = 1e-4
"""The norm behind Gated DeltaNet divides small numbers by little more than sqrt(eps): with an eps of 1e-6 the
classes are within 8.4e-5 of themselves in float64, on small random models with logits of about 1."""

FAMILY = Family(
    name="qwen3_5_text",
    class_name="Qwen3_5ForCausalLM",
    layout=WithAttention(
        "layer_types", {"linear_attention": "gated_deltanet mlp", "full_attention": "attention mlp"}
    ),
    rules=(
        *SIZES,
        TextRope(),
        Agrees("attn_output_gate", lambda f: True),
        Agrees("output_gate_type", lambda f: "swish"),
    ),
    fixed=FIXED,
    # What predicts further tokens is not read by the class; mamba_ssm_dtype is the type of the states, which
    # are in float32 here and there.
    ignored=frozenset(
        ["mamba_ssm_dtype", "mlp_only_layers", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"]
    ),
    rows=(
        *ENDS,
        *NORMS,
        *ATTENTION,
        row(
            "model.layers.#.linear_attn.in_proj_qkv.weight",
            *(f"gated_deltanet:layer.{x}_proj.weight" for x in "qkv"),
            how=FUSED,
        ),
        *(
            row(f"model.layers.#.linear_attn.in_proj_{x}.weight", f"gated_deltanet:layer.{x}_proj.weight")
            for x in "zab"
        ),
        *DELTA,
        *MLP,
    ),
    tolerance=ROUGH,
    # The published models see images too.
    unread=("mtp.", "model.visual."),
    spelled={"model.language_model.": "model."},
)
