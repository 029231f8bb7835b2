"""The README of an export."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hybrid_lm
from hybrid_lm.config.pattern import canon, expand
from hybrid_lm.model.lm import HybridLM
from hybrid_lm.model.stats import layer_table, totals

if TYPE_CHECKING:
    from hybrid_lm.data.tokenizer import Tokenizer

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [hybrid_lm, state-space, hybrid]
---
# {name}

A causal language model of {n_layers} residual layers, {parameters:,} parameters, d_model {d_model},
vocabulary {vocab:,}. Exported by hybrid_lm {version}{form}

Pattern: `{pattern}`

| layer | name | type | parameters | memory per sequence (bytes) | and per token |
|---:|---|---|---:|---:|---:|
{rows}

## Use

```python
from transformers import AutoModelForCausalLM{tokenizer_import}

model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
{example}
```
{remarks}"""
CODE = """. The code is in this folder; it needs torch and
transformers only."""
REMARKS = """
`A_log`, `dt_bias` and `D` stay in float32 in every type. Padding belongs on the left; positions that start
again, or `doc_ids`, keep the documents of a packed row apart. Assisted decoding, `inputs_embeds` and gradient
checkpointing are not there.
"""
WITH_TEXT = """tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"""
WITHOUT_TEXT = """print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=64))"""


def model_card(
    model: HybridLM, name: str, tokenizer: Tokenizer | None = None, class_name: str | None = None
) -> str:
    """Markdown: what the model is, its layers, and how to load it from the folder `name`.

    class_name: the class of transformers that it has become; None: remote code.
    """
    config, sums = model.config, totals(model)
    rows = [
        f"| {row.index} | {row.name} | {row.type} | {row.parameters:,} | {row.state_bytes_fixed:,} "
        f"| {row.state_bytes_per_token:,} |"
        for row in layer_table(model)
    ]
    items = expand(config.pattern, list(config.layers), config.depth)
    return CARD.format(
        name=name,
        n_layers=len(rows),
        parameters=sums.parameters,
        d_model=config.d_model,
        vocab=config.vocab_size,
        version=hybrid_lm.__version__,
        form=CODE if class_name is None else f" as a `{class_name}`\nof transformers.",
        trust=", trust_remote_code=True" if class_name is None else "",
        remarks=REMARKS if class_name is None else "",
        pattern=canon(items),
        rows="\n".join(rows),
        tokenizer_import=", AutoTokenizer" if tokenizer else "\nimport torch",
        example=(WITH_TEXT if tokenizer else WITHOUT_TEXT).format(name=name),
    )
