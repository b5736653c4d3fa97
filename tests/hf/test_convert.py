"""From published weights to checkpoints and back, through the library's own training forward and backward."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from steel_megatron.config import ParallelConfig
from steel_megatron.errors import CheckpointError
from steel_megatron.hf import convert, mapping, weights
from steel_megatron.hf.configuration_steel import SteelConfig
from steel_megatron.hf.modeling_steel import SteelForCausalLM
from steel_megatron.train import checkpoint
from tests.distributed import run_distributed
from tests.hf import golden, launched
from tests.hf.test_mapping import BASE, random_tensors

LAYOUTS = {
    "alone": (1, ParallelConfig()),
    "tp2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "pp2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "ep2": (2, ParallelConfig(expert_model_parallel_size=2)),
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden models' checkpoints, by name."""
    return run_distributed(launched.import_all, 1, tmp_path_factory.mktemp("imported"))[0]


@pytest.fixture(scope="module")
def exported(imported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders exported from those checkpoints, by name."""
    return run_distributed(launched.export_all, 1, imported, tmp_path_factory.mktemp("exported"))[0]


def assemble(parts: list[launched.Pieces], model: Any) -> dict[str, torch.Tensor]:
    """Whole tensors under published names from the processes' pieces."""
    whole = {
        rule.key: torch.zeros((model.num_layers, *rule.shape) if rule.per_layer else rule.shape)
        for rule in mapping.rules(model)
    }
    for part in parts:
        for label, piece in part.items():
            key, offsets, prepended = label.split("|")
            place = [int(number) for number in offsets.split(",")]
            shape = [1] * int(prepended) + list(piece.shape)
            index = tuple(slice(start, start + size) for start, size in zip(place, shape, strict=True))
            whole[key][index] = piece.view(shape)
    return mapping.to_hf(whole, model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_equals_the_published_model(layout: str, imported: dict[str, Path]) -> None:
    fixtures = {name: golden.read(name) for name in golden.NAMES}
    if layout == "ep2":  # a dense model has no experts to share; the configuration refuses it
        del fixtures["dense_senet"]
    processes, parallel = LAYOUTS[layout]
    inputs = {name: tensors["io"] for name, (_, tensors) in fixtures.items()}
    paths = {name: imported[name] for name in fixtures}
    results = run_distributed(launched.training_gradients, processes, paths, parallel, inputs)
    for name, (config, tensors) in fixtures.items():
        for result in results:
            assert result[name][0] == pytest.approx(tensors["io"]["loss"].item(), rel=1e-6), name
        gradients = assemble([result[name][1] for result in results], mapping.config_from_hf(config, name))
        for key, expected in tensors["grads"].items():
            assert golden.relative_error(gradients[key], expected) < 1e-4, (name, key)


@pytest.mark.parametrize("name", golden.NAMES)
def test_export_gives_back_the_same_bits_and_transformers_loads_it(name: str, exported: dict[str, Path]) -> None:
    _, tensors = golden.read(name)
    again = load_file(exported[name] / "model.safetensors")
    assert again.keys() == tensors["model"].keys()
    for key, tensor in tensors["model"].items():
        assert torch.equal(again[key], tensor) and again[key].dtype == tensor.dtype, key
    model = AutoModelForCausalLM.from_pretrained(exported[name], trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        logits = model(tensors["io"]["input_ids"]).logits
    torch.testing.assert_close(logits, tensors["io"]["logits"], atol=1e-4, rtol=0)


MODES = ("sequence", "block_causal", "token", "merged")


def test_the_exported_code_computes_what_the_library_trains() -> None:
    base = dataclasses.replace(BASE, block_length=6, init_method_std=0.3)
    models = [
        dataclasses.replace(base, routing_mode=mode, slot_input=mix) for mode in MODES for mix in ("raw", "normalized")
    ]
    tokens = torch.randint(0, BASE.vocab_size, (2, 23), generator=torch.Generator().manual_seed(0))
    results = run_distributed(launched.library_logits, 1, models, tokens)[0]
    different: list[torch.Tensor] = []
    for model, (logits, own) in zip(models, results, strict=True):
        exported = SteelForCausalLM(SteelConfig(**mapping.config_to_hf(model))).eval()
        exported.load_state_dict(assemble([own], model))
        with torch.no_grad():
            ours = exported(tokens).logits
        assert ours.std() > 0.5
        torch.testing.assert_close(
            ours, logits[..., : model.vocab_size], atol=2e-4, rtol=0, msg=lambda text, of=model: f"{of}: {text}"
        )
        different.append(ours)
    for number, one in enumerate(different):  # none of them is another's function
        assert all((one - other).abs().max() > 2e-3 for other in different[:number])


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    """A small model's published folder, made here."""
    folder = tmp_path / "published"
    folder.mkdir()
    save_file(random_tensors(BASE), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(mapping.config_to_hf(BASE)))
    return folder


def test_a_folder_in_several_files(small_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(small_folder / "model.safetensors")
    planned = {name: weights.Planned(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    shutil.copyfile(small_folder / "config.json", tmp_path / "config.json")
    weights.write_weights(tmp_path, planned, tensors.items(), 20_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and not (tmp_path / "model.safetensors").exists()
    again = convert.read_weights(tmp_path)
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)
    (tmp_path / files[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"names {files[1]}, which is not there"):
        convert.read_weights(tmp_path)


DAMAGES = [
    "not finite",
    "integers",
    "missing tensor",
    "truncated",
    "pickle",
    "no config",
    "bad config",
    "index",
    "twice",
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_folders_that_cannot_be_imported(small_folder: Path, tmp_path: Path, damage: str) -> None:
    file = small_folder / "model.safetensors"
    tensors = load_file(file)
    expected = {"truncated": "is damaged", "pickle": "which can execute anything", "no config": "config.json"}
    if damage == "not finite":
        tensors["lm_head.weight"][3, 4] = float("nan")
        save_file(tensors, file)
        expected[damage] = "lm_head.weight holds values that are not finite"
    elif damage == "missing tensor":
        del tensors["model.norm.weight"]
        save_file(tensors, file)
        expected[damage] = "has no tensor model.norm.weight"
    elif damage == "integers":
        save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"].int()}, file)
        expected[damage] = "lm_head.weight is of type I32"
    elif damage == "index":
        (small_folder / weights.INDEX).write_text(
            json.dumps({"weight_map": {"lm_head.weight": "../model.safetensors"}})
        )
        expected[damage] = "must name files of its own folder"
    elif damage == "twice":
        save_file({"lm_head.weight": tensors["lm_head.weight"]}, small_folder / "other.safetensors")
        index = {"weight_map": {"model.norm.weight": file.name, "lm_head.weight": "other.safetensors"}}
        (small_folder / weights.INDEX).write_text(json.dumps(index))
        expected[damage] = "lm_head.weight a second time"
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "pickle":
        file.rename(small_folder / "pytorch_model.bin")
    elif damage == "no config":
        (small_folder / "config.json").unlink()
    else:
        (small_folder / "config.json").write_text("{")
        expected[damage] = "config.json is not JSON"
    assert expected[damage] in launched.refused("import_hf", small_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.slow
def test_outputs_are_replaced_only_when_asked(small_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    messages = run_distributed(launched.convert_twice, 1, small_folder, output)[0]
    assert "is already there" in messages[0] and "is already there" in messages[1]
    assert "lies inside" in messages[2] and "is a Hugging Face folder" in messages[3]
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint", "hf"]
    exported = load_file(output / "hf/model.safetensors")
    for name, tensor in load_file(small_folder / "model.safetensors").items():
        assert torch.equal(exported[name], tensor.bfloat16()), name
    assert json.loads((output / "hf/config.json").read_text())["dtype"] == "bfloat16"
    checkpoint.verify(output / "checkpoint")
    info = checkpoint.read_info(output / "checkpoint")
    assert not info.has_optimizer and info.step == 0 and info.model == BASE


@pytest.mark.slow
def test_nothing_else_is_replaced(small_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    messages = run_distributed(launched.overwrite_what_must_stay, 1, small_folder, run)[0]
    assert all("which it would replace" in messages[number] for number in (0, 1, 5)), messages
    assert all("is not an earlier output" in messages[number] for number in (2, 3, 4)), messages
    assert "another job is writing" in messages[6]
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "link", "thesis"]
    assert (run / "thesis" / "thesis.tex").read_text() == "years of work"
    checkpoint.verify(run / "checkpoints" / "step_00000001")
    assert (small_folder / "model.safetensors").is_file()


@pytest.mark.slow
def test_every_weight_keeps_its_type(small_folder: Path, tmp_path: Path) -> None:
    tensors = {
        name: tensor if ".phi" in name or ".scale" in name else tensor.bfloat16()
        for name, tensor in load_file(small_folder / "model.safetensors").items()
    }
    save_file(tensors, small_folder / "model.safetensors")
    run_distributed(launched.convert_types, 1, small_folder, tmp_path / "out")
    again = load_file(tmp_path / "out/hf/model.safetensors")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name


def small_tokenizer(folder: Path) -> Path:
    """A tokenizer of 30 ids; 0 ends a document."""
    letters = ["<eos>", *"abcdefghijklmnopqrstuvwxyz .,"]
    model = tokenizers.models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    built = tokenizers.Tokenizer(model)
    built.add_special_tokens([tokenizers.AddedToken("<eos>", special=True)])
    built.decoder = tokenizers.decoders.Fuse()
    folder.mkdir()
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return folder


@pytest.mark.slow
def test_the_tokenizer_goes_with_the_model(small_folder: Path, tmp_path: Path) -> None:
    fitting, output = small_tokenizer(tmp_path / "tokenizer"), tmp_path / "out"
    large = tmp_path / "large"
    shutil.copytree(fitting, large)
    description = json.loads((large / "tokenizer.json").read_text())
    description["model"]["vocab"] |= {f"word{number}": number for number in range(30, 200)}
    (large / "tokenizer.json").write_text(json.dumps(description))
    messages = run_distributed(launched.export_with_tokenizers, 1, small_folder, output, fitting, large)[0]
    assert "200 ids" in messages[0] and messages[0].endswith("was trained with 100")
    assert messages[1] == "cannot be exported"
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint", "hf"]
    tokenizer = AutoTokenizer.from_pretrained(output / "hf", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(output / "hf", trust_remote_code=True)
    assert model.generation_config.eos_token_id == 0 and tokenizer.eos_token_id == 0
    ids = tokenizer("a small text", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "a small text"
    assert model.generate(ids, max_new_tokens=4, pad_token_id=0).shape[0] == 1


@pytest.mark.slow
def test_the_script(small_folder: Path, tmp_path: Path) -> None:
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model"]
    saved, exported = ["--save", str(tmp_path / "checkpoint")], ["--save", str(tmp_path / "hf")]
    to_hf = ["--direction", "to-hf", "--load", str(tmp_path / "checkpoint"), *exported]
    from_hf = ["--direction", "from-hf", "--load", str(small_folder), *saved]
    calls = [
        from_hf,
        from_hf,
        [*from_hf, "--overwrite"],
        [*from_hf, "--dtype", "float32"],
        [*to_hf, *tokenizer[:2]],
        [*to_hf, "--dtype", "bfloat16", *tokenizer, str(small_tokenizer(tmp_path / "tokenizer"))],
    ]
    results = run_distributed(launched.run_tool, 1, calls)[0]
    assert [code for code, _ in results] == [0, 2, 0, 2, 2, 0], results
    assert results[1][1].splitlines()[-1].startswith("error: ") and "is already there" in results[1][1]
    assert "require --direction to-hf" in results[3][1] and "must be given together" in results[4][1]
    assert load_file(tmp_path / "hf/model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert (tmp_path / "hf/tokenizer.json").is_file()


def test_conversion_is_for_one_process(small_folder: Path, tmp_path: Path) -> None:
    for message in run_distributed(launched.refused, 2, "import_hf", small_folder, tmp_path / "out"):
        assert "this launch has 2" in message
    assert not (tmp_path / "out").exists()
