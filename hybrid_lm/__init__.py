"""hybrid_lm: state-space and hybrid sequence models, from a layer pattern in YAML to a trained, measured,
exported model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrid_lm.config.load import load_config
    from hybrid_lm.hf.convert import from_hf, to_hf
    from hybrid_lm.model.build import build_model
    from hybrid_lm.model.generate import generate
    from hybrid_lm.model.lm import HybridLM
    from hybrid_lm.train.checkpoint import load_checkpoint

__version__ = "0.1.0"

_PUBLIC = {
    "load_config": "hybrid_lm.config.load",
    "build_model": "hybrid_lm.model.build",
    "HybridLM": "hybrid_lm.model.lm",
    "generate": "hybrid_lm.model.generate",
    "load_checkpoint": "hybrid_lm.train.checkpoint",
    "from_hf": "hybrid_lm.hf.convert",
    "to_hf": "hybrid_lm.hf.convert",
}

__all__ = [  # noqa: RUF022 - in the order of the work
    "__version__",
    "load_config",
    "build_model",
    "HybridLM",
    "generate",
    "load_checkpoint",
    "from_hf",
    "to_hf",
]


def __getattr__(name: str) -> Any:
    # Looked up when first used: `import hybrid_lm` costs nothing, and the command line can complain about a
    # configuration before it has loaded torch.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hybrid_lm' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
