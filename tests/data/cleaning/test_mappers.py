"""Operators that change texts: what goes, what stays, and how long they take over text that was made to be slow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from selectolax import lexbor

from steel_megatron.data.cleaning import recipe
from steel_megatron.data.cleaning.mappers import (
    MAPPERS,
    CleanCopyright,
    CleanEmail,
    CleanHtml,
    CleanIp,
    CleanLinks,
    ExpandMacro,
    Mapper,
    NormalizePunctuation,
    NormalizeWhitespace,
    RemoveRepeatSentences,
    RemoveSpecificChars,
)
from tests.data.growth import is_linear

CASES = [
    (CleanEmail(), "写信到abc.d+e@mail.qq.com吧", "写信到吧"),
    (CleanEmail(repl="@"), "a@b.cn, @someone, x@y, 3@4.5", "@, @someone, x@y, 3@4.5"),
    (CleanIp(), "从192.168.0.1登录，不是1.2.3.400或1.2.3.4.5", "从登录，不是1.2.3.400或1.2.3.4.5"),
    (CleanIp(), "fe80:0:0:0:1:2:3:4a 12:30:45", " 12:30:45"),
    (CleanLinks(), "见https://a.com/x?y=1&z=(2)。再见", "见。再见"),
    (CleanLinks(), "访问www.baidu.com查看 (ftp://x.y/z), ok", "访问查看 (), ok"),
    (CleanLinks(), "[文](http://a.cn/b_(c)) github.com/a/b!", "[文]() !"),
    (CleanLinks(), "self.size/2 and/or np.pi/2 std::vector 12:30", "self.size/2 and/or np.pi/2 std::vector 12:30"),
    (CleanLinks(), "见:1.http://www.a.cn/x Sourcehttps://b.com/y 2019http://c.net/", "见:1. Source 2019"),
    (CleanLinks(), "xsftp://a profile://b", "xsftp://a profile://b"),
    (CleanCopyright(), "/* Copyright 2020\n * X */\nint x;", "int x;"),
    (CleanCopyright(), "/* what it does */\nint x;", "/* what it does */\nint x;"),
    (CleanCopyright(), "#!/bin/sh\n# Copyright X\n\n# All.\nls", "#!/bin/sh\nls"),
    (CleanCopyright(), "// Copyright X\n#include <a.h>\nint x;", "#include <a.h>\nint x;"),
    (CleanCopyright(), "# 标题\n正文", "# 标题\n正文"),
    (CleanCopyright(), "x = 1  # Copyright", "x = 1  # Copyright"),
    (CleanCopyright(), "# 版权法解读\n\n正文开始。", "# 版权法解读\n\n正文开始。"),
    (CleanCopyright(), "# 2020年版权法\n\n## 版权是什么\n正文", "# 2020年版权法\n\n## 版权是什么\n正文"),
    (CleanCopyright(), "# Copyright 2020 X\nls", "ls"),
    (CleanCopyright(), "# Copyright (c) X\nls", "ls"),
    (CleanCopyright(), "# SPDX-License-Identifier: MIT\nls", "ls"),
    (CleanCopyright(), "# Copyright X\n# All of it.\nls", "ls"),
    (ExpandMacro(), "\\newcommand{\\R}{\\bf R}\nx in \\R, \\Rx", "\\newcommand{\\R}{\\bf R}\nx in \\bf R, \\Rx"),
    (ExpandMacro(), "\\def\\a{\\a\\a}\n\\a", "\\def\\a{\\a\\a}\n\\a\\a"),
    (NormalizePunctuation(), "“你好”，《书》：１２３！……——", '"你好","书":123!......--'),
    (NormalizeWhitespace(), "\u3000 a\u00a0b\tc\u200bd\n\n e \n", "a b c d\n\n e"),
    (RemoveSpecificChars(), "◆a●b□c", "abc"),
    (RemoveSpecificChars(chars_to_remove="a]"), "[a]b", "[b"),
    (RemoveRepeatSentences(), "今天下雨。今天下雨！我走了。", "今天下雨。我走了。"),
    (RemoveRepeatSentences(), "好。好。是 3.14 和 3.14，见 a.txt。", "好。好。是 3.14 和 3.14，见 a.txt。"),
    (RemoveRepeatSentences(), "One two.\nOne two!\n\nThree.", "One two.\n\nThree."),
    (RemoveRepeatSentences(), "if a != 10:\n  x()\nif b != 10:\n  y()", "if a != 10:\n  x()\nif b != 10:\n  y()"),
    (RemoveRepeatSentences(), "x = a ? 10 : 20;\ny = b ? 10 : 20;", "x = a ? 10 : 20;\ny = b ? 10 : 20;"),
    (RemoveRepeatSentences(), "x = a?10:20;\ny = a?10:20;", "x = a?10:20;\ny = a?10:20;"),
    (RemoveRepeatSentences(), 'f("No!", 1)\nf("No!", 2)', 'f("No!", 1)\nf("No!", 2)'),
    (RemoveRepeatSentences(), "Is it? Is it? 是吗?是吗?真的", "Is it? 是吗?真的"),
    (RemoveRepeatSentences(), "Yes it is. yes it is.", "Yes it is. yes it is."),
    (RemoveRepeatSentences(lowercase=True), "Yes it is. yes it is.", "Yes it is."),
    (RemoveRepeatSentences(ignore_special_character=False), "他来了。他来了！", "他来了。他来了！"),
    (RemoveRepeatSentences(min_repeat_sentence_length=5), "他来了。他来了。", "他来了。他来了。"),
]  # fmt: skip


@pytest.mark.parametrize(("mapper", "text", "expected"), CASES, ids=lambda value: getattr(value, "name", None))
def test_cases(mapper: Mapper, text: str, expected: str) -> None:
    assert mapper.apply(text) == expected


def test_chinese_is_converted() -> None:
    assert MAPPERS["chinese_convert_mapper"]().apply("電腦軟體與滑鼠，abc") == "电脑软体与滑鼠，abc"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<p>一</p><p>二<br>三</p>", "一\n二\n三\n"),
        ("<ul><li>a</li><li>b</li></ul>", "\n* a\n* b\n"),
        ("<div class='x'>a &lt; b &amp; c</div><script>x()</script><style>y</style><!-- z -->", "a < b & c\n"),
        ("if (a<b) {c>d} vector<int> #include <sys/ipc.h>", "if (a<b) {c>d} vector<int> #include <sys/ipc.h>"),
        ("a<b <b>c</b> <a href='x'>d</a> p<a and <I>e</I>", "a<b c d p<a and e"),
        ("写 <script> 标签，<!-- 也写 <B>粗</B>", "写 <script> 标签，<!-- 也写 粗"),
        ("箭头 A --> B 与 <!-- 不丢。<b>x</b>", "箭头 A --> B 与 <!-- 不丢。x"),
        ("</script>尾，<script>头<b>x</b>", "尾，<script>头x"),
        ("零<!--> 一 <!-- <script> --> 二 <script><!-- <script></script> 三<p>", "零 一  二  三"),
        ("用 <div 元素，a > b 时 <b>x</b>", "用  b 时 x"),
        ("用 <div 元素，在 <b>x</b> 里", "用 <div 元素，在 x 里"),
        ("<textarea>写 <b> 在此</textarea>后<i>x</i>", "写 <b> 在此后x"),
        ("Tom &amp; Jerry &notanentity; a&copy=1", "Tom & Jerry &notanentity; a&copy=1"),
    ],
)
def test_html_becomes_text(text: str, expected: str) -> None:
    assert CleanHtml().apply(text) == expected


HIDING = ("<!--", "<script>", "<STYLE>", "<style type='x'>", "<iframe src=a>", "<textarea>", "<title>")
ENDS = ("-->", "</script>", "</style >", "</iframe>", "</textarea>", "</TITLE>")


@given(
    st.lists(st.sampled_from([*ENDS, *HIDING, "<b>", "</b>", "<div>", "<p>", "<li>", "一些字", "\n"]), max_size=12),
    st.lists(st.sampled_from([*HIDING, "<b>", "<p>", "</div>", "<ul><li>"]), min_size=1, max_size=6),
)
def test_text_behind_a_begin_without_an_end_is_kept(before: list[str], after: list[str]) -> None:
    visible = [f"可见{place}号" for place in range(len(after))]
    closed = [end for end in ENDS if any(piece in HIDING for piece in before)]  # so that what is hidden ends before
    text = "".join([*before, *closed, *(piece + seen for piece, seen in zip(after, visible, strict=True))])
    assert [seen for seen in visible if seen not in CleanHtml().apply(text)] == []


def test_html_that_is_too_deep_is_stripped_of_its_tags() -> None:
    deep = "<div>" * 600 + "a &lt; b<script>x</script> <b>c</b><br>d" + "</div>" * 600
    assert CleanHtml().apply(deep).strip() == "a < b c\nd"
    flat = "<p>段落<p>段落<li>项<li>项<div>x</div>" * 600  # ends that HTML does not ask for
    assert CleanHtml().apply(flat).count("段落") == 1200


def test_macros_do_not_blow_a_text_up() -> None:
    text = "\\def\\a{" + "x" * 1000 + "}\n" + "\\a " * 100_000
    expanded = ExpandMacro().apply(text)
    assert 1.9 * len(text) < len(expanded) <= 2 * len(text) and expanded.endswith("\\a ")


def test_unicode_is_mended() -> None:
    mapper = MAPPERS["fix_unicode_mapper"]()
    assert mapper.apply("schÃ¶n ﬁn e\u0301") == "schön fin é"
    assert mapper.apply("cafe\u00cc\u0081 déjà vu") == "café déjà vu"  # composed when it is mended, not before


@given(st.lists(st.text(alphabet="一二三四五六七八九十", min_size=6, max_size=6), unique=True, max_size=6), st.data())
def test_texts_without_repetition_are_left_alone(words: list[str], data: st.DataObject) -> None:
    ends = data.draw(st.lists(st.sampled_from(["。", "！", "”。", "……", ". ", "?\n", "。」"]), min_size=6, max_size=6))
    text = "".join(word + end for word, end in zip(words, ends, strict=False))
    assert RemoveRepeatSentences().apply(text) == text


@pytest.mark.parametrize("name", sorted(MAPPERS))
@pytest.mark.parametrize(
    "piece", ["a", ".", "a.", "a@", "1.", "0:", "<", "<a", "&#", "/*", "# c\n", "http://", "\\def\\a{", "。", "www.",
              "<!--", "<div>", "<ul><li>", "<dd><li>", "<b><p></b>", "<span><div></span></div>", "<script>",
              "</title ", "? "]
)  # fmt: skip
def test_time_is_linear(name: str, piece: str) -> None:
    """A quadratic pattern takes minutes over a document that was made for it."""
    mapper = MAPPERS[name]()
    mapper.apply(piece * 10)  # what is loaded at the first call
    assert is_linear(lambda size: mapper.apply(piece * (size // len(piece))), 2_500)


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("before <div " + " ".join(f"a{number}=1" for number in range(20_000)) + ">text</div> &amp; after", True),
        ("before " + "<div>" * 600 + "text" + "</div>" * 600 + " &amp; after", True),
        ("before <div a=1>text</div> &amp; after", False),
    ],
    ids=["attributes", "levels", "plain"],
)
def test_what_the_parser_is_quadratic_in_is_not_parsed(
    monkeypatch: pytest.MonkeyPatch, html: str, expected: bool
) -> None:
    parse, parsed = lexbor.LexborHTMLParser, []
    monkeypatch.setattr(lexbor, "LexborHTMLParser", lambda text: (parsed.append(len(text)), parse(text))[1])
    assert CleanHtml().apply(html).split() == ["before", "text", "&", "after"]
    assert (not parsed) == expected


def test_the_operator_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "cleaning.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"dataclass": dataclass, "Mapper": Mapper}
    (example,) = [block for block in page.split("```") if "class RemoveLines" in block]
    exec(example.removeprefix("python\n"), namespace)
    monkeypatch.setitem(recipe.OPERATORS, "remove_lines_mapper", namespace["RemoveLines"])
    path = tmp_path / "recipe.yaml"
    path.write_text("kind: text\noperators: [remove_lines_mapper: {word: x}]")
    (operator,) = recipe.load_recipe(path).operators
    assert isinstance(operator, Mapper) and operator.apply("a\nbxc\nd") == "a\nd"
