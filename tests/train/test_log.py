"""The log: JSON lines that survive a crash, a terminal or not, wandb offline, and sinks that fail alone."""

from __future__ import annotations

import io
import json
import sys
import time

import pytest
from rich.console import Console

from hybrid_lm.train.log import ConsoleSink, JsonlSink, Log, drop_after, open_log, read_metrics
from hybrid_lm.train.loop import train


def test_records_are_lines_and_later_ones_can_be_dropped(tmp_path, quiet):
    log = Log(quiet, [JsonlSink(tmp_path / "metrics.jsonl")])
    for step in (1, 2, 3):
        log.record("train", step, loss=float("nan") if step == 2 else 0.5)
    log.event(3, "something happened")
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # a crash in the middle of a line
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 3]
    assert records[1] == {"kind": "train", "step": 2, "loss": None}
    drop_after(tmp_path, 2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_sink_that_fails_is_given_up_with_one_warning(tmp_path):
    class Broken:
        name = "the broken one"

        def write(self, record):
            raise ConnectionError("no route")

        def close(self):
            raise AssertionError("it is gone")

    out = io.StringIO()
    log = Log(Console(file=out, width=200), [Broken(), JsonlSink(tmp_path / "metrics.jsonl")])
    log.record("train", 1, loss=1.0)
    log.record("train", 2, loss=1.0)
    log.close()
    assert out.getvalue() == "warning: no more logging to the broken one: ConnectionError: no route\n"
    assert len(read_metrics(tmp_path)) == 2


@pytest.mark.parametrize("terminal", [False, True])
def test_plain_lines_or_a_bar(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    log = Log(console, [ConsoleSink(console, steps=20, step=0)])
    log.record("train", 5, loss=1.25, lr=1e-3, grad_norm=2.0, tokens_per_s=1000.0, skipped=0)
    log.record("eval", 5, nll=1.5, bits_per_byte=2.25, seconds=1.0)
    log.close()
    text = out.getvalue()
    assert "eval  nll 1.5000  bits_per_byte 2.2500" in text
    assert ("━" in text) == terminal
    assert ("step  5/20  loss 1.2500  lr 1.00e-03  grad_norm 2.00  1,000 tokens/s" in text) != terminal


def test_wandb_offline_writes_its_files_without_account_or_network(make_config, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    config = make_config("train.wandb.mode=offline", "train.steps=3")
    run = tmp_path / "run"
    out = io.StringIO()
    train(config, run, console=Console(file=out, width=200))
    assert "warning" not in out.getvalue()
    run_id = json.loads((run / "manifest.json").read_text())["id"]
    (written,) = run.glob(f"wandb/offline-run-*/run-{run_id}.wandb")
    names = (b"train/loss", b"train/grad_norm", b"eval/bits_per_byte")
    # wandb's own process writes the file, some tenths of a second after `finish` has returned.
    give_up = time.monotonic() + 30
    while not all(name in written.read_bytes() for name in names) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert [name for name in names if name not in written.read_bytes()] == []
    wandb.teardown()


def test_wandb_that_cannot_start_costs_a_warning(make_config, tmp_path, monkeypatch):
    class Fake:
        class Settings:
            def __init__(self, **settings):
                pass

        @staticmethod
        def init(**settings):
            raise RuntimeError("no server")

    monkeypatch.setitem(sys.modules, "wandb", Fake)
    out = io.StringIO()
    config = make_config("train.wandb.mode=online")
    log = open_log(config, tmp_path, "id", Console(file=out, width=200), 0)
    log.record("train", 1, loss=1.0)
    log.close()
    assert "warning: no logging to wandb: RuntimeError: no server" in out.getvalue()
    assert len(read_metrics(tmp_path)) == 1
