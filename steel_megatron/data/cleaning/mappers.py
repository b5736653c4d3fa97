"""Operators that change a text. Names and meaning are data-juicer's; docs/cleaning.md lists where they differ.

Every mapper is a frozen dataclass whose fields are its parameters in a recipe, with one method ``apply(text) -> text``.
All take time linear in the text: their patterns begin only where a run of characters begins.
"""

from __future__ import annotations

import bisect
import functools
import html
import html.entities
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from steel_megatron.data.reading.html import takes_long
from steel_megatron.errors import ConfigError

ChineseMode = Literal["t2s", "s2t", "tw2s", "s2tw", "hk2s", "s2hk", "tw2sp", "s2twp"]


@dataclass(frozen=True, kw_only=True)
class Mapper:
    """An operator that changes a text."""

    name: ClassVar[str]

    def apply(self, text: str) -> str:
        """The changed text."""
        raise NotImplementedError


@functools.cache
def _chinese_converter(mode: str) -> Any:
    import opencc

    return opencc.OpenCC(mode)


@dataclass(frozen=True, kw_only=True)
class ChineseConvert(Mapper):
    """Converts between traditional and simplified Chinese, by OpenCC."""

    name = "chinese_convert_mapper"
    mode: ChineseMode = "t2s"

    def apply(self, text: str) -> str:
        converted: str = _chinese_converter(self.mode).convert(text)
        return converted


@dataclass(frozen=True, kw_only=True)
class _Remove(Mapper):
    """Replaces what a pattern finds."""

    pattern: ClassVar[re.Pattern[str]]
    repl: str = ""

    def apply(self, text: str) -> str:
        return self.pattern.sub(lambda _: self.repl, text)


@dataclass(frozen=True, kw_only=True)
class CleanEmail(_Remove):
    """Removes e-mail addresses."""

    name = "clean_email_mapper"
    pattern = re.compile(r"(?<![A-Za-z0-9._+-])[A-Za-z0-9._+-]++@(?:[A-Za-z0-9-]++\.)+[A-Za-z]{2,}")


_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"


@dataclass(frozen=True, kw_only=True)
class CleanIp(_Remove):
    """Removes IPv4 addresses, and IPv6 addresses with all their eight groups."""

    name = "clean_ip_mapper"
    pattern = re.compile(
        rf"(?<![0-9.]){_OCTET}(?:\.{_OCTET}){{3}}(?![0-9]|\.[0-9])"
        r"|(?<![0-9A-Fa-f:])(?:[0-9A-Fa-f]{1,4}:){7}[0-9A-Fa-f]{1,4}(?![0-9A-Fa-f:])"
    )


# The characters of a URL (RFC 3986) are ASCII: a link in Chinese text ends at the next Chinese character.
# A closing parenthesis is part of one only if its opening is.
_IN_URL = r"[a-z0-9\-._~:/?#\[\]@!$&'*+,;=%]"
_BRACKETED = rf"\({_IN_URL}*+\)"
# A scheme need not stand apart: Chinese text, and a word before https, run into links.
# Hosts without a scheme are links only below these: self.size/2 is none.
_DOMAINS = "com|net|org|edu|gov|cn|tw|hk|jp|kr|uk"


@dataclass(frozen=True, kw_only=True)
class CleanLinks(_Remove):
    """Removes links: with a scheme, beginning in ``www.``, or a host of a common domain followed by a path."""

    name = "clean_links_mapper"
    pattern = re.compile(
        rf"(?:https?://|(?<![a-z])(?:ftps?|sftp|rtsp|file)://|(?<![a-z0-9.-])(?:www\d{{0,3}}\.(?=[a-z0-9])"
        rf"|(?:[a-z0-9-]++\.)+?(?:{_DOMAINS})/(?=[a-z0-9])))(?:(?:{_IN_URL}|{_BRACKETED})*(?:[a-z0-9/#&=_~-]|{_BRACKETED}))?",
        re.IGNORECASE | re.ASCII,
    )


@dataclass(frozen=True, kw_only=True)
class CleanCopyright(Mapper):
    """Removes the comment at the beginning of a text if it holds a notice of copyright or licence."""

    name = "clean_copyright_mapper"
    _comment: ClassVar = re.compile(
        r"\s*+(?:/\*.*?\*/|(?:(?://|#(?!\s*(?:include|define|undef|if|ifdef|ifndef|pragma|import)\b)|--)[^\n]*+"
        r"(?:\n|\Z)(?:[ \t]*+\n)*+)++)",
        re.DOTALL,
    )
    _notice: ClassVar = re.compile(
        r"copyright|all rights reserved|spdx-license|\blicen[sc]ed under|©|版权", re.IGNORECASE
    )
    _sure: ClassVar = re.compile(
        r"all rights reserved|spdx-license|licen[sc]ed under|©|\(c\)|(?<!\d)(?:19|20)\d\d(?![\d年])", re.IGNORECASE
    )
    """What no heading of a text about copyright has: ``#`` begins comments of code and headings of Markdown."""
    _two_lines: ClassVar = re.compile(r"#[^\n]*+\n[ \t]*#")
    _kept: ClassVar = re.compile(r"#!|#.*coding[:=]")
    """A line that says how to run or read a file is no part of the notice."""

    def apply(self, text: str) -> str:
        found = self._comment.match(text)
        if found is None or not self._notice.search(found[0]):
            return text
        comment = found[0].lstrip()
        if comment.startswith("#") and not self._two_lines.match(comment) and not self._sure.search(comment):
            return text
        kept = [line for line in found[0].split("\n")[:2] if self._kept.match(line)]
        return "\n".join([*kept, text[found.end() :].lstrip("\n")])


# What is taken for a tag, if it ends before the next "<"; any other "<" is a sign of its own (a < b, vector<int>,
# #include <map>).
_ELEMENTS = (
    "abbr|address|article|aside|audio|big|blockquote|body|br|button|caption|center|cite|code|col|colgroup|dd|del|details|"
    "div|dl|dt|em|embed|fieldset|figcaption|figure|font|footer|form|h[1-6]|head|header|hr|html|iframe|img|input|ins|kbd|"
    "label|legend|li|link|main|mark|meta|nav|noscript|ol|optgroup|option|param|picture|pre|samp|script|section|select|"
    "small|source|span|strike|strong|style|sub|summary|sup|table|tbody|td|textarea|tfoot|th|thead|title|tr|tt|ul|video|wbr"
)
_TAG = rf"(?:/?(?:(?:{_ELEMENTS})(?=[\s/>])|[abipqsu](?=/?>|\s+[a-z-]+\s*=))|!doctype\b)(?=[^<>]*+>)"
_LINE_BREAKS = r"br|hr|/p|/div|/tr|/h[1-6]|/table|/ul|/ol|/dl|/dt|/dd|/pre|/blockquote|/section|/article"
_HIDING = ("script", "style", "iframe", "textarea", "title")


@dataclass(frozen=True, kw_only=True)
class CleanHtml(Mapper):
    """Turns HTML into plain text, by selectolax; list items begin lines with an asterisk."""

    name = "clean_html_mapper"
    _tag: ClassVar = re.compile(f"<{_TAG}", re.IGNORECASE)
    _other_sign: ClassVar = re.compile(f"<(?!{_TAG})", re.IGNORECASE)
    _whole_tag: ClassVar = re.compile(rf"<(?={_TAG})(/?)([a-z!]\w*)[^<>]*>", re.IGNORECASE)
    _entity: ClassVar = re.compile(r"&(?:#\d{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
    _line_break: ClassVar = re.compile(rf"\n?(?=<(?:{_LINE_BREAKS})[\s/>])", re.IGNORECASE)
    _item: ClassVar = re.compile(r"\n?<li(?=[\s/>])", re.IGNORECASE)
    _begin: ClassVar = re.compile(rf"<(!--|(?:{'|'.join(_HIDING)})(?=[\s/>])(?=[^<>]*+>))", re.IGNORECASE | re.ASCII)
    _ends: ClassVar = {
        "!--": re.compile("-->"),
        **{name: re.compile(rf"</{name}\s*+>", re.IGNORECASE | re.ASCII) for name in _HIDING},
    }

    def apply(self, text: str) -> str:
        text = self._without_hidden(text)
        if not self._tag.search(text):
            return self._entity.sub(self._unescape, text)
        from selectolax.lexbor import LexborHTMLParser

        marked = self._item.sub("\n* <li", self._line_break.sub("\n", self._other_sign.sub("&lt;", text)))
        if takes_long(self._whole_tag, marked):
            return self._entity.sub(self._unescape, self._whole_tag.sub("", marked))
        tree = LexborHTMLParser(marked)
        tree.strip_tags(["head"])
        return tree.text() or ""

    def _without_hidden(self, text: str) -> str:
        """Remove comments, scripts, styles and frames; what is in titles and text areas is left to the parser.

        A begin is one only where an end follows: a text that only speaks of it is not lost behind it.
        """
        begins = list(self._begin.finditer(text))
        if not begins:
            return text
        ends = {name: [end.span() for end in pattern.finditer(text)] for name, pattern in self._ends.items()}
        pieces, at = [], 0
        for begin in begins:
            if begin.start() < at:
                continue
            name = begin[1].lower()
            pieces.append(text[at : begin.start()])
            place = bisect.bisect(ends[name], (begin.start() + 2,))  # "<!-->" is all of a comment
            if place == len(ends[name]):
                pieces.append("&lt;")
                at = begin.start() + 1
            else:
                at = ends[name][place][1]
                pieces.append(text[begin.start() : at] if name in ("title", "textarea") else "")
        return "".join([*pieces, text[at:]])

    @staticmethod
    def _unescape(entity: re.Match[str]) -> str:
        known = entity[0][1] == "#" or entity[0][1:] in html.entities.html5
        return html.unescape(entity[0]) if known else entity[0]


@dataclass(frozen=True, kw_only=True)
class ExpandMacro(Mapper):
    """Writes out LaTeX macros without arguments that the text defines (``\\newcommand``, ``\\def``), one level deep.

    What would make the text more than twice as long stays a macro.
    """

    name = "expand_macro_mapper"
    _definition: ClassVar = re.compile(
        r"\\(?:newcommand\*?\s*\{\s*(\\[A-Za-z]+)\s*\}|def\s*(\\[A-Za-z]+)\s*)\{(.{0,1000})\}[ \t]*$", re.MULTILINE
    )

    def apply(self, text: str) -> str:
        if "\\newcommand" not in text and "\\def" not in text:
            return text
        values: dict[str, str] = {}
        pieces, end = [], 0  # the text between the definitions, and the definitions
        for found in self._definition.finditer(text):
            values[found[1] or found[2]] = found[3]
            pieces += [text[end : found.start()], found[0]]
            end = found.end()
        if not values:
            return text
        pieces.append(text[end:])
        left = len(text)  # characters that the text may grow by

        def expand(macro: re.Match[str]) -> str:
            nonlocal left
            value = values.get(macro[0], macro[0])
            growth = len(value) - len(macro[0])
            if growth > left:
                return macro[0]
            left -= growth
            return value

        macro = re.compile(r"\\[A-Za-z]+")
        pieces[::2] = [macro.sub(expand, piece) for piece in pieces[::2]]
        return "".join(pieces)


@dataclass(frozen=True, kw_only=True)
class FixUnicode(Mapper):
    """Mends text that was decoded by the wrong character set, and normalises it, by ftfy."""

    name = "fix_unicode_mapper"
    normalization: Literal["NFC", "NFKC", "NFD", "NFKD"] = "NFC"

    def apply(self, text: str) -> str:
        import ftfy

        return ftfy.fix_text(text, normalization=self.normalization)


_PUNCTUATION = {
    **dict(zip("，。、；：？！（）【】〔〕％～．－＿／＂＇", ",.,;:?!()[][]%~.-_/\"'", strict=True)),
    **dict.fromkeys("“”„‟«»「」『』《》", '"'),
    **dict.fromkeys("‘’‚‛´", "'"),
    "〈": "<",
    "〉": ">",
    "∶": ":",
    "–": "-",
    "━": "-",
    "—": "-",
    "…": "...",
    **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
}


@dataclass(frozen=True, kw_only=True)
class NormalizePunctuation(Mapper):
    """Writes Chinese and typographic punctuation, and full-width digits, in ASCII."""

    name = "punctuation_normalization_mapper"
    _table: ClassVar = str.maketrans(_PUNCTUATION)

    def apply(self, text: str) -> str:
        return text.translate(self._table)


# Space separators of Unicode, the tab, and signs that have no width; line ends stay.
_SPACES = "\t\x0b\x0c\u00ad\u200b\u200c\u200d\u2060\ufeff\ufffc" + "".join(
    chr(code) for code in range(0x10000) if unicodedata.category(chr(code)) == "Zs"
)


@dataclass(frozen=True, kw_only=True)
class NormalizeWhitespace(Mapper):
    """Writes every kind of space as U+0020 and strips the ends; line ends stay."""

    name = "whitespace_normalization_mapper"
    _table: ClassVar = str.maketrans(dict.fromkeys(_SPACES, " "))

    def apply(self, text: str) -> str:
        return text.strip().translate(self._table).strip()


@dataclass(frozen=True, kw_only=True)
class RemoveRepeatSentences(Mapper):
    """Removes a sentence that the same text had before."""

    name = "remove_repeat_sentences_mapper"
    lowercase: bool = False
    ignore_special_character: bool = True
    min_repeat_sentence_length: int = 2
    # ASCII signs end a sentence only behind a word and before a space, a CJK character or the end: not in 3.14, a != b.
    _ends: ClassVar = re.compile(
        r"(?<=[。！？…])(?![。！？!?….’”\"'」』）)])|(?<=\S[.!?])(?=\s|[\u3040-\u9fff])"
        r"|(?<=[。！？…][’”\"'」』）)])(?=\S)|(?<=\S[.!?][’”\"'」』）)])(?=\s|[\u3040-\u9fff])"
    )
    _special: ClassVar = re.compile(r"[^\w\s]|_")

    def __post_init__(self) -> None:
        if self.min_repeat_sentence_length < 1:
            raise ConfigError(f"min_repeat_sentence_length is {self.min_repeat_sentence_length}; it must be at least 1")

    def apply(self, text: str) -> str:
        seen: set[str] = set()
        lines = []
        for line in text.split("\n"):
            kept = "".join(sentence for sentence in self._ends.split(line) if self._is_new(sentence, seen))
            if kept or not line:
                lines.append(kept)
        return "\n".join(lines)

    def _is_new(self, sentence: str, seen: set[str]) -> bool:
        key = sentence.strip()
        if self.lowercase:
            key = key.lower()
        if self.ignore_special_character:
            key = self._special.sub("", key)
        if len(key) < self.min_repeat_sentence_length:
            return True
        new = key not in seen
        seen.add(key)
        return new


@dataclass(frozen=True, kw_only=True)
class RemoveSpecificChars(Mapper):
    """Removes the given characters."""

    name = "remove_specific_chars_mapper"
    chars_to_remove: str = "◆●■►▼▲▴∆▻▷❖♡□"

    def apply(self, text: str) -> str:
        return text.translate(dict.fromkeys(map(ord, self.chars_to_remove)))


MAPPERS: dict[str, type[Mapper]] = {
    mapper.name: mapper
    for mapper in (
        ChineseConvert, CleanEmail, CleanHtml, CleanIp, CleanLinks, CleanCopyright, ExpandMacro, FixUnicode,
        NormalizePunctuation, NormalizeWhitespace, RemoveRepeatSentences, RemoveSpecificChars,
    )
}  # fmt: skip
"""Every mapper by its name in a recipe."""
