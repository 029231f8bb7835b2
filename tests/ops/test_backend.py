"""The table of backends: choice, refusal, drift."""

import inspect
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hybrid_lm import ops
from hybrid_lm.ops import backend, proof, trials
from hybrid_lm.ops.external import packages
from hybrid_lm.ops.native import library
from hybrid_lm.ops.triton import ssd as triton

NAMES = (
    "attention",
    "causal_conv1d",
    "delta_rule",
    "gated_rms_norm",
    "grouped_linear",
    "linear",
    "linear_cross_entropy",
    "linear_recurrence",
    "mamba2_mixer",
    "rms_norm",
    "selective_scan",
    "ssd",
)


NATIVE = ("causal_conv1d", "gated_rms_norm", "linear", "rms_norm", "selective_scan", "ssd")


@pytest.mark.parametrize("why_not", [None, "not built: run `hybrid-lm build-native`"])
def test_auto_takes_the_best_that_can_run(monkeypatch: pytest.MonkeyPatch, why_not: str | None) -> None:
    monkeypatch.setattr(library, "library", lambda: library.Library(None, why_not))
    monkeypatch.setattr(triton, "_gpu", lambda: "PyTorch sees no GPU")
    monkeypatch.setattr(packages, "no_gpu", lambda: "PyTorch sees no GPU")
    plain = dict.fromkeys(NAMES, "torch")
    best = plain if why_not else plain | dict.fromkeys(NATIVE, "native")
    assert ops.select() == best
    assert ops.select("auto", "cuda") == plain
    assert set(ops.select("reference").values()) == {"reference"}
    assert ops.select({"ssd": "reference"}) == best | {"ssd": "reference"}
    rows = [r for r in ops.report() if r.backend == "native"]
    steps = {"mamba2_mixer": "there is no kernel for one token on cpu"}
    assert {r.op: r.why_not for r in rows} == dict.fromkeys(NATIVE, why_not) | steps


def test_a_native_library_that_is_missing_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library", lambda: library.Library(None, "not built"))
    for op in NATIVE:
        with pytest.raises(ValueError, match=f"^{op}: backend 'native' cannot run on cpu: not built$"):
            ops.select({op: "native"})
    with pytest.raises(ValueError, match="rms_norm: backend 'native' cannot run on cpu: not built"):
        ops.rms_norm(torch.ones(3), backend="native")


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("fla", "mamba2_mixer: backend 'fla' cannot run on cpu: this version has no fla kernel for it"),
        (
            "native",
            "attention, grouped_linear, linear_cross_entropy: backend 'native' cannot run on cpu: this",
        ),
        ("native", "it has: reference, torch"),
        ("troch", "known: auto, causal_conv1d, fla, mamba_ssm, native, reference, torch, triton. Did you"),
        ("troch", "Did you mean 'torch'?"),
        ({"sdd": "torch"}, "unknown op 'sdd'; known: attention,"),
        ({"sdd": "torch"}, "Did you mean 'ssd'?"),
    ],
)
def test_what_is_asked_for_and_missing_is_refused(requested: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.select(requested)


def test_a_call_refuses_too() -> None:
    with pytest.raises(
        ValueError, match=r"rms_norm: backend 'fla' cannot run on cpu: this version has no fla"
    ):
        ops.rms_norm(torch.ones(3), backend="fla")


def test_a_kernel_is_one_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_OPS", {})

    def reference(x, *, eps=1.0):
        return "reference"

    def torch_form(x, *, eps=1.0):
        return "torch"

    def kernel(x, *, eps=1.0):
        return "native"

    pick = backend.define("toy", reference=reference, torch=torch_form)
    backend.register(
        "toy", "native", run=kernel, why_not=lambda d: None if d == "cpu" else f"not built for {d}"
    )
    assert pick(None, torch.ones(1))(0) == "native"
    assert pick("reference", torch.ones(1))(0) == "reference"
    assert ops.select("auto", "cpu") == {"toy": "native"}
    assert ops.select("auto", "cuda") == {"toy": "torch"}
    with pytest.raises(ValueError, match=r"toy: backend 'native' cannot run on cuda: not built for cuda"):
        ops.select("native", "cuda")
    assert [(r.backend, r.chosen, r.why_not) for r in ops.report("cuda")] == [
        ("native", False, "not built for cuda"),
        ("torch", True, None),
        ("reference", False, None),
    ]


@dataclass
class Tried:
    """An op whose kernel computes `kernel`, on a device of which nothing is known; `asks` counts its runs."""

    kernel: Callable[[torch.Tensor], torch.Tensor]
    asks: int = 0
    source: str = "one"

    def chosen(self) -> str:
        """What `auto` means in a new process."""
        proof._VERDICTS.clear()
        return backend.default_backend("toy", "cpu")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tried:
    monkeypatch.setenv("HYBRID_LM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backend, "_OPS", {})
    monkeypatch.setattr(proof, "_VERDICTS", {})
    monkeypatch.setattr(proof, "DEVICES", {"cpu"})
    state = Tried(lambda x: 2 * x)
    monkeypatch.setattr(proof, "IDENTITIES", {"native": lambda: state.source})
    trial = proof.Trial("a row", {"x": torch.arange(-8, 8, dtype=torch.float64)})
    monkeypatch.setattr(trials, "TRIALS", {"toy": (lambda: trial,)})

    def kernel(x):
        state.asks += 1
        return state.kernel(x)

    backend.define("toy", reference=lambda x: 2 * x, torch=lambda x: x + x)
    backend.register("toy", "native", run=kernel)
    return state


def test_a_kernel_that_agrees_is_tried_once(toy: Tried) -> None:
    assert toy.chosen() == "native"
    # in float32 and in bfloat16
    assert toy.asks == 2
    assert backend.default_backend("toy", "cpu") == toy.chosen() == "native"
    assert toy.asks == 2
    toy.source = "another"
    assert toy.chosen() == "native"
    assert toy.asks == 4
    toy.source = "one"
    assert toy.chosen() == "native"
    assert toy.asks == 4


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (
            lambda x: 2.01 * x,
            "a row in float32: output 1 is off by 5.0e-03 of the largest value, and 4.9e-04",
        ),
        (lambda x: x + x.detach(), "a row in float32: the gradient of x is off by"),
        (lambda x: 2 * x + torch.nan, "a row in float32: output 1 is off by nan"),
        (lambda x: x + x if x.dtype == torch.float32 else 3 * x, "a row in bfloat16: output 1 is off by"),
    ],
)
def test_a_kernel_that_differs_says_by_how_much(
    toy: Tried, kernel: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
    toy.kernel = kernel
    for _ in range(2):
        assert toy.chosen() == "torch"
        with pytest.raises(
            ValueError, match="toy: backend 'native' cannot run on cpu: it does not agree"
        ) as e:
            ops.select("native", "cpu")
        assert f"with PyTorch on this device, cpu: {reason}" in str(e.value)
        # the second time it is read
        assert toy.asks <= 2


def test_a_kernel_that_fails_is_refused_and_one_without_memory_asked_again(toy: Tried) -> None:
    def fails(x):
        raise RuntimeError("no kernel image\nand more")

    def has_no_memory(x):
        raise torch.OutOfMemoryError("3 GiB")

    toy.kernel = has_no_memory
    assert toy.chosen() == toy.chosen() == "torch"
    assert toy.asks == 2
    toy.kernel = fails
    assert toy.chosen() == toy.chosen() == "torch"
    assert toy.asks == 3
    [row] = [r for r in ops.report("cpu") if r.backend == "native"]
    assert row.why_not == "it fails on this device, cpu: RuntimeError: no kernel image"


def test_a_device_that_does_not_answer_says_nothing_of_the_kernel(
    toy: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def zeros(*args: object, **how: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", zeros)
        assert toy.chosen() == "torch"
        [row] = [r for r in ops.report("cpu") if r.backend == "native"]
    assert row.why_not == (
        "this device does not answer, and nothing can be tried: CUDA error: an illegal memory access"
    )
    assert toy.asks == 0
    assert toy.chosen() == "native"


def test_a_cache_that_is_broken_or_cannot_be_written(toy: Tried, tmp_path: Path) -> None:
    assert toy.chosen() == "native"
    [kept] = (tmp_path / "cache" / "proofs").iterdir()
    for content in ("not JSON", "[]", '{"why_not": 3}', "{}"):
        before = toy.asks
        kept.write_text(content)
        assert toy.chosen() == "native"
        assert toy.asks == before + 2
    # a file in the place of the folder: not even root can write into it
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("")
    before = toy.asks
    assert toy.chosen() == backend.default_backend("toy", "cpu") == "native"
    assert toy.asks == before + 2


def test_what_is_not_tried(toy: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.kernel = lambda x: 3 * x
    monkeypatch.setenv("HYBRID_LM_PROOF", "0")
    assert toy.chosen() == "native"
    monkeypatch.delenv("HYBRID_LM_PROOF")
    monkeypatch.setattr(proof, "DEVICES", {"cuda"})
    assert toy.chosen() == "native"
    # while a CUDA graph is recorded nothing is tried, and nothing remembered
    proof._VERDICTS.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backend.default_backend("toy", "cuda") == "torch"
    assert not proof._VERDICTS
    assert toy.asks == 0


@pytest.mark.compile
def test_a_compiled_graph_that_is_the_first_to_ask(toy: Tried) -> None:
    torch.compiler.reset()
    pick = backend.define("other", reference=lambda x: 2 * x, torch=lambda x: x + x)
    trials.TRIALS["other"] = trials.TRIALS["toy"]
    asked: list[int] = []
    backend.register("other", "native", run=lambda x: asked.append(1) or 3 * x)

    def op(x: torch.Tensor) -> torch.Tensor:
        return pick(None, x)(x)

    compiled = torch.compile(op, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert len(asked) == 1
    assert proof._VERDICTS["other", "native", "cpu"]


def test_trying_leaves_no_trace_and_takes_no_mode(toy: Tried) -> None:
    before = torch.get_rng_state()
    toy.kernel = lambda x: torch.nn.functional.linear(x[None], 2 * torch.eye(16, dtype=x.dtype))[0]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert toy.chosen() == "native"
    assert torch.equal(torch.get_rng_state(), before)


def test_drift_of_signatures_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_OPS", {})

    def reference(x, *, eps=1.0): ...

    def drifted(x, *, eps=2.0): ...

    shown = r"(?s)toy: .*reference\(x, \*, eps=1.0\).*drifted\(x, \*, eps=2.0\)"
    with pytest.raises(TypeError, match=shown):
        backend.define("toy", reference=reference, torch=drifted)
    # whatever came first
    monkeypatch.setattr(backend, "_OPS", {})
    backend.register("toy", "native", run=reference)
    with pytest.raises(TypeError, match=shown):
        backend.register("toy", "reference", run=drifted)


@pytest.mark.parametrize("name", NAMES)
def test_the_public_signature_is_the_backends_plus_backend(name: str) -> None:
    public = inspect.signature(getattr(ops, name))
    inner = inspect.signature(backend._OPS[name]["reference"].run)
    assert public.parameters["backend"].default is None
    without = [p for p in public.parameters.values() if p.name != "backend"]
    assert without == list(inner.parameters.values())
