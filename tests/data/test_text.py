import os
import re
import sys
from collections import Counter

import pytest

from hybrid_lm.data import documents


def test_the_standard_library_without_its_tests():
    texts = dict(documents("stdlib"))
    assert "json/decoder.py" in texts
    assert "class JSONDecoder" in texts["json/decoder.py"]
    assert list(texts) == sorted(texts, key=lambda name: name.split("/"))
    assert not [name for name in texts if {"test", "tests", "site-packages"} & set(name.split("/"))]
    # 11.3 to 12.1 MB on CPython 3.10 to 3.13; a distribution may leave some modules out.
    assert 8e6 < sum(len(text.encode()) for text in texts.values()) < 20e6


def test_a_text_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path):
    text = "".join(f"line {i} äöü\r\n" for i in range(20_000)) + "no newline at the end"
    file = tmp_path / "a.txt"
    file.write_bytes(text.encode())
    parts = list(documents(file))
    assert "".join(part.text for part in parts) == text
    assert all(part.text.endswith("\n") for part in parts[:-1])
    # A 200th of the file each, less the line that did not fit: at most 19 of some 1,900 bytes.
    assert 200 <= len(parts) <= 203
    sizes = [len(part.text.encode()) for part in parts]
    assert max(sizes) <= len(text.encode()) // 200
    assert [part.name for part in parts[:2]] == ["a.txt@0", f"a.txt@{sizes[0]}"]


@pytest.mark.parametrize(
    ("lines", "sizes"),
    [
        ([300], [300]),
        ([300, 10], [300, 10]),
        ([10, 300], [10, 300]),
        ([10] * 30, [150, 150]),
        # A kilobyte each from two kilobytes on.
        ([100] * 35, [1000, 1000, 1000, 500]),
        ([250_000, 10, 10], [250_000, 20]),
    ],
)
def test_short_files_and_long_lines(lines, sizes, tmp_path):
    (tmp_path / "a.txt").write_text("".join("x" * (n - 1) + "\n" for n in lines))
    assert [len(part.text) for part in documents(tmp_path / "a.txt")] == sizes


def test_jsonl_and_parquet_give_the_same_documents(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = ["one", "zwei\n\0", "", "三"]
    pq.write_table(pa.table({"text": texts, "id": [1, 2, 3, 4]}), tmp_path / "a.parquet", row_group_size=2)
    import json

    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps({"text": text, "n": 1}) for text in texts))
    skipped = Counter()
    kept = ["one", "zwei\n\0", "三"]
    assert [document.text for document in documents(tmp_path / "a.parquet", skipped)] == kept
    assert [document.text for document in documents(tmp_path / "a.jsonl", skipped)] == kept
    assert [document.name for document in documents(tmp_path / "a.jsonl")] == [
        "a.jsonl:1",
        "a.jsonl:3",
        "a.jsonl:7",
    ]
    assert skipped["empty"] == 2


def test_a_folder_is_sorted_and_what_is_left_out_is_counted(tmp_path):
    for name, data in {
        "b.md": b"B",
        "a/z.py": b"Z",
        "a/y.jsonl": b'{"text": "Y"}',
        "c.bin": b"\0\1",
        "d.latin1": b"\xe4",
        "e.txt": b"",
        ".secret": b"S",
        ".git/config": b"G",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    skipped = Counter()
    assert [tuple(d) for d in documents(tmp_path, skipped)] == [
        ("a/y.jsonl:1", "Y"),
        ("a/z.py", "Z"),
        ("b.md", "B"),
    ]
    assert skipped == {"hidden": 2, "not UTF-8 text": 2, "empty": 1, "not a file": 1}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "no text found (left out: nothing)"),
        ("a.txt", b"abc\0", "a NUL byte at offset 3"),
        # The second piece of the file: the offset counts from the file's start.
        ("a.txt", b"x" * 1999 + b"\nab\xff\n", "not UTF-8: byte 0xff at offset 2002"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl:2: not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not JSON"),
        ("a.jsonl", b'{"txt": "a", "id": 1}', "a.jsonl:1: no field 'text'; its fields: txt, id"),
        ("a.jsonl", b'{"text": 1}', "a.jsonl:1: 'text' is int, not a string"),
        (
            "a.jsonl",
            b'{"text": "a\\ud800"}',
            "a.jsonl:1: 'text' is not Unicode: half a surrogate pair at character 1",
        ),
        ("a.jsonl", b'["text"]', "a.jsonl:1: not a JSON object with a field 'text'"),
        ("a.parquet", b"PAR0", "a.parquet: "),
    ],
)
def test_bad_files_say_where_and_what(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        list(documents(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_the_column(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: no column 'text'; its columns: body"):
        list(documents(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet: row 1: 'text' is NoneType, not a string"):
        list(documents(tmp_path / "b.parquet"))


def test_parquet_without_pyarrow(monkeypatch, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs the package pyarrow: pip install 'hybrid_lm\[hf\]'"):
        list(documents(tmp_path / "a.parquet"))


def test_no_such_place(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder; the built-in corpus is called stdlib"):
        list(documents(tmp_path / "x"))
    (tmp_path / "only.bin").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"no text found \(left out: 1 not UTF-8 text\)"):
        list(documents(tmp_path))
