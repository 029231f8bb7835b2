"""Measures every family on its tiny models, float32 on one thread, and writes families.json and families.md
into evals/results/hf:

    python tests/hf/measure.py [FAMILY ...]

With names, the other families keep what the file says of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from native_models import CONFIGS, native
from transformers import AutoConfig, GenerationConfig
from transformers.utils import logging

from hybrid_lm.hf.convert import from_hf, to_hf
from hybrid_lm.hf.families import FAMILIES
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Agrees, Must
from hybrid_lm.hf.importing import published
from hybrid_lm.hf.native import tensors_of
from hybrid_lm.model.generate import generate

FOLDER = Path(__file__).resolve().parents[2] / "evals" / "results" / "hf"
PROMPT, NEW = 11, 8
NUMBERS = ("logit_difference", "gradient_difference", "our_gradient_error", "their_gradient_error")


def tokens() -> torch.Tensor:
    """(2 19), longer than the windows and chunks of the models, and no multiple of them."""
    return torch.randint(257, (2, 19), generator=torch.Generator().manual_seed(1))


def measure(name: str) -> dict[str, Any]:
    """What one family's models show."""
    family, rows = FAMILIES[name], []
    for options in CONFIGS[name]:
        theirs = native(name, options)
        ours = from_hf(theirs, check=False)
        rows.append(
            forward(family, theirs, ours)
            | {"same_tokens": continued(family, theirs, ours), "exact_export": exported(name, theirs, ours)}
            | gradients(family, theirs, ours)
        )
    return {
        "class": family.class_name,
        "blocks": [" ".join("+".join(item) for item in block) for block in family.layout.blocks],
        "models": len(rows),
        "bound": family.tolerance,
        **{key: max(row[key] for row in rows) for key in NUMBERS},
        "same_tokens": all(row["same_tokens"] for row in rows),
        "exact_export": all(row["exact_export"] for row in rows),
        "fields": fields_of(name),
    }


@torch.no_grad()
def forward(family: Family, theirs: Any, ours: Any) -> dict[str, float]:
    """Largest difference of logits without a cache."""
    logits = theirs(tokens(), use_cache=False).logits
    difference = float((ours(tokens()).logits - logits).abs().max())
    assert difference <= family.tolerance * max(1.0, float(logits.abs().max()))
    return {"logit_difference": difference}


@torch.no_grad()
def continued(family: Family, theirs: Any, ours: Any) -> bool:
    """Whether a greedy continuation is the same; theirs has no cache where theirs differs with one."""
    cached = not family.cached_differs(theirs.config.to_dict())
    start = tokens()[:, :PROMPT]
    how = GenerationConfig(do_sample=False, max_new_tokens=NEW, use_cache=cached)
    made = theirs.generate(start, attention_mask=torch.ones_like(start), generation_config=how)
    own = generate(ours, start.tolist(), max_new_tokens=NEW, temperature=0)
    return made[:, PROMPT:].tolist() == [list(row.tokens) for row in own]


@torch.no_grad()
def exported(name: str, theirs: Any, ours: Any) -> bool:
    """Whether the way out gives the same tensors, and a model with the same logits, bit for bit."""
    stored, out = published(theirs), dict(tensors_of(FAMILIES[name], ours))
    back = to_hf(ours, format=f"native:{name}")
    logits = [model(tokens(), use_cache=False).logits for model in (theirs, back)]
    return all(torch.equal(stored[key], x) for key, x in out.items()) and torch.equal(*logits)


def gradients(family: Family, theirs: Any, ours: Any) -> dict[str, float]:
    """Largest relative differences of a gradient of the loss, |one - other| / |other| by tensor: ours from
    theirs, and each of them from ours in float64.

    Left out are tensors whose gradient is zero but for roundings: biases of keys without positions, routers
    that choose one expert and weigh it by one.
    """
    x, exact = tokens(), copy.deepcopy(ours).double()
    before = {key: value.clone() for key, value in published(theirs).items()}
    for model in (theirs, ours, exact):
        F.cross_entropy(model(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    found = {"theirs": published(theirs), "ours": dict(tensors_of(family, ours))}
    found["exact"] = dict(tensors_of(family, exact))
    # What the backward pass has not touched is no parameter there.
    keys = [key for key in found["ours"] if not torch.equal(found["theirs"][key], before[key])]
    sizes = {key: float(found["exact"][key].norm()) for key in keys}
    zero = torch.finfo(torch.float32).eps * math.hypot(*sizes.values())

    def largest(one: str, other: str) -> float:
        pairs = {key: (found[one][key].double(), found[other][key].double()) for key in keys}
        assert all(sizes[key] > zero or float((x - y).norm()) <= zero for key, (x, y) in pairs.items())
        return max(float((x - y).norm() / y.norm()) for key, (x, y) in pairs.items() if sizes[key] > zero)

    return {
        "gradient_difference": largest("ours", "theirs"),
        "our_gradient_error": largest("ours", "exact"),
        "their_gradient_error": largest("theirs", "exact"),
    }


def fields_of(name: str) -> dict[str, list[str]]:
    """Fields of the configuration: read and written, and off their default in a test; the same, and never off
    it; with one value or some that mean the same; without meaning for what is computed."""
    family = FAMILIES[name]
    default = AutoConfig.for_model(name).to_dict()
    made = [AutoConfig.for_model(name, **options).to_dict() for options in CONFIGS[name]]
    fixed = [field for rule in family.rules if isinstance(rule, Must | Agrees) for field in rule.theirs]
    ruled = [field for rule in family.rules for field in rule.theirs if field not in fixed]
    mapped = dict.fromkeys((*family.layout.theirs, *ruled))
    off = [field for field in mapped if any(one.get(field) != default.get(field) for one in made)]
    return {
        "varied": off,
        "mapped": [field for field in mapped if field not in off],
        "fixed": sorted(fixed),
        "ignored": sorted(family.ignored),
    }


def listing(families: dict[str, Any]) -> str:
    """The fields of every family, for people."""
    what = {
        "varied": "read and written, and off its default in at least one tested model",
        "mapped": "read and written, and at its default in all tested models",
        "fixed": "accepted with the value (or values) that the layers here have, else refused by name",
        "ignored": "does not change what is computed",
    }
    lines = [
        "# Fields of each family",
        "",
        "Written by `python tests/hf/measure.py`; any other field is an error.",
    ]
    for name, facts in families.items():
        lines += ["", f"## {name} (`{facts['class']}`)", ""]
        lines.append("One layer is " + " or ".join(f"`{block}`" for block in facts["blocks"]) + ".")
        for kind, meaning in what.items():
            if facts["fields"][kind]:
                named = ", ".join(f"`{field}`" for field in facts["fields"][kind])
                lines += ["", f"- {meaning}: {named}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("families", nargs="*", help="only these")
    names = parser.parse_args().families
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = FOLDER / "families.json"
    old = json.loads(path.read_text(encoding="utf-8"))["families"] if names and path.is_file() else {}
    families = {}
    for name in FAMILIES:
        if names and name not in names:
            families |= {name: old[name]} if name in old else {}
            continue
        families[name] = measure(name)
        facts = families[name]
        numbers = " ".join(f"{key} {facts[key]:.1e}" for key in NUMBERS)
        print(f"{name:20} {numbers} {facts['same_tokens']} {facts['exact_export']}", flush=True)
    versions = {package: version(package) for package in ("torch", "transformers")}
    command = "python tests/hf/measure.py"
    FOLDER.mkdir(parents=True, exist_ok=True)
    document = {"command": command, "versions": versions, "families": families}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (FOLDER / "families.md").write_text(listing(families), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
