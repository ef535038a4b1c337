"""The tiles of one map, computed by several processes or machines.

Workers paint tiles; the process that was started blends them, in order, and writes them as it would its own. So the
bytes are those of a run in one process with as many threads, and so is what a killed run finds when it goes on.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import cast

import torch

from panterra.energy.meter import Usage
from panterra.errors import InputError
from panterra.finetune.model import FineTuned
from panterra.mapping import reading
from panterra.mapping.blend import Canvas
from panterra.mapping.crews import Crew, Processes, Ray, WorkerDiedError
from panterra.mapping.detector import Detector
from panterra.mapping.painter import Answer, Job, saved
from panterra.mapping.parts import Failure, Parts
from panterra.mapping.sources import Canvases, Encoding
from panterra.mapping.stored import Stored
from panterra.mapping.tiles import Tile
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
    crew: Crew = Processes(job, processes) if processes else Ray(job, on)
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
    made = reading.ahead(lambda tile: _made(crew, tile, closed, tell), tiles, crew.size, most=most)
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
    waits, deaths = iter(reading.WAITS_S), itertools.count(1)
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
