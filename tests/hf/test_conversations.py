"""A finetuned model is spoken to as it was trained: by the library, and by whoever loads its exported folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from steel_megatron.data.ledger.ledger import Ledger
from steel_megatron.data.reading.conversations import Turn
from steel_megatron.data.tokenizing.chat_template import ChatTemplate
from steel_megatron.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from steel_megatron.errors import ConfigError
from steel_megatron.hf.exporting import _write_chat_template
from steel_megatron.hf.texts import Texts, finetuned, texts_of_folder, texts_of_tokenizer
from tests.data.corpora import write
from tests.fixtures.make_tokenizer import make_tokenizer
from tests.layouts.sft_runs import prepared

OWN = (  # writes a BOS and no system prompt, and ends answers in its own way
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = (Turn("user", "Hi?"), Turn("assistant", "Hello."), Turn("user", "你好"), Turn("assistant", "你好！"))
MESSAGES = [{"role": turn.role, "content": turn.content} for turn in TURNS]


def tokenizer_of(folder: Path, **config: object) -> Tokenizer:
    make_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **config}))
    return load_tokenizer("huggingface", str(folder))


def ids_of(texts: Texts, messages: Sequence[dict[str, str]], reply: bool) -> list[int]:
    return texts.encode(texts.render(list(messages), reply))


@pytest.mark.parametrize("source", [None, OWN], ids=["chatml", "own"])
def test_the_prompt_is_what_training_saw(source: str | None, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(
        tmp_path / "own", chat_template=source, bos_token="<|im_start|>", eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(tmp_path / "exported")
    ends = _write_chat_template(tmp_path / "exported", tokenizer)
    end = tokenizer.eod_id if source else tokenizer.control_id("<|im_end|>")
    assert ends == [end]
    (tmp_path / "exported" / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eod_id, end]}))
    trained, said = ChatTemplate(tokenizer).encode(TURNS, only_last=True)
    prompt = trained[: said.argmax()].tolist()
    for texts in (texts_of_tokenizer(tokenizer, True, finetuned=True), texts_of_folder(tmp_path / "exported", True)):
        assert ids_of(texts, MESSAGES[:3], True) == prompt
        assert ids_of(texts, MESSAGES, False) == [*prompt, *tokenizer.encode("你好！")]
        assert texts.ends >= {tokenizer.eod_id, end}


def test_a_template_that_refuses_is_bad_input(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, chat_template="{{ raise_exception('no turns') }}")
    with pytest.raises(ConfigError, match="no turns"):
        texts_of_tokenizer(tokenizer, True, finetuned=True).render(MESSAGES, True)


def test_what_was_finetuned_is_told_by_the_corpora(tmp_path: Path) -> None:
    assert not finetuned(tmp_path)
    for corpus, expected in ((write(tmp_path / "plain", [[1] * 300]), False), (prepared(tmp_path), True)):
        Ledger.create([corpus], 96, 1, tmp_path).save(tmp_path / "ledger.json")
        assert finetuned(tmp_path) is expected
