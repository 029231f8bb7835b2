"""Our model as a `transformers` model: config and causal-LM class.

Importing this module registers the classes, so that a saved model loads here without remote code. The same
source, made self-contained by `hf.bundle`, is the remote code of an export.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as hf_init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from hybrid_lm.config.pattern import expand
from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.hf.cache import HybridLMCache
from hybrid_lm.hf.inputs import documents, mask_of
from hybrid_lm.hf.plain_json import from_json_safe, json_safe
from hybrid_lm.layers.base import Auxiliary, Module
from hybrid_lm.layers.block import Residual
from hybrid_lm.layers.parts import Embedding, Linear
from hybrid_lm.model.balance import rebalance
from hybrid_lm.model.build import build_model
from hybrid_lm.model.init import entries
from hybrid_lm.model.lm import HybridLM
from hybrid_lm.ops import select


class HybridLMConfig(PreTrainedConfig):
    """The architecture (a `model` section, nothing left to defaults) and what Hugging Face's tools ask for.

    `vocab_size` and `tie_word_embeddings` can be set; that changes `architecture` too.

    Raises ValueError if `vocab_size`, `hidden_size`, `num_hidden_layers` or `tie_word_embeddings` is given
    and contradicts `architecture`.
    """

    model_type = "hybrid_lm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(self, architecture: dict[str, Any] | None = None, use_cache: bool = True, **kwargs: Any):
        # transformers makes an empty config to find out what is not a default.
        self.architecture = None if architecture is None else json_safe(architecture)
        self.use_cache = use_cache
        if architecture is not None:
            model = self.model_config()
            derived = {
                "vocab_size": model.vocab_size,
                "hidden_size": model.d_model,
                "num_hidden_layers": len(expand(model.pattern, list(model.layers), model.depth)),
                "tie_word_embeddings": model.embedding.tied,
            }
            for key, value in derived.items():
                if kwargs.get(key, value) != value:
                    raise ValueError(
                        f"{key} = {kwargs[key]}, but `architecture` says {value}; change it there"
                    )
            kwargs |= derived
        super().__init__(**kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value)
        architecture = vars(self).get("architecture")
        if architecture is not None and key == "vocab_size":
            architecture[key] = value
        elif architecture is not None and key == "tie_word_embeddings":
            architecture["embedding"] = {**architecture.get("embedding", {}), "tied": value}

    def model_config(self) -> ModelConfig:
        """The architecture as the `model` section of a run."""
        if self.architecture is None:
            raise ValueError(
                "this HybridLMConfig has no `architecture`; make one with hybrid_lm.to_hf(model)"
            )
        return ModelConfig.model_validate(from_json_safe(self.architecture))


class HybridLMForCausalLM(PreTrainedModel, GenerationMixin):
    """A `HybridLM` behind the interface of `transformers`. `model` is the model itself.

    Tied and shared weights are single parameters of the model, so each is saved once.
    """

    config_class = HybridLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # What was read cannot be unread: this makes `generate` refuse assisted decoding.
    _is_stateful = True
    _supports_sdpa = True
    # A residual layer is on one device.
    _no_split_modules: ClassVar[list[str]] = [Residual.__name__]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]

    def __init__(self, config: HybridLMConfig, model: HybridLM | None = None):
        super().__init__(config)
        # from_pretrained builds on the meta device and fills in what it read.
        device = torch.empty(0).device
        if model is None:
            model = build_model(
                config.model_config(),
                device=device,
                dtype=torch.get_default_dtype(),
                weights=device.type != "meta",
            )
        self.model, self.vocab_size = model, config.vocab_size
        self.chosen_for = "cpu" if device.type == "meta" else model.embed.weight.device.type
        # Those that our own modules keep in float32 too, by name, for a `dtype=bfloat16` of from_pretrained.
        self._keep_in_fp32_modules_strict = {
            entry.name.rpartition(".")[2] for entry in entries(model) if entry.spec.kind == "dynamics"
        }
        if device.type != "meta":
            for parameter in model.parameters():
                mark_filled(parameter)
        # What experts were sent since the last optimizer step, and the version of the weights then.
        self.passes: list[Auxiliary] = []
        self.weighed = 0
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As every class; parameters that are not learned by gradients stay so."""
        loaded = super().from_pretrained(*args, **kwargs)
        made = loaded[0] if isinstance(loaded, tuple) else loaded
        fresh = build_model(made.config.model_config(), weights=False)
        for name, parameter in fresh.named_parameters():
            if not parameter.requires_grad:
                made.model.get_parameter(name).requires_grad_(False)
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As every class, with the corrections of experts as they are after the last optimizer step."""
        self._after_a_step()
        return super().save_pretrained(*args, **kwargs)

    def _version(self) -> int:
        # A step of any optimizer writes into the weights, and that tells.
        return sum(parameter._version for parameter in self.parameters() if parameter.requires_grad)

    @torch.compiler.disable()
    def _after_a_step(self) -> None:
        # Moves the corrections of experts (`balance: bias`) by what the passes of a step have seen.
        if self._version() != self.weighed:
            rebalance(self.passes)
            self.passes = []

    @torch.compiler.disable()
    def _count(self, added: Auxiliary) -> None:
        self.passes.append(Auxiliary([], [*added.loads]))
        self.weighed = self._version()

    def _init_weights(self, module: torch.nn.Module) -> None:
        # Called for modules that a checkpoint left incomplete, and for what transformers adds. A parameter's
        # start depends on its full name: the first call starts all that are missing.
        if not isinstance(module, Module) and isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            hf_init.normal_(module.weight, std=self.model.config.init.std)
            return
        missing = [entry for entry in entries(self.model) if not is_filled(entry.parameter)]
        if missing:
            fresh = dict(build_model(self.config.model_config()).named_parameters())
            for entry in missing:
                hf_init.copy_(entry.parameter, fresh[entry.name])
                mark_filled(entry.parameter)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridLMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        doc_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits for the token after each of `input_ids` (b t), and the loss if there are `labels`.

        attention_mask   (b t), or (b s + t) with what was read before: 1 token, 0 padding
        position_ids     (b t); where they do not go up, a document begins, which sees nothing of the last one
        inputs_embeds    (b t d) in place of `input_ids`, as `get_input_embeddings()` gives them
        labels           (b t): the tokens themselves, -100 where nothing is scored; shifted here
        logits_to_keep   only the last k logits, or those at the given indices; 0: all
        doc_ids          (b t): 0 padding, documents 1, 2, ... in order, instead of marking them by positions
        output_hidden_states   what enters each layer (b t d), and at last what the logits are made of

        Raises ValueError for masks of other shapes, other caches, a full static cache, and attention weights.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise ValueError("output_attentions: this model does not return them")
        if past_key_values is not None and not isinstance(past_key_values, HybridLMCache):
            kind = type(past_key_values).__name__
            raise ValueError(f"past_key_values is a {kind}; give what an earlier call returned, or nothing")
        rows = inputs_embeds if input_ids is None else input_ids
        assert rows is not None
        head = self.model.embed.weight if self.model.lm_head is None else None
        if head is not None and head.is_meta and not rows.is_meta:
            raise ValueError(
                "the embedding is the output matrix too and is needed at all times: give model.embed a "
                "device in device_map, not disk"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = HybridLMCache()
        self._choose_backends(rows.device.type)
        state = None if past_key_values is None else past_key_values.begin(self.model, rows)
        if position_ids is not None:
            position_ids = position_ids.expand(rows.shape[:2])
        mask = None if attention_mask is None else mask_of(attention_mask, rows, state)
        if doc_ids is None:
            doc_ids = documents(rows, mask, position_ids, state)
        elif mask is not None:
            doc_ids = doc_ids * mask
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden: list[Tensor] | None = [] if output_hidden_states else None
        added = Auxiliary([], []) if labels is not None and self.training else None
        if added is not None and self.passes:
            self._after_a_step()
        x, _ = self.model.features(
            input_ids,
            state=state,
            doc_ids=doc_ids,
            positions=position_ids,
            embeds=inputs_embeds,
            hidden=hidden,
            auxiliary=added,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x = x[:, keep] if head is None else x[:, keep].to(head.device)
        logits = self.model.logits(x)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
            if added is not None and any(load.rate for load in added.loads):
                self._count(added)
            if added is not None and added.terms:
                loss = loss + balance_loss(self.model, added, labels, kwargs.get("num_items_in_batch"))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=None if hidden is None else tuple(hidden),
        )

    def _choose_backends(self, device: str) -> None:
        # The model was built on the meta device, before anybody knew where it would run.
        if device != self.chosen_for:
            self.model.backends, self.chosen_for = select("auto", device), device

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any) -> None:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation = {kind!r}: this model has 'dynamic' memory, which grows, and 'static'"
            )
        if model_kwargs.get("past_key_values") is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # pyright: ignore
        elif generation_config.use_cache is not False:
            room = max(args[-1], getattr(generation_config, "max_cache_len", None) or 0)
            model_kwargs["past_key_values"] = HybridLMCache(max_tokens=room, fixed=kind == "static")

    def get_input_embeddings(self) -> Embedding:
        """The module that holds the embedding matrix (v d)."""
        return self.model.embed

    def set_input_embeddings(self, value: Embedding) -> None:
        """Puts another embedding in its place."""
        self.model.embed = value

    def get_output_embeddings(self) -> Linear | None:
        """The module that holds the output matrix (v d); None with tied weights: it is the embedding's."""
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings: torch.nn.Linear) -> None:
        """Gives the output matrix the weight of another module. ValueError with tied weights."""
        if self.model.lm_head is None:
            raise ValueError("the output matrix is the embedding's; untie them first (tie_word_embeddings)")
        self.model.lm_head.weight = new_embeddings.weight
        self.model.lm_head.out_features = len(new_embeddings.weight)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> torch.nn.Embedding:
        """Cuts or extends the vocabulary as other classes do: new rows have the old ones' mean and spread."""
        embed = super().resize_token_embeddings(*args, **kwargs)
        n, bias = len(embed.weight), self.model.lm_bias
        if bias is not None and len(bias) != n:
            new = bias.detach().new_full((n,), float(bias.detach().float().mean()))
            new[: len(bias)] = bias.detach()[:n]
            self.model.lm_bias = torch.nn.Parameter(new, requires_grad=bias.requires_grad)
        self.model.config = self.model.config.model_copy(update={"vocab_size": n})
        return embed


def balance_loss(model: HybridLM, added: Auxiliary, labels: Tensor, num_items: int | Tensor | None) -> Any:
    """What layers add to the loss of a batch: its share, if a step is a mean over `num_items` labels."""
    how = getattr(model.layers[0]._gradient_checkpointing_func, "keywords", {})
    if model.gradient_checkpointing and how.get("use_reentrant") is True:
        raise ValueError("the balance losses of experts get no gradient with use_reentrant; set it to False")
    return (
        added.objective if num_items is None else added.objective * (labels[:, 1:] != -100).sum() / num_items
    )


def mark_filled(parameter: Tensor) -> None:
    """Tells transformers that a parameter has its values."""
    vars(parameter)["_is_hf_initialized"] = True


def is_filled(parameter: Tensor) -> bool:
    """Whether transformers, or `mark_filled`, says that a parameter has its values."""
    return getattr(parameter, "_is_hf_initialized", False)


AutoConfig.register("hybrid_lm", HybridLMConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridLMConfig, HybridLMForCausalLM, exist_ok=True)
