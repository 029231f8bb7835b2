"""Scalings of rotary positions that go by the length: equal to transformers up to the original one, beyond it
to what transformers decodes token by token."""

from __future__ import annotations

import pytest
import torch
from native_models import native
from native_sizes import DECODER

from hybrid_lm.hf.convert import from_hf
from hybrid_lm.hf.family import TOLERANCE

LENGTH = 16
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": LENGTH,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5],
}


@pytest.mark.parametrize(
    ("scaling", "longest"), [(DYNAMIC, LENGTH), (LONGROPE, 4 * LENGTH)], ids=["dynamic", "longrope"]
)
@torch.no_grad()
def test_lengths_beyond_the_original(scaling, longest):
    theirs = native("llama", {**DECODER, "rope_parameters": scaling, "max_position_embeddings": longest})
    # Its check goes beyond the original length.
    ours = from_hf(theirs, check=False)
    x = torch.randint(257, (2, 2 * LENGTH), generator=torch.Generator().manual_seed(1))
    logits = ours(x).logits
    within = theirs(x[:, :LENGTH], use_cache=False).logits
    assert (logits[:, :LENGTH] - within).abs().max() <= TOLERANCE
    cache, decoded = None, []
    for i in range(2 * LENGTH):
        out = theirs(x[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache, decoded = out.past_key_values, [*decoded, out.logits]
    assert (logits - torch.cat(decoded, 1)).abs().max() <= TOLERANCE
    # Given all at once, it has other wavelengths for every token: that is what ours cannot be equal to.
    assert (theirs(x, use_cache=False).logits - torch.cat(decoded, 1)).abs().max() > 100 * TOLERANCE
