"""DeepSeek-V3: multi-head latent attention; MLPs in the first layers, mixtures of experts behind. DeepSeek-AI
2024, arXiv:2412.19437; the class is `DeepseekV3ForCausalLM` of transformers (Moonlight is one too)."""

from collections.abc import Sequence
from typing import Any

from hybrid_lm.hf.attention_rules import Rope
from hybrid_lm.hf.families.llama import ACTS, ENDS
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Agrees, Derived, EitherChoice, Must, Same, Whole
from hybrid_lm.hf.layouts import Layout, block
from hybrid_lm.hf.options import Block, ConversionError, Fields, Options
from hybrid_lm.hf.weights import GATE_UP_STACKED, STACKED, linear, row


class FirstDense(Layout):
    """`first_k_dense_replace`: how many layers have an MLP, before those with experts."""

    theirs = ("num_hidden_layers", "first_k_dense_replace")
    blocks = (block("mla mlp"), block("mla moe"))

    def read(self, fields: Fields) -> list[Block]:
        n, dense = (fields[name] for name in self.theirs)
        return [self.blocks[i >= dense] for i in range(n)]

    def write(self, blocks: Sequence[Block], fields: dict[str, Any]) -> None:
        dense = sum(what == self.blocks[0] for what in blocks)
        if self.blocks[0] in blocks[dense:]:
            raise ConversionError(
                "an MLP stands behind a mixture of experts, it has MLPs in its first layers"
            )
        fields["num_hidden_layers"], fields["first_k_dense_replace"] = len(blocks), dense


class LatentRope(Rope):
    """Rotary positions of the part of a head that has them."""

    theirs = (*Rope.theirs, "rope_interleave")

    def read(self, fields: Fields, ours: Options) -> None:
        rope = self.said(fields["rope_parameters"], fields, ours)
        ours["mla.rope"] = {**rope, "interleaved": fields["rope_interleave"]}

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        rope = ours["mla.rope"]
        if rope is None:
            raise ConversionError("mla.rope is null, it always has rotary positions")
        self.write_length(rope, fields)
        fields["rope_parameters"], fields["rope_interleave"] = self.worded(rope), rope["interleaved"]


class SharedExperts(Whole):
    """The width of the expert for all tokens, in widths of the others."""

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        if not ours["moe.d_shared"]:
            raise ConversionError("moe.d_shared is 0, it always has an expert for all tokens")
        super().write(ours, fields)


FAMILY = Family(
    name="deepseek_v3",
    class_name="DeepseekV3ForCausalLM",
    layout=FirstDense(),
    rules=(
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "d_model"),
        Same("rms_norm_eps", "block.eps"),
        Same("tie_word_embeddings", "embedding.tied"),
        # Attention. Every head has a key of its own.
        Same("num_attention_heads", "mla.n_heads"),
        Agrees("num_key_value_heads", lambda f: f["num_attention_heads"]),
        Whole("num_key_value_heads", lambda ours: ours["mla.n_heads"]),
        Same("q_lora_rank", "mla.q_rank"),
        Same("kv_lora_rank", "mla.kv_rank"),
        Same("qk_nope_head_dim", "mla.nope_dim"),
        Same("qk_rope_head_dim", "mla.rope_dim"),
        Same("v_head_dim", "mla.v_dim"),
        Agrees("qk_head_dim", lambda f: f["qk_nope_head_dim"] + f["qk_rope_head_dim"]),
        Agrees("head_dim", lambda f: f["qk_rope_head_dim"]),
        Same("attention_bias", "mla.bias"),
        Same("attention_dropout", "mla.dropout"),
        LatentRope(),
        # MLPs and experts.
        Same("intermediate_size", "mlp.d_ff"),
        Same("moe_intermediate_size", "moe.d_ff"),
        Same("n_routed_experts", "moe.n_experts"),
        Same("num_experts_per_tok", "moe.top_k"),
        Same("n_group", "moe.n_groups"),
        Same("topk_group", "moe.top_k_groups"),
        Same("norm_topk_prob", "moe.renormalise"),
        Same("routed_scaling_factor", "moe.scale"),
        Derived("moe.d_shared", lambda f: f["n_shared_experts"] * f["moe_intermediate_size"]),
        SharedExperts("n_shared_experts", lambda ours: ours["moe.d_shared"] / ours["moe.d_ff"]),
        EitherChoice("hidden_act", ["mlp.act", "moe.act"], ACTS),
        Must("pretraining_tp", 1),
        # In the published files, and not read by the class.
        Agrees("scoring_func", lambda f: "sigmoid"),
        Agrees("topk_method", lambda f: "noaux_tc"),
        Agrees("moe_layer_freq", lambda f: 1),
    ),
    fixed={"moe.router": "sigmoid", "mla.norm_eps": 1e-6},
    # About training, about where experts are, and layers that guess further ahead, which the class has not.
    ignored=frozenset(
        [
            "aux_loss_alpha",
            "ep_size",
            "num_mtp_layers",
            "num_nextn_predict_layers",
            "output_router_logits",
            "seq_aux",
        ]
    ),
    rows=(
        *ENDS,
        row("model.layers.#.input_layernorm.weight", "mla:pre_norm.weight"),
        *linear("model.layers.#.self_attn.q_proj", "mla:layer.q_proj"),
        *linear("model.layers.#.self_attn.q_a_proj", "mla:layer.q_a_proj"),
        row("model.layers.#.self_attn.q_a_layernorm.weight", "mla:layer.q_a_norm.weight"),
        *linear("model.layers.#.self_attn.q_b_proj", "mla:layer.q_b_proj"),
        *linear("model.layers.#.self_attn.kv_a_proj_with_mqa", "mla:layer.kv_a_proj"),
        row("model.layers.#.self_attn.kv_a_layernorm.weight", "mla:layer.kv_a_norm.weight"),
        *linear("model.layers.#.self_attn.kv_b_proj", "mla:layer.kv_b_proj"),
        *linear("model.layers.#.self_attn.o_proj", "mla:layer.o_proj"),
        row("model.layers.#.post_attention_layernorm.weight", "mlp:pre_norm.weight"),
        row("model.layers.#.post_attention_layernorm.weight", "moe:pre_norm.weight"),
        *(
            entry
            for part in ("gate_proj", "up_proj", "down_proj")
            for entry in (
                *linear(f"model.layers.#.mlp.{part}", f"mlp:layer.{part}"),
                *linear(f"model.layers.#.mlp.shared_experts.{part}", f"moe:layer.shared.{part}"),
            )
        ),
        row("model.layers.#.mlp.gate.weight", "moe:layer.router.weight"),
        row("model.layers.#.mlp.gate.e_score_correction_bias", "moe:layer.router_correction"),
        row(
            [f"model.layers.#.mlp.experts.@.{part}_proj.weight" for part in ("gate", "up")],
            "moe:layer.experts.gate_up",
            how=GATE_UP_STACKED,
        ),
        row("model.layers.#.mlp.experts.@.down_proj.weight", "moe:layer.experts.down", how=STACKED),
    ),
    # The layer behind the last of the published model guesses further ahead.
    unread=("model.layers.61.",),
)
