import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_lm.config.schema import TokenizerConfig
from hybrid_lm.data import ByteTokenizer, HFTokenizer, load_tokenizer, make_tokenizer, train_bpe

TEXTS = ["the cat sat on the mat\n" * 20, "def f(x):\n    return x\n" * 20, "Ärger über Öl 漢字 😀" * 5]
NASTY = "a  é\t漢\x00\x7f <|endoftext|><|pad|> 😀 .\r\n ,' "
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 300)


@given(UNICODE)
def test_bytes_are_utf8_and_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tobytes() == text.encode()
    assert tokenizer.decode(ids) == text


@settings(deadline=None)
@given(text=UNICODE | st.sampled_from([NASTY, "<|endoftext|>", "<|pad|>"]))
def test_bpe_round_trips_and_text_never_yields_specials(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert not np.isin(ids, [bpe.eot_id, bpe.pad_id]).any()


def test_decode_leaves_specials_out_and_marks_broken_utf8(bpe):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([tokenizer.eot_id, 0x41, tokenizer.pad_id, 0xFF]) == "A�"
    assert bpe.decode([bpe.eot_id, *bpe.encode("cat"), bpe.pad_id]) == "cat"


def test_bytes_need_no_optional_package(monkeypatch, tmp_path):
    for package in ("tokenizers", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    tokenizer = make_tokenizer(TokenizerConfig())
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match=r"needs the package tokenizers: pip install 'hybrid_lm\[hf\]'"):
        train_bpe(TEXTS, 300)


def test_bpe_is_the_same_every_time_and_after_saving(bpe, tmp_path):
    assert train_bpe(TEXTS, 300).fingerprint == bpe.fingerprint
    assert train_bpe(TEXTS, 299).fingerprint != bpe.fingerprint
    bpe.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.name, loaded.vocab_size, loaded.fingerprint) == ("bpe-300", 300, bpe.fingerprint)
    np.testing.assert_array_equal(loaded.encode(NASTY), bpe.encode(NASTY))


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_hf_form_gives_the_same_ids_in_a_program_that_knows_only_transformers(kind, bpe, tmp_path):
    from transformers import AutoTokenizer

    ours = ByteTokenizer() if kind == "bytes" else bpe
    ours.to_hf(max_length=512).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [NASTY, *TEXTS, ""]:
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
        assert theirs.decode(ours.encode(text)) == text
    assert (theirs.vocab_size, len(theirs)) == (ours.vocab_size, ours.vocab_size)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (
        ours.eot_id,
        ours.eot_id,
        ours.pad_id,
    )
    assert theirs.model_max_length == 512


def test_any_hf_tokenizer_survives_the_store(bpe, tmp_path):
    bpe.to_hf(max_length=64).save_pretrained(tmp_path / "theirs")
    # A saved truncation must not cut documents.
    file = tmp_path / "theirs" / "tokenizer.json"
    saved = json.loads(file.read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(saved))

    tokenizer = make_tokenizer(TokenizerConfig(kind="huggingface", path=str(tmp_path / "theirs")))
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot_id) == ("theirs", 300, bpe.eot_id)
    np.testing.assert_array_equal(tokenizer.encode(NASTY), bpe.encode(NASTY))
    tokenizer.save(tmp_path / "ours")
    loaded = load_tokenizer(tmp_path / "ours")
    assert (loaded.name, loaded.fingerprint) == ("theirs", tokenizer.fingerprint)
    assert loaded.to_hf(max_length=77).model_max_length == 77


def test_a_hub_that_cannot_be_reached_is_tried_once(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def unreachable(self, name, timeout):
        asked.append(name)
        raise ConnectionError("no route\nat all")

    monkeypatch.setattr(hub.HfApi, "model_info", unreachable)
    message = (
        "^tokenizer nobody/nothing: no such folder, and not to be had from the Hugging Face hub: no route$"
    )
    with pytest.raises(ValueError, match=message):
        HFTokenizer("nobody/nothing")
    assert asked == ["nobody/nothing"]
    # What can only be a folder is not sought on a network.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/tokenizer", "a/b/c", "../x", "~/x", tmp_path / "x"):
        with pytest.raises(ValueError, match=r"no such folder$"):
            HFTokenizer(path)
    assert len(asked) == 1


def test_a_tokenizer_without_an_end_token_is_refused(bpe, tmp_path):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=bpe.backend).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no eos_token, which separates documents"):
        HFTokenizer(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "bytes", "path": "gpt2"}, "tokenizer.path: kind bytes does not take it"),
        ({"kind": "huggingface"}, "tokenizer.path: kind huggingface needs it"),
        ({"kind": "bpe"}, "tokenizer.vocab_size: kind bpe needs it"),
        (
            {"kind": "bpe", "vocab_size": 257},
            "tokenizer.vocab_size = 257: 256 bytes and 2 specials need at least 258",
        ),
        ({"kind": "huggingface", "path": "./nowhere"}, "tokenizer ./nowhere: no such folder"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_tokenizer(TokenizerConfig(**options))


@pytest.mark.parametrize(
    "saved", [None, "{", "[]", '{"kind": "morse", "name": "x"}', '{"kind": "bpe", "name": "x"}']
)
def test_a_damaged_folder_is_one_error(saved, tmp_path):
    if saved is not None:
        (tmp_path / "hybrid_lm.json").write_text(saved)
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
