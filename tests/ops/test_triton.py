"""The Triton kernels: on a GPU where there is one, else in triton's interpreter, in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_lm import ops
from hybrid_lm.ops import proof, trials
from hybrid_lm.ops.backend import default_backend
from hybrid_lm.ops.native import library
from hybrid_lm.ops.precision import wide
from hybrid_lm.ops.triton import ssd as triton_ssd
from hybrid_lm.ops.triton import tuning
from tests.ops.cases import Case, Inputs, cast, error, leaves_of, outputs, randn, run, ssd

INTERPRETED = tuning.interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    import tests.ops.interpreter  # noqa: F401
REASON = triton_ssd.why_not(DEVICE)
kernel = pytest.mark.skipif(REASON is not None, reason=f"in the interpreter, by another test: {REASON}")
HERE = Path(__file__)


@pytest.mark.skipif(INTERPRETED or REASON is None, reason="the kernels run here")
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_all_of_these_in_the_interpreter() -> None:
    # triton looks at this variable when it is imported: a process that compiles kernels cannot do both
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not interpreter",
        str(HERE),
    ]
    done = subprocess.run(command, cwd=HERE.parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def small(t: int, **sizes: Any) -> Case:
    """A case that the interpreter goes through in a second."""
    return ssd(t, sizes.pop("chunk", 16), sizes.pop("groups", 1), **{"b": 1, "h": 2, **sizes})


CASES = [
    small(1, b=2),
    small(16, groups=2),
    small(37, h=4, groups=2),
    small(21, p=17, n=19),
    small(32, p=16, n=16),
    small(35, full=False, reset=False),
    small(35, full=False),
    *(small(21, reset=reset) for reset in ("first", "all")),
    *(small(21, without=(name,)) for name in ("D", "dt_bias", "dt_softplus", "dt_limit", "initial", "reset")),
]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What a kernel forgets to write is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def placed(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs rounded to a type, as leaves, where the kernels run."""
    return {k: v.to(DEVICE).detach().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
            for k, v in cast(inputs, dtype).items()}  # fmt: skip


def exact(made: Inputs, dtype: torch.dtype, unused: int | None = None) -> list[Tensor]:
    """The float64 reference on inputs that a type has rounded."""
    rounded = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in made.items()
    }
    return run(ops.ssd, placed(rounded, torch.float64), unused, backend="reference")


def check(case: Case, made: Inputs, dtype: torch.dtype, unused: int | None = None) -> None:
    expected, plain = (
        exact(made, dtype, unused),
        run(ops.ssd, placed(made, dtype), unused, backend="reference"),
    )
    inputs = placed(made, dtype)
    actual = run(ops.ssd, inputs, unused, backend="triton")
    assert [(a.dtype, a.shape) for a in actual] == [(p.dtype, p.shape) for p in plain]
    names = ["y", "state", *leaves_of(inputs)]
    for name, a, p, e in zip(names, actual, plain, expected, strict=True):
        # roundings of the wide type, one for each link of the case's chain
        limit = case.chain * torch.finfo(wide(inputs["x"])).eps
        if dtype in (torch.bfloat16, torch.float16):
            # factors are rounded once more than in plain PyTorch: at most twice its error, as for every op,
            # and the half of a last place by which that one may have been lucky
            limit += 2 * error(p, e) + torch.finfo(dtype).eps / 2
        assert error(a, e) <= limit, name


@kernel
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_equals_the_reference(case: Case, generator: torch.Generator) -> None:
    check(case, case.make(generator), torch.float64)


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES[:5], ids=lambda c: c.id)
def test_types(case: Case, dtype: torch.dtype, generator: torch.Generator) -> None:
    check(case, case.make(generator), dtype)


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_do_not_drift(dtype: torch.dtype, generator: torch.Generator) -> None:
    """The state is float32 from end to end, whatever the type of the inputs."""
    case = small(150, reset=False)
    made = case.make(generator)
    made["A"] = made["A"] / 100
    rounded = placed(made, dtype)
    state = ops.ssd(**rounded, backend="triton")[1]
    assert state.dtype == torch.float32
    # 2^-16: what is left when a factor counts in two parts of 8 bits each
    assert error(state, exact(made, dtype)[1]) <= case.chain * torch.finfo(torch.float32).eps + 2**-16


@kernel
@pytest.mark.parametrize("spans", [1, 2, 3])
def test_both_ways_through_a_sequence(
    spans: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_ssd, "_spans", lambda s: min(spans, s.chunks))
    case = small(70, chunk=16)
    check(case, case.make(generator), torch.float64)


@kernel
@pytest.mark.parametrize("share", [1, 2, 3])
def test_heads_may_be_shared_out(
    share: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_ssd, "_shares", lambda s: (share, -(-s.heads // share)))
    case = small(20, h=3)
    check(case, case.make(generator), torch.float64)


@kernel
def test_states_wider_than_a_program(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ssd, "MAX_P", 2)
    monkeypatch.setattr(triton_ssd, "MAX_N", 3)
    for t, dtype in ((17, torch.float64), (3, torch.bfloat16)):
        case = small(t, h=1)
        check(case, case.make(generator), dtype)


@kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("full", [True, False])
def test_wide_heads_are_taken_as_two_on_the_way_back(
    full: bool, dtype: torch.dtype, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_ssd, "HALVED", 2)
    case = small(20, p=4, h=4, groups=2, full=full)
    check(case, case.make(generator), dtype)


@kernel
@pytest.mark.parametrize("unused", [0, 1], ids=["only the state is used", "only y is used"])
def test_an_unused_output(unused: int, generator: torch.Generator) -> None:
    case = small(20)
    check(case, case.make(generator), torch.float64, unused)


@kernel
@pytest.mark.parametrize("t", [1, 20])
def test_no_sequences_at_all(t: int) -> None:
    x = torch.ones(0, t, 2, 5, device=DEVICE, requires_grad=True)
    A, B = torch.full((2,), -1.0, device=DEVICE, requires_grad=True), torch.ones(0, t, 1, 7, device=DEVICE)
    y, state = ops.ssd(x, x[..., 0], A, B, B, backend="triton")
    assert (y.shape, state.shape) == ((0, t, 2, 5), (0, 2, 5, 7))
    gx, gA = torch.autograd.grad(y.sum(), (x, A))
    assert gx.shape == x.shape
    assert torch.equal(gA, torch.zeros_like(A))


@kernel
@pytest.mark.parametrize("case", [small(1, b=2), small(1, b=2, full=False), small(1, groups=2, p=33)],
                         ids=lambda c: c.id)  # fmt: skip
@pytest.mark.parametrize("donate", [False, True])
def test_decoding(case: Case, donate: bool, generator: torch.Generator) -> None:
    made = case.make(generator)
    expected = ops.ssd(**made, backend="reference")
    inputs: Inputs = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in made.items()}
    given = inputs.get("initial")
    before = None if given is None else given.clone()
    y, state = ops.ssd(**inputs, donate=donate, backend="triton")
    for a, e in zip((y, state), expected, strict=True):
        assert error(a.cpu(), e) <= case.chain * torch.finfo(torch.float64).eps
    if given is not None and before is not None:
        assert (state is given) == donate
        assert donate or torch.equal(given, before)


@kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("t", "w", "spans", "full"), [(1, 4, 1, True), (2, 4, 1, True), (37, 4, 2, True),
                         (37, 3, 1, False), (20, 1, 1, True)])  # fmt: skip
def test_with_the_convolution(
    t: int, w: int, spans: int, full: bool, dtype: torch.dtype, generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(triton_ssd, "_spans", lambda s: min(spans, s.chunks))
    b, h, p = 2, 2, 3
    made = small(t, b=b, h=h, p=p, full=full, reset=full).make(generator)
    made |= {"weight": randn(generator, h, p, w)}
    if full:
        made |= {"conv_bias": randn(generator, h, p), "conv_initial": randn(generator, b, w - 1, h, p)}
    inputs: Inputs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in placed(made, dtype).items()}
    fused = triton_ssd.ssd_conv(**inputs)
    apart = triton_ssd.ssd_conv(**inputs | {"x": inputs["x"].clone().requires_grad_()})
    for name, a, e in zip(("y", "window", "state"), fused, apart, strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        # the convolution's sums may come in another order: in bfloat16 that is one place of x
        assert error(a, e) <= 2**6 * torch.finfo(torch.float64).eps if dtype == torch.float64 else 2**-7, name


def gaps(v: Tensor) -> Tensor:
    """The same numbers, every second of a tensor with NaNs between."""
    return torch.stack((v, torch.full_like(v, torch.nan)), -1)[..., 0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second": gaps,
    "last axis first": lambda v: v.movedim(-1, 0).contiguous().movedim(0, -1),
    "batch after tokens": lambda v: v.movedim(0, 1).contiguous().movedim(1, 0) if v.dim() > 1 else v,
    "slice of a row": lambda v: torch.cat((v, v), -1)[..., : v.shape[-1]],
}


@kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_nothing(layout: str, generator: torch.Generator) -> None:
    made = placed(small(5, b=2, groups=2).make(generator), torch.float32)
    laid: Inputs = {
        k: LAYOUTS[layout](v.detach()).requires_grad_() if k in leaves_of(made) else v
        for k, v in made.items()
    }
    ys = outputs(ops.ssd(**laid, backend="triton"))
    given = [torch.randn(y.shape, generator=generator).to(DEVICE) for y in ys]
    plain = outputs(ops.ssd(**made, backend="triton"))
    actual = torch.autograd.grad(ys, list(leaves_of(laid).values()), [LAYOUTS[layout](g) for g in given])
    expected = torch.autograd.grad(plain, list(leaves_of(made).values()), given)
    for a, e in zip([*ys, *actual], [*plain, *expected], strict=True):
        assert torch.equal(a, e)


@kernel
def test_operators_as_pytorch_sees_them(generator: torch.Generator) -> None:
    made = placed(small(5).make(generator), torch.float32)
    tensors = [made[k] for k in ("x", "dt", "A", "B", "C", "D", "dt_bias")]
    reset, initial = made["reset"], made["initial"]
    operators = torch.ops.hybrid_lm_triton
    rest = (True, 0.1, 2.0)
    torch.library.opcheck(operators.ssd.default, (*tensors, *rest, initial, reset, 16))
    plain = [v.detach() for v in tensors]
    y, state = ops.ssd(**made, backend="triton")
    gradients = (y.detach(), state.detach(), *plain, *rest, initial.detach(), reset, 16)
    torch.library.opcheck(operators.ssd_backward.default, gradients)
    one = [v[:, :1] if v.dim() > 1 else v for v in plain]
    torch.library.opcheck(operators.ssd_step.default, (*one, *rest, state.detach(), reset[:, :1]))


@kernel
@pytest.mark.compile
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(dynamic: bool, generator: torch.Generator) -> None:
    torch.compiler.reset()
    made = small(5).make(generator)
    compiled = torch.compile(ops.ssd, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected = run(ops.ssd, placed(made, torch.float64), backend="triton")
    actual = run(compiled, placed(made, torch.float64), backend="triton")
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@kernel
def test_autocast_is_kept_out(generator: torch.Generator) -> None:
    made = small(5).make(generator)
    expected = run(ops.ssd, placed(made, torch.float32), backend="triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = run(ops.ssd, placed(made, torch.float32), backend="triton")
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@kernel
def test_what_cannot_be_is_refused(generator: torch.Generator) -> None:
    made = placed(small(5).make(generator), torch.float32)
    y = ops.ssd(**made, backend="triton")[0]
    (gx,) = torch.autograd.grad(y.sum(), made["x"], create_graph=True)
    with pytest.raises(ValueError, match="no gradients of gradients"):
        torch.autograd.grad((gx * y).sum(), made["x"])
    empty = {k: v[:, :0] if k in ("x", "dt", "B", "C", "reset") else v for k, v in made.items()}
    with pytest.raises(ValueError, match="ssd: x has 0 tokens; at least one is needed"):
        ops.ssd(**empty, backend="triton")


def test_the_fastest_way_is_kept_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HYBRID_LM_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(tuning, "on_device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(
        tuning, "_milliseconds", lambda run: (run(), {3: 1.0, 2: 2.0, 1: 3.0}[launched[-1].num_stages])[1]
    )
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    candidates, launched = tuning.CANDIDATES["ssd_outputs"], []

    def launch(choice: tuning.Choice) -> tuple[Tensor, ...]:
        launched.append(choice)
        right = torch.tensor([3.0, -4.0])
        return right * (1 + 2**-8), right + (choice.num_stages == wrong), torch.ones(0)

    def call() -> tuning.Choice:
        launched.clear()
        tuning.best("ssd_outputs", launch, on_gpu, (8, 64, 128))
        return launched[-1]

    def fresh_process() -> None:
        tuning._table.cache_clear()
        tuning._file.cache_clear()

    fresh_process()
    wrong, capturing = None, True
    assert call() == candidates[0]
    assert len(launched) == 1
    capturing = False
    monkeypatch.setattr(proof, "_TRYING", [1])
    assert call() == candidates[0]
    assert len(launched) == 1
    monkeypatch.setattr(proof, "_TRYING", [0])
    assert call().num_stages == 3
    assert len(launched) == 3 * len(candidates) + 1
    fresh_process()
    assert call().num_stages == 3
    assert len(launched) == 1
    (kept,) = (tmp_path / "triton").iterdir()
    kept.write_text("not JSON")
    fresh_process()
    assert call().num_stages == 3
    assert len(launched) == 3 * len(candidates) + 1
    # the fastest one that comes to what the first does
    wrong = 3
    kept.unlink()
    fresh_process()
    assert call().num_stages == 2
    fresh_process()


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_what_the_device_has_no_room_for_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    on_gpu: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    monkeypatch.setattr(tuning, "on_device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(tuning, "_table", lambda device: {})
    monkeypatch.setattr(proof, "_TRYING", [1])
    launched: list[int] = []

    def launch(choice: tuning.Choice) -> tuple[Tensor, ...]:
        launched.append(choice.num_stages)
        if choice.num_stages > room:
            raise OutOfResources(140_000, 100_000, "shared memory")
        return ()

    room = 2
    tuning.best("ssd_gradients", launch, on_gpu, ())
    assert launched == [3, 2]
    room = 1
    with pytest.raises(OutOfResources):
        tuning.best("ssd_gradients", launch, on_gpu, ())


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_every_launch_compiles_as_triton_binds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the launch itself: triton looks at the arguments, specialises and compiles, for a GPU that is
    not there."""
    from tests.ops.ahead import on_hopper

    b, t, h, p, n = 1, 128, 2, 64, 64
    x, dt, A = torch.zeros(b, t, h, p).bfloat16(), torch.zeros(b, t, h).bfloat16(), torch.zeros(h)
    B, state, reset = torch.zeros(b, t, 1, n).bfloat16(), torch.zeros(b, h, p, n), torch.zeros(b, t).bool()
    inputs: Any = (x, dt, A, B, B, A, A, True, 0.0, float("inf"), state, reset)
    with on_hopper() as compiled:
        monkeypatch.setattr(triton_ssd, "kernels", lambda: compiled)
        triton_ssd.forward(*inputs, 64)
        triton_ssd.backward(x, state, *inputs, 64)
        triton_ssd.step(*(v[:, :1] if isinstance(v, Tensor) and v.dim() > 1 else v for v in inputs[:-2]),
                        state, reset[:, :1])  # fmt: skip
    forward, backward = ["steps", "states", "outputs"], ["steps", "states", "states", "gradients", "finish"]
    assert compiled.names == [f"{name}_kernel" for name in (*forward, *backward, "step")]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on the CPU")
def test_where_it_does_not_run_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="ssd: backend 'triton' cannot run on cpu: Triton kernels run on NVIDIA"
    ):
        ops.select({"ssd": "triton"})
    monkeypatch.setattr(triton_ssd, "find_spec", lambda name: None)
    triton_ssd._gpu.cache_clear()
    assert triton_ssd.why_not("cuda") == "triton is not installed: pip install triton"
    triton_ssd._gpu.cache_clear()
    # the interpreter as it comes is wrong in three ways
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(tuning, "MENDED", [])
    assert (
        triton_ssd.why_not("cpu")
        == "Triton's interpreter is for tests, which mend it; unset TRITON_INTERPRET"
    )


def test_auto_takes_it_on_a_gpu_once_it_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ssd, "_gpu", lambda: None)
    monkeypatch.setattr(proof, "_VERDICTS", {("ssd", "triton", "cuda"): None})
    assert default_backend("ssd", "cuda") == "triton"
    proof._VERDICTS["ssd", "triton", "cuda"] = "y is off by 1.0e+00"
    assert default_backend("ssd", "cuda") == "torch"
    with pytest.raises(ValueError, match="cannot run on cuda: y is off by"):
        ops.select({"ssd": "triton"}, "cuda")
    monkeypatch.setattr(triton_ssd, "_gpu", lambda: "PyTorch sees no GPU")
    with pytest.raises(ValueError, match="cannot run on cuda: PyTorch sees no GPU"):
        ops.select({"ssd": "triton"}, "cuda")


# The sizes of `trials.TRIALS` take the interpreter minutes.
TRIALS = (
    partial(trials.ssd, "some heads", 1, 20, 2, 5, 19, 1, chunk=16, reset=torch.arange(20)[None] == 13),
    partial(trials.ssd, "one token", 2, 1, 2, 5, 19, 1, donate=True),
)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[Any, Any]]:
    """A machine whose CPU counts as a GPU on which nothing has been tried, and that has no other kernels."""
    verdicts: dict[Any, Any] = {}
    monkeypatch.setenv("HYBRID_LM_CACHE", str(tmp_path))
    monkeypatch.setenv("HYBRID_LM_NATIVE", "0")
    monkeypatch.setattr(library, "library", lambda: library.Library(None, "switched off"))
    monkeypatch.setattr(proof, "DEVICES", {"cpu"})
    monkeypatch.setattr(proof, "_VERDICTS", verdicts)
    monkeypatch.setattr(trials, "TRIALS", {"ssd": TRIALS})
    proof._triton.cache_clear()
    yield verdicts
    proof._triton.cache_clear()


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's kernels can be changed")
def test_a_kernel_is_tried_before_auto_takes_it(
    tried: dict[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert default_backend("ssd", "cpu") == "triton"
    assert "trying the triton kernels of ssd" in capsys.readouterr().err
    assert torch.equal(torch.get_rng_state(), before)
    (kept,) = (tmp_path / "proofs").iterdir()
    assert json.loads(kept.read_text())["why_not"] is None


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's kernels can be changed")
@pytest.mark.parametrize(
    "part", ["steps_kernel", "outputs_kernel", "gradients_kernel", "finish_kernel", "step_kernel"]
)
def test_a_wrong_kernel_is_refused_with_the_reason(
    part: str, tried: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = triton_ssd.kernels()

    class Wrong:
        """The kernels, of which one does nothing."""

        def __getattr__(self, name: str) -> Any:
            return Nothing() if name == part else getattr(right, name)

    class Nothing:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **settings: None

    monkeypatch.setattr(triton_ssd, "kernels", Wrong)
    assert default_backend("ssd", "cpu") == "torch"
    reason = tried["ssd", "triton", "cpu"]
    where = "one token" if part == "step_kernel" else "some heads"
    assert reason.startswith(f"it does not agree with PyTorch on this device, cpu: {where} in float32: ")
    assert "is off by" in reason
    with pytest.raises(ValueError, match="ssd: backend 'triton' cannot run on cpu: it does not agree"):
        ops.select({"ssd": "triton"}, "cpu")


LIMITS = HERE.with_name("triton_limits.json")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_machine_code_for_hopper_stays_within_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the sizes of Mamba-2, bfloat16; wide heads, float32 and float64 where the kernels are others.
    `shared` is bytes of one program, of 227 KiB on a multiprocessor."""
    from tests.ops.ahead import Launches, machine_code

    launches = Launches()
    monkeypatch.setattr(triton_ssd, "kernels", lambda: launches)
    inputs, state = sizes_of_mamba2(64, 128, torch.bfloat16)
    x = inputs[0]
    triton_ssd.forward(*inputs, None, None, 64)
    weight = torch.empty(64, 64, 4, device="meta", dtype=x.dtype)
    triton_ssd.forward_conv(x, weight, x[0, 0], None, *inputs[1:], None, None, 64)
    triton_ssd.backward(x, None, *inputs, None, None, 64)
    triton_ssd.step(*(v[:, :1] if isinstance(v, Tensor) and v.dim() > 1 else v for v in inputs), state, None)
    wanted: list[Any] = [(name, "", arguments, settings) for name, arguments, settings in launches.found]
    for kind, p, n, dtype in (("_wide", 128, 128, torch.bfloat16), ("_exact", 64, 64, torch.float32),
                              ("_double", 32, 64, torch.float64)):  # fmt: skip
        launches.found.clear()
        others, _ = sizes_of_mamba2(p, n, dtype)
        triton_ssd.forward(*others, None, None, 64)
        triton_ssd.backward(others[0], None, *others, None, None, 64)
        large = ("outputs_kernel",) if kind == "_wide" else ("outputs_kernel", "gradients_kernel")
        wanted += [(name, kind, *rest) for name, *rest in launches.found if name in large]
    found = {}
    for name, kind, arguments, settings in wanted:
        kind = "_reverse" if settings.get("REVERSE") else "_conv" if settings.get("W") else kind
        found[name.removesuffix("_kernel") + kind] = machine_code(name, arguments, settings)
    limits = json.loads(LIMITS.read_text())
    print(json.dumps(found, indent=1))  # what to write into the file after a change that is meant
    assert found.keys() == limits.keys()
    for name, numbers in found.items():
        for what, number in numbers.items():
            # products on the tensor cores of this generation may only become more
            kept = number >= limits[name][what] if what == "wgmma" else number <= limits[name][what]
            assert kept, f"{name}: {what}: {number}, and {limits[name][what]} in {LIMITS.name}"


def sizes_of_mamba2(p: int, n: int, dtype: torch.dtype) -> Any:
    """Arguments without data for 8 sequences of 4096 tokens and 64 heads, and a state."""
    b, t, h, g = 8, 4096, 64, 1
    given: dict[str, Any] = {"device": "meta", "dtype": dtype}
    kept: dict[str, Any] = given | {"dtype": torch.promote_types(dtype, torch.float32)}
    x, dt, A = torch.empty(b, t, h, p, **given), torch.empty(b, t, h, **given), torch.empty(h, **kept)
    B, C = (torch.empty(b, t, g, n, **given) for _ in range(2))
    return (x, dt, A, B, C, A, A, True, 0.0, float("inf")), torch.empty(b, h, p, n, **kept)
