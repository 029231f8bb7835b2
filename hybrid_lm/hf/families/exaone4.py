"""EXAONE 4: norms behind attention and MLP, and of each head's queries and keys; where some layers have a
window, the others have no positions. LG AI Research 2025, arXiv:2507.11407."""

from typing import Any

from hybrid_lm.hf.attention_rules import Rope, WindowsByLayer
from hybrid_lm.hf.families.cohere2 import rope_on_windows
from hybrid_lm.hf.families.llama import SIZES, head_dim
from hybrid_lm.hf.families.olmo2 import ROWS
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Same
from hybrid_lm.hf.layouts import Uniform
from hybrid_lm.hf.options import Fields, Options


class Windows(WindowsByLayer):
    """Windows by `layer_types`. While there is a `sliding_window`, layers without one have no positions;
    where it is null, all have them."""

    def read(self, fields: Fields, ours: Options) -> None:
        super().read(fields, ours)
        if fields["sliding_window"] is not None:
            rope_on_windows(ours)

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        if ours["attention.rope"] is not None:
            fields["sliding_window"] = None
        super().write(ours, fields)


FAMILY = Family(
    name="exaone4",
    class_name="Exaone4ForCausalLM",
    layout=Uniform("attention mlp"),
    rules=(
        *SIZES,
        Same("head_dim", "attention.head_dim", default=head_dim),
        Same("rms_norm_eps", "block.eps", "attention.qk_norm_eps"),
        Rope(sparse=True),
        Windows(switched=False),
    ),
    fixed={"block.placement": "post", "attention.qk_norm": "head"},
    # Told by layer_types.
    ignored=frozenset(["sliding_window_pattern"]),
    rows=ROWS,
)
