"""Rotary positions as options of a layer, and their application to queries and keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from hybrid_lm.config.base import Config, Positive
from hybrid_lm.layers.base import Context
from hybrid_lm.ops import apply_rope, rope_table


class RopeScaling(Config):
    """How wavelengths change for lengths beyond those trained on; names and formulas as in `transformers`."""

    rope_type: Literal["linear", "dynamic", "yarn", "llama3", "longrope"]
    """Which rule; `ops.rope` has their sources. dynamic and longrope go by each token's own position."""
    factor: Annotated[float, Field(ge=1.0)] | None = None
    """How many times longer."""
    original_max_position_embeddings: Positive | None = None
    """Tokens trained on; by default `max_positions`."""
    attention_factor: Annotated[float, Field(gt=0.0)] | None = None
    """yarn, longrope: factor on cosines and sines, instead of the papers'."""
    beta_fast: Annotated[float, Field(gt=0.0)] | None = None
    """yarn: turns within the original length from which a channel is kept."""
    beta_slow: Annotated[float, Field(gt=0.0)] | None = None
    """yarn: turns up to which it is interpolated."""
    mscale: Annotated[float, Field(gt=0.0)] | None = None
    """yarn (DeepSeek): see `ops.rope`."""
    mscale_all_dim: Annotated[float, Field(gt=0.0)] | None = None
    """yarn (DeepSeek): see `ops.rope`."""
    truncate: bool | None = None
    """yarn: round the channels between which it goes over; true by default."""
    low_freq_factor: Annotated[float, Field(gt=0.0)] | None = None
    """llama3: turns up to which a channel is stretched in full."""
    high_freq_factor: Annotated[float, Field(gt=0.0)] | None = None
    """llama3: turns from which it is kept."""
    short_factor: Annotated[tuple[float, ...], Field(strict=False)] | None = None
    """longrope: one per pair of channels, within the original length."""
    long_factor: Annotated[tuple[float, ...], Field(strict=False)] | None = None
    """longrope: one per pair of channels, beyond it."""

    def problems(self, width: int, max_positions: int | None) -> Iterable[str]:
        """What is missing or has no meaning for this rule, at `width` rotated channels."""
        needed, allowed = SCALING_KEYS[self.rope_type]
        given = {key for key, value in self.model_dump(exclude_none=True).items() if key != "rope_type"}
        for key in needed:
            if key not in given:
                yield f"{self.rope_type} needs {key}"
        for key in sorted(given - set(needed) - set(allowed)):
            yield f"{key} means nothing to {self.rope_type}, which takes {', '.join((*needed, *allowed))}"
        original = self.original_max_position_embeddings or max_positions
        if self.rope_type != "linear" and original is None:
            yield f"{self.rope_type} needs original_max_position_embeddings, or rope.max_positions"
        if self.rope_type in ("yarn", "longrope") and self.factor is None and max_positions is None:
            yield f"{self.rope_type} needs factor, or rope.max_positions to derive it from"
        for key in ("short_factor", "long_factor"):
            if (values := getattr(self, key)) is not None and len(values) != width // 2:
                yield f"{key} has {len(values)} numbers, but {width // 2} pairs of channels are rotated"


SCALING_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        (),
        (
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "longrope": (
        ("short_factor", "long_factor"),
        ("factor", "original_max_position_embeddings", "attention_factor"),
    ),
}
"""What each rule needs, and what it takes besides."""


class RopeOptions(Config):
    """Rotary positions. Su et al. 2021, arXiv:2104.09864."""

    theta: Annotated[float, Field(gt=0.0)] = 10000.0
    """Base of the wavelengths."""
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Part of each head that is rotated."""
    interleaved: bool = False
    """Rotate neighbouring pairs (GPT-J) instead of the two halves (NeoX)."""
    scaling: RopeScaling | None = None
    """Length scaling as in a Hugging Face config: `{rope_type: llama3, factor: 8.0, ...}`."""
    max_positions: Positive | None = None
    """Length trained on, for the scaling types that need it."""


class Rotation:
    """Rope on heads of a width, in plain numbers: torch.compile cannot look into a configuration."""

    def __init__(self, rope: RopeOptions, head_dim: int):
        self.dim = round(rope.fraction * head_dim)
        self.interleaved = rope.interleaved
        scaling = rope.scaling.model_dump(exclude_none=True) if rope.scaling else None
        self.settings = {"theta": rope.theta, "scaling": scaling, "max_positions": rope.max_positions}
        self.key = f"rope {self.dim} {self.settings}"

    def __call__(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Rotates the first `dim` channels of each head of q and k (b t h p) by its token's position."""
        cos, sin = ctx.once(self.key, lambda: rope_table(ctx.positions, self.dim, **self.settings))
        how = {"interleaved": self.interleaved}
        return apply_rope(q, cos, sin, **how), apply_rope(k, cos, sin, **how)
