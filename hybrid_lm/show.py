"""What a configuration amounts to, as tables on a terminal: nothing is allocated and nothing is run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid_lm.config.load import architecture_hash, load_config, parse_config
from hybrid_lm.config.pattern import canon, expand
from hybrid_lm.config.schema import RunConfig
from hybrid_lm.eval.published import evals_dir
from hybrid_lm.eval.table import print_table, size
from hybrid_lm.layers import LAYERS
from hybrid_lm.model.build import build_model
from hybrid_lm.model.stats import class_table, layer_table, totals
from hybrid_lm.ops.backend import report
from hybrid_lm.ops.native import library as native
from hybrid_lm.train.run import is_run, pick_device
from hybrid_lm.train.vocabulary import filled

if TYPE_CHECKING:
    from rich.console import Console


def configuration(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a file, of a shipped name, of a run's folder or of a Hugging Face folder."""
    if (Path(name) / "config.json").is_file():
        data = {"kind": "text", "tokenizer": {"kind": "bytes"}}
        return parse_config({"init_from": {"path": name}, "data": data}, name, overrides)
    return load_config(Path(name) / "config.yaml" if is_run(Path(name)) else name, overrides)


def architecture(config: RunConfig, context: int, console: Console) -> None:
    """Prints the layers with their costs, the totals, the parameter classes and the backends."""
    config = filled(config)
    model = build_model(config, weights=False, backend=config.train.backend)
    m, all_of_it = config.model, totals(model, context)
    items = expand(m.pattern, list(m.layers), m.depth)
    console.print(
        f"pattern  {canon(items)}   ({len(items)} layers, width {m.d_model}, vocabulary {m.vocab_size:,})",
        markup=False,
    )
    console.print(f"hash     {architecture_hash(m)[:16]}", markup=False)
    header = ["", "name", "type", "parameters", "memory, fixed", "memory per token", "operations per token"]
    rows = layer_table(model, context)
    lines = [
        [
            str(r.index),
            r.name,
            r.type,
            f"{r.parameters:,}",
            *map(size_of, r[4:6]),
            f"{r.flops_per_token:,.0f}",
        ]
        for r in rows
    ]
    rest = all_of_it.parameters - sum(r.parameters for r in rows)
    head = all_of_it.flops_per_token - sum(r.flops_per_token for r in rows)
    lines.append(["", "", "embedding, norm, head", f"{rest:,}", "0", "0", f"{head:,.0f}"])
    lines.append(
        [
            "",
            "",
            "all",
            f"{all_of_it.parameters:,}",
            *map(size_of, all_of_it[2:4]),
            f"{all_of_it.flops_per_token:,.0f}",
        ]
    )
    print_table(
        console, f"Layers (operations of a forward pass at {context:,} tokens in view)", header, lines
    )
    header = ["class", "tensors", "parameters", "start", "decays", "stays float32", "rate"]
    lines = [
        [r.kind, str(r.tensors), f"{r.parameters:,}", r.start, yes(r.decay), yes(r.float32), f"x {r.lr:g}"]
        for r in class_table(model)
    ]
    print_table(console, "Parameter classes", header, lines)
    chosen = ", ".join(f"{op}: {backend}" for op, backend in sorted(model.backends.items()))
    console.print(f"backends  {chosen}", markup=False)


def layers() -> str:
    """All layers as a Markdown table: name, what it is, settings. A test compares it with the README's."""
    rows = ["| `type:` | what it is | settings |", "| --- | --- | --- |"]
    for name in LAYERS:
        layer = LAYERS[name]
        what = " ".join((layer.__doc__ or "").strip().split("\n\n")[0].split())
        settings = ", ".join(f"`{key}`" for key in layer.Options.model_fields)
        rows.append(f"| `{name}` | {what} | {settings} |")
    return "\n".join(rows)


def families() -> str:
    """The families of Hugging Face models as a Markdown table, from what was measured of them
    (`evals/results/hf/families.json`). A test compares it with the README's."""
    rows = [
        "| family | class | import | export | options tested | logits | gradients | greedy tokens |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    path = evals_dir() / "results" / "hf" / "families.json"
    for name, facts in json.loads(path.read_text(encoding="utf-8"))["families"].items():
        tested, all_of_them = (
            len(facts["fields"]["varied"]),
            sum(map(len, list(facts["fields"].values())[:2])),
        )
        rows.append(
            f"| {name} | `{facts['class']}` | yes | {'bit for bit' if facts['exact_export'] else 'no'} "
            f"| {tested} of {all_of_them} | {facts['logit_difference']:.1e} "
            f"| {facts['gradient_difference']:.1e} | {'the same' if facts['same_tokens'] else 'differ'} |"
        )
    return "\n".join(rows)


def backends(console: Console) -> None:
    """Prints which backend each op has on this machine's device, why not another, and the native library."""
    device = pick_device("auto").type
    lines = [[r.op, r.backend, "runs" if r.chosen else "", r.why_not or ""] for r in report(device)]
    print_table(console, f"Backends on {device}", ["op", "backend", "", "why not"], lines)
    for target in ("cpu", "cuda"):
        console.print(f"native, {target}: {native.why_not(target) or built()}", markup=False, soft_wrap=True)


def built() -> str:
    """The native library that is loaded, and the instruction set that it chose."""
    isa = native.isa()
    return f"{native.loaded()}" + (f", {isa} kernels" if isa else "")


def size_of(n: float) -> str:
    """Bytes, in words; 0 stays 0."""
    return size(n) if n else "0"


def yes(x: bool) -> str:
    """For a column of yes and no."""
    return "yes" if x else "no"
