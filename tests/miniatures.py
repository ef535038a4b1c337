"""Data sets in their official layout on disk, a few samples each, with numbers that name their own place."""

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import rasterio
import torch
from affine import Affine

from panterra.data.planted import SENSORS
from panterra.data.spacenet7 import AREAS

UTM = "EPSG:32632"
NORTH_UP = Affine(10, 0, 500000, 0, -10, 5500000)
WEST_EAST = (9.0, 49.64)
"""Longitude and latitude of that corner, roughly."""


def numbers(seed, *shape, low=100, high=9000, dtype="float32"):
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def decibels(seed, *shape):
    return np.random.default_rng(seed).uniform(-25, -3, shape).astype("float32")


def write_tif(path, pixels, *, crs=UTM, driver="GTiff", nodata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    placed = {} if driver == "PNG" else {"crs": crs, "transform": NORTH_UP}
    count, height, width = pixels.shape
    with rasterio.open(
        path, "w", driver=driver, count=count, height=height, width=width, dtype=pixels.dtype, nodata=nodata, **placed
    ) as file:
        file.write(pixels)


def write_npy(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, pixels)


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_json(path, value):
    write_text(path, json.dumps(value))


def write_table(path, head, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


# One builder per data set: writes below `root`, returns what was written


def treesatai_ts(root: Path):
    name, bare = "Abies_alba_1_1_A.tif", "Cleared_0_2_B.tif"
    for split, listed in (("train", [name, bare]), ("val", [name]), ("test", [name])):
        write_text(root / f"{split}_filenames.lst", "\n".join(listed) + "\n")
    labels = {name: [["Abies", 0.62], ["Tilia", 0.071], ["Picea", 0.07]], bare: [["Quercus", 0.05]]}
    write_json(root / "labels/TreeSatBA_v9_60m_multi_labels.json", labels)
    aerial = numbers(0, 4, 304, 304, high=255, dtype="uint8")
    write_tif(root / "aerial" / name, aerial)
    series = {
        "sen-2": numbers(1, 3, 10, 6, 6),
        "sen-1-asc": np.random.default_rng(2).uniform(0.01, 0.4, (2, 2, 6, 6)).astype("float32"),
        "sen-1-des": np.random.default_rng(3).uniform(0.01, 0.4, (1, 2, 6, 6)).astype("float32"),
    }
    products = {
        # Out of order, to be put in order by the reader.
        "sen-2": [f"S2A_MSIL2A_{day}T102421_N0213_R065_T32UNC_x" for day in ("20200105", "20200102", "20200301")],
        "sen-1-asc": [f"S1A_IW_GRDH_1SDV_{day}T170841_x_030639_0382D5_360A" for day in ("20200103", "20200109")],
        "sen-1-des": ["S1B_IW_GRDH_1SDV_20200106T053252_x_019692_025399_6B7A"],
    }
    (root / "sentinel").mkdir()
    with h5py.File(root / "sentinel" / "Abies_alba_1_1_A.h5", "w") as file:
        for key, pixels in series.items():
            file[f"{key}-data"] = pixels
            file[f"{key}-products"] = products[key]
        file["sen-2-masks"] = np.zeros_like(series["sen-2"])
    return {"name": name, "aerial": aerial, **series}


def pastis_hd(root: Path, side=8):
    features, truth = [], {}
    for fold in range(1, 6):
        id = 10000 + fold
        x, y = 700000, 6600000 + 1280 * fold
        outline = [[[x, y], [x + 1280, y], [x + 1280, y + 1280], [x, y + 1280], [x, y]]]
        dates = {f"dates-{kind}": {"0": 20180924, "1": 20191003, "10": 20191010} for kind in ("S2", "S1A", "S1D")}
        features.append(
            {
                "type": "Feature",
                "properties": {"ID_PATCH": id, "Fold": fold, **dates},
                "geometry": {"type": "MultiPolygon", "coordinates": [outline]},
            }
        )
        part = {
            "S2": numbers(fold, 3, 10, side, side, dtype="int16"),
            "S1A": decibels(fold, 3, 3, side, side),
            "S1D": decibels(fold + 50, 3, 3, side, side),
            "SPOT": numbers(fold, 3, 80, 80, high=255, dtype="uint8"),
            "TARGET": numbers(fold, 3, side, side, low=0, high=20, dtype="uint8"),
        }
        part["S2"][1, :, 2, 3] = -10000
        part["TARGET"][0, 0, :2] = (0, 19)
        for kind in ("S2", "S1A", "S1D"):
            write_npy(root / f"DATA_{kind}/{kind}_{id}.npy", part[kind])
        write_npy(root / f"ANNOTATIONS/TARGET_{id}.npy", part["TARGET"])
        spot = root / f"DATA_SPOT/PASTIS_SPOT6_RVB_1M00_2019/SPOT6_RVB_1M00_2019_{id}.tif"
        write_tif(spot, part["SPOT"], crs="EPSG:2154")
        truth[str(id)] = part
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::2154"}}
    write_json(root / "metadata.geojson", {"type": "FeatureCollection", "crs": crs, "features": features})
    return truth


def flair(root: Path):
    splits = {"train": ["D001_2019"], "val": ["D002_2020"], "test": ["D003_2021"]}
    write_json(root / "splits.json", splits)
    centroids, truth = {}, {}
    for number, (split, (domain,)) in enumerate(splits.items()):
        aerial, sen, labels = (
            root / (f"flair_2_{kind}_test" if split == "test" else f"flair_{kind}_train") / domain / "Z1_AA"
            for kind in ("aerial", "sen", "labels")
        )
        part = {
            "image": numbers(number, 5, 512, 512, low=0, high=255, dtype="uint8"),
            "label": numbers(number, 1, 512, 512, low=1, high=20, dtype="uint8"),
            "series": numbers(number, 2, 10, 40, 44, dtype="uint16"),
            "centre": (20, 27),
        }
        name = f"IMG_00000{number}.tif"
        write_tif(aerial / "img" / name, part["image"], crs="EPSG:2154")
        write_tif(labels / "msk" / name.replace("IMG", "MSK"), part["label"], crs="EPSG:2154")
        write_npy(sen / "sen" / f"SEN2_sp_{domain}-Z1_AA_data.npy", part["series"])
        write_npy(sen / "sen" / f"SEN2_sp_{domain}-Z1_AA_masks.npy", np.zeros((2, 2, 40, 44), "uint8"))
        products = "S2B_MSIL2A_20210114T105329_N0214_R051_T31\nS2A_MSIL2A_20210509T105621_N0300_R094_T31\n"
        write_text(sen / "sen" / f"SEN2_sp_{domain}-Z1_AA_products.txt", products)
        centroids[name] = part["centre"]
        truth[split] = part | {"name": name}
    write_json(root / "flair-2_centroids_sp_to_patch.json", centroids)
    return truth


def planted(root: Path):
    shapes = {
        "s2": (3, 12, 12, 10),
        "s1": (2, 12, 12, 3),
        "l7": (2, 4, 4, 6),
        "alos": (2, 4, 4, 3),
        "modis": (2, 1, 1, 7),
    }
    truth = {}
    for number, split in enumerate(("train", "val", "test")):
        id = f"{number}7"
        write_json(root / split / "labels2.json", {id: 39 - number})
        for key, shape in shapes.items():
            pixels = decibels(number, *shape) if key == "s1" else numbers(number, *shape)
            pixels = pixels % 255 + 1 if key == "l7" else pixels
            mask = np.ones(shape, "uint8")
            mask[-1] = 0
            if shape[1] > 1:
                mask[0, 0, 0, len(SENSORS[key][1]) - 1] = 0
            days = 86_400_000 * (16000 + 16 * np.arange(shape[0])) + 3_600_000
            folder = root / split / id
            folder.mkdir(exist_ok=True)
            for ending, values in (("", pixels), ("_mask", mask), ("_timestamp", days)):
                np.savez(folder / f"{id}_{key}{ending}.npz", values)
            truth[split, key] = pixels
    return truth


def s2naip_urban(root: Path):
    truth = {}
    for number, split in enumerate(("train", "val", "test")):
        name = f"100_{number}"
        dates = {"s1_dates": [["20200105", "20200117"]], "s2_dates": [["20200401"]], "l8_dates": [["20210710"]]}
        write_json(root / f"{split}_dict.json", {"name": [name], **dates})
        part = {
            "naip": numbers(number, 4, 512, 512, low=0, high=255, dtype="uint8"),
            "sentinel1": decibels(number, 4, 64, 64),
            "sentinel2_8": numbers(number, 4, 64, 64, dtype="uint16"),
            "sentinel2_16": numbers(number, 6, 32, 32, dtype="uint16"),
            "landsat_8": numbers(number, 1, 64, 64, low=5000, high=20000, dtype="uint16"),
            "landsat_16": numbers(number, 10, 32, 32, low=5000, high=20000, dtype="uint16"),
        }
        part["sentinel2_8"][:, 0, 0] = 0
        part["landsat_16"][:, 5, 5] = 0
        write_tif(root / f"naip/{name}.png", part["naip"], driver="PNG")
        write_tif(root / f"sentinel1/{name}.tif", part["sentinel1"])
        for sensor in ("sentinel2", "landsat"):
            for size in (8, 16):
                write_tif(root / f"{sensor}/{name}_{size}.tif", part[f"{sensor}_{size}"])
        shapes = [
            ("power plant", {"type": "Polygon", "coordinates": [[[10, 20], [30, 20], [30, 40], [10, 40], [10, 20]]]}),
            ("road", {"type": "LineString", "coordinates": [[0, 100], [512, 100]]}),
            ("fountain", {"type": "Point", "coordinates": [200.5, 300.5]}),
            (
                "leisure",
                {"type": "Polygon", "coordinates": [[[400, 400], [410, 400], [410, 405], [400, 405], [400, 400]]]},
            ),
            ("building", {"type": "Polygon", "coordinates": [[[12, 22], [14, 22], [14, 24], [12, 24], [12, 22]]]}),
        ]
        features = [{"type": "Feature", "properties": {"category": c}, "geometry": g} for c, g in shapes]
        write_json(root / f"openstreetmap/{name}.geojson", {"type": "FeatureCollection", "features": features})
        truth[split] = part
    return truth


def bradd_s1ts(root: Path):
    rows, truth = [], {}
    for number, (split, linear) in enumerate((("train", False), ("validation", True), ("test", False))):
        name = f"sample_{number}.pt"
        image = decibels(number, 3, 2, 48, 48)
        sample = {
            "image": torch.from_numpy(10 ** (image / 10) if linear else image),
            "image_dates": ["20190105", "20190117", "20190129"],
            "label_dates": ["20190101", "20190131"],
            "label": torch.from_numpy(numbers(number, 2, 48, 48, low=0, high=2, dtype="uint8")),
        }
        if linear:  # as arrays and dates, which a sample may hold as well
            sample["image"] = sample["image"].numpy()
            sample["image_dates"] = np.array(["2019-01-05", "2019-01-17", "2019-01-29"], "M8[D]")
        (root / "Samples").mkdir(exist_ok=True)
        torch.save(sample, root / "Samples" / name)
        rows.append((number, name, split))
        truth[split] = {"image": image, "label": sample["label"]}
    write_table(root / "meta.csv", ("index", "file", "close_set"), rows)
    return truth


def sickle(root: Path):
    rows = [("train", 7, 1), ("train", 7, 2), ("val", 7, 3), ("val", 8, 9)]
    head = ("SPLIT", "UNIQUE_ID", "PLOT_ID")
    write_table(root / "sickle_dataset_tabular.csv", head, rows)
    planes = np.zeros((3, 32, 32), "float32")
    planes[0, :4], planes[1, :4] = 1, 1  # paddy
    planes[0, 4:8], planes[1, 4:8] = 2, 5  # another crop
    planes[0, 8:12], planes[1, 8:12] = 3, 1  # of the other split
    planes[0, 12:14] = 1  # a plot without crop type
    bands = {
        "S2": ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12"),
        "L8": ("SR_B1", "SR_B2", "SR_B3", "SR_B4", "SR_B5", "SR_B6", "SR_B7", "ST_B10"),
        "S1": ("VV", "VH"),
    }
    files = {
        "S2": ("20180106T050211_20180106T051254_T44PKS", "T44PKS_20180101T050211_x"),
        "L8": ("LC08_143052_20180110",),
        "S1": ("S1A_IW_GRDH_1SDV_20180103T003115_20180103T003140_019988_0220C6_7AAE",),
    }
    truth = {"planes": planes}
    for square in ("7", "8"):
        write_tif(root / f"masks/10m/{square}.tif", planes)
        for sensor, names in files.items():
            folder = root / f"images/{sensor}/npy/{square}"
            folder.mkdir(parents=True)
            side = 11 if sensor == "L8" else 32
            for name in names:
                # Reflectance of 0.2 to 0.35 and 290 K or so at level 2.
                low, high = (14550, 20000) if sensor == "L8" else (100, 4000)
                arrays = {b: numbers(i, side, side, low=low, high=high) for i, b in enumerate(bands[sensor])}
                if sensor == "S1":
                    arrays = {b: decibels(i, side, side) for i, b in enumerate(bands[sensor])}
                if sensor == "L8":
                    arrays["ST_B10"] = numbers(9, side, side, low=40000, high=45000)
                np.savez(folder / f"{name}.npz", **arrays)
                truth[sensor, name] = arrays
    return truth


def timesen2crop(root: Path):
    columns = ("B2", "B3", "B4", "B5", "B6", "B7", "B8A", "B11", "B12", "flag")
    truth = {}
    for number, tile in enumerate(("32TNT", "33TWN", "33UVP", "2019_33UVP")):
        write_table(root / tile / "dates.csv", ("", "acquisition_date"), [(0, 20170906), (1, 20170913), (2, 20171002)])
        for code in range(16):
            (root / tile / str(code)).mkdir()
        values = numbers(number, 3, 9, dtype="int64")
        rows = [(*row, flag) for row, flag in zip(values.tolist(), (0, 1, 3), strict=True)]
        write_table(root / tile / str(10 + number) / "41.csv", columns, rows)
        truth[tile] = values
    return truth


def sen1floods11(root: Path, side=16):
    base = root / "v1.1"
    splits = {"train": "Ghana_1", "valid": "India_2", "test": "Spain_3", "bolivia": "Bolivia_4"}
    floods = [
        {"location": place, "s1_date": s1, "s2_date": s2}
        for place, s1, s2 in (
            ("Ghana", "2018/09/18", "2018/09/19"),
            ("India", "2016/08/12", "2016/08/12"),
            ("India", "2016/08/24", "2016/08/24"),
            ("Spain", "2019-09-17", "2019-09-18"),
            ("Bolivia", "2018/02/15", "2018/02/15"),
        )
    ]
    features = [{"type": "Feature", "properties": f, "geometry": None} for f in floods]
    write_json(base / "Sen1Floods11_Metadata.geojson", {"type": "FeatureCollection", "features": features})
    truth = {}
    for number, (split, chip) in enumerate(splits.items()):
        listing = base / f"splits/flood_handlabeled/flood_{split}_data.csv"
        write_text(listing, f"{chip}_S1Hand.tif,{chip}_LabelHand.tif\n")
        part = {
            "S1": decibels(number, 2, side, side),
            "S2": numbers(number, 13, side, side, dtype="int16"),
            "Label": numbers(number, 1, side, side, low=-1, high=2, dtype="int16"),
        }
        part["S1"][1, 3, 3] = np.nan
        part["S2"][:, 4, 4] = 0
        for kind, pixels in part.items():
            write_tif(base / f"data/flood_events/HandLabeled/{kind}Hand/{chip}_{kind}Hand.tif", pixels)
        truth[split] = part
    return truth


def so2sat(root: Path):
    truth = {}
    for number, split in enumerate(("training", "validation", "testing")):
        part = {
            "sen1": np.random.default_rng(number).uniform(0.001, 0.5, (3, 32, 32, 8)).astype("float64"),
            "sen2": np.random.default_rng(number).uniform(0.01, 0.6, (3, 32, 32, 10)).astype("float64"),
            "label": np.eye(17)[[number, 16, 4]],
        }
        with h5py.File(root / f"{split}.h5", "w") as file:
            for key, values in part.items():
                file[key] = values
        truth[split] = part
    return truth


def hls_burn_scars(root: Path, count=11):
    truth = {}
    for folder, some, tile, ending in (
        ("training", count, "T10SEH", "_mask.tif"),
        ("validation", 2, "T11SKA", ".mask.tif"),
    ):
        for number in range(some):
            stem = f"subsetted_512x512_HLS.S30.{tile}.2018{190 + number}.v1.4"
            pixels = np.random.default_rng(number).uniform(0.01, 0.5, (6, 16, 16)).astype("float32")
            pixels[2, 1, 1] = 9999
            mask = numbers(number, 1, 16, 16, low=-1, high=2, dtype="int16")
            write_tif(root / folder / f"{stem}_merged.tif", pixels)
            write_tif(root / folder / f"{stem}{ending}", mask)
            truth[folder, f"{stem}_merged.tif"] = pixels, mask
    return truth


def spacenet7(root: Path):
    truth, metadata = {}, {}
    for number, areas in enumerate(AREAS.values()):
        area = areas[0]
        image = numbers(number, 4, 64, 64, low=1, high=255, dtype="uint8")
        image[3] = 255
        image[3, 0, 0] = 0
        label = np.zeros((1, 64, 64), "uint8")
        label[0, 10:20, 30:40] = 255
        name = f"global_monthly_2018_07_mosaic_{area}"
        write_tif(root / f"train/{area}/images_masked/{name}.tif", image, crs="EPSG:3857")
        write_tif(root / f"train/{area}/labels_raster/{name}_Buildings.tif", label, crs="EPSG:3857")
        entry = {"aoi_id": area, "year": 2018, "month": 7, "mask": False, "label": True}
        metadata[area] = [entry, entry | {"month": 8, "label": False}, entry | {"month": 9, "mask": True}]
        truth[area] = image, label
    write_json(root / "metadata_train.json", metadata)
    return truth


def biomassters(root: Path):
    truth = {}
    for number, (split, folder) in enumerate((("train", "train"), ("val", "train"), ("test", "test"))):
        chip = f"00{number}d7f33"
        write_table(root / f"{split}_Data_list.csv", ("chip_id",), [(chip,)])
        for month in range(12):
            radar = decibels(100 * number + month, 4, 16, 16)
            radar[3, 2, 2] = -9999
            write_tif(root / f"{folder}_features/{chip}_S1_{month:02d}.tif", radar)
            truth[split, "S1", month] = radar
            if month not in (3, 4):
                optical = numbers(100 * number + month, 11, 16, 16, dtype="uint16")
                write_tif(root / f"{folder}_features/{chip}_S2_{month:02d}.tif", optical)
                truth[split, "S2", month] = optical
        label = np.random.default_rng(number).uniform(0, 300, (1, 16, 16)).astype("float32")
        label[0, 0, 0] = np.nan
        write_tif(root / f"{folder}_agbm/{chip}_agbm.tif", label)
        truth[split, "label"] = label
    return truth


BUILDERS = {
    "treesatai_ts": treesatai_ts,
    "pastis_hd": pastis_hd,
    "flair": flair,
    "planted": planted,
    "s2naip_urban": s2naip_urban,
    "bradd_s1ts": bradd_s1ts,
    "sickle": sickle,
    "timesen2crop": timesen2crop,
    "sen1floods11": sen1floods11,
    "so2sat": so2sat,
    "hls_burn_scars": hls_burn_scars,
    "spacenet7": spacenet7,
    "biomassters": biomassters,
}
