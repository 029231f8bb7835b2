"""Rotary position embeddings and their scaling rules.

RoPE: Su et al. 2021, arXiv:2104.09864, eq. 15. linear: Chen et al. 2023, arXiv:2306.15595. dynamic:
NTK-aware base change by length. yarn: Peng et al. 2023, arXiv:2309.00071. longrope: Ding et al. 2024,
arXiv:2402.13753. llama3: the Llama 3.1 release. The option names are those of transformers'
`rope_parameters`, so that a config moves between the two unchanged.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hybrid_lm.registry import unknown

SCALINGS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def rope_table(
    positions: Tensor,
    dim: int,
    *,
    theta: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    max_positions: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The cosines and sines for a batch of positions.

    positions      (b t) integers, in tokens from the start of the document
    dim            rotated channels per head, even
    theta          base of the wavelengths, in tokens / (2 pi)
    scaling        {"rope_type": one of SCALINGS, ...} with transformers' keys (`factor`, `beta_fast`,
                   `long_factor`, ...)
    max_positions  the model's configured length in tokens: needed by "dynamic", and where `factor` or
                   `original_max_position_embeddings` is left out
    Returns cos, sin, each (b t dim/2) float32, with yarn's and longrope's attention factor multiplied in.
    "dynamic" and "longrope" go by the length up to each token, its own position + 1, as transformers does
    when it decodes token by token; reading many tokens at once it takes the last one's length for all, and
    then differs from its own decoding.
    Raises ValueError for an unknown rope_type, a missing setting or an odd dim.
    """
    if dim % 2:
        raise ValueError(f"rope: dim = {dim} is odd; rotary embeddings turn pairs of channels")
    options = dict(scaling or {})
    kind = options.get("rope_type", "default")
    if kind not in SCALINGS:
        raise ValueError(f"rope: {unknown('rope_type', kind, SCALINGS)}")
    length = positions[..., None] + 1 if kind in ("dynamic", "longrope") else None
    frequency, factor = _FREQUENCIES[kind](dim, theta, options, max_positions, length, positions.device)
    angle = positions.to(torch.float32)[..., None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] channels of every head; the others pass (partial rotary).

    x            (b t h p)
    cos, sin     (b t r) with 2 r <= p
    interleaved  pairs are channels (0, 1), (2, 3), ... (the paper, GPT-J); otherwise (0, r), (1, r + 1), ...
                 (Llama)
    Returns (b t h p) in x's dtype.
    """
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    # (..., r, 2) or (..., 2, r): the axis of length 2 holds the two channels of a pair
    pair = -1 if interleaved else -2
    first, second = turned.unflatten(-1, (half, 2) if interleaved else (2, half)).unbind(pair)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), pair).flatten(-2)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


# Each rule gives the frequencies, (dim/2) or (b t dim/2) in radians per token, and the factor on cos, sin.
Frequencies = tuple[Tensor, float]


def _plain(dim: int, theta: float | Tensor, device: torch.device) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


def _default(dim, theta, options, max_positions, length, device) -> Frequencies:
    return _plain(dim, theta, device), 1.0


def _linear(dim, theta, options, max_positions, length, device) -> Frequencies:
    return _plain(dim, theta, device) / _need(options, "factor"), 1.0


def _dynamic(dim, theta, options, max_positions, length, device) -> Frequencies:
    # The base grows with the length, so that the lowest frequency just spans it (transformers' formula).
    factor, limit = _need(options, "factor"), _original(options, max_positions, "dynamic")
    longest = length.clamp(min=limit).to(torch.float32)
    growth = torch.log((factor * longest / limit) - (factor - 1)) * (dim / (dim - 2))
    # exp and log, not a power: a power's last bit depends on how many tokens are worked on at once.
    share = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    return torch.exp(-(growth + math.log(theta)) * share), 1.0


def _yarn(dim, theta, options, max_positions, length, device) -> Frequencies:
    limit = _original(options, max_positions, "yarn")
    factor = options.get("factor")
    if factor is None:
        if max_positions is None:
            raise ValueError("rope: yarn needs `factor`, or max_positions to derive it from")
        factor = max_positions / limit
    fast, slow = options.get("beta_fast") or 32, options.get("beta_slow") or 1

    def channel(turns: float) -> float:
        # the channel whose wave fits `turns` times into the original length
        return dim * math.log(limit / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(fast), channel(slow)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low or 0.001
    # ramp 0: fast channels, kept as they are; ramp 1: slow channels, interpolated (eq. 18-19)
    ramp = ((torch.arange(dim // 2, device=device, dtype=torch.float32) - low) / span).clamp(0, 1)
    plain = _plain(dim, theta, device)
    return plain / factor * ramp + plain * (1 - ramp), _yarn_factor(options, factor)


def _yarn_factor(options: Mapping[str, Any], factor: float) -> float:
    """The attention temperature (eq. 22), or the ratio of two of them when DeepSeek's mscale settings are
    given."""
    if (given := options.get("attention_factor")) is not None:
        return given

    def scale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    m, m_all = options.get("mscale"), options.get("mscale_all_dim")
    return scale(m) / scale(m_all) if m and m_all else scale(1.0)


def _llama3(dim, theta, options, max_positions, length, device) -> Frequencies:
    factor, limit = _need(options, "factor"), _original(options, max_positions, "llama3")
    low, high = _need(options, "low_freq_factor"), _need(options, "high_freq_factor")
    plain = _plain(dim, theta, device)
    # turns: how often a channel's wave fits into the original length; few turns are stretched, many are kept
    turns = limit * plain / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * plain / factor + smooth * plain, 1.0


def _longrope(dim, theta, options, max_positions, length, device) -> Frequencies:
    limit = _original(options, max_positions, "longrope")
    long, short = (
        torch.tensor(_need(options, key), dtype=torch.float32, device=device)
        for key in ("long_factor", "short_factor")
    )
    stretch = torch.where(length > limit, long, short)
    factor = options.get("factor")
    if factor is None:
        if max_positions is None:
            raise ValueError("rope: longrope needs `factor`, or max_positions to derive it from")
        factor = max_positions / limit
    attention = options.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(limit))
    return _plain(dim, theta, device) / stretch, attention


def _need(options: Mapping[str, Any], key: str) -> Any:
    if options.get(key) is None:
        raise ValueError(f"rope: rope_type {options['rope_type']!r} needs `{key}`")
    return options[key]


def _original(options: Mapping[str, Any], max_positions: int | None, kind: str) -> int:
    limit = options.get("original_max_position_embeddings") if kind != "dynamic" else None
    limit = max_positions if limit is None else limit
    if limit is None:
        raise ValueError(
            f"rope: {kind} needs the original length: `original_max_position_embeddings` or max_positions"
        )
    return limit


_FREQUENCIES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
