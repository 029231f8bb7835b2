"""Adapters of PEFT on our models: names for `target_modules`, and a report of what an adapter reached.

Our matrices are `nn.Linear`, so that PEFT finds them by itself (`target_modules="all-linear"`). What it does
not say is which kinds of layer it hit: names from a Transformer's recipe miss every Mamba layer, in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from hybrid_lm.registry import table, unknown

MATRICES = ("matrix", "output", "embedding")
"""The parameter classes that an adapter is for; `model.init` has the table of all."""
BASE, REPLACED, COPIES = ".base_layer", ".original_module", ".modules_to_save"
"""How PEFT names what it puts an adapter around, what it trains a copy of, and those copies."""


class Matrix(NamedTuple):
    """One matrix of a model."""

    layer: str
    """The type of layer it belongs to, `model` for embeddings and the output."""
    name: str
    """Its name in that layer, with a star for the numbers of parts."""
    path: str
    """The module's name in the model, which PEFT takes as a target."""
    parameter: nn.Parameter
    linear: bool
    """Whether it is a module that PEFT can take the place of, not a parameter of a larger one."""
    adapters: tuple[nn.Module, ...]
    """What PEFT put around it."""


class AdapterRow(NamedTuple):
    """The matrices of one name in one type of layer."""

    layer: str
    matrix: str
    adapted: int
    """How many have a low-rank addition."""
    trained: int
    """How many are trained themselves."""
    of: int
    """How many there are."""
    parameters: int
    """Trainable numbers, those of the additions included."""


class AdapterReport(list[AdapterRow]):
    """Rows of `lora_report`; as text, a table with the types of layer that nothing reached below it."""

    def missed(self) -> list[str]:
        """The types of layer in which nothing is adapted or trained."""
        reached = {row.layer for row in self if row.adapted or row.trained}
        kinds = dict.fromkeys(row.layer for row in self if row.layer != "model")
        return [kind for kind in kinds if kind not in reached]

    def __str__(self) -> str:
        head = ("layer", "matrix", "adapted", "trained", "of", "parameters")
        cells = [head, *((*row[:2], *(f"{number:,}" for number in row[2:])) for row in self)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in cells
        ]
        hit, of = sum(row.adapted for row in self), sum(row.of for row in self)
        lines.append(
            f"{hit} of {of} matrices adapted, {sum(row.parameters for row in self):,} parameters train"
        )
        if self.missed():
            lines.append(f"nothing reached in: {', '.join(self.missed())}")
        return "\n".join(lines)


def lora_report(model: nn.Module) -> AdapterReport:
    """How many matrices of each kind of layer an adapter reached.

    Args:
        model: a HybridLMForCausalLM, with or without PEFT around it (`get_peft_model`, `add_adapter`).

    Raises:
        ValueError: for a model of another class.
    """
    rows: dict[tuple[str, str], list[int]] = {}
    for matrix in matrices(model):
        row = rows.setdefault((matrix.layer, matrix.name), [0, 0, 0, 0])
        own = matrix.parameter if matrix.parameter.requires_grad else None
        added = [
            parameter
            for adapter in matrix.adapters
            for name, parameter in adapter.named_parameters()
            if parameter.requires_grad and "base_layer" not in name
        ]
        new = (
            bool(matrix.adapters),
            own is not None,
            1,
            sum(p.numel() for p in (own, *added) if p is not None),
        )
        rows[matrix.layer, matrix.name] = [a + b for a, b in zip(row, new, strict=True)]
    return AdapterReport(AdapterRow(*key, *numbers) for key, numbers in rows.items())


def lora_targets(model: nn.Module, *layers: str) -> list[str]:
    """`target_modules` for a `LoraConfig`: the matrices of these types of layer (`attention`, `mamba2`, ...),
    by default of all. Those that are no module (the experts of a `moe`) are for its `target_parameters`.

    Raises:
        ValueError: for a type that the model does not have, and for a model of another class.
    """
    found = [matrix for matrix in matrices(model) if matrix.layer != "model"]
    known = dict.fromkeys(matrix.layer for matrix in found)
    for kind in layers:
        if kind not in known:
            raise ValueError(unknown("type of layer", kind, known))
    return [m.path for m in found if m.linear and (not layers or m.layer in layers)]


def matrices(model: nn.Module) -> Iterator[Matrix]:
    """The matrices of a model, those that layers share once."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "hybrid_lm":
        raise ValueError(
            f"a HybridLMForCausalLM is needed, with or without PEFT, not a {type(model).__name__}; "
            "to_hf(model, format='remote') makes one"
        )
    # By name, for a model loaded by remote code has classes of its own.
    types = {recipe["type"] for recipe in config.architecture["layers"].values()}
    kinds = {table("layer").place(kind).partition(":")[2]: kind for kind in types}
    owners: dict[str, tuple[str, str]] = {}
    for path, module in model.named_modules():
        above, _, last = path.rpartition(".")
        layer, inside = owners.get(above, ("model", ""))
        kind = kinds.get(type(module).__name__)
        own = f".{last}" not in (BASE, REPLACED, COPIES) and not above.endswith(COPIES)
        part = ("." + ("*" if last.isdigit() else last)) if own else ""
        layer, inside = owners[path] = (kind, "") if kind else (layer, inside + part)
        if path.endswith(REPLACED):
            continue
        # Of the module itself: PEFT's modules answer for what is in them.
        for name, spec in vars(module).get("specs", {}).items():
            parameter = module._parameters[name]
            if spec.kind in MATRICES and parameter is not None and parameter.ndim > 1:
                label = inside if name == "weight" else f"{inside}.{name}"
                label = label.removeprefix(".") if layer != "model" else label.rpartition(".")[2]
                around = tuple(adapters(model, path, name))
                linear = isinstance(module, nn.Linear)
                yield Matrix(layer, label, path.removesuffix(BASE), parameter, linear, around)


def adapters(model: nn.Module, path: str, name: str) -> Iterator[nn.Module]:
    """The modules of PEFT that add to parameter `name` of the module at `path`."""
    while path.endswith(BASE):
        path = path.removesuffix(BASE)
        around = model.get_submodule(path)
        if hasattr(around, "lora_A") and getattr(around, "parameter_name", "weight") == name:
            yield around
