"""Our model as lm-eval sees it. Only `harness` imports this file, and only when tasks are to be run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hybrid_lm.data import IGNORE, Tokenizer
from hybrid_lm.eval.language import Progress
from hybrid_lm.eval.probe import score
from hybrid_lm.model.generate import generate
from hybrid_lm.model.lm import HybridLM

GENERATION = {"until", "max_gen_toks", "temperature", "do_sample", "top_k", "top_p"}
MAX_GEN_TOKS = 256
"""New tokens where a task does not say; lm-eval's own default."""


class HarnessModel(TemplateLM):
    """Answers lm-eval's three sorts of request straight from a `HybridLM`.

    Prompts of a batch are padded on the left as padding, not as text (`doc_ids`): a recurrent layer that read
    the padding would answer differently in every batch. `max_length` is given, never asked of the tokenizer.
    """

    def __init__(
        self,
        model: HybridLM,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        batch_size: int = 8,
        progress: Progress | None = None,
    ):
        """`max_length`: tokens that the model reads at a time; `batch_size`: changes speed, not results."""
        super().__init__()
        self.model, self.encoder = model, tokenizer
        self.max_length, self.batch_size = max_length, batch_size
        self.progress = progress or (lambda done, total: None)

    @property
    def eot_token_id(self) -> int:
        return self.encoder.eot_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text; special tokens are never added here."""
        return self.encoder.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For (text, context tokens, continuation tokens): log p of the continuation, and is it greedy."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Requests of like length share a batch; the longest first, so that too little memory shows at once.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            tokens, labels = self._pack([requests[i][1:] for i in rows])
            correct, nll = score(self.model, tokens, labels, self.batch_size)
            greedy = correct == (labels != IGNORE).sum(1)
            for i, loss, best in zip(rows, nll.tolist(), greedy.tolist(), strict=True):
                answers[i] = (-loss, best)
            self.progress(min(start + self.batch_size, len(order)), len(order))
        return answers

    def _pack(self, pairs: Sequence[Sequence[list[int]]]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels (b t): what does not fit is cut from the beginning, filler is on the right."""
        streams = [(context + continuation)[-(self.max_length + 1) :] for context, continuation in pairs]
        width = max(len(stream) - 1 for stream in streams)
        tokens = np.full((len(pairs), width), self.eot_token_id, dtype=np.int64)
        labels = np.full((len(pairs), width), IGNORE, dtype=np.int64)
        for row, (stream, (_, continuation)) in enumerate(zip(streams, pairs, strict=True)):
            n, scored = len(stream) - 1, len(continuation)
            if scored > n:
                limit = self.max_length
                raise ValueError(
                    f"a continuation of {scored} tokens does not fit into max_length {limit}; raise it"
                )
            tokens[row, :n], labels[row, n - scored : n] = stream[:-1], stream[n - scored + 1 :]
        return tokens, labels

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in lm-eval's disjoint windows, the first after an end-of-text token."""
        owners, windows = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                owners.append(i)
                windows.append((None, *make_disjoint_window(pair)))
        totals = [0.0] * len(requests)
        for i, (logp, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += logp
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of prompts up to a stop string; greedy unless a task asks for a temperature."""
        texts = [""] * len(requests)
        prompts: list[tuple[str, dict[str, Any]]] = [request.args for request in requests]  # pyright: ignore
        groups: dict[str, list[int]] = defaultdict(list)
        for i, (_, how) in enumerate(prompts):
            groups[repr(sorted(how.items()))].append(i)
        done = 0
        for members in groups.values():
            # Prompts of like length need little padding.
            members.sort(key=lambda i: -len(prompts[i][0]))
            for start in range(0, len(members), self.batch_size):
                rows = members[start : start + self.batch_size]
                made = self._continue([prompts[i][0] for i in rows], prompts[rows[0]][1])
                for i, text in zip(rows, made, strict=True):
                    texts[i] = text
                done += len(rows)
                self.progress(done, len(prompts))
        return texts

    def _continue(self, contexts: Sequence[str], how: dict[str, Any]) -> list[str]:
        if unknown := set(how) - GENERATION:
            raise ValueError(
                f"generation_kwargs {', '.join(sorted(unknown))}: known are {', '.join(sorted(GENERATION))}"
            )
        until = how.get("until") or []
        n = how.get("max_gen_toks", MAX_GEN_TOKS)
        room = self.max_length - n
        if room < 1:
            raise ValueError(f"max_gen_toks {n} leaves no room for a prompt in max_length {self.max_length}")
        made = generate(
            self.model,
            [(self.tok_encode(context) or [self.eot_token_id])[-room:] for context in contexts],
            max_new_tokens=n,
            temperature=float(how.get("temperature", 1.0 if how.get("do_sample") else 0.0)),
            top_k=how.get("top_k"),
            top_p=how.get("top_p"),
            stop_tokens=[self.eot_token_id],
            stop_strings=[until] if isinstance(until, str) else list(until),
            decode=self.encoder.decode,
        )
        return [result.text or "" for result in made]
