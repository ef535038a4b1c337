"""Batches, made ahead of time by worker processes where there are any."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from panterra.errors import InputError, RunError

T = TypeVar("T")

DIED = "DataLoader worker (pid"
"""How PyTorch's errors about workers that are gone begin."""
UNOPENED = ("Too many open files", "items of ancdata")
"""What PyTorch's and Python's errors say where a tensor of a worker cannot be opened any more."""
TOO_FEW_FILES = (
    "too few files may be open at once for workers, whose batches are files; raise the limit, as by ulimit -n 4096, or "
    "make batches without workers"
)


@contextmanager
def load_batches(batches: Dataset[T], steps: range, *, workers: int) -> Iterator[Iterator[T]]:
    """Make the batches of `steps` in order.

    To ask for one raises RunError where a worker has died, and InputError as the data set raises it.
    """
    if not workers:
        yield (batches[step] for step in steps)
        return
    allow_open_files()
    made = _Made(_loader(batches, steps, workers))
    try:
        yield made
    finally:
        made.close()


class _Made(Generic[T]):
    """The batches of workers whose death is news only to who waits for one.

    PyTorch raises it from a signal handler wherever the program happens to be, such as in the middle of a checkpoint,
    whose writer fails of it with words of its own. Here it is held back until the next batch.
    """

    def __init__(self, loader: DataLoader[T | _Refused]) -> None:
        self._waiting = self._held = False
        others = set(active_children())
        self._iterator: Iterator[T | _Refused] | None = iter(loader)
        self._workers = [child for child in active_children() if child not in others]
        self._raise: Any = signal.getsignal(signal.SIGCHLD) if _hears_of_children() else None
        if self._raise is not None:
            signal.signal(signal.SIGCHLD, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            self._raise(number, frame)
        else:
            self._held = True

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        assert self._iterator is not None, "closed"
        try:
            self._waiting = True
            if self._held:
                self._held = False
                self._raise(signal.SIGCHLD, None)
            batch = next(self._iterator)
        except RuntimeError as error:
            unopened = any(said in str(error) for said in UNOPENED)
            if not unopened and not str(error).startswith(DIED):
                raise
        else:
            if isinstance(batch, _Refused):
                raise InputError(batch.why)
            return batch
        finally:
            self._waiting = False
        # Not from within the handler of the error, whose frames would keep the other workers alive.
        if unopened:
            raise InputError(TOO_FEW_FILES)
        raise RunError(
            f"a worker that makes batches {_how_ended(self._workers)}; start the run again to go on from its newest"
            " checkpoint, with fewer workers where memory ran out"
        )

    def close(self) -> None:
        """Stop the workers; their ends are no news any more."""
        iterator, self._iterator = self._iterator, None
        # An error that nobody catches keeps its frames, and with them the iterator, which would keep its workers.
        shut_down: Callable[[], None] = getattr(iterator, "_shutdown_workers", lambda: None)
        shut_down()
        if self._raise is not None:
            signal.signal(signal.SIGCHLD, self._raise)


def _how_ended(workers: Sequence[BaseProcess]) -> str:
    code = next((worker.exitcode for worker in workers if worker.exitcode), None)
    if code is None:
        return "is gone"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


@dataclass(frozen=True, slots=True)
class _Refused:
    """In place of a batch: what an InputError in a worker says."""

    why: str


class _Telling(Dataset[T | _Refused]):
    """A data set whose workers hand over an InputError as it is; PyTorch would put a traceback into its message."""

    def __init__(self, batches: Dataset[T]) -> None:
        self._batches = batches

    def __getitem__(self, step: int) -> T | _Refused:
        try:
            return self._batches[step]
        except InputError as error:
            return _Refused(str(error))


def _loader(batches: Dataset[T], steps: range, workers: int) -> DataLoader[T | _Refused]:
    return DataLoader(
        _Telling(batches),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=4,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_the_loop,
    )


def _as_it_is(batch: T) -> T:
    return batch


def _leave_signals_to_the_loop(worker: int) -> None:
    # Terminals and schedulers signal all processes; workers must live until the step and its checkpoint are done.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _hears_of_children() -> bool:
    return hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()


def allow_open_files() -> None:
    """Raise this process's limit of open files as far as it may; each tensor from a worker is one."""
    if sys.platform != "win32":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
