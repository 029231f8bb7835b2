"""Native values and gradients against the float64 reference: odd shapes, types, layouts, absent inputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_lm import ops
from hybrid_lm.ops.precision import wide
from tests.ops.cases import Case, Inputs, cast, conv, error, leaves_of, linear, norm, outputs, run, scan, ssd

CONV = [
    *(conv(t, w, b=b, d=d) for b, t, d, w in (
        (1, 1, 1, 1), (3, 1, 65, 4), (1, 2, 7, 4), (3, 3, 33, 2), (1, 5, 6, 9), (1, 31, 5, 3), (1, 32, 16, 4),
        (3, 33, 17, 5), (1, 63, 3, 7), (1, 64, 64, 4), (3, 65, 20, 4), (1, 129, 9, 4), (1, 40, 2100, 4),
    )),
    *(conv(t, 4, d=19, full=False, reset=reset) for t in (1, 2, 37) for reset in (False, True)),
    *(conv(35, 4, d=19, without=(name,)) for name in ("bias", "activation", "initial", "reset")),
    *(conv(t, 4, d=19, reset=reset) for t in (1, 2, 35) for reset in ("first", "all")),
]  # fmt: skip
SCAN = [
    *(scan(t, b=b, d=d, n=n) for b, t, d, n in (
        (1, 1, 1, 1), (3, 1, 65, 16), (1, 2, 3, 3), (3, 3, 17, 24), (1, 31, 33, 16), (1, 32, 64, 1),
        (3, 33, 7, 3), (1, 63, 130, 2), (1, 64, 16, 65), (3, 65, 5, 16), (1, 129, 40, 7),
        (1, 66, 3, 130), (1, 9, 5, 256),
    )),
    *(scan(t, d=19, n=5, full=False, reset=reset) for t in (1, 2, 37) for reset in (False, True)),
    *(scan(35, d=19, n=5, without=(name,))
      for name in ("D", "z", "dt_bias", "dt_softplus", "initial", "reset")),
    *(scan(t, d=19, n=5, reset=reset) for t in (1, 2, 35) for reset in ("first", "all")),
]  # fmt: skip
SSD = [
    *(ssd(t, 64, g, b=b, h=h, p=p, n=n) for b, t, h, p, g, n in (
        (1, 1, 1, 1, 1, 1), (3, 1, 4, 64, 2, 16), (1, 2, 3, 5, 3, 3), (3, 3, 6, 17, 2, 24),
        (1, 8, 2, 8, 1, 16), (1, 9, 2, 3, 1, 5), (1, 31, 4, 33, 4, 16), (1, 32, 2, 64, 1, 1),
        (3, 33, 6, 3, 2, 3), (1, 63, 3, 65, 1, 7), (1, 64, 2, 16, 2, 65), (3, 65, 4, 1, 1, 16),
        (1, 129, 9, 5, 1, 24), (2, 130, 20, 3, 2, 4),
    )),
    *(ssd(t, 64, p=7, full=False, reset=reset) for t in (1, 2, 67) for reset in (False, True)),
    *(ssd(67, 64, p=7, without=(name,))
      for name in ("D", "dt_bias", "dt_softplus", "dt_limit", "initial", "reset")),
    *(ssd(t, 64, p=7, reset=reset) for t in (1, 2, 67) for reset in ("first", "all")),
]  # fmt: skip
NORM = [
    *(norm(rows=(rows,), d=d) for rows, d in ((1, 1), (3, 17), (33, 64), (65, 130))),
    *(norm(d=19, **options) for options in ({"weight": False}, {"unit_offset": True}, {"eps": 0.5})),
    *(
        norm(gate=True, weight=weight, rows=(5, 7), d=36, groups=groups, order=order)
        for order in ("gate_norm", "norm_gate", "gate")
        for groups, weight in ((1, True), (4, False), (12, True))
    ),
]  # fmt: skip
LINEAR = [
    *(linear(rows, d, out) for rows, d, out in (
        (1, 1, 1), (1, 17, 5), (2, 33, 3), (3, 130, 9), (4, 64, 16), (1, 70, 2100), (1, 40000, 3),
    )),
    linear(bias=False),
]  # fmt: skip
ODD = [*CONV, *SCAN, *SSD, *NORM]
SOME = [
    conv(37, d=19), scan(37, d=19, n=5), ssd(67, 64, p=7), norm(rows=(3, 5), d=19),
    norm(gate=True, rows=(3, 5), d=36, groups=4),
]  # fmt: skip
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

native = torch.ops.hybrid_lm_native


def over(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.id)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def check(case: Case, isas: list[str], inputs: Callable[[], Inputs], unused: int | None = None) -> None:
    """Every instruction set's results against the reference on the same numbers in float64."""
    expected = run(case.op, cast(inputs(), torch.float64), unused, backend="reference")
    plain = run(case.op, inputs(), unused, backend="reference")
    n_outputs = len(expected) - len(leaves_of(inputs()))
    names = [*(f"output {k}" for k in range(n_outputs)), *leaves_of(inputs())]
    for isa in isas:
        assert native.use_isa(isa)
        actual = run(case.op, inputs(), unused, backend="native")
        assert [(a.dtype, a.shape) for a in actual] == [(p.dtype, p.shape) for p in plain]
        for name, a, e in zip(names, actual, expected, strict=True):
            assert error(a, e) <= bound(case, inputs(), a), (isa, name)
        # Without gradients other ways are taken: nothing is kept, and few tokens go one by one.
        with torch.no_grad():
            alone = outputs(case.op(**inputs(), backend="native"))
        for name, a, e in zip(names, alone, expected, strict=False):
            assert error(a, e) <= bound(case, inputs(), a), (isa, name, "without gradients")


def bound(case: Case, inputs: Inputs, result: Tensor) -> float:
    """Roundings of the wide type, one for each link of the case's chain, then one to the result's."""
    sums = wide(next(iter(inputs.values())))
    return case.chain * torch.finfo(sums).eps + (result.dtype != sums) * torch.finfo(result.dtype).eps / 2


@over(ODD)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_float64_reference(
    case: Case, dtype: torch.dtype, isas: list[str], generator: torch.Generator
) -> None:
    made = case.make(generator)
    check(case, isas, lambda: cast(made, dtype))


@over(LINEAR)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_times_a_matrix(
    case: Case, dtype: torch.dtype, isas: list[str], generator: torch.Generator
) -> None:
    """Only without gradients, for weights of x's type, whose rows may be apart."""
    inputs = {k: v.to(dtype) for k, v in case.make(generator).items()}
    exact = ops.linear(**{k: v.double() for k, v in inputs.items()}, backend="reference")
    for isa in isas:
        native.use_isa(isa)
        for weight in (inputs["weight"], gaps(inputs["weight"], 1, 2, 1)):
            y = ops.linear(**inputs | {"weight": weight}, backend="native")
            assert y.dtype == dtype
            assert error(y, exact) <= bound(case, inputs, y), (isa, weight.stride())


PARAMETERS = ("weight", "bias", "A", "D", "dt_bias", "initial")
MIXED: dict[str, Callable[[str, int], torch.dtype]] = {
    "parameters-f32": lambda name, k: torch.float32 if name in PARAMETERS else torch.bfloat16,
    "parameters-bf16": lambda name, k: torch.bfloat16 if name in PARAMETERS else torch.float32,
    "parameters-f64": lambda name, k: torch.float64 if name in PARAMETERS else torch.float32,
    "x-f64": lambda name, k: torch.float64 if k == 0 else torch.float32,
    "all-sorts": lambda name, k: DTYPES[(k + 1) % 4],
}


@over(SOME)
@pytest.mark.parametrize("types", MIXED)
def test_types_may_be_mixed(case: Case, types: str, isas: list[str], generator: torch.Generator) -> None:
    made = {
        name: v.to(MIXED[types](name, k)) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, (name, v) in enumerate(case.make(generator).items())
    }
    if case.op is ops.causal_conv1d:
        # whose state is of x's type, and taken as such
        made["initial"] = made["initial"].to(made["x"].dtype)

    def leaf(v: Any) -> Any:
        return v.clone().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v

    check(case, isas, lambda: {name: leaf(v) for name, v in made.items()})


def test_conv_takes_a_wider_state_at_the_precision_of_x(generator: torch.Generator) -> None:
    made = conv(5, reset=False).make(generator)
    initial = made.pop("initial").float().requires_grad_()
    inputs = cast(made, torch.bfloat16)
    actual = run(ops.causal_conv1d, inputs | {"initial": initial}, backend="native")
    rounded = initial.detach().bfloat16().requires_grad_()
    expected = run(ops.causal_conv1d, inputs | {"initial": rounded}, backend="native")
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert [a.dtype for a in actual].count(torch.float32) == 1


@over([*SOME[:3], conv(2), scan(2), ssd(2)])
@pytest.mark.parametrize("unused", [0, 1], ids=["only the state is used", "only y is used"])
def test_an_unused_output(case: Case, unused: int, isas: list[str], generator: torch.Generator) -> None:
    made = case.make(generator)
    check(case, isas, lambda: cast(made, torch.float32), unused)


@over([conv(37, d=19), scan(37, d=19, n=5), ssd(67, 64, p=7)])
def test_gradients_of_some_inputs_are_those_of_all(case: Case, generator: torch.Generator) -> None:
    made = case.make(generator)
    everything = cast(made, torch.float32)
    names = list(leaves_of(everything))
    grads = dict(zip(names, run(case.op, everything, backend="native")[2:], strict=True))
    for name in names:
        inputs = cast(made, torch.float32)
        for other in set(names) - {name}:
            inputs[other].requires_grad_(False)
        assert torch.equal(run(case.op, inputs, backend="native")[2], grads[name]), name


def gaps(v: Tensor, before: int, after: int, step: int) -> Tensor:
    """The same numbers in a wider tensor, with what must not be read around and between them."""
    wider = v.new_full((*v.shape[:-1], before + step * v.shape[-1] + after), torch.nan)  # True, as a bool
    wider[..., before : before + step * v.shape[-1] : step] = v
    return wider[..., before : before + step * v.shape[-1] : step]


def turned(v: Tensor) -> Tensor:
    return v.permute(*reversed(range(v.dim())))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda v: gaps(v, 3, 5, 1),
    "every third": lambda v: gaps(v, 1, 2, 3),
    "first axis last": lambda v: v.movedim(0, -1).contiguous().movedim(-1, 0),
    "last axis first": lambda v: v.movedim(-1, 0).contiguous().movedim(0, -1),
    "axes turned round": lambda v: turned(turned(v).contiguous()),
    "one row for the batch": lambda v: v[:1].expand_as(v),
    "one token for all": lambda v: v[:, :1].expand_as(v) if v.dim() > 1 else v,
    "one channel for all": lambda v: v[..., :1].expand_as(v),
    "one number for all": lambda v: v.flatten()[0].expand_as(v),
}


@over(SOME)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_an_input_changes_nothing(
    case: Case, layout: str, isas: list[str], generator: torch.Generator
) -> None:
    made = cast(case.make(generator), torch.float32)
    laid = {k: LAYOUTS[layout](v.detach()) if isinstance(v, Tensor) else v for k, v in made.items()}

    for isa in isas:
        native.use_isa(isa)
        plain = {k: v.contiguous().requires_grad_() if k in leaves_of(made) else v for k, v in laid.items()}
        strided = {k: v.detach().requires_grad_() if k in leaves_of(made) else v for k, v in laid.items()}
        expected, actual = (run(case.op, inputs, backend="native") for inputs in (plain, strided))
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True)), isa


@over(SOME)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_a_gradient_changes_nothing(
    case: Case, layout: str, generator: torch.Generator
) -> None:
    inputs = cast(case.make(generator), torch.float32)
    ys = outputs(case.op(**inputs, backend="native"))
    given = [LAYOUTS[layout](torch.randn(y.shape, generator=generator)) for y in ys]
    leaves = list(leaves_of(inputs).values())
    actual = torch.autograd.grad(ys, leaves, given, retain_graph=True)
    expected = torch.autograd.grad(ys, leaves, [g.contiguous() for g in given])
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
