"""The model's own parts: embedding, head, documents, positions, memory; the layers have their own tests."""

from __future__ import annotations

import pytest
import torch

from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.model.build import build_model
from hybrid_lm.model.lm import count_positions, sinusoids


def model(**changes):
    config = {
        "d_model": 16,
        "vocab_size": 29,
        "pattern": "m f",
        "layers": {"m": {"type": "mamba2", "d_state": 4, "head_dim": 8}, "f": {"type": "mlp", "d_ff": 24}},
        **changes,
    }
    return build_model(ModelConfig.model_validate(config))


TOKENS = torch.arange(24).view(2, 12)


def test_head_options_are_their_formulas():
    plain = model()
    capped = model(head={"multiplier": 0.5, "softcap": 2.0, "bias": True})
    with torch.no_grad():
        capped.lm_bias.uniform_(-1, 1)
        x, _ = capped.features(TOKENS)
        logits = 0.5 * (x @ capped.embed.weight.T + capped.lm_bias)
        torch.testing.assert_close(capped(TOKENS).logits, 2.0 * torch.tanh(logits / 2.0))
        torch.testing.assert_close(plain(TOKENS).logits, plain.features(TOKENS)[0] @ plain.embed.weight.T)


@pytest.mark.parametrize("head", [{}, {"multiplier": 0.7, "softcap": 3.0, "bias": True}])
@pytest.mark.parametrize("tied", [True, False])
def test_token_loss_is_cross_entropy_of_the_logits(head, tied):
    lm = model(head=head, embedding={"tied": tied})
    labels = TOKENS.roll(-1, 1).masked_fill(TOKENS % 5 == 0, -100)
    loss = lm.token_loss(TOKENS, labels, label_smoothing=0.1, z_loss=1e-2)
    logits = lm(TOKENS).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(
        logits, labels.flatten(), reduction="none", label_smoothing=0.1
    )
    z = 1e-2 * logits.logsumexp(-1).square() * (labels.flatten() != -100)
    # float32 sums over a vocabulary of 29.
    torch.testing.assert_close(loss.objective.flatten(), expected + z, rtol=1e-5, atol=1e-5)
    nll = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none")
    torch.testing.assert_close(loss.nll.flatten(), nll, rtol=1e-5, atol=1e-5)


def test_tied_and_untied_heads():
    assert "lm_head.weight" not in model().state_dict()
    untied = model(embedding={"tied": False})
    assert not torch.equal(untied.lm_head.weight, untied.embed.weight)


def test_embedding_options():
    scaled = model(embedding={"multiplier": 4.0, "positions": "learned", "max_positions": 12})
    positions = torch.arange(12).expand(2, 12)
    expected = 4.0 * scaled.embed(TOKENS) + scaled.embed_positions(positions)
    torch.testing.assert_close(scaled.embedded(TOKENS, positions), expected)
    table = sinusoids(torch.tensor([[0, 3]]), 6)[0]
    rates = torch.tensor([1.0, 10000 ** (-2 / 6), 10000 ** (-4 / 6)])
    torch.testing.assert_close(table[1, 0::2], (3 * rates).sin())
    torch.testing.assert_close(table[1, 1::2], (3 * rates).cos())


def test_a_document_longer_than_learned_positions_says_so():
    lm = model(embedding={"positions": "learned", "max_positions": 8})
    with pytest.raises(
        ValueError, match=r"a document of 12 tokens, but the model has learned positions for 8"
    ):
        lm(TOKENS)
    docs = torch.tensor([[1] * 6 + [2] * 6] * 2)
    assert lm(TOKENS, doc_ids=docs).logits.isfinite().all(), "two documents of six fit"
    state = lm.empty_state(2)
    lm(TOKENS[:, :8], state=state)
    with pytest.raises(ValueError, match="max_positions"):
        lm(TOKENS[:, 8:9], state=state)


def test_positions_count_in_each_document():
    reset = torch.tensor([[1, 0, 1, 0, 0, 1]], dtype=torch.bool)
    assert count_positions(1, 6, reset, None, reset.device).tolist() == [[0, 1, 0, 1, 2, 0]]
    go_on = torch.tensor([[0, 0, 1, 0, 0, 0]], dtype=torch.bool)
    start = torch.tensor([7])
    assert count_positions(1, 6, go_on, start, reset.device).tolist() == [[7, 8, 0, 1, 2, 3]]
    assert count_positions(1, 3, None, start, reset.device).tolist() == [[7, 8, 9]]


@pytest.mark.parametrize("bad", [[1, 2, 1], [0, 1, 0, 1], [2, 1]])
def test_document_numbers_that_come_back_are_refused(bad):
    docs = torch.tensor([bad])
    with pytest.raises(ValueError, match="must go up along a row"):
        model()(TOKENS[:1, : len(bad)], doc_ids=docs)


def test_a_padded_row_cannot_go_on_as_its_old_document():
    lm = model()
    state = lm.empty_state(1)
    lm(TOKENS[:1, :4], state=state, doc_ids=torch.tensor([[1, 1, 0, 0]]))
    with pytest.raises(ValueError, match="must go up along a row"):
        lm(TOKENS[:1, 4:6], state=state, doc_ids=torch.tensor([[1, 1]]))


def test_dropout_acts_in_training_only():
    lm = model(block={"dropout": 0.5}, embedding={"dropout": 0.5})
    assert torch.equal(lm(TOKENS).logits, lm(TOKENS).logits)
    lm.train()
    assert not torch.equal(lm(TOKENS).logits, lm(TOKENS).logits)


def test_state_is_sized_by_its_tensors(hybrid_config):
    lm = build_model(hybrid_config)
    tokens = torch.randint(61, (3, 9))
    state = lm.empty_state(3)
    lm(tokens, state=state)
    kv_and_rest = sum(x.numel() * x.element_size() for x in state.tensors().values())
    assert 0 < kv_and_rest <= state.nbytes
    one = state.gather(torch.tensor([1]))
    assert one.position.shape == (1,)
    assert one.nbytes <= state.nbytes / 3 + 1
    assert state.fork().seen == state.seen == 9


def test_a_state_of_another_model_is_refused(tmp_path, hybrid_config):
    lm = model()
    state = lm.empty_state(1)
    lm(TOKENS[:1], state=state)
    state.save(tmp_path / "state.safetensors")
    for other in (
        build_model(hybrid_config),
        model(pattern="m f m"),
        model(layers={"m": {"type": "mamba2", "d_state": 8, "head_dim": 8}, "f": {"type": "mlp"}}),
        model(layers={"m": {"type": "attention", "n_heads": 2}, "f": {"type": "mlp"}}),
    ):
        with pytest.raises(ValueError, match="the state of another architecture"):
            other.empty_state(1).load(tmp_path / "state.safetensors")


def test_gradients_flow_through_a_state(hybrid_config):
    """Training over two segments with the memory between them is training on the whole."""
    lm = build_model(hybrid_config).double()
    tokens = torch.randint(61, (2, 14))

    def gradient(pieces):
        lm.zero_grad()
        state = lm.empty_state(2)
        torch.cat([lm(piece, state=state).logits for piece in pieces], 1).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in lm.parameters()])

    whole, split = gradient([tokens]), gradient([tokens[:, :5], tokens[:, 5:]])
    # float64 rounding of sums of some ten thousand terms.
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-11 * float(whole.abs().max()))
