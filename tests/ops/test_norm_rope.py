"""Norms and rotary embeddings equal transformers' on every option."""

import math
from typing import Any

import pytest
import torch

from hybrid_lm import ops
from tests.ops.cases import FAST

# one rounding per operation of a short formula, on values of order 1
FEW = 16 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("backend", ["reference", *FAST], indirect=True)
def test_gated_norm_equals_mamba2_s(backend: str) -> None:
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

    theirs = MambaRMSNormGated(24, group_size=8, eps=1e-3)
    theirs.weight.data = torch.randn(24)
    y, gate = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    ours = ops.gated_rms_norm(y, gate, theirs.weight, eps=1e-3, groups=3, backend=backend)
    assert (ours - theirs(y, gate)).abs().max() <= FEW * ours.abs().max()


def test_unit_offset_with_zero_weight_is_the_plain_norm(backend: str) -> None:
    x = torch.randn(3, 8)
    shifted = ops.rms_norm(x, torch.zeros(8), unit_offset=True, backend=backend)
    assert torch.equal(shifted, ops.rms_norm(x, backend=backend))


def test_norm_of_float16_does_not_overflow_inside(backend: str) -> None:
    # 3e4 squared is beyond float16's largest number, 65504
    x = torch.full((1, 512), 3.0e4, dtype=torch.float16)
    assert (ops.rms_norm(x, backend=backend) == 1).all()


SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32,
        "beta_fast": 16, "beta_slow": 2,
    },
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "truncate": False},
    {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32,
        "mscale": 0.7, "mscale_all_dim": 1.3,
    },
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "attention_factor": 1.5},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32,
        "long_factor": [1.0 + i for i in range(8)], "short_factor": [1.0 + i / 8 for i in range(8)],
    },
]  # fmt: skip


@pytest.mark.parametrize("length", [30, 100])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: "-".join(f"{v}" for v in s.values())[:40])
def test_rope_table_equals_transformers(scaling: dict[str, Any], length: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_parameters=scaling | {"rope_theta": 500.0},
    )
    positions = torch.arange(length)[None].repeat(2, 1)
    theirs = LlamaRotaryEmbedding(config)
    # Rules that look at the length: what a model decoding token by token would have used.
    pieces = positions.split(1 if scaling["rope_type"] in ("dynamic", "longrope") else length, 1)
    cos, sin = (torch.cat(part, 1) for part in zip(*(theirs(torch.zeros(1), p) for p in pieces), strict=True))
    ours = ops.rope_table(positions, 16, theta=500.0, scaling=scaling, max_positions=64)
    # theirs repeats the frequencies for the second channels; angles reach `length` radians
    for mine, their in zip(ours, (cos, sin), strict=True):
        assert (mine - their[..., :8]).abs().max() <= FEW * length


@pytest.mark.parametrize("interleaved", [False, True])
def test_apply_rope_turns_pairs_and_passes_the_rest(interleaved: bool) -> None:
    x = torch.randn(2, 5, 3, 12, dtype=torch.float64)
    cos, sin = ops.rope_table(torch.arange(5)[None].repeat(2, 1), 8, theta=100.0)
    y = ops.apply_rope(x, cos, sin, interleaved=interleaved)
    assert torch.equal(y[..., 8:], x[..., 8:])
    first, second = (slice(0, 8, 2), slice(1, 8, 2)) if interleaved else (slice(0, 4), slice(4, 8))
    # eq. 15 as complex numbers: multiply by exp(i m theta)
    turned = torch.complex(x[..., first], x[..., second]) * torch.complex(cos, sin)[:, :, None]
    double = 16 * torch.finfo(torch.float64).eps
    assert (y[..., first] - turned.real).abs().max() <= double
    assert (y[..., second] - turned.imag).abs().max() <= double


def test_rotated_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).expand(2, 1, 9, 1, 16)
    table = ops.rope_table(torch.arange(9)[None], 16)
    q, k = (ops.apply_rope(v, *table) for v in (q, k))
    scores = torch.einsum("btd,bsd->ts", q[:, :, 0], k[:, :, 0])
    for distance in range(9):
        diagonal = scores.diagonal(-distance)
        # the tables are float32, with angles up to 9
        assert (diagonal - diagonal[0]).abs().max() <= 9 * FEW * math.sqrt(16) * scores.abs().max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 7}, "dim = 7 is odd"),
        ({"dim": 8, "scaling": {"rope_type": "yarm"}}, "unknown rope_type 'yarm'.*Did you mean 'yarn'"),
        ({"dim": 8, "scaling": {"rope_type": "linear"}}, "rope_type 'linear' needs `factor`"),
        ({"dim": 8, "scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic needs the original length"),
    ],
)
def test_bad_options_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.rope_table(torch.arange(3)[None], **arguments)
