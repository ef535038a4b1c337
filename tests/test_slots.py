import datetime as dt

import numpy as np
import torch

from panterra import Batch, Observation, collate
from panterra.models.slots import align, to_timestamps
from panterra.sample import to_days


def series(dates, bands=2, start=0.0):
    pixels = np.arange(len(dates), dtype=np.float32)[:, None, None, None] + np.full((1, bands, 2, 2), start, np.float32)
    return Observation.build(pixels, dates)


def test_timestamps_are_calendar_parts():
    dates = [dt.date(2024, 2, 29), dt.date(1999, 12, 31), dt.date(1969, 1, 1)]
    stamps = to_timestamps(torch.tensor([[to_days(d) for d in dates]]))
    assert stamps[0].tolist() == [[d.day, d.month - 1, d.year] for d in dates]


def test_close_dates_share_a_slot_and_gaps_are_invalid():
    s2 = series(["2024-01-01", "2024-02-01", "2024-04-01"], bands=12)
    s1 = series(["2024-01-05", "2024-03-02", "2024-04-03"], start=10)
    out = align({"sentinel2_l2a": s2, "sentinel1": s1}, tolerance_days=15)
    assert out.timestamps[0].tolist() == [[1, 0, 2024], [1, 1, 2024], [2, 2, 2024], [1, 3, 2024]]
    assert out.observations["sentinel2_l2a"].valid[0, :, 0, 0].tolist() == [True, True, False, True]
    assert out.observations["sentinel1"].valid[0, :, 0, 0].tolist() == [True, False, True, True]
    assert out.observations["sentinel1"].pixels[0, [0, 2, 3], 0, 0, 0].tolist() == [10, 11, 12]


def test_two_images_of_one_modality_never_share_a_slot():
    s2 = series(["2024-01-01", "2024-01-03"], bands=12)
    s1 = series(["2024-01-02"])
    out = align({"sentinel2_l2a": s2, "sentinel1": s1}, tolerance_days=15)
    assert out.observations["sentinel2_l2a"].valid.flatten(1).all()
    assert out.timestamps.shape[1] == 2


def test_unsorted_dates_are_put_in_order():
    s2 = series(["2024-03-01", "2024-01-01", "2024-02-01"], bands=12)
    out = align({"sentinel2_l2a": s2}, tolerance_days=15)
    assert out.observations["sentinel2_l2a"].pixels[0, :, 0, 0, 0].tolist() == [1, 2, 0]


def test_padding_opens_no_slot():
    short = Batch(observations={"sentinel2_l2a": series(["2024-01-01"], 12), "sentinel1": series(["2024-05-01"])})
    long = Batch(
        observations={
            "sentinel2_l2a": series(["2024-01-01", "2024-02-01", "2024-03-01"], 12),
            "sentinel1": series(["2024-05-01"]),
        }
    )
    alone = align(short.observations, tolerance_days=15)
    together = align(collate([short, long]).observations, tolerance_days=15)
    assert together.timestamps[0, :2].tolist() == alone.timestamps[0].tolist()
    for name, o in alone.observations.items():
        assert together.observations[name].valid[0, :2].tolist() == o.valid[0].tolist()
        assert not together.observations[name].valid[0, 2:].any()
