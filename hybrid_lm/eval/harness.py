"""lm-eval on our models, in this process, without a network; lm_eval is imported here and in `adapter`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hybrid_lm.data import Tokenizer
from hybrid_lm.data.optional import MissingPackage
from hybrid_lm.eval.language import Progress
from hybrid_lm.eval.tasks import task_names
from hybrid_lm.model.lm import HybridLM
from hybrid_lm.registry import unknown

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def run_tasks(
    model: HybridLM,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    max_length: int,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    offline: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs lm-eval tasks.

    Args:
        tasks: names, of the tasks in `include_path`; without it, of those that lm-eval comes with.
        max_length: tokens that the model reads at a time; longer prompts lose their beginning.
        include_path: a folder of task YAMLs.
        limit: questions per task; by default all.
        batch_size: prompts per forward pass; changes speed, not results.
        progress: called with the requests done and those to do, for each sort of request anew.
        offline: never ask the network, in this process from now on. lm-eval's own tasks need it for their
            data.

    Returns:
        `results` (task -> metric,filter -> value), `versions` (of the tasks), `samples` (task -> a list of
        `hash` and `metrics` per question, for `compare`), `lm_eval` (its version), `max_length`.

    Raises:
        ValueError: for an unknown task, a batch_size or limit below 1, and without lm-eval (MissingPackage).
    """
    for name, given in (("batch_size", batch_size), ("limit", limit)):
        if given is not None and given < 1:
            raise ValueError(f"{name} {given}: must be at least 1")
    prepare_import(offline)
    import lm_eval
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from hybrid_lm.eval.adapter import HarnessModel

    # lm-eval's own index of thousands of tasks takes its time: it is read only where no folder is named.
    manager = TaskManager(
        include_path=None if include_path is None else str(include_path),
        include_defaults=include_path is None,
    )
    for task in tasks:
        if task not in manager.all_tasks:
            raise ValueError(unknown_task(task, manager.all_tasks, include_path))
    lm = HarnessModel(model, tokenizer, max_length=max_length, batch_size=batch_size, progress=progress)
    with undisturbed():
        # Its bootstrap starts a pool of processes; intervals are ours, paired, in `compare`.
        found: Any = simple_evaluate(
            model=lm, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0
        )
    assert found is not None
    samples = {task: [sample(row) for row in rows] for task, rows in found["samples"].items()}
    return {
        "results": {task: dict(metrics) for task, metrics in found["results"].items()},
        "versions": dict(found["versions"]),
        "samples": samples,
        "lm_eval": lm_eval.__version__,
        "max_length": max_length,
    }


@contextmanager
def undisturbed() -> Iterator[None]:
    """lm_eval without what it does besides: a bar for each preparation that takes no time, and questions to
    git, pip and the hardware, which cost seconds, complain on the terminal, and whose answers are not kept.
    """
    from lm_eval import evaluator
    from tqdm import tqdm

    init = tqdm.__init__

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "disable": True})

    changes = [
        (tqdm, "__init__", silent),
        (evaluator, "get_git_commit_hash", lambda: None),
        (evaluator, "add_env_info", lambda storage: None),
    ]
    before = [(place, name, getattr(place, name)) for place, name, _ in changes if hasattr(place, name)]
    try:
        for place, name, new in changes:
            setattr(place, name, new)
        yield
    finally:
        for place, name, old in before:
            setattr(place, name, old)


def prepare_import(offline: bool) -> None:
    """What must be said before lm_eval is first imported. Raises MissingPackage if it is not installed."""
    if find_spec("lm_eval") is None:
        raise MissingPackage("lm-eval tasks need the package lm_eval: pip install 'hybrid_lm[eval]'")
    if offline:
        os.environ.update(dict.fromkeys(OFFLINE, "1"))
        # These read the environment when they are imported, which may have been earlier.
        for name in ("huggingface_hub.constants", "datasets.config"):
            if module := sys.modules.get(name):
                for variable in OFFLINE[:2]:
                    if hasattr(module, variable):
                        setattr(module, variable, True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Its warnings are about its own defaults.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def sample(row: dict[str, Any]) -> dict[str, Any]:
    """Of lm-eval's record of a question, what a paired comparison needs."""
    return {"hash": row["doc_hash"], "metrics": {name: row[name] for name in row["metrics"]}}


def unknown_task(task: str, known: Collection[str], include_path: str | Path | None) -> str:
    """What to say of a name that is no task: of a folder all names, of lm-eval's thousands those like it."""
    if include_path is not None and not known:
        return f"unknown task {task!r}: {include_path} has no task files"
    alike = [name for name in known if include_path or name[:4].lower() == task[:4].lower()][:20]
    if alike:
        return unknown("task", task, alike)
    return (
        f"unknown task {task!r}; made from a run's own text: {', '.join(task_names())}; lm-eval's are called "
        "hellaswag, lambada_openai, arc_easy and so on: `lm-eval ls tasks` lists them"
    )
