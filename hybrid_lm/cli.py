"""The command line: one thin verb for each thing that the package does.

A mistake of the user is one clear message and exit code 2; `--debug` shows the traceback. torch is imported
by the verbs that compute, not by `--help`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hybrid_lm import __version__

Arguments = argparse.Namespace


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


def train(a: Arguments) -> None:
    from hybrid_lm.config.load import load_config
    from hybrid_lm.train.loop import train
    from hybrid_lm.train.run import is_run

    if a.resume and is_run(Path(a.config)):
        # `train RUN --resume`: the run knows its configuration.
        config, out = load_config(Path(a.config) / "config.yaml", a.overrides), Path(a.config)
    else:
        config, out = load_config(a.config, a.overrides), Path(a.out or default_run(a.config))
    result = train(config, out, resume=a.resume, overwrite=a.overwrite)
    for key, value in sorted(result.metrics.items()):
        if key.startswith(("accuracy/", "bits_per_byte", "nll")):
            say(f"{key}: {value:.4f}")
    say(f"{result.run_dir}: {result.step} steps ({result.stopped})")


def default_run(config: str) -> str:
    """`runs/recall-mqar_small` for the configuration `recall/mqar_small` or a file of that name."""
    name = Path(config).with_suffix("")
    return str(Path("runs") / (name.name if Path(config).is_file() else "-".join(name.parts)))


def evaluate(a: Arguments) -> None:
    from hybrid_lm.eval.run import evaluate_run
    from hybrid_lm.eval.summary import read_runs
    from hybrid_lm.eval.table import print_table, results_table

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
    print_table(console(), "", *results_table(read_runs([a.run])))


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
        seeds=[int(seed) for seed in a.seeds.split(",")],
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
        raise ValueError(f"{a.run} was trained on a probe, which has no text; generate needs a run on text")
    tokenizer, prompts = run.tokenizer, a.prompt or [""]

    def show(row: int, token: int, text: str | None) -> None:
        if len(prompts) == 1:
            print(text or "", end="", flush=True)

    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
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
    from hybrid_lm.config.load import load_config
    from hybrid_lm.laws import LAWS, compiled_is_eager, subject

    config = load_config(a.config, a.overrides).model
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
    elif a.yaml:
        from hybrid_lm.config.load import dump_yaml

        print(dump_yaml(show.configuration(a.config, a.overrides)), end="")
    else:
        show.architecture(show.configuration(a.config, a.overrides), a.context, console())


def export(a: Arguments) -> None:
    import torch

    from hybrid_lm.hf.convert import export
    from hybrid_lm.train.checkpoint import load_run

    dtype = None if a.dtype is None else getattr(torch, a.dtype)
    run = load_run(a.run, step=a.step)
    length = getattr(run.config.data, "seq_len", None)
    folder = export(run, a.out, dtype=dtype, overwrite=a.overwrite, max_length=length)
    say(f"{folder}: exported, loaded in a process of its own and compared; see hybrid_lm_export.json")


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


def demo(a: Arguments) -> None:
    from hybrid_lm.demo import demo

    demo(Path(a.out), fast=a.fast)


class Verb(NamedTuple):
    """A verb of the command line."""

    run: Callable[[Arguments], None]
    help: str
    example: str
    arguments: Sequence[tuple[tuple[str, ...], dict[str, Any]]]


def option(*names: str, **how: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """One argument, as `argparse` takes it."""
    return names, how


CONFIG = option("config", help="a YAML file, or the name of a shipped one: recall/mqar_small")
OVERRIDES = option(
    "overrides", nargs="*", metavar="key=value", help="changes: train.steps=100 model.pattern='m f'"
)
RUN = option("run", help="the folder of a run")
STEP = option("--step", type=int, help="the checkpoint of this step instead of the newest")
OVERWRITE = option("--overwrite", action="store_true", help="replace what is there")

VERBS = {
    "prepare": Verb(
        prepare,
        "text to a token store",
        "hybrid-lm prepare stdlib --out runs/data/stdlib",
        [
            option("path", help="a text, JSONL or Parquet file, a folder, or stdlib"),
            option("--out", required=True, help="where the store goes"),
            option("--tokenizer", default="bytes", help="bytes, bpe, or huggingface:FOLDER"),
            option("--vocab-size", type=int, help="entries of a bpe"),
            option("--val-fraction", type=float, default=0.05, help="part of the documents held out"),
            option("--workers", type=int, help="processes"),
            OVERWRITE,
        ],
    ),
    "train": Verb(
        train,
        "train a model",
        "hybrid-lm train demo/samba data.path=shakespeare.txt --out runs/shakespeare",
        [
            option("config", help="a YAML file, a shipped name, or with --resume the folder of a run"),
            OVERRIDES,
            option("--out", help="the run's folder; by default runs/NAME"),
            option("--resume", action="store_true", help="go on from the newest checkpoint"),
            OVERWRITE,
        ],
    ),
    "eval": Verb(
        evaluate,
        "bits per byte, recall, lm-eval tasks",
        "hybrid-lm eval runs/demo-samba --max-bytes 100000",
        [
            RUN,
            STEP,
            option("--max-bytes", type=int, help="of held-out text, whole documents"),
            option("--stride", type=int, help="tokens between windows; by default the whole window"),
            option("--batch-size", type=int, default=8, help="windows in a forward pass"),
            option("--tasks", help="lm-eval tasks, with commas"),
            option("--include-path", help="a folder of lm-eval task files"),
            option("--limit", type=int, help="documents per lm-eval task"),
        ],
    ),
    "probe": Verb(
        probe,
        "train and test on a recall probe, or show its examples",
        "hybrid-lm probe mqar --preset ci --show 1",
        [
            option("config", help="a probe's configuration, or the name of a probe to show examples of"),
            OVERRIDES,
            option("--seeds", default="0", help="one run each: 0,1,2"),
            option("--out", help="the folder of the runs; by default runs/NAME"),
            option("--preset", default="small", help="of the examples shown"),
            option("--show", type=int, default=1, help="number of examples shown"),
        ],
    ),
    "generate": Verb(
        generate,
        "text from a run",
        "hybrid-lm generate runs/demo-samba --prompt 'def ' --max-new-tokens 60 --seed 0",
        [
            RUN,
            STEP,
            option("--prompt", action="append", help="what to continue; several are one batch"),
            option("--max-new-tokens", type=int, default=256),
            option("--temperature", type=float, default=0.8, help="0: the most likely token"),
            option("--top-k", type=int, help="only the k most likely tokens"),
            option("--top-p", type=float, help="only the fewest tokens with this probability"),
            option("--stop", action="append", default=[], help="text that ends it; may be given again"),
            option("--seed", type=int, help="for a repeatable draw"),
            option("--device", default="auto"),
        ],
    ),
    "check": Verb(
        check,
        "apply the laws to a configuration",
        "hybrid-lm check demo/samba --no-compile",
        [
            CONFIG,
            OVERRIDES,
            option("--whole", action="store_true", help="all layers, not each distinct one twice"),
            option("--tokens", type=int, help="length of the sequences; by default beyond the windows"),
            option("--no-compile", action="store_true", help="leave torch.compile out (it is slow)"),
        ],
    ),
    "show": Verb(
        show,
        "layers, parameters, memory, operations, backends; runs nothing",
        "hybrid-lm show demo/samba model.d_model=256",
        [
            option("config", help="a YAML file, a shipped name, the folder of a run, layers, or backends"),
            OVERRIDES,
            option("--context", type=int, default=2048, help="tokens in view, for the operations"),
            option("--yaml", action="store_true", help="the whole configuration, defaults included"),
        ],
    ),
    "export": Verb(
        export,
        "a run to Hugging Face format",
        "hybrid-lm export runs/demo-samba --out exported",
        [
            RUN,
            STEP,
            option("--out", required=True, help="the folder"),
            option("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights"),
            OVERWRITE,
        ],
    ),
    "compare": Verb(
        compare,
        "paired statistics of evaluated runs",
        "hybrid-lm compare runs/demo-transformer runs/demo-samba",
        [
            option("runs", nargs="+", help="their folders"),
            option(
                "--baseline", help="the folder's name that the others are compared with; by default the first"
            ),
            option("--out", help="a .md, .csv or .json file"),
        ],
    ),
    "report": Verb(
        report,
        "one self-contained HTML file of evaluated runs",
        "hybrid-lm report runs/demo-transformer runs/demo-samba --out report.html",
        [
            option("runs", nargs="+", help="their folders"),
            option("--out", default="report.html"),
            option("--title", default="hybrid_lm report"),
        ],
    ),
    "demo": Verb(
        demo,
        "train, measure and export three small models on real text",
        "hybrid-lm demo",
        [
            option("--out", default="runs/demo"),
            option("--fast", action="store_true", help="a few steps of everything, to see that it works"),
        ],
    ),
}


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(
        prog="hybrid-lm", description="State-space and hybrid sequence models: train, measure recall, export."
    )
    top.add_argument("--version", action="version", version=__version__)
    top.add_argument("--debug", action="store_true", help="show tracebacks")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="verb")
    for name, verb in VERBS.items():
        # Overrides may stand among the options.
        sub = verbs.add_parser(name, help=verb.help, description=verb.help, epilog=f"example: {verb.example}")
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        for names, how in verb.arguments:
            sub.add_argument(*names, **how)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 0, 2 for a user's mistake, 130 for an interruption."""
    arguments = parse(argv)
    try:
        VERBS[arguments.verb].run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output, `head` say, has seen enough.
        sys.stderr.close()
        return 0
    except (ValueError, OSError) as error:
        if arguments.debug:
            raise
        print(f"hybrid-lm {arguments.verb}: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str] | None) -> Arguments:
    """Arguments in any order: `key=value` may follow options, which argparse alone does not allow."""
    arguments, rest = parser().parse_known_args(argv)
    stray = [
        word
        for word in rest
        if word.startswith("-") or "=" not in word or not hasattr(arguments, "overrides")
    ]
    if stray:
        parser().error(f"unrecognized arguments: {' '.join(stray)} (see hybrid-lm {arguments.verb} --help)")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def console() -> Any:
    """Where tables go: standard output, as wide as they need where it is not a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def say(text: str) -> None:
    """A line on standard output."""
    print(text, flush=True)


@contextmanager
def progress_bar(what: str):
    """Yields `moved(done, total)`, which draws a bar on a terminal and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    to = Console(stderr=True)
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


if __name__ == "__main__":
    sys.exit(main())
