"""The cards of the sets that OlmoEarth was tested on and that stand alone."""

from __future__ import annotations

from dataclasses import replace

from panterra.data import cards_anysat
from panterra.data.card import DatasetCard

_KNOWN = {card.name: card for card in cards_anysat.CARDS}

_PASTIS = replace(
    _KNOWN["pastis_hd"],
    name="pastis",
    title="PASTIS-R, tiles of 640 m",
    opener="panterra.data.pastis:open_pastis",
    splits={"train": 5820, "val": 1928, "test": 1984},
    modalities={"sentinel2_l2a": (None, 64, 64), "sentinel1": (None, 64, 64)},
    target_shape=(64, 64),
    layout=("metadata.geojson", "DATA_S2", "DATA_S1A", "ANNOTATIONS"),
    about=(
        "A mean image per month over what is valid, of the first 12 months with any; ascending backscatter. The "
        "published evaluation sorts radar images into months by the dates of Sentinel-2, here by their own. Void "
        "pixels (code 19) are without label. Folds 1 to 3 train, 4 validates, 5 tests."
    ),
    citation="Garnot and Landrieu 2021 (ICCV); Garnot et al. 2022, ISPRS",
    options={"name": "pastis", "tile_px": 64},
)

_CROPHARVEST = DatasetCard(
    name="cropharvest_togo",
    title="CropHarvest, crops of Togo",
    opener="panterra.data.cropharvest:open_cropharvest",
    task="classification",
    class_names=("not crop", "crop"),
    splits={"train": None, "test": None},
    modalities={"sentinel2": (12, 1, 1), "sentinel1": (12, 1, 1), "srtm": (1, 1, 1)},
    target_shape=(),
    layout=("labels.geojson", "features/arrays", "test_features/togo-eval.h5"),
    about=(
        "Single pixels, twelve steps of 30 days up to February. Sentinel-2 is of level 1C, where B01 and B10 were left "
        "out and neighbours stand in. Weather, slope and the vegetation index are not read. Training samples are those "
        "in the country's extent; what lacks imagery is left out."
    ),
    licence="CC-BY-SA-4.0",
    citation="Tseng et al. 2021, CropHarvest (NeurIPS Datasets and Benchmarks)",
    options={"name": "cropharvest_togo"},
)

CARDS = (
    _PASTIS,
    replace(
        _PASTIS,
        name="pastis128",
        title="PASTIS-R",
        splits={"train": 1455, "val": 482, "test": 496},
        modalities={"sentinel2_l2a": (None, 128, 128), "sentinel1": (None, 128, 128)},
        target_shape=(128, 128),
        options={"name": "pastis128", "tile_px": 128},
    ),
    DatasetCard(
        name="mados",
        title="MADOS",
        opener="panterra.data.mados:open_mados",
        task="segmentation",
        class_names=(
            "Marine Debris",
            "Dense Sargassum",
            "Sparse Floating Algae",
            "Natural Organic Material",
            "Ship",
            "Oil Spill",
            "Marine Water",
            "Sediment-Laden Water",
            "Foam",
            "Turbid Water",
            "Shallow Water",
            "Waves & Wakes",
            "Oil Platform",
            "Jellyfish",
            "Sea snot",
        ),
        splits={"train": None, "val": None, "test": None},
        modalities={"sentinel2_l2a": (1, 80, 80)},
        target_shape=(80, 80),
        layout=("splits/train_X.txt", "splits/val_X.txt", "splits/test_X.txt", "Scene_*"),
        about=(
            "Reflectance after ACOLITE's Rayleigh correction, from 0 to 1, brought to times 10,000: darker than "
            "surface reflectance, so normalise with the set's own statistics. Coarse bands are resized "
            "bilinearly. Squares of 240 pixels are cut into tiles of 80; those without labels are left out. No dates."
        ),
        licence="CC-BY-4.0",
        citation="Kikaki et al. 2024, ISPRS Journal 210, 39",
    ),
    replace(
        _KNOWN["pastis_hd"],
        name="pastis_hd_crops",
        title="PASTIS-HD, which crops occur",
        opener="panterra.data.pastis:open_pastis_crops",
        task="multilabel",
        class_names=_KNOWN["pastis_hd"].class_names[1:],
        target_shape=(18,),
        options={"name": "pastis_hd_crops"},
    ),
    replace(
        _KNOWN["sen1floods11"],
        name="sen1floods11_tiles",
        title="Sen1Floods11, radar tiles of 640 m",
        opener="panterra.data.sen1floods11_tiles:open_sen1floods11_tiles",
        splits={"train": None, "valid": None, "test": None, "bolivia": None},
        modalities={"sentinel1": (1, 64, 64)},
        target_shape=(64, 64),
        layout=(
            "v1.1/splits/flood_handlabeled",
            "v1.1/Sen1Floods11_Metadata.geojson",
            "v1.1/data/flood_events/HandLabeled/S1Hand",
            "v1.1/data/flood_events/HandLabeled/LabelHand",
        ),
        about=(
            "The chips cut into 8 x 8 tiles; those without water, or with a gap in the radar, are left out as in "
            "OlmoEarth's published evaluation."
        ),
    ),
    DatasetCard(
        name="breizhcrops",
        title="BreizhCrops",
        opener="panterra.data.breizhcrops:open_breizhcrops",
        task="classification",
        class_names=(
            "barley",
            "wheat",
            "rapeseed",
            "corn",
            "sunflower",
            "orchards",
            "nuts",
            "permanent meadows",
            "temporary meadows",
        ),
        splits={"train": None, "valid": None, "test": None},
        modalities={"sentinel2": (None, 1, 1)},
        target_shape=(),
        layout=("classmapping.csv", "2017/L1C/frh01.h5", "2017/L1C/frh01.csv", "2017/L1C/frh04.h5"),
        about=(
            "Level 1C of 2017, a field's mean as a single pixel, here a mean per month. Regions frh01 and frh02 train, "
            "frh03 validates, frh04 tests."
        ),
        licence=None,
        citation="Rußwurm et al. 2020, BreizhCrops (ISPRS Archives XLIII-B2, 1545)",
    ),
    _CROPHARVEST,
    replace(
        _CROPHARVEST,
        name="cropharvest_kenya",
        title="CropHarvest, maize in Kenya",
        class_names=("not maize", "maize"),
        layout=("labels.geojson", "features/arrays", "test_features/Kenya_maize_*.h5"),
        options={"name": "cropharvest_kenya"},
    ),
    replace(
        _CROPHARVEST,
        name="cropharvest_brazil",
        title="CropHarvest, coffee in Brazil",
        class_names=("not coffee", "coffee"),
        layout=("labels.geojson", "features/arrays", "test_features/Brazil_coffee_*.h5"),
        options={"name": "cropharvest_brazil"},
    ),
)
