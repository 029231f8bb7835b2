"""What the tests of the native kernels share: the instruction sets that run here."""

from collections.abc import Iterator

import pytest
import torch

from hybrid_lm.ops.native import library
from tests.native.emulated import ORDERS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a library there are no kernels to test. (The building of one is tested without.)"""
    reason = library.why_not("cpu")
    without = ("test_build.py", "test_build_cuda.py", "test_emulation.py")
    for item in items:
        if item.path.parent.name == "native" and item.path.name not in without and reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"no native library: {reason}"))


@pytest.fixture
def isas() -> Iterator[list[str]]:
    """The instruction sets of the library that this processor has; a test goes through them by `use_isa`."""
    native = torch.ops.hybrid_lm_native
    yield [isa for isa in ("baseline", "avx2", "avx512", *ORDERS) if native.use_isa(isa)]
    native.use_isa("")
