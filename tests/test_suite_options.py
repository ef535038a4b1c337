"""What a comparison can be told: subsets, statistics, compression, losses, class weights."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import miniatures_benchmarks
import planet_benchmarks
from panterra.data.geobench import LANDSAT, SENTINEL2
from panterra.errors import InputError
from panterra.evaluate import published
from panterra.evaluate.benchmark import normalised, open_benchmark
from panterra.evaluate.published import OlmoEarthTask
from panterra.evaluate.published_statistics import published_statistics
from panterra.evaluate.subsets import published_subset
from panterra.evaluate.suite import Plan, evaluate
from panterra.modalities import MODALITIES
from panterra.models.normalize import olmoearth_tables
from panterra.sample import Batch, Observation

NANO = "olmoearth-v1.2-nano@random:0"
S2 = MODALITIES["sentinel2_l2a"].band_names


pytestmark = pytest.mark.usefixtures("root")


def plan_of(root, *names, **options):
    settings = {"models": ("raw",), "protocols": ("linear",), "rates": (1e-2,), "epochs": 3, "limit": 20} | options
    return Plan(benchmarks=tuple((name, root) for name in names), **settings)


def train_of(root):
    return planet_benchmarks.opened("planet_classes", root, "train")


# Fewer training samples


def test_a_list_in_the_folder_decides(root, tmp_path):
    train, listed = train_of(root), ["007", "003", "031"]
    (tmp_path / "0.05x_train_partition.json").write_text(json.dumps({"train": listed, "valid": ["001"]}))
    index, said = published_subset(tmp_path, train, 0.05)
    assert [train.ids[i] for i in index] == sorted(listed)
    assert said == "0.05x_train_partition.json"
    tiles = replace(train, ids=["007@0,0", "007@0,8", "008@0,0"])
    assert published_subset(tmp_path, tiles, 0.05)[0].tolist() == [0, 1]
    with pytest.raises(InputError, match="lists none of the 1 training samples"):
        published_subset(tmp_path, replace(train, ids=["9"]), 0.05)
    for text in ("{", "[]", '{"valid": []}'):
        (tmp_path / "0.05x_train_partition.json").write_text(text)
        with pytest.raises(InputError, match="lists no training samples; wanted JSON such as"):
            published_subset(tmp_path, train, 0.05)


def test_without_a_list_a_share_is_drawn_once_and_nested(root, tmp_path):
    train = train_of(root)
    small, large = (published_subset(tmp_path, train, f) for f in (0.1, 0.5))
    assert (len(small[0]), len(large[0])) == (6, 30)
    assert set(small[0]) < set(large[0])
    assert small[1] == "random, seed 42"


def test_published_subsets_stand_in_the_rows(root, tmp_path):
    plan = plan_of(root, "planet_classes", protocols=("knn", "linear"), fractions=(0.5, 1), seeds=(0, 1), limit=None)
    rows = evaluate(replace(plan, subsets="published"), tmp_path / "a", cache=tmp_path / "cache")
    found = [(r.protocol, r.fraction, r.seed, r.labels, r.subset) for r in rows]
    # Without a draw, neighbours of a subset do not depend on the seed.
    drawn = "random, seed 42"
    assert found == [
        ("knn", 0.5, 0, 30, drawn),
        ("knn", 1, 0, 60, ""),
        *[("linear", 0.5, s, 30, drawn) for s in (0, 1)],
        *[("linear", 1, s, 60, "") for s in (0, 1)],
    ]
    stratified = evaluate(plan, tmp_path / "a", cache=tmp_path / "cache")
    assert {r.subset for r in stratified if r.fraction < 1} == {"stratified"}
    # What is not a share is found again.
    assert [r.id for r in stratified if r.fraction == 1] == [r.id for r in rows if r.fraction == 1]
    with pytest.raises(InputError, match=r"a fraction is 0.3; published subsets are of 0.01, 0.02"):
        evaluate(replace(plan, subsets="published", fractions=(0.3,)), tmp_path / "b")


# Statistics


def test_statistics_are_in_declared_units_and_the_models_order(tmp_path):
    tables = olmoearth_tables()["evaluation"]["datasets"]
    shown = {"sentinel2_l2a": "sentinel2_l2a"}
    mean, std = published_statistics("mados", tmp_path, shown)["sentinel2_l2a"]
    row = tables["mados"]["sentinel2_l2a"]
    for i, band in enumerate(S2):
        at = row["bands"].index(band)
        assert mean[i].item() == pytest.approx(1e4 * row["mean"][at])
        assert std[i].item() == pytest.approx(1e4 * row["std"][at])
    both = published_statistics("pastis128", tmp_path, shown | {"sentinel1": "sentinel1"})
    assert both["sentinel1"][0].tolist() == pytest.approx(tables["pastis"]["sentinel1"]["mean"])


def test_columns_of_breizhcrops_are_named_anew(tmp_path):
    mean, _ = published_statistics("breizhcrops", tmp_path, {"sentinel2": "sentinel2_l2a"})["sentinel2_l2a"]
    row = olmoearth_tables()["evaluation"]["datasets"]["breizhcrops"]["sentinel2_l2a"]["mean"]
    # B02 is the fifth column; of water vapour, the last, comes less than of its neighbours.
    assert mean[S2.index("B02")].item() == pytest.approx(row[4])
    assert mean[S2.index("B09")].item() == pytest.approx(row[12])
    assert mean.argmin().item() == S2.index("B09")


@pytest.mark.parametrize(
    ("name", "known", "modality"),
    [("m_forestnet", LANDSAT, "landsat"), ("m_so2sat", SENTINEL2, "sentinel2"), ("m_eurosat", SENTINEL2, "sentinel2")],
)
def test_geobench_brings_its_own(tmp_path, name, known, modality):
    keys = [k for k in known if name != "m_so2sat" or k[:2] not in ("01", "09", "10")]
    stored = {k: {"mean": 10.0 + i, "std": 1.0 + i, "min": 0, "max": 9} for i, k in enumerate(keys)}
    (tmp_path / "band_stats.json").write_text(json.dumps(stored | {"label": {"mean": 1, "std": 0}}))
    as_ = "sentinel2_l2a" if modality == "sentinel2" else modality
    mean, _ = published_statistics(name, tmp_path, {modality: as_})[as_]
    order, scale = MODALITIES[as_].band_names, 1e4 if name == "m_so2sat" else 1
    by_band = {known[k]: stored[k]["mean"] * scale for k in keys}
    stand_ins = {"m_forestnet": {"B8": "B3", "B1": "B2", "B9": "B7"}, "m_so2sat": {"B01": "B02", "B09": "B8A"}}
    for band in order:
        source = stand_ins.get(name, {}).get(band, band if band in by_band else "B7")
        assert mean[order.index(band)].item() == pytest.approx(by_band[source])


def test_what_has_no_published_statistics_says_so(tmp_path):
    with pytest.raises(InputError, match=r"no statistics of naip were published for mados"):
        published_statistics("mados", tmp_path, {"naip": "naip"})
    with pytest.raises(InputError, match=r"there is no .*band_stats.json; it comes with the download of m-eurosat"):
        published_statistics("m_eurosat", tmp_path, {"sentinel2": "sentinel2_l2a"})
    with pytest.raises(InputError, match="ask for as_published too"):
        published_statistics("gb2_benv2", tmp_path, {"sentinel1": "sentinel1"})


def test_bands_that_are_not_there_stay_zero():
    pixels = torch.full((2, 1, 2, 4, 4), 3.0)
    pixels[0, :, 1] = 0
    o = Observation(pixels=pixels, dates=torch.zeros(2, 1).long(), valid=torch.ones(2, 1, 4, 4).bool())
    statistics = {"sentinel1": (torch.tensor([3.0, 3.0]).double(), torch.ones(2).double())}
    batch = Batch(observations={"sentinel1": o})
    kept = normalised(batch, statistics, keep_zeros=True).observations["sentinel1"].pixels[:, 0, :, 0, 0]
    assert kept.tolist() == [[0.5, 0.0], [0.5, 0.5]]
    assert normalised(batch, statistics).observations["sentinel1"].pixels[0, 0, 1, 0, 0] == -0.25


def test_published_statistics_are_an_option_of_the_table(root, tmp_path, monkeypatch):
    monkeypatch.setitem(
        olmoearth_tables()["evaluation"]["datasets"],
        "planet_classes",
        {"sentinel2_l2a": {"bands": list(S2), "mean": [1500.0] * 12, "std": [800.0] * 12}},
    )
    plan = plan_of(root, "planet_classes", "planet_labels", models=(NANO,), protocols=("knn",))
    published_, none = evaluate(replace(plan, normalisations=("published",)), tmp_path, cache=tmp_path / "cache")
    assert published_.chosen["normalisation"] == "published"
    assert none.error.startswith("no statistics of sentinel2_l2a were published for planet_labels")
    figures = {str(published_.figures)}
    for other in ("model", "dataset"):
        row, _ = evaluate(replace(plan, normalisations=(other,)), tmp_path, cache=tmp_path / "cache")
        assert row.chosen["normalisation"] == other
        figures.add(str(row.figures))
    assert len(list((tmp_path / "cache").glob("*.npy"))) >= 3 * 3
    # Other numbers are other features.
    monkeypatch.setitem(
        olmoearth_tables()["evaluation"]["datasets"],
        "planet_classes",
        {"sentinel2_l2a": {"bands": list(S2), "mean": [100.0] * 12, "std": [50.0] * 12}},
    )
    before = len(list((tmp_path / "cache").glob("*.npy")))
    evaluate(replace(plan, normalisations=("published",)), tmp_path, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.npy"))) == before + 3


def test_bands_can_be_filled_as_published(tmp_path):
    miniatures_benchmarks.BUILDERS["gb2_burn_scars"](tmp_path)
    plain, filled = (open_benchmark("gb2_burn_scars", tmp_path, as_published=how) for how in (False, True))
    assert (plain.modalities, filled.modalities) == (("hls",), ("sentinel2_l2a",))
    assert "bands filled as published" in filled.note
    assert plain.contents != filled.contents
    statistics = published_statistics("gb2_burn_scars", tmp_path, {"sentinel2_l2a": "sentinel2_l2a"}, as_published=True)
    assert statistics["sentinel2_l2a"][0][S2.index("B05")] == 0
    assert statistics["sentinel2_l2a"][0][S2.index("B8A")] > 0


# Compression, losses, weights


def test_compressed_features_have_rows_of_their_own(root, tmp_path):
    plan = plan_of(root, "planet_classes", models=(NANO,), compressions=("none", "int8", "pca4+percentile2"))
    rows = evaluate(plan, tmp_path)
    assert [(r.compression, r.chosen["bytes"]) for r in rows] == [("none", 512), ("int8", 128), ("pca4+percentile2", 1)]
    assert len({r.id for r in rows}) == 3
    assert not [r.error for r in rows if r.error]
    # Features were kept once, in full.
    assert len(list((tmp_path / "features").glob("*.npy"))) == 3 * 2


def test_pixels_can_be_judged_by_other_losses_and_probes(root, tmp_path, monkeypatch):
    plan = plan_of(root, "planet_pixels", protocols=("linear", "interpolate", "attention"))
    plain = evaluate(plan, tmp_path / "a", cache=tmp_path / "cache")
    assert {r.chosen["loss"] for r in plain} == {"cross_entropy"}
    asked = evaluate(replace(plan, loss="dice", class_weights="balanced"), tmp_path / "a", cache=tmp_path / "cache")
    for before, after in zip(plain, asked, strict=True):
        assert (after.chosen["loss"], after.chosen["class_weights"]) == ("dice", "balanced")
        assert before.figures != after.figures
    monkeypatch.setitem(published.OLMOEARTH, "planet_pixels", OlmoEarthTask(loss="dice"))
    (row, *_) = evaluate(plan, tmp_path / "b", cache=tmp_path / "cache")
    assert row.chosen["loss"] == "dice"


def test_interpolation_is_for_pixels_classes(root, tmp_path):
    plan = plan_of(root, "planet_classes", "planet_height", protocols=("interpolate",))
    assert evaluate(plan, tmp_path) == []


def test_balanced_classes_and_labels_are_learned(root, tmp_path):
    plan = plan_of(root, "planet_classes", "planet_labels", "planet_height", limit=None, epochs=10)
    plain = evaluate(plan, tmp_path, cache=tmp_path / "cache")
    even = evaluate(replace(plan, class_weights="balanced"), tmp_path, cache=tmp_path / "cache")
    assert [r.chosen["class_weights"] for r in even] == ["balanced", "balanced", "none"]
    assert [a.figures == b.figures for a, b in zip(plain, even, strict=True)] == [False, False, True]
    assert not [r.error for r in even if r.error]


def test_two_classes_have_the_figure_of_the_second(root, tmp_path, monkeypatch):
    def opened(folder, split):
        labelled = planet_benchmarks.opened("planet_pixels", folder, split)
        read = labelled.read

        def halved(id):
            sample = read(id)
            return replace(sample, target=torch.where(sample.target < 0, -1, (sample.target > 2).long()))

        return replace(labelled, class_names=("other", "mine"), read=halved)

    monkeypatch.setattr(planet_benchmarks, "open_planet_pixels", opened)
    monkeypatch.setitem(published.OLMOEARTH, "planet_pixels", OlmoEarthTask(metric="f1_class_1", loss="dice"))
    (row,) = evaluate(plan_of(root, "planet_pixels", epochs=20), tmp_path)
    assert row.metric == "f1_class_1"
    assert 0 <= row.score.estimate <= 1
    (many,) = evaluate(plan_of(root, "planet_classes"), tmp_path / "many")
    assert "f1_class_1" not in many.figures
    assert np.isfinite(many.figures["macro_accuracy"].estimate)
