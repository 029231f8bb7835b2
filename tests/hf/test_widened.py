"""A model computes in another type layer by layer as a copy of it in that type does, and is as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import WHOLE, build

from hybrid_lm.hf.verify import continued
from hybrid_lm.hf.widened import widened


@pytest.mark.parametrize("name", list(WHOLE))
def test_layer_by_layer_is_the_whole_model(name):
    model = build(WHOLE[name]).to(torch.bfloat16)
    wide, before = copy.deepcopy(model).float(), copy.deepcopy(model.state_dict())
    tokens = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), widened(model, torch.float32) as seen:
        assert torch.equal(seen(tokens).logits, wide(tokens).logits)
        assert torch.equal(continued(seen, tokens, 5), continued(wide, tokens, 5))
        assert next(model.layers[0].parameters()).dtype == torch.bfloat16
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(x.dtype == after[key].dtype and torch.equal(x, after[key]) for key, x in before.items())
    assert model(tokens).logits.dtype == torch.bfloat16


def test_it_comes_back_from_an_error():
    model = build(WHOLE["hybrid"]).to(torch.bfloat16)
    with pytest.raises(KeyError, match="stop"), widened(model, torch.float32):
        raise KeyError("stop")
    assert "forward" not in vars(model.layers[0])
    assert model.embed.weight.dtype == torch.bfloat16
