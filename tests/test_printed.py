"""Everything that README and the headers of the configurations print is run as it stands, only made small."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_lm import show
from hybrid_lm.cli import main
from hybrid_lm.config.load import config_names, configs_dir, parse_config
from hybrid_lm.config.yaml import load
from hybrid_lm.train.checkpoint import newest
from hybrid_lm.train.run import read_manifest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

SMALL = {
    "train": ["train.steps=2", "train.schedule.warmup_steps=1", "train.eval_batches=1", "data.seq_len=32"],
    "probe": ["train.steps=2", "train.schedule.warmup_steps=1", "data.n_test=4"],
    "demo": ["--fast"],
    "eval": ["--max-bytes", "2000"],
}
"""What makes a command take seconds: the last of repeated overrides counts."""


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(command: str) -> None:
    """Runs one printed command, made small, in this process."""
    words = shlex.split(command)
    assert words[0] == "hybrid-lm", command
    examples_only = words[1] == "probe" and "--show" in words
    small = [] if examples_only else SMALL.get(words[1], [])
    # A run that is gone on with has more steps to do, as in the original.
    more = ["train.steps=3"] if "--resume" in words else []
    assert main([*words[1:], *small, *more]) == 0, command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with some text of the user's in it."""
    monkeypatch.chdir(tmp_path)
    text = Path(os.__file__).read_text(encoding="utf-8")
    (tmp_path / "shakespeare.txt").write_text(text[:40_000], encoding="utf-8")
    return tmp_path


def test_every_command_of_the_readme(folder):
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    assert len(commands) > 12
    for command in commands:
        if command == "./run test":
            # This is it.
            assert os.access(ROOT / "run", os.X_OK)
        else:
            run(command.replace("./run demo", "hybrid-lm demo"))
    (resumed,) = re.findall(r"hybrid-lm train (\S+) --resume", README)
    history = read_manifest(folder / resumed)["history"]
    assert [entry["resumed_at_step"] for entry in history] == [2]
    assert newest(folder / resumed).name == "step-00000003"
    for page in (folder / "runs/demo/report.html", folder / "report.html"):
        assert "<img" in page.read_text(encoding="utf-8")
    for code in blocks("python"):
        env = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_readmes_yaml_is_a_configuration():
    (text,) = blocks("yaml")
    config = parse_config({**load(text).data, "data": {"kind": "text"}})
    assert config.model.pattern == "(m f w f)x6"


def test_the_readmes_table_of_layers_is_the_table_of_layers():
    assert show.layers() in README, "paste the output of `hybrid-lm show layers`"


@pytest.mark.parametrize("name", config_names())
def test_the_command_in_a_configurations_header(name, folder):
    path = configs_dir() / f"{name}.yaml"
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    commands = [line.removeprefix("#").strip() for line in header if line.startswith("#   ")]
    assert commands, f"{name}: the header has no command"
    for command in commands:
        assert name in command
        extra = " data.path=shakespeare.txt" if command.startswith("hybrid-lm train") else ""
        run(command + extra)


def test_the_index_of_configurations_names_each():
    index = (configs_dir() / "README.md").read_text(encoding="utf-8")
    for name in config_names():
        last = name.rsplit("/", 1)[-1]
        assert any(form in index for form in (f"`{name}`", f"`{last}`", f"/{last}`")), name


def test_links_of_the_documents_lead_somewhere():
    for document in ("README.md", "CONTRIBUTING.md", "configs/README.md", "evals/README.md"):
        path = ROOT / document
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{document}: {target}"
