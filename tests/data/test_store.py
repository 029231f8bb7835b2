import errno
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hybrid_lm.config.schema import TextData, TokenizerConfig
from hybrid_lm.data import ByteTokenizer, StoreError, TokenStore, documents, open_or_prepare, prepare
from hybrid_lm.data import build as build_module
from hybrid_lm.data import encode as encode_module
from hybrid_lm.files import DiskError

BYTES = ByteTokenizer()


@pytest.fixture
def corpus(tmp_path):
    """Forty documents and one of them again; one spells the separator, one is longer than a page."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [f"document {i}: é {'x' * (100 + i)}\n" for i in range(38)] + ["<|endoftext|>", "long " * 2000]
    for i, text in enumerate([*texts, texts[7]]):
        (folder / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    return folder


def contents(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }


def test_a_store_holds_the_corpus(corpus, tmp_path):
    store = prepare(corpus, tmp_path / "store", BYTES, val_fraction=0.1)
    texts = {name: [BYTES.decode(ids) for ids in store.split(name).documents()] for name in ("train", "val")}
    assert sorted(texts["train"] + texts["val"]) == sorted(text for _, text in documents(corpus))
    # 40 different texts, a tenth held out; the text that is there twice is on one side only.
    assert len(set(texts["val"])) == 4
    assert not set(texts["train"]) & set(texts["val"])
    for name in ("train", "val"):
        split = store.split(name)
        # The text "<|endoftext|>" is not a separator: the EOTs are exactly the starts and the end.
        assert np.flatnonzero(split.tokens == BYTES.eot_id).tolist() == [*split.starts, len(split.tokens) - 1]
        assert split.doc_bytes.tolist() == [len(text.encode()) for text in texts[name]]
        assert (split.n_documents, split.n_tokens) == (len(texts[name]), split.n_bytes + len(texts[name]) + 1)
    assert store.meta["corpus"]["n_bytes"] == sum(store.split(name).n_bytes for name in ("train", "val"))
    assert store.tokenizer.name == "bytes"
    TokenStore.open(store.folder, verify=True)


def test_the_split_follows_the_text_not_its_name_or_place(corpus, tmp_path):
    first = prepare(corpus, tmp_path / "first", BYTES)
    for file in corpus.iterdir():
        file.rename(file.with_name(f"{99 - int(file.stem)}.md"))
    second = prepare(corpus, tmp_path / "second", BYTES)
    held_out = [{ids.tobytes() for ids in store.split("val").documents()} for store in (first, second)]
    assert held_out[0] == held_out[1]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_workers_change_no_byte(kind, corpus, tmp_path, monkeypatch):
    # Many small hand-overs, so that results could come back out of order.
    monkeypatch.setattr(encode_module, "BATCH_BYTES", 200)
    config = TokenizerConfig(kind=kind, vocab_size=270 if kind == "bpe" else None)
    one = prepare(corpus, tmp_path / "one", config, workers=1)
    two = prepare(corpus, tmp_path / "two", config, workers=2)
    assert contents(one.folder) == contents(two.folder)
    assert one.fingerprint == two.fingerprint


def test_a_script_that_processes_cannot_import_is_told_so(corpus, tmp_path):
    (tmp_path / "script.py").write_text(
        "from hybrid_lm.data import ByteTokenizer, prepare\n"
        f"prepare({str(corpus)!r}, {str(tmp_path / 'store')!r}, ByteTokenizer(), workers=2)\n"
    )
    root = Path(encode_module.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 1
    assert "without `if __name__ == '__main__':`); workers=1 needs no processes" in run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "script.py"]


def test_a_bpe_learns_from_the_training_documents_only(corpus, tmp_path):
    (corpus / "rare.txt").write_text("zqzq " * 2500)
    held = {"train": 0, "val": 0}
    for val_fraction in (0.02, 0.98):
        store = prepare(
            corpus,
            tmp_path / f"s{val_fraction}",
            TokenizerConfig(kind="bpe", vocab_size=400),
            val_fraction=val_fraction,
        )
        in_val = any("zqzq" in store.tokenizer.decode(ids) for ids in store.split("val").documents())
        held["val" if in_val else "train"] += 1
        # By far the most frequent word where it was seen, four bytes each where it was not.
        assert len(store.tokenizer.encode("zqzq zqzq")) == (9 if in_val else 2)
    assert held == {"train": 1, "val": 1}


def test_a_large_vocabulary_takes_four_bytes(corpus, tmp_path):
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = 2**16 + 1
    assert prepare(corpus, tmp_path / "store", tokenizer).split("val").tokens.dtype == np.dtype("<u4")


def test_progress_counts_every_byte(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "BATCH_BYTES", 500)
    calls = []
    store = prepare(
        corpus, tmp_path / "store", BYTES, progress=lambda done, total: calls.append((done, total))
    )
    total = store.meta["corpus"]["n_bytes"]
    assert calls[-1] == (total, total)
    assert len(calls) > 2
    assert calls == sorted(calls)


def test_too_few_documents(tmp_path):
    (tmp_path / "a.txt").write_text("short\n")
    message = (
        r"a.txt: 1 document\(s\), 1 different; a train and a val split need at least 2 different ones: give "
    )
    message += r"more text, text with line breaks \(where a file is cut\), or a folder of files$"
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "a.txt", tmp_path / "store", BYTES)
    assert not (tmp_path / "store").exists()


def test_too_little_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("first line\nsecond line\n")
    message = (
        r"a.txt: 1[12] of 23 bytes would be held out, too few to judge a model on; give more text, or hold"
    )
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "a.txt", tmp_path / "store", BYTES)
    # Whichever of the two is held out is long enough.
    (tmp_path / "a.txt").write_text("a" * 99 + "\n" + "b" * 199 + "\n")
    store = prepare(tmp_path / "a.txt", tmp_path / "store", BYTES)
    assert [store.split(name).n_documents for name in ("train", "val")] == [1, 1]


def test_notes_say_what_became_of_the_text(corpus, tmp_path):
    assert prepare(corpus, tmp_path / "clean", BYTES).notes == []
    (corpus / ".hidden").write_text("h")
    (corpus / "a.bin").write_bytes(b"\0")
    (corpus / "b.latin1").write_bytes(b"\xe4")
    assert prepare(corpus, tmp_path / "folder", BYTES).notes == [
        "left out of corpus: 1 hidden, 2 not UTF-8 text"
    ]
    (tmp_path / "a.txt").write_text("".join(f"{i} some line of text\n" for i in range(20_000)))
    store = prepare(tmp_path / "a.txt", tmp_path / "file", BYTES)
    (note,) = store.notes
    assert re.fullmatch(r"a.txt is one file: it was cut at line ends into 2\d\d documents, of which .*", note)
    # A twentieth: enough documents for statistics over them.
    assert store.split("val").n_documents == 10


@pytest.mark.parametrize(
    ("made", "asked", "wanted", "has"),
    [
        ({"kind": "bytes"}, {"kind": "bpe", "vocab_size": 270}, "bpe-270", "bytes"),
        ({"kind": "bytes"}, {"kind": "huggingface", "path": "some/name"}, "huggingface some/name", "bytes"),
        ({"kind": "bpe", "vocab_size": 270}, {"kind": "bpe", "vocab_size": 290}, "bpe-290", "bpe-270"),
    ],
)
def test_a_store_of_another_tokenizer_is_refused(made, asked, wanted, has, corpus, tmp_path):
    path = str(prepare(corpus, tmp_path / "store", TokenizerConfig(**made)).folder)
    message = re.escape(
        f"data.tokenizer asks for {wanted}, but data.path = {path} is a token store made with {has};"
    )
    with pytest.raises(ValueError, match=message):
        open_or_prepare(TextData(path=path, tokenizer=TokenizerConfig(**asked)), tmp_path / "unused")
    # A run's own configuration writes the default out, and a store has its own tokenizer.
    for fine in (TokenizerConfig(), TokenizerConfig(**made)):
        assert open_or_prepare(TextData(path=path, tokenizer=fine), tmp_path / "unused").tokenizer.name == has


def test_nothing_is_overwritten_without_being_asked(corpus, tmp_path):
    out = tmp_path / "store"
    old = prepare(corpus, out, BYTES).fingerprint
    (corpus / "new.txt").write_text("new")
    with pytest.raises(
        StoreError, match="a token store is already there; choose another place, or say overwrite"
    ):
        prepare(corpus, out, BYTES)
    assert TokenStore.open(out, verify=True).fingerprint == old
    assert prepare(corpus, out, BYTES, overwrite=True).fingerprint != old

    with pytest.raises(StoreError, match="not empty and no token store"):
        prepare(corpus, tmp_path, BYTES, overwrite=True)
    with pytest.raises(StoreError, match="a file is in the way"):
        prepare(corpus, corpus / "00.txt", BYTES, overwrite=True)
    with pytest.raises(StoreError, match="inside the corpus"):
        prepare(corpus, corpus / "store", BYTES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "store"]


@pytest.mark.parametrize("before", ["nothing", "store"])
def test_a_broken_off_run_leaves_what_was_there(before, corpus, tmp_path):
    out = tmp_path / "store"
    old = prepare(corpus, out, BYTES).fingerprint if before == "store" else None
    names = sorted(path.name for path in tmp_path.iterdir())
    (corpus / "new.txt").write_text("new")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, out, BYTES, overwrite=True, progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    if old:
        assert TokenStore.open(out, verify=True).fingerprint == old


def test_a_full_disk_is_one_error_and_leaves_nothing(corpus, tmp_path):
    (corpus / "big.txt").write_text("word " * 50_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel refuses to let a file grow past the limit, as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DiskError, match=r"cannot write a token store in .*: File too large$") as caught:
            prepare(corpus, tmp_path / "store", BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_place_that_cannot_be_made(corpus, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file/a/store: .*/file is a file; choose another place"):
        prepare(corpus, tmp_path / "file" / "a" / "store", BYTES)
    # The tests may run as root, for whom only a read-only file system is read-only.
    monkeypatch.setattr(build_module.os, "access", lambda path, mode: False)
    with pytest.raises(DiskError, match="read-only or not yours"):
        prepare(corpus, tmp_path / "a" / "store", BYTES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "file"]


def test_text_that_changes_between_the_readings(corpus, tmp_path, monkeypatch):
    true_survey = build_module.survey

    def survey_then_change(path, val_fraction):
        result = true_survey(path, val_fraction)
        (corpus / "05.txt").write_text("other")
        return result

    monkeypatch.setattr(build_module, "survey", survey_then_change)
    with pytest.raises(ValueError, match="the text changed while it was read"):
        prepare(corpus, tmp_path / "store", BYTES)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["train.bin", "val.idx.npy", "tokenizer/hybrid_lm.json"])
def test_any_damage_is_found(name, corpus, tmp_path):
    folder = prepare(corpus, tmp_path / "store", BYTES).folder
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StoreError, match=re.escape(f"{path}: its SHA-256 is not the one on record")):
        TokenStore.open(folder, verify=True)
    path.write_bytes(data[:-1])
    with pytest.raises(StoreError, match=re.escape(f"{path}: {len(data) - 1} bytes, {len(data)} on record")):
        TokenStore.open(folder)
    path.unlink()
    with pytest.raises(StoreError, match=re.escape(f"{path}: missing")):
        TokenStore.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "store.json: damaged"),
        ("[]", "store.json: damaged"),
        ({"format": 99}, "format 99, this version reads format 1"),
        ({"files": {}}, "store.json: damaged"),
        ({"files": {"../corpus/00.txt": {"bytes": 1, "sha256": ""}}}, "leads out of the store"),
        ({"dtype": "O"}, "neither <u2 nor <u4"),
        ({"splits": {"train": {"n_tokens": 7, "n_documents": 1}}}, "do not hold 7 uint16 tokens"),
        ({"tokenizer": None}, "store.json: damaged"),
    ],
)
def test_a_damaged_record(change, message, corpus, tmp_path):
    folder = prepare(corpus, tmp_path / "store", BYTES).folder
    record = folder / "store.json"
    if isinstance(change, dict):
        change = json.dumps(json.loads(record.read_text()) | change)
    record.write_text(change)
    with pytest.raises(StoreError, match=re.escape(message)):
        TokenStore.open(folder)


def test_places_that_are_no_store(tmp_path):
    with pytest.raises(StoreError, match="no such token store; hybrid-lm prepare makes one"):
        TokenStore.open(tmp_path / "x")
    with pytest.raises(StoreError, match=r"it has no store.json"):
        TokenStore.open(tmp_path)


def test_a_run_reuses_its_store_until_text_or_tokenizer_change(corpus, tmp_path):
    folder, data = tmp_path / "store", TextData(path=str(corpus))
    first = open_or_prepare(data, folder)
    made = (folder / "store.json").stat().st_mtime_ns
    assert open_or_prepare(data, folder).fingerprint == first.fingerprint
    assert open_or_prepare(TextData(path=str(folder)), tmp_path / "unused").folder == folder
    assert (folder / "store.json").stat().st_mtime_ns == made
    assert not (tmp_path / "unused").exists()

    bpe = data.model_copy(update={"tokenizer": TokenizerConfig(kind="bpe", vocab_size=270)})
    assert open_or_prepare(bpe, folder).tokenizer.name == "bpe-270"
    (corpus / "new.txt").write_text("new")
    assert open_or_prepare(data, folder).meta["corpus"]["n_documents"] == 42
    (folder / "train.bin").write_bytes(b"")
    assert TokenStore.open(open_or_prepare(data, folder).folder, verify=True).split("train").n_documents > 30
