"""The edge: a YAML file and `key=value` overrides become a RunConfig, or one report of everything that is
wrong."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from hybrid_lm.config import yaml
from hybrid_lm.config.dump import architecture_hash, dump_yaml
from hybrid_lm.config.explain import Finding, Path, explain
from hybrid_lm.config.imported import fill
from hybrid_lm.config.recipes import Recipes
from hybrid_lm.config.report import ConfigError, Problem, show
from hybrid_lm.config.schema import ProbeData, RunConfig
from hybrid_lm.registry import nearest, table, unknown

__all__ = [
    "ConfigError",
    "architecture_hash",
    "config_names",
    "configs_dir",
    "dump_yaml",
    "find_config",
    "load_config",
    "parse_config",
]


def configs_dir() -> FilePath:
    """The configurations that come with hybrid_lm: inside the installed package, or beside it in a
    checkout."""
    package = FilePath(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """The names that `load_config` knows without a file: `demo`, `recall/mqar_small`, ..."""
    root = configs_dir()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def load_config(path_or_name: str | FilePath, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads, overrides and validates a run's configuration.

    Args:
        path_or_name: a YAML file, or the name of one that comes with hybrid_lm (`recall/mqar_small`).
        overrides: `section.key=value`, later ones over earlier ones; the value is read as in YAML, so that
            lists and
            mappings are possible: `train.optimizer.betas=[0.9, 0.99]`.

    Returns:
        The configuration with every default filled in, the layers' own options included.

    Raises:
        ConfigError: with all problems, each as `file:line: key.path = value: reason`.
    """
    path = find_config(path_or_name)
    name = str(path)
    try:
        with path.open("rb") as file:
            document = yaml.load(file.read(yaml.MAX_BYTES + 1))
    except OSError as error:
        raise ConfigError(name, [Problem(name, f"cannot be read: {error.strerror}")]) from None
    except yaml.YamlError as error:
        where = f"{name}:{error.line}:{error.column}"
        raise ConfigError(name, [Problem(where, error.message, error.line, error.picture)]) from None
    return _validate(Source(name, document.data, document.lines), overrides)


def parse_config(data: Mapping[str, Any], source: str = "config", overrides: Sequence[str] = ()) -> RunConfig:
    """The same for data that is already in memory; problems are told as `source: key.path = value:
    reason`."""
    return _validate(Source(source, copy.deepcopy(dict(data)), {}), overrides)


def find_config(path_or_name: str | FilePath) -> FilePath:
    """The file meant by a path or by the name of a shipped configuration.

    Raises:
        ConfigError: naming the shipped configurations and the nearest one.
    """
    path, name = FilePath(path_or_name), str(path_or_name)
    if path.is_file():
        return path
    known = config_names()
    for candidate in (name, name.removesuffix(".yaml"), name.removeprefix("configs/").removesuffix(".yaml")):
        if candidate in known:
            return configs_dir() / f"{candidate}.yaml"
    if (path / "config.yaml").is_file():
        text = f"the folder of a run; `--resume` goes on with it, its settings are in {path / 'config.yaml'}"
        raise ConfigError(name, [Problem(name, text)])
    what = "a folder, not a YAML file" if path.is_dir() else "no such file"
    close = nearest(name, known)
    hint = f". Did you mean {close!r}?" if close else ""
    shipped = f"; names that come with hybrid_lm: {', '.join(known)}" if known else ""
    raise ConfigError(name, [Problem(name, f"{what}{shipped}{hint}")])


class Source:
    """Data, and where each part of it was written: a line of a file or an override."""

    def __init__(self, name: str, data: dict[str, Any], lines: Mapping[Path, int]):
        self.name, self.data = name, data
        self.lines = dict(lines)
        self.origins: dict[Path, str] = {}

    def override(self, text: str) -> str | None:
        """Sets what `section.key=value` says; returns what is wrong with it, if anything is."""
        key, equals, written = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            return "an override is section.key=value"
        try:
            value = yaml.value(written)
        except yaml.YamlError as error:
            return error.message
        place: Any = self.data
        for depth, part in enumerate(path[:-1], start=1):
            if place.get(part) is None:
                place[part] = {}
                self.origins[path[:depth]] = text
            place = place[part]
            if not isinstance(place, dict):
                return f"{'.'.join(path[:depth])} is {show(place)}, which has no keys; set it as a whole"
        place[path[-1]] = value
        for known in (self.lines, self.origins):
            for inner in [inner for inner in known if inner[: len(path)] == path]:
                del known[inner]
        self.origins[path] = text
        return None

    def problem(self, finding: Finding) -> Problem:
        """A finding with the place where its key was written, or its section if the key is missing."""
        path, reason, picture = finding
        dotted, value = ".".join(str(part) for part in path), self.value(path)
        what = f"{dotted}: {reason}" if value is None else f"{dotted} = {value}: {reason}"
        for end in range(len(path), -1, -1):
            near = path[:end]
            if near in self.origins:
                return Problem(
                    f"override {self.origins[near]}", reason if near == path else what, picture=picture
                )
            if near in self.lines:
                return Problem(f"{self.name}:{self.lines[near]}", what, self.lines[near], picture)
        where = f"{self.name}:1" if self.lines else self.name
        return Problem(where, what, 1, picture)

    def value(self, path: Path) -> str | None:
        """What stands at a path, as text; None if nothing does."""
        place: Any = self.data
        for part in path:
            try:
                place = place[part]
            except (KeyError, IndexError, TypeError):
                return None
        return show(place)


def _validate(source: Source, overrides: Sequence[str]) -> RunConfig:
    problems = []
    for text in overrides:
        if wrong := source.override(text):
            problems.append(Problem(f"override {text}", wrong))
    if source.data.get("init_from") is not None and (unfilled := fill(source.data)):
        # Without the imported model there is nothing to judge the rest by.
        raise ConfigError(source.name, problems + [source.problem(finding) for finding in unfilled])
    model = source.data.get("model")
    recipes = Recipes(model if isinstance(model, dict) else {})
    findings = list(recipes.findings)
    config = None
    try:
        config = RunConfig.model_validate(source.data)
        findings += _across(config)
    except ValidationError as error:
        findings += explain(RunConfig, source.data, error)
    problems += [source.problem(finding) for finding in findings]
    if problems or config is None:
        raise ConfigError(source.name, problems)
    return _resolve(config, recipes)


def _resolve(config: RunConfig, recipes: Recipes) -> RunConfig:
    """The configuration with the layers' defaults written into their recipes."""
    layers = {
        name: recipe.model_copy(update=recipes.options[name].model_dump())
        for name, recipe in config.model.layers.items()
    }
    return config.model_copy(update={"model": config.model.model_copy(update={"layers": layers})})


def _across(config: RunConfig) -> list[Finding]:
    """What single fields cannot know: keys that need each other."""
    found, embedding, data = [], config.model.embedding, config.data
    if embedding.positions == "learned" and embedding.max_positions is None:
        reason = "missing; learned positions need it: the longest sequence in tokens"
        found.append(Finding(("model", "embedding", "max_positions"), reason))
    if isinstance(data, ProbeData):
        probes = table("probe")
        if data.probe not in probes:
            found.append(Finding(("data", "probe"), unknown("probe", data.probe, probes)))
        return found
    longest = embedding.max_positions
    if embedding.positions == "learned" and longest is not None and data.seq_len > longest:
        reason = f"longer than the {longest} learned positions (model.embedding.max_positions)"
        found.append(Finding(("data", "seq_len"), reason))
    needed = {"huggingface": "path", "bpe": "vocab_size"}.get(data.tokenizer.kind)
    if needed and getattr(data.tokenizer, needed) is None:
        reason = f"missing; a tokenizer of kind {data.tokenizer.kind} needs it"
        found.append(Finding(("data", "tokenizer", needed), reason))
    return found
