"""A plugin for pytest: the tests run on CUDA's kernels, emulated on the host, in the place of the CPU's.

    HYBRID_LM_NATIVE=<what `hybrid-lm build-native emulated` printed> \\
        python -m pytest -p tests.native.emulated tests/native -k scan

Tests that go through the instruction sets go through the orders in which threads can run.
"""

import pytest

from hybrid_lm.ops.native import causal_conv1d, library, selective_scan

ORDERS = ("emulated", "emulated backwards")
# What has nothing to do with a GPU: its kernels compute in float32 alone, and threads of the host run none.
ELSEWHERE = ("torch.float64", "x-f64", "all-sorts", "number_of_threads", "finite_differences", "of_gradients")
# What takes long, and what a few others show as well.
LONG = ("t80", "t70", "opcheck")


def pytest_configure() -> None:
    assert library.isa() in ORDERS, library.why_not("cpu") or library.isa()
    selective_scan.CHUNKS["cpu"] = selective_scan.CHUNKS["cuda"]
    selective_scan.NARROW.add("cpu")
    causal_conv1d.NARROW.add("cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not any(word in item.nodeid for word in (*ELSEWHERE, *LONG))]
