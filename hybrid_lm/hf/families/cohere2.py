"""Command R7B and A (Cohere 2): attention and MLP beside each other on one norm; layers with a window rotate
neighbouring pairs, the others have no positions. Cohere 2025, arXiv:2504.00698."""

from hybrid_lm.hf.attention_rules import Rope, WindowsByLayer
from hybrid_lm.hf.families.llama import ATTENTION, ENDS, MLP, SIZES, head_dim
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Agrees, Same
from hybrid_lm.hf.layouts import Uniform
from hybrid_lm.hf.options import Fields, Options
from hybrid_lm.hf.weights import row


def rope_on_windows(ours: Options) -> None:
    """Takes the positions from layers without a window."""
    for _, layer in ours.each("attention"):
        if layer["attention.window"] is None:
            layer["attention.rope"] = None


class RopeOnWindows(Rope):
    """Rotary positions on layers with a window."""

    def read(self, fields: Fields, ours: Options) -> None:
        super().read(fields, ours)
        rope_on_windows(ours)


FAMILY = Family(
    name="cohere2",
    class_name="Cohere2ForCausalLM",
    layout=Uniform("attention+mlp"),
    rules=(
        *SIZES,
        Same("head_dim", "attention.head_dim", default=head_dim),
        Same("layer_norm_eps", "block.eps"),
        Same("attention_bias", "attention.qkv_bias", "attention.out_bias"),
        Same("logit_scale", "head.multiplier"),
        WindowsByLayer(switched=False),
        RopeOnWindows(interleaved=True, sparse=True),
        # What the first implementation could switch, and this one does not read.
        Agrees("order_of_interleaved_layers", lambda f: "local_attn_first"),
        Agrees("position_embedding_type", lambda f: "rope_gptj"),
        Agrees("rotary_pct", lambda f: 1.0),
        Agrees("use_embedding_sharing", lambda f: f["tie_word_embeddings"]),
        Agrees("use_gated_activation", lambda f: True),
        Agrees("use_parallel_block", lambda f: True),
        Agrees("use_qk_norm", lambda f: False),
    ),
    fixed={"block.norm": "layernorm"},
    # layer_types says where the windows are; how a table is cut over machines is nobody's matter here.
    ignored=frozenset(
        ["_sliding_window_pattern", "layer_switch", "sliding_window_pattern", "use_parallel_embedding"]
    ),
    rows=(
        *ENDS,
        row("model.layers.#.input_layernorm.weight", "attention:pre_norm.weight"),
        *ATTENTION,
        *MLP,
    ),
)
