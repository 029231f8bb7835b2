"""The language models that `bench gpu` trains and generates with: ours, transformers' and mamba_ssm's, with
the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_lm.bench.models import take_weights, transformers_model
from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.model.build import build_model
from hybrid_lm.model.decode import Decoder
from hybrid_lm.model.lm import HybridLM


@dataclass
class Training:
    """A model that is trained."""

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    """The mean loss of the tokens (b t+1) after the first."""
    bf16: bool = True
    run: Callable[[Tensor], Tensor] | None = None
    """`forward` as torch.compile made it."""

    def loss(self, tokens: Tensor) -> Tensor:
        if self.run is not None:
            # What a CUDA graph of the last step returned is not looked at any more.
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            return (self.run or self.forward)(tokens)

    def step(self, tokens: Tensor) -> None:
        """Forward, loss, backward."""
        for parameter in self.model.parameters():
            parameter.grad = None
        self.loss(tokens).backward()

    def outcome(self, tokens: Tensor) -> dict[str, Tensor]:
        """The loss, and the gradient of the embeddings."""
        loss = self.loss(tokens)
        (gradient,) = torch.autograd.grad(loss, [next(self.model.parameters())])
        return {"loss": loss.detach().clone(), "d_embedding": gradient.clone()}


def our_training(
    config: ModelConfig, device: torch.device, mode: str | None = None, *, exact: bool = False
) -> Training:
    """`mode` of torch.compile, None: eager. `exact`: float64, by PyTorch alone, layer by layer."""
    model = our_model(config, device, torch.float32, exact).train()
    model.gradient_checkpointing = exact

    def forward(tokens: Tensor) -> Tensor:
        return model.token_loss(tokens[:, :-1], tokens[:, 1:]).objective.mean()

    run = None if mode is None else torch.compile(forward, mode=mode, fullgraph=True, dynamic=False)
    return Training(model, forward, bf16=not exact, run=run)


def our_model(config: ModelConfig, device: torch.device, dtype: torch.dtype, exact: bool) -> HybridLM:
    model = build_model(config, device=device, dtype=dtype, backend="torch" if exact else "auto")
    return model.double() if exact else model


def their_training(package: str, kind: str, config: ModelConfig, device: torch.device) -> Training:
    model = their_model(package, kind, config, device, torch.float32).train()

    def forward(tokens: Tensor) -> Tensor:
        logits = model(input_ids=tokens[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return Training(model, forward)


def their_model(
    package: str, kind: str, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Any:
    """A model of `transformers` or `mamba_ssm`, with the weights of ours."""
    like = build_model(config, device=device, dtype=dtype, backend="torch")
    assert config.vocab_size is not None
    (recipe,) = config.layers.values()
    options = recipe.options
    if package == "transformers":
        sizes: dict[str, Any] = {"hidden_size": config.d_model, "num_hidden_layers": len(like.layers)}
        sizes |= {"vocab_size": config.vocab_size, "state_size": options["d_state"], "use_cache": False}
        sizes["tie_word_embeddings"] = True
        if kind == "mamba2":
            head = options["head_dim"]
            sizes |= {"head_dim": head, "num_heads": 2 * config.d_model // head, "n_groups": 1}
        model = transformers_model(kind, head=True, **sizes).to(device, dtype)
    else:
        layer = {"layer": "Mamba1" if kind == "mamba" else "Mamba2", "d_state": options["d_state"]}
        layer |= {"headdim": options["head_dim"], "ngroups": 1} if kind == "mamba2" else {}
        sizes = {"d_model": config.d_model, "n_layer": len(like.layers), "vocab_size": config.vocab_size}
        made = import_module("mamba_ssm.models.config_mamba").MambaConfig(ssm_cfg=layer, **sizes)
        build = import_module("mamba_ssm.models.mixer_seq_simple").MambaLMHeadModel
        model = build(made, device=device, dtype=dtype)
    take_weights(model, like)
    return model.eval()


class Steps:
    """A model that generates: `step` of tokens (b,) gives logits (b v), and remembers."""

    def step(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def why_not(self) -> str | None:
        """Why the last step was no replay of a recorded one, where one would expect that."""
        return None


class OurSteps(Steps):
    """Ours, by calls of the model or through a `Decoder`."""

    def __init__(self, model: HybridLM, b: int, decoder: Decoder | None):
        self.model, self.decoder, self.state = model, decoder, model.empty_state(b)

    def step(self, tokens: Tensor) -> Tensor:
        if self.decoder is not None:
            return self.decoder.step(tokens, self.state)
        return self.model(tokens[:, None], state=self.state).logits[:, -1]

    def why_not(self) -> str | None:
        return None if self.decoder is None else self.decoder.why_not


def our_steps(
    config: ModelConfig, device: torch.device, b: int, how: str = "eager", *, exact: bool = False
) -> OurSteps:
    model = our_model(config, device, torch.bfloat16, exact)
    decoder = None if how == "eager" else Decoder(model, compiled=how == "compiled_graph")
    return OurSteps(model, b, decoder)


class TransformersSteps(Steps):
    """transformers' forward with its cache, without the loop of `generate`."""

    def __init__(self, model: Any):
        self.model, self.cache = model, None

    def step(self, tokens: Tensor) -> Tensor:
        out = self.model(input_ids=tokens[:, None], cache_params=self.cache, use_cache=True)
        self.cache = out.cache_params
        return out.logits[:, -1]


def transformers_steps(kind: str, config: ModelConfig, device: torch.device, b: int) -> TransformersSteps:
    return TransformersSteps(their_model("transformers", kind, config, device, torch.bfloat16))


class TheirSteps(Steps):
    """mamba_ssm's forward with its `InferenceParams`, as its `generate` calls it; with a `cache`, its CUDA
    graph from the second token on."""

    def __init__(self, model: Any, params: Any, cache: Any = None):
        self.model, self.params, self.cache = model, params, cache

    def step(self, tokens: Tensor) -> Tensor:
        rows, place = tokens[:, None], self.params.seqlen_offset
        if self.cache is not None and place > 0:
            logits = self.cache.run(rows, torch.full_like(rows, place), place)
        else:
            logits = self.model(rows, inference_params=self.params, num_last_tokens=1).logits
        self.params.seqlen_offset += 1
        return logits[:, -1]


def their_steps(kind: str, config: ModelConfig, device: torch.device, b: int, most: int) -> TheirSteps:
    model = their_model("mamba_ssm", kind, config, device, torch.bfloat16)
    params = import_module("mamba_ssm.utils.generation").InferenceParams(max_seqlen=most, max_batch_size=b)
    return TheirSteps(model, params)


def their_graph(kind: str, config: ModelConfig, device: torch.device, b: int, most: int) -> TheirSteps:
    model = their_model("mamba_ssm", kind, config, device, torch.bfloat16)
    cache = import_module("mamba_ssm.utils.generation").update_graph_cache(model, None, b, 1, most)
    cache.inference_params.reset(most, b)
    return TheirSteps(model, cache.inference_params, cache)
