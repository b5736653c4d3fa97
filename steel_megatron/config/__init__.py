"""The settings of a run, and of the jobs that make its corpora: frozen dataclasses, checked when they are built.

One YAML file holds a run; every field can be overridden on the command line by its dotted name
(``--model.hidden_size 256``). Nothing is changed after it is built, and the resolved run is written next to
every checkpoint, which is enough to run it again.
"""

from steel_megatron.config.chat import PrepareConfig
from steel_megatron.config.checkpoint import CheckpointConfig
from steel_megatron.config.checks import with_homes
from steel_megatron.config.clean import CleanConfig
from steel_megatron.config.data import (
    MEGATRON_TOKENIZER_TYPES,
    BadRowPolicy,
    DataConfig,
    TokenizerEngine,
    TokenizerKind,
)
from steel_megatron.config.doubts import doubts, job_doubts
from steel_megatron.config.evaluation import EvaluationConfig
from steel_megatron.config.execution import ExecutionConfig, ExecutorName
from steel_megatron.config.loading import dump_yaml, from_dict, load_yaml, to_dict
from steel_megatron.config.lora import LoraConfig
from steel_megatron.config.model import (
    Activation,
    FeedForward,
    ImplementationName,
    ModelConfig,
    SlotInput,
    take_old_names,
    warn_of_old_name,
)
from steel_megatron.config.optimizer import OptimizerConfig
from steel_megatron.config.parallel import ParallelConfig, check_layout
from steel_megatron.config.preference import DpoConfig
from steel_megatron.config.preprocess import PreprocessConfig
from steel_megatron.config.routing import (
    RoutingModeFacts,
    add_routing_mode,
    import_routing_code,
    refuse_unknown_routing_code,
    routing_facts,
    routing_mode_names,
)
from steel_megatron.config.run import RunConfig
from steel_megatron.config.sampling import Sampling
from steel_megatron.config.training import Precision, TrainingConfig

__all__ = [
    "MEGATRON_TOKENIZER_TYPES",
    "Activation",
    "BadRowPolicy",
    "CheckpointConfig",
    "CleanConfig",
    "DataConfig",
    "DpoConfig",
    "EvaluationConfig",
    "ExecutionConfig",
    "ExecutorName",
    "FeedForward",
    "ImplementationName",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Precision",
    "PrepareConfig",
    "PreprocessConfig",
    "RoutingModeFacts",
    "RunConfig",
    "Sampling",
    "SlotInput",
    "TokenizerEngine",
    "TokenizerKind",
    "TrainingConfig",
    "add_routing_mode",
    "check_layout",
    "doubts",
    "dump_yaml",
    "from_dict",
    "import_routing_code",
    "job_doubts",
    "load_yaml",
    "refuse_unknown_routing_code",
    "routing_facts",
    "routing_mode_names",
    "take_old_names",
    "to_dict",
    "warn_of_old_name",
    "with_homes",
]
