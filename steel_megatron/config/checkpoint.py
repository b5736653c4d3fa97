"""Where a run lives on disk."""

from __future__ import annotations

from dataclasses import dataclass

from steel_megatron.config.checks import at_least, typed
from steel_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where a run lives on disk."""

    directory: str = "runs/default"
    """The run's folder: checkpoints/, tensorboard/, ledger.json, run.yaml, events.jsonl."""
    save_interval: int = 1000
    """Steps between two checkpoints; the last step is always saved."""
    async_save: bool = True
    """Train while a checkpoint is written. It takes as much memory of the machine as the checkpoint has bytes; without
    it training waits for the disk."""
    keep_last: int | None = None
    """Checkpoints to keep; older ones are removed once a newer one was read back from the disk. None keeps all."""
    resume: bool = True
    """Resume from the newest complete checkpoint in the folder, if there is one; the model must be the same."""
    resume_from: int | None = None
    """Go back to the checkpoint of this step; later ones are moved to checkpoints/set_aside. Once the run has saved
    again, the same command resumes from its newest checkpoint."""
    init_from: str | None = None
    """A checkpoint, a run (its newest checkpoint) or a Hugging Face folder to take the weights from (only the weights)
    when the run starts anew, and with lora.rank at each start; it may route tokens in another way."""

    def __post_init__(self) -> None:
        typed(self)
        at_least(1, self, "save_interval", "keep_last")
        at_least(0, self, "resume_from")
        if self.resume_from is not None and not self.resume:
            raise ConfigError(
                f"CheckpointConfig.resume_from is {self.resume_from}, but resume is false; leave one of them out"
            )
        if not self.directory.strip():
            raise ConfigError("CheckpointConfig.directory is empty; name the run's folder, such as runs/first")
