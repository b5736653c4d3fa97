"""Log-probabilities of the reference of a run on pairs: computed once, stored in the run's folder, checked."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from steel_megatron.config import RunConfig
from steel_megatron.data.indexed.dataset import IndexedCorpus, content_hash
from steel_megatron.data.indexed.labels import SECOND, open_labels
from steel_megatron.data.ledger.corpora import open_corpus
from steel_megatron.data.ledger.loader import WholeSamples
from steel_megatron.data.ledger.session import LedgerSession
from steel_megatron.errors import CheckpointError, ConfigError, DataError
from steel_megatron.files import disk_errors, sha256_of, write_atomically
from steel_megatron.log import get_logger
from steel_megatron.parallel.agreement import on_rank0, raise_if_any_rank_failed
from steel_megatron.train.batches import Batches
from steel_megatron.train.engine import Engine
from steel_megatron.train.initial_weights import open_initial
from steel_megatron.train.objective.dpo import Dpo

logger = get_logger(__name__)

FORMAT = "steel-megatron-reference-1"
"""Name and version of what is stored."""


def prepare_reference(run: RunConfig, engine: Engine, batches: Batches, session: LedgerSession) -> bool:
    """Give a run on pairs what its reference, ``checkpoint.init_from``, says of all pairs; compute what is not stored.

    Args:
        run: the run's settings.
        engine: of the run; other objectives than DPO are left alone.
        batches: of the run.
        session: the run's ledger, started.

    Returns:
        whether the model now has the reference's weights, as something was computed.

    Raises:
        ConfigError: there is no reference.
        DataError: what is stored is of another reference or of other pairs, or a corpus holds no pairs.
    """
    objective = engine.objective
    if not isinstance(objective, Dpo):
        return False
    if run.checkpoint.init_from is None:
        raise ConfigError("training.objective dpo needs checkpoint.init_from, the model to start from and to refer to")
    origin = open_initial(run.checkpoint.init_from)
    fingerprint = origin.fingerprint()
    computed = False
    for number, corpus in raise_if_any_rank_failed(lambda: _corpora(batches, session)).items():
        path = Path(run.checkpoint.directory) / "reference" / f"{number}.npy"
        record = raise_if_any_rank_failed(lambda corpus=corpus: _record(corpus, fingerprint))  # type: ignore[misc]
        stored = raise_if_any_rank_failed(lambda path=path, record=record: _stored(path, record))  # type: ignore[misc]
        if stored is None:
            if not computed and run.lora.rank is None:
                for chunk in engine.chunks:
                    origin.load(chunk, run.model)
                computed = True
            logger.info(f"computing the reference's log-probabilities of {corpus.documents:,} pairs of {corpus.prefix}")
            samples = WholeSamples([corpus], run.model.sequence_length, number)
            with engine.chunks[0].adapters.disabled():  # without them the model is the reference
                stored = _computed(engine, batches, samples, number)
            on_rank0(lambda path=path, record=record, stored=stored: _store(path, record, stored))  # type: ignore[misc]
        objective.reference[number] = stored
    return computed


def check_reference(engine: Engine, session: LedgerSession) -> None:
    """Raise a DataError when the run's ledger has corpora that the reference has not seen: on all processes."""
    if isinstance(engine.objective, Dpo) and session.ledger is not None:
        history = session.ledger.history
        unknown = [
            history.corpora[number].name for number in history.in_use() if number not in engine.objective.reference
        ]
        if unknown:
            raise DataError(
                f"{', '.join(unknown)} was added while the run was live, and the reference has not seen its pairs; the "
                "same command resumes from the last checkpoint, and computes them first"
            )


def _corpora(batches: Batches, session: LedgerSession) -> dict[int, IndexedCorpus]:
    """The corpora of pairs by their numbers in keys of documents."""
    assert session.ledger is not None
    history, folder = session.ledger.history, session.ledger.folder
    found = {number: open_corpus(history.corpora[number], folder) for number in history.in_use()}
    for samples in batches.validation_sets.values():
        assert isinstance(samples, WholeSamples)
        found |= dict(enumerate(samples.corpora, samples.first))
    return found


def _record(corpus: IndexedCorpus, reference: str) -> dict[str, Any]:
    """What log-probabilities depend on."""
    labels = open_labels(corpus)
    pairs = int((labels.flat & SECOND > 0).sum())
    if pairs != corpus.documents:
        raise DataError(
            f"{corpus.prefix} holds conversations, not pairs ({pairs:,} pairs in {corpus.documents:,} documents); make "
            "pairs with steel-megatron dpo prepare"
        )
    contents = {"content": content_hash(corpus), "labels": content_hash(labels)}
    return {"format": FORMAT, "reference": reference, **contents}


def _stored(path: Path, record: dict[str, Any]) -> torch.Tensor | None:
    """What is stored, float64 [documents, 2]; None if nothing is."""
    if not path.with_suffix(".json").exists():
        return None
    with disk_errors("read", path, DataError):
        try:
            found = json.loads(path.with_suffix(".json").read_bytes())
        except ValueError as error:
            raise DataError(f"{path.with_suffix('.json')} cannot be read: {error}; remove it") from None
        digest = sha256_of(path)
    changed = [name for name, value in {**record, "sha256": digest}.items() if found.get(name) != value]
    if changed:
        raise DataError(
            f"{path} holds log-probabilities of another {changed[0]} ({found.get(changed[0])}, now it is "
            f"{ {**record, 'sha256': digest}[changed[0]] }); use another checkpoint.directory, or remove the folder to "
            "compute them again"
        )
    return torch.from_numpy(np.load(path, allow_pickle=False))


def _store(path: Path, record: dict[str, Any], values: torch.Tensor) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values.numpy(), allow_pickle=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue(), CheckpointError)
    text = json.dumps({**record, "sha256": sha256_of(path)}, indent=2)
    write_atomically(path.with_suffix(".json"), text.encode(), CheckpointError)


def _computed(engine: Engine, batches: Batches, samples: WholeSamples, number: int) -> torch.Tensor:
    """Log-probabilities of all pairs by the model as it is, float64 [documents, 2], on every process."""
    objective, device = engine.objective, engine.topology.device
    assert isinstance(objective, Dpo)
    values = torch.zeros(samples.corpora[0].documents, 2, dtype=torch.float64)
    objective.recorded = {number: values}
    try:
        for part in batches.all_of(samples):
            engine.evaluate(part)
    finally:
        objective.recorded = None
    together = values.to(device)  # each pair was recorded by the processes of one stage and copy that computed it
    dist.all_reduce(together, group=engine.groups.dp_cp)
    dist.all_reduce(together, group=engine.groups.pp)
    return together.cpu()
