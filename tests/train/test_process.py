"""Signals: remembered once, then as they were."""

from __future__ import annotations

import signal

import pytest

from hybrid_lm.train.process import Signals


@pytest.fixture
def hits():
    """Handlers of the caller's own that note what they got."""
    seen: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda n, frame: seen.append(n)) for number in numbers}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_the_first_is_remembered_and_the_second_does_what_it_did(name, hits):
    number = getattr(signal, name)
    with Signals() as signals:
        signal.raise_signal(number)
        assert (signals.name, hits) == (name, [])
        signal.raise_signal(number)
        assert hits == [number]
    signal.raise_signal(number)
    assert hits == [number, number]


def test_what_is_ignored_stays_ignored(hits):
    # nohup starts a program with SIGHUP ignored: closing the terminal is to change nothing.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Signals() as signals:
        signal.raise_signal(signal.SIGHUP)
    assert signals.name == ""
