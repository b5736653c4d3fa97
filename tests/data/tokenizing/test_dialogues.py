"""Dialogues: only their own marks become control tokens, and only where the tokenizer has such."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from steel_megatron.data.tokenizing.huggingface import HuggingFaceTokenizer
from steel_megatron.data.tokenizing.sentencepiece import SentencePieceTokenizer
from steel_megatron.data.tokenizing.sentencepiece_training import train_sentencepiece
from steel_megatron.data.tokenizing.tokenizer import DIALOGUE_MARKS, Tokenizer, encode_dialogue, encode_dialogues
from steel_megatron.errors import DataError
from tests.data.conftest import Qwen, make_texts

START, END = DIALOGUE_MARKS
TALK = f"{START}system\nBe kind.{END}\n{START}user\n长江有多长？{END}\n{START}assistant\n约6300公里。{END}"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model that has the marks as control pieces."""
    prefix = tmp_path_factory.mktemp("chat") / "chat"
    return train_sentencepiece(make_texts(100), prefix, 600, control_tokens=DIALOGUE_MARKS)


@pytest.fixture(scope="module")
def chat(chat_model: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(chat_model)


def _by_hand(tokenizer: Tokenizer, text: str) -> list[int]:
    """The plain way: cut off the text before the first mark, then the mark, then go on."""
    ids = []
    while places := [(text.index(mark), mark) for mark in DIALOGUE_MARKS if mark in text]:
        at, mark = min(places)
        control = tokenizer.control_id(mark)
        assert control is not None
        ids += [*tokenizer.encode(text[:at]), control]
        text = text[at + len(mark) :]
    return ids + tokenizer.encode(text)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(
    parts=st.lists(
        st.lists(st.sampled_from([START, END, "</s>", "<s>", "<|im_", "start|>", "长江", "a b", "\n", "▁"])), max_size=5
    )
)
def test_marks_become_control_tokens(chat: SentencePieceTokenizer, parts: list[list[str]]) -> None:
    texts = ["".join(part) for part in parts]
    ids, lengths = encode_dialogues(chat, texts)
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int64)
    expected = [_by_hand(chat, text) for text in texts]
    assert ids.tolist() == [token for part in expected for token in part]
    assert lengths.tolist() == [len(part) for part in expected]
    of_bytes = encode_dialogues(chat, [text.encode() for text in texts])
    assert np.array_equal(of_bytes[0], ids) and np.array_equal(of_bytes[1], lengths)
    for text, part in zip(texts, expected, strict=True):
        assert encode_dialogue(chat, text).tolist() == part
        assert chat.eod_id not in part  # </s> in a turn is text


def test_marks_a_tokenizer_lacks_are_plain_text(sp: SentencePieceTokenizer, tmp_path: Path) -> None:
    assert sp.control_id(START) is None
    assert encode_dialogue(sp, TALK).tolist() == sp.encode(TALK)
    one = SentencePieceTokenizer(
        train_sentencepiece(make_texts(60), tmp_path / "one", 500, control_tokens=["<|im_end|>"])
    )
    assert one.control_id(END) == 3
    ids = encode_dialogue(one, f"{START}a{END}b").tolist()
    assert ids == [*one.encode(f"{START}a"), 3, *one.encode("b")]


def test_plain_text_with_marks_stays_plain_and_the_export_agrees(chat: SentencePieceTokenizer, tmp_path: Path) -> None:
    assert (chat.control_id(START), chat.control_id(END)) == (3, 4)
    assert not {3, 4} & set(chat.encode(TALK)) and chat.decode(chat.encode(TALK)) == TALK
    chat.save_pretrained(tmp_path)
    exported = HuggingFaceTokenizer(tmp_path)
    assert encode_dialogue(exported, TALK).tolist() == encode_dialogue(chat, TALK).tolist()
    assert exported.encode(TALK) == chat.encode(TALK)


def test_user_defined_marks_are_control_tokens(chat_model: Path, chat: SentencePieceTokenizer, tmp_path: Path) -> None:
    """SentencePiece would find them in any text."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(chat_model.read_bytes())
    for piece in model.pieces[3:5]:
        piece.type = 4
    (tmp_path / "user.model").write_bytes(model.SerializeToString())
    plain = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    assert 3 in plain.Encode(TALK)  # the library's own way
    ours = SentencePieceTokenizer(tmp_path / "user.model")
    assert ours.encode(TALK) == chat.encode(TALK)
    assert np.array_equal(encode_dialogue(ours, TALK), encode_dialogue(chat, TALK))
    assert ours.decode([3, 4]) == "" and ours.fingerprint != chat.fingerprint


def test_what_is_no_text_is_refused(chat: SentencePieceTokenizer) -> None:
    with pytest.raises(DataError, match=r"lone surrogate"):
        encode_dialogue(chat, f"{START}长\ud800{END}")
    with pytest.raises(DataError, match=r"text 0 of 1 to encode is not valid UTF-8"):
        encode_dialogues(chat, [b"\xff"])


@pytest.mark.slow
def test_qwen_gives_the_ids_of_the_chat_template(qwen: Qwen, qwen_by_transformers: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "长江有多长？\n  It's <b>2</b>km?"},
        {"role": "assistant", "content": "约6300公里。"},
    ]
    theirs = qwen_by_transformers
    text = theirs.apply_chat_template(messages, tokenize=False)
    ours = HuggingFaceTokenizer(qwen.folder)
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert encode_dialogue(ours, text).tolist() == expected
    assert expected.count(ours.eod_id) == 3
    fake = encode_dialogue(ours, text.replace("公里", "<|endoftext|>")).tolist()
    assert ours.control_id("<|endoftext|>") == qwen.endoftext and qwen.endoftext not in fake
    assert ours.decode(fake).count("<|endoftext|>") == 1
