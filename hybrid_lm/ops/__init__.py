"""Ops: pure functions on tensors, one signature and several backends each.

Axis letters: b batch, t token, s key, d width, h heads, g groups, p head dim, n state dim, c chunk, w conv
width, v vocab, m rows; layout (b, t, h, p). Every recurrence takes `initial`, returns its final state, both
differentiable, and takes `reset (b t)`: true where a document starts.
"""

from hybrid_lm.ops import external, native, triton
from hybrid_lm.ops.attention import alibi_slopes, attention
from hybrid_lm.ops.backend import report, select
from hybrid_lm.ops.causal_conv1d import causal_conv1d
from hybrid_lm.ops.delta_rule import delta_rule
from hybrid_lm.ops.grouped_linear import grouped_linear
from hybrid_lm.ops.linear import linear
from hybrid_lm.ops.linear_recurrence import linear_recurrence
from hybrid_lm.ops.loss import TokenLoss, linear_cross_entropy
from hybrid_lm.ops.mamba2_mixer import mamba2_mixer
from hybrid_lm.ops.norm import gated_rms_norm, rms_norm
from hybrid_lm.ops.rope import apply_rope, rope_table
from hybrid_lm.ops.selective_scan import selective_scan
from hybrid_lm.ops.ssd import ssd

__all__ = [
    "TokenLoss",
    "alibi_slopes",
    "apply_rope",
    "attention",
    "causal_conv1d",
    "delta_rule",
    "external",
    "gated_rms_norm",
    "grouped_linear",
    "linear",
    "linear_cross_entropy",
    "linear_recurrence",
    "mamba2_mixer",
    "native",
    "report",
    "rms_norm",
    "rope_table",
    "select",
    "selective_scan",
    "ssd",
    "triton",
]
