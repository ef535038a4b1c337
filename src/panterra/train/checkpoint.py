"""The state of a run on disk."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from panterra.errors import InputError, RunError
from panterra.files import file_checksum, read_json, write_whole

FACTS = "facts.json"
SUMS = "sha256"
"""Of the other files, among the facts: PyTorch takes a block of zeros in one for weights."""
REMEDY = "remove that folder to go on from the checkpoint before it, or from the start where there is none"


def newest(folder: Path) -> Path | None:
    """Find the checkpoint with most steps; unfinished ones have another name."""
    return max((path for path in folder.glob("step_*") if path.suffix != ".part"), default=None)


def at(folder: Path, step: int) -> Path | None:
    """Find the checkpoint after a step."""
    path = folder / f"step_{step:08d}"
    return path if path.is_dir() else None


def save(
    folder: Path,
    objective: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    facts: Mapping[str, Any],
    *,
    permanent: bool,
) -> Path:
    """Write a checkpoint, all ranks together, and remove the temporary ones before it.

    `facts` is plain JSON and says the step. The folder has its name only when everything is on disk; one that is there
    already stays as it is.
    """
    from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

    path = folder / f"step_{facts['step']:08d}"
    if path.exists():
        return path
    part, first = path.with_suffix(".part"), _rank() == 0
    if first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    _meet()
    with (
        _one_process_is_meant(),
        _told(f"the checkpoint {path} cannot be written, as happens on a full disk", "start again once there is room"),
    ):
        save_tensors(_tensors(objective, optimisers), checkpoint_id=part)
    if first:
        write_json(part / FACTS, {**facts, "permanent": permanent, SUMS: _sums(part)})
        part.rename(path)
        _sync(folder)
        for other in folder.glob("step_*"):
            if other != path and _expired(other):
                discard(other)
    _meet()
    return path


def load(path: Path, objective: nn.Module, optimisers: Sequence[torch.optim.Optimizer] = ()) -> dict[str, Any]:
    """Fill an objective, and its optimisers if given, from a checkpoint of any number of ranks; return its facts.

    Raises InputError where its files are not as they were written.
    """
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

    facts = _facts(path)
    written = facts.pop(SUMS, None)
    if _rank() == 0 and written is not None and written != _sums(path):
        raise InputError(f"the checkpoint {path} is damaged: its files are not as they were written; {REMEDY}")
    state = _tensors(objective, optimisers)
    with _one_process_is_meant(), _told(f"the checkpoint {path} cannot be read", REMEDY):
        load_tensors(state, checkpoint_id=path)
    set_model_state_dict(objective, state["model"])
    if optimisers:
        set_optimizer_state_dict(objective, optimisers, state["optimiser"])
    return facts


def _facts(path: Path) -> dict[str, Any]:
    if not (path / FACTS).is_file():
        raise InputError(f"the checkpoint {path} is damaged: it has no {FACTS}; {REMEDY}")
    return dict(read_json(path / FACTS, REMEDY))


def _sums(path: Path) -> dict[str, str]:
    return {file.name: file_checksum(file) for file in path.iterdir() if file.name != FACTS}


@contextmanager
def _told(what: str, remedy: str) -> Iterator[None]:
    """Say in a line what PyTorch's writer and reader say in tracebacks of all ranks."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        if isinstance(reason, OSError):
            raise reason from None
        said = " ".join(str(reason).split()) or type(reason).__name__
        raise RunError(f"{what} ({said[:200]}); {remedy}") from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either as it was or complete."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False), sync=True)


def discard(path: Path) -> None:
    """Delete a checkpoint; a kill in between leaves nothing that looks like one."""
    part = path if path.suffix == ".part" else path.rename(path.with_suffix(".part"))
    shutil.rmtree(part)


def _expired(path: Path) -> bool:
    return path.suffix == ".part" or not _facts(path)["permanent"]


def _tensors(objective: nn.Module, optimisers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    state: dict[str, Any] = {"model": get_model_state_dict(objective)}
    if optimisers:
        for optimiser in optimisers:
            _complete(optimiser)
        state["optimiser"] = get_optimizer_state_dict(objective, optimisers)
    return state


def _complete(optimiser: torch.optim.Optimizer) -> None:
    """Give parameters that have had no gradient yet the state that they would start from.

    A new optimiser asks a checkpoint for the state of every parameter.
    """
    if not optimiser.state:
        return
    example = next(iter(optimiser.state.values()))
    for group in optimiser.param_groups:
        for weight in group["params"]:
            if weight not in optimiser.state:
                empty = torch.zeros_like(weight, memory_format=torch.preserve_format)
                optimiser.state[weight] = {
                    name: torch.zeros_like(value) if name == "step" else empty.clone()
                    for name, value in example.items()
                }


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _several() else 0


def _meet() -> None:
    if _several():
        dist.barrier()


def _sync(folder: Path) -> None:
    """Put a rename on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
