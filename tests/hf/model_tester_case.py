"""Our class under transformers' own common tests: a module for their test package, into which
`test_model_tester.py` copies it. Their tests are run where they are, and never copied."""

from __future__ import annotations

import unittest
from typing import Any, ClassVar

import torch
from hf_models import ATTENTION, M2, MLP, PARALLEL, ZAMBA
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.hf.convert import explicit
from hybrid_lm.hf.wrapper import HybridLMConfig, HybridLMForCausalLM, json_safe
from hybrid_lm.layers.block import Residual

from .. import test_modeling_common as common
from ..generation.test_utils import GenerationTesterMixin
from ..test_configuration_common import ConfigTester
from ..test_training_mixin import TrainingTesterMixin

# They look for the causal models that have labels in a table of their own classes.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["hybrid_lm"] = "HybridLMForCausalLM"
# They look for a base class of theirs to find the layers that are computed again; ours are these.
common.GradientCheckpointingLayer = Residual

EXPERTS = {"type": "moe", "n_experts": 4, "d_ff": 24, "top_k": 2, "balance": "loss", "d_shared": 16}
# Two residual layers each, as they ask.
TIED = {"pattern": "m a+f", "layers": {"m": M2, "a": ATTENTION, "f": MLP}}
SHARED = {**ZAMBA, "pattern": "z z"}
UNTIED = {**PARALLEL, "pattern": "n+c a+m"}
MOE = {"pattern": "a e", "layers": {"a": ATTENTION, "e": EXPERTS}}


class Tester:
    """What their tests ask of a model: a small configuration and inputs for it."""

    batch_size, seq_length, is_training = 3, 8, True

    def __init__(self, section: dict[str, Any]):
        self.section = section
        config = self.get_config()
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers

    def settings(self) -> dict[str, Any]:
        section = {"d_model": 32, "vocab_size": 61, **self.section}
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return {"architecture": json_safe(explicit(ModelConfig.model_validate(section))), **ids}

    def get_config(self) -> HybridLMConfig:
        return HybridLMConfig(**self.settings())

    def prepare_config_and_inputs_for_common(self) -> tuple[HybridLMConfig, dict[str, Any]]:
        # Without the special tokens: a padding id in the middle of a row is a mask with a hole.
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 3) + 3
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Case(common.ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    """All of them; our models give no attention weights."""

    all_model_classes = (HybridLMForCausalLM,)
    has_attentions = False
    test_can_init_all_missing_weights_before_2023 = True
    section: ClassVar[dict[str, Any]]
    model_tester: Any = None

    def setUp(self) -> None:
        self.model_tester = Tester(self.section)

    def test_config(self) -> None:
        properties = ["hidden_size", "num_hidden_layers"]
        settings = self.model_tester.settings()
        ConfigTester(self, HybridLMConfig, common_properties=properties, **settings).run_common_tests()


class TiedTest(Case, unittest.TestCase):
    section: ClassVar[dict[str, Any]] = TIED


class SharedTest(Case, unittest.TestCase):
    section: ClassVar[dict[str, Any]] = SHARED


class UntiedTest(Case, unittest.TestCase):
    section: ClassVar[dict[str, Any]] = UNTIED
    # Theirs is for models without a cap on the logits: after 300 steps it leaves 15% here, not 10.
    training_grad_norm_reduction_threshold = 0.8


class ExpertsTest(Case, unittest.TestCase):
    section: ClassVar[dict[str, Any]] = MOE
    # An expert that no token chose has none.
    test_all_params_have_gradient = False
