"""Where a run lives on disk."""

from __future__ import annotations

from dataclasses import dataclass

from steel_megatron.config.checks import at_least, typed
from steel_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where a run lives on disk."""

    directory: str = "runs/default"
    """The run's folder: checkpoints/, tensorboard/, ledger.json, run.yaml."""
    save_interval: int = 1000
    """Steps between two checkpoints; the last step is always saved."""
    async_save: bool = True
    """Train while a checkpoint is written. It takes as much memory of the machine as the checkpoint has bytes; without
    it training waits for the disk."""
    keep_last: int | None = None
    """Checkpoints to keep; older ones are removed once a newer one is whole. None keeps all."""
    resume: bool = True
    """Resume from the newest complete checkpoint in the folder, if there is one; the model must be the same."""
    init_from: str | None = None
    """A checkpoint to take the weights from (only the weights) when the run starts anew; it may route tokens in
    another way."""

    def __post_init__(self) -> None:
        typed(self)
        at_least(1, self, "save_interval", "keep_last")
        if not self.directory.strip():
            raise ConfigError("CheckpointConfig.directory is empty; name the run's folder, such as runs/first")
