"""Benchmarks in their official layout on disk, a few samples each, with numbers that name their own place."""

import json
import pickle
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import miniatures
from miniatures import decibels, numbers, write_json, write_table, write_text, write_tif
from panterra.data.breizhcrops import REGIONS
from panterra.data.cards_rslearn import CARDS as RSLEARN
from panterra.data.geobench import LANDSAT, SENTINEL2
from panterra.data.labelled import DATASETS
from panterra.data.mados import WAVELENGTHS

# GEO-Bench


def geobench(name, root: Path, dated=False):
    """Three samples; the labels stand in the pickle and, for several classes, in label_stats.json."""
    card, side = DATASETS[name], 16
    (modality,) = card.modalities
    keys = list(LANDSAT if modality == "landsat" else SENTINEL2)
    if modality == "sentinel2_l2a":
        keys.remove("10 - SWIR - Cirrus")
    if name == "m_so2sat":
        keys = [key for key in keys if key[:2] not in ("01", "09", "10")]
    truth, stats = {}, {}
    for number, split in enumerate(("train", "valid", "test")):
        id = f"sample_{number}"
        bands = {key: numbers(10 * number + i, side, side) for i, key in enumerate(keys)}
        if name == "m_so2sat":
            bands = {key: values / 1e4 for key, values in bands.items()}
        code = len(card.class_names) - 1 - number
        mask = numbers(number, side, side, low=0, high=len(card.class_names), dtype="uint8")
        attributes = {"bands_order": list(bands)} if card.task != "classification" else {"label": code}
        with h5py.File(root / f"{id}.hdf5", "w") as file:
            for key, values in bands.items():
                file[f"{key}_2019-11-05" if dated else key] = values
            if card.task == "segmentation":
                file["label"] = mask
            else:
                file["Cloud probability"] = mask
            file.attrs["pickle"] = str(pickle.dumps(attributes | {"about": {"label": "label"}}))
        stats[id] = np.eye(len(card.class_names))[[code, 0]].max(axis=0).tolist()
        truth[split] = {"id": id, "bands": bands, "code": code, "mask": mask}
    write_json(root / "default_partition.json", {split: [part["id"]] for split, part in truth.items()})
    write_json(root / "0.01x_train_partition.json", {split: [part["id"]] for split, part in truth.items()})
    (root / "task_specs.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")  # whoever opens this is in trouble
    if card.task == "multilabel":
        write_json(root / "label_stats.json", stats)
    return truth


# GEO-Bench-2


def tortilla(files, columns):
    """Lay files out as a tortilla: the table's place and length first, the files, the table."""
    body, offsets = b"", []
    for content in files:
        offsets.append(50 + len(body))
        body += content
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({**columns, "tortilla:offset": offsets, "tortilla:length": [len(content) for content in files]}), sink
    )
    footer = sink.getvalue().to_pybytes()
    head = b"#y" + (50 + len(body)).to_bytes(8, "little") + len(footer).to_bytes(8, "little")
    return head + bytes(32) + body + footer


def geobench2_parts(name, seed):
    """Make the files of one sample, in the order and with the columns of the publishers' scripts."""
    side = 8

    def mask(low, high):
        return numbers(seed + 90, 1, side, side, low=low, high=high, dtype="int16")

    def series(sensor, count, make):
        return [(f"chip_{sensor}_{i}", make(i), {"modality": sensor}) for i in range(count)]

    if name == "gb2_benv2":
        more = {"labels": ["Arable land", "Marine waters"], "lon": 9.5, "lat": 49.5}
        return [("s1", decibels(seed, 2, side, side), more), ("s2", numbers(seed, 12, side, side), more)]
    if name == "gb2_treesatai":
        more = {"species_labels": ["Abies", "Tilia"], "dist_labels": [0.6, 0.4], "stac:centroid": "POINT (9.5 49.5)"}
        shapes = {"aerial": (4, 32, 32), "s1": (3, 6, 6), "s2": (12, 6, 6)}
        return [(id, numbers(seed + i, *shape), more) for i, (id, shape) in enumerate(shapes.items())]
    if name == "gb2_biomassters":
        radar = series("S1", 3, lambda i: decibels(seed + i, 4, side, side))
        radar[0][1][0, 0, 0] = -9999
        radar[1][1][:, 1, 1] = -9999
        optical = series("S2", 2, lambda i: numbers(seed + 10 + i, 11, side, side))
        return [*radar, *optical, ("chip_AGBM", numbers(seed, 1, side, side, high=300), {"modality": "AGBM"})]
    images = {
        "gb2_burn_scars": {"image": numbers(seed, 6, side, side) / 1e4, "label": mask(-1, 2)},
        "gb2_caffe": {"img": numbers(seed, 1, side, side, high=255, dtype="uint8"), "mask": mask(0, 4)},
        "gb2_cloudsen12": {"s2l2a": numbers(seed, 14, side, side, dtype="uint16"), "target": mask(0, 4)},
        "gb2_flair2": {"aerial": numbers(seed, 5, side, side, high=255, dtype="uint8"), "mask": mask(1, 20)},
        "gb2_fotw": {
            "win_a": numbers(seed, 4, side, side),
            "win_b": numbers(seed + 1, 4, side, side),
            "instance_mask": mask(0, 50),
            "semantic_3class_mask": mask(0, 4),
        },
        "gb2_kuro_siwo": {
            **{key: 10 ** (decibels(seed + i, 2, side, side) / 10) for i, key in enumerate(("pre_1", "pre_2", "post"))},
            "dem": np.where(np.arange(side * side) == 9, -900, 50).reshape(1, side, side).astype("float32"),
            "mask": mask(0, 4),
            "invalid_data": numbers(seed + 7, 1, side, side, low=0, high=2, dtype="uint8"),
        },
        "gb2_spacenet2": {
            "ps-ms": numbers(seed, 8, side, side, dtype="uint16"),
            "pan": numbers(seed + 1, 1, side, side, dtype="uint16"),
            "semantic_mask": mask(0, 2),
            "instance_mask": mask(0, 50),
        },
        "gb2_spacenet7": {"images": numbers(seed, 4, side, side, low=0, high=255, dtype="uint8"), "mask": mask(0, 2)},
    }
    return [(id, pixels, {"stac:centroid": "POINT (9.5 49.5)"}) for id, pixels in images[name].items()]


def geobench2(name, root: Path):
    truth, samples, splits = {}, [], ("train", "validation", "test")
    for number, split in enumerate(splits):
        parts = geobench2_parts(name, 100 * number)
        contents = []
        for id, pixels, _ in parts:
            write_tif(root / "part.tif", pixels)
            contents.append((root / "part.tif").read_bytes())
            truth.setdefault(split, {})[id] = pixels
        (root / "part.tif").unlink()
        keys = parts[0][2]
        columns = {
            "tortilla:id": [id for id, _, _ in parts],
            "tortilla:file_format": ["GTiff"] * len(parts),
            **{key: [more[key] for _, _, more in parts] for key in keys},
        }
        samples.append(tortilla(contents, columns))
    columns = {
        "tortilla:id": [f"sample_{number}" for number in range(3)],
        "tortilla:file_format": ["TORTILLA"] * 3,
        "tortilla:data_split": list(splits),
    }
    parted = name == "gb2_biomassters"
    file = root / f"geobench_{name.removeprefix('gb2_')}{'.0000.part' if parted else ''}.tortilla"
    file.write_bytes(tortilla(samples, columns))
    return truth


# One each


def mados(root: Path):
    """A square per split; the middle tile has labels, and one corner."""
    truth = {}
    for number, split in enumerate(("train", "val", "test")):
        scene, crop = f"Scene_{number}", str(10 + number)
        write_text(root / f"splits/{split}_X.txt", f"{scene}_{crop}\n")
        part = {}
        for i, (band, wavelengths) in enumerate(WAVELENGTHS.items()):
            gsd = 60 if band == "B01" else 10 if band in ("B02", "B03", "B04", "B08") else 20
            part[band] = numbers(100 * number + i, 1, 2400 // gsd, 2400 // gsd) / 1e4
            named = wavelengths[-1] if split == "val" else wavelengths[0]
            write_tif(root / scene / str(gsd) / f"{scene}_L2R_rhorc_{named}_{crop}.tif", part[band])
        label = np.zeros((1, 240, 240), "uint8")
        label[0, 100, 110], label[0, 5, 239] = 6, 15
        write_tif(root / scene / "10" / f"{scene}_L2R_cl_{crop}.tif", label)
        truth[split] = part | {"label": label}
    return truth


def breizhcrops(root: Path):
    crops = {"ORH": (0, "barley"), "BTH": (1, "wheat"), "PTR": (8, "temporary meadows")}
    rows = [(i, number, name, code) for i, (code, (number, name)) in enumerate(crops.items())]
    write_table(root / "classmapping.csv", ("", "id", "classname", "code"), rows)
    truth = {}
    days = np.array(["2017-01-03", "2017-01-13", "2017-03-02"], "datetime64[ns]").astype(np.int64)
    for number, region in enumerate(region for regions in REGIONS.values() for region in regions):
        stored = np.concatenate([numbers(number, 3, 16, dtype="float64"), days[:, None].astype("float64")], axis=1)
        inside = f"2017/L1C/{region}/csv/4{number}.csv"
        listed = [
            (0, 0.1, 40 + number, "PTR", inside, 1, 3),
            (1, 0.1, 50, "XXX", f"2017/L1C/{region}/csv/50.csv", 2, 3),  # a crop that is no class
            (2, 0.1, 51, "BTH", f"2017/L1C/{region}/csv/51.csv", 3, 0),  # no image
        ]
        head = ("", "meanQA60", "id", "CODE_CULTU", "path", "idx", "sequencelength")
        write_table(root / f"2017/L1C/{region}.csv", head, listed)
        with h5py.File(root / f"2017/L1C/{region}.h5", "w") as file:
            file[inside] = stored
        truth[region] = stored
    return truth


def cropharvest(name, root: Path):
    places = {
        # index, dataset: longitude, latitude, crop or not, which, for tests
        (1, "kenya"): (37.0, 0.5, 1, "maize", False),
        (2, "kenya"): (37.1, 0.6, 1, "tea", False),
        (3, "kenya"): (37.2, 0.7, 1, None, False),
        (4, "geowiki-landcover-2017"): (37.3, 0.8, 0, None, False),
        (5, "lem-brazil"): (-45.7, -12.1, 1, "coffee", False),
        (6, "togo"): (1.0, 8.0, 1, None, False),
        (7, "togo"): (1.1, 8.1, 0, None, False),
        (8, "togo-eval"): (1.2, 8.2, 1, None, True),
        (9, "kenya"): (37.4, 0.9, 1, "maize", False),  # without imagery
    }
    features, truth = [], {}
    for (index, dataset), (lon, lat, is_crop, label, is_test) in places.items():
        said = {"index": index, "dataset": dataset, "lon": lon, "lat": lat, "is_crop": is_crop, "label": label}
        said |= {"is_test": is_test, "export_end_date": "2020-02-01T00:00:00"}
        features.append({"type": "Feature", "properties": said, "geometry": None})
        if index < 8:
            array = numbers(index, 12, 18, dtype="float64")
            array[:, :2] = decibels(index, 12, 2)
            path = root / f"features/arrays/{index}_{dataset}.h5"
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(path, "w") as file:
                file["array"] = array
            truth[f"{index}_{dataset}"] = array
    write_json(root / "labels.geojson", {"type": "FeatureCollection", "features": features})
    tests = {"togo-eval": (1.2, 8.2), "Kenya_maize_2020_0": (34.2, 0.47), "Brazil_coffee_2021_0": (-45.8, -12.2)}
    (root / "test_features").mkdir()
    for number, (stem, (lon, lat)) in enumerate(tests.items()):
        x = numbers(50 + number, 3, 12, 18, dtype="float64")
        x[..., :2] = decibels(number, 3, 12, 2)
        with h5py.File(root / f"test_features/{stem}.h5", "w") as file:
            file["x"], file["y"] = x, np.array([1, -1, 0])
            file["lons"], file["lats"] = np.full(3, lon), np.full(3, lat)
        truth[stem] = x
    return truth


def rslearn(card, root: Path, steps=2):
    """A window per split; the second of two sets of bands is stored at half the resolution."""
    side, sets = (
        8,
        {
            "sentinel2_l2a": [["B02", "B03", "B04", "B08"], ["B05", "B06", "B07", "B8A", "B11", "B12"]],
            "sentinel1": [["vv", "vh"]],
            "landsat": [["B8"], ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B9", "B10", "B11"]],
        },
    )
    shapes = card.task == "classification" or card.target_shape == ()
    layers = {
        modality: {"type": "raster", "band_sets": [{"dtype": "uint16", "bands": bands} for bands in sets[modality]]}
        | {"data_source": {}}
        for modality in card.modalities
    }
    kind = (
        {"type": "vector"} if shapes else {"type": "raster", "band_sets": [{"bands": ["label"], "nodata_vals": [255]}]}
    )
    write_json(root / "config.json", {"layers": layers | {"label_raster": kind}})
    truth = {}
    for number, split in enumerate(("train", "val", "test")):
        window = root / "windows/default" / f"window_{number}"
        placed = {"crs": "EPSG:32632", "x_resolution": 10, "y_resolution": -10}
        write_json(
            window / "metadata.json",
            {
                "group": "default",
                "name": window.name,
                "projection": placed,
                "bounds": [50000, -550000, 50000 + side, -550000 + side],
                "time_range": ["2021-11-15T00:00:00+00:00", "2022-11-15T00:00:00+00:00"],
                "options": {"split": split},
            },
        )
        part = {}
        for modality in card.modalities:
            for step in range(steps):
                folder = window / "layers" / (modality if step == 0 else f"{modality}.{step}")
                for i, bands in enumerate(sets[modality]):
                    size = side if i == 0 else side // 2
                    pixels = numbers(100 * number + 10 * step + i, len(bands), size, size, low=1000, high=12000)
                    if modality == "sentinel1":
                        pixels = 10 ** (decibels(number + step, 2, side, side) / 10)
                    write_tif(folder / "_".join(bands) / "geotiff.tif", pixels)
                    part[modality, step, i] = pixels
        if shapes:
            part["label"] = 3 if card.task == "classification" else 41.5
            shape = {"type": "Feature", "properties": {"label": part["label"]}, "geometry": None}
            write_text(
                window / "layers/label_raster/data.geojson",
                json.dumps({"type": "FeatureCollection", "features": [shape]}),
            )
        else:
            high = 100 if card.task == "regression" else len(card.class_names)
            part["label"] = numbers(number, 1, side, side, low=0, high=high, dtype="uint8")
            part["label"][0, 0, 0] = 255
            write_tif(window / "layers/label_raster/label/geotiff.tif", part["label"])
        truth[split] = part
    return truth


def eurosat_ms(root: Path):
    """Three images of each class; the third by number, though not by name, tests."""
    truth = {}
    for code, name in enumerate(DATASETS["eurosat_ms"].class_names):
        for number in (1, 2, 10):
            pixels = numbers(10 * code + number, 13, 64, 64, dtype="uint16")
            write_tif(root / name / f"{name}_{number}.tif", pixels)
            truth[f"{name}/{name}_{number}"] = pixels
    return truth


BUILDERS = {
    **miniatures.BUILDERS,
    **{name: partial(geobench, name) for name in DATASETS if name.startswith("m_")},
    **{name: partial(geobench2, name) for name in DATASETS if name.startswith("gb2_")},
    "pastis": partial(miniatures.pastis_hd, side=128),
    "pastis128": partial(miniatures.pastis_hd, side=128),
    "pastis_hd_crops": partial(miniatures.pastis_hd, side=128),
    "mados": mados,
    "eurosat_ms": eurosat_ms,
    "sen1floods11_tiles": partial(miniatures.sen1floods11, side=128),
    "breizhcrops": breizhcrops,
    **{name: partial(cropharvest, name) for name in DATASETS if name.startswith("cropharvest_")},
    **{card.name: partial(rslearn, card) for card in RSLEARN},
}
"""Of all data sets."""
