"""A family of Hugging Face models as data: its table of fields, its table of weights, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid_lm.config.dump import architecture
from hybrid_lm.config.pattern import canon
from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.hf.fields import ConversionError, Fields, Options, Rule, shown, without_nulls
from hybrid_lm.hf.weights import Row, unrolled
from hybrid_lm.registry import table

COMMON = frozenset(
    [
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)
"""Fields of every configuration that do not change what the model computes."""

FALSE = frozenset(["add_cross_attention", "is_decoder", "is_encoder_decoder"])
"""Fields of any configuration that are read only if they are false."""

TRAINING = frozenset(["A_range", "chunk", "dropout", "dt_floor", "dt_max", "dt_min", "expand", "init"])
"""Options that say how a model starts, trains or is cut into pieces: two models that differ in these only
compute the same. `expand` is here because `d_inner` says it."""

LETTERS = {"attention": "a", "mlp": "f", "mamba": "m", "mamba2": "m"}
"""Names of the recipes of an imported model; attention with a window is `w`."""


@dataclass(frozen=True)
class Family:
    """What `transformers` calls a model type."""

    name: str
    """`model_type`."""
    class_name: str
    """The class for causal language modelling."""
    block: tuple[str, ...]
    """The types of our residual layers that one of their layers is."""
    rules: tuple[Rule, ...]
    """Their fields and our options."""
    rows: tuple[Row, ...]
    """Their keys and our parameters, in the layout on disk."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Options that are always so, where our default is something else."""
    depth: str = "num_hidden_layers"
    """The field with the number of layers."""
    ignored: frozenset[str] = frozenset()
    """Fields that do not change what the model computes."""
    prefix: str = ""
    """What old checkpoints leave out at the start of every key but the head's."""
    buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)
    """Endings of keys that old checkpoints have and that are no parameters."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Key in memory -> key on disk, where they differ."""
    cached_differs: Callable[[Fields], bool] = lambda fields: False
    """Whether their decoding with a cache is known to differ from their own forward pass."""

    @property
    def known(self) -> frozenset[str]:
        """Every field that has a meaning here, or none."""
        ruled = (name for rule in self.rules for name in rule.theirs)
        return frozenset({self.depth, *self.ignored, *COMMON, *ruled})

    def read(self, fields: Fields) -> ModelConfig:
        """The architecture that their configuration describes.

        Raises ConversionError naming the first field that is unknown or has a value that we do not have.
        """
        known = self.known
        for name, value in fields.items():
            silent = value is None or (name in FALSE and value is False)
            if name not in known and not silent:
                raise ConversionError(f"{self.name}: unknown field {name} = {value!r}")
        ours = Options({}, [{} for _ in range(fields[self.depth])])
        try:
            for path, value in self.fixed.items():
                ours[path] = value
            for rule in self.rules:
                rule.read(fields, ours)
        except ConversionError as error:
            raise ConversionError(f"{self.name}: {error}") from None
        return config_of(ours, self.block)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Their configuration of an architecture. Raises ConversionError saying the first thing in which it
        is not one of this family."""
        try:
            ours = describe(config, self.block)
            for reason in self.unfixed(ours):
                raise ConversionError(reason)
            fields: dict[str, Any] = {self.depth: len(ours.layers)}
            for rule in self.rules:
                rule.write(ours, fields)
            # The table decides by being run both ways: what it cannot say has become something else.
            theirs = describe(self.read(filled(self, fields)), self.block)
        except ConversionError as error:
            reason = str(error).removeprefix(f"{self.name}: ")
            raise ConversionError(f"not {self.name}: {reason}") from None
        for reason in differences(ours, theirs, self.block):
            raise ConversionError(f"not {self.name}: {reason}")
        return fields

    def unfixed(self, ours: Options) -> Iterator[str]:
        """Options that are not as they always are in this family."""
        for path, value in self.fixed.items():
            # Where the norms are is told layer by layer.
            if path != "block.placement" and ours[path] != value:
                yield f"{path} is {shown(ours[path])}, it has {shown(value)}"

    def unrolled(self, config: ModelConfig, names: Sequence[str]) -> list[Row]:
        """Every tensor of a model of this family, with full keys and names."""
        return unrolled(self.rows, self.block, len(describe(config, self.block).layers), names)


def filled(family: Family, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that `transformers` makes of these: with its defaults."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(family.name, **fields).to_dict()
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConversionError(str(error).strip().splitlines()[-1].strip()) from error


def describe(config: ModelConfig, block: Sequence[str]) -> Options:
    """A configuration as options of layers that are made of `block`.

    Raises ConversionError if the layers are not such blocks, or share weights.
    """
    expanded = architecture(config)
    items, n = expanded.pop("layers"), len(block)
    for i, item in enumerate(items):
        kind = "+".join(part["type"] for part in item)
        if kind != block[i % n]:
            raise ConversionError(f"layer {i} is {kind}, it has {block[i % n]} there")
        if "shared" in item[0]:
            raise ConversionError(f"layer {i} shares its weights")
    if len(items) % n:
        raise ConversionError(f"{len(items)} layers are no whole number of blocks of {' '.join(block)}")
    layers = []
    for start in range(0, len(items), n):
        layer: dict[str, Any] = {}
        for (part,) in items[start : start + n]:
            kind, options = part["type"], resolved(part["type"], part["options"], config.d_model)
            layer |= {f"{kind}.{key}": value for key, value in options.items()}
            layer |= {f"{kind}.residual.{key}": value for key, value in part["residual"].items()}
        layers.append(layer)
    return Options(dict(flat(expanded)), layers)


def flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and values of nested sections."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def resolved(kind: str, options: Mapping[str, Any], d_in: int) -> dict[str, Any]:
    """A layer's options with the numbers that nulls stand for, and defaults for those without effect."""
    o, default = dict(options), table("layer")[kind].Options().model_dump()
    quiet: list[str] = []
    if kind == "attention":
        o["n_kv_heads"] = o["n_kv_heads"] or o["n_heads"]
        o["head_dim"] = o["head_dim"] or d_in // o["n_heads"]
        if o["scale"] is not None and math.isclose(o["scale"], o["head_dim"] ** -0.5, rel_tol=1e-12):
            o["scale"] = None
        quiet = ["qk_norm_eps", "qk_norm_unit_offset"] if o["qk_norm"] == "none" else []
    elif kind == "mlp":
        o["d_ff"] = o["d_ff"] or (-(-8 * d_in // 24) * 8 if o["gated"] else 4 * d_in)
    elif kind == "mamba":
        o["d_inner"] = o["d_inner"] or round(o["expand"] * d_in)
        o["dt_rank"] = o["dt_rank"] or math.ceil(d_in / 16)
        quiet = ["inner_norm_eps"] if o["inner_norm"] == "none" else []
    elif kind == "mamba2":
        o["d_inner"] = o["d_inner"] or round(o["expand"] * d_in)
        quiet = ["norm_eps"] if o["norm"] == "gate" else []
    return o | {key: default[key] for key in quiet}


def differences(ours: Options, theirs: Options, block: Sequence[str]) -> Iterator[str]:
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
    for i, (one, other) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
        for path, value in one.items():
            if not alike(path, value, other[path]):
                kind, _, option = path.partition(".")
                at = i * len(block) + block.index(kind)
                yield f"layer {at} has {option} {shown(value)}, it has {shown(other[path])}"


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


def config_of(ours: Options, block: Sequence[str]) -> ModelConfig:
    """The `model` section that options describe: equal layers get one recipe."""
    data: dict[str, Any] = {}
    for path, value in ours.model.items():
        place = data
        *sections, key = path.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    recipes: dict[str, dict[str, Any]] = {}
    items: list[str] = []
    for layer in ours.layers:
        for kind in block:
            start = f"{kind}."
            options = {
                path.removeprefix(start): value for path, value in layer.items() if path.startswith(start)
            }
            name = "w" if options.get("window") else LETTERS[kind]
            recipe = recipes.setdefault(name, {"type": kind, **options})
            assert recipe == {"type": kind, **options}, f"two sorts of {name}"
            items.append(name)
    return ModelConfig.model_validate({**data, "pattern": canon(items), "layers": recipes})
