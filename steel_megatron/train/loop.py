"""The training loop: from settings to the last checkpoint."""

from __future__ import annotations

import os
import socket
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from steel_megatron.config import RunConfig, doubts, dump_yaml
from steel_megatron.data.ledger.history import History
from steel_megatron.data.ledger.ledger import Ledger
from steel_megatron.data.ledger.session import LedgerSession
from steel_megatron.data.ledger.sync import check_past
from steel_megatron.data.tokenizing.tokenizer import find_tokenizer
from steel_megatron.errors import CheckpointError, ConfigError, DataError, LostRankError, TrainingError
from steel_megatron.files import exclusive_lock, lease, lease_holder, with_suffix, write_atomically
from steel_megatron.log import get_logger
from steel_megatron.parallel import agreement
from steel_megatron.parallel.agreement import any_rank, broadcast_from_rank0, on_rank0, raise_if_any_rank_failed
from steel_megatron.parallel.peers import Peers
from steel_megatron.parallel.topology import Topology, initialize, read_launch, refuse_without_srun, shutdown
from steel_megatron.platform import Implementation, choose_implementation
from steel_megatron.platform.fp8 import missing_for_fp8
from steel_megatron.train import checkpoint, random_states
from steel_megatron.train.bad_samples import naming_documents, note_skipped
from steel_megatron.train.batches import Batches
from steel_megatron.train.callbacks import Callback, CopyFirst, RunView, callbacks_of
from steel_megatron.train.callbacks.base import EvaluatesTasks
from steel_megatron.train.callbacks.events import EventLog
from steel_megatron.train.checkpoint_checksums import verified_by_all
from steel_megatron.train.checkpoint_info import CheckpointInfo, check_adapters
from steel_megatron.train.checkpoint_save import Saver
from steel_megatron.train.engine import Engine, minimised
from steel_megatron.train.initial_weights import open_initial
from steel_megatron.train.model_path import base_at
from steel_megatron.train.reference import check_reference, prepare_reference
from steel_megatron.train.stop_signal import StopSignal
from steel_megatron.train.time_limit import TimeLimit, job_end

logger = get_logger(__name__)

_UNDER_WAY = threading.Lock()
"""Held while a run is under way in this process: megatron-core's process groups are there once."""


@dataclass(frozen=True)
class TrainingSummary:
    """Where a run stands when it leaves.

    Attributes:
        step: optimizer steps done.
        loss: of the last step, in nats per token; None when there was no step left to do.
        validation_loss: of the last validation, the mean over its sets; None without validation data.
        validation_losses: the same for each set by name; the name is empty where there is one without a name.
        losses: of each step of this call, in order, skipped ones included; the last one is ``loss``.
        checkpoint: the newest checkpoint's folder.
        finished: whether all of the run's steps are done.
        stopped: whether a signal stopped it before it had done what it was to do; the same call resumes it.
    """

    step: int
    loss: float | None
    validation_loss: float | None
    checkpoint: Path
    finished: bool
    stopped: bool = False
    validation_losses: Mapping[str, float] = field(default_factory=dict)
    losses: Sequence[float] = ()


def pretrain(run: RunConfig, callbacks: Sequence[Callback] = ()) -> TrainingSummary:
    """Train a model from where its folder stands; every process of the launch calls it.

    It works in a script, in a notebook and in a thread. In the main thread it notices signals (SIGTERM, SIGUSR1 and
    Ctrl-C) while it trains: it saves after the step under way, and returns.

    Args:
        run: the run's settings.
        callbacks: what is called around the loop's steps, after the library's own.

    Raises:
        SteelError: settings, data, checkpoints or the loss are not usable, or another run is under way in this
            process.
    """
    if run.evaluation.tasks and not any(isinstance(one, EvaluatesTasks) for one in callbacks):
        raise ConfigError(
            f"evaluation.tasks is {run.evaluation.tasks}, but none of the callbacks evaluates them; pass pretrain "
            "steel_megatron.evaluation.in_loop.TaskScores(run) among its callbacks, as the command does"
        )
    if not _UNDER_WAY.acquire(blocking=False):
        raise ConfigError(
            "a run is under way in this process already; wait for its end, or start this one in a process of its own"
        )
    with ExitStack() as stack:
        stack.callback(_UNDER_WAY.release)
        implementation = choose_implementation(run.model.implementation, fully_sharded=run.parallel.fsdp)
        _check_fp8(run, implementation)
        refuse_without_srun(os.environ)
        run.num_micro_batches(read_launch(os.environ).world_size)  # checks the batch before anything is started
        topology = stack.enter_context(_process_groups(run))
        peers = stack.enter_context(Peers(Path(run.checkpoint.directory), run.training.watchdog_seconds))
        stack.enter_context(peers.named())
        lock = exclusive_lock(Path(run.checkpoint.directory) / "run", CheckpointError)
        on_rank0(lambda: stack.enter_context(lock))
        held = lease(Path(run.checkpoint.directory) / "run", CheckpointError)
        on_rank0(lambda: stack.enter_context(held))
        if run.ledger_path.parent != Path(run.checkpoint.directory):
            on_rank0(lambda: stack.enter_context(_ledger_lock(run.ledger_path)))
        on_rank0(lambda: _check_tokenizer(run))
        logger.info(implementation.describe())
        return _train(run, topology, peers, [*callbacks_of(run), CopyFirst(callbacks), *callbacks])


@contextmanager
def _process_groups(run: RunConfig) -> Iterator[Topology]:
    """The process groups of a run; those that have lost a process are left to the end of this one."""
    topology = initialize(run.parallel)
    try:
        yield topology
    except LostRankError:
        raise
    except BaseException:
        shutdown()
        raise
    shutdown()


def _check_fp8(run: RunConfig, implementation: Implementation) -> None:
    """Refuse FP8 that this machine cannot compute, or would not, before the processes meet."""
    if not run.training.fp8:
        return
    if missing := missing_for_fp8():
        raise ConfigError(f"training.fp8 = {run.training.fp8} needs {' and '.join(missing)}; leave it unset here")
    if implementation.transformer_engine is None:
        raise ConfigError(
            f"training.fp8 = {run.training.fp8} has no effect with model.implementation = {run.model.implementation}: "
            "only transformer-engine's layers compute in FP8; set it to auto or transformer_engine"
        )


def _check_tokenizer(run: RunConfig) -> None:
    """Load the tokenizer that export and generation will need, if the run names one.

    Raises:
        ConfigError: it is missing or damaged, or has more ids than the model.
    """
    path = run.data.tokenizer_path
    if path is None:
        return
    folder = Path(run.checkpoint.directory)
    try:
        recorded = Ledger.load(run.ledger_path).history.tokenizer if run.ledger_path.exists() else None
        size = find_tokenizer(
            run.data.tokenizer_kind, path, folder, recorded
        ).vocab_size  # a moved run has it elsewhere
    except DataError as error:
        raise ConfigError(f"data.tokenizer_path is {path}: {error}") from None
    if size > run.model.vocab_size:
        raise ConfigError(
            f"data.tokenizer_path is {path}, which has {size:,} ids; model.vocab_size is {run.model.vocab_size:,}"
        )


@contextmanager
def _ledger_lock(path: Path) -> Iterator[None]:
    """Tell commands that a ledger outside of the run's folder is read; a second run may read by it as well."""
    with ExitStack() as stack:
        with suppress(CheckpointError):
            stack.enter_context(exclusive_lock(with_suffix(path, ".run"), CheckpointError))
        yield


def _train(run: RunConfig, topology: Topology, peers: Peers, callbacks: Sequence[Callback]) -> TrainingSummary:
    training = run.training
    for doubt in doubts(run) if topology.launch.rank == 0 else ():
        logger.warning(doubt)
    session = LedgerSession(run, agreement)
    batches = Batches(run, topology, session)
    engine = Engine(run, topology)
    consumed, saved = _start(run, topology, engine, batches, session)
    view = RunView(run, topology, engine)
    saver = Saver(run)
    log = EventLog(lambda: saver.seconds)
    callbacks = [log, *callbacks]
    limit = TimeLimit(job_end(os.environ) if topology.is_rank0 else None)
    validation: dict[str, float] = {}
    losses = array("d")
    stopping = False

    def note(path: Path | None) -> None:
        nonlocal saved
        if path is not None:
            saved = path
            for callback in callbacks:
                callback.after_save(view, path)

    peers.phase = lambda: f"step {engine.step_number + 1}{saver.doing}"
    # The signals come first: a second one must not hit what is left to do after the save.
    with StopSignal() as signal, _started(callbacks, view), _ended(saver, note), peers.named():
        _tell_if_done(run, engine.step_number)
        while engine.step_number < training.last_step:
            for callback in callbacks:
                callback.before_step(view)
            samples = range(consumed, consumed + training.global_batch_size)
            own = batches.training(consumed)
            with naming_documents(run, session, samples):
                result = engine.step(own)
            if result.skipped is not None:
                note_skipped(engine, session, samples, result.skipped)
            consumed = samples.stop
            losses.append(result.loss)
            for callback in callbacks:
                callback.after_step(view, result)
            note(saver.poll())
            is_last = result.step == training.last_step
            time_is_up = limit.is_up(log.longest_step, saver.longest_seconds)
            asked_to_stop = any_rank(signal.received or time_is_up)
            stopping = asked_to_stop and not is_last
            if not asked_to_stop and (result.step % training.eval_interval == 0 or is_last):
                validation = _validate(engine, batches, callbacks, view)
            if result.step % run.checkpoint.save_interval == 0 or is_last or stopping:
                on_rank0(lambda: _check_folder(run, engine.step_number))
                (session.release if stopping or is_last else session.sync)(result.step, consumed)
                check_reference(engine, session)
                note(saver.begin(engine, consumed, session.ledger))
                if stopping or is_last or not run.checkpoint.async_save:
                    note(saver.finish())
            if stopping:
                why = "the job's time is nearly up" if time_is_up else "asked to stop"
                log.ended(view, "time limit" if time_is_up else "signal")
                logger.warning(f"{why}: step {result.step} is saved; the same command resumes from there")
                break
            if asked_to_stop and is_last:  # the save came first: who asks to stop may not wait for long
                validation = _validate(engine, batches, callbacks, view)
        if not stopping:
            log.ended(view, "finished" if engine.step_number >= training.train_steps else "stop_after_step")
    assert saved is not None, "a run has at least one step, done now or before"
    return TrainingSummary(
        step=engine.step_number,
        loss=losses[-1] if losses else None,
        validation_loss=sum(validation.values()) / len(validation) if validation else None,
        checkpoint=saved,
        finished=engine.step_number >= training.train_steps,
        stopped=stopping,
        validation_losses=validation,
        losses=losses,
    )


def _check_folder(run: RunConfig, step: int) -> None:
    """Refuse to save into a folder that was removed or moved: what is left would be half a run."""
    folder = Path(run.checkpoint.directory)
    holder = lease_holder(folder / "run")
    if holder and (holder.get("host"), holder.get("process")) != (socket.gethostname(), os.getpid()):
        raise CheckpointError(
            f"process {holder.get('process')} on {holder.get('host')} has taken over {folder}, as this one did not "
            f"renew its lease in time; step {step} is not saved"
        )
    if not with_suffix(folder / "run", ".lock").exists():
        raise CheckpointError(
            f"{folder} was removed or moved while the run was under way (its run.lock is gone), so step {step} is not "
            "saved; where its checkpoints are kept, the run resumes from the newest one"
        )


def _validate(engine: Engine, batches: Batches, callbacks: Sequence[Callback], view: RunView) -> dict[str, float]:
    """The losses of the validation sets; without any, nobody is told of a validation."""
    found = {name: minimised(engine.evaluate(own)).mean for name, own in batches.validation()}
    for callback in callbacks if found else ():
        callback.after_validation(view, found)
    return found


def _tell_if_done(run: RunConfig, done: int) -> None:
    training = run.training
    if done >= training.last_step:
        asked = "train_steps" if training.stop_after_step is None else "stop_after_step"
        logger.info(f"nothing is left to do: step {done} is done, and training.{asked} is {training.last_step}")


@contextmanager
def _ended(saver: Saver, note: Callable[[Path | None], None]) -> Iterator[None]:
    """Finish the save under way also where training ends with an error, if all processes have that error."""
    try:
        yield
    except TrainingError:
        note(saver.finish())
        raise
    finally:
        saver.give_up()


@contextmanager
def _started(callbacks: Sequence[Callback], view: RunView) -> Iterator[None]:
    """Start all callbacks; stop those that started, the last one first."""
    with ExitStack() as stack:

        def start() -> None:
            for callback in callbacks:
                callback.start(view)
                stack.callback(callback.stop, view)

        raise_if_any_rank_failed(start)
        yield


def _start(
    run: RunConfig, topology: Topology, engine: Engine, batches: Batches, session: LedgerSession
) -> tuple[int, Path | None]:
    """Resume, or take initial weights from elsewhere, or begin; returns the samples consumed and the checkpoint."""
    found = verified_by_all(lambda check: _find(run, check), checkpoint.verify)
    step = broadcast_from_rank0(found.step if found else -1)
    if step >= 0:
        path = checkpoint.path_of(run, step)
        info = raise_if_any_rank_failed(lambda: checkpoint.read_info(path))

        def check(history: History | None) -> None:
            check_past(history, run.ledger_path, path, info.consumed_samples, info.data_fingerprint)

        own = session.ledger.history if session.ledger else None
        on_rank0(lambda: check(own))  # before anything large is read
        if run.lora.rank is not None:  # the checkpoint has its adapters alone
            _load_origin(run, engine, info)
        checkpoint.load(engine, info)
        session.start(step, info.consumed_samples, check)
        if prepare_reference(run, engine, batches, session):
            checkpoint.load(engine, info)
        logger.info(f"resuming after step {info.step} ({info.layout} before, {topology.describe()} now)")
        return info.consumed_samples, path
    random_states.seed_all(run.training.seed, 0, topology)
    if run.checkpoint.init_from:
        _load_origin(run, engine)
        engine.optimizer.reload_model_params()
    session.start()
    path = Path(run.checkpoint.directory) / "run.yaml"
    text = dump_yaml(run).encode()
    on_rank0(lambda: write_atomically(path, text, CheckpointError))  # after the ledger: it says that a run has started
    prepare_reference(run, engine, batches, session)
    return 0, None


def _load_origin(run: RunConfig, engine: Engine, resumed: CheckpointInfo | None = None) -> None:
    """Load the weights of ``checkpoint.init_from``; those that the adapters of a checkpoint were trained on, if any."""
    origin = open_initial(str(run.checkpoint.init_from))
    base = None if run.lora.rank is None else raise_if_any_rank_failed(lambda: base_at(origin.path))
    if resumed is not None:
        check_adapters(resumed, run.lora)
        if resumed.base is not None and base is not None:
            resumed.base.check(base, resumed.path)
    origin.verify()
    for chunk in engine.chunks:
        origin.load(chunk, run.model)
    engine.base = base


def _find(run: RunConfig, check: Callable[[Path], None]) -> CheckpointInfo | None:
    """The checkpoint to resume from: the newest whole one, unless an older one is asked for; None if there is none."""
    if run.checkpoint.resume_from is not None:
        return checkpoint.go_back(run, run.checkpoint.resume_from, check)
    info = checkpoint.newest(run.checkpoints_dir, check)
    if info is None and any(run.checkpoints_dir.glob("step_*")):
        raise CheckpointError(
            f"no checkpoint in {run.checkpoints_dir} is whole, so there is nothing to resume from and nothing is begun "
            "anew over them; fix or remove them, or choose another checkpoint.directory"
        )
    if info is not None and not run.checkpoint.resume:
        raise CheckpointError(
            f"{run.checkpoints_dir} holds checkpoints up to step {info.step}, but checkpoint.resume is false; resume, "
            "or choose another checkpoint.directory"
        )
    return info
