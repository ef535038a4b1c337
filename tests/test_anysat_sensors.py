"""AnySat's sensors against the tables of its description."""

import pytest

from panterra import MODALITIES
from panterra.models.anysat_sensors import NEW_SENSORS, SENSORS, hub_sensors

# Name: channels in order, pixel in metres; a cell's side in pixels, in metres and in the table of places.
IMAGES = {
    "aerial": ("NIR R G B", 0.2, 10, 2, 2),
    "aerial-flair": ("R G B NIR elevation", 0.2, 10, 2, 2),
    "spot": ("R G B", 1.0, 10, 10, 10),
    "naip": ("R G B IR", 1.25, 8, 10, 10),
    # Planet's 4 pixels of 3 m count as a cell of 10 m, which images are resampled to.
    "planet": ("R G B", 2.5, 4, 10, 12),
}
# Name: channels in order, pixel in metres, period, dropout, norm over dates, hub's pixel, hub's dropout.
SERIES = {
    "s2": ("B02 B03 B04 B05 B06 B07 B08 B8A B11 B12", 10, 367, 0.0, True, 10, 0.0),
    "s1-asc": ("vv vh", 10, 367, 0.2, False, 10, 0.2),
    "s1": ("vv vh vv/vh", 10, 367, 0.2, False, 10, 0.2),
    "alos": ("hh hv hh/hv", 30, 367, 0.2, False, 10, 0.2),
    "l7": ("B1 B2 B3 B4 B5 B7", 30, 367, 0.2, False, 10, 0.2),
    "l8": ("B8 B1 B2 B3 B4 B5 B6 B7 B9 B10 B11", 10, 366, 0.0, False, 10, 0.2),
    "modis": ("B1 B2 B3 B4 B5 B6 B7", 250, 367, 0.2, False, 250, 0.2),
    "hls": ("B2 B3 B4 B5 B6 B7", 30, 366, 0.0, False, None, None),
}
KNOWN = {**SENSORS, **NEW_SENSORS}


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_as_described(name):
    sensor, (channels, pixel_m, kernel, cell_m, place_m) = KNOWN[name], IMAGES[name]
    assert (sensor.channel_names, sensor.dated) == (tuple(channels.split()), False)
    assert (sensor.kernel, sensor.cell_m, sensor.place_m) == (kernel, cell_m, place_m)
    assert sensor.cell_m / sensor.kernel == pytest.approx(pixel_m)


@pytest.mark.parametrize("name", SERIES)
def test_series_are_as_described(name):
    sensor, (channels, pixel_m, period, dropout, in_norm, hub_m, hub_dropout) = KNOWN[name], SERIES[name]
    assert (sensor.channel_names, sensor.dated) == (tuple(channels.split()), True)
    assert (sensor.cell_m, sensor.place_m, sensor.kernel) == (pixel_m, pixel_m, 1)
    assert (sensor.period, sensor.dropout, sensor.in_norm, sensor.whole) == (period, dropout, in_norm, name == "modis")
    if hub_m is not None:
        hub = {s.name: s for s in hub_sensors()}[name]
        assert (hub.cell_m, hub.dropout) == (hub_m, hub_dropout)


def test_each_described_sensor_is_there_and_no_other():
    assert KNOWN.keys() == IMAGES.keys() | SERIES.keys()
    assert list(SENSORS) == [
        *("aerial", "aerial-flair", "spot", "naip", "s2", "s1-asc", "s1", "alos", "l7", "l8", "modis")
    ]


@pytest.mark.parametrize("name", KNOWN)
def test_each_sensor_reads_modalities_that_hold_its_bands(name):
    sensor = KNOWN[name]
    for modality in sensor.modalities:
        row = MODALITIES[modality]
        assert set(sensor.bands) <= set(row.band_names)
        assert row.kind == ("series" if sensor.dated else "still")
        if sensor.dated:  # images are resampled, series keep their pixels
            assert row.gsd == sensor.cell_m
