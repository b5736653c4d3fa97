"""The harness's own task definitions, with data from local files and one of three ways to score multiple choice."""

from __future__ import annotations

import ast
import difflib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from steel_megatron.errors import ConfigError, DataError
from steel_megatron.evaluation.contamination import Item
from steel_megatron.evaluation.local_data import LETTERS, Row, find_split, read_rows
from steel_megatron.evaluation.protocol import Scoring, check_request

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the libraries are imported that read them
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import jinja2.meta
import lm_eval
from datasets import Dataset
from lm_eval.api import task as harness_task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import apply_template
from lm_eval.utils import env as templates

_NAMES = {"ceval": "ceval-valid"}
"""Benchmarks whose group has another name in the harness."""
_FOLDERS = {"ceval": ("ceval-exam",)}
_ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
_READERS = (
    r"(?:答案|选项|选择|应选|故选|选)\s*(?:应该|应)?\s*(?:是|为)?\s*[:：]?\s*[(（【\[]?\s*({letter})",
    r"(?i:answer|option|choice)\s*(?i:is)?\s*:?\s*[(\[]?\s*({letter})",
)
_OPTION_LINE = re.compile(r"[A-J]\. ?\{\{.*\}\}$")


@dataclass(frozen=True)
class Benchmark:
    """One of the tasks that were asked for.

    Attributes:
        name: as it was asked for.
        subjects: the harness's tasks by their names there, one per subject.
        categories: the harness's own groups of them by name, for benchmarks that have such.
    """

    name: str
    subjects: dict[str, Any]
    categories: dict[str, list[str]]

    def items(self) -> Iterator[Item]:
        """The questions and the texts of the right answers, of a benchmark that was loaded with scoring ``answer``."""
        for name, task in self.subjects.items():
            columns = sorted(_columns({"doc_to_text": task.config.doc_to_text}))
            for number, row in enumerate(task.eval_docs, start=1):
                question = " ".join(str(row[column]) for column in columns) if columns else task.doc_to_text(row)
                answer = task.doc_to_target(row)
                if task.config.doc_to_choice is not None and isinstance(answer, int):
                    answer = task.doc_to_choice(row)[answer]
                yield Item(name, number, str(question), str(answer))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's progress bars, and with its errors alone in the log."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with patch.object(harness_task, "tqdm", lambda items, **_: items):
            yield
    finally:
        log.setLevel(level)


def load_benchmarks(
    names: Sequence[str], data: Path, num_fewshot: int | None, scoring: Scoring = "letter", max_new_tokens: int = 256
) -> list[Benchmark]:
    """The tasks of some names, with their data read and checked.

    Args:
        names: benchmarks (``ceval``, ``cmmlu``, ``mmlu``, ``gsm8k``), or any task or group of the harness whose name
            begins with that of its folder there; ``FOLDER/NAME`` for the others.
        data: folder with the benchmarks, each in a folder of its name.
        num_fewshot: examples before each question; None for the task's own number.
        scoring: how multiple choice is scored.
        max_new_tokens: of a generated reply, where the task names no number.

    Raises:
        ConfigError: there is no such task, or it cannot be scored so.
        DataError: its data are not there, or wrong.
    """
    check_request(names, data, num_fewshot, scoring)
    with quiet():
        return [_load(name, data, num_fewshot, scoring, max_new_tokens) for name in names]


def _load(name: str, data: Path, num_fewshot: int | None, scoring: Scoring, max_new_tokens: int) -> Benchmark:
    folder, index = _index_of(name)
    wanted = _NAMES.get(name, name.rpartition("/")[2])
    subjects, categories = _members(index, wanted)
    roots = [data / one for one in (name, folder, *_FOLDERS.get(folder, ()))]
    roots = [root for one in dict.fromkeys([*roots, data]) for root in (one, one / "data") if root.is_dir()]
    tasks = {}
    for subject in subjects:
        config = load_yaml(index[subject].yaml_path, resolve_func=True)
        tasks[subject] = _task(dict(config), roots, num_fewshot, scoring, max_new_tokens)
    return Benchmark(name, tasks, categories)


def _index_of(name: str) -> tuple[str, Mapping[str, Any]]:
    """The harness's folder of a task, and the definitions in it by name."""
    root = Path(lm_eval.__file__).parent / "tasks"
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("_"))
    first, _, _ = name.partition("/")
    near = [folder for folder in folders if name.startswith(folder) or folder == first]
    if near:
        folder = max(near, key=len)
        index = TaskManager(include_defaults=False, include_path=str(root / folder)).task_index
        if _NAMES.get(name, name.rpartition("/")[2]) in index:
            return folder, index
        folders += [*index]
    close = difflib.get_close_matches(name, folders, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ConfigError(f"there is no task {name!r} in lm-eval's definitions{hint}")


def _members(index: Mapping[str, Any], name: str) -> tuple[list[str], dict[str, list[str]]]:
    """The names of the tasks that a task, group or tag stands for, and the groups directly below it."""
    entry = index.get(name)
    if entry is None:
        return [], {}
    if entry.yaml_path is None:  # a tag
        return sorted(entry.tags), {}
    if "group" not in entry.cfg:
        return [name], {}
    members: list[str] = []
    categories = {}
    for one in entry.cfg["task"]:
        if not isinstance(one, str):
            raise ConfigError(f"the group {name} of lm-eval defines tasks within itself; name its tasks one by one")
        found, _ = _members(index, one)
        if found != [one]:
            categories[one.removeprefix(f"{name}_").replace("_", " ")] = found
        members += found
    return list(dict.fromkeys(members)), categories


def _columns(config: Mapping[str, Any]) -> set[str]:
    """The columns that a task's templates read."""
    columns: set[str] = set()
    for field in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        template = config.get(field)
        if isinstance(template, str) and "{" in template:
            columns |= jinja2.meta.find_undeclared_variables(templates.parse(template))
        elif isinstance(template, str) and template.isidentifier():
            columns.add(template)
    return columns


def _task(config: dict[str, Any], roots: list[Path], num_fewshot: int | None, scoring: Scoring, tokens: int) -> Any:
    """A task of the harness with its local data."""
    shots = config.get("num_fewshot") or 0 if num_fewshot is None else num_fewshot
    asked, examples = config.get("test_split") or config.get("validation_split"), config.get("fewshot_split")
    written = (config.get("fewshot_config") or {}).get("samples")  # examples in the definition itself
    if not shots or written:
        examples = None
    if asked is None or (shots and not written and examples is None):
        raise ConfigError(f"task {config['task']} names no split of questions or of examples; it cannot be read")
    rows, files = {}, {}
    for split in sorted({asked, examples} if examples else {asked}):
        files[split] = find_split(roots, config.get("dataset_name"), split)
        rows[split] = read_rows(files[split], _columns(config))
        for number, row in enumerate(rows[split], start=1):
            _check_answer(config, row, f"{files[split][0]}: row {number}")
    if examples and shots > len(rows[examples]):
        raise DataError(f"{files[examples][0]} has {len(rows[examples])} examples; --num_fewshot is {shots}")
    config = _scored(config, scoring, tokens)
    config = {name: value for name, value in config.items() if name not in ("training_split", "validation_split")} | {
        "test_split": asked,
        "fewshot_split": examples,
        "num_fewshot": shots,
        "dataset_kwargs": None,
        "custom_dataset": lambda **_: {split: Dataset.from_list(found) for split, found in rows.items()},
    }
    task = harness_task.ConfigurableTask(config=config)
    task.set_fewshot_seed(seed=1234)
    return task


def _check_answer(config: Mapping[str, Any], row: Row, place: str) -> None:
    """Raise a DataError where the answer is not among the choices, or where there is none."""
    target, choices = config.get("doc_to_target"), config.get("doc_to_choice")
    if not isinstance(target, str):
        return
    answer = next((row[name] for name in ("answer", "Answer", "label", "gold", "target") if name in row), None)
    try:
        value = row[target] if target in row else apply_template(target, row)
        if isinstance(choices, str):
            choices = row[choices] if choices in row else ast.literal_eval(apply_template(choices, row))
        number = int(value) if str(value).isdigit() and choices is not None else value
        fits = number != "" if choices is None else number in range(len(choices)) or number in choices
    except (ValueError, TypeError, IndexError, SyntaxError, jinja2.TemplateError):
        fits = False
    if not fits:
        listed = f"among the choices {list(choices)}" if choices else "given"
        raise DataError(f"{place}: the answer {answer!r} is not {listed}")


def _scored(config: dict[str, Any], scoring: Scoring, max_new_tokens: int) -> dict[str, Any]:
    """A task that is scored in another way than by letters, where it is a multiple choice by letters."""
    if config.get("output_type") == "generate_until":
        return {
            **config,
            "generation_kwargs": {"max_gen_toks": max_new_tokens, **(config.get("generation_kwargs") or {})},
        }
    if scoring == "letter" or config.get("output_type") != "multiple_choice":
        return config
    template, given = config["doc_to_text"], config.get("doc_to_choice")
    letters: list[str] = given if isinstance(given, list) else []
    options = [line for line in str(template).split("\n") if _OPTION_LINE.match(line)]
    if scoring == "answer" and not options:
        return config  # its choices are the answers' texts
    if not letters or letters != [*LETTERS[: len(letters)]] or len(options) != len(letters):
        raise ConfigError(
            f"scoring is {scoring}, but {config['task']} has no list of options by letters; use the scoring 'letter'"
        )
    lists = "choices" in _columns(config)
    texts = "{{choices}}" if lists else "{{[" + ", ".join(letters) + "]}}"
    if scoring == "answer":
        asked = "\n".join(line for line in template.split("\n") if not _OPTION_LINE.match(line))
        metrics = [_ACCURACY, {**_ACCURACY, "metric": "acc_norm"}]
        return {**config, "doc_to_text": asked, "doc_to_choice": texts, "metric_list": metrics}
    right = partial(_right_letter, config["doc_to_target"])

    def judge(row: Row, replies: Sequence[str]) -> dict[str, float]:
        choices = row["choices"] if lists else [row[letter] for letter in letters]
        letter = read_letter(replies[0], choices)
        return {"acc": float(letter == right(row)), "unread": float(letter is None)}

    return {name: value for name, value in config.items() if name != "doc_to_choice"} | {
        "output_type": "generate_until",
        "doc_to_target": right,
        "process_results": judge,
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": max_new_tokens, "do_sample": False},
        "metric_list": [_ACCURACY, {**_ACCURACY, "metric": "unread", "higher_is_better": False}],
    }


def _right_letter(target: str, row: Row) -> str:
    value = row[target] if target in row else apply_template(target, row)
    return LETTERS[int(value)] if str(value).isdigit() else str(value)


def read_letter(reply: str, choices: Sequence[str]) -> str | None:
    """The letter that a reply decides for: the last one that it calls its answer, else the one that it begins with, the
    only one that it names, or that of the only option that it repeats.

    Args:
        reply: what a model wrote.
        choices: the texts of the options.

    Returns:
        A letter of one of the options; None if the reply cannot be read.
    """
    letters = LETTERS[: len(choices)]
    letter = rf"[{letters}](?![A-Za-z])"
    readers: list[Callable[[], list[str]]] = [
        lambda: [found[1] for one in _READERS for found in re.finditer(one.format(letter=letter), reply)][-1:],
        lambda: re.findall(rf"^\s*[(（【\[]?({letter})", reply),
        lambda: sorted(set(re.findall(rf"(?<![A-Za-z]){letter}", reply))),
        lambda: [name for name, text in zip(letters, choices, strict=True) if str(text) and str(text) in reply],
    ]
    for read in readers:
        found = read()
        if len(found) == 1:
            return found[0]
    return None
