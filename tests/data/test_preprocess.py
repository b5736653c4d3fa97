"""Preprocessing: the right ids, the same bytes for any number of workers, and nothing left when it fails."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from steel_megatron.data.indexed import open_indexed, verify
from steel_megatron.data.preprocess import preprocess
from steel_megatron.data.tokenizer import SentencePieceTokenizer
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.files import exclusive_lock
from tests.data.conftest import make_texts, write_jsonl


def files_in(folder: Path) -> dict[str, bytes]:
    found = sorted(folder.iterdir()) if folder.exists() else []  # work that wrote nothing leaves no folder
    return {path.name: path.read_bytes() for path in found if path.is_file()}


def documents_of(prefix: str) -> list[list[int]]:
    corpus = open_indexed(prefix)
    return [corpus.document(index).tolist() for index in range(corpus.documents)]


def test_start_up_needs_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, steel_megatron.data.preprocess; "
        "print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
    assert manifest["inputs"] == [{"path": str(source), "bytes": source.stat().st_size}]
    assert verify(report.outputs["train"], vocab_size=700).checksums
    assert sorted(files_in(tmp_path / "out")) == [f"c_text_document.{suffix}" for suffix in ("bin", "idx", "json")]


def test_without_end_of_document(tmp_path: Path, sp_model: Path, sp: SentencePieceTokenizer) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", ["one </s>", "two"])
    report = preprocess([str(source)], tmp_path / "c", "sentencepiece", sp_model, append_eod=False)
    assert documents_of(report.outputs["train"]) == [sp.encode("one </s>"), sp.encode("two")]
    assert all(sp.eod_id not in document for document in documents_of(report.outputs["train"]))


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, sp_model: Path) -> None:
    texts = make_texts(4000)  # several chunks
    source = write_jsonl(tmp_path / "corpus.jsonl", [*texts[:2000], "", *texts[2000:]])
    written = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        report = preprocess([str(source)], folder / "c", "sentencepiece", sp_model, workers=workers, valid_fraction=0.1)
        assert (report.documents, report.skipped) == (4000, 1)
        written.append(files_in(folder))
    assert written[0] == written[1] and len(written[0]) == 7


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
            **options,  # type: ignore[arg-type]
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
    assert "c_skipped.jsonl" not in files_in(out) and len(files_in(out)) == 3


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
        preprocess([str(source)], tmp_path / "out" / "c", "sentencepiece", sp_model, **options)  # type: ignore[arg-type]
    assert not files_in(tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [{"workers": 0}, {"valid_fraction": 1.0}, {"valid_fraction": -0.1}, {"json_keys": ()}, {"json_keys": "aa"}],
)
def test_arguments_out_of_range(tmp_path: Path, sp_model: Path, options: dict[str, object]) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", ["a"])
    with pytest.raises(ConfigError, match="must be at least 1"):
        preprocess([str(source)], tmp_path / "c", "sentencepiece", sp_model, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="on_bad_row is 'Skip'"):
        preprocess([str(source)], tmp_path / "c", "sentencepiece", sp_model, on_bad_row="Skip")  # type: ignore[arg-type]


# ---------------------------------------------------------------- processes that die


@pytest.fixture(scope="module")
def large_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough text that a run with two workers takes a second or more."""
    texts = make_texts(20_000)
    return write_jsonl(tmp_path_factory.mktemp("large") / "corpus.jsonl", [text * 3 for text in texts])


def start_job(source: Path, prefix: Path, sp_model: Path) -> subprocess.Popen[str]:
    """Start the job and wait until its first ids are on disk."""
    prefix.parent.mkdir()
    code = (
        "import sys\n"
        "from steel_megatron.data.preprocess import preprocess\n"
        "from steel_megatron.errors import SteelError\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        preprocess([sys.argv[1]], sys.argv[2], 'sentencepiece', sys.argv[3], workers=2)\n"
        "    except SteelError as error:\n"
        "        sys.exit(f'error: {error}')\n"
    )
    arguments = [sys.executable, "-c", code, str(source), str(prefix), str(sp_model)]
    job = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    begun = Path(f"{prefix}_text_document.bin.partial")
    deadline = time.monotonic() + 30
    while not (begun.exists() and begun.stat().st_size):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.005)
    return job


def workers_of(job: subprocess.Popen[str]) -> list[int]:
    """Process ids of the job's spawned workers."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in pids):
        assert time.monotonic() < deadline, "workers outlived the job"
        time.sleep(0.02)


def test_a_killed_worker_ends_the_job(tmp_path: Path, sp_model: Path, large_corpus: Path) -> None:
    job = start_job(large_corpus, tmp_path / "out" / "c", sp_model)
    os.kill(workers_of(job)[0], signal.SIGKILL)
    _, errors = job.communicate(timeout=30)
    assert job.returncode == 1 and "error: one of 2 worker processes died" in errors and "Traceback" not in errors
    assert not files_in(tmp_path / "out")


def test_a_killed_job_leaves_no_workers_and_can_run_again(tmp_path: Path, sp_model: Path, large_corpus: Path) -> None:
    job = start_job(large_corpus, tmp_path / "out" / "c", sp_model)
    workers = workers_of(job)
    assert len(workers) == 2
    job.kill()
    job.communicate(timeout=30)
    wait_gone(workers)
    assert all(name.endswith((".partial", ".lock")) for name in files_in(tmp_path / "out"))
    with pytest.raises(DataError):
        open_indexed(tmp_path / "out" / "c_text_document")
    small = write_jsonl(tmp_path / "small.jsonl", make_texts(5))
    preprocess([str(small)], tmp_path / "out" / "c", "sentencepiece", sp_model)
    assert sorted(files_in(tmp_path / "out")) == [f"c_text_document.{suffix}" for suffix in ("bin", "idx", "json")]


def test_an_interrupted_job_leaves_nothing(tmp_path: Path, sp_model: Path, large_corpus: Path) -> None:
    job = start_job(large_corpus, tmp_path / "out" / "c", sp_model)
    workers = workers_of(job)
    job.send_signal(signal.SIGINT)
    job.communicate(timeout=30)
    assert job.returncode != 0
    wait_gone(workers)
    assert not files_in(tmp_path / "out")


# ---------------------------------------------------------------- real data


def test_real_rows_get_the_ids_of_transformers(
    shared_dir: Path, qwen_folder: Path, qwen_by_transformers: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    texts = []
    for name, key in (("part-010205-a894b46e_sample.jsonl", "content"), ("firefly-train-1.1M_sample.jsonl", "input")):
        with (shared_dir / "data" / "steel_samples" / name).open(encoding="utf-8") as file:
            texts += [json.loads(line)[key] for line in itertools.islice(file, 60)]
    source = write_jsonl(tmp_path / "corpus.jsonl", texts)
    report = preprocess([str(source)], tmp_path / "c", "huggingface", qwen_folder, json_keys=("text",))
    expected = [qwen_by_transformers(text, split_special_tokens=True)["input_ids"] for text in texts if text.strip()]
    assert documents_of(report.outputs["train"]) == [[*ids, 151645] for ids in expected]
    assert report.documents + report.skipped == 120
    assert open_indexed(report.outputs["train"], vocab_size=151646).dtype.name == "int32"
