"""The layers. Adding one is a file here, a line in this table, a test of its equation in `tests/layers/`."""

from hybrid_lm.registry import Registry

LAYERS = Registry(
    "layer",
    {
        "attention": "hybrid_lm.layers.attention:Attention",
        "gated_deltanet": "hybrid_lm.layers.gated_deltanet:GatedDeltaNet",
        "mamba": "hybrid_lm.layers.mamba:Mamba",
        "mamba2": "hybrid_lm.layers.mamba2:Mamba2",
        "mla": "hybrid_lm.layers.mla:MLA",
        "mlp": "hybrid_lm.layers.mlp:MLP",
        "moe": "hybrid_lm.layers.moe:MoE",
        "rg_lru": "hybrid_lm.layers.rg_lru:RGLRU",
        "short_conv": "hybrid_lm.layers.short_conv:ShortConv",
        "inject": "hybrid_lm.layers.inject:Inject",
    },
)
