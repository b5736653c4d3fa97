"""The settings of a run: frozen dataclasses, checked when they are built.

One YAML file holds a run; every field can be overridden on the command line by its dotted name
(``--model.hidden_size 256``). Nothing is changed after it is built, and the resolved run is written beside
every checkpoint, which is enough to run it again.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from steel_megatron.errors import ConfigError

FeedForward = Literal["soft_moe", "dense", "none", "top_k_moe"]
Activation = Literal["double_swiglu", "swiglu"]
RoutingMode = Literal["sequence", "token", "block_causal", "merged"]
RoutingMix = Literal["normalized", "raw"]
TokenizerKind = Literal["huggingface", "sentencepiece"]
MEGATRON_TOKENIZER_TYPES: dict[str, TokenizerKind] = {
    "HuggingFaceTokenizer": "huggingface",
    "SentencePieceTokenizer": "sentencepiece",
    "GPTSentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
}
"""What Megatron's --tokenizer-type calls them."""
Precision = Literal["float32", "bfloat16"]


def _at_least(minimum: float, owner: object, *names: str) -> None:
    """Raise a ConfigError for the first of ``owner``'s fields that is below ``minimum``."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and not minimum <= value < float("inf"):  # refuses NaN as well
            raise ConfigError(f"{type(owner).__name__}.{name} is {value}; it must be at least {minimum} and finite")


def _one_of(allowed: tuple[str, ...], owner: object, name: str) -> None:
    value = getattr(owner, name)
    if value not in allowed:
        raise ConfigError(f"{type(owner).__name__}.{name} is {value!r}; it must be one of {', '.join(allowed)}")


def _divides(divisor: int, divisor_name: str, value: int, value_name: str) -> None:
    if value % divisor:
        raise ConfigError(f"{value_name} = {value} is not divisible by {divisor_name} = {divisor}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network (Steel-LLM, section 3 and table 1)."""

    num_layers: int = 4
    """Transformer layers."""
    hidden_size: int = 256
    """Width of the residual stream."""
    num_attention_heads: int = 4
    """Query heads; hidden_size must be divisible by it."""
    num_query_groups: int | None = None
    """Key and value heads (grouped-query attention); none means one per query head."""
    ffn: FeedForward = "soft_moe"
    """Feed-forward layer: a Soft-MoE, one dense network, none (attention only), or megatron-core's top-k MoE."""
    ffn_activation: Activation = "double_swiglu"
    """What an expert (or the dense network) computes: Steel's double SwiGLU ("senet"), or SwiGLU."""
    ffn_hidden_size: int = 256
    """Inner width of one expert, or of the dense network."""
    num_experts: int = 6
    """Experts of an MoE layer."""
    slots_per_expert: int = 1
    """Slots that each expert computes per sequence or block."""
    routing_mode: RoutingMode | None = None
    """How tokens reach experts; a Soft-MoE run must say which. Only `sequence` is not causal."""
    routing_mix: RoutingMix = "raw"
    """What is mixed into slots: the tokens as they are, or scaled to length 1 (the published weights)."""
    block_length: int = 64
    """Tokens between two refreshes of the slots (block_causal), or of one segment (merged)."""
    routing_scale_init: float = 1.0
    """Initial length of the slots' keys: how sharp routing is before it is trained. Logits are at most this large."""
    moe_top_k: int = 2
    """Experts that each token of a top_k_moe passes through."""
    moe_aux_loss_coeff: float = 0.01
    """Weight of the loss that spreads a top_k_moe's tokens over its experts."""
    shared_expert_intermediate_size: int = 0
    """Inner width of one more expert that every token passes through; 0 for none."""
    vocab_size: int = 151936
    """Token ids are below this number."""
    make_vocab_size_divisible_by: int = 128
    """Embedding rows are padded to a multiple of this; padding never gets probability."""
    sequence_length: int = 2048
    """Tokens of one training sequence."""
    rotary_base: int = 1_000_000
    """Base of the rotary position embedding, computed in float32."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in RMSNorm."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights."""
    expert_init_method_std: float | None = None
    """The same for experts, or for the dense network; none means init_method_std. Merging E experts evenly divides the
    deviation by sqrt(E), which init_method_std * sqrt(E) makes up for."""
    experts_alike: bool = False
    """Start the experts of a layer as copies of one (sparse upcycling); routing then makes them different."""

    def __post_init__(self) -> None:
        _one_of(("soft_moe", "dense", "none", "top_k_moe"), self, "ffn")
        _one_of(("double_swiglu", "swiglu"), self, "ffn_activation")
        _one_of(("normalized", "raw"), self, "routing_mix")
        _at_least(1, self, "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")
        _at_least(1, self, "num_experts", "slots_per_expert", "block_length", "vocab_size", "sequence_length")
        _at_least(1, self, "make_vocab_size_divisible_by", "rotary_base", "moe_top_k")
        _at_least(0, self, "shared_expert_intermediate_size", "norm_epsilon", "init_method_std")
        _at_least(0, self, "routing_scale_init", "moe_aux_loss_coeff", "expert_init_method_std")
        if self.ffn == "soft_moe":
            if self.routing_mode is None:
                raise ConfigError(
                    "ModelConfig.routing_mode is not set; a Soft-MoE run must say which mode it trains: sequence (as "
                    "published, not causal), block_causal, merged or token"
                )
            _one_of(("sequence", "token", "block_causal", "merged"), self, "routing_mode")
        if self.ffn == "top_k_moe":
            self._check_top_k_moe()
        _divides(self.num_attention_heads, "num_attention_heads", self.hidden_size, "hidden_size")
        if self.head_dim % 2:
            raise ConfigError(
                f"hidden_size / num_attention_heads = {self.head_dim}; the rotary embedding needs an even head size"
            )
        _divides(self.query_groups, "num_query_groups", self.num_attention_heads, "num_attention_heads")

    def _check_top_k_moe(self) -> None:
        if self.ffn_activation != "swiglu":
            raise ConfigError(
                f"ModelConfig.ffn_activation is {self.ffn_activation}; the experts of ffn = top_k_moe are "
                "megatron-core's own, which compute swiglu"
            )
        if self.moe_top_k > self.num_experts:
            raise ConfigError(f"ModelConfig.moe_top_k = {self.moe_top_k} is over num_experts = {self.num_experts}")

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Key and value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrices. Does not depend on the parallel layout, so checkpoints fit any."""
        multiple = self.make_vocab_size_divisible_by
        return (self.vocab_size + multiple - 1) // multiple * multiple

    @property
    def causal(self) -> bool:
        """Whether no token's output depends on a later token."""
        return self.ffn != "soft_moe" or self.routing_mode != "sequence"

    @property
    def loss_name(self) -> str:
        """How a loss of this model is to be called in a report."""
        return "loss" if self.causal else "loss (non-causal)"


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is cut over processes; what is left over is data parallelism."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are cut into (1F1B schedule)."""
    expert_model_parallel_size: int = 1
    """Data-parallel and context-parallel processes that share the experts of each layer."""
    sequence_parallel: bool = False
    """Whether tensor-parallel processes also share the tokens between attention and matrices (needs 2 or more)."""
    context_parallel_size: int = 1
    """Processes that share each sequence: process r has pieces r and 2 * size - 1 - r of 2 * size."""

    def __post_init__(self) -> None:
        _at_least(1, self, "tensor_model_parallel_size", "pipeline_model_parallel_size")
        _at_least(1, self, "expert_model_parallel_size", "context_parallel_size")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "ParallelConfig.sequence_parallel is true, but tensor_model_parallel_size is 1; it shares tokens among "
                "tensor-parallel processes: set tensor_model_parallel_size to 2 or more, or sequence_parallel to false"
            )

    @property
    def sequence_parallel_size(self) -> int:
        """Tensor-parallel processes that share the tokens of each sequence."""
        return self.tensor_model_parallel_size if self.sequence_parallel else 1

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model in a launch of ``world_size`` processes that read different samples.

        Raises:
            ConfigError: the launch does not fit the degrees.
        """
        names, sizes = "tensor x pipeline", [self.tensor_model_parallel_size, self.pipeline_model_parallel_size]
        if self.context_parallel_size > 1:
            names, sizes = names + " x context", [*sizes, self.context_parallel_size]
        model = math.prod(sizes)
        if world_size % model:
            raise ConfigError(
                f"a launch of {world_size} processes does not fit {names} parallel = "
                f"{' x '.join(map(str, sizes))} = {model}; the number of processes must be a multiple of {model}"
            )
        data = world_size // model
        if data * self.context_parallel_size % self.expert_model_parallel_size:
            context = f" x context_parallel_size {self.context_parallel_size}" if self.context_parallel_size > 1 else ""
            raise ConfigError(
                f"expert_model_parallel_size = {self.expert_model_parallel_size} does not divide the data-parallel "
                f"size {data}{context} (= {world_size} processes / {model}); experts are shared among these processes"
            )
        return data

    def describe(self, world_size: int) -> str:
        """The layout in one word, such as ``TP2 PP1 EP1 DP1``, or with all there is ``TP2 SP PP1 CP2 EP1 DP1``."""
        sequence = "SP " if self.sequence_parallel else ""
        context = f"CP{self.context_parallel_size} " if self.context_parallel_size > 1 else ""
        return (
            f"TP{self.tensor_model_parallel_size} {sequence}PP{self.pipeline_model_parallel_size} {context}"
            f"EP{self.expert_model_parallel_size} DP{self.data_parallel_size(world_size)}"
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from."""

    train: list[str] = field(default_factory=list)
    """Prefixes of indexed corpora (.bin and .idx) that a new run's ledger begins with, each read again and again."""
    ledger: str | None = None
    """The ledger of the run; if not given, ledger.json in its folder. See ``steel-megatron data --help``."""
    num_workers: int = 0
    """Processes that read ahead, for each training process; 0 reads when a step needs it. The samples are the same."""
    validation: list[str] = field(default_factory=list)
    """Prefixes of indexed corpora to validate on; none for no validation."""
    tokenizer_kind: TokenizerKind = "huggingface"
    """Which tokenizer made the corpora."""
    tokenizer_path: str | None = None
    """Its folder or file; copied into exported models."""
    reset_at_eod: bool = False
    """Keep the documents that share a sequence apart: attention and routing begin anew with each, and the first token
    of a document is not predicted. Not with context or sequence parallelism."""

    def __post_init__(self) -> None:
        _at_least(0, self, "num_workers")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the learning rate's course (Steel-LLM, section 5)."""

    lr: float = 3e-4
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    decay_steps: int | None = None
    """Steps until the cosine ends; none means training.train_steps."""
    weight_decay: float = 0.05
    """Decoupled weight decay, on matrices only."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of the squared gradient's running mean."""
    epsilon: float = 1e-8
    """Added to the root of the squared gradient's mean."""
    clip_grad: float = 1.0
    """The gradient's global norm is scaled down to this; 0 for no clipping."""

    def __post_init__(self) -> None:
        _at_least(0, self, "lr", "min_lr", "warmup_steps", "decay_steps", "weight_decay", "epsilon", "clip_grad")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"OptimizerConfig.{name} is {getattr(self, name)}; it must be in [0, 1)")
        if self.min_lr > self.lr:
            raise ConfigError(f"OptimizerConfig.min_lr = {self.min_lr} is over lr = {self.lr}")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Steps, batches and what happens between them."""

    train_steps: int = 100
    """Optimizer steps of the whole run."""
    stop_after_step: int | None = None
    """Save and leave after this step, as a preempted job would; the schedule still spans train_steps."""
    micro_batch_size: int = 1
    """Sequences that one data-parallel process computes at a time."""
    global_batch_size: int = 8
    """Sequences of one optimizer step, over all processes."""
    precision: Precision = "float32"
    """Type of weights and activations; optimizer state is always float32."""
    seed: int = 1234
    """Seed of the initial weights and of the order of samples."""
    log_interval: int = 10
    """Steps between two lines of the log; TensorBoard gets every step."""
    eval_interval: int = 100
    """Steps between two validations; the last step is always validated."""
    eval_steps: int = 10
    """Global batches of one validation, at most."""

    def __post_init__(self) -> None:
        _one_of(("float32", "bfloat16"), self, "precision")
        _at_least(1, self, "train_steps", "stop_after_step", "micro_batch_size", "global_batch_size")
        _at_least(1, self, "log_interval", "eval_interval", "eval_steps")
        _at_least(0, self, "seed")
        if self.stop_after_step is not None and self.stop_after_step > self.train_steps:
            raise ConfigError(
                f"TrainingConfig.stop_after_step = {self.stop_after_step} is over train_steps = {self.train_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where a run lives on disk."""

    directory: str = "runs/default"
    """The run's folder: checkpoints/, tensorboard/, ledger.json, run.yaml."""
    save_interval: int = 1000
    """Steps between two checkpoints; the last step is always saved."""
    keep_last: int | None = None
    """Checkpoints to keep; older ones are removed once a newer one is whole. None keeps all."""
    resume: bool = True
    """Go on from the newest complete checkpoint in the folder, if there is one; the model must be the same."""
    init_from: str | None = None
    """A checkpoint to take the weights from (only the weights) when the run starts anew; tokens may be
    routed in another way than there."""

    def __post_init__(self) -> None:
        _at_least(1, self, "save_interval", "keep_last")
        if not self.directory.strip():
            raise ConfigError("CheckpointConfig.directory is empty; name the run's folder, such as runs/first")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        check_layout(self.model, self.parallel)
        context, sharing = self.parallel.context_parallel_size, self.parallel.sequence_parallel
        if self.data.reset_at_eod and (context > 1 or sharing):
            raise ConfigError(
                f"data.reset_at_eod is true with context_parallel_size = {context} and sequence_parallel = {sharing}; "
                "documents can be kept apart only where each process has whole sequences"
            )

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
        """Micro batches of one step on each data-parallel process, for a launch of ``world_size`` processes."""
        data_parallel = self.parallel.data_parallel_size(world_size)
        together = self.training.micro_batch_size * data_parallel
        if self.training.global_batch_size % together:
            raise ConfigError(
                f"training.global_batch_size = {self.training.global_batch_size} is not divisible by "
                f"micro_batch_size x data-parallel size = {self.training.micro_batch_size} x {data_parallel} "
                f"= {together}"
            )
        return self.training.global_batch_size // together


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise a ConfigError, with the numbers, when ``model`` cannot be cut as ``parallel`` says."""
    tensor, tensor_name = parallel.tensor_model_parallel_size, "tensor_model_parallel_size"
    _divides(tensor, tensor_name, model.num_attention_heads, "num_attention_heads")
    _divides(tensor, tensor_name, model.query_groups, "num_query_groups")
    _divides(tensor, tensor_name, model.ffn_hidden_size, "ffn_hidden_size")
    _divides(tensor, tensor_name, model.shared_expert_intermediate_size, "shared_expert_intermediate_size")
    _divides(tensor, tensor_name, model.padded_vocab_size, "the padded vocabulary")
    _divides(parallel.pipeline_model_parallel_size, "pipeline_model_parallel_size", model.num_layers, "num_layers")
    expert = parallel.expert_model_parallel_size
    context = parallel.context_parallel_size
    if model.ffn == "top_k_moe" and max(tensor, expert, context) > 1:
        raise ConfigError(
            f"tensor, expert and context parallel sizes are {tensor}, {expert} and {context}; ffn = top_k_moe, a "
            "baseline to compare with, is cut over pipeline stages and data-parallel processes only"
        )
    if expert > 1 and model.ffn != "soft_moe":
        raise ConfigError(f"expert_model_parallel_size = {expert}, but ffn = {model.ffn} has no experts to share")
    if model.ffn == "soft_moe":
        _divides(expert, "expert_model_parallel_size", model.num_experts, "num_experts")
    _check_pieces(model, parallel)


def _check_pieces(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise a ConfigError when sequences cannot be cut into the pieces of context and sequence parallelism."""
    context, sharing = parallel.context_parallel_size, parallel.sequence_parallel_size
    cuts = []  # numbers of equal pieces that sequences are cut into, with their names
    if context > 1:
        cuts.append((2 * context, f"2 x context_parallel_size = {2 * context}"))
    if sharing > 1:
        name = "tensor_model_parallel_size" if context == 1 else "tensor_model_parallel_size x context_parallel_size"
        cuts.append((sharing * context, f"{name} = {sharing * context} (sequence_parallel)"))
    for pieces, name in cuts:
        if model.sequence_length % pieces:
            raise ConfigError(f"sequence_length = {model.sequence_length} is not divisible by {name}")
        piece = model.sequence_length // pieces
        if model.ffn == "soft_moe" and model.routing_mode == "merged" and piece % model.block_length:
            raise ConfigError(
                f"block_length = {model.block_length} does not divide {piece}, the tokens of each of the {pieces} "
                f"pieces that sequences are cut into by {name}; in routing_mode merged a segment of block_length "
                "tokens lies on one process"
            )


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dictionaries and lists, as it stands in YAML."""
    return dataclasses.asdict(config)


def from_dict(kind: type, values: dict[str, Any], origin: str) -> Any:
    """Build a config dataclass from plain values.

    Args:
        kind: the dataclass to build.
        values: what :func:`to_dict` gave; nested sections are dictionaries.
        origin: where the values came from, for the message.

    Raises:
        ConfigError: a key is unknown or a value is out of range.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{origin}: unknown key {unknown[0]!r} in {kind.__name__}; it has {', '.join(fields)}")
    sections = {
        "model": ModelConfig,
        "parallel": ParallelConfig,
        "data": DataConfig,
        "optimizer": OptimizerConfig,
        "training": TrainingConfig,
        "checkpoint": CheckpointConfig,
    }
    built = {
        name: from_dict(sections[name], value, origin) if kind is RunConfig else value for name, value in values.items()
    }
    return kind(**built)


def dump_yaml(config: Any) -> str:
    """A config as YAML text that :func:`from_dict` and the command line read back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
