"""Native models come in, compute the same here, and go out as they were, bit for bit."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from native_models import CONFIGS, REWORDED, native
from native_sizes import DECODER, GPT2
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hybrid_lm.config.dump import architecture_hash
from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.hf import convert
from hybrid_lm.hf.convert import export, from_hf, to_hf
from hybrid_lm.hf.families import FAMILIES
from hybrid_lm.hf.family import COMMON, FALSE, TOLERANCE, differences
from hybrid_lm.hf.importing import published
from hybrid_lm.hf.native import choose, tensors_of
from hybrid_lm.hf.options import ConversionError
from hybrid_lm.hf.verify import verify_object
from hybrid_lm.hf.weights import (
    BY_HEAD,
    DEPTHWISE,
    FUSED,
    FUSED_TRANSPOSED,
    GATE_UP_STACKED,
    SAME,
    STACKED,
    TRANSPOSED,
)
from hybrid_lm.model.build import build_model

CASES = [
    pytest.param(name, options, id=f"{name}-{i}")
    for name in CONFIGS
    for i, options in enumerate(CONFIGS[name])
]
BOUND = TOLERANCE
"""On logits of about 1 in float32; native classes are within 1.2e-5 of themselves in float64."""


def tokens(b: int, t: int) -> torch.Tensor:
    """Longer than the windows and chunks of the models, and no multiple of them."""
    return torch.randint(257, (b, t), generator=torch.Generator().manual_seed(1))


def test_every_family_is_tested():
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_in_and_out_again(name, options):
    theirs, family = native(name, options), FAMILIES[name]
    # `from_hf` compares a cached continuation as well.
    ours, x = from_hf(theirs), tokens(2, 19)
    with torch.no_grad():
        logits = theirs(x, use_cache=False).logits
        bound = family.tolerance * max(1.0, float(logits.abs().max()))
        assert (ours(x).logits - logits).abs().max() <= bound
        # Padding on the left and a second document change nothing.
        padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), x[:1, :11], x[1:, :9]], 1)
        docs = torch.tensor([[0] * 5 + [1] * 11 + [2] * 9], dtype=torch.int32)
        y = ours(padded, doc_ids=docs).logits
        assert (y[:, 5:16] - logits[:1, :11]).abs().max() <= bound
        assert (y[:, 16:] - logits[1:, :9]).abs().max() <= bound
    # Out: the same keys but for tied ones, the same bits, the same fields; and in again the same model.
    state, out = published(theirs), dict(tensors_of(family, ours))
    tied = {family.head, "lm_head.weight"} if theirs.config.tie_word_embeddings else set()
    assert state.keys() - out.keys() <= tied
    assert all(torch.equal(state[key], x) for key, x in out.items())
    back = to_hf(ours, format=f"native:{name}")
    skipped = COMMON | family.ignored
    ruled = {k: v for k, v in theirs.config.to_dict().items() if k not in skipped | FALSE}
    assert {k: v for k, v in back.config.to_dict().items() if k in ruled} == {**ruled, **again(name, back)}
    with torch.no_grad():
        assert torch.equal(back(x, use_cache=False).logits, logits)
    assert architecture_hash(from_hf(back, check=False).config) == architecture_hash(ours.config)


def again(name: str, back: Any) -> dict[str, Any]:
    """The fields that are said in another way."""
    return {key: back.config.to_dict()[key] for key in REWORDED[name]}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_gradients(name):
    theirs = native(name, CONFIGS[name][0])
    ours, x = from_hf(theirs, check=False), tokens(2, 19)
    for model in (theirs, ours):
        loss = torch.nn.functional.cross_entropy(model(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
    with torch.no_grad():
        for parameter in (*theirs.parameters(), *ours.parameters()):
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    grads = published(theirs)
    # One rounding of the whole gradient, for those that nearly cancel: of decays that forget at once.
    rounding = torch.finfo(torch.float32).eps * torch.stack([grad.norm() for grad in grads.values()]).norm()
    for key, grad in tensors_of(FAMILIES[name], ours):
        # A thousand float32 roundings on a sum of that size.
        assert (grad - grads[key]).norm() <= 1e-4 * grads[key].norm() + rounding, key


@pytest.fixture
def here(monkeypatch):
    """Folders are compared in this process: another one takes seconds to import transformers."""

    def verify(folder, model, **how):
        return verify_object(AutoModelForCausalLM.from_pretrained(folder), model, **how)

    monkeypatch.setattr(convert, "verify", verify)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "mamba2"])
def test_through_folders(name, tmp_path, here):
    in_and_out(name, tmp_path)


def test_through_a_folder_that_another_process_reads(tmp_path):
    in_and_out("mistral", tmp_path)


def in_and_out(name, tmp_path):
    theirs = native(name, CONFIGS[name][0])
    theirs.save_pretrained(tmp_path / "in", max_shard_size="50KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    ours = from_hf(tmp_path / "in")
    out = export(ours, tmp_path / "out", max_shard_size="60KB")
    assert len(list(out.glob("*.safetensors"))) > 2
    record = json.loads((out / "hybrid_lm_export.json").read_text())
    assert record["format"] == f"native:{name}"
    assert record["check"]["max_abs_logit_difference"] <= record["check"]["bound"]
    assert "trust_remote_code" not in (out / "README.md").read_text()
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(loaded) is type(theirs)
    assert not info["unexpected_keys"]
    assert all(torch.equal(theirs.state_dict()[key], x) for key, x in loaded.state_dict().items())
    again = from_hf(out, check=False)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), again.parameters(), strict=True))


def test_the_type_of_the_weights_is_kept(tmp_path, here):
    theirs = native("mamba", CONFIGS["mamba"][0]).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "in")
    ours = from_hf(tmp_path / "in")
    kinds = {name.rpartition(".")[2]: p.dtype for name, p in ours.named_parameters()}
    assert kinds["conv_weight"] == torch.bfloat16
    assert kinds["A_log"] == torch.float32
    out = export(ours, tmp_path / "out")
    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16
    stored = load_file(out / "model.safetensors")
    for key, x in theirs.state_dict().items():
        assert key == "lm_head.weight" or torch.equal(stored[key].to(x.dtype), x)


SHAPES = {
    "fused": [(8, 6), (4, 6), (4, 6)],
    "fused_transposed": [(8, 6), (4, 6), (4, 6)],
    "by_head": [(8, 6)] * 3,
    "stacked": [(3, 8, 6)],
    "gate_up_stacked": [(3, 8, 6)],
}
HOWS = [SAME, TRANSPOSED, DEPTHWISE, FUSED, FUSED_TRANSPOSED, BY_HEAD, STACKED, GATE_UP_STACKED]


@pytest.mark.parametrize("how", HOWS, ids=lambda t: t.name)
def test_reshuffles_undo_each_other(how):
    ours, options = [torch.randn(shape) for shape in SHAPES.get(how.name, [(8, 6)])], {"attention.n_heads": 4}
    theirs = how.write(ours, options)
    again = how.read(theirs, [x.shape for x in ours], options)
    assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(how.write(again, options), theirs, strict=True))


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("llama", {"hidden_act": "quick_gelu"}, "llama: hidden_act = 'quick_gelu'"),
        ("llama", {"some_new_thing": 3}, "llama: unknown field some_new_thing = 3"),
        ("llama", {"pretraining_tp": 2}, "llama: pretraining_tp = 2"),
        ("llama", {"rope_interleaved": True}, "llama: rope_interleaved = True"),
        ("qwen2", {"use_mrope": True}, "qwen2: use_mrope = True"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantised checkpoints are not read"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers: the model has no layers"),
        ("llama", {"is_encoder_decoder": True}, "llama: unknown field is_encoder_decoder"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
            "rope_type = 'proportional'",
        ),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "beta_fast": 2.0}}, "rope_parameters.beta_fast"),
        (
            "qwen2",
            {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
            "linear_attention",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("stablelm", {"use_parallel_residual": True, "hidden_dropout": 0.1}, "hidden_dropout = 0.1"),
        ("stablelm", {"use_parallel_residual": None}, "use_parallel_residual = None"),
        ("mpt", {"attn_config": {"clip_qkv": 6.0}}, "attn_config.clip_qkv = 6.0"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 4}, "and use_sliding_window is false"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("mamba", {"hidden_act": "gelu"}, "mamba: hidden_act = 'gelu'"),
    ],
)
def test_what_is_not_known_is_refused_by_name(name, changed, message):
    options = AutoConfig.for_model(name, **CONFIGS[name][0]).to_dict()
    with pytest.raises(ConversionError, match=message):
        FAMILIES[name].read({**options, **changed})


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        # Of mamba_ssm's MambaConfig, in the files that were converted from it (state-spaces/mamba-130m-hf).
        ("mamba", {"rms_norm": True, "ssm_cfg": {}, "fused_add_norm": True, "pad_vocab_size_multiple": 8}),
        # `Mamba2Config` of 4.44; 4.57 has the first.
        ("mamba2", {"rms_norm": True, "norm_before_gate": True}),
        # `GPTNeoXConfig` of 4.57.
        ("gpt_neox", {"rotary_pct": 0.5, "partial_rotary_factor": 0.5, "rotary_emb_base": 5000}),
        # `Cohere2Config` of 4.57.
        ("cohere2", {"_sliding_window_pattern": 4}),
        ("bamba", {"partial_rotary_factor": 0.5, "attn_layer_indices": [1]}),
        ("stablelm", {"partial_rotary_factor": 0.5, "rope_theta": 5000.0}),
        ("recurrent_gemma", {"partial_rotary_factor": 0.5}),
        # HuggingFaceTB/SmolLM2-135M
        ("llama", {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"a": 1}}),
        # Qwen/Qwen2.5-0.5B
        ("qwen2", {"use_mrope": False, "_attn_implementation_autoset": True}),
        # openai-community/gpt2-medium
        ("gpt2", {"n_special": 0, "predict_special_tokens": True, "gradient_checkpointing": False}),
        ("gpt2", {"_num_labels": 1, "output_past": True, "torchscript": False, "tokenizer_class": "X"}),
        ("llama", {"unsloth_fixed": True, "unsloth_version": "2025.1"}),
    ],
)
def test_fields_that_published_files_have_besides_are_read(name, fields, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, **fields}))
    config = FAMILIES[name].read(AutoConfig.from_pretrained(tmp_path).to_dict())
    for recipe in config.layers.values():
        if (rope := recipe.options.get("rope")) is not None and "partial_rotary_factor" in fields:
            assert rope["fraction"] == 0.5


A = {"type": "attention", "n_heads": 4, "n_kv_heads": 2, "rope": {}}
F = {"type": "mlp", "d_ff": 96}
M = {"type": "mamba", "d_state": 8}
M2 = {"type": "mamba2", "d_state": 8, "head_dim": 16}
LN = {"norm": "layernorm", "bias": True}


def of(pattern: str, **more: object) -> ModelConfig:
    layers = {"a": A, "f": F, "m": M, "s": M2, **more.pop("layers", {})}
    return ModelConfig.model_validate(
        {"d_model": 64, "vocab_size": 257, "pattern": pattern, "layers": layers, **more}
    )


@pytest.mark.parametrize(
    ("config", "wanted", "family", "reason"),
    [
        (of("(a f)x2"), "llama", "mistral", None),
        (of("(w f)x2", layers={"w": {**A, "window": 9}}), "mistral", "llama", "layer 0 has window 9"),
        (
            of("a f w f", layers={"w": {**A, "window": 9, "qkv_bias": True}, "a": {**A, "qkv_bias": True}}),
            "qwen2",
            "llama",
            "layer 0 has out_bias false, it has true",
        ),
        (of("a f w f", layers={"w": {**A, "window": 9}}), "smollm3", "llama", "layer 2 has window 9"),
        (of("(a f)x2", layers={"a": {**A, "softcap": 3.0}}), None, "llama", "layer 0 has softcap 3.0"),
        (of("(a f)x2", head={"multiplier": 0.3}), "granite", "llama", "head.multiplier is 0.3"),
        (of("(a f)x2", embedding={"multiplier": 8.0}), "granite", "llama", "embedding.multiplier is 8.0"),
        (of("(a f)x2", block={"placement": "sandwich"}), None, "llama", "residual.placement sandwich"),
        (of("(a f)x2", layers={"f": {**F, "gated": False}}), None, "llama", "layer 1 has gated false"),
        (of("(a f)x2", layers={"a": {**A, "rope": {"fraction": 0.5}}}), "phi3", "llama", "layer 0 has rope"),
        (of("(a f)x2", layers={"a": {**A, "share": True}}), None, "llama", "layer 0 shares its weights"),
        (of("(a f)x2", layers={"a": {**A, "rope": None}}), "smollm3", "llama", "attention.rope is null"),
        (of("(a f)x2", final_norm=False), None, "llama", "final_norm is false, it has true"),
        (of("(a f)x2", block={"eps": 1e-6}), "llama", "mamba", "layer 0 is attention"),
        (of("(a f)x2", layers={"f": {**F, "residual": {"eps": 1e-6}}}), None, "llama", "residual.eps"),
        (of("a f a"), None, "llama", "3 layers are no whole number of blocks"),
        (of("(a f)x2", block={"placement": "pre_each"}), "llama", "gpt_neox", "norm is rmsnorm"),
        (of("a+f a f"), None, "gpt_neox", "its blocks are of two sorts"),
        (of("a+m f"), None, "llama", r"layer 0 is attention\+mamba"),
        (of("m m"), "mamba", "falcon_mamba", "inner_norm is none, it has weightless"),
        (of("s s"), "mamba2", "mamba", "layer 0 is mamba2, it has mamba there"),
        (of("s s", layers={"s": {**M2, "norm": "norm_gate"}}), None, "mamba2", "layer 0 has norm norm_gate"),
        (of("s s", layers={"s": {**M2, "d_inner": 96}}), None, "mamba2", "expand would be 1.5"),
        (of("s s", layers={"s": {**M2, "norm_eps": 1e-3}}), None, "mamba2", "layer 0 has norm_eps 0.001"),
    ],
)  # fmt: skip
def test_auto_takes_the_class_that_fits_and_says_why_not(config, wanted, family, reason):
    target = choose(config)
    assert (target.family.name if target.family else None) == wanted
    if reason is not None:
        with pytest.raises(ConversionError, match=f"not {family}: .*{reason}"):
            choose(config, f"native:{family}")
    if wanted:
        model = build_model(config)
        x = tokens(1, 19)
        with torch.no_grad():
            assert (to_hf(model)(x).logits - model(x).logits).abs().max() <= BOUND


def test_other_formats_are_refused():
    for format, message in (
        ("native:bert", "unknown family 'bert'"),
        ("gguf", "say auto, remote, or native"),
    ):
        with pytest.raises(ConversionError, match=message):
            choose(of("a f"), format)


def test_weights_that_do_not_belong_are_refused(tmp_path):
    theirs = native("llama", DECODER)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    norm = stored["model.norm.weight"]
    for changed, message in (
        ({"model.extra.weight": norm.clone()}, "nothing here takes the weight model.extra.weight"),
        ({"model.norm.weight": None}, "the weight model.norm.weight is missing"),
        (
            {"model.norm.weight": norm[:3].clone()},
            r"model.norm.weight is \(3,\), its configuration says \(64,\)",
        ),
        # Old checkpoints have the wavelengths of the rotary positions as a tensor.
        ({"model.layers.0.self_attn.rotary_emb.inv_freq": norm.clone()}, None),
    ):
        save_file({k: x for k, x in {**stored, **changed}.items() if x is not None}, path, {"format": "pt"})
        if message is None:
            from_hf(tmp_path, check=False)
        else:
            with pytest.raises(ConversionError, match=message):
                from_hf(tmp_path)


def test_weights_that_are_no_numbers_of_a_model_are_refused(tmp_path):
    theirs = native("llama", {**DECODER, "tie_word_embeddings": True})
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    key, head = "model.layers.1.mlp.up_proj.weight", stored["model.embed_tokens.weight"]
    for changed, message in (
        ({key: stored[key].to(torch.int8)}, f"{key} is torch.int8: quantised"),
        ({key: stored[key].to(torch.float8_e4m3fn)}, "quantised weights are not read"),
        ({"lm_head.weight": head + 1}, "lm_head.weight is not model.embed_tokens.weight, but tie_word"),
        ({"lm_head.weight": head.clone()}, None),
        ({key: torch.full_like(stored[key], torch.nan)}, "not finite: is there a NaN"),
    ):
        save_file({**stored, **changed}, path, {"format": "pt"})
        if message is None:
            from_hf(tmp_path, check=False)
        else:
            with pytest.raises(ValueError, match=message):
                from_hf(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_act": 3}, "'hidden_act' expected str, got int"),
        ({"num_hidden_layers": "2"}, "'num_hidden_layers' expected int"),
        ({"dtype": "float99"}, "float99"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
    ],
)
def test_a_damaged_configuration_is_one_message(tmp_path, changed, message):
    native("llama", DECODER).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(ConversionError, match=f"it cannot be read: .*{message}"):
        from_hf(tmp_path)


def test_settings_for_generating_do_not_disturb_the_comparison():
    theirs = native("llama", DECODER)
    for key, value in (("eos_token_id", list(range(200))), ("num_beams", 3), ("no_repeat_ngram_size", 2)):
        setattr(theirs.generation_config, key, value)
    own = theirs.generation_config
    from_hf(theirs)
    assert theirs.generation_config is own


def test_an_index_that_points_elsewhere_is_refused(tmp_path):
    native("llama", DECODER).save_pretrained(tmp_path / "in", max_shard_size="100KB")
    index = tmp_path / "in" / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    for outside in ("../other.safetensors", "/etc/model.safetensors", "sub\\x.safetensors"):
        data["weight_map"]["lm_head.weight"] = outside
        index.write_text(json.dumps(data))
        with pytest.raises(ConversionError, match="is outside the folder"):
            from_hf(tmp_path / "in")


def test_pickles_are_not_read(tmp_path):
    native("llama", DECODER).config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConversionError, match="pickles"):
        from_hf(tmp_path)


def test_a_wrong_mapping_is_found(monkeypatch):
    theirs, real = native("gpt2", GPT2), convert.read_model

    def swapped(*args, **how):
        made = real(*args, **how)
        attention = made.layers[2].layer
        attention.q_proj, attention.k_proj = attention.k_proj, attention.q_proj
        return made

    monkeypatch.setattr(convert, "read_model", swapped)
    with pytest.raises(ValueError, match="not the same model: logits differ"):
        from_hf(theirs)


def test_old_gpt2_keys(tmp_path, here):
    # The first releases have no prefix, and the causal mask as a tensor.
    theirs = native("gpt2", GPT2)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {key.removeprefix("transformer."): x for key, x in load_file(path).items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 96, 96)
    save_file(old, path, {"format": "pt"})
    x = tokens(1, 19)
    with torch.no_grad():
        assert (from_hf(tmp_path)(x).logits - theirs(x).logits).abs().max() <= BOUND


@pytest.mark.parametrize("biases", [(False, False), (True, False), (True, True), (False, True)])
@pytest.mark.parametrize("windows", list(itertools.product((None, 8), repeat=3)))
def test_every_pattern_of_windows_and_biases(windows, biases):
    options = {**A, "qkv_bias": biases[0], "out_bias": biases[1]}
    config = of(
        " ".join("w f" if window else "a f" for window in windows),
        layers={"a": options, "w": {**options, "window": 8}},
    )
    wanted = None
    if biases == (True, False):
        wanted = "qwen2"
    elif not any(windows) and biases[0] == biases[1]:
        wanted = "llama"
    elif all(windows) and not any(biases):
        wanted = "mistral"
    elif biases[0] == biases[1]:
        wanted = "smollm3"
    target = choose(config)
    assert (target.family.name if target.family else None) == wanted
    assert target.family or target.reasons.keys() == set(FAMILIES)
    if target.family:
        # Out and in again is the same architecture, with its numbers written out.
        describe = target.family.describe
        fields = AutoConfig.for_model(wanted, **target.fields).to_dict()
        again = target.family.read(fields)
        assert not list(differences(describe(config), describe(again)))
        assert target.family.write(again) == {**target.fields, **again_length(fields, target.fields)}


def again_length(fields: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The length, which is a default until it was read."""
    key = "max_position_embeddings"
    return {} if key in given else {key: fields[key]}
