"""What the published evaluations do with each benchmark: OlmoEarth's table of tasks, AnySat's of linear probes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class OlmoEarthTask:
    """A row of OlmoEarth's table of frozen evaluations."""

    metric: str | None = None
    """What is reported, of `scoring`; None: what the kind of task has by default."""
    rate: float | None = None
    """Of the probe where nothing is swept; None: judged by neighbours."""
    batch: int = 8
    normalisation: Literal["model", "dataset"] = "model"
    patch_px: int | None = None
    """None: 4."""
    loss: Literal["cross_entropy", "dice"] = "cross_entropy"
    """Of pixels' classes; dice: both."""
    centre: bool = False
    """Whether the patch in the middle is judged instead of the whole sample."""
    modalities: tuple[str, ...] | None = None
    """None: all that the data set has and the model knows."""
    highest_of: tuple[str, ...] | None = None
    """Modalities of which, where they are all that is shown, patches are pooled by the maximum instead of the mean."""


_OVERALL = OlmoEarthTask(metric="accuracy", rate=0.01)
_MIOU = OlmoEarthTask(metric="mean_iou", rate=0.1)
_VESSEL_TYPE = OlmoEarthTask(metric="accuracy", rate=0.01, centre=True)
_VESSEL_LENGTH = OlmoEarthTask(metric="rmse", rate=0.01, centre=True)
_FUEL_MOISTURE = OlmoEarthTask(metric="rmse", rate=5e-5)

OLMOEARTH: Mapping[str, OlmoEarthTask] = {
    "m_eurosat": OlmoEarthTask(metric="accuracy"),
    "m_forestnet": OlmoEarthTask(metric="accuracy", normalisation="dataset"),
    "m_bigearthnet": OlmoEarthTask(metric="macro_f1"),
    "m_so2sat": OlmoEarthTask(metric="accuracy"),
    "m_brick_kiln": OlmoEarthTask(metric="accuracy"),
    "m_sa_crop_type": OlmoEarthTask(metric="mean_iou", rate=0.1, normalisation="dataset"),
    "m_cashew_plant": OlmoEarthTask(metric="mean_iou", rate=0.1, normalisation="dataset"),
    # Micro F1 over pixels of one class each is their accuracy.
    "mados": OlmoEarthTask(metric="accuracy", rate=0.01, batch=128, normalisation="dataset"),
    "sen1floods11": OlmoEarthTask(metric="mean_iou", rate=0.1, batch=128, modalities=("sentinel1",)),
    "sen1floods11_tiles": OlmoEarthTask(metric="mean_iou", rate=0.1, batch=128, modalities=("sentinel1",)),
    "pastis": _MIOU,
    "pastis128": OlmoEarthTask(metric="mean_iou", rate=0.1, highest_of=("sentinel2_l2a",)),
    "tolbi_crop": _MIOU,
    "yemen_crop": OlmoEarthTask(metric="mean_iou", rate=0.001),
    **dict.fromkeys(
        ("forest_loss_driver", "nigeria_settlement", "nandi_crop_map", "awf_lulc_map"), OlmoEarthTask(rate=0.01)
    ),
    **dict.fromkeys(
        (
            "geo_ecosystem_annual_test",
            "africa_crop_mask",
            "canada_crops_coarse",
            "canada_crops_fine",
            "descals",
            "ethiopia_crops",
            "glance",
            "lcmap_lu",
            "us_trees",
            "surface_fuels",
            "kenya_intercropping",
        ),
        _OVERALL,
    ),
    **{f"small_{sensor}_vessel_type": _VESSEL_TYPE for sensor in ("landsat", "sentinel1", "sentinel2")},
    **{f"small_{sensor}_vessel_length": _VESSEL_LENGTH for sensor in ("landsat", "sentinel1", "sentinel2")},
    "gb2_benv2": OlmoEarthTask(metric="average_precision"),
    "gb2_treesatai": OlmoEarthTask(metric="average_precision"),
    "gb2_biomassters": OlmoEarthTask(metric="rmse", rate=0.001),
    **dict.fromkeys(
        ("gb2_burn_scars", "gb2_cloudsen12", "gb2_spacenet2", "gb2_spacenet7", "gb2_flair2", "gb2_caffe"), _MIOU
    ),
    "gb2_fotw": OlmoEarthTask(metric="mean_iou", rate=0.1, batch=16),
    "gb2_kuro_siwo": OlmoEarthTask(metric="mean_iou", rate=0.1, batch=16),
    "lfmc_woody_3k": _FUEL_MOISTURE,
    "lfmc_woody_3k_s1_s2": _FUEL_MOISTURE,
    "mapbiomas_3k_dense": OlmoEarthTask(metric="macro_f1", rate=0.001),
    "canada_wildfire_sat_eval_split": OlmoEarthTask(metric="f1_class_1", loss="dice", patch_px=5),
}
"""By data set; others get the defaults."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnySatProbe:
    """A row of AnySat's table of experiments (linear probing)."""

    modalities: tuple[str, ...]
    patch_m: float
    dense: str | None
    """The modality whose sub-patches are read; None: the tile's vector."""
    rate: float
    schedule: Literal["plateau", "epoch_cosine"]
    batch: int
    metric: str


ANYSAT: Mapping[str, AnySatProbe] = {
    "pastis_hd": AnySatProbe(
        modalities=("sentinel2_l2a",),
        patch_m=40,
        dense="sentinel2_l2a",
        rate=5e-5,
        schedule="plateau",
        batch=4,
        metric="mean_iou",
    ),
    "bradd_s1ts": AnySatProbe(
        modalities=("sentinel1",),
        patch_m=40,
        dense="sentinel1",
        rate=2e-4,
        schedule="plateau",
        batch=8,
        metric="mean_iou",
    ),
    "sickle": AnySatProbe(
        modalities=("landsat", "sentinel2_l2a", "sentinel1"),
        patch_m=10,
        dense="sentinel2_l2a",
        rate=5e-5,
        schedule="plateau",
        batch=12,
        metric="mean_iou",
    ),
    "timesen2crop": AnySatProbe(
        modalities=("sentinel2_l2a",),
        patch_m=10,
        dense=None,
        rate=2e-4,
        schedule="epoch_cosine",
        batch=2048,
        metric="accuracy",
    ),
    "sen1floods11": AnySatProbe(
        modalities=("sentinel2", "sentinel1"),
        patch_m=80,
        dense="sentinel2",
        rate=2e-4,
        schedule="plateau",
        batch=4,
        metric="mean_iou",
    ),
    "so2sat": AnySatProbe(
        modalities=("sentinel2", "sentinel1"),
        patch_m=80,
        dense=None,
        rate=2e-3,
        schedule="epoch_cosine",
        batch=768,
        metric="accuracy",
    ),
    "biomassters": AnySatProbe(
        modalities=("sentinel2_l2a", "sentinel1"),
        patch_m=10,
        dense="sentinel1",
        rate=2e-4,
        schedule="epoch_cosine",
        batch=128,
        metric="rmse",
    ),
}
"""By data set; those whose projectors are trained too (burn scars, SpaceNet 7) are no probes and not here."""
