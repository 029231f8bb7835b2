"""Batches are functions of (seed, step, micro); held-out batches are the same for everybody."""

from __future__ import annotations

import numpy as np
import pytest

from hybrid_lm.data import IGNORE
from hybrid_lm.train.source import ProbeSource, TextSource, open_source


def equal(one, two) -> bool:
    return all((x is None and y is None) or np.array_equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.fixture(params=["text", "probe"])
def make(request, make_config, make_probe):
    """Both kinds of configuration."""
    return make_config if request.param == "text" else make_probe


def test_a_batch_depends_on_seed_step_and_micro_alone(make, tmp_path):
    source = open_source(make("train.accumulate=2"), tmp_path)
    again = open_source(make("train.accumulate=2"), tmp_path)
    late = again.batch(7, 1)
    batches = [source.batch(step, micro) for step in range(8) for micro in range(2)]
    assert equal(batches[15], late)
    # Accumulating two batches reads what two steps without accumulation would.
    assert equal(open_source(make(), tmp_path).batch(15, 0), late)
    assert not equal(open_source(make("train.seed=1"), tmp_path).batch(15, 0), late)
    assert not any(equal(batch, late) for batch in batches[:15])


def test_held_out_batches_do_not_depend_on_the_seed(make, tmp_path):
    one, two = (open_source(make(f"train.seed={seed}"), tmp_path) for seed in (0, 1))
    pairs = list(zip(one.eval_batches(2), two.eval_batches(2), strict=True))
    assert all(a[0] == b[0] and equal(a[1], b[1]) for a, b in pairs)
    assert one.fingerprint == two.fingerprint
    assert one.describe() == two.describe()


def test_text_is_prepared_once(make_config, tmp_path, monkeypatch):
    source = open_source(make_config(), tmp_path / "run")
    assert isinstance(source, TextSource)
    before = (tmp_path / "run" / "data" / "train.bin").stat()
    open_source(make_config(), tmp_path / "run")
    after = (tmp_path / "run" / "data" / "train.bin").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    # A run that goes on has its own copy, even if the text is gone.
    config = make_config("data.path=/no/such/text")
    assert open_source(config, tmp_path / "run", prepared=True).fingerprint == source.fingerprint


def test_the_fingerprint_of_text_covers_windows_and_packing(make_config, tmp_path):
    changes = ([], ["data.seq_len=8"], ["data.packing=concat"])
    found = {open_source(make_config(*change), tmp_path).fingerprint for change in changes}
    assert len(found) == 3


def test_bits_per_byte_are_of_text_alone(make_config, tmp_path):
    source = open_source(make_config(), tmp_path)
    assert isinstance(source, TextSource)
    assert source.bytes_per_token == 1.0  # one token is one byte
    batches = [batch for _, batch in source.eval_batches(None)]
    scored = np.concatenate([batch.labels[batch.labels != IGNORE] for batch in batches])
    assert len(scored) == source.val.split.n_bytes
    assert scored.max() < 256
    some = list(source.eval_batches(2))
    assert [(name, batch.tokens.shape) for name, batch in some] == [("val", (2, 16))] * 2


def test_a_probe_draws_settings_in_training_and_tests_all_combinations(make_probe, tmp_path):
    source = open_source(make_probe(), tmp_path)
    assert isinstance(source, ProbeSource)
    counts = {int((source.batch(step, 0).labels[0] != IGNORE).sum()) for step in range(40)}
    assert counts == {1, 2, 4}
    names = [name for name, _ in source.eval_batches(None)]
    assert list(dict.fromkeys(names)) == [
        "n_pairs=2,seq_len=16", "n_pairs=2,seq_len=32", "n_pairs=4,seq_len=16", "n_pairs=4,seq_len=32",
    ]  # fmt: skip
    rows = [len(batch.tokens) for name, batch in source.eval_batches(None) if name == "n_pairs=2,seq_len=16"]
    assert rows == [4, 1]
    assert (source.vocab_size, source.seq_len, source.tokenizer) == (64, 32, None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train_params={n_pairs: [1, 30]}", r"data\.train_params \{'n_pairs': 30\}: .*room for 8"),
        ("data.test_params={n_pairs: []}", r"data\.test_params\.n_pairs = \[\]: at least one value"),
        ("data.test_params={pairs: [1]}", "unknown parameter 'pairs'.*Did you mean 'n_pairs'"),
    ],
)
def test_impossible_settings_are_named(make_probe, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        open_source(make_probe(override), tmp_path)
