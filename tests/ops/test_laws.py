"""What must hold for every op, by table: backends agree, gradients, tails, strides, bf16 and compile."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_lm import ops
from tests.ops.cases import (
    FAST,
    Case,
    attention,
    cast,
    conv,
    delta_rule,
    error,
    grouped,
    linear,
    loss,
    lru,
    norm,
    outputs,
    run,
    scan,
    ssd,
)

RECURRENT = [
    *(conv(t, w) for t in (1, 2, 3, 9, 37) for w in (1, 4)),
    conv(5, full=False, reset=False),
    conv(5, 2, full=False),
    conv(37, 3, reset=False),
    # wide enough for several blocks of tokens, so that a tap reaches across them
    conv(40, 4, d=8192),
    *(scan(t) for t in (1, 2, 15, 16, 17, 37)),
    *(scan(t, full=False, reset=False) for t in (1, 33)),
    scan(33, b=1, full=False),
    scan(33, b=1, reset=False),
    *(ssd(t, c, g) for t, c, g in ((1, 8, 2), (2, 1, 1), (7, 8, 4), (8, 8, 2), (17, 8, 1), (37, 16, 2))),
    *(ssd(t, full=False, reset=False) for t in (1, 19)),
    ssd(19, full=False),
    ssd(19, reset=False),
    *(
        delta_rule(t, c, g)
        for t, c, g in ((1, 8, 2), (2, 1, 1), (7, 8, 4), (8, 8, 2), (17, 8, 1), (37, 16, 2))
    ),
    *(delta_rule(t, full=False, reset=False) for t in (1, 19)),
    delta_rule(19, full=False),
    delta_rule(19, reset=False),
    *(lru(t) for t in (1, 2, 3, 4, 16, 17, 37)),
    *(lru(t, full=False, reset=False) for t in (1, 19)),
    lru(19, full=False),
    lru(19, reset=False),
]
POINTWISE = [
    *(attention(t, s, docs=docs) for t, s in ((7, 7), (1, 7), (3, 9)) for docs in (False, True)),
    *(attention(7, 7, heads=h, window=w) for h in (2, 4) for w in (1, 3, 100)),
    attention(1, 9, window=4, docs=True),
    attention(5, 9, window=4, docs=True, slopes=True, softcap=3.0, scale=0.3),
    attention(7, 7, slopes=True),
    *(attention(1, 9, slopes=True, docs=docs) for docs in (False, True)),
    attention(1, 9, slopes=True, docs=True, sinks=True),
    attention(7, 7, softcap=3.0),
    attention(7, 7, sinks=True),
    attention(1, 9, sinks=True, window=4, docs=True),
    attention(5, 9, sinks=True, window=4, docs=True, slopes=True, scale=0.3),
    attention(5, 9, sinks=True, docs=True, softcap=3.0),
    *(loss(**o) for o in ({}, {"bias": True}, {"scale": 0.5, "softcap": 4.0}, {"label_smoothing": 0.1})),
    loss(bias=True, z_loss=0.01, label_smoothing=0.1, scale=0.5, softcap=4.0),
    norm(eps=0.1),
    norm(weight=False),
    norm(unit_offset=True),
    *(norm(gate=True, order=o, groups=k) for o in ("gate_norm", "norm_gate", "gate") for k in (1, 2)),
    norm(gate=True, weight=False, groups=4),
    *(linear(rows, bias=bias) for rows in (1, 9) for bias in (True, False)),
    *(grouped(*sizes, bias=bias) for sizes in ((3,), (0, 4, 1, 0, 5), (2, 2, 0)) for bias in (True, False)),
]
CASES = RECURRENT + POINTWISE
# One plain and one full case of each op, where a law costs seconds.
FEW = [
    conv(5), scan(18), lru(18), ssd(9, 4), delta_rule(9, 4),
    attention(6, 6), attention(6, 6, docs=True, sinks=True),
    attention(5, 7, window=3, softcap=3.0, slopes=True),
    loss(bias=True, z_loss=0.01, label_smoothing=0.1, softcap=4.0, scale=0.5),
    norm(), norm(gate=True, groups=2), linear(), grouped(2, 0, 3),
]  # fmt: skip


def over(cases: list[Case]) -> Any:
    """Every case with every fast backend that its op has."""
    has = {(row.op, row.backend) for row in ops.report()}
    pairs = [(case, name) for case in cases for name in FAST if (case.op.__name__, name) in has]
    ids = [f"{case.id}-{name}" for case, name in pairs]
    return pytest.mark.parametrize(("case", "backend"), pairs, ids=ids, indirect=["backend"])


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# No sum in these shapes has more than 2**12 terms, and each is rounded once.
ROUNDINGS = 2**12
EXACT = ROUNDINGS * torch.finfo(torch.float64).eps


@over(CASES)
def test_equals_the_reference(case: Case, backend: str, generator: torch.Generator) -> None:
    inputs = case.make(generator)
    expected = run(case.op, cast(inputs, torch.float64), backend="reference")
    actual = run(case.op, cast(inputs, torch.float64), backend=backend)
    assert [v.shape for v in actual] == [v.shape for v in expected]
    assert max(error(a, e) for a, e in zip(actual, expected, strict=True)) <= EXACT


@over([*FEW, conv(1), scan(1), lru(1), ssd(1), delta_rule(1)])
def test_gradients_by_finite_differences(case: Case, backend: str, generator: torch.Generator) -> None:
    inputs = cast(case.make(generator), torch.float64)
    inputs.pop("alibi_slopes", None)
    names = [k for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(outputs(case.op(**inputs | dict(zip(names, leaves, strict=True)), backend=backend)))

    # gradcheck's defaults: differences of 1e-6, for which 1e-5 is the error of the second order
    torch.autograd.gradcheck(function, [inputs[k] for k in names], fast_mode=True)


@over(FEW)
def test_strided_inputs(case: Case, backend: str, generator: torch.Generator) -> None:
    inputs = cast(case.make(generator), torch.float64)

    def spread(v: Any) -> Any:
        return torch.stack((v, v + 1), -1)[..., 0] if isinstance(v, Tensor) and v.is_floating_point() else v

    strided = {k: spread(v) for k, v in inputs.items()}
    for plain, other in zip(
        outputs(case.op(**inputs, backend=backend)), outputs(case.op(**strided, backend=backend)), strict=True
    ):
        assert error(other, plain) <= EXACT


@over([c for c in FEW if c.op is not ops.attention])
def test_bf16_error_is_at_most_twice_the_reference_s(
    case: Case, backend: str, generator: torch.Generator
) -> None:
    inputs = {
        k: v.detach() for k, v in cast(case.make(generator), torch.bfloat16).items() if isinstance(v, Tensor)
    }
    inputs = case.make(generator) | inputs
    exact = run(case.op, cast(inputs, torch.float64), backend="reference")
    plain = run(case.op, cast(inputs, torch.bfloat16), backend="reference")
    fast = run(case.op, cast(inputs, torch.bfloat16), backend=backend)
    assert [v.dtype for v in fast] == [v.dtype for v in plain]
    for e, p, f in zip(exact, plain, fast, strict=True):
        # twice the error of plain PyTorch in this dtype, and the sums in float32
        assert error(f, e) <= 2 * error(p, e) + ROUNDINGS * torch.finfo(torch.float32).eps


@over(FEW)
def test_float32_stays_near_float64(case: Case, backend: str, generator: torch.Generator) -> None:
    inputs = case.make(generator)
    exact = run(case.op, cast(inputs, torch.float64), backend="reference")
    single = run(case.op, cast(inputs, torch.float32), backend=backend)
    assert (
        max(error(s, e) for s, e in zip(single, exact, strict=True))
        <= ROUNDINGS * torch.finfo(torch.float32).eps
    )


@pytest.mark.compile
@pytest.mark.parametrize("dynamic", [False, True])
@over([*FEW, scan(1), lru(1), ssd(1), delta_rule(1), conv(1), attention(1, 9, slopes=True)])
def test_compiled_equals_eager(case: Case, backend: str, dynamic: bool, generator: torch.Generator) -> None:
    torch.compiler.reset()
    inputs = case.make(generator)
    # aot_eager traces forward and backward whole, as inductor does, without seconds of C++ compilation
    compiled = torch.compile(case.op, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected = run(case.op, cast(inputs, torch.float64), backend=backend)
    actual = run(compiled, cast(inputs, torch.float64), backend=backend)
    assert max(error(a, e) for a, e in zip(actual, expected, strict=True)) <= EXACT


@over(
    [
        conv(5),
        conv(5, full=False, reset=False),
        scan(5),
        scan(5, full=False, reset=False),
        lru(5),
        lru(5, full=False),
        ssd(5),
        ssd(5, full=False),
        delta_rule(5),
        delta_rule(5, full=False),
    ]
)
def test_recurrences_keep_autocast_out(case: Case, backend: str, generator: torch.Generator) -> None:
    inputs = case.make(generator)
    expected = run(case.op, cast(inputs, torch.float32), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(case.op, cast(inputs, torch.float32), backend=backend)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
