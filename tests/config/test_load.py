"""The configuration edge: files, shipped names and overrides in, one report of all problems out."""

import copy
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_lm.config import load as edge
from hybrid_lm.config.load import (
    ConfigError,
    architecture_hash,
    configs_dir,
    dump_yaml,
    load_config,
    parse_config,
)

GOOD = """\
model:
  d_model: 64
  pattern: (m f a f)x2
  layers:
    m: {type: mamba2, d_state: 16, head_dim: 16}
    a: {type: attention, n_heads: 4, n_kv_heads: 2, rope: {theta: 10000}}
    f: {type: mlp, d_ff: 128}
train:
  optimizer: {lr: 3e-4}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes run.yaml into the current folder, so that reports begin with the bare name."""
    monkeypatch.chdir(tmp_path)

    def write_file(text):
        (tmp_path / "run.yaml").write_text(text)
        return "run.yaml"

    return write_file


def report(name, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(name, overrides)
    return str(caught.value)


def test_a_good_file(write):
    config = load_config(write(GOOD))
    assert config.model.d_model == 64
    assert config.train.optimizer.lr == 3e-4
    assert config.model.layers["a"].options["n_kv_heads"] == 2
    # The layer's own defaults are filled in, nested ones too.
    assert config.model.layers["a"].options["rope"]["theta"] == 10000.0
    assert config.model.layers["a"].options["window"] is None


def test_the_whole_report(write):
    bad = """\
# comment
model:
  d_modle: 64
  d_model: 0
  pattern: (m f q)x2
  layers:
    m: {type: mamba2, d_stat: 16}
    f: {type: mlpp}
  head:
    softcap: -1
train:
  steps: 1e3
  batch_size: true
  precision: bf61
  optimizer: {betas: [0.9, 2]}
  compile: yes
foo: [1, 2]
"""
    lines = report(write(bad)).split("\n")
    # Lists of known keys grow with the layers, so that only their ends are compared.
    expected = [
        ("run.yaml: 12 problems", ""),
        (
            "  run.yaml:3: model.d_modle = 64: unknown key; known: block, d_model, depth,",
            "Did you mean 'd_model'?",
        ),
        ("  run.yaml:4: model.d_model = 0: must be greater than 0", ""),
        ("  run.yaml:5: model.pattern = '(m f q)x2': unknown layer 'q'; known: f, m (column 6)", ""),
        ("      (m f q)x2", ""),
        ("           ^", ""),
        ("  run.yaml:7: model.layers.m.d_stat = 16: unknown key; known: ", "Did you mean 'd_state'?"),
        ("  run.yaml:8: model.layers.f.type = 'mlpp': unknown layer 'mlpp'; known: ", "Did you mean 'mlp'?"),
        ("  run.yaml:10: model.head.softcap = -1: must be greater than 0", ""),
        ("  run.yaml:12: train.steps = 1000.0: must be a whole number; write 1000", ""),
        ("  run.yaml:13: train.batch_size = true: must be a whole number", ""),
        ("  run.yaml:14: train.precision = 'bf61': must be 'float32' or 'bf16'. Did you mean 'bf16'?", ""),
        ("  run.yaml:15: train.optimizer.betas.1 = 2: must be less than or equal to 1", ""),
        ("  run.yaml:16: train.compile = 'yes': must be true or false; write true", ""),
        ("  run.yaml:17: foo = [1, 2]: unknown key; known: data, init_from, model, train", ""),
    ]
    assert len(lines) == len(expected)
    for line, (start, end) in zip(lines, expected, strict=True):
        assert line.startswith(start)
        assert line.endswith(end)


LEARNED_64 = "  embedding: {positions: learned, max_positions: 64}\n"


def changed(changes):
    """GOOD with some of its text replaced."""
    text = GOOD
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"  d_model: 64\n": ""}, "run.yaml:1: model.d_model: missing"),
        ({"type: mlp, ": ""}, "run.yaml:7: model.layers.f.type: missing"),
        ({"lr: 3e-4": "lr: fast"}, "run.yaml:9: train.optimizer.lr = 'fast': must be a number"),
        ({"lr: 3e-4": "lr: 1_0"}, "run.yaml:9: train.optimizer.lr = '1_0': must be a number; write 10"),
        (
            {"train:\n  optimizer: {lr: 3e-4}": "train: 3"},
            "run.yaml:8: train = 3: must be a mapping of keys to values",
        ),
        (
            {"d_ff: 128": "d_ff: 128, share: 3"},
            "run.yaml:7: model.layers.f.share = 3: must be true or false or a mapping of keys",
        ),
        (
            {"d_ff: 128": "d_ff: 128, share: {copys: 2}"},
            "run.yaml:7: model.layers.f.share.copys = 2: unknown key; known: copies, norms. "
            "Did you mean 'copies'?",
        ),
        (
            {"d_ff: 128": "d_ff: 128, per_call: {out_proj: true}"},
            "only a shared recipe has calls; add share: true",
        ),
        (
            {"d_ff: 128}": "d_ff: 128}\n    g: {type: mlp}"},
            "nothing names it; take it out, or begin its name with '_'",
        ),
        ({"n_heads: 4": "n_heads: 6"}, "run.yaml:6: model.layers.a.n_heads = 6: "),
        ({"theta: 10000": "thet: 1"}, "Did you mean 'theta'?"),
        ({"pattern: (m f a f)x2": "pattern: NO"}, "run.yaml:3: model.pattern = 'NO': unknown layer 'NO'"),
        (
            {"pattern: (m f a f)x2": "pattern: m f a ..."},
            "'...' needs the number of layers: set depth (column 7)",
        ),
        (
            {"pattern: (m f a f)x2": "pattern: (m f a f)x2\n  depth: 9"},
            "the pattern has 8 layers, but depth is 9 (column 1)",
        ),
        (
            {"train:": "data: {path: x}\ntrain:"},
            "run.yaml:8: data.kind: missing; must be one of 'text', 'probe'",
        ),
        (
            {"train:": "data: {kind: txt}\ntrain:"},
            "run.yaml:8: data.kind = 'txt': must be one of 'text', 'probe'. Did you mean 'text'?",
        ),
        (
            {"train:": "data: {kind: text, pth: x}\ntrain:"},
            "run.yaml:8: data.pth = 'x': unknown key; known: kind, packing, path, seq_len, tokenizer. Did",
        ),
        (
            {"train:": "data: {kind: text, tokenizer: {kind: bpe}}\ntrain:"},
            "run.yaml:8: data.tokenizer.vocab_size: missing; a tokenizer of kind bpe needs it",
        ),
        (
            {"train:": "  embedding: {positions: learned}\ntrain:"},
            "run.yaml:8: model.embedding.max_positions: missing; learned positions need it",
        ),
        (
            {"train:": LEARNED_64 + "data: {kind: text, seq_len: 65}\ntrain:"},
            "run.yaml:9: data.seq_len = 65: longer than the 64 learned positions",
        ),
    ],
)
def test_one_problem(write, changes, expected):
    told = report(write(changed(changes)))
    assert expected in told
    assert "problems" not in told  # one mistake is told once


def test_a_name_that_a_pattern_cannot_say(write):
    told = report(write(GOOD.replace("f: {type", "x2: {type")))
    assert "'x' and 'x3' mean repeats in a pattern and cannot name a layer" in told


def test_yaml_faults_have_line_column_and_caret(write):
    assert report(write(GOOD + "model: 3\n")) == (
        "run.yaml:10:1: the key 'model' stands twice; first in line 1\n"  #
        "  model: 3\n"
        "  ^"
    )


def test_a_recipe_may_wait_unused_under_an_underscore(write):
    config = load_config(write(GOOD.replace("d_ff: 128}", "d_ff: 128}\n    _g: {type: mlp}")))
    assert "_g" in config.model.layers


COMPOSITE = """\
model:
  d_model: 32
  pattern: m z
  layers:
    m: {type: mamba2, d_state: 8, head_dim: 16}
    s: {type: attention, n_heads: 4, share: true}
    z: {type: inject, block: s, into: m}
"""


def test_recipes_inside_recipes_count_as_used(write):
    assert load_config(write(COMPOSITE)).model.layers["z"].options["block"] == "s"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("block: s", "block: s q", "run.yaml:7: model.layers.z.block = 's q': unknown layer 'q'"),
        (
            "into: m",
            "into: z",
            "run.yaml:7: model.layers.z.into = 'z': a recipe cannot contain itself: z -> z",
        ),
        # The block reads the stream beside the embeddings: 64 wide, so that a head has 9 1/7.
        ("n_heads: 4", "n_heads: 7", "run.yaml:6: model.layers.s.n_heads = 7: "),
    ],
)
def test_recipes_inside_recipes_are_checked(write, old, new, expected):
    assert expected in report(write(COMPOSITE.replace(old, new)))


def test_overrides(write):
    name = write(GOOD)
    config = load_config(
        name,
        [
            "model.d_model=128",
            "model.pattern=(m f)x3 a f",
            "train.optimizer={lr: 1e-2, betas: [0.8, 0.9]}",
            "train.schedule.warmup_steps=10",
            "model.layers.a.rope=null",
            "train.steps=1",
            "train.steps=2",
        ],
    )
    assert config.model.d_model == 128
    assert config.model.pattern == "(m f)x3 a f"
    assert config.train.optimizer.lr == 1e-2
    assert config.train.optimizer.betas == (0.8, 0.9)
    assert config.train.schedule.warmup_steps == 10
    assert config.model.layers["a"].options["rope"] is None
    assert config.train.steps == 2  # the last one counts


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.d_modle=512", "override model.d_modle=512: unknown key; known: block, d_model,"),
        ("train.steps=1e3", "override train.steps=1e3: must be a whole number; write 1000"),
        ("model.d_model", "override model.d_model: an override is section.key=value"),
        ("=3", "override =3: an override is section.key=value"),
        ("a..b=3", "override a..b=3: an override is section.key=value"),
        (
            "model.d_model.x=3",
            "override model.d_model.x=3: model.d_model is 64, which has no keys; set it as a whole",
        ),
        ("train.steps=[1", "override train.steps=[1: while parsing a flow sequence: expected ',' or ']'"),
        ("model.layers.q.window=3", "override model.layers.q.window=3: model.layers.q.type: missing"),
        ("model.layers.m.type=mamba3", "override model.layers.m.type=mamba3: unknown layer 'mamba3'"),
        (
            "model.layers={m: {type: mamba2, d: 1}}",
            "override model.layers={m: {type: mamba2, d: 1}}: model.layers.m.d = 1: unknown key",
        ),
        (
            "model.pattern=(m f",
            "override model.pattern=(m f: '(' is never closed (column 1)\n    (m f\n    ^",
        ),
    ],
)
def test_an_override_is_named_itself(write, override, expected):
    assert expected in report(write(GOOD), [override])


def test_data_in_memory(write):
    data = {"model": {"d_model": 8, "pattern": "f", "layers": {"f": {"type": "mlp", "d_ff": "x"}}}}
    with pytest.raises(ConfigError) as caught:
        parse_config(data, source="config.json")
    assert str(caught.value) == "config.json: model.layers.f.d_ff = 'x': must be a whole number"
    data["model"]["layers"]["f"]["d_ff"] = 16
    assert parse_config(data, overrides=["model.d_model=4"]).model.d_model == 4
    assert data["model"]["d_model"] == 8  # the caller's data stays as it was
    with pytest.raises(ConfigError, match="config: model: missing"):
        parse_config({})
    with pytest.raises(ConfigError, match=r"config: model\.layers\.1"):
        parse_config({"model": {**data["model"], "layers": {1: {"type": "mlp"}}}})
    assert issubclass(ConfigError, ValueError)


BASE = {
    "model": {
        "d_model": 32,
        "pattern": "m (z f)x2",
        "layers": {
            "m": {"type": "mamba2", "d_state": 8, "head_dim": 16},
            "s": {"type": "attention", "n_heads": 4, "rope": {"theta": 100.0}, "share": {"copies": 2}},
            "z": {"type": "inject", "block": "s", "into": "m"},
            "f": {"type": "mlp", "d_ff": 8, "residual": {"norm": "layernorm"}},
        },
        "embedding": {"positions": "learned", "max_positions": 300},
    },
    "data": {"kind": "text", "tokenizer": {"kind": "bytes"}},
    "train": {"optimizer": {"betas": [0.9, 0.95]}, "backend": {"ssd": "torch"}},
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["m", "z", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def paths(data, path=()):
    yield path
    if isinstance(data, dict):
        for key, inner in data.items():
            yield from paths(inner, (*path, key))


@given(st.lists(st.tuples(st.sampled_from([*paths(BASE)][1:]), VALUES), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_any_value_anywhere_is_accepted_or_reported(changes):
    data = copy.deepcopy(BASE)
    for path, value in changes:
        place = data
        for part in path[:-1]:
            place = place.get(part) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place[path[-1]] = value
    try:
        config = parse_config(data)
    except ConfigError as error:
        told = str(error)
    else:
        told = dump_yaml(config)
    assert told


def test_an_unknown_probe(write):
    told = report(write(GOOD.replace("train:", "data: {kind: probe, probe: mqra}\ntrain:")))
    assert told.startswith("run.yaml:8: data.probe = 'mqra': unknown probe 'mqra'; known: ")
    assert told.endswith("Did you mean 'mqar'?")


def test_the_edge_needs_no_torch():
    code = "import sys, hybrid_lm.config.load, hybrid_lm.config.notation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Stands in for the folder of shipped configurations."""
    (tmp_path / "shipped/recall").mkdir(parents=True)
    for name in ("demo", "recall/mqar_small"):
        (tmp_path / f"shipped/{name}.yaml").write_text(GOOD)
    monkeypatch.setattr(edge, "configs_dir", lambda: tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("name", ["demo", "recall/mqar_small", "recall/mqar_small.yaml", "configs/demo.yaml"])
def test_shipped_names(name):
    assert load_config(name).model.d_model == 64


@pytest.mark.usefixtures("shipped")
def test_files_that_are_not_there(tmp_path):
    known = "names that come with hybrid_lm: demo, recall/mqar_small"
    assert report("recall/mqar_smal") == (
        f"recall/mqar_smal: no such file; {known}. Did you mean 'recall/mqar_small'?"
    )
    assert report("shipped") == f"shipped: a folder, not a YAML file; {known}"
    (tmp_path / "big.yaml").write_text("#" * 1_000_001)
    assert report("big.yaml") == (
        "big.yaml:1:1: larger than 1,000,000 bytes; a configuration is never that long"
    )


def test_the_shipped_folder_is_found():
    assert configs_dir().name == "configs"


def test_dump_loads_to_an_equal_config(write):
    for text in (GOOD, COMPOSITE):
        config = load_config(write(text))
        dumped = dump_yaml(config)
        again = load_config(write(dumped))
        assert again == config
        assert dump_yaml(again) == dumped
        assert architecture_hash(again) == architecture_hash(config)


@given(
    st.text(max_size=40)
    | st.sampled_from(["1e3", "0o7", "NO", "1_000", "12:30", "~", "", "*a", "a: b", "'"]),
    st.floats(allow_nan=False),
)
@settings(max_examples=200, deadline=None)
def test_dump_keeps_any_text_and_number(text, number):
    if any(ord(c) < 32 and c not in "\t\n" for c in text):
        text = "plain"
    config = parse_config(
        {
            "model": {
                "d_model": 8,
                "pattern": "f",
                "layers": {"f": {"type": "mlp", "d_ff": 8}},
                "embedding": {"multiplier": number},
            },
            "data": {"kind": "text", "path": text},
        }
    )
    document = edge.yaml.load(dump_yaml(config))
    again = parse_config(document.data)
    assert again == config
    assert math.copysign(1, again.model.embedding.multiplier) == math.copysign(1, number)


def hash_of(**changes):
    layers = {
        "m": {"type": "mamba2", "d_state": 8, "head_dim": 8},
        "f": {"type": "mlp", "d_ff": 16},
    }
    model = {"d_model": 16, "pattern": "m f m f", "layers": layers, **changes}
    return architecture_hash(parse_config({"model": model}))


def test_the_hash_sees_the_architecture_only():
    base = hash_of()
    m, f = {"type": "mamba2", "d_state": 8, "head_dim": 8}, {"type": "mlp", "d_ff": 16}
    assert len(base) == 64
    # the same model in other words
    assert hash_of(pattern="(m f)x2") == base
    assert hash_of(pattern="m f ...", depth=4) == base
    assert hash_of(pattern="(mix ff)x2", layers={"mix": m, "ff": f}) == base
    assert hash_of(layers={"f": {**f, "gated": True}, "m": m, "_unused": f}) == base
    assert hash_of(layers={"m": m, "f": {**f, "residual": {"eps": 1e-5}}}) == base
    assert hash_of(init={"std": 0.5}) == base
    # other models
    others = [
        hash_of(pattern="m f f m"),
        hash_of(pattern="(m f)x3"),
        hash_of(pattern="m+f m+f"),
        hash_of(d_model=32),
        hash_of(vocab_size=10),
        hash_of(final_norm=False),
        hash_of(layers={"m": {**m, "d_state": 4}, "f": f}),
        hash_of(layers={"m": m, "f": {**f, "share": True}}),
        hash_of(layers={"m": m, "f": {**f, "share": {"copies": 2}}}),
        hash_of(layers={"m": m, "f": {**f, "residual": {"eps": 1e-6}}}),
        hash_of(block={"placement": "post"}),
    ]
    assert len({base, *others}) == len(others) + 1


def test_the_hash_sees_which_occurrences_share():
    f = {"type": "mlp", "d_ff": 16, "share": True}
    one_set = hash_of(pattern="f f", layers={"f": f})
    two_sets = hash_of(pattern="f g", layers={"f": f, "g": f})
    assert one_set != two_sets


def test_the_hash_looks_into_parts(write):
    def composite(old, new):
        return architecture_hash(load_config(write(COMPOSITE.replace(old, new))))

    base = composite("", "")
    assert composite("n_heads: 4", "n_heads: 8") != base
    renamed = COMPOSITE.replace("s: {type: attention", "t: {type: attention").replace("block: s", "block: t")
    assert architecture_hash(load_config(write(renamed))) == base


def test_a_runs_folder_is_told_from_a_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {}")
    with pytest.raises(ConfigError, match="the folder of a run; `--resume` goes on with it"):
        load_config(tmp_path)
