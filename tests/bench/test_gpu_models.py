"""Whole models in `bench gpu`, as far as they go without a GPU: in small, with what stands for compilers and
for peers."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hybrid_lm.bench import gpu_report
from hybrid_lm.bench.gpu import bench_gpu
from hybrid_lm.bench.gpu_models import MODELS, ModelCase, limit_of
from hybrid_lm.bench.models import transformers_model
from hybrid_lm.cli import main
from hybrid_lm.model import decode
from hybrid_lm.model.build import build_model
from tests.model.tape import tape

CPU = torch.device("cpu")


def on_cpu(name: str, **how: Any) -> dict[str, Any]:
    how = {"repeat": 1, "compiled": False, "small": True, "device": CPU} | how
    (case,) = bench_gpu(cases=[name], **how)["cases"]
    return case


@pytest.mark.parametrize("name", MODELS)
def test_floors_count_the_weights_that_there_are(name: str) -> None:
    case = MODELS[name]
    model = build_model(case.config(case.sizes), weights=False)
    elements = sum(p.numel() for p in model.parameters() if p.dim() == 2 and p.shape[-1] > 16)
    floor = case.floors({**case.sizes, "b": 1, "t": 1})[case.quantity]
    if case.decoding:
        state = sum(v.numel() * v.element_size() for v in model.empty_state(1).tensors().values())
        # In float32 on this model, and the convolution's is one in seven of Mamba-1's.
        seconds = (2 * elements + 2 * state) / 4.3e12
        assert floor == pytest.approx(1e3 * seconds, rel=0.03)
    else:
        assert floor >= 1e3 * 6 * elements / 790e12


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_checked_and_timed(name: str) -> None:
    found = on_cpu(name)
    (quantity,) = found["quantities"]
    names = {"eager", "graph"} if MODELS[name].decoding else {"eager"}
    for candidate in (*names, "transformers"):
        row = found["candidates"][candidate]
        assert row["status"] == "ok", row
        assert row["worst_error"] <= limit_of(MODELS[name].small["layers"])
        assert row[f"{quantity}_over_floor"] == row[quantity]["median"] / found["floors"][quantity]
        assert row["tokens_per_s"] > 0
    if MODELS[name].decoding:
        assert found["candidates"]["graph"]["note"] == "not recorded: only steps on a GPU are recorded"
    json.dumps(found)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """torch.compile without its code generator, and a tape for CUDA graphs; what was asked of the first."""
    compile_, asked = torch.compile, list[dict[str, Any]]()

    def compiled(function: Any, **how: Any) -> Any:
        asked.append(how)
        return compile_(function, fullgraph=True, dynamic=how.get("dynamic"), backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compiled)
    begin = decode.Decoder.__init__

    def recording(self: Any, model: Any, **how: Any) -> None:
        begin(self, model, **how, record=tape)

    monkeypatch.setattr(decode.Decoder, "__init__", recording)
    return asked


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler about its own parts
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_compiled_and_recorded_candidates(kind: str, as_on_a_gpu: list[dict[str, Any]]) -> None:
    only = ["eager", "compiled", "compiled_graphs", "graph", "compiled_graph"]
    found = on_cpu(f"{kind}_train", compiled=True, only=only[:3])["candidates"]
    assert {name: row["status"] for name, row in found.items()} == dict.fromkeys(only[:3], "ok")
    assert [found[name]["graph_breaks"] for name in only[:3]] == [0, 0, 0]
    assert [how["mode"] for how in as_on_a_gpu] == ["default", "reduce-overhead"]
    assert all(how["fullgraph"] for how in as_on_a_gpu)
    found = on_cpu(f"{kind}_generate_1", compiled=True, only=["eager", *only[3:]])["candidates"]
    for name in only[3:]:
        assert found[name]["status"] == "ok", found[name]
        assert "note" not in found[name], "it was recorded"


class Theirs(nn.Module):
    """mamba_ssm's model by transformers', with its own forward."""

    def __init__(self, config: Any, device: Any = None, dtype: Any = None):
        super().__init__()
        kind = {"Mamba1": "mamba", "Mamba2": "mamba2"}[config.ssm_cfg["layer"]]
        sizes: dict[str, Any] = {"hidden_size": config.d_model, "num_hidden_layers": config.n_layer}
        sizes |= {
            "tie_word_embeddings": True,
            "vocab_size": config.vocab_size,
            "state_size": config.ssm_cfg["d_state"],
        }
        if kind == "mamba2":
            head = config.ssm_cfg["headdim"]
            sizes |= {"head_dim": head, "num_heads": 2 * config.d_model // head, "n_groups": 1}
        inner = transformers_model(kind, head=True, **sizes).to(device, dtype)
        self.backbone, self.lm_head, self.inner = inner.backbone, inner.lm_head, [inner]

    def forward(
        self, input_ids: Any, position_ids: Any = None, inference_params: Any = None, num_last_tokens: int = 0
    ) -> Any:
        kept = None if inference_params is None else inference_params.key_value_memory_dict
        out = self.inner[0](
            input_ids=input_ids, cache_params=(kept or {}).get("cache"), use_cache=kept is not None
        )
        if kept is not None:
            kept["cache"] = out.cache_params
        return SimpleNamespace(logits=out.logits[:, -num_last_tokens:])


class InferenceParams:
    def __init__(self, max_seqlen: int, max_batch_size: int, seqlen_offset: int = 0):
        self.seqlen_offset, self.key_value_memory_dict = seqlen_offset, dict[str, Any]()

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        self.seqlen_offset = 0


def update_graph_cache(
    model: Any, cache: Any, batch_size: int, seqlen_og: int, max_seqlen: int, decoding_seqlens: Any = (1,),
    tensor_parallel: int = 1, dtype: Any = None, n_warmups: int = 2,
) -> Any:  # fmt: skip
    params = InferenceParams(max_seqlen, batch_size)

    def run(input_ids: Any, position_ids: Any, seqlen: int) -> Any:
        assert seqlen == params.seqlen_offset > 0
        assert (position_ids == seqlen).all()
        return model(input_ids, position_ids, inference_params=params, num_last_tokens=1).logits

    return SimpleNamespace(run=run, inference_params=params)


@pytest.fixture
def mamba_ssm_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes: dict[str, dict[str, Any]] = {
        "mamba_ssm": {},
        "mamba_ssm.models": {},
        "mamba_ssm.models.config_mamba": {"MambaConfig": SimpleNamespace},
        "mamba_ssm.models.mixer_seq_simple": {"MambaLMHeadModel": Theirs},
        "mamba_ssm.utils": {},
        "mamba_ssm.utils.generation": {
            "InferenceParams": InferenceParams,
            "update_graph_cache": update_graph_cache,
        },
        "causal_conv1d": {},
        "triton": {},
    }
    for name, content in fakes.items():
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        for key, value in content.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("mamba_ssm_installed")
@pytest.mark.parametrize("name", [name for name in MODELS if not name.endswith("64")])
def test_mamba_ssm_is_asked_as_it_wants_to_be(name: str) -> None:
    only = ["eager", "mamba_ssm", *(["mamba_ssm_graph"] if MODELS[name].decoding else [])]
    found = on_cpu(name, only=only)["candidates"]
    assert set(found) == set(only)
    assert {row["status"] for row in found.values()} == {"ok"}, found


def test_what_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, tokens: Any) -> Any:
        raise RuntimeError("no kernel\nand more")

    monkeypatch.setattr("hybrid_lm.bench.gpu_lms.TransformersSteps.step", broken)
    found = on_cpu("mamba_generate_1", only=["eager", "transformers"])["candidates"]
    assert found["transformers"]["note"] == "RuntimeError: no kernel"
    assert found["eager"]["status"] == "ok"


def test_a_dry_run_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu", "--dry-run", "--op", "mamba2_train", "--op", "mamba_generate_1"]) == 0
    out = capsys.readouterr().out
    for words in (
        "b8 t2048 d768",
        "fwd+bwd ms 18.1",
        "token ms 0.0609",
        "mamba_generate_1, mamba2_train: transformers",
    ):
        assert words in out


def test_a_table_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    from hybrid_lm.verbs import console

    found = on_cpu("mamba_generate_1", only=["eager", "graph"])
    found["candidates"]["eager"]["graph_breaks"] = 0
    gpu_report.show_case(console(), found)
    out = capsys.readouterr().out
    assert "token ms" in out
    assert "graph: ok: not recorded: only steps on a GPU are recorded" in out
    assert "eager: 0 breaks in the graph" in out


def test_they_are_cases_of_both_kinds() -> None:
    assert {(case.kind, case.decoding) for case in MODELS.values()} == {
        (kind, decoding) for kind in ("mamba", "mamba2") for decoding in (True, False)
    }
    assert all(isinstance(case, ModelCase) for case in MODELS.values())
