"""Tokenizers: lossless, equal to their exported form, blind to control tokens written out in a text."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from steel_megatron.data.tokenizing.sentencepiece_training import train_sentencepiece
from steel_megatron.data.tokenizing.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from steel_megatron.errors import DataError
from tests.data.conftest import EN, ZH, Qwen, make_texts

SAMPLES = (
    "你好，世界！这是一个测试。",
    "Hello world, it's 2024.",
    "def f(x):\n    if x:\n\t\treturn 1\n\n\n    return  2\n",
    "😀👍🏽🇨🇳 ok",
    "a </s><s><unk> b <|im_end|><|im_start|> <0x0A>",
    "  two leading, two trailing  ",
    "line\r\nline\n",
    "",
)
ANY_TEXT = (
    st.text() | st.text("ab -=") | st.text("的是了 a\n\t") | st.text("▁▅\x00\ufeff <s>/0") | st.sampled_from(ZH + EN)
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_round_trip_is_lossless_and_the_export_is_equal(sp: SentencePieceTokenizer, hf_folder: Path, text: str) -> None:
    exported = _exported(hf_folder)
    ids = sp.encode(text)
    assert sp.decode(ids) == text
    assert exported.encode(text) == ids
    assert exported.decode(ids) == text
    assert [part.tolist() for part in sp.encode_batch([text, "x", text])] == [ids, sp.encode("x"), ids]
    assert sp.eod_id not in ids and all(0 <= token < sp.vocab_size for token in ids)


_LOADED: dict[Path, HuggingFaceTokenizer] = {}


def _exported(folder: Path) -> HuggingFaceTokenizer:
    return _LOADED.setdefault(folder, HuggingFaceTokenizer(folder))


@pytest.mark.parametrize("text", SAMPLES)
def test_transformers_gives_the_same_ids(sp: SentencePieceTokenizer, hf_folder: Path, text: str) -> None:
    theirs = AutoTokenizer.from_pretrained(str(hf_folder))
    ids = sp.encode(text)
    assert theirs(text, split_special_tokens=True)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.unk_token_id) == (sp.eod_id, None, 0)
    if "<s>" not in text:
        assert theirs(text)["input_ids"] == ids


def test_the_space_symbol_in_a_text_stays_itself(sp: SentencePieceTokenizer) -> None:
    assert sp.decode(sp.encode("a▁b c")) == "a▁b c"
    assert sp.encode("a▁b") != sp.encode("a b")


def test_digits_are_single_tokens_and_indentation_is_short(sp: SentencePieceTokenizer) -> None:
    assert len(sp.encode("12345")) == 5
    assert len(sp.encode("        ")) <= 2


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
def test_pickled_tokenizer_is_the_same(sp_model: Path, hf_folder: Path, kind: str) -> None:
    tokenizer = load_tokenizer(kind, sp_model if kind == "sentencepiece" else hf_folder)  # type: ignore[arg-type]
    copy: Tokenizer = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert (copy.vocab_size, copy.eod_id) == (tokenizer.vocab_size, tokenizer.eod_id) == (700, 2)
    for text in SAMPLES:
        assert copy.encode(text) == tokenizer.encode(text)


def test_training_is_deterministic(tmp_path: Path, sp_model: Path) -> None:
    again = train_sentencepiece(iter(make_texts(300)), tmp_path / "again", 700)
    assert again.read_bytes() == sp_model.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.model"]
    sampled = [train_sentencepiece(make_texts(300), tmp_path / f"{n}", 600, max_bytes=20_000) for n in range(2)]
    assert sampled[0].read_bytes() == sampled[1].read_bytes()


def test_training_on_text_without_spaces_still_keeps_them(tmp_path: Path) -> None:
    model = train_sentencepiece([text.replace(" ", "") for text in ZH] * 5, tmp_path / "zh", 420)
    tokenizer = SentencePieceTokenizer(model)
    assert tokenizer.decode(tokenizer.encode("你 好  a▁")) == "你 好  a▁"
    tokenizer.save_pretrained(tmp_path / "hf")


def test_very_long_lines_are_trained_on(tmp_path: Path) -> None:
    model = train_sentencepiece(["".join(ZH) * 300], tmp_path / "long", 450)
    assert SentencePieceTokenizer(model).vocab_size == 450


@pytest.mark.parametrize(
    ("size", "texts", "message"),
    [
        (100_000, ["abc abd"], r"vocab_size 100000 is too large for this text; at most \d+ is possible"),
        (262, ["".join(ZH)], r"vocab_size 262 is too small: the characters and bytes alone need \d+"),
        (500, ["", " \n"], "no text"),
    ],
)
def test_impossible_training(tmp_path: Path, size: int, texts: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_sentencepiece(texts, tmp_path / "x", size)
    assert not list(tmp_path.iterdir())


def test_the_largest_possible_vocabulary_is_possible(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        train_sentencepiece(EN, tmp_path / "x", 100_000)
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    assert SentencePieceTokenizer(train_sentencepiece(EN, tmp_path / "x", largest)).vocab_size == largest


def test_a_length_limit_stored_in_the_folder_is_ignored(hf_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "limited"
    shutil.copytree(hf_folder, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    limited, free = HuggingFaceTokenizer(folder), HuggingFaceTokenizer(hf_folder)
    assert limited.encode(ZH[0]) == free.encode(ZH[0])
    assert limited.fingerprint == free.fingerprint


def test_dropout_stored_in_the_folder_is_ignored(hf_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "random"
    shutil.copytree(hf_folder, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.9
    (folder / "tokenizer.json").write_text(json.dumps(content))
    random, fixed = HuggingFaceTokenizer(folder), HuggingFaceTokenizer(hf_folder)
    assert random.encode(ZH[0]) == random.encode_batch([ZH[0]])[0].tolist() == fixed.encode(ZH[0])
    assert random.fingerprint == fixed.fingerprint


def test_fingerprint_depends_on_what_decides_ids(hf_folder: Path, tmp_path: Path) -> None:
    original = HuggingFaceTokenizer(hf_folder)
    assert HuggingFaceTokenizer(hf_folder, eod_token="<s>").fingerprint != original.fingerprint
    original.save_pretrained(tmp_path)
    assert HuggingFaceTokenizer(tmp_path).fingerprint == original.fingerprint
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert HuggingFaceTokenizer(tmp_path).fingerprint != original.fingerprint


def test_an_exported_tokenizer_adds_nothing_that_training_did_not_see(
    hf_folder: Path, sp_model: Path, tmp_path: Path
) -> None:
    """A template that begins texts with <s>, as Llama's, stays behind; there is always something to pad with."""
    llama = tmp_path / "llama"
    shutil.copytree(hf_folder, llama)
    built = tokenizers.Tokenizer.from_file(str(llama / "tokenizer.json"))
    template = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", built.token_to_id("<s>"))]
    )
    built.post_processor = tokenizers.processors.Sequence([tokenizers.processors.ByteLevel(), template])
    built.save(str(llama / "tokenizer.json"))
    config = json.loads((llama / "tokenizer_config.json").read_text()) | {"bos_token": "<s>", "add_bos_token": True}
    (llama / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(str(llama))("a")["input_ids"][0] == built.token_to_id("<s>")
    for kind, path in (("huggingface", llama), ("sentencepiece", sp_model)):
        ours = load_tokenizer(kind, path)
        ours.save_pretrained(tmp_path / kind)
        exported = AutoTokenizer.from_pretrained(str(tmp_path / kind))
        assert exported.bos_token is None and exported.eos_token_id == ours.eod_id
        assert exported.pad_token_id is not None
        for text in (*ZH, "two  spaces and\na line"):
            assert exported(text)["input_ids"] == ours.encode(text), kind


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _with(name: str, content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(content)

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("tokenizer.json"), "has neither tokenizer.json nor vocab.json and merges.txt"),
        (_without("tokenizer_config.json"), "names no eos_token"),
        (_with("tokenizer.json", "{"), "tokenizer.json cannot be loaded"),
        (_with("tokenizer_config.json", "[]"), "holds a list"),
        (_with("tokenizer_config.json", "{"), "cannot be read"),
        (_with("tokenizer_config.json", '{"eos_token": "<nowhere>"}'), "'<nowhere>' is not in the vocabulary"),
    ],
)
def test_damaged_folder(hf_folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(hf_folder, folder)
    damage(folder)
    with pytest.raises(DataError, match=message):
        HuggingFaceTokenizer(folder)


def test_tokens_that_only_the_configuration_has(hf_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(hf_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    size = HuggingFaceTokenizer(folder).vocab_size
    marks = ["<|im_start|>", "<|im_end|>", "<|the_end|>"]
    decoder = {str(size + number): {"content": mark, "special": True} for number, mark in enumerate(marks)}
    config |= {"eos_token": "<|the_end|>", "added_tokens_decoder": config.get("added_tokens_decoder", {}) | decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = HuggingFaceTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.eod_id == theirs.eos_token_id == size + 2 and ours.vocab_size == len(theirs) == size + 3
    assert [ours.control_id(mark) for mark in marks] == theirs.convert_tokens_to_ids(marks)
    assert not set(ours.encode("".join(marks))) & {size, size + 1, size + 2}  # plain text gives none of them
    ours.save_pretrained(tmp_path / "exported")
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported.convert_tokens_to_ids(marks) == [size, size + 1, size + 2]
    config["added_tokens_decoder"][str(size + 7)] = {"content": "<late>", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=rf"gives '<late>' the id {size + 7}; .* it gets {size + 3}"):
        HuggingFaceTokenizer(folder)


def test_a_sentencepiece_model_is_recognised(sp_model: Path, hf_folder: Path, tmp_path: Path) -> None:
    assert load_tokenizer("huggingface", sp_model).fingerprint == SentencePieceTokenizer(sp_model).fingerprint
    json_file = tmp_path / "named.model"
    shutil.copyfile(hf_folder / "tokenizer.json", json_file)
    shutil.copyfile(hf_folder / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    assert isinstance(load_tokenizer("huggingface", json_file), HuggingFaceTokenizer)


def test_folders_without_a_tokenizer(sp_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no tokenizer: it has neither tokenizer\.json nor vocab.json"):
        load_tokenizer("huggingface", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds no tokenizer \(it holds a model without one\)"):
        load_tokenizer("huggingface", tmp_path)
    shutil.copyfile(sp_model, tmp_path / "tokenizer.model")
    with pytest.raises(DataError, match=r"its tokenizer\.model is of kind sentencepiece: name that file"):
        load_tokenizer("huggingface", tmp_path)


def test_missing_and_damaged_models(sp_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer("huggingface", tmp_path / "nowhere")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        load_tokenizer("sentencepiece", tmp_path / "nowhere.model")
    (tmp_path / "bad.model").write_bytes(sp_model.read_bytes()[:-50])
    with pytest.raises(DataError, match="is no SentencePiece model"):
        load_tokenizer("sentencepiece", tmp_path / "bad.model")
    (tmp_path / "empty.model").touch()
    with pytest.raises(DataError, match="is no SentencePiece model"):
        load_tokenizer("sentencepiece", tmp_path / "empty.model")
    with pytest.raises(DataError, match="tokenizer kind 'bpe' is unknown"):
        load_tokenizer("bpe", tmp_path)  # type: ignore[arg-type]


@pytest.mark.slow
def test_qwen_equals_transformers_and_survives_saving(
    qwen: Qwen, qwen_by_transformers: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    ours, theirs = HuggingFaceTokenizer(qwen.folder), qwen_by_transformers
    assert (ours.eod_id, ours.vocab_size) == (qwen.end, qwen.vocab_size)
    ours.save_pretrained(tmp_path)
    saved, reloaded = HuggingFaceTokenizer(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    assert saved.fingerprint == ours.fingerprint
    assert reloaded.chat_template == theirs.chat_template and reloaded.eos_token_id == qwen.end
    for text in SAMPLES:
        ids = ours.encode(text)
        assert ids == saved.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]
        assert np.array_equal(ours.encode_batch([text])[0], np.array(ids, dtype=np.int32))
        assert reloaded(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ids) == text
    assert ours.encode("<|im_end|>") != [ours.eod_id]
    assert ours.decode([ours.eod_id]) == ""
