import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from panterra.errors import InputError, RunError
from panterra.train import checkpoint
from panterra.train.loop import Check, Options, Run, Stopped, export, seed_micro, train
from panterra.train.optim import Optimisation, learning_rate

HERE = Options(device="cpu", workers=0, logs=("jsonl",), log_every=1, save_every=4, keep_every=10)


class Points:
    """Samples of a line."""

    def __init__(self, x, y):
        self.x, self.y, self.samples = x, y, len(x)

    def to(self, device):
        return Points(self.x.to(device), self.y.to(device))


class Lines(Dataset):
    """Two micro-batches a step; subclasses spoil what a step brings."""

    def __init__(self, rank=0, world=1):
        assert (rank, world) == (0, 1)

    def __getitem__(self, step):
        x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(step))
        return [Points(part, part.sum(1, keepdim=True)) for part in x]


class Fit(nn.Module):
    """Regression with both kinds of randomness."""

    def __init__(self, noise=0.1):
        super().__init__()
        self.noise = noise
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(noise), nn.Linear(8, 1))

    def forward(self, points, generator=None):
        drawn = self.noise * torch.randn(points.x.shape, generator=generator)
        error = self.model(points.x + drawn.to(points.x)) - points.y
        total = error.float().square().mean()
        return SimpleNamespace(total=total, terms={"error": error.detach().float().abs().mean()})


def write(objective, folder):
    torch.save(objective.state_dict(), folder / "weights.pt")


RUN = Run(
    name="line",
    seed=5,
    objective=Fit,
    batches=Lines,
    optimisation=Optimisation(lr=0.05, weight_decay=0.1, steps=12, warmup_steps=3, clip_norm=0.5),
    export=write,
)


def exported(folder):
    return torch.load(folder / "model" / "weights.pt")


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one | other)


def lines(folder):
    """Read all that two equal runs have in common."""
    read = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "samples_per_s"} for line in read]


def steps_of(folder):
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())


def test_the_loop_is_what_its_parts_say(tmp_path):
    result = train(RUN, tmp_path, HERE)
    torch.manual_seed(RUN.init_seed)
    model = Fit()
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    for step in range(12):
        optimiser.zero_grad()
        for i, micro in enumerate(Lines()[step]):
            generator = seed_micro(RUN.seed, step, 0, i)
            (model(micro, generator).total / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.param_groups[0]["lr"] = learning_rate(step + 1, RUN.optimisation)
        optimiser.step()
        logged = lines(tmp_path)[step]
        assert logged["step"] == step + 1
        assert logged["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert logged["learning_rate"] == optimiser.param_groups[0]["lr"]
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(exported(tmp_path)[name], weight, rtol=1e-5, atol=1e-6)
    assert (result.step, result.finished, result.samples) == (12, True, 96)
    assert result.loss == lines(tmp_path)[-1]["loss"]
    assert result.model == tmp_path / "model"


def test_the_best_stretch_is_exported_whether_or_not_the_run_was_stopped(tmp_path):
    class Harder(Lines):
        """Lines whose slope grows from the ninth step on."""

        def __getitem__(self, step):
            return [Points(part.x, part.y * (1 + 4 * (step > 7))) for part in super().__getitem__(step)]

    run = replace(RUN, best_of=4, batches=Harder)
    quiet = replace(HERE, save_every=3)
    train(run, tmp_path / "whole", quiet)
    losses = [line["loss"] for line in lines(tmp_path / "whole")]
    means = [sum(losses[i : i + 4]) / 4 for i in (0, 4, 8)]
    best = 4 * (means.index(min(means)) + 1)
    assert best < 12
    train(replace(run, best_of=None), tmp_path / "until", replace(quiet, steps_this_time=best))
    export(run, tmp_path / "until", tmp_path / "until" / "model")
    assert same(exported(tmp_path / "whole"), exported(tmp_path / "until"))
    for done in (5, 7):
        result = train(run, tmp_path / "parts", replace(quiet, steps_this_time=done))
    assert result.finished
    assert same(exported(tmp_path / "whole"), exported(tmp_path / "parts"))
    train(run, tmp_path / "parts", quiet)
    assert same(exported(tmp_path / "whole"), exported(tmp_path / "parts"))
    train(replace(run, best_of=13), tmp_path / "short", quiet)
    export(run, tmp_path / "whole", tmp_path / "whole" / "model")
    assert same(exported(tmp_path / "short"), exported(tmp_path / "whole"))
    assert not same(exported(tmp_path / "short"), exported(tmp_path / "until"))


def test_micro_batches_of_one_size_are_one_batch(tmp_path):
    class Whole(Lines):
        def __getitem__(self, step):
            a, b = super().__getitem__(step)
            return [Points(torch.cat([a.x, b.x]), torch.cat([a.y, b.y]))]

    quiet = replace(RUN, objective=lambda: Fit(noise=0.0))
    train(quiet, tmp_path / "parts", HERE)
    train(replace(quiet, batches=Whole), tmp_path / "whole", HERE)
    for one, other in zip(lines(tmp_path / "parts"), lines(tmp_path / "whole"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_run_in_pieces_is_the_run_in_one(tmp_path):
    checks = [Check(name="bias", every=3, run=lambda objective, step: {"out": objective.model[2].bias.item()})]
    run = replace(RUN, checks=checks)
    train(run, tmp_path / "one", HERE)
    for pieces in (1, 6, 2):
        result = train(run, tmp_path / "pieces", replace(HERE, steps_this_time=pieces))
        assert not result.finished
    assert train(run, tmp_path / "pieces", replace(HERE, workers=2)).finished
    assert same(exported(tmp_path / "one"), exported(tmp_path / "pieces"))
    assert lines(tmp_path / "one") == lines(tmp_path / "pieces")
    assert [line["step"] for line in lines(tmp_path / "one")] == list(range(13))
    checked = [line["step"] for line in lines(tmp_path / "one") if "bias/out" in line]
    assert checked == [0, 3, 6, 9, 12]
    weights = exported(tmp_path / "one")
    again = train(run, tmp_path / "one", HERE)  # there is nothing left to do
    assert again.loss == lines(tmp_path / "one")[-1]["loss"]
    assert same(weights, exported(tmp_path / "one"))
    assert len(lines(tmp_path / "one")) == 13


def test_a_run_that_another_process_is_at_is_left_alone(tmp_path, claimed_elsewhere):
    kill = claimed_elsewhere(tmp_path / "run")
    with pytest.raises(InputError, match="another process is making the run in"):
        train(RUN, tmp_path / "run", HERE)
    kill()
    assert train(RUN, tmp_path / "run", HERE).finished


def test_damaged_settings_of_a_run_are_told_of(tmp_path):
    train(RUN, tmp_path, replace(HERE, steps_this_time=2))
    (tmp_path / "run.json").write_text('{"run": ')
    with pytest.raises(InputError, match=r"run\.json is damaged .*put back a copy, or choose another folder"):
        train(RUN, tmp_path, HERE)


def killed_again_and_again(folder):
    """Start a run, kill it at some moment, until it is through; say how often that was."""
    moments, patience, kills = random.Random(7), 0.1, 0
    while not (folder / "result.json").exists():
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            # As SIGKILL this ends a process at once, and a busy system cannot delay it until the run is through.
            signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.001, patience))
            train(LONG, folder, replace(HERE, save_every=2))
            os._exit(0)
        patience *= 1.2
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
    return kills


LONG = replace(RUN, optimisation=replace(RUN.optimisation, steps=60))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_minus_nine_at_any_moment_changes_nothing(tmp_path):
    train(LONG, tmp_path / "one", HERE)
    # A process of its own, which only imports and forks: each start then takes milliseconds.
    done = subprocess.run([sys.executable, __file__, tmp_path / "killed"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3, "the run was hardly disturbed"
    assert same(exported(tmp_path / "one"), exported(tmp_path / "killed")), done.stdout
    assert lines(tmp_path / "one") == lines(tmp_path / "killed")


def test_a_half_written_checkpoint_is_not_taken(tmp_path):
    train(RUN, tmp_path, replace(HERE, steps_this_time=5))
    part = tmp_path / "checkpoints" / "step_00000009.part"
    part.mkdir()
    (part / "__0_0.distcp").write_bytes(b"cut")
    assert train(RUN, tmp_path, replace(HERE, steps_this_time=1)).step == 6
    assert not part.exists()


def test_temporary_checkpoints_go_and_permanent_ones_stay(tmp_path):
    seen = []
    Path(tmp_path / "checkpoints").mkdir()
    run = replace(RUN, optimisation=replace(RUN.optimisation, steps=23))
    train(run, tmp_path, HERE, progress=lambda done, total, rate: seen.append(steps_of(tmp_path)))
    assert seen[4] == [4]
    assert seen[9] == [8]
    assert seen[11] == [10]
    assert seen[18] == [10, 16]
    assert steps_of(tmp_path) == [10, 20, 23]


def test_randomness_comes_from_the_place_in_the_run():
    def draw(*place):
        generator = seed_micro(*place)
        return float(torch.rand((), generator=generator)), float(torch.rand(()))

    places = [(5, 0, 0, 0), (6, 0, 0, 0), (5, 1, 0, 0), (5, 0, 1, 0), (5, 0, 0, 1)]
    drawn = [number for place in places for number in draw(*place)]
    assert len(set(drawn)) == 10
    assert draw(*places[0]) == tuple(drawn[:2])


class Spoilt(Lines):
    def __getitem__(self, step):
        batch = super().__getitem__(step)
        if step == 7:
            batch[1].x[2, 0] = torch.inf
        return batch


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(tmp_path):
    run = replace(RUN, batches=Spoilt)
    for _ in range(2):  # starting again changes nothing
        with pytest.raises(FloatingPointError, match=r"batch 7 .* micro-batch 1 of rank 0: loss (inf|nan); no update"):
            train(run, tmp_path, HERE)
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    (found,) = report["ranks"]
    assert (found["seed"], found["step"], found["rank"], found["micro_batches"]) == (5, 7, 0, [1])
    assert found["terms"][1]["error"] in ("inf", "nan")
    assert len(lines(tmp_path)) == 7
    train(RUN, tmp_path / "good", replace(HERE, steps_this_time=7))
    export(run, tmp_path, tmp_path / "model")
    export(RUN, tmp_path / "good", tmp_path / "good" / "model")
    assert same(exported(tmp_path), exported(tmp_path / "good"))
    # What the report says is enough to meet the loss again.
    model = Fit()
    model.load_state_dict(exported(tmp_path))
    micro = run.batches(0, 1)[found["step"]][1]
    assert not model(micro, seed_micro(found["seed"], 7, 0, 1)).total.isfinite()


class Root(nn.Module):
    """A finite loss of which the gradient is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, points, generator=None):
        return SimpleNamespace(total=self.weight.sqrt(), terms={})


def test_a_gradient_that_is_not_finite_stops_the_run_too(tmp_path):
    with pytest.raises(FloatingPointError, match=r"batch 0 .* gradient norm inf; no update was made"):
        train(replace(RUN, objective=Root), tmp_path, HERE)
    assert steps_of(tmp_path) == [] if (tmp_path / "checkpoints").exists() else True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path, number):
    def interrupt(done, total, rate):
        if done == 5:  # as terminals and schedulers do
            for process in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
                os.kill(process, number)

    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=rf"{number.name} stopped the run after step 6 of 12; start it again"):
        train(RUN, tmp_path / "stopped", replace(HERE, workers=1), progress=interrupt)
    assert signal.getsignal(number) == before
    assert checkpoint.newest(tmp_path / "stopped" / "checkpoints").name == "step_00000006"
    train(RUN, tmp_path / "stopped", HERE)
    train(RUN, tmp_path / "one", HERE)
    assert same(exported(tmp_path / "one"), exported(tmp_path / "stopped"))
    assert lines(tmp_path / "one") == lines(tmp_path / "stopped")


class Crash(Lines):
    def __getitem__(self, step):
        if step == 6:
            os._exit(3)
        return super().__getitem__(step)


def test_a_worker_that_dies_leaves_a_valid_checkpoint(tmp_path):
    message = "a worker that makes batches ended with exit code 3; start the run again"
    with pytest.raises(RunError, match=message):
        train(replace(RUN, batches=Crash), tmp_path / "crashed", replace(HERE, workers=1, save_every=1))
    train(RUN, tmp_path / "crashed", HERE)
    train(RUN, tmp_path / "one", HERE)
    assert same(exported(tmp_path / "one"), exported(tmp_path / "crashed"))


def test_a_worker_that_is_killed_during_a_checkpoint_leaves_it_whole(tmp_path, monkeypatch):
    def kill(path, value):
        if value.get("step") == 4:
            (one, _) = multiprocessing.active_children()
            one.kill()
            wait([one.sentinel])
        write_json(path, value)

    write_json = checkpoint.write_json
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", kill)
        with pytest.raises(RunError, match="a worker that makes batches was killed by SIGKILL; start the run"):
            train(RUN, tmp_path / "killed", replace(HERE, workers=2, save_every=1))
    assert steps_of(tmp_path / "killed") == [4]
    assert not multiprocessing.active_children()  # the other worker went with it
    train(RUN, tmp_path / "killed", HERE)
    train(RUN, tmp_path / "one", HERE)
    assert same(exported(tmp_path / "one"), exported(tmp_path / "killed"))


class Refusing(Lines):
    def __getitem__(self, step):
        raise InputError("window 7 is broken; write it anew")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_with_the_data_is_said_as_the_data_set_says_it(tmp_path, workers):
    with pytest.raises(InputError, match=r"^window 7 is broken; write it anew$"):
        train(replace(RUN, batches=Refusing), tmp_path, replace(HERE, workers=workers))


def test_another_run_is_not_continued(tmp_path):
    run = replace(RUN, settings={"model": {"dim": 8, "depth": 2}, "folder": Path("a")})
    train(run, tmp_path, replace(HERE, steps_this_time=2))
    other = replace(
        run,
        optimisation=replace(RUN.optimisation, lr=0.1),
        settings={"model": {"dim": 16, "depth": 2}, "folder": Path("a")},
    )
    message = r"other settings \(optimisation.lr was 0.05 and is 0.1, settings.model.dim was 8 and is 16\)"
    with pytest.raises(InputError, match=message):
        train(other, tmp_path, HERE)
    assert train(run, tmp_path, HERE).finished


def test_checks_see_the_objective_at_rest(tmp_path):
    seen = []

    def look(objective, step):
        seen.append((step, objective.training))
        torch.manual_seed(0)  # a check may draw as it likes
        return {"two": 2}

    train(replace(RUN, checks=[Check(name="look", every=5, run=look)]), tmp_path / "checked", HERE)
    train(RUN, tmp_path / "one", HERE)
    assert seen == [(0, False), (5, False), (10, False), (12, False)]
    assert same(exported(tmp_path / "one"), exported(tmp_path / "checked"))


def test_what_comes_before_an_update_finds_gradients_and_old_weights(tmp_path):
    seen = []

    def look(objective, step):
        weight = next(p for p in objective.parameters() if p.grad is not None)
        seen.append((step, weight.detach().clone(), weight.grad.abs().sum() > 0))

    started = RUN.objective
    torch.manual_seed(RUN.init_seed)
    first = next(p for p in started().parameters() if p.requires_grad)
    train(replace(RUN, before_update=look), tmp_path, replace(HERE, steps_this_time=2))
    assert [step for step, _, _ in seen] == [0, 1]
    assert all(found for _, _, found in seen)
    assert torch.equal(seen[0][1], first)
    assert not torch.equal(seen[1][1], first)


def test_before_each_step_a_teacher_may_follow(tmp_path):
    steps = []
    train(replace(RUN, before_step=lambda objective, step: steps.append(step)), tmp_path, HERE)
    assert steps == list(range(12))


def test_a_model_comes_from_any_checkpoint(tmp_path):
    train(RUN, tmp_path / "long", HERE)
    train(replace(RUN), tmp_path / "short", replace(HERE, steps_this_time=10))
    assert export(RUN, tmp_path / "long", tmp_path / "at-ten" / "model", step=10) == tmp_path / "at-ten" / "model"
    export(RUN, tmp_path / "short", tmp_path / "short" / "model")
    assert same(exported(tmp_path / "at-ten"), exported(tmp_path / "short"))
    with pytest.raises(InputError, match="no checkpoint of step 3 in"):
        export(RUN, tmp_path / "long", tmp_path / "x", step=3)
    with pytest.raises(InputError, match="says no way to export"):
        export(replace(RUN, export=None), tmp_path / "long", tmp_path / "x")


def test_energy_adds_up_over_resumes(tmp_path):
    first = train(RUN, tmp_path, replace(HERE, steps_this_time=5, country="FRA"))
    second = train(RUN, tmp_path, replace(HERE, country="FRA"))
    assert 0 < first.kwh < second.kwh
    assert 0 < first.seconds < second.seconds
    assert second.co2e_kg == pytest.approx(second.kwh * 0.056)
    kept = json.loads((tmp_path / "result.json").read_text())
    assert kept["kwh"] == second.kwh
    assert kept["energy"]


def test_bfloat16_leaves_weights_in_float32(tmp_path):
    train(RUN, tmp_path / "exact", HERE)
    train(RUN, tmp_path / "rough", replace(HERE, precision="bfloat16"))
    assert all(weight.dtype == torch.float32 for weight in exported(tmp_path / "rough").values())
    exact, rough = lines(tmp_path / "exact"), lines(tmp_path / "rough")
    assert exact[0]["loss"] != rough[0]["loss"]
    assert rough[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.2)


class Deep(Fit):
    """Its blocks are what is compiled."""

    def __init__(self):
        super().__init__(noise=0.0)
        self.model = nn.Identity()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.GELU()) for _ in range(2))

    def forward(self, points, generator=None):
        x = points.x
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(total=(x.sum(1, keepdim=True) - points.y).square().mean(), terms={})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own, in its compiler
def test_compiled_blocks_give_the_same(tmp_path):
    run = replace(RUN, objective=Deep)
    train(run, tmp_path / "eager", HERE)
    train(run, tmp_path / "compiled", replace(HERE, compile=True))
    for one, other in zip(lines(tmp_path / "eager"), lines(tmp_path / "compiled"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_trains_as_the_processor_does(tmp_path, precision):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    run = replace(RUN, objective=Deep)
    train(run, tmp_path / "cpu", HERE)
    train(run, tmp_path / "gpu", replace(HERE, device="cuda", precision=precision, steps_this_time=6))
    train(run, tmp_path / "gpu", replace(HERE, device="cuda", precision=precision))
    for one, other in zip(lines(tmp_path / "cpu"), lines(tmp_path / "gpu"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3 if precision == "float32" else 0.1)


@pytest.mark.parametrize(
    ("options", "message"), [({"precision": "float16"}, "float32 or bfloat16"), ({"log_every": 0}, "give 1 or more")]
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        replace(HERE, **options)


if __name__ == "__main__":
    import torch._dynamo
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.checkpoint.state_dict_loader
    import torch.distributed.checkpoint.state_dict_saver

    folder = Path(sys.argv[1])
    print(killed_again_and_again(folder))
