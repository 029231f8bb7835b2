"""The laws of the recurrences: hand-off of states, documents, extreme steps, memory, operators."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lm import ops
from tests.ops.cases import FAST

Inputs = dict[str, Any]
EXACT = 2**12 * torch.finfo(torch.float64).eps  # no sum here has more than 2**12 terms, each rounded once


def conv_inputs(t: int, *, dtype: torch.dtype = torch.float64) -> Inputs:
    x, weight, bias = torch.randn(2, t, 6), torch.randn(6, 4), torch.randn(6)
    return {"x": x.to(dtype), "weight": weight.to(dtype), "bias": bias.to(dtype), "activation": "silu"}


def scan_inputs(t: int, *, dtype: torch.dtype = torch.float64) -> Inputs:
    b, d, n = 2, 6, 3
    x, dt, z, B, C = (torch.randn(b, t, k) for k in (d, d, d, n, n))
    floats = {"x": x, "dt": dt.abs(), "A": -torch.rand(d, n), "B": B, "C": C, "D": torch.randn(d), "z": z}
    return {k: v.to(dtype) for k, v in floats.items()}


def ssd_inputs(t: int, *, dtype: torch.dtype = torch.float64) -> Inputs:
    b, h, p, g, n = 2, 4, 3, 2, 5
    x, dt, B, C = (
        torch.randn(b, t, h, p),
        torch.rand(b, t, h),
        torch.randn(b, t, g, n),
        torch.randn(b, t, g, n),
    )
    floats = {"x": x, "dt": dt, "A": -torch.rand(h), "B": B, "C": C, "D": torch.randn(h)}
    return {k: v.to(dtype) for k, v in floats.items()} | {"chunk": 4}


def delta_rule_inputs(t: int, *, dtype: torch.dtype = torch.float64) -> Inputs:
    b, h, p, g, k = 2, 4, 3, 2, 5
    key = F.normalize(torch.randn(b, t, g, k), dim=-1)
    floats = {"q": torch.randn(b, t, g, k), "k": key, "v": torch.randn(b, t, h, p)}
    floats |= {"log_decay": -torch.rand(b, t, h), "beta": 2 * torch.rand(b, t, h)}
    return {k: v.to(dtype) for k, v in floats.items()} | {"chunk": 4}


def lru_inputs(t: int, *, dtype: torch.dtype = torch.float64) -> Inputs:
    return {"x": torch.randn(2, t, 6).to(dtype), "log_a": -torch.rand(2, t, 6).to(dtype)}


RECURRENCES = [
    (ops.causal_conv1d, conv_inputs),
    (ops.selective_scan, scan_inputs),
    (ops.ssd, ssd_inputs),
    (ops.delta_rule, delta_rule_inputs),
    (ops.linear_recurrence, lru_inputs),
]
PER_TOKEN = ("x", "dt", "B", "C", "z", "q", "k", "v", "log_decay", "beta", "log_a", "reset")
STEPS = ("dt", "log_decay", "log_a")


def over(recurrences: list[tuple[Callable[..., Any], Callable[..., Inputs]]]) -> Any:
    """Every recurrence with every fast backend that it has."""
    has = {(row.op, row.backend) for row in ops.report()}
    rows = [(op, make, name) for op, make in recurrences for name in FAST if (op.__name__, name) in has]
    ids = [f"{op.__name__}-{name}" for op, _, name in rows]
    return pytest.mark.parametrize(("op", "make", "backend"), rows, ids=ids, indirect=["backend"])


every_recurrence = over(RECURRENCES)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def cut(inputs: Inputs, start: int, stop: int) -> Inputs:
    return {k: v[:, start:stop] if k in PER_TOKEN else v for k, v in inputs.items()}


def close(actual: Tensor, expected: Tensor) -> bool:
    if not expected.numel():
        return actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max()) <= EXACT * float(expected.abs().max().clamp(min=1))


@pytest.mark.parametrize("with_reset", [False, True])
@every_recurrence
def test_any_split_equals_the_whole(
    op: Callable[..., Any], make: Callable[..., Inputs], backend: str, with_reset: bool
) -> None:
    t = 21
    inputs = make(t) | ({"reset": torch.rand(2, t) < 0.15} if with_reset else {})
    leaves = [v.requires_grad_() for k, v in inputs.items() if k in PER_TOKEN and k != "reset"]
    whole, last = op(backend=backend, **inputs)
    g_whole = torch.autograd.grad(whole.square().sum() + last.square().sum(), leaves)
    for at in range(1, t):
        first, state = op(backend=backend, **cut(inputs, 0, at))
        second, state = op(backend=backend, **cut(inputs, at, t), initial=state)
        ys = torch.cat((first, second), 1)
        grads = torch.autograd.grad(ys.square().sum() + state.square().sum(), leaves)
        assert close(ys, whole), at
        assert close(state, last), at
        assert all(close(g, e) for g, e in zip(grads, g_whole, strict=True)), at


@every_recurrence
def test_token_by_token_equals_the_whole(
    op: Callable[..., Any], make: Callable[..., Inputs], backend: str
) -> None:
    inputs = make(19)
    whole, last = op(backend=backend, **inputs)
    state, ys = None, []
    for i in range(19):
        y, state = op(backend=backend, **cut(inputs, i, i + 1), initial=state)
        ys.append(y)
    assert close(torch.cat(ys, 1), whole)
    assert close(state, last)


@every_recurrence
def test_reset_separates_documents(op: Callable[..., Any], make: Callable[..., Inputs], backend: str) -> None:
    t = 21
    inputs = make(t)
    _, initial = op(backend=backend, **make(9))
    reset = torch.zeros(2, t, dtype=torch.bool)
    starts = [0, 5, 6, 16]
    reset[:, starts] = True
    packed, state = op(backend=backend, **inputs, reset=reset, initial=initial)
    pieces = [op(backend=backend, **cut(inputs, a, b)) for a, b in zip(starts, [*starts[1:], t], strict=True)]
    assert close(packed, torch.cat([y for y, _ in pieces], 1))
    assert close(state, pieces[-1][1])


@every_recurrence
def test_nothing_before_a_reset_gets_a_gradient_from_behind_it(
    op: Callable[..., Any], make: Callable[..., Inputs], backend: str
) -> None:
    t, at = 21, 7
    inputs = make(t)
    initial = op(backend=backend, **make(3))[1].requires_grad_()
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if k in PER_TOKEN}
    reset = torch.zeros(2, t, dtype=torch.bool)
    reset[:, at] = True
    y, state = op(backend=backend, **inputs, reset=reset, initial=initial)
    grads = torch.autograd.grad(y[:, at:].sum() + state.sum(), [*leaves.values(), initial])
    assert all(not g[:, :at].any() for g in grads[:-1])
    assert not grads[-1].any()


@pytest.mark.parametrize("size", [1e-12, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@over(RECURRENCES[1:])
def test_extreme_steps_have_finite_gradients(
    op: Callable[..., Any], make: Callable[..., Inputs], backend: str, dtype: torch.dtype, size: float
) -> None:
    inputs = make(21, dtype=dtype)
    inputs |= {name: inputs[name] * size for name in STEPS if name in inputs}
    leaves = [v.requires_grad_() for v in inputs.values() if isinstance(v, Tensor)]
    y, state = op(backend=backend, **inputs, reset=torch.rand(2, 21) < 0.2)
    grads = torch.autograd.grad(y.float().sum() + state.sum(), leaves)
    assert all(v.isfinite().all() for v in (y, state, *grads))


def saved_bytes(function: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def pack(v: Tensor) -> Tensor:
        kept[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        function()
    return sum(kept.values())


@every_recurrence
def test_memory_kept_for_backward_is_linear_and_small(
    op: Callable[..., Any], make: Callable[..., Inputs], backend: str
) -> None:
    def kept(t: int) -> tuple[int, int]:
        inputs = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in make(t).items()}
        own = sum(v.nbytes for v in inputs.values() if isinstance(v, Tensor))
        return saved_bytes(lambda: op(backend=backend, **inputs)), own

    (short, _), (long, own) = kept(256), kept(1024)
    assert long <= 4 * short
    # the inputs themselves, and states between chunks: n / 16 and n p / (chunk p) of x at these sizes
    assert long <= 4 * own


@every_recurrence
def test_the_state_does_not_hold_the_inputs(
    op: Callable[..., Any], make: Callable[..., Inputs], backend: str
) -> None:
    with torch.no_grad():
        _, state = op(backend=backend, **make(200))
    assert state.untyped_storage().nbytes() == state.nbytes


@pytest.mark.parametrize("backend", ["reference", *FAST], indirect=True)
def test_conv_state_zeroes_what_stands_before_the_last_reset(backend: str) -> None:
    x = torch.arange(1.0, 6.0).view(1, 5, 1)
    reset = torch.tensor([[False, False, False, True, False]])
    _, state = ops.causal_conv1d(x, torch.ones(1, 4), reset=reset, backend=backend)
    assert state.flatten().tolist() == [0.0, 4.0, 5.0]
    # fewer tokens than taps: the given state moves up
    _, state = ops.causal_conv1d(x[:, :1], torch.ones(1, 4), initial=x[:, 1:4], backend=backend)
    assert state.flatten().tolist() == [3.0, 4.0, 1.0]


def test_conv_keeps_non_finite_values_of_another_document_out(backend: str) -> None:
    x = torch.randn(1, 8, 3)
    x[:, :4] = float("nan")
    x.requires_grad_()
    reset = torch.arange(8)[None] == 4
    y, state = ops.causal_conv1d(x, torch.randn(3, 4), reset=reset, backend=backend)
    assert y[:, 4:].isfinite().all()
    assert state.isfinite().all()


operators = torch.ops.hybrid_lm


def test_the_operators_of_the_torch_forms_pass_opcheck() -> None:
    s = scan_inputs(18, dtype=torch.float32)
    x, dt, A, B, C, D, z = (s[k].requires_grad_() for k in ("x", "dt", "A", "B", "C", "D", "z"))
    reset = torch.rand(2, 18) < 0.2
    initial = torch.randn(2, 6, 3, requires_grad=True)
    torch.library.opcheck(operators.selective_scan.default, (x, dt, A, B, C, D, z, D, True, initial, reset))
    torch.library.opcheck(
        operators.selective_scan.default, (x, dt, A, B, C, None, None, None, False, initial, None)
    )
    s = ssd_inputs(9, dtype=torch.float32)
    x, dt, A, B, C, D = (s[k].requires_grad_() for k in ("x", "dt", "A", "B", "C", "D"))
    initial = torch.randn(2, 4, 3, 5, requires_grad=True)
    torch.library.opcheck(operators.ssd.default, (x, dt, A, B, C, D, initial, reset[:, :9], 4))
    s = delta_rule_inputs(9, dtype=torch.float32)
    tensors = tuple(s[k].requires_grad_() for k in ("q", "k", "v", "log_decay", "beta"))
    initial = torch.randn(2, 4, 5, 3, requires_grad=True)
    torch.library.opcheck(operators.delta_rule.default, (*tensors, 0.5, initial, reset[:, :9], 4))
    c = conv_inputs(9, dtype=torch.float32)
    x, weight, bias = (c[k].requires_grad_() for k in ("x", "weight", "bias"))
    initial = torch.randn(2, 3, 6, requires_grad=True)
    document = reset[:, :9].cumsum(1, dtype=torch.int32)
    torch.library.opcheck(operators.causal_conv1d.default, (x, weight, bias, initial, document, True))
    torch.library.opcheck(operators.causal_conv1d.default, (x, weight, None, initial, None, False))
    r = lru_inputs(9, dtype=torch.float32)
    x, log_a, initial = (
        r["x"].requires_grad_(),
        r["log_a"].requires_grad_(),
        torch.randn(2, 6).requires_grad_(),
    )
    for given in (reset[:, :9], None):
        torch.library.opcheck(operators.linear_recurrence.default, (x, log_a, initial, given))
    x, weight = torch.randn(9, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    labels = torch.arange(9)
    labels[2] = -100
    options = (0.5, 4.0, 0.1, 0.01, -100, 4, torch.float32)
    torch.library.opcheck(operators.linear_cross_entropy.default, (x, weight, labels, None, *options))
