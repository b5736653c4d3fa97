"""A wrong option and a path that is not there are told before anything heavy is imported, by every command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from steel_megatron.cli import COMMANDS

HEAVY = ("torch", "megatron.core", "transformers", "lm_eval", "datasets", "pyarrow")
NONE = "no/such/place"
"""A path that is not there; each message must name it, or the wrong value."""
OUT = ["--output", "out"]
TOKENIZER = ["--tokenizer_path", NONE]
RUN = ["--model.routing_mode", "token", "--checkpoint.directory", "run"]
PREPARE = ["--inputs", NONE, "--output_prefix", "out", "--max_tokens", "8", *TOKENIZER]
GENERATE = ["generate", "--model", "folder", "--prompts", "a"]
EVALUATE = ["evaluate", "folder", "--tasks", "ceval", "--data"]
CONTAMINATION = ["contamination", "--tasks", "ceval", "--corpora", NONE, "--tokenizer_path", NONE, "--data"]
CASES: list[tuple[list[str], str]] = [
    (["sources", "--such", NONE], "--such"),
    (["clean", NONE, *OUT], NONE),
    (["preprocess", "--inputs", NONE, "--output_prefix", "out", *TOKENIZER], NONE),
    (["inspect", NONE], NONE),
    (["verify", NONE], NONE),
    (["merge", NONE, *OUT], NONE),
    (["data create", "ledger.json", NONE, "--sequence_length", "8"], NONE),
    (["data append", NONE, NONE], NONE),
    (["data remove", NONE, "name"], NONE),
    (["data reweight", NONE, "name", "--epochs", "2"], NONE),
    (["data mixture", NONE, "name=2"], NONE),
    (["data cancel", NONE], NONE),
    (["data relocate", NONE, "a", "b"], NONE),
    (["data skip", NONE, "--samples", "1"], "must be FIRST:END"),
    (["data show", NONE], NONE),
    (["checkpoint list", NONE], NONE),
    (["checkpoint verify", NONE], NONE),
    (["checkpoint plan", NONE], NONE),
    (["checkpoint reshard", NONE, "out"], NONE),
    (["checkpoint compare", NONE, NONE], NONE),
    (["checkpoint compare", "folder", NONE], "is a Hugging Face folder"),
    (["pretrain", *RUN], "data.train is empty"),
    (["pretrain", *RUN, "--data.train", NONE], NONE),
    (["pretrain", *RUN, "--data.train", "corpus", "--data.tokenizer_path", NONE], NONE),
    (["pretrain", *RUN, "--parallel.tensor_model_parallel_size", "2"], "a launch of 1 processes does not fit"),
    (["pretrain", *RUN, "--data.train", "corpus", "--data.validation", NONE], NONE),
    (["pretrain", *RUN, "--data.train", "corpus", "--checkpoint.init_from", NONE], NONE),
    (["pretrain", *RUN, "--optimizer.lr", "-1"], "lr"),
    (["sft prepare", *PREPARE], NONE),
    (["sft inspect", NONE, *TOKENIZER], NONE),
    (["sft build", NONE, *OUT], NONE),
    (["slurm render", *RUN, "--profile", NONE], NONE),
    (["slurm submit", *RUN, "--profile", NONE], NONE),
    (["slurm status", NONE, "--json_output", "maybe"], "maybe"),
    (["slurm cancel", NONE, "--such", NONE], "--such"),
    (["sft train", *RUN, "--data.train", NONE], NONE),
    (["dpo prepare", *PREPARE], NONE),
    (["dpo train", *RUN, "--data.train", NONE], NONE),
    (["export-hf", "--checkpoint", NONE, *OUT], NONE),
    (["export-hf", "--checkpoint", "folder", *OUT], "is a Hugging Face folder"),
    (["export-hf", "--checkpoint", NONE, *OUT, "--max_shard_size", "5XB"], "5XB"),
    (["import-hf", "--folder", NONE, *OUT], NONE),
    (["import-hf", "--folder", "folder", "--output", "folder"], "inside"),
    (["import-hf", "--folder", "folder", *OUT, "--seed", "3"], "without upcycle"),
    (["generate", "--model", NONE, "--prompts", "a"], NONE),
    ([*GENERATE, "--temperature", "-3"], "-3"),
    ([*GENERATE, *TOKENIZER], NONE),
    ([*GENERATE, "--prompts_file", NONE], NONE),
    ([*GENERATE, "--tensor_model_parallel_size", "0"], "tensor_model_parallel_size"),
    (["audit", NONE], NONE),
    (["audit", "folder", "--json", "folder"], "is a folder; name a file"),
    (["evaluate", NONE, "--tasks", "ceval", "--data", "folder"], NONE),
    ([*EVALUATE, NONE], NONE),
    ([*EVALUATE, "folder", "--batch_size", "0"], "batch_size"),
    ([*EVALUATE, "folder", "--num_fewshot", "-1"], "num_fewshot"),
    ([*EVALUATE, "folder", *TOKENIZER], NONE),
    ([*EVALUATE, "folder", "--json", "folder"], "is a folder; name a file"),
    ([*CONTAMINATION, NONE], NONE),
    ([*CONTAMINATION, "folder"], NONE),
]
PROGRAM = """
import contextlib, io, json, sys
from steel_megatron.cli import main

for words, wanted in json.loads(sys.argv[1]):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main([*words[0].split(), *words[1:]])
    told = errors.getvalue()
    heavy = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
    if code != 2 or wanted not in told or len(told.splitlines()) != 1 or heavy:
        print(f"{words}: {code}, imported {heavy}, said {told!r}")
"""


def test_errors_come_before_heavy_imports(tmp_path: Path) -> None:
    assert {words[0] for words, _ in CASES} == set(COMMANDS)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / "corpus.idx").touch()
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(CASES), json.dumps(HEAVY)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-2000:]
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left behind
