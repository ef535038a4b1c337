"""The sets behind docs/real-tasks.md open, their splits share no ground, and their figures are counted right."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

pytestmark = pytest.mark.data

SMALL = ("eurosat", "floods", "land_cover", "canopy", "biomass", "algae", "rondonia")
"""Those that open in a second or two."""


@pytest.fixture(scope="module")
def sets():
    pytest.importorskip("pandas")
    return pytest.importorskip("real_task_sets")


@pytest.fixture(scope="module")
def tasks():
    pytest.importorskip("sklearn")
    return pytest.importorskip("real_tasks")


@pytest.mark.parametrize("name", SMALL)
def test_splits_share_no_ground(sets, tasks, data_dir, name):
    material = sets.SETS[name](data_dir)
    view = next(iter(material.views.values()))
    pixels = [next(iter(b.observations.values())).pixels.numpy().tobytes() for b in view.batches]
    assert len(pixels) == len(material.targets) == len(material.blocks)
    for seed in range(3):
        dealt = tasks.split(material, seed)
        learn, test = dealt.of("train", "val"), dealt.of("test")
        assert len(learn) > len(test) > 0
        assert not set(material.blocks[learn]) & set(material.blocks[test])
        assert not {pixels[i] for i in learn} & {pixels[i] for i in test}
        if material.names:
            found = np.unique(np.concatenate([material.targets[i].ravel() for i in dealt.of("train")]))
            assert {k for k in found if k >= 0} == set(range(len(material.names)))


def test_targets_lie_where_the_windows_are(sets, data_dir):
    """The truth put together from windows is the label's raster."""
    pictures = pytest.importorskip("real_task_pictures")
    material = sets.floods(data_dir)
    whole = pictures.mosaic(material, "Spain", dict(enumerate(material.targets)), 32)
    label = sets.read_image(data_dir / "sen1floods11_spain" / "Spain_7370579_west_label.tif").pixels[0]
    np.testing.assert_array_equal(whole, label)


def test_every_view_is_read_by_its_encoder(sets, tasks, data_dir):
    material = sets.biomass(data_dir)
    for family, view in material.views.items():
        encoder = tasks.random_encoder(family, 0, view)
        few = sets.View(batches=view.batches[:3], patch_m=view.patch_m, new=view.new)
        assert tasks.embed(encoder, material, few, np.arange(3)).shape == (3, encoder.dim)


def test_figures_are_those_of_all_tests_together(tasks):
    """Two seeds that test one block each: the estimate pools them, and a method less itself is nothing."""
    line = {"set": "s", "task": "classification", "method": tasks.FOREST, "names": ["a", "b"]}
    first = {**line, "seed": 0, "blocks": [0], "sums": [[[3, 1], [0, 4]]]}
    second = {**line, "seed": 1, "blocks": [1], "sums": [[[1, 3], [2, 2]]]}
    row = tasks.gather([first, second])["s"][tasks.FOREST]
    found = tasks.interval(row, "classification", "accuracy")
    assert found.estimate == pytest.approx(10 / 16)
    assert found.low == pytest.approx(3 / 8)
    assert found.high == pytest.approx(7 / 8)
    assert tasks.against(row, row, "classification", "accuracy").high == 0
    assert "0.62 [0.38, 0.88]" in tasks.tables([first, second])["s"]


def test_a_cell_has_its_commonest_class_or_its_mean(tasks):
    y = np.array([[[0, 0, -1, -1], [0, 1, -1, -1], [1, 1, 2, 2], [0, 1, 2, -1]]])
    assert tasks.coarser(y, 2, classes=3).tolist() == [[[0, -1], [1, 2]]]
    assert tasks.coarser(np.arange(16.0).reshape(1, 4, 4), 2, classes=0).tolist() == [[[2.5, 4.5], [10.5, 12.5]]]


def test_unknown_targets_stay_unknown(sets, data_dir):
    material = sets.floods(data_dir)
    unknown = next(i for i, t in enumerate(material.targets) if (t < 0).any())
    target = sets.as_target(material, unknown)
    assert target.shape == (1, 32, 32)
    assert torch.equal(target[0] < 0, torch.as_tensor(material.targets[unknown]) < 0)
