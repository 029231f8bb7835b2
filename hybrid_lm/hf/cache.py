"""The memory that `generate` carries from call to call: our states as a cache of `transformers`."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hybrid_lm.model.lm import HybridLM, ModelState


class HybridLMCache(Cache):
    """A model's memory between calls: a `ModelState`, made at the first call, when the batch is known.

    max_tokens   room to reserve where memory grows with length
    fixed        never more than that: `cache_implementation="static"`
    """

    # The memory grows in Python, so generate must not try to compile its steps.
    is_compileable = False  # pyright: ignore[reportAssignmentType] - a property there
    # A recurrence cannot be run backwards; the property of transformers asks its own layers, and none object.
    is_croppable = False  # pyright: ignore[reportAssignmentType]

    def __init__(self, max_tokens: int | None = None, fixed: bool = False):
        super().__init__(layers=[])
        self.state: ModelState | None = None
        self.max_tokens, self.fixed = max_tokens, fixed

    def __bool__(self) -> bool:
        # `len` counts transformers' own cache layers, of which there are none.
        return True

    def __repr__(self) -> str:
        return f"HybridLMCache({self.get_seq_length()} tokens)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return 0 if self.state is None else self.state.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that there is room for; -1 if it grows."""
        return self.max_tokens if self.fixed and self.max_tokens is not None else -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of a mask over all tokens up to the end of a call of `query_length` tokens."""
        return self.get_seq_length() + query_length, 0

    def begin(self, model: HybridLM, rows: Tensor) -> ModelState:
        """The state before a call on tokens or embeddings (b t ...). ValueError if they do not fit."""
        b, t = rows.shape[:2]
        if self.state is None:
            self.state = model.empty_state(b, max_tokens=self.max_tokens)
            if any(x.is_meta for x in self.state.tensors().values()):
                # Weights that are fetched when they are needed cannot say where.
                self.state = self.state.map(
                    lambda _, x: x if x is None else torch.zeros_like(x, device=rows.device)
                )
        longest = self.get_max_length()
        if 0 <= longest < self.state.seen + t:
            raise ValueError(
                f"{self.state.seen + t} tokens, but this static cache has room for {longest}; ask for more "
                "with max_cache_len, or for cache_implementation='dynamic'"
            )
        return self.state

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.state is not None

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first call."""
        return -1 if self.state is None else self.state.position.shape[0]

    def reset(self) -> None:
        """Forgets everything."""
        self.state = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the given rows (n,), in that order: beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Takes the given rows (n,), in that order."""
        if self.state is not None:
            self.state = self.state.gather(indices.to(self.state.position.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: ValueError."""
        raise ValueError(
            "the memory of a recurrent layer cannot be cropped; keep a copy of an earlier cache instead"
        )
