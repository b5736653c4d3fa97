"""The same tokens from a checkpoint, from its exported folder, and from transformers."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steel_megatron import load_model
from steel_megatron.audit import audit
from steel_megatron.cli import main
from steel_megatron.config import DataConfig, ParallelConfig
from steel_megatron.data.tokenizing.sentencepiece_training import train_sentencepiece
from steel_megatron.data.tokenizing.tokenizer import SentencePieceTokenizer
from steel_megatron.errors import CheckpointError, ConfigError
from steel_megatron.generate import Generation, Sampling, _continue, _Reply, chat, generate, with_cache
from steel_megatron.hf.configuration_steel import SteelConfig
from steel_megatron.hf.convert import export_hf, read_config
from steel_megatron.hf.mapping import config_from_hf
from steel_megatron.hf.modeling_steel import SteelForCausalLM
from steel_megatron.train.loop import pretrain
from tests.data.configured import preprocess
from tests.distributed import run_distributed
from tests.evaluation.benchmarks import write_model
from tests.train.small_run import small_run

pytestmark = pytest.mark.slow

TEXTS = ["月球是地球的卫星，潮汐是月球的引力引起的。", "def f(x):\n    return x + 1\n", "The moon has tides."]
PROMPTS = ["月球", "def f", "T"]


@pytest.fixture(scope="module", params=["block_causal", "merged", "sequence"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of four steps in a routing mode, and its exported model."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text").mkdir()
    for number, text in enumerate(TEXTS * 10):
        (folder / "text" / f"{number}.txt").write_text(text * 3, encoding="utf-8")
    tokenizer = train_sentencepiece(TEXTS * 10, folder / "tokenizer", vocab_size=330)
    preprocess([str(folder / "text")], folder / "corpus", "sentencepiece", tokenizer)
    run = small_run(ParallelConfig(), str(folder / "run"), steps=4, routing_mode=request.param, vocab_size=330)
    data = DataConfig(
        train=[str(folder / "corpus_text_document")], tokenizer_kind="sentencepiece", tokenizer_path=str(tokenizer)
    )
    run_distributed(pretrain, 1, dataclasses.replace(run, data=data))
    run_distributed(export_hf, 1, newest(folder), folder / "hf", ("sentencepiece", str(tokenizer)))
    return folder


def newest(folder: Path) -> Path:
    return folder / "run/checkpoints/step_00000004"


def by_library(path: Path, sampling: Sampling) -> list[Generation]:
    return run_distributed(generate, 1, path, PROMPTS, sampling)[0]


def test_all_ways_give_the_same_tokens(trained: Path) -> None:
    sampling = Sampling(max_new_tokens=9)
    from_checkpoint = by_library(newest(trained), sampling)
    # Token by token: the two tokenizers write bytes that are no UTF-8 differently.
    from_folder = by_library(trained / "hf", sampling)
    assert [one.new_tokens for one in from_folder] == [one.new_tokens for one in from_checkpoint]
    model = AutoModelForCausalLM.from_pretrained(trained / "hf", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(trained / "hf", trust_remote_code=True)
    own = SentencePieceTokenizer(trained / "tokenizer.model")
    for prompt, ours in zip(PROMPTS, from_checkpoint, strict=True):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        assert ids[0].tolist() == own.encode(prompt)
        theirs = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.size(1) :].tolist()
        assert ours.new_tokens == [token for token in theirs if token != own.eod_id]
        assert ours.text == own.decode(own.encode(prompt) + ours.new_tokens)
        assert ours.text.startswith(prompt) and ours.prompt == prompt


def logits_of(paths: list[Path], tokens: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        found = [load_model(path)(tokens).logits for path in paths]
    assert not torch.distributed.is_initialized()  # a script may begin its own
    return found


def test_a_model_loaded_from_a_checkpoint_is_the_exported_one(trained: Path) -> None:
    tokens = torch.randint(330, (2, 20), generator=torch.Generator().manual_seed(0))
    from_checkpoint, from_folder = run_distributed(logits_of, 1, [newest(trained), trained / "hf"], tokens)[0]
    model = AutoModelForCausalLM.from_pretrained(trained / "hf", trust_remote_code=True)
    with torch.no_grad():
        expected = model(tokens).logits
    assert torch.equal(from_checkpoint, from_folder)
    torch.testing.assert_close(from_folder, expected)


def by_its_own_model(path: Path, sampling: Sampling) -> list[Generation]:
    from steel_megatron import generate as module

    module.why_not_exportable = lambda model: "it is not to be"
    return generate(path, PROMPTS, sampling)


def test_the_library_s_own_model_gives_the_same_tokens(trained: Path) -> None:
    sampling = Sampling(max_new_tokens=9)
    own = run_distributed(by_its_own_model, 1, newest(trained), sampling)[0]
    assert own == by_library(newest(trained), sampling)


@pytest.mark.parametrize("form", ["checkpoint", "folder"])
def test_exported_code_decodes_with_a_cache(form: str, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trained / "hf" if form == "folder" else newest(trained)
    computed = []
    forward = SteelForCausalLM.forward

    def counting(self: SteelForCausalLM, input_ids: torch.Tensor, **settings: object) -> object:
        computed.append(input_ids.size(1))
        return forward(self, input_ids=input_ids, **settings)

    monkeypatch.setattr(SteelForCausalLM, "forward", counting)
    model = config_from_hf(read_config(trained / "hf"), "the export")
    # Two texts, of which the second goes on from the first's beginning only.
    results = generate(path, ["T", "The m"], Sampling(max_new_tokens=5))
    prompts = [len(SentencePieceTokenizer(trained / "tokenizer.model").encode(text)) for text in ("T", "The m")]
    expected = []
    for prompt, result in zip(prompts, results, strict=True):
        steps = min(len(result.new_tokens) + 1, 5)  # one more where the end of the text was the last
        expected += [prompt] + [1 if model.causal else prompt + step for step in range(1, steps)]
    assert computed == expected


def test_a_cache_is_used_only_for_a_text_that_goes_on() -> None:
    torch.manual_seed(0)
    settings = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = SteelForCausalLM(SteelConfig(**settings, routing_mode="merged", routing_block_length=4)).eval()
    next_logits = with_cache(model)
    text = torch.randint(40, (1, 12))
    other = (text + 1) % 40
    for tokens in (text[:, :3], text[:, :4], text[:, :9], text[:, :9], text[:, :2], other[:, :5], text):
        expected = model(tokens, use_cache=False).logits[0, -1]
        torch.testing.assert_close(next_logits(tokens), expected, atol=1e-5, rtol=0)


def test_draws_follow_the_seed(trained: Path) -> None:
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_k": 50}
    first, again, other = (by_library(trained / "hf", Sampling(**settings, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert [one.new_tokens for one in first] != [one.new_tokens for one in other]


def test_a_text_ends_with_its_end_or_when_it_is_long_enough() -> None:
    asked: list[list[int]] = []

    def next_logits(tokens: torch.Tensor) -> torch.Tensor:
        """3, 1, the end, and 2 from then on; the three rows of padding are likelier than all."""
        asked.append(tokens[0].tolist())
        following = [3, 1, 4, 2][min(len(asked[-1]) - 2, 3)]
        return torch.tensor([float(token == following) for token in range(5)] + [9.0] * 3)

    assert _continue([0, 2], next_logits, 5, {4}, Sampling(max_new_tokens=9)) == [3, 1]
    assert asked == [[0, 2], [0, 2, 3], [0, 2, 3, 1]]
    assert _continue([0, 2], next_logits, 5, {4}, Sampling(max_new_tokens=1)) == [3]
    drawn = [
        _continue(
            [0], lambda tokens: torch.zeros(90), 90, {90}, Sampling(max_new_tokens=20, temperature=1.0, seed=seed)
        )
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths that commands find before they look into them: m, a model, and t, a tokenizer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").touch()
    (tmp_path / "t").touch()


def test_the_command_passes_its_options_on(
    named: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[object] = []

    def generated(*arguments: object) -> list[Generation]:
        given.extend(arguments)
        return [Generation("a", "a b", [7])]

    monkeypatch.setattr("steel_megatron.generate.generate", generated)
    options = "--temperature 0.5 --top_k 3 --seed 7 --max_new_tokens 9 --tokenizer_path t --top_p 0.9 --min_p 0.1"
    options += " --repetition_penalty 1.5 --stop x y --tensor_model_parallel_size 2 --pipeline_model_parallel_size 4"
    assert main(["generate", "--model", "m", "--prompts", "a", "b", *options.split(), "--json_output=true"]) == 0
    sampling = Sampling(
        max_new_tokens=9,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.5,
        stop=["x", "y"],
        seed=7,
    )
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=4)
    assert given == [Path("m"), ["a", "b"], sampling, ("huggingface", "t"), parallel]
    assert json.loads(capsys.readouterr().out) == {"prompt": "a", "text": "a b", "new_tokens": [7]}


def test_texts_that_do_not_fit(trained: Path) -> None:
    for prompt, new_tokens in (("", 2), ("月球", 1000)):
        with pytest.raises(ConfigError, match="at most sequence_length = 24"):
            generate(trained / "hf", [prompt], Sampling(max_new_tokens=new_tokens))


def test_bad_settings() -> None:
    bad: list[dict[str, object]] = [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}]
    bad += [{"top_k": -1}, {"top_p": 0.0}, {"min_p": 1.5}, {"repetition_penalty": 0.0}, {"stop": [""]}, {"stop": "a"}]
    for settings in bad:
        with pytest.raises(ConfigError, match=next(iter(settings))):
            Sampling(**settings)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    for use in (lambda: generate(tmp_path, ["a"], Sampling()), lambda: load_model(tmp_path), lambda: audit(tmp_path)):
        with pytest.raises(CheckpointError, match=r"is neither a checkpoint .*steel\.json\), nor .*config\.json\)"):
            use()


def test_a_folder_without_a_tokenizer(trained: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(trained / "hf" / name, tmp_path / name)
    with pytest.raises(CheckpointError, match="was exported without a tokenizer; name it with --tokenizer_path"):
        generate(tmp_path, PROMPTS, Sampling())
    tokenizer = ("sentencepiece", str(trained / "tokenizer.model"))
    assert generate(tmp_path, PROMPTS, Sampling(max_new_tokens=2), tokenizer)


def test_a_repetition_penalty_as_in_transformers(trained: Path) -> None:
    """From the exported folder and from the checkpoint, the tokens of transformers' generate."""
    sampling = Sampling(max_new_tokens=8, repetition_penalty=1.7)
    model = AutoModelForCausalLM.from_pretrained(trained / "hf", trust_remote_code=True)
    own = SentencePieceTokenizer(trained / "tokenizer.model")
    plain = [one.new_tokens for one in by_library(trained / "hf", Sampling(max_new_tokens=8))]
    for path in (trained / "hf", newest(trained)):
        found = [one.new_tokens for one in by_library(path, sampling)]
        assert found != plain
        for prompt, tokens in zip(PROMPTS, found, strict=True):
            ids = torch.tensor([own.encode(prompt)])
            theirs = model.generate(ids, max_new_tokens=8, do_sample=False, repetition_penalty=1.7)[0, ids.size(1) :]
            assert tokens == [token for token in theirs.tolist() if token != own.eod_id]


def test_the_same_under_every_layout(trained: Path) -> None:
    sampling = Sampling(max_new_tokens=5, temperature=0.9, top_p=0.95, seed=3)
    alone = by_library(newest(trained), sampling)
    tensor, pipeline = (
        ParallelConfig(tensor_model_parallel_size=2),
        ParallelConfig(pipeline_model_parallel_size=2),
    )
    for layout in (tensor, pipeline):
        ranks = run_distributed(generate, 2, newest(trained), PROMPTS, sampling, None, layout)
        assert ranks == [alone, alone]


def test_a_stop_string_ends_the_text(trained: Path) -> None:
    (whole,) = generate(trained / "hf", ["T"], Sampling(max_new_tokens=8))
    reply = whole.text[1:]
    assert len(reply) > 3
    stop = reply[2:4]
    (found,) = generate(trained / "hf", ["T"], Sampling(max_new_tokens=8, stop=["never", stop]))
    assert found.text == "T" + reply[: reply.index(stop)]
    assert found.new_tokens == whole.new_tokens[: len(found.new_tokens)]


def test_pieces_are_shown_when_they_are_certain() -> None:
    words = ["a", "b", "ST", "x", "\ufffd", "ST", "OP", "y"]
    shown: list[str] = []
    reply = _Reply(lambda ids: "".join(words[token] for token in ids), ["STOP"], shown.append)
    seen = []
    for count in range(1, 8):
        done = reply(list(range(count)))
        seen.append("".join(shown))
        if done:
            break
    assert seen == ["a", "ab", "ab", "abSTx", "abSTx", "abSTx\ufffd", "abSTx\ufffd"] and done
    assert reply.end(list(range(7)), "prompt " + "".join(words[:7])) == "prompt abSTx\ufffd"


def test_a_conversation(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn is asked after the reply to the one before, which is part of the next prompt."""
    hf = write_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(hf, trust_remote_code=True)
    sampling = Sampling(max_new_tokens=6)
    replies = list(chat(hf, ["你好", "", "Why?"], sampling))
    model = AutoModelForCausalLM.from_pretrained(hf, trust_remote_code=True)
    messages: list[dict[str, str]] = []
    for turn, reply in zip(["你好", "Why?"], replies, strict=True):
        messages.append({"role": "user", "content": turn})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt").input_ids
        theirs = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.size(1) :]
        assert reply == tokenizer.decode(theirs, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": reply})
    # The library's tokenizer renders the same conversation, and stdin gives the same turns.
    assert list(chat(hf, ["你好", "Why?"], sampling, ("huggingface", str(tmp_path / "tokenizer")))) == replies
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("你好\n\nWhy?\n"))
    assert main(["generate", "--model", str(hf), "--chat", "--max_new_tokens", "6"]) == 0
    assert capsys.readouterr().out == "".join(reply + "\n" for reply in replies)
    with pytest.raises(ConfigError, match="at most sequence_length = 512"):
        list(chat(hf, ["word " * 600], sampling))


def test_prompts_of_a_file(
    named: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("steel_megatron.generate.generate", lambda model, prompts, *rest: asked.append(prompts) or [])
    (tmp_path / "a.txt").write_text("one\n\n二\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one\\ntwo"}\n', encoding="utf-8")
    command = ["generate", "--model", "m"]
    assert main([*command, "--prompts", "zero", "--prompts_file", str(tmp_path / "a.txt")]) == 0
    assert main([*command, "--prompts_file", str(tmp_path / "a.jsonl")]) == 0
    assert asked == [["zero", "one", "二"], ["one\ntwo"]]
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n')
    for options, message in (
        (["--prompts_file", str(tmp_path / "b.jsonl")], 'line 1 must be an object with the text of a "prompt"'),
        (["--prompts_file", str(tmp_path / "none")], "cannot be read"),
        ([], "there is no prompt; name one with --prompts"),
        (["--prompts", "a", "--stream", "--json_output"], "leave out --chat and --stream"),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("output", ["closed pipe", "full device", "closed", "ascii"])
def test_output_that_cannot_be_written(trained: Path, output: str) -> None:
    """One line and a code, or escaped characters; never a traceback."""
    command = f"{sys.executable} -m steel_megatron generate --model {trained / 'hf'} --prompts 月球 --stream"
    command += " --max_new_tokens 4"
    line = {
        "closed pipe": f"{command} | true; exit ${{PIPESTATUS[0]}}",
        "full device": f"{command} > /dev/full",
        "closed": f"{command} >&-",
        "ascii": command,
    }[output]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii" if output == "ascii" else "utf-8"}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, timeout=280)
    assert "Traceback" not in done.stderr
    if output == "ascii":
        assert done.returncode == 0 and "\\u6708\\u7403" in done.stdout
    else:
        assert done.returncode == (141 if output == "closed pipe" else 2)
        assert len([one for one in done.stderr.splitlines() if "stdout cannot be written" in one]) <= 1
