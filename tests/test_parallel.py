import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from panterra.errors import InputError
from panterra.models.predictor import VISIBLE
from panterra.objectives.jepa import JEPA
from panterra.objectives.latent_mim import LatentMIM, View, Views
from panterra.objectives.teacher import follow
from panterra.recipes.anysat import run_from
from panterra.train import checkpoint
from panterra.train.loop import Check, Options, Run, Stopped, export, train
from panterra.train.optim import Optimisation
from panterra.train.parallel import blocks, choose_device, join_ranks
from test_anysat_recipes import Tiles, small
from test_latent_mim import config, views

STEPS = 3
HERE = {"device": "cpu", "workers": 0, "logs": ("jsonl",), "log_every": 1}


class Batches(Dataset):
    """Two micro-batches a step, of which each of `world` ranks has its part of the samples."""

    def __init__(self, rank, world):
        self.rank, self.world = rank, world

    def __getitem__(self, step):
        size = 4 // self.world
        pick = slice(self.rank * size, (self.rank + 1) * size)
        return [
            Views(
                tuple(
                    View(
                        inputs={m: x[pick] for m, x in view.inputs.items()},
                        timestamps=view.timestamps[pick],
                        masks={m: x[pick] for m, x in view.masks.items()},
                        patch_px=view.patch_px,
                    )
                    for view in views(4, seed=2 * step + micro)
                )
            )
            for micro in range(2)
        ]


class Spoilt(Batches):
    """The second rank's second micro-batch of the second step is not a number."""

    def __getitem__(self, step):
        batch = super().__getitem__(step)
        if self.rank == 1 and step == 1:
            for x in batch[1].views[0].inputs.values():
                x.fill_(torch.nan)
        return batch


class Ended(Batches):
    """A signal reaches the second rank alone while it makes its second batch."""

    def __getitem__(self, step):
        if self.rank == 1 and step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(step)


def build(across_ranks=True):
    return LatentMIM(config(across_ranks=across_ranks))


@torch.no_grad()
def weights(module, _step):
    """Sum up a whole objective, which a check must have at hand."""
    (view,) = views(1, number=1)
    visible = {m: mask == VISIBLE for m, mask in view.masks.items()}
    module.encoder(view.inputs, view.timestamps, patch_px=2, visible=visible)
    return {"sum": sum(float(w.double().abs().sum()) for w in module.parameters())}


def run_of(batches=Batches, objective=build):
    return Run(
        name="two",
        seed=1,
        objective=objective,
        batches=batches,
        optimisation=Optimisation(lr=1e-3, weight_decay=0.02, steps=STEPS, warmup_steps=1, clip_norm=0.5),
        before_step=lambda objective, step: follow(objective.teacher, objective.encoder, 0.9),
        checks=[Check(name="weights", every=2, run=weights)],
        export=lambda objective, folder: torch.save(objective.state_dict(), folder / "weights.pt"),
    )


class BothRanks(Dataset):
    """What two ranks are given, as the micro-batches of one."""

    def __init__(self, _rank, _world):
        self.ranks = [anysat_run(2).batches(rank, 2) for rank in range(2)]

    def __getitem__(self, step):
        return [micro for rank in self.ranks for micro in rank[step]]


class Undropped(JEPA):
    """Without dropout, which is drawn for each rank."""

    def train(self, _mode=True):
        return super().train(False)


def anysat_run(world):
    run = run_from(small(), {"planted": Tiles()}, world=world)
    return replace(
        run,
        objective=lambda: Undropped(small().objective),
        export=lambda objective, folder: torch.save(objective.state_dict(), folder / "weights.pt"),
        best_of=None,  # an epoch of two ranks has fewer steps
    )


def one_of_two(rank, folder, port):
    """Do all that takes two processes, so that they start once."""
    torch.set_num_threads(1)
    # As torchrun would start them.
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    try:
        train(run_of(Ended), folder / "ended", Options(**HERE))
    except Stopped as error:
        (folder / f"ended-{rank}").write_text(str(error))
    assert not dist.is_initialized()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for how in ("ddp", "fsdp"):
        train(run_of(), folder / how, Options(parallel=how, **HERE))
        train(run_of(), folder / f"{how}-half", Options(parallel=how, steps_this_time=2, **HERE))
        train(run_of(), folder / f"half-{how}", Options(parallel=how, **HERE))
        train(run_of(), folder / f"{how}-bfloat16", Options(parallel=how, precision="bfloat16", **HERE))
        train(anysat_run(2), folder / f"anysat-{how}", Options(parallel=how, **HERE))
    try:
        train(run_of(Spoilt, objective=lambda: build(across_ranks=False)), folder / "spoilt", Options(**HERE))
    except FloatingPointError as error:
        (folder / f"spoilt-{rank}").write_text(str(error))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    train(run_of(), folder / "one", Options(**HERE))
    train(replace(anysat_run(1), batches=BothRanks), folder / "anysat-one", Options(**HERE))
    for how in ("ddp", "fsdp"):
        train(run_of(), folder / f"half-{how}", Options(steps_this_time=2, **HERE))
    # A process of its own, which only imports and forks: what is slow to import is so once.
    done = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def small_anysat():
    torch.manual_seed(anysat_run(1).init_seed)
    return anysat_run(1).objective()


def difference(one, other):
    return sum(float((one[name].double() - other[name]).square().sum()) for name in one) ** 0.5


def exported(folder: Path):
    return torch.load(folder / "model" / "weights.pt")


def lines(folder: Path):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does_with_the_doubled_batch(folder, how):
    for one, two in zip(lines(folder / "one"), lines(folder / how), strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"samples_per_s"}:
            assert two[name] == pytest.approx(one[name], rel=1e-5), name
    one, two = exported(folder / "one"), exported(folder / how)
    start = build().state_dict()
    moved = [name for name in one if not torch.equal(one[name], start[name])]
    assert any("teacher" in name for name in moved)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_anysat_as_one_does(folder, how):
    for one, two in zip(lines(folder / "anysat-one"), lines(folder / f"anysat-{how}"), strict=True):
        for name in one.keys() - {"samples_per_s"}:
            assert two[name] == pytest.approx(one[name], rel=1e-4), name
    start = small_anysat().state_dict()
    moved = difference(exported(folder / "anysat-one"), start)
    # AdamW makes whole steps of gradients that are all rounding, so that single weights say nothing.
    assert difference(exported(folder / f"anysat-{how}"), exported(folder / "anysat-one")) < 0.02 * moved


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_checkpoints_know_no_number_of_processes(folder, how):
    train(run_of(), folder / f"{how}-half", Options(**HERE))
    for way in (f"{how}-half", f"half-{how}"):
        one, other = exported(folder / "one"), exported(folder / way)
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-5)
        assert [line["step"] for line in lines(folder / way)] == [0, 1, 2, 3]


def test_one_process_exports_what_two_have_saved(folder, tmp_path):
    export(run_of(), folder / "fsdp", tmp_path / "model")
    one, other = exported(folder / "fsdp"), exported(tmp_path)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_bfloat16_stays_near_float32(folder, how):
    exact, rough = lines(folder / how), lines(folder / f"{how}-bfloat16")
    assert rough[1]["loss"] != exact[1]["loss"]
    for a, b in zip(exact[1:], rough[1:], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02)
    assert all(x.dtype == torch.float32 for x in exported(folder / f"{how}-bfloat16").values())


def test_all_ranks_stop_at_the_batch_that_one_finds_not_finite(folder):
    for rank in range(2):
        assert "micro-batch 1 of rank 1: loss nan" in (folder / f"spoilt-{rank}").read_text()
    report = json.loads((folder / "spoilt" / "nonfinite.json").read_text())
    assert [(r["step"], r["rank"], r["micro_batches"]) for r in report["ranks"]] == [(1, 0, []), (1, 1, [1])]


def test_a_signal_to_one_rank_ends_all_after_the_same_step(folder):
    for rank in range(2):
        assert f"stopped the run after step 2 of {STEPS}" in (folder / f"ended-{rank}").read_text()
    assert checkpoint.newest(folder / "ended" / "checkpoints").name == "step_00000002"


def test_blocks_are_those_of_encoder_and_predictor():
    model = build()
    assert blocks(model) == [*model.encoder.blocks, *model.predictor.blocks]


@pytest.mark.parametrize(
    ("parallel", "message"),
    [("ddp", "needs processes that torchrun started"), ("zero", "choose one of auto, none, ddp, fsdp")],
)
def test_what_cannot_be_parallel_is_said(parallel, message, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match=message), join_ranks("cpu", parallel):
        pass


def test_several_processes_are_not_left_to_themselves(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes came with parallel='none'"), join_ranks("cpu", "none"):
        pass


def test_a_device_is_checked():
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="device 'toaster' came"):
        choose_device("toaster")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="finds no GPU here"):
            choose_device("cuda")


if __name__ == "__main__":
    import torch._dynamo
    import torch.distributed.checkpoint.state_dict_loader
    import torch.distributed.checkpoint.state_dict_saver
    import torch.distributed.fsdp

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(one_of_two, (Path(sys.argv[1]), port), nprocs=2, start_method="fork")
