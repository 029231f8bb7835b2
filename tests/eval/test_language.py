"""Bits per byte: every token once, the stated context, batches that change nothing."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, normalizers
from transformers import PreTrainedTokenizerFast

from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.data import ByteTokenizer, HFTokenizer, prepare, train_bpe
from hybrid_lm.data.tokenizer import EOT
from hybrid_lm.eval.language import (
    compression_baselines,
    evaluate_text,
    evaluating,
    held_out,
    texts_of,
    windows,
)
from hybrid_lm.model.build import build_model

EPS = torch.finfo(torch.float32).eps
TOKENIZER = ByteTokenizer()
TEXTS = ["The quick brown fox. " * 9, "é" * 20, "", "x", "jumps over\n" * 4]


def tiny(pattern="m a f", d_model=16):
    layers = {
        "m": {"type": "mamba2", "d_state": 4, "head_dim": 8, "chunk": 16},
        "a": {"type": "attention", "n_heads": 2, "rope": {}},
        "f": {"type": "mlp", "d_ff": 32},
    }
    config = {"d_model": d_model, "pattern": pattern, "layers": layers, "vocab_size": 258}
    return build_model(ModelConfig.model_validate(config), seed=1)


@given(n=st.integers(0, 200), seq_len=st.integers(1, 40), data=st.data())
def test_windows_score_every_token_once_with_the_promised_context(n, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    scored = []
    for begin, done, end in windows(n, seq_len, stride):
        assert end - begin <= seq_len
        for token in range(done + 1, end + 1):
            scored.append(token)
            # stream[token] is predicted from stream[begin : token], of which stream[0] is the EOT.
            assert token - begin >= min(token, seq_len - stride + 1)
    assert scored == list(range(1, n + 1))


def nats(model, text):
    """One document in one forward pass, the definition."""
    stream = torch.tensor([[TOKENIZER.eot_id, *text.encode()]])
    logp = model(stream[:, :-1]).logits.double().log_softmax(-1)
    return -logp.gather(-1, stream[:, 1:, None]).sum().item()


@torch.no_grad()
def test_is_the_mean_over_documents_scored_on_their_own():
    model = tiny()
    result = evaluate_text(model, TEXTS, TOKENIZER, seq_len=256, batch_size=3)
    expected = sum(nats(model, text) for text in TEXTS if text)
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    # A token's loss is off by about eps * (size of the logits, < 10); errors of n tokens add at worst.
    assert abs(result.nll_nats - expected) <= 10 * EPS * n_bytes
    assert result.n_tokens == result.n_bytes == n_bytes
    assert result.bits_per_byte == result.nll_nats / n_bytes / math.log(2)
    assert result.perplexity == pytest.approx(math.exp(result.nll_nats / n_bytes))
    assert [d.n_bytes for d in result.documents] == [len(t.encode()) for t in TEXTS if t]
    # The documents' nats are the same numbers added in another order: eps of float64.
    assert sum(d.nll for d in result.documents) == pytest.approx(result.nll_nats, rel=1e-14)


def test_batches_change_nothing_but_rounding():
    model = tiny()
    one, many = (evaluate_text(model, TEXTS, TOKENIZER, seq_len=24, stride=7, batch_size=b) for b in (1, 16))
    # Per token about eps * (size of the logits, < 10).
    assert abs(one.nll_nats - many.nll_nats) <= 10 * EPS * one.n_tokens
    assert [d.hash for d in one.documents] == [d.hash for d in many.documents]


def test_windows_as_long_as_the_text_do_not_depend_on_the_stride():
    model = tiny()
    results = [evaluate_text(model, TEXTS, TOKENIZER, seq_len=200, stride=s) for s in (1, 50, 200)]
    assert len({result.nll_nats for result in results}) == 1


def test_untrained_model_knows_nothing():
    result = evaluate_text(tiny(), TEXTS, TOKENIZER, seq_len=64)
    # log2(258) = 8.011 for a uniform guess; random logits of size 0.1 cost about their variance more.
    assert abs(result.bits_per_byte - math.log2(258)) < 0.1


def test_loss_by_position_adds_up():
    result = evaluate_text(tiny(), TEXTS, TOKENIZER, seq_len=300)
    lengths = [len(text.encode()) for text in TEXTS]
    counts = [sum(n > i for n in lengths) for i in range(300)]
    filled = [(x, n) for x, n in zip(result.by_position, counts, strict=True) if n]
    assert sum(x * n for x, n in filled) == pytest.approx(result.nll_nats, rel=1e-12)
    assert all(x is None for x, n in zip(result.by_position, counts, strict=True) if not n)


def test_a_split_of_a_store_scores_like_its_texts(tmp_path):
    rng = random.Random(0)
    (tmp_path / "corpus").mkdir()
    for i in range(20):
        text = "".join(rng.choices("abc é\n", k=60))
        (tmp_path / "corpus" / f"{i}.txt").write_text(text, encoding="utf-8")
    split = prepare(tmp_path / "corpus", tmp_path / "store", TOKENIZER, val_fraction=0.3).split("val")
    model = tiny("f")
    texts = texts_of(held_out(split, TOKENIZER), TOKENIZER)
    a = evaluate_text(model, split, TOKENIZER, seq_len=32)
    b = evaluate_text(model, texts, TOKENIZER, seq_len=32)
    assert a.n_bytes == b.n_bytes == split.n_bytes
    assert sorted(d.hash for d in a.documents) == [d.hash for d in b.documents]
    # Other batches: per token about eps * (size of the logits, < 10).
    assert abs(a.nll_nats - b.nll_nats) <= 10 * EPS * a.n_tokens
    assert texts_of(held_out(split, TOKENIZER, max_bytes=1), TOKENIZER) == texts[:1]
    # Each text has 60 to 120 bytes.
    assert texts_of(held_out(split, TOKENIZER, max_bytes=121), TOKENIZER) in (texts[:2], texts[:3])


def test_bits_are_per_byte_of_the_original_text(tmp_path):
    """By a tokenizer that reads any run of blanks as one."""
    backend = train_bpe(["a b c d\n"], 258).backend
    backend.normalizer = normalizers.Replace(Regex(" +"), " ")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOT).save_pretrained(tmp_path / "t")
    tokenizer = HFTokenizer(tmp_path / "t")
    texts = [f"{i}{' ' * 50}{i}\n" for i in range(8)]
    (tmp_path / "corpus").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "corpus" / f"{i}.txt").write_text(text)
    split = prepare(tmp_path / "corpus", tmp_path / "store", tokenizer, val_fraction=0.5).split("val")
    documents = held_out(split, tokenizer)
    assert sum(len(text) for text in texts_of(documents, tokenizer)) == 4 * 4
    result = evaluate_text(tiny(), documents, tokenizer, seq_len=32)
    assert result.n_bytes == 4 * 53
    assert result.n_tokens == 4 * 4
    assert result.bits_per_byte == result.nll_nats / (4 * 53) / math.log(2)


def test_progress_ends_at_the_number_of_tokens():
    seen = []
    evaluate_text(tiny("f"), TEXTS, TOKENIZER, seq_len=16, batch_size=4, progress=lambda *x: seen.append(x))
    total = sum(len(text.encode()) for text in TEXTS)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_model_comes_back_in_its_mode():
    model = tiny("f").train()
    with evaluating(model):
        assert not model.training
        assert not torch.is_grad_enabled()
    assert model.training
    evaluate_text(model, ["ab"], TOKENIZER, seq_len=4)
    model.token_loss(
        torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)
    ).nll.sum().backward()


def test_what_cannot_be_scored_is_refused():
    for stride in (0, 9):
        with pytest.raises(ValueError, match=f"stride {stride}: must be between 1 and seq_len 8"):
            evaluate_text(tiny("f"), ["abc"], TOKENIZER, seq_len=8, stride=stride)
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size {batch_size}: must be at least 1"):
            evaluate_text(tiny("f"), ["abc"], TOKENIZER, seq_len=8, batch_size=batch_size)
    with pytest.raises(ValueError, match="no text to score"):
        evaluate_text(tiny("f"), ["", ""], TOKENIZER, seq_len=8)


def test_compressors_on_known_data():
    noise = np.random.default_rng(0).integers(0, 128, 20_000, dtype=np.uint8).tobytes().decode()
    bits = compression_baselines([noise[:5000], noise[5000:]])
    # Seven random bits per byte cannot be said in fewer, and the formats add little.
    assert all(7.0 <= x < 7.3 for x in bits.values())
    assert all(x < 0.2 for x in compression_baselines(["spam " * 4000]).values())
