import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_lm.data import IGNORE, Split, Windows
from hybrid_lm.data.sampler import permute

EOT, PAD = 256, 257


def split_of(lengths, seed=0):
    """A split whose documents have these lengths."""
    rng = np.random.default_rng(seed)
    stream, starts = [], []
    for length in lengths:
        starts.append(len(stream))
        stream += [EOT, *rng.integers(0, 256, length)]
    tokens = np.array([*stream, EOT], dtype=np.uint16)
    return Split("train", tokens, np.array(starts), np.array(lengths), EOT, PAD, "")


SPLIT = split_of([5, 1, 30, 12, 2, 2, 50, 7, 64, 3])


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**70), epoch=st.integers(0, 2**40))
def test_an_epoch_is_a_permutation(n, seed, epoch):
    index = np.arange(n, dtype=np.uint64)
    out = permute(index, n, seed, np.full_like(index, epoch))
    assert np.array_equal(np.sort(out), index)


def test_orders_differ_by_seed_and_epoch_and_look_random():
    n = 1000
    index = np.arange(n, dtype=np.uint64)
    orders = [
        permute(index, n, seed, np.full_like(index, epoch)).astype(np.int64)
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    for i, order in enumerate(orders):
        # Random permutations agree in one place on average; Poisson(1) passes 10 with probability 1e-8.
        assert all((order == other).sum() <= 10 for other in [index.astype(np.int64), *orders[:i]])
        # The correlation of random orders has standard deviation 1/sqrt(n).
        assert abs(np.corrcoef(index.astype(np.int64), order)[0, 1]) < 5 / np.sqrt(n)


def test_large_corpora_need_no_table():
    n = 10**10
    out = permute(np.arange(512, dtype=np.uint64), n, 0, np.zeros(512, dtype=np.uint64))
    assert len(set(out.tolist())) == 512
    assert out.max() < n


@pytest.mark.parametrize("packing", ["isolate", "concat"])
def test_a_batch_depends_on_the_numbers_of_its_samples_only(packing):
    windows = Windows(SPLIT, 8, seed=3, packing=packing)
    whole = windows.batch(5, 8)
    halves = [Windows(SPLIT, 8, seed=3, packing=packing).batch(step, 4) for step in (10, 11)]
    rank1 = windows.samples(5 * 8 + 2, 2)
    for i, array in enumerate(whole):
        if array is None:
            assert packing == "concat"
            continue
        np.testing.assert_array_equal(array, np.concatenate([half[i] for half in halves]))
        np.testing.assert_array_equal(array[2:4], rank1[i])
    assert whole.tokens.dtype == whole.labels.dtype == np.int64


def test_every_window_once_per_epoch_also_when_a_batch_spans_two():
    windows = Windows(SPLIT, 8, seed=0)
    n = windows.n_windows
    assert n == (len(SPLIT.tokens) - 1) // 8 == 23
    rows = np.concatenate([windows.batch(step, 5).tokens for step in range(10)])[: 2 * n]
    expected = sorted(SPLIT.tokens[: 8 * n].reshape(n, 8).tolist())
    assert sorted(rows[:n].tolist()) == expected == sorted(rows[n:].tolist())
    assert rows[:n].tolist() != rows[n:].tolist()


def test_labels_are_the_next_tokens_and_none_crosses_a_document():
    windows = Windows(SPLIT, 8, seed=1)
    batch = windows.batch(0, windows.n_windows)
    assert (batch.labels[:, :-1] == batch.tokens[:, 1:]).all()
    assert batch.doc_ids is not None
    assert batch.doc_ids.dtype == np.int32
    assert (batch.doc_ids[:, 0] == 1).all()
    new = np.diff(batch.doc_ids, axis=1)
    assert (new == (batch.tokens[:, 1:] == EOT)).all()
    # The only label that stands in another document is the EOT that ends this one.
    assert (batch.labels[:, :-1][new == 1] == EOT).all()
    assert new.sum() > 0


@pytest.mark.parametrize("packing", ["isolate", "concat"])
@pytest.mark.parametrize("seq_len", [8, 23, 185])
def test_evaluation_scores_every_token_once_and_in_order(packing, seq_len):
    batches = list(Windows(SPLIT, seq_len, packing=packing).eval_batches(3))
    labels = np.concatenate([batch.labels.ravel() for batch in batches])
    tokens = np.concatenate([batch.tokens.ravel() for batch in batches])
    scored = labels != IGNORE
    assert labels[scored].tolist() == SPLIT.tokens[1:].tolist()
    assert tokens[scored].tolist() == SPLIT.tokens[:-1].tolist()
    assert (tokens[~scored] == PAD).all()
    assert scored.argmin() == scored.sum() or scored.all()
    if packing == "isolate":
        doc_ids = np.concatenate([batch.doc_ids.ravel() for batch in batches])
        assert ((doc_ids == 0) == ~scored).all()
    else:
        assert all(batch.doc_ids is None for batch in batches)


def test_a_split_shorter_than_a_window():
    with pytest.raises(ValueError, match=r"186 tokens .* data.seq_len = 187; use a seq_len of at most 186"):
        Windows(SPLIT, 187)
    assert Windows(SPLIT, 186).n_windows == 1
