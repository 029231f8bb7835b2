"""Decoding one token a step: on a GPU the whole step of a model is recorded once and then replayed.

A step of a small batch is hundreds of kernels of a few microseconds, and Python needs longer to start them
than they take. A CUDA graph starts them all at once, always on the same memory: what a step reads and leaves
has to lie where it lay before. Recurrent memories do, those of attention grow: `Decoder` looks which it is.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_lm.layers.base import State
from hybrid_lm.model.lm import HybridLM, ModelState

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]]
"""Takes down what a function does on the device, without doing it; returns what does it, and the tensor where
the function's result will lie."""
Work = Callable[[Tensor, ModelState], Tensor]
"""Logits (b v) of tokens (b,) and a state, which it updates."""


class Leaf(NamedTuple):
    """A tensor of a state, and where it hangs."""

    path: str
    holder: State
    name: str
    tensor: Tensor


def leaves(state: State, prefix: str = "") -> Iterator[Leaf]:
    """Every tensor of a state, room to grow included."""
    for item in dataclasses.fields(state):
        value = getattr(state, item.name)
        if isinstance(value, Tensor):
            yield Leaf(prefix + item.name, state, item.name, value)
        for k, part in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(part, State):
                place = f"{item.name}.{k}" if isinstance(value, list) else item.name
                yield from leaves(part, f"{prefix}{place}.")


def form(state: ModelState) -> dict[str, Any]:
    """All that a step's work depends on besides the values of tensors: their shapes and types, and the
    numbers that are kept in Python. A step that leaves it as it was can be done again as often as one likes.
    """
    found: dict[str, Any] = {
        leaf.path: (tuple(leaf.tensor.shape), leaf.tensor.dtype, leaf.tensor.device) for leaf in leaves(state)
    }
    # Tokens read: the model itself looks at them only for a limit, see `Decoder.step`.
    return found | {path: number for path, number in state.numbers().items() if path != "seen"}


def difference(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """What a step changed of a state's form, in words; None: nothing."""
    for path in {**before, **after}:
        old, new = (found.get(path) for found in (before, after))
        if old != new:
            old, new = (v[0] if isinstance(v, tuple) else v for v in (old, new))
            return f"the memory {path} changes with every token: {old}, then {new}"
    return None


PICKS = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


class Watch(TorchDispatchMode):
    """Notes the first operation that makes the processor wait for the device, or the device for it."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.found = device, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.found is None and self.waits(func, args, out):
            self.found = f"a step waits for the device: {func.overloadpacket}"
        return out

    def waits(self, func: Any, args: Sequence[Any], out: Any) -> bool:
        """Whether what Python gets, or a result's shape, depends on numbers of the device."""
        given = [v.device for v in args if isinstance(v, Tensor)]
        if func.overloadpacket in PICKS:
            # By places it is no question; by a mask, the places have to be counted first.
            return any(v is not None and v.dtype in (torch.bool, torch.uint8) for v in args[1])
        if torch.Tag.cudagraph_unsafe in func.tags:
            return True
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.intersection(func.tags):
            return self.device in given
        moved = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        return moved and any(device != out.device for device in given)


def cuda_graph(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], Any], Tensor]:
    """Records a step of a model on this GPU as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    # PyTorch's own stream for recording is the first GPU's that was recorded on: a step on another would be
    # done instead. Other threads may go on with their own work meanwhile.
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        out = step()
    return graph.replay, out


class Recorded:
    """A step and the memory that it works on, always the same; whose state that is may change."""

    def __init__(self, work: Work, tokens: Tensor, state: ModelState):
        self.work, self.tokens = work, tokens.clone()
        self.held: list[Tensor] = []
        self.replay: Callable[[], Any] | None = None
        self.logits: Tensor | None = None
        self.warm = False
        storages = set[int]()
        for leaf in leaves(state):
            own, place = leaf.tensor, leaf.tensor.untyped_storage().data_ptr()
            # Views of what others hold, too, cannot be written to.
            if not own.is_contiguous() or place in storages:
                own = own.clone(memory_format=torch.contiguous_format)
            storages.add(place)
            setattr(leaf.holder, leaf.name, own)
            self.held.append(own)
        self.own(state)

    def once(self, state: ModelState) -> Tensor:
        """The step itself: logits (b v), and everything back in its place."""
        try:
            logits = self.work(self.tokens, state)
            self.bring_back(state)
        finally:
            for leaf, own in zip([*leaves(state)], self.held, strict=True):
                setattr(leaf.holder, leaf.name, own)
            self.own(state)
        return logits

    def take_down(self, state: ModelState, record: Record) -> None:
        """Records the step, which is not done by that."""
        seen = state.seen
        try:
            self.replay, self.logits = record(lambda: self.once(state))
        finally:
            state.seen = seen

    def bring_back(self, state: ModelState) -> None:
        """Puts what a step made anew where the next one looks for it."""
        now = [*leaves(state)]
        ours = {own.untyped_storage().data_ptr() for own in self.held if own.numel()}
        moves = []
        for leaf, own in zip(now, self.held, strict=True):
            new = leaf.tensor
            if new.data_ptr() != own.data_ptr() or new.stride() != own.stride():
                # What lies in a memory that is about to be written is read first.
                moves.append((own, new.clone() if new.untyped_storage().data_ptr() in ours else new))
        for own, new in moves:
            own.copy_(new)

    def own(self, state: ModelState) -> None:
        """Remembers whose memory this is now."""
        self.state = weakref.ref(state)
        self.layers = [*state.layers]
        # Not the state itself, which is nobody's when its owner has forgotten it.
        self.places = [
            (None if leaf.holder is state else leaf.holder, leaf.name, own)
            for leaf, own in zip(leaves(state), self.held, strict=True)
        ]

    def holds(self, state: ModelState) -> bool:
        """Whether the state still is this memory: calls of the model and rolling back put others there."""
        if self.state() is not state or len(self.layers) != len(state.layers):
            return False
        # Loops, for this is what every token waits for.
        for a, b in zip(self.layers, state.layers, strict=True):
            if a is not b:
                return False
        for holder, name, own in self.places:  # noqa: SIM110 - `all` takes twice as long
            if getattr(holder or state, name) is not own:
                return False
        return True

    def adopt(self, state: ModelState) -> None:
        """Moves another state in; the one that was here gets memory of its own."""
        before = self.state()
        if before is not None:
            for leaf in leaves(before):
                if any(leaf.tensor is own for own in self.held):
                    setattr(leaf.holder, leaf.name, leaf.tensor.clone())
        for leaf, own in zip([*leaves(state)], self.held, strict=True):
            if leaf.tensor is not own:
                own.copy_(leaf.tensor)
                setattr(leaf.holder, leaf.name, own)
        self.own(state)

    def step(self, tokens: Tensor, state: ModelState) -> Tensor:
        """Logits (b v) after one more token."""
        self.tokens.copy_(tokens)
        if self.replay is None or self.logits is None:
            return self.once(state)
        self.replay()
        state.seen += 1
        return self.logits.clone()


class Decoder:
    """Steps of one token through a model, the same bits as calls of the model.

    On CUDA a step is recorded for each batch size after one that is only looked at, and replayed from then
    on; `why_not` says why the last step was not. The model must not be moved or get other tensors as weights
    meanwhile. For one thread at a time; several have a decoder each.
    """

    def __init__(self, model: HybridLM, *, compiled: bool = False, record: Record | None = None):
        """`compiled`: what is replayed has been through torch.compile, which has roundings of its own.
        `record`: by default CUDA graphs for a model on a GPU, and nothing elsewhere."""
        self.model = model
        self.device = model.embed.weight.device
        on_gpu = record is None and self.device.type == "cuda"
        self.record = partial(cuda_graph, device=self.device) if on_gpu else record
        # For the first batch size as it is, then once for all others.
        self.compiled = torch.compile(self.logits, fullgraph=True) if compiled else None
        self.why_not: str | None = None
        self.recorded: list[tuple[dict[str, Any], Recorded]] = []
        self.current: Recorded | None = None
        self.tried: list[dict[str, Any]] = []
        self.changed: weakref.ref[ModelState] | None = None
        self.refused: tuple[weakref.ref[ModelState], str] | None = None

    @torch.no_grad()
    def step(self, tokens: Tensor, state: ModelState) -> Tensor:
        """Logits (b v) for the token after `tokens` (b,); `state` is updated, as by a call of the model."""
        rows = state.position.shape
        if tokens.shape != rows or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"tokens: one whole number for each of {rows[0]} sequences, not {tuple(tokens.shape)} "
                f"{str(tokens.dtype).removeprefix('torch.')}"
            )
        self.model.check_length(state.position, state.seen + 1)
        self.why_not = self.reason(state)
        if self.why_not is not None:
            return self.run(self.logits, tokens, state)
        if self.current is None or not self.current.holds(state):
            now = form(state)
            self.current = next((one for known, one in self.recorded if known == now), None)
            if self.current is not None:
                self.current.adopt(state)
            elif now not in self.tried:
                return self.first(tokens, state, now)
            else:
                self.current = Recorded(partial(self.run, self.compiled or self.logits), tokens, state)
                self.recorded.append((now, self.current))
        one = self.current
        if one.replay is None:
            if self.record is None or (self.compiled is not None and not one.warm):
                one.warm, self.why_not = True, "this step is compiled and not recorded"
            elif not self.take_down(one, state, self.record):
                return self.run(self.logits, tokens, state)
        return one.step(tokens, state)

    def reason(self, state: ModelState) -> str | None:
        """Why a step of this state is not recorded, as far as that is known without a look at one."""
        if self.record is None and self.compiled is None:
            return "only steps on a GPU are recorded"
        if self.model.training:
            return "the model is in training mode"
        if torch.is_autocast_enabled(self.device.type):
            return "autocast casts the weights anew for every step"
        if self.refused is not None and self.refused[0]() is state:
            return self.refused[1]
        return None

    def logits(self, tokens: Tensor, state: ModelState) -> Tensor:
        """The model's, (b v)."""
        return self.model(tokens[:, None], state=state).logits[:, -1]

    def run(self, work: Work, tokens: Tensor, state: ModelState) -> Tensor:
        """A step that is done at once. How many tokens were read is counted outside: a compiled step would be
        another one for every count."""
        seen, state.seen = state.seen, 0
        try:
            logits = work(tokens, state)
            seen += 1
        finally:
            state.seen = seen
        return logits

    def first(self, tokens: Tensor, state: ModelState, before: dict[str, Any]) -> Tensor:
        """A step as it is, watched: what allocates or is tuned at a first call has done so when it is
        recorded."""
        devices = {leaf.tensor.device for leaf in leaves(state)}
        with Watch(tokens.device) as watch:
            logits = self.run(self.logits, tokens, state)
        after = form(state)
        never = "the model is on several devices" if len(devices) > 1 else watch.found
        change = difference(before, after)
        self.why_not = never or change or "the first step is only looked at"
        if never is None and change is None:
            self.tried.append(after)
        # What changed once may have come to its end, as a window that is full now.
        elif never is not None or (self.changed is not None and self.changed() is state):
            self.refused = weakref.ref(state), self.why_not
        else:
            self.changed = weakref.ref(state)
        return logits

    def take_down(self, one: Recorded, state: ModelState, record: Record) -> bool:
        """Records a step; False, and the reason told, where that cannot be."""
        try:
            one.take_down(state, record)
        except RuntimeError as error:
            self.why_not = f"a step cannot be recorded: {(str(error).splitlines() or [''])[0]}"
            self.refused = weakref.ref(state), self.why_not
            self.recorded = [(form, other) for form, other in self.recorded if other is not one]
            self.current = None
            return False
        return True
