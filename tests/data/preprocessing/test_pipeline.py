"""Preprocessing: the right ids in the right corpus, the same bytes however the work is cut, and clear refusals."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from steel_megatron.config import TokenizerEngine
from steel_megatron.data.indexed.dataset import open_indexed, verify
from steel_megatron.data.indexed.merge import merge
from steel_megatron.data.preprocessing.step import ChunkSizes
from steel_megatron.data.tokenizing.tokenizer import SentencePieceTokenizer
from steel_megatron.errors import DataError
from steel_megatron.files import exclusive_lock
from tests.data.configured import preprocess
from tests.data.conftest import Qwen, make_texts, rows_of, write_jsonl
from tests.data.jobs import files_in, mixed_inputs

FILES = ("bin", "idx", "json", "rows.npy")


def documents_of(prefix: str) -> list[list[int]]:
    corpus = open_indexed(prefix)
    return [corpus.document(index).tolist() for index in range(corpus.documents)]


def test_start_up_needs_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, steel_megatron.data.preprocessing.pipeline; "
        "print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_commands_on_corpora_load_no_heavy_module(tmp_path: Path, sp_model: Path) -> None:
    source, ledger = write_jsonl(tmp_path / "in.jsonl", make_texts(20)), str(tmp_path / "ledger.json")
    prefix, tokenizer = str(tmp_path / "c"), ["--tokenizer_kind", "sentencepiece", "--tokenizer_path", str(sp_model)]
    corpus = f"{prefix}_text_document"
    commands = [
        ["preprocess", "--inputs", str(source), "--output_prefix", prefix, *tokenizer],
        ["inspect", corpus],
        ["verify", corpus],
        ["data", "create", ledger, corpus, "--sequence_length", "8"],
        ["data", "show", ledger],
    ]
    code = (  # pyarrow is not listed, as gigatoken's awkward arrays bring it along
        "import sys; from steel_megatron.cli import main\n"
        f"codes = [main(words) for words in {commands!r}]\n"
        "heavy = ('torch', 'transformers', 'megatron', 'pandas', 'datasets', 'scipy', 'matplotlib', 'ray')\n"
        "print(codes, [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0, 0] []", done.stderr


def test_a_key_cannot_name_a_folder(tmp_path: Path, sp_model: Path) -> None:
    folder = tmp_path / "out"
    keys = {"../../esc": "..%2F..%2Fesc", "a/b": "a%2Fb", "a%2Fb": "a%252Fb", "[标题]*": "%5B标题%5D%2A"}
    folder.mkdir()
    (folder / "in.jsonl").write_text(json.dumps({key: key for key in keys}) + "\n")
    for _ in range(2):  # the second time it is finished already, and its own files are no input
        preprocess([str(folder)], folder / "c", "sentencepiece", sp_model, json_keys=tuple(keys))
    written = {path.name for path in folder.iterdir() if path.suffix == ".bin"}
    assert written == {f"c_{name}_document.bin" for name in keys.values()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and all(path.is_file() for path in folder.iterdir())


def test_ids_counts_and_entropy(tmp_path: Path, sp_model: Path, sp: SentencePieceTokenizer) -> None:
    texts = make_texts(50)
    source = write_jsonl(tmp_path / "corpus.jsonl", texts)
    report = preprocess([str(source)], tmp_path / "out" / "c", "sentencepiece", sp_model)
    expected = [[*sp.encode(text), sp.eod_id] for text in texts]
    assert report.outputs == {"train": f"{tmp_path}/out/c_text_document"}
    assert documents_of(report.outputs["train"]) == expected
    counts = Counter(token for document in expected for token in document)
    total = sum(counts.values())
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    assert report.unigram_entropy == pytest.approx(entropy, rel=1e-12)
    assert (report.documents, report.skipped, report.tokens) == (50, 0, total)
    assert report.bytes == sum(len(text.encode()) for text in texts)
    assert (report.split_documents, report.split_tokens) == ({"train": 50}, {"train": total})
    manifest = open_indexed(report.outputs["train"], vocab_size=700).manifest
    assert manifest is not None
    assert manifest["tokenizer"] == {
        "kind": "sentencepiece",
        "fingerprint": sp.fingerprint,
        "vocab_size": 700,
        "eod_id": 2,
    }
    (entry,) = manifest["inputs"]
    assert len(entry.pop("fingerprint")) == 64
    counted = {"documents": 50, "tokens": total, "text_bytes": report.bytes}
    assert entry == {"path": str(source), "source": "text", "bytes": source.stat().st_size, **counted}
    assert verify(report.outputs["train"], vocab_size=700).checksums
    assert sorted(files_in(tmp_path / "out")) == [f"c_text_document.{suffix}" for suffix in FILES]


def test_without_end_of_document(tmp_path: Path, sp_model: Path, sp: SentencePieceTokenizer) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", ["one </s>", "two"])
    report = preprocess([str(source)], tmp_path / "c", "sentencepiece", sp_model, append_eod=False)
    assert documents_of(report.outputs["train"]) == [sp.encode("one </s>"), sp.encode("two")]
    assert all(sp.eod_id not in document for document in documents_of(report.outputs["train"]))


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, sp_model: Path) -> None:
    texts = make_texts(4000)  # several chunks
    source = write_jsonl(tmp_path / "corpus.jsonl", [*texts[:2000], "", *texts[2000:]])
    written = []
    engines: tuple[TokenizerEngine, ...] = (
        "tokenizers",
        "auto",
    )  # with processes; with threads, where gigatoken is installed
    for engine in engines:
        for workers in (1, 3):
            prefix = tmp_path / f"{engine}{workers}" / "c"
            options: dict[str, Any] = {"workers": workers, "engine": engine, "valid_fraction": 0.1}
            report = preprocess([str(source)], prefix, "sentencepiece", sp_model, **options, pace=ChunkSizes(20_000))
            assert (report.documents, report.skipped) == (4000, 1)
            written.append(files_in(prefix.parent))
    assert written[0] == written[1] == written[2] == written[3] and len(written[0]) == 9


def test_without_compiled_helpers_the_bytes_are_the_same(
    tmp_path: Path, sp_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = mixed_inputs(tmp_path, 300)
    options: dict[str, Any] = {"valid_fraction": 0.2, "on_bad_row": "skip", "pace": ChunkSizes(4096)}
    preprocess(inputs, tmp_path / "compiled" / "c", "sentencepiece", sp_model, **options)
    for module in ("reading.documents", "preprocessing.stored_documents", "tokenizing.gigatoken_engine"):
        monkeypatch.setattr(f"steel_megatron.data.{module}.helpers", None)
    preprocess(inputs, tmp_path / "plain" / "c", "sentencepiece", sp_model, **options)
    assert files_in(tmp_path / "compiled") == files_in(tmp_path / "plain") != {}


def test_a_document_never_changes_its_split(tmp_path: Path, sp_model: Path, sp: SentencePieceTokenizer) -> None:
    texts = make_texts(400)

    def split(name: str, rows: list[str], **options: object) -> dict[str, str]:
        source = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        report = preprocess(
            [str(source)],
            tmp_path / name,
            "sentencepiece",
            sp_model,
            append_eod=False,
            **options,
        )
        assert report.outputs == {part: f"{tmp_path}/{name}_{part}_text_document" for part in ("train", "valid")}
        found: dict[str, str] = {}
        for part, prefix in report.outputs.items():
            for document in documents_of(prefix):
                text = sp.decode(document)
                assert found.setdefault(text, part) == part, "copies of a document are on both sides"
        return found

    base = split("base", texts, valid_fraction=0.2)
    assert set(base) == set(texts)
    assert 0.1 < sum(part == "valid" for part in base.values()) / len(texts) < 0.3
    assert split("again", texts[::-1] + texts[:100], valid_fraction=0.2) == base
    assert {text: base[text] for text in texts[:60]} == split("fewer", texts[:60], valid_fraction=0.2)
    more = split("more", texts, valid_fraction=0.4)
    assert all(more[text] == "valid" for text, part in base.items() if part == "valid")
    assert split("seed", texts, valid_fraction=0.2, seed=1) != base


def test_several_keys_and_several_files(tmp_path: Path, sp_model: Path, sp: SentencePieceTokenizer) -> None:
    rows = [{"title": f"title {number}", "body": f"body {number}"} for number in range(3)]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row))
    report = preprocess(
        [str(tmp_path / "*.jsonl")], tmp_path / "c", "sentencepiece", sp_model, json_keys=("title", "body")
    )
    assert set(report.outputs) == {"train.title", "train.body"} and report.documents == 6
    for key in ("title", "body"):
        expected = [[*sp.encode(row[key]), sp.eod_id] for row in rows]
        assert documents_of(report.outputs[f"train.{key}"]) == expected
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(DataError, match=r"x\.txt has no keys to choose from"):
        preprocess([str(tmp_path)], tmp_path / "d", "sentencepiece", sp_model, json_keys=("title", "body"))


def test_bad_rows_stop_or_are_listed(tmp_path: Path, sp_model: Path) -> None:
    source = tmp_path / "corpus.jsonl"
    source.write_bytes(b'{"text": "good"}\n{"text": \n\n{"text": null}\n{"text": ""}\n{"text": "good too"}\n')
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"corpus\.jsonl, row 2, byte \d+: broken JSON"):
        preprocess([str(source)], out / "c", "sentencepiece", sp_model)
    assert not files_in(out)
    report = preprocess([str(source)], out / "c", "sentencepiece", sp_model, on_bad_row="skip")
    assert (report.documents, report.skipped) == (2, 3)
    skipped = [json.loads(line) for line in (out / "c_skipped.jsonl").read_text().splitlines()]
    assert [(row["source"], row["row"], row["key"]) for row in skipped] == [(str(source), n, "text") for n in (2, 4, 5)]
    assert skipped[0]["reason"].startswith("broken JSON") and skipped[2]["reason"] == "empty"
    # A clean run over it does not leave the old list behind.
    write_jsonl(source, ["good"])
    preprocess([str(source)], out / "c", "sentencepiece", sp_model, overwrite=True)
    assert "c_skipped.jsonl" not in files_in(out) and len(files_in(out)) == 4


def test_existing_output_is_refused_before_any_work(tmp_path: Path, sp_model: Path) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", make_texts(20))
    out = tmp_path / "out"
    preprocess([str(source)], out / "c", "sentencepiece", sp_model)
    before = files_in(out)
    write_jsonl(source, make_texts(20, seed=1))
    with pytest.raises(DataError, match=r"c_text_document\.bin exists already; .*overwrite"):
        preprocess([str(source)], out / "c", "sentencepiece", sp_model)
    assert files_in(out) == before
    preprocess([str(source)], out / "c", "sentencepiece", sp_model, overwrite=True)
    assert files_in(out) != before


def test_a_failed_run_with_overwrite_keeps_the_old_corpus(tmp_path: Path, sp_model: Path) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", make_texts(20))
    out = tmp_path / "out"
    preprocess([str(source)], out / "c", "sentencepiece", sp_model)
    before = files_in(out)
    source.write_bytes(source.read_bytes() + b"{")
    with pytest.raises(DataError, match="row 21"):
        preprocess([str(source)], out / "c", "sentencepiece", sp_model, overwrite=True)
    assert files_in(out) == before


def test_a_second_job_on_the_prefix_is_refused(tmp_path: Path, sp_model: Path) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", make_texts(5))
    with exclusive_lock(tmp_path / "c", DataError), pytest.raises(DataError, match="another job is writing to"):
        preprocess([str(source)], tmp_path / "c", "sentencepiece", sp_model)
    preprocess([str(source)], tmp_path / "c", "sentencepiece", sp_model)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, r"no document under key 'text' \(0 rows were skipped\)"),
        (["", ""], {}, r"no document under key 'text' \(2 rows were skipped\)"),
        (["a", "b"], {"valid_fraction": 1e-9}, "the valid split got none of 2 documents"),
        (["a", "b"], {"valid_fraction": 1 - 1e-9}, "the train split got none of 2 documents"),
    ],
)
def test_empty_outputs(
    tmp_path: Path, sp_model: Path, rows: list[str], options: dict[str, float], message: str
) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", rows)
    with pytest.raises(DataError, match=message):
        preprocess([str(source)], tmp_path / "out" / "c", "sentencepiece", sp_model, **options)
    assert not files_in(tmp_path / "out")


# ---------------------------------------------------------------- sources


def test_counts_by_source_and_where_documents_came_from(tmp_path: Path, sp_model: Path) -> None:
    inputs = mixed_inputs(tmp_path, 90)
    out = tmp_path / "out"
    report = preprocess(inputs, out / "c", "sentencepiece", sp_model, valid_fraction=0.3, on_bad_row="skip")
    text, firefly = report.sources["text"], report.sources["firefly"]
    assert (text.skipped, firefly.skipped, report.skipped) == (3, 1, 4)
    assert sum(counts.documents for counts in text.splits.values()) == 90
    assert sum(counts.documents for counts in firefly.splits.values()) == 30
    origins = []
    for split, prefix in report.outputs.items():
        corpus = open_indexed(prefix)
        both = [of.splits[split] for of in report.sources.values()]
        assert corpus.documents == sum(counts.documents for counts in both) > 0
        assert corpus.tokens == sum(counts.tokens for counts in both)
        origins += [origin for index in range(corpus.documents) if (origin := corpus.origin(index)) is not None]
    assert len({(origin.path, origin.row) for origin in origins}) == 120
    assert all((origin.source == "firefly") == origin.path.endswith("c.jsonl") for origin in origins)
    assert {origin.row for origin in origins if origin.path.endswith("a.jsonl")} == set(range(1, 31))
    skipped = [json.loads(line) for line in (out / "c_skipped.jsonl").read_text().splitlines()]
    assert [(row["row"], row["raw"]) for row in skipped[:2]] == [(31, '{"text": null}'), (33, "broken")]
    assert skipped[1]["offset"] >= (tmp_path / "a.jsonl").read_bytes().index(b"broken")


def test_small_files_are_encoded_together(tmp_path: Path, sp_model: Path, sp: SentencePieceTokenizer) -> None:
    texts = make_texts(40)
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02d}.py").write_text(text)
    report = preprocess([str(tmp_path)], tmp_path / "out" / "c", "sentencepiece", sp_model, append_eod=False)
    assert documents_of(report.outputs["train"]) == [sp.encode(text) for text in texts]
    origin = open_indexed(report.outputs["train"]).origin(17)
    assert origin is not None and (origin.path, origin.row) == (str(tmp_path / "17.py"), 1)


def test_several_keys_need_rows_of_keys(tmp_path: Path, sp_model: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(DataError, match="is read as skypile, which has no keys to choose from"):
        preprocess([f"skypile={tmp_path}/a.jsonl"], tmp_path / "c", "sentencepiece", sp_model, json_keys=("a", "b"))


# ---------------------------------------------------------------- shards


@pytest.mark.parametrize("size", [1, 500, 4000, 10**9])
def test_shards_follow_each_other(tmp_path: Path, sp_model: Path, size: int) -> None:
    inputs = mixed_inputs(tmp_path, 60)
    options: dict[str, Any] = {"on_bad_row": "skip", "valid_fraction": 0.3}
    whole = preprocess(inputs, tmp_path / "whole" / "c", "sentencepiece", sp_model, **options)
    cut = preprocess(inputs, tmp_path / "cut" / "c", "sentencepiece", sp_model, shard_size=size, **options)
    assert cut.split_documents == whole.split_documents and cut.split_tokens == whole.split_tokens
    assert cut.sources == whole.sources and cut.unigram_entropy == pytest.approx(whole.unigram_entropy, rel=1e-12)
    for split, prefix in whole.outputs.items():
        shards = cut.shards[split]
        assert shards == [f"{cut.outputs[split]}_{number:05d}" for number in range(len(shards))]
        several = len(shards) > 1
        assert several == (size <= 4000) and (size > 1 or len(shards) == whole.split_documents[split])
        corpora = [open_indexed(shard) for shard in shards]
        for corpus, following in itertools.pairwise(corpora):
            assert corpus.tokens <= size or corpus.documents == 1
            assert corpus.tokens + int(following.sizes[0]) > size, "the next document would have fitted"
        merge(shards, merged := tmp_path / f"merged_{split}")
        for suffix in ("bin", "idx", "rows.npy"):
            assert Path(f"{merged}.{suffix}").read_bytes() == Path(f"{prefix}.{suffix}").read_bytes(), suffix
        manifests = [json.loads(Path(f"{of}.json").read_text()) for of in (merged, prefix)]
        assert manifests[0]["inputs"] == manifests[1]["inputs"]
        assert all(verify(shard, vocab_size=700).checksums for shard in shards[:5])


def test_overwrite_leaves_no_shard_of_an_earlier_job(tmp_path: Path, sp_model: Path) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", make_texts(40))
    out = tmp_path / "out"
    first = preprocess([str(source)], out / "c", "sentencepiece", sp_model, shard_size=500)
    assert len(first.shards["train"]) > 5
    for shard_size in (None, 500, 20_000):
        with pytest.raises(DataError, match="exists already"):
            preprocess([str(source)], out / "c", "sentencepiece", sp_model, shard_size=shard_size)
        report = preprocess([str(source)], out / "c", "sentencepiece", sp_model, shard_size=shard_size, overwrite=True)
        expected = [Path(shard).name for shard in report.shards["train"]]
        assert sorted(files_in(out)) == sorted(f"{name}.{suffix}" for name in expected for suffix in FILES)


# ---------------------------------------------------------------- made and real samples


@pytest.mark.slow
def test_rows_get_the_ids_of_transformers(
    sample_files: dict[str, Path], qwen: Qwen, qwen_by_transformers: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    keys = {"wanjuan": "content", "firefly": "input"}
    texts = [row[key] for source, key in keys.items() for row in rows_of(sample_files[source], 60)]
    assert len(texts) == 120 and all(text.strip() for text in texts)
    source = write_jsonl(tmp_path / "corpus.jsonl", texts)
    report = preprocess([str(source)], tmp_path / "c", "huggingface", qwen.folder, json_keys=("text",))
    expected = [qwen_by_transformers(text, split_special_tokens=True)["input_ids"] for text in texts]
    assert documents_of(report.outputs["train"]) == [[*ids, qwen.end] for ids in expected]
    assert (report.documents, report.skipped) == (120, 0)
    dtype = open_indexed(report.outputs["train"], vocab_size=qwen.vocab_size).dtype.name
    assert dtype == ("int32" if qwen.vocab_size > 65_536 else "uint16")


@pytest.mark.slow
def test_dialogues_get_control_tokens_and_one_end(
    sample_files: dict[str, Path], qwen: Qwen, qwen_by_transformers: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    said = rows_of(sample_files["firefly"], 40)
    (tmp_path / "firefly.jsonl").write_text("\n".join(map(json.dumps, said)))
    write_jsonl(tmp_path / "plain.jsonl", ["<|im_start|>user\nplain<|im_end|>", "text<|endoftext|>"])
    (tmp_path / "mixed.jsonl").write_text(
        '{"text": "one"}\n{"text": "<|im_start|>user\\ntwo<|im_end|>", "dialogue": true}\n{"text": "three"}\n'
    )
    inputs = [f"firefly={tmp_path}/firefly.jsonl", f"{tmp_path}/plain.jsonl", f"{tmp_path}/mixed.jsonl"]
    report = preprocess(inputs, tmp_path / "c", "huggingface", qwen.folder)
    found = documents_of(report.outputs["train"])
    for row, ids in zip(said, found, strict=False):
        turns = [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": row["input"]},
            {"role": "assistant", "content": row["target"]},
        ]
        expected = qwen_by_transformers.apply_chat_template(turns, tokenize=False).rstrip("\n")
        assert ids == qwen_by_transformers(expected)["input_ids"] and ids.count(qwen.end) == 3
    for ids in found[40:42]:
        assert qwen.start not in ids and ids.count(qwen.end) == 1 and ids[-1] == qwen.end
    assert [ids.count(qwen.end) for ids in found[42:]] == [1, 1, 1]
    assert found[43][0] == qwen.start and qwen.start not in found[42] + found[44]
