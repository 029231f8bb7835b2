"""Nemotron-H and Nemotron 3: Mamba-2, attention, MLP and mixture of experts in any order, one to a layer,
each with a norm. NVIDIA 2025, arXiv:2504.03624 and arXiv:2512.20856.

The class knows one limit of step sizes, `time_step_min`, and decodes without it; `time_step_limit` it does
not read. What checkpoints have for predicting several tokens at once (`mtp`) it does not run, as we do not.
"""

import math
from collections.abc import Sequence
from typing import Any

from hybrid_lm.hf.families.bamba import with_attention
from hybrid_lm.hf.families.llama import ACTS
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Agrees, Choice, Derived, Must, Rule, Same, Whole
from hybrid_lm.hf.layouts import Listed
from hybrid_lm.hf.options import Block, ConversionError, Fields, Options
from hybrid_lm.hf.weights import DEPTHWISE, STACKED, linear, row

RELU2 = {"relu2": "relu2", **ACTS}
"""Their activations that are ours, the name that is written first."""

TINY = 2.0**-126
"""The smallest float32 that is not denormal."""


class WithAttention(Listed):
    """A field that names each layer, and at least one of them is attention."""

    def read(self, fields: Fields) -> list[Block]:
        return with_attention(super().read(fields))

    def write(self, blocks: Sequence[Block], fields: dict[str, Any]) -> None:
        super().write(with_attention(blocks), fields)


class LowerLimit(Rule):
    """The smallest step size, of which the class takes a logarithm: no limit is the smallest float32."""

    theirs = ("time_step_min",)

    def read(self, fields: Fields, ours: Options) -> None:
        low = fields["time_step_min"]
        ours["mamba2.dt_limit"] = (low if low > TINY else 0.0, math.inf)

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        low, high = ours["mamba2.dt_limit"]
        if high != math.inf:
            raise ConversionError(f"mamba2.dt_limit ends at {high}, it has no upper limit")
        fields["time_step_min"] = max(low, TINY)


class MLPBias(Rule):
    """Biases of MLPs, and there also of the expert that all tokens use."""

    theirs = ("mlp_bias",)

    def read(self, fields: Fields, ours: Options) -> None:
        if fields["mlp_bias"] and any(ours.each("moe")):
            raise ConversionError("mlp_bias = True: the shared expert has no bias here")
        ours["mlp.bias"] = fields["mlp_bias"]

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        fields["mlp_bias"] = ours["mlp.bias"]


class Activation(Rule):
    """The nonlinearity of MLPs and of experts."""

    theirs = ("mlp_hidden_act",)
    each = (Choice("mlp_hidden_act", "mlp.act", RELU2), Choice("mlp_hidden_act", "moe.act", RELU2))

    def read(self, fields: Fields, ours: Options) -> None:
        for rule in self.each:
            rule.read(fields, ours)

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        of_mlp, of_experts = self.each
        (of_mlp if any(ours.each("mlp")) else of_experts).write(ours, fields)


FAMILY = Family(
    name="nemotron_h",
    class_name="NemotronHForCausalLM",
    layout=WithAttention(
        "layers_block_type",
        {"linear_attention": "mamba2", "full_attention": "attention", "mlp": "mlp", "moe": "moe"},
        depth=None,
    ),
    rules=(
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "d_model"),
        Same("layer_norm_epsilon", "block.eps", "mamba2.norm_eps"),
        # The class never ties.
        Must("tie_word_embeddings", False),
        Same("num_attention_heads", "attention.n_heads"),
        Same("num_key_value_heads", "attention.n_kv_heads", default=lambda f: f["num_attention_heads"]),
        Same("head_dim", "attention.head_dim"),
        Same("attention_dropout", "attention.dropout"),
        Same("intermediate_size", "mlp.d_ff"),
        Activation(),
        MLPBias(),
        Same("ssm_state_size", "mamba2.d_state"),
        Same("mamba_head_dim", "mamba2.head_dim"),
        Derived("mamba2.d_inner", lambda f: f["mamba_num_heads"] * f["mamba_head_dim"]),
        Whole("mamba_num_heads", lambda ours: ours["mamba2.d_inner"] / ours["mamba2.head_dim"]),
        Same("n_groups", "mamba2.n_groups"),
        Same("conv_kernel", "mamba2.d_conv"),
        Same("use_conv_bias", "mamba2.conv_bias"),
        Same("use_bias", "mamba2.bias"),
        Same("chunk_size", "mamba2.chunk"),
        LowerLimit(),
        Must("mamba_hidden_act", "silu", "swish"),
        Same("n_routed_experts", "moe.n_experts"),
        Same("num_experts_per_tok", "moe.top_k"),
        Same("moe_intermediate_size", "moe.d_ff"),
        Same("moe_shared_expert_intermediate_size", "moe.d_shared"),
        Same("moe_latent_size", "moe.d_latent"),
        Same("routed_scaling_factor", "moe.scale"),
        Same("n_group", "moe.n_groups"),
        Same("topk_group", "moe.top_k_groups"),
        Same("norm_topk_prob", "moe.renormalise"),
        # Other names for what the class has.
        Agrees("attention_head_dim", lambda f: f["head_dim"]),
        Agrees("norm_eps", lambda f: f["layer_norm_epsilon"]),
        Agrees("rms_norm_eps", lambda f: f["layer_norm_epsilon"]),
    ),
    fixed={"embedding.tied": False, "mlp.gated": False, "moe.router": "sigmoid", "moe.gated": False},
    # The class has no positions and no dropout, attention without biases, one shared expert, and Mamba's
    # inner width from its heads; the rest is about kernels, starting values, rounding and generating.
    ignored=frozenset(
        [
            "attention_bias",
            "expand",
            "hidden_dropout",
            "mamba_proj_bias",
            "mamba_ssm_cache_dtype",
            "max_position_embeddings",
            "moe_shared_expert_overlap",
            "mtp_layers_block_type",
            "n_shared_experts",
            "num_logits_to_keep",
            "num_nextn_predict_layers",
            "output_router_logits",
            "partial_rotary_factor",
            "rescale_prenorm_residual",
            "residual_in_fp32",
            "rope_theta",
            "time_step_floor",
            "time_step_limit",
            "time_step_max",
            "time_step_rank",
            "use_mamba_kernels",
        ]
    ),
    rows=(
        row("backbone.embeddings.weight", "embed.weight"),
        *(
            row("backbone.layers.#.norm.weight", f"{kind}:pre_norm.weight")
            for kind in ("mamba2", "attention", "mlp", "moe")
        ),
        *linear("backbone.layers.#.mixer.in_proj", "mamba2:layer.in_proj"),
        row("backbone.layers.#.mixer.conv1d.weight", "mamba2:layer.conv_weight", how=DEPTHWISE),
        row("backbone.layers.#.mixer.conv1d.bias", "mamba2:layer.conv_bias"),
        row("backbone.layers.#.mixer.dt_bias", "mamba2:layer.dt_bias"),
        row("backbone.layers.#.mixer.A_log", "mamba2:layer.A_log"),
        row("backbone.layers.#.mixer.D", "mamba2:layer.D"),
        row("backbone.layers.#.mixer.norm.weight", "mamba2:layer.norm_weight"),
        *linear("backbone.layers.#.mixer.out_proj", "mamba2:layer.out_proj"),
        *(
            row(f"backbone.layers.#.mixer.{name}.weight", f"attention:layer.{name}.weight")
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        ),
        *linear("backbone.layers.#.mixer.up_proj", "mlp:layer.up_proj"),
        *linear("backbone.layers.#.mixer.down_proj", "mlp:layer.down_proj"),
        row("backbone.layers.#.mixer.gate.weight", "moe:layer.router.weight"),
        row("backbone.layers.#.mixer.gate.e_score_correction_bias", "moe:layer.router_correction"),
        row("backbone.layers.#.mixer.experts.@.up_proj.weight", "moe:layer.experts.up", how=STACKED),
        row("backbone.layers.#.mixer.experts.@.down_proj.weight", "moe:layer.experts.down", how=STACKED),
        row("backbone.layers.#.mixer.shared_experts.up_proj.weight", "moe:layer.shared.up_proj.weight"),
        row("backbone.layers.#.mixer.shared_experts.down_proj.weight", "moe:layer.shared.down_proj.weight"),
        row("backbone.layers.#.mixer.fc1_latent_proj.weight", "moe:layer.latent_in.weight"),
        row("backbone.layers.#.mixer.fc2_latent_proj.weight", "moe:layer.latent_out.weight"),
        row("backbone.norm_f.weight", "final_norm.weight"),
        row("lm_head.weight", "lm_head.weight"),
    ),
    unread=("mtp.",),
    cached_differs=lambda fields: fields["time_step_min"] > TINY,
)
