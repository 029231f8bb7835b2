"""Packages that only some readers and tokenizers need."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class MissingPackage(ImportError, ValueError):
    """An optional package that is not installed."""


def need(module: str, why: str) -> Any:
    """Imports an optional module, or raises one sentence that says what for and how to get it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        # A module missing deeper down is a broken install, and hiding its name would help no one.
        if (error.name or "").partition(".")[0] != package:
            raise
        raise MissingPackage(f"{why} needs the package {package}: pip install 'hybrid_lm[hf]'") from None
