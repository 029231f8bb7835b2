"""One token of Mamba-2 in one kernel against the ops that it stands for, in float64.

It is a kernel for CUDA: here it runs emulated (tests/native/emulated.py), and is skipped with the CPU's
library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lm import ops
from hybrid_lm.ops.native import library
from hybrid_lm.ops.native.mamba2_step import mamba2_step, new_tickets, no_mamba2_step

pytestmark = pytest.mark.skipif(
    not (library.isa() or "").startswith("emulated"), reason="the emulated library is not the one in use"
)
ORDERS = ("emulated", "emulated backwards")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# b, h, p, g, n, w: heads cut into slices, one row, states below and above what a warp has in one access, and
# odd ones.
SHAPES = (
    (1, 1, 1, 1, 1, 2),
    (2, 4, 20, 2, 16, 4),
    (3, 2, 5, 1, 7, 4),
    (1, 3, 16, 3, 33, 3),
    (2, 2, 33, 1, 64, 4),
    (1, 2, 18, 2, 132, 4),
    (1, 2, 4, 1, 260, 1),
    (2, 2, 8, 1, 24, 8),
)


@pytest.fixture(autouse=True)
def orders() -> Any:
    yield
    torch.ops.hybrid_lm_native.use_isa("")


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    b, h, p, groups, n, w = shape
    c = h * p + 2 * groups * n

    def new(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=g).to(dtype)

    made: dict[str, Any] = {"xBC": new(b, c), "dt": new(b, h), "z": new(b, h, p), "conv": new(b, w - 1, c)}
    made |= {"weight": new(c, w), "bias": new(c), "A": -new(h).abs().float(), "D": new(h).float()}
    made |= {"dt_bias": new(h).float(), "state": torch.randn(b, h, p, n, generator=g)}
    return made | {"dt_softplus": True, "dt_limit": (0.1, 2.0), "groups": groups}


def plain(v: dict[str, Any], reset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the state and the convolution's, by the references of the ops, in float64."""
    v = {k: u.double() if isinstance(u, Tensor) and u.is_floating_point() else u for k, u in v.items()}
    h, p, n = v["state"].shape[1:]
    xBC, conv, again = v["xBC"][:, None], v.get("conv"), None if reset is None else reset[:, None]
    if v.get("weight") is not None:
        how = {"initial": conv, "reset": again, "backend": "reference"}
        xBC, conv = ops.causal_conv1d(xBC, v["weight"], v.get("bias"), activation="silu", **how)
    x, B, C = xBC.split([h * p, v["groups"] * n, v["groups"] * n], -1)
    y, state = ops.ssd(
        x.unflatten(-1, (h, p)), v["dt"][:, None], v["A"], *(u.unflatten(-1, (-1, n)) for u in (B, C)),
        D=v.get("D"), dt_bias=v.get("dt_bias"), dt_softplus=v["dt_softplus"], dt_limit=v["dt_limit"],
        initial=v["state"], reset=again, backend="reference",
    )  # fmt: skip
    y = y[:, 0]
    return y if v.get("z") is None else y * F.silu(v["z"]), state, conv


def check(v: dict[str, Any], reset: Tensor | None = None) -> None:
    expected = plain(v, reset)
    groups, n = v["groups"], v["state"].shape[-1]
    for order in ORDERS:
        assert torch.ops.hybrid_lm_native.use_isa(order)
        mine = {k: u.clone() if isinstance(u, Tensor) else u for k, u in v.items()}
        tickets = new_tickets(mine["state"], groups)
        y = mamba2_step(**mine, tickets=tickets, reset=reset)
        assert y.dtype == v["xBC"].dtype
        assert not tickets.any(), "the next step finds them so"
        # The sum over the taps, the step, the sum over the states and the gate: so many roundings in a row.
        chain = (16 + 16 + n) * torch.finfo(torch.float32).eps
        for actual, exact in ((y, expected[0]), (mine["state"], expected[1])):
            narrow = actual.dtype != torch.float32
            bound = chain + narrow * torch.finfo(actual.dtype).eps / 2
            assert (actual.double() - exact).abs().max() <= bound * exact.abs().max().clamp(min=1), order
        if expected[2] is not None:
            # Inputs that move on are not computed with.
            assert torch.equal(mine["conv"].double(), expected[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_ops_that_it_stands_for(shape, dtype):
    v = inputs(shape, dtype)
    check(v)
    check(v, torch.arange(shape[0]) % 2 == 0)


@pytest.mark.parametrize("absent", ["z", "bias", "D", "dt_bias", "dt_softplus", "dt_limit"])
def test_what_is_optional_may_be_absent(absent):
    v = inputs(SHAPES[1], torch.float32)
    v[absent] = {"dt_softplus": False, "dt_limit": (0.0, float("inf"))}.get(absent)
    check(v)


def test_without_a_convolution_it_is_the_step_of_ssd():
    v = inputs(SHAPES[1], torch.bfloat16)
    check(v | {"weight": None, "bias": None, "conv": None})


def test_a_new_document_asks_nothing_of_what_was_before():
    v = inputs(SHAPES[1], torch.float32)
    reset = torch.tensor([True, False])
    expected = plain(
        v | {name: v[name].index_fill(0, torch.tensor([0]), 0.0) for name in ("conv", "state")}, reset
    )
    for name in ("conv", "state"):
        v[name][0] = torch.nan
    y = mamba2_step(**v, tickets=new_tickets(v["state"], 2), reset=reset)
    for actual, exact in zip((y, v["state"], v["conv"]), expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)  # 100 eps


def test_any_layout():
    v = inputs(SHAPES[3], torch.float32)
    wider = {k: torch.full((*u.shape[:-1], 2 * u.shape[-1]), torch.nan) for k, u in v.items()
             if k in ("xBC", "dt", "z", "conv", "weight", "A")}  # fmt: skip
    for name, u in wider.items():
        u[..., ::2] = v[name]
    strided = v | {name: u[..., ::2] for name, u in wider.items()} | {"state": v["state"].clone()}
    tickets = new_tickets(v["state"], 3)
    y = mamba2_step(**v | {"conv": v["conv"].clone(), "state": v["state"].clone()}, tickets=tickets)
    assert torch.equal(mamba2_step(**strided, tickets=tickets), y)
    assert wider["conv"][..., 1::2].isnan().all()


@pytest.mark.parametrize("full", [True, False])
def test_opcheck(full):
    v = inputs(SHAPES[1], torch.bfloat16)
    low, high = v["dt_limit"]
    if not full:
        v |= dict.fromkeys(("z", "weight", "bias", "D", "dt_bias", "conv"))
    given = [v[name] for name in ("xBC", "dt", "z", "weight", "bias", "A", "D", "dt_bias")]
    reset, tickets = (torch.tensor([True, False]), new_tickets(v["state"], 2)) if full else (None, None)
    operator = torch.ops.hybrid_lm_native.mamba2_step_.default
    torch.library.opcheck(operator, (*given, True, low, high, 2, reset, v["conv"], v["state"], tickets))


WRONG = {
    "state": lambda v: v[:, :1],
    "xBC": lambda v: v[:, 1:],
    "conv": lambda v: v[:, 1:],
    "A": lambda v: v[1:],
    "z": lambda v: v[..., 1:],
    "tickets": lambda v: v[:1],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_refused(name):
    v = inputs(SHAPES[1], torch.float32)
    v["tickets"] = new_tickets(v["state"], 2)
    v[name] = WRONG[name](v[name])
    with pytest.raises(RuntimeError, match=r"size|tickets|groups|without gaps"):
        mamba2_step(**v)


def test_it_says_where_it_runs():
    assert no_mamba2_step("cpu") == "there is no kernel for one token on cpu"
    assert no_mamba2_step("cuda")
