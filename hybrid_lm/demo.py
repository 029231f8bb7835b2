"""The main job from end to end, on real text: corpus, training, recall, lm-eval, export, report.

Three siblings of equal size, a Transformer, a Mamba-2 and a Samba-style hybrid, are the configurations
`demo/*`; tiny ones of the same patterns (`demo/recall/*`) learn to recall. Each part is a verb of the command
line too. Running it again does only what is missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from hybrid_lm.config.load import dump_yaml, load_config
from hybrid_lm.config.schema import RunConfig, TokenizerConfig
from hybrid_lm.data import TokenStore, is_store, prepare
from hybrid_lm.eval.report import report
from hybrid_lm.eval.results import read_results, read_rows
from hybrid_lm.eval.summary import read_runs
from hybrid_lm.eval.table import print_table, results_table
from hybrid_lm.hf.convert import export
from hybrid_lm.jobs import Job, run_jobs
from hybrid_lm.terminal import Terminal
from hybrid_lm.train.checkpoint import load_run, newest
from hybrid_lm.train.run import is_run

SIBLINGS = ("transformer", "mamba2", "samba")
HYBRID = "samba"
TASK = "hybrid_lm_names"
EVAL_BYTES = 100_000
"""Of held-out text on which bits per byte are reported."""
FAST = ("train.steps=4", "train.schedule.warmup_steps=1", "train.eval_every_steps=4", "train.eval_batches=1")
PROMPT = "def __init__(self"

GENERATE = """
import sys
folder, prompt = sys.argv[1:3]
# A process that has transformers and the exported files: ours cannot be imported.
for name in ("hybrid_lm", "pydantic", "einops"):
    sys.modules[name] = None
from transformers import AutoModelForCausalLM, AutoTokenizer, logging, set_seed
logging.set_verbosity_error()
logging.disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
set_seed(0)
inputs = tokenizer(tokenizer.eos_token + prompt, return_tensors="pt", split_special_tokens=False)
made = model.generate(**inputs, max_new_tokens=160, do_sample=True, temperature=0.7, top_p=0.95)
print(tokenizer.decode(made[0], skip_special_tokens=True))
"""


class Steps:
    """Headings with the time that has passed."""

    def __init__(self, console: Console, n: int):
        self.console, self.n, self.i, self.begin = console, n, 0, time.perf_counter()

    def next(self, text: str) -> None:
        """The heading of the next part."""
        self.i += 1
        self.console.print(f"\n[{self.i}/{self.n}] {text}   ({self.passed()})", markup=False, style="bold")

    def passed(self) -> str:
        """Minutes and seconds since the beginning."""
        seconds = round(time.perf_counter() - self.begin)
        return f"{seconds // 60}:{seconds % 60:02d}"


def demo(out: Path, *, fast: bool = False, console: Console | None = None) -> Path:
    """Runs everything in the folder `out`; returns the path of the report.

    fast: a few steps of everything, for trying whether it works at all; its numbers mean nothing.
    """
    console = console or Terminal(stderr=True)
    steps = Steps(console, 4)
    steps.next("corpus: the Python standard library's own sources, as bytes")
    store = corpus(out / "corpus")
    for split in (store.split("train"), store.split("val")):
        console.print(f"{split.name}: {split.n_documents:,} documents, {split.n_bytes:,} bytes", markup=False)
    steps.next(
        "three siblings learn it and are measured on text they have not seen, by us and by lm-eval; tiny "
        "ones of the same patterns learn to recall (MQAR)"
    )
    # The long ones first: what is left at the end is short.
    work = [language_job(name, out, fast) for name in SIBLINGS] + [
        recall_job(name, out, fast) for name in SIBLINGS
    ]
    run_jobs([job for job in work if job], console=console)
    steps.next(
        f"export of {HYBRID}, and text from a process that has the exported files and transformers only"
    )
    console.print(exported(out / "lm" / HYBRID, out / "export"), markup=False, highlight=False)
    steps.next("report")
    folders = {name: [out / "lm" / name, out / "recall" / name] for name in SIBLINGS}
    page = out / "report.html"
    inputs = [path for path in out.rglob("*.json*") if path.stem in ("results", "metrics")]
    if not page.exists() or page.stat().st_mtime < max(path.stat().st_mtime for path in inputs):
        report(folders, page, title="Transformer, Mamba-2 and a hybrid on real text")
    print_table(Terminal(width=None if sys.stdout.isatty() else 160), "", *results_table(read_runs(folders)))
    facts = read_results(out / "lm" / HYBRID)["text"]["baselines"]
    for name, bits in facts.items():
        console.print(f"{name} on the same bytes: {bits:.3f} bits per byte", markup=False, highlight=False)
    console.print(f"\n{page}   ({steps.passed()})", markup=False, highlight=False)
    return page


def corpus(folder: Path) -> TokenStore:
    """The standard library as a token store."""
    return TokenStore.open(folder) if is_store(folder) else prepare("stdlib", folder, TokenizerConfig())


def language_job(name: str, out: Path, fast: bool) -> Job | None:
    """Training and measuring one sibling; None if that is done."""
    folder = out / "lm" / name
    changes = [f"data.path={json.dumps(str(out / 'corpus'))}", *(FAST if fast else ())]
    config = load_config(f"demo/{name}", changes)
    commands: list[Sequence[str]] = []
    if not complete(folder, config):
        commands.append(train_command(f"demo/{name}", folder, config, changes))
    if commands or not {"text", "harness"} <= set(read_results(folder)):
        size = ["--max-bytes", "2000", "--limit", "8"] if fast else ["--max-bytes", str(EVAL_BYTES)]
        commands.append(["eval", str(folder), *size, "--tasks", TASK])
    log = out / "logs" / f"{name}.txt"
    return (
        Job(f"{name} {config.model.pattern}", commands, folder, config.train.steps, log) if commands else None
    )


def recall_job(name: str, out: Path, fast: bool) -> Job | None:
    """Training and testing one tiny sibling on MQAR; None if that is done."""
    folder, changes = out / "recall" / name, list(FAST if fast else ())
    config = load_config(f"demo/recall/{name}", changes)
    run = folder / f"seed-{config.train.seed}"
    commands: list[Sequence[str]] = []
    if not complete(run, config):
        commands.append(train_command(f"demo/recall/{name}", run, config, changes))
    if commands or not read_rows(folder / "results.jsonl"):
        commands.append(["probe", f"demo/recall/{name}", *changes, "--out", str(folder)])
    log = out / "logs" / f"recall-{name}.txt"
    title = f"recall {name} {config.model.pattern}"
    return Job(title, commands, run, config.train.steps, log) if commands else None


def train_command(config_name: str, folder: Path, config: RunConfig, changes: Sequence[str]) -> list[str]:
    """Going on with a run of the same settings, or a new one."""
    if is_run(folder) and settings(folder) == settings_of(config):
        return ["train", str(folder), "--resume"]
    replace = ["--overwrite"] if is_run(folder) else []
    return ["train", config_name, *changes, "--out", str(folder), *replace]


def complete(folder: Path, config: RunConfig) -> bool:
    """Whether the run has these settings and has reached its last step."""
    if not is_run(folder) or settings(folder) != settings_of(config):
        return False
    last = newest(folder)
    return last is not None and last.name.endswith(f"-{config.train.steps:08d}")


def settings_of(config: RunConfig) -> str:
    """A configuration as text, without the vocabulary, which a run fills in."""
    plain = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": None})})
    return dump_yaml(plain)


def settings(folder: Path) -> str:
    """The same, of a run."""
    return settings_of(load_config(folder / "config.yaml"))


def exported(run: Path, folder: Path) -> str:
    """What a process without hybrid_lm generates from a run's export, which is made if it is not there."""
    trained, text = load_run(run), folder / "sample.txt"
    stamp = f"{run.name}, step {trained.step}, {(run / 'metrics.jsonl').stat().st_mtime_ns}\n"
    if text.exists() and text.read_text(encoding="utf-8").startswith(stamp):
        return text.read_text(encoding="utf-8").removeprefix(stamp)
    length = getattr(trained.config.data, "seq_len", None)
    export(trained, folder, overwrite=folder.exists(), max_length=length)
    child = subprocess.run(
        [sys.executable, "-I", "-c", GENERATE, str(folder.resolve()), PROMPT],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str((folder.parent / ".modules").resolve()),
        },
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise ValueError(f"{folder}: the export does not generate:\n{child.stderr[-2000:]}")
    text.write_text(stamp + child.stdout.strip(), encoding="utf-8")
    return child.stdout.strip()
