"""Closed, full and unread output, and terminals that lack characters: never a traceback, and no work that is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from steel_megatron.cli import main
from steel_megatron.data.indexed.dataset import open_indexed
from tests.fixtures.make_tokenizer import make_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["月球是地球的卫星。", "A text with \U0001f600.", "第三篇"]
RECIPE = "kind: text\noperators:\n  - text_length_filter: {min_len: 5}\n"


def start(words: list[str], shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run Python with words, and redirections as a shell writes them; ``GONE`` is a pipe whose reader has left."""
    read, write = os.pipe()
    os.close(read)
    command = ["bash", "-c", f'"$@" {shell.replace("GONE", f"&{write}")}', "bash", sys.executable, *words]
    try:
        return subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "", **environment},
            capture_output=True,
            pass_fds=[write],
            timeout=120,
            check=False,
        )
    finally:
        os.close(write)


def snippet(body: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command of a few lines; ``work`` is what it has to do."""
    code = (
        "import sys\nfrom steel_megatron.log import exit_code, get_logger\nfrom steel_megatron.streams import say\n"
        f"def command():\n    {body}\nsys.exit(exit_code(command))"
    )
    return start(["-c", code], shell, **environment)


LOST = b"error: stdout cannot be written: "
SAID = b"stdout cannot be written: No space left on device; the work is done, only its summary is lost\n"


@pytest.mark.parametrize("body", ["print('x')", "print('x' * 100_000)"])
@pytest.mark.parametrize(
    ("shell", "code", "err"),
    [
        (">/dev/full", 2, LOST + b"No space left on device\n"),
        (">GONE", 141, b""),
        (">&-", 2, LOST + b"it is closed\n"),
        (">&- <&-", 2, LOST + b"it is closed\n"),
        (">/dev/full 2>&-", 2, b""),
        (">/dev/full 2>/dev/full", 2, b""),
        (">&- 2>&-", 2, b""),
    ],
)
def test_results_that_cannot_be_printed(body: str, shell: str, code: int, err: bytes) -> None:
    for unbuffered in ("", "1"):
        done = snippet(body, shell, PYTHONUNBUFFERED=unbuffered)
        assert (done.returncode, done.stderr, done.stdout) == (code, err, b""), unbuffered


@pytest.mark.parametrize(
    ("shell", "err"),
    [
        (">/dev/full", SAID),
        (">GONE", b""),
        (">&-", b"stdout cannot be written: it is closed; the work is done, only its summary is lost\n"),
        (">/dev/full 2>GONE", b""),
        (">&- 2>&-", b""),
    ],
)
def test_summaries_that_cannot_be_printed(shell: str, err: bytes) -> None:
    done = snippet("say('one'); open('/dev/null').close()", shell)
    assert (done.returncode, done.stderr, done.stdout) == (0, err, b"")


@pytest.mark.parametrize("shell", ["2>/dev/full", "2>GONE", "2>&-", "2>&- <&-"])
@pytest.mark.parametrize(
    "body",
    [
        "get_logger('steel_megatron.x').warning('one'); print('done')",
        "print('one', file=sys.stderr); import warnings; warnings.warn('two'); print('done')",
        "from rich.console import Console; Console(stderr=True).print('one'); print('done')",
    ],
)
def test_nothing_depends_on_stderr(shell: str, body: str) -> None:
    done = snippet(body, shell)
    assert (done.returncode, done.stdout) == (0, b"done\n")


def test_no_file_of_the_work_is_taken_for_a_closed_stream(tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    done = snippet(
        f"import os; file = open({str(path)!r}, 'w'); os.write(2, b'of C code'); file.write('whole')", "2>&-"
    )
    assert done.returncode == 0 and path.read_text() == "whole"


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_characters_that_a_terminal_lacks_are_escaped(environment: dict[str, str]) -> None:
    text = "月 \U0001f600 \udcff"
    done = snippet(f"print({text!a}); print({text!a}, file=sys.stderr)", PYTHONCOERCECLOCALE="0", **environment)
    assert done.returncode == 0
    assert done.stdout == done.stderr == rb"\u6708 \ud83d\ude00 \udcff" + b"\n"
    assert json.loads(b'"' + done.stdout.strip() + b'"') == text


def test_a_lone_surrogate_is_escaped_in_utf_8_as_well() -> None:
    done = snippet("print('月\\udcff')", PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stdout) == (0, "月\\udcff\n".encode())


def test_streams_are_as_they_were_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr, sys.stdout.errors
    assert main(["import-hf", "--folder", "nowhere", "--output", "out"]) == 2
    assert (sys.stdout, sys.stderr, sys.stdout.errors) == before
    assert capsys.readouterr().err.startswith("error: ")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents, a tokenizer, a recipe, an indexed corpus and a ledger."""
    folder = tmp_path_factory.mktemp("made")
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS * 20)
    (folder / "a.jsonl").write_text(rows, encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE)
    make_tokenizer(folder / "tokenizer")
    for words in (preprocess(folder, folder / "made"), ["data", "create", *ledger(folder, "ledger.json")]):
        assert main(words) == 0
    return folder


def preprocess(made: Path, prefix: Path) -> list[str]:
    inputs = ["--inputs", str(made / "a.jsonl"), "--tokenizer_path", str(made / "tokenizer")]
    return ["preprocess", *inputs, "--output_prefix", str(prefix)]


def ledger(made: Path, name: str) -> list[str]:
    return [str(made / name), str(made / "made_text_document"), "--sequence_length", "8"]


def clean(made: Path, output: Path) -> list[str]:
    return ["clean", str(made / "recipe.yaml"), "--sources", str(made / "a.jsonl"), "--output", str(output)]


Words = Callable[[Path, Path], list[str]]
WORK: dict[str, Words] = {
    "preprocess": lambda made, out: preprocess(made, out / "c"),
    "clean": lambda made, out: clean(made, out / "cleaned"),
    "merge": lambda made, out: ["merge", str(made / "made_text_document"), "--output", str(out / "c_text_document")],
    "data create": lambda made, out: ["data", "create", str(out / "l.json"), *ledger(made, "")[1:]],
    "verify": lambda made, out: ["verify", str(made / "made_text_document")],
}
RESULTS: dict[str, Words] = {
    "inspect": lambda made, out: ["inspect", str(made / "made_text_document")],
    "data show": lambda made, out: ["data", "show", str(made / "ledger.json")],
    "data show --step": lambda made, out: ["data", "show", str(made / "ledger.json"), "--sample", "1"],
    "--help": lambda made, out: ["pretrain", "--help"],
}


@pytest.mark.slow
@pytest.mark.parametrize("shell", [">/dev/full 2>GONE", ">GONE 2>/dev/full", ">&- 2>&- <&-"])
@pytest.mark.parametrize("name", WORK)
def test_work_is_done_whatever_the_streams(name: str, shell: str, made: Path, tmp_path: Path) -> None:
    done = start(["-m", "steel_megatron", *WORK[name](made, tmp_path)], shell)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    if name in ("preprocess", "merge"):
        corpus, expected = open_indexed(tmp_path / "c_text_document"), open_indexed(made / "made_text_document")
        assert corpus.documents == 60 and corpus.tokens == expected.tokens
    elif name != "verify":
        assert list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", RESULTS)
def test_results_are_printed_or_their_loss_is_told(name: str, made: Path, tmp_path: Path) -> None:
    words = ["-m", "steel_megatron", *RESULTS[name](made, tmp_path)]
    gone, full, quiet = (start(words, shell) for shell in (">GONE", ">/dev/full", "2>&-"))
    assert (gone.returncode, gone.stderr) == (141, b"")
    assert (full.returncode, full.stderr) == (2, LOST + b"No space left on device\n")
    assert quiet.returncode == 0 and quiet.stdout == start(words).stdout != b""


@pytest.mark.slow
def test_scripts_behave_alike(made: Path, tmp_path: Path) -> None:
    flags = ["--input", str(made / "a.jsonl"), "--tokenizer-type", "HuggingFaceTokenizer"]
    words = [str(ROOT / "tools/preprocess_data.py"), *flags, "--tokenizer-model", str(made / "tokenizer")]
    done = start([*words, "--output-prefix", str(tmp_path / "c")], ">/dev/full")
    assert done.returncode == 0 and SAID in done.stderr and open_indexed(tmp_path / "c_text_document").documents == 60
    done = start([*words, "--help"], ">GONE")
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.slow
def test_json_stays_json_in_ascii(made: Path) -> None:
    words = ["data", "show", str(made / "ledger.json"), "--sample", "1", "--json_output", "true"]
    words += ["--tokenizer_path", str(made / "tokenizer")]
    here, there = (start(["-m", "steel_megatron", *words], PYTHONIOENCODING=code) for code in ("utf-8", "ascii"))
    assert here.returncode == there.returncode == 0
    assert here.stdout != there.stdout and there.stdout.isascii()
    assert [json.loads(line) for line in here.stdout.splitlines()] == list(map(json.loads, there.stdout.splitlines()))
