"""What a run's YAML file may say: one section per concern, each field with its meaning and unit.

The options of a layer are not here: they belong to the layer (`Layer.Options`) and `config.load` asks it for
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from hybrid_lm.config.base import Config, Fraction, Positive

NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0.0)]


class BlockConfig(Config):
    """How a layer sits in the residual stream: `x + multiplier * dropout(post_norm(layer(pre_norm(x))))`."""

    placement: Literal["pre", "pre_each", "post", "sandwich", "none"] = "pre"
    """Where the norms are: before the layer, after it (OLMo-2), both (Gemma-2), or nowhere. pre_each:
    parallel layers (`a+f`) have one each before them (GPT-NeoX) instead of one for all."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Which norm."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-5
    """Added to the variance."""
    weight: bool = True
    """Whether the norm has a learned scale."""
    bias: bool = False
    """Whether a layernorm has a learned shift."""
    unit_offset: bool = False
    """Scale by (1 + w) with w starting at zero (Gemma) instead of by w."""
    residual_multiplier: float = 1.0
    """Factor on what the layer adds to the residual stream (Granite)."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability of dropping an element of what the layer adds, in training."""


class BlockOverride(Config):
    """Fields of `model.block` that one recipe sets for itself; an unset field keeps the model's value."""

    placement: Literal["pre", "pre_each", "post", "sandwich", "none"] | None = None
    norm: Literal["rmsnorm", "layernorm"] | None = None
    eps: Annotated[float, Field(gt=0.0)] | None = None
    weight: bool | None = None
    bias: bool | None = None
    unit_offset: bool | None = None
    residual_multiplier: float | None = None
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None

    def apply(self, block: BlockConfig) -> BlockConfig:
        """The model's block settings with this recipe's on top."""
        return block.model_copy(update=self.model_dump(exclude_none=True))


class ShareConfig(Config):
    """Weights used by all occurrences of a recipe (Zamba)."""

    copies: Positive = 1
    """How many sets of weights the occurrences use in turn."""
    norms: bool = False
    """Share the norms around the layer as well; otherwise each occurrence has its own."""


class LoRAConfig(Config):
    """A low-rank addition to the weights of a shared layer, one per occurrence. Hu et al. 2021,
    arXiv:2106.09685."""

    rank: Positive
    """Rank of the addition."""
    on: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """Names of the layer's matrices: q_proj, gate_proj, ...; `gate_proj+up_proj`: one addition for both, as
    if they were one matrix (Zamba2)."""


class PerCallConfig(Config):
    """What each occurrence of a shared recipe has for itself."""

    lora: LoRAConfig | None = None
    """Low-rank additions to the shared matrices."""
    out_proj: bool = False
    """A square matrix on the shared layer's output."""


class Recipe(Config):
    """A named layer: `{type: mamba2, d_state: 128}`. Keys not named here are the layer's own options."""

    model_config = ConfigDict(extra="allow")

    type: str
    """A key of the layer table."""
    share: bool | ShareConfig = False
    """One set of weights for all occurrences; `{copies: 2}`: two, used in turn."""
    per_call: PerCallConfig | None = None
    """Small parts of its own for each occurrence of a shared recipe."""
    residual: BlockOverride = BlockOverride()
    """Fields of `model.block` that differ for this recipe."""

    @property
    def options(self) -> Mapping[str, Any]:
        """The layer's own options: as written, or after `load_config` with every default."""
        return self.model_extra or {}

    @property
    def copies(self) -> int:
        """Sets of weights that the occurrences share, 0 if each has its own."""
        return self.share.copies if isinstance(self.share, ShareConfig) else int(self.share)

    @property
    def shares_norms(self) -> bool:
        """Whether the occurrences share the norms around the layer too."""
        return isinstance(self.share, ShareConfig) and self.share.norms


class EmbeddingConfig(Config):
    """Tokens in."""

    tied: bool = True
    """Use the embedding matrix as the output matrix too."""
    multiplier: float = 1.0
    """Factor on the embedded tokens (Gemma: sqrt(d_model))."""
    positions: Literal["none", "learned", "sinusoidal"] = "none"
    """Absolute positions added to the embeddings. Attention layers have their own (`rope`, `alibi`)."""
    max_positions: Positive | None = None
    """Longest sequence in tokens that learned positions allow; required with them."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability of dropping an element of the embeddings, in training."""


class HeadConfig(Config):
    """Logits out."""

    multiplier: float = 1.0
    """Factor on the logits (Granite divides by `logits_scaling`; Falcon-H1 multiplies)."""
    softcap: Annotated[float, Field(gt=0.0)] | None = None
    """Logits become softcap * tanh(logits / softcap) (Gemma-2)."""
    bias: bool = False
    """A bias per vocabulary entry."""


class InitConfig(Config):
    """Starting values of the parameters that layers leave to the model; the table is in `model.init`."""

    matrix: Literal["fan_in", "normal"] = "fan_in"
    """fan_in: uniform in +-1/sqrt(inputs), std 0.58/sqrt(inputs); normal: `std`."""
    std: Annotated[float, Field(gt=0.0)] = 0.02
    """Standard deviation of embeddings, and of matrices with `matrix: normal`."""
    scale_residual: bool = True
    """Divide output matrices by sqrt(number of residual layers), so that depth does not grow the stream
    (GPT-2)."""


class ModelConfig(Config):
    """The architecture: a pattern of named layer recipes in one residual stream."""

    d_model: Positive
    """Width of the residual stream."""
    pattern: str
    """The order of the layers, over the keys of `layers`; the grammar is in `config.pattern`."""
    layers: dict[str, Recipe]
    """The recipes that the pattern names."""
    depth: Positive | None = None
    """Number of residual layers, for a pattern that ends in `...`."""
    vocab_size: Positive | None = None
    """Entries of the vocabulary; filled in from the tokenizer or the probe when left out."""
    block: BlockConfig = BlockConfig()
    """How layers sit in the residual stream, unless a recipe says otherwise."""
    embedding: EmbeddingConfig = EmbeddingConfig()
    """Tokens in."""
    head: HeadConfig = HeadConfig()
    """Logits out."""
    final_norm: bool = True
    """A norm of the block's kind before the logits."""
    init: InitConfig = InitConfig()
    """Starting values."""


class TokenizerConfig(Config):
    """How text becomes tokens."""

    kind: Literal["bytes", "huggingface", "bpe"] = "bytes"
    """bytes: one token per UTF-8 byte, no download; huggingface: a local folder or hub name; bpe: trained on
    the corpus."""
    path: str | None = None
    """Folder or name of a Hugging Face tokenizer, or the folder `tokenizer` of a run."""
    vocab_size: Positive | None = None
    """Entries of a BPE to train, specials included."""


class TextData(Config):
    """Text for language modelling."""

    kind: Literal["text"] = "text"
    path: str = "stdlib"
    """A prepared token store, a text, JSONL or Parquet file, a folder of texts, or `stdlib`: the Python
    library's own sources."""
    seq_len: Annotated[int, Field(ge=2)] = 256
    """Tokens in a training window."""
    packing: Literal["isolate", "concat"] = "isolate"
    """isolate: tokens see their own document only; concat: the window is read as one document."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Used when `path` is text; a token store has its own."""


class ProbeData(Config):
    """A synthetic probe of in-context recall."""

    kind: Literal["probe"]
    probe: str
    """A key of the probe table: mqar."""
    preset: Literal["paper", "small", "ci"] = "small"
    """Which published or CPU-sized setting to start from."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the probe that differ from the preset's."""
    train_params: dict[str, list[Any]] = Field(default_factory=dict)
    """Parameters drawn uniformly per training batch: `{n_pairs: [1, 2, 4, 8, 16]}`."""
    test_params: dict[str, list[Any]] = Field(default_factory=dict)
    """Parameters tested one after another: `{n_pairs: [4, 8, 16]}`."""
    n_test: Positive = 256
    """Test examples per setting."""


class OptimizerConfig(Config):
    """AdamW. Loshchilov & Hutter 2019, arXiv:1711.05101."""

    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    """Peak learning rate."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Rate = 0.1
    """Decoupled decay of the classes that the policy table decays."""


class ScheduleConfig(Config):
    """Learning rate over steps, a pure function of the step."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """After the warmup: a half cosine; flat, then down at the end; a straight line; flat."""
    warmup_steps: NonNegative = 0
    """Steps of a straight line from 0 to the peak."""
    decay_fraction: Fraction = 0.2
    """wsd: the last part of the run in which the rate goes down."""
    final_ratio: Fraction = 0.1
    """Rate at the last step, as a part of the peak."""


class WandbConfig(Config):
    """Weights & Biases, beside the JSONL that is always written."""

    mode: Literal["off", "offline", "online"] = "off"
    """offline needs no account and no network."""
    project: str = "hybrid_lm"
    """Project to log to."""
    entity: str | None = None
    """User or team."""


class TrainConfig(Config):
    """One training run in one process."""

    steps: Positive = 1000
    """Optimizer steps."""
    batch_size: Positive = 16
    """Sequences in a forward pass."""
    accumulate: Positive = 1
    """Forward passes per optimizer step."""
    seed: NonNegative = 0
    """Of weights, data order and dropout."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clip_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Largest norm of the gradient; null: no clipping."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: matrix products under autocast, parameters and recurrences in float32."""
    device: str = "auto"
    """auto: cuda if there is one, else cpu; or a torch device. mps only by name, it is best effort."""
    backend: str | dict[str, str] = "auto"
    """Backend of all ops, or of each: `{ssd: torch}`."""
    compile: bool = False
    """Run the model through torch.compile: one graph forward, one backward. (No CUDA graphs.)"""
    gradient_checkpointing: bool = False
    """Keep only what enters each layer and compute the rest again for the gradients: memory for time. Chen et
    al. 2016, arXiv:1604.06174."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Part of the target spread over the vocabulary."""
    z_loss: Rate = 0.0
    """Weight of log(sum(exp(logits)))^2 per token (PaLM: 1e-4)."""
    log_every_steps: Positive = 10
    eval_every_steps: Positive | None = None
    """Steps between validations; null: only at the end."""
    eval_batches: Positive = 16
    """Batches of a validation during the run."""
    save_every_steps: Positive | None = None
    """Steps between checkpoints; null: only at the end."""
    keep: Positive = 2
    """Newest checkpoints to keep."""
    stop_at_accuracy: Fraction | None = None
    """Probes: end the run when a validation reaches this accuracy on every tested setting."""
    wandb: WandbConfig = WandbConfig()


class InitFromConfig(Config):
    """A model to start from. Places are layers by number (`3`), from-to (`0-11`) or recipe (`a`), and
    `embed`, `embed_positions`, `final_norm`, `lm_head`."""

    path: str
    """A Hugging Face folder or hub name, or the folder of a run or of one of its checkpoints."""
    freeze: Annotated[tuple[int | str, ...], Field(strict=False)] = ()
    """Places that keep their weights: `[embed, f, 0-3]`."""
    replace: dict[str, str | None] = Field(default_factory=dict)
    """Places of the imported pattern, and the recipe that stands there from now on, with weights from their
    start: `{a: m}`, m being one of `model.layers`; null: the same recipe, from its start."""


class RunConfig(Config):
    """One YAML file: one run."""

    init_from: InitFromConfig | None = None
    """A model to start from; `model` then says only what is to differ from it, or everything."""
    model: ModelConfig
    data: Annotated[TextData | ProbeData, Field(discriminator="kind")] = TextData()
    train: TrainConfig = TrainConfig()
