"""Files that are damaged or crafted, with right checksums: one line that names the file, and nothing is executed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from steel_megatron.cli import main
from steel_megatron.config import DataConfig, ParallelConfig, RunConfig, dump_yaml
from steel_megatron.data.tokenizing.sentencepiece_training import train_sentencepiece
from steel_megatron.data.tokenizing.tokenizer import load_tokenizer
from steel_megatron.errors import SteelError
from tests.data.configured import preprocess
from tests.distributed import run_distributed
from tests.train.small_run import small_run

pytestmark = pytest.mark.slow

TEXTS = ["月球是地球的卫星，潮汐是月球的引力引起的。", "def f(x):\n    return x + 1\n", "The moon has tides."]
DEEP = 100_000
VALUES: list[Any] = [None, [], {}, "x", -1, 1.5, True, float("inf"), float("nan"), 10**400, 10**18, [[]], {"x": None}]
"""In place of what a field is to have."""
RAW = {
    "empty": b"",
    "garbage": bytes(range(128, 256)) * 8,
    "zeros": bytes(64),
    "[]": b"[]",
    "{}": b"{}",
    "null": b"null",
    "number": b"1" + b"0" * 5000,
    "deep": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "text": b'"x"',
}
"""In place of a whole file."""


class Executes:
    """A pickle that leaves a file when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def payloads(content: bytes) -> dict[str, bytes]:
    """What may stand in a file in place of its content."""
    return {**RAW, "half": content[: len(content) // 2], "doubled": content + content}


def pickles() -> dict[str, bytes]:
    """Archives and pickles that hold something else."""
    found = {}
    for name, value in {"list": [], "none": None, "tensor": torch.ones(2), "name": {"model": 1}}.items():
        buffer = io.BytesIO()
        torch.save(value, buffer)
        found[name] = buffer.getvalue()
    buffer = io.BytesIO()
    torch.save({"a": Executes()}, buffer)
    return {**found, "executes": buffer.getvalue(), "plain executes": pickle.dumps(Executes())}


def indices(content: bytes) -> dict[str, bytes]:
    """Indices of a checkpoint that are none, or not of this one."""
    index = pickle.loads(content)
    name, first = next(iter(index.state_dict_metadata.items()))
    place, info = next(iter(index.storage_data.items()))
    replace: Callable[..., Any] = dataclasses.replace
    large = replace(first, size=torch.Size([2**40]))
    wrong: dict[str, Any] = {
        "list": [],
        "dictionary": {},
        "none": None,
        "no tensors": replace(index, state_dict_metadata={}),
        "lists": replace(index, state_dict_metadata=[], storage_data=[]),
        "one large": replace(index, state_dict_metadata={**index.state_dict_metadata, name: large}),
        "no tensor": replace(index, state_dict_metadata={**index.state_dict_metadata, name: 5}),
        "elsewhere": replace(
            index, storage_data={**index.storage_data, place: replace(info, relative_path="../../../secret")}
        ),
        "executes": Executes(),
    }
    return {name: pickle.dumps(value) for name, value in wrong.items()}


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    from steel_megatron.train import checkpoint

    with contextlib.suppress(TypeError):  # a manifest without fields has no place for one
        manifest["sha256"] = checkpoint.manifest_checksum(manifest)
    (folder / "steel.json").write_text(json.dumps(manifest))


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Write a file of a checkpoint, and its checksum."""
    (folder / name).write_bytes(content)
    if name != "steel.json":
        manifest = json.loads((folder / "steel.json").read_text())
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        seal(folder, manifest)


@contextlib.contextmanager
def changed(folder: Path, name: str, content: bytes) -> Iterator[None]:
    before = {file: (folder / file).read_bytes() for file in {name, "steel.json"} if (folder / file).exists()}
    try:
        if "steel.json" in before:
            rewrite(folder, name, content)
        else:
            (folder / name).write_bytes(content)
        yield
    finally:
        for file, own in before.items():
            (folder / file).write_bytes(own)


def said(*words: str) -> tuple[int, str]:
    """The exit code of a command, and what it wrote to stderr; an exception is a traceback."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(list(words))
        except BaseException as problem:
            return 1, f"Traceback: {type(problem).__name__}: {problem}"[:500]
    return code, error.getvalue()


def message(read: Callable[[], object]) -> str:
    """What a function refuses; empty if it does not."""
    try:
        read()
    except SteelError as error:
        return str(error)
    return ""


def make(root: Path) -> RunConfig:
    """A run of two checkpoints with a tokenizer, and its exported folder; relative to ``root``."""
    from steel_megatron.train.loop import pretrain

    os.chdir(root)
    Path("text").mkdir()
    for number, text in enumerate(TEXTS * 10):
        Path(f"text/{number}.txt").write_text(text * 3, encoding="utf-8")
    train_sentencepiece(TEXTS * 10, Path("tokenizer"), vocab_size=330)
    load_tokenizer("sentencepiece", "tokenizer.model").save_pretrained("tokenizer")
    preprocess(["text"], Path("corpus"), "sentencepiece", Path("tokenizer.model"))
    run = small_run(ParallelConfig(), "run", steps=4, routing_mode="merged", vocab_size=330, num_layers=1)
    data = DataConfig(train=["corpus_text_document"], tokenizer_kind="sentencepiece", tokenizer_path="tokenizer.model")
    saves = dataclasses.replace(run.checkpoint, save_interval=2)
    run = dataclasses.replace(run, data=data, checkpoint=saves)
    Path("run.yml").write_text(dump_yaml(run))
    new = dataclasses.replace(saves, directory="new", init_from="run/checkpoints/step_00000004")
    Path("new.yml").write_text(dump_yaml(dataclasses.replace(run, checkpoint=new)))
    pretrain(run)
    words = ["--tokenizer_path", "tokenizer.model", "--tokenizer_kind", "sentencepiece"]
    assert said("export-hf", "--checkpoint", "run/checkpoints/step_00000004", "--output", "hf", *words)[0] == 0
    return run


STEP = Path("run/checkpoints/step_00000004")
GENERATE = ["generate", "--max_new_tokens", "1", "--prompts", "a"]
READ_CHECKPOINT: dict[str, list[str]] = {
    "export": ["export-hf", "--checkpoint", str(STEP), "--output", "out"],
    "generate": [*GENERATE, "--model", str(STEP)],
    "audit": ["audit", str(STEP)],
    "init_from": ["pretrain", "--config", "new.yml"],
}
READ_FOLDER = {
    "import": ["import-hf", "--folder", "hf", "--output", "out"],
    "generate": [*GENERATE, "--model", "hf"],
    "audit": ["audit", "hf"],
}


def of_checkpoints(root: Path) -> list[str]:
    """What went wrong with files of checkpoints."""
    from steel_megatron import load_model
    from steel_megatron.log import setup_logging
    from steel_megatron.train import checkpoint

    run = make(root)
    wrong: list[str] = []

    def check(name: str, kind: str, content: bytes, commands: dict[str, list[str]], *, resumes: bool = True) -> None:
        with changed(STEP, name, content):
            for command, words in commands.items():
                code, text = said(*words)
                if code != 2 or "Traceback" in text or name not in text or len(text.splitlines()) > 2:
                    wrong.append(f"{command}, {name}, {kind}: {code} {text[-400:]!r}")
            if not resumes:
                return
            if name not in message(lambda: load_model(STEP)):
                wrong.append(f"load_model, {name}, {kind}")
            error = io.StringIO()
            with contextlib.redirect_stderr(error):
                setup_logging()
                found = checkpoint.newest(run.checkpoints_dir)
            if found is None or found.step != 2 or f"passing over {STEP.name}" not in error.getvalue():
                wrong.append(f"resume, {name}, {kind}: {found and found.step}")

    contents = {name: (STEP / name).read_bytes() for name in ("common.pt", ".metadata", "metadata.json", "run.yaml")}
    for kind, content in {**payloads(contents["common.pt"]), **pickles()}.items():
        if kind not in ("doubled",):  # an archive may follow anything
            check("common.pt", kind, content, READ_CHECKPOINT if kind in ("empty", "list") else {})
    for kind, content in {**payloads(contents[".metadata"]), **indices(contents[".metadata"])}.items():
        if kind != "doubled":  # nothing reads what follows a pickle
            check(".metadata", kind, content, READ_CHECKPOINT if kind in ("half", "no tensors") else {})
    for kind, content in payloads(contents["metadata.json"]).items():
        check("metadata.json", kind, content, READ_CHECKPOINT if kind in ("null", "deep") else {})
    manifest = (STEP / "steel.json").read_bytes()
    for kind, content in payloads(manifest).items():
        check("steel.json", kind, content, READ_CHECKPOINT)
    for kind, content in payloads(contents["run.yaml"]).items():
        if kind != "doubled":
            check("run.yaml", kind, content, {"generate": READ_CHECKPOINT["generate"]}, resumes=False)
    for kind, content in payloads((STEP / "ledger.json").read_bytes()).items():
        check("ledger.json", kind, content, {"generate": READ_CHECKPOINT["generate"]}, resumes=False)
    for value in VALUES:
        data = json.dumps({"data": {"tokenizer_kind": value, "tokenizer_path": value}}).encode()
        check("run.yaml", repr(value)[:20], data, {"generate": READ_CHECKPOINT["generate"]}, resumes=False)
    wrong += of_fields(manifest)
    with changed(STEP, "steel.json", b"{}"), changed(STEP.with_name("step_00000002"), "common.pt", b""):
        code, text = said("pretrain", "--config", "run.yml")
        if code != 2 or "no checkpoint in run/checkpoints is whole" not in text:
            wrong.append(f"resume of none: {code} {text}")
    with changed(STEP, "common.pt", b""):
        code, text = said("pretrain", "--config", "run.yml")
        if code != 0 or "passing over step_00000004: run/checkpoints/step_00000004/common.pt" not in text:
            wrong.append(f"resume: {code} {text}")
    return wrong + ["something was executed"] * Path("executed").exists()


def of_fields(content: bytes) -> list[str]:
    """What went wrong with values of a manifest."""
    from steel_megatron.train import checkpoint

    wrong = []
    for section in (None, "model", "files"):
        for key in json.loads(content)[section] if section else json.loads(content):
            for value in (*VALUES, "missing"):
                manifest = json.loads(content)
                fields = manifest[section] if section else manifest
                fields[key] = value
                if value == "missing":
                    del fields[key]
                if key != "sha256":
                    seal(STEP, manifest)
                else:
                    (STEP / "steel.json").write_text(json.dumps(manifest))
                try:
                    text = message(lambda: checkpoint.read_info(STEP))
                except BaseException as problem:
                    wrong.append(f"{section} {key} = {str(value)[:20]}: {type(problem).__name__}: {problem}"[:300])
                    continue
                if text and "steel.json" not in text and section != "files" and key not in ("files", "format"):
                    wrong.append(f"{section} {key} = {str(value)[:20]} is not named: {text}")
    (STEP / "steel.json").write_bytes(content)
    return wrong


def of_folders(root: Path) -> list[str]:
    """What went wrong with files of exported folders, and of tokenizers."""
    from steel_megatron import load_model

    make(root)
    wrong: list[str] = []
    folder = Path("hf")

    def check(name: str, kind: str, content: bytes, commands: dict[str, list[str]], *, loads: bool = True) -> None:
        with changed(folder, name, content):
            for command, words in commands.items():
                code, text = said(*words)
                if code != 2 or "Traceback" in text or len(text.splitlines()) > 1:
                    wrong.append(f"{command}, {name}, {kind}: {code} {text[-400:]!r}")
            try:
                if loads and name not in (text := message(lambda: load_model(folder))):
                    wrong.append(f"load_model, {name}, {kind}: {text}")
            except Exception as problem:
                wrong.append(f"load_model, {name}, {kind}: {type(problem).__name__}")

    config = (folder / "config.json").read_bytes()
    for kind, content in payloads(config).items():
        check("config.json", kind, content, READ_FOLDER)
    for key in json.loads(config):
        for value in VALUES:
            with changed(folder, "config.json", json.dumps({**json.loads(config), key: value}).encode()):
                try:
                    message(lambda: load_model(folder))  # it may be a right value
                except Exception as problem:
                    wrong.append(f"config.json, {key} = {str(value)[:20]}: {type(problem).__name__}: {problem}"[:300])
    weights = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")
    for kind, content in payloads(weights).items():
        check("model.safetensors", kind, content, READ_FOLDER if kind in ("half", "empty", "garbage") else {})
    entries: list[Any] = [*VALUES, *({**header[first], key: value} for key in header[first] for value in VALUES)]
    for entry in [*entries, {**header[first], "dtype": "F8_E4M3"}, {**header[first], "dtype": "F4"}]:
        made = json.dumps({**header, first: entry}).encode()
        content = len(made).to_bytes(8, "little") + made + weights[8 + length :]
        check("model.safetensors", str(entry)[:60], content, {})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(header, "model.safetensors")})
    )
    index = "model.safetensors.index.json"
    maps = {str(value)[:20]: json.dumps({"weight_map": value}).encode() for value in VALUES if value != {}}
    for kind, content in {**payloads((folder / index).read_bytes()), **maps}.items():
        check(index, kind, content, READ_FOLDER if kind in ("[]", "deep") else {})
    (folder / index).unlink()
    wrong += of_tokenizers()
    return wrong + ["something was executed"] * Path("executed").exists()


def of_tokenizers() -> list[str]:
    """What went wrong with the files of tokenizers."""
    wrong: list[str] = []

    def check(path: Path, kind: str, content: bytes) -> None:
        before = path.read_bytes()
        path.write_bytes(content)
        where = path.parent if path.suffix == ".json" else path
        try:
            message(lambda: load_tokenizer("huggingface" if path.suffix == ".json" else "sentencepiece", where))
        except BaseException as problem:
            wrong.append(f"{path}, {kind}: {type(problem).__name__}: {problem}"[:300])
        path.write_bytes(before)

    for path in (Path("tokenizer/tokenizer.json"), Path("tokenizer/tokenizer_config.json"), Path("tokenizer.model")):
        content = path.read_bytes()
        for kind, payload in payloads(content).items():
            check(path, kind, payload)
        if path.suffix == ".json":
            for key in json.loads(content):
                for value in VALUES:
                    check(path, f"{key} = {str(value)[:20]}", json.dumps({**json.loads(content), key: value}).encode())
    tokenizer = Path("tokenizer/tokenizer.json").read_bytes()
    for kind in ("empty", "deep", "{}"):
        Path("tokenizer/tokenizer.json").write_bytes(RAW[kind])
        words = ["--tokenizer_path", "tokenizer"]
        for command in ([*GENERATE, "--model", "hf"], READ_CHECKPOINT["export"]):
            code, text = said(*command, *words)
            if code != 2 or "tokenizer" not in text or "Traceback" in text:
                wrong.append(f"{command[0]}, tokenizer.json, {kind}: {code} {text}")
    Path("tokenizer/tokenizer.json").write_bytes(tokenizer)
    return wrong


def shown(wrong: list[str]) -> str:
    return "\n".join([f"{len(wrong)} of them", *wrong[:40]])


def test_checkpoints(tmp_path: Path) -> None:
    """Every command that reads one ends with a line and exit code 2; a resume takes the older one."""
    wrong = run_distributed(of_checkpoints, 1, tmp_path, timeout=600)[0]
    assert not wrong, shown(wrong)


def test_exported_folders_and_tokenizers(tmp_path: Path) -> None:
    wrong = run_distributed(of_folders, 1, tmp_path, timeout=600)[0]
    assert not wrong, shown(wrong)


def test_settings(tmp_path: Path) -> None:
    """Of an audit, and of commands."""
    path = tmp_path / "settings.yml"
    for kind, content in payloads(dump_yaml(small_run(ParallelConfig(), "x").model).encode()).items():
        path.write_bytes(content)
        if kind not in ("half", "doubled"):  # YAML may be cut at a line, and repeat itself
            code, text = said("audit", str(path))
            assert code == 2 and "settings.yml" in text and "Traceback" not in text, (kind, text[-300:])
        code, text = said("pretrain", "--config", str(path))
        assert code == 2 and "Traceback" not in text, (kind, text[-300:])


def test_copies_are_kept(tmp_path: Path) -> None:
    """The helper gives back what was there."""
    (tmp_path / "a").write_bytes(b"1")
    with changed(tmp_path, "a", b"2"):
        assert (tmp_path / "a").read_bytes() == b"2"
    assert (tmp_path / "a").read_bytes() == b"1"
    shutil.rmtree(tmp_path)
