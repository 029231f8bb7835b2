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
from pathlib import Path
from typing import Any

from rich.console import Console

from hybrid_lm.config.load import dump_yaml, load_config
from hybrid_lm.config.schema import TokenizerConfig
from hybrid_lm.data import TokenStore, is_store, prepare
from hybrid_lm.eval.report import report
from hybrid_lm.eval.results import read_results, read_rows
from hybrid_lm.eval.run import evaluate_run, evaluate_tasks, run_probe
from hybrid_lm.eval.summary import read_runs
from hybrid_lm.eval.table import print_table, results_table
from hybrid_lm.hf.convert import export
from hybrid_lm.train.checkpoint import load_run, newest
from hybrid_lm.train.loop import train
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
    console = console or Console(stderr=True)
    steps = Steps(console, 6)
    steps.next("corpus: the Python standard library's own sources, as bytes")
    store = corpus(out / "corpus")
    for split in (store.split("train"), store.split("val")):
        console.print(f"{split.name}: {split.n_documents:,} documents, {split.n_bytes:,} bytes", markup=False)
    steps.next("three siblings learn it, and are measured on text they have not seen")
    changes = [f"data.path={json.dumps(str(out / 'corpus'))}", *(FAST if fast else ())]
    for name in SIBLINGS:
        language_model(name, out / "lm" / name, changes, fast, console)
    steps.next("tiny ones of the same patterns learn to recall (MQAR)")
    for name in SIBLINGS:
        recall(name, out / "recall" / name, FAST if fast else (), console)
    steps.next(f"lm-eval: {TASK}, which of four names comes again?")
    for name in SIBLINGS:
        if "harness" not in read_results(out / "lm" / name):
            evaluate_tasks(out / "lm" / name, [TASK], limit=8 if fast else None)
        scores = read_results(out / "lm" / name)["harness"]["results"][TASK]
        console.print(f"{name}: accuracy {scores['acc,none']:.3f}   (chance 0.250)", markup=False)
    steps.next(
        f"export of {HYBRID}, and text from it in a process that has the exported files and transformers"
    )
    text = exported(out / "lm" / HYBRID, out / "export")
    console.print(text, markup=False, highlight=False)
    steps.next("report")
    folders = {name: [out / "lm" / name, out / "recall" / name] for name in SIBLINGS}
    page = report(folders, out / "report.html", title="Transformer, Mamba-2 and a hybrid on real text")
    print_table(Console(width=None if sys.stdout.isatty() else 160), "", *results_table(read_runs(folders)))
    console.print(f"\n{page}   ({steps.passed()})", markup=False)
    return page


def corpus(folder: Path) -> TokenStore:
    """The standard library as a token store."""
    return TokenStore.open(folder) if is_store(folder) else prepare("stdlib", folder, TokenizerConfig())


def language_model(name: str, folder: Path, changes: list[str], fast: bool, console: Console) -> None:
    """Trains and evaluates one sibling, unless that is done."""
    config = load_config(f"demo/{name}", changes)
    same = is_run(folder) and settings(folder) == settings_of(config)
    done = same and (last := newest(folder)) is not None and last.name.endswith(f"{config.train.steps:08d}")
    if not done:
        console.print(f"{name}: {config.model.pattern}", markup=False)
        train(config, folder, resume=same, overwrite=is_run(folder) and not same, console=console)
    if not done or "text" not in read_results(folder):
        found = evaluate_run(folder, max_bytes=2_000 if fast else EVAL_BYTES, prompt=PROMPT)
        rows = [(name, found["text"]["bits_per_byte"]), *found["text"]["baselines"].items()]
        console.print(
            "held out, bits per byte   " + "   ".join(f"{k} {v:.3f}" for k, v in rows), markup=False
        )


def settings_of(config: Any) -> str:
    """A configuration as text, without the vocabulary, which a run fills in."""
    plain = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": None})})
    return dump_yaml(plain)


def settings(folder: Path) -> str:
    """The same, of a run."""
    return settings_of(load_config(folder / "config.yaml"))


def recall(name: str, folder: Path, changes: tuple[str, ...] | list[str], console: Console) -> None:
    """Trains and tests one tiny sibling on MQAR, unless that is done."""
    config = load_config(f"demo/recall/{name}", list(changes))
    seed = folder / f"seed-{config.train.seed}"
    if read_rows(folder / "results.jsonl") and is_run(seed) and settings(seed) == settings_of(config):
        return
    console.print(f"{name}: {config.model.pattern}", markup=False)
    if is_run(seed) and settings(seed) != settings_of(config):
        train(config, seed, overwrite=True, console=console)
    rows = run_probe(config, folder, seeds=[config.train.seed], console=console)
    shown = "   ".join(f"{row['setting']['n_pairs']} pairs {row['accuracy']:.2f}" for row in rows)
    console.print(f"recall   {shown}", markup=False)


def exported(run: Path, folder: Path) -> str:
    """Exports a run and returns what a process without hybrid_lm generates from the export."""
    trained = load_run(run)
    export(
        trained, folder, overwrite=folder.exists(), max_length=getattr(trained.config.data, "seq_len", None)
    )
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
    return child.stdout.strip()
