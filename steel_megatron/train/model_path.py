"""What a path to a model names: a run, a checkpoint or an exported folder. Finding out imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steel_megatron.errors import CheckpointError
from steel_megatron.log import get_logger
from steel_megatron.train.checkpoint_info import Base, CheckpointInfo
from steel_megatron.train.checkpoint_manifest import MANIFEST, read_info, read_manifest

logger = get_logger(__name__)


@dataclass(frozen=True)
class ModelPath:
    """A model on disk.

    Attributes:
        path: the folder of a checkpoint, or an exported one.
        info: what the checkpoint's manifest says; None for an exported folder.
    """

    path: Path
    info: CheckpointInfo | None = None


def find_model(path: str | Path) -> ModelPath:
    """What a path names, checked as far as manifests and the sizes of files tell.

    Args:
        path: a run's folder, whose newest whole checkpoint is taken; a checkpoint's folder (``step_...``); or a Hugging
            Face folder.

    Raises:
        CheckpointError: it is none of these, or the checkpoint is not whole.
        ConfigError: its routing mode is code that has not been imported.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return ModelPath(path)
    if (path / MANIFEST).exists():
        return ModelPath(path, read_info(path))
    if (path / "checkpoints").is_dir():
        return _newest(path / "checkpoints")
    if not path.is_dir():
        raise CheckpointError(
            f"there is no folder {path}; name a run's folder, a checkpoint's (step_...), or one that export-hf made"
        )
    raise CheckpointError(
        f"{path} is neither a checkpoint (it has no {MANIFEST}), nor a Hugging Face folder (it has no config.json), "
        "nor a run's folder (it has no checkpoints/)"
    )


def find_checkpoint(path: str | Path) -> CheckpointInfo:
    """The checkpoint that a path names, as :func:`find_model` finds it.

    Raises:
        CheckpointError: it names none; also if it names an exported folder.
        ConfigError: its routing mode is code that has not been imported.
    """
    info = find_model(path).info
    if info is None:
        raise CheckpointError(
            f"{path} is a Hugging Face folder; name a run's folder or a checkpoint, which import-hf makes of it"
        )
    return info


def base_at(path: str | Path) -> Base:
    """The checkpoint that a path names, as one to adapt.

    Raises:
        CheckpointError: as :func:`find_checkpoint`.
        ConfigError: as there.
    """
    found = find_checkpoint(path).path
    return Base(found.resolve(), read_manifest(found)["sha256"])


def _newest(checkpoints: Path) -> ModelPath:
    passed: list[str] = []
    for path in sorted(checkpoints.glob("step_*"), reverse=True):
        try:
            found = ModelPath(path, read_info(path))
        except CheckpointError as error:
            passed.append(f"{path.name}: {error}")
            continue
        for damage in passed:
            logger.warning(f"passing over {damage}")
        return found
    why = f"; the newest is {passed[0]}" if passed else ""
    raise CheckpointError(f"{checkpoints} has no whole checkpoint (step_...){why}")
