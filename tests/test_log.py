"""One rank speaks; progress is plain lines where there is no terminal."""

from __future__ import annotations

import subprocess
import sys

import pytest

from steel_megatron.errors import ConfigError, LostRankError
from steel_megatron.log import exit_code, get_logger, launched_rank, progress, setup_logging


@pytest.fixture(params=["torchrun", "slurm"])
def rank_variable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return "RANK" if request.param == "torchrun" else "SLURM_PROCID"


def test_other_ranks_only_warn(
    rank_variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = get_logger("steel_megatron.somewhere")
    for rank, expected in (("0", "news\nbad\n"), ("3", "[rank 3] bad\n")):
        monkeypatch.setenv(rank_variable, rank)
        assert launched_rank() == int(rank)
        setup_logging()
        logger.info("news")
        logger.warning("bad")
        assert capsys.readouterr().err == expected


def test_progress_without_a_terminal(
    rank_variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging()
    with progress("reading", 10, "rows") as bar:
        bar.advance(4)
        bar.advance(6, note="file b")
    line = capsys.readouterr().err
    assert line.startswith("reading: 10 of 10 rows (") and line.endswith("rows/s)  file b\n")
    with progress("training", 10, "steps", plain=False) as bar:
        bar.advance(10)
    monkeypatch.setenv(rank_variable, "1")
    with progress("reading", 10, "rows") as bar:
        bar.advance(10)
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress("reading", 10, "rows") as bar:
        bar.advance(10, note="done")
    drawn = capsys.readouterr().err
    assert "reading" in drawn and "10/10" in drawn and "done" in drawn


def test_exit_codes(rank_variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> None:
        raise error

    monkeypatch.setenv(rank_variable, "1")
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: fail(ConfigError("no such file"))) == 2
    assert exit_code(lambda: fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "[rank 1] error: no such file\nstopped\n"
    assert exit_code(lambda: fail(LostRankError("rank 3 is gone"))) == 76
    assert exit_code(lambda: fail(LostRankError("rank 3 failed", 1))) == 1
    with pytest.raises(ValueError, match="a bug"):
        exit_code(lambda: fail(ValueError("a bug")))
    with pytest.raises(BrokenPipeError, match="a worker's"):
        exit_code(lambda: fail(BrokenPipeError("a worker's")))


@pytest.mark.parametrize("lines", [1, 10_000])
def test_output_that_nobody_reads_to_its_end(lines: int) -> None:
    """As under ``| head``: no traceback, whether the command or its end notices."""
    code = (
        "import sys, time; from steel_megatron.log import exit_code; sys.stdin.read(1)\n"
        f"sys.exit(exit_code(lambda: [print('a line') for _ in range({lines})] and None))"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.close()
        assert process.communicate(b"go")[1] == b"" and process.returncode == 141
