"""The first import of transformers runs through other people's code, whose warnings are not ours."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import hybrid_lm.hf.wrapper  # noqa: F401
