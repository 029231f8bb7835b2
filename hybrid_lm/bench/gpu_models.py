"""Whole models in `bench gpu`: a training step and generating, of Mamba-1 and Mamba-2 language models.

A training step is forward, loss and backward on one batch, with bfloat16 autocast, without the optimizer.
Generating is what a user waits for: the next token is chosen and read before the one after it, and the clock
on the wall says how long that takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybrid_lm.bench.gpu_cases import (
    CASES,
    COPY,
    MATMUL,
    Floors,
    GpuCase,
    Sizes,
    reasons,
    scan_floors,
    ssd_floors,
)
from hybrid_lm.bench.gpu_device import times
from hybrid_lm.bench.gpu_lms import (
    Steps,
    Training,
    our_steps,
    our_training,
    their_graph,
    their_steps,
    their_training,
    transformers_steps,
)
from hybrid_lm.bench.gpu_peers import Peer
from hybrid_lm.bench.measure import Candidate, Row, add_ratios, attempt, interleaved, relative_errors, spread
from hybrid_lm.bench.models import RECURRENCE, ours
from hybrid_lm.config.schema import ModelConfig

CHECKED = 8
"""Steps of generating that are compared with float64: enough for one to be looked at, compiled, recorded and
replayed."""
FEW_TOKENS = 256
"""Tokens of a training step that are compared with float64."""
TOKENS = 16
"""Tokens of a timed round."""
TRAINING_STEPS = 3
"""Training steps of a timed round."""
LIBRARY, THEIRS = ("transformers",), ("mamba_ssm", "causal_conv1d", "triton")


@dataclass(frozen=True)
class ModelCase:
    """A model of one kind of layer, trained or generating."""

    name: str
    kind: str
    """`mamba` or `mamba2`."""
    decoding: bool
    sizes: Sizes
    """b batch, t tokens, d model width, n states, p head dim, v vocabulary, layers."""
    small: Sizes
    reach: Floors = field(default_factory=dict)

    @property
    def op(self) -> str:
        """The op that decides which backends the model can have."""
        return RECURRENCE[self.kind]

    @property
    def quantity(self) -> str:
        return "token_ms" if self.decoding else "fwd_bwd_ms"

    def config(self, s: Sizes) -> ModelConfig:
        options = {"d_state": s["n"], **({"head_dim": s["p"]} if self.kind == "mamba2" else {})}
        return ours(self.kind, d_model=s["d"], n_layers=s["layers"], vocab_size=s["v"], options=options)

    def floors(self, s: Sizes) -> Floors:
        """Training: six operations for every element of a matrix and token, and the recurrences. A token:
        every weight once, and the states in and out."""
        inner, rank = 2 * s["d"], -(-s["d"] // 16)
        if self.kind == "mamba":
            matrices = s["d"] * 3 * inner + inner * (2 * rank + 2 * s["n"])
            channels, states = inner, inner * s["n"]
            mixing = scan_floors({"b": s["b"], "t": s.get("t", 1), "d": inner, "n": s["n"]}, gated=True)
        else:
            heads = inner // s["p"]
            matrices = s["d"] * (3 * inner + 2 * s["n"] + heads)
            channels, states = inner + 2 * s["n"], inner * s["n"]
            sizes = {"b": s["b"], "t": s.get("t", 1), "h": heads, "p": s["p"], "g": 1, "n": s["n"]}
            mixing = ssd_floors(sizes)
        weights = s["layers"] * matrices + s["d"] * s["v"]
        if self.decoding:
            memory = 8.0 * states + 4.0 * 3 * channels
            return {"token_ms": 1e3 * (2.0 * weights + s["b"] * s["layers"] * memory) / COPY}
        products = 1e3 * 6.0 * weights * s["b"] * s["t"] / MATMUL
        return {"fwd_bwd_ms": products + s["layers"] * mixing["fwd_bwd_ms"]}

    @property
    def peers(self) -> tuple[Candidate, ...]:
        """Those of the full size: for `plan`, which only asks for their names and packages."""
        return tuple(one for one in self.at(self.sizes, torch.device("cpu")) if not one.ours)

    def candidates(self, device: str) -> Iterator[Candidate]:
        """All there are, for their names; `at` makes those that are run."""
        yield from self.at(self.sizes, torch.device(device))

    def at(self, s: Sizes, device: torch.device) -> Iterator[Candidate]:
        """The candidates at a size, on a device."""
        given = (self.kind, self.config(s), device)
        if self.decoding:
            most = CHECKED + 1000 * TOKENS
            yield Candidate("eager", partial(our_steps, *given[1:], s["b"]), ours=True)
            yield Candidate("graph", partial(our_steps, *given[1:], s["b"], "graph"), ours=True)
            load = partial(our_steps, *given[1:], s["b"], "compiled_graph")
            yield Candidate("compiled_graph", load, ours=True, compiled=True)
            yield Peer("transformers", partial(transformers_steps, *given, s["b"]), packages=LIBRARY)
            yield Peer("mamba_ssm", partial(their_steps, *given, s["b"], most), packages=THEIRS)
            yield Peer("mamba_ssm_graph", partial(their_graph, *given, s["b"], most), packages=THEIRS)
            return
        for name, mode in (("eager", None), ("compiled", "default"), ("compiled_graphs", "reduce-overhead")):
            load = partial(our_training, *given[1:], mode)
            yield Candidate(name, load, ours=True, compiled=mode is not None)
        yield Peer("transformers", partial(their_training, "transformers", *given), packages=LIBRARY)
        yield Peer("mamba_ssm", partial(their_training, "mamba_ssm", *given), packages=THEIRS)


def known() -> dict[str, GpuCase | ModelCase]:
    """Every case of `bench gpu` by its name."""
    return {**CASES, **MODELS}


def measure_model(
    case: ModelCase,
    sizes: Sizes,
    names: Sequence[str],
    device: torch.device,
    repeat: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """One case: errors against float64, times, floors, and breaks of the graph under torch.compile."""
    torch.compiler.reset()
    chosen = [one for one in case.at(sizes, device) if one.name in names]
    counts = break_counts(case, sizes, names, device)
    work = Decoding(case, sizes, device) if case.decoding else Learning(case, sizes, device)
    rows: dict[str, Row] = {}
    ready: dict[str, Any] = {}
    for candidate in chosen:
        row = rows[candidate.name] = {"ours": candidate.ours, "status": "ok"}
        if (reason := candidate.missing()) is not None:
            row |= {"status": "absent", "note": reason}
            continue
        tell(f"checking {candidate.name}")
        # What does not start is told, ours or not: the rest of the table can still be measured.
        limit = limit_of(sizes["layers"])
        loaded = attempt(replace(candidate, ours=False, limit=limit), row, work.errors)
        if row["status"] == "ok":
            ready[candidate.name] = loaded
            row |= work.remarks(loaded, candidate)
            if (count := counts.get("ours" if candidate.ours else candidate.name)) is not None:
                row["graph_breaks"] = count
    timed = [one for one in chosen if one.name in ready]
    for name, values in interleaved(timed, ready, work.times, repeat, tell).items():
        rows[name] |= {key: spread(v) for key, v in values.items()}
    floors = case.floors(sizes)
    for row in rows.values():
        row |= {f"{key}_over_floor": row[key]["median"] / floors[key] for key in floors if key in row}
        if case.quantity in row:
            count = sizes["b"] * sizes.get("t", 1)
            row["tokens_per_s"] = 1e3 * count / row[case.quantity]["median"]
    return {
        "op": case.name,
        "sizes": dict(sizes),
        "floors": floors,
        "reach": case.reach,
        "quantities": [case.quantity],
        "not_run": reasons(case.op, device.type),
        "candidates": rows,
        "base": add_ratios(rows, case.quantity),
    }


def limit_of(layers: int) -> float:
    """Errors of eps/2, in each layer three products one after another, forward and backward, add up to
    sqrt(6 layers) eps/2; twice that."""
    return (6 * layers) ** 0.5 * torch.finfo(torch.bfloat16).eps


def break_counts(case: ModelCase, sizes: Sizes, names: Sequence[str], device: torch.device) -> dict[str, int]:
    """Where torch.compile would have to leave the graph in the forward pass of a training step, as dynamo
    counts it on a few tokens: of ours and of each peer that is there. Nothing where nothing is compiled."""
    candidates = [*case.at(sizes, device)]
    if not any(one.compiled and one.name in names for one in candidates) or case.decoding:
        return {}
    tokens = torch.zeros(1, 9, dtype=torch.int64, device=device)
    found = {}
    for one in candidates:
        if one.compiled or one.missing() is not None or not (one.ours or one.name in names):
            continue
        try:
            forward = one.load().loss
            found["ours" if one.ours else one.name] = torch._dynamo.explain(forward)(tokens).graph_break_count
        except Exception:  # Of any kind: it is told where the candidate itself is tried.
            continue
        torch.compiler.reset()
    return found


class Learning:
    """Training steps on one batch; the gradient of the embeddings has come through every layer.

    A step as it is has its few tokens in float64 to stand up to; one that is compiled, for one shape, the
    step as it is on the whole batch.
    """

    def __init__(self, case: ModelCase, s: Sizes, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(s["v"], (s["b"], s["t"] + 1), generator=generator).to(device)
        self.few, self.device = self.tokens[:1, : FEW_TOKENS + 1], device
        self.truth = our_training(case.config(s), device, exact=True).outcome(self.few)
        self.eager = our_training(case.config(s), device).outcome(self.tokens)

    def errors(self, one: Training) -> Mapping[str, float]:
        if one.run is None:
            return relative_errors(one.outcome(self.few), self.truth)
        exact = {name: v.double() for name, v in self.eager.items()}
        return relative_errors(one.outcome(self.tokens), exact)

    def remarks(self, one: Training, candidate: Candidate) -> Row:
        return {}

    def times(self, one: Training) -> dict[str, list[float]]:
        return {"fwd_bwd_ms": times(lambda: one.step(self.tokens), self.device, TRAINING_STEPS)}


class Decoding:
    """Steps of one token, all rows of the batch at once."""

    def __init__(self, case: ModelCase, s: Sizes, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        self.few = torch.randint(s["v"], (CHECKED, s["b"]), generator=generator).to(device)
        self.truth = self.logits(our_steps(case.config(s), device, s["b"], exact=True))

    @torch.no_grad()
    def logits(self, one: Steps) -> dict[str, Tensor]:
        return {"logits": torch.stack([one.step(tokens).clone() for tokens in self.few])}

    def errors(self, one: Steps) -> Mapping[str, float]:
        return relative_errors(self.logits(one), self.truth)

    def remarks(self, one: Steps, candidate: Candidate) -> Row:
        reason = one.why_not() if candidate.name.endswith("graph") else None
        return {} if reason is None else {"note": f"not recorded: {reason}"}

    @torch.no_grad()
    def times(self, one: Steps) -> dict[str, list[float]]:
        found, tokens = [], self.few[0]
        for _ in range(TOKENS):
            begun = time.perf_counter()
            tokens = one.step(tokens).argmax(-1)
            tokens.tolist()
            found.append((time.perf_counter() - begun) * 1e3)
        return {"token_ms": found}


TRAINED = {"b": 8, "t": 2048, "d": 768, "v": 50288, "layers": 24}
FEW = {"b": 2, "t": 6, "d": 16, "v": 20, "layers": 2}
STATES = {"mamba": {"n": 16}, "mamba2": {"n": 128, "p": 64}}
FEW_STATES = {"mamba": {"n": 4}, "mamba2": {"n": 4, "p": 8}}


def without(sizes: Sizes, *names: str) -> Sizes:
    return {name: size for name, size in sizes.items() if name not in names}


MODELS = {
    case.name: case
    for kind in STATES
    for case in (
        ModelCase(f"{kind}_train", kind, False, {**TRAINED, **STATES[kind]}, {**FEW, **FEW_STATES[kind]}),
        *(
            ModelCase(
                f"{kind}_generate_{b}",
                kind,
                True,
                {**without(TRAINED, "t"), **STATES[kind], "b": b},
                {**without(FEW, "t"), **FEW_STATES[kind]},
            )
            for b in (1, 64)
        ),
    )
}
