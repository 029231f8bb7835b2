"""Whether a package of others can be used, and its modules."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_lm.ops.triton.tuning import testable

INSTALL = 'pip install "hybrid_lm[cuda]"'


class Package(NamedTuple):
    """A package, and the oldest version whose functions are those that are called here."""

    name: str
    distribution: str
    oldest: tuple[int, ...]


class Needs(NamedTuple):
    """What one backend of one op takes from a package: a module, and a compiled one where it has one."""

    package: Package
    module: str
    compiled: str | None = None

    def load(self) -> ModuleType:
        """The module; ImportError or whatever else it raises."""
        if self.compiled is not None:
            import_module(self.compiled)
        try:
            return import_module(self.module)
        except ImportError:
            return _without_package(self.module)

    def why_not(self, device: str) -> str | None:
        """None where the backend runs, else the reason in words."""
        # triton's interpreter takes tensors of the CPU
        if device != "cuda" and not (device == "cpu" and testable()):
            return f"{self.package.name} runs on NVIDIA GPUs, not on {device}"
        return _missing(self) or (no_gpu() if device == "cuda" else None) or _broken(self)


def _without_package(name: str) -> ModuleType:
    """A module of a package whose own `__init__` fails, as that of mamba_ssm does where a compiled extension
    that only some of its modules use is missing. The package stays as it was: not imported."""
    root = name.partition(".")[0]
    spec = None if root in sys.modules else find_spec(root)
    if spec is None or not spec.submodule_search_locations:
        return import_module(name)
    bare = ModuleType(root)
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules[root] = bare
    try:
        return import_module(name)
    finally:
        del sys.modules[root]


def _missing(needs: Needs) -> str | None:
    package = needs.package
    if not _there(package.name):
        return f"{package.name} is not installed: {INSTALL}"
    try:
        found = version(package.distribution)
    # a folder on the path, of no version that could be told
    except PackageNotFoundError:
        found = None
    oldest = ".".join(map(str, package.oldest))
    if found is not None and numbers(found) < package.oldest:
        return f"{package.name} {found} is too old, {oldest} or later is needed: {INSTALL}"
    if needs.compiled is not None and not _there(needs.compiled):
        return (
            f"{package.name} is installed without its compiled extension {needs.compiled}: install it where "
            "nvcc and a PyTorch for CUDA are"
        )
    return None


def _there(name: str) -> bool:
    # a module that somebody put together has no spec, and to ask for it is an error
    return name in sys.modules or find_spec(name) is not None


def numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.3.2.post1 is (2, 3, 2)."""
    found = []
    for part in text.split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


@cache
def no_gpu() -> str | None:
    """Why there is no GPU that the packages run on; None if there is one."""
    if torch.version.hip is not None:
        return "untested on AMD GPUs"
    return None if torch.cuda.is_available() else "PyTorch sees no GPU"


@cache
def _broken(needs: Needs) -> str | None:
    """Why the module cannot be imported. The first call imports it."""
    try:
        needs.load()
    # A package may raise anything while it is imported: a missing symbol, a GPU that it does not know, a
    # version of triton without what it uses.
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return f"{needs.package.name} cannot be imported: {type(error).__name__}: {lines[0]}"
    return None


def aligned(
    x: Tensor, grads: Iterable[Tensor | None], tensors: Iterable[Tensor | None]
) -> tuple[Tensor, ...]:
    """Gradients in the types of what they are the gradients of; empty, and where x is, for what is absent."""
    pairs = zip(grads, tensors, strict=True)
    return tuple(x.new_empty(0) if g is None or v is None else g.to(v.dtype).contiguous() for g, v in pairs)


def refuse(name: str, package: str, ctx: object, *grads: object) -> None:
    """What an operator that computes gradients has as gradient: an error; autograd would take it for 0."""
    raise ValueError(
        f"{name}: the kernels of {package} have no gradients of gradients; backend='reference' has them"
    )


def refusing(name: str, package: str) -> partial[None]:
    """`refuse` for one operator."""
    return partial(refuse, name, package)
