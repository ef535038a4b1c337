"""A check of a download says in sentences what is wrong with it."""

import subprocess
import sys

import numpy as np
import pytest

import miniatures
import miniatures_benchmarks
from panterra.data.labelled import DATASETS
from panterra.data.verify import verify
from panterra.errors import InputError
from panterra.modalities import MODALITIES

SMALL = {"sen1floods11", "hls_burn_scars", "biomassters", "pastis_hd", "pastis_hd_crops"} | {
    name for name in DATASETS if name.startswith(("m_", "gb2_")) or "rslearn" in DATASETS[name].opener
}
"""Miniatures whose images are smaller than the published ones."""


def said(findings, level=None):
    return [finding.what for finding in findings if level is None or finding.level == level]


@pytest.mark.parametrize("name", DATASETS)
def test_miniatures_are_whole_but_small(name, tmp_path):
    miniatures_benchmarks.BUILDERS[name](tmp_path)
    findings = verify(name, tmp_path)
    expected = ("are missing",)
    if name in SMALL:
        expected = (*expected, "(dates, rows, columns); wanted", "has a target of shape")
    if name in ("m_forestnet", "gb2_caffe"):  # 8 bits in the place of other units
        expected = (*expected, "the unit may be another")
    if name == "treesatai_ts":
        expected = (*expected, "are in two splits")
    assert not said(findings, "error")
    assert [what for what in said(findings, "warning") if not any(part in what for part in expected)] == []
    assert any("parts of the layout are there" in what for what in said(findings, "ok"))


def test_missing_parts_and_files_are_named(tmp_path):
    miniatures.so2sat(tmp_path)
    (tmp_path / "validation.h5").unlink()
    errors = said(verify("so2sat", tmp_path), "error")
    assert errors[0] == "validation.h5 is missing; So2Sat LCZ42 has it at the top of its folder"
    assert errors[1].startswith("validation cannot be opened: cannot read ")


def test_missing_files_of_samples_are_counted(tmp_path):
    miniatures.pastis_hd(tmp_path)
    gone = tmp_path / "DATA_S2" / "S2_10002.npy"
    gone.unlink()
    errors = said(verify("pastis_hd", tmp_path), "error")
    assert errors[0] == f"train: 1 of 3 samples lack files, such as {gone}"
    assert errors[1].startswith("train: sample 10002 cannot be read: there is no file")


def test_counts_are_compared_with_the_published_ones(tmp_path):
    miniatures.so2sat(tmp_path)
    warnings = said(verify("so2sat", tmp_path), "warning")
    assert "training lists 3 of 352,366 samples: 352,363 are missing" in warnings


def test_a_wrong_unit_is_noticed(tmp_path):
    truth = miniatures.sen1floods11(tmp_path)
    miniatures.write_tif(
        tmp_path / "v1.1/data/flood_events/HandLabeled/S2Hand/Spain_3_S2Hand.tif",
        truth["test"]["S2"].astype("float32") * 10,
    )
    warnings = said(verify("sen1floods11", tmp_path), "warning")
    (found,) = [what for what in warnings if "plausible" in what]
    assert found.startswith("test: sample Spain_3_S1Hand.tif has sentinel2 from ")
    assert found.endswith("outside the plausible 0 to 12000 (reflectance_1e4): the unit may be another")


def test_strange_codes_are_noticed(tmp_path):
    miniatures.sen1floods11(tmp_path)
    label = tmp_path / "v1.1/data/flood_events/HandLabeled/LabelHand/Spain_3_LabelHand.tif"
    miniatures.write_tif(label, np.full((1, 16, 16), 7, "int16"))
    assert "test: sample Spain_3_S1Hand.tif has class codes such as 7; there are 2 classes" in said(
        verify("sen1floods11", tmp_path), "warning"
    )


def test_damaged_files_are_named(tmp_path):
    miniatures.biomassters(tmp_path)
    damaged = tmp_path / "test_features" / "002d7f33_S1_05.tif"
    damaged.write_bytes(b"II*\0")
    (error,) = said(verify("biomassters", tmp_path), "error")
    assert error.startswith(f"test: sample 002d7f33 cannot be read: cannot read {damaged}")


def test_an_absent_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"there is no folder .*nowhere; give the one that holds FLAIR #2"):
        verify("flair", tmp_path / "nowhere")


@pytest.mark.parametrize("card", DATASETS.values(), ids=lambda card: card.name)
def test_cards_are_complete(card):
    assert set(card.modalities) <= set(MODALITIES)
    assert len(set(card.class_names)) == len(card.class_names)
    assert card.about.endswith(".")
    assert card.citation
    assert card.target_shape or card.task in ("classification", "regression")


def test_cards_are_light():
    script = (
        "import sys\nimport panterra.data.labelled, panterra.data.verify\n"
        "print({'torch', 'numpy', 'rasterio', 'h5py'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
