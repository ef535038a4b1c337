"""SpaceNet 7: buildings in monthly Planet mosaics of growing cities."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from panterra.data.labelled import DATASETS, LabelledSample, LabelledSet, check_split
from panterra.data.stored_pixels import load_json, nearest, observe, read_image
from panterra.errors import InputError
from panterra.sample import Batch, to_days

CARD = DATASETS["spacenet7"]
SIDE_PX = 1024
MIDDLE_OF_MONTH = 15

AREAS = {
    "train": (
        "L15-0331E-1257N_1327_3160_13",
        "L15-0358E-1220N_1433_3310_13",
        "L15-0457E-1135N_1831_3648_13",
        "L15-0487E-1246N_1950_3207_13",
        "L15-0577E-1243N_2309_3217_13",
        "L15-0586E-1127N_2345_3680_13",
        "L15-0595E-1278N_2383_3079_13",
        "L15-0632E-0892N_2528_4620_13",
        "L15-0683E-1006N_2732_4164_13",
        "L15-0924E-1108N_3699_3757_13",
        "L15-1015E-1062N_4061_3941_13",
        "L15-1138E-1216N_4553_3325_13",
        "L15-1203E-1203N_4815_3378_13",
        "L15-1204E-1202N_4816_3380_13",
        "L15-1209E-1113N_4838_3737_13",
        "L15-1210E-1025N_4840_4088_13",
        "L15-1276E-1107N_5105_3761_13",
        "L15-1298E-1322N_5193_2903_13",
        "L15-1389E-1284N_5557_3054_13",
        "L15-1438E-1134N_5753_3655_13",
        "L15-1439E-1134N_5759_3655_13",
        "L15-1481E-1119N_5927_3715_13",
        "L15-1538E-1163N_6154_3539_13",
        "L15-1615E-1206N_6460_3366_13",
        "L15-1669E-1153N_6678_3579_13",
        "L15-1669E-1160N_6679_3549_13",
        "L15-1672E-1207N_6691_3363_13",
        "L15-1703E-1219N_6813_3313_13",
        "L15-1709E-1112N_6838_3742_13",
        "L15-1716E-1211N_6864_3345_13",
    ),
    "val": (
        "L15-0357E-1223N_1429_3296_13",
        "L15-0361E-1300N_1446_2989_13",
        "L15-0368E-1245N_1474_3210_13",
        "L15-0566E-1185N_2265_3451_13",
        "L15-0614E-0946N_2459_4406_13",
        "L15-0760E-0887N_3041_4643_13",
        "L15-1014E-1375N_4056_2688_13",
        "L15-1049E-1370N_4196_2710_13",
        "L15-1185E-0935N_4742_4450_13",
        "L15-1289E-1169N_5156_3514_13",
        "L15-1296E-1198N_5184_3399_13",
        "L15-1615E-1205N_6460_3370_13",
        "L15-1617E-1207N_6468_3360_13",
        "L15-1669E-1160N_6678_3548_13",
        "L15-1748E-1247N_6993_3202_13",
    ),
    "test": (
        "L15-0387E-1276N_1549_3087_13",
        "L15-0434E-1218N_1736_3318_13",
        "L15-0506E-1204N_2027_3374_13",
        "L15-0544E-1228N_2176_3279_13",
        "L15-0977E-1187N_3911_3441_13",
        "L15-1025E-1366N_4102_2726_13",
        "L15-1172E-1306N_4688_2967_13",
        "L15-1200E-0847N_4802_4803_13",
        "L15-1204E-1204N_4819_3372_13",
        "L15-1335E-1166N_5342_3524_13",
        "L15-1479E-1101N_5916_3785_13",
        "L15-1690E-1211N_6763_3346_13",
        "L15-1691E-1211N_6764_3347_13",
        "L15-1848E-0793N_7394_5018_13",
    ),
}
"""The split of the labelled areas that AnySat's evaluation uses."""


def open_spacenet7(root: str | Path, split: str) -> LabelledSet:
    """Open a split: the mosaics of its areas that are labelled and not masked."""
    check_split(CARD, split)
    root = Path(root)
    mosaics = load_json(root / "metadata_train.json")
    absent = [area for area in AREAS[split] if area not in mosaics]
    if len(absent) == len(AREAS[split]):
        raise InputError(f"metadata_train.json names none of the areas of {split}, such as {absent[0]}")
    return LabelledSet(
        card=CARD,
        split=split,
        task=CARD.task,
        class_names=CARD.class_names,
        ids=[
            f"{area}/{int(m['year']):04d}_{int(m['month']):02d}"
            for area in AREAS[split]
            for m in mosaics.get(area, ())
            if m["label"] and not m["mask"]
        ],
        read=partial(_read, root, split),
        files=partial(_files, root),
    )


def _files(root: Path, id: str) -> tuple[Path, Path]:
    area, month = id.split("/")
    name = f"global_monthly_{month}_mosaic_{area}"
    folder = root / "train" / area
    return folder / "images_masked" / f"{name}.tif", folder / "labels_raster" / f"{name}_Buildings.tif"


def _read(root: Path, split: str, id: str) -> LabelledSample:
    image, label = (read_image(path) for path in _files(root, id))
    *colours, seen = nearest(image.pixels, SIDE_PX)
    year, month = id.split("/")[1].split("_")
    observation = observe(
        "planet",
        np.stack(colours)[None],
        [to_days(f"{year}-{month}-{MIDDLE_OF_MONTH}")],
        bands=("R", "G", "B"),
        valid=(seen != 0)[None],
    )
    return LabelledSample(
        id=id,
        batch=Batch(observations={"planet": observation}, lonlat=image.lonlat),
        target=torch.from_numpy((nearest(label.pixels[:1], SIDE_PX) > 0).astype(np.int64)),
        fold=split,
    )
