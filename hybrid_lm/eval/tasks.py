"""lm-eval tasks out of a run's own held-out text: no download, the same questions for every model."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

from hybrid_lm.eval.published import evals_dir
from hybrid_lm.files import replace_text

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{4,}")
CHOICES = 4


def task_names() -> list[str]:
    """The tasks that `write_tasks` can make: the templates in `evals/tasks`."""
    return sorted(path.stem for path in (evals_dir() / "tasks").glob("*.yaml"))


def write_tasks(
    texts: Sequence[str], folder: str | Path, *, context: int = 256, n_questions: int = 200, seed: int = 0
) -> list[str]:
    """Writes data and task files into `folder`, to be given to lm-eval as `include_path`; returns the tasks'
    names.

    Args:
        texts: held-out documents.
        context: characters before a question.
        n_questions: at most, for tasks that ask questions; spread over the documents.
        seed: of the choice of places and wrong answers.

    The paths inside are absolute, for lm-eval reads them from wherever it is started. A task for which the
    texts hold nothing to ask is left out.
    """
    root = Path(folder).resolve()
    root.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Iterable[dict[str, Any]]] = {
        "hybrid_lm_text": ({"text": text} for text in texts if text),
        "hybrid_lm_names": name_questions(texts, context=context, n=n_questions, seed=seed),
    }
    written = []
    for name, found in rows.items():
        if lines := [json.dumps(row) + "\n" for row in found]:
            data = root / f"{name}.jsonl"
            replace_text(data, "".join(lines))
            template = Template((evals_dir() / "tasks" / f"{name}.yaml").read_text(encoding="utf-8"))
            # JSON strings are YAML strings, whatever characters the paths have.
            paths = {"data": json.dumps(str(data)), "cache": json.dumps(str(root / "cache"))}
            replace_text(root / f"{name}.yaml", template.substitute(paths))
            written.append(name)
    return written


def name_questions(
    texts: Sequence[str], *, context: int = 256, n: int = 200, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Yields at most n questions `{context, choices, answer}` in a fixed random order.

    The context ends where a name (five or more letters, digits or underscores) comes again; the choices are
    that name and three others of the same context, none of them the beginning of another.
    """
    rng = random.Random(seed)
    places = [
        (text, match) for text in texts for match in NAME.finditer(text) if match.start() >= min(context, 64)
    ]
    rng.shuffle(places)
    asked = 0
    for text, match in places:
        if asked == n:
            return
        before = text[max(0, match.start() - context) : match.start()]
        # The window may cut the first name in two.
        seen = sorted(set(NAME.findall(before.partition("\n")[2] or before)))
        wrong = [name for name in seen if not name.startswith(match[0]) and not match[0].startswith(name)]
        if match[0] in seen and len(wrong) >= CHOICES - 1:
            choices = [match[0], *rng.sample(wrong, CHOICES - 1)]
            rng.shuffle(choices)
            yield {"context": before, "choices": choices, "answer": choices.index(match[0])}
            asked += 1
