"""Distributions of the next token: transformers' for the same settings."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from steel_megatron.ops.sampling import Sampling, choose, processed

SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 1.5, "min_p": 0.2},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.4},
    {"temperature": 0.8, "top_k": 1000, "repetition_penalty": 0.8},
    {"repetition_penalty": 1.2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_as_in_transformers(settings: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, seen = 3 * torch.randn(60, generator=generator), [3, 7, 7, 59]
    theirs = LogitsProcessorList()
    if "repetition_penalty" in settings:
        theirs.append(RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    warpers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    theirs += [warpers[name](value) for name, value in settings.items() if name in warpers]
    expected = theirs(torch.tensor([seen]), logits[None].clone())[0]
    found = processed(logits, seen, Sampling(**settings))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_transformers_applies_them_in_this_order() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    settings = GenerationConfig(do_sample=True, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.1)
    names = [type(one).__name__ for one in model._get_logits_processor(settings)]
    kinds = (
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        MinPLogitsWarper,
    )
    assert names == [kind.__name__ for kind in kinds]


def test_draws_have_the_probabilities_of_the_best_logits() -> None:
    logits, draws = torch.tensor([0.5, 2.0, -1.0, 1.0]), 4000
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.5, 2.0):
        sampling = Sampling(temperature=temperature, top_k=3)
        counts = Counter(choose(logits, [], sampling, generator) for _ in range(draws))
        weights = {token: math.exp(logits[token].item() / temperature) for token in (0, 1, 3)}
        assert set(counts) == set(weights)
        for token, weight in weights.items():
            share = weight / sum(weights.values())
            deviation = math.sqrt(share * (1 - share) / draws)
            assert abs(counts[token] / draws - share) < 5 * deviation, (temperature, token)


def test_settings_without_effect() -> None:
    assert Sampling(top_k=3, min_p=0.1, repetition_penalty=2.0).without_effect == ["top_k", "min_p"]
    assert Sampling(top_k=3, temperature=1.0).without_effect == []
