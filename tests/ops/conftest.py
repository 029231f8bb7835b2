"""The fast backends, which every law of an op is put to."""

import pytest

from hybrid_lm.ops.native.library import why_not
from tests.ops.cases import FAST


@pytest.fixture(params=FAST)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend. A test of an op that has others names them, with `indirect`."""
    reason = why_not("cpu") if request.param == "native" else None
    if reason is not None:
        pytest.skip(f"no native library: {reason}")
    return request.param
