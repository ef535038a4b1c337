"""The cards of the sets that OlmoEarth's partners keep as rslearn windows."""

from __future__ import annotations

from collections.abc import Sequence

from panterra.data.card import DatasetCard, Task

S2, S1, LANDSAT = "sentinel2_l2a", "sentinel1", "landsat"


def _card(
    name: str,
    classes: int | str,
    steps: int,
    side_px: int,
    counts: tuple[int, int, int],
    *,
    modalities: Sequence[str] = (S2,),
    task: Task = "segmentation",
) -> DatasetCard:
    """Make a card of what is published: how many classes, or what is measured, and the sizes."""
    named = (classes,) if isinstance(classes, str) else tuple(f"class {code}" for code in range(classes))
    return DatasetCard(
        name=name,
        title=name.replace("_", " "),
        opener="panterra.data.rslearn_windows:open_rslearn",
        task=task,
        class_names=named,
        splits=dict(zip(("train", "val", "test"), counts, strict=True)),
        modalities=dict.fromkeys(modalities, (steps, side_px, side_px)),
        target_shape=() if task == "classification" or "vessel" in name else (side_px, side_px),
        layout=("config.json", "windows/*/*/metadata.json"),
        about=(
            "Windows in rslearn's layout. Names of classes and layers are not published: give class_names, layers and "
            "target where the reader asks for them. Sentinel-1 is stored as linear power."
        ),
        licence=None,
        citation="OlmoEarth 2025 and its partners",
        options={"name": name},
    )


def _vessels(sensor: str, modality: str, counts: tuple[int, int, int]) -> tuple[DatasetCard, DatasetCard]:
    kind = f"small_{sensor}_vessel_type"
    length = f"small_{sensor}_vessel_length"
    return (
        _card(kind, 9, 1, 64, counts, modalities=(modality,), task="classification"),
        _card(length, "vessel length (m)", 1, 64, counts, modalities=(modality,), task="regression"),
    )


CARDS = (
    _card("africa_crop_mask", 2, 12, 32, (400, 1078, 1078)),
    _card("awf_lulc_map", 9, 12, 64, (1120, 169, 170)),
    _card("canada_crops_coarse", 9, 12, 32, (2831, 6624, 6624)),
    _card("canada_crops_fine", 24, 12, 32, (5565, 4500, 4501)),
    _card("canada_wildfire_sat_eval_split", 2, 8, 50, (282, 35, 36)),
    _card("descals", 3, 12, 32, (600, 8438, 8439)),
    _card("ethiopia_crops", 4, 12, 32, (574, 978, 978)),
    _card("forest_loss_driver", 10, 6, 64, (6621, 131, 131), task="classification"),
    _card("geo_ecosystem_annual_test", 112, 12, 64, (19789, 1060, 1061)),
    _card("glance", 11, 12, 32, (3300, 15792, 15793)),
    _card("kenya_intercropping", 3, 6, 32, (4071, 2125, 2089)),
    _card("lcmap_lu", 6, 12, 32, (1800, 12356, 12357)),
    _card("lfmc_woody_3k", "live fuel moisture (%)", 12, 32, (3000, 1000, 1000), task="regression"),
    _card(
        "lfmc_woody_3k_s1_s2",
        "live fuel moisture (%)",
        12,
        32,
        (3000, 1000, 1000),
        modalities=(S2, S1),
        task="regression",
    ),
    _card("mapbiomas_3k_dense", 28, 1, 48, (2989, 500, 500)),
    _card("mapbiomas_3k_sparse", 12, 1, 48, (2921, 486, 487)),
    _card("nandi_crop_map", 8, 12, 64, (5066, 929, 929)),
    _card("nigeria_settlement", 2, 12, 64, (3620, 987, 499)),
    *_vessels("landsat", LANDSAT, (6743, 1371, 864)),
    *_vessels("sentinel1", S1, (6768, 1365, 850)),
    *_vessels("sentinel2", S2, (7886, 532, 533)),
    _card("surface_fuels", 29, 12, 32, (7045, 3461, 3494)),
    _card("tolbi_crop", 7, 12, 64, (33444, 5608, 5609)),
    _card("us_trees", 39, 12, 32, (11700, 16841, 16841)),
    _card("yemen_crop", 9, 12, 16, (456, 68, 69)),
)
