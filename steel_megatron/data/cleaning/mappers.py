"""Operators that change a text. Names and meaning are data-juicer's; docs/cleaning.md lists where they differ.

Every mapper is a frozen dataclass whose fields are its parameters in a recipe, with one method ``apply(text) -> text``.
All take time linear in the text: their patterns begin only where a run of characters begins.
"""

from __future__ import annotations

import functools
import html
import html.entities
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

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


# The characters of a URL (RFC 3986) are ASCII: a link in Chinese text ends where the Chinese goes on.
# A closing parenthesis is part of one only if its opening is.
_IN_URL = r"[a-z0-9\-._~:/?#\[\]@!$&'*+,;=%]"
_BRACKETED = rf"\({_IN_URL}*+\)"
# Hosts without a scheme are links only below these: self.size/2 is none.
_DOMAINS = "com|net|org|edu|gov|cn|tw|hk|jp|kr|uk"


@dataclass(frozen=True, kw_only=True)
class CleanLinks(_Remove):
    """Removes links: with a scheme, beginning in ``www.``, or a host of a common domain followed by a path."""

    name = "clean_links_mapper"
    pattern = re.compile(
        rf"(?<![a-z0-9.-])(?:(?:https?|ftps?|sftp|rtsp|file)://|www\d{{0,3}}\.(?=[a-z0-9])"
        rf"|(?:[a-z0-9-]++\.)+?(?:{_DOMAINS})/(?=[a-z0-9]))(?:(?:{_IN_URL}|{_BRACKETED})*(?:[a-z0-9/#&=_~-]|{_BRACKETED}))?",
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
    _kept: ClassVar = re.compile(r"#!|#.*coding[:=]")
    """A line that says how to run or read a file is no part of the notice."""

    def apply(self, text: str) -> str:
        found = self._comment.match(text)
        if found is None or not self._notice.search(found[0]):
            return text
        kept = [line for line in found[0].split("\n")[:2] if self._kept.match(line)]
        return "\n".join([*kept, text[found.end() :].lstrip("\n")])


# What is taken for a tag; any other "<" is a sign of its own (a < b, vector<int>, #include <map>).
_ELEMENTS = (
    "abbr|address|article|aside|audio|big|blockquote|body|br|button|caption|center|cite|code|col|colgroup|dd|del|details|"
    "div|dl|dt|em|embed|fieldset|figcaption|figure|font|footer|form|h[1-6]|head|header|hr|html|iframe|img|input|ins|kbd|"
    "label|legend|li|link|main|mark|meta|nav|noscript|ol|optgroup|option|param|picture|pre|samp|script|section|select|"
    "small|source|span|strike|strong|style|sub|summary|sup|table|tbody|td|textarea|tfoot|th|thead|title|tr|tt|ul|video|wbr"
)
_TAG = rf"/?(?:(?:{_ELEMENTS})(?=[\s/>])|[abipqsu](?=/?>|\s+[a-z-]+\s*=))|!--|!doctype\b"
_LINE_BREAKS = r"br|hr|/p|/div|/tr|/h[1-6]|/table|/ul|/ol|/dl|/dt|/dd|/pre|/blockquote|/section|/article"
_HIDING = (("<!--", "-->"), *((f"<{name}", f"</{name}") for name in ("script", "style", "textarea", "title", "iframe")))
"""Begin and end of what hides all text between them; a text that only speaks of one must not be lost behind it."""


@dataclass(frozen=True, kw_only=True)
class CleanHtml(Mapper):
    """Turns HTML into plain text, by selectolax; list items begin lines with an asterisk."""

    name = "clean_html_mapper"
    _tag: ClassVar = re.compile(f"<(?:{_TAG})", re.IGNORECASE)
    _other_sign: ClassVar = re.compile(f"<(?!{_TAG})", re.IGNORECASE)
    _entity: ClassVar = re.compile(r"&(?:#\d{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
    _line_break: ClassVar = re.compile(rf"\n?(?=<(?:{_LINE_BREAKS})[\s/>])", re.IGNORECASE)
    _item: ClassVar = re.compile(r"\n?<li(?=[\s/>])", re.IGNORECASE)

    def apply(self, text: str) -> str:
        lower = text.lower()
        for begin, end in _HIDING:
            if begin in lower and end not in lower:
                text = re.sub(begin, "&lt;" + begin[1:], text, flags=re.IGNORECASE)
        if not self._tag.search(text):
            return self._entity.sub(self._unescape, text)
        from selectolax.lexbor import LexborHTMLParser

        marked = self._item.sub("\n* <li", self._line_break.sub("\n", self._other_sign.sub("&lt;", text)))
        tree = LexborHTMLParser(marked)
        tree.strip_tags(["script", "style", "head"])
        return tree.text() or ""

    @staticmethod
    def _unescape(entity: re.Match[str]) -> str:
        known = entity[0][1] == "#" or entity[0][1:] in html.entities.html5
        return html.unescape(entity[0]) if known else entity[0]


@dataclass(frozen=True, kw_only=True)
class ExpandMacro(Mapper):
    """Writes out LaTeX macros without arguments that the text defines (``\\newcommand``, ``\\def``), one level deep."""

    name = "expand_macro_mapper"
    _definition: ClassVar = re.compile(
        r"\\(?:newcommand\*?\s*\{\s*(\\[A-Za-z]+)\s*\}|def\s*(\\[A-Za-z]+)\s*)\{(.{0,1000})\}[ \t]*$", re.MULTILINE
    )  # a longer value could blow a text up

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
        macro = re.compile(r"\\[A-Za-z]+")
        pieces[::2] = [macro.sub(lambda found: values.get(found[0], found[0]), piece) for piece in pieces[::2]]
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
    # A full stop in ASCII ends a sentence only before a space, a CJK character or the end: not in 3.14 and a.txt.
    _ends: ClassVar = re.compile(
        r"(?<=[。！？!?…])(?![。！？!?….’”\"'」』）)])|(?<=\.)(?=\s|[\u3040-\u9fff])|(?<=[。！？!?….][’”\"'」』）)])(?=\S)"
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
