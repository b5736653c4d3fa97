"""Pages in HTML -> their text, by selectolax."""

from __future__ import annotations

import codecs
import re
from typing import Any

from steel_megatron.data.reading.chunks import BYTE_ORDER_MARK, BadRow

HTML_TYPES = ("text/html", "application/xhtml")
CRAWLED_TEXT = (*HTML_TYPES, "text/plain")
"""How the types of what is read of a crawl begin."""

DEEPEST = 512
"""Levels of HTML that are parsed, as in browsers: the parser takes time by their square."""
LONGEST_TAG = 1 << 16
"""Characters of a tag that is parsed: the parser takes time by the square of the number of attributes."""
_VOID = {"br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "wbr", "!doctype"}
_CLOSED_BY_NEXT = {"p", "li", "option", "tr", "td", "th", "dt", "dd"}
_TAG = re.compile(r"<(/?)([a-z!]\w*)[^<>]*>", re.IGNORECASE)
_NO_TEXT = ["head", "script", "style", "template", "noscript", "iframe", "svg", "math", "canvas", "object", "select"]
_BLOCK = re.compile(
    "address|article|aside|blockquote|body|br|caption|dd|details|div|dl|dt|fieldset|figcaption|figure|footer|form|"
    "h[1-6]|header|hr|li|main|nav|ol|p|pre|section|summary|table|tbody|tfoot|thead|tr|ul"
)
"""They begin and end lines."""
_CELLS = {"td", "th"}
_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_OF_TYPE = re.compile(r"charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_WIDER = {"gb2312": "gb18030", "gbk": "gb18030", "iso8859-1": "cp1252", "ascii": "cp1252", "shift_jis": "cp932"}
"""What browsers read in place of a character set."""


def takes_long(tags: re.Pattern[str], text: str) -> bool:
    """Whether the parser's time would grow with the square of the text.

    So it does where a tag is very long, or tags nest deep: an end closes only the tag that is next to be closed.

    Args:
        tags: what is a tag; its first group is the slash of an end, its second one the name.
        text: HTML.
    """
    nest: list[str] = []
    for tag in tags.finditer(text):
        if len(tag[0]) > LONGEST_TAG:
            return True
        name = tag[2].lower()
        if tag[1]:
            if nest and nest[-1] == name:
                nest.pop()
        elif name not in _VOID and not (name in _CLOSED_BY_NEXT and nest and nest[-1] == name):
            nest.append(name)
            if len(nest) > DEEPEST:
                return True
    return False


def page_text(page: str) -> str:
    """The text of a page: a line for each block, the cells of a table parted by tabs, without scripts and the like.

    Raises:
        BadRow: the page is built so that parsing would take for ever.
    """
    from selectolax.lexbor import LexborHTMLParser

    if takes_long(_TAG, page):
        raise BadRow(f"HTML that is nested more than {DEEPEST} deep, or has a tag of {LONGEST_TAG:,} characters")
    tree = LexborHTMLParser(page)
    tree.strip_tags(_NO_TEXT)
    parts: list[str] = []
    if tree.body is not None:
        _collect(tree.body, parts, verbatim=False)
    lines = re.sub(r" *\n *", "\n", re.sub(r" {2,}", " ", "".join(parts))).split("\n")
    return "\n".join(line.strip(" ").rstrip("\t").replace("\0", " ") for line in lines if line.strip(" \t\0"))


def _collect(node: Any, parts: list[str], verbatim: bool) -> None:
    """Append the text of a node; no deeper than :data:`DEEPEST`. Spaces that stay are NULs, which HTML cannot hold."""
    child = node.child
    while child is not None:
        if child.tag == "-text":
            text = child.text_content or ""
            parts.append(text.replace(" ", "\0") if verbatim else re.sub(r"[ \t\r\n\f]+", " ", text))
        elif not child.tag.startswith("-"):
            around = "\n" if _BLOCK.fullmatch(child.tag) else ""
            parts.append(around)
            _collect(child, parts, verbatim or child.tag == "pre")
            parts.append("\t" if child.tag in _CELLS else around)
        child = child.next


def decoded_page(content: bytes, content_type: str = "") -> str:
    """The HTML of a page in the character set that its type or itself names, UTF-8 if neither does.

    Raises:
        BadRow: there is no such character set, or the page is not in it.
    """
    if content.startswith(BYTE_ORDER_MARK):
        content, found = content[len(BYTE_ORDER_MARK) :], "utf-8"
    elif named := _OF_TYPE.search(content_type):
        found = named[1]
    else:
        meta = _CHARSET.search(content, 0, 4096)
        found = meta[1].decode() if meta else "utf-8"
    try:
        name = codecs.lookup(found).name
        return content.decode(_WIDER.get(name, name))
    except LookupError:
        raise BadRow(f"a page in the character set {found!r}, which is not known") from None
    except UnicodeDecodeError as error:
        raise BadRow(f"not valid {found} (byte 0x{content[error.start]:02x}: {error.reason})", error.start) from None


def crawled_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a crawl with its text in place of HTML.

    Raises:
        BadRow: its HTML cannot be read.
    """
    kind = row["content_type"].decode(errors="replace")
    if kind.lower().startswith(HTML_TYPES):
        row["text"] = page_text(decoded_page(row["text"], kind))
    elif _OF_TYPE.search(kind):
        row["text"] = decoded_page(row["text"], kind)
    return row
