"""Jobs: side by side, in order, and a failure is told with what the command said."""

from __future__ import annotations

import io
import os
import signal
import threading
import time

import pytest
from rich.console import Console

from hybrid_lm.jobs import Job, run_jobs

TINY = """
model:
  d_model: 16
  pattern: f
  layers:
    f: {type: mlp, d_ff: 16}
data: {kind: text, path: text.txt, seq_len: 32}
train: {steps: 2, batch_size: 2, eval_batches: 1}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "text.txt").write_text("".join(f"line {i}: to be or not to be\n" for i in range(200)))
    return tmp_path


def job(folder, name, *commands):
    return Job(name, commands, folder / name, 2, folder / "logs" / f"{name}.txt")


@pytest.mark.parametrize("terminal", [True, False])
def test_jobs_run_their_commands_one_after_another(folder, terminal):
    seen = io.StringIO()
    jobs = [
        job(folder, "one", ["train", "tiny.yaml", "--out", "one"], ["eval", "one", "--max-bytes", "500"]),
        job(folder, "two", ["train", "tiny.yaml", "--out", "two", "train.seed=1"]),
    ]
    run_jobs(jobs, console=Console(file=seen, force_terminal=terminal, width=120), workers=2)
    assert (folder / "one" / "results.json").exists()
    assert "two: 2 steps (done)" in (folder / "logs" / "two.txt").read_text()
    assert [one.state() for one in jobs] == [(2, "done"), (2, "done")]
    assert "done" in seen.getvalue()
    assert "one" in seen.getvalue()


def test_a_failure_ends_the_others_and_says_why(folder):
    jobs = [
        job(folder, "bad", ["train", "tiny.yaml", "train.stepz=3", "--out", "bad"]),
        job(folder, "long", ["train", "tiny.yaml", "train.steps=100000", "--out", "long"]),
    ]
    with pytest.raises(ValueError, match=r"bad: hybrid-lm train(.|\n)*train.stepz=3(.|\n)*unknown key"):
        run_jobs(jobs, console=Console(file=io.StringIO()), workers=2)
    assert jobs[1].process is not None
    assert jobs[1].process.poll() is not None, "nothing goes on behind one's back"


def test_a_signal_ends_the_jobs_and_they_can_go_on(folder):
    work = job(folder, "long", ["train", "tiny.yaml", "train.steps=100000", "--out", "long"])

    def send():
        while not (folder / "long" / "metrics.jsonl").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_jobs([work], console=Console(file=io.StringIO()), workers=1)
    assert work.process is not None
    assert work.process.poll() is not None
    assert list((folder / "long" / "checkpoints").iterdir()), "it saved before it went"
