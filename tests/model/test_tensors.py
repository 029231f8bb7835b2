"""Files of tensors: safetensors reads what is written here, and ours what it writes."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hybrid_lm.model import tensors
from hybrid_lm.model.tensors import TensorFile, write

KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SOME = {f"{kind}": torch.randn(3, 5).to(kind) for kind in KINDS}
SOME |= {"turned": torch.randn(4, 6).bfloat16().T, "empty": torch.zeros(0, 3, dtype=torch.bfloat16)}
SOME |= {"one": torch.tensor(2.5, dtype=torch.float16)}


def test_what_is_written_is_read_by_safetensors(tmp_path):
    write(tmp_path / "x", {key: x.to("meta") for key, x in SOME.items()}, SOME.items())
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    stored = load_file(tmp_path / "x")
    assert stored.keys() == SOME.keys()
    assert all(x.dtype == stored[key].dtype and torch.equal(x, stored[key]) for key, x in SOME.items())


@pytest.mark.parametrize("mapped", [0, 2**20])
def test_what_safetensors_writes_is_read(tmp_path, monkeypatch, mapped):
    # With 0 the file is opened anew before each tensor but the first.
    monkeypatch.setattr(tensors, "MAPPED", mapped)
    save_file({key: x.contiguous() for key, x in SOME.items()}, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    assert len(file) == len(SOME)
    kept = dict(file)
    assert all(torch.equal(kept[key], x) for key, x in SOME.items())
    assert "other" not in file


def test_what_was_not_announced_is_a_mistake_of_ours(tmp_path):
    shapes = {"a": torch.empty(3, device="meta")}
    for wrong in ({"a": torch.zeros(4)}, {"b": torch.zeros(3)}, {"a": torch.zeros(3).half()}):
        with pytest.raises(AssertionError):
            write(tmp_path / "x", shapes, wrong.items())
