"""What runs on a CPU runs on a CUDA device, to the same numbers; that device is simulated here."""

import copy
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

import test_anysat
import test_jepa
import test_latent_mim
import test_olmoearth
from panterra.cli import main
from panterra.errors import InputError
from panterra.evaluate.probes import FeatureSource, fit_probe
from panterra.evaluate.suite import Plan, evaluate
from panterra.finetune.examples import examples_from_scenes
from panterra.finetune.run import Settings, finetune
from panterra.finetune.step import Tuning
from panterra.imagery.stac import open_scene
from panterra.mapping import run
from panterra.mapping.painter import ModelFiles
from panterra.mapping.sources import Encoding
from panterra.mapping.trials import try_pixels
from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.anysat_attention import chunk_rows
from panterra.models.layers import ROWS
from panterra.models.olmoearth import OlmoEarth
from panterra.planet import write_planet_scene
from panterra.recipes import recipe
from panterra.recipes.plan import crop_tokens, local_power, measure_rate, published_facts
from panterra.sample import collate
from panterra.train import checkpoint
from panterra.train.loop import Check, Options, Run, train
from panterra.train.monitors import collapse_check, latent_mim_vectors
from panterra.train.optim import Optimisation
from panterra.train.parallel import choose_device
from simulated_device import POSSIBLE, DeviceTensor, simulated_cuda

aten = torch.ops.aten
simulated = pytest.mark.skipif(not POSSIBLE, reason="a device is simulated on Linux, by PyTorch 2.13 built for the CPU")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")


@pytest.fixture
def cuda():
    with simulated_cuda() as device:
        yield device


def on_cuda(model):
    return copy.deepcopy(model).to("cuda")


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]


def same_features(found, expected, **tolerances):
    for name in ("patches", "summary", "valid", "dense"):
        one, other = getattr(found, name), getattr(expected, name)
        if other is not None:
            assert one.device.type == "cuda"
            torch.testing.assert_close(one.cpu(), other, **tolerances)


# The simulated device itself.


@simulated
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(3).add_(x.sum()),
        lambda x: torch.cat([x, torch.ones(3)]),
        lambda x: x.masked_fill(torch.ones(3, dtype=torch.bool), 1),
        lambda x: torch.ones(3)[x.long()],
        lambda x: torch.rand(3, device="cuda", generator=torch.Generator()),
        lambda x: x.long()[None] @ x.long()[:, None],
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
    ],
)
def test_it_refuses_what_cuda_refuses(cuda, wrong):
    with pytest.raises((RuntimeError, TypeError)):
        wrong(torch.ones(3, device="cuda"))


@simulated
def test_it_differentiates_as_the_cpu_does(cuda):
    def gradient(x):
        leaf = x.clone().requires_grad_()
        y = leaf[:, None] * leaf
        y[0] = 3 * leaf.conj() if leaf.is_complex() else leaf.exp()
        (y.real.square().sum() + F.pad(leaf, (1, 2)).abs().sum()).backward()
        return leaf.grad

    for x in (torch.tensor([1.0, -2, 3]), torch.tensor([1 + 2j, 3 - 1j])):
        found = gradient(x.to("cuda"))
        assert isinstance(found, DeviceTensor)
        torch.testing.assert_close(found.cpu(), gradient(x))
        assert x.to("cuda")[[0, 1]].tolist() == x[[0, 1]].tolist()


# Models.


@simulated
@pytest.mark.parametrize("version", list(test_olmoearth.CONFIGS))
def test_olmoearth_encodes_there(cuda, version):
    torch.manual_seed(1)
    model = OlmoEarth(test_olmoearth.CONFIGS[version]).eval().requires_grad_(False)
    there, sample = on_cuda(model), test_olmoearth.sample
    one = sample(dates=("2023-04-01",), sensors=("sentinel2_l2a",), seed=3)
    batch = collate([one, sample(seed=4), sample(dates=("2022-12-01", "2023-01-20"), seed=5)])
    o = batch.observations["sentinel2_l2a"]
    valid = o.valid.clone()
    valid[1, 0, :6, :7], valid[2, :, :4, :4] = False, False
    cloudy = replace(batch, observations={**batch.observations, "sentinel2_l2a": replace(o, valid=valid)})
    for attention, given in (("masked", batch), ("masked", cloudy), ("published_eval", batch), ("published_fast", one)):
        model.attention = there.attention = attention
        with torch.no_grad():
            expected, found = model.encode(given, patch_m=40), there.encode(given.to("cuda"), patch_m=40)
            with torch.autocast("cuda", torch.bfloat16):
                rough = there.encode(given.to("cuda"), patch_m=40)
        same_features(found, expected, rtol=1e-4, atol=1e-5)
        same_features(there.encode(given.to("cuda"), patch_m=40), expected, rtol=1e-4, atol=1e-5)
        assert F.cosine_similarity(rough.summary.cpu().float(), expected.summary).min() > 0.99


@simulated
@pytest.mark.parametrize("missing", ["masked", "published"])
def test_anysat_encodes_there(cuda, missing):
    torch.manual_seed(0)
    model = AnySat(AnySatConfig(dim=96, depth=2, heads=2), normalized_input=True, missing=missing).eval()
    there, batch_of = on_cuda(model.requires_grad_(False)), test_anysat.batch_of
    parts = [
        batch_of("sentinel2_l2a", "aerial", dates=2),
        batch_of("sentinel2_l2a", "sentinel1", dates=5, seed=3),
        batch_of("sentinel1", "modis", "landsat7", "alos2", dates=1, seed=7),
    ]
    for batch, dense in ((collate(parts), "sentinel2_l2a"), (batch_of("aerial_flair", "spot", "naip"), True)):
        with torch.no_grad():
            expected = model.encode(batch, patch_m=20, dense=dense)
            found = there.encode(batch.to("cuda"), patch_m=20, dense=dense)
            with torch.autocast("cuda", torch.bfloat16):
                rough = there.encode(batch.to("cuda"), patch_m=20, dense=dense).patches.cpu().float()
        same_features(found, expected, rtol=1e-3, atol=1e-4)
        assert F.cosine_similarity(rough, expected.patches, dim=-1)[expected.valid].min() > 0.97
    fitted = there.with_statistics(there.fit_statistics([parts[0].to("cuda")]))
    assert fitted.statistics_of("aerial") == model.with_statistics(model.fit_statistics([parts[0]])).statistics_of(
        "aerial"
    )


@simulated
def test_a_gpu_is_given_many_tokens_at_once(cuda):
    model = OlmoEarth(test_olmoearth.SMALL).eval().requires_grad_(False).to("cuda")
    dates = [f"2023-{month:02d}-01" for month in range(1, 10)]
    batch = collate([test_olmoearth.sample(dates=dates, sensors=("sentinel2_l2a",), seed=s) for s in range(5)])
    tokens = 5 * 9 * 16 * 3
    assert tokens > 2 * ROWS
    with torch.no_grad():
        model.encode(batch.to("cuda"), patch_m=40)
    assert cuda.calls[aten.addmm.out] == len(model.blocks)  # queries, keys and values of all tokens
    assert cuda.calls[aten.addmm_.default] == 2 * len(model.blocks)
    assert chunk_rows(torch.ones(1, device="cuda")) // 2 <= 65535  # sequences that an attention kernel takes


# Pretraining.


@simulated
@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: test_latent_mim.make(band_dropout=0.5), test_latent_mim.views),
        (lambda: test_latent_mim.make(teacher_seed=3, regulariser={"type": "KoLeo"}), test_latent_mim.views),
        (test_jepa.make, lambda: test_jepa.tiles(("s2", "s1", "modis"))),
    ],
    ids=["latent_mim", "teacher", "jepa"],
)
def test_losses_and_gradients_are_those_of_the_cpu(cuda, make, data):
    torch.manual_seed(0)
    here, given = make(), data()
    there = on_cuda(here)
    losses = [
        model(given.to(device), torch.Generator().manual_seed(1)) for model, device in ((here, "cpu"), (there, "cuda"))
    ]
    for name, term in losses[0].terms.items():
        torch.testing.assert_close(losses[1].terms[name].cpu(), term, rtol=1e-3, atol=1e-4)
    for loss in losses:
        loss.total.backward()
    for (name, one), other in zip(here.named_parameters(), there.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(other.grad.cpu(), one.grad, rtol=2e-3, atol=1e-4)
    with torch.autocast("cuda", torch.bfloat16):
        rough = there(given.to("cuda"), torch.Generator().manual_seed(1))
    rough.total.backward()
    torch.testing.assert_close(rough.total.cpu(), losses[0].total, rtol=0.1, atol=0.05)


class Steps(Dataset):
    def __init__(self, rank, world):
        pass

    def __getitem__(self, step):
        return [test_latent_mim.views(seed=step)]


def write(objective, folder):
    torch.save({name: value.cpu() for name, value in objective.state_dict().items()}, folder / "weights.pt")


@simulated
def test_a_run_trains_there_and_goes_on_where_it_was(cuda, tmp_path):
    vectors = latent_mim_vectors(test_latent_mim.views())
    plan = Run(
        name="there",
        seed=5,
        objective=lambda: test_latent_mim.make(band_dropout=0.3),
        batches=Steps,
        optimisation=Optimisation(lr=1e-3, weight_decay=0.1, steps=2, warmup_steps=1),
        checks=[Check(name="collapse", every=2, run=collapse_check(vectors, every=2).run)],
        export=write,
    )
    options = Options(device="cpu", workers=0, logs=("jsonl",), log_every=1, save_every=1, precision="bfloat16")
    train(plan, tmp_path / "cpu", options)
    train(plan, tmp_path / "one", replace(options, device="cuda"))
    train(plan, tmp_path / "two", replace(options, device="auto", steps_this_time=1))
    train(plan, tmp_path / "two", replace(options, device="cuda:0"))
    for here, there in zip(lines(tmp_path / "cpu"), lines(tmp_path / "one"), strict=True):
        assert here.keys() == there.keys()
        assert all(there[k] == pytest.approx(here[k], rel=0.2) for k in ("loss", "gradient_norm") if k in here)
    one, two = (torch.load(tmp_path / name / "model" / "weights.pt") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    checkpoint.load(checkpoint.newest(tmp_path / "two" / "checkpoints"), test_latent_mim.make())  # on the CPU again


@simulated
def test_the_speed_of_a_gpu_is_measured(cuda):
    settings = recipe("olmoearth-v1.2-nano")
    small = replace(settings, micro_batch=1)
    found = measure_rate(small, crop_tokens(settings, published_facts(settings))[:1], device="cuda:0")
    assert found.flops > 0
    assert "cuda:0" in found.source


def test_the_power_is_that_of_the_gpu_in_use(monkeypatch):
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetPowerManagementLimit=lambda handle: 1000 * (300 + handle),
        NVMLError=OSError,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert [local_power(name).watts for name in ("cuda", "cuda:0", "cuda:2")] == [300, 300, 302]


# What comes after.


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planet") / "scene"
    write_planet_scene(
        folder, seed=3, size_px=64, dates=("2023-06-09", "2023-07-09"), modalities=("sentinel2_l2a",), clouds=0.3
    )
    rng, box = np.random.default_rng(0), open_scene(folder).geobox()
    x, y = box.affine @ (rng.integers(0, 64, (2, 80)) + 0.5)
    told = {"class": np.where(rng.random(80) < 0.5, "a", "b"), "value": rng.random(80)}
    gpd.GeoDataFrame(told, geometry=shapely.points(x, y), crs=str(box.crs)).to_file(folder / "labels.gpkg")
    return folder


def small_olmoearth():
    torch.manual_seed(0)
    return OlmoEarth(test_olmoearth.CONFIGS["v1.2"], name="olmoearth-v1.2-nano").eval().requires_grad_(False)


@simulated
@pytest.mark.parametrize(
    ("task", "column", "options", "tuning"),
    [
        ("segmentation", "class", {"head": "conv", "skip": True}, {"loss": "dice", "class_weights": "balanced"}),
        ("classification", "class", {"head": "attention"}, {"method": "lora", "rank": 2, "precision": "bfloat16"}),
    ],
)
def test_models_are_fine_tuned_there(cuda, scene, tmp_path, task, column, options, tuning):
    found = examples_from_scenes(
        [open_scene(scene)], scene / "labels.gpkg", column=column, task=task, window_px=16, cell_px=1, block_m=160
    )
    how = Tuning(epochs=2, head_first=1, batch_size=16, **tuning)
    results = [
        finetune(found, small_olmoearth(), tmp_path / device, Settings(tuning=how, device=device, **options))
        for device in ("cpu", "cuda")
    ]
    for one, other in zip(*(lines(result.folder) for result in results), strict=True):
        assert other["val/loss"] == pytest.approx(one["val/loss"], rel=0.02 if how.precision == "float32" else 0.2)
    assert all(value.device.type == "cpu" for value in results[1].model.state_dict().values())


@simulated
@pytest.mark.usefixtures("root")
def test_the_suite_takes_encoders_to_the_device(cuda, root, tmp_path):
    plan = Plan(
        models=(small_olmoearth(),),
        benchmarks=(("planet_classes", root), ("planet_pixels", root)),
        protocols=("knn", "linear", "attention", "interpolate"),
        compressions=("none", "pca8"),
        rates=(1e-2, 1e-1),
        epochs=1,
        limit=12,
    )
    here, there = (evaluate(replace(plan, device=d), tmp_path / d) for d in ("cpu", "cuda"))
    assert [row.error for row in there] == [None] * len(here)
    for one, other in zip(here, there, strict=True):
        assert other.score.estimate == pytest.approx(one.score.estimate, abs=0.05)
    assert next(plan.models[0].parameters()).device.type == "cpu"  # a copy went


@simulated
@pytest.mark.parametrize("kind", ["logistic", "ridge", "knn"])
def test_probes_are_fitted_there(cuda, tmp_path, kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 6)).astype(np.float32)
    y = (x[:, 0] + 0.5 * rng.normal(size=120) > 0).astype(int)
    (here, said), (there, told) = (
        fit_probe(features, targets, kind=kind, groups=np.arange(120) // 6)
        for features, targets in ((x, y), (torch.tensor(x, device="cuda"), torch.tensor(y, device="cuda")))
    )
    for name, figure in said.metrics.items():
        assert told.metrics[name].estimate == pytest.approx(figure.estimate, abs=1e-3)
    for features in (x, torch.tensor(x, device="cuda")):
        shares = there.probabilities(features)
        np.testing.assert_allclose(torch.as_tensor(shares).cpu(), here.probabilities(x), atol=1e-3)
    there.save(tmp_path / "probe")


@simulated
def test_a_scene_is_embedded_and_mapped_there(cuda, scene, tmp_path):
    encoder = small_olmoearth()
    there, where = on_cuda(encoder), open_scene(scene)
    cut = {"patch_m": 40, "window_px": 32, "overlap_px": 8, "tile_px": 48}
    stores = [run.embed(where, e, tmp_path / n, **cut) for e, n in ((encoder, "a.tif"), (there, "b.tif"))]
    rows = []
    for store in stores:
        with rasterio.open(store.path) as file:
            rows.append(file.read().reshape(file.count, -1).T)
    np.testing.assert_allclose(rows[1], rows[0], rtol=1e-3, atol=1e-4)
    known = rows[0][np.isfinite(rows[0]).all(1)]
    source = FeatureSource(encoder=encoder.name, patch_m=40, modalities=("sentinel2_l2a",), window_px=32)
    codes, groups = np.arange(len(known)) % 2, np.arange(len(known)) // 8
    probe, _ = fit_probe(torch.tensor(known, device="cuda"), codes, kind="ridge", groups=groups, source=source)
    maps = [
        run.map(where, probe, tmp_path / f"{n}-map.tif", model=e, probabilities=True, tile_px=48)
        for e, n in ((encoder, "a"), (there, "b"))
    ]
    shares = []
    for result in maps:
        with rasterio.open(result.probabilities) as file:
            shares.append(file.read())
    np.testing.assert_allclose(shares[1], shares[0], atol=2e-3)
    work = Encoding.plan(where, there, box=None, modalities=None, batch_windows=2, workers=1, **cut)
    assert math.isfinite(try_pixels(work).seconds.value)


@simulated
def test_commands_compute_there(cuda, scene, tmp_path, capsys):
    drawn = ["--model", "olmoearth-v1.2-nano", "--random", "0", "--patch-m", "80", "--window-px", "32"]
    store, probe, out = (tmp_path / name for name in ("store.tif", "probe", "map.tif"))
    there = ["--device", "cuda", "--json"]
    assert main(["embed", str(scene), *drawn, "--overlap-px", "0", "--out", str(store), *there]) == 0
    cut = ["--column", "value", "--kind", "ridge", "--split", "random", "--out", str(probe)]
    assert main(["probe", str(store), "--labels", str(scene / "labels.gpkg"), *cut]) == 0
    assert main(["map", str(scene), "--probe", str(probe), "--out", str(out), *there]) == 0
    capsys.readouterr()
    assert main(["plan", str(scene), "--probe", str(probe), "--measure", *there]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "cuda"
    for made in (store, out):
        told = json.loads(made.with_name(f"{made.name}.json").read_text("utf-8"))["properties"]
        assert told["panterra:model"]["device"] == "cuda"


def test_a_worker_on_a_cluster_takes_the_gpu_that_it_is_given(tmp_path):
    files = ModelFiles(folder=tmp_path, tuned=False, about={}, settings={}, device="cuda:3", dtype=None)
    assert files.carried().device == "cuda"


# Devices that are not there.


@without_gpu
@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps", "xpu", ""])
def test_what_is_no_device_is_refused(name):
    with pytest.raises(InputError, match="give auto, cpu, cuda or cuda:N"):
        choose_device(name)


@simulated
def test_a_gpu_is_chosen_among_those_that_are_there(cuda):
    assert [str(choose_device(name)) for name in ("auto", "cuda", "cuda:0", "cpu")] == ["cuda:0"] * 3 + ["cpu"]
    with pytest.raises(InputError, match="device 'cuda:9' came, but torch sees 1 GPUs here"):
        choose_device("cuda:9")
    with pytest.raises(InputError, match="for process 1 of this machine came, but torch sees 1"):
        choose_device("cuda", local_rank=1)


@without_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:9", "gpu"])
@pytest.mark.parametrize(
    "command",
    [
        ["finetune", "no-scene", "--labels", "none.gpkg", "--model", "no-model"],
        ["finetune", "--dataset", "eurosat_ms", "--root", "nowhere", "--model", "no-model"],
        ["evaluate", "--models", "no-model", "--benchmarks", "eurosat_ms=nowhere"],
        ["pretrain", "olmoearth-v1.2-nano", "--data", "nowhere"],
        ["pretrain", "anysat-geoplex", "--data", "nowhere"],
        ["pretrain", "panterra-nano"],
        ["pretrain", "olmoearth-v1.2-nano", "--dry-run", "--data", "nowhere"],
        ["embed", "no-scene", "--model", "no-model"],
        ["probe", "no-scene", "--labels", "none.gpkg", "--model", "no-model"],
        ["map", "no-scene", "--probe", "no-probe"],
        ["detect", "no-scene", "--model", "no-model"],
        ["plan", "no-scene", "--model", "no-model"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_missing_gpu_is_told_before_anything_is_read(tmp_path, capsys, command, name):
    out = [] if "--dry-run" in command or "plan" in command else ["--out", str(tmp_path / "out")]
    assert main([*command, *out, "--device", name]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert f"device {name!r} came" in said
    assert not (tmp_path / "out").exists()
