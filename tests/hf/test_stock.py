"""Stock architectures: Qwen2, Llama and Qwen2-MoE of transformers against checkpoints, in both directions."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from steel_megatron.cli.models import export_hf as export_command
from steel_megatron.cli.models import import_hf as import_command
from steel_megatron.config import ModelConfig
from steel_megatron.errors import CheckpointError, ConfigError, SteelError
from steel_megatron.hf import compare, convert, mapping
from steel_megatron.hf.architectures import architecture_for, read_source, stock_config
from steel_megatron.hf.folder import ModelFolder
from steel_megatron.hf.loading import load_model
from steel_megatron.hf.upcycling import Upcycling
from steel_megatron.train import checkpoint
from tests.hf.test_modeling import small_model, tokens

SHAPE: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
TOKENS = torch.randint(90, (2, 40), generator=torch.Generator().manual_seed(1))
MAKERS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, rope_parameters=ROPE)),
    "qwen2 tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, rope_parameters=ROPE, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=ROPE, rms_norm_eps=1e-5)),
}


def make(name: str, folder: Path) -> Any:
    """A stock model with random weights, saved by transformers in two files."""
    torch.manual_seed(3)
    model = MAKERS[name]()
    with torch.no_grad():
        for parameter in (
            parameter for key, parameter in model.named_parameters() if key.endswith(("bias", "norm.weight"))
        ):
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, torch.Tensor]]:
    """Of each stock model: its folder, the checkpoint made of it, and its logits."""
    made = {}
    for name in MAKERS:
        folder = tmp_path_factory.mktemp("stock") / "model"
        expected = logits(make(name, folder))
        made[name] = (folder, convert.import_hf(folder, folder.with_name("checkpoint")), expected)
    return made


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "conversion.json").read_text())


@pytest.mark.parametrize("name", MAKERS)
def test_a_stock_model_becomes_a_checkpoint_and_a_folder(name: str, stock: Any, tmp_path: Path) -> None:
    folder, saved, expected = stock[name]
    checkpoint.verify(saved)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(load_model(saved)), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(load_model(folder)), expected, atol=1e-4, rtol=0)
    report = report_of(saved)
    assert report["tied_embeddings_copied"] == (name == "qwen2 tied")
    assert report["biases_added_as_zeros"] == (name == "llama")
    assert report["logits"]["largest_difference"] < 1e-4

    exported = convert.export_hf(saved, tmp_path / "hf", max_shard_bytes=20_000)
    model = AutoModelForCausalLM.from_pretrained(exported)  # no remote code
    assert type(model) is Qwen2ForCausalLM and not list(exported.glob("*.py"))
    torch.testing.assert_close(logits(model.eval()), expected, atol=1e-4, rtol=0)
    files = sorted(path.name for path in exported.glob("*.safetensors"))
    assert len(files) > 2 and all((exported / file).stat().st_size < 25_000 for file in files)
    again, before = ModelFolder(exported), ModelFolder(folder)
    assert again.count == len(mapping.published_shapes(before.model))
    for key in mapping.published_shapes(before.model):
        assert torch.equal(again.read(key), before.read(key)), key
    assert report_of(exported)["vocabulary"] == {"rows": 90, "padding_removed": 38}
    assert mapping.config_from_hf(again.config, "here").norm_epsilon == (1e-5 if name == "llama" else 1e-6)


@torch.no_grad()
def test_tied_embeddings_of_the_exported_code(tmp_path: Path) -> None:
    model = small_model("block_causal", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    ids = tokens()
    for again in (type(model).from_pretrained(tmp_path / "tied"), load_model(tmp_path / "tied")):
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    saved = convert.import_hf(tmp_path / "tied", tmp_path / "checkpoint")
    torch.testing.assert_close(load_model(saved)(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("to", ["merged", "token", "top_k_moe"])
def test_upcycling_begins_with_the_dense_model_s_logits(to: str, stock: Any, tmp_path: Path) -> None:
    folder, _, expected = stock["qwen2"]
    upcycling = Upcycling(to=to, num_experts=3, block_length=8)
    saved = convert.import_hf(folder, tmp_path / "checkpoint", upcycling=upcycling)
    model = checkpoint.read_info(saved).model
    assert model.num_experts == 3 and (model.routing_mode or model.ffn) == to
    exported = convert.export_hf(saved, tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=to != "top_k_moe").eval()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=0)
    assert report_of(saved)["logits"]["largest_difference"] < 1e-4
    if to == "top_k_moe":
        from steel_megatron.audit.sources import open_subject  # imports megatron-core

        assert type(loaded).__name__ == "Qwen2MoeForCausalLM"
        again = ModelFolder(exported)
        assert again.model.ffn == "top_k_moe" and again.model.moe_top_k == 2
        with pytest.raises(CheckpointError, match="load it with transformers'"):
            load_model(exported)
        with pytest.raises(CheckpointError, match="audit the checkpoint that it was made of"):
            open_subject(exported, 0)
    weights = load_file(exported / "model.safetensors")
    first = "model.layers.1.mlp.experts.{}.up_proj.weight"
    assert torch.equal(weights[first.format(0)], weights[first.format(2)])
    routing = weights["model.layers.1.mlp." + ("gate.weight" if to == "top_k_moe" else "phi")]
    assert 0.1 < routing.std() < 0.3 and routing.dtype == torch.float32


def test_top_1_and_trained_experts_are_exact_as_qwen2_moe(stock: Any, tmp_path: Path) -> None:
    # The export itself compares logits; experts that differ make every wrong choice or weight visible.
    folder = tmp_path / "experts"
    saved = convert.import_hf(stock["qwen2"][0], tmp_path / "one", upcycling=Upcycling(to="top_k_moe", moe_top_k=1))
    assert report_of(saved)["logits"] is None  # the router's probability scales the network
    convert.export_hf(saved, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        elif name.endswith("mlp.gate.weight"):
            tensor.mul_(5)
    save_file(tensors, file, metadata={"format": "pt"})
    agreement = report_of(convert.import_hf(folder, tmp_path / "two"))["logits"]
    assert 0 < agreement["largest_difference"] < 1e-4 < agreement["largest_logit"]


def test_a_mixture_that_is_not_exact_says_so(stock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr("steel_megatron.hf.importing.logger.warning", notes.append)
    saved = convert.import_hf(stock["qwen2"][0], tmp_path / "out", upcycling=Upcycling(to="sequence"))
    assert report_of(saved)["logits"] is None
    assert notes == ["with routing mode sequence, the model does not begin with the dense model's logits"]
    with pytest.raises(ConfigError, match="upcycle is 'blocks'"):
        Upcycling(to="blocks").model(ModelConfig(ffn="dense"), "here")
    with pytest.raises(CheckpointError, match="only a dense model"):
        Upcycling(to="merged").model(ModelConfig(routing_mode="token"), "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3"}, "model_type is 'gemma3'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "type 'llama3' (rope_scaling)"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, "of type 'yarn'"),
        ({"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "here every layer is full_attention"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; this library does not know the key"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"num_attention_heads": 3}, "not divisible by num_attention_heads = 3"),
        ({"attention_dropout": 1.5}, "attention_dropout is 1.5"),
    ],
)
def test_keys_that_change_the_mathematics_are_refused(change: dict[str, Any], message: str) -> None:
    config = {**SHAPE, "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4}
    assert read_source(config, "here").model.rotary_base == 10_000
    with pytest.raises(CheckpointError) as raised:
        read_source({**config, **change}, "here")
    assert message in str(raised.value) and str(raised.value).startswith("here: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared_expert_intermediate_size": 8}, "has no shared expert"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"decoder_sparse_step": 2}, "every layer has experts"),
        ({"mlp_only_layers": [0]}, "every layer has experts"),
        ({"qkv_bias": False}, "qkv_bias is false"),
    ],
)
def test_other_mixtures_than_ours_are_refused(change: dict[str, Any], message: str) -> None:
    model = ModelConfig(ffn="top_k_moe", ffn_activation="swiglu", num_experts=3, num_query_groups=2)
    config = stock_config(model, architecture_for(model)[0])
    assert read_source(config, "here").model == model
    with pytest.raises(CheckpointError, match=message):
        read_source({**config, **change}, "here")


def damaged(folder: Path, damage: str) -> str:
    """Damages a folder; returns what the message must say."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    if damage == "missing shard":
        file.unlink()
        return f"names {file.name}, which is not there"
    if damage == "half-written":
        file.write_bytes(file.read_bytes()[:-100])
        return f"{file.name} is damaged"
    if damage == "pickle":
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        (folder / "pytorch_model.pth").write_bytes(b"cos\nsystem\n(S'touch /tmp/harm'\ntR.")
        return "pytorch_model.pth is a pickle, which can execute anything"
    if damage == "other shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
        save_file(tensors, file)
        return f"{name} has shape [24, 31]; its settings say [24, 32]"
    if damage == "unknown tensor":
        save_file({**tensors, "model.layers.1.mlp.lora_A.weight": torch.zeros(2)}, file)
        return "has a tensor model.layers.1.mlp.lora_A.weight"
    if damage == "not in its file":
        index["weight_map"]["model.norm.bias"] = file.name
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return f"says that model.norm.bias is in {file.name}, which does not hold it"
    del tensors[name]
    save_file(tensors, file)
    return f"says that {name} is in {file.name}"


DAMAGES = [
    "missing shard",
    "half-written",
    "pickle",
    "other shape",
    "unknown tensor",
    "not in its file",
    "missing tensor",
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused(damage: str, stock: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stock["qwen2"][0], folder)
    expected = damaged(folder, damage)
    with pytest.raises(CheckpointError) as raised:
        convert.import_hf(folder, tmp_path / "out")
    assert expected in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.fixture
def keys_for_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of names that takes values for keys: all names and shapes are right, and the model is another one."""
    rules = mapping.rules

    def exchanged(model: ModelConfig) -> list[mapping.Rule]:
        found = []
        for rule in rules(model):
            if "linear_qkv" in rule.key:
                query, key, value = rule.names
                rule = mapping.Rule(rule.key, rule.shape, (query, value, key), rule.split, rule.join)
            found.append(rule)
        return found

    monkeypatch.setattr(mapping, "rules", exchanged)


@pytest.mark.usefixtures("keys_for_values")
def test_nothing_is_kept_when_the_logits_differ(stock: Any, tmp_path: Path) -> None:
    folder, saved, _ = stock["qwen2"]
    for action, source in ((convert.import_hf, folder), (convert.export_hf, saved)):
        with pytest.raises(CheckpointError, match="give other logits: they differ by up to"):
            action(source, tmp_path / "out")
        assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]


def test_a_half_written_checkpoint_is_not_exported(stock: Any, tmp_path: Path) -> None:
    saved = tmp_path / "checkpoint"
    shutil.copytree(stock["qwen2"][1], saved)
    file = next(saved.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(SteelError, match=file.name):
        convert.export_hf(saved, tmp_path / "hf")
    file.write_bytes(content[:-9])
    with pytest.raises(SteelError, match=file.name):
        convert.export_hf(saved, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


@torch.no_grad()
def test_one_layer_at_a_time_gives_the_whole_model_s_logits(stock: Any) -> None:
    folder, _, _ = stock["llama"]
    tokens = TOKENS[0]
    whole = AutoModelForCausalLM.from_pretrained(folder)(tokens[None]).logits[0]
    with mock.patch.object(compare, "_one_layer", wraps=compare._one_layer) as made:
        found = compare.folder_logits(folder, convert.read_config(folder), tokens)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
    assert made.call_count == 1  # later layers use its memory


def test_weights_are_synced_once_after_the_logits_and_before_the_name(stock: Any, tmp_path: Path) -> None:
    folder, _, _ = stock["llama"]
    events: list[str] = []
    sync, replace, compared = os.fsync, os.replace, compare.compare

    def fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    with (
        mock.patch.object(os, "fsync", fsync),
        mock.patch.object(os, "replace", lambda *paths: (events.append("replace"), replace(*paths))),
        mock.patch.object(compare, "compare", lambda *sides: (events.append("compare"), compared(*sides))[1]),
    ):
        saved = convert.import_hf(folder, tmp_path / "checkpoint")
        imported, events = events, []
        convert.export_hf(saved, tmp_path / "hf")
    for made, found in ((saved, imported), (tmp_path / "hf", events)):
        names = {path.name for path in made.iterdir()}
        between = found[found.index("compare") : found.index("replace")]
        assert names <= set(between) and all(found.count(name) == 1 for name in names)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2**31), ("1024", 1024)])
def test_sizes(text: str, size: int) -> None:
    assert convert.parse_size(text) == size


@pytest.mark.parametrize("text", ["0", "-1GB", "much", "GB", "inf", "nan"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(CheckpointError, match="max_shard_size is"):
        convert.parse_size(text)


def test_options_that_do_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_experts is given without upcycle"):
        import_command(str(tmp_path / "in"), str(tmp_path / "out"), num_experts=4)
    with pytest.raises(ConfigError, match="moe_top_k has no effect with upcycle merged"):
        import_command(str(tmp_path / "in"), str(tmp_path / "out"), "merged", moe_top_k=2)
    with pytest.raises(ConfigError, match="block_length has no effect with upcycle top_k_moe"):
        import_command(str(tmp_path / "in"), str(tmp_path / "out"), "top_k_moe", block_length=2)
    with pytest.raises(CheckpointError, match="max_shard_size is 'much'"):
        export_command(str(tmp_path / "in"), str(tmp_path / "out"), max_shard_size="much")
