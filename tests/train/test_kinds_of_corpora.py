"""Which corpora an objective takes: what it does not take is refused before anything is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from steel_megatron.config import DataConfig, ParallelConfig
from steel_megatron.data.indexed.dataset import open_indexed
from steel_megatron.data.indexed.labels import open_labels
from steel_megatron.data.ledger.ledger import edit
from steel_megatron.data.ledger.session import LedgerSession
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.train import batches
from tests.data.corpora import write
from tests.data.ledger.test_session import Alone
from tests.layouts.sft_runs import prepared as conversations
from tests.layouts.test_dpo import prepared as pairs
from tests.train.small_run import small_run

TOPOLOGY: Any = SimpleNamespace(launch=SimpleNamespace(rank=0))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("corpora")
    return {
        "next_token": write(folder / "plain", [list(range(100))] * 20),
        "sft": conversations(folder),
        "dpo": pairs(folder),
    }


def session_of(folder: Path, objective: str, data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> LedgerSession:
    """The session of a run whose batches are ready."""
    monkeypatch.setattr(batches, "raise_if_any_rank_failed", lambda action: action())
    base = small_run(ParallelConfig(), str(folder))
    run = dataclasses.replace(
        base,
        data=dataclasses.replace(data, reset_at_eod=True),
        model=dataclasses.replace(base.model, sequence_length=192, vocab_size=100_000),
        training=dataclasses.replace(base.training, objective=objective),
    )
    session = LedgerSession(run, Alone())
    batches.Batches(run, TOPOLOGY, session)
    return session


@pytest.mark.parametrize(
    ("objective", "corpus", "message"),
    [
        ("sft", "next_token", "have no labels, but training.objective = sft takes them"),
        ("next_token", "sft", "have labels, but training.objective = next_token takes none"),
        ("sft", "dpo", "holds pairs, but training.objective = sft takes conversations"),
        ("sft_per_sample", "dpo", "holds pairs, but training.objective = sft_per_sample takes conversations"),
        ("dpo", "sft", "holds conversations, but training.objective = dpo takes pairs"),
    ],
)
def test_refused_before_there_is_a_ledger(
    objective: str, corpus: str, message: str, corpora: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = corpora[objective.removesuffix("_per_sample")], corpora[corpus]
    with pytest.raises(ConfigError, match=message):
        session_of(tmp_path, objective, DataConfig(train=[other]), monkeypatch)
    with pytest.raises(ConfigError, match=message):
        session_of(tmp_path, objective, DataConfig(train=[own], validation=[other]), monkeypatch)
    session_of(tmp_path, objective, DataConfig(train=[own]), monkeypatch).start()  # nothing is in its way


def test_pairs_that_are_appended_to_conversations_are_not_read(
    corpora: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session = session_of(tmp_path, "sft", DataConfig(train=[corpora["sft"]]), monkeypatch)
    session.start()
    with edit(tmp_path / "ledger.json") as file:
        file.ledger = file.ledger.append([corpora["dpo"]])
    session.sync(1, 8)
    assert "deferred to the next checkpoint" in caplog.text and "holds pairs" in caplog.text


def test_labels_are_no_corpus(corpora: dict[str, str]) -> None:
    labels = corpora["sft"].replace("_messages_", "_labels_")
    with pytest.raises(DataError, match=f"{labels} holds labels, not tokens; name {corpora['sft']}"):
        open_labels(open_indexed(labels))
