"""GPT-OSS: attention with sinks, in turn with a window and without, and experts with biases and a clamped
SwiGLU. OpenAI 2025, arXiv:2508.10925; the class is `GptOssForCausalLM` of transformers."""

import torch
from torch import Tensor

from hybrid_lm.hf.attention_rules import Rope, WindowsByLayer
from hybrid_lm.hf.families.llama import ATTENTION, ENDS
from hybrid_lm.hf.families.mixtral import IGNORED, NORMS, SIZES
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Agrees, Must, Same
from hybrid_lm.hf.layouts import Uniform
from hybrid_lm.hf.weights import TRANSPOSED, each, row


def _apart(x: Tensor) -> Tensor:
    return torch.cat([x[:, ::2], x[:, 1::2]], 1)


def _in_turn(x: Tensor) -> Tensor:
    return torch.stack(x.chunk(2, 1), 2).flatten(1, 2)


IN_TURN = each("in_turn", _apart, _in_turn)
"""(n 2f): a gate, its up, the next gate, ...; here all gates, then all ups."""
IN_TURN_TRANSPOSED = each("in_turn_transposed", lambda x: _apart(x.mT), lambda x: _in_turn(x).mT)
"""The same as columns, (n d 2f)."""

FAMILY = Family(
    name="gpt_oss",
    class_name="GptOssForCausalLM",
    layout=Uniform("attention moe"),
    rules=(
        *SIZES,
        Same("intermediate_size", "moe.d_ff"),
        Same("swiglu_limit", "moe.limit"),
        Same("swiglu_alpha", "moe.alpha"),
        # The class does not read it.
        Must("hidden_act", "silu"),
        Same("rms_norm_eps", "block.eps"),
        Same("attention_bias", "attention.qkv_bias", "attention.out_bias"),
        WindowsByLayer(switched=False),
        Rope(),
        # Old names for the same.
        Agrees("experts_per_token", lambda f: f["num_experts_per_tok"]),
        Agrees(
            "initial_context_length",
            lambda f: (f["rope_parameters"] or {}).get("original_max_position_embeddings"),
        ),
    ),
    fixed={
        "attention.sinks": True,
        "moe.router": "topk_softmax",
        "moe.router_bias": True,
        "moe.bias": True,
    },
    ignored=IGNORED,
    rows=(
        *ENDS,
        *NORMS,
        *ATTENTION,
        row("model.layers.#.self_attn.sinks", "attention:layer.sinks"),
        row("model.layers.#.mlp.router.weight", "moe:layer.router.weight"),
        row("model.layers.#.mlp.router.bias", "moe:layer.router.bias"),
        row(
            "model.layers.#.mlp.experts.gate_up_proj",
            "moe:layer.experts.gate_up",
            how=IN_TURN_TRANSPOSED,
        ),
        row("model.layers.#.mlp.experts.gate_up_proj_bias", "moe:layer.experts.gate_up_bias", how=IN_TURN),
        row("model.layers.#.mlp.experts.down_proj", "moe:layer.experts.down", how=TRANSPOSED),
        row("model.layers.#.mlp.experts.down_proj_bias", "moe:layer.experts.down_bias"),
    ),
)
