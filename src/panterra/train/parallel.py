"""One run in several processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from panterra.errors import InputError

PARALLEL = ("auto", "none", "ddp", "fsdp")
PATIENCE = timedelta(hours=1)
"""How long processes wait for each other: one may write a checkpoint while the others have nothing to do."""
BLOCK_METHODS = ("first", "update")
"""Other ways than a call into a transformer block, for which FSDP gathers its parameters too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Which of the run's processes is this one."""

    device: torch.device
    parallel: Literal["none", "ddp", "fsdp"] = "none"
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0


@contextmanager
def join_ranks(device: str = "auto", parallel: str = "auto") -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it did; leave them at the end of the block.

    A process group that is there already is used and left alone.
    """
    if parallel not in PARALLEL:
        raise InputError(f"parallel={parallel!r} came; choose one of {', '.join(PARALLEL)}")
    rank, world, local_rank = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    joined = dist.is_available() and dist.is_initialized()
    if joined:
        rank, world = dist.get_rank(), dist.get_world_size()
    if parallel == "auto":
        parallel = "ddp" if world > 1 else "none"
    if parallel == "none" and world > 1:
        raise InputError(f"{world} processes came with parallel='none'; use 'ddp' or 'fsdp', or start one process")
    if parallel != "none" and not joined and "RANK" not in os.environ:
        raise InputError(
            f"parallel={parallel!r} needs processes that torchrun started; use torchrun, or parallel='none'"
        )
    here = choose_device(device, local_rank)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    joining = parallel != "none" and not joined
    if joining:
        dist.init_process_group("nccl" if here.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        how = cast(Literal["none", "ddp", "fsdp"], parallel)
        yield Ranks(device=here, parallel=how, rank=rank, world=world, local_rank=local_rank)
    finally:
        if joining:
            dist.destroy_process_group()


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """Give this process its device; "auto" is a GPU where there is one. Raises InputError where torch has no such."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type != "cuda":
            torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):  # AssertionError: built without that kind of device
        raise InputError(f"device {device!r} came; give auto, cpu, cuda or cuda:N") from None
    if chosen.type != "cuda":
        return chosen
    if not torch.cuda.is_available():
        raise InputError(f"device {device!r} came, but torch {torch.__version__} finds no GPU here; use cpu")
    number, there = local_rank if chosen.index is None else chosen.index, torch.cuda.device_count()
    if number >= there:
        asked = f"device {device!r}" if chosen.index is not None else f"{device!r} for process {number} of this machine"
        raise InputError(f"{asked} came, but torch sees {there} GPUs here, counted from 0; use one of those, or cpu")
    return torch.device("cuda", number)


class Losses(nn.Module):
    """An objective whose result is made of plain tensors, as DDP and FSDP need."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, micro: Any, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.objective(micro, generator)
        return out.total, dict(out.terms)


def blocks(module: nn.Module) -> list[nn.Module]:
    """List the transformer blocks, which are what is compiled and what FSDP gathers one at a time."""
    lists = [part for name, part in module.named_modules() if name.rpartition(".")[2] == "blocks"]
    return [block for part in lists if isinstance(part, nn.ModuleList) for block in part]


def compile_blocks(module: nn.Module) -> None:
    """Compile the transformer blocks in place, for sequences of any length."""
    for block in blocks(module):
        block.compile(dynamic=True)


def distribute(objective: nn.Module, ranks: Ranks) -> nn.Module:
    """Make of an objective the model that gives `Losses` and whose gradients are averages over ranks, in float32.

    An objective that leaves out parameters in some steps says so by an attribute `leaves_out_parameters`.
    """
    model = Losses(objective)
    if ranks.parallel == "ddp":
        return nn.parallel.DistributedDataParallel(
            model,
            # A group of its own: an objective's own collectives must not change places with DDP's.
            process_group=dist.new_group(timeout=PATIENCE),
            gradient_as_bucket_view=True,
            find_unused_parameters=bool(getattr(objective, "leaves_out_parameters", False)),
        )
    if ranks.parallel == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        scalars = {weight for weight in objective.parameters() if not weight.ndim}  # which nothing can shard
        for part in (*blocks(objective), model):
            fully_shard(part, mesh=mesh, ignored_params=scalars)
            for method in BLOCK_METHODS:
                if hasattr(part, method):
                    register_fsdp_forward_method(part, method)
    return model


def synchronising(model: nn.Module, ranks: Ranks, *, last: bool) -> AbstractContextManager[None]:
    """Hold gradients back from the other ranks until the last micro-batch."""
    if ranks.parallel == "ddp" and not last:
        return cast(nn.parallel.DistributedDataParallel, model).no_sync()
    if ranks.parallel == "fsdp":
        from torch.distributed.fsdp import FSDPModule

        cast(FSDPModule, model).set_requires_gradient_sync(last)
    return nullcontext()


def whole(objective: nn.Module, ranks: Ranks, build: Callable[[], nn.Module]) -> nn.Module:
    """Give an objective with all of its parameters: itself, or a copy on every rank where FSDP has spread it."""
    if ranks.parallel != "fsdp":
        return objective
    state = {name: full(weight, ranks) for name, weight in objective.state_dict().items()}
    copy = build().to(ranks.device)
    copy.load_state_dict(state)
    return copy


def full(weight: Tensor, ranks: Ranks) -> Tensor:
    """Give a tensor with the parts of all ranks."""
    if ranks.parallel != "fsdp":
        return weight
    from torch.distributed.tensor import DTensor

    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def summed(values: Tensor, ranks: Ranks) -> Tensor:
    """Add up over ranks."""
    if ranks.world > 1:
        dist.all_reduce(values)
    return values


def gathered(value: Any, ranks: Ranks) -> list[Any]:
    """Collect every rank's value."""
    if ranks.world == 1:
        return [value]
    values: list[Any] = [None] * ranks.world
    dist.all_gather_object(values, value)
    return values
