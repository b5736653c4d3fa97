"""Corpora that were moved: found by content, refused where it is another, and relocated by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from steel_megatron.cli import main
from steel_megatron.data.ledger.ledger import Ledger, OpenCorpora
from steel_megatron.data.ledger.locations import found
from steel_megatron.errors import DataError
from steel_megatron.files import exclusive_lock
from tests.data.corpora import write, write_megatron

DOCUMENTS = [list(range(20))] * 5
OTHERS = [list(range(1, 21))] * 5
PATH = Path("runs/a/ledger.json")
Logged = Callable[[], str]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder, in which one works, with the corpora data/zh and data/en."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    write(folder / "data" / "zh", DOCUMENTS)
    write(folder / "data" / "en", OTHERS)
    monkeypatch.chdir(folder)
    return folder


def create(*prefixes: str, path: Path = PATH) -> None:
    assert main(["data", "create", str(path), *prefixes, "--sequence_length", "10"]) == 0


def prefixes(path: Path = PATH) -> list[str]:
    return [corpus.prefix for corpus in Ledger.load(path).history.corpora]


def move(prefix: str, new: str) -> str:
    """Move a corpus' files."""
    Path(new).parent.mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(prefix).parent.glob(Path(prefix).name + ".*")):
        shutil.move(path, Path(new).with_name(Path(new).name + path.name.removeprefix(Path(prefix).name)))
    return new


def taken(*named: str, path: Path = PATH) -> list[str]:
    """The records of a ledger after its corpora were looked for and opened."""
    ledger = Ledger.load(path).then(found, path, named)
    OpenCorpora(ledger)
    return [corpus.prefix for corpus in ledger.history.corpora]


def test_paths_are_recorded_as_they_were_given(project: Path, tmp_path: Path) -> None:
    create("data/zh", str(project / "data/en"))
    assert prefixes() == ["../../data/zh", f"{project}/data/en"] == taken()
    (tmp_path / "scratch/deep").mkdir(parents=True)
    Path("runs/linked").symlink_to(tmp_path / "scratch/deep")  # from which .. leads to scratch
    create("data/zh", path=Path("runs/linked/ledger.json"))
    assert prefixes(Path("runs/linked/ledger.json")) == [f"{project}/data/zh"]


@pytest.mark.parametrize("given", ["data/zh", "{project}/data/zh"])
def test_a_project_moves_as_a_whole(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    create(given.format(project=project))
    new = tmp_path / "elsewhere" / "copy"
    shutil.copytree(project, new)
    shutil.rmtree(project)
    monkeypatch.chdir(new)
    assert taken() == ["../../data/zh"]
    moved = [line for line in capsys.readouterr().err.splitlines() if "was moved" in line]
    if given == "data/zh":
        assert not moved  # nothing is absolute
    else:
        assert moved == [f"corpus zh was moved: it is read from data/zh, the ledger had {project}/data/zh"]
    assert main(["data", "show", str(PATH), "--step", "1", "--global_batch_size", "2"]) == 0
    write(new / "extra", DOCUMENTS[:1])
    assert main(["data", "append", str(PATH), "extra", "--drop_duplicates", "true"]) == 2  # compared: all are known


@pytest.mark.parametrize("name", ["zh", "renamed"])
def test_a_corpus_is_found_where_the_settings_say(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    create("data/zh", "data/en")
    new = move("data/zh", str(tmp_path / "disk" / name))
    move("data/en", str(tmp_path / "disk" / "en"))
    assert taken(new) == [new, f"{tmp_path}/disk/en"]  # beside the one that is named
    assert f"corpus zh was moved: it is read from {new}, the ledger had {project}/data/zh" in capsys.readouterr().err


def test_another_corpus_is_refused_with_both(project: Path, tmp_path: Path) -> None:
    create("data/zh")
    content = Ledger.load(PATH).history.corpora[0].content
    other = str(tmp_path / "disk" / "zh")
    (tmp_path / "disk").mkdir()
    write(Path(other), OTHERS)
    theirs = json.loads(Path(f"{other}.json").read_text())["content"]
    place = move("data/zh", str(tmp_path / "far" / "away"))
    with pytest.raises(DataError) as caught:
        taken(other)
    message = str(caught.value)
    assert f"corpus zh is not at {project}/data/zh" in message and f"data relocate {PATH} " in message
    assert f"{other} is another corpus ({theirs}, recorded is {content})" in message
    # At the recorded place as well: the right one is taken where it is found, and otherwise nothing is.
    write(Path("data/zh"), OTHERS)
    with pytest.raises(DataError, match=f"has changed since it was added to the ledger: content of .* {content}"):
        taken(other)
    assert taken(other, place) == [place]


def test_without_a_manifest_the_tokens_are_compared(project: Path, tmp_path: Path) -> None:
    """Megatron's corpora have none: equal counts are not enough."""
    for folder, documents in (("data", DOCUMENTS), ("far", OTHERS), ("away", DOCUMENTS)):
        (tmp_path / folder).mkdir(exist_ok=True)
        write_megatron(tmp_path / folder / "plain", [[document] for document in documents])
    create(str(tmp_path / "data" / "plain"))
    move(str(tmp_path / "data" / "plain"), str(tmp_path / "gone" / "plain2"))
    with pytest.raises(DataError, match=r"far/plain is another corpus \([0-9a-f]{64}, recorded"):
        taken(str(tmp_path / "far" / "plain"))
    away = str(tmp_path / "away" / "plain")
    assert taken(str(tmp_path / "far" / "plain"), away) == [away]


def test_relocate(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create("data/zh", str(project / "data/en"), "--names", "zh", "en")
    before = PATH.read_bytes()
    other = str(tmp_path / "other")
    relocate = ["data", "relocate", str(PATH)]

    def refused(message: str, *words: str) -> None:
        assert main([*relocate, *words]) == 2 and PATH.read_bytes() == before
        assert message in capsys.readouterr().err

    refused("no corpus of runs/a/ledger.json is moved from data/z to", "data/z", other)  # whole names only
    refused("cannot read", "data", other)
    (tmp_path / "other").mkdir()
    for name in ("zh", "en"):
        write(tmp_path / "other" / name, DOCUMENTS)
    refused(f"{other}/en is not corpus en: it is", "data", other)  # zh would do; nothing is written
    write(tmp_path / "other" / "en", OTHERS, overwrite=True)
    tokens = bytearray((tmp_path / "other" / "en.bin").read_bytes())
    tokens[0] ^= 1
    (tmp_path / "other" / "en.bin").write_bytes(tokens)
    refused("has changed since it was written", "data", other)  # the manifest alone does not tell
    write(tmp_path / "other" / "en", OTHERS, overwrite=True)
    with exclusive_lock(PATH.parent / "run", DataError):
        refused("a live run reads by runs/a/ledger.json; stop it", "data", other)
    assert main([*relocate, str(project / "data"), "../other"]) == 0
    assert prefixes() == ["../../../other/zh", "../../../other/en"]
    assert main([*relocate, "../../../other/zh", str(project / "data/zh")]) == 0  # as the ledger has it
    assert prefixes() == [f"{project}/data/zh", "../../../other/en"] == taken()


def test_a_removed_corpus_may_be_gone(project: Path, tmp_path: Path) -> None:
    create("data/zh", "data/en")
    assert main(["data", "remove", str(PATH), "en", "--at", "0"]) == 0
    move("data/zh", "disk/zh")
    for path in Path("data").glob("en.*"):
        path.unlink()
    assert taken("disk/zh") == ["../../disk/zh", "../../data/en"]
    assert main(["data", "relocate", str(PATH), "data", "disk"]) == 0
    assert prefixes() == ["../../disk/zh", "../../data/en"]


def test_settings_may_name_the_old_place(project: Path) -> None:
    """Once a ledger was relocated, the settings' file need not be changed as well."""
    create("data/zh")
    move("data/zh", "disk/zh")
    assert main(["data", "relocate", str(PATH), "data", "disk"]) == 0
    Ledger.load(PATH).check_began_with(["data/zh"])
    with pytest.raises(DataError, match=r"cannot read .*data/other.idx"):
        Ledger.load(PATH).check_began_with(["data/other"])
