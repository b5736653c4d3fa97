"""A small bilingual corpus and a tokenizer trained on it, shared by the tests of the data layer."""

from __future__ import annotations

import inspect
import itertools
import json
import random
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from steel_megatron.data.tokenizing.sentencepiece_training import train_sentencepiece
from steel_megatron.data.tokenizing.tokenizer import SentencePieceTokenizer
from tests.fixtures.make_samples import Sample, make_samples
from tests.fixtures.make_tokenizer import VOCABULARY, make_tokenizer

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


REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
"""Samples of the real sources and the published tokenizer, which are not part of the project."""
KINDS = ["made", *(["real"] if REAL.is_dir() else [])]
"""Which samples and tokenizers there are here: the project's own everywhere, the real ones where they are at hand."""

MADE_LINES = {
    "wanjuan": "wanjuan.jsonl",
    "firefly": "firefly.jsonl",
    "belle": "belle_2M.json",
    "baidu_qa": "baike_qa.json",
}
REAL_LINES = {
    "wanjuan": "part-010205-a894b46e_sample.jsonl",
    "firefly": "firefly-train-1.1M_sample.jsonl",
    "belle": "train_2M_CN_sample.json",
    "baidu_qa": "baike_qa_train_sample.json",
}


def rows_of(path: Path, count: int) -> list[dict[str, str]]:
    """The first rows of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, count)]


@dataclass(frozen=True)
class Qwen:
    """The files of Qwen's tokenizer, or of one in its layout; its special tokens come after the vocabulary.

    Attributes:
        folder: where they are.
        words: ids of the vocabulary.
    """

    folder: Path
    words: int

    @property
    def endoftext(self) -> int:
        return self.words

    @property
    def start(self) -> int:
        return self.words + 1

    @property
    def end(self) -> int:
        return self.words + 2

    @property
    def vocab_size(self) -> int:
        return self.words + 3


@pytest.fixture(scope="session")
def made_samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sample]:
    """The project's own samples by file name."""
    return make_samples(tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="session")
def sample_files(kind: str, made_samples: dict[str, Sample]) -> dict[str, Path]:
    """A file of JSON lines of each of some sources, by the source's name."""
    if kind == "made":
        return {source: made_samples[name].path for source, name in MADE_LINES.items()}
    return {source: REAL / "steel_samples" / name for source, name in REAL_LINES.items()}


@pytest.fixture(scope="session")
def made_qwen(tmp_path_factory: pytest.TempPathFactory) -> Qwen:
    folder = tmp_path_factory.mktemp("made_qwen")
    make_tokenizer(folder)
    return Qwen(folder, VOCABULARY)


@pytest.fixture(scope="session")
def real_qwen() -> Qwen:
    return Qwen(REAL / "qwen_tokenizer", 151643)


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every test that uses this runs once with each kind of samples and tokenizer."""
    return request.param


@pytest.fixture(scope="session")
def qwen(kind: str, request: pytest.FixtureRequest) -> Qwen:
    return request.getfixturevalue(f"{kind}_qwen")


@pytest.fixture(scope="session")
def qwen_by_transformers(qwen: Qwen) -> PreTrainedTokenizerBase:
    """What transformers makes of it."""
    return AutoTokenizer.from_pretrained(str(qwen.folder))


@pytest.fixture(scope="session")
def sp(sp_model: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(sp_model)


@pytest.fixture(scope="session")
def hf_folder(sp: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("hf")
    sp.save_pretrained(folder)
    return folder
