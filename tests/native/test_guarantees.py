"""What native kernels promise beside values: the same bits on any number of threads, states that are updated
where they may be and only there, NaN and infinity that show."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_lm import ops
from hybrid_lm.ops.precision import wide
from tests.ops.cases import Case, Inputs, cast, conv, error, leaves_of, norm, outputs, run, scan, ssd

native = torch.ops.hybrid_lm_native


def over(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.id)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# In every loop over work items (`for_each_item` of csrc/cpu/kernels.h) several of them, some odd, and the
# 200,000 operations or more that it takes to go parallel.
LARGE = [
    conv(300, b=4, d=4100),  # 4 taps: 2e7; sums of 24 items in 3 tiles of 5 x 2048: 2.4e5
    conv(1, b=4, d=16390),  # 2.6e5
    scan(1030, d=160, n=24),  # 7.9e6; sums over 5 groups of channels: 2.5e5
    ssd(130, 64, h=26, p=64, n=64),  # 2.8e7 and more; to read and write states: 2.1e5
    ssd(1, 64, h=26, p=64, n=64),  # 8.5e5
    norm(rows=(513,), d=100),  # 4.1e5
    norm(gate=True, rows=(513,), d=100, groups=5),
]


@over(LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_on_any_number_of_threads(
    case: Case, dtype: torch.dtype, generator: torch.Generator
) -> None:
    inputs = cast(case.make(generator), dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with torch.no_grad():
            alone = outputs(case.op(**inputs, backend="native"))
        results.append([*alone, *run(case.op, inputs, backend="native")])
    for other in results[1:]:
        assert all(torch.equal(a, e) for a, e in zip(other, results[0], strict=True))


RECURRENT = [case(t) for case in (conv, scan, ssd) for t in (1, 2, 9, 70)] + [ssd(3, n=16), ssd(3, n=17)]


def state_type(case: Case, x: Tensor) -> torch.dtype:
    return x.dtype if case.op is ops.causal_conv1d else wide(x)


def decode(case: Case, inputs: Inputs, initial: Tensor, **options: Any) -> list[Tensor]:
    return list(case.op(**inputs | {"initial": initial}, backend="native", **options))


@over(RECURRENT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_donated_state_is_the_state_that_comes_back(
    case: Case, dtype: torch.dtype, isas: list[str], generator: torch.Generator
) -> None:
    inputs = {
        k: v.detach() if isinstance(v, Tensor) else v for k, v in cast(case.make(generator), dtype).items()
    }
    initial = inputs["initial"].to(state_type(case, inputs["x"]))
    for isa in isas:
        native.use_isa(isa)
        given = initial.clone()
        expected = decode(case, inputs, initial)
        y, state = decode(case, inputs, given, donate=True)
        assert state.data_ptr() == given.data_ptr()
        assert torch.equal(y, expected[0])
        assert torch.equal(state, expected[1])


@over(RECURRENT)
@pytest.mark.parametrize("kind", ["gradients", "another type", "one row for the batch", "transposed"])
def test_a_donated_state_that_must_not_be_written_stays(
    case: Case, kind: str, generator: torch.Generator
) -> None:
    inputs = {
        k: v.detach() if isinstance(v, Tensor) else v
        for k, v in cast(case.make(generator), torch.float32).items()
    }
    given = inputs["initial"]
    if kind == "gradients":
        inputs["x"].requires_grad_()
    if kind == "another type":
        given = given.double()
    if kind == "one row for the batch":
        given = given[:1].expand_as(given)
    if kind == "transposed":
        given = given.mT.contiguous().mT
    before = given.clone()
    expected = decode(case, inputs, given)
    actual = decode(case, inputs, given, donate=True)
    assert torch.equal(given, before)
    assert actual[1].data_ptr() != given.data_ptr()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


BAD = [math.nan, math.inf, -math.inf]
WITHOUT_RESET = [
    *(conv(t, d=19, reset=False) for t in (2, 37)),
    *(scan(t, d=19, n=5, reset=False) for t in (2, 37)),
    scan(37, d=19, n=5, reset=False, without=("dt_softplus",)),
    *(ssd(t, 64, p=7, reset=False) for t in (2, 70)),
    ssd(70, 64, p=7, reset=False, without=("dt_softplus", "dt_limit")),
    norm(rows=(5,), d=19),
    *(
        norm(gate=True, rows=(5,), d=36, groups=4, order=order)
        for order in ("gate_norm", "norm_gate", "gate")
    ),
]


def check_shown(case: Case, inputs: Inputs, exact: list[Tensor], where: object) -> None:
    """Native results on `inputs`, which hold a bad number, against the reference's in float64."""
    results = run(case.op, inputs, backend="native")
    for actual, expected in zip(results, exact, strict=True):
        assert not (actual.isfinite() & ~expected.isfinite()).any(), (where, "hidden")
        both = actual.isfinite() & expected.isfinite()
        bound = case.chain * torch.finfo(actual.dtype).eps
        assert error(actual[both], expected[both]) <= bound, where
    with torch.no_grad():
        alone = outputs(case.op(**inputs, backend="native"))
    for ys in (results[: len(alone)], alone):
        for actual, expected in zip(ys, exact, strict=False):
            assert torch.equal(actual.isfinite(), expected.isfinite()), (where, "spread")


@over(WITHOUT_RESET)
@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_shows(
    case: Case, bad: float, isas: list[str], generator: torch.Generator
) -> None:
    """One bad number in each input in turn: an output is finite where the reference's is, and only there. No
    gradient is finite where the reference's is not; it may be the other way round, for a product with a bad
    number that the reference leaves out as a whole (of a chunk's pairs of tokens, say) need not be left out.
    """
    made = case.make(generator)
    shown = 0
    for name in leaves_of(cast(made, torch.float64)):
        spoiled = made | {name: made[name].clone()}
        spoiled[name].view(-1)[made[name].numel() // 2] = bad
        exact = run(case.op, cast(spoiled, torch.float64), backend="reference")
        shown += not all(e.isfinite().all() for e in exact)
        for dtype in (torch.float64, torch.float32):
            for isa in isas:
                native.use_isa(isa)
                check_shown(case, cast(spoiled, dtype), exact, (name, dtype, isa))
    # A step of -inf is 0 behind softplus, and a limit is a limit: not every input has to show.
    assert shown > 0


PER_TOKEN = ("x", "dt", "B", "C", "z")


@over([case(t) for case in (conv, scan, ssd) for t in (6, 80)])
@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_stays_in_its_document(
    case: Case, bad: float, isas: list[str], generator: torch.Generator
) -> None:
    """Here native is stricter than the reference, which multiplies a state by 0 where a document starts: the
    outputs of the documents that follow, and the gradients of their tokens, are those of finite numbers."""
    made = case.make(generator)
    t = made["x"].shape[1]
    for at in {1, 5, 32, 33, 64} & set(range(t)):
        reset = (torch.arange(t) == at).expand(2, t)
        for name in {*PER_TOKEN, "initial"} & set(made):
            spoiled = made | {name: made[name].clone(), "reset": reset}
            spoiled[name][:, : at if name in PER_TOKEN else None] = bad
            names = ["y", "state", *leaves_of(cast(made, torch.float32))]
            for isa in isas:
                native.use_isa(isa)
                clean = run(case.op, cast(made | {"reset": reset}, torch.float32), backend="native")
                actual = run(case.op, cast(spoiled, torch.float32), backend="native")
                for key, a, c in zip(names, actual, clean, strict=True):
                    if key in ("y", *PER_TOKEN):
                        assert torch.equal(a[:, at:], c[:, at:]), (isa, at, name, key)
                    if key == "state":
                        assert torch.equal(a, c), (isa, at, name)


@over([conv(9), scan(9), ssd(9), norm(), norm(gate=True)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(case: Case, mode: Any, generator: torch.Generator) -> None:
    inputs = cast(case.make(generator), torch.float32)
    expected = outputs(case.op(**inputs, backend="native"))
    with mode():
        actual = outputs(case.op(**inputs, backend="native"))
        donated = {"donate": True} if "initial" in inputs else {}
        inside = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        again = outputs(case.op(**inside, **donated, backend="native"))
    for a, b, e in zip(actual, again, expected, strict=True):
        assert not a.requires_grad
        assert error(a, e) <= case.chain * torch.finfo(torch.float32).eps
        assert torch.equal(a, b)


def test_there_may_be_no_sequences(generator: torch.Generator) -> None:
    for case in (conv(5, b=0), scan(5, b=0), ssd(5, b=0), norm(rows=(0,)), norm(gate=True, rows=(0,))):
        inputs = cast(case.make(generator), torch.float32)
        shapes = [v.shape for v in run(case.op, inputs, backend="reference")]
        results = run(case.op, inputs, backend="native")
        assert [v.shape for v in results] == shapes
        # what is summed over no sequence is 0
        assert not any(v.any() for v in results)


@pytest.mark.parametrize(
    "case", [scan(5, d=4, n=4), ssd(5, 16, h=2, p=4, n=4), conv(5, d=4)], ids=["scan", "ssd", "conv"]
)
def test_tensors_on_several_devices_are_refused(case: Case, generator: torch.Generator) -> None:
    """An operator would run where one of them is, and read the others as its own."""
    inputs = cast(case.make(generator), torch.float32)
    for name, v in inputs.items():
        if isinstance(v, Tensor) and name != "x":
            with pytest.raises(ValueError, match="tensors on cpu and meta; bring them to one device"):
                case.op(**inputs | {name: v.to("meta")}, backend="native")
