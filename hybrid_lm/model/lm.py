"""The language model: embed, a pattern of residual layers, norm, logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.layers.base import Auxiliary, Context, Layer, LayerList, Module, State
from hybrid_lm.layers.parts import Embedding, Linear, make_norm
from hybrid_lm.ops import linear, linear_cross_entropy


class LMOutput(NamedTuple):
    """What a call returns: logits (b t v), and the state if one was given."""

    logits: Tensor
    state: ModelState | None


class LMLoss(NamedTuple):
    """What training minimises: the mean of `objective` over the labels, plus `auxiliary.objective`."""

    objective: Tensor
    """(b t): label smoothing and z-loss included; zero without a label."""
    nll: Tensor
    """(b t): -log p(label), in nats; zero without a label."""
    auxiliary: Auxiliary
    """What the layers add, in training mode only: how evenly experts are used."""


@dataclass
class ModelState(State):
    """The memory of a whole model for a batch of sequences."""

    layers: list[State | None]
    """One per residual layer."""
    position: Tensor
    """(b,) int64: the next token's place in its document."""
    doc: Tensor | None
    """(b,) int32: the document of the last token; None while no call has given documents."""
    opened: Tensor | None
    """(b,) int32: the highest document number so far; None like `doc`."""
    seen: int
    """Tokens read, padding included."""


class HybridLM(Module):
    """A stack of residual layers over one embedding. `build_model` makes one; the constructor leaves weights
    unset."""

    def __init__(
        self,
        config: ModelConfig,
        layers: Sequence[Layer],
        shared: Mapping[str, Sequence[Layer]],
        backends: Mapping[str, str],
    ):
        super().__init__()
        assert config.vocab_size is not None
        self.config, self.backends = config, dict(backends)
        d, e = config.d_model, config.embedding
        self.embed = Embedding(config.vocab_size, d)
        self.embed_positions = Embedding(e.max_positions or 0, d) if e.positions == "learned" else None
        self.shared = nn.ModuleDict({name: nn.ModuleList(copies) for name, copies in shared.items()})
        self.layers = LayerList(layers)
        self.final_norm = make_norm(d, config.block) if config.final_norm else None
        self.lm_head = None if e.tied else Linear(d, config.vocab_size, kind="embedding")
        if config.head.bias:
            self.add("lm_bias", (config.vocab_size,), "bias")
        else:
            self.register_parameter("lm_bias", None)

    def forward(
        self,
        tokens: Tensor,
        *,
        state: ModelState | None = None,
        doc_ids: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> LMOutput:
        """Logits for the token after each of `tokens` (b t).

        `state`: what came before (`empty_state`); updated in place and returned. `doc_ids` (b t) int: 0 is
        padding, documents are 1, 2, ... in order, and a token sees its own only; None: the document goes on.
        `positions` (b t): places in the document, by default counted.
        """
        x, state = self.features(tokens, state=state, doc_ids=doc_ids, positions=positions)
        return LMOutput(self.logits(x), state)

    def features(
        self,
        tokens: Tensor | None,
        *,
        state: ModelState | None = None,
        doc_ids: Tensor | None = None,
        positions: Tensor | None = None,
        embeds: Tensor | None = None,
        hidden: list[Tensor] | None = None,
        auxiliary: Auxiliary | None = None,
    ) -> tuple[Tensor, ModelState | None]:
        """`forward` up to the logits: (b t d), after the final norm.

        `embeds` (b t d): what to read in place of the rows of `embed` that `tokens` name. `hidden`: gets what
        enters each layer (b t d), and at last what is returned. `auxiliary`: gets what the layers add to the
        loss.
        """
        rows = embeds if tokens is None else tokens
        assert rows is not None
        if state is not None and len(state.layers) != len(self.layers):
            raise ValueError(
                f"a state of {len(state.layers)} layers, of another model: this one has {len(self.layers)}; "
                "`empty_state` makes one"
            )
        ctx = self.context(rows, state, doc_ids, positions)
        ctx.auxiliary = auxiliary
        x = ctx.embeddings = self.embedded(tokens, ctx.positions, embeds)
        memories = [None] * len(self.layers) if state is None else state.layers
        for i, layer in enumerate(self.layers):
            if hidden is not None:
                hidden.append(x)
            x, memories[i] = layer(x, memories[i], ctx)
        if state is not None:
            state.position = ctx.positions[:, -1] + 1
            state.seen += rows.shape[1]
            if ctx.doc_ids is not None:
                state.doc = ctx.doc_ids[:, -1]
                opened = ctx.doc_ids.amax(1)
                state.opened = opened if state.opened is None else torch.maximum(opened, state.opened)
        x = x if self.final_norm is None else self.final_norm(x, ctx)
        if hidden is not None:
            hidden.append(x)
        return x, state

    def logits(self, x: Tensor) -> Tensor:
        """x (... d) -> (... v)."""
        head = self.config.head
        if self.lm_head is None:
            logits = linear(x, self.embed.weight, backend=self.backends.get("linear"))
        else:
            # A call of the module, for it may have been replaced by one that adds to it (PEFT).
            logits = self.lm_head(x, Context(x.new_empty(0), backends=self.backends))
        if self.lm_bias is not None:
            logits = logits + self.lm_bias
        if head.multiplier != 1.0:
            logits = logits * head.multiplier
        return head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits

    def token_loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        doc_ids: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> LMLoss:
        """Loss in nats at each labelled place, (b t), zero where the label is -100; the logits are never all
        in memory."""
        added = Auxiliary([], [])
        x, _ = self.features(tokens, doc_ids=doc_ids, auxiliary=added if self.training else None)
        loss = linear_cross_entropy(
            x.flatten(0, 1),
            self.head_weight,
            labels.flatten(),
            bias=self.lm_bias,
            scale=self.config.head.multiplier,
            softcap=self.config.head.softcap,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )
        # Copies: layers that are computed again for the gradients hand in the same a second time.
        auxiliary = Auxiliary([*added.terms], [*added.loads])
        return LMLoss(loss.objective.view(labels.shape), loss.nll.view(labels.shape), auxiliary)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix (v d)."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training keeps only the input of each layer, and computes the rest again for gradients."""
        return all(layer.gradient_checkpointing for layer in self.layers)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        for layer in list[Any](self.layers):
            layer.gradient_checkpointing = on

    def empty_state(self, batch: int, *, max_tokens: int | None = None) -> ModelState:
        """The memory before the first token of `batch` sequences; `max_tokens` reserves room."""
        layers = [layer.empty_state(batch, max_tokens=max_tokens) for layer in self.layers]
        position = torch.zeros(batch, dtype=torch.int64, device=self.embed.weight.device)
        return ModelState(layers, position, None, None, 0)

    def embedded(self, tokens: Tensor | None, positions: Tensor, embeds: Tensor | None = None) -> Tensor:
        """Token embeddings, or `embeds` in their place (b t d), with absolute positions if there are any."""
        e = self.config.embedding
        x = self.embed(tokens) if embeds is None else embeds
        if e.multiplier != 1.0:
            # Rounded to the model's type, as the checkpoints that have this factor were trained.
            x = x * torch.tensor(e.multiplier, dtype=x.dtype)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        elif e.positions == "sinusoidal":
            x = x + sinusoids(positions, x.shape[-1]).to(x.dtype)
        return F.dropout(x, e.dropout, self.training) if e.dropout else x

    def context(
        self, rows: Tensor, state: ModelState | None, doc_ids: Tensor | None, positions: Tensor | None
    ) -> Context:
        """What the layers of a call on tokens or embeddings (b t ...) share: documents, resets, positions."""
        b, t = rows.shape[:2]
        reset = None
        if doc_ids is None:
            # The documents go on: nothing is reset, but their numbers still say which keys are theirs.
            if state is not None and state.doc is not None:
                doc_ids = state.doc[:, None].expand(b, t)
        else:
            doc_ids = doc_ids.to(torch.int32)
            before = self._document_before(doc_ids, state)
            reset = doc_ids != torch.cat([before, doc_ids[:, :-1]], 1)
            if not torch.compiler.is_compiling() and (state is not None or doc_ids.device.type == "cpu"):
                check_order(doc_ids, reset, None if state is None else state.opened)
        start = None if state is None else state.position
        if positions is None:
            positions = count_positions(b, t, reset, start, rows.device)
        self.check_length(positions, (0 if state is None else state.seen) + t)
        return Context(positions, doc_ids, reset, backends=self.backends)

    def _document_before(self, doc_ids: Tensor, state: ModelState | None) -> Tensor:
        """(b 1): the document of the token before the first; -1 if there is none."""
        if state is None or state.seen == 0:
            return torch.full_like(doc_ids[:, :1], -1)
        return torch.ones_like(doc_ids[:, :1]) if state.doc is None else state.doc[:, None]

    def check_length(self, positions: Tensor, seen: int) -> None:
        """ValueError for positions that the model has not learned; `seen`: no document can be longer."""
        limit = self.config.embedding.max_positions if self.embed_positions is not None else None
        # Positions are at most the tokens read, so that a look at the data is needed only beyond the limit.
        if limit is not None and seen > limit and int(positions.max()) >= limit:
            raise ValueError(
                f"a document of {int(positions.max()) + 1} tokens, but the model has learned positions for "
                f"{limit} (model.embedding.max_positions); use shorter documents, or positions that have no "
                "limit (rope, alibi)"
            )


def check_order(doc_ids: Tensor, reset: Tensor, opened: Tensor | None) -> None:
    """ValueError if a document's number comes back after another: attention would see it again, a recurrence
    would not."""
    first = torch.zeros_like(doc_ids[:, :1]) if opened is None else opened[:, None]
    highest = torch.cummax(torch.cat([first, doc_ids[:, :-1]], 1), 1).values
    wrong = reset & (doc_ids > 0) & (doc_ids <= highest)
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"doc_ids[{row}, {place}] = {int(doc_ids[row, place])}: document numbers must go up along a row "
            f"(0 is padding), and {int(highest[row, place])} was there before; pad on the left, and give a "
            "new document a new number"
        )


def count_positions(
    b: int, t: int, reset: Tensor | None, start: Tensor | None, device: torch.device
) -> Tensor:
    """(b t) int64: places from 0 in each document; the first goes on from `start` (b,)."""
    index = torch.arange(t, device=device).expand(b, t)
    if reset is None:
        return index if start is None else index + start[:, None]
    # The index of the last reset so far; before any, a negative one that makes the count go on from `start`.
    origin = torch.zeros(b, 1, dtype=torch.int64, device=device) if start is None else -start[:, None]
    last = torch.where(reset, index, origin.expand(b, t))
    return index - torch.cummax(last, 1).values


def sinusoids(positions: Tensor, d: int) -> Tensor:
    """sin and cos of positions (b t) at wavelengths from 2 pi to 10000 * 2 pi, (b t d). Vaswani et al. 2017,
    section 3.5."""
    rate = torch.exp(
        torch.arange(0, d, 2, device=positions.device) * (-torch.log(torch.tensor(10000.0)).item() / d)
    )
    angle = positions[..., None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[..., :d]
