"""What a command refuses before it imports torch and what builds on it, which takes seconds."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from steel_megatron.config import RunConfig
from steel_megatron.errors import ConfigError, DataError


def check_tokenizer(path: str | None) -> None:
    """Raise a DataError if an option names a tokenizer that is not there."""
    if path is not None and not Path(path).exists():
        raise DataError(f"the tokenizer {path} does not exist")


def check_report(path: str | None) -> None:
    """Raise a DataError if the file for a report is a folder."""
    if path and os.path.isdir(path):
        raise DataError(f"the report {path} is a folder; name a file")


def check_run(run: RunConfig) -> None:
    """Refuse a run that does not fit its launch, or a run of one process whose paths are not there.

    Several processes find the latter later, and agree on it: not each of them may see the ledger.

    Raises:
        SteelError: the launch does not fit, or there is no tokenizer, no ledger, no corpus or no model to start from.
    """
    from steel_megatron.data.indexed.format import IDX
    from steel_megatron.data.ledger.session import read_ledger
    from steel_megatron.files import with_suffix
    from steel_megatron.parallel.launch import read_launch, refuse_without_srun
    from steel_megatron.train.model_path import find_model

    refuse_without_srun(os.environ)
    world_size = read_launch(os.environ).world_size
    run.num_micro_batches(world_size)
    if world_size > 1:
        return
    named = run.data.tokenizer_path
    if named is not None and not Path(named).exists() and not run.ledger_path.exists():  # else it may have been moved
        raise ConfigError(f"data.tokenizer_path is {named}: the tokenizer {named} does not exist")
    is_new = read_ledger(run.ledger_path, run.model.sequence_length, run.data.train) is None
    for prefix in itertools.chain(run.data.train if is_new else (), *run.data.validation_sets.values()):
        if not with_suffix(prefix, IDX).exists():
            raise DataError(f"cannot read {with_suffix(prefix, IDX)}: No such file or directory")
    if run.checkpoint.init_from and not any(run.checkpoints_dir.glob("step_*")):
        find_model(run.checkpoint.init_from)
