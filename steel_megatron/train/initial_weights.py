"""What a run starts from: the weights that ``checkpoint.init_from`` names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron.core.models.gpt import GPTModel

from steel_megatron.config import ModelConfig
from steel_megatron.errors import ConfigError
from steel_megatron.parallel.agreement import first_process_bytes, on_rank0, raise_if_any_rank_failed
from steel_megatron.train import checkpoint
from steel_megatron.train.checkpoint_checksums import verified_by_all
from steel_megatron.train.checkpoint_info import CheckpointInfo
from steel_megatron.train.checkpoint_manifest import manifest_checksum, read_manifest
from steel_megatron.train.model_path import find_model


class InitialWeights(Protocol):
    """A model to start from; every process calls each of these."""

    @property
    def path(self) -> Path:
        """Its folder."""

    def verify(self) -> None:
        """Make sure that the files are whole."""

    def fingerprint(self) -> str:
        """Of all weights."""

    def load(self, chunk: GPTModel, model: ModelConfig) -> None:
        """Fill a chunk of a model with these settings, whatever its layout."""


@dataclass(frozen=True)
class _OfCheckpoint:
    info: CheckpointInfo

    @property
    def path(self) -> Path:
        return self.info.path

    def verify(self) -> None:
        verified_by_all(lambda check: check(self.path), checkpoint.verify)

    def fingerprint(self) -> str:
        return raise_if_any_rank_failed(lambda: manifest_checksum(read_manifest(self.path)))

    def load(self, chunk: GPTModel, model: ModelConfig) -> None:
        checkpoint.load_weights(chunk, self.info, model)


openers: list[Callable[[Path], InitialWeights]] = []
"""What opens exported folders, at most one: :mod:`steel_megatron.hf.starting` puts it here, from above training."""


def open_initial(path: str) -> InitialWeights:
    """The model that a path names, the same one on every process.

    Args:
        path: a run's folder, a checkpoint's, or an exported one.

    Raises:
        CheckpointError: it is none of these.
        ConfigError: it is an exported folder, and nobody reads those here.
    """
    # The first process's choice: a run that still trains may save another checkpoint meanwhile.
    own = on_rank0(lambda: str(find_model(path).path))
    chosen = Path(first_process_bytes((own or "").encode()).decode())
    found = raise_if_any_rank_failed(lambda: find_model(chosen))
    if found.info is not None:
        return _OfCheckpoint(found.info)
    if not openers:
        raise ConfigError(
            f"checkpoint.init_from is {path}, a Hugging Face folder: start with steel_megatron.pretrain, which reads "
            "those, or make a checkpoint of it with steel-megatron import-hf"
        )
    return raise_if_any_rank_failed(lambda: openers[0](found.path))
