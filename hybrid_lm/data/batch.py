"""What a training step eats."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

IGNORE = -100
"""The label of a position that is not scored, PyTorch's default `ignore_index`."""


class Batch(NamedTuple):
    """Rows of tokens and what follows each.

    `labels[i, j]` is what the model should say after reading `tokens[i, : j + 1]`: already shifted, never
    shift again.
    """

    tokens: np.ndarray
    """(b t) int64."""
    labels: np.ndarray
    """(b t) int64, -100 where nothing is scored."""
    doc_ids: np.ndarray | None
    """(b t) int32: 0 is padding, documents are 1, 2, ... in order; None: each row is one document."""
