"""The ledger commands: data create, append, remove, reweight, mixture, cancel, relocate, skip, show."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steel_megatron.config import TokenizerKind
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.log import get_logger
from steel_megatron.streams import say

if TYPE_CHECKING:
    from steel_megatron.data.ledger.history import History
    from steel_megatron.data.ledger.ledger import Ledger
    from steel_megatron.data.ledger.loader import DocumentSpan

logger = get_logger(__name__)

_SHOWN = 160
"""Characters shown per document."""


def create(
    ledger: str,
    prefixes: list[str],
    sequence_length: int,
    seed: int = 1234,
    names: list[str] = [],  # noqa: B006 (read by the parser, never changed)
    domain: str = "default",
    epochs: float | None = None,
) -> None:
    """Create a ledger before its run starts: in the run's folder, or where data.ledger names it.

    A run that names its corpora in data.train creates its own ledger.

    Args:
        ledger: file to create, such as runs/first/ledger.json.
        prefixes: indexed corpora, without .bin or .idx.
        sequence_length: the model's sequence length: tokens that a sample predicts.
        seed: random seed of the sample order.
        names: one name per corpus; default: the last parts of their paths.
        domain: domain of all these corpora, as mixtures name it.
        epochs: epochs over each corpus in the whole run, such as 1 or 2.5; default: unlimited.
    """
    from steel_megatron.data.ledger.ledger import Ledger, edit

    path = Path(ledger)
    if path.exists():
        raise DataError(f"{path} exists already; append to it (steel-megatron data append), or choose another name")
    named = {"names": names or None, "domain": domain, "epochs": epochs}
    made = Ledger.create(prefixes, sequence_length, seed, path.parent, **named)
    with edit(path, made) as file:
        if file.ledger != made:
            raise DataError(f"{path} was just created by another process; append to it (steel-megatron data append)")
    say(_summary(path, made))


def append(
    ledger: str,
    prefixes: list[str],
    names: list[str] = [],  # noqa: B006 (read by the parser, never changed)
    domain: str = "default",
    epochs: float | None = 1.0,
    at: int | None = None,
    on_duplicate: Literal["stop", "skip"] = "stop",
    drop_duplicates: bool = False,
    mixture: list[str] = [],  # noqa: B006 (read by the parser, never changed)
    stopped: bool = False,
) -> None:
    """Add corpora; from the run's next checkpoint, they are mixed with everything it has not read.

    Args:
        ledger: the run's ledger.json.
        prefixes: indexed corpora, without .bin or .idx.
        names: one name per corpus; default: the last parts of their paths.
        domain: domain of all these corpora, as mixtures name it.
        epochs: epochs over each corpus in the whole run, such as 1 or 2.5; null for unlimited.
        at: sample at which they enter; default: the run's next checkpoint, or where it resumes.
        on_duplicate: stop if a corpus is already in the ledger, or skip it.
        drop_duplicates: drop documents that exactly equal one already in the ledger.
        mixture: weights from then on, such as zh=0.8 en=0.2; default: unchanged.
        stopped: no longer needed: a live run holds a lock, and a killed one does not.
    """
    from steel_megatron.data.ledger.ledger import Ledger, edit

    path, weights = Path(ledger), _weights(mixture) if mixture else None
    while True:
        # What may take hours is done without the lock: others may change the ledger, and a run may start.
        current = _released(path, Ledger.load(path), stopped)
        if drop_duplicates:  # documents are compared with those of the ledger's corpora
            current = _found(path, current)
        pending = current.prepare(prefixes, names or None, domain, on_duplicate, drop_duplicates)
        with edit(path) as file:
            current = _released(path, file.ledger)
            if current.up_to_date(pending):
                file.ledger = current.append_prepared(pending, epochs, at, weights)
                added = file.ledger.history.used - current.history.used
                corpora = file.ledger.history.corpora
                _tell_of_weight_zero(file.ledger.history, {corpora[number].name for number in added})
                break
        logger.info(f"{path} changed while documents were compared; comparing again")
    say(_summary(path, file.ledger))


def remove(ledger: str, names: list[str], at: int | None = None, stopped: bool = False) -> None:
    """Remove corpora from the run for good.

    Args:
        ledger: the run's ledger.json.
        names: corpora, by their names in the ledger.
        at: sample at which they leave; default: the run's next checkpoint, or where it resumes.
        stopped: no longer needed: a live run holds a lock, and a killed one does not.
    """
    from steel_megatron.data.ledger import changes

    _change(ledger, stopped, lambda old: changes.remove(old, names, at))


def reweight(ledger: str, names: list[str], epochs: float | None, at: int | None = None, stopped: bool = False) -> None:
    """Change the number of epochs over corpora in the whole run; epochs already read count.

    Args:
        ledger: the run's ledger.json.
        names: corpora, by their names in the ledger.
        epochs: such as 1 or 2.5; null for unlimited.
        at: sample at which it takes effect; default: the run's next checkpoint, or where it resumes.
        stopped: no longer needed: a live run holds a lock, and a killed one does not.
    """
    from steel_megatron.data.ledger import changes

    history = _change(ledger, stopped, lambda old: changes.reweight(old, dict.fromkeys(names, epochs), at))
    _tell_of_weight_zero(history, names)


def mixture(ledger: str, weights: list[str], at: int | None = None, stopped: bool = False) -> None:
    """Set the mixture of domains, such as zh=0.8 en=0.2 code=0; several with --at make a curriculum.

    Args:
        ledger: the run's ledger.json.
        weights: DOMAIN=WEIGHT for each domain, 0 to pause it; or the word none, to read corpora by size.
        at: sample at which they take effect; default: the run's next checkpoint, or where it resumes.
        stopped: no longer needed: a live run holds a lock, and a killed one does not.
    """
    from steel_megatron.data.ledger import changes

    chosen = None if weights == ["none"] else _weights(weights)
    _change(ledger, stopped, lambda old: changes.set_mixture(old, chosen, at))


def cancel(ledger: str, at: int | None = None, stopped: bool = False) -> None:
    """Cancel pending changes, or changes planned for a sample that the run has not read.

    Args:
        ledger: the run's ledger.json.
        at: sample that the change is planned for; default: the pending changes.
        stopped: no longer needed: a live run holds a lock, and a killed one does not.
    """
    from steel_megatron.data.ledger import changes

    _change(ledger, stopped, lambda old: changes.cancel(old, at))


def relocate(ledger: str, old: str, new: str) -> None:
    """Record that corpora were moved, after reading them at their new place and comparing their content.

    Needed only where a run does not find them by itself: by data.train, or around the ledger's folder.

    Args:
        ledger: the run's ledger.json.
        old: prefix of a corpus, or folder of several, as it was.
        new: the same as it is now.
    """
    from steel_megatron.data.ledger.ledger import Ledger, edit, run_is_live
    from steel_megatron.data.ledger.locations import relocated

    path = Path(ledger)

    def refuse_live() -> None:
        if run_is_live(path):
            raise DataError(f"a live run reads by {path}; stop it before its corpora are moved")

    refuse_live()
    while True:
        # Reading the corpora may take hours, and is done without the lock.
        before = Ledger.load(path)
        changed = before.then(relocated, path, old, new)
        with edit(path) as file:
            refuse_live()
            if file.ledger == before:
                file.ledger = changed
                break
        logger.info(f"{path} changed while corpora were read; reading again")
    say(_summary(path, changed))


def skip(ledger: str, samples: str, undo: bool = False) -> None:
    """Leave samples out, such as those of a step that ends the run: they keep their places, but are not read.

    Args:
        ledger: the run's ledger.json.
        samples: FIRST:END, the numbers of the first sample and of the one after the last, such as 512:520.
        undo: read them after all.
    """
    from steel_megatron.data.ledger import changes

    first, colon, end = samples.partition(":")
    if not colon or not (first.isdecimal() and end.isdecimal()):
        raise ConfigError(f"samples is {samples!r}; it must be FIRST:END, such as 512:520")
    change = changes.read_again if undo else changes.skip
    _change(ledger, False, lambda old: change(old, int(first), int(end)))


def _weights(words: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for word in words:
        domain, equals, weight = word.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = -1.0
        if not equals or not domain or domain in found or not 0 <= value < float("inf"):
            raise ConfigError(f"weight {word!r} is not DOMAIN=WEIGHT with a number of at least 0, each domain once")
        found[domain] = value
    return found


def _found(path: Path, ledger: Ledger) -> Ledger:
    """The ledger with the places where its corpora lie now; those that the run's settings name are looked up."""
    from steel_megatron.data.ledger.locations import found

    data = _run_settings(path)["data"]
    train, validation = data.get("train"), data.get("validation")
    lists = [train, *(validation.values() if isinstance(validation, dict) else [validation])]
    named = [prefix for one in lists if isinstance(one, list) for prefix in one if isinstance(prefix, str)]
    return ledger.then(found, path, named)


def _released(path: Path, ledger: Ledger, stopped: bool = False) -> Ledger:
    """The ledger that a command changes; what a killed run was still to read may be changed."""
    from steel_megatron.data.ledger.changes import released
    from steel_megatron.data.ledger.ledger import run_is_live

    if stopped:
        logger.info("--stopped is no longer needed: the lock of a run tells whether it is live")
    return ledger if run_is_live(path) else ledger.then(released)


def _tell_of_weight_zero(history: History, names: Collection[str]) -> None:
    """Warn of corpora that are to be read for some epochs, while the last mixture gives their domain the weight 0."""
    from steel_megatron.data.ledger.records import Unchanged

    events = sorted(history.events, key=lambda event: event.start(history.next_sync_sample))
    mixtures = [event.mixture for event in events if not isinstance(event.mixture, Unchanged)]
    weights = mixtures[-1] if mixtures else None
    for corpus in history.corpora:
        if corpus.name in names and weights is not None and weights.get(corpus.domain) == 0:
            logger.warning(
                f"{corpus.name} is not read, whatever its epochs: the mixture gives its domain {corpus.domain} the "
                "weight 0; change it with steel-megatron data mixture"
            )


def _change(path: str, stopped: bool, change: Callable[[History], History]) -> History:
    from steel_megatron.data.ledger.ledger import edit

    with edit(path) as file:
        file.ledger = _released(Path(path), file.ledger, stopped).then(change)
    say(_summary(Path(path), file.ledger))
    return file.ledger.history


def _summary(path: Path, ledger: Ledger) -> str:
    """Each corpus with its progress at the last sync, and all changes with their position."""
    from steel_megatron.data.ledger.ledger import run_is_live
    from steel_megatron.data.ledger.records import in_words

    history = ledger.history
    synced = history.last_synced_sample
    lines = [f"{path}: samples of {history.sequence_length:,} tokens, seed {history.seed}, run at {synced:,}"]
    if history.next_sync_sample > synced and run_is_live(path):
        lines[0] += f", next sync at {history.next_sync_sample:,}"
    seen = history.schedule.consumed(synced)
    for number in sorted(history.used):
        corpus, samples = history.corpora[number], history.samples(number)
        dropped = f", {corpus.dropped.documents:,} documents dropped" if corpus.dropped else ""
        lines.append(
            f"  {corpus.name} ({corpus.domain}): {samples:,} samples, {corpus.documents:,} documents{dropped}, "
            f"read {int(seen[number]) / samples:.2f} times"
        )
    for event in sorted(history.events, key=lambda event: event.start(history.next_sync_sample)):
        at = "the next checkpoint, or from where the run resumes" if event.at is None else f"sample {event.at:,}"
        lines.append(f"  from {at}: {in_words(event, history.corpora)}")
    for part in history.skipped:
        lines.append(f"  skipped: samples {part.first:,} to {part.end - 1:,}")
    capacity = history.schedule.capacity()
    lines.append(f"  samples in all: {'unlimited' if capacity == float('inf') else f'{capacity:,}'}")
    return "\n".join(lines)


def show(
    ledger: str,
    step: int | None = None,
    sample: int | None = None,
    global_batch_size: int | None = None,
    tokenizer_path: str | None = None,
    tokenizer_kind: TokenizerKind = "huggingface",
    json_output: bool = False,
) -> None:
    """Show a ledger, or with --step the documents of an optimizer step: file, row, text.

    Args:
        ledger: the run's ledger.json.
        step: optimizer step, from 1.
        sample: a single sample, from 0, instead of a step.
        global_batch_size: samples per step; default: as recorded in the ledger, or in run.yaml for older ledgers.
        tokenizer_path: tokenizer to decode text; default: that of the run.yaml in the ledger's folder.
        tokenizer_kind: kind of the tokenizer.
        json_output: print one JSON object per document span, with its token ids.
    """
    import dataclasses
    import json

    from steel_megatron.data.ledger.ledger import Ledger
    from steel_megatron.data.ledger.loader import LedgerSamples
    from steel_megatron.data.tokenizing.tokenizer import find_tokenizer, load_tokenizer

    path = Path(ledger)
    loaded = Ledger.load(path)
    if step is None and sample is None:
        sys.stdout.write(_summary(path, loaded) + "\n")
        return
    settings = _run_settings(path)
    numbers = loaded.history.step_samples(step) if step is not None and step > 0 and sample is None else None
    if numbers is None or global_batch_size is not None:
        numbers = _numbers(path, step, sample, global_batch_size or settings["training"].get("global_batch_size"))
    data = settings["data"]
    tokenizer, named, kind = None, data.get("tokenizer_path"), data.get("tokenizer_kind")
    if tokenizer_path is not None:
        tokenizer = load_tokenizer(tokenizer_kind, tokenizer_path)
    elif isinstance(named, str) and isinstance(kind, str):
        tokenizer = find_tokenizer(kind, named, path.parent, loaded.history.tokenizer)  # type: ignore[arg-type]
    samples = LedgerSamples(_found(path, loaded), cache=path.with_suffix(".cache"))
    for number in numbers:
        for span in samples.documents(number):
            text = tokenizer.decode(span.ids) if tokenizer else " ".join(map(str, span.ids))
            if json_output:
                facts = {"sample": number, **dataclasses.asdict(span), "text": text}
                sys.stdout.write(json.dumps(facts, ensure_ascii=False) + "\n")
            else:
                sys.stdout.write(_shown(number, span, text))


def _numbers(path: Path, step: int | None, sample: int | None, global_batch_size: int | None) -> range:
    """The samples to show."""
    if step is not None and sample is not None:
        raise ConfigError(f"step is {step} and sample is {sample}; give only one")
    if sample is not None:
        numbers = range(sample, sample + 1)
    elif global_batch_size is None:
        raise ConfigError(f"no run.yaml next to {path} gives the samples per step; give --global_batch_size")
    else:
        assert step is not None
        numbers = range((step - 1) * global_batch_size, step * global_batch_size)
    if numbers.start < 0 or not numbers:
        raise ConfigError(
            f"step is {step}, sample {sample}, global_batch_size {global_batch_size}; steps count from 1, samples "
            "from 0"
        )
    return numbers


def _shown(number: int, span: DocumentSpan, text: str) -> str:
    at = f"{span.origin.path}, row {span.origin.row}" if span.origin else "source file not recorded"
    last = span.offset + len(span.ids)
    shown = text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
    place = f"{span.corpus}, document {span.document}, tokens {span.offset} to {last}"
    return f"sample {number}: {place} ({at})\n  {shown!r}\n"


def _run_settings(ledger: Path) -> dict[str, dict[str, Any]]:
    """Sections ``data`` and ``training`` of the run.yaml in the ledger's folder; empty if there is none."""
    import yaml

    path = ledger.parent / "run.yaml"
    found: object = {}
    if path.exists():
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
    sections = found if isinstance(found, dict) else {}
    return {name: section if isinstance(section := sections.get(name), dict) else {} for name in ("data", "training")}
