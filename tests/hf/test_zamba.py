"""Zamba and Zamba2: models of ours go out, patterns come back, and what the classes are not is said."""

from __future__ import annotations

import random

import pytest
import torch
from native_models import CONFIGS
from transformers import AutoConfig, AutoModelForCausalLM

from hybrid_lm.config.dump import architecture_hash
from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.hf.convert import from_hf, to_hf
from hybrid_lm.hf.families import FAMILIES
from hybrid_lm.hf.families.zamba import ALTERNATING, BY_MAMBA_HEAD, HEAD_MATRICES
from hybrid_lm.hf.native import choose, native_config, save, tensors_of
from hybrid_lm.hf.options import ConversionError
from hybrid_lm.model.build import build_model

BOUND = 2e-5
"""On logits of about 1 in float32; the classes are within 1e-5 of themselves in float64."""

SHARE = {"copies": 2, "norms": True}
A = {"type": "attention", "n_heads": 4, "scale": 0.25, "share": SHARE}
F = {"type": "mlp", "d_ff": 96, "act": "gelu", "share": SHARE, "per_call": {"out_proj": True}}
M2 = {"type": "mamba2", "d_state": 8, "head_dim": 16, "dt_limit": [0.01, float("inf")]}
M1 = {"type": "mamba", "d_state": 8, "n_heads": 2}
Z = {"type": "inject", "block": "sa sf", "into": "m"}
ON_A = {"lora": {"rank": 3, "on": ["q_proj", "k_proj", "v_proj"]}}
ON_F = {"lora": {"rank": 3, "on": ["gate_proj+up_proj"]}, "out_proj": True}
ONE = {"share": {"copies": 1, "norms": True}}


def of(pattern: str = "m z m z z", **more: object) -> ModelConfig:
    layers = {"m": M2, "sa": A, "sf": F, "z": Z, **more.pop("layers", {})}
    return ModelConfig.model_validate(
        {"d_model": 64, "vocab_size": 257, "pattern": pattern, "layers": layers, **more}
    )


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("zamba2", {}),
        ("zamba2", {"sa": {**A, "per_call": ON_A}}),
        ("zamba2", {"sf": {**F, "per_call": ON_F}}),
        ("zamba2", {"sa": {**A, "per_call": ON_A, "rope": {}}, "sf": {**F, "per_call": ON_F}}),
        ("zamba", {"m": M1, "sa": {**A, **ONE}, "sf": {**F, **ONE}}),
        ("zamba", {"m": {**M1, "n_heads": 1}, "sa": {**A, **ONE, "head_dim": 32}, "sf": {**F, **ONE}}),
    ],
)
def test_a_model_goes_out_and_is_the_same(family, changed, tmp_path):
    config = of(layers=changed)
    target, model = choose(config), build_model(config)
    assert target.family is FAMILIES[family]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    theirs, x = to_hf(model), torch.randint(257, (2, 19))
    with torch.no_grad():
        assert (theirs(x).logits - model(x).logits).abs().max() <= BOUND
    # Through files, in shards.
    native_config(FAMILIES[family], target.fields, model).save_pretrained(tmp_path)
    save(FAMILIES[family], model, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, theirs(x).logits)
        again = from_hf(tmp_path, check=False)
        assert (again(x).logits - model(x).logits).abs().max() <= BOUND


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("zamba2", of(embedding={"tied": False}), "embedding.tied is false, and then the class shares no"),
        ("zamba2", of("m m"), "the pattern has no layer with a shared block, it has one"),
        ("zamba2", of("m sf z"), "layer 1 is mlp, it has mamba2 or inject there"),
        ("zamba2", of("m+z z"), r"layer 0 is mamba2\+inject"),
        (
            "zamba2",
            of(layers={"sa": {**A, "share": True}}),
            "layer 1 has attention that does not share weights and norms",
        ),
        ("zamba2", of(layers={"sf": {**F, **ONE}}), "different numbers of copies of attention and mlp"),
        ("zamba2", of(layers={"sf": {**F, "per_call": ON_A}}), "out_proj: it has one behind the mlp"),
        (
            "zamba2",
            of(layers={"sf": {**F, "per_call": {"lora": {"rank": 3, "on": ["up_proj"]}, "out_proj": True}}}),
            r"per_call.lora.on of mlp: it has gate_proj\+up_proj",
        ),
        (
            "zamba2",
            of(
                layers={
                    "sa": {**A, "per_call": {"lora": {**ON_A["lora"], "rank": 2}}},
                    "sf": {**F, "per_call": ON_F},
                }
            ),
            "per_call.lora.rank is 2, 3, it has one",
        ),
        (
            "zamba2",
            of("z y", layers={"y": {**Z, "block": "sb sf"}, "sb": A}),
            "several sets of shared recipes, it has one",
        ),
        ("zamba2", of(layers={"m": {**M2, "share": True}}), "layer 0 shares its weights"),
        (
            "zamba2",
            of("z y", layers={"y": {**Z, "into": "n"}, "n": {**M2, "dt_limit": [0.02, float("inf")]}}),
            r"layer 1 has dt_limit \(0.02, inf\), it has \(0.01, inf\)",
        ),
        ("zamba2", of(layers={"m": {**M2, "dt_limit": [0.0, float("inf")]}}), "a lower limit above 0"),
        ("zamba2", of(layers={"m": {**M2, "dt_limit": [0.1, 0.2]}}), "above 0 and no upper one"),
        ("zamba2", of(layers={"m": {**M2, "norm_eps": 1e-6}}), "layer 0 has norm_eps 1e-06, it has 1e-05"),
        ("zamba2", of(layers={"sa": {**A, "scale": None}}), "layer 1 has scale null, it has 0.25"),
        ("zamba2", of(layers={"z": {**Z, "residual": {"residual_multiplier": 0.5}}}), "multiplier 0.5"),
        (
            "zamba2",
            of(layers={"sa": {**A, "per_call": ON_A, "n_kv_heads": 2}}),
            "per_call.lora on keys of width 64, it has additions of 128",
        ),
        ("zamba2", of(layers={"z": {**Z, "block": "sf"}}), "injects other layers than attention and mlp"),
        ("zamba", of(layers={"m": M1}), "inject.copies is 2, it has 1"),
        (
            "zamba",
            of(layers={"m": M1, "sa": {**A, **ONE}, "sf": {**F, **ONE, "per_call": ON_F}}),
            "inject.adapter_rank is 3, it has 0",
        ),
        (
            "zamba",
            of(layers={"m": M1, "sa": {**A, **ONE, "rope": {}}, "sf": {**F, **ONE}}),
            "layer 1 has rope .*, it has null",
        ),
    ],
)  # fmt: skip
def test_what_the_classes_are_not(family, config, reason):
    with pytest.raises(ConversionError, match=f"not {family}: .*{reason}"):
        choose(config, f"native:{family}")


@pytest.mark.parametrize(
    ("name", "changed", "reason"),
    [
        ("zamba2", {"tie_word_embeddings": False}, "tie_word_embeddings = False: the class then shares no"),
        ("zamba", {"tie_word_embeddings": False}, "tie_word_embeddings = False: the class then shares no"),
        ("zamba2", {"attention_head_dim": 24}, "attention_head_dim = 24: the class has 32"),
        ("zamba2", {"attention_hidden_size": 64}, "attention_hidden_size = 64: the class has 128"),
        ("zamba2", {"mamba_headdim": 8}, "mamba_headdim = 8: the class has 16"),
        ("zamba2", {"hybrid_layer_ids": [1]}, r"hybrid_layer_ids = \[1\]: the class has \[1, 2, 4\]"),
        ("zamba2", {"layers_block_type": ["conv"] * 6}, "layers_block_type: 'conv': only linear_attention"),
        ("zamba2", {"num_hidden_layers": 5}, "layers_block_type has 6 entries for 5 layers"),
        ("zamba2", {"time_step_min": 0.0}, "time_step_min = 0.0"),
        ("zamba2", {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'"),
        ("zamba", {"hidden_mamba_act": "gelu"}, "hidden_mamba_act = 'gelu'"),
        ("zamba", {"attention_hidden_size": 64}, "attention_hidden_size = 64: the class has 128"),
    ],
)
def test_fields_that_are_refused(name, changed, reason):
    fields = AutoConfig.for_model(name, **CONFIGS[name][0]).to_dict()
    with pytest.raises(ConversionError, match=f"{name}: {reason}"):
        FAMILIES[name].read({**fields, **changed})


def test_random_patterns_go_out_and_come_back():
    rng = random.Random(0)
    for _ in range(30):
        pattern = " ".join(rng.choice("mz") for _ in range(rng.randint(1, 9)))
        name, copies = rng.choice(["zamba", "zamba2"]), rng.randint(1, 3)
        a, f = ({**recipe, "share": {"copies": copies, "norms": True}} for recipe in (A, F))
        if name == "zamba2":
            a, f = {**a, "per_call": rng.choice([None, ON_A])}, {**f, "per_call": ON_F}
        config = of(pattern, layers={"m": M1 if name == "zamba" else M2, "sa": a, "sf": f})
        wrong = [] if "z" in pattern else ["no layer with a shared block"]
        wrong += ["inject.copies"] if name == "zamba" and copies > 1 else []
        if wrong:
            with pytest.raises(ConversionError, match=wrong[0]):
                choose(config, f"native:{name}")
            continue
        fields = choose(config, f"native:{name}").fields
        again = FAMILIES[name].read(AutoConfig.for_model(name, **fields).to_dict())
        assert FAMILIES[name].write(again) == fields
        assert len(fields["layers_block_type"]) == len(pattern.split())


@pytest.mark.parametrize("name", ["zamba", "zamba2"])
def test_the_sizes_of_the_published_models(name):
    # The defaults of the classes, and layers by the names that the first releases had.
    named = ["mamba"] * 5 + ["hybrid"]
    old = {
        "layers_block_type": named * 9,
        "hybrid_layer_ids": list(range(5, 54, 6)),
        "ffn_hidden_size": 10240,
        "gated_linear_unit": True,
        "kv_channels": 80,
        "rope_theta": 10000,
        "sliding_window": None,
        "time_step_limit": None,
        "use_shared_mlp_adapter": True,
    }
    config = AutoConfig.for_model(name, **(old if name == "zamba2" else {}))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    model = build_model(FAMILIES[name].read(config.to_dict()), weights=False)
    tied = theirs.all_tied_weights_keys
    wanted = {key: x.shape for key, x in theirs.state_dict().items() if key not in tied}
    assert {key: x.shape for key, x in tensors_of(FAMILIES[name], model)} == wanted
    assert architecture_hash(model.config) == architecture_hash(FAMILIES[name].read(config.to_dict()))


@pytest.mark.parametrize(
    ("how", "shape", "heads"),
    [
        (ALTERNATING, (8, 6), 1),
        (ALTERNATING, (8,), 1),
        (BY_MAMBA_HEAD, (8, 3), 2),
        (BY_MAMBA_HEAD, (8,), 4),
        (HEAD_MATRICES, (5, 8), 1),
        (HEAD_MATRICES, (2, 5, 4), 2),
    ],
)
def test_reshuffles_undo_each_other(how, shape, heads):
    ours, options = torch.randn(shape), {"mamba.n_heads": heads}
    (theirs,) = how.write([ours], options)
    (again,) = how.read([theirs], [ours.shape], options)
    assert torch.equal(again, ours)
    assert torch.equal(how.write([again], options)[0], theirs)
