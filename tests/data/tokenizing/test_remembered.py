"""What is remembered of tokenizers: found out once, forgotten with whatever it came from, and never needed."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from steel_megatron.data.tokenizing import base, huggingface, remembered
from steel_megatron.data.tokenizing.base import TokenizerBase
from steel_megatron.data.tokenizing.huggingface import HuggingFaceTokenizer, save_gpt2
from steel_megatron.data.tokenizing.remembered import cache_folder, key_of, recall, remember
from steel_megatron.data.tokenizing.sentencepiece import SentencePieceTokenizer
from tests.data.conftest import ZH
from tests.fixtures.make_tokenizer import make_tokenizer


@pytest.fixture(scope="session")
def pair_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``vocab.json`` and ``merges.txt``, which transformers makes a tokenizer of."""
    folder = tmp_path_factory.mktemp("pair")
    make_tokenizer(folder)
    return folder


def _unigram(folder: Path) -> Path:
    """A model that finds its control tokens in plain text, unless they are put out of its reach."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in "abs<>/▁")]
    built = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    built.add_special_tokens(["<unk>", "</s>", "<end>"])
    folder.mkdir()
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


def _never(*args: object, **kwargs: object) -> None:
    pytest.fail("found out again")


def _forbid_examining(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_from_folder", "_from_file", "mark_control_tokens", "within_reach"):
        monkeypatch.setattr(huggingface, name, _never)
    for name in ("_check_plain_text", "_compare"):
        monkeypatch.setattr(TokenizerBase, name, _never)


@pytest.mark.parametrize("kind", ["pair", "unigram"])
def test_the_second_start_finds_out_nothing(
    kind: str, pair_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pair_folder if kind == "pair" else _unigram(tmp_path / "unigram")
    first = HuggingFaceTokenizer(folder)
    texts = [*ZH, "a</s>b", "<|im_end|>"]
    expected, about, engine = first.encode_flat(texts), first.describe(), first.engine
    warned = len(caplog.records)
    _forbid_examining(monkeypatch)
    second = HuggingFaceTokenizer(folder)
    assert (second.describe(), second.engine) == (about, engine) and engine == (
        "gigatoken" if kind == "pair" else "tokenizers"
    )
    assert len(caplog.records) == 2 * warned == (0 if kind == "pair" else 2)  # the reason is given at each start
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(second.encode_flat(texts), expected, strict=True))
    del second.__dict__["fingerprint"], second.__dict__["vocab_size"]
    assert second.describe() == about
    assert second.encode("a</s>b") == first.encode("a</s>b") and second.eod_id not in second.encode("a</s>b")


@pytest.mark.slow
def test_the_second_start_takes_neither_transformers_nor_torch(pair_folder: Path) -> None:
    code = (
        "import sys; from steel_megatron.data.tokenizing.tokenizer import load_tokenizer;"
        f"tokenizer = load_tokenizer('huggingface', {str(pair_folder)!r}); tokenizer.encode_flat(['a']);"
        "print([name for name in ('transformers', 'torch') if name in sys.modules])"
    )
    found = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout
        for _ in range(2)
    ]
    assert [line.strip() for line in found] == ["['transformers', 'torch']", "[]"]


def test_an_engine_is_remembered_for_sentencepiece(sp_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = SentencePieceTokenizer(sp_model).encode_flat(ZH)
    monkeypatch.setattr(TokenizerBase, "_compare", _never)
    second = SentencePieceTokenizer(sp_model)
    assert second.engine == "gigatoken" and np.array_equal(second.encode_flat(ZH)[0], expected[0])
    monkeypatch.setattr(base, "is_installed", lambda: False)
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert SentencePieceTokenizer(sp_model).engine == "tokenizers", "what is remembered was removed"


@pytest.mark.parametrize("changed", ["tokenizer.json", "tokenizer_config.json", "eod_token", "library", "sources"])
def test_what_decides_it_is_looked_at_again(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    folder, eod_token = _unigram(tmp_path / "unigram"), None
    HuggingFaceTokenizer(folder)
    examined: list[Path] = []
    plain: Callable[[Path], tokenizers.Tokenizer] = huggingface._from_folder
    monkeypatch.setattr(huggingface, "_from_folder", lambda path: [examined.append(path), plain(path)][1])
    HuggingFaceTokenizer(folder)
    assert examined == [] and len(list((cache / "steel-megatron/tokenizers").iterdir())) == 1
    remembered._versions.cache_clear()
    if changed == "tokenizer.json":
        text = (folder / changed).read_text()
        (folder / changed).write_text(text.replace("-3.0", "-4.0"))
    elif changed == "tokenizer_config.json":
        (folder / changed).write_text('{"eos_token": "</s>", "pad_token": "a"}')
    elif changed == "eod_token":
        eod_token = "<end>"
    elif changed == "library":
        monkeypatch.setattr(remembered, "version", lambda name: "0.0")
    else:
        monkeypatch.setattr(remembered, "__file__", str(tmp_path / "other" / "remembered.py"))
    HuggingFaceTokenizer(folder, eod_token)
    remembered._versions.cache_clear()
    assert examined == [folder]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "of another key"])
def test_a_damaged_record_is_none(damage: str) -> None:
    remember(key := key_of("a"), {"problem": None}, "text\nof two lines")
    assert recall(key) == ({"problem": None}, "text\nof two lines")
    path = cache_folder() / key
    content = path.read_bytes()
    if damage == "of another key":
        os.replace(path, cache_folder() / (key := key_of("b")))
    else:
        flipped = content.replace(b"two", b"six")
        path.write_bytes({"cut": content[:-3], "flipped": flipped, "empty": b""}[damage])
    assert recall(key) is None
    remember(key, {"problem": None}, "anew")
    assert recall(key) == ({"problem": None}, "anew")


def test_parts_of_a_key_stay_apart() -> None:
    assert key_of("ab", "c") != key_of("a", "bc") and key_of("ab") == key_of(b"ab")


def test_where_nothing_can_be_written(
    sp_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert SentencePieceTokenizer(sp_model).engine == "gigatoken"
    assert not caplog.records and (tmp_path / "file").read_text() == ""


def test_writers_at_the_same_time(cache: Path) -> None:
    key, wrong = key_of("shared"), []

    def work(letter: str) -> None:
        for _ in range(20):
            remember(key, {"by": letter}, letter * 100_000)
            found = recall(key)
            if found is None or found[1] != found[0]["by"] * 100_000:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and [path.name for path in (cache / "steel-megatron/tokenizers").iterdir()] == [key]


def test_the_oldest_records_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_KEPT", 3)
    keys = [key_of(str(number)) for number in range(4)]
    for age, key in enumerate(keys[:3]):
        remember(key, {})
        os.utime(cache_folder() / key, (age, age))
    assert recall(keys[0]) == ({}, "")  # which makes it the newest
    remember(keys[3], {})
    assert [recall(key) is not None for key in keys] == [True, False, True, True]


def test_the_folder_follows_the_convention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / ".cache" / "steel-megatron" / "tokenizers"


def test_gpt2_files_are_told_apart(tmp_path: Path) -> None:
    """Folders of the same names and sizes of files, of which one merge differs."""
    letters = {letter: index for index, letter in enumerate(["a", "b", "c", "ab", "bc", "<|endoftext|>"])}
    found = []
    for merge in ("a b", "b c"):
        (folder := tmp_path / merge.replace(" ", "")).mkdir()
        (folder / "v.json").write_text("{" + ", ".join(f'"{name}": {index}' for name, index in letters.items()) + "}")
        (folder / "m.txt").write_text(merge + "\n")
        save_gpt2(folder / "v.json", folder / "m.txt", folder)
        found.append(HuggingFaceTokenizer(folder).encode("abc"))
    assert found == [[3, 2], [0, 4]]


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "steel_megatron")
