"""Qwen3-MoE: Qwen3 with a mixture of experts in some layers or all. Yang et al. 2025, arXiv:2505.09388."""

from collections.abc import Sequence
from typing import Any

from hybrid_lm.hf.attention_rules import Rope
from hybrid_lm.hf.families.llama import ACTS, ATTENTION, ENDS, MLP
from hybrid_lm.hf.families.mixtral import IGNORED, NORMS, SIZES
from hybrid_lm.hf.families.qwen3 import QK_NORMS
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import EitherChoice, Rule, Same
from hybrid_lm.hf.layouts import Layout, block
from hybrid_lm.hf.options import Block, ConversionError, Fields, Options, shown
from hybrid_lm.hf.weights import GATE_UP_STACKED, STACKED, row


class Sparse(Layout):
    """A mixture of experts in every `decoder_sparse_step`-th layer but for `mlp_only_layers`."""

    blocks = (block("attention moe"), block("attention mlp"))
    theirs = ("num_hidden_layers", "mlp_only_layers", "decoder_sparse_step")

    def read(self, fields: Fields) -> list[Block]:
        sparse, dense = self.blocks
        step, named = fields["decoder_sparse_step"], fields["mlp_only_layers"] or []
        every = fields["num_local_experts"] > 0
        return [
            sparse if every and (i + 1) % step == 0 and i not in named else dense
            for i in range(fields["num_hidden_layers"])
        ]

    def write(self, blocks: Sequence[Block], fields: dict[str, Any]) -> None:
        fields["num_hidden_layers"] = len(blocks)
        fields["mlp_only_layers"] = [i for i, what in enumerate(blocks) if what == self.blocks[1]]
        fields["decoder_sparse_step"] = 1


class Window(Rule):
    """One window for all layers or for none, if `use_sliding_window` says so."""

    theirs = ("sliding_window", "use_sliding_window")

    def read(self, fields: Fields, ours: Options) -> None:
        ours["attention.window"] = fields["sliding_window"] if fields["use_sliding_window"] else None

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        window = ours["attention.window"]
        for _, layer in ours.each("attention"):
            if layer["attention.window"] != window:
                other = shown(layer["attention.window"])
                raise ConversionError(f"attention.window is {shown(window)} and {other}, it has one for all")
        fields |= {"sliding_window": window, "use_sliding_window": window is not None}


FAMILY = Family(
    name="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    layout=Sparse(),
    rules=(
        *SIZES,
        Same("intermediate_size", "mlp.d_ff"),
        Same("moe_intermediate_size", "moe.d_ff"),
        EitherChoice("hidden_act", ["moe.act", "mlp.act"], ACTS),
        Same("norm_topk_prob", "moe.renormalise"),
        Same("rms_norm_eps", "block.eps", "attention.qk_norm_eps"),
        Same("attention_bias", "attention.qkv_bias", "attention.out_bias"),
        Window(),
        Rope(),
    ),
    fixed={"attention.qk_norm": "head"},
    # The class has one window for all layers, or none.
    ignored=IGNORED | {"max_window_layers"},
    rows=(
        *ENDS,
        *NORMS,
        row("model.layers.#.post_attention_layernorm.weight", "mlp:pre_norm.weight"),
        *ATTENTION,
        *QK_NORMS,
        *MLP,
        row("model.layers.#.mlp.gate.weight", "moe:layer.router.weight"),
        row(
            [f"model.layers.#.mlp.experts.@.{x}_proj.weight" for x in ("gate", "up")],
            "moe:layer.experts.gate_up",
            how=GATE_UP_STACKED,
        ),
        row("model.layers.#.mlp.experts.@.down_proj.weight", "moe:layer.experts.down", how=STACKED),
    ),
)
