"""Evaluating a trained run on what it was trained for, and training a probe once per seed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hybrid_lm.config.schema import ProbeData, RunConfig, TextData
from hybrid_lm.data import Split
from hybrid_lm.eval.language import Progress, compression_baselines, evaluate_text, held_out, texts_of
from hybrid_lm.eval.probe import Row, evaluate_probe
from hybrid_lm.eval.results import read_results, read_rows, write_results, write_rows
from hybrid_lm.eval.tasks import task_names, write_tasks
from hybrid_lm.model.generate import generate
from hybrid_lm.model.lm import HybridLM
from hybrid_lm.model.stats import layer_table, totals
from hybrid_lm.train.checkpoint import Run, load_run
from hybrid_lm.train.log import read_metrics
from hybrid_lm.train.loop import train
from hybrid_lm.train.run import is_run, pick_device, read_manifest
from hybrid_lm.train.source import TextSource, open_source, slice_name

ROWS = "results.jsonl"
PROMPT = "def "
"""Of the sample: the default corpus is source code."""
MILESTONES = (0.5, 0.9, 0.99)


def evaluate_run(
    run_dir: str | Path,
    *,
    step: int | None = None,
    device: str = "auto",
    max_bytes: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    prompt: str = PROMPT,
    sample_tokens: int = 300,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a trained run and puts what was found into its results.json; returns the new sections.

    Always `model`: its pattern, parameters, memory and layers. A run on text: `text` (held-out bits per byte,
    see `language`, with the compressors' on the same documents) and `sample`. A run on a probe: `probe`, its
    rows.

    Args:
        step: of the checkpoint; the newest by default.
        max_bytes: of held-out text, whole documents of a fixed choice; by default all.
        stride: see `language.windows`.
        batch_size: windows per forward pass on text.
        prompt: of the sample.
        sample_tokens: made at most.

    Raises:
        ValueError: for no run, no checkpoint, damaged files, or data that is gone.
    """
    run = load_run(run_dir, step=step, device=pick_device(device))
    sections: dict[str, Any] = {"model": model_facts(run), "step": run.step}
    if isinstance(run.config.data, ProbeData):
        sections["probe"] = evaluate_probe(run.model, run.config.data)
    else:
        assert run.tokenizer is not None
        documents, seq_len = held_out_documents(run, max_bytes), run.config.data.seq_len
        how = {"stride": stride, "batch_size": batch_size, "progress": progress}
        found = evaluate_text(run.model, documents, run.tokenizer, seq_len=seq_len, **how)
        baselines = compression_baselines(texts_of(documents, run.tokenizer))
        sections["text"] = found.to_dict() | {"baselines": baselines}
        sections["sample"] = {"prompt": prompt, "text": sample(run, prompt, sample_tokens)}
    write_results(run.path, **sections)
    return sections


def evaluate_tasks(
    run_dir: str | Path,
    tasks: Sequence[str],
    *,
    step: int | None = None,
    device: str = "auto",
    include_path: str | Path | None = None,
    limit: int | None = None,
    max_bytes: int | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    offline: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs lm-eval tasks on a trained run and puts what `run_tasks` returns into its results.json, beside
    other tasks of the same checkpoint and length.

    The tasks of `tasks.task_names()` are made from the run's held-out text, in its folder `lm_eval`.

    Args:
        max_bytes: of held-out text for those, as in `evaluate_run`.
        max_length: tokens that the model reads at a time; by default the length it was trained on.

    Raises:
        ValueError: for a run without text, an unknown task, and all that `load_run` refuses.
    """
    from hybrid_lm.eval.harness import run_tasks

    run = load_run(run_dir, step=step, device=pick_device(device))
    if run.tokenizer is None or not isinstance(run.config.data, TextData):
        raise ValueError(f"{run.path}: a run on a probe has no tokenizer; lm-eval needs a run on text")
    length = max_length or run.config.data.seq_len
    own = [task for task in tasks if task in task_names()]
    if own:
        if include_path is not None or len(own) < len(tasks):
            raise ValueError(
                f"{', '.join(own)}: made from the run's text, in its folder; run other tasks apart from these"
            )
        include_path = run.path / "lm_eval"
        # A question's context and its answer fit into the window.
        texts = texts_of(held_out_documents(run, max_bytes), run.tokenizer)
        if missing := set(own) - set(write_tasks(texts, include_path, context=max(64, length - 48))):
            raise ValueError(f"{', '.join(missing)}: the held-out text has no questions in it; use more text")
    found = run_tasks(
        run.model,
        run.tokenizer,
        tasks,
        max_length=length,
        include_path=include_path,
        limit=limit,
        batch_size=batch_size,
        offline=offline,
        progress=progress,
    )
    found["step"] = run.step
    before = read_results(run.path).get("harness") or {}
    # Scores of another checkpoint or another length do not stand beside these.
    if all(before.get(key) == found[key] for key in ("step", "max_length")):
        for key in ("results", "versions", "samples"):
            found[key] = {**before[key], **found[key]}
    write_results(run.path, harness=found)
    return found


def held_out_documents(run: Run, max_bytes: int | None = None) -> Split:
    """Documents that the run has not been trained on, by `language.held_out`.

    ValueError if the token store that it was trained on has been replaced by another.
    """
    assert isinstance(run.config.data, TextData)
    assert run.tokenizer is not None
    source = open_source(run.config, run.path, prepared=True)
    assert isinstance(source, TextSource)
    if source.fingerprint != read_manifest(run.path)["identity"]["data"]:
        raise ValueError(
            f"{run.path}: the token store {run.config.data.path} is not the one that the run was trained on, "
            "and its held-out part may be what the run has seen; put that one back"
        )
    return held_out(source.store.split("val"), run.tokenizer, max_bytes)


def model_facts(run: Run) -> dict[str, Any]:
    """What the report says of a model: pattern, sizes, layers; operations at its training length."""
    model, data = run.model, run.config.data
    context = data.seq_len if isinstance(data, TextData) else 2048
    rows = [row._asdict() for row in layer_table(model, context)]
    return {"pattern": model.config.pattern, **totals(model, context)._asdict(), "layers": rows}


def sample(run: Run, prompt: str, max_new_tokens: int) -> str:
    """A continuation at temperature 0.8, always the same; the prompt begins a document."""
    tokenizer = run.tokenizer
    assert tokenizer is not None
    tokens = [tokenizer.eot_id, *tokenizer.encode(prompt).tolist()]
    room = position_room(run.model, len(tokens))
    (made,) = generate(
        run.model,
        [tokens],
        max_new_tokens=max_new_tokens if room is None else max(1, min(max_new_tokens, room)),
        temperature=0.8,
        seed=0,
        stop_tokens=[tokenizer.eot_id],
        decode=tokenizer.decode,
    )
    return made.text or ""


def position_room(model: HybridLM, n: int) -> int | None:
    """Tokens that may follow `n` where positions are learned; None: as many as one likes."""
    embedding = model.config.embedding
    return (
        embedding.max_positions - n if embedding.positions == "learned" and embedding.max_positions else None
    )


def run_probe(
    config: RunConfig, run_dir: str | Path, *, seeds: Iterable[int] = (0,), console: Console | None = None
) -> list[Row]:
    """Trains a probe's model once per seed (in `run_dir/seed-<n>`, going on where a run is already there) and
    tests it.

    The rows, those of `evaluate_probe` with `pattern`, `seed`, `lr`, `steps`, `examples_seen`, `parameters`,
    `cpu_s` (None where a run was resumed) and `steps_to` (validation accuracy -> first step that had it),
    replace those of the same seeds in `run_dir/results.jsonl`.

    Raises:
        ValueError: for a configuration that is not of a probe, and whatever `train` raises.
    """
    if not isinstance(config.data, ProbeData):
        raise ValueError("data.kind is text: run_probe trains probes; set data.kind: probe")
    path, all_rows = Path(run_dir), []
    for seed in seeds:
        folder = path / f"seed-{seed}"
        ours = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
        fresh, begin = not is_run(folder), time.process_time()
        result = train(ours, folder, resume=not fresh, console=console)
        facts = {
            "pattern": config.model.pattern,
            "seed": seed,
            "lr": config.train.optimizer.lr,
            "steps": result.step,
            "examples_seen": result.step * config.train.batch_size * config.train.accumulate,
            "cpu_s": time.process_time() - begin if fresh else None,
        }
        found = evaluate_run(folder, device=config.train.device)
        facts["parameters"] = found["model"]["parameters"]
        rows = [{**facts, "steps_to": steps_to(folder, row["setting"]), **row} for row in found["probe"]]
        write_rows(path / ROWS, [row for row in read_rows(path / ROWS) if row["seed"] != seed] + rows)
        all_rows += rows
    return all_rows


def steps_to(run_dir: Path, setting: dict[str, Any]) -> dict[str, int | None]:
    """The first step at which a validation of the setting was as accurate as each milestone."""
    key = f"accuracy/{slice_name(setting)}"
    seen = [
        (r["step"], r[key]) for r in read_metrics(run_dir) if r["kind"] == "eval" and r.get(key) is not None
    ]
    return {f"{goal:g}": next((step for step, x in seen if x >= goal), None) for goal in MILESTONES}
