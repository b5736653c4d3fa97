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

import steel_megatron
from steel_megatron.cli import COMMANDS, _parse, main
from steel_megatron.cli.help import TASKS
from steel_megatron.cli.options import add_flags, options_of, settings_of
from steel_megatron.config import CleanConfig, PreprocessConfig, RunConfig, from_dict

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


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Runs a command that prints something and has nothing to do."""
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.parametrize("columns", ["80", "60"])
@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = shown(capsys, *name.split(), "--help")
    assert (
        text.startswith(f"usage: steel-megatron {name} [--config FILE]") and shown(capsys, *name.split(), "-h") == text
    )
    of_words = [line for line in text.splitlines()[1:] if not line.startswith("--")]
    assert max(map(len, of_words)) <= int(columns)
    for word in ("Union", "None", "Literal", "typing", "<class"):
        assert word not in text
    everything = shown(capsys, *name.split(), "--help=all")
    for option in settings_of(COMMANDS[name].config or COMMANDS[name].function).values():
        assert " ".join(option.help.split()) in " ".join(everything.split()), option.name


def test_the_short_help_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    short, everything, section = (
        shown(capsys, "pretrain", word) for word in ("--help", "--help=all", "--help=parallel")
    )
    assert 15 <= short.count("\n--") <= 25 and everything.count("\n--") > 60
    assert "\n--model.hidden_size N\n    Width of the residual stream. (whole number; default 256)\n" in short
    assert "--model.norm_epsilon" not in short and "--model.norm_epsilon" in everything
    assert "routing_mix" not in everything, "an old name is shown"
    assert {line.partition(".")[0] for line in section.splitlines() if line.startswith("--")} == {"--parallel"}
    assert "there is no --help=paralel; did you mean parallel?" in refused(capsys, "pretrain", "--help=paralel")


def test_an_overview_by_task(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capsys)
    assert text == shown(capsys, "--help") == shown(capsys, "-h")
    places = [text.index(f"\n{task}:\n") for task in TASKS.values()]
    assert places == sorted(places) and max(map(len, text.splitlines())) <= 80
    for name in COMMANDS:
        assert f"\n  {name.split()[0]} " in text, name
    group = shown(capsys, "data")
    assert group == shown(capsys, "data", "--help")
    for name in COMMANDS:
        assert not name.startswith("data ") or f"\n  {name.split()[1]} " in group, name
    assert {command.task for command in COMMANDS.values()} == set(TASKS.values()), "a command without a task"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--version")
    assert text.startswith(f"steel-megatron {steel_megatron.__version__} (torch ") and "megatron-core 0.16" in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = shown(capsys, "--completion", shell)
    assert script == shown(capsys, f"--completion={shell}")
    for word in ("preprocess", "export-hf", "--parallel.sequence_parallel", "bfloat16", "append", "--on_duplicate"):
        assert word in script, word
    assert "--completion is 'xonsh'; it must be one of bash" in refused(capsys, "--completion", "xonsh")


def test_completion_in_bash(capsys: pytest.CaptureFixture[str]) -> None:
    Path("script").write_text(shown(capsys, "--completion", "bash"))
    code = (
        "source ./script; COMP_WORDS=(steel-megatron pretrain --training.prec); COMP_CWORD=2; "
        "$(complete -p steel-megatron | sed 's/.*-F *\\([^ ]*\\).*/\\1/'); echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["--training.precision"]


def test_completion_without_its_package(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install 'steel-megatron[completion]'" in refused(capsys, "--completion", "bash")


@pytest.mark.parametrize("words", [[], ["--version"], ["pretrain", "--help"], ["preprocess", "--nothing"]])
def test_what_needs_no_torch_does_not_wait_for_it(words: list[str]) -> None:
    code = f"import sys; from steel_megatron.cli import main; main({words!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False, cwd=ROOT).returncode == 0


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["preproces"], "there is no command preproces; did you mean preprocess?"),
        (["data", "apend"], "there is no command data apend; did you mean data append?"),
        (["--workers", "3"], "--workers stands before a command"),
        (
            ["generate", "--prompts", "a"],
            "not given: --model (checkpoint folder (step_...), run folder (its newest checkpoint), or Hugging Face",
        ),
        (["preprocess", "--inputs", "a"], "not given: --output_prefix ("),
        (["clean"], "not given: RECIPE (YAML file of the recipe, such as examples/steel_1b/clean_text.yaml)"),
        (["verify", "--prefixes"], "--prefixes has no value; it must be one or several"),
        (["clean", "a.yaml", "b.yaml"], "'b.yaml' belongs to no option"),
        (["clean", "a.yaml", "--workers"], "--workers has no value; it must be of type int"),
        (["clean", "a.yaml", "--workers", "--tasks", "3"], "--workers has no value"),
        (["clean", "a.yaml", "--worker", "3"], "there is no option --worker; did you mean --workers?"),
        (["pretrain", "--hidden_size", "3"], "did you mean --model.hidden_size or --model.ffn_hidden_size?"),
        (["pretrain", "--model", "3"], "the settings file 3 cannot be read: No such file or directory"),
        (["pretrain", "--model", "{hiden_size: 3}"], "--model, line 1: there is no option model.hiden_size"),
        (["pretrain", "--training.seed+", "3"], "--training.seed+ adds to a list, but training.seed is of type int"),
        (["audit", "m", "--positions", "1", "x"], "--positions has 'x'; it must be a list of int"),
        (["data", "relocate", "l.json", "a"], "not given: NEW (the same as it is now)"),
    ],
)
def test_words_that_are_wrong_or_missing(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *words)


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


LIST = "a list of str"
SETS = "a list of str or a dictionary with keys of type str, each a list of str"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "FILE is empty; it must hold options, one a line, such as 'model.num_layers: VALUE'"),
        ("# all of it\n", "FILE is empty"),
        ("- a\n- b", "FILE holds no options; it must have lines such as"),
        ("data: {validation: 5}", f"FILE, line 1: data.validation is 5; it must be {SETS}"),
        ("\ndata:\n  train: {a: b}", f"FILE, line 3: data.train is {{'a': 'b'}}; it must be {LIST}"),
        (
            "model:\n  num_query_groups: x",
            "FILE, line 2: model.num_query_groups is 'x'; it must be of type int or null",
        ),
        (
            "model:\n  hidden_size: 8\n  hiden_size: 8",
            "FILE, line 3: there is no option model.hiden_size; did you mean",
        ),
        ("modle: {hidden_size: 8}", "FILE, line 1: there is no option modle"),
        ("model: 3", "FILE, line 1: model is 3; it is a section with options of its own"),
        ("model: {ffn: dense}\ndata: {}\nmodel: {}", "FILE, line 3: model is given twice, first in line 1"),
        ("data:\n  train: [a]\n  train: [b]", "FILE, line 3: data.train is given twice, first in line 2"),
        (
            "data: {tokenizer_path: 2024}",
            "data.tokenizer_path is 2024; it must be of type str or null; put it into quotes",
        ),
        ("model: [unclosed", "FILE is not valid YAML: "),
        ("config: a.yaml", "FILE, line 1: there is no option config"),
    ],
)
def test_mistakes_in_a_file_are_named_with_their_line(
    content: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("config") / "run.yaml"
    file.write_text(content)
    for given in (["--config", str(file)], [f"--config={file}", "--model.num_layers", "2"]):
        line = refused(capsys, "pretrain", *given)
        assert message.replace("FILE", str(file)) in line
        assert line.endswith(" (steel-megatron pretrain --help lists the options)")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.hidden_size", "x"], "--model.hidden_size is x; it must be of type int"),
        (["--training.precision", "half"], "precision is half; it must be one of float32, bfloat16, float16"),
        (["--optimizer.lr="], "--optimizer.lr has no value; it must be of type float"),
        (["--data.validation", "{zh: {a: b}}"], f"it must be {SETS}"),
    ],
)
def test_wrong_values_of_a_word(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "pretrain", *words).endswith(f"{message} (steel-megatron pretrain --help lists the options)")


def test_what_a_file_may_look_like() -> None:
    file = """model: {hidden_size: 8}
training:
checkpoint.directory: here
optimizer: {lr: 1e-3, min_lr: '1e-4'}
data: {train: a, validation: {zh: z}}
"""
    Path("FILE").write_text("\ufeff" + file)
    options = _parse(["pretrain", "--config", "FILE"])[1]
    assert options["checkpoint"]["directory"] == "here" and options["model"]["hidden_size"] == 8
    assert (options["optimizer"]["lr"], options["optimizer"]["min_lr"]) == (1e-3, 1e-4)
    assert options["data"]["train"] == ["a"] and options["data"]["validation"] == {"zh": ["z"]}
    Path("FILE").write_text("inputs: a\njson_keys: q\nworkers: '3'\n")
    options = _parse([*PREPROCESS, "--config", "FILE"])[1]
    assert (options["inputs"], options["json_keys"], options["workers"]) == (["a"], ["q"], 3)


def test_lists_of_a_run_on_the_command_line() -> None:
    Path("FILE").write_text("data: {train: [a], validation: {zh: [z], code: [c]}}\n")

    def data(*words: str) -> dict[str, Any]:
        options: dict[str, Any] = _parse(["pretrain", "--config", "FILE", *words])[1]["data"]
        return options

    for words in (["x", "y"], ["[x, y]"], ["[x]", "y"]):
        assert data("--data.train", *words)["train"] == ["x", "y"]
        assert data("--data.train+", *words)["train"] == ["a", "x", "y"]
        assert data("--data.validation.zh", *words)["validation"] == {"zh": ["x", "y"], "code": ["c"]}
        assert data("--data.validation", *words)["validation"] == ["x", "y"]
    assert data("--data.train=x", "--data.train", "[y]")["train"] == ["x", "y"]
    assert data("--data.train+", "x", "--data.train+", "y")["train"] == ["a", "x", "y"]
    assert data("--data.train", "[ab]*.bin", "5", "null", "a: b")["train"] == ["[ab]*.bin", "5", "null", "a: b"]
    assert data("--data.validation.new", "y")["validation"] == {"zh": ["z"], "code": ["c"], "new": ["y"]}
    assert data("--data.validation", "{new: [y]}")["validation"] == {"new": ["y"]}
    assert data("--data.train", "x", "--config", "FILE", "--data.train", "y")["train"] == ["y"]


def test_lists_of_every_command_are_written_alike() -> None:
    for words in (["a", "b"], ["[a, b]"], ["--prefixes", "a", "b"], ["--prefixes=a", "--prefixes", "b"]):
        assert _parse(["verify", *words])[1]["prefixes"] == ["a", "b"]
    assert _parse(["audit", "m", "--positions", "-1", "2"])[1]["positions"] == [-1, 2]
    assert _parse(["audit", "m", "--positions", "[1, 2]"])[1]["positions"] == [1, 2]
    prompts = _parse(["generate", "--model", "m", "--prompts", "[INST]", "- a", "{b}"])[1]["prompts"]
    assert prompts == ["[INST]", "- a", "{b}"], "a prompt is no list"


def test_sections_from_words() -> None:
    Path("FILE").write_text("num_layers: 3\nhidden_size: 8\n")
    for section in ("{num_layers: 3, hidden_size: 8}", "FILE"):
        words = ["--model.hidden_size", "4", "--model", section, "--model.num_layers", "2"]
        model = _parse(["pretrain", *words])[1]["model"]
        assert (model["num_layers"], model["hidden_size"]) == (2, 8)


def test_switches_and_hyphens() -> None:
    for words in (["--overwrite"], ["--overwrite", "true"], ["--overwrite=yes"]):
        assert _parse(["merge", "--output", "o", *words, "--prefixes", "a"])[1]["overwrite"] is True
    assert _parse(["merge", "a", "--overwrite", "false", "--output", "o"])[1]["overwrite"] is False
    assert _parse([*PREPROCESS, "--inputs", "a", "--valid-fraction", "0.5"])[1]["valid_fraction"] == 0.5


def test_an_option_that_is_given_twice_is_told(caplog: pytest.LogCaptureFixture) -> None:
    Path("FILE").write_text("inputs: [x]\nworkers: 2\n")
    options = _parse([*PREPROCESS, "--config", "FILE", "--workers", "3", "--workers", "4", "--seed", "1", "--seed=1"])[
        1
    ]
    assert options["workers"] == 4
    assert [record.getMessage() for record in caplog.records] == ["--workers is given twice: 4 is taken, not 3"]


def test_the_home_folder_in_paths(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    home = str(Path.cwd())
    Path("run.yaml").write_text("model: {routing_mode: token}\ndata: {train: ~/a, validation: {zh: ['~/z']}}\n")
    run = from_dict(RunConfig, _parse(["pretrain", "--config", "~/run.yaml", "--checkpoint.directory", "~/run"])[1], "")
    assert run.data.train == [f"{home}/a"] and run.data.validation == {"zh": [f"{home}/z"]}
    assert run.checkpoint.directory == f"{home}/run" and run.data.tokenizer_path is None
    options = _parse([*PREPROCESS, "--inputs", "skypile=~/a", "~/b", "a~/c=d", "--json_keys", "~", "--report", "~/r"])[
        1
    ]
    config = from_dict(PreprocessConfig, options, "")
    assert config.inputs == [f"skypile={home}/a", f"{home}/b", "a~/c=d"] and config.json_keys == ["~"]
    assert config.report == f"{home}/r"
    Path("run.yaml").unlink()
    for words in (["verify", "~/none"], ["export-hf", "--checkpoint", "~/none", "--output", "o"], ["audit", "~/none"]):
        assert f"{home}/none" in refused(capsys, *words)


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
@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ([], "the tokenizer runs/quickstart/tokenizer.model does not exist"),
        (["--data.tokenizer_path", "null"], "runs/quickstart/data/corpus_train_text_document"),
    ],
)
def test_missing_data_is_named(options: list[str], missing: str) -> None:
    done = run_pretrain("--parallel.tensor_model_parallel_size", "1", *options)
    assert done.returncode == 2
    assert missing in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(Path.cwd().iterdir())
