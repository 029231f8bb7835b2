"""Recorded steps against calls of the model, bit for bit; a CUDA graph, or elsewhere what stands for one."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.layers import LAYERS
from hybrid_lm.model import decode
from hybrid_lm.model.build import build_model
from hybrid_lm.model.decode import Decoder, leaves
from hybrid_lm.model.generate import generate, prefill
from hybrid_lm.model.lm import HybridLM, ModelState
from tests.model.tape import tape

FIXED = ("mamba", "mamba2", "short_conv", "gated_deltanet", "rg_lru", "mlp")
VARIANTS = [(name, i) for name in FIXED for i in range(len(LAYERS[name].EXAMPLES))]
STEPS = 6


def model_of(pattern: str, layers: dict[str, Any], **more: Any) -> HybridLM:
    given = {"d_model": 32, "vocab_size": 50, "pattern": pattern, "layers": layers, **more}
    return build_model(ModelConfig.model_validate(given))


def example(name: str, i: int = 0) -> HybridLM:
    return model_of("L L", {"L": {"type": name, **LAYERS[name].EXAMPLES[i]}})


def begun(model: HybridLM, b: int = 2, documents: bool = True, seed: int = 0) -> ModelState:
    """A state after five tokens, of which the first rows have padding in front."""
    rng = torch.Generator().manual_seed(seed)
    state = model.empty_state(b, max_tokens=64)
    docs = (torch.arange(5) >= torch.arange(b)[:, None]).int() if documents else None
    prefill(model, torch.randint(50, (b, 5), generator=rng), state=state, doc_ids=docs)
    return state


def tokens_of(b: int = 2) -> list[Tensor]:
    return [*torch.randint(50, (STEPS, b), generator=torch.Generator().manual_seed(1))]


@torch.no_grad()
def eager(model: HybridLM, state: ModelState, tokens: list[Tensor]) -> list[Tensor]:
    return [model(one[:, None], state=state).logits[:, -1] for one in tokens]


def same(a: ModelState, b: ModelState) -> bool:
    one, other = a.tensors(), b.tensors()
    equal = one.keys() == other.keys() and all(torch.equal(v, other[name]) for name, v in one.items())
    return equal and a.numbers() == b.numbers()


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_recorded_steps_are_the_models_own(name: str, variant: int, documents: bool) -> None:
    model = example(name, variant)
    state = begun(model, documents=documents)
    reference, decoder = state.fork(), Decoder(model, record=tape)
    expected, reasons, where = eager(model, reference, tokens_of()), [], []
    for tokens, logits in zip(tokens_of(), expected, strict=True):
        assert torch.equal(decoder.step(tokens, state), logits)
        reasons.append(decoder.why_not)
        where.append([leaf.tensor.data_ptr() for leaf in leaves(state)])
    assert reasons == ["the first step is only looked at", *[None] * (STEPS - 1)]
    assert all(places == where[1] for places in where[1:]), "states stay where they are"
    assert same(state, reference)


HYBRID = {
    "m": {"type": "mamba2", "d_state": 8, "head_dim": 16},
    "a": {"type": "attention", "n_heads": 2},
    "w": {"type": "attention", "n_heads": 2, "window": 3},
    "n": {"type": "mamba", "d_state": 4},
}


@pytest.mark.parametrize("pattern", ["m a", "n+a m"])
def test_a_memory_that_grows_is_not_recorded_and_says_so(pattern: str) -> None:
    model = model_of(pattern, HYBRID)
    state = begun(model)
    reference, decoder = state.fork(), Decoder(model, record=tape)
    for tokens, logits in zip(tokens_of(), eager(model, reference, tokens_of()), strict=True):
        assert torch.equal(decoder.step(tokens, state), logits)
        assert "length changes with every token: " in (decoder.why_not or "")
    assert same(state, reference)


def test_a_window_that_is_full_is_a_fixed_memory() -> None:
    model = model_of("m+n w n+m", HYBRID)
    state = begun(model)
    reference, decoder = state.fork(), Decoder(model, record=tape)
    for tokens, logits in zip(tokens_of(), eager(model, reference, tokens_of()), strict=True):
        assert torch.equal(decoder.step(tokens, state), logits)
    assert decoder.why_not is None
    assert same(state, reference)


def asks(x: Tensor) -> Tensor:
    return x * float(x.sum())


def picks(x: Tensor) -> Tensor:
    return x + x[x > 0].sum()


@pytest.mark.parametrize(("function", "op"), [(asks, "_local_scalar_dense"), (picks, "index")])
def test_a_step_that_waits_is_not_recorded_and_says_where(function: Any, op: str) -> None:
    model = example("mamba")
    model.layers[0].register_forward_hook(lambda _, given, out: (function(out[0]), out[1]))
    state, decoder = begun(model), Decoder(model, record=tape)
    decoder.step(tokens_of()[0], state)
    assert decoder.why_not == f"a step waits for the device: aten.{op}"


def test_experts_are_not_recorded() -> None:
    model = example("moe")
    decoder, state = Decoder(model, record=tape), begun(model)
    for tokens in tokens_of():
        decoder.step(tokens, state)
        assert (decoder.why_not or "").startswith("a step waits for the device: ")


def test_a_recording_that_fails_costs_nothing() -> None:
    def record(step):
        tape(step)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model = example("mamba2")
    state = begun(model)
    reference, decoder = state.fork(), Decoder(model, record=record)
    for tokens, logits in zip(tokens_of(), eager(model, reference, tokens_of()), strict=True):
        assert torch.equal(decoder.step(tokens, state), logits)
    assert decoder.why_not == "a step cannot be recorded: operation not permitted when stream is capturing"
    assert same(state, reference)


def test_states_take_turns() -> None:
    """Two states of one size in a recording that has one memory; and one of another size."""
    model, tokens = example("mamba2"), tokens_of()
    states = [begun(model, seed=seed) for seed in (0, 1)]
    references = [state.fork() for state in states]
    decoder = Decoder(model, record=counted(calls := list[int]()))
    for one in tokens:
        for state, reference in zip(states, references, strict=True):
            assert torch.equal(decoder.step(one, state), eager(model, reference, [one])[0])
    other = begun(model, b=3)
    reference = other.fork()
    for one in tokens_of(3):
        assert torch.equal(decoder.step(one, other), eager(model, reference, [one])[0])
    assert all(same(a, b) for a, b in zip([*states, other], [*references, reference], strict=True))
    assert len(calls) == 2, "once for each size"


def test_states_of_two_sizes_take_turns_from_the_first_step_on() -> None:
    model, tokens = example("mamba"), tokens_of()
    states = [begun(model, b=b) for b in (1, 2)]
    references = [state.fork() for state in states]
    decoder = Decoder(model, record=counted(calls := list[int]()))
    for one in tokens:
        for state, reference in zip(states, references, strict=True):
            given = one[: len(state.position)]
            assert torch.equal(decoder.step(given, state), eager(model, reference, [given])[0])
    assert decoder.why_not is None
    assert len(calls) == 2, "once for each size"


def counted(calls: list[int]) -> decode.Record:
    def record(step):
        calls.append(1)
        return tape(step)

    return record


def test_a_state_may_be_forked_rolled_back_gathered_and_read_on() -> None:
    model, tokens = example("mamba"), tokens_of()
    state, decoder = begun(model), Decoder(model, record=tape)
    reference = state.fork()

    def both(one: Tensor) -> None:
        assert torch.equal(decoder.step(one, state), eager(model, reference, [one])[0])
        assert same(state, reference)

    for one in tokens[:3]:
        both(one)
    kept, kept_reference = state.fork(), reference.fork()
    both(tokens[3])
    state.rollback(kept)
    reference.rollback(kept_reference)
    both(tokens[4])
    rows = torch.tensor([1, 1])
    state, reference = state.gather(rows), reference.gather(rows)
    both(tokens[5])
    for one in (state, reference):
        prefill(model, torch.stack(tokens, 1), state=one)
    both(tokens[0])
    both(tokens[1])


def test_logits_and_forks_are_not_overwritten() -> None:
    model, tokens = example("mamba2"), tokens_of()
    state, decoder = begun(model), Decoder(model, record=tape)
    for one in tokens[:2]:
        decoder.step(one, state)
    logits = decoder.step(tokens[2], state)
    fork, before = state.fork(), logits.clone()
    copied = fork.fork()
    decoder.step(tokens[3], state)
    assert torch.equal(logits, before)
    assert same(fork, copied)


@pytest.mark.parametrize("mode", ["training", "autocast", "no GPU"])
def test_where_nothing_is_recorded(mode: str) -> None:
    model = example("mamba")
    model.train(mode == "training")
    decoder = Decoder(model, record=None if mode == "no GPU" else tape)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        state = begun(model)
        for tokens in tokens_of():
            decoder.step(tokens, state)
    said = {
        "training": "the model is in training mode",
        "autocast": "autocast casts the weights anew for every step",
        "no GPU": "only steps on a GPU are recorded",
    }
    if mode == "no GPU" and torch.cuda.is_available():
        assert decoder.record is None
    assert decoder.why_not == said[mode]


def test_learned_positions_end_where_they_end() -> None:
    model = model_of("n", HYBRID, embedding={"positions": "learned", "max_positions": 9})
    state, decoder = begun(model, documents=False), Decoder(model, record=tape)
    for tokens in tokens_of()[:4]:
        decoder.step(tokens, state)
    with pytest.raises(ValueError, match="the model has learned positions for 9"):
        decoder.step(tokens_of()[4], state)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generating_with_it_is_generating(temperature: float) -> None:
    model, prompts = example("mamba2"), [[1, 2, 3], [4]]
    how: dict[str, Any] = {"max_new_tokens": 20, "temperature": temperature, "seed": 3}
    decoder = Decoder(model, record=counted(calls := list[int]()))
    expected = generate(model, prompts, **how)
    for _ in range(2):
        assert [one.tokens for one in generate(model, prompts, **how, decoder=decoder)] == [
            one.tokens for one in expected
        ]
    assert len(calls) == 1, "the second call goes on with the recording of the first"


def test_a_decoder_holds_no_state_alive() -> None:
    model = example("mamba")
    state, decoder = begun(model), Decoder(model, record=tape)
    for tokens in tokens_of():
        decoder.step(tokens, state)
    assert decoder.current is not None
    del state, tokens
    gc.collect()
    assert decoder.current.state() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@pytest.mark.parametrize("b", [1, 64])
def test_a_cuda_graph_gives_the_models_own_bits(name: str, b: int) -> None:
    model = build_model(example(name).config, device="cuda")
    state = model.empty_state(b)
    reference, decoder = state.fork(), Decoder(model)
    tokens = [v.to("cuda") for v in tokens_of(b)]
    for one, logits in zip(tokens, eager(model, reference, tokens), strict=True):
        assert torch.equal(decoder.step(one, state), logits)
    assert decoder.why_not is None
    assert same(state, reference)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="less than two GPUs")
def test_each_gpu_has_recordings_of_its_own() -> None:
    for device in ("cuda:0", "cuda:1"):
        model = build_model(example("mamba2").config, device=device)
        state = model.empty_state(2)
        reference, decoder = state.fork(), Decoder(model)
        tokens = [v.to(device) for v in tokens_of()]
        for one, logits in zip(tokens, eager(model, reference, tokens), strict=True):
            assert torch.equal(decoder.step(one, state), logits)
        assert decoder.why_not is None


@pytest.mark.compile
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler about its own parts
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_compiled_cuda_graph_is_close(name: str) -> None:
    model = build_model(example(name).config, device="cuda")
    state = model.empty_state(2)
    reference, decoder = state.fork(), Decoder(model, compiled=True)
    tokens = [v.to("cuda") for v in tokens_of()]
    for one, logits in zip(tokens, eager(model, reference, tokens), strict=True):
        found = decoder.step(one, state)
        # Sums of 64 float32 in another order, in each product of two layers.
        assert (found - logits).abs().max() <= 64 * 8 * torch.finfo(torch.float32).eps * logits.abs().max()
    assert decoder.why_not is None


@pytest.mark.parametrize("recorded", [False, True])
def test_what_is_no_token_is_refused(recorded: bool) -> None:
    """Also where a recorded step would copy it into place, in every row or cut off."""
    model = example("mamba")
    model.eval()
    decoder, state = Decoder(model, record=tape if recorded else None), begun(model, 3)
    for tokens in (torch.zeros(3, dtype=torch.int64),) * 3:
        decoder.step(tokens, state)
    wrong = (
        torch.tensor(1),
        torch.tensor([1]),
        torch.zeros(3, 1, dtype=torch.int64),
        torch.tensor([2.9] * 3),
    )
    for tokens in (*wrong, torch.ones(3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="tokens: one whole number for each of 3 sequences"):
            decoder.step(tokens, state)


def test_the_state_of_another_model_is_refused() -> None:
    model, deeper = example("mamba"), model_of("L L L", {"L": {"type": "mamba"}})
    for one, other in ((model, deeper), (deeper, model)):
        with pytest.raises(ValueError, match=r"a state of \d layers, of another model"):
            one(torch.zeros(2, 1, dtype=torch.int64), state=other.empty_state(2))
