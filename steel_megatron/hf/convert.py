"""Checkpoints to Hugging Face folders and back, in one process, without building the model.

Both directions check everything before they write, write under a temporary name, and are exact: a folder that is
imported and exported again has the same bits.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from steel_megatron.config import ModelConfig, TokenizerKind
from steel_megatron.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from steel_megatron.errors import CheckpointError
from steel_megatron.files import exclusive_lock, replace_folder
from steel_megatron.hf import mapping
from steel_megatron.log import get_logger, progress
from steel_megatron.parallel.topology import alone, initialize_alone
from steel_megatron.platform import prepare

if TYPE_CHECKING:
    from steel_megatron.train.checkpoint import CheckpointInfo

logger = get_logger(__name__)

CODE = ("configuration_steel.py", "modeling_steel.py")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
# What shows that a folder is an earlier output, which may be replaced.
EXPORT_MARK, CHECKPOINT_MARK = "modeling_steel.py", "steel.json"


def export_hf(
    checkpoint_path: Path,
    output: Path,
    tokenizer: tuple[TokenizerKind, str] | None = None,
    dtype: str | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Turn a checkpoint into a folder that transformers loads.

    Args:
        checkpoint_path: the checkpoint's folder.
        output: the folder to make; it appears only when it is complete.
        tokenizer: kind and path of the tokenizer to export with it.
        dtype: ``float32`` or ``bfloat16``; None keeps the type it was trained in.
        overwrite: whether an earlier folder of that name may be replaced.

    Raises:
        CheckpointError: the checkpoint is not whole, the exported code computes no such model, the tokenizer has more
            ids than the model, or the folder cannot be made.
        ConfigError: the launch has more than one process.
        DataError: the tokenizer cannot be loaded or exported.
    """
    checkpoint_path, output = checkpoint_path.resolve(), output.resolve()
    _check_output(output, overwrite, checkpoint_path, EXPORT_MARK)
    loaded = load_tokenizer(*tokenizer) if tokenizer else None
    info, tensors = read_checkpoint(checkpoint_path, lambda lacks: f"{checkpoint_path} cannot be exported: {lacks}")
    if loaded is not None and loaded.vocab_size > info.model.vocab_size:
        raise CheckpointError(
            f"the tokenizer {tokenizer} has {loaded.vocab_size:,} ids; the model {checkpoint_path} was trained with "
            f"{info.model.vocab_size:,}"
        )
    if dtype:
        tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    main_type = str(tensors["lm_head.weight"].dtype).removeprefix("torch.")
    config = _exported_config(info.model, main_type, loaded)
    with exclusive_lock(output, CheckpointError):
        _check_output(output, overwrite, checkpoint_path, EXPORT_MARK)  # another job may have been faster
        _write_folder(output, tensors, config, loaded)
    logger.info(f"exported step {info.step} as {len(tensors)} tensors to {output}")
    return output


def is_exported(path: Path) -> bool:
    """Whether a folder is an exported or published one; if not, it may be a checkpoint.

    Raises:
        CheckpointError: the folder is neither.
    """
    if (path / "config.json").is_file():
        return True
    if path.is_dir() and not (path / CHECKPOINT_MARK).exists():
        raise CheckpointError(
            f"{path} is neither a checkpoint (it has no {CHECKPOINT_MARK}) nor a Hugging Face folder (it has no "
            "config.json); name a checkpoint's folder, step_..., or one that export-hf made"
        )
    return False


def read_checkpoint(path: Path, refusal: Callable[[str], str]) -> tuple[CheckpointInfo, dict[str, torch.Tensor]]:
    """A checkpoint and its weights under the published names.

    Args:
        path: the checkpoint's folder.
        refusal: makes the message from what the exported model code lacks to compute the model.

    Raises:
        CheckpointError: it is not complete, or the exported model code cannot compute the model.
        ConfigError: the launch has more than one process.
    """
    prepare()  # before megatron-core is imported
    from steel_megatron.train import checkpoint

    info = checkpoint.read_info(path)
    lacks = mapping.why_not_exportable(info.model)
    if lacks is not None:
        raise CheckpointError(refusal(lacks))
    checkpoint.verify(path)
    with alone("a conversion"):
        own = checkpoint.read_tensors(info, [rule.key for rule in mapping.rules(info.model)])
    return info, mapping.to_hf(own, info.model)


def _exported_config(model: ModelConfig, dtype: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["SteelForCausalLM"],
        "model_type": "steel",
        "auto_map": {
            "AutoConfig": "configuration_steel.SteelConfig",
            "AutoModelForCausalLM": "modeling_steel.SteelForCausalLM",
        },
        "dtype": dtype,
    }
    config |= mapping.config_to_hf(model)
    if tokenizer is not None:
        config |= {"bos_token_id": None, "eos_token_id": tokenizer.eod_id}
    return config


def _check_output(output: Path, overwrite: bool, source: Path, mark: str) -> None:
    """Refuse an output that would change or replace what it must not.

    Args:
        output: the folder to make; a path without links, as is ``source``.
        overwrite: whether an earlier output may be replaced.
        source: the folder that is converted.
        mark: a file that every earlier output of this kind holds.

    Raises:
        CheckpointError: the output lies in the source or around it, is there already, or is something else.
    """
    if source == output or source in output.parents:
        raise CheckpointError(f"the output {output} lies inside {source}, which it would change; choose another")
    if output in source.parents:
        raise CheckpointError(f"the output {output} holds {source}, which it would replace; choose another")
    if not output.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{output} is already there; choose another name, or give --overwrite true")
    if not output.is_dir() or not ((output / mark).is_file() or not any(output.iterdir())):
        raise CheckpointError(
            f"{output} is already there and is not an earlier output (it has no {mark}), so it is not replaced; "
            "choose another name, or remove it yourself"
        )


@contextmanager
def _partial_folder(output: Path) -> Iterator[Path]:
    """A folder under a temporary name, which gets its own, synced, when the block ends well and vanishes otherwise."""
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process
        partial.mkdir(parents=True)
        yield partial
        replace_folder(partial, output)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write {output}: {error}; no partial output was kept") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_folder(
    output: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], tokenizer: Tokenizer | None
) -> None:
    with _partial_folder(output) as partial:
        if tokenizer is not None:  # first, because it may not be exportable
            tokenizer.save_pretrained(partial)
            config = config | {"pad_token_id": _pad_id(partial)}
        _write_weights(partial, tensors)
        for name in CODE:
            shutil.copyfile(Path(__file__).with_name(name), partial / name)
        _write_json(partial / "config.json", config)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation: dict[str, Any] = {key: config[key] for key in ids if key in config}
        _write_json(partial / "generation_config.json", {"do_sample": False} | generation)


def _pad_id(folder: Path) -> int | None:
    """The id of the token that pads, of an exported tokenizer."""
    pad = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["pad_token"]
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(pad)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One safetensors file, or several with an index when they would be over 5 GB."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > MAX_SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        _save_file(shards[0], folder / "model.safetensors")
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file that those may read who may read any new file; safetensors alone makes it private."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def import_hf(folder: Path, output: Path, *, overwrite: bool = False) -> Path:
    """Turn a published or exported folder into a checkpoint with weights only, to start a run from.

    Args:
        folder: with config.json and safetensors files.
        output: the checkpoint to make; it appears only when it is complete.
        overwrite: whether an earlier one of that name may be replaced.

    Raises:
        CheckpointError: the folder's settings or tensors are not those of a Steel model, a weight is not finite, or
            the checkpoint cannot be written.
        ConfigError: the launch has more than one process.
    """
    folder, output = folder.resolve(), output.resolve()
    config = read_config(folder)
    model = mapping.config_from_hf(config, str(folder / "config.json"))
    _check_output(output, overwrite, folder, CHECKPOINT_MARK)
    published = read_weights(folder)
    _check_values(published, folder)
    tensors = mapping.from_hf(published, model, str(folder))

    prepare()  # before megatron-core is imported
    from megatron.core.dist_checkpointing import ShardedTensor

    from steel_megatron.train.checkpoint_save import write_checkpoint

    topology = initialize_alone("a conversion")
    state = {key: ShardedTensor.from_rank_offsets(key, tensor, replica_id=0) for key, tensor in tensors.items()}
    with exclusive_lock(output, CheckpointError):
        _check_output(output, overwrite, folder, CHECKPOINT_MARK)  # another job may have been faster
        write_checkpoint({"model": state}, output, model=model, step=0, consumed_samples=0, layout=topology.describe())
    logger.info(f"imported {len(published)} tensors, {sum(map(_count, published.values())):,} numbers, to {output}")
    return output


def _check_values(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    known = (torch.float32, torch.bfloat16, torch.float16)
    for name, tensor in tensors.items():
        if tensor.dtype not in known:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{folder}: {name} is {kind}; weights must be float32, bfloat16 or float16")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{folder}: {name} holds values that are not finite")


def _count(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape)


def read_config(folder: Path) -> dict[str, Any]:
    """What a model folder's config.json holds.

    Raises:
        CheckpointError: the file cannot be read, is not JSON or holds no object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{folder} is not a model's folder: {path.name}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold an object; it holds a {type(config).__name__}")
    return config


def _weight_files(folder: Path) -> list[Path]:
    """The model's safetensors files: those that its index names, or the only one."""
    index = folder / INDEX
    try:
        named = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index} is not an index of safetensors files") from None
    for name in named:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}; it must name files of its own folder")
    files = [folder / name for name in sorted(set(named) or {"model.safetensors"})]
    missing = [path.name for path in files if not path.is_file()]
    if missing and index.is_file():
        raise CheckpointError(f"{index} names {missing[0]}, which is not there")
    if missing:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = (
            "; {} is a pickle, which can execute anything and is not read: if you trust it, load the folder once with "
            "transformers' from_pretrained and write it anew with save_pretrained, which makes safetensors"
        )
        raise CheckpointError(
            f"{folder} has neither {missing[0]} nor {INDEX}{hint.format(pickled[0]) if pickled else ''}"
        )
    return files


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's folder, by published name."""
    files = _weight_files(folder)
    tensors: dict[str, torch.Tensor] = {}
    with progress("reading weights", sum(os.path.getsize(path) for path in files), "bytes") as bar:
        for path in files:
            try:
                with safe_open(path, framework="pt") as weights:
                    found = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise CheckpointError(f"{path} is damaged: {error}") from None
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
            except Exception as error:  # what a crafted header asks of torch
                raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None
            twice = sorted(found.keys() & tensors.keys())
            if twice:
                raise CheckpointError(f"{path} holds {twice[0]} a second time; another file of its folder has it too")
            tensors.update(found)
            bar.advance(os.path.getsize(path))
    return tensors
