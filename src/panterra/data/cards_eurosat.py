"""The card of EuroSAT as it is published, beside the choice from it that is in GEO-Bench."""

from __future__ import annotations

from panterra.data.card import DatasetCard

_EUROSAT = (
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
)

CARDS = (
    DatasetCard(
        name="eurosat_ms",
        title="EuroSAT, multispectral",
        opener="panterra.data.eurosat_ms:open_eurosat_ms",
        task="classification",
        class_names=_EUROSAT,
        splits={"train": None, "test": None},
        modalities={"sentinel2": (1, 64, 64)},
        target_shape=(),
        layout=tuple(f"{name}/{name}_*.tif" for name in _EUROSAT),
        about=(
            "Level 1C, times 10,000, without dates. There is no official split: of each class the first seven in ten "
            "by number train and the others test, which does not keep neighbours apart. A part of the download will do."
        ),
        licence="MIT",
        citation="Helber et al. 2019, EuroSAT (IEEE JSTARS)",
    ),
)
