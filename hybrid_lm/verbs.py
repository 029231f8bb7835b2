"""What each verb of the command line does: thin calls of the package, and lines on standard output.

Everything is imported where it is used: `--help` needs no torch.
"""

from __future__ import annotations

import signal
import sys
from argparse import Namespace as Arguments
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def prepare(a: Arguments) -> None:
    from hybrid_lm.config.schema import TokenizerConfig
    from hybrid_lm.data import prepare

    kind, _, path = a.tokenizer.partition(":")
    if kind not in ("bytes", "bpe", "huggingface") or (kind == "huggingface") != bool(path):
        raise ValueError(f"--tokenizer {a.tokenizer}: say bytes, bpe, or huggingface:FOLDER")
    config = TokenizerConfig(kind=kind, path=path or None, vocab_size=a.vocab_size)
    with progress_bar("preparing") as moved:
        store = prepare(
            a.path,
            a.out,
            config,
            val_fraction=a.val_fraction,
            workers=a.workers,
            overwrite=a.overwrite,
            progress=moved,
        )
    for split in (store.split("train"), store.split("val")):
        say(
            f"{split.name}: {split.n_documents:,} documents, {split.n_bytes:,} bytes, "
            f"{split.n_tokens:,} tokens"
        )
    say(f"{a.out}: vocabulary of {store.vocab_size:,}, fingerprint {store.fingerprint[:16]}")
    for note in store.notes:
        say(note)


def train(a: Arguments) -> int:
    from hybrid_lm.config.load import load_config
    from hybrid_lm.train.loop import train
    from hybrid_lm.train.run import is_run

    if a.resume and is_run(Path(a.config)):
        # `train RUN --resume`: the run knows its configuration.
        config, out = load_config(Path(a.config) / "config.yaml", a.overrides), Path(a.config)
    else:
        config, out = load_config(a.config, a.overrides), Path(a.out or default_run(a.config))
    if a.resume and a.out and out != Path(a.out):
        raise ValueError(
            f"--out {a.out}: {a.config} is a run and goes on where it is; take --out or --resume out"
        )
    result = train(config, out, resume=a.resume, overwrite=a.overwrite)
    for key, value in sorted(result.metrics.items()):
        if key.startswith(("accuracy/", "bits_per_byte", "nll")):
            say(f"{key}: {value:.4f}")
    say(f"{result.run_dir}: {result.step} steps ({result.stopped})")
    # What comes after `&&` is meant for a run that is complete.
    return 128 + signal.Signals[result.stopped] if result.stopped.startswith("SIG") else 0


def default_run(config: str) -> str:
    """`runs/recall-mqar_small` for the configuration `recall/mqar_small` or a file of that name."""
    name = Path(config).with_suffix("")
    return str(Path("runs") / (name.name if Path(config).is_file() else "-".join(name.parts)))


def evaluate(a: Arguments) -> None:
    from hybrid_lm.eval.run import evaluate_run
    from hybrid_lm.eval.summary import read_runs
    from hybrid_lm.eval.table import notes, print_table, results_table

    with progress_bar("evaluating") as moved:
        evaluate_run(
            a.run,
            step=a.step,
            max_bytes=a.max_bytes,
            stride=a.stride,
            batch_size=a.batch_size,
            progress=moved,
        )
    if a.tasks:
        from hybrid_lm.eval.run import evaluate_tasks

        evaluate_tasks(a.run, a.tasks.split(","), step=a.step, include_path=a.include_path, limit=a.limit)
    runs = read_runs([a.run])
    print_table(console(), "", *results_table(runs))
    for note in notes(runs):
        say(note)


def probe(a: Arguments) -> None:
    from hybrid_lm import probes

    if a.config in probes.names():
        given = dict(item.partition("=")[::2] for item in a.overrides)
        from hybrid_lm.config.yaml import value

        shown = probes.get(a.config, a.preset, **{key: value(text) for key, text in given.items()})
        say(shown.describe())
        tokens, labels = shown.generate(a.show, 0, "test")
        for row in range(a.show):
            say("\n" + shown.pretty(tokens[row], labels[row]))
        return
    from hybrid_lm.config.load import load_config
    from hybrid_lm.eval.run import run_probe
    from hybrid_lm.eval.table import print_table

    rows = run_probe(
        load_config(a.config, a.overrides),
        a.out or default_run(a.config),
        seeds=a.seeds,
    )
    header = ["seed", "setting", "accuracy", "95 % interval", "chance", "plateau", "memory bytes"]
    lines = [
        [
            str(row["seed"]),
            " ".join(f"{key}={x}" for key, x in row["setting"].items()),
            f"{row['accuracy']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            f"{row['chance']:.4f}",
            f"{row['plateau']:.3f}",
            f"{row['state_bytes']:,}",
        ]
        for row in rows
    ]
    print_table(console(), "", header, lines)


def generate(a: Arguments) -> None:
    from hybrid_lm.model.generate import generate
    from hybrid_lm.train.checkpoint import load_run
    from hybrid_lm.train.run import pick_device

    run = load_run(a.run, step=a.step, device=pick_device(a.device))
    if run.tokenizer is None:
        why = (
            "was trained on a probe, which has no text"
            if run.config.data.kind == "probe"
            else "has lost its tokenizer"
        )
        raise ValueError(f"{a.run} {why}; generate needs a run on text, with its folder `tokenizer`")
    tokenizer, prompts = run.tokenizer, a.prompt or [""]
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            # Bytes of the command line that are no UTF-8 arrive as lone surrogates.
            raise ValueError(f"--prompt {prompt!r}: not UTF-8 text") from None

    waiting = [prompts[0]]

    def show(row: int, token: int, text: str | None) -> None:
        if len(prompts) == 1:
            # The prompt is printed once everything has been checked.
            print((waiting.pop() if waiting else "") + (text or ""), end="", flush=True)

    done = generate(
        run.model,
        [[tokenizer.eot_id, *tokenizer.encode(prompt).tolist()] for prompt in prompts],
        max_new_tokens=a.max_new_tokens,
        temperature=a.temperature,
        top_k=a.top_k,
        top_p=a.top_p,
        seed=a.seed,
        stop_tokens=[tokenizer.eot_id],
        stop_strings=a.stop,
        decode=tokenizer.decode,
        on_token=show,
    )
    print()
    if len(prompts) > 1:
        for prompt, result in zip(prompts, done, strict=True):
            print(f"--- {prompt!r}\n{prompt}{result.text or ''}")


def check(a: Arguments) -> None:
    from hybrid_lm.laws import LAWS, compiled_is_eager, subject
    from hybrid_lm.show import configuration

    config = configuration(a.config, a.overrides).model
    how = {} if a.tokens is None else {"tokens": a.tokens}
    judged = subject(config, whole=a.whole, **how)
    say(f"{a.config}: {judged.config.pattern} at width {config.d_model}, {judged.tokens} tokens, float64")
    broken = 0
    for law in LAWS:
        if a.no_compile and law is compiled_is_eager:
            continue
        verdict = law(judged)
        word = "--" if verdict.skipped else "ok" if verdict.holds else "BROKEN"
        say(f"{word:6}  {verdict.law:24} {verdict.error:9.2e}  bound {verdict.bound:7.1e}  {verdict.note}")
        broken += not verdict.holds
    if broken:
        raise ValueError(f"{a.config}: {broken} law{'s' * (broken > 1)} broken")


def show(a: Arguments) -> None:
    from hybrid_lm import show

    if a.config == "backends":
        show.backends(console())
    elif a.config == "layers":
        print(show.layers())
    elif a.config == "families":
        print(show.families())
    elif a.yaml:
        from hybrid_lm.config.load import dump_yaml

        print(dump_yaml(show.configuration(a.config, a.overrides)), end="")
    else:
        show.architecture(show.configuration(a.config, a.overrides), a.context, console())


def export(a: Arguments) -> None:
    import torch

    from hybrid_lm.hf.convert import export, read_record
    from hybrid_lm.hf.native import nearest_first
    from hybrid_lm.hf.origin import origin
    from hybrid_lm.hf.verify import show_check
    from hybrid_lm.train.checkpoint import load_run, locate, step_name

    path, stored = locate(a.run, a.step)
    came = origin(path)
    # What was imported and not trained goes out in the type in which it came.
    name = a.dtype or (came.dtype if came and stored.name == step_name(0) else None)
    # Read in that type: there is no second copy of the model.
    run = load_run(stored, dtype=None if name is None else getattr(torch, name))
    length = None if came else getattr(run.config.data, "seq_len", None)
    folder = export(run, a.out, format=a.format, overwrite=a.overwrite, max_length=length)
    record = read_record(folder)
    for reason in nearest_first(record["reasons"]):
        say(reason)
    say(f"{folder}: exported as {record['format']}; see hybrid_lm_export.json")
    say(show_check(record["check"]))


def import_hf(a: Arguments) -> None:
    import torch

    from hybrid_lm.config.load import parse_config
    from hybrid_lm.hf.convert import explicit, from_hf
    from hybrid_lm.hf.origin import check_tokenizer, keep_origin
    from hybrid_lm.hf.verify import show_check
    from hybrid_lm.train.adopt import adopt
    from hybrid_lm.train.run import refuse_existing

    out = Path(a.out)
    refuse_existing(out, a.overwrite)
    checks: list[dict[str, Any]] = []
    model = from_hf(
        a.folder,
        dtype="auto" if a.dtype is None else getattr(torch, a.dtype),
        trust_remote_code=a.trust_remote_code,
        told=checks.append,
    )
    longest = model.config.embedding.max_positions or 256
    data = {"kind": "text", "seq_len": min(256, longest)}
    data["tokenizer"] = {"kind": "huggingface", "path": a.folder}
    written = {"model": explicit(model.config), "data": data}
    config = parse_config(written, "import", a.overrides)
    check_tokenizer(a.folder, config)
    adopt(
        model,
        config,
        out,
        overwrite=a.overwrite,
        console=console(),
        more=lambda folder: keep_origin(a.folder, folder, checks),
    )
    for check in checks:
        say(show_check(check))
    say(f"{out}: imported from {a.folder}; `hybrid-lm train {out} --resume` goes on with it")


def compare(a: Arguments) -> None:
    from hybrid_lm.eval.compare import compare, to_csv, to_json, to_markdown
    from hybrid_lm.eval.summary import read_runs

    rows = compare({run.name: run.results for run in read_runs(a.runs)}, baseline=a.baseline)
    forms = {".md": to_markdown, ".csv": to_csv, ".json": to_json}
    if a.out is None:
        say(to_markdown(rows))
        return
    if Path(a.out).suffix not in forms:
        raise ValueError(f"--out {a.out}: the name decides the form, and must end in {', '.join(forms)}")
    Path(a.out).write_text(forms[Path(a.out).suffix](rows))
    say(a.out)


def report(a: Arguments) -> None:
    from hybrid_lm.eval.report import report

    say(str(report(a.runs, a.out, title=a.title)))


def build_native(a: Arguments) -> None:
    import time

    from hybrid_lm.ops.native.build import build

    begun, compiled = time.perf_counter(), False
    with progress_bar("compiling") as moved:

        def count(done: int, total: int) -> None:
            nonlocal compiled
            if not compiled:
                print(f"compiling the native kernels in {total} steps", file=sys.stderr, flush=True)
            compiled = True
            moved(done, total)

        path = build(a.target, arch=a.arch, sanitize=a.sanitize, force=a.force, progress=count)
    say(f"{path}: {f'built in {time.perf_counter() - begun:.0f} s' if compiled else 'up to date'}")


def bench(a: Arguments) -> int:
    from hybrid_lm.bench.run import bench, ours_are_right

    document = bench(
        a.what,
        out=None if a.out is None else Path(a.out),
        console=console(),
        ops=a.op,
        lengths=a.length,
        only=None if a.only is None else a.only.split(","),
        threads=a.threads,
        repeat=a.repeat,
        compiled=not a.no_compile,
        memory=not a.no_memory,
        dry_run=a.dry_run,
    )
    return 0 if ours_are_right(document) else 1


def demo(a: Arguments) -> None:
    from hybrid_lm.demo import demo

    demo(Path(a.out), fast=a.fast)


def console() -> Any:
    """Where tables go: standard output, as wide as they need where it is not a terminal."""
    from hybrid_lm.terminal import Terminal

    return Terminal(width=None if sys.stdout.isatty() else 160)


def say(text: str) -> None:
    """A line on standard output."""
    print(text, flush=True)


@contextmanager
def progress_bar(what: str):
    """Yields `moved(done, total)`, which draws a bar on a terminal and nothing elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from hybrid_lm.terminal import Terminal

    to = Terminal(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
        console=to,
        disable=not to.is_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
