"""The forms that corpora come in, told by the ends of their names, in any case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steel_megatron.data.reading.compression import COMPRESSIONS

Kind = Literal["lines", "json", "csv", "parquet", "arrow", "tar", "warc", "file", "html"]


@dataclass(frozen=True)
class Form:
    """One form of files."""

    kind: Kind
    """What reads it."""
    suffixes: tuple[str, ...]
    rows: str
    """What its rows are, for people."""
    example: str
    """An input."""
    compressed: bool = True
    """Whether one of :data:`COMPRESSIONS` may follow the suffix."""
    packages: tuple[str, ...] = ()
    """What reading it needs in addition to what the library itself does."""


CODE_SUFFIXES = (".py", ".cpp", ".cc", ".hpp", ".h", ".java")
"""Source code."""
LINES = Form("lines", (".jsonl", ".ndjson"), "a JSON value per line", "corpus.jsonl.zst")
JSON = Form("json", (".json",), "the elements of one JSON array, or a JSON value per line", "corpus.json")
PARQUET = Form("parquet", (".parquet",), "rows of the table", "'corpus/*.parquet'", False, ("pyarrow",))
ARROW = Form(
    "arrow", (".arrow",), "rows of the table; a folder of datasets.save_to_disk", "saved_dataset/", False, ("pyarrow",)
)
CSV = Form(
    "csv", (".csv", ".tsv"), "records under a line with the names of the columns", "corpus.csv.gz", True, ("pyarrow",)
)
TAR = Form(
    "tar",
    (".tar",),
    "samples of WebDataset: files that follow each other and differ behind the first dot only",
    "'shards/*.tar' --json_keys txt",
    True,
    ("pyarrow",),
)
WARC = Form(
    "warc",
    (".warc", ".wet"),
    "texts of a crawl: WET, or responses in HTML or plain text",
    "crawl.warc.wet.gz",
    True,
    ("pyarrow", "warcio", "selectolax"),
)
TEXT = Form("file", (".txt", ".md", ".markdown", *CODE_SUFFIXES), "the whole file is one document", "books/")
HTML = Form("html", (".html", ".htm"), "the text of the page is one document", "pages/", True, ("selectolax",))
FORMS = (LINES, JSON, CSV, PARQUET, ARROW, TAR, WARC, TEXT, HTML)
"""All of them."""

KNOWN_SUFFIXES = tuple(suffix for form in FORMS for suffix in form.suffixes)
KNOWN = f"{', '.join(KNOWN_SUFFIXES)}, most of them also with {', '.join(COMPRESSIONS)} behind it"
"""The known ends of names, for messages."""


def name_of(path: str) -> str:
    """The last name of a path or an address, in lower case."""
    if "://" in path:
        path = path.partition("?")[0]
    return path.rstrip("/").rpartition("/")[2].lower()


def form_of(path: str) -> Form | None:
    """The form of a file; None for a name that says nothing."""
    name = name_of(path)
    if name.endswith(".tgz"):
        return TAR
    inner = next((name.removesuffix(end) for end in COMPRESSIONS if name.endswith(end)), None)
    for form in FORMS:
        if name.endswith(form.suffixes) or (form.compressed and inner is not None and inner.endswith(form.suffixes)):
            return form
    return None


def compression_of(path: str) -> str:
    """How a file of a known form is compressed: one of :data:`COMPRESSIONS`, or empty."""
    name = name_of(path)
    return ".gz" if name.endswith(".tgz") else next((end for end in COMPRESSIONS if name.endswith(end)), "")


def has_keys(path: str) -> bool:
    """Whether the file's rows have keys, so that a text is picked from them by its key."""
    return form_of(path) not in (TEXT, HTML)


def is_code(path: str) -> bool:
    """Whether a file is source code, by its name."""
    return name_of(path).removesuffix(compression_of(path)).endswith(CODE_SUFFIXES)


def packages_of(path: str) -> tuple[str, ...]:
    """The packages that reading a file or an address takes in addition to what the library itself needs."""
    form = form_of(path)
    packages = form.packages if form else ()
    if compression_of(path) == ".lz4":
        packages += ("lz4",)
    return (*packages, "fsspec") if "://" in path else packages
