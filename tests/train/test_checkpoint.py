"""A checkpoint is whole or not there, and damage is found: by killing, flipping bits and filling disks."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import hybrid_lm
from hybrid_lm.files import DiskError
from hybrid_lm.model.lm import HybridLM
from hybrid_lm.train import checkpoint as checkpoints
from hybrid_lm.train.checkpoint import CheckpointError, load_checkpoint, load_run
from hybrid_lm.train.loop import train

KEEP = 2


def save(run_dir: Path, step: int, keep: int = KEEP) -> Path:
    tensors = {"w": torch.full((64,), float(step))}
    return checkpoints.save(
        run_dir, step, tensors, {"w.exp_avg": tensors["w"] / 2}, {"note": step}, keep=keep
    )


def test_what_was_saved_is_read_and_old_ones_go(tmp_path):
    for step in (1, 2, 30):
        folder = save(tmp_path, step)
    assert [path.name for path in checkpoints.step_folders(tmp_path)] == ["step-00000002", "step-00000030"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir())[0] == "step-00000002"
    assert checkpoints.newest(tmp_path) == folder
    found = checkpoints.read(folder)
    assert (found.step, found.state["note"]) == (30, 30)
    assert torch.equal(found.model["w"], torch.full((64,), 30.0))
    assert torch.equal(found.optimizer["w.exp_avg"], torch.full((64,), 15.0))


@pytest.mark.parametrize("name", [*checkpoints.FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_is_named_and_the_older_one_is_used(tmp_path, name, damage):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    path = bad / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        # The top bit of a byte in the middle: in JSON it makes invalid UTF-8, in tensors another number.
        data[len(data) // 2] ^= 128
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1] if name != "manifest.json" else data[:-2])
    else:
        path.unlink()
    with pytest.warns(UserWarning, match=rf"damaged checkpoint: .*step-00000002/{name}"):
        assert checkpoints.newest(tmp_path) == good


def test_nothing_undamaged_is_an_error_and_nothing_at_all_is_none(tmp_path):
    assert checkpoints.newest(tmp_path) is None
    for step in (1, 2):
        (save(tmp_path, step) / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no undamaged checkpoint: .*step-00000002.*step-00000001"):
        checkpoints.newest(tmp_path)


def test_damaged_ones_after_the_resumed_step_do_not_count_as_newest(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 9) / "state.json").write_text("{}")
    (tmp_path / "checkpoints" / ".new-step-00000010").mkdir()
    (tmp_path / "checkpoints" / ".trash-step-00000000").mkdir()
    checkpoints.sweep(tmp_path, 1)
    save(tmp_path, 5, keep=1)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["damaged-step-00000009", "step-00000005"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fails_in_the_middle_leaves_what_was_there(tmp_path, monkeypatch, code):
    good = save(tmp_path, 1)
    fsync, calls = os.fsync, []

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(DiskError, match=rf"cannot write the checkpoint .*step-00000002: {os.strerror(code)}"):
        save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [good.name]
    checkpoints.verify(good)


def test_too_little_space_is_told_with_sizes(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(DiskError, match=r"a checkpoint needs 1\.0 MB and 0\.0 MB are free"):
        save(tmp_path, 1)


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from hybrid_lm.train import checkpoint as checkpoints

run, rng = Path(sys.argv[1]), random.Random(0)
torch.set_num_threads(1)

def tensors(step):
    return {"w": torch.full((20000,), float(step))}

def saving(step):
    while True:
        step += 1
        checkpoints.save(run, step, tensors(step), tensors(step), {"note": step}, keep=2)
        (run / "committed").write_text(str(step))

begin = time.monotonic()
step = 1
checkpoints.save(run, step, tensors(step), tensors(step), {"note": step}, keep=2)
typical = time.monotonic() - begin
for kill in range(10):
    child = os.fork()
    if child == 0:
        saving(step)
    time.sleep(rng.uniform(0.1, 4.0) * typical)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    written = (run / "committed").read_text() if (run / "committed").exists() else ""
    for folder in checkpoints.step_folders(run):
        checkpoints.verify(folder)
    newest = checkpoints.newest(run)
    step = checkpoints.read(newest).step if newest else 0
    assert step >= int(written or step), (step, written)
    if newest:
        assert torch.equal(checkpoints.read(newest).model["w"], tensors(step)["w"])
print("saved", step)
"""


def test_kill_9_at_any_moment_leaves_only_whole_checkpoints(tmp_path):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(hybrid_lm.__file__).parents[1]),
    }
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    # The first was saved in peace: there was something to hit.
    assert int(done.stdout.split()[1]) > 1


def test_load_run_gives_the_trained_model_and_its_tokenizer(tmp_path, make_config, quiet):
    config = make_config("train.steps=4", "train.save_every_steps=2", "train.keep=5")
    train(config, tmp_path / "run", console=quiet)
    run = load_run(tmp_path / "run")
    assert (run.step, run.path, run.config.model.vocab_size) == (4, tmp_path / "run", 258)
    assert run.tokenizer is not None
    assert run.tokenizer.decode(run.tokenizer.encode("abc")) == "abc"
    assert isinstance(run.model, HybridLM)
    assert not run.model.training
    stored = checkpoints.read(tmp_path / "run" / "checkpoints" / "step-00000004")
    weights = checkpoints.weights(run.model)
    assert weights.keys() == stored.model.keys()
    assert all(torch.equal(weights[name], x) for name, x in stored.model.items())

    older = load_run(tmp_path / "run", step=2)
    assert older.step == 2
    assert load_run(tmp_path / "run" / "checkpoints" / "step-00000002").path == tmp_path / "run"
    narrow = load_checkpoint(tmp_path / "run", dtype=torch.bfloat16)
    kinds = {name: x.dtype for name, x in narrow.named_parameters()}
    assert {dtype for name, dtype in kinds.items() if name.endswith(("A_log", "dt_bias", "D"))} == {
        torch.float32
    }
    assert kinds["embed.weight"] == torch.bfloat16

    assert hybrid_lm.load_checkpoint is load_checkpoint


def test_each_thing_that_is_no_checkpoint_has_its_message(tmp_path, make_config, quiet):
    with pytest.raises(CheckpointError, match="nowhere: no such folder; `hybrid-lm train` makes one"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"not a run's folder: it has no config\.yaml"):
        load_run(tmp_path)
    run = tmp_path / "run"
    train(make_config("train.steps=2"), run, console=quiet)
    with pytest.raises(CheckpointError, match="no checkpoint of step 1; there are: 2"):
        load_run(run, step=1)

    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("pattern: m f", "pattern: m f f"))
    with pytest.raises(CheckpointError, match="written by another architecture"):
        load_run(run)
    (run / "config.yaml").write_text(text)
    # A step that is asked for by name is never replaced by another one.
    (run / "checkpoints" / "step-00000002" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: 0 bytes, [0-9]+ were written"):
        load_run(run, step=2)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        load_run(run)


def test_weights_of_another_shape_are_refused(hybrid_config):
    from hybrid_lm.model.build import build_model

    model = build_model(hybrid_config)
    tensors = dict(checkpoints.weights(model))
    tensors["embed.weight"] = tensors["embed.weight"][1:]
    with pytest.raises(
        CheckpointError, match=r"1 parameters differ, first embed\.weight: \(60, 32\) in the file"
    ):
        checkpoints.load_weights(model, tensors, Path("x"))
