"""Workers: processes on this machine, or actors on a Ray cluster."""

from __future__ import annotations

import importlib
import logging
import math
import multiprocessing as mp
import os
import signal
import threading
import traceback
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any, Protocol

from panterra.errors import InputError
from panterra.mapping.painter import Job, Painted, Painter, Reply
from panterra.mapping.tiles import Tile


class WorkerDiedError(Exception):
    """A worker is gone, and with it the tile it had."""


class Crew(Protocol):
    """Workers. `paint` may be called from `size` threads at once, and raises WorkerDiedError."""

    size: int

    def paint(self, tile: Tile) -> Reply: ...

    def close(self) -> None:
        """Stop the workers, once or again; what they had in hand ends in WorkerDiedError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Worker:
    process: BaseProcess
    pipe: Connection


class Processes:
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
        worker = _Worker(process=process, pipe=ours)
        try:
            ours.recv()  # that it is ready
        except EOFError:
            ended = self._end(worker)
            if process.exitcode == 1:
                raise InputError(
                    "workers cannot start, for the reason above; in a script, whatever computes in other processes "
                    'belongs under if __name__ == "__main__":'
                ) from None
            raise WorkerDiedError(ended) from None
        return worker

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
    pipe.send("ready")
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


class Ray:
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
