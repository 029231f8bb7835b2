"""SmolLM3: Llama without positions on some layers. Hugging Face 2025; NoPE layers after Yang et al. 2025,
arXiv:2501.18795."""

from typing import Any

from hybrid_lm.hf.attention_rules import Rope, WindowsByLayer
from hybrid_lm.hf.families.llama import ROWS, SIZES, head_dim
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Rule, Same
from hybrid_lm.hf.layouts import Uniform
from hybrid_lm.hf.options import ConversionError, Fields, Options


class WithoutPositions(Rule):
    """`no_rope_layers`, in which 1 is for a layer with rotary positions."""

    theirs = ("no_rope_layers", "no_rope_layer_interval")

    def read(self, fields: Fields, ours: Options) -> None:
        for i, layer in ours.each("attention"):
            if not fields["no_rope_layers"][i]:
                layer["attention.rope"] = None

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        ropes = [layer["attention.rope"] for _, layer in ours.each("attention")]
        fields["no_rope_layers"] = [int(rope is not None) for rope in ropes]


class SwitchedWindows(WindowsByLayer):
    """Windows by `layer_types`, which have no meaning while `use_sliding_window` is false."""

    def read(self, fields: Fields, ours: Options) -> None:
        if "sliding_attention" in fields["layer_types"] and not fields["use_sliding_window"]:
            raise ConversionError("layer_types has sliding_attention, and use_sliding_window is false")
        super().read(fields, ours)


FAMILY = Family(
    name="smollm3",
    class_name="SmolLM3ForCausalLM",
    layout=Uniform("attention mlp"),
    rules=(
        *SIZES,
        Same("head_dim", "attention.head_dim", default=head_dim),
        Same("rms_norm_eps", "block.eps"),
        Same("mlp_bias", "mlp.bias"),
        Same("attention_bias", "attention.qkv_bias", "attention.out_bias"),
        SwitchedWindows(),
        Rope(sparse=True),
        WithoutPositions(),
    ),
    # The class does not read it.
    ignored=frozenset(["pretraining_tp"]),
    rows=ROWS,
)
