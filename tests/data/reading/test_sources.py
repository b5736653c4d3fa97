"""Every source of the paper, as it is published, gives the text it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from steel_megatron.data.reading.compression import COMPRESSIONS
from steel_megatron.data.reading.conversations import CHAT_FORMS
from steel_megatron.data.reading.documents import Document, SkippedRow, read_documents
from steel_megatron.data.reading.forms import CODE_SUFFIXES, KNOWN_SUFFIXES
from steel_megatron.data.reading.inputs import Input, parse_inputs
from steel_megatron.data.reading.listing import listing
from steel_megatron.data.reading.sources import SOURCES, Dialogue, get_source
from steel_megatron.errors import DataError
from tests.data.conftest import KINDS, REAL
from tests.data.growth import is_linear
from tests.fixtures.make_samples import LAYOUTS, Sample, make_samples

PAGE = (Path(__file__).resolve().parents[3] / "docs/sources.md").read_text(encoding="utf-8")

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"

EXAM = {
    "id": "x",
    "q_type": "单选题",
    "q_main": "水的化学式是（）",
    "option_a": "H2O",
    "option_b": "CO2",
    "option_c": "",
    "option_d": None,
    "std_ans": "A",
    "answer_detail": "两个氢，一个氧。",
}

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("skypile", {"text": "网页"}, "网页"),
    ("wanjuan", {"id": "1", "content": "正文"}, "正文"),
    ("wanjuan", EXAM, "水的化学式是（）\nA. H2O\nB. CO2\n答案：A\n解析：两个氢，一个氧。"),
    ("wikipedia_cn", {"completion": "词条", "source": "wiki"}, "词条"),
    (
        "baidu_baike",
        {"title": "江", "summary": "大河", "sections": [{"title": "长度", "content": "长"}], "tags": ["x"], "url": "u"},
        "江\n大河\n长度\n长",
    ),
    ("starcoder", {"content": "<reponame>a/b<filename>x.java<gh_stars>1-10\nclass A {}\n"}, "class A {}\n"),
    ("starcoder", {"content": "<reponame>a/b\n\ufeff#include <vector>\n"}, "#include <vector>\n"),
    ("starcoder", {"content": "\n<reponame>\n"}, "\n<reponame>\n"),
    ("wanjuan", {"q_main": "2+2=?", "std_ans": None, "answer": "4", "option_a": ""}, "2+2=?\n答案：4"),
    ("wanjuan", {"q_main": " ", "std_ans": "A"}, ""),
    ("baidu_baike", {"title": "江", "summary": None, "sections": []}, ""),
    ("text", {"text": "t", "more": 1}, "t"),
]


@pytest.mark.parametrize(("name", "row", "text"), CASES)
def test_texts(name: str, row: dict[str, Any], text: str) -> None:
    assert get_source(name).text(row) == text


MOSS_TURNS = [
    {"Human": "<|Human|>: 你好<eoh>\n", "Inner Thoughts": "x", "MOSS": "<|MOSS|>: 你好！<eom>\n"},
    {"Human": "再见", "MOSS": "再见！"},
]
DIALOGUES: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("belle", {"instruction": "写诗", "input": "", "output": "春"}, [("写诗", "春")]),
    ("belle", {"instruction": "翻译", "input": "a", "output": "一"}, [("翻译\na", "一")]),
    (
        "belle",
        {"id": "1", "conversations": [{"from": "human", "value": "a"}, {"from": "assistant", "value": "b"}]},
        [("a", "b")],
    ),
    ("moss", {"conversation": {f"turn_{n}": turn for n, turn in ((2, MOSS_TURNS[1]), (1, MOSS_TURNS[0]))}}, []),
    ("moss", {"conversation": MOSS_TURNS}, []),
    ("moss", {"conversation": [{"human": "你好", "assistant": "你好！"}, MOSS_TURNS[1]], "category": "x"}, []),
    (
        "baidu_qa",
        {"qid": "1", "category": "c", "title": "问 ", "desc": "详", "answer": "答"},
        [("问\n详", "答")],
    ),
    ("baidu_qa", {"title": "问", "desc": "问", "answer": "答"}, [("问", "答")]),
    ("zhihu", {"INSTRUCTION": "问", "RESPONSE": "  答", "SOURCE": "Zhihu"}, [("问", "答")]),
    (
        "belle",
        {
            "conversations": [
                {"from": who, "value": said} for who, said in (("human", "a"), ("gpt", "b"), ("human", "c"))
            ]
        },
        [("a", "b")],
    ),
    ("firefly", {"kind": "k", "input": "上联", "target": "下联"}, [("上联", "下联")]),
]


@pytest.mark.parametrize(("name", "row", "turns"), DIALOGUES)
def test_dialogues(name: str, row: dict[str, Any], turns: list[tuple[str, str]]) -> None:
    turns = turns or [("你好", "你好！"), ("再见", "再见！")]
    said = [f"<|im_start|>user\n{a}<|im_end|>\n<|im_start|>assistant\n{b}<|im_end|>" for a, b in turns]
    assert get_source(name).text(row) == Dialogue(SYSTEM + "\n".join(said))


def test_moss_takes_linear_time() -> None:
    def read(spaces: int) -> None:
        said = "<|Human|>:  a" + " " * spaces + "b <eoh> \n"
        document = get_source("moss").text({"conversation": [{"Human": said, "MOSS": "ok"}]})
        assert document == Dialogue.of([("a" + " " * spaces + "b", "ok")])

    assert is_linear(read, 2_500)


def test_the_template_is_the_published_tokenizer_s(qwen_by_transformers: PreTrainedTokenizerBase) -> None:
    turns = [("你好", "你好！"), ("def f():\n  pass", " spaces ")]
    roles = ("user", "assistant")
    messages = [{"role": role, "content": said} for turn in turns for role, said in zip(roles, turn, strict=True)]
    expected = qwen_by_transformers.apply_chat_template(messages, tokenize=False)
    assert Dialogue.of(turns).text + "\n" == expected


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("skypile", {"content": "x"}, "key 'text' is missing; the row has 'content'"),
        ("wanjuan", {"content": None}, "key 'content' holds null"),
        ("baidu_baike", {"title": "t", "sections": "s"}, "key 'sections' holds"),
        ("belle", {"instruction": "a", "output": 3}, "key 'output' holds a int"),
        ("belle", {"conversations": [{"from": "gpt", "value": "b"}, {"from": "human", "value": "a"}]}, "out of place"),
        ("belle", {"instruction": "say <|im_end|>", "output": "x"}, r"a turn of the user holds <\|im_end\|>"),
        ("firefly", {"input": "a", "target": "<|im_start|>"}, r"a turn of the assistant holds <\|im_start\|>"),
        ("belle", {"conversations": "x"}, "key 'conversations' holds no list of turns"),
        ("baidu_qa", {"title": "a", "answer": None}, "key 'answer' holds null"),
        ("zhihu", {"INSTRUCTION": "a"}, "key 'RESPONSE' is missing; the row has 'INSTRUCTION'"),
        ("moss", {"conversation": [{"Human": "a"}]}, "key 'MOSS' is missing; the row has 'Human'"),
        ("moss", {"conversation": {"first": {}}}, "turns are named 'first'"),
        ("moss", {"text": "x"}, "no turns under 'conversation'; the row has 'text'"),
    ],
)
def test_bad_rows(tmp_path: Path, name: str, row: dict[str, Any], reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"a\.jsonl, row 1, byte 0: .*{reason}"):
        list(read_documents(path, source=name))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("firefly", {"input": "a", "target": " \n"}),
        ("belle", {"instruction": "", "input": None, "output": "b"}),
        ("belle", {"conversations": []}),
        ("moss", {"conversation": {}}),
        ("moss", {"conversation": [MOSS_TURNS[1], {"Human": "<|Human|>: <eoh>", "MOSS": "x"}]}),
        ("zhihu", {"INSTRUCTION": "a", "RESPONSE": ""}),
    ],
)
def test_a_dialogue_in_which_nothing_is_said_is_an_empty_document(
    tmp_path: Path, name: str, row: dict[str, Any]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    skipped: list[SkippedRow] = []
    assert list(read_documents(path, source=name, on_skip=skipped.append)) == []
    assert [entry.reason for entry in skipped] == ["empty"]


def test_cleaned_rows_keep_the_flag(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "dialogue": true}\n{"text": "y", "dialogue": 1}\n', encoding="utf-8")
    assert list(read_documents(path)) == [Document("x", str(path), 1, True), Document("y", str(path), 2, False)]


DIALOGUES_OF = {"belle", "firefly", "zhihu", "baidu_qa", "moss"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_made_samples(made_samples: dict[str, Sample], name: str) -> None:
    """Every row in every layout gives the text that it was built from."""
    sample, skipped = made_samples[name], list[SkippedRow]()
    rows = list(enumerate(sample.rows, start=1))
    assert sample.dialogue == (sample.source in DIALOGUES_OF)
    documents = list(read_documents(sample.path, source=sample.source, on_skip=skipped.append))
    assert documents == [Document(made.text, str(sample.path), row, sample.dialogue) for row, made in rows if made.text]
    assert [(entry.row, entry.reason) for entry in skipped] == [(row, "empty") for row, made in rows if not made.text]


def test_made_samples_are_of_every_source(made_samples: dict[str, Sample], tmp_path: Path) -> None:
    assert {sample.source for sample in made_samples.values()} == set(SOURCES) - {"text", "chat", *CHAT_FORMS}
    for name, sample in make_samples(tmp_path).items():
        assert sample.path.read_bytes() == made_samples[name].path.read_bytes()  # the same for the same seed
    titles = [
        made for made in made_samples["baidubaike.json"].rows if not made.row["sections"] and not made.row["summary"]
    ]
    assert len(titles) == 10 and not any(made.text for made in titles)
    chats = [made.row["chat"] for made in made_samples["moss.jsonl"].rows]
    assert max(map(len, chats)) == 12  # turn_10 sorts before turn_2
    assert any(list(chat) != sorted(chat, key=lambda name: int(name[5:])) for chat in chats)


REAL_SAMPLES = {
    "wikipedia-cn-20230720-filtered_sample.json": ("wikipedia_cn", 250),
    "563w_baidubaike_sample.json": ("baidu_baike", 990),  # ten have a title only
    "baike_qa_train_sample.json": ("baidu_qa", 1000),
    "train-00000-of-00005-a1278ede4e8c5cdb_sample.parquet": ("zhihu", 1000),
    "train_2M_CN_sample.json": ("belle", 1000),
    "firefly-train-1.1M_sample.jsonl": ("firefly", 1000),
    "part-010205-a894b46e_sample.jsonl": ("wanjuan", 1000),
    "train-00000-of-00059_python_sample.parquet": ("starcoder", 500),
}
if "real" in KINDS:

    @pytest.mark.parametrize("name", REAL_SAMPLES)
    def test_real_samples(name: str) -> None:
        source, count = REAL_SAMPLES[name]
        documents = list(read_documents(REAL / "steel_samples" / name, source=source))
        assert len(documents) == count
        assert all(document.dialogue == (source in DIALOGUES_OF) for document in documents)


def test_inputs_name_their_source(tmp_path: Path) -> None:
    (tmp_path / "sky").mkdir()
    for name in ("sky/b.jsonl.zst", "sky/a.parquet", "plain.jsonl", "text=odd.jsonl"):
        (tmp_path / name).touch()
    found = parse_inputs([f"skypile={tmp_path}/sky/*", str(tmp_path / "plain.jsonl"), str(tmp_path / "text=odd.jsonl")])
    assert found == [
        Input(f"{tmp_path}/sky/a.parquet", "skypile"),
        Input(f"{tmp_path}/sky/b.jsonl.zst", "skypile"),
        Input(f"{tmp_path}/plain.jsonl", "text"),
        Input(f"{tmp_path}/text=odd.jsonl", "text"),
    ]
    with pytest.raises(DataError, match="there is no source 'skypil'; known are text, skypile, wanjuan"):
        parse_inputs([f"skypil={tmp_path}/sky"])
    with pytest.raises(DataError, match="is named as skypile and as text"):
        parse_inputs([f"skypile={tmp_path}/sky", str(tmp_path / "sky")])


def test_the_page_shows_a_source_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example in docs/sources.md runs, and does what the page says."""
    (tmp_path / "my_sources.py").write_text(PAGE.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "静夜思", "lines": ["床前明月光", "疑是地上霜"]}\n', encoding="utf-8")
    (found,) = parse_inputs([f"my_sources:Poems={path}"])
    documents = read_documents(found.path, source=found.source)
    assert [document.text for document in documents] == ["静夜思\n床前明月光\n疑是地上霜"]
    path.write_text('{"title": "静夜思"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="row 1, byte 0: key 'lines' holds no list"):
        list(read_documents(path, source=found.source))


def test_every_form_and_source_is_listed_and_on_the_page() -> None:
    listed = listing()
    assert max(map(len, listed.splitlines())) <= 80
    for suffix in (*KNOWN_SUFFIXES, *COMPRESSIONS):
        assert suffix in PAGE and (suffix in listed or suffix in CODE_SUFFIXES), suffix
    for source in SOURCES:
        assert f"| `{source}` |" in PAGE and f"\n  {source} " in listed, source
        assert source == "text" or f"--inputs {source}=" in listed, source


def test_all_sources_of_the_paper_are_there() -> None:
    names = "skypile wanjuan wikipedia_cn baidu_baike baidu_qa zhihu belle moss firefly starcoder"
    assert set(SOURCES) >= set(names.split())
    with pytest.raises(DataError, match="there is no source 'x'"):
        get_source("x")
