"""Checkpoints to Hugging Face folders, in one process, a tensor at a time.

Everything is checked before the folder gets its name: every tensor is accounted for, and transformers computes from the
folder what the library computes from the checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch

from steel_megatron.config import TokenizerKind
from steel_megatron.data.ledger.ledger import Ledger
from steel_megatron.data.tokenizing.chat_template import ChatTemplate
from steel_megatron.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from steel_megatron.errors import CheckpointError, DataError
from steel_megatron.files import exclusive_lock
from steel_megatron.hf import mapping
from steel_megatron.hf.architectures import CLASSES, STEEL, architecture_for, constant_shapes, stock_config
from steel_megatron.hf.card import write_card
from steel_megatron.hf.folder import partial_folder, write_json
from steel_megatron.hf.paths import MARKS, REPORT, check_output
from steel_megatron.hf.texts import finetuned
from steel_megatron.hf.weights import Planned, write_weights
from steel_megatron.log import get_logger, progress
from steel_megatron.parallel.topology import Topology, alone
from steel_megatron.platform import prepare
from steel_megatron.train.model_path import find_checkpoint

if TYPE_CHECKING:
    from steel_megatron.train.checkpoint_adapters import WeightFiles
    from steel_megatron.train.checkpoint_info import CheckpointInfo

logger = get_logger(__name__)

CODE = ("configuration_steel.py", "modeling_steel.py")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_BYTES = 5 * 10**9


def export_hf(
    checkpoint_path: Path,
    output: Path,
    tokenizer: tuple[TokenizerKind, str] | None = None,
    dtype: str | None = None,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_other_tokenizer: bool = False,
    separate_adapters: bool = False,
) -> Path:
    """Turn a checkpoint into a folder that transformers loads.

    Args:
        checkpoint_path: the checkpoint's folder, or a run's, whose newest checkpoint is taken.
        output: the folder to make; it appears only when it is complete.
        tokenizer: kind and path of the tokenizer to export with it.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None keeps the type it was trained in.
        overwrite: whether an earlier folder of that name may be replaced.
        max_shard_bytes: most bytes of a file of weights.
        allow_other_tokenizer: whether the tokenizer may be another one than made the run's corpora.
        separate_adapters: whether to write the checkpoint's adapters alone, in peft's format, and not the model that
            they make of its base.

    Raises:
        CheckpointError: the checkpoint is not whole, has no adapters to be written alone, neither a stock architecture
            nor the exported code computes such a model, the tokenizer does not fit it, both sides give other logits, or
            the folder cannot be made.
        ConfigError: the launch has more than one process.
        DataError: the tokenizer cannot be loaded or exported.
    """
    info = find_checkpoint(checkpoint_path.resolve())
    checkpoint_path, output = info.path, output.resolve()
    check_output(output, overwrite, checkpoint_path, MARKS)
    loaded = load_tokenizer(*tokenizer) if tokenizer else None
    prepare()  # before megatron-core is imported
    from steel_megatron.train import checkpoint

    try:
        architecture, reason = architecture_for(info.model)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint_path} cannot be exported: {error}") from None
    if separate_adapters and info.base is None:
        raise CheckpointError(
            f"{checkpoint_path} holds a whole model, no adapters; export it without --adapters separate"
        )
    checkpoint.verify(checkpoint_path)
    if loaded is not None and tokenizer is not None:
        _check_tokenizer(loaded, tokenizer, info, allow_other_tokenizer)
    files = checkpoint.weight_files(info)
    _check_tensors(files, info)
    export = _Export(info, files, architecture, reason, DTYPES[dtype] if dtype else None, max_shard_bytes)
    with alone("a conversion") as topology, exclusive_lock(output, CheckpointError):
        check_output(output, overwrite, checkpoint_path, MARKS)  # another job may have been faster
        with partial_folder(output) as partial:
            (export.write_adapters if separate_adapters else export.write)(partial, topology, loaded)
    if separate_adapters and info.base is not None:
        logger.info(f"exported the adapters of step {info.step} to {output}; they fit the exported {info.base.path}")
        return output
    what = f"step {info.step} as {CLASSES[architecture]}" + (f", because {reason}" if reason else "")
    logger.info(f"exported {what}, to {output}")
    return output


def _check_tokenizer(
    loaded: Tokenizer, named: tuple[TokenizerKind, str], info: CheckpointInfo, allow_other: bool
) -> None:
    if loaded.vocab_size > info.model.vocab_size:
        raise CheckpointError(
            f"the tokenizer {named} has {loaded.vocab_size:,} ids; the model {info.path} was trained with "
            f"{info.model.vocab_size:,}"
        )
    ledger = info.path / "ledger.json"
    recorded = Ledger.load(ledger).history.tokenizer if ledger.exists() else None
    if recorded is None or recorded == loaded.fingerprint:
        return
    told = (
        f"the tokenizer {named[1]} has the fingerprint {loaded.fingerprint}; the corpora that {info.path} was trained "
        f"on were made with {recorded}"
    )
    if not allow_other:
        raise DataError(f"{told}: texts would get other ids. Name that one, or give --allow_other_tokenizer true")
    logger.warning(told)


def _check_tensors(files: WeightFiles, info: CheckpointInfo) -> None:
    """Every tensor of the model is there, and there is no other one of a model's."""
    model = info.model
    expected = {
        rule.key: (model.num_layers, *rule.shape) if rule.per_layer else rule.shape for rule in mapping.rules(model)
    }
    found = {
        name: facts.shape
        for name, facts in files.tensors.items()
        if name.startswith(("decoder.", "embedding.", "output"))
    }
    mapping.check_shapes(found, expected, f"the checkpoint {info.path}")


@dataclass(frozen=True)
class _Export:
    """A checkpoint on its way to a folder.

    Attributes:
        info: the checkpoint.
        files: its tensors.
        architecture: what it is exported as.
        reason: why that is no stock one.
        dtype: of the weights; None keeps theirs.
        max_shard_bytes: most bytes of a file of weights.
    """

    info: CheckpointInfo
    files: WeightFiles
    architecture: str
    reason: str | None
    dtype: torch.dtype | None
    max_shard_bytes: int

    def write(self, folder: Path, topology: Topology, tokenizer: Tokenizer | None) -> None:
        """Fill the folder, and make sure that both sides agree.

        Args:
            folder: the new one, under its temporary name.
            topology: of one process.
            tokenizer: goes into the folder; None for none.
        """
        from steel_megatron.hf import compare

        config = self._config(tokenizer)
        if tokenizer is not None:  # first, because it may not be exportable
            tokenizer.save_pretrained(folder)
            config["pad_token_id"] = _pad_id(folder)
        ends = _write_chat_template(folder, tokenizer) if tokenizer and finetuned(self.info.path) else []
        planned = self._planned()
        write_weights(folder, planned, self._tensors(planned), self.max_shard_bytes)
        if self.architecture == STEEL:
            for name in CODE:
                shutil.copyfile(Path(__file__).with_name(name), folder / name)
        write_json(folder / "config.json", config)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation: dict[str, Any] = {key: config[key] for key in ids if key in config}
        if more := [end for end in ends if end != generation["eos_token_id"]]:
            generation["eos_token_id"] = [generation["eos_token_id"], *more]
        write_json(folder / "generation_config.json", {"do_sample": False} | generation)

        tokens = compare.fixed_tokens(self.info.model)
        ours = compare.checkpoint_logits(self.files, self.info.model, topology, tokens, self.dtype)
        agreement = compare.compare(ours, compare.folder_logits(folder, config, tokens))
        agreement.check(f"{self.info.path} and the folder made of it")
        model = self.info.model
        write_json(
            folder / REPORT,
            {
                "source": str(self.info.path),
                "step": self.info.step,
                "architecture": CLASSES[self.architecture],
                "reason": self.reason,
                "dtype": config["dtype"],
                "tensors": len(planned),
                "bytes": sum(one.nbytes for one in planned.values()),
                "vocabulary": {"rows": model.vocab_size, "padding_removed": model.padded_vocab_size - model.vocab_size},
                "logits": agreement.to_dict(),
            },
        )
        write_card(folder, self.info, CLASSES[self.architecture], self.reason, agreement)

    def write_adapters(self, folder: Path, topology: Topology, tokenizer: Tokenizer | None) -> None:
        """Fill the folder with adapters alone.

        Args: as for :meth:`write`.
        """
        from steel_megatron.hf import adapters
        from steel_megatron.train.checkpoint_adapters import MergedFiles

        assert isinstance(self.files, MergedFiles) and self.info.base is not None
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
            if finetuned(self.info.path):
                _write_chat_template(folder, tokenizer)
        tensors = adapters.write_adapters(folder, self.info, self.files.adapters, self.dtype)
        report = {"source": str(self.info.path), "step": self.info.step, "base": str(self.info.base.path)}
        size = sum(one.nbytes for one in tensors.values())
        write_json(folder / REPORT, {**report, "tensors": len(tensors), "bytes": size})

    def _config(self, tokenizer: Tokenizer | None) -> dict[str, Any]:
        dtype = self.dtype or self.files.tensors["output_layer.weight"].dtype
        config: dict[str, Any] = {"dtype": mapping.type_name(dtype)}
        if self.architecture == STEEL:
            config |= {
                "architectures": [CLASSES[STEEL]],
                "model_type": STEEL,
                "auto_map": {
                    "AutoConfig": "configuration_steel.SteelConfig",
                    "AutoModel": "modeling_steel.SteelModel",
                    "AutoModelForCausalLM": "modeling_steel.SteelForCausalLM",
                    "AutoModelForSequenceClassification": "modeling_steel.SteelForSequenceClassification",
                },
                **mapping.config_to_hf(self.info.model),
            }
        else:
            config |= stock_config(self.info.model, self.architecture)
        if tokenizer is not None:
            config |= {"bos_token_id": None, "eos_token_id": tokenizer.eod_id}
        return config

    def _groups(self) -> list[tuple[mapping.Rule, int]]:
        """What is read at once, a rule and its layer, in the order of the network."""
        model = self.info.model
        rules = mapping.rules(model)
        first, *last = (rule for rule in rules if not rule.per_layer)
        inner = [(rule, layer) for layer in range(model.num_layers) for rule in rules if rule.per_layer]
        return [(first, 0), *inner, *((rule, 0) for rule in last)]

    def _planned(self) -> dict[str, Planned]:
        shapes = mapping.published_shapes(self.info.model)
        planned = {}
        for rule, layer in self._groups():
            dtype = self.dtype or self.files.tensors[rule.key].dtype
            for name in (name.format(layer=layer) for name in rule.names):
                planned[name] = Planned(shapes[name], dtype)
        assert planned.keys() == shapes.keys()
        dtype = self.dtype or self.files.tensors["output_layer.weight"].dtype
        constant = constant_shapes(self.info.model, self.architecture)
        return planned | {name: Planned(shape, dtype) for name, shape in constant.items()}

    def _tensors(self, planned: dict[str, Planned]) -> Iterator[tuple[str, torch.Tensor]]:
        made = set()
        with progress("exporting", len(planned), "tensors") as bar:
            for rule, layer in self._groups():
                names = [name.format(layer=layer) for name in rule.names]
                parts = rule.split(self._read(rule, layer))
                for name in names:
                    made.add(name)
                    yield name, parts.pop(0).to(planned[name].dtype)
                    bar.advance(1)
            for name in (name for name in planned if name not in made):
                yield name, torch.zeros(planned[name].shape, dtype=planned[name].dtype)

    def _read(self, rule: mapping.Rule, layer: int) -> torch.Tensor:
        if not rule.per_layer:
            return self.files.read(rule.key, ((0,) * len(rule.shape), rule.shape))
        return self.files.read(rule.key, ((layer, *(0 for _ in rule.shape)), (1, *rule.shape)))[0]


def _write_chat_template(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """Give an exported tokenizer the template of the conversations that the model was trained on.

    Returns:
        the tokens that end an answer.
    """
    try:
        template = ChatTemplate(tokenizer)
    except DataError as error:  # only of a tokenizer that did not make the run's corpora
        logger.warning(f"the folder has no chat template: {error}")
        return []
    if template.portable != tokenizer.chat_template:
        path = folder / "tokenizer_config.json"
        write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"chat_template": template.portable})
    return sorted(template.ends)


def _pad_id(folder: Path) -> int | None:
    """The id of the token that pads, of an exported tokenizer."""
    pad = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["pad_token"]
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(pad)
