"""Labelled data sets: what one is, and which ones can be opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from panterra.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from panterra.sample import Batch

Task = Literal["classification", "multilabel", "segmentation", "regression"]

IGNORE = -1
"""The class of pixels without a label; where the target is a quantity, NaN."""

UNDATED = 0
"""The day (1970-01-01) of images whose date the data set does not give."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSample:
    """One place with what is known about it."""

    id: str
    batch: Batch
    """B = 1."""
    target: Tensor
    """classification: int64 [1]; multilabel: float32 [1, classes] of 0 and 1; segmentation: int64 [1, H, W];
    regression: float32 [1, H, W]."""
    fold: str
    """The official fold where there are folds, else the split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSet:
    """One split of a data set, read a sample at a time; torch's `DataLoader` takes it as it is."""

    card: DatasetCard
    split: str
    task: Task
    class_names: tuple[str, ...]
    """In the order of the codes; what is measured, where the target is a quantity."""
    ids: Sequence[str]
    read: Callable[[str], LabelledSample]
    files: Callable[[str], Sequence[Path]]
    """What `read` opens, without opening it."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> LabelledSample:
        return self.read(self.ids[index])


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetCard:
    """What is known of a data set before it is opened."""

    name: str
    title: str
    opener: str
    """module:function, called with (root, split)."""
    task: Task
    class_names: tuple[str, ...]
    splits: Mapping[str, int | None]
    """Number of samples as published; None where it is not."""
    modalities: Mapping[str, tuple[int | None, int, int]]
    """Dates, rows and columns of each; None where they vary."""
    target_shape: tuple[int, ...]
    layout: tuple[str, ...]
    """Files and folders (glob patterns) that must be there."""
    about: str
    """Units as stored, dates, and where the reader differs from the one published with AnySat."""
    licence: str | None
    """None: not established; ask the publisher before passing anything on."""
    citation: str
    shared_places: bool = False
    """Whether a place may stand in several splits, with other pixels labelled."""

    def open(self, root: str | Path, split: str, **options: Any) -> LabelledSet:
        """Open one split of a download."""
        module, function = self.opener.split(":")
        opened: LabelledSet = getattr(import_module(module), function)(root, split, **options)
        return opened


def open_labelled(name: str, root: str | Path, split: str, **options: Any) -> LabelledSet:
    """Open one split of a data set of `DATASETS`."""
    return card_of(name).open(root, split, **options)


def card_of(name: str) -> DatasetCard:
    """Look a data set up by its name."""
    if name not in DATASETS:
        raise InputError(f"no data set {name!r}; known: {', '.join(DATASETS)}")
    return DATASETS[name]


def check_split(card: DatasetCard, split: str) -> None:
    """Refuse a split that a data set does not have."""
    if split not in card.splits:
        raise InputError(f"{card.title} has no split {split!r}; choose one of {', '.join(card.splits)}")


DATASETS: dict[str, DatasetCard] = {
    card.name: card
    for card in (
        DatasetCard(
            name="treesatai_ts",
            title="TreeSatAI Time Series",
            opener="panterra.data.treesatai_ts:open_treesatai_ts",
            task="multilabel",
            class_names=(
                "Abies",
                "Acer",
                "Alnus",
                "Betula",
                "Cleared",
                "Fagus",
                "Fraxinus",
                "Larix",
                "Picea",
                "Pinus",
                "Populus",
                "Prunus",
                "Pseudotsuga",
                "Quercus",
                "Tilia",
            ),
            splits={"train": 38520, "val": None, "test": None},
            modalities={"aerial": (1, 300, 300), "sentinel2_l2a": (None, 6, 6), "sentinel1_ascending": (None, 6, 6)},
            target_shape=(15,),
            layout=(
                "train_filenames.lst",
                "val_filenames.lst",
                "test_filenames.lst",
                "labels/TreeSatBA_v9_60m_multi_labels.json",
                "aerial",
                "sentinel",
            ),
            about=(
                "Backscatter is stored as linear power and delivered in decibels. Aerial images (stored near infrared "
                "first) lose two pixels on each side to cover the 60 m of the series; they have no date."
            ),
            licence="CC-BY-4.0",
            citation="Ahlswede et al. 2023, Earth System Science Data 15, 681; Astruc et al. 2024, OmniSat (ECCV)",
        ),
        DatasetCard(
            name="pastis_hd",
            title="PASTIS-HD",
            opener="panterra.data.pastis_hd:open_pastis_hd",
            task="segmentation",
            class_names=(
                "Background",
                "Meadow",
                "Soft winter wheat",
                "Corn",
                "Winter barley",
                "Winter rapeseed",
                "Spring barley",
                "Sunflower",
                "Grapevine",
                "Beet",
                "Winter triticale",
                "Winter durum wheat",
                "Fruits, vegetables, flowers",
                "Potatoes",
                "Leguminous fodder",
                "Soybeans",
                "Orchard",
                "Mixed cereal",
                "Sorghum",
            ),
            splits={"train": 1455, "val": 482, "test": 496},
            modalities={"spot": (1, 1280, 1280), "sentinel2_l2a": (None, 128, 128), "sentinel1": (None, 128, 128)},
            target_shape=(128, 128),
            layout=(
                "metadata.geojson",
                "DATA_S2",
                "DATA_S1A",
                "DATA_SPOT/PASTIS_SPOT6_RVB_1M00_2019",
                "ANNOTATIONS",
            ),
            about=(
                "Void pixels (code 19) are without label. Folds 1 to 3 train, 4 validates, 5 tests. Dates are true "
                "ones; AnySat was trained with days since 2018-09-01. Backscatter is ascending unless asked otherwise."
            ),
            licence="Etalab-2.0",
            citation="Garnot and Landrieu 2021 (ICCV); Garnot et al. 2022, ISPRS; Astruc et al. 2024, OmniSat (ECCV)",
        ),
        DatasetCard(
            name="flair",
            title="FLAIR #2",
            opener="panterra.data.flair:open_flair",
            task="segmentation",
            class_names=(
                "building",
                "pervious surface",
                "impervious surface",
                "bare soil",
                "water",
                "coniferous",
                "deciduous",
                "brushwood",
                "vineyard",
                "herbaceous vegetation",
                "agricultural land",
                "plowed land",
                "other",
            ),
            splits={"train": 49230, "val": 12482, "test": 16050},
            modalities={"aerial_flair": (1, 500, 500), "sentinel2_l2a": (None, 10, 10)},
            target_shape=(500, 500),
            layout=("splits.json", "flair-2_centroids_sp_to_patch.json", "flair_*"),
            about=(
                "Images of 512 pixels are cut to the 500 that the 100 m of the series cover, in the middle unless "
                "asked otherwise. Classes 13 to 19 are other, which benchmarks leave out. Aerial images have no date. "
                "The published runs validate on the test split; here validation is its own."
            ),
            licence="Etalab-2.0",
            citation="Garioud et al. 2023, FLAIR (NeurIPS Datasets and Benchmarks)",
        ),
        DatasetCard(
            name="planted",
            title="PLANTED",
            opener="panterra.data.planted:open_planted",
            task="classification",
            class_names=(
                "Elaeis guineensis",
                "Pinus taeda",
                "Pinus rigida",
                "Pinus koraiensis",
                "Pinus densiflora",
                "Abies sachalinensis",
                "Pinus elliottii",
                "Shorea robusta",
                "Castanea crenata",
                "Pseudotsuga menziesii",
                "Eucalyptus globulus",
                "Pinus radiata",
                "Robinia pseudoacacia",
                "Pinus thunbergii",
                "Pinus echinata",
                "Thea sinensis",
                "Betula pendula",
                "Hevea brasiliensis",
                "Picea glehnii",
                "Quercus acutissima",
                "Eucalyptus nitens",
                "Cocos nucifera",
                "Anacardium occidentale",
                "Zelkova serrata",
                "Acer pictum",
                "Prunus serrulata",
                "Prunus dulcis",
                "Picea jezoensis",
                "Quercus variabilis",
                "Fraxinus rhynchophylla",
                "Ginkgo biloba",
                "Pasania edulis",
                "Dendropanax morbiferus",
                "Machilus thunbergii",
                "Cryptomeria japonica",
                "Acacia melanoxylon",
                "Malus pumila",
                "Picea mariana",
                "Cornus controversa",
                "Theobroma cacao",
            ),
            splits={"train": 1075701, "val": None, "test": None},
            modalities={
                "sentinel2": (None, 12, 12),
                "sentinel1": (None, 12, 12),
                "landsat7": (None, 4, 4),
                "alos2": (None, 4, 4),
                "modis": (None, 1, 1),
            },
            target_shape=(),
            layout=("train/labels2.json", "val/labels2.json", "test/labels2.json"),
            about=(
                "Masks say where values are data. Times are UTC days; the published reader takes local ones. "
                "Sentinel-1 is taken to be decibels and ALOS-2 digital numbers, as Earth Engine delivers them."
            ),
            licence=None,
            citation="Pazos-Outon et al. 2024, Planted (IGARSS)",
        ),
        DatasetCard(
            name="s2naip_urban",
            title="S2NAIP-URBAN",
            opener="panterra.data.s2naip_urban:open_s2naip_urban",
            task="segmentation",
            class_names=("none", "building or tower", "transport", "industry or energy", "water", "leisure or other"),
            splits={"train": 359046, "val": 82140, "test": 74084},
            modalities={
                "naip": (1, 1024, 1024),
                "landsat": (None, 64, 64),
                "sentinel2": (None, 64, 64),
                "sentinel1": (None, 64, 64),
            },
            target_shape=(512, 512),
            layout=("*_dict.json", "naip", "sentinel1", "sentinel2", "landsat", "openstreetmap"),
            about=(
                "NAIP is stored at 1.25 m and every pixel repeated to the 0.625 m that the modality declares. "
                "Coarser bands are interpolated to 10 m as published. NAIP has no date. Labels are drawn from "
                "OpenStreetMap; AnySat's pretraining does not use them."
            ),
            licence=None,
            citation="Astruc et al. 2025, AnySat (CVPR); Wolters et al. 2023, S2-NAIP; OpenStreetMap (ODbL)",
        ),
        DatasetCard(
            name="bradd_s1ts",
            title="BraDD-S1TS",
            opener="panterra.data.bradd_s1ts:open_bradd_s1ts",
            task="segmentation",
            class_names=("no change", "deforestation"),
            splits={"train": None, "validation": None, "test": None},
            modalities={"sentinel1": (None, 48, 48)},
            target_shape=(48, 48),
            layout=("meta.csv", "Samples"),
            about=(
                "Dates are true ones; AnySat's reader counts from the first image or label of a sample, which is day "
                "1. Backscatter without any negative value is linear power and is brought to decibels."
            ),
            licence=None,
            citation="Karaman et al. 2023, ISPRS Annals X-1/W1, 835",
        ),
        DatasetCard(
            name="sickle",
            title="SICKLE",
            opener="panterra.data.sickle:open_sickle",
            task="segmentation",
            class_names=("paddy", "other crop"),
            splits={"train": None, "val": None},
            modalities={"landsat": (None, 32, 32), "sentinel2_l2a": (None, 32, 32), "sentinel1": (None, 32, 32)},
            target_shape=(32, 32),
            layout=("sickle_dataset_tabular.csv", "masks/10m", "images/S2/npy", "images/L8/npy", "images/S1/npy"),
            about=(
                "The published runs test on the validation split. Landsat is level 2, which is rescaled to the digital "
                "numbers of level 1: surface reflectance stands for top of atmosphere. Stand-ins fill its three "
                "absent bands."
            ),
            licence=None,
            citation="Sani et al. 2024, SICKLE (WACV)",
            shared_places=True,
        ),
        DatasetCard(
            name="timesen2crop",
            title="TimeSen2Crop",
            opener="panterra.data.timesen2crop:open_timesen2crop",
            task="classification",
            class_names=(
                "Legumes",
                "Grassland",
                "Maize",
                "Potato",
                "Sunflower",
                "Soy",
                "Winter barley",
                "Winter caraway",
                "Rye",
                "Rapeseed",
                "Beet",
                "Spring cereals",
                "Winter wheat",
                "Winter triticale",
                "Permanent plantations",
                "Other crops",
            ),
            splits={"train": None, "val": None, "test": None},
            modalities={"sentinel2_l2a": (None, 1, 1)},
            target_shape=(),
            layout=("*/dates.csv", "33UVP", "33TWN"),
            about=(
                "Single pixels. B08 is absent and B8A stands in for it. Cloudy, shaded and snowy dates are kept as "
                "published; clear_only=True marks them invalid. 2019_33UVP, another year of the test tile, is left out."
            ),
            licence="CC-BY-4.0",
            citation="Weikmann et al. 2021, TimeSen2Crop (IEEE JSTARS)",
        ),
        DatasetCard(
            name="sen1floods11",
            title="Sen1Floods11",
            opener="panterra.data.sen1floods11:open_sen1floods11",
            task="segmentation",
            class_names=("no water", "water"),
            splits={"train": 252, "valid": 89, "test": 90, "bolivia": 15},
            modalities={"sentinel2": (1, 512, 512), "sentinel1": (1, 512, 512)},
            target_shape=(512, 512),
            layout=(
                "v1.1/splits/flood_handlabeled",
                "v1.1/Sen1Floods11_Metadata.geojson",
                "v1.1/data/flood_events/HandLabeled/S1Hand",
                "v1.1/data/flood_events/HandLabeled/S2Hand",
                "v1.1/data/flood_events/HandLabeled/LabelHand",
            ),
            about="All 13 bands of level 1C. Each sensor has its own date, where just one flood has the chip's name.",
            licence="CC-BY-4.0 (as reported; the repository has no licence file)",
            citation="Bonafilia et al. 2020, Sen1Floods11 (CVPR Workshops)",
        ),
        DatasetCard(
            name="so2sat",
            title="So2Sat LCZ42",
            opener="panterra.data.so2sat:open_so2sat",
            task="classification",
            class_names=(
                "Compact high rise",
                "Compact mid rise",
                "Compact low rise",
                "Open high rise",
                "Open mid rise",
                "Open low rise",
                "Lightweight low rise",
                "Large low rise",
                "Sparsely built",
                "Heavy industry",
                "Dense trees",
                "Scattered trees",
                "Bush, scrub",
                "Low plants",
                "Bare rock or paved",
                "Bare soil or sand",
                "Water",
            ),
            splits={"training": 352366, "validation": 24119, "testing": 24188},
            modalities={"sentinel2": (1, 32, 32), "sentinel1": (1, 32, 32)},
            target_shape=(),
            layout=("training.h5", "validation.h5", "testing.h5"),
            about=(
                "Backscatter is the Lee-filtered intensity in decibels, where AnySat's reader takes the real parts of "
                "the complex signal; and images are not transposed. No dates."
            ),
            licence="CC-BY-4.0",
            citation="Zhu et al. 2020, So2Sat LCZ42 (IEEE GRSM 8(3), 76)",
        ),
        DatasetCard(
            name="hls_burn_scars",
            title="HLS Burn Scars",
            opener="panterra.data.hls_burn_scars:open_hls_burn_scars",
            task="segmentation",
            class_names=("not burned", "burn scar"),
            splits={"train": 486, "val": 54, "test": 264},
            modalities={"hls": (1, 512, 512)},
            target_shape=(512, 512),
            layout=("training", "validation"),
            about=(
                "Reflectance from 0 to 1 is brought to 1e4; 9999 is no data. The date is the one in the file's name. "
                "A tenth of the training folder, drawn as published, validates; the validation folder tests."
            ),
            licence="CC-BY-4.0",
            citation="Phillips et al. 2023, HLS Foundation Burnscars Dataset, doi:10.57967/hf/0956",
        ),
        DatasetCard(
            name="spacenet7",
            title="SpaceNet 7",
            opener="panterra.data.spacenet7:open_spacenet7",
            task="segmentation",
            class_names=("background", "building"),
            splits={"train": None, "val": None, "test": None},
            modalities={"planet": (1, 1024, 1024)},
            target_shape=(1024, 1024),
            layout=("metadata_train.json", "train/*/images_masked", "train/*/labels_raster"),
            about=(
                "Pixels count as 3 m, as published; they measure about 4.8 m at the equator and less elsewhere. "
                "Monthly mosaics are dated the 15th. The published runs validate on the test areas."
            ),
            licence="CC-BY-SA-4.0",
            citation="Van Etten et al. 2021, The Multi-Temporal Urban Development SpaceNet Dataset (CVPR)",
        ),
        DatasetCard(
            name="biomassters",
            title="BioMassters",
            opener="panterra.data.biomassters:open_biomassters",
            task="regression",
            class_names=("above-ground biomass",),
            splits={"train": None, "val": None, "test": 2773},
            modalities={"sentinel2_l2a": (None, 256, 256), "sentinel1": (None, 256, 256)},
            target_shape=(256, 256),
            layout=(
                "train_Data_list.csv",
                "val_Data_list.csv",
                "test_Data_list.csv",
                "train_features",
                "train_agbm",
                "test_features",
                "test_agbm",
            ),
            about=(
                "Months are known and years are not: September to August are dated the 15th, from 2019 to 2020. Each "
                "month's backscatter is two images, ascending and descending. Tonnes per pixel; NaN is without label."
            ),
            licence="CC-BY-4.0",
            citation="Nascetti et al. 2023, BioMassters (NeurIPS Datasets and Benchmarks)",
        ),
    )
}
