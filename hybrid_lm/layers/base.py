"""What a layer is, what its memory is, and how its parameters say which class they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from hybrid_lm.config.base import Config

KINDS = ("matrix", "output", "embedding", "norm", "conv", "dynamics", "bias")
"""The parameter classes; what each means for start, decay, dtype and learning rate is one table in
`model.init`."""

Init = Callable[[Tensor, torch.Generator], None]
"""Fills a parameter in place with its starting values, drawing from the generator."""


class Spec(NamedTuple):
    """The class of a parameter, and its own start where the class's is not right for it."""

    kind: str
    init: Init | None = None


class Module(nn.Module):
    """An `nn.Module` whose parameters carry a `Spec`, and whose dynamics stay in float32.

    Parameters are made uninitialised and filled once by `model.init`, after every construction path alike.
    """

    specs: dict[str, Spec]
    used: float = 1.0
    """Share of the elements of its matrices that one token is multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.specs = {}

    def add(self, name: str, shape: Sequence[int], kind: str, init: Init | None = None) -> None:
        """Registers an uninitialised parameter of the given class as `self.<name>`."""
        assert kind in KINDS, kind
        dtype = torch.float32 if kind == "dynamics" else None
        self.register_parameter(name, nn.Parameter(torch.empty(tuple(shape), dtype=dtype)))
        self.specs[name] = Spec(kind, init)

    if TYPE_CHECKING:
        # nn.Module says "Tensor | Module" of every attribute, which is never what is meant.
        def __getattr__(self, name: str) -> Any: ...

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to(bfloat16)` must not round A_log, dt_bias and D: exp() of them is applied once per token
        # for ever.
        dynamics = {
            name: self._parameters[name] for name, spec in self.specs.items() if spec.kind == "dynamics"
        }
        kept = {name: parameter.detach() for name, parameter in dynamics.items() if parameter is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = self._parameters[name]
            if now is not None and now.dtype.itemsize < before.dtype.itemsize:
                now.data = before.to(device=now.device, dtype=torch.float32)
        return self


class Term(NamedTuple):
    """A loss beside that of the next token: training minimises `factor * value`."""

    name: str
    value: Tensor
    """() float, a mean over the tokens of the call that are no padding."""
    factor: float


class Load(NamedTuple):
    """How many tokens of a call chose each expert of a mixture, and what is learned from that."""

    counts: Tensor
    """(e) float, without padding."""
    correction: nn.Parameter | None
    """(e): added to the scores when experts are chosen."""
    rate: float
    """Change of the correction per optimizer step; 0: it is left alone."""


class Auxiliary(NamedTuple):
    """What layers hand to training besides their outputs, one entry per call of a layer."""

    terms: list[Term]
    loads: list[Load]

    @property
    def objective(self) -> Tensor | float:
        """The sum of the terms with their factors, to be added to the mean loss per token."""
        return sum((term.factor * term.value for term in self.terms), 0.0)


class Choices:
    """Choices that roundings can turn over, such as a token's experts: written down in the order in which
    they are made, or made again as they were `given`, so that two precisions compute the same function."""

    def __init__(self, given: Iterable[Tensor] | None = None):
        self.made: list[Tensor] = []
        self.given = None if given is None else iter(given)

    def take(self, own: Tensor) -> Tensor:
        """The layer's own choice, or the one that was given for it."""
        self.made.append(own if self.given is None else next(self.given))
        return self.made[-1]


@dataclass
class Context:
    """What all layers of one call share. Shapes: (b t), and (b t d) for the embeddings."""

    positions: Tensor
    """Place of each token in its own document, from 0; int64."""
    doc_ids: Tensor | None = None
    """0 is padding, documents are 1, 2, ... in order; None: one document and no padding."""
    reset: Tensor | None = None
    """True where a token opens a document: nothing finite before it, a given state included, reaches it.
    None: no token does."""
    embeddings: Tensor | None = None
    """The embedded tokens, for layers that read them again (Zamba)."""
    backends: Mapping[str, str] = field(default_factory=dict)
    """The backend of each op, chosen when the model was built."""
    auxiliary: Auxiliary | None = None
    """Where layers put their own losses and measurements; None: nobody asks for them."""
    choices: Choices | None = None
    """Where layers write down what they choose, or read what to choose; None: they choose for themselves."""
    made: dict[str, Any] = field(default_factory=dict)
    """What a layer has worked out and others of the call can use again: see `once`."""

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """`make()`, or what it gave when a layer of this call asked for the same key before."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Context:
        """The same for a layer on another device: accelerate asks for it where a model is on several."""
        if self.positions.device == torch.device(device):
            return self
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **moved, made={})


@dataclass
class State:
    """A memory. Its tensors have the batch first; a subclass is a dataclass of tensors, numbers and other
    states.

    A state given to `forward` may be updated in place and must not be used afterwards: keep a `fork`.
    """

    def _parts(self) -> Iterator[tuple[str, Any]]:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, list):
                yield from ((f"{item.name}.{i}", part) for i, part in enumerate(value))
            else:
                yield item.name, value

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Every tensor in use, by its path."""
        found: dict[str, Tensor] = {}
        for name, value in self._parts():
            if isinstance(value, State):
                found |= value.tensors(f"{prefix}{name}.")
            elif isinstance(value, Tensor):
                found[prefix + name] = value
        return found

    def numbers(self, prefix: str = "") -> dict[str, int]:
        """Every whole number, by its path."""
        found: dict[str, int] = {}
        for name, value in self._parts():
            if isinstance(value, State):
                found |= value.numbers(f"{prefix}{name}.")
            elif isinstance(value, int):
                found[prefix + name] = value
        return found

    def map(self, fn: Callable[[str, Tensor | None], Tensor | None], prefix: str = "") -> Self:
        """A new state with `fn(path, tensor)` in the place of every tensor (None: an absent one)."""

        def one(name: str, value: Any) -> Any:
            if isinstance(value, State):
                return value.map(fn, f"{prefix}{name}.")
            return fn(prefix + name, value) if value is None or isinstance(value, Tensor) else value

        values: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, list):
                values[item.name] = [one(f"{item.name}.{i}", part) for i, part in enumerate(value)]
            else:
                values[item.name] = one(item.name, value)
        return dataclasses.replace(self, **values)

    def fork(self) -> Self:
        """An independent copy."""
        return self.map(lambda _, x: None if x is None else x.clone())

    def gather(self, rows: Tensor) -> Self:
        """The given rows (n,) of the batch, in that order: beam search, or dropping finished rows."""
        return self.map(lambda _, x: None if x is None else x.index_select(0, rows))

    def rollback(self, earlier: Self) -> None:
        """Makes this object what `earlier`, a fork of it, was; everybody who holds it sees that."""
        restored = earlier.fork()
        for item in dataclasses.fields(self):
            setattr(self, item.name, getattr(restored, item.name))

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, room to grow included, measured on the tensors."""
        parts = [value for _, value in self._parts()]
        tensors = sum(x.numel() * x.element_size() for x in parts if isinstance(x, Tensor))
        return tensors + sum(x.nbytes for x in parts if isinstance(x, State))

    def save(self, path: str | Path) -> None:
        """Writes the state as safetensors."""
        from safetensors.torch import save_file

        tensors = {name: x.detach().contiguous().clone() for name, x in self.tensors().items()}
        save_file(tensors, str(path), metadata={name: str(x) for name, x in self.numbers().items()})

    def load(self, path: str | Path) -> Self:
        """The state saved at `path`, in the form of this one (an `empty_state` of the same model)."""
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            numbers = {name: int(x) for name, x in (file.metadata() or {}).items()}
        ours, absent = self.tensors(), set[str]()
        self.map(lambda name, x: absent.add(name) if x is None else x)
        fits = set(numbers) == set(self.numbers()) and set(ours) <= set(tensors) <= set(ours) | absent
        if not fits or not all(_alike(x, tensors[name]) for name, x in ours.items()):
            raise ValueError(
                f"{path} holds the state of another architecture; load it into the model that wrote it"
            )
        device = next(iter(ours.values())).device
        loaded = self.map(lambda name, x: tensors[name].to(device) if name in tensors else None)
        loaded._set_numbers(numbers, "")
        return loaded

    def _set_numbers(self, numbers: Mapping[str, int], prefix: str) -> None:
        for name, value in list(self._parts()):
            if isinstance(value, State):
                value._set_numbers(numbers, f"{prefix}{name}.")
            elif isinstance(value, int):
                setattr(self, name, numbers[prefix + name])


def _alike(empty: Tensor, stored: Tensor) -> bool:
    """Whether a stored tensor can stand for an empty one: batch and, where ours is of no token, length are
    free."""
    free = 2 if empty.dim() > 1 and empty.shape[1] == 0 else 1
    return (
        empty.dtype == stored.dtype
        and empty.shape[free:] == stored.shape[free:]
        and empty.dim() == stored.dim()
    )


@dataclass
class StateList(State):
    """The memories of several layers; None for one that has none."""

    items: list[State | None]


class LayerList(nn.ModuleList):
    """A list of layers."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[Layer]: ...

        def __getitem__(self, idx: int) -> Layer: ...  # type: ignore[override]


Parts = Mapping[str, Sequence["Layer"]]
"""What options of type `PartPattern` were built into: lists of branches, layers with their own norms."""


class LayerOptions(Config):
    """Base of every layer's settings."""

    def check(self, d_in: int) -> Iterable[tuple[str, str]]:
        """What these settings make impossible at input width `d_in`: pairs of key and reason."""
        return ()

    def resolved(self, d_in: int) -> dict[str, Any]:
        """The settings as plain data at input width `d_in`, so that those that are the same layer are equal:
        the numbers that nulls stand for, and defaults for what has no effect."""
        return self.model_dump()

    def without_effect(self, *keys: str) -> dict[str, Any]:
        """The defaults of settings that have no effect here."""
        return {key: type(self).model_fields[key].default for key in keys}


class Layer(Module):
    """A causal map `(x, state, ctx) -> (y, state)`: one `forward` for training, prefill of any length, and
    decoding.

    A subclass has `Options`, `EXAMPLES` (settings at d_model 32 that together reach every option: the laws
    are applied to each), a constructor, `forward`, and `empty_state` if it remembers anything.
    """

    class Options(LayerOptions):
        """No settings."""

    EXAMPLES: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    reads_raw: ClassVar[bool] = False
    """True if the layer takes the residual stream as it is because its parts have norms of their own."""

    def __init__(
        self, d_in: int, options: LayerOptions, *, d_out: int | None = None, parts: Parts | None = None
    ):
        """`d_in`, `d_out` (default: `d_in`): widths. `parts`: what options of type `PartPattern` were built
        into."""
        super().__init__()
        self.d_in, self.d_out = d_in, d_out or d_in

    def empty_state(self, batch: int, *, max_tokens: int | None = None) -> State | None:
        """The memory before the first token, for `batch` rows; None for a layer that has none.

        `max_tokens`: room to reserve where memory grows with length; it can always grow further.
        """
        return None

    def forward(self, x: Tensor, state: Any, ctx: Context) -> tuple[Tensor, Any]:
        """x (b t d_in) -> (y (b t d_out), state). Without a state no state comes out."""
        raise NotImplementedError

    @classmethod
    def part_width(cls, key: str, index: int, d_in: int) -> int:
        """Input width of item `index` of the part that `key` names, in a layer of input width `d_in`."""
        return d_in

    def mixing_flops(self, context: int) -> float:
        """Operations per token of the forward pass beyond two per matrix element, at `context` tokens in
        view."""
        return 0.0
