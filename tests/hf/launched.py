"""What the tests of conversion do in launched processes.

In a module of its own, without transformers, whose import would take seconds in every process.
"""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from steel_megatron.config import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from steel_megatron.errors import CheckpointError, DataError, SteelError
from steel_megatron.hf import convert, exporting
from steel_megatron.train import checkpoint
from tests.hf import golden


def refused(action: str, *args: Any, **kwargs: Any) -> str:
    """Calls a function of ``convert`` that must raise; returns the message."""
    try:
        getattr(convert, action)(*args, **kwargs)
    except SteelError as error:
        return str(error)
    return "no error"


def import_all(output: Path) -> dict[str, Path]:
    return {name: convert.import_hf(golden.FOLDER / name, output / name) for name in golden.NAMES}


def export_all(imported: dict[str, Path], output: Path) -> dict[str, Path]:
    return {name: convert.export_hf(path, output / name) for name, path in imported.items()}


Pieces = dict[str, torch.Tensor]
"""Parts of tensors, by name, offset and number of axes put in front."""


def pieces(chunks: Any, value_of: Callable[[torch.Tensor], torch.Tensor]) -> Pieces:
    """What ``value_of`` gives for each weight of a stage or of a list of chunks, labelled with its place."""
    from steel_megatron.model.weights import sharded_weights

    return {
        f"{sharded.key}|{','.join(map(str, sharded.global_offset))}|{sharded.prepend_axis_num}": value_of(sharded.data)
        for sharded in sharded_weights(*(chunks if isinstance(chunks, list) else [chunks])).values()
    }


def training_gradients(
    paths: dict[str, Path], parallel: ParallelConfig, inputs: dict[str, dict[str, torch.Tensor]]
) -> dict[str, tuple[float, Pieces]]:
    """For each checkpoint the loss of the training forward, and this process's gradients."""
    from steel_megatron.parallel.topology import initialize

    topology = initialize(parallel)
    from steel_megatron.model.spec import build_model
    from steel_megatron.train.engine import Engine, minimised
    from steel_megatron.train.objective import Batch

    results = {}
    for name, path in paths.items():
        info, given = checkpoint.read_info(path), inputs[name]
        batch = len(given["input_ids"])
        run = RunConfig(
            model=info.model,
            parallel=parallel,
            training=TrainingConfig(micro_batch_size=batch, global_batch_size=batch * topology.data_parallel_size),
        )
        stage = build_model(info.model, topology)
        checkpoint.load_weights(stage, info, info.model)
        engine = Engine(run, topology, stage)
        # Data-parallel processes all see the same batch: their mean is the fixture's.
        ids, labels = given["input_ids"], given["labels"]
        loss = minimised(engine.accumulate_gradients([Batch(ids, labels, torch.ones(labels.shape))])).mean
        gather_gradients(engine.models[0])
        by_storage = {parameter.data_ptr(): parameter.main_grad for parameter in stage.parameters()}
        results[name] = (loss, pieces([stage], lambda weight, of=by_storage: of[weight.data_ptr()].clone()))
    return results


def gather_gradients(model: Any) -> None:
    """Every process's part of the reduced gradients, on all: the distributed optimizer reduces to one part each."""
    import torch.distributed as dist

    if not hasattr(model, "expert_parallel_buffers"):  # the gradients belong to the shards of fully sharded weights
        return
    for buffer in [*model.buffers, *model.expert_parallel_buffers]:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            own = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


def library_logits(models: list[ModelConfig], tokens: torch.Tensor) -> list[tuple[torch.Tensor, Pieces]]:
    """What freshly initialised models of the library compute, and their weights."""
    from steel_megatron.model.spec import build_model
    from steel_megatron.parallel.topology import initialize

    topology, results = initialize(ParallelConfig()), []
    for model in models:
        stage = build_model(model, topology, seed=5)
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        with torch.no_grad():
            for layer in stage.decoder.layers:
                layer.mlp.scale.fill_(4.0)
                # Vectors of different lengths, so that scaling them to length 1 makes a difference.
                layer.pre_mlp_layernorm.weight.copy_(torch.linspace(0.2, 3.0, model.hidden_size))
                if model.slot_input == "normalized":  # short vectors; the experts are cubic
                    layer.mlp.experts.up.mul_(4.0)
                    layer.mlp.experts.down.mul_(4.0)
            results.append((stage(tokens, positions, None), pieces([stage], lambda weight: weight.detach().clone())))
    return results


def convert_twice(folder: Path, output: Path) -> list[str]:
    """Imports and exports with overwriting asked for and not; returns the messages."""
    convert.import_hf(folder, output / "checkpoint")
    messages = [refused("import_hf", folder, output / "checkpoint")]
    convert.import_hf(folder, output / "checkpoint", overwrite=True)
    convert.export_hf(output / "checkpoint", output / "hf", dtype="bfloat16")
    messages.append(refused("export_hf", output / "checkpoint", output / "hf"))
    convert.export_hf(output / "checkpoint", output / "hf", dtype="bfloat16", overwrite=True)
    messages.append(refused("export_hf", output / "checkpoint", output / "checkpoint" / "hf"))
    messages.append(refused("export_hf", output / "hf", output / "again"))
    return messages


def overwrite_what_must_stay(folder: Path, run: Path) -> list[str]:
    """Conversions that would take something with them; returns the messages."""
    from steel_megatron.files import exclusive_lock

    saved = convert.import_hf(folder, run / "checkpoints" / "step_00000001")
    (run / "thesis").mkdir()
    (run / "thesis" / "thesis.tex").write_text("years of work")
    (run / "link").symlink_to(run / "checkpoints")
    messages = [
        refused("export_hf", saved, run, overwrite=True),
        refused("export_hf", saved, run / "link", overwrite=True),
        refused("export_hf", saved, run / "thesis", overwrite=True),
        refused("export_hf", saved, run / "thesis" / "thesis.tex", overwrite=True),
        refused("import_hf", folder, run / "thesis", overwrite=True),
        refused("import_hf", folder, folder.parent, overwrite=True),
    ]
    with exclusive_lock(run / "hf", CheckpointError):
        messages.append(refused("export_hf", saved, run / "hf"))
    return messages


def convert_types(folder: Path, output: Path) -> None:
    convert.export_hf(convert.import_hf(folder, output / "checkpoint"), output / "hf")


def export_with_tokenizers(folder: Path, output: Path, fitting: Path, too_large: Path) -> list[str]:
    """Exports with a tokenizer that fits, with one that does not, and with one that fails halfway."""
    saved = convert.import_hf(folder, output / "checkpoint")
    convert.export_hf(saved, output / "hf", ("huggingface", str(fitting)))
    messages = [refused("export_hf", saved, output / "too_large", ("huggingface", str(too_large)))]
    loaded = exporting.load_tokenizer("huggingface", fitting)

    def fail(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("half of it")
        raise DataError("cannot be exported")

    loaded.save_pretrained = fail  # type: ignore[method-assign]
    exporting.load_tokenizer = lambda *_: loaded
    messages.append(refused("export_hf", saved, output / "failed", ("huggingface", str(fitting))))
    return messages


TOOL = Path(__file__).resolve().parents[2] / "tools/convert_checkpoint.py"


def run_tool(calls: list[list[str]]) -> list[tuple[Any, str]]:
    """Exit code and stderr of each call of the script."""
    results = []
    for words in calls:
        sys.argv = [str(TOOL), *words]
        error = io.StringIO()
        code = None
        with contextlib.redirect_stderr(error):
            try:
                runpy.run_path(str(TOOL), run_name="__main__")
            except SystemExit as stopped:
                code = stopped.code
        results.append((code, error.getvalue()))
    return results
