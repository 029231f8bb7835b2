"""StableLM: Llama's matrices, layer norms, heads that are rotated in part; attention and MLP one after the
other, or beside each other on one norm. Bellagente et al. 2024, arXiv:2402.17834."""

from typing import Any

from hybrid_lm.hf.attention_rules import Rope
from hybrid_lm.hf.families.llama import ATTENTION, MLP, SIZES, head_dim
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Agrees, Choice, Derived, Rule, Same
from hybrid_lm.hf.layouts import Switch
from hybrid_lm.hf.options import ConversionError, Fields, Options
from hybrid_lm.hf.weights import STACKED, linear, row


class Dropout(Rule):
    """`hidden_dropout`, which is for the output of the MLP only."""

    theirs = ("hidden_dropout",)

    def read(self, fields: Fields, ours: Options) -> None:
        if rate := fields["hidden_dropout"]:
            if fields["use_parallel_residual"]:
                raise ConversionError(f"hidden_dropout = {rate} of one of two parallel layers: only 0.0")
            ours["mlp.residual.dropout"] = rate

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        fields["hidden_dropout"] = ours["mlp.residual.dropout"]


FAMILY = Family(
    name="stablelm",
    class_name="StableLmForCausalLM",
    layout=Switch("use_parallel_residual", {False: "attention mlp", True: "attention+mlp"}),
    rules=(
        *SIZES,
        Derived("attention.head_dim", head_dim),
        Same("layer_norm_eps", "block.eps", "attention.qk_norm_eps"),
        Same("use_qkv_bias", "attention.qkv_bias"),
        Dropout(),
        Rope(partial=True),
        Choice("qk_layernorm", "attention.qk_norm", {False: "none", True: "layernorm"}),
        Agrees("num_heads", lambda f: f["num_attention_heads"]),
        Agrees("rotary_scaling_factor", lambda f: 1.0),
    ),
    # The class gives its norms a shift, and the published weights have it, whatever it says.
    ignored=frozenset(["use_norm_bias"]),
    fixed={"block.norm": "layernorm", "block.bias": True},
    rows=(
        row("model.embed_tokens.weight", "embed.weight"),
        *linear("model.layers.#.input_layernorm", "attention:pre_norm"),
        *ATTENTION,
        *(
            row(
                f"model.layers.#.self_attn.{part}_layernorm.norms.@.weight",
                f"attention:layer.{part}_norm.weight",
                how=STACKED,
                count=f"attention.{heads}",
            )
            for part, heads in (("q", "n_heads"), ("k", "n_kv_heads"))
        ),
        *linear("model.layers.#.post_attention_layernorm", "mlp:pre_norm"),
        *MLP,
        *linear("model.norm", "final_norm"),
        row("lm_head.weight", "lm_head.weight"),
    ),
)
