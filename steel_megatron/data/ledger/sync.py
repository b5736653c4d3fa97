"""The protocol between a run and its ledger's file: what a sync takes in, what it defers, and which past it refuses.

A run syncs when it starts or resumes, and before each checkpoint. What has come by then holds from that sample on.
The sample of the next sync is written into the file. While the run holds its lock, no command changes what is read
until there; a change that comes too late all the same, where locks do not tell, is deferred to the next sync.
"""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from steel_megatron.config import RunConfig
from steel_megatron.data.ledger.changes import apply_pending, at_step, synced, take_event_of
from steel_megatron.data.ledger.history import History
from steel_megatron.data.ledger.ledger import SYNC_SECONDS, Ledger, edit
from steel_megatron.data.ledger.records import in_words
from steel_megatron.errors import CheckpointError, ConfigError, DataError
from steel_megatron.log import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class RunPosition:
    """Where a run syncs with its ledger."""

    step: int
    """Optimizer steps done."""
    consumed: int
    """Samples consumed."""
    next_sync: int
    """The sample at which it syncs next; ``consumed`` if it ends here."""
    end: int
    """The samples that it will have consumed in the end."""
    global_batch_size: int


def run_position(run: RunConfig, step: int, consumed: int, *, ends: bool = False) -> RunPosition:
    """Where a run stands after a step.

    Args:
        run: the run's settings.
        step: optimizer steps done.
        consumed: samples consumed by them.
        ends: whether the run ends here, so that there is no next sync.

    Raises:
        ConfigError: it has done more steps than it is to do.
    """
    training, size = run.training, run.training.global_batch_size
    if step > training.train_steps:
        raise ConfigError(
            f"training.train_steps is {training.train_steps}, but the run has done {step} steps already; raise it, or "
            "choose another checkpoint.directory"
        )
    next_save = (step // run.checkpoint.save_interval + 1) * run.checkpoint.save_interval
    steps = 0 if ends else max(0, min(next_save, training.last_step) - step)
    return RunPosition(step, consumed, consumed + steps * size, consumed + (training.train_steps - step) * size, size)


def start(history: History, position: RunPosition) -> History:
    """The ledger with which a run starts: what is pending holds from its position on.

    Raises:
        DataError: what waited does not fit, or there are fewer samples than the run wants.
    """
    active = apply_pending(history, position.consumed, position.next_sync)
    active.schedule.require(position.end, "training.train_steps x training.global_batch_size")
    return at_step(active, position.step, position.consumed, position.global_batch_size)


def resume(history: History, own: History, position: RunPosition) -> History:
    """The ledger with which a run continues: :func:`start`, unless the past was changed.

    Args:
        history: what the ledger's file says.
        own: the history by which the run has read so far.
        position: where the run syncs.

    Raises:
        DataError: as :func:`start`, or the file says something else about what was read.
    """
    if difference := first_difference(history, own, position.consumed):
        raise DataError(f"{difference[0]}, other than what was read")
    return start(history, position)


def defer(history: History, own: History, position: RunPosition) -> History:
    """The ledger's file when a run takes nothing in, and reads by ``own`` to its next sync.

    Until there it is ``own``. What is pending stays pending, what is planned for later stays planned, and what was
    planned for before is pending now: nothing is lost, and the next sync finds it.

    Args:
        history: what the file says.
        own: the history by which the run reads.
        position: where the run syncs.

    Raises:
        DataError: the two no longer fit together.
    """
    if first_difference(history, own, position.next_sync) is None:
        return synced(history, position.consumed, position.next_sync)
    read = own.before(position.next_sync)
    meanings, said = [own.meaning(event) for event in read], [history.meaning(event) for event in history.events]
    for event in read:
        if event.at is not None and event.at >= position.consumed and own.meaning(event) not in said:
            logger.warning(
                f"{in_words(event, own.corpora)} at sample {event.at:,} was taken back, but the run goes on by the "
                "ledger that has it; undo it by another change, such as steel-megatron data remove"
            )
    result = synced(dataclasses.replace(own, events=tuple(read)), position.consumed, position.next_sync)
    # In the order in which they would have held: what was pending from here on, then what was planned.
    for event in sorted(history.events, key=lambda event: position.consumed if event.at is None else event.at):
        is_later = event.at is None or event.at >= position.next_sync
        if not is_later and history.meaning(event) in meanings:
            continue
        result = take_event_of(result, history, event, event.at if is_later else None)
    return result


def defer_file(path: Path, own: History, position: RunPosition) -> Ledger:
    """:func:`defer` for a ledger's file. If the two no longer fit together, the file's ledger is set aside next to it.

    Args:
        path: the file.
        own: the history by which the run reads.
        position: where the run syncs.

    Returns:
        the ledger that the file then holds.

    Raises:
        DataError: the file is damaged or gone, somebody holds it, or the disk refuses.
    """
    with edit(path, wait=SYNC_SECONDS) as file:
        try:
            file.ledger = file.ledger.then(defer, own, position)
        except DataError as error:
            aside = path.with_name(f"{path.stem}.refused-{position.consumed}{path.suffix}")
            file.ledger.save(aside)
            file.ledger = Ledger(synced(own, position.consumed, position.next_sync), path.parent)
            logger.warning(
                f"{path} is again what the run reads by; changes that do not fit are left in {aside}: {error}"
            )
    return file.ledger


def first_difference(history: History, other: History, position: int) -> tuple[str, int | None] | None:
    """The first thing in which two histories differ on the samples before a position.

    Args:
        history: one history.
        other: the one it is compared with.
        position: number of samples that are compared.

    Returns:
        what it is, and if it is a change that only ``history`` has, for which sample; None if there is none.
    """
    for name in ("seed", "sequence_length"):
        mine, others = getattr(history, name), getattr(other, name)
        if mine != others:
            return f"its {name} is {mine} in place of {others}", None
    events, wanted = history.before(position), other.before(position)
    for mine, others in zip_longest(events, wanted):
        if mine is None or others is None or history.meaning(mine) != other.meaning(others):
            says = f"{in_words(mine, history.corpora)} at sample {mine.at:,}" if mine else "no change"
            should = f"{in_words(others, other.corpora)} at sample {others.at:,}" if others else "none"
            alone = mine is not None and all(event.at != mine.at for event in wanted)
            return f"it has {says}, where there was {should}", mine.at if alone and mine else None
    return None


def check_new_run(history: History, path: Path, folder: Path, *, restarted: bool) -> None:
    """Check the ledger of a run that has no checkpoint, and so starts at sample 0.

    Args:
        history: of the ledger.
        path: its file.
        folder: the run's folder.
        restarted: whether a run was started in the folder before, and may have been killed before its first checkpoint.

    Raises:
        DataError: another run has read by the ledger; its progress would be lost. The message says how to share data.
    """
    if not history.last_synced_sample:
        return
    found = f"{path} was read to sample {history.last_synced_sample:,}, and {folder} has no checkpoint to resume from"
    if not restarted and path.parent.resolve() != folder.resolve():
        raise DataError(
            f"{found}; a run that starts at sample 0 would overwrite the progress of the run that read it. To read the "
            f"same data, copy the ledger into the run's folder (cp {path} {folder / 'ledger.json'}, and any "
            "dropped-*.npy next to it) and leave out data.ledger; to resume that run, set checkpoint.directory to its "
            "folder"
        )
    logger.warning(
        f"{found}: this run starts at sample 0, and the ledger's progress is set back to it; changes keep their samples"
    )


def check_past(history: History | None, path: Path, checkpoint: Path, consumed: int, fingerprint: str) -> None:
    """Hold a ledger against the past of a checkpoint.

    Args:
        history: of the ledger; None where there is none.
        path: its file, for messages.
        checkpoint: the checkpoint's folder, with a ledger of its own.
        consumed: the samples consumed before the checkpoint.
        fingerprint: what the checkpoint says of them.

    Raises:
        CheckpointError: it tells another past; the message says where they differ first, and what mends it.
    """
    if history is not None and history.fingerprint(consumed) == fingerprint:
        return
    own = checkpoint / "ledger.json"
    cure, found = f"go back to the checkpoint's (cp {own} {path}), which forgets what came later", ""
    with suppress(DataError):
        if history is None:
            found = ": it is gone"
        elif difference := first_difference(history, Ledger.load(own).history, consumed):
            found = f": {difference[0]}"
            if difference[1] is not None and difference[1] >= history.last_synced_sample:
                cure = f"take it back: steel-megatron data cancel {path} --at {difference[1]}"
    raise CheckpointError(
        f"{checkpoint} was trained on other data than {path} says of the first {consumed:,} samples{found}; {cure}. Or "
        "use the weights in another folder (checkpoint.init_from)"
    )
