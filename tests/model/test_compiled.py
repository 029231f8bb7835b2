"""Training and decoding of whole Mamba models as one graph each: no break, no second compilation, the same
numbers; on the backends of this process, and in others on the emulated kernels for CUDA and on Triton's."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.model.build import build_model
from hybrid_lm.model.decode import Decoder, leaves
from hybrid_lm.model.generate import prefill
from hybrid_lm.model.lm import HybridLM
from hybrid_lm.ops.native import library, mamba2_mixer, mamba2_step
from hybrid_lm.ops.native.build import COMPILERS, build
from hybrid_lm.ops.triton import tuning
from tests.model.tape import tape

pytestmark = [
    pytest.mark.compile,
    # of torch's compiler about its own parts
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
INTERPRETED = tuning.interpreted()
EMULATED = (library.isa() or "").startswith("emulated")
ALONE = INTERPRETED or EMULATED
ROOT = Path(__file__).parents[2]
if INTERPRETED:
    import tests.ops.interpreter  # noqa: F401 - mends it

PLAIN = dict.fromkeys(("rms_norm", "gated_rms_norm", "linear", "ssd"), "torch")
KERNELS = {"selective_scan": "native", "causal_conv1d": "native", "mamba2_mixer": "native"}
WAYS: dict[str, Any] = {"torch": "torch", "auto": "auto"}
if INTERPRETED:
    WAYS = {"triton": {"ssd": "triton"}}
if EMULATED:
    WAYS = {"emulated": PLAIN | KERNELS}
LAYERS: dict[str, dict[str, Any]] = {
    "m": {"type": "mamba", "d_state": 4},
    "s": {"type": "mamba2", "d_state": 8, "head_dim": 16, "chunk": 8},
    "g": {"type": "mamba2", "d_state": 8, "head_dim": 16, "chunk": 8, "n_groups": 2, "norm": "norm_gate"},
    "o": {"type": "mamba2", "d_state": 8, "head_dim": 16, "chunk": 8, "norm": "gate", "conv_bias": False},
    "f": {"type": "mlp", "d_ff": 48},
}
KINDS = {"mamba": "m f m", "mamba2": "s f g o"}
if INTERPRETED:
    # The interpreter takes its time for every head.
    KINDS = {"mamba2": "s f"}
    LAYERS["s"] |= {"d_inner": 32}
# Documents behind padding, over two of the chunks above.
DOCS = torch.tensor([0] * 3 + [1] * 4 + [2] * 6, dtype=torch.int32)


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if EMULATED:
        monkeypatch.setattr(mamba2_step, "DEVICES", {"cuda", "cpu"})
    torch.compiler.reset()
    # A second compilation of the same function is an error.
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


def model_of(pattern: str, way: str) -> HybridLM:
    given = {"d_model": 32, "vocab_size": 50, "pattern": pattern, "layers": LAYERS}
    return build_model(ModelConfig.model_validate(given), backend=WAYS[way])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_is_one_graph(kind: str, way: str, bf16: bool) -> None:
    """On packed documents behind padding; with bf16, under autocast and with layers computed again."""
    model = model_of(KINDS[kind], way).train()
    model.gradient_checkpointing = bf16
    compiled = torch.compile(model.token_loss, fullgraph=True, backend="aot_eager")
    docs = DOCS.expand(2, -1)
    for _ in range(2):
        tokens, labels = torch.randint(50, (2, *docs.shape))
        found: list[list[Tensor]] = []
        for token_loss in (model.token_loss, compiled):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                objective = token_loss(tokens, labels, doc_ids=docs).objective
            grads = torch.autograd.grad(objective.sum(), list(model.parameters()))
            found.append([objective.detach(), *grads])
        # The same operations, in another order where gradients of one tensor are added.
        eps = torch.finfo(torch.bfloat16 if bf16 else torch.float32).eps
        for eager, one in zip(*found, strict=True):
            assert (one - eager).abs().max() <= 8 * eps * eager.abs().max()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_is_one_graph(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled step over and over; then recorded, and replayed, as it is on a GPU."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    steps = counted(monkeypatch)
    model = model_of(KINDS[kind], way)
    state = model.empty_state(2)
    docs = (torch.arange(5) >= torch.arange(2)[:, None]).int()
    prefill(model, torch.randint(50, (2, 5)), state=state, doc_ids=docs)
    mine = {
        "the model": state,
        "compiled": state.fork(),
        "recorded": state.fork(),
    }
    decoders = {"compiled": Decoder(model, compiled=True), "recorded": Decoder(model, record=tape)}
    if torch.cuda.is_available():
        decoders["compiled"].record = None
    places = []
    for tokens in torch.randint(50, (5, 2)):
        with torch.no_grad():
            logits = model(tokens[:, None], state=state).logits[:, -1]
        for name, decoder in decoders.items():
            assert torch.equal(decoder.step(tokens, mine[name]), logits), name
        places.append([leaf.tensor.data_ptr() for leaf in leaves(mine["recorded"])])
    assert decoders["compiled"].why_not == "this step is compiled and not recorded"
    assert decoders["recorded"].why_not is None
    assert places[1:] == [places[1]] * 4
    assert bool(steps) == EMULATED or kind == "mamba"
    for name, one in mine.items():
        for path, v in state.tensors().items():
            assert torch.equal(one.tensors()[path], v), (name, path)
        assert one.numbers() == state.numbers()


@pytest.mark.skipif(ALONE, reason="once is enough")
def test_batch_sizes_share_a_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    model = model_of("m s", "auto")
    decoder = Decoder(model, compiled=True)
    if torch.cuda.is_available():
        decoder.record = None
    with torch._dynamo.config.patch(error_on_recompile=False), torch.no_grad():
        for b in range(1, 13):
            state = model.empty_state(b)
            reference = state.fork()
            for tokens in torch.randint(50, (2, b)):
                logits = model(tokens[:, None], state=reference).logits[:, -1]
                assert torch.equal(decoder.step(tokens, state), logits), b
    # One row is a case of its own to torch.compile.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.skipif(library.why_not("cpu") is not None, reason="no native library")
@pytest.mark.parametrize("way", [way for way in WAYS if way != "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_leave_states_where_they_are(kind: str, way: str) -> None:
    model = model_of(KINDS[kind], way)
    state = model.empty_state(2)
    places = []
    for tokens in torch.randint(50, (3, 2)):
        with torch.no_grad():
            model(tokens[:, None], state=state)
        places.append([leaf.tensor.data_ptr() for leaf in leaves(state) if leaf.path.startswith("layers")])
    assert places[0] == places[1] == places[2]


@pytest.mark.skipif(INTERPRETED or library.why_not("cpu") is not None, reason="no native library")
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no compiler")
def test_a_compiled_step_copies_no_state() -> None:
    """torch.compile takes updates in place for new tensors, and has to find out that they need not be."""
    (way,) = (way for way in WAYS if way != "torch")
    model = model_of("m s", way)
    state = model.empty_state(2)
    shapes = [leaf.tensor.shape for leaf in leaves(state) if leaf.path.startswith("layers")]
    step = torch.compile(lambda tokens: model(tokens, state=state).logits, fullgraph=True, dynamic=False)
    with torch.no_grad():
        _, code = run_and_get_code(step, torch.randint(50, (2, 1)))
    made = re.findall(r"empty_strided\w*\((\([^)]*\))", "\n".join(code))
    assert made
    assert not {str(tuple(shape)) for shape in shapes} & set(made)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at every token that one kernel works on."""
    calls: list[int] = []
    step = mamba2_mixer.mamba2_step

    def counting(*args: Any, **how: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            calls.append(1)
        return step(*args, **how)

    monkeypatch.setattr(mamba2_mixer, "mamba2_step", counting)
    return calls


@pytest.mark.skipif(not EMULATED, reason="in a process of its own, by the test below")
@pytest.mark.parametrize("layer", ["s", "g", "o"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_in_one_kernel_is_a_token_by_the_ops(layer: str, dtype: torch.dtype) -> None:
    one, parts = (model_of(f"{layer} {layer}", "emulated").to(dtype) for _ in range(2))
    parts.backends = dict.fromkeys(parts.backends, "torch")
    exact = model_of(f"{layer} {layer}", "emulated").double()
    exact.load_state_dict(one.state_dict())
    exact.backends = parts.backends
    models = (one, parts, exact)
    states = [model.empty_state(3) for model in models]
    where = [leaf.tensor.data_ptr() for leaf in leaves(states[0]) if "layers" in leaf.path]
    for k, tokens in enumerate(torch.randint(50, (6, 3, 1))):
        # A new document for some; all begin one with the first token.
        docs = None if k % 2 else torch.tensor([[1], [1 + k], [1]])
        with torch.no_grad():
            y, z, x = (
                model(tokens, state=state, doc_ids=docs).logits.double()
                for model, state in zip(models, states, strict=True)
            )
        # Not further from the truth than the ops are, save for two roundings of a logit.
        slack = 4 * torch.finfo(dtype).eps * x.abs().max()
        assert (y - x).abs().max() <= 2 * (z - x).abs().max() + slack
    assert [leaf.tensor.data_ptr() for leaf in leaves(states[0]) if "layers" in leaf.path] == where


def in_a_process_of_its_own(*more: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *more, __file__],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.skipif(ALONE or not any(map(shutil.which, COMPILERS)), reason="there is no compiler, or it runs")
def test_on_the_emulated_kernels_for_cuda() -> None:
    in_a_process_of_its_own("-p", "tests.native.emulated", HYBRID_LM_NATIVE=str(build("emulated")))


@pytest.mark.skipif(ALONE or find_spec("triton") is None, reason="triton is not installed, or it runs")
def test_on_the_kernels_of_triton() -> None:
    in_a_process_of_its_own(TRITON_INTERPRET="1")
