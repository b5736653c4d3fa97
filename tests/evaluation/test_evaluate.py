"""Benchmarks through the harness: the scores of its own backend, on one process and on two."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM

from steel_megatron.cli import main
from steel_megatron.config import ParallelConfig
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.evaluation.answers import Answers, key_of
from steel_megatron.evaluation.protocol import Protocol, Scoring
from steel_megatron.evaluation.run import Evaluation, evaluate
from steel_megatron.evaluation.scores import Score, macro, micro
from steel_megatron.evaluation.subjects import CATEGORIES
from steel_megatron.evaluation.tasks import load_benchmarks, quiet, read_letter
from steel_megatron.hf.convert import import_hf
from tests.distributed import run_distributed
from tests.evaluation.benchmarks import write_benchmarks, write_model
from tests.layouts.pool import Pool

TASKS = ("ceval-valid_logic", "cmmlu_arts", "mmlu_anatomy", "mmlu_virology", "gsm8k")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Benchmarks, an exported model, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_benchmarks(folder / "data")
    write_model(folder)
    run_distributed(import_hf, 1, folder / "hf", folder / "checkpoint")
    return folder


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Processes that stay for all layouts."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield


def protocol(folder: Path, **changes: Any) -> Protocol:
    settings = {"tasks": TASKS, "data": folder / "data", "num_fewshot": 1, "batch_size": 8, "max_new_tokens": 4}
    return Protocol(**{**settings, **changes})


def by_harness(folder: Path, settings: Protocol) -> dict[str, Any]:
    """The same by the harness alone: its model, its metrics."""
    found = load_benchmarks(
        settings.tasks, settings.data, settings.num_fewshot, settings.scoring, settings.max_new_tokens
    )
    tasks = [task for one in found for task in one.subjects.values()]
    backend = HFLM(
        pretrained=str(folder / "hf"),
        trust_remote_code=True,
        batch_size=settings.batch_size,
        device="cpu",
        dtype="float32",
    )
    with quiet():
        return lm_eval.simple_evaluate(
            backend,
            tasks=tasks,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=settings.chat,
            bootstrap_iters=10,
            log_samples=True,
        )


@pytest.mark.parametrize(("scoring", "chat"), [("letter", False), ("answer", False), ("letter", True)])
@pytest.mark.slow
def test_an_exported_folder_scores_as_in_the_harness(
    folder: Path, scoring: Scoring, chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = protocol(folder, scoring=scoring, chat=chat)
    expected = by_harness(folder, settings)
    answers: dict[tuple[str, str], tuple[float, bool]] = {}
    from steel_megatron.evaluation.language_model import EvaluatedModel

    computed = EvaluatedModel.loglikelihood

    def noting(self: EvaluatedModel, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found = computed(self, requests)
        answers.update(zip([request.args for request in requests], found, strict=True))
        return found

    monkeypatch.setattr(EvaluatedModel, "loglikelihood", noting)
    found = evaluate(folder / "hf", settings)
    for score in found.scores:
        (subject,) = score.subjects.values()
        theirs = expected["results"][score.name]
        for metric, value in subject.items():
            key = metric if "," in metric else f"{metric},none"
            assert value.value == theirs[key], (score.name, metric)
            name, _, kept = key.partition(",")
            assert value.stderr == theirs[f"{name}_stderr,{kept}"]
    compared = 0
    for name, samples in expected["samples"].items():
        for sample in samples if name != "gsm8k" else ():
            for arguments, ((value, greedy),) in zip(sample["arguments"], sample["resps"], strict=True):
                assert answers[tuple(arguments)] == (value, greedy)  # the same bits
                compared += 1
    assert compared == 4 * (3 + 3 + 4 + 4)


def values(found: Evaluation) -> dict[tuple[str, str, str], float]:
    return {
        (one.name, subject, metric): score.value
        for one in found.scores
        for subject, metrics in one.subjects.items()
        for metric, score in metrics.items()
    }


LAYOUTS = {
    "TP2": ParallelConfig(tensor_model_parallel_size=2),
    "PP2": ParallelConfig(pipeline_model_parallel_size=2),
    "DP2": ParallelConfig(),
}


def answers_in(path: Path) -> dict[str, Any]:
    import sqlite3

    with sqlite3.connect(path) as connection:
        return {key: json.loads(answer) for key, answer in connection.execute("SELECT key, answer FROM answers")}


@pytest.mark.slow
def test_a_checkpoint_scores_alike_under_every_layout(folder: Path, tmp_path: Path, pool: Pool) -> None:
    settings = protocol(folder)
    shutil.copytree(folder / "checkpoint", tmp_path / "run" / "checkpoints" / "step_00000000")
    tokenizer = ("huggingface", str(folder / "tokenizer"))
    arguments = (settings, ParallelConfig(), tmp_path / "one.sqlite", tokenizer)
    ((one, _),) = pool.run(evaluated_with, 1, folder / "checkpoint", *arguments)
    exported = values(evaluate(folder / "hf", settings, cache=tmp_path / "hf.sqlite"))
    assert one.keys() == exported.keys()
    expected = answers_in(tmp_path / "one.sqlite")
    assert len(expected) == len(answers_in(tmp_path / "hf.sqlite")) > 50
    for name, layout in LAYOUTS.items():
        arguments = (settings, layout, tmp_path / f"{name}.sqlite", tokenizer)
        ranks = pool.run(evaluated_with, 2, tmp_path / "run", *arguments)
        assert ranks[0] == ranks[1], name
        found = answers_in(tmp_path / f"{name}.sqlite")
        assert found.keys() == expected.keys(), name
        for key, answer in expected.items():
            if isinstance(answer, str):
                assert found[key] == answer
            else:
                assert found[key][0] == pytest.approx(answer[0], abs=1e-4) and found[key][1] == answer[1], name
    # The exported folder is another model by its fingerprint, with the same likelihoods.
    theirs = sorted(answer[0] for answer in answers_in(tmp_path / "hf.sqlite").values() if not isinstance(answer, str))
    ours = sorted(answer[0] for answer in expected.values() if not isinstance(answer, str))
    assert ours == pytest.approx(theirs, abs=1e-4)


def evaluated_with(path: Path, settings: Protocol, parallel: ParallelConfig, cache: Path, tokenizer: Any) -> Any:
    """What a process of a launch finds."""
    found = evaluate(path, settings, parallel, cache=cache, tokenizer=tokenizer)
    return values(found), found.summary["requests"]


@pytest.mark.slow
def test_a_second_run_asks_nothing(folder: Path, tmp_path: Path) -> None:
    settings = protocol(folder)
    first = evaluate(folder / "hf", settings, cache=tmp_path / "answers")
    again = evaluate(folder / "hf", settings, cache=tmp_path / "answers")
    assert values(again) == values(first)
    assert first.summary["requests"]["reused"] == 0 < first.summary["requests"]["computed"]
    assert again.summary["requests"] == {"computed": 0, "reused": first.summary["requests"]["computed"]}
    longer = evaluate(folder / "hf", protocol(folder, num_fewshot=2), cache=tmp_path / "answers")
    assert longer.summary["requests"]["reused"] == 0
    (tmp_path / "no answers").write_text("text")
    with pytest.raises(DataError, match=r"no answers cannot be used: .*; name another one with --cache"):
        evaluate(folder / "hf", settings, cache=tmp_path / "no answers")


@pytest.mark.slow
def test_generated_replies(folder: Path) -> None:
    found = evaluate(folder / "hf", protocol(folder, tasks=["cmmlu_arts"], scoring="generate"))
    (subject,) = found.scores[0].subjects.values()
    assert set(subject) == {"acc", "unread"} and 0 <= subject["acc"].value <= 1 - subject["unread"].value


@pytest.mark.slow
def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(folder / "hf"), "--tasks", "ceval", "--data", str(folder / "data")]
    assert main([*arguments, "--num_fewshot", "1", "--json", str(tmp_path / "scores.json"), "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 or "--- ceval" in out
    text = out[out.index("ceval, in percent") :]
    assert max(map(len, text.splitlines())) <= 80
    assert "以下是中国关于逻辑学的单项选择题，请选出其中的正确答案。\n\n" in out
    assert "答案：\n-> ' A', ' B', ' C', ' D'" in out
    assert "TinyLlama-1.1B" in text and "24.03" in text
    scores = json.loads((tmp_path / "scores.json").read_text())["tasks"]["ceval"]
    subjects = {name: metrics["acc"] for name, metrics in scores["subjects"].items()}
    assert set(subjects) == set().union(*CATEGORIES["ceval"].values())
    mean = sum(one["value"] for one in subjects.values()) / 52
    assert scores["all"]["acc"]["macro"]["value"] == pytest.approx(mean)
    spread = sum(one["stderr"] ** 2 for one in subjects.values()) ** 0.5 / 52
    assert scores["all"]["acc"]["macro"]["stderr"] == pytest.approx(spread)
    hard = [subjects[name]["value"] for name in CATEGORIES["ceval"]["hard"]]
    assert scores["categories"]["hard"]["acc"]["macro"]["value"] == pytest.approx(sum(hard) / 8)
    assert f"{100 * mean:.2f}" in next(line for line in text.splitlines() if line.startswith("mean of subjects"))


def test_keys_of_answers(tmp_path: Path) -> None:
    request = ("context", " A")
    keys = {key_of(*one) for one in (("m", "a", request), ("n", "a", request), ("m", "b", request), ("m", "a", "x"))}
    assert len(keys) == 4 and key_of("m", "a", request) in keys
    answers = {f"key {number}": [number / 3, True] for number in range(1200)}
    for _ in range(2):  # written over by the same
        kept = Answers(tmp_path / "answers")
        kept.write(answers)
        kept.close()
    kept = Answers(tmp_path / "answers")
    assert kept.read([*answers, "other"]) == answers
    kept.close()


def test_means() -> None:
    scores = [Score(0.5, 0.1, 10), Score(1.0, 0.2, 30)]
    assert macro(scores) == Score(0.75, pytest.approx((0.1**2 + 0.2**2) ** 0.5 / 2), 40)
    assert micro(scores) == Score(
        pytest.approx(0.875), pytest.approx(((0.1 * 10) ** 2 + (0.2 * 30) ** 2) ** 0.5 / 40), 40
    )
    assert macro([Score(1.0, None, 1), *scores]).stderr is None


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("（C）因为", "C"),
        ("首先排除A，其次排除B。所以答案是：D。", "D"),
        ("A seems right at first, but the answer is (B).", "B"),
        ("I would go for D here", "D"),
        ("应该选C", "C"),
        ("答案是A？不对，答案是D。", "D"),
        ("它是红色的", "A"),
        ("A或者B", "A"),
        ("either B or C", None),
        ("ABBA", None),
        ("答案是E", None),
        ("", None),
    ],
)
def test_letters_are_read(reply: str, letter: str | None) -> None:
    assert read_letter(reply, ["红色", "绿色", "蓝色", "白色"]) == letter


@pytest.mark.slow
def test_bad_data(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    (data / "ceval" / "val").mkdir(parents=True)
    file = data / "ceval" / "val" / "logic_val.csv"

    def refused(text: str | None, message: str, task: str = "ceval-valid_logic", shots: int = 0) -> None:
        if text is not None:
            file.write_text(text, encoding="utf-8")
        with pytest.raises((DataError, ConfigError), match=message):
            load_benchmarks([task], data, shots)

    head = "id,question,A,B,C,D,answer\n"
    refused(None, r"no split val of subject logic in .*ceval.* expected is a file such as val/logic\.csv")
    refused("id,question,A,B,C,answer\n0,q,1,2,3,A\n", r"logic_val\.csv: column 'D' is missing \(row 1 has: id, ")
    refused(head + "0,q,1,2,3,4,E\n", r"row 1: the answer 'E' is not among the choices \['A', 'B', 'C', 'D'\]")
    refused(head + "0,q,1,2,3,4,A\n1,q,1,2,3,4\n", r"row 2 has 6 values for 7 columns")
    refused(head, "has no rows")
    refused('"', "cannot be read: ")
    refused(head + "0,q,1,2,3,4,A\n", "no split dev of subject logic", shots=1)
    file.with_suffix(".jsonl").write_text("{}\n")
    refused(None, "has several files for the split val of logic")
    refused(None, "there is no task 'cevall' in lm-eval's definitions; did you mean ceval", task="cevall")
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        load_benchmarks(["ceval"], tmp_path / "nowhere", 0)
    assert main(["evaluate", str(folder / "hf"), "--tasks", "cmmlu", "--data", str(folder / "data")]) == 2
    assert "no split test of subject agronomy" in capsys.readouterr().err
