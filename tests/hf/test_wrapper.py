"""The `transformers` class is the model: forward, loss, memory, generation, padding, packing, types."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hf_models import HYBRID, PARALLEL, RECURRENT, WHOLE, ZAMBA, bound, build
from torch import Tensor
from transformers import DynamicCache

from hybrid_lm.hf.convert import to_hf
from hybrid_lm.hf.wrapper import HybridLMCache, HybridLMConfig, HybridLMForCausalLM
from hybrid_lm.model.generate import generate
from hybrid_lm.model.init import entries

SHAPES = pytest.mark.parametrize("shape", list(WHOLE))


def tokens(b: int, t: int) -> Tensor:
    return torch.randint(61, (b, t))


def greedy(model: HybridLMForCausalLM, prompt: Tensor, n: int, **how) -> Tensor:
    """The continuation alone (b n), with nothing that could end it early."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    how = {"attention_mask": torch.ones_like(prompt), "do_sample": False, **how}
    return model.generate(prompt, max_new_tokens=n, **how)[:, prompt.shape[1] :]


@SHAPES
def test_forward_is_the_models(shape):
    model = build(WHOLE[shape])
    x = tokens(2, 13)
    with torch.no_grad():
        ours = model(x).logits
        # The same operations on the same numbers: exact.
        assert torch.equal(to_hf(model)(x, use_cache=False).logits, ours)
        # A cache begins with a state of zeros, from which on decays are summed: they round otherwise.
        assert (to_hf(model)(x).logits - ours).abs().max() <= bound(ours)
        last = to_hf(model)(x, logits_to_keep=2, use_cache=False)
        assert last.past_key_values is None
        # A smaller product may be summed in another order.
        assert (last.logits - ours[:, -2:]).abs().max() <= bound(ours)


@SHAPES
def test_greedy_cached_is_uncached_is_ours(shape):
    model = build(WHOLE[shape])
    hf, x = to_hf(model), tokens(2, 9)
    cached = greedy(hf, x, 10)
    assert torch.equal(cached, greedy(hf, x, 10, use_cache=False))
    ours = generate(model, x.tolist(), max_new_tokens=10, temperature=0)
    assert cached.tolist() == [g.tokens for g in ours]


@SHAPES
def test_left_padding_changes_no_row(shape):
    model = build(WHOLE[shape])
    hf, lengths = to_hf(model), [3, 11, 7]
    x, mask = tokens(3, 11), torch.zeros(3, 11, dtype=torch.int64)
    for row, n in enumerate(lengths):
        mask[row, 11 - n :] = 1
    together = greedy(hf, x, 8, attention_mask=mask)
    with torch.no_grad():
        logits = hf(x, attention_mask=mask).logits
        for row, n in enumerate(lengths):
            alone = x[row : row + 1, 11 - n :]
            assert torch.equal(together[row : row + 1], greedy(hf, alone, 8))
            single = hf(alone).logits[0]
            assert (logits[row, 11 - n :] - single).abs().max() <= bound(single)


@pytest.mark.parametrize("architecture", [HYBRID, RECURRENT], ids=["hybrid", "recurrent"])
def test_beam_search_follows_its_rows(architecture):
    hf, x = to_hf(build(architecture)), tokens(2, 7)
    # Without a memory nothing needs reordering: the search as transformers means it.
    with_cache = greedy(hf, x, 9, num_beams=3)
    assert torch.equal(with_cache, greedy(hf, x, 9, num_beams=3, use_cache=False))
    assert not torch.equal(with_cache, greedy(hf, x, 9)), "the beams never crossed: choose another seed"


@SHAPES
def test_goes_on_from_a_returned_cache(shape):
    hf, x, more = to_hf(build(WHOLE[shape])), tokens(2, 9), tokens(2, 4)
    first = hf.generate(x, do_sample=False, max_new_tokens=5, return_dict_in_generate=True, eos_token_id=None)
    assert first.past_key_values.get_seq_length() == 9 + 5 - 1
    whole = torch.cat([first.sequences, more], 1)
    mask = torch.ones_like(whole)
    again = greedy(hf, whole, 5, past_key_values=first.past_key_values, attention_mask=mask)
    assert torch.equal(again, greedy(hf, whole, 5))


def test_packed_positions_and_doc_ids_keep_documents_apart():
    hf, x = to_hf(build(ZAMBA)), tokens(1, 16)
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    docs = (torch.arange(16)[None] >= 7).int() + 1
    with torch.no_grad():
        apart = torch.cat([hf(x[:, :7]).logits, hf(x[:, 7:]).logits], 1)
        by_positions = hf(x, position_ids=positions).logits
        by_docs = hf(x, doc_ids=docs).logits
        padded = hf(
            F.pad(x, (2, 0)), position_ids=F.pad(positions, (2, 0)), attention_mask=F.pad(x * 0 + 1, (2, 0))
        )
        cut = hf(x[:, :4], position_ids=positions[:, :4])
        rest = hf(x[:, 4:], position_ids=positions[:, 4:], past_key_values=cut.past_key_values).logits
        leak = hf(x).logits
    limit = bound(apart)
    assert (by_positions - apart).abs().max() <= limit
    assert (by_docs - apart).abs().max() <= limit
    assert (padded.logits[:, 2:] - apart).abs().max() <= limit
    assert (rest - apart[:, 4:]).abs().max() <= limit
    assert (leak - apart).abs().max() > 100 * limit


def test_loss_is_cross_entropy_of_shifted_labels_and_trains():
    hf = to_hf(build(ZAMBA)).train()
    x = tokens(3, 12)
    labels = x.clone()
    labels[:, :4] = -100
    out = hf(x, labels=labels)
    assert out.past_key_values is None
    logits = hf(x).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    # One mean of 24 terms, summed in two ways.
    error = (out.loss - expected).abs().item()
    assert error <= 32 * torch.finfo(torch.float32).eps * expected.item()
    out.loss.backward()
    for name, parameter in hf.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    before = out.loss.item()
    optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        loss = hf(input_ids=x, labels=labels).loss
        loss.backward()
    assert loss.item() < before


def test_bf16_keeps_dynamics_in_float32(tmp_path):
    hf = to_hf(build(HYBRID))
    hf.save_pretrained(tmp_path)
    dynamics = {f"model.{e.name}" for e in entries(hf.model) if e.spec.kind == "dynamics"}
    kept = {name: p for name, p in hf.named_parameters() if name in dynamics}
    assert kept
    loaded = HybridLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for model in (loaded, to_hf(build(HYBRID)).to(torch.bfloat16)):
        assert model.dtype == torch.bfloat16
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if name in kept else torch.bfloat16), name
            if name in kept:
                assert torch.equal(parameter, kept[name])
        assert model(tokens(1, 5)).logits.dtype == torch.bfloat16


def test_a_missing_weight_gets_its_start_and_no_other_is_touched(tmp_path):
    hf = to_hf(build(HYBRID))
    state = {k: v for k, v in hf.state_dict().items() if not k.endswith("A_log")}
    hf.save_pretrained(tmp_path, state_dict=state)
    loaded, info = HybridLMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    missing = {name for name, _ in hf.named_parameters() if name.endswith("A_log")}
    assert info["missing_keys"] == missing
    fresh = HybridLMForCausalLM(hf.config)
    for name, parameter in loaded.named_parameters():
        source = fresh if name in missing else hf
        assert torch.equal(parameter, source.get_parameter(name)), name


@pytest.mark.parametrize("architecture", [HYBRID, PARALLEL], ids=["tied", "untied"])
def test_resizing_the_vocabulary_keeps_what_was_there(architecture, tmp_path):
    hf, x = to_hf(build(architecture)), tokens(2, 6)
    with torch.no_grad():
        before = hf(x).logits
        hf.resize_token_embeddings(70, pad_to_multiple_of=8)
        after = hf(x).logits
        assert after.shape[-1] == hf.config.vocab_size == hf.model.config.vocab_size == 72
        # A wider matrix product may be summed in another order.
        assert (after[..., :61] - before).abs().max() <= bound(before)
        hf.save_pretrained(tmp_path)
        assert torch.equal(HybridLMForCausalLM.from_pretrained(tmp_path)(x).logits, after)
    tied = architecture is HYBRID
    assert (hf.get_output_embeddings() is None) == tied


def test_rows_of_a_cache_can_be_chosen():
    hf, x = to_hf(build(HYBRID)), tokens(2, 6)
    with torch.no_grad():
        cache = hf(x).past_key_values
        assert (HybridLMCache().is_initialized, cache.is_initialized, cache.is_croppable) == (
            False,
            True,
            False,
        )
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 4
        cache.batch_select_indices(torch.tensor([3, 0]))
        y = tokens(2, 1)
        out = hf(y, past_key_values=cache).logits[:, -1]
        whole = hf(torch.cat([x[[1, 0]], y], 1)).logits[:, -1]
    assert (out - whole).abs().max() <= bound(whole)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda hf, x: hf(x, inputs_embeds=torch.zeros(1, 6, 32)), "either input_ids or inputs_embeds"),
        (lambda hf, x: hf(), "either input_ids or inputs_embeds"),
        (lambda hf, x: hf(x, attention_mask=torch.ones(1, 1, 6, 6)), "attention_mask"),
        (lambda hf, x: hf(x, attention_mask={"full_attention": None}), "attention_mask is dict"),
        (lambda hf, x: hf(x, past_key_values=DynamicCache()), "DynamicCache"),
        (lambda hf, x: hf(x, output_attentions=True), "output_attentions"),
        (lambda hf, x: hf(x, attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1]])), "go up"),
        (
            lambda hf, x: hf.generate(x, cache_implementation="quantized", max_new_tokens=1),
            "cache_implementation = 'quantized'.*'static'",
        ),
        (lambda hf, x: hf.generate(x, assistant_model=hf, max_new_tokens=2), "stateful"),
        (
            lambda hf, x: hf(x, past_key_values=HybridLMCache(5, fixed=True)),
            "6 tokens, but this static cache has room for 5",
        ),
        (lambda hf, x: HybridLMCache().crop(1), "cropped"),
        (lambda hf, x: HybridLMConfig().model_config(), "architecture"),
        (lambda hf, x: HybridLMConfig(architecture=hf.config.architecture, hidden_size=7), "hidden_size = 7"),
    ],
)
def test_what_it_cannot_do_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call(to_hf(build(HYBRID)), tokens(1, 6))
