"""Imported once, before the copies of the project are tested: packages that most tests import, which takes seconds."""

import hypothesis
import megatron.core.models.gpt
import megatron.core.optimizer
import torch
import transformers

__all__ = ["hypothesis", "megatron", "torch", "transformers"]
