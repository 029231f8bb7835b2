"""What must hold for every op, by table: backends agree, gradients, tails, strides, bf16 and compile."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_lm import ops

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    id: str
    op: Callable[..., Any]
    make: Callable[[torch.Generator], Inputs]  # float64 inputs


def _randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _reset(g: torch.Generator, b: int, t: int) -> Tensor:
    return torch.rand(b, t, generator=g) < 0.2


def conv(t: int, w: int = 4, *, full: bool = True, reset: bool = True, d: int = 6) -> Case:
    def make(g: torch.Generator) -> Inputs:
        inputs: Inputs = {"x": _randn(g, 2, t, d), "weight": _randn(g, d, w)}
        if full:
            inputs |= {"bias": _randn(g, d), "activation": "silu", "initial": _randn(g, 2, w - 1, d)}
        return inputs | ({"reset": _reset(g, 2, t)} if reset else {})

    return Case(f"conv-t{t}-w{w}-{'full' if full else 'bare'}{'-reset' * reset}", ops.causal_conv1d, make)


def scan(t: int, *, full: bool = True, reset: bool = True, b: int = 2) -> Case:
    def make(g: torch.Generator) -> Inputs:
        d, n = 6, 3
        inputs: Inputs = {
            "x": _randn(g, b, t, d),
            "dt": _randn(g, b, t, d).abs(),
            "A": -_randn(g, d, n).abs(),
            "B": _randn(g, b, t, n),
            "C": _randn(g, b, t, n),
        }
        if full:
            inputs |= {"D": _randn(g, d), "z": _randn(g, b, t, d), "dt_bias": _randn(g, d)}
            inputs |= {"dt_softplus": True, "initial": _randn(g, b, d, n)}
        return inputs | ({"reset": _reset(g, b, t)} if reset else {})

    return Case(f"scan-b{b}-t{t}-{'full' if full else 'bare'}{'-reset' * reset}", ops.selective_scan, make)


def ssd(t: int, chunk: int = 8, groups: int = 2, *, full: bool = True, reset: bool = True) -> Case:
    def make(g: torch.Generator) -> Inputs:
        b, h, p, n = 2, 4, 3, 5
        inputs: Inputs = {
            "x": _randn(g, b, t, h, p),
            "dt": _randn(g, b, t, h).abs(),
            "A": -_randn(g, h).abs(),
            "B": _randn(g, b, t, groups, n),
            "C": _randn(g, b, t, groups, n),
            "chunk": chunk,
        }
        if full:
            inputs |= {
                "D": _randn(g, h),
                "dt_bias": _randn(g, h),
                "dt_softplus": True,
                "dt_limit": (0.1, 2.0),
            }
            inputs |= {"initial": _randn(g, b, h, p, n)}
        return inputs | ({"reset": _reset(g, b, t)} if reset else {})

    name = f"ssd-t{t}-c{chunk}-g{groups}-{'full' if full else 'bare'}{'-reset' * reset}"
    return Case(name, ops.ssd, make)


def attention(
    t: int, s: int, *, docs: bool = False, slopes: bool = False, heads: int = 4, **options: Any
) -> Case:
    def make(g: torch.Generator) -> Inputs:
        inputs: Inputs = {
            "q": _randn(g, 2, t, heads, 6),
            "k": _randn(g, 2, s, 2, 6),
            "v": _randn(g, 2, s, 2, 5),
        }
        if docs:
            ids = torch.randint(0, 4, (2, s), generator=g).sort(1).values
            inputs |= {"q_docs": ids[:, s - t :], "k_docs": ids}
        if slopes:
            inputs["alibi_slopes"] = ops.alibi_slopes(heads)
        return inputs | options

    words = [*("docs",) * docs, *("alibi",) * slopes, *(f"{k}{v}" for k, v in options.items())]
    return Case("-".join([f"attention-t{t}-s{s}-h{heads}", *words]), ops.attention, make)


def loss(*, bias: bool = False, **options: Any) -> Case:
    def make(g: torch.Generator) -> Inputs:
        labels = torch.randint(0, 11, (20,), generator=g)
        labels[::3] = -100
        inputs: Inputs = {"x": _randn(g, 20, 6), "weight": _randn(g, 11, 6), "labels": labels, "chunk": 4}
        return inputs | ({"bias": _randn(g, 11)} if bias else {}) | options

    words = [*("bias",) * bias, *(f"{k}{v}" for k, v in options.items())]
    return Case("-".join(["loss", *words]), ops.linear_cross_entropy, make)


def norm(name: str, op: Callable[..., Any], *, gate: bool, weight: bool = True, **options: Any) -> Case:
    def make(g: torch.Generator) -> Inputs:
        inputs: Inputs = {"y" if gate else "x": _randn(g, 2, 3, 8)}
        inputs |= {"gate": _randn(g, 2, 3, 8)} if gate else {}
        return inputs | ({"weight": _randn(g, 8)} if weight else {}) | options

    return Case(name, op, make)


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
]
POINTWISE = [
    *(attention(t, s, docs=docs) for t, s in ((7, 7), (1, 7), (3, 9)) for docs in (False, True)),
    *(attention(7, 7, heads=h, window=w) for h in (2, 4) for w in (1, 3, 100)),
    attention(1, 9, window=4, docs=True),
    attention(5, 9, window=4, docs=True, slopes=True, softcap=3.0, scale=0.3),
    attention(7, 7, slopes=True),
    attention(7, 7, softcap=3.0),
    *(loss(**o) for o in ({}, {"bias": True}, {"scale": 0.5, "softcap": 4.0}, {"label_smoothing": 0.1})),
    loss(bias=True, z_loss=0.01, label_smoothing=0.1, scale=0.5, softcap=4.0),
    norm("rms", ops.rms_norm, gate=False, eps=0.1),
    norm("rms-bare", ops.rms_norm, gate=False, weight=False),
    norm("rms-offset", ops.rms_norm, gate=False, unit_offset=True),
    *(
        norm(f"gated-{o}-{k}", ops.gated_rms_norm, gate=True, order=o, groups=k)
        for o in ("gate_norm", "norm_gate", "gate")
        for k in (1, 2)
    ),
    norm("gated-bare", ops.gated_rms_norm, gate=True, weight=False, groups=4),
]
CASES = RECURRENT + POINTWISE
# One plain and one full case of each op, where a law costs seconds.
FEW = [
    conv(5), scan(18), ssd(9, 4),
    attention(6, 6), attention(6, 6, docs=True), attention(5, 7, window=3, softcap=3.0, slopes=True),
    loss(bias=True, z_loss=0.01, label_smoothing=0.1, softcap=4.0, scale=0.5),
    norm("rms", ops.rms_norm, gate=False), norm("gated", ops.gated_rms_norm, gate=True, groups=2),
]  # fmt: skip


def over(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.id)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Leaves of the given type that want gradients, and everything else as it is."""

    def leaf(v: Any) -> Any:
        wanted = isinstance(v, Tensor) and v.is_floating_point()
        return v.detach().to(dtype, copy=True).requires_grad_() if wanted else v

    return {k: leaf(v) for k, v in inputs.items()}


def outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def run(op: Callable[..., Any], inputs: Inputs, **options: Any) -> list[Tensor]:
    """Outputs, then the gradient of every float input under fixed random weights of the outputs."""
    ys = outputs(op(**inputs, **options))
    g = torch.Generator().manual_seed(1)
    total = sum((y.double() * torch.randn(y.shape, generator=g, dtype=torch.float64)).sum() for y in ys)
    leaves = [
        v for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad and k != "alibi_slopes"
    ]
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [y.detach() for y in ys] + [
        torch.zeros_like(v) if g is None else g for g, v in zip(grads, leaves, strict=True)
    ]


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value, or to 1 for small ones."""
    if not expected.numel():
        return 0.0
    a, e = actual.detach().double(), expected.detach().double()
    return float((a - e).abs().max() / e.abs().max().clamp(min=1))


# No sum in these shapes has more than 2**12 terms, and each is rounded once.
ROUNDINGS = 2**12
EXACT = ROUNDINGS * torch.finfo(torch.float64).eps


@over(CASES)
def test_torch_equals_reference(case: Case, generator: torch.Generator) -> None:
    inputs = case.make(generator)
    expected = run(case.op, cast(inputs, torch.float64), backend="reference")
    actual = run(case.op, cast(inputs, torch.float64), backend="torch")
    assert [v.shape for v in actual] == [v.shape for v in expected]
    assert max(error(a, e) for a, e in zip(actual, expected, strict=True)) <= EXACT


@over([*FEW, conv(1), scan(1), ssd(1)])
def test_gradients_by_finite_differences(case: Case, generator: torch.Generator) -> None:
    inputs = cast(case.make(generator), torch.float64)
    inputs.pop("alibi_slopes", None)
    names = [k for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(outputs(case.op(**inputs | dict(zip(names, leaves, strict=True)), backend="torch")))

    # gradcheck's defaults: differences of 1e-6, for which 1e-5 is the error of the second order
    torch.autograd.gradcheck(function, [inputs[k] for k in names], fast_mode=True)


@over(FEW)
def test_strided_inputs(case: Case, generator: torch.Generator) -> None:
    inputs = cast(case.make(generator), torch.float64)

    def spread(v: Any) -> Any:
        return torch.stack((v, v + 1), -1)[..., 0] if isinstance(v, Tensor) and v.is_floating_point() else v

    strided = {k: spread(v) for k, v in inputs.items()}
    for plain, other in zip(outputs(case.op(**inputs)), outputs(case.op(**strided)), strict=True):
        assert error(other, plain) <= EXACT


@over([c for c in FEW if c.op is not ops.attention])
def test_bf16_error_is_at_most_twice_the_reference_s(case: Case, generator: torch.Generator) -> None:
    inputs = {
        k: v.detach() for k, v in cast(case.make(generator), torch.bfloat16).items() if isinstance(v, Tensor)
    }
    inputs = case.make(generator) | inputs
    exact = run(case.op, cast(inputs, torch.float64), backend="reference")
    plain = run(case.op, cast(inputs, torch.bfloat16), backend="reference")
    fast = run(case.op, cast(inputs, torch.bfloat16), backend="torch")
    assert [v.dtype for v in fast] == [v.dtype for v in plain]
    for e, p, f in zip(exact, plain, fast, strict=True):
        # twice the error of plain PyTorch in this dtype, and the sums in float32
        assert error(f, e) <= 2 * error(p, e) + ROUNDINGS * torch.finfo(torch.float32).eps


@over(FEW)
def test_float32_stays_near_float64(case: Case, generator: torch.Generator) -> None:
    inputs = case.make(generator)
    exact = run(case.op, cast(inputs, torch.float64))
    single = run(case.op, cast(inputs, torch.float32))
    assert (
        max(error(s, e) for s, e in zip(single, exact, strict=True))
        <= ROUNDINGS * torch.finfo(torch.float32).eps
    )


@pytest.mark.compile
@pytest.mark.parametrize("dynamic", [False, True])
@over([*FEW, scan(1), ssd(1), conv(1)])
def test_compiled_equals_eager(case: Case, dynamic: bool, generator: torch.Generator) -> None:
    torch.compiler.reset()
    inputs = case.make(generator)
    # aot_eager traces forward and backward whole, as inductor does, without seconds of C++ compilation
    compiled = torch.compile(case.op, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected = run(case.op, cast(inputs, torch.float64))
    actual = run(compiled, cast(inputs, torch.float64))
    assert max(error(a, e) for a, e in zip(actual, expected, strict=True)) <= EXACT


@over(
    [
        conv(5),
        conv(5, full=False, reset=False),
        scan(5),
        scan(5, full=False, reset=False),
        ssd(5),
        ssd(5, full=False),
    ]
)
def test_recurrences_keep_autocast_out(case: Case, generator: torch.Generator) -> None:
    inputs = case.make(generator)
    expected = run(case.op, cast(inputs, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(case.op, cast(inputs, torch.float32))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
