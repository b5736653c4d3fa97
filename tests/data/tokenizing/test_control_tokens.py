"""No text gives the id of a control token: layouts of models that would, and those that cannot be kept from it."""

from __future__ import annotations

import json
import pickle
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from steel_megatron.data.tokenizing.huggingface import HuggingFaceTokenizer, save_gpt2
from steel_megatron.data.tokenizing.sentencepiece import SentencePieceTokenizer
from steel_megatron.data.tokenizing.tokenizer import encode_dialogue, load_tokenizer
from steel_megatron.errors import DataError
from tests.data.conftest import Qwen

EOD = "</s>"
PLAIN = [*string.ascii_letters, *"<>/|_[]▁"]


def _ids(pieces: list[str]) -> dict[str, int]:
    return {piece: index for index, piece in enumerate(pieces)}


def _unigram() -> tokenizers.Tokenizer:
    control = [("<unk>", 0.0), ("<s>", 0.0), (EOD, 0.0), ("<|im_end|>", 0.0)]
    model = models.Unigram([*control, *((piece, -3.0) for piece in PLAIN)], unk_id=0)
    built = tokenizers.Tokenizer(model)
    built.normalizer = normalizers.NFKC()
    built.pre_tokenizer, built.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    built.add_special_tokens([name for name, _ in control])
    return built


def _words() -> tokenizers.Tokenizer:
    built = tokenizers.Tokenizer(models.WordLevel(_ids(["[UNK]", "one", EOD]), unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return built


def _word_pieces() -> tokenizers.Tokenizer:
    pieces = ["[UNK]", "[SEP]", EOD, *PLAIN, *(f"##{piece}" for piece in PLAIN)]
    built = tokenizers.Tokenizer(models.WordPiece(_ids(pieces), unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.add_special_tokens(["[UNK]", "[SEP]", EOD])
    return built


def _merged() -> tokenizers.Tokenizer:
    """A BPE whose merges make the control token, and a word that goes on from it."""
    merges = [("<", "/"), ("</", "s"), ("</s", ">"), (EOD, "a")]
    pieces = [*PLAIN, *("".join(pair) for pair in merges)]
    return tokenizers.Tokenizer(models.BPE(_ids(pieces), merges))


def _whole_words() -> tokenizers.Tokenizer:
    """A BPE that takes whole words of its vocabulary before it merges, as Llama 3's."""
    built = tokenizers.Tokenizer(models.BPE(_ids([*PLAIN, EOD]), [], ignore_merges=True))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return built


def _not_special() -> tokenizers.Tokenizer:
    built = tokenizers.Tokenizer(models.BPE(_ids(PLAIN), []))
    built.add_tokens([AddedToken(EOD, special=False)])
    return built


def _named(name: str) -> Callable[[], tokenizers.Tokenizer]:
    """An added token that is not special by itself, but by its part in the configuration."""

    def build() -> tokenizers.Tokenizer:
        built = tokenizers.Tokenizer(models.BPE(_ids([*PLAIN, EOD]), []))
        built.add_tokens([AddedToken(name, special=False)])
        return built

    return build


def save(folder: Path, built: tokenizers.Tokenizer, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOD, **config}))
    return folder


@pytest.mark.parametrize(
    "build",
    [_unigram, _words, _word_pieces, _merged, _whole_words, _not_special],
    ids=["unigram", "words", "word_pieces", "merged", "whole_words", "not_special"],
)
def test_text_that_spells_a_control_token_is_text(build: Callable[[], tokenizers.Tokenizer], tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(save(tmp_path / "a", build()))
    special = ("<s>", EOD, "<|im_end|>", "[SEP]")
    control = {index for name in special if (index := tokenizer.control_id(name)) is not None}
    assert tokenizer.eod_id in control and tokenizer.control_id(EOD) == tokenizer.eod_id
    texts = [f"{before}{name}{after}" for name in special for before in ("", "a", " ") for after in ("", "a", " ")]
    texts += ["＜/s＞", f"{EOD}{EOD}"]
    copy = pickle.loads(pickle.dumps(tokenizer))
    tokenizer.save_pretrained(tmp_path / "b")
    for each in (tokenizer, copy, HuggingFaceTokenizer(tmp_path / "b")):
        flat, lengths = each.encode_flat(texts)
        assert not control & set(flat.tolist())
        one_by_one = [each.encode(text) for text in texts]
        assert [part.tolist() for part in each.encode_batch(texts)] == one_by_one
        assert lengths.tolist() == list(map(len, one_by_one)) and all(lengths)
        assert each.decode([each.eod_id]) == "" and each.fingerprint == tokenizer.fingerprint
    assert np.array_equal(copy.encode_flat(texts)[0], tokenizer.encode_flat(texts)[0])


def test_the_characters_of_a_control_token_are_encoded(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(save(tmp_path, _unigram()))
    assert tokenizer.decode(tokenizer.encode("hello</s>hello <|im_end|>")) == "hello</s>hello <|im_end|>"
    dialogue = encode_dialogue(tokenizer, "a</s><|im_end|>").tolist()
    assert dialogue == [*tokenizer.encode("a</s>"), tokenizer.control_id("<|im_end|>")]
    merged = HuggingFaceTokenizer(save(tmp_path, _merged()))
    assert merged.decode(merged.encode("x</s>ay")).replace(" ", "") == "x</s>ay"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("<pad>", {"pad_token": "<pad>"}),
        ("<sep>", {"sep_token": {"content": "<sep>", "lstrip": False}}),
        ("<turn>", {"additional_special_tokens": ["<turn>"]}),
        ("<turn>", {"extra_special_tokens": {"turn": "<turn>"}}),
        ("<turn>", {"added_tokens_decoder": {"61": {"content": "<turn>", "special": True}}}),
    ],
)
def test_tokens_with_a_part_to_play_are_control_tokens(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    plain = HuggingFaceTokenizer(save(tmp_path, _named(name)()))
    assert plain.control_id(name) is None and len(plain.encode(name)) == 1  # found, as its maker meant
    tokenizer = HuggingFaceTokenizer(save(tmp_path, _named(name)(), **config))
    assert tokenizer.control_id(name) is not None and len(tokenizer.encode(name)) == len(name)


def test_what_cannot_be_kept_apart_is_refused(tmp_path: Path) -> None:
    letters = tokenizers.Tokenizer(models.BPE(_ids(PLAIN), []))
    with pytest.raises(DataError, match=r"has no id for the plain text 'a' but that of the control token"):
        HuggingFaceTokenizer(save(tmp_path, letters), eod_token="a")
    unknown = tokenizers.Tokenizer(models.WordLevel({EOD: 0, "a": 1}, unk_token=EOD))
    with pytest.raises(DataError, match=r"gives the control token '</s>' for the plain text .*\(eod_token\)"):
        HuggingFaceTokenizer(save(tmp_path, unknown))
    without = tokenizers.Tokenizer(models.WordLevel({EOD: 0, "a": 1}, unk_token="<none>"))
    with pytest.raises(DataError, match="cannot encode every text: WordLevel error: Missing"):
        HuggingFaceTokenizer(save(tmp_path, without))


def _typed(model_file: Path, to: Path, types: dict[str, int], **trainer: str) -> Path:
    """A SentencePiece model with other types of some pieces."""
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(model_file.read_bytes())
    for piece in model.pieces:
        piece.type = types.get(piece.piece, piece.type)
    for name, value in trainer.items():
        setattr(model.trainer_spec, name, value)
    to.write_bytes(model.SerializeToString())
    return to


@pytest.mark.parametrize("piece_type", [1, 4], ids=["normal", "user_defined"])
def test_sentencepiece_ends_that_are_no_control_pieces(sp_model: Path, tmp_path: Path, piece_type: int) -> None:
    model = _typed(sp_model, tmp_path / "m.model", {"<s>": piece_type, EOD: piece_type})
    tokenizer, expected = SentencePieceTokenizer(model), SentencePieceTokenizer(sp_model)
    text = "a</s><s> b</s>"
    assert tokenizer.eod_id == 2 == tokenizer.control_id(EOD)
    assert tokenizer.encode(text) == expected.encode(text) == tokenizer.encode_flat([text])[0].tolist()
    assert not {1, 2} & set(tokenizer.encode(text)) and tokenizer.decode([1, 2]) == ""


def test_the_end_of_a_document_can_be_named(sp_model: Path, hf_folder: Path, tmp_path: Path) -> None:
    for kind, path in (("sentencepiece", sp_model), ("huggingface", hf_folder)):
        usual = load_tokenizer(kind, path)  # type: ignore[arg-type]
        other = load_tokenizer(kind, path, eod_token="<s>")  # type: ignore[arg-type]
        same = load_tokenizer(kind, path, eod_token=EOD)  # type: ignore[arg-type]
        assert (other.eod_id, same.eod_id) == (1, 2) and other.encode("a<s></s>") == usual.encode("a<s></s>")
        assert same.fingerprint == usual.fingerprint != other.fingerprint
        assert pickle.loads(pickle.dumps(other)).describe() == other.describe()
        other.save_pretrained(tmp_path)
        assert HuggingFaceTokenizer(tmp_path).eod_id == 1
        with pytest.raises(DataError, match="'<nowhere>'"):
            load_tokenizer(kind, path, eod_token="<nowhere>")  # type: ignore[arg-type]
    turn = _typed(sp_model, tmp_path / "turn.model", {"的": 4})
    named = SentencePieceTokenizer(turn, eod_token="的")
    assert named.eod_id not in named.encode("的") and named.decode(named.encode("的")) == "的"


def test_a_configuration_beside_the_usual_one(hf_folder: Path, tmp_path: Path) -> None:
    expected = HuggingFaceTokenizer(hf_folder)
    model = (hf_folder / "tokenizer.json").read_bytes()
    (tmp_path / "my_tok.json").write_bytes(model)
    with pytest.raises(DataError, match=r"names no eos_token, .* name the token as eod_token"):
        HuggingFaceTokenizer(tmp_path / "my_tok.json")
    assert HuggingFaceTokenizer(tmp_path / "my_tok.json", eod_token=EOD).describe() == expected.describe()
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024, "eos_token": null}')
    for eos in (EOD, {"content": EOD, "lstrip": False}):
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": eos}))
        assert HuggingFaceTokenizer(tmp_path / "my_tok.json").describe() == expected.describe()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    assert HuggingFaceTokenizer(tmp_path / "my_tok.json").eod_id == 1  # which comes first
    (tmp_path / "special_tokens_map.json").write_text("[")
    with pytest.raises(DataError, match=r"special_tokens_map\.json cannot be read"):
        HuggingFaceTokenizer(tmp_path / "my_tok.json")


def test_a_model_of_another_kind_is_named(sp_model: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be loaded as a tokenizer.json: .*; a \.model file is of kind sentenc"):
        HuggingFaceTokenizer(sp_model, eod_token=EOD)


DAMAGE = [
    ("vocab.json", b"[]"),
    ("vocab.json", b"{}"),
    ("vocab.json", b"3"),
    ("vocab.json", b'{"a":1'),
    ("vocab.json", b'{"a":"b"}'),
    ("vocab.json", b"\xff\xfe"),
    ("merges.txt", b""),
    ("merges.txt", b"#version: 0.2\n\n"),
    ("merges.txt", b"\xff\xfe\x00garbage"),
    ("merges.txt", b"one_word\n"),
]


@pytest.mark.parametrize(("name", "content"), DAMAGE)
def test_a_damaged_pair_of_files(qwen: Qwen, tmp_path: Path, name: str, content: bytes) -> None:
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((qwen.folder / file).read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{tmp_path}"):
        HuggingFaceTokenizer(tmp_path)
    with pytest.raises(DataError, match=rf"{tmp_path}"):
        save_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_pair_of_gpt2(tmp_path: Path) -> None:
    """Against transformers' own GPT-2."""
    from transformers import GPT2Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("Ġ", "th"), ("Ġth", "e"), ("1", "2"), ("i", "n")]
    vocab = _ids([*alphabet, *("".join(pair) for pair in merges), "<|endoftext|>"])
    (tmp_path / "v.json").write_text(json.dumps(vocab))
    (tmp_path / "m.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    save_gpt2(tmp_path / "v.json", tmp_path / "m.txt", tmp_path / "out")
    ours = HuggingFaceTokenizer(tmp_path / "out")
    theirs = GPT2Tokenizer(vocab=vocab, merges=merges)
    assert (ours.eod_id, ours.vocab_size) == (len(vocab) - 1, len(vocab))
    for text in (" the thin 1212\n\n it's  长江 é", "the  the", ""):
        assert ours.encode(text) == theirs(text)["input_ids"] and ours.decode(ours.encode(text)) == text
    assert ours.eod_id not in ours.encode("a<|endoftext|>b")
    with pytest.raises(DataError, match=r"v\.json has no token '<eod>'"):
        save_gpt2(tmp_path / "v.json", tmp_path / "m.txt", tmp_path / "out", "<eod>")
