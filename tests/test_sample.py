import datetime as dt

import numpy as np
import pytest
import torch

from panterra import Batch, InputError, Observation, collate
from panterra.sample import to_date, to_days


def series(dates, *, bands=2, size=4, fill=1.0):
    pixels = np.full((len(dates), bands, size, size), fill, np.float32)
    return Observation.build(pixels, dates)


def test_days_and_dates_are_inverse():
    for date in (dt.date(1970, 1, 1), dt.date(2024, 2, 29), dt.date(1969, 12, 31)):
        assert to_date(to_days(date)) == date
    assert to_days("2024-05-01T10:00:00Z") == to_days(dt.datetime(2024, 5, 1, 10)) == to_days(dt.date(2024, 5, 1))


@pytest.mark.parametrize(
    "date",
    ["2024-05-01", dt.date(2024, 5, 1), dt.datetime(2024, 5, 1, 10), np.datetime64("2024-05-01T10"), np.int64(19844)],
)
def test_build_takes_dates_as_people_have_them(date):
    assert Observation.build(np.ones((1, 2, 3, 3)), [date]).dates.tolist() == [[19844]]


def test_a_single_image_takes_a_single_date():
    assert Observation.build(np.ones((2, 3, 3)), "2024-05-01").dates.tolist() == [[19844]]


def test_build_marks_nan_as_invalid():
    pixels = np.ones((1, 2, 3, 3), np.float32)
    pixels[0, 1, 2, 2] = np.nan
    o = Observation.build(pixels, ["2024-01-01"])
    assert o.valid.sum() == 8
    assert not o.valid[0, 0, 2, 2]


def test_collate_pads_with_invalid_dates_and_keeps_the_rest():
    short, long = series(["2024-01-01"], fill=3), series(["2024-01-01", "2024-02-01"], fill=4)
    joined = collate([Batch(observations={"sentinel1": o}) for o in (short, long)])
    o = joined.observations["sentinel1"]
    assert o.valid.flatten(2).all(-1).tolist() == [[True, False], [True, True]]
    assert o.dates[0, 1] == o.dates[0, 0]
    torch.testing.assert_close(o.pixels[1], long.pixels[0])


def test_collate_fills_an_absent_modality():
    one = Batch(observations={"sentinel1": series(["2024-01-01"])})
    two = Batch(observations={"sentinel2_l2a": series(["2024-01-01"], bands=12)})
    joined = collate([one, two])
    assert joined.observations["sentinel1"].valid.flatten(1).any(1).tolist() == [True, False]
    assert joined.observations["sentinel2_l2a"].valid.flatten(1).any(1).tolist() == [False, True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: to_days("May 2024"), "write it as YYYY-MM-DD"),
        (lambda: Observation.build(np.ones((2, 2, 4, 4)), ["2024-01-01"]), "2 images came with 1 dates"),
        (lambda: Observation.build(np.ones((4, 4)), ["2024-01-01"]), r"wanted real numbers \[T, C, H, W\]"),
        (lambda: Observation.build(np.ones((0, 2, 4, 4)), []), "T >= 1"),
        (lambda: Observation.build(np.ones((2, 4, 4)), None), "None is not a date"),
        (lambda: Observation.build(np.ones((1, 2, 4, 4)), [19000.5]), "count whole days"),
        (lambda: Observation.build(np.ones((3, 2, 4, 4)), "2024-01-01"), "3 images came with 1 dates"),
        (lambda: Observation.build(np.ones((2, 4, 4)), "2024-01-01", np.ones((2, 2))), r"wanted \[1, 4, 4\]"),
        (lambda: Batch(observations={"sentinel1": np.ones((2, 4, 4))}), "make one of pixels and dates"),
        (lambda: Batch(observations={"sentinel1": series(["2024-01-01"])}, pixel_m=0), "wanted metres per pixel"),
        (lambda: Batch(observations={}), "needs at least one modality"),
        (lambda: Batch(observations={"sentinel9": series(["2024-01-01"])}), "no modality 'sentinel9'"),
        (lambda: Batch(observations={"sentinel1": series(["2024-01-01"], bands=3)}), "came with 3 bands; wanted 2"),
        (
            lambda: Observation(
                pixels=torch.zeros(1, 1, 2, 4, 4, dtype=torch.uint8),
                dates=torch.zeros(1, 1, dtype=torch.int64),
                valid=torch.ones(1, 1, 4, 4, dtype=torch.bool),
            ),
            "pixels are uint8",
        ),
        (lambda: collate([]), "nothing to collate"),
        (
            lambda: collate([Batch(observations={"sentinel1": series(["2024-01-01"], size=n)}) for n in (4, 8)]),
            "several sizes",
        ),
    ],
)
def test_bad_input_gets_one_plain_sentence(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
