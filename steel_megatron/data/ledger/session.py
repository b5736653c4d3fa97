"""The ledger of a run: begun with its first corpora, held against its settings, looked at again while the run goes on,
and what one of its steps read.

A run looks at its ledger's file when it starts or resumes, and before each checkpoint. What has come by then holds from
that sample on. Until which sample it will not look again is written into the file (``reserved``), so that no command
changes what is read meanwhile.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from steel_megatron.config import RunConfig
from steel_megatron.data.indexed.dataset import Origin
from steel_megatron.data.ledger.ledger import LOOK_SECONDS, Ledger, edit
from steel_megatron.data.ledger.loader import LedgerSamples
from steel_megatron.data.ledger.records import in_words
from steel_megatron.data.sampling.packing import remove_caches
from steel_megatron.errors import CheckpointError, ConfigError, DataError
from steel_megatron.log import get_logger

logger = get_logger(__name__)


def names_of(prefixes: Sequence[str]) -> list[str]:
    """Names for corpora: the last parts of their paths, or the whole paths of those that would have the same."""
    counts = Counter(Path(prefix).name for prefix in prefixes)
    return [Path(prefix).name if counts[Path(prefix).name] == 1 else str(prefix) for prefix in prefixes]


def new_ledger(
    folder: Path,
    prefixes: Sequence[str],
    sequence_length: int,
    seed: int,
    names: Sequence[str] | None = None,
    domain: str = "default",
    epochs: float | None = None,
) -> Ledger:
    """A ledger that begins with some corpora.

    Args:
        folder: where it will be.
        prefixes: paths without a suffix; each once.
        sequence_length: tokens that a sample predicts.
        seed: of all orders.
        names: one for each; by default as :func:`names_of`.
        domain: of all of them.
        epochs: how often each is read; None for without end.

    Raises:
        ConfigError: the length or the seed is out of range.
        DataError: a corpus cannot be used.
    """
    if not (1 <= sequence_length <= 2**31 and 0 <= seed < 2**63):
        raise ConfigError(
            f"sequence_length is {sequence_length} and seed {seed}; they must be from 1 to 2**31 and 0 to 2**63 - 1"
        )
    return Ledger(sequence_length, seed, folder=folder).append(prefixes, names or names_of(prefixes), domain, epochs)


def read_ledger(path: Path, sequence_length: int, beginning: Sequence[str]) -> Ledger | None:
    """A run's ledger; None if there is none yet.

    Args:
        path: where it is.
        sequence_length: of the model.
        beginning: the corpora that the run's settings name; empty for any.

    Raises:
        DataError: it is damaged, for other sequences, or does not read these corpora.
    """
    if not path.exists():
        return None
    ledger = Ledger.load(path)
    if ledger.sequence_length != sequence_length:
        raise DataError(
            f"{path} cuts samples of {ledger.sequence_length:,} tokens, but model.sequence_length is "
            f"{sequence_length:,}; take another checkpoint.directory or ledger"
        )
    if beginning:
        ledger.check_began_with(beginning)
    return ledger


@dataclass(frozen=True)
class Place:
    """Where a run looks at its ledger."""

    step: int
    """Optimizer steps done."""
    consumed: int
    """Samples consumed."""
    until: int
    """The sample at which it looks next; ``consumed`` if it does not go on."""
    last: int
    """The samples that it will have consumed in the end."""
    global_batch_size: int


def place_of(run: RunConfig, step: int, consumed: int, *, goes_on: bool = True) -> Place:
    """Where a run stands after a step.

    Raises:
        ConfigError: it has done more steps than it is to do.
    """
    training, size = run.training, run.training.global_batch_size
    if step > training.train_steps:
        raise ConfigError(
            f"training.train_steps is {training.train_steps}, but the run has done {step} steps already; raise it, or "
            "choose another checkpoint.directory"
        )
    end = training.stop_after_step or training.train_steps
    following = min((step // run.checkpoint.save_interval + 1) * run.checkpoint.save_interval, end)
    until = consumed + max(0, following - step) * size if goes_on else consumed
    return Place(step, consumed, until, consumed + (training.train_steps - step) * size, size)


def begun(ledger: Ledger, place: Place) -> Ledger:
    """A ledger as a run starts or resumes with it: what waited holds from here on.

    Raises:
        DataError: what waited does not fit, or there are fewer samples than the run wants.
    """
    active = ledger.activate(place.consumed, place.until)
    active.require(place.last, "training.train_steps x training.global_batch_size")
    return active.at_step(place.step, place.consumed, place.global_batch_size)


def continued(ledger: Ledger, own: Ledger, place: Place) -> Ledger:
    """A ledger's file as a run takes in what has come since it looked last, which was ``own``.

    Raises:
        DataError: as :func:`begun`, or the file says something else of what was read.
    """
    if difference := first_difference(ledger, own, place.consumed):
        raise DataError(f"{difference[0]}, other than what was read")
    return begun(ledger, place)


def left(ledger: Ledger, own: Ledger, place: Place) -> Ledger:
    """A ledger's file as a run leaves it that takes nothing in, and goes on by ``own`` to where it looks next.

    What is read until then is as in ``own``. Of the rest, what is pending stays so, what is planned for later too, and
    what was planned for before is pending now: nothing is lost, and it comes up at the next look.

    Raises:
        DataError: the two do not fit together any more.
    """
    if first_difference(ledger, own, place.until) is None:
        return ledger.looked(place.consumed, place.until)
    read = own.before(place.until)
    meanings, said = [own.meaning(event) for event in read], [ledger.meaning(event) for event in ledger.events]
    for event in read:
        if event.at is not None and event.at >= place.consumed and own.meaning(event) not in said:
            logger.warning(
                f"{in_words(event, own.corpora)} at sample {event.at:,} was taken back, but the run goes on by the "
                "ledger that has it; undo it by another change, such as steel-megatron data remove"
            )
    result = dataclasses.replace(own, events=tuple(read)).looked(place.consumed, place.until)
    # In the order in which they would have held: what was pending from here on, then what was planned.
    for event in sorted(ledger.events, key=lambda event: place.consumed if event.at is None else event.at):
        is_later = event.at is None or event.at >= place.until
        if not is_later and ledger.meaning(event) in meanings:
            continue
        result = result.with_event_of(ledger, event, event.at if is_later else None)
    return result


def leave(path: Path, own: Ledger, place: Place) -> Ledger:
    """:func:`left` for a ledger's file. What does not fit together any more is set aside in a file beside it.

    Raises:
        DataError: the file is damaged or gone, somebody holds it, or the disk refuses.
    """
    with edit(path, wait=LOOK_SECONDS) as file:
        try:
            file.ledger = left(file.ledger, own, place)
        except DataError as error:
            aside = path.with_name(f"{path.stem}.refused-{place.consumed}{path.suffix}")
            file.ledger.save(aside)
            file.ledger = own.looked(place.consumed, place.until)
            logger.warning(
                f"{path} is again what the run reads by; changes that do not fit are left in {aside}: {error}"
            )
    return file.ledger


def tidy(ledger: Ledger, cache: Path) -> None:
    """Remove from a ledger's caches what no run reads that goes on from where it was looked at last."""
    cursors = ledger.cursors(ledger.reached).tolist()
    over = {ledger.corpora[n].content: cursors[n] // ledger.samples(n) for n in ledger.used}
    remove_caches(cache, over)


def first_difference(ledger: Ledger, other: Ledger, position: int) -> tuple[str, int | None] | None:
    """The first thing in which two ledgers differ on the samples before a position.

    Returns:
        what it is, and if it is a change that only ``ledger`` has, for which sample; None if there is none.
    """
    for name in ("seed", "sequence_length"):
        mine, others = getattr(ledger, name), getattr(other, name)
        if mine != others:
            return f"its {name} is {mine} in place of {others}", None
    events, wanted = ledger.before(position), other.before(position)
    for mine, others in zip_longest(events, wanted):
        if mine is None or others is None or ledger.meaning(mine) != other.meaning(others):
            says = f"{in_words(mine, ledger.corpora)} at sample {mine.at:,}" if mine else "no change"
            should = f"{in_words(others, other.corpora)} at sample {others.at:,}" if others else "none"
            alone = mine is not None and all(event.at != mine.at for event in wanted)
            return f"it has {says}, where there was {should}", mine.at if alone and mine else None
    return None


def check_past(ledger: Ledger | None, path: Path, checkpoint: Path, consumed: int, fingerprint: str) -> None:
    """Hold a ledger against the past of a checkpoint.

    Args:
        ledger: the ledger; None where there is none.
        path: its file, for messages.
        checkpoint: the checkpoint's folder, with a ledger of its own.
        consumed: the samples consumed before the checkpoint.
        fingerprint: what the checkpoint says of them.

    Raises:
        CheckpointError: it tells another past; the message says where they differ first, and what mends it.
    """
    if ledger is not None and ledger.fingerprint(consumed) == fingerprint:
        return
    own = checkpoint / "ledger.json"
    cure, found = f"go back to the checkpoint's (cp {own} {path}), which forgets what came later", ""
    with suppress(DataError):
        if ledger is None:
            found = ": it is gone"
        elif difference := first_difference(ledger, Ledger.load(own), consumed):
            found = f": {difference[0]}"
            if difference[1] is not None and difference[1] >= ledger.reached:
                cure = f"take it back: steel-megatron data cancel {path} --at {difference[1]} --stopped true"
    raise CheckpointError(
        f"{checkpoint} was trained on other data than {path} says of the first {consumed:,} samples{found}; {cure}. Or "
        "use the weights in another folder (checkpoint.init_from)"
    )


@dataclass(frozen=True)
class DocumentPart:
    """A part of a document in a sample."""

    corpus: str
    """Name of the corpus in the ledger."""
    document: int
    """Number of the document in its corpus."""
    origin: Origin | None
    """The file and row it came from; None where nobody recorded it."""
    offset: int
    """The document's token with which the part begins."""
    ids: tuple[int, ...]
    """The token ids of the part."""


def parts_of(samples: LedgerSamples, number: int) -> list[DocumentPart]:
    """The documents that a sample is made of, in order.

    Raises:
        DataError: the ledger has no such sample.
    """
    name = samples.ledger.corpora[samples.ledger.locate(number).corpus].name
    corpus, pieces = samples.documents(number)
    return [
        DocumentPart(
            name,
            piece.document,
            corpus.origin(piece.document),
            piece.offset,
            tuple(corpus.tokens_of(piece.document, piece.offset, piece.length).tolist()),
        )
        for piece in pieces
    ]
