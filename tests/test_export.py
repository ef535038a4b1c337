"""Exports are equal to their encoder, open like one, and appear whole or not at all."""

import json
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import panterra
from panterra.commands import export as command
from panterra.errors import InputError
from panterra.mapping import export as module
from panterra.mapping.export import export
from panterra.mapping.export_looks import planet_samples
from panterra.mapping.run import embed
from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.exported import Exported
from panterra.models.features import Encoder, Fitted
from panterra.models.olmoearth import OlmoEarth, released_config
from panterra.models.weights import load_model, passport, save_model
from panterra.planet import write_planet_scene
from panterra.sample import Batch, Observation, collate

S2_S1 = ("sentinel2_l2a", "sentinel1")
SHAPE = {"modalities": S2_S1, "dates": 2, "window_px": 16, "patch_m": 40}


def small_olmoearth() -> OlmoEarth:
    torch.manual_seed(0)
    config = replace(released_config("v1.2", "nano"), dim=16, depth=1, heads=2)
    return OlmoEarth(config, name="small").eval().requires_grad_(False)


def small_anysat(**shape) -> AnySat:
    torch.manual_seed(0)
    model = AnySat(AnySatConfig(dim=32, depth=1, heads=1), name="small").eval().requires_grad_(False)
    return model.with_statistics(model.fit_statistics([planet_samples(module.Signature(**shape))]))


@pytest.fixture(scope="module")
def olmoearth():
    return small_olmoearth()


@pytest.fixture(scope="module")
def folder(olmoearth, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "olmoearth"
    export(olmoearth, out, engine="torch", **SHAPE)
    return out


@pytest.fixture(scope="module")
def exported(folder):
    return load_model(folder)


def check_equal(exported: Encoder, model: Encoder, samples: Batch, *, tolerance: float = 2e-5) -> None:
    with torch.inference_mode():
        wanted, found = (encoder.encode(samples, patch_m=40) for encoder in (model, exported))
    assert torch.equal(found.valid, wanted.valid)
    torch.testing.assert_close(found.patches, wanted.patches, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.summary, wanted.summary, rtol=tolerance, atol=tolerance)


def one_date(batch: Batch) -> Batch:
    cut = {
        m: Observation(pixels=o.pixels[:, :1], dates=o.dates[:, :1], valid=o.valid[:, :1])
        for m, o in batch.observations.items()
    }
    return replace(batch, observations=cut)


def test_it_opens_as_an_encoder_and_takes_whatever_fits(exported, olmoearth):
    assert isinstance(exported, Exported)
    assert isinstance(exported, Encoder)
    samples = planet_samples(exported.signature)
    check_equal(exported, olmoearth, samples)
    check_equal(exported, olmoearth, collate([samples, samples, samples]))
    check_equal(exported, olmoearth, one_date(samples))
    alone = replace(samples, observations={"sentinel1": samples.observations["sentinel1"]})
    check_equal(exported, olmoearth, alone)


def test_config_says_what_it_is(folder, exported, olmoearth):
    config = json.loads((folder / "config.json").read_text())
    about = passport(exported)
    assert config["weights_sha256"] == about["weights_sha256"] == passport(olmoearth)["weights_sha256"]
    assert (config["engine"], config["dtype"], config["signature"]["patch_m"]) == ("torch", "float32", 40)
    assert config["inputs"][0]["shape"] == ["batch", 2, 12, 16, 16]
    assert config["inputs"][0]["unit"] == "reflectance_1e4"
    assert config["outputs"][0]["shape"] == ["batch", 4, 4, 16]
    assert config["equality"]["relative_difference"] < 1e-4
    assert config["versions"]["torch"] == torch.__version__
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.pt2"]


def test_it_says_what_it_was_exported_for(folder, exported):
    samples = planet_samples(exported.signature)
    with pytest.raises(InputError, match="exported for patches of 40 m, not 20 m"):
        exported.encode(samples, patch_m=20)
    with pytest.raises(InputError, match="without sub-patch features"):
        exported.encode(samples, patch_m=40, dense=True)
    with pytest.raises(InputError, match=r"windows of 16 x 16 pixels of sentinel2_l2a, not 32 x 32; .* window_px=16"):
        exported.encode(planet_samples(replace(exported.signature, window_px=32)), patch_m=40)
    with pytest.raises(InputError, match="exported for 2 dates of sentinel2_l2a, and 3 came"):
        exported.encode(planet_samples(replace(exported.signature, dates=3)), patch_m=40)
    with pytest.raises(InputError, match="exported without landsat"):
        exported.encode(planet_samples(replace(exported.signature, modalities=("landsat",))), patch_m=40)
    with pytest.raises(InputError, match="resample"):
        exported.encode(replace(samples, pixel_m=20.0), patch_m=40)
    with pytest.raises(InputError, match="are fixed"):
        load_model(folder, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="is an export already"):
        command.export(folder, folder, engine="torch", dtype="float32", **SHAPE)


def test_a_damaged_export_is_refused(folder, tmp_path):
    for name in ("config.json", "model.pt2"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "model.pt2").write_bytes(b"half")
    with pytest.raises(InputError, match="absent or damaged"):
        load_model(tmp_path)


def test_a_scene_gets_the_same_embeddings(exported, olmoearth, tmp_path):
    scene = write_planet_scene(tmp_path / "scene", size_px=40, dates=("2023-04-28", "2023-07-22"), labels=5, clouds=0.4)
    how = {"window_px": 16, "overlap_px": 4}
    wanted, found = (
        embed(scene, encoder, tmp_path / f"{name}.zarr", **how).read()
        for name, encoder in (("encoder", olmoearth), ("export", exported))
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)
    with pytest.raises(InputError, match="window_px=16"):
        embed(scene, exported, tmp_path / "other.zarr", window_px=32, overlap_px=4)
    assert not (tmp_path / "other.zarr.parts").exists()  # refused before anything is begun


def test_nothing_appears_where_it_differs(olmoearth, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_DIFFERENCE", -1.0)
    with pytest.raises(InputError, match="differs too much from small"):
        export(olmoearth, tmp_path / "out", engine="torch", **(SHAPE | {"modalities": ["sentinel1"], "batch": 1}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "tflite"}, "no format 'tflite'; choose one of torch, onnx, openvino"),
        ({"dtype": "int8"}, "torch cannot be written in int8; choose one of float32, bfloat16"),
        ({"dates": 0}, "wanted 1 or more"),
        ({"modalities": ["sentinel9"]}, "no modality 'sentinel9'"),
        ({"modalities": ["srtm"]}, "was trained to predict srtm"),
        ({"window_px": 18}, "not a whole number"),
        ({"patch_m": 45}, "patch_m is 45"),
    ],
)
def test_what_cannot_be_exported(olmoearth, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        export(olmoearth, tmp_path / "out", **({"engine": "torch"} | SHAPE | change))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(find_spec("onnxscript") is not None, reason="onnxscript is installed")
def test_a_missing_package_is_named(olmoearth, tmp_path):
    with pytest.raises(InputError, match=r"needs .*onnxscript.*pip install"):
        export(olmoearth, tmp_path / "out", engine="onnx", **SHAPE)


def test_what_is_there_is_kept(olmoearth, folder):
    with pytest.raises(InputError, match="exists"):
        export(olmoearth, folder, engine="torch", **SHAPE)


@pytest.mark.slow
def test_anysat_with_statistics_inside(tmp_path):
    shape = {"modalities": ("sentinel2_l2a",), "dates": 2, "window_px": 8, "patch_m": 40}
    model = small_anysat(**shape)
    exported, _ = export(model, tmp_path / "out", engine="torch", batch=3, **shape)
    samples = planet_samples(exported.signature)
    check_equal(exported, model, samples)  # four samples, three at a time
    inside = passport(model)["statistics"]
    assert isinstance(exported, Fitted)
    assert exported.missing_statistics(shape["modalities"]) == ()
    assert exported.statistics_of("sentinel2_l2a") == model.statistics_of("sentinel2_l2a")
    assert exported.with_statistics(inside) is exported
    other = {"s2": {**inside["s2"], "mean": [0.0] * 10}}
    with pytest.raises(InputError, match="standardises by other statistics"):
        exported.with_statistics(other)


def test_statistics_come_from_a_scene(tmp_path):
    scene = write_planet_scene(tmp_path / "scene", size_px=16, dates=("2023-04-28",), labels=3)
    bare = AnySat(AnySatConfig(dim=32, depth=1, heads=1), name="small").eval()
    with pytest.raises(InputError, match=r"no statistics of sentinel2_l2a.*--statistics"):
        export(bare, tmp_path / "out", engine="torch", **SHAPE)
    fitted = command.standardised(bare, S2_S1, str(scene))
    assert not fitted.missing_statistics(S2_S1)
    with pytest.raises(InputError, match="has no landsat"):
        command.standardised(bare, ["landsat"], str(scene))
    with pytest.raises(InputError, match="statistics of its own"):
        command.standardised(small_olmoearth(), S2_S1, str(scene))


def test_the_command_takes_a_saved_model(olmoearth, folder, tmp_path):
    save_model(olmoearth, tmp_path / "model")
    with pytest.raises(InputError, match="batch is 'many'"):
        command.export(tmp_path / "model", tmp_path / "out", engine="torch", dtype="float32", batch="many", **SHAPE)
    with pytest.raises(InputError, match="exists"):
        command.export(tmp_path / "model", folder, engine="torch", dtype="float32", **SHAPE)


needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed",
)
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_onnx(olmoearth, tmp_path, dtype):
    exported, equality = export(olmoearth, tmp_path / "out", engine="onnx", dtype=dtype, **SHAPE)
    if dtype == "float32":
        check_equal(exported, olmoearth, one_date(planet_samples(exported.signature)))
    assert equality.passed
    assert isinstance(panterra.load_model(tmp_path / "out"), Exported)
    assert np.float32(1e-39) * np.float32(0.5) > 0, "the engine changed the arithmetic of this thread"


@needs_onnx
@needs_openvino
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_openvino(olmoearth, tmp_path, dtype):
    exported, equality = export(olmoearth, tmp_path / "out", engine="openvino", dtype=dtype, **SHAPE)
    assert equality.passed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.bin", "model.xml"]
    if dtype == "float32":
        check_equal(exported, olmoearth, planet_samples(exported.signature))


@needs_onnx
@pytest.mark.slow
def test_anysat_in_onnx(tmp_path):
    shape = {"modalities": S2_S1, "dates": 2, "window_px": 8, "patch_m": 40}
    model = small_anysat(**shape)
    exported, _ = export(model, tmp_path / "out", engine="onnx", **shape)
    check_equal(exported, model, planet_samples(exported.signature))
