"""transformers' own common tests of a model, over the exported code.

They come from the source distribution of the installed transformers (tests/hf/suite.py) and run as they are there. That
distribution has ``ModelTesterMixin``, but neither ``GenerationTesterMixin`` nor ``ExportTesterMixin`` (tests/generation
and tests/exporters are not in it): generation and torch.export are tested in test_modeling.py and test_consumers.py.
"""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.models.auto import configuration_auto, modeling_auto

from steel_megatron.hf.configuration_steel import SteelConfig
from steel_megatron.hf.modeling_steel import SteelForCausalLM, SteelForSequenceClassification, SteelModel
from tests import needs
from tests.hf import suite

pytestmark = [
    needs.common_suite.mark,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning"),  # the suite has marks of its own
]
CLASSES = {
    "MODEL": SteelModel,
    "MODEL_FOR_CAUSAL_LM": SteelForCausalLM,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION": SteelForSequenceClassification,
}
ANSWERS_OF_THE_MACHINE = ("test requires", "test is slow")
"""How the suite's own conditions begin (a GPU, flash attention, deepspeed, ...); such tests are not in ``LEFT_OUT``."""
LEFT_OUT = {
    "test_generation_tester_mixin_inheritance": "the distribution does not have GenerationTesterMixin",
    "test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions": "done for the first two classes; the last "
    "one's arguments are transformers' own and do not name output_attentions",
    "test_bc_cache_name_forward": "for plain caches; SteelCache keeps the routing too, and both names are accepted",
    "test_can_capture_specific_layers_hidden_states": "for transformers' decorator that captures outputs",
    "test_capture_outputs_decorator": "for transformers' decorator that captures outputs",
    "test_eager_matches_batched_and_grouped_inference_0_fp16": "experts are modules, not grouped matrices",
    "test_eager_matches_batched_and_grouped_inference_1_fp32": "experts are modules, not grouped matrices",
    "test_eager_matches_batched_and_grouped_inference_2_bf16": "experts are modules, not grouped matrices",
    "test_moe_models_record_router_logits": "no token is sent to some experts only",
    "test_output_router_logits_from_config": "no token is sent to some experts only",
    "test_can_load_from_already_mapped_keys": "no name of a weight is changed on loading",
    "test_reverse_loading_mapping": "no name of a weight is changed on loading",
    "test_keep_in_fp32_modules": "no weight is held in float32; norms and routing are computed in it",
    "test_keep_in_fp32_modules_exist": "no weight is held in float32; norms and routing are computed in it",
    "test_keep_in_fp32_modules_strict_also_hardcode_fp32": "no weight is held in float32",
    "test_model_rope_scaling_from_config_0_linear": "scaled rotary embeddings are refused (test_misuse_is_named)",
    "test_model_rope_scaling_from_config_1_dynamic": "scaled rotary embeddings are refused (test_misuse_is_named)",
    "test_model_rope_scaling_from_config_2_yarn": "scaled rotary embeddings are refused (test_misuse_is_named)",
    "test_model_rope_scaling_frequencies": "scaled rotary embeddings are refused (test_misuse_is_named)",
    "test_model_rope_with_partial_rotation": "heads are rotated whole",
    "test_vision_axial_rope": "no images",
    "test_resize_position_vector_embeddings": "positions have no embedding matrix",
    "test_sliding_window_mask": "attention has no window",
    "test_encoder_decoder_loss_no_double_shift": "no encoder",
    "test_attn_implementation_composite_models": "one model, not several in one",
    "test_can_set_attention_dynamically_composite_model": "one model, not several in one",
    "test_internal_model_config_and_subconfig_are_same": "one model, not several in one",
    "test_sdpa_can_dispatch_composite_models": "one model, not several in one",
}


class Tester:
    """What the suite asks for a model and its inputs."""

    __test__ = False  # not for pytest
    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_attention_heads, num_hidden_layers = 16, 2, 2

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def get_config(self) -> SteelConfig:
        """A tiny configuration."""
        return SteelConfig(
            vocab_size=50,
            hidden_size=self.hidden_size,
            intermediate_size=12,
            mlp_div_ratio=1,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            n_experts=2,
            slots_per_expert=2,
            routing_mode=self.mode,
            routing_mix="raw",
            routing_block_length=3,
            shared_expert_intermediate_size=8,
            pad_token_id=0,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[SteelConfig, dict[str, torch.Tensor]]:
        """The configuration, and arguments of a forward."""
        ids = torch.randint(1, 50, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The suite's module, with transformers knowing the classes as it knows its own: it tests by that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configuration_auto.CONFIG_MAPPING._extra_content, "steel", SteelConfig)
        for name, model_class in CLASSES.items():
            patch.setitem(getattr(modeling_auto, f"{name}_MAPPING_NAMES"), "steel", model_class.__name__)
            patch.setitem(getattr(modeling_auto, f"{name}_MAPPING")._extra_content, SteelConfig, model_class)
        yield suite.load(tmp_path_factory.mktemp("suite"))


def case_of(common: ModuleType, mode: str) -> type[unittest.TestCase]:
    def set_up(self: Any) -> None:
        torch.manual_seed(0)
        self.model_tester = Tester(mode)

    members = {
        "all_model_classes": tuple(CLASSES.values()),
        "test_can_init_all_missing_weights_before_2023": True,
        "setUp": set_up,
    }
    return type("SteelModelTest", (common.ModelTesterMixin, unittest.TestCase), members)


@pytest.mark.parametrize("mode", ["block_causal", "merged", "token"])
def test_the_suite_of_transformers(common: ModuleType, mode: str) -> None:
    case = case_of(common, mode)
    names = [name for name in unittest.TestLoader().getTestCaseNames(case) if callable(getattr(case, name))]
    absent = "test_generation_tester_mixin_inheritance"
    assert absent in names and len(names) > 100
    result = unittest.TestResult()
    unittest.TestSuite(case(name) for name in names if name != absent).run(result)
    assert not [(str(test), text) for test, text in (*result.failures, *result.errors)]
    reasons = {
        getattr(test, "test_case", test)._testMethodName: reason
        for test, reason in result.skipped
        if not reason.startswith(ANSWERS_OF_THE_MACHINE)
    }
    assert {name: reason for name, reason in reasons.items() if name not in LEFT_OUT} == {}
    assert set(LEFT_OUT) - set(reasons) == {absent}, "these are skipped no more"
