"""A whole run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from steel_megatron.config.checkpoint import CheckpointConfig
from steel_megatron.config.checks import typed
from steel_megatron.config.data import DataConfig
from steel_megatron.config.evaluation import EvaluationConfig
from steel_megatron.config.lora import LoraConfig, check_lora
from steel_megatron.config.model import ModelConfig
from steel_megatron.config.optimizer import OptimizerConfig
from steel_megatron.config.parallel import ParallelConfig, check_layout
from steel_megatron.config.preference import DpoConfig
from steel_megatron.config.routing import RoutingModeFacts
from steel_megatron.config.training import TrainingConfig
from steel_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        typed(self)
        check_layout(self.model, self.parallel)
        check_lora(self.lora, self.model, self.parallel, self.checkpoint.init_from)
        if self.lora.rank is not None and self.model.implementation == "auto":  # others have no adapters
            object.__setattr__(self, "model", replace(self.model, implementation="local"))
        if self.data.reset_at_eod and self.model.routing is not None:
            self._check_documents(self.model.routing)

        decay, warmup = self.decay_steps, self.optimizer.warmup_steps
        if self.optimizer.lr_schedule == "wsd" and warmup + self.wsd_decay_steps > decay:
            raise ConfigError(
                f"optimizer.warmup_steps = {warmup} and wsd_decay_steps = {self.wsd_decay_steps} are more than the "
                f"{decay} steps of the schedule; shorten them, or raise optimizer.decay_steps or training.train_steps"
            )

    def _check_documents(self, mode: RoutingModeFacts) -> None:
        """Raise a ConfigError when the routing mode cannot keep documents apart under the layout."""
        if not mode.packs_documents:
            raise ConfigError(
                f"data.reset_at_eod is true, but routing_mode {self.model.routing_mode} has no forward_documents: it "
                "cannot keep documents apart that share a sequence; set it to false"
            )
        context, sharing = self.parallel.context_parallel_size, self.parallel.sequence_parallel
        if (context > 1 or sharing) and not mode.splits_documents:
            raise ConfigError(
                f"data.reset_at_eod is true with context_parallel_size = {context} and sequence_parallel = {sharing}, "
                f"but routing_mode {self.model.routing_mode} has no forward_split_documents: it can keep documents "
                "apart only where each process has whole sequences"
            )

    @property
    def decay_steps(self) -> int:
        """The step at which the learning rate's decay ends, wherever the run stops."""
        steps = self.optimizer.decay_steps
        return max(self.training.train_steps if steps is None else steps, self.optimizer.warmup_steps + 1)

    @property
    def wsd_decay_steps(self) -> int:
        """Steps of the decay at the end of schedule wsd."""
        return self.optimizer.wsd_decay_steps or max(1, self.decay_steps // 10)

    @property
    def tensorboard_dir(self) -> Path:
        """Where the run's TensorBoard log is."""
        return Path(self.checkpoint.directory) / "tensorboard"

    @property
    def ledger_path(self) -> Path:
        """Where the run's ledger is."""
        return Path(self.data.ledger or Path(self.checkpoint.directory) / "ledger.json")

    @property
    def checkpoints_dir(self) -> Path:
        """Where the run's checkpoints are."""
        return Path(self.checkpoint.directory) / "checkpoints"

    def num_micro_batches(self, world_size: int) -> int:
        """Micro batches of one step on each data-parallel process, for a launch of ``world_size`` processes.

        Raises:
            ConfigError: the global batch cannot be cut so.
        """
        data_parallel = self.parallel.data_parallel_size(world_size)
        samples_per_pass = self.training.micro_batch_size * data_parallel
        if self.training.global_batch_size % samples_per_pass:
            raise ConfigError(
                f"training.global_batch_size = {self.training.global_batch_size} is not divisible by "
                f"micro_batch_size x data-parallel size = {self.training.micro_batch_size} x {data_parallel} "
                f"= {samples_per_pass}"
            )
        number, stages = self.training.global_batch_size // samples_per_pass, self.parallel.pipeline_model_parallel_size
        if self.parallel.interleaved and number % stages:
            raise ConfigError(
                f"{number} micro batches of a step (training.global_batch_size {self.training.global_batch_size} / "
                f"(micro_batch_size {self.training.micro_batch_size} x data-parallel size {data_parallel})) are not "
                f"divisible by pipeline_model_parallel_size = {stages}, which the interleaved schedule "
                "(virtual_pipeline_model_parallel_size) needs"
            )
        return number
