"""Which tokens of a rendered conversation the assistant said."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from steel_megatron.data.reading.chunks import BadRow
from steel_megatron.data.reading.conversations import Turn
from steel_megatron.data.tokenizing.chat_template import CHATML, ChatTemplate
from steel_megatron.data.tokenizing.huggingface import HuggingFaceTokenizer
from steel_megatron.data.tokenizing.sentencepiece import SentencePieceTokenizer
from steel_megatron.errors import DataError
from tests.fixtures.make_tokenizer import TEMPLATE, make_tokenizer

TURNS = (
    Turn("user", "How are you?"),
    Turn("assistant", " Fine, thanks. "),
    Turn("user", "你好"),
    Turn("assistant", "你好！\n\n有什么可以帮你？"),
)
SPOKEN = [" Fine, thanks. <|im_end|>", "你好！\n\n有什么可以帮你？<|im_end|>"]
NO_PROMPT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% if not loop.last %}\n{% endif %}"
    "{% endfor %}"
)
OUTSIDE = (  # the end mark stands behind what is generated
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
)
REWRITES = (  # as templates that leave out earlier thoughts do
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}"
    "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'][:3] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(made)
    return made


@pytest.fixture
def template(folder: Path, tmp_path: Path) -> Callable[..., ChatTemplate]:
    def build(source: str | None, **config: object) -> ChatTemplate:
        own = Path(shutil.copytree(folder, tmp_path / "own", dirs_exist_ok=True))
        settings = json.loads((own / "tokenizer_config.json").read_text())
        settings |= {"chat_template": source, **config}
        (own / "tokenizer_config.json").write_text(json.dumps(settings))
        return ChatTemplate(HuggingFaceTokenizer(own, engine="tokenizers"))

    return build


def spoken(template: ChatTemplate, turns: tuple[Turn, ...] = TURNS, only_last: bool = False) -> list[str]:
    """The texts of the runs of tokens that the assistant said."""
    ids, said = template.encode(turns, only_last)
    runs: list[list[int]] = []
    for index, own, before in zip(ids.tolist(), said.tolist(), [False, *said.tolist()[:-1]], strict=True):
        if own and not before:
            runs.append([])
        if own:
            runs[-1].append(index)
    mark = template.tokenizer.control_id("<|im_end|>")
    return [template.tokenizer.decode(run) + "<|im_end|>" * (mark in run) for run in runs]


@pytest.mark.parametrize("source", [TEMPLATE, CHATML, NO_PROMPT, OUTSIDE, None])
def test_the_assistants_words_and_their_end_mark(template: Callable[..., ChatTemplate], source: str | None) -> None:
    expected = SPOKEN if source != NO_PROMPT else [text.lstrip() for text in SPOKEN]
    found = template(source)
    if source == NO_PROMPT:  # the space behind "assistant:" is a part of the first word's token
        assert [text.strip() for text in spoken(found)] == [text.strip() for text in expected]
    else:
        assert spoken(found) == expected
        assert spoken(found, only_last=True) == expected[1:]


@pytest.mark.parametrize("source", [TEMPLATE, CHATML, OUTSIDE])
def test_ids_and_mask_are_those_of_transformers(
    template: Callable[..., ChatTemplate], source: str, tmp_path: Path
) -> None:
    """Where the template says what is generated, the mask too; of end marks outside, only ours has them."""
    found = template(source)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "own"))
    messages = [dataclasses.asdict(turn) for turn in TURNS]
    both = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask="generation" in source)
    ids, said = found.encode(TURNS)
    assert ids.tolist() == both["input_ids"]
    if source == CHATML:
        assert said.astype(int).tolist() == both["assistant_masks"]


def test_pad_is_eos_and_the_end_mark_is_still_predicted(template: Callable[..., ChatTemplate]) -> None:
    found = template(TEMPLATE, eos_token="<|im_end|>", pad_token="<|im_end|>")
    ids, said = found.encode(TURNS)
    end = found.tokenizer.control_id("<|im_end|>")
    assert said[np.flatnonzero(ids == end)].tolist() == [False, False, True, False, True]  # the system's is the first


def test_one_bos_and_no_more(template: Callable[..., ChatTemplate]) -> None:
    found = template(OUTSIDE, bos_token="<|endoftext|>")
    ids, said = found.encode(TURNS)
    assert np.flatnonzero(ids == found.tokenizer.control_id("<|endoftext|>")).tolist() == [0] and not said[0]


def test_a_template_that_rewrites_earlier_turns_is_refused(template: Callable[..., ChatTemplate]) -> None:
    with pytest.raises(BadRow, match=r"renders turn 2 or those before it in another way"):
        template(REWRITES).encode(TURNS)
    assert spoken(template(REWRITES), (*TURNS[:1], Turn("assistant", "Yes"))) == ["Yes<|im_end|>"]


def test_what_a_template_or_a_turn_must_not_have(template: Callable[..., ChatTemplate]) -> None:
    with pytest.raises(BadRow, match=r"turn 1 \(user\) holds the control token <\|im_end\|>"):
        template(TEMPLATE).encode((Turn("user", "a<|im_end|>b"), TURNS[1]))
    with pytest.raises(BadRow, match="cannot render the conversation: no system here"):
        template("{{ raise_exception('no system here') }}").encode(TURNS)
    with pytest.raises(BadRow, match="cannot render the conversation"):
        template("{{ messages[0]['missing'] + 'x' }}").encode(TURNS)


def test_templates_of_files(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    settings = json.loads((own / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "rag", "template": "x"}, {"name": "default", "template": NO_PROMPT}]
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    assert HuggingFaceTokenizer(own).chat_template == NO_PROMPT
    (own / "chat_template.jinja").write_text(OUTSIDE)
    tokenizer = HuggingFaceTokenizer(own)
    assert tokenizer.chat_template == OUTSIDE
    tokenizer.save_pretrained(tmp_path / "exported")
    assert AutoTokenizer.from_pretrained(str(tmp_path / "exported")).chat_template == OUTSIDE


def test_neither_a_template_nor_chatml(template: Callable[..., ChatTemplate], sp: SentencePieceTokenizer) -> None:
    with pytest.raises(DataError, match="neither a chat template nor ChatML's control tokens"):
        ChatTemplate(sp)
