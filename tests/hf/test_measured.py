"""What is said of the families is what was measured, of the tables as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from measure import FOLDER, NUMBERS, fields_of, listing, measure

from hybrid_lm import show
from hybrid_lm.cli import main
from hybrid_lm.hf.families import FAMILIES

FACTS = json.loads((FOLDER / "families.json").read_text(encoding="utf-8"))["families"]
AGAIN = "run python tests/hf/measure.py"
CLOSE = 1e-4
"""Relative difference of gradients: a thousand float32 roundings."""


def test_every_family_is_measured():
    assert list(FACTS) == list(FAMILIES), AGAIN


@pytest.mark.parametrize("name", list(FACTS))
def test_the_file_is_about_these_tables(name):
    assert FACTS[name]["fields"] == fields_of(name), AGAIN


@pytest.mark.parametrize("name", list(FACTS))
def test_what_was_measured_holds(name):
    check(FACTS[name])


@pytest.mark.parametrize("name", ["mpt", "mamba2"])
def test_it_is_measured_again(name):
    facts = measure(name)
    check(facts)
    # The numbers are those of a machine and its kernels.
    assert {**facts, **dict.fromkeys(NUMBERS)} == {**FACTS[name], **dict.fromkeys(NUMBERS)}, AGAIN


def check(facts: dict[str, Any]) -> None:
    """What every family is held to."""
    assert facts["exact_export"]
    assert facts["same_tokens"]
    # Tied to the bound by `measure` itself, in units of the largest logit; these models' are below 10.
    assert facts["logit_difference"] <= 10 * facts["bound"]
    assert facts["our_gradient_error"] <= CLOSE
    # Where a class is further than that from float64, the difference is its own.
    assert facts["gradient_difference"] <= CLOSE + facts["their_gradient_error"]


def test_the_tables_for_people(capsys):
    assert (FOLDER / "families.md").read_text(encoding="utf-8") == listing(FACTS), AGAIN
    assert main(["show", "families"]) == 0
    table = capsys.readouterr().out.strip()
    assert len(table.splitlines()) == 2 + len(FAMILIES)
    readme = Path(__file__).parents[2] / "README.md"
    assert show.families() in readme.read_text(encoding="utf-8"), (
        "paste what `hybrid-lm show families` prints"
    )
