"""What training minimises, as the function that megatron-core's schedules call for every micro batch."""

from steel_megatron.train.objective.base import OBJECTIVES, Objective, Term
from steel_megatron.train.objective.dpo import Dpo
from steel_megatron.train.objective.next_token import Batch, NextToken
from steel_megatron.train.objective.sft import Sft, SftPerSample

__all__ = ["OBJECTIVES", "Batch", "Dpo", "NextToken", "Objective", "Sft", "SftPerSample", "Term"]
