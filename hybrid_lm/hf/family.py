"""A family of Hugging Face models as data: its table of fields, its table of weights, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count
from typing import Any

from hybrid_lm.config.dump import architecture
from hybrid_lm.config.pattern import canon
from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.hf.fields import Rule
from hybrid_lm.hf.layouts import Layout
from hybrid_lm.hf.options import (
    Absent,
    Block,
    ConversionError,
    Fields,
    Item,
    Options,
    of_layer,
    shown,
    without_nulls,
)
from hybrid_lm.hf.weights import Placed, Row, unrolled
from hybrid_lm.registry import table

COMMON = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "_num_labels",
        "architectures",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    ]
)
"""Fields of every configuration that do not change what the model computes."""

FALSE = frozenset(["add_cross_attention", "is_decoder", "is_encoder_decoder"])
"""Fields of any configuration that are read only if they are false."""

TRAINING = frozenset(
    [
        "A_range",
        "balance",
        "balance_factor",
        "balance_rate",
        "chunk",
        "dropout",
        "dt_floor",
        "dt_max",
        "dt_min",
        "expand",
        "init",
        "z_loss",
    ]
)
"""Options that say how a model starts, trains or is cut into pieces: two models that differ in these only
compute the same. `expand` is here because `d_inner` says it."""

LETTERS = {
    "attention": "a",
    "gated_deltanet": "g",
    "inject": "z",
    "mamba": "m",
    "mamba2": "m",
    "mla": "a",
    "mlp": "f",
    "moe": "e",
    "rg_lru": "r",
    "short_conv": "c",
}
"""Names of the recipes of an imported model; attention with a window is `w`."""

TOLERANCE = 2e-5
"""Largest difference of logits against a class of transformers in float32, at logits of about 1: classes that
are right are within 1.2e-5 of themselves in float64, on small random models."""


@dataclass(frozen=True)
class Family:
    """What `transformers` calls a model type."""

    name: str
    """`model_type`."""
    class_name: str
    """The class for causal language modelling."""
    layout: Layout
    """Which residual layers of ours each of their layers is."""
    rules: tuple[Rule, ...]
    """Their fields and our options."""
    rows: tuple[Row, ...]
    """Their keys and our parameters, in the layout on disk."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Options that are always so, where our default is something else."""
    ignored: frozenset[str] = frozenset()
    """Fields that do not change what the model computes."""
    prefix: str = ""
    """What old checkpoints leave out at the start of every key but the head's."""
    buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)
    """Endings of keys that old checkpoints have and that are no parameters."""
    unread: tuple[str, ...] = ()
    """Beginnings of keys of parts that the class does not run either."""
    spelled: Mapping[str, str] = field(default_factory=dict)
    """Parts of keys as some checkpoints have them, and as they are in `rows`."""
    cached_differs: Callable[[Fields], bool] = lambda fields: False
    """Whether their decoding with a cache is known to differ from their own forward pass."""
    tolerance: float = TOLERANCE
    """Largest difference of logits that their own roundings explain."""

    @property
    def known(self) -> frozenset[str]:
        """Every field that has a meaning here, or none."""
        ruled = (name for rule in self.rules for name in rule.theirs)
        return frozenset({*self.layout.theirs, *self.ignored, *COMMON, *ruled})

    @property
    def head(self) -> str:
        """Their key of the output matrix."""
        return next(entry.theirs[0] for entry in self.rows if entry.ours == ("lm_head.weight",))

    def read(self, fields: Fields) -> ModelConfig:
        """The architecture that their configuration describes.

        Raises ConversionError naming the first field that is unknown or has a value that we do not have.
        """
        known = self.known
        if fields.get("quantization_config"):
            raise ConversionError(f"{self.name}: quantization_config: quantised checkpoints are not read")
        for name, value in fields.items():
            silent = value is None or (name in FALSE and value is False)
            if name not in known and not silent:
                raise ConversionError(f"{self.name}: unknown field {name} = {value!r}")
        try:
            blocks = self.layout.read(fields)
            if not blocks:
                raise ConversionError(f"{' and '.join(self.layout.theirs)}: the model has no layers")
            ours = Options({}, [{} for _ in blocks], blocks)
            for path, value in self.fixed.items():
                ours[path] = value
            for rule in self.rules:
                # What no layer has needs no option.
                with suppress(Absent):
                    rule.read(fields, ours)
        except ConversionError as error:
            raise ConversionError(f"{self.name}: {error}") from None
        return self.composed(ours)

    def composed(self, ours: Options) -> ModelConfig:
        """The architecture that these options describe: the inverse of `describe`."""
        return config_of(ours)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Their configuration of an architecture. Raises ConversionError saying in what it is not one of this
        family, option by option."""
        fields: dict[str, Any] = {}
        try:
            ours = self.describe(config)
            reasons = [*self.unfixed(ours), *self.unwritten(ours, fields)]
            if not reasons:
                # The table decides by being run both ways: what it cannot say has become something else.
                reasons = [*differences(ours, self.describe(self.read(filled(self, fields))))]
        except ConversionError as error:
            reasons = [str(error).removeprefix(f"{self.name}: ")]
        if reasons:
            raise ConversionError(f"not {self.name}: {'; '.join(reasons)}")
        return fields

    def unwritten(self, ours: Options, fields: dict[str, Any]) -> Iterator[str]:
        """Writes the fields; what cannot be said in them."""
        writers = [partial(rule.write, ours, fields) for rule in self.rules]
        for write in (partial(self.layout.write, ours.blocks, fields), *writers):
            try:
                write()
            except Absent:
                # What no layer has is left to their default.
                continue
            except ConversionError as error:
                yield str(error)

    def describe(self, config: ModelConfig) -> Options:
        """An architecture in the terms of this family's tables. Raises ConversionError if its layers are not
        such as this family has."""
        return describe(config, self.layout.blocks)

    def unfixed(self, ours: Options) -> Iterator[str]:
        """Options that are not as they always are in this family."""
        for path, value in self.fixed.items():
            # Where the norms are is told layer by layer.
            if path == "block.placement" or (of_layer(path) and not any(path in o for o in ours.layers)):
                continue
            if ours[path] != value:
                yield f"{path} is {shown(ours[path])}, it has {shown(value)}"

    def unrolled(self, config: ModelConfig, names: Sequence[str]) -> list[Placed]:
        """Every tensor of a model of this family, with full keys and names."""
        return unrolled(self.rows, self.describe(config), names)


def filled(family: Family, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that `transformers` makes of these: with its defaults."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(family.name, **fields).to_dict()
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConversionError(str(error).strip().splitlines()[-1].strip()) from error


def describe(config: ModelConfig, alphabet: Sequence[Block]) -> Options:
    """A configuration as options of layers that are made of the blocks of `alphabet`.

    Raises ConversionError if the layers are not such blocks, or share weights.
    """
    expanded = architecture(config)
    items = expanded.pop("layers")
    orders = {i: tuple(part["type"] for part in item) for i, item in enumerate(items)}
    kinds = [tuple(sorted(order)) for order in orders.values()]
    blocks = blocks_of(kinds, alphabet)
    for i, item in enumerate(items):
        if any("shared" in part for part in item):
            raise ConversionError(f"layer {i} shares its weights")
        # A norm for each of one layer is the norm before it.
        if len(item) == 1 and item[0]["residual"]["placement"] == "pre_each":
            item[0]["residual"]["placement"] = "pre"
    layers, rest = [], iter(items)
    for block in blocks:
        layer: dict[str, Any] = {}
        for part in (part for _ in block for part in next(rest)):
            kind, options = part["type"], table("layer")[part["type"]].Options
            resolved = options.model_validate(part["options"]).resolved(config.d_model)
            layer |= {f"{kind}.{key}": value for key, value in resolved.items()}
            layer |= {f"{kind}.residual.{key}": value for key, value in part["residual"].items()}
        layers.append(layer)
    return Options(dict(flat(expanded)), layers, blocks, orders)


def blocks_of(kinds: Sequence[Item], alphabet: Sequence[Block]) -> list[Block]:
    """Residual layers of these types, taken together as blocks. Raises ConversionError naming the first that
    is in none."""
    found: list[Block] = []
    at = 0
    while at < len(kinds):
        agree = {b: next((k for k, item in enumerate(b) if kinds[at + k : at + k + 1] != [item]), len(b))
                 for b in alphabet}  # fmt: skip
        whole = [b for b in alphabet if agree[b] == len(b)]
        if whole:
            found.append(max(whole, key=len))
            at += len(found[-1])
            continue
        far = max(agree.values())
        if at + far == len(kinds):
            names = " or ".join(" ".join(told(item) for item in b) for b in alphabet)
            raise ConversionError(f"{len(kinds)} layers are no whole number of blocks of {names}")
        wanted = dict.fromkeys(told(b[far]) for b in alphabet if agree[b] == far)
        raise ConversionError(
            f"layer {at + far} is {told(kinds[at + far])}, it has {' or '.join(wanted)} there"
        )
    return found


def told(item: Item) -> str:
    """The types of a residual layer as one writes them."""
    return "+".join(item)


def flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and values of nested sections."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def nested(paths: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The inverse of `flat`."""
    data: dict[str, Any] = {}
    for path, value in paths:
        place = data
        *sections, key = path.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return data


def differences(ours: Options, theirs: Options) -> Iterator[str]:
    """What of two descriptions is not the same function, option by option."""
    for path, value in ours.model.items():
        # How the residual stream is joined is each layer's; here is only the final norm's part.
        if path in ("block.placement", "block.residual_multiplier"):
            continue
        if path.startswith("block.") and not ours.model["final_norm"]:
            continue
        if path == "embedding.max_positions" and ours.model["embedding.positions"] != "learned":
            continue
        if not alike(path, value, theirs.model[path]):
            yield f"{path} is {shown(value)}, it has {shown(theirs.model[path])}"
    for i, (one, other) in enumerate(zip(ours.blocks, theirs.blocks, strict=True)):
        if one != other:
            names = (" ".join(told(item) for item in block) for block in (one, other))
            yield "block {} is {}, it has {}".format(i, *names)
            return
    told_once: dict[tuple[str, str, str], list[int]] = {}
    for i, (one, other) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
        for path, value in one.items():
            if not alike(path, value, other[path]):
                kind, _, option = path.partition(".")
                at, _ = ours.place(i, kind) or (i, None)
                told_once.setdefault((option, shown(value), shown(other[path])), []).append(at)
    for (option, one, other), layers in told_once.items():
        more = f" ({len(layers) - 1} more layers too)" if len(layers) > 1 else ""
        yield f"layer {layers[0]} has {option} {one}, it has {other}{more}"


def alike(path: str, one: Any, other: Any) -> bool:
    """Whether two values of an option compute the same."""
    if path.rpartition(".")[2] in TRAINING:
        return True
    return same_rope(one, other) if path.endswith(".rope") else one == other


def same_rope(one: Any, other: Any) -> bool:
    """Whether two settings of rotary positions are the same: lengths matter to a scaling only."""
    if one is None or other is None:
        return one is other
    one, other = ({**rope, "scaling": without_nulls(rope["scaling"] or {})} for rope in (one, other))
    if not one["scaling"]:
        one["max_positions"] = other["max_positions"]
    return one == other


def config_of(ours: Options) -> ModelConfig:
    """The `model` section that options describe: equal layers get one recipe."""
    recipes: dict[str, dict[str, Any]] = {}
    items: list[str] = []
    for i, block in enumerate(ours.blocks):
        for item in block:
            names = []
            for kind in item:
                start = f"{kind}."
                own = ((k.removeprefix(start), v) for k, v in ours.layers[i].items() if k.startswith(start))
                names.append(recipe_name(recipes, kind, {"type": kind, **residual_nested(own)}))
            items.append("+".join(names))
    layers = {"pattern": canon(items), "layers": recipes}
    return ModelConfig.model_validate({**nested(ours.model.items()), **layers})


def residual_nested(options: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A layer's options, with those of its residual in a section."""
    flat_ones = dict(options)
    residual = {key for key in flat_ones if key.startswith("residual.")}
    kept = {key: value for key, value in flat_ones.items() if key not in residual}
    return {**kept, **nested((key, flat_ones[key]) for key in residual)}


def recipe_name(recipes: dict[str, dict[str, Any]], kind: str, recipe: dict[str, Any]) -> str:
    """The name of a recipe, entered under a new one if there is none like it yet."""
    letter = "w" if recipe.get("window") else LETTERS[kind]
    for name in chain((letter, letter.upper()), (f"{letter}_{n}" for n in count(2))):
        if recipes.setdefault(name, recipe) == recipe:
            return name
    raise AssertionError
