"""A small bilingual corpus and a tokenizer trained on it, shared by the tests of the data layer."""

from __future__ import annotations

import inspect
import json
import random
import textwrap
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from steel_megatron.data.sentencepiece_training import train_sentencepiece
from steel_megatron.data.tokenizer import SentencePieceTokenizer

ZH = (
    "长江发源于青藏高原，向东流经十一个省市，最后注入东海。",
    "光合作用把阳光、水和二氧化碳变成糖和氧气。",
    "问：为什么天空是蓝色的？答：因为空气对蓝光的散射更强。",
    "她把书放回书架，轻轻关上了门，走进了雨里。",
    "2023年，全国共有1234万名考生参加了考试，比上一年多了5%。",
    "小明有三个苹果，给了妹妹一个，还剩下两个。",
)
EN = (
    "The river rises in the mountains and reaches the sea after a long way.",
    "Water boils at 100 degrees; at 4 degrees it is heaviest.",
    "She put the book back on the shelf, closed the door and went out.",
    "What is the difference between speed and velocity?",
)


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Documents of a few sentences each, no two alike: Chinese, English, code."""
    draw = random.Random(seed)
    code = [textwrap.dedent(inspect.getsource(method)) for method in (random.Random.shuffle, random.Random.sample)]
    texts = []
    for number in range(count):
        kind = draw.choice((ZH, ZH, EN, code))
        texts.append(f"{number}\n" + "\n".join(draw.choice(kind) for _ in range(draw.randint(1, 6))))
    return texts


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    """One JSON row per text."""
    path.write_text("".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 700 ids."""
    return train_sentencepiece(make_texts(300), tmp_path_factory.mktemp("tokenizer") / "small", 700)


@pytest.fixture(scope="session")
def qwen_folder(shared_dir: Path) -> Path:
    """The tokenizer of the published model."""
    return shared_dir / "data" / "qwen_tokenizer"


@pytest.fixture(scope="session")
def qwen_by_transformers(qwen_folder: Path) -> PreTrainedTokenizerBase:
    """What transformers makes of it."""
    return AutoTokenizer.from_pretrained(str(qwen_folder))


@pytest.fixture(scope="session")
def sp(sp_model: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(sp_model)


@pytest.fixture(scope="session")
def hf_folder(sp: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("hf")
    sp.save_pretrained(folder)
    return folder
