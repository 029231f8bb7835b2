"""Safetensors files of any size, one tensor in memory at a time.

The format: the header's length (8 bytes, little-endian), the header (JSON: key -> dtype, shape, place), the
tensors' bytes one after another. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

MAPPED = 64 * 2**20
"""Bytes of a file that may stay in memory once they have been read."""
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for. They are views of the file: copy what is kept.

    Raises OSError or SafetensorError for a file that cannot be read.
    """

    def __init__(self, path: Path):
        self.path, self._read = path, 0
        self._file: Any = safe_open(path, framework="pt")
        self._keys = frozenset(self._file.keys())

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        if self._read > MAPPED:
            # What has been read stays in memory for as long as the file is open.
            self._file, self._read = safe_open(self.path, framework="pt"), 0
        x = self._file.get_tensor(key)
        self._read += x.nbytes
        return x

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def write(path: Path, shapes: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes a file. shapes: a tensor on `meta` for each key, in the order in which `tensors` come, those of
    wide types first (so that each begins at a multiple of its element's size)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, x in shapes.items():
        place = [end, end := end + x.nbytes]
        header[key] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (key, x), (wanted, meta) in zip(tensors, shapes.items(), strict=True):
            assert (key, x.shape, x.dtype) == (wanted, meta.shape, meta.dtype)
            file.write(x.detach().contiguous().flatten().view(torch.uint8).numpy().data)
