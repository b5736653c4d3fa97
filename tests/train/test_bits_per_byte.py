"""Validation in bits per byte: the sizes that corpora record, and what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from steel_megatron.config import DataConfig
from steel_megatron.data.indexed.dataset import open_indexed
from steel_megatron.train.callbacks.bits_per_byte import BitsPerByte, bytes_per_token
from tests.data.configured import preprocess
from tests.fixtures.make_tokenizer import make_tokenizer

TEXTS = {"zh": ["月球是地球的卫星。", "潮汐"], "en": ["The moon has tides, twice a day.", "Tides"]}


class Written:
    """In place of TensorBoard."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}

    def write(self, scalars: dict[str, float], step: int) -> None:
        assert step == 7
        self.scalars |= scalars


def test_losses_are_divided_by_the_bytes_of_a_token(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    for name, texts in TEXTS.items():
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        preprocess([str(tmp_path / f"{name}.jsonl")], tmp_path / name, "huggingface", tmp_path / "tokenizer")
    prefixes = {name: str(tmp_path / f"{name}_text_document") for name in TEXTS}
    sizes = {name: sum(len(text.encode()) for text in texts) for name, texts in TEXTS.items()}
    tokens = {name: open_indexed(prefix).tokens for name, prefix in prefixes.items()}
    assert bytes_per_token([prefixes["zh"]]) == sizes["zh"] / tokens["zh"]
    assert bytes_per_token([*prefixes.values()]) == sum(sizes.values()) / sum(tokens.values())
    (tmp_path / "other.bin").write_bytes(Path(prefixes["zh"] + ".bin").read_bytes())
    (tmp_path / "other.idx").write_bytes(Path(prefixes["zh"] + ".idx").read_bytes())
    assert bytes_per_token([prefixes["zh"], str(tmp_path / "other")]) is None

    data = DataConfig(
        validation={name: [prefix] for name, prefix in prefixes.items()} | {"x": [str(tmp_path / "other")]}
    )
    for term, label in (("loss", "bits_per_byte"), ("loss (non-causal)", "bits_per_byte (non-causal)")):
        written = Written()
        callback = BitsPerByte(written)  # type: ignore[arg-type]
        engine = SimpleNamespace(objective=SimpleNamespace(terms=(term,)))
        run: Any = SimpleNamespace(is_rank0=True, step=7, engine=engine, config=SimpleNamespace(data=data))
        callback.start(run)
        callback.after_validation(run, {"zh": 2.0, "en": 3.0, "x": 4.0})
        expected = {"zh": 2.0, "en": 3.0}
        assert written.scalars == pytest.approx(
            {
                f"validation/{name}/{label}": loss * tokens[name] / sizes[name] / math.log(2)
                for name, loss in expected.items()
            }
        )


def test_every_run_has_it() -> None:
    from steel_megatron.train.callbacks import callbacks_of
    from tests.train.small_run import LAYOUTS, small_run

    assert any(isinstance(one, BitsPerByte) for one in callbacks_of(small_run(LAYOUTS["dp2"])))
