"""Logits of a checkpoint by the library's modules, and of a folder by transformers', one layer in memory at a time.

Both sides compute in float32, from the weights as they were written. A conversion gets its final name only if they
agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from steel_megatron.config import ModelConfig
from steel_megatron.errors import CheckpointError
from steel_megatron.hf.weights import CHUNK, StoredTensor, stored_tensors
from steel_megatron.parallel.topology import Topology
from steel_megatron.train.checkpoint_adapters import WeightFiles

MOST_TOKENS = 256
TOLERANCE = 1e-3
"""Of the largest logit: what summation in another order may change in float32, over many layers."""


@dataclass(frozen=True)
class Agreement:
    """How far two sides agree.

    Attributes:
        tokens: positions that were compared.
        largest_logit: the largest absolute value of a logit.
        largest_difference: the largest absolute difference.
    """

    tokens: int
    largest_logit: float
    largest_difference: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a report."""
        return {**vars(self), "allowed_difference": TOLERANCE * self.largest_logit}

    def check(self, what: str) -> None:
        """Raise a CheckpointError if the two sides differ by more than rounding.

        Args:
            what: the two sides, for the message.
        """
        if not self.largest_difference <= TOLERANCE * self.largest_logit:
            raise CheckpointError(
                f"{what} give other logits: they differ by up to {self.largest_difference:.3g}, the largest is "
                f"{self.largest_logit:.3g}; nothing was kept. This is a fault of the conversion: please report it"
            )


def fixed_tokens(model: ModelConfig) -> torch.Tensor:
    """The token ids that both sides get, int64 [T]: some blocks of the routing, if it has any."""
    blocks = 2 * model.block_length + 3 if model.routing is not None and model.routing.has_blocks else 32
    length = min(model.sequence_length, blocks, MOST_TOKENS)
    return torch.randint(model.vocab_size, (length,), generator=torch.Generator().manual_seed(0))


def compare(checkpoint: torch.Tensor, folder: torch.Tensor) -> Agreement:
    """Compare logits [T, V] of both sides."""
    difference = (checkpoint - folder).abs().max().item()
    return Agreement(len(checkpoint), folder.abs().max().item(), difference)


@torch.no_grad()
def checkpoint_logits(
    files: WeightFiles, model: ModelConfig, topology: Topology, tokens: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """What the library computes from a checkpoint, float32 [T, V].

    Args:
        files: the checkpoint's tensors.
        model: its settings.
        topology: of one process.
        tokens: int64 [T].
        dtype: the type that weights are rounded to first; None for none.
    """
    from steel_megatron.model.spec import build_model
    from steel_megatron.model.weights import sharded_weights

    def read(key: str, start: int, count: int) -> torch.Tensor:
        shape = files.tensors[key].shape
        box = ((start, *(0 for _ in shape[1:])), (count, *shape[1:]))
        part = files.read(key, box)
        return part if dtype is None else part.to(dtype)

    # One layer, and next to no vocabulary: embedding and output matrix are read here, the rows that are needed.
    small = replace(model, num_layers=1, vocab_size=1, make_vocab_size_divisible_by=1, implementation="local")
    stage: Any = build_model(small, topology).eval()
    hidden = _rows("embedding.word_embeddings.weight", tokens, read).unsqueeze(1).to(topology.device)
    angles = stage.rotary_pos_emb(len(tokens))
    weights = sharded_weights(stage)
    for layer in range(model.num_layers):
        for one in weights.values():
            if one.prepend_axis_num:
                one.data.copy_(read(one.key, layer, 1)[0])
        hidden = stage.decoder.layers[0](hidden_states=hidden, attention_mask=None, rotary_pos_emb=angles)[0]
    norm = "decoder.final_layernorm.weight"
    stage.decoder.final_layernorm.weight.copy_(read(norm, 0, model.hidden_size))
    final = stage.decoder.final_layernorm(hidden).squeeze(1).cpu()
    return _outputs(final, model.vocab_size, lambda start, count: read("output_layer.weight", start, count))


@torch.no_grad()
def folder_logits(folder: Path, config: Mapping[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    """What transformers' class computes from a folder, float32 [T, V].

    Args:
        folder: with safetensors files.
        config: its config.json.
        tokens: int64 [T].

    Raises:
        CheckpointError: the class does not take the folder's tensors as they are.
    """
    stored = stored_tensors(folder)

    def read(name: str, start: int, count: int) -> torch.Tensor:
        return stored[name].read_rows(start, count)

    embedding = "model.embed_tokens.weight"
    output = "lm_head.weight" if "lm_head.weight" in stored else embedding
    hidden = _rows(embedding, tokens, read).unsqueeze(0)
    model: Any = None
    with _quiet():
        for layer in range(config["num_hidden_layers"]):
            weights = _weights_of(stored, config, layer)
            if model is not None and model.state_dict().keys() == weights.keys():
                model.load_state_dict(weights)
            else:  # the first layer; and any, if the class has the folder's weights under other names
                model = None
                model = _one_layer(weights, config, layer)
            norm = model.model.norm
            if layer + 1 < config["num_hidden_layers"]:
                model.model.norm = torch.nn.Identity()
            hidden = model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
            model.model.norm = norm
    return _outputs(hidden[0], config["vocab_size"], lambda start, count: read(output, start, count))


Rows = Callable[[str, int, int], torch.Tensor]


def _rows(name: str, tokens: torch.Tensor, read: Rows) -> torch.Tensor:
    return torch.cat([read(name, token, 1) for token in tokens.tolist()]).float()


def _outputs(hidden: torch.Tensor, vocabulary: int, read: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """[T, d] to logits [T, V], with some rows of the output matrix at a time."""
    step = max(1, CHUNK // hidden.size(1))
    rows, logits = torch.empty(step, hidden.size(1)), torch.empty(vocabulary, len(hidden))
    for start in range(0, vocabulary, step):
        count = min(step, vocabulary - start)
        # Into the same memory each time: new pages cost several times what converting does.
        torch.mm(rows[:count].copy_(read(start, count)), hidden.T, out=logits[start : start + count])
    return logits.T


def _weights_of(stored: Mapping[str, StoredTensor], config: Mapping[str, Any], layer: int) -> dict[str, torch.Tensor]:
    """One of a folder's layers as the first, the last norm, and next to no vocabulary."""
    prefix, hidden = f"model.layers.{layer}.", torch.zeros(1, config["hidden_size"])
    weights = {
        "model.layers.0." + name.removeprefix(prefix): one.read()
        for name, one in stored.items()
        if name.startswith(prefix)
    }
    weights |= {"model.embed_tokens.weight": hidden, "lm_head.weight": hidden.clone()}
    return weights | {"model.norm.weight": stored["model.norm.weight"].read()}


def _one_layer(weights: Mapping[str, torch.Tensor], config: Mapping[str, Any], layer: int) -> Any:
    """A model in float32 of the weights of one layer, whose number is for the message."""
    small = copy.deepcopy(dict(config)) | {"num_hidden_layers": 1, "vocab_size": 1, "tie_word_embeddings": False}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "layer_types", "auto_map", "dtype", "torch_dtype"):
        small.pop(name, None)
    kind, settings = _class_of(small)
    model, loading = kind.from_pretrained(
        None,
        config=settings,
        state_dict={name: one.float() for name, one in weights.items()},
        dtype=torch.float32,
        output_loading_info=True,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if loading.get(problem):
            first = sorted(map(str, loading[problem]))[0]
            raise CheckpointError(f"{kind.__name__} does not take the weights of layer {layer}: {problem}: {first}")
    return model.eval()


def _class_of(config: dict[str, Any]) -> tuple[Any, Any]:
    if "FFN_type" in config:
        from steel_megatron.hf.configuration_steel import SteelConfig
        from steel_megatron.hf.modeling_steel import SteelForCausalLM

        # Published models call themselves qwen2.
        return SteelForCausalLM, SteelConfig(**{name: one for name, one in config.items() if name != "model_type"})
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: Any = AutoConfig.for_model(**config)
    mapped: Any = AutoModelForCausalLM._model_mapping
    return mapped[type(settings)], settings


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and notes on models that are made to be thrown away."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
