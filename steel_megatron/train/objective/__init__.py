"""What training minimises, as the function that megatron-core's schedules call for every micro batch."""

from steel_megatron.train.objective.base import OBJECTIVES, Objective, Term
from steel_megatron.train.objective.next_token import Batch, NextToken

__all__ = ["OBJECTIVES", "Batch", "NextToken", "Objective", "Term"]
