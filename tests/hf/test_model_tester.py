"""transformers' own common tests of models, run on our class from a copy of its sources.

The sources are those of the installed version, of which the package has no tests:

    pip download transformers==VERSION --no-deps --no-binary :all: -d SOMEWHERE   and unpack it
    pip install parameterized
    HYBRID_LM_TRANSFORMERS_SRC=SOMEWHERE/transformers-VERSION pytest tests/hf/test_model_tester.py

`python tests/hf/test_model_tester.py` writes what was found to evals/results/hf/model_tester.md.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REPORT = ROOT / "evals/results/hf/model_tester.md"
SOURCE = os.environ.get("HYBRID_LM_TRANSFORMERS_SRC")
MISSING = {
    "exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}
"""Modules that their tests import and that a source distribution leaves out, each with what stands in."""
KNOWN: dict[str, str] = {}
"""Tests that fail (Model.test), and why that is right."""


HEAD = """# transformers' own model tests

`ModelTesterMixin`, `ConfigTester` and `TrainingTesterMixin` of transformers {version} on
`HybridLMForCausalLM`, on a CPU. The tests are run from the source distribution and are not part of this
repository. `tests/hf/test_model_tester.py` says how to run them again; this file is written by

    HYBRID_LM_TRANSFORMERS_SRC=... RUN_SLOW=1 python tests/hf/test_model_tester.py

Four models of two residual layers: Tied (Mamba-2, then attention beside an MLP), Shared (Zamba's injected
blocks, twice, with adapters), Untied (Mamba beside a short convolution, attention beside Mamba-2, learned
positions, output bias, softcap), Experts (attention, mixture of experts). Two names of theirs are replaced:
their table of causal models also lists ours, and the base class of layers that are computed again stands for
our residual layer.
"""
NO_GENERATION = """The generation tests (`GenerationTesterMixin`) are not in the source distribution; with a
checkout of the repository in its place they run too. `tests/hf/test_tools.py` has our own: every way to
generate, with every memory, on several architectures.
"""


class Outcome(NamedTuple):
    """One test of theirs on one of our models."""

    model: str
    test: str
    result: str
    """passed, failed or skipped"""
    reason: str

    @property
    def known(self) -> str | None:
        """Why it fails, if that is right."""
        return KNOWN.get(f"{self.model}.{self.test}")


def lay_out(source: Path, folder: Path) -> Path:
    """A test package in `folder`: links to theirs, and our case; returns the case."""
    package = folder / "tests"
    package.mkdir(parents=True)
    for path in (source / "tests").iterdir():
        if path.suffix == ".py" or path.name in ("exporters", "generation", "utils"):
            (package / path.name).symlink_to(path)
    for name, text in MISSING.items():
        if not (package / name).exists():
            (package / name).parent.mkdir(exist_ok=True)
            (package / name).write_text(text)
    case = package / "hybrid_lm" / "test_modeling_hybrid_lm.py"
    case.parent.mkdir()
    for path in (package, case.parent, *(package / name for name in ("exporters", "generation", "utils"))):
        if not (path / "__init__.py").exists():
            (path / "__init__.py").touch()
    shutil.copy(HERE / "model_tester_case.py", case)
    return case


def outcomes(source: Path, folder: Path) -> list[Outcome]:
    """Runs their tests in a process of its own, and reads what came of each."""
    case = lay_out(source, folder)
    found = folder / "found.xml"
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}",
    }
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "--rootdir",
        str(folder),
        f"--junitxml={found}",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(case)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode in (0, 1), run.stdout[-3000:] + run.stderr[-3000:]
    return sorted(read(found))


def read(found: Path) -> list[Outcome]:
    """The outcomes in a report of pytest; what fails in a part of a test fails the test."""
    tests: dict[tuple[str, str], tuple[str, str]] = {}
    for node in ET.parse(found).getroot().iter("testcase"):
        model = node.get("classname", "").rpartition(".")[2].removesuffix("Test")
        name = node.get("name", "").partition(" ")[0]
        failed = [child for child in node if child.tag in ("failure", "error")]
        skipped = next((child for child in node if child.tag == "skipped"), None)
        if failed:
            tests[model, name] = ("failed", (failed[0].get("message") or "").split("\n")[0])
        elif (model, name) not in tests or tests[model, name][0] != "failed":
            reason = "" if skipped is None else (skipped.get("message") or "")
            tests[model, name] = ("passed" if skipped is None else "skipped", reason)
    return [Outcome(*key, *value) for key, value in tests.items()]


@pytest.mark.skipif(SOURCE is None, reason="HYBRID_LM_TRANSFORMERS_SRC: no sources of transformers")
def test_their_common_tests_pass(tmp_path):
    pytest.importorskip("parameterized")
    found = outcomes(Path(SOURCE or ""), tmp_path / "suite")
    failed = {
        f"{o.model}.{o.test}: {o.reason}" for o in found if o.result == "failed" and o.test not in KNOWN
    }
    assert not failed
    # So that nothing passes because nothing ran.
    assert sum(o.result == "passed" for o in found) > 200


def report(found: list[Outcome], version: str, generation: bool) -> str:
    """The outcomes for people."""
    models = list(dict.fromkeys(o.model for o in found))
    lines = [HEAD.format(version=version), "" if generation else NO_GENERATION]
    lines += ["| model | passed | failed | skipped |", "|---|---|---|---|"]
    for model in models:
        count = Counter(o.result for o in found if o.model == model)
        lines.append(f"| {model} | {count['passed']} | {count['failed']} | {count['skipped']} |")
    for result, title in (("failed", "Failed"), ("skipped", "Skipped, in their words")):
        groups: dict[str, set[str]] = defaultdict(set)
        for o in found:
            if o.result == result:
                groups[o.known or o.reason].add(o.test)
        lines += ["", f"## {title}", "", *([] if groups else ["None."])]
        for reason, tests in sorted(groups.items()):
            of = [
                m
                for m in models
                if any(o.model == m and o.test in tests and o.result == result for o in found)
            ]
            whom = "" if of == models else f" ({', '.join(of)})"
            lines.append(f"- {reason}{whom}: {names(tests)}")
    passed = {o.test for o in found} - {o.test for o in found if o.result != "passed"}
    return "\n".join([*lines, "", "## Passed by all four", "", f"{names(passed)}.", ""])


def names(tests: set[str]) -> str:
    """Names in order; of a test with many settings one, with their number."""
    # Settings are numbered; a number behind `attn` is a version.
    short = Counter(re.sub(r"(?<!attn)_\d+(_.*)?$", "", test) for test in tests)
    return ", ".join(f"`{name}`" + (f" ({n} settings)" if n > 1 else "") for name, n in sorted(short.items()))


if __name__ == "__main__":
    if SOURCE is None or importlib.util.find_spec("parameterized") is None:
        raise SystemExit(__doc__)
    import transformers

    with tempfile.TemporaryDirectory() as temporary:
        results = outcomes(Path(SOURCE), Path(temporary) / "suite")
    whole = (Path(SOURCE) / "tests/generation/test_utils.py").is_file()
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(report(results, transformers.__version__, whole), encoding="utf-8")
    print(REPORT.read_text(encoding="utf-8")[:3000])
