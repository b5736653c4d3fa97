"""Settings are checked when they are built, and messages carry the numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from steel_megatron.cli import _parse, main
from steel_megatron.config import (
    CheckpointConfig,
    CleanConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PreprocessConfig,
    RunConfig,
    TrainingConfig,
    dump_yaml,
    from_dict,
    load_yaml,
    to_dict,
    warn_of_old_name,
)
from steel_megatron.errors import ConfigError

MODEL = ModelConfig(routing_mode="block_causal", num_attention_heads=4, num_layers=4, num_experts=6)
RECIPES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*/pretrain.yaml"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"routing_mode": None}, "must say which mode"),
        ({"routing_mode": "blocks"}, "'blocks'; it must be one of sequence, token, block_causal, merged"),
        ({"hidden_size": 255}, "hidden_size = 255 is not divisible by num_attention_heads = 4"),
        ({"hidden_size": 12}, "head_dim|even head size"),
        ({"num_query_groups": 3}, "num_attention_heads = 4 is not divisible by num_query_groups = 3"),
        ({"num_layers": 0}, "num_layers is 0; it must be at least 1"),
        ({"block_length": 0}, "block_length is 0"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon is nan"),
        ({"ffn": "sparse"}, "ffn is 'sparse'; it must be one of soft_moe, dense"),
    ],
)
def test_bad_models_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{"routing_mode": "block_causal", **change})


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            {"tensor_model_parallel_size": 3},
            "num_attention_heads = 4 is not divisible by tensor_model_parallel_size = 3",
        ),
        (
            {"pipeline_model_parallel_size": 3},
            "num_layers = 4 is not divisible by pipeline_model_parallel_size = 3; parallel.pipeline_layers may say how",
        ),
        (
            {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2},
            "is not divisible by pipeline_model_parallel_size x virtual_pipeline_model_parallel_size = 8; parallel",
        ),
        (
            {"virtual_pipeline_model_parallel_size": 2},
            "virtual_pipeline_model_parallel_size is 2, but pipeline_model_parallel_size is 1",
        ),
        ({"virtual_pipeline_model_parallel_size": 0}, "virtual_pipeline_model_parallel_size is 0; it must be at least"),
        ({"pipeline_layers": ["4"]}, r"pipeline_layers is \['4'\]; it must be a list of int or null"),
        (
            {"pipeline_model_parallel_size": 3, "pipeline_layers": [1, 3]},
            r"pipeline_layers = \[1, 3\] has 2 entries; pipeline_model_parallel_size = 3 needs one each",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "pipeline_layers": [1, 3],
            },
            r"\[1, 3\] has 2 entries; pipeline_model_parallel_size x virtual_\w+ = 4 \(2 x 2\) needs one each",
        ),
        (
            {"pipeline_model_parallel_size": 3, "pipeline_layers": [1, 2, 2]},
            r"pipeline_layers = \[1, 2, 2\] has 1 \+ 2 \+ 2 = 5 layers; model.num_layers is 4",
        ),
        ({"pipeline_model_parallel_size": 2, "pipeline_layers": [5, -1]}, "entry 1 is -1; a number of layers is at"),
        ({"pipeline_model_parallel_size": 3, "pipeline_layers": [2, 0, 2]}, "entry 1 is 0; only the first part"),
        ({"expert_model_parallel_size": 4}, "num_experts = 6 is not divisible by expert_model_parallel_size = 4"),
        ({"tensor_model_parallel_size": 0}, "tensor_model_parallel_size is 0"),
    ],
)
def test_models_that_cannot_be_cut_so_are_refused(parallel: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(model=MODEL, parallel=ParallelConfig(**parallel))


ATTENTION = ["linear_qkv", "linear_proj"]


@pytest.mark.parametrize(
    ("lora", "run", "message"),
    [
        ({"rank": 0}, {}, "rank is 0; it must be at least 1"),
        ({"alpha": 0.0}, {}, "alpha is 0.0; it must be above 0"),
        ({"dropout": 1.0, "targets": ATTENTION}, {}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"targets": ["q_proj"]}, {}, "it must be a list of some of linear_qkv, linear_proj, linear_fc1, linear_fc2"),
        ({"targets": []}, {}, r"targets is \[\]; name some of"),
        ({"targets": ["linear_fc1"] * 2}, {}, "each once"),
        ({"dropout": 0.1}, {}, "and targets has linear_fc1; only adapters of attention have dropout"),
        (
            {},
            {"checkpoint": CheckpointConfig()},
            "there is nothing to adapt; name a checkpoint in checkpoint.init_from",
        ),
        ({}, {"model": ModelConfig(ffn="none")}, "ffn = none has no feed-forward layers"),
        ({}, {"model": ModelConfig(ffn="top_k_moe", ffn_activation="swiglu")}, "megatron-core's own experts"),
        ({}, {"parallel": ParallelConfig(fsdp=True)}, "with parallel.fsdp, .*: frozen weights have none"),
        (
            {},
            {"parallel": ParallelConfig(pipeline_model_parallel_size=2, pipeline_layers=[0, 4])},
            r"pipeline_layers = \[0, 4\]: a stage without layers has nothing to train",
        ),
        ({}, {"model": dataclasses.replace(MODEL, implementation="transformer_engine")}, "have no adapters; set it to"),
    ],
)
def test_adapters_that_cannot_be_are_refused(lora: dict[str, Any], run: dict[str, Any], message: str) -> None:
    fields = {"model": MODEL, "checkpoint": CheckpointConfig(init_from="base"), **run}
    with pytest.raises(ConfigError, match=message):
        RunConfig(lora=LoraConfig(**{"rank": 4, **lora}), **fields)


def test_adapters_of_attention_fit_every_model_and_are_computed_locally() -> None:
    lora = LoraConfig(rank=4, dropout=0.1, targets=ATTENTION)
    model = ModelConfig(ffn="top_k_moe", ffn_activation="swiglu")
    run = RunConfig(model=model, lora=lora, checkpoint=CheckpointConfig(init_from="base"))
    assert run.model.implementation == "local" and RunConfig(model=model).model.implementation == "auto"


def test_a_dense_model_has_no_experts_to_share() -> None:
    with pytest.raises(ConfigError, match="has no experts"):
        RunConfig(model=ModelConfig(ffn="dense"), parallel=ParallelConfig(expert_model_parallel_size=2))


def test_the_launch_must_fit_the_degrees() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert parallel.data_parallel_size(8) == 2
    with pytest.raises(ConfigError, match=r"launch of 6 processes .* 2 x 2 = 4"):
        parallel.data_parallel_size(6)
    with pytest.raises(ConfigError, match="expert_model_parallel_size = 2 does not divide the data-parallel size 3"):
        ParallelConfig(expert_model_parallel_size=2).data_parallel_size(3)


def test_the_global_batch_must_fit_the_launch() -> None:
    run = RunConfig(model=MODEL, training=TrainingConfig(global_batch_size=12, micro_batch_size=2))
    assert run.num_micro_batches(2) == 3
    with pytest.raises(ConfigError, match=r"global_batch_size = 12 is not divisible by .* 2 x 4 = 8"):
        run.num_micro_batches(4)


def test_the_layers_of_pipeline_chunks() -> None:
    chunks = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    assert ParallelConfig(pipeline_model_parallel_size=2).layers_of_chunks(4) == [2, 2]
    assert ParallelConfig(**chunks).layers_of_chunks(4) == [1, 1, 1, 1]
    for layers in ([0, 3, 1, 0], [1, 1, 1, 1], [4, 0], [4]):
        sizes = {4: chunks, 2: {"pipeline_model_parallel_size": 2}, 1: {}}[len(layers)]
        run = RunConfig(model=MODEL, parallel=ParallelConfig(**sizes, pipeline_layers=layers))
        assert run.parallel.layers_of_chunks(4) == layers
        assert from_dict(RunConfig, to_dict(run), "run.yaml") == run
    assert ParallelConfig(**chunks).describe(2) == "TP1 PP2 VPP2 EP1 DP1"


def test_the_interleaved_schedule_takes_a_multiple_of_the_stages() -> None:
    chunks = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    run = RunConfig(model=MODEL, parallel=chunks, training=TrainingConfig(global_batch_size=12, micro_batch_size=2))
    assert run.num_micro_batches(2) == 6
    with pytest.raises(ConfigError, match=r"3 micro batches of a step .* = 2, which the interleaved schedule"):
        run.num_micro_batches(4)


def test_optimizer_settings() -> None:
    with pytest.raises(ConfigError, match=r"beta1 is 1.0; it must be in \[0, 1\)"):
        OptimizerConfig(beta1=1.0)
    with pytest.raises(ConfigError, match=r"min_lr = 0.1 is over lr = 0.01"):
        OptimizerConfig(lr=0.01, min_lr=0.1)


def test_the_bounds_themselves_are_allowed() -> None:
    assert OptimizerConfig(lr=0.01, min_lr=0.01).min_lr == 0.01  # a constant learning rate
    assert TrainingConfig(train_steps=3, stop_after_step=3).stop_after_step == 3
    for seed in (-(1 << 63), (1 << 63) - 1):
        assert PreprocessConfig(**JOB, seed=seed, valid_fraction=0.0, workers=1, shard_size=1).seed == seed
    assert CleanConfig(recipe="a", executor="slurm", slurm_partition="cpu", workers=1, tasks=1, slurm_memory_gb=1)
    top_k = {"ffn": "top_k_moe", "ffn_activation": "swiglu", "num_experts": 4}
    assert ModelConfig(**top_k, moe_top_k=4, moe_aux_loss_coeff=0.0).moe_top_k == 4


JOB = {"inputs": ["a.jsonl"], "output_prefix": "data/c", "tokenizer_path": "tokenizer"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": 0}, "PreprocessConfig.workers is 0; it must be at least 1"),
        ({"shard_size": 0}, "shard_size is 0; it must be at least 1"),
        ({"valid_fraction": 1.0}, r"valid_fraction is 1.0; it must be in \[0, 1\)"),
        ({"valid_fraction": -0.1}, r"valid_fraction is -0.1; it must be in \[0, 1\)"),
        ({"valid_fraction": float("nan")}, "valid_fraction is nan"),
        ({"json_keys": []}, r"json_keys is \[\]; it needs at least 1"),
        ({"json_keys": ["a", "b", "a"]}, "and none twice"),
        ({"on_bad_row": "Skip"}, "on_bad_row is 'Skip'; it must be one of stop, skip"),
        ({"engine": "fast"}, "engine is 'fast'; it must be one of auto, gigatoken, tokenizers"),
        ({"tokenizer_kind": "bert"}, "tokenizer_kind is 'bert'; it must be one of huggingface, sentencepiece"),
        ({"seed": 1 << 63}, r"seed is a number of 64 bits; it must be one of 64, from -2\^63 to 2\^63 - 1"),
        ({"seed": -(1 << 63) - 1}, "seed is a number of 64 bits"),
        ({"seed": 10**5000}, "seed is a number of 16610 bits"),
        ({"output_prefix": ""}, "output_prefix is ''; it must end in a name, such as data/corpus"),
        ({"output_prefix": "data/"}, "output_prefix is 'data/'; it must end in a name"),
    ],
)
def test_bad_preprocessing_jobs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreprocessConfig(**{**JOB, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": 0}, "CleanConfig.workers is 0; it must be at least 1"),
        ({"tasks": 0}, "tasks is 0; it must be at least 1"),
        ({"slurm_memory_gb": 0}, "slurm_memory_gb is 0; it must be at least 1"),
        ({"slurm_poll_seconds": -1.0}, "slurm_poll_seconds is -1.0; it must be at least 0"),
        ({"executor": "kubernetes"}, "executor is 'kubernetes'; it must be one of local, slurm, ray"),
        ({"executor": "slurm"}, "CleanConfig.slurm_partition is not set; executor slurm needs a partition"),
        ({"on_bad_row": "drop"}, "on_bad_row is 'drop'; it must be one of stop, skip"),
    ],
)
def test_bad_cleaning_jobs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CleanConfig(recipe="recipe.yaml", **change)


def test_unknown_keys_are_named() -> None:
    with pytest.raises(ConfigError, match=r"here: unknown key 'hiden_size' in ModelConfig"):
        from_dict(RunConfig, {"model": {"hiden_size": 3}}, "here")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"hidden_size": "256"}}, "here: hidden_size is '256'; it must be of type int"),
        ({"model": {"hidden_size": 256.0}}, "hidden_size is 256.0; it must be of type int"),
        ({"model": {"num_layers": True}}, "num_layers is True; it must be of type int"),
        ({"model": {"num_query_groups": "2"}}, "num_query_groups is '2'; it must be of type int or null"),
        ({"model": 3}, "model is 3; it must be of type ModelConfig"),
        ({"optimizer": {"lr": "1e-3"}}, "lr is '1e-3'; it must be of type float"),
        ({"optimizer": {"lr_schedule": "step"}}, "lr_schedule is 'step'; it must be one of cosine, linear"),
        ({"checkpoint": {"resume": 1}}, "resume is 1; it must be of type bool"),
        ({"data": {"train": ["a", 3]}}, r"train is \['a', 3\]; it must be a list of str"),
        ({"data": {"validation": {"zh": "a"}}}, "validation is .*; it must be a list of str or a dictionary with keys"),
        ({"data": {"validation": {2024: ["a"]}}}, "validation is .* keys of type str, each a list of str"),
    ],
)
def test_values_of_another_type_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(RunConfig, values, "here")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (DataConfig, {"train": "data/corpus"}, "DataConfig.train is 'data/corpus'; it must be a list of str"),
        (DataConfig, {"validation": {2024: ["a"]}}, "validation is .* keys of type str"),
        (TrainingConfig, {"train_steps": 1e3}, "TrainingConfig.train_steps is 1000.0; it must be of type int"),
        (CheckpointConfig, {"directory": Path("runs")}, "CheckpointConfig.directory is .*; it must be of type str"),
        (RunConfig, {"model": {"routing_mode": "token"}}, "RunConfig.model is .*; it must be of type ModelConfig"),
        (PreprocessConfig, {"inputs": "a", "output_prefix": "b", "tokenizer_path": "c"}, "inputs is 'a'; .* a list"),
        (
            CleanConfig,
            {"recipe": "recipe.yaml", "sources": "a"},
            "CleanConfig.sources is 'a'; it must be a list of str",
        ),
    ],
)
def test_types_are_checked_in_python_as_well(kind: type, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**change)


def test_what_yaml_says_in_another_way_is_the_same() -> None:
    values = {"lr": 1, "decay_steps": None, "megatron": {"adam_eps": "anything"}}
    assert from_dict(OptimizerConfig, values, "here") == OptimizerConfig(**values)
    assert from_dict(DataConfig, {"validation": {"zh": ["a"]}}, "here").validation_sets == {"zh": ["a"]}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.parent.name)
def test_recipes_are_valid_and_survive_a_round_trip(recipe: Path) -> None:
    run = from_dict(RunConfig, yaml.safe_load(recipe.read_text(encoding="utf-8")), str(recipe))
    assert from_dict(RunConfig, yaml.safe_load(dump_yaml(run)), "the dump") == run


def test_the_vocabulary_is_padded_for_every_layout() -> None:
    assert ModelConfig(routing_mode="merged", vocab_size=8001).padded_vocab_size == 8064
    assert ModelConfig(routing_mode="merged", vocab_size=151936).padded_vocab_size == 151936


def test_only_sequence_mode_is_not_causal() -> None:
    assert MODEL.causal and MODEL.loss_name == "loss"
    assert ModelConfig(routing_mode="sequence").loss_name == "loss (non-causal)"
    assert ModelConfig(ffn="dense").causal


def test_old_names_of_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In Python, in a file, on the command line, and alone in what an earlier version saved."""
    new = ModelConfig(routing_mode="token", slot_input="normalized", identical_expert_init=True)

    def warnings() -> list[str]:
        messages = [record.getMessage().split(" is now")[0] for record in caplog.records]
        caplog.clear()
        warn_of_old_name.cache_clear()
        return sorted(messages)

    warnings()
    old: dict[str, Any] = {"routing_mix": "normalized", "experts_alike": True}
    assert ModelConfig(routing_mode="token", **old) == new
    assert warnings() == ["experts_alike", "routing_mix"]
    assert dataclasses.replace(new, num_layers=2) == dataclasses.replace(ModelConfig(**to_dict(new)), num_layers=2)
    assert from_dict(ModelConfig, {"routing_mode": "token", **old}, "steel.json") == new
    assert warnings() == [] and not old.keys() & to_dict(new).keys()
    file = tmp_path / "run.yaml"
    file.write_text("model: {routing_mode: token, routing_mix: normalized}")
    for words in (["--model.experts_alike", "true"], ["--model.identical_expert_init", "true"]):
        name, options = _parse(["pretrain", "--config", str(file), *words])
        assert from_dict(RunConfig, options, name).model == new
    assert warnings() == ["experts_alike", "routing_mix"]
    with pytest.raises(
        ConfigError, match=r"--model\.slot_input is given and so is its old name, model\.routing_mix = norm"
    ):
        _parse(["pretrain", "--config", str(file), "--model.slot_input", "raw"])
    with pytest.raises(ConfigError, match="routing_mix is 'raw' and slot_input is 'normalized'; give only slot_input"):
        ModelConfig(routing_mode="token", slot_input="normalized", routing_mix="raw")
    with pytest.raises(ConfigError, match="slot_input is 'both'; it must be one of normalized, raw"):
        from_dict(ModelConfig, {"routing_mode": "token", "routing_mix": "both"}, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {x: 1}\na: 2\n", "line 3: a is given twice, first in line 1"),
        ("- b: {x: 1,\n   y: 2, x: 3}\n", "line 2: x is given twice, first in line 1"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(text: str, message: str) -> None:
    with pytest.raises(yaml.YAMLError, match=message):
        load_yaml(text)


def test_yaml_that_says_everything_once() -> None:
    text = "a: &a {x: 1, y: &y [1]}\nb: {<<: *a, x: 2}\nc: [*y, *a]\n1: one\n'1.0': string\n"
    assert load_yaml(text) == yaml.safe_load(text) and load_yaml("") is None
    assert load_yaml("&a [*a]")  # an alias within what it names


def test_a_config_file_or_recipe_with_a_key_twice_ends_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("model: {num_layers: 2}\ndata: {train: [x]}\nmodel: {hidden_size: 8}\n")
    (tmp_path / "recipe.yaml").write_text("kind: text\noperators: [clean_email_mapper]\nkind: code\n")
    commands = ["pretrain", "--config", f"{tmp_path}/run.yaml"], ["clean", f"{tmp_path}/recipe.yaml", "--sources", "x"]
    for command, key in zip(commands, ("model", "kind"), strict=True):
        assert main(command) == 2
        assert f"line 3: {key} is given twice, first in line 1" in capsys.readouterr().err
