"""The scripts in tools/: Megatron's flags, and errors without a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from steel_megatron.data.indexed.dataset import open_indexed
from steel_megatron.data.tokenizing.tokenizer import SentencePieceTokenizer
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
    assert "200 documents in = 200 written + 0 skipped" in done.stdout and "unigram entropy:" in done.stdout
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


GPT2_FLAGS = ("--tokenizer-type", "GPT2BPETokenizer", "--append-eod")


def gpt2_files(folder: Path) -> tuple[Path, Path]:
    """A small pair of the kind of GPT-2's."""
    import tokenizers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: index for index, piece in enumerate([*letters, "th", "the", "<|endoftext|>", "<|eot|>"])}
    (folder / "gpt2-vocab.json").write_text(json.dumps(vocab))
    (folder / "gpt2-merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    return folder / "gpt2-vocab.json", folder / "gpt2-merges.txt"


def test_the_command_line_of_megatron(tmp_path: Path) -> None:
    """With flags that change nothing here, the files of GPT-2 and a second --input."""
    vocab, merges = gpt2_files(tmp_path)
    first = write_jsonl(tmp_path / "a.jsonl", ["the a<|endoftext|>", "b"], key="q")
    second = write_jsonl(tmp_path / "b.jsonl", ["then c"], key="q")
    done = run(
        "preprocess_data.py", "--input", first, "--input", second, "--output-prefix", tmp_path / "c", *GPT2_FLAGS,
        "--vocab-file", vocab, "--merge-file", merges, "--json-keys", "q", "--workers", 1, "--partitions", 4,
        "--log-interval", 1000, "--keep-sequential-samples", "--dataset-impl", "mmap",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for flag in ("--partitions", "--log-interval", "--keep-sequential-samples", "--dataset-impl"):
        assert f"{flag} is not needed: " in done.stderr
    corpus = open_indexed(tmp_path / "c_q_document")
    ids = json.loads(vocab.read_text())
    end = ids["<|endoftext|>"]
    documents = [corpus.document(number).tolist() for number in range(corpus.documents)]
    assert [document[0] for document in documents] == [ids["the"], ids["b"], ids["the"]]
    assert [document.count(end) for document in documents] == [1, 1, 1] and {d[-1] for d in documents} == {end}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"])
def test_names_of_sentencepiece(name: str, tmp_path: Path, sp_model: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["the sea"])
    flags = ("--tokenizer-type", name, "--tokenizer-model", sp_model)
    done = run("preprocess_data.py", "--input", source, "--output-prefix", tmp_path / "c", *flags, "--append-eod")
    assert done.returncode == 0, done.stderr
    sp = SentencePieceTokenizer(sp_model)
    assert open_indexed(tmp_path / "c_text_document").document(0).tolist() == [*sp.encode("the sea"), sp.eod_id]


def test_the_end_of_a_document_is_named(tmp_path: Path, hf_folder: Path) -> None:
    (tmp_path / "my_tok.json").write_bytes((hf_folder / "tokenizer.json").read_bytes())
    source = write_jsonl(tmp_path / "a.jsonl", ["the sea"])
    vocab, merges = gpt2_files(tmp_path)
    hugging_face = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tmp_path / "my_tok.json")
    gpt2 = (*GPT2_FLAGS, "--vocab-file", vocab, "--merge-file", merges)
    ends = {"<s>": hugging_face, "<|eot|>": gpt2}
    for end, flags in ends.items():
        command = ("--input", source, "--output-prefix", tmp_path / "c", *flags, "--append-eod", "--overwrite")
        done = run("preprocess_data.py", *command, "--eod-token", end)
        assert done.returncode == 0, done.stderr
        eod_id = 1 if end == "<s>" else json.loads(vocab.read_text())[end]
        assert open_indexed(tmp_path / "c_text_document").document(0)[-1] == eod_id


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--split-sentences",), "--split-sentences: sentence splitting is not supported"),
        (("--find-optimal-num-workers",), "--find-optimal-num-workers: set --workers to the number"),
        (("--vocab-file", "v.json"), "--vocab-file v.json does not belong to --tokenizer-type SentencePiece"),
        (
            ("--tokenizer-type", "GPT2BPETokenizer"),
            "--vocab-file is missing; --tokenizer-type GPT2BPETokenizer needs it",
        ),
        (("--tokenizer-model", ""), "--tokenizer-model is missing"),
        (("--tokenizer-type", "BertWordPieceCase"), "invalid choice: 'BertWordPieceCase'"),
    ],
)
def test_flags_that_ask_for_something_else(flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["text"])
    usual = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "m.model")
    done = run("preprocess_data.py", "--input", tmp_path, "--output-prefix", tmp_path / "c", *usual, *flags)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_inputs_given_twice_are_all_trained_on(tmp_path: Path) -> None:
    folders = []
    for name, texts in (("a", make_texts(60)), ("b", make_texts(60, seed=1))):
        folders.append(write_jsonl(tmp_path / f"{name}.jsonl", texts))
    flags = (
        "--vocab-size",
        450,
        "--report",
        tmp_path / "r.json",
        "--control-tokens",
        "<|a|>",
        "--control-tokens",
        "<|b|>",
    )
    inputs = ("--input", folders[0], "--input", folders[1])
    done = run("train_tokenizer.py", *inputs, "--output", tmp_path / "t", *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert sum(kind["documents"] for kind in report["kinds"].values()) == 120
    trained = SentencePieceTokenizer(tmp_path / "t.model")
    assert [trained.control_id(name) for name in ("<|a|>", "<|b|>", "<|im_start|>")] == [3, 4, None]
