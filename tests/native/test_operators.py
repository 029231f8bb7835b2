"""The native operators as PyTorch sees them: schemas, shapes, gradients, compiled graphs, refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_lm import ops
from tests.ops.cases import Case, cast, conv, error, leaves_of, norm, outputs, scan, ssd

native = torch.ops.hybrid_lm_native
Arguments = tuple[Any, ...]


def scan_inputs(t: int = 5) -> Arguments:
    b, d, n = 2, 6, 3
    x, dt, z = (torch.rand(b, t, d) for _ in range(3))
    B, C = (torch.rand(b, t, n) for _ in range(2))
    return x, dt, -torch.rand(d, n), B, C, torch.rand(d), z, torch.rand(d), True


def ssd_inputs(t: int = 5) -> Arguments:
    b, h, p, g, n = 2, 4, 3, 2, 5
    x, dt, B, C = torch.rand(b, t, h, p), torch.rand(b, t, h), torch.rand(b, t, g, n), torch.rand(b, t, g, n)
    return x, dt, -torch.rand(h), B, C, torch.rand(h), torch.rand(h), True, 0.1, 2.0


def conv_inputs(t: int = 5) -> Arguments:
    return torch.rand(2, t, 6), torch.rand(6, 4), torch.rand(6), True


def norm_inputs() -> Arguments:
    return torch.rand(5, 6), torch.rand(5, 6), torch.rand(6), 1e-5, 0.0, 2, 1


RESET = torch.arange(5).expand(2, 5) == 3


def calls() -> dict[str, Arguments]:
    """Arguments of every operator: all that it takes."""
    scan, ssd, conv, norm = scan_inputs(), ssd_inputs(), conv_inputs(), norm_inputs()
    scan_state, ssd_state, conv_state = torch.rand(2, 6, 3), torch.rand(2, 4, 3, 5), torch.rand(2, 3, 6)
    scan_kept, ssd_kept = torch.rand(1, 2, 3, 6), torch.rand(1, 2, 4, 5, 3)
    return {
        "selective_scan": (*scan, scan_state, RESET, True),
        "selective_scan_": (*scan, scan_state, RESET),
        "selective_scan_backward": (torch.rand(2, 5, 6), torch.rand(2, 6, 3), scan_kept, *scan, RESET),
        "ssd": (*ssd, ssd_state, RESET, True),
        "ssd_": (*ssd, ssd_state, RESET),
        "ssd_backward": (torch.rand(2, 5, 4, 3), torch.rand(2, 4, 3, 5), ssd_kept, *ssd, ssd_state, RESET),
        "causal_conv1d": (*conv, conv_state, RESET),
        "causal_conv1d_": (*conv, conv_state, RESET),
        "causal_conv1d_backward": (torch.rand(2, 5, 6), torch.rand(2, 3, 6), *conv, conv_state, RESET),
        "rms_norm": norm,
        "rms_norm_backward": (torch.rand(5, 6), *norm),
        "linear": (torch.rand(3, 6), torch.rand(5, 6), torch.rand(5)),
    }


NAMES = [
    *(op + end for op in ("selective_scan", "ssd", "causal_conv1d") for end in ("", "_", "_backward")),
    *("rms_norm", "rms_norm_backward", "linear"),
]


def bare(name: str) -> Arguments:
    """The same call without what may be absent."""
    arguments = getattr(native, name).default._schema.arguments
    return tuple(
        None if str(a.type).startswith("Optional") else v
        for a, v in zip(arguments, calls()[name], strict=True)
    )


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, full: bool) -> None:
    arguments = calls()[name] if full else bare(name)
    if name.startswith("rms_norm") and not full:
        arguments = (*arguments[:-1], 0)  # the order without a gate
    if not name.endswith(("_", "_backward", "linear")):
        arguments = tuple(
            v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for v in arguments
        )
    torch.library.opcheck(getattr(native, name).default, arguments)


def test_every_operator_is_here() -> None:
    declared = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
                if name.startswith("hybrid_lm_native::")}  # fmt: skip
    # The last is for CUDA alone: tests/native/test_mamba2_step.py.
    assert declared == {*NAMES, "isa", "use_isa", "mamba2_step_"}


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_call_is_refused(name: str) -> None:
    """Each tensor in turn of other sizes or another type, which would be read beyond its end."""
    operator, right = getattr(native, name), calls()[name]
    operator(*right)
    for k, (argument, v) in enumerate(zip(operator.default._schema.arguments, right, strict=True)):
        if not isinstance(v, Tensor):
            continue
        wrong = {
            "an axis more": v[None],
            "an axis less": v[0],
            "longer": torch.cat((v, v), -1),
            "shorter": v[..., :-1],
            "another batch": torch.cat((v, v)),
            "whole numbers": v.int(),
            "complex": v.to(torch.complex64),
        }
        for what, value in wrong.items():
            if (name, argument.name) == ("linear", "x") and what == "another batch":
                continue  # which is right there
            assert refused(operator, *right[:k], value, *right[k + 1 :]), (argument.name, what)


def refused(operator: Any, *arguments: Any) -> bool:
    try:
        operator(*arguments)
    except RuntimeError:
        return True
    return False


def test_a_refusal_says_what() -> None:
    x, weight, bias, silu = conv_inputs()
    for wrong, message in (
        ((x, weight, bias[None], silu), "bias: 2 dimensions instead of 1"),
        ((x, weight, bias[:5], silu), "bias: size 5 in dimension 0 instead of 6"),
        ((x, weight.int(), bias, silu), "weight: neither float32, float64, bfloat16 nor float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            native.causal_conv1d(*wrong, None, None)
    with pytest.raises(RuntimeError, match="reset: not bool"):
        native.causal_conv1d(x, weight, bias, silu, None, RESET.int())


def test_impossible_sizes_are_refused() -> None:
    x, weight, *rest = conv_inputs()
    with pytest.raises(RuntimeError, match="with t, w > 0"):
        native.causal_conv1d(x[:, :0], weight, *rest, None, None)
    with pytest.raises(RuntimeError, match="with t, w > 0"):
        native.causal_conv1d(x, weight[:, :0], *rest, None, None)
    with pytest.raises(RuntimeError, match="t > 0"):
        native.selective_scan(
            *(v[:, :0] if getattr(v, "ndim", 0) == 3 else v for v in scan_inputs()), None, None, True
        )
    x, dt, A, B, C, *rest = ssd_inputs()
    with pytest.raises(RuntimeError, match="t > 0"):
        native.ssd(x[:, :0], dt[:, :0], A, B[:, :0], C[:, :0], *rest, None, None, True)
    three = (v.repeat_interleave(3, 2)[:, :, :3] for v in (B, C))
    with pytest.raises(RuntimeError, match="4 heads are no multiple of 3 groups"):
        native.ssd(x, dt, A, *three, *rest, None, None, True)
    x, gate, weight, eps, offset, *_ = norm_inputs()
    with pytest.raises(RuntimeError, match="a multiple of the groups"):
        native.rms_norm(x, gate, weight, eps, offset, 4, 1)
    for order, some_gate in ((1, None), (0, gate), (4, gate), (-1, gate)):
        with pytest.raises(RuntimeError, match="a gate and an order that uses it"):
            native.rms_norm(x, some_gate, weight, eps, offset, 2, order)


def test_an_unknown_instruction_set_is_refused() -> None:
    before = native.isa()
    assert not native.use_isa("avx1024")
    assert native.isa() == before


LONG = [
    conv(35, d=5), conv(35, d=5, full=False), scan(35, d=5), scan(35, d=5, full=False),
    ssd(67), ssd(67, full=False), norm(d=19, unit_offset=True),
    *(norm(gate=True, d=18, groups=3, order=order) for order in ("gate_norm", "norm_gate", "gate")),
]  # fmt: skip


@pytest.mark.parametrize("case", LONG, ids=lambda c: c.id)
def test_gradients_by_finite_differences(case: Case, isas: list[str]) -> None:
    """Over several chunks, on every instruction set; `tests/ops` has the short ones."""
    inputs = cast(case.make(torch.Generator().manual_seed(0)), torch.float64)
    leaves = leaves_of(inputs)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(outputs(case.op(**inputs | dict(zip(leaves, values, strict=True)), backend="native")))

    for isa in isas:
        native.use_isa(isa)
        # gradcheck's defaults: differences of 1e-6, for which 1e-5 is the error of the second order
        torch.autograd.gradcheck(function, list(leaves.values()), fast_mode=True)


def test_gradients_of_gradients_are_refused() -> None:
    for case in (conv(5), scan(5), ssd(5), norm(), norm(gate=True)):
        inputs = cast(case.make(torch.Generator().manual_seed(0)), torch.float64)
        y = outputs(case.op(**inputs, backend="native"))[0]
        (gx,) = torch.autograd.grad(y.sum(), next(iter(inputs.values())), create_graph=True)
        with pytest.raises(ValueError, match="no gradients of gradients"):
            torch.autograd.grad((gx * y).sum(), next(iter(inputs.values())))


def network(v: dict[str, Tensor], states: list[Tensor] | None, reset: Tensor) -> list[Tensor]:
    """Every op once, in a row; `states` are given away."""
    a, b, c = states or (None, None, None)
    options: dict[str, Any] = {"reset": reset, "donate": states is not None, "backend": "native"}
    u, a = ops.causal_conv1d(v["x"], v["taps"], v["bias"], activation="silu", initial=a, **options)
    u, b = ops.selective_scan(
        u, v["dt"], v["A"], v["B"], v["C"], D=v["D"], z=v["x"], dt_softplus=True, initial=b, **options
    )
    heads, group = u.unflatten(-1, (4, 3)), (v["B"][:, :, None], v["C"][:, :, None])
    y, c = ops.ssd(heads, v["dt"][..., :4], v["A"][:4, 0], *group, dt_softplus=True, initial=c, **options)
    y = ops.gated_rms_norm(y.flatten(-2), u, v["D"], groups=3, backend="native")
    return [ops.rms_norm(y, v["D"], unit_offset=True, backend="native"), a, b, c]


def network_inputs(t: int) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
    b, d, n = 2, 12, 3
    sizes = {
        "x": (b, t, d),
        "dt": (b, t, d),
        "B": (b, t, n),
        "C": (b, t, n),
        "taps": (d, 4),
        "bias": (d,),
        "D": (d,),
    }
    values = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}
    values["A"] = -torch.rand(d, n, dtype=torch.float64)
    states = [torch.randn(size, dtype=torch.float64) for size in ((b, 3, d), (b, d, n), (b, 4, 3, n))]
    return values, states, torch.rand(b, t) < 0.2


# No sum in these shapes has more than 2**12 terms, and each is rounded once.
EXACT = 2**12 * torch.finfo(torch.float64).eps


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_equals_eager(compiler: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend=compiler)
    values, _, reset = network_inputs(37)
    leaves = [v.requires_grad_() for v in values.values()]
    results = []
    for function in (network, compiled):
        ys = function(values, None, reset)
        results.append([*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), leaves)])
    assert max(error(a, e) for a, e in zip(*results, strict=True)) <= EXACT


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_decoding_updates_the_states_in_place(compiler: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend=compiler)
    with torch.no_grad():
        values, states, reset = network_inputs(1)
        expected = network(values, [s.clone() for s in states], reset)
        y, *after = compiled(values, states, reset)
    for actual, given, e in zip([y, *after], [None, *states], expected, strict=True):
        assert error(actual, e) <= EXACT
        assert given is None or torch.equal(given, actual)
