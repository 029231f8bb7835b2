"""From the inputs that `transformers` gives, masks and positions, to documents."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_lm.model.lm import ModelState


def mask_of(attention_mask: Tensor, rows: Tensor, state: ModelState | None) -> Tensor:
    """The part (b t) of a padding mask that belongs to this call's tokens or embeddings (b t ...). ValueError
    for any other mask."""
    (b, t), seen = rows.shape[:2], 0 if state is None else state.seen
    if not isinstance(attention_mask, Tensor) or attention_mask.shape not in {(b, t), (b, seen + t)}:
        shape = (
            tuple(attention_mask.shape)
            if isinstance(attention_mask, Tensor)
            else type(attention_mask).__name__
        )
        raise ValueError(
            f"attention_mask is {shape}; give 1 for tokens and 0 for padding as ({b}, {seen + t})"
        )
    return attention_mask[:, -t:].to(torch.int32)


def documents(
    rows: Tensor, mask: Tensor | None, position_ids: Tensor | None, state: ModelState | None
) -> Tensor | None:
    """`doc_ids` (b t) of tokens or embeddings (b t ...) from a padding mask (b t) and positions (b t); None:
    all go on with document 1.

    A token opens a document if it is the row's first, or if its position is not above that of the one before.
    """
    b, t = rows.shape[:2]
    fresh = state is None or state.seen == 0
    if mask is None and (position_ids is None or t == 1) and (state is None or state.doc is None):
        return None
    mask = torch.ones(b, t, dtype=torch.int32, device=rows.device) if mask is None else mask
    opened = torch.full_like(mask[:, 0], int(not fresh))
    if state is not None and state.opened is not None:
        opened = state.opened
    opens = (mask.cumsum(1) == 1) & (opened == 0)[:, None]
    if position_ids is not None:
        before = position_ids[:, :1] - 1 if state is None or fresh else state.position[:, None] - 1
        opens = opens | (position_ids <= torch.cat([before, position_ids[:, :-1]], 1))
    doc_ids = (opened[:, None] + (opens & (mask == 1)).cumsum(1)).to(torch.int32) * mask
    if (state is None or state.doc is None) and bool((doc_ids == 1).all()):
        return None
    return doc_ids
