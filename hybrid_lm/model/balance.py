"""Experts that are kept in use by a correction of their scores, which moves after each optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybrid_lm.layers.base import Auxiliary, Load


@torch.no_grad()
def rebalance(passes: Sequence[Auxiliary]) -> None:
    """Raises the correction of experts that got fewer tokens than the mean in this optimizer step, and lowers
    that of those that got more, in place. Wang et al. 2024, arXiv:2408.15664, algorithm 1.
    """
    loads: dict[int, Load] = {}
    for load in (load for auxiliary in passes for load in auxiliary.loads):
        if load.correction is not None and load.rate:
            # Layers that share their weights share the correction.
            before = loads.get(id(load.correction))
            counts = load.counts if before is None else before.counts + load.counts
            loads[id(load.correction)] = load._replace(counts=counts)
    for counts, correction, rate in loads.values():
        assert correction is not None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Every process has its own tokens, and all must move alike.
            counts = counts.clone()
            torch.distributed.all_reduce(counts)
        correction += rate * torch.sign(counts.mean() - counts).to(correction.dtype)
