"""The command line: help with examples, one message and code 2 for mistakes, a traceback on request."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybrid_lm.cli import VERBS, main, parse

TINY = """
model:
  d_model: 16
  pattern: m f
  layers:
    m: {type: mamba2, d_state: 4, head_dim: 8}
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


@pytest.fixture
def run(folder, capsys):
    assert main(["train", "tiny.yaml", "--out", "run"]) == 0
    capsys.readouterr()
    return folder / "run"


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help_with_an_example_that_parses(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    example = VERBS[verb].example
    assert example in " ".join(capsys.readouterr().out.split())
    assert parse(example.replace("'", "").split()[1:]).verb == verb


def test_help_needs_no_torch():
    code = (
        "import sys; from hybrid_lm.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "tiny.yaml", "train.stepz=3"], "override train.stepz=3"),
        (["train", "tiny.yaml", "model.pattern=m q"], "unknown layer 'q'; known: f, m (column 3)"),
        (["train", "nothing.yaml"], "nothing.yaml"),
        (["train", "demo/sambo"], "demo/samba"),
        (["train", "tiny.yaml", "data.path=absent.txt"], "absent.txt"),
        (["train", "tiny.yaml", "model.layers.m.head_dim=5"], "5 does not divide the inner width 32"),
        (["train", "tiny.yaml", "train.device=gpu"], "gpu"),
        (["train", "tiny.yaml", "train.backend=native"], "native"),
        (["eval", "absent"], "absent"),
        (["generate", "absent"], "absent"),
        (["export", "absent", "--out", "x"], "absent"),
        (["report", "absent"], "absent"),
        (["compare", "absent", "other"], "absent"),
        (["probe", "mqar", "n_pair=3"], "Did you mean 'n_pairs'"),
        (["probe", "tiny.yaml"], "data.kind"),
        (
            ["prepare", "text.txt", "--out", "s", "--tokenizer", "huggingface"],
            "say bytes, bpe, or",
        ),
        (["prepare", "absent", "--out", "s"], "absent"),
        (["show", "demo/sambo"], "demo/samba"),
        (["check", "tiny.yaml", "model.d_model=-1"], "model.d_model"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(words, message, folder, capsys):
    (folder / "runs").mkdir()
    before = sorted(path.name for path in folder.rglob("*"))
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert err.splitlines()[-1 if words[-1].startswith("data.") else 0].startswith(f"hybrid-lm {words[0]}: ")
    assert sorted(path.name for path in folder.rglob("*")) == before, "nothing is left behind"


def test_debug_shows_the_traceback(folder):
    with pytest.raises(ValueError, match=r"nothing\.yaml"):
        main(["train", "nothing.yaml", "--debug"])


def test_unknown_arguments_are_refused(folder, capsys):
    for words in (["eval", "run", "train.steps=3"], ["train", "tiny.yaml", "--steps", "3"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *(
            (
                [*verb, option, bad],
                f"argument {option}: '{bad}': a whole number of at least {least} is needed",
            )
            for verb, option, least in [
                (["eval", "run"], "--batch-size", 1),
                (["eval", "run"], "--stride", 1),
                (["eval", "run"], "--limit", 1),
                (["eval", "run"], "--max-bytes", 1),
                (["eval", "run"], "--step", 1),
                (["generate", "run"], "--max-new-tokens", 1),
                (["generate", "run"], "--top-k", 1),
                (["generate", "run"], "--seed", 0),
                (["check", "tiny.yaml"], "--tokens", 8),
                (["probe", "mqar"], "--show", 1),
                (["probe", "mqar"], "--seeds", 0),
                (["prepare", "text.txt", "--out", "s"], "--workers", 1),
                (["prepare", "text.txt", "--out", "s"], "--vocab-size", 1),
                (["show", "tiny.yaml"], "--context", 1),
            ]
            for bad in (str(least - 1), "-7", "a", "1.5", "")
        ),
        (["probe", "mqar", "--seeds", "0,1,"], "argument --seeds: '': a whole number"),
        (["generate", "run", "--seed", str(2**63)], "a seed is less than 2^63"),
        (["generate", "run", "--seed", "9" * 5000], "a whole number of at least 0"),
        (["generate", "run", "--stop", ""], "an empty text ends every answer before it begins"),
    ],
)
def test_a_wrong_count_is_told_before_anything_is_done(words, message, folder, capsys):
    *before, option, bad = words
    with pytest.raises(SystemExit) as stop:
        main([*before, f"{option}={bad}"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["text.txt", "tiny.yaml"]


@pytest.mark.parametrize("prompt", ["", "\0", "é\u2028😀", "<|endoftext|>"])
def test_any_text_is_a_prompt(run, capsys, prompt):
    assert main(["generate", "run", "--prompt", prompt, "--max-new-tokens", "3", "--seed", "0"]) == 0
    assert capsys.readouterr().out.startswith(prompt)


def test_a_prompt_of_broken_bytes_is_one_message(run, capsys):
    assert main(["generate", "run", "--prompt", b"caf\xe9".decode(errors="surrogateescape")]) == 2
    captured = capsys.readouterr()
    assert captured.err == "hybrid-lm generate: --prompt 'caf\\udce9': not UTF-8 text\n"
    assert not captured.out


def test_a_run_is_not_overwritten_without_being_asked(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["train", "tiny.yaml", "--out", "run"]) == 2
    err = capsys.readouterr().err
    assert "--resume" in err or "resume" in err
    assert "overwrite" in err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_from_end_to_end(run, capsys):
    assert main(["train", "run", "--resume", "train.steps=3"]) == 0
    assert "run: 3 steps (done)" in capsys.readouterr().out
    assert main(["eval", "run", "--max-bytes", "500"]) == 0
    assert "m f" in capsys.readouterr().out
    assert json.loads((run / "results.json").read_text())["text"]["bits_per_byte"] > 0
    assert main(["generate", "run", "--prompt", "line", "--max-new-tokens", "5", "--seed", "1"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("line")
    assert main(["generate", "run", "--prompt", "line", "--max-new-tokens", "5", "--seed", "1"]) == 0
    assert capsys.readouterr().out == first
    assert main(["generate", "run", "--prompt", "a", "--prompt", "longer", "--max-new-tokens", "4"]) == 0
    assert "--- 'longer'" in capsys.readouterr().out
    assert main(["show", "run"]) == 0
    assert "m f" in capsys.readouterr().out


def test_show_yaml_is_a_configuration(folder, capsys):
    assert main(["show", "tiny.yaml", "--yaml", "train.steps=7"]) == 0
    Path("again.yaml").write_text(capsys.readouterr().out)
    assert main(["show", "again.yaml", "--yaml"]) == 0
    assert capsys.readouterr().out == Path("again.yaml").read_text()


def test_check_prints_a_line_per_law_and_fails_on_a_broken_one(folder, capsys, monkeypatch):
    assert main(["check", "tiny.yaml", "--no-compile", "--tokens", "30"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert all(line.startswith("ok") and "bound" in line for line in lines[1:])
    monkeypatch.setattr("hybrid_lm.laws.SLACK", 0)
    assert main(["check", "tiny.yaml", "--no-compile", "--tokens", "30"]) == 2
    captured = capsys.readouterr()
    assert "BROKEN" in captured.out
    assert "laws broken" in captured.err


def test_prepare_writes_a_store_that_trains(folder, capsys):
    assert main(["prepare", "text.txt", "--out", "store", "--val-fraction", "0.2"]) == 0
    assert "vocabulary of 258" in capsys.readouterr().out
    assert main(["prepare", "text.txt", "--out", "store"]) == 2
    assert main(["train", "tiny.yaml", "data.path=store", "--out", "other"]) == 0


def test_a_read_only_disk_is_one_message(folder, capsys, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    assert main(["train", "tiny.yaml", "--out", "run"]) == 2
    err = capsys.readouterr().err
    assert "Read-only file system" in err
    assert "Traceback" not in err


def test_only_one_process_trains_a_run(run, capsys):
    from hybrid_lm.train.run import locked

    with locked(run):
        assert main(["train", "run", "--resume", "train.steps=9"]) == 2
    assert "another process is training this run" in capsys.readouterr().err
    assert main(["train", "run", "--resume", "train.steps=3"]) == 0


def test_a_run_that_came_to_nothing_is_no_success(folder, capsys):
    assert (
        main(["train", "tiny.yaml", "train.optimizer.lr=1e18", "train.steps=4", "train.clip_norm=null"]) == 2
    )
    assert "no finite number" in capsys.readouterr().err


def test_a_model_beyond_the_memory_is_refused(folder, capsys):
    assert main(["train", "tiny.yaml", "model.d_model=800000", "--out", "big"]) == 2
    assert "GB of memory" in capsys.readouterr().err
    assert not (folder / "big").exists()


def test_an_interrupted_run_is_no_success(folder):
    words = ["train", "tiny.yaml", "train.steps=100000"]
    code = f"import sys; from hybrid_lm.cli import main; sys.exit(main({words!r}))"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while not (folder / "runs" / "tiny" / "metrics.jsonl").exists():
        time.sleep(0.1)
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 130


def test_resume_stays_where_the_run_is(run, capsys):
    assert main(["train", "run", "--resume", "--out", "elsewhere"]) == 2
    assert "goes on where it is" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["show", "tiny.yaml"], ["train", "tiny.yaml", "train.steps=3"], ["show", "tiny.yaml", "--yaml"]]
)
def test_a_reader_that_goes_away_ends_nothing(words, folder):
    code = f"import sys; from hybrid_lm.cli import main; sys.exit(main({words!r}))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert child.stdout is not None
    child.stdout.close()
    assert child.wait(60) == 0
    if words[0] == "train":
        assert (folder / "runs" / "tiny" / "checkpoints" / "step-00000003").is_dir()
