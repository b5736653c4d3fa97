"""Validation in bits per byte of text, so that runs with different tokenizers compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from steel_megatron.data.indexed.dataset import open_indexed
from steel_megatron.log import get_logger
from steel_megatron.train.callbacks.base import Callback, RunView
from steel_megatron.train.callbacks.metrics import TensorBoard

logger = get_logger(__name__)


def bytes_per_token(prefixes: Sequence[str]) -> float | None:
    """Bytes of text in UTF-8 that a token of some corpora stands for, ends of documents included.

    Args:
        prefixes: of indexed corpora.

    Returns:
        The figure; None where a corpus does not record the size of its text.
    """
    tokens = text_bytes = 0
    for prefix in prefixes:
        manifest = open_indexed(prefix).manifest or {}
        inputs = manifest.get("inputs", [])
        if not inputs or any(type(entry.get(name)) is not int for entry in inputs for name in ("tokens", "text_bytes")):
            return None
        tokens += sum(entry["tokens"] for entry in inputs)
        text_bytes += sum(entry["text_bytes"] for entry in inputs)
    return text_bytes / tokens if tokens and text_bytes else None


class BitsPerByte(Callback):
    """Writes each validation set's loss in bits per byte, on rank 0.

    A set's loss per token, in nats, is divided by its bytes per token: those of the whole set, also where only its
    first batches are validated. Corpora that another program wrote do not record the size of their text, and get no
    figure.

    Args:
        tensorboard: the run's TensorBoard log.
    """

    def __init__(self, tensorboard: TensorBoard) -> None:
        self._tensorboard = tensorboard
        self._sizes: dict[str, float] = {}

    def start(self, run: RunView) -> None:
        """Read how much text the validation sets are.

        Raises:
            DataError: a corpus is damaged.
        """
        if not run.is_rank0 or not run.engine.objective.terms[0].startswith("loss"):
            return
        sizes = {name: bytes_per_token(prefixes) for name, prefixes in run.config.data.validation_sets.items()}
        self._sizes = {name: size for name, size in sizes.items() if size is not None}

    def after_validation(self, run: RunView, losses: Mapping[str, float]) -> None:
        """Take note of a validation."""
        name = run.engine.objective.terms[0].replace("loss", "bits_per_byte", 1)
        for validation_set, size in self._sizes.items():
            label = f"{validation_set}/{name}" if validation_set else name
            bits = losses[validation_set] / size / math.log(2)
            self._tensorboard.write({f"validation/{label}": bits}, run.step)
            logger.info(f"step {run.step:>6} validation {label} {bits:.4f}")
