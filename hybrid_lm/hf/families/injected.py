"""What Zamba and Zamba2 have in common: Mamba layers, some of which read the output of a shared block too.

One of their layers is a Mamba layer, or `hybrid`: here `{type: inject, block: "a f", into: m}`, in which `a`
and `f` share weights and norms with the other occurrences, and `f` has a matrix of each occurrence's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid_lm.config.dump import architecture
from hybrid_lm.config.pattern import canon, expand
from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.hf.family import Family, flat, nested
from hybrid_lm.hf.fields import Must
from hybrid_lm.hf.layouts import Listed, block
from hybrid_lm.hf.options import Block, ConversionError, Fields, Options, listed
from hybrid_lm.hf.weights import FUSED, Placed, Row, Transform, row, unrolled
from hybrid_lm.registry import table

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), "gate_proj+up_proj"
"""The matrices that have additions of each occurrence's own."""


class Hybrid(Listed):
    """`layers_block_type`: a Mamba layer, or one whose input has a shared block's output added to it."""

    def __init__(self, mamba: str):
        parts = {"linear_attention": mamba, "hybrid": "+".join(["attention", "inject", mamba, "mlp"])}
        super().__init__("layers_block_type", parts)
        self.alone, self.whole = self.blocks
        # The tables see the parts of an injection; from outside it is one layer.
        self.blocks = (block(mamba), block("inject"))


class Tied(Must):
    """`tie_word_embeddings`, which their classes need: otherwise each hybrid layer has a block of its own."""

    def __init__(self) -> None:
        super().__init__("tie_word_embeddings", True)

    def read(self, fields: Fields, ours: Options) -> None:
        if not fields["tie_word_embeddings"]:
            raise ConversionError("tie_word_embeddings = False: the class then shares no blocks")

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        if not ours["embedding.tied"]:
            raise ConversionError("embedding.tied is false, and then the class shares no blocks")
        fields["tie_word_embeddings"] = True


def half_scale(head_dim: int) -> float:
    """Their factor on the scores: of heads half as wide, as they would be over the stream alone."""
    return (head_dim / 2) ** -0.5


@dataclass(frozen=True)
class Injected(Family):
    """A family of this kind. In the terms of its tables a hybrid layer has options of all its parts:
    `attention.n_heads`, `mlp.d_ff`, `mamba2.d_state`, and `inject.copies`, `inject.adapter_rank` (0: none),
    `inject.attention_adapters`.
    """

    mamba: str = "mamba2"
    """The type of the layers that are not shared."""
    mixer: tuple[Row, ...] = ()
    """Their keys and our parameters inside such a layer, alone or in a hybrid one."""
    shared: str = "shared_transformer"
    """Their name of the shared block."""
    fused: bool = True
    """Whether gate and up are one matrix."""

    def describe(self, config: ModelConfig) -> Options:
        expanded = architecture(config)
        assert isinstance(self.layout, Hybrid)
        layers: list[dict[str, Any]] = []
        blocks: list[Block] = []
        for i, item in enumerate(expanded.pop("layers")):
            types = [part["type"] for part in item]
            if types not in ([self.mamba], ["inject"]):
                raise ConversionError(f"layer {i} is {'+'.join(types)}, it has {self.mamba} or inject there")
            part, shared = item[0], types == ["inject"]
            if "shared" in part:
                raise ConversionError(f"layer {i} shares its weights")
            layers.append(self.hybrid(i, part, config.d_model) if shared else of_part(part, config.d_model))
            blocks.append(self.layout.whole if shared else self.layout.alone)
        used = {layer["inject.shared"] for layer in layers if "inject.shared" in layer}
        if len(used) != 1:
            many = "several sets of shared recipes" if used else "no layer with a shared block"
            raise ConversionError(f"the pattern has {many}, it has one")
        for layer in layers:
            layer.pop("inject.shared", None)
        return Options(dict(flat(expanded)), layers, blocks)

    def hybrid(self, i: int, part: Mapping[str, Any], d_model: int) -> dict[str, Any]:
        """The options of an injection, those of its parts included."""
        inner, into = part["options"]["block"], part["options"]["into"]
        types = [[recipe["type"] for recipe in item] for item in (*inner, *into)]
        if types != [["attention"], ["mlp"], [self.mamba]] or len(into) != 1:
            raise ConversionError(f"layer {i} injects other layers than attention and mlp into {self.mamba}")
        (attention,), (mlp,), (mamba,) = *inner, *into
        if "shared" in mamba:
            raise ConversionError(f"layer {i} shares the weights of its {self.mamba}")
        for recipe in (attention, mlp):
            if not recipe.get("norms"):
                raise ConversionError(f"layer {i} has {recipe['type']} that does not share weights and norms")
        if attention["copies"] != mlp["copies"]:
            raise ConversionError(f"layer {i} has different numbers of copies of attention and mlp")
        adapted, rank = adapters(i, attention["per_call"] or {}, mlp["per_call"] or {})
        return {
            **of_part(attention, 2 * d_model),
            **of_part(mlp, d_model),
            **of_part(mamba, d_model),
            "inject.residual.residual_multiplier": part["residual"]["residual_multiplier"],
            "inject.residual.dropout": part["residual"]["dropout"],
            "inject.copies": attention["copies"],
            "inject.attention_adapters": adapted,
            # Where the class has adapters in any case, one of ours without has zeros of rank 1.
            "inject.adapter_rank": rank or int(self.fused),
            "inject.shared": (attention["shared"], mlp["shared"]),
        }

    def composed(self, ours: Options) -> ModelConfig:
        mamba, layers = self.mamba, ours.layers
        recipes: dict[str, dict[str, Any]] = {"m": {"type": mamba, **options_of(layers[0], mamba)}}
        if (whole := next((layer for layer in layers if "inject.copies" in layer), None)) is not None:
            share = {"copies": whole["inject.copies"], "norms": True}
            rank = whole["inject.adapter_rank"]
            on_a, on_f = (
                {"lora": {"rank": rank, "on": on}} if rank and wanted else {}
                for on, wanted in ((QKV, whole["inject.attention_adapters"]), ((GATE_UP,), True))
            )
            recipes["a"] = {"type": "attention", **options_of(whole, "attention"), "share": share}
            recipes["f"] = {"type": "mlp", **options_of(whole, "mlp"), "share": share}
            recipes["a"] |= {"per_call": on_a} if on_a else {}
            recipes["f"] |= {"per_call": {**on_f, "out_proj": True}}
            recipes["z"] = {"type": "inject", "block": "a f", "into": "m"}
        pattern = canon(["z" if "inject.copies" in layer else "m" for layer in layers])
        model = nested(ours.model.items())
        return ModelConfig.model_validate({**model, "pattern": pattern, "layers": recipes})

    def unrolled(self, config: ModelConfig, names: Sequence[str]) -> list[Placed]:
        options = self.describe(config)
        hybrids = [i for i, _ in options.each("inject")]
        copies = options["inject.copies"]
        rows = [*self.rows]
        for i in range(len(options.layers)):
            rows += self.layer_rows(i, i in hybrids)
        rows += [*self.shared_rows(config, hybrids, copies), *self.adapter_rows(hybrids, copies)]
        placed = unrolled(rows, options, names)
        if self.fused and not any(".lora.gate" in name for name in names):
            placed += self.no_adapters(options, hybrids, copies)
        return placed

    def layer_rows(self, i: int, hybrid: bool) -> Iterator[Row]:
        """What layer `i` has for itself."""
        there, here = f"model.layers.{i}.", f"layers.{i}."
        if hybrid:
            yield row(f"{there}linear.weight", f"{here}layer.block.1.layer.out_proj.weight")
            there, here = f"{there}mamba_decoder.", f"{here}layer.into.0."
        for entry in self.mixer:
            yield row(there + entry.theirs[0], here + entry.ours[0], how=entry.how)

    def shared_rows(self, config: ModelConfig, hybrids: Sequence[int], copies: int) -> Iterator[Row]:
        """The shared blocks, which are stored in the first hybrid layer that uses them."""
        names = list(config.layers)
        used = (config.layers[name] for name in expand(config.pattern, names, config.depth))
        a, f = next(expand(recipe.options["block"], names) for recipe in used if recipe.type == "inject")
        for k, i in enumerate(hybrids[:copies]):
            there = f"model.layers.{i}.{self.shared}."
            here_a, here_f = f"shared.{a}.{k}.", f"shared.{f}.{k}."
            yield row(there + "input_layernorm.weight", here_a + "pre_norm.weight")
            yield row(there + "pre_ff_layernorm.weight", here_f + "pre_norm.weight")
            for name in (*QKV, "o_proj"):
                yield row(f"{there}self_attn.{name}.weight", f"{here_a}layer.{name}.weight")
            gate, up, down = (f"{here_f}layer.{name}_proj" for name in ("gate", "up", "down"))
            for kind in ("weight", "bias"):
                mlp = there + "feed_forward."
                if self.fused:
                    yield row(f"{mlp}gate_up_proj.{kind}", f"{gate}.{kind}", f"{up}.{kind}", how=FUSED)
                else:
                    yield row(f"{mlp}gate_proj.{kind}", f"{gate}.{kind}")
                    yield row(f"{mlp}up_proj.{kind}", f"{up}.{kind}")
                yield row(f"{mlp}down_proj.{kind}", f"{down}.{kind}")

    def adapter_rows(self, hybrids: Sequence[int], copies: int) -> Iterator[Row]:
        """The additions of each occurrence, which are stored with the block that it uses."""
        for j, i in enumerate(hybrids):
            there = f"model.layers.{hybrids[j % copies]}.{self.shared}."
            here = f"layers.{i}.layer.block."
            lists = {f"self_attn.linear_{name[0]}_adapter_list": f"0.layer.lora.{name}" for name in QKV}
            lists["feed_forward.gate_up_proj_adapter_list"] = "1.layer.lora.gate_proj_up_proj"
            for theirs, ours in lists.items():
                for n, part in enumerate("AB"):
                    yield row(f"{there}{theirs}.{j}.{n}.weight", f"{here}{ours}.{part}")

    def no_adapters(self, options: Options, hybrids: Sequence[int], copies: int) -> Iterator[Placed]:
        """Additions of zero, where the class has them and the model does not."""
        rank, d_ff = options["inject.adapter_rank"], options["mlp.d_ff"]

        def write(ours: Sequence[Tensor], _: Mapping[str, Any]) -> list[Tensor]:
            # A as the unit matrix begins, so that training can move B, and B zero: nothing is added.
            d = ours[0].shape[0]
            like = {"dtype": ours[0].dtype, "device": ours[0].device}
            return [torch.eye(rank, d, **like), torch.zeros(2 * d_ff, rank, **like)]

        nothing = Transform("nothing", lambda theirs, shapes, _: [], write)
        for j, i in enumerate(hybrids):
            there = f"model.layers.{hybrids[j % copies]}.{self.shared}.feed_forward"
            keys = tuple(f"{there}.gate_up_proj_adapter_list.{j}.{n}.weight" for n in (0, 1))
            yield Placed(keys, (f"layers.{i}.layer.block.1.layer.out_proj.weight",), nothing, options.model)


def of_part(part: Mapping[str, Any], d_in: int) -> dict[str, Any]:
    """The options of a recipe as paths."""
    kind = part["type"]
    options = table("layer")[kind].Options.model_validate(part["options"]).resolved(d_in)
    found = {f"{kind}.{key}": value for key, value in options.items()}
    return found | {f"{kind}.residual.{key}": value for key, value in part["residual"].items()}


def options_of(layer: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The options of one type of layer, by their own names."""
    start = f"{kind}."
    return {path.removeprefix(start): value for path, value in layer.items() if path.startswith(start)}


def adapters(i: int, attention: Mapping[str, Any], mlp: Mapping[str, Any]) -> tuple[bool, int]:
    """Whether attention has additions, and the rank of all there are. Raises ConversionError for parts of an
    occurrence's own that their classes do not have."""
    if attention.get("out_proj") or not mlp.get("out_proj"):
        raise ConversionError(f"layer {i}: per_call.out_proj: it has one behind the mlp, and none before it")
    found = {}
    for name, lora, on in (("attention", attention.get("lora"), QKV), ("mlp", mlp.get("lora"), (GATE_UP,))):
        if lora is not None:
            if sorted(lora["on"]) != sorted(on):
                raise ConversionError(f"layer {i}: per_call.lora.on of {name}: it has {listed(on)}")
            found[name] = lora["rank"]
    if len(set(found.values())) > 1:
        raise ConversionError(f"layer {i}: per_call.lora.rank is {listed(found.values())}, it has one")
    return "attention" in found, next(iter(found.values()), 0)
