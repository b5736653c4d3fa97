"""Every kind of tokenizer under every engine: the same ids from all calls, nothing lost, no control token from text."""

from __future__ import annotations

import json
import logging
import multiprocessing
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from steel_megatron.config import TokenizerEngine
from steel_megatron.data.tokenizing import base as tokenizer_base
from steel_megatron.data.tokenizing import gigatoken_engine as fast_encoding
from steel_megatron.data.tokenizing.base import TokenizerBase
from steel_megatron.data.tokenizing.gigatoken_engine import Gigatoken
from steel_megatron.data.tokenizing.huggingface import HuggingFaceTokenizer
from steel_megatron.data.tokenizing.sentencepiece import SentencePieceTokenizer
from steel_megatron.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from steel_megatron.errors import DataError
from tests.data.conftest import EN, KINDS, ZH, Qwen, make_texts, rows_of
from tests.fixtures.make_samples import Sample
from tests.fixtures.make_tokenizer import make_tokenizer

ENGINES: list[TokenizerEngine] = ["tokenizers", "gigatoken"]
SMALL_CASES = [(kind, engine) for kind in ("byte_level", "exported", "sentencepiece") for engine in ENGINES]
SMALL_CASES += [("unigram", "auto"), ("words", "auto"), ("learned_end", "tokenizers"), ("learned_end", "gigatoken")]
CASES = [*((f"{kind}_qwen", engine) for kind in KINDS for engine in ENGINES), *SMALL_CASES]
LOSSY = ("made_qwen", "real_qwen", "unigram", "words")
"""Tokenizers that normalise a text, or have an unknown token."""
ENDS = {"made_qwen": "<|im_end|>", "real_qwen": "<|im_end|>", "byte_level": "<|endoftext|>", "learned_end": "END"}
"""Ends of a document other than ``</s>``."""
CONTROL = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "END")

TEXT = (
    st.text()
    | st.text("ab '-=1\n\r\t", max_size=60)
    | st.text("的是了 a\n\u3000，。1é", max_size=60)
    | st.text("▁▅\x00\x85\ufeff <s>/0\U0001f600\U00020bb7", max_size=30)
    # Marks of old and new versions of Unicode, and letters that only the newest one knows.
    | st.text("ae\u0301\u0323\u0327\u1ac3\u1bf2\u0619\u0c3c\u09fe\u1100\u1161\u088f\u0c5c\ua7ce\U000323b0", max_size=20)
    | st.lists(st.sampled_from([*CONTROL, *ZH, *EN, " ", "a"]), max_size=4).map("".join)
    # Words, numbers, marks and white space of all lengths in any order, as in code, tables and logs.
    | st.lists(
        st.sampled_from(
            ["the", "River", "HTTP", "'s", "'LL", "x1", "2024", "-", "==", "\n", "\r\n", "\t", "中文", "é", "。", "、"]
        )
        | st.integers(1, 40).map(" ".__mul__)
        | st.integers(1, 40).map("\n".__mul__)
        | st.integers(1, 70).map("=-".__mul__)
        | st.text(st.characters(codec="ascii"), max_size=12)
        | st.text(st.characters(categories=("L", "M", "N", "P", "S", "Z")), max_size=12),
        max_size=30,
    ).map("".join)
)

Load = Callable[[str, TokenizerEngine], TokenizerBase]


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE such as GPT-2's, whose tokens that are no control tokens are found in any text."""
    import tokenizers

    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, show_progress=False, initial_alphabet=alphabet)
    built.train_from_iterator(make_texts(200), trainer)
    built.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    built.add_tokens(["<think>"])
    return save(tmp_path_factory.mktemp("byte_level"), built, "<|endoftext|>")


@pytest.fixture(scope="session")
def unigram_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of T5 and XLM-R: likely pieces, the control tokens among them; NFKC makes some of other characters."""
    import tokenizers

    built = tokenizers.Tokenizer(tokenizers.models.Unigram())
    built.normalizer = tokenizers.normalizers.NFKC()
    built.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    built.decoder = tokenizers.decoders.Metaspace()
    control = ["<s>", "</s>", "<unk>", "<|im_end|>"]
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=400, show_progress=False, special_tokens=control, unk_token="<unk>", initial_alphabet=list("<>/|_s")
    )
    built.train_from_iterator(make_texts(100), trainer)
    return save(tmp_path_factory.mktemp("unigram"), built)


@pytest.fixture(scope="session")
def words_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of words, ``</s>`` among them, which is no added token."""
    import tokenizers

    words = dict.fromkeys(["[UNK]", "</s>", *" ".join(make_texts(30)).split()])
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return save(tmp_path_factory.mktemp("words"), built)


@pytest.fixture(scope="session")
def learned_end_folder(byte_level_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE whose merges make the end of a document out of plain letters."""
    import tokenizers

    content = json.loads((byte_level_folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"EN": 600, "END": 601}
    content["model"]["merges"] += [["E", "N"], ["EN", "D"]]
    return save(tmp_path_factory.mktemp("learned"), tokenizers.Tokenizer.from_str(json.dumps(content)), "END")


def save(folder: Path, built: Any, eos_token: str = "</s>") -> Path:
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    return folder


@pytest.fixture(scope="session")
def load(request: pytest.FixtureRequest, sp_model: Path) -> Load:
    """Loads a tokenizer by the name of its case, once."""
    loaded: dict[tuple[str, TokenizerEngine], TokenizerBase] = {}

    def get(name: str, engine: TokenizerEngine) -> TokenizerBase:
        if (name, engine) not in loaded:
            if name == "sentencepiece":
                loaded[name, engine] = SentencePieceTokenizer(sp_model, engine=engine)
            else:
                fixture = {"exported": "hf_folder"}.get(name, name if name.endswith("_qwen") else f"{name}_folder")
                folder = request.getfixturevalue(fixture)
                folder = folder.folder if isinstance(folder, Qwen) else folder
                loaded[name, engine] = HuggingFaceTokenizer(folder, engine=engine)
        return loaded[name, engine]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(("name", "engine"), CASES)
def test_all_calls_agree_and_nothing_is_lost(load: Load, name: str, engine: TokenizerEngine) -> None:
    tokenizer, reference = load(name, engine), load(name, "tokenizers")
    assert tokenizer.engine == engine or engine == "auto"

    @settings(max_examples=100, deadline=None)
    @given(texts=st.lists(TEXT, max_size=6))
    @example(texts=[])
    @example(texts=["", ""])
    @example(texts=["a", "\u1ac3\u1bf2", "", "b\u1ac3\u1bf2 \u088f"])
    def check(texts: list[str]) -> None:
        ids, lengths = tokenizer.encode_flat(texts)
        assert (ids.dtype, lengths.dtype, len(lengths)) == (np.int32, np.int64, len(texts))
        parts = np.split(ids, np.cumsum(lengths)[:-1]) if texts else []
        expected = [reference.encode(text) for text in texts]
        assert [part.tolist() for part in parts] == expected
        assert [part.tolist() for part in tokenizer.encode_batch(texts)] == expected
        assert [tokenizer.encode(text) for text in texts] == expected
        of_bytes = tokenizer.encode_flat([text.encode() for text in texts])
        assert np.array_equal(of_bytes[0], ids) and np.array_equal(of_bytes[1], lengths)
        # An unknown token stands for what the vocabulary does not have.
        control = [tokenizer.control_id(mark) for mark in CONTROL if mark != "<unk>" or name not in LOSSY]
        assert not set(control) & set(ids.tolist())
        assert len(ids) == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
        if name not in LOSSY:
            assert [tokenizer.decode(part.tolist()) for part in parts] == texts

    check()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "engine"), SMALL_CASES)
def test_pickling_and_fingerprint(load: Load, name: str, engine: TokenizerEngine, tmp_path: Path) -> None:
    tokenizer, reference = load(name, engine), load(name, "tokenizers")
    assert tokenizer.fingerprint == reference.fingerprint
    assert tokenizer.describe() == reference.describe()
    assert set(tokenizer.describe()) == {"kind", "fingerprint", "vocab_size", "eod_id"}
    json.dumps(tokenizer.describe())
    copy: TokenizerBase = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.engine, copy.describe()) == (tokenizer.engine, tokenizer.describe())
    texts = make_texts(20)
    assert np.array_equal(copy.encode_flat(texts)[0], reference.encode_flat(texts)[0])
    tokenizer.save_pretrained(tmp_path)
    saved = HuggingFaceTokenizer(tmp_path, engine=engine)
    assert np.array_equal(saved.encode_flat(texts)[0], reference.encode_flat(texts)[0])


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_control_ids(load: Load, name: str, engine: TokenizerEngine) -> None:
    tokenizer = load(name, engine)
    end = ENDS.get(name, "</s>")
    assert tokenizer.control_id(end) == tokenizer.eod_id
    assert tokenizer.control_id("的") is None and tokenizer.control_id("<|nothing|>") is None
    assert tokenizer.control_id("<think>") is None  # found in any text, so no control token
    assert tokenizer.decode([tokenizer.eod_id]) == ""


def test_added_tokens_that_are_no_control_tokens_are_found(load: Load) -> None:
    for engine in ENGINES:
        tokenizer = load("byte_level", engine)
        think = tokenizer.vocab_size - 1
        ids = tokenizer.encode_flat(["a<think>b", "<|endoftext|>"])[0].tolist()
        assert ids.count(think) == 1 and tokenizer.eod_id not in ids


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["exported", "sentencepiece"])
def test_what_is_no_text_is_refused(load: Load, name: str, engine: TokenizerEngine) -> None:
    tokenizer = load(name, engine)
    surrogate = r"lone surrogate \(U\+D800 at character 1 of 3\)"
    with pytest.raises(DataError, match=surrogate):
        tokenizer.encode("a\ud800b")
    with pytest.raises(DataError, match=surrogate):
        tokenizer.encode_flat(["fine", "长江", "a\ud800b"])
    with pytest.raises(DataError, match=r"text 1 of 2 to encode is not valid UTF-8 \(byte 2 is 0xff: invalid start"):
        tokenizer.encode_flat([b"fine", b"ab\xff"])


@pytest.mark.timeout(60)
def test_gigatoken_runs_in_spawned_workers(load: Load) -> None:
    tokenizer = load("byte_level", "gigatoken")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        ids, lengths = pool.submit(tokenizer.encode_flat, ZH).result(timeout=50)
    expected = load("byte_level", "tokenizers").encode_flat(ZH)
    assert np.array_equal(ids, expected[0]) and np.array_equal(lengths, expected[1])


def test_auto_takes_gigatoken_and_says_nothing(byte_level_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "steel_megatron"):
        assert load_tokenizer("huggingface", byte_level_folder).engine == "gigatoken"
        sent = pickle.dumps(load_tokenizer("huggingface", byte_level_folder))  # which has not been used yet
    assert pickle.loads(sent).engine == "gigatoken"
    assert not caplog.records


def test_without_gigatoken_there_is_one_hint(
    byte_level_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with caplog.at_level(logging.INFO, "steel_megatron"):
        tokenizer = load_tokenizer("huggingface", byte_level_folder)
        assert not caplog.records  # it is of no use before there are batches
        assert sum(tokenizer.encode_flat(ZH)[1]) == sum(len(tokenizer.encode(text)) for text in ZH)
        copy = pickle.loads(pickle.dumps(tokenizer))
        copy.encode_flat(ZH)
    assert [(record.levelname, "steel-megatron[data]" in record.message) for record in caplog.records] == [
        ("INFO", True)
    ]
    with pytest.raises(DataError, match=r"gigatoken was asked for .*pip install 'steel-megatron\[data\]'"):
        load_tokenizer("huggingface", byte_level_folder, engine="gigatoken")


def test_a_worker_without_gigatoken_says_so(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = pickle.dumps(load("byte_level", "gigatoken"))
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(DataError, match=r"cannot encode for the tokenizer in .* in this process"):
        pickle.loads(sent).encode_flat(ZH)


def test_other_ids_lead_back_to_the_own_library(
    byte_level_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = json.loads((byte_level_folder / "tokenizer.json").read_text())
    content["added_tokens"][-1]["single_word"] = True  # which gigatoken passes over
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    with caplog.at_level(logging.INFO, "steel_megatron"):
        tokenizer = load_tokenizer("huggingface", tmp_path)
        assert tokenizer.engine == "tokenizers"
        texts = ["a<think>b", "a <think> b"]
        assert [part.tolist() for part in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "it gives other ids for '<think> a<think>b" in caplog.text
    with pytest.raises(DataError, match=r"gigatoken was asked for .* it gives other ids"):
        load_tokenizer("huggingface", tmp_path, engine="gigatoken")


def test_what_gigatoken_cannot_run_is_run_by_the_own_library(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import tokenizers

    words = {word: index for index, word in enumerate(["[UNK]", "the", "river", "</s>"])}
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    built.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = load_tokenizer("huggingface", tmp_path / "tokenizer.json")
    assert tokenizer.encode_flat(["the river sea", ""])[0].tolist() == [1, 2, 0]
    assert "it cannot run this tokenizer: Unsupported model type" in caplog.text
    with pytest.raises(DataError, match=r"gigatoken was asked for .* Unsupported model type"):
        load_tokenizer("huggingface", tmp_path, engine="gigatoken")
    with pytest.raises(DataError, match="engine 'fast' is unknown; it must be one of auto, gigatoken, tokenizers"):
        load_tokenizer("huggingface", tmp_path, engine="fast")  # type: ignore[arg-type]


class _OffByOne(Gigatoken):
    """An engine that is wrong on one word."""

    def encode_flat(self, texts: list[str]) -> fast_encoding.FlatIds:
        ids, lengths = super().encode_flat(texts)
        return ids + np.repeat(["velocity" in text for text in texts], lengths), lengths


def test_real_texts_are_compared_too(
    byte_level_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tokenizer_base, "Gigatoken", _OffByOne)
    tokenizer = load_tokenizer("huggingface", byte_level_folder)
    tokenizer.verify_on(list(EN[:3]))
    assert tokenizer.engine == "gigatoken"
    tokenizer.verify_on([text.encode() for text in EN])
    assert tokenizer.engine == "tokenizers" and "it gives other ids for 'What is the" in caplog.text
    assert [part.tolist() for part in tokenizer.encode_batch(EN)] == [tokenizer.encode(text) for text in EN]
    asked_for = load_tokenizer("huggingface", byte_level_folder, engine="gigatoken")
    with pytest.raises(DataError, match="it gives other ids"):
        asked_for.verify_on(EN)


@pytest.mark.slow
def test_samples_get_the_same_ids(load: Load, kind: str, sample_files: dict[str, Path]) -> None:
    texts = [row["target"] for row in rows_of(sample_files["firefly"], 400)]
    fast: Tokenizer = load(f"{kind}_qwen", "gigatoken")
    expected = load(f"{kind}_qwen", "tokenizers").encode_flat(texts)
    assert all(map(np.array_equal, fast.encode_flat(texts), expected))


def test_the_pair_of_files_gives_the_ids_it_was_trained_to(
    made_samples: dict[str, Sample], load: Load, tmp_path: Path
) -> None:
    """The reference is the tokenizer in memory before it was written, so also what transformers reads is checked."""
    trained = make_tokenizer(tmp_path)
    trained.encode_special_tokens = True
    tokenizer = load("made_qwen", "tokenizers")
    first = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()[0]
    assert trained.token_to_id(first.replace(" ", "")) == 256  # as in Qwen's file, the first line is a merge
    texts = [made.text for sample in made_samples.values() for made in sample.rows]
    for text in texts:
        assert tokenizer.encode(text) == trained.encode(text, add_special_tokens=False).ids
