"""The command line: help that a person can read, and one line and exit code 2 for what is wrong."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from steel_megatron.cli import COMMANDS, _parse, main
from steel_megatron.cli.options import add_flags, options_of
from steel_megatron.config import CleanConfig, PreprocessConfig

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "examples/quickstart/pretrain.yaml"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Runs a command that must fail; returns its one line on stderr."""
    assert main(words) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == "" and len(lines) == 1, captured
    assert lines[0].startswith("error: ")
    assert list(Path.cwd().iterdir()) == [], "something was written"
    return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([*name.split(), "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: steel-megatron {name} [--config FILE]")
    if name == "pretrain":
        assert "Key and value heads (grouped-query attention)" in text


def test_overrides_win_over_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain", "--config", str(RECIPE), "--model.hidden_size", "384", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    assert printed["model"]["hidden_size"] == 384
    assert printed["optimizer"]["lr"] == recipe["optimizer"]["lr"]
    assert printed["optimizer"]["clip_grad"] == 1.0  # the default, spelled out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.hiden_size", "3"], "--model.hiden_size"),
        (["--model.hidden_size", "many"], "many"),
        (["--model.num_attention_heads", "5"], "hidden_size = 192 is not divisible by num_attention_heads = 5"),
        (["--parallel.pipeline_model_parallel_size", "3"], "num_layers = 4 is not divisible by"),
        (["--parallel.expert_model_parallel_size", "4"], "num_experts = 6 is not divisible by"),
        (["--training.precision", "float8"], "float8"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_wrong_settings(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, "pretrain", "--config", str(RECIPE), *words)


def test_wrong_keys_in_a_file(capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    broken = tmp_path_factory.mktemp("config") / "broken.yaml"
    broken.write_text("model: {hidden: 3}\n")
    assert "hidden" in refused(capsys, "pretrain", "--config", str(broken))
    broken.write_text("model: [unclosed\n")
    assert "broken.yaml" in refused(capsys, "pretrain", "--config", str(broken))


def test_a_mode_must_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert "routing_mode is not set" in refused(capsys, "pretrain")


def test_commands_and_required_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert "preprocess" in refused(capsys, "preproces")
    assert "prompts" in refused(capsys, "generate", "--model", "nowhere")
    assert refused(capsys)


def test_folders_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in refused(capsys, "import-hf", "--folder", "nowhere", "--output", "out")
    assert "nowhere" in refused(capsys, "export-hf", "--checkpoint", "nowhere", "--output", "out")
    assert "nowhere" in refused(capsys, "generate", "--model", "nowhere", "--prompts", "a")
    preprocess = ("preprocess", "--inputs", "nowhere", "--output_prefix", "out", "--tokenizer_path", "none")
    assert "nowhere" in refused(capsys, *preprocess)


PREPROCESS = ("preprocess", "--output_prefix", "out", "--tokenizer_path", "none")


@pytest.mark.parametrize(
    ("words", "inputs"),
    [
        (["--inputs", "a", "--inputs", "b", "c"], ["a", "b", "c"]),
        (["--inputs=a", "--workers", "2", "--inputs=b"], ["a", "b"]),
        (["--config", "FILE"], ["x", "y"]),
        (["--config", "FILE", "--inputs", "b", "--inputs", "c"], ["b", "c"]),
        (["--inputs", "b", "--config", "FILE"], ["x", "y"]),
    ],
)
def test_an_option_with_a_list_may_be_given_again(words: list[str], inputs: list[str]) -> None:
    Path("FILE").write_text("inputs: [x, y]\n")
    name, options = _parse([*PREPROCESS, *words])
    assert name == "preprocess" and options["inputs"] == inputs and options["json_keys"] == ["text"]
    _, options = _parse([*PREPROCESS, *words, "--json_keys", "q", "--json_keys", "a"])
    assert options["json_keys"] == ["q", "a"], "the default is no part of what is given"


def test_a_list_in_a_file_must_be_one(
    capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("config") / "job.yaml"
    file.write_text("inputs: a.jsonl\n")
    said = refused(capsys, *PREPROCESS, "--config", str(file))
    assert "'a.jsonl' is not a list; write [a.jsonl]" in said and "job.yaml" in said


LIST = "a list of str"
SETS = "a list of str or a dictionary with keys of type str, each a list of str"
BRACKETS = "; on the command line a list is written '[A, B]'"


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ("", ["--data.train", "a"], f"--data.train is a; it must be {LIST}{BRACKETS}"),
        ("", ["--data.validation", "5"], f"--data.validation is 5; it must be {SETS}{BRACKETS}"),
        ("", ["--data.validation.zh", "z"], f"--data.validation.zh is 'z'; it must be {LIST}{BRACKETS}"),
        ("data: {validation: 5}", [], f"data.validation in FILE is 5; it must be {SETS}"),
        ("data: {validation: [v]}", ["--data.validation", "5"], f"--data.validation is 5; it must be {SETS}{BRACKETS}"),
        ("model: {num_query_groups: x}", [], "model.num_query_groups in FILE is x; it must be of type int or null"),
        ("model: {hidden_size: 8}", ["--model.hidden_size", "x"], "--model.hidden_size is x; it must be of type int"),
        ("model: {hiden_size: 8}", [], "does not accept option 'model.hiden_size'; settings from FILE"),
        ("model: {hidden_size: 8}", ["--model.hiden_size", "8"], "unrecognized arguments: --model.hiden_size 8"),
        ("", ["--training.precision", "half"], "--training.precision is half; it must be one of float32, bfloat16"),
    ],
)
def test_wrong_values_are_named_with_their_origin(
    content: str,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    file = tmp_path_factory.mktemp("config") / "run.yaml"
    file.write_text(content or "{}")
    for given in (["--config", str(file), *words], [f"--config={file}", *words]):
        line = refused(capsys, "pretrain", *given)
        assert line.endswith(f"{message.replace('FILE', str(file))} (steel-megatron pretrain --help lists the options)")


def test_lists_of_a_run_on_the_command_line() -> None:
    Path("FILE").write_text("data: {train: [a], validation: {zh: [z], code: [c]}}\n")

    def data(*words: str) -> dict[str, Any]:
        options: dict[str, Any] = _parse(["pretrain", "--config", "FILE", *words])[1]["data"]
        return options

    assert data("--data.train", "[x]", "--data.train", "[y]")["train"] == ["y"]
    assert data("--data.train+", "x", "--data.train+", "y")["train"] == ["a", "x", "y"]
    assert data("--data.validation.zh", "[y]")["validation"] == {"zh": ["y"], "code": ["c"]}
    assert data("--data.validation.new", "[y]")["validation"] == {"zh": ["z"], "code": ["c"], "new": ["y"]}
    assert data("--data.validation", "{new: [y]}")["validation"] == {"new": ["y"]}


def test_settings_out_of_range(capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("config") / "job.yaml"
    file.write_text("inputs: [a.jsonl]\nworkers: 0\n")
    assert "PreprocessConfig.workers is 0; it must be at least 1" in refused(capsys, *PREPROCESS, "--config", str(file))
    assert "CleanConfig.tasks is 0; it must be at least 1" in refused(capsys, "clean", "recipe.yaml", "--tasks", "0")


@pytest.mark.parametrize("config", [CleanConfig, PreprocessConfig])
def test_every_setting_has_its_help(config: type) -> None:
    for option in options_of(config):
        assert option.help.endswith("."), option.name


def test_flags_of_a_script_are_the_fields_of_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, PreprocessConfig, leave_out=["output_prefix"])
    words = ["--inputs", "a", "--tokenizer-path", "t", "--json-keys", "q", "--inputs", "b", "c", "--shard-size", "3"]
    given = vars(parser.parse_args([*words, "--valid-fraction", "0.5", "--no-append-eod", "--engine", "tokenizers"]))
    assert given.pop("inputs") == ["a", "b", "c"] and given.pop("json_keys") == ["q"]
    assert given == {  # and no defaults, which are the config's
        "tokenizer_path": "t", "shard_size": 3, "valid_fraction": 0.5, "append_eod": False, "engine": "tokenizers",
    }  # fmt: skip
    for wrong in (words[2:6], [*words, "--engine", "fast"], [*words, "--output-prefix", "out"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)
    capsys.readouterr()


def run_pretrain(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "steel_megatron", "pretrain", "--config", str(RECIPE), *words]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.slow
def test_a_launch_that_does_not_fit_is_refused_before_anything_starts() -> None:
    done = run_pretrain()  # the recipe wants two processes
    assert done.returncode == 2
    assert done.stderr.startswith("error: a launch of 1 processes does not fit tensor x pipeline parallel = 2 x 1")
    assert not list(Path.cwd().iterdir())


@pytest.mark.slow
def test_missing_data_is_named() -> None:
    done = run_pretrain("--parallel.tensor_model_parallel_size", "1")
    assert done.returncode == 2
    assert "runs/quickstart/data/corpus_train_text_document" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(Path.cwd().iterdir())


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from steel_megatron.cli import build_parser; build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False, cwd=ROOT).returncode == 0
