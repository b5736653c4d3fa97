"""Looking into corpora, and the commands for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.data.indexed.dataset import open_indexed
from steel_megatron.data.indexed.inspection import (
    QUANTILES,
    expand_prefixes,
    inspect,
    inspect_corpus,
    merge_corpora,
    verify_corpus,
)
from steel_megatron.data.tokenizing.tokenizer import SentencePieceTokenizer
from steel_megatron.errors import ConfigError, DataError
from tests.data.conftest import make_texts
from tests.data.corpora import inputs, write, write_megatron


def shards(folder: Path, tokenizer: SentencePieceTokenizer, count: int = 30) -> list[str]:
    """Two shards of one file, the second with the begin of another file; each text is a document."""
    texts = make_texts(count)
    half = count // 2
    prefixes = []
    for number, part in enumerate((texts[:half], texts[half:])):
        documents = [[*tokenizer.encode(text), tokenizer.eod_id] for text in part]
        files = [
            {
                "path": name,
                "source": source,
                "documents": len(chosen),
                "tokens": sum(len(documents[at]) for at in chosen),
                "text_bytes": sum(len(part[at].encode()) for at in chosen),
            }
            for name, source, chosen in (
                ("a.jsonl", "zhihu", range(half - 1)),
                ("b.jsonl", "belle", range(half - 1, half)),
            )
        ]
        about: dict[str, Any] = {"tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": 700}}
        rows = [*range(1, half), 1]
        prefixes.append(write(folder / f"c_document_{number:05d}", documents, rows=rows, inputs=files, **about))
    return prefixes


def test_inspection_of_shards(tmp_path: Path, sp: SentencePieceTokenizer) -> None:
    prefixes = shards(tmp_path, sp)
    texts = make_texts(30)
    found = inspect([str(tmp_path / "c_document_*")], sp, samples=4)
    sizes = np.array([len(sp.encode(text)) + 1 for text in texts])
    assert found.prefixes == prefixes and found.dtypes == ["uint16", "uint16"]
    assert (found.documents, found.tokens, found.max_id) == (30, sizes.sum(), max(found_ids(prefixes)))
    assert list(found.quantiles.values()) == np.quantile(sizes, QUANTILES, method="nearest").tolist()
    assert found.tokenizers == [sp.fingerprint] and found.tokenizer_matches is True and not found.without_manifest
    assert found.bytes == sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix != ".json")
    chosen = {"zhihu": [*range(14), *range(15, 29)], "belle": [14, 29]}
    for counts in found.sources:
        of = chosen.pop(counts.source)
        assert (counts.documents, counts.tokens) == (len(of), sizes[of].sum())
        assert counts.bytes_per_token == sum(len(texts[at].encode()) for at in of) / sizes[of].sum()
    assert not chosen
    places = [(sample.prefix, sample.document) for sample in found.samples]
    assert places == [(prefixes[0], 0), (prefixes[0], 9), (prefixes[1], 4), (prefixes[1], 14)]
    assert [sample.text for sample in found.samples] == [
        sp.decode([*sp.encode(texts[at]), sp.eod_id][:200])[:200] for at in (0, 9, 19, 29)
    ]
    origins = [(sample.origin.path, sample.origin.row) for sample in found.samples if sample.origin]
    assert origins == [("a.jsonl", 1), ("a.jsonl", 10), ("a.jsonl", 5), ("b.jsonl", 1)]


def found_ids(prefixes: list[str]) -> list[int]:
    return [int(open_indexed(prefix).flat.max()) for prefix in prefixes]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 70), min_size=1, max_size=40).filter(any), min_size=1, max_size=3))
def test_lengths_are_counted_exactly(tmp_path_factory: pytest.TempPathFactory, sizes: list[list[int]]) -> None:
    folder = tmp_path_factory.mktemp("any")
    prefixes = [write_megatron(folder / str(number), [[[1] * size] for size in of]) for number, of in enumerate(sizes)]
    found = inspect(prefixes, samples=0)
    flat = np.array([size for of in sizes for size in of])
    expected = [sorted(flat)[round(quantile * (len(flat) - 1))] for quantile in QUANTILES]
    assert list(found.quantiles.values()) == expected
    assert (sum(bin.documents for bin in found.histogram), sum(bin.tokens for bin in found.histogram)) == (
        len(flat),
        flat.sum(),
    )
    for bin in found.histogram:
        assert bin.documents == sum(bin.low <= size <= bin.high for size in flat)
    assert found.histogram[0].documents and found.histogram[-1].documents
    assert all(a.high + 1 == b.low for a, b in zip(found.histogram, found.histogram[1:], strict=False))


def test_the_text_says_it_all(tmp_path: Path, sp: SentencePieceTokenizer) -> None:
    shards(tmp_path, sp)
    text = inspect([str(tmp_path / "c_document_*")], sp, samples=1).as_text()
    for expected in (
        "2 corpora: 30 documents, ",
        "tokens of uint16",
        f"tokenizer: {sp.fingerprint}, which is the one given",
        "tokens per document: 0% ",
        "source ",
        "zhihu ",
        "document 0 of ",
        "row 1 of a.jsonl",
        repr(make_texts(1)[0][:20])[1:-1],
    ):
        assert expected in text
    bare = inspect([write_megatron(tmp_path / "theirs", [[[7, 8]], [[]]])]).as_text()
    assert "theirs: 2 documents, 2 tokens of uint16" in bare and "'7 8'" in bare
    assert "without a manifest, so without checksums: " in bare and "source" not in bare


def test_corpora_of_different_tokenizers(tmp_path: Path, sp: SentencePieceTokenizer) -> None:
    prefixes = [write(tmp_path / name, [[1]], tokenizer={"fingerprint": name}) for name in ("a", "b")]
    found = inspect(prefixes)
    assert "made with 2 different tokenizers: a, b" in found.as_text() and found.tokenizer_matches is None
    with pytest.raises(DataError, match=f"a was made with another tokenizer: .* a, this one has {sp.fingerprint}"):
        inspect(prefixes, sp)
    with pytest.raises(DataError, match=r"token id 5000 .* ids 0 to 699"):
        inspect([write(tmp_path / "c", [[5000]])], sp)


def test_the_bounds_of_samples(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x")
    assert [sample.document for sample in inspect([prefix], samples=9).samples] == [0, 1, 2, 3, 4]
    assert inspect([prefix], samples=0).samples == []
    with pytest.raises(ConfigError, match="samples is -1"):
        inspect([prefix], samples=-1)


def test_prefixes(tmp_path: Path) -> None:
    a, b, odd, named = (write(tmp_path / name, [[1]]) for name in ("c_b", "c_a", "[c]", "c.bin"))
    everything = str(tmp_path / "c_*")
    assert expand_prefixes([everything]) == [b, a]
    assert expand_prefixes([a, everything]) == [a, b]
    # What a shell makes of a pattern without a suffix.
    assert expand_prefixes(sorted(map(str, tmp_path.glob("c_*")))) == [b, a]
    assert expand_prefixes([odd, named]) == [odd, named]
    for patterns, message in (([str(tmp_path / "z*")], r"no corpus matches .*z\*"), ([], "no corpus was given")):
        with pytest.raises(DataError, match=message):
            expand_prefixes(patterns)


def test_the_commands(tmp_path: Path, sp_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sp = SentencePieceTokenizer(sp_model)
    shards(tmp_path, sp)
    everything = [str(tmp_path / "c_document_*")]
    output = str(tmp_path / "merged" / "c")
    merge_corpora(everything, output)
    assert f"{output}: 30 documents, " in capsys.readouterr().out
    with pytest.raises(DataError, match="exists already"):
        merge_corpora(everything, output)
    merge_corpora(everything, output, overwrite=True)
    capsys.readouterr()
    inspect_corpus([output], str(sp_model), "sentencepiece", samples=2, json_output=True)
    found = json.loads(capsys.readouterr().out)
    assert found["documents"] == 30
    assert found["samples"][1]["origin"] == {"path": "b.jsonl", "source": "belle", "row": 1}
    assert {of["source"]: of["documents"] for of in found["sources"]} == {"zhihu": 28, "belle": 2}
    assert all(of["bytes_per_token"] == of["text_bytes"] / of["tokens"] for of in found["sources"])
    inspect_corpus([output])
    assert "30 documents" in capsys.readouterr().out
    verify_corpus([*everything, output])
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3 and all("structure in order" in line and "checksums match" in line for line in out)
    path = Path(f"{output}.bin")
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match="has changed"):
        verify_corpus([output])
    for bad in ("", f"{tmp_path}/"):
        with pytest.raises(ConfigError, match="must end in a name"):
            merge_corpora(everything, bad)
    with pytest.raises(ConfigError, match="workers is 0"):
        verify_corpus(everything, workers=0)
    with pytest.raises(DataError, match="No such file"):
        verify_corpus([str(tmp_path / "none")])


def test_a_largest_id_that_not_all_say(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / "a", [[9]], inputs=inputs(1)), write_megatron(tmp_path / "b", [[[1]]])]
    assert inspect(prefixes[:1]).max_id == 9
    assert inspect(prefixes).max_id is None
