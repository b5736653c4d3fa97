"""The scripts in tools/: Megatron's flags, and errors without a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from steel_megatron.data.indexed import open_indexed
from steel_megatron.data.tokenizer import SentencePieceTokenizer
from tests.data.conftest import make_texts, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_way_from_text_to_a_checked_corpus(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", make_texts(200), key="content")
    (tmp_path / "code.py").write_text("def f(x):\n    return x\n" * 20)
    model = tmp_path / "tokenizer.model"
    done = run(
        "train_tokenizer.py", "--input", source, tmp_path / "code.py", "--output", tmp_path / "tokenizer",
        "--vocab-size", 600, "--json-key", "content", "--report", tmp_path / "report.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = {line.split()[0]: line.split() for line in done.stdout.splitlines()[3:]}
    assert set(table) == {"zh", "en", "code"} and table["code"][1] == "1"
    tokenizer = SentencePieceTokenizer(model)
    code = (tmp_path / "code.py").read_text()
    assert float(table["code"][4]) == round(len(code.encode()) / len(tokenizer.encode(code)), 3)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fingerprint"] == tokenizer.fingerprint and report["kinds"]["code"]["bytes"] == len(code.encode())

    flags = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model)
    done = run(
        "preprocess_data.py", "--input", source, "--output-prefix", tmp_path / "c", *flags, "--json-keys", "content",
        "--workers", 2, "--append-eod", "--valid-fraction", 0.2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "documents: 200 written + 0 skipped" in done.stdout and "unigram entropy:" in done.stdout
    corpus = open_indexed(tmp_path / "c_train_content_document")
    assert corpus.document(0)[-1] == tokenizer.eod_id

    done = run("inspect_dataset.py", tmp_path / "c_train_content_document", "--verify", *flags)
    assert done.returncode == 0, done.stderr
    assert f"{corpus.documents:,} documents, {corpus.tokens:,} tokens of uint16" in done.stdout
    assert "checksums match" in done.stdout
    assert repr(tokenizer.decode(corpus.document(0).tolist())[:20])[1:-1] in done.stdout


def test_errors_are_one_line(tmp_path: Path, sp_model: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", ["text"], key="content")
    flags = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", sp_model)
    failures = [
        ("preprocess_data.py", "--input", tmp_path, "--output-prefix", tmp_path / "c", *flags),
        ("train_tokenizer.py", "--input", tmp_path / "none", "--output", tmp_path / "t", "--vocab-size", 500),
        ("inspect_dataset.py", tmp_path / "none"),
    ]
    for tool, *arguments in failures:
        done = run(str(tool), *arguments)
        assert done.returncode == 2
        assert "error: " in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]
