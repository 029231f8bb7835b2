"""The command line: one thin verb for each thing that the package does.

A mistake of the user is one clear message and exit code 2; `--debug` shows the traceback. torch is imported
by the verbs that compute, not by `--help`.
"""

from __future__ import annotations

import argparse
import os
import sys
from argparse import Namespace as Arguments
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hybrid_lm import __version__, verbs


class Verb(NamedTuple):
    """A verb of the command line."""

    run: Callable[[Arguments], int | None]
    help: str
    example: str
    arguments: Sequence[tuple[tuple[str, ...], dict[str, Any]]]


def option(*names: str, **how: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """One argument, as `argparse` takes it."""
    return names, how


def count(least: int = 1) -> Callable[[str], int]:
    """Reads a whole number of at least `least`."""

    def read(text: str) -> int:
        try:
            n = int(text)
        except ValueError:
            n = least - 1
        if n < least:
            raise argparse.ArgumentTypeError(f"{text!r}: a whole number of at least {least} is needed")
        return n

    return read


def seed(text: str) -> int:
    """Reads a seed, a whole number that fits into 63 bits."""
    n = count(0)(text)
    if n >= 2**63:
        raise argparse.ArgumentTypeError(f"{text}: a seed is less than 2^63")
    return n


def counts(text: str) -> list[int]:
    """Reads whole numbers of at least 1 with commas between them."""
    return [count()(part) for part in text.split(",")]


def seeds(text: str) -> list[int]:
    """Reads seeds with commas between them."""
    return [seed(part) for part in text.split(",")]


def words(text: str) -> str:
    """Reads a text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("an empty text ends every answer before it begins")
    return text


CONFIG = option("config", help="a YAML file, or the name of a shipped one: recall/mqar_small")
OVERRIDES = option(
    "overrides", nargs="*", metavar="key=value", help="changes: train.steps=100 model.pattern='m f'"
)
RUN = option("run", help="the folder of a run")
STEP = option("--step", type=count(), help="the checkpoint of this step instead of the newest")
DTYPE = option("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights")
OVERWRITE = option("--overwrite", action="store_true", help="replace what is there")

VERBS = {
    "prepare": Verb(
        verbs.prepare,
        "text to a token store",
        "hybrid-lm prepare stdlib --out runs/data/stdlib",
        [
            option("path", help="a text, JSONL or Parquet file, a folder, or stdlib"),
            option("--out", required=True, help="where the store goes"),
            option("--tokenizer", default="bytes", help="bytes, bpe, or huggingface:FOLDER"),
            option("--vocab-size", type=count(), help="entries of a bpe"),
            option("--val-fraction", type=float, default=0.05, help="part of the documents held out"),
            option("--workers", type=count(), help="processes"),
            OVERWRITE,
        ],
    ),
    "train": Verb(
        verbs.train,
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
        verbs.evaluate,
        "bits per byte, recall, lm-eval tasks",
        "hybrid-lm eval runs/demo-samba --max-bytes 100000",
        [
            RUN,
            STEP,
            option("--max-bytes", type=count(), help="of held-out text, whole documents"),
            option("--stride", type=count(), help="tokens between windows; by default the whole window"),
            option("--batch-size", type=count(), default=8, help="windows in a forward pass"),
            option("--tasks", help="lm-eval tasks, with commas"),
            option("--include-path", help="a folder of lm-eval task files"),
            option("--limit", type=count(), help="documents per lm-eval task"),
        ],
    ),
    "probe": Verb(
        verbs.probe,
        "train and test on a recall probe, or show its examples",
        "hybrid-lm probe mqar --preset ci --show 1",
        [
            option("config", help="a probe's configuration, or the name of a probe to show examples of"),
            OVERRIDES,
            option("--seeds", type=seeds, default="0", help="one run each: 0,1,2"),
            option("--out", help="the folder of the runs; by default runs/NAME"),
            option("--preset", default="small", help="of the examples shown"),
            option("--show", type=count(), default=1, help="number of examples shown"),
        ],
    ),
    "generate": Verb(
        verbs.generate,
        "text from a run",
        "hybrid-lm generate runs/demo-samba --prompt 'def ' --max-new-tokens 60 --seed 0",
        [
            RUN,
            STEP,
            option("--prompt", action="append", help="what to continue; several are one batch"),
            option("--max-new-tokens", type=count(), default=256),
            option("--temperature", type=float, default=0.8, help="0: the most likely token"),
            option("--top-k", type=count(), help="only the k most likely tokens"),
            option("--top-p", type=float, help="only the fewest tokens with this probability"),
            option(
                "--stop",
                type=words,
                action="append",
                default=[],
                help="text that ends it; may be given again",
            ),
            option("--seed", type=seed, help="for a repeatable draw"),
            option("--device", default="auto"),
        ],
    ),
    "check": Verb(
        verbs.check,
        "apply the laws to a configuration",
        "hybrid-lm check demo/samba --no-compile",
        [
            CONFIG,
            OVERRIDES,
            option("--whole", action="store_true", help="all layers, not each distinct one twice"),
            option("--tokens", type=count(8), help="length of the sequences; by default beyond the windows"),
            option("--no-compile", action="store_true", help="leave torch.compile out (it is slow)"),
        ],
    ),
    "show": Verb(
        verbs.show,
        "layers, parameters, memory, operations, backends; runs nothing",
        "hybrid-lm show demo/samba model.d_model=256",
        [
            option(
                "config",
                help="a YAML file, a shipped name, the folder of a run or of a Hugging Face model, layers, "
                "families, or backends",
            ),
            OVERRIDES,
            option("--context", type=count(), default=2048, help="tokens in view, for the operations"),
            option("--yaml", action="store_true", help="the whole configuration, defaults included"),
        ],
    ),
    "export": Verb(
        verbs.export,
        "a run to Hugging Face format",
        "hybrid-lm export runs/demo-samba --out exported",
        [
            RUN,
            STEP,
            option("--out", required=True, help="the folder"),
            option(
                "--format",
                default="auto",
                help="native:NAME, a class of transformers; remote, our own code; auto: what fits",
            ),
            DTYPE,
            OVERWRITE,
        ],
    ),
    "import": Verb(
        verbs.import_hf,
        "a Hugging Face checkpoint to a run",
        "hybrid-lm import exported --out runs/imported data.path=shakespeare.txt",
        [
            option("folder", help="of the checkpoint, or a hub name"),
            OVERRIDES,
            option("--out", required=True, help="the run's folder"),
            DTYPE,
            option(
                "--trust-remote-code",
                action="store_true",
                help="let transformers run code that the checkpoint brings",
            ),
            OVERWRITE,
        ],
    ),
    "compare": Verb(
        verbs.compare,
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
        verbs.report,
        "one self-contained HTML file of evaluated runs",
        "hybrid-lm report runs/demo-transformer runs/demo-samba --out report.html",
        [
            option("runs", nargs="+", help="their folders"),
            option("--out", default="report.html"),
            option("--title", default="hybrid_lm report"),
        ],
    ),
    "build-native": Verb(
        verbs.build_native,
        "compile the native kernels into the cache",
        "hybrid-lm build-native",
        [
            option(
                "target",
                nargs="?",
                default="cpu",
                help="cpu, cuda, or emulated: cuda's kernels on the CPU, for tests; by default cpu",
            ),
            option(
                "--arch", help="cpu: instruction sets, as in baseline,avx2; by default all. cuda: as in sm_90"
            ),
            option("--sanitize", help="for a search for errors: address,undefined"),
            option("--force", action="store_true", help="compile even if the cache has it"),
        ],
    ),
    "bench": Verb(
        verbs.bench,
        "time and memory beside the installed peers, on this machine",
        "hybrid-lm bench ops --op scan --op attention --length 256,1024 --out bench.json",
        [
            option(
                "what",
                nargs="?",
                choices=["ops", "train", "generate", "gpu"],
                default="ops",
                help="each op; a training step; a token decoded; the kernels on a GPU; by default ops",
            ),
            option("--op", action="append", help="of ops and gpu: only this one; may be given again"),
            option("--length", type=counts, help="tokens, with commas for several (ops: with a plot)"),
            option(
                "--threads",
                type=count(),
                default=1,
                help="1: process CPU time; more: wall time, and one thread beside",
            ),
            option("--repeat", type=count(), default=5, help="timed rounds"),
            option("--only", help="these candidates, with commas"),
            option("--no-compile", action="store_true", help="leave torch.compile out (it is slow)"),
            option("--no-memory", action="store_true", help="of ops: leave peak memory out"),
            option("--dry-run", action="store_true", help="of gpu: list what would be measured"),
            option("--out", help="a JSON file; plots are written beside it"),
        ],
    ),
    "demo": Verb(
        verbs.demo,
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
    choices = top.add_subparsers(dest="verb", required=True, metavar="verb")
    for name, verb in VERBS.items():
        # Overrides may stand among the options.
        sub = choices.add_parser(
            name, help=verb.help, description=verb.help, epilog=f"example: {verb.example}"
        )
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        for names, how in verb.arguments:
            sub.add_argument(*names, **how)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 0, 2 for a user's mistake, 128 + the signal's number for an interruption."""
    arguments = parse(argv)
    try:
        return VERBS[arguments.verb].run(arguments) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output, `head` say, has seen enough; nor is what is left written at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if arguments.debug:
            raise
        print(f"hybrid-lm {arguments.verb}: {error}", file=sys.stderr)
        return 2


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


if __name__ == "__main__":
    sys.exit(main())
