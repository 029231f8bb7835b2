"""The log: JSON lines that survive a crash, a terminal or not, wandb offline, and sinks that fail alone."""

from __future__ import annotations

import io
import json
import os
import sys
import time

import pytest
from rich.console import Console

from hybrid_lm.train.log import ConsoleSink, JsonlSink, Log, brief, drop_after, open_log, read_metrics
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
def test_a_reader_that_leaves_ends_the_lines_and_not_the_run(terminal, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)  # `| head` after its last line
    stdout = os.dup(1)
    file = os.fdopen(writer, "w")
    try:
        console = Console(file=file, force_terminal=terminal, width=80)
        log = Log(console, [JsonlSink(tmp_path / "metrics.jsonl")])
        log.add("the terminal", lambda: ConsoleSink(console, steps=10, step=0))
        for step in range(1, 11):
            log.record("train", step, loss=1.0)
        assert [sink.name for sink in log.sinks] == ["metrics.jsonl"]
        log.close()
    finally:
        os.dup2(stdout, 1)  # rich points standard output elsewhere
        os.close(stdout)
        with pytest.raises(BrokenPipeError):
            file.close()
    assert len(read_metrics(tmp_path)) == 10


def test_a_terminal_that_fails_cannot_be_told_and_the_run_goes_on(tmp_path):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    console = Console(file=Gone())
    log = Log(console, [ConsoleSink(console, steps=10, step=0), JsonlSink(tmp_path / "metrics.jsonl")])
    log.record("train", 1, loss=1.0)
    log.close()
    assert len(read_metrics(tmp_path)) == 1


def test_progress_fits_80_columns_and_leaves_a_line_at_every_tenth():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    sink = ConsoleSink(console, steps=2_000_000, step=0)
    for step in range(50_000, 2_000_001, 50_000):
        sink.write({"kind": "train", "step": step, "loss": 11.2345, "lr": 3e-4, "tokens_per_s": 1_234_567.0})
    assert sink.progress is not None
    shown = console.render_lines(sink.progress.get_renderable())
    sink.close()
    (line,) = ("".join(part.text for part in line) for line in shown)
    assert "step 2000000/2000000 loss 11.2345  1.23M tok/s eta " in line
    assert "…" not in line
    kept = [line for line in out.getvalue().splitlines() if "lr 3.00e-04" in line]
    assert len(kept) == 10
    assert brief({"loss": None, "tokens_per_s": 999_700.0}) == "1000k tok/s"


@pytest.mark.parametrize("terminal", [False, True])
def test_plain_lines_or_a_bar(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    log = Log(console, [ConsoleSink(console, steps=20, step=0)])
    log.record("train", 1, loss=1.25, lr=1e-3, grad_norm=2.0, tokens_per_s=1000.0, skipped=0)
    log.record("eval", 5, nll=1.5, bits_per_byte=2.25, seconds=1.0)
    log.close()
    text = out.getvalue()
    assert "eval  nll 1.5000  bits_per_byte 2.2500" in text
    assert ("eta" in text) == terminal
    assert ("step  1/20  loss 1.2500  lr 1.00e-03  grad_norm 2.00  1,000 tokens/s" in text) != terminal


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
