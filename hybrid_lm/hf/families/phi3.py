"""Phi-3: Llama with one matrix for queries, keys and values, and one for both halves of its MLP; longrope for
long texts. Abdin et al. 2024, arXiv:2404.14219.

Beyond the original length a longrope model of transformers reads a prompt with the long wavelengths for all
its tokens, and computes it again when a continuation comes to that length; ours goes by each token's place.
"""

from typing import Any

from hybrid_lm.hf.attention_rules import Rope
from hybrid_lm.hf.families.llama import ENDS, SIZES, head_dim
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Agrees, Same
from hybrid_lm.hf.layouts import Uniform
from hybrid_lm.hf.options import Options
from hybrid_lm.hf.weights import FUSED, row


class Phi3Rope(Rope):
    """Rotary positions, whose original length is a field of its own as well and goes before the other."""

    theirs = (*Rope.theirs, "original_max_position_embeddings")
    rules = ("longrope",)

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        super().write(ours, fields)
        original = fields["rope_parameters"].get("original_max_position_embeddings")
        if original is not None:
            fields["original_max_position_embeddings"] = original


FAMILY = Family(
    name="phi3",
    class_name="Phi3ForCausalLM",
    layout=Uniform("attention mlp"),
    rules=(
        *SIZES,
        Same("head_dim", "attention.head_dim", default=head_dim),
        Same("rms_norm_eps", "block.eps"),
        Same("resid_pdrop", "block.dropout"),
        Same("sliding_window", "attention.window"),
        Phi3Rope(partial=True),
        Agrees("partial_rotary_factor", lambda f: f["rope_parameters"].get("partial_rotary_factor")),
        Agrees("attention_bias", lambda f: False),
        Agrees("lm_head_bias", lambda f: False),
        Agrees("mlp_bias", lambda f: False),
        Agrees("full_attn_mod", lambda f: 1),
        Agrees("interpolate_factor", lambda f: 1),
    ),
    # The class drops no embeddings.
    ignored=frozenset(["embd_pdrop"]),
    rows=(
        *ENDS,
        row("model.layers.#.input_layernorm.weight", "attention:pre_norm.weight"),
        row(
            "model.layers.#.self_attn.qkv_proj.weight",
            *(f"attention:layer.{name}_proj.weight" for name in "qkv"),
            how=FUSED,
        ),
        row("model.layers.#.self_attn.o_proj.weight", "attention:layer.o_proj.weight"),
        row("model.layers.#.post_attention_layernorm.weight", "mlp:pre_norm.weight"),
        row(
            "model.layers.#.mlp.gate_up_proj.weight",
            "mlp:layer.gate_proj.weight",
            "mlp:layer.up_proj.weight",
            how=FUSED,
        ),
        row("model.layers.#.mlp.down_proj.weight", "mlp:layer.down_proj.weight"),
    ),
)
