"""How the published evaluations fine-tune on each benchmark: OlmoEarth's batches, AnySat's table of experiments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from panterra.evaluate.published import ANYSAT

RATES = (1e-4, 5e-4, 1e-3)
"""Of which OlmoEarth's fine-tuning keeps the one that validates best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OlmoEarthTuning:
    """A row of OlmoEarth's table of fine-tuning tasks."""

    batch: int = 8
    """Of data sets that are not in the table: that of their probes."""
    accumulate: int = 1
    """How many batches make one step."""
    patch_px: int | None = None
    """None: that of the frozen evaluation."""


OLMOEARTH_TUNING: Mapping[str, OlmoEarthTuning] = {
    **dict.fromkeys(("m_eurosat", "m_brick_kiln"), OlmoEarthTuning(batch=64)),
    **dict.fromkeys(("sen1floods11", "sen1floods11_tiles"), OlmoEarthTuning(batch=32)),
    **dict.fromkeys(("m_bigearthnet", "m_so2sat", "mados", "pastis"), OlmoEarthTuning(batch=16)),
    "m_sa_crop_type": OlmoEarthTuning(batch=8),
    **dict.fromkeys(("m_forestnet", "gb2_fotw"), OlmoEarthTuning(batch=4)),
    "m_cashew_plant": OlmoEarthTuning(batch=4, patch_px=16),
    **dict.fromkeys(("gb2_biomassters", "gb2_burn_scars"), OlmoEarthTuning(batch=2, accumulate=4)),
    **dict.fromkeys(
        (
            "gb2_benv2",
            "gb2_treesatai",
            "gb2_cloudsen12",
            "gb2_spacenet2",
            "gb2_spacenet7",
            "gb2_flair2",
            "gb2_caffe",
            "gb2_kuro_siwo",
        ),
        OlmoEarthTuning(batch=2),
    ),
}
"""By data set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnySatRun:
    """How one experiment of AnySat's table is trained."""

    rate: float = 5e-5
    weight_decay: float = 0.0
    schedule: Literal["plateau", "epoch_cosine"] = "plateau"
    epochs: int = 200
    head: Literal["linear", "batch_mlp"] = "linear"
    """Of the tile's vector; pixels have the linear one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnySatTuning:
    """A row of AnySat's table of experiments whose encoders are trained."""

    metric: str | None = None
    """None: what the kind of task has by default."""
    batch: int = 8
    modalities: tuple[str, ...] | None = None
    patch_m: float | None = None
    dense: str | None = None
    """The modality whose sub-patches are read for pixels."""
    full: AnySatRun = AnySatRun()
    """All weights, from the pretrained ones."""
    scratch: AnySatRun = AnySatRun()
    """All weights, drawn at random."""
    projector: AnySatRun = AnySatRun()
    """Projectors and head."""
    last_class_counts: bool = True
    """Whether the last class is learned and scored."""
    crops: tuple[tuple[int, int], ...] = ()
    """Where crops of a test image begin whose answers are averaged, in pixels of the labels."""
    date_shares: Mapping[str, float] = field(default_factory=dict)
    """By modality, the share of the dates of a training sample that is shown; else all."""
    most_dates: int | None = None
    """Of a longer series of a training sample so many are shown."""
    random_crop: Mapping[str, int] = field(default_factory=dict)
    """By modality, the side in pixels of what is cut out of a training sample at random; else all cut the middle."""
    draw: Literal["each", "root"] = "each"
    """root: training samples are drawn by class, by the root of its frequency."""


def _as_probed(name: str, **more: Any) -> AnySatTuning:
    """Show a data set as its linear probe does."""
    row = ANYSAT[name]
    return AnySatTuning(
        metric=row.metric, batch=row.batch, modalities=row.modalities, patch_m=row.patch_m, dense=row.dense, **more
    )


_COSINE = AnySatRun(schedule="epoch_cosine")
_MLP = replace(_COSINE, head="batch_mlp")
_PASTIS = AnySatTuning(batch=4, modalities=("spot", "sentinel2_l2a", "sentinel1"), patch_m=40, most_dates=20)

ANYSAT_TUNING: Mapping[str, AnySatTuning] = {
    "treesatai_ts": AnySatTuning(
        metric="weighted_f1",
        batch=256,
        modalities=("aerial", "sentinel2_l2a", "sentinel1_ascending"),
        patch_m=10,
        full=_COSINE,
        scratch=_MLP,
        random_crop={"aerial": 300},
    ),
    "pastis_hd": replace(_PASTIS, metric="mean_iou", dense="sentinel2_l2a", scratch=AnySatRun(rate=2e-4)),
    "pastis_hd_crops": replace(_PASTIS, metric="macro_f1", full=_COSINE),
    "flair": AnySatTuning(
        metric="iou_but_last",
        batch=32,
        modalities=("aerial_flair", "sentinel2_l2a"),
        patch_m=10,
        dense="aerial_flair",
        full=AnySatRun(weight_decay=1e-2),
        last_class_counts=False,
        crops=((0, 0), (0, 12), (12, 0), (12, 12), (6, 6)),
        date_shares={"sentinel2_l2a": 0.3},
        random_crop={"aerial_flair": 500},
    ),
    "planted": AnySatTuning(
        metric="macro_f1",
        batch=64,
        modalities=("sentinel2", "sentinel1", "landsat7", "alos2", "modis"),
        patch_m=30,
        full=AnySatRun(weight_decay=1e-4),
        scratch=_MLP,
        date_shares={**dict.fromkeys(("sentinel2", "sentinel1", "landsat7", "modis"), 0.7), "alos2": 0.9},
        draw="root",
    ),
    "bradd_s1ts": _as_probed("bradd_s1ts", date_shares={"sentinel1": 0.5}),
    "sickle": _as_probed("sickle", date_shares=dict.fromkeys(("landsat", "sentinel2_l2a", "sentinel1"), 0.8)),
    "timesen2crop": _as_probed("timesen2crop", full=replace(_COSINE, epochs=100), date_shares={"sentinel2_l2a": 0.7}),
    "hls_burn_scars": AnySatTuning(
        metric="mean_iou",
        batch=4,
        modalities=("hls",),
        patch_m=240,
        dense="hls",
        projector=AnySatRun(rate=2e-4),
    ),
    # Published: 40 m, in which pixels of 3 m count as 2.5 m.
    "spacenet7": AnySatTuning(metric="mean_iou", modalities=("planet",), patch_m=48, dense="planet"),
}
"""By data set; others are trained like most of these. Classes of PASTIS-HD's void are no labels here; the published run
on its crops from scratch lacks its encoder's settings."""
