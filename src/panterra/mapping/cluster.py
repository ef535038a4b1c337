"""The tiles of one map, computed by several processes or machines.

Workers paint tiles; the process that was started blends them, in order, and writes them as it would its own. So the
bytes are those of a run in one process with as many threads, and so is what a killed run finds when it goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import math
import multiprocessing as mp
import os
import re
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError

from panterra.energy.meter import Usage
from panterra.errors import InputError
from panterra.finetune.model import FineTuned, load_finetuned
from panterra.mapping import sources
from panterra.mapping.blend import Canvas
from panterra.mapping.detector import Detector
from panterra.mapping.parts import Failure, Parts
from panterra.mapping.sources import Canvases, Encoding, Stored, ahead
from panterra.mapping.tiles import Tile
from panterra.models import weights
from panterra.models.anysat import AnySat
from panterra.models.exported import Exported
from panterra.models.features import Encoder
from panterra.models.olmoearth import OlmoEarth

DEATHS = 6
"""So many workers may die of a tile before it counts as failed; preemption kills workers that did no wrong."""
WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
"""How long to wait after a worker died, doubled each time, and the longest."""
LEAST_AHEAD, AHEAD = 2, 10
"""Tiles in flight per worker. They wait for their turn to be written, which a slow one holds up."""
IN_FLIGHT_BYTES = 4 * 2**30
"""What they may take together, unless that is less than `LEAST_AHEAD` of each worker."""


def check_on(on: str, work: Encoding | Stored, budget_kwh: float | None) -> None:
    """Refuse what is no place to compute, and what cannot be done there."""
    if on != "local" and _num_processes(on) is None and on != "ray" and not on.startswith("ray://"):
        raise InputError(f"cannot compute on {on!r}; give local, processes:N (such as processes:4), ray or ray://HOST")
    if on == "local":
        return
    if isinstance(work, Stored):
        raise InputError(f"stored embeddings need no encoder, so other workers bring nothing; leave out {on}")
    if not isinstance(work.encoder, OlmoEarth | AnySat | FineTuned | Exported | Detector):
        raise InputError(
            f"{work.encoder.name} cannot be loaded by other workers; use a model of panterra's own families, a "
            f"fine-tuned or an exported one, or leave out {on}"
        )
    if budget_kwh is not None and _num_processes(on) is None and _device_of(work.encoder).startswith("cuda"):
        raise InputError(f"what GPUs of other machines take is not known; leave out the budget or {on}")


def _device_of(encoder: Encoder) -> str:
    module = encoder.model if isinstance(encoder, Detector) else encoder
    return str(next(module.parameters()).device) if isinstance(module, torch.nn.Module) else "cpu"


def _num_processes(on: str) -> int | None:
    found = re.fullmatch(r"processes:([1-9]\d*)", on)
    return int(found[1]) if found else None


@contextlib.contextmanager
def painters(
    on: str,
    work: Encoding | Stored,
    parts: Parts,
    *,
    tell: Callable[[Usage], None],
    note: Callable[[str], None] | None,
) -> Iterator[Canvases | None]:
    """Start workers for a job, and stop them; None where the job is to compute by itself.

    Every worker loads the encoder once, from files. With each tile they `tell` what they have used so far. Raises
    InputError for encoders that are not made of files, and where Ray is not installed or cannot be reached.
    """
    if on == "local" or isinstance(work, Stored):
        yield None
        return
    folder = parts.folder / "model"
    shutil.rmtree(folder, ignore_errors=True)
    job = Job(
        work=replace(work, encoder=cast(Encoder, None)),
        model=saved(work.encoder, folder),
        threads=torch.get_num_threads(),
    )
    processes = _num_processes(on)
    crew: Crew = _Processes(job, processes) if processes else _Ray(job, on)
    if note:
        note(_told(on, crew.size, job.threads, alone=bool(processes)))
    with contextlib.closing(crew):
        yield lambda tiles, advance: _canvases(crew, work, tiles, advance, tell)
    shutil.rmtree(folder, ignore_errors=True)


def in_flight(workers: int, tile_bytes: float) -> int:
    """Return how many tiles are asked for and not yet written, at most."""
    return max(LEAST_AHEAD * workers, min(AHEAD * workers, int(IN_FLIGHT_BYTES / tile_bytes)))


def _told(on: str, size: int, threads: int, *, alone: bool) -> str:
    said = f"{on}: {size} workers with {threads} {'threads' if threads > 1 else 'thread'} each"
    cores = os.cpu_count() or 1
    if not alone:
        return f"{said}; on other machines, electricity is modelled, and that of GPUs is not counted"
    if size * threads > cores:
        return f"{said} share {cores} cores; OMP_NUM_THREADS={max(cores // size, 1)} gives each its own"
    return said


# What a worker is told.


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """An encoder as files, and what of its set-up is not in them."""

    folder: Path
    """Where the files are; workers that may be on other machines get `content` instead."""
    tuned: bool
    about: Mapping[str, Any]
    """What the encoder is, so that a worker knows whether it has the same."""
    settings: Mapping[str, Any]
    """Arguments of `load_model`."""
    device: str
    dtype: str | None
    detects: bool = False
    content: Mapping[str, bytes] | None = None

    def carried(self) -> ModelFiles:
        """Take the files along."""
        files = (file for file in self.folder.rglob("*") if file.is_file())
        return replace(self, content={file.relative_to(self.folder).as_posix(): file.read_bytes() for file in files})

    def load(self) -> Encoder:
        """Load the encoder."""
        if self.content is None:
            return self._load(self.folder)
        with tempfile.TemporaryDirectory(prefix="panterra-model-") as name:
            for file, content in self.content.items():
                path = Path(name) / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            return self._load(Path(name))

    def _load(self, folder: Path) -> Encoder:
        dtype = getattr(torch, self.dtype) if self.dtype else None
        if self.tuned:
            model = load_finetuned(folder, device=self.device).to(dtype=dtype)
            return Detector(model=model) if self.detects else model
        return cast(Encoder, weights.load_model(folder, device=self.device, dtype=dtype, **self.settings))


def saved(encoder: Encoder, folder: Path) -> ModelFiles:
    """Save an encoder for workers."""
    if isinstance(encoder, Detector):
        return replace(saved(encoder.model, folder), detects=True)
    about = weights.passport(encoder)
    if isinstance(encoder, Exported):
        return ModelFiles(folder=Path(encoder.name), tuned=False, about=about, settings={}, device="cpu", dtype=None)
    if isinstance(encoder, FineTuned):
        encoder.save(folder, overwrite=True)
        settings: dict[str, Any] = {}
    else:
        assert isinstance(encoder, OlmoEarth | AnySat), encoder.name
        try:
            weights.save_model(encoder, folder)
        except SafetensorError as error:  # what it says of a full disk
            raise OSError(str(error)) from error
        settings = {"normalized_input": encoder.normalized_input}
        if isinstance(encoder, OlmoEarth):
            settings["attention"] = encoder.attention
        else:
            settings["missing"] = encoder.missing
    first = next(encoder.parameters())
    dtype = None if first.dtype == torch.float32 else str(first.dtype).removeprefix("torch.")
    return ModelFiles(
        folder=folder,
        tuned=isinstance(encoder, FineTuned),
        about=about,
        settings=settings,
        device=str(first.device),
        dtype=dtype,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a worker needs to paint any tile: the plan without its encoder, and files to load that from."""

    work: Encoding
    model: ModelFiles
    threads: int
    """Part of the job: rounding depends on how many there are."""

    def open(self) -> Encoding:
        """Load the encoder, and check that it is the one that was planned with."""
        torch.set_num_threads(self.threads)
        encoder = self.model.load()
        planned = self.model.about
        loaded = weights.passport(encoder.model if isinstance(encoder, Detector) else encoder)
        other = sorted(k for k in {*planned, *loaded} - {"name", "source"} if planned.get(k) != loaded.get(k))
        if other:
            raise InputError(
                f"the encoder's {', '.join(other)} got lost on the way to a worker; leave out where to compute"
            )
        return replace(self.work, encoder=encoder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Painted:
    """A tile as a worker made it."""

    canvas: Canvas
    encoder_seconds: float


Answer = Painted | Failure | InputError
"""An InputError says that a worker cannot work at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a worker answers, and what it has used so far."""

    answer: Answer
    used: Usage


class Painter:
    """A worker: opens the job at its first tile."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._work: Encoding | None = None
        self._started = time.perf_counter()

    def paint(self, row: int, col: int) -> Reply:
        """Paint a tile, by its number along rows and columns."""
        answer = self._paint(row, col)
        return Reply(answer=answer, used=Usage.since(self._started))

    def _paint(self, row: int, col: int) -> Answer:
        try:
            self._work = work = self._work or self._job.open()
        except InputError as error:
            return error
        before = work.encoder_seconds
        canvas = work.canvas(work.lattice.tile(row, col))
        if isinstance(canvas, Failure):
            return canvas
        return Painted(canvas=canvas, encoder_seconds=work.encoder_seconds - before)


# Who asks.


class WorkerDiedError(Exception):
    """A worker is gone, and with it the tile it had."""


class Crew(Protocol):
    """Workers. `paint` may be called from `size` threads at once, and raises WorkerDiedError."""

    size: int

    def paint(self, tile: Tile) -> Reply: ...

    def close(self) -> None:
        """Stop the workers, once or again; what they had in hand ends in WorkerDiedError."""


def _canvases(
    crew: Crew,
    work: Encoding,
    tiles: Iterable[Tile],
    advance: Callable[[int], None],
    tell: Callable[[Usage], None],
) -> Iterator[tuple[Tile, Canvas | Failure]]:
    closed = threading.Event()
    rows, cols = work.lattice.rows, work.lattice.cols
    tile_bytes = 4 * (rows.tile + rows.window) * (cols.tile + cols.window) * (work.dim + 1)
    most = in_flight(crew.size, tile_bytes)
    made = ahead(lambda tile: _made(crew, tile, closed, tell), tiles, crew.size, most=most)
    try:
        for tile, answer in made:
            if isinstance(answer, InputError):
                raise answer
            advance(work.cost(tile))
            if isinstance(answer, Failure):
                yield tile, answer
            else:
                work.encoder_seconds += answer.encoder_seconds
                yield tile, answer.canvas
    finally:
        closed.set()
        crew.close()  # before `made` waits for the tiles in hand, which nobody wants any more


def _made(crew: Crew, tile: Tile, closed: threading.Event, tell: Callable[[Usage], None]) -> Answer:
    """Have a tile painted, by another worker where one dies, and again where it fails."""
    waits, deaths = iter(sources.WAITS_S), itertools.count(1)
    while True:
        try:
            reply = crew.paint(tile)
            answer = reply.answer
            tell(reply.used)
            wait = next(waits, None) if isinstance(answer, Failure) else None
        except WorkerDiedError as died:
            times = next(deaths)
            answer = Failure(reason=f"cannot be computed: its worker died {times} times ({died})")
            wait = min(WAIT_S * 2 ** (times - 1), LONGEST_WAIT_S) if times < DEATHS else None
        if wait is None or closed.wait(wait):
            return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Worker:
    process: BaseProcess
    pipe: Connection


class _Processes:
    """Processes on this machine, each started when there is a tile for it, and again where it has died."""

    def __init__(self, job: Job, size: int) -> None:
        self.size = size
        self._job = job
        self._idle: SimpleQueue[_Worker | None] = SimpleQueue()
        for _ in range(size):
            self._idle.put(None)
        self._alive: set[BaseProcess] = set()
        self._lock = threading.Lock()
        self._closed = False

    def paint(self, tile: Tile) -> Reply:
        worker, seat = self._idle.get(), None
        try:
            seat = worker = worker or self._start()
            worker.pipe.send((tile.row, tile.col))
            reply: Reply | str = worker.pipe.recv()
        except (EOFError, OSError):
            seat = None
            raise WorkerDiedError(self._end(worker)) from None
        finally:
            self._idle.put(seat)
        if isinstance(reply, str):
            raise RuntimeError(f"a worker failed at tile {tile.name}:\n{reply}")
        return reply

    def _start(self) -> _Worker:
        context = mp.get_context("spawn")
        with self._lock:
            if self._closed:
                raise EOFError
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._job), daemon=True, name="panterra-worker")
            process.start()
            self._alive.add(process)
        theirs.close()
        return _Worker(process=process, pipe=ours)

    def _end(self, worker: _Worker | None) -> str:
        """Take away what is left of a worker, and say how it ended."""
        if worker is None:
            return "it could not start"
        worker.pipe.close()
        worker.process.join()
        with self._lock:
            self._alive.discard(worker.process)
        return f"exit code {worker.process.exitcode}"

    def close(self) -> None:
        with self._lock:
            self._closed = True
            left = list(self._alive)
        for process in left:
            process.terminate()
        for process in left:
            process.join()


def _serve(pipe: Connection, job: Job) -> None:
    """Paint what is asked for until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks decides when to stop
    painter = Painter(job)
    while True:
        try:
            row, col = pipe.recv()
        except EOFError:
            return
        try:
            reply: Reply | str = painter.paint(row, col)
        except Exception:
            reply = traceback.format_exc()
        pipe.send(reply)


class _Ray:
    """Actors on a Ray cluster: the one that is running, the one at an address, or a fresh one on this machine."""

    def __init__(self, job: Job, on: str) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray: Any = importlib.import_module("ray")
        except ModuleNotFoundError:
            raise InputError(f"on={on!r} needs ray; install it with: pip install 'panterra[ray]'") from None
        self._ray = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            try:
                ray.init(on if on != "ray" else None, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise InputError(
                    f"the Ray cluster at {on} cannot be used: {error}; see that it runs, that its version is "
                    "that of ray here, and that RAY_AUTH_MODE and RAY_AUTH_TOKEN are the same there and here"
                ) from None
        gpus = int(job.model.device.startswith("cuda"))
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus = min(job.threads, max(int(node.get("CPU", 1)) for node in nodes))
        rooms = [min(node.get("CPU", 0) // cpus, node.get("GPU", 0) if gpus else math.inf) for node in nodes]
        self.size = max(int(sum(rooms)), 1)
        carried = ray.put(replace(job, model=job.model.carried()))
        actor = ray.remote(Painter).options(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=0)
        self._actors = [actor.remote(carried) for _ in range(self.size)]
        self._idle: SimpleQueue[Any] = SimpleQueue()
        for one in self._actors:
            self._idle.put(one)

    def paint(self, tile: Tile) -> Reply:
        actor = self._idle.get()
        try:
            reply: Reply = self._ray.get(actor.paint.remote(tile.row, tile.col))
        except self._ray.exceptions.RayTaskError:
            raise  # a mistake of ours
        except self._ray.exceptions.RayError as error:
            raise WorkerDiedError(str(error).strip().split("\n")[0]) from None
        finally:
            self._idle.put(actor)
        answer = reply.answer
        if isinstance(answer, Painted):  # arrays of the object store are read-only, and fill it as long as they live
            return replace(reply, answer=replace(answer, canvas=answer.canvas.copy()))
        return reply

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors.clear()
        if self._ours:
            self._ray.shutdown()
            self._ours = False
