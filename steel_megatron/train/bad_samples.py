"""Which documents a step had that was skipped, or that ended the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from steel_megatron.config import RunConfig
from steel_megatron.data.ledger.session import LedgerSession
from steel_megatron.errors import DataError, TrainingError
from steel_megatron.log import get_logger
from steel_megatron.train.bad_steps import in_words
from steel_megatron.train.engine import Engine

logger = get_logger(__name__)


def note_skipped(engine: Engine, session: LedgerSession, samples: range, why: str) -> None:
    """Log what a skipped step had, and note it for the checkpoint.

    Args:
        engine: the engine that has just skipped it.
        session: the run's ledger.
        samples: the step's samples.
        why: as the step's result says.
    """
    documents = _documents(session, samples)
    engine.bad_steps.name(samples, documents)
    logger.warning(f"step {engine.step_number} is skipped, nothing was updated: {why}; {_had(samples, documents)}")


@contextmanager
def naming_documents(run: RunConfig, session: LedgerSession, samples: range) -> Iterator[None]:
    """Say of an error that ends training in a step which documents the step had.

    Args:
        run: the run's settings.
        session: the run's ledger.
        samples: the step's samples.
    """
    try:
        yield
    except TrainingError as error:
        raise TrainingError(
            f"{error}; {_had(samples, _documents(session, samples))}. To leave them out: steel-megatron data skip "
            f"{run.ledger_path} --samples {samples.start}:{samples.stop}"
        ) from error


def _documents(session: LedgerSession, samples: range) -> dict[str, list[int]]:
    assert session.samples is not None, "the session has started"
    try:
        return session.samples.numbers_of_documents(samples.start, samples.stop)
    except DataError as error:  # this is no time for another error
        logger.warning(f"the documents of samples {samples.start} to {samples.stop - 1} cannot be named: {error}")
        return {}


def _had(samples: range, documents: dict[str, list[int]]) -> str:
    return f"samples {samples.start} to {samples.stop - 1} are of documents {in_words(documents) or 'unknown'}"
