"""The tools of `transformers` work on our class: Trainer, PEFT, pipelines, devices, every way to generate."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_models import ATTENTION, M2, MLP, WHOLE, bound, build
from torch import Tensor

from hybrid_lm.data.tokenizer import ByteTokenizer
from hybrid_lm.hf.adapters import lora_report, lora_targets
from hybrid_lm.hf.bundle import bundle
from hybrid_lm.hf.convert import export, to_hf
from hybrid_lm.hf.wrapper import HybridLMForCausalLM

pytest.importorskip("accelerate")

MOE = {
    "pattern": "a e m e",
    "layers": {
        "a": ATTENTION,
        "m": M2,
        "e": {"type": "moe", "n_experts": 4, "d_ff": 24, "balance": "loss", "d_shared": 16},
    },
}
MODELS = {**WHOLE, "moe": MOE}
# Layers that look at their weights and positions in ways of their own.
LATENT = {
    "pattern": "a l f",
    "layers": {
        "a": {"type": "attention", "n_heads": 4, "alibi": True},
        "l": {"type": "mla", "n_heads": 4, "kv_rank": 12, "nope_dim": 8, "rope_dim": 4, "v_dim": 6},
        "f": MLP,
    },
}
SHAPES = pytest.mark.parametrize("shape", list(MODELS))
# Other people's code calls its own old names; a bias beside the modules is placed like a module.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:The following device_map keys:UserWarning"
)


def made(shape: str, **how: Any) -> HybridLMForCausalLM:
    return to_hf(build(MODELS[shape], **how), format="remote")


def tokens(b: int, t: int) -> Tensor:
    # Without 0, which pads here.
    return torch.randint(1, 61, (b, t))


def continued(model: Any, prompt: Tensor, **how: Any) -> Tensor:
    """The continuation alone, with nothing that could end it early."""
    model.generation_config.eos_token_id = None
    how = {"attention_mask": torch.ones(prompt.shape[:2]), "do_sample": False, "pad_token_id": 0, **how}
    torch.manual_seed(1)
    if prompt.is_floating_point():
        return model.generate(inputs_embeds=prompt, max_new_tokens=8, **how)
    return model.generate(prompt, max_new_tokens=8, **how)[:, prompt.shape[1] :]


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beam": {"num_beams": 3},
    "beam_several": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
    "in_pieces": {"prefill_chunk_size": 4},
    "repetition": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
}


@pytest.mark.parametrize("way", list(WAYS))
@SHAPES
def test_every_way_to_generate_is_the_same_with_every_memory(shape, way):
    model, x = made(shape), tokens(2, 9)
    cached = continued(model, x, **WAYS[way])
    # In pieces needs a memory: the whole prompt at once is what it must equal.
    without = {} if way == "in_pieces" else WAYS[way]
    assert torch.equal(cached, continued(model, x, use_cache=False, **without))
    assert torch.equal(cached, continued(model, x, cache_implementation="static", **WAYS[way]))
    if way != "in_pieces":
        rows = model.get_input_embeddings()(x).detach()
        if way != "repetition":
            assert torch.equal(cached, continued(model, rows, **WAYS[way]))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_static_cache_reserves_once_and_never_grows(beams):
    model, x = made("hybrid"), tokens(2, 9)
    model.generation_config.eos_token_id = None
    room = []

    def look(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        state = given["past_key_values"].state
        room.append(None if state is None else state.layers[2].k.shape[1])

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    out = model.generate(
        x,
        max_new_tokens=8,
        num_beams=beams,
        do_sample=False,
        pad_token_id=0,
        attention_mask=torch.ones_like(x),
        cache_implementation="static",
        max_cache_len=40,
        return_dict_in_generate=True,
    )
    handle.remove()
    assert room == [None] + [40] * 7
    cache = out.past_key_values
    assert (cache.get_seq_length(), cache.get_max_length()) == (16, 40)
    with torch.no_grad():
        model(tokens(2 * beams, 24), past_key_values=cache)
        with pytest.raises(ValueError, match="41 tokens, but this static cache has room for 40"):
            model(tokens(2 * beams, 1), past_key_values=cache)


@SHAPES
def test_embeddings_and_hidden_states_are_the_models(shape):
    model, x = made(shape), tokens(2, 11)
    with torch.no_grad():
        plain = model(x, use_cache=False)
        rows = model.get_input_embeddings()(x)
        out = model(inputs_embeds=rows, output_hidden_states=True, use_cache=False)
        assert torch.equal(out.logits, plain.logits)
        assert plain.hidden_states is None
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1
        assert torch.equal(model.model.logits(out.hidden_states[-1]), plain.logits)
        where = torch.arange(11).expand(2, 11)
        assert torch.equal(out.hidden_states[0], model.model.embedded(x, where))
        # What the last layer makes of its input is what the final norm reads.
        ctx = model.model.context(x, None, None, None)
        ctx.embeddings = out.hidden_states[0]
        y = model.model.layers[-1](out.hidden_states[-2], None, ctx)[0]
        assert torch.equal(model.model.final_norm(y, ctx), out.hidden_states[-1])


def gradients(model: HybridLMForCausalLM, x: Tensor) -> tuple[dict[str, Tensor], int]:
    """Gradients of the loss, and bytes that the forward pass keeps for them."""
    kept = 0

    def count(saved: Tensor) -> Tensor:
        nonlocal kept
        kept += saved.numel() * saved.element_size()
        return saved

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
        loss = model(x, labels=x).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("reentrant", [False, True])
@SHAPES
def test_gradient_checkpointing_keeps_less_and_changes_nothing(shape, reentrant):
    model, x = made(shape).train(), tokens(2, 16)
    plain, kept = gradients(model, x)
    how = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    if shape == "moe" and reentrant:
        with pytest.raises(ValueError, match=r"balance losses .* set it to False"):
            model(x, labels=x)
        return
    again, kept_again = gradients(model, x)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        # The same sums; those of shared weights and embeddings may add up in another order.
        error = (again[name] - gradient).abs().max()
        assert error <= 16 * torch.finfo(torch.float32).eps * gradient.abs().max(), name
    assert kept_again < kept / 2
    model.gradient_checkpointing_disable()
    assert gradients(model, x)[1] == kept


@pytest.mark.parametrize("shape", ["hybrid", "moe"])
def test_trainer_trains_and_goes_on_from_its_checkpoint(shape, tmp_path):
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    tokenizer = ByteTokenizer().to_hf(4096)
    model = made(shape, vocab_size=258)
    ids = tokenizer("the quick brown fox jumps over the lazy dog. " * 40)["input_ids"]
    # Of several lengths, so that batches are padded.
    data = [{"input_ids": ids[i : i + 20 + i % 7]} for i in range(0, len(ids) - 40, 24)]

    def trainer(model, steps, **more):
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=5,
            report_to=[],
            use_cpu=True,
            seed=1,
            disable_tqdm=True,
            **more,
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        return Trainer(model=model, args=args, train_dataset=data, data_collator=collator)

    again = copy.deepcopy(model)
    how = {"gradient_accumulation_steps": 2, "gradient_checkpointing": shape == "moe"}
    first = trainer(model, 10, **how)
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    # A byte at random costs log 258 = 5.6 nats; ten steps on one sentence take off half a nat and more.
    assert losses[-1] < losses[0] - 0.5
    second = trainer(again, 10, **how)
    second.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-5"))
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    loaded = HybridLMForCausalLM.from_pretrained(tmp_path / "out/checkpoint-10")
    x = tokens(1, 9)
    assert torch.equal(loaded(x).logits, model.eval()(x).logits)


@pytest.mark.parametrize("shape", list(WHOLE))
def test_documents_packed_or_padded_by_a_collator_are_separate(shape):
    """Padding-free batches, in which native recurrent classes leak from one document into the next."""
    from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening

    model = made(shape, vocab_size=258).train()
    documents = [torch.randint(1, 256, (n,)) for n in (5, 9, 3, 7)]
    alone = [model(x[None], labels=x[None]).loss * (len(x) - 1) for x in documents]
    expected = sum(alone) / sum(len(x) - 1 for x in documents)
    rows = [{"input_ids": x.tolist()} for x in documents]
    packed = model(**DataCollatorWithFlattening()(rows)).loss
    collator = DataCollatorForLanguageModeling(ByteTokenizer().to_hf(4096), mlm=False)
    padded = model(**collator(rows)).loss
    for loss in (packed, padded):
        # Logits within `bound`, and a mean of 20 terms.
        assert (loss - expected).abs() <= bound(expected.detach())


def test_balance_losses_are_in_the_loss_of_training_by_their_share():
    model, x = made("moe"), tokens(2, 10)
    plain = model(x, labels=x, use_cache=False).loss
    model.train()
    with_balance = model(x, labels=x).loss
    shift = F.pad(x, (0, 1), value=-100)[:, 1:]
    added = model.model.token_loss(x, shift).auxiliary.objective
    # One more addition.
    eps = 4 * torch.finfo(torch.float32).eps * plain.item()
    assert (with_balance - plain - added).abs() <= eps
    assert added > 0
    # Half of a step's 36 labels: half the sum of the losses, and half the balance loss.
    half = model(x, labels=x, num_items_in_batch=36).loss
    assert (half - (plain + added) / 2).abs() <= eps


@SHAPES
def test_lora_reaches_what_it_says_and_all_of_it_trains(shape, tmp_path):
    peft = pytest.importorskip("peft")
    model, x = made(shape), tokens(2, 12)
    with torch.no_grad():
        before = model(x).logits
    # The matrices of experts are parameters of one module, which PEFT knows by another name.
    experts = ["experts.gate_up", "experts.down"] if shape == "moe" else None
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", target_parameters=experts, task_type="CAUSAL_LM"
    )
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        assert torch.equal(tuned(x).logits, before)
    report = lora_report(tuned)
    assert not report.missed()
    not_linear = ("embed", "embed_positions", "lm_head", "router")
    for row in report:
        own_lora = ".lora." in row.matrix
        assert row.adapted == (0 if row.matrix in not_linear or own_lora else row.of), row
        assert row.trained == 0
    trainable = [p for p in tuned.parameters() if p.requires_grad]
    assert sum(row.parameters for row in report) == sum(p.numel() for p in trainable)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.train()
    tuned(input_ids=x, labels=x).loss.backward()
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    tuned.eval()
    with torch.no_grad():
        adapted = tuned(x).logits
        assert (adapted - before).abs().max() > 100 * bound(before)
        tuned.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(made(shape), tmp_path)
        assert torch.equal(loaded(x).logits, adapted)
        assert torch.equal(continued(loaded, x), continued(tuned, x))
        merged = tuned.merge_and_unload()
        # W x + B A x against (W + B A) x.
        assert (merged(x).logits - adapted).abs().max() <= bound(adapted)
    assert not any(row.adapted for row in lora_report(merged))


def test_the_report_says_which_layers_a_transformers_recipe_misses():
    peft = pytest.importorskip("peft")
    model = made("hybrid")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["embed"])
    report = lora_report(peft.get_peft_model(model, config))
    assert report.missed() == ["mamba2", "mlp"]
    rows = {(row.layer, row.matrix): row for row in report}
    assert rows["attention", "q_proj"] == ("attention", "q_proj", 2, 0, 2, 2 * 4 * (32 + 32))
    assert rows["mamba2", "in_proj"][2:] == (0, 0, 2, 0)
    assert rows["model", "embed"][2:] == (0, 1, 1, 61 * 32)
    text = str(report)
    assert "4 of 25 matrices adapted" in text
    assert text.endswith("nothing reached in: mamba2, mlp")
    assert "trained" in text.splitlines()[0]


def test_targets_by_type_of_layer():
    peft = pytest.importorskip("peft")
    targets = lora_targets(made("hybrid"), "mamba2", "attention")
    tuned = peft.get_peft_model(made("hybrid"), peft.LoraConfig(r=2, target_modules=targets))
    report = lora_report(tuned)
    assert report.missed() == ["mlp"]
    assert sum(row.adapted for row in report) == len(targets) == 2 * 2 + 2 * 4
    with pytest.raises(ValueError, match="unknown type of layer 'mamba'; known: attention, mamba2, mlp"):
        lora_targets(made("hybrid"), "mamba")
    with pytest.raises(ValueError, match="HybridLMForCausalLM is needed"):
        lora_report(torch.nn.Linear(2, 2))


def test_lora_on_the_output_matrix_counts():
    peft = pytest.importorskip("peft")
    model, x = made("parallel_untied_learned"), tokens(1, 7)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    (b,) = (p for name, p in tuned.named_parameters() if "lora_B" in name)
    tuned(input_ids=x, labels=x).loss.backward()
    assert b.grad.abs().max() > 0


@pytest.mark.parametrize("shape", ["hybrid", "zamba"])
def test_soft_prompts_go_through_embeddings(shape):
    peft = pytest.importorskip("peft")
    model, x = made(shape), tokens(2, 6)
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", num_attention_heads=1)
    tuned = peft.get_peft_model(model, config)
    prompt = tuned.get_prompt(batch_size=2)
    with torch.no_grad():
        rows = torch.cat([prompt, model.get_input_embeddings()(x)], 1)
        assert torch.equal(tuned(x).logits[:, -6:], model(inputs_embeds=rows).logits[:, -6:])
    tuned(input_ids=x, labels=x).loss.backward()
    (parameter,) = (p for p in tuned.parameters() if p.requires_grad)
    assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(place, tmp_path):
    model, x = made("zamba"), tokens(2, 9)
    model.save_pretrained(tmp_path)
    loaded = HybridLMForCausalLM.from_pretrained(tmp_path, device_map=place)
    assert torch.equal(loaded(x).logits, model(x).logits)


def test_device_map_auto_cuts_between_residual_layers(tmp_path):
    model, x = made("hybrid"), tokens(2, 9)
    model.save_pretrained(tmp_path / "model")
    loaded = HybridLMForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": 120_000},
        offload_folder=str(tmp_path / "off"),
    )
    places = {name: loaded.hf_device_map[f"model.layers.{name}"] for name in range(8)}
    assert set(places.values()) == {"cpu", "disk"}
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model(x).logits)


@pytest.mark.parametrize("shape", [*MODELS, "latent"])
def test_layers_that_stay_on_disk(shape, tmp_path):
    model, x = to_hf(build({**MODELS, "latent": LATENT}[shape]), format="remote"), tokens(2, 9)
    model.save_pretrained(tmp_path / "model")
    parts = {f"model.{name}": "disk" for name, _ in model.model.named_children()}
    # A residual layer is the unit; a matrix that is looked up and multiplied by is needed at all times.
    del parts["model.layers"]
    parts |= {f"model.layers.{i}": "disk" for i in range(len(model.model.layers))}
    parts |= {"model.embed": "cpu", "model.lm_bias": "cpu"}
    kept = {name: place for name, place in parts.items() if name != "model.lm_bias" or "parallel" in shape}
    loaded = HybridLMForCausalLM.from_pretrained(
        tmp_path / "model", device_map=kept, offload_folder=str(tmp_path / "off")
    )
    assert sum(p.is_meta for p in loaded.parameters()) > 3
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model(x).logits)
    assert torch.equal(continued(loaded, x), continued(model, x))


@pytest.mark.parametrize("shape", ["hybrid", "parallel_untied_learned"])
def test_sharded_save_and_load_is_bit_identical(shape, tmp_path):
    model = made(shape)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, info = HybridLMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_pipeline_batched_is_single():
    from transformers import pipeline

    model, tokenizer = made("hybrid", vocab_size=258), ByteTokenizer().to_hf(4096)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompts = ["Once upon a time", "To be", "x"]
    how = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    together = generate(prompts, batch_size=3, **how)
    alone = [generate(prompt, **how) for prompt in prompts]
    assert together == alone
    assert all(isinstance(found[0]["generated_text"], str) for found in together)


def test_mlp_only_models_generate_too():
    """No layer remembers anything: the cache counts tokens and holds no tensor of theirs."""
    model = to_hf(build({"pattern": "f f", "layers": {"f": MLP}}), format="remote")
    x = tokens(2, 5)
    assert torch.equal(continued(model, x), continued(model, x, use_cache=False))


def test_an_embedding_that_is_the_output_too_cannot_stay_on_disk(tmp_path):
    model, x = made("recurrent"), tokens(1, 5)
    model.save_pretrained(tmp_path / "model")
    place = {"model.embed": "disk", "model.layers": "cpu", "model.final_norm": "cpu", "model.shared": "cpu"}
    loaded = HybridLMForCausalLM.from_pretrained(
        tmp_path / "model", device_map=place, offload_folder=str(tmp_path / "off")
    )
    with pytest.raises(ValueError, match=r"give model\.embed a device"):
        loaded(x)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("shape", ["hybrid", "zamba", "recurrent"])
def test_what_generate_returns_beside_tokens(shape, beams):
    model, x = made(shape), tokens(2, 6)
    model.generation_config.eos_token_id = None
    out = model.generate(
        x,
        max_new_tokens=4,
        num_beams=beams,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        attention_mask=torch.ones_like(x),
    )
    n_layers = model.config.num_hidden_layers
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == 4
    assert all(score.shape == (2 * beams, 61) for score in out.scores)
    for step, hidden in enumerate(out.hidden_states):
        assert len(hidden) == n_layers + 1
        assert {h.shape for h in hidden} == {(2 * beams, 6 if step == 0 else 1, 32)}
    assert out.past_key_values.get_seq_length() == 9
    with torch.no_grad():
        # What was said with a memory is what one pass over the whole says.
        whole = model(out.sequences[:, :-1]).logits[:, 5:]
    if beams == 1:
        said = torch.stack(out.logits, 1)
        assert (said - whole).abs().max() <= bound(whole)


@pytest.mark.parametrize("shape", ["hybrid", "parallel_untied_learned"])
def test_generation_from_nothing_and_on_from_embeddings(shape):
    model = made(shape)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    start = model.generate(max_new_tokens=5, do_sample=False, bos_token_id=3)
    assert start.shape == (1, 6)
    x = torch.tensor([[3]])
    assert torch.equal(start[:, 1:6], continued(model, x)[:, :5])
    # The first part as embeddings, the rest as tokens on the memory that came back.
    x = tokens(2, 7)
    rows = model.get_input_embeddings()(x).detach()
    how = {"do_sample": False, "attention_mask": torch.ones(2, 7), "return_dict_in_generate": True}
    first = model.generate(inputs_embeds=rows, max_new_tokens=3, **how)
    whole = torch.cat([x, first.sequences], 1)
    more = model.generate(
        whole,
        past_key_values=first.past_key_values,
        attention_mask=torch.ones_like(whole),
        max_new_tokens=5,
        do_sample=False,
    )
    assert torch.equal(more[:, 7:], continued(model, x))


def test_an_end_token_ends_a_row_and_others_go_on():
    model, x = made("hybrid"), tokens(3, 6)
    free = continued(model, x)
    # The third token of the first row ends texts from now on.
    end = int(free[0, 2])
    mask = torch.ones_like(x)
    out = model.generate(
        x, attention_mask=mask, eos_token_id=end, pad_token_id=0, max_new_tokens=8, do_sample=False
    )[:, 6:]
    for row in range(3):
        at = (free[row] == end).nonzero()
        n = int(at[0]) + 1 if len(at) else 8
        n = min(n, out.shape[1])
        assert torch.equal(out[row, :n], free[row, :n])
        assert not out[row, n:].any()


@pytest.mark.parametrize("shape", ["zamba", "moe"])
def test_remote_code_has_the_same_tools(shape, tmp_path, monkeypatch):
    """The copy of our sources in an export: classes of its own, which PEFT and the report know too."""
    peft = pytest.importorskip("peft")
    model, x = made(shape), tokens(2, 12)
    model.save_pretrained(tmp_path / "weights")
    package = tmp_path / f"exported_{shape}"
    package.mkdir()
    for name, text in bundle({recipe.type for recipe in model.model.config.layers.values()}).items():
        (package / name).write_text(text, encoding="utf-8")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    theirs = importlib.import_module(f"{package.name}.modeling_hybrid_lm").HybridLMForCausalLM
    loaded = theirs.from_pretrained(tmp_path / "weights")
    assert type(loaded) is not type(model)
    with torch.no_grad():
        here = model(x).logits
        # Here it may be the native kernels that compute.
        assert (loaded(x).logits - here).abs().max() <= bound(here)
    assert torch.equal(continued(loaded, x, cache_implementation="static"), continued(model, x))
    config = {"r": 2, "target_modules": "all-linear"}
    ours = lora_report(peft.get_peft_model(model, peft.LoraConfig(**config)))
    tuned = peft.get_peft_model(loaded, peft.LoraConfig(**config)).train()
    assert lora_report(tuned) == ours
    losses = []
    for again in (False, True):
        if again:
            loaded.gradient_checkpointing_enable()
        losses.append(tuned(input_ids=x, labels=x).loss)
        losses[-1].backward()
    assert torch.equal(*losses)


def test_a_process_that_has_run_remote_code_can_export(tmp_path, monkeypatch):
    """transformers puts its cache of remote code on the path, where the check of an export must not look."""
    cache = tmp_path / "cache/transformers_modules"
    cache.mkdir(parents=True)
    (cache / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(cache.parent))
    export(build(MODELS["recurrent"]), tmp_path / "out", format="remote")
    assert (tmp_path / "out/modeling_hybrid_lm.py").is_file()


BALANCED = {
    **MOE,
    "layers": {**MOE["layers"], "e": {**MOE["layers"]["e"], "router": "sigmoid", "balance": "bias"}},
}


def corrections(model: HybridLMForCausalLM) -> list[Tensor]:
    """Those of the experts, by layer."""
    return [p.detach().clone() for name, p in model.named_parameters() if name.endswith("router_correction")]


def test_corrections_of_experts_move_once_a_step_and_are_saved(tmp_path):
    model = to_hf(build(BALANCED), format="remote").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, start = tokens(2, 16), corrections(model)
    for _ in range(2):
        # Two passes of one step.
        for _ in range(2):
            model(x, labels=x).loss.backward()
        assert all(torch.equal(a, b) for a, b in zip(start, corrections(model), strict=True))
        optimizer.step()
        optimizer.zero_grad()
        model(x, labels=x)
        moved = corrections(model)
        rate = 0.001
        for before, after in zip(start, moved, strict=True):
            # One rate up or down, or not where an expert has its share: a rounding of float32 away.
            assert set(((after - before) / rate).round(decimals=3).tolist()) <= {-1.0, 0.0, 1.0}
            assert not torch.equal(before, after)
        start = moved
    optimizer.step()
    model.save_pretrained(tmp_path)
    again = HybridLMForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(corrections(model), corrections(again), strict=True))
    # A parameter without a gradient would be waited for by DistributedDataParallel.
    fixed = {name for name, p in again.named_parameters() if not p.requires_grad}
    assert fixed == {name for name, _ in again.named_parameters() if name.endswith("router_correction")}
