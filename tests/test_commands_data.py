import csv
import datetime as dt
from dataclasses import replace

import h5py
import numpy as np
import pytest

from panterra.commands.data import (
    check_corpora,
    find_corpora,
    inspect_corpus,
    parse_day,
    parse_shares,
    range_row,
    run_build,
    run_verify,
    spread,
)
from panterra.data.corpus_plan import Job, Rules, Splits
from panterra.data.olmoearth_h5 import Sample, open_corpus, write_corpus
from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.planet import write_planet_scene

STAMPS = np.array([(1, month, 2021) for month in range(12)], np.int64)


def make_sample(rng, *, dates=12, lat=47.0, radar=True):
    present = np.zeros(12, bool)
    present[:dates] = True
    pixels = {
        "sentinel2_l2a": rng.integers(100, 5000, (16, 16, dates, 12)).astype(np.uint16),
        "worldcover": np.full((16, 16, 1, 1), 40, np.uint8),
    }
    if radar:
        pixels["sentinel1"] = rng.uniform(-25, -5, (16, 16, 12, 2)).astype(np.float32)
    return Sample(latlon=(lat, 14.5), timestamps=STAMPS, pixels=pixels, present={"sentinel2_l2a": present})


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    samples = [make_sample(rng, dates=12 - 2 * i, lat=40.0 + 3 * i, radar=i != 2) for i in range(4)]
    return write_corpus(tmp_path / "corpus", samples)


def checked(folder, **options):
    return [(f.level, f.what) for f in check_corpora({"corpus": open_corpus(folder)}, **options)]


def test_inspection_sums_up_a_corpus(folder):
    about = inspect_corpus(open_corpus(folder), patch_px=4)
    assert about["samples"] == about["looked_at"] == 4
    assert about["tile_px"] == 16
    assert about["latitude"] == (40.0, 49.0)
    assert about["longitude"] == (14.5, 14.5)
    assert about["degree_squares"] == 4
    assert (about["first_day"], about["last_day"]) == (dt.date(2021, 1, 1), dt.date(2021, 12, 1))
    assert about["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    # 16 patches: three tokens of Sentinel-2 per date in v1 and one in v1.2, one of radar, one of the map.
    dates, radar = np.array([12, 10, 8, 6]), np.array([12, 12, 0, 12])
    assert about["tokens"]["v1"] == round(float((16 * (3 * dates + radar + 1)).mean()))
    assert about["tokens"]["v1.2"] == round(float((16 * (dates + radar + 1)).mean()))
    radar_about = about["modalities"]["sentinel1"]
    assert (radar_about["samples"], radar_about["dates"]) == (3, 12.0)
    assert about["modalities"]["sentinel2_l2a"]["dates"] == 9.0
    bands = about["modalities"]["sentinel2_l2a"]["bands"]
    assert list(bands) == list(MODALITIES["sentinel2_l2a"].band_names)
    assert bands["B02"]["found"] == pytest.approx([198, 4902], abs=60)
    assert bands["B02"]["expected"][0] < 0 < bands["B02"]["expected"][1]
    row = range_row("sentinel1", radar_about)
    assert row[:3] == ("sentinel1", "3", "12")
    assert float(row[3].split(" to ")[0]) == pytest.approx(-24.6, abs=0.2)
    few = inspect_corpus(open_corpus(folder), samples=2)
    assert few["looked_at"] == 2


def test_what_the_normalisation_does_not_know_has_no_expected_range(tmp_path):
    rng = np.random.default_rng(0)
    sample = make_sample(rng)
    sample = replace(
        sample, pixels=dict(sample.pixels) | {"hls": rng.uniform(0, 9, (16, 16, 12, 6)).astype(np.float32)}
    )
    about = inspect_corpus(open_corpus(write_corpus(tmp_path, [sample])))["modalities"]["hls"]
    assert about["outside"] is None
    assert all(band["expected"] is None for band in about["bands"].values())
    assert range_row("hls", about)[4:] == ("", "")


@pytest.mark.parametrize(("count", "most", "wanted"), [(5, 9, [0, 1, 2, 3, 4]), (101, 3, [0, 50, 100]), (3, 1, [0])])
def test_spread(count, most, wanted):
    assert spread(count, most) == wanted


def test_a_sound_corpus_has_no_trouble(folder):
    found = checked(folder)
    assert [level for level, _ in found] == ["ok", "ok"]
    assert found[1][1] == "4 files were opened and found in order"
    assert checked(folder, samples=2)[1][1] == "2 files were opened and found in order"


def truncate(folder):
    path = folder / "sample_1.h5"
    path.write_bytes(path.read_bytes()[:-3000])


def break_chunk(folder):
    path = folder / "sample_1.h5"
    with h5py.File(path, "r") as file:
        chunk = file["sentinel2_l2a"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + 64] = bytes(64)
    path.write_bytes(content)


def edit(change):
    def break_it(folder):
        with h5py.File(folder / "sample_1.h5", "a") as file:
            change(file)

    return break_it


def put(name, make):
    def change(file):
        value = make(file[name][()])
        del file[name]
        file[name] = value

    return edit(change)


def edit_table(folder):
    path = folder / "sample_metadata.csv"
    rows = list(csv.reader(path.read_text().splitlines()))
    rows[2][rows[0].index("sentinel1")] = "0"
    path.write_text("".join(",".join(row) + "\n" for row in rows))


S2, MASK = "sentinel2_l2a", "missing_timesteps_masks/sentinel2_l2a"


@pytest.mark.parametrize(
    ("damage", "level", "message"),
    [
        (truncate, "error", "corpus/sample_1.h5 cannot be read (Unable to synchronously open file (truncated file"),
        (break_chunk, "error", "corpus/sample_1.h5 cannot be read ("),
        (
            lambda folder: (folder / "sample_3.h5").unlink(),
            "error",
            "1 files are listed and not there, such as sample_3",
        ),
        (
            lambda folder: (folder / "sample_9.h5").touch(),
            "error",
            "1 files are there and not listed, such as sample_9",
        ),
        (lambda folder: folder.rename(folder.parent / "5"), "error", "is named after 5 samples; its table lists 4"),
        (edit_table, "error", "holds sentinel1, sentinel2_l2a, worldcover; its table says sentinel2_l2a, worldcover"),
        (put(MASK, lambda x: np.ones(12, bool)), "error", "has 10 dates of sentinel2_l2a; its mask says 12"),
        (put(MASK, lambda x: x[:5]), "error", "has a mask of sentinel2_l2a of bool [5]; wanted bool [12]"),
        (put(S2, lambda x: x[..., :5]), "error", "of shape [16, 16, 10, 5]; wanted [row, column, date, 12 bands]"),
        (put(S2, lambda x: x[:8]), "error", "has sentinel2_l2a of 8 x 16 pixels; wanted a square"),
        (put("sentinel1", lambda x: x * np.nan), "error", "has sentinel1 that is not finite"),
        (put(S2, lambda x: x.astype(np.int64)), "warning", "as int64; the published corpus has uint16"),
        (put("sentinel1", lambda x: 10 ** (x / 10) + 90), "warning", "100% of it outside the plausible -40 to 10 (db)"),
        (
            put("timestamps", lambda x: x + np.array([0, 1, 0])),
            "error",
            "has a timestamp that is no day 1-31, month 0-11",
        ),
        (put("timestamps", lambda x: x[::-1]), "error", "has timestamps that go back in time"),
        (put("latlon", lambda x: x + 50), "error", "wanted latitude and longitude in degrees"),
        (put("latlon", lambda x: x + 1), "error", "lies at [44.0, 15.5]; latlon_distribution.npy says [43.0, 14.5]"),
        (edit(lambda file: file.__delitem__("timestamps")), "error", "has no timestamps"),
        (edit(lambda file: file.__delitem__(MASK)), "error", "has 10 dates of sentinel2_l2a and no mask"),
    ],
)
def test_each_kind_of_damage_is_named_once(folder, damage, level, message):
    damage(folder)
    folder = next(folder.parent.iterdir())
    found = [(grade, what) for grade, what in checked(folder) if grade != "ok"]
    assert len(found) == 1, found
    assert found[0][0] == level
    assert message in found[0][1]
    assert "\n" not in found[0][1]


def test_samples_that_show_the_same_are_found(tmp_path):
    rng = np.random.default_rng(0)
    one, other = make_sample(rng), make_sample(rng, lat=50.0)
    folder = write_corpus(
        tmp_path / "a", [one, replace(one, latlon=(10.0, 10.0)), other, replace(one, pixels=other.pixels)]
    )
    found = checked(folder)
    assert [what.partition(" ")[2] for level, what in found if level == "error"] == [
        "has the same images as corpus/sample_0.h5; so do 1 more of 4 files",
        "shows the same place and time as corpus/sample_0.h5",
    ]
    apart = {name: open_corpus(write_corpus(tmp_path / name, [one])) for name in ("train", "val")}
    assert any("same images" in finding.what for finding in check_corpora(apart))


def test_from_a_scene_to_a_checked_corpus(tmp_path):
    write_planet_scene(
        tmp_path / "scene",
        size_px=512,
        dates=("2023-06-09",),
        modalities=("sentinel2_l2a", "worldcover"),
        labels=3,
        origin=(2560 * 186, 2560 * 2068),
        clouds=0.0,
    )
    splits = Splits(shares=parse_shares(["train=0.75", "val=0.25"]), block_cells=1)
    job = Job(scenes=(str(tmp_path / "scene"),), rules=Rules(min_dates=1), splits=splits)
    built = run_build(tmp_path / "corpus", job, workers=2)
    assert built.report["samples"] == {"train": 12, "val": 4}
    corpora = find_corpora(tmp_path / "corpus")
    assert {name: inspect_corpus(corpus)["samples"] for name, corpus in corpora.items()} == {"train": 12, "val": 4}
    assert all(finding.level == "ok" for finding in run_verify(str(tmp_path / "corpus"), None, samples=None))
    assert list(find_corpora(built.corpora["val"])) == ["4"]

    (tmp_path / "corpus" / "report.json").unlink()
    with pytest.raises(InputError, match="is not finished; repeat its panterra data build"):
        find_corpora(tmp_path / "corpus")


def test_inspection_of_a_broken_file_is_one_clear_line(folder):
    truncate(folder)
    with pytest.raises(InputError, match=r"sample_1.h5 cannot be read .*; see what else is wrong with: panterra data"):
        inspect_corpus(open_corpus(folder))


def test_verify_takes_a_data_set_by_its_name(tmp_path):
    with pytest.raises(InputError, match="pastis_hd is a data set; say where it lies"):
        run_verify("pastis_hd", None, samples=None)
    with pytest.raises(InputError, match="there is no folder"):
        run_verify("pastis_hd", tmp_path / "none", samples=None)
    with pytest.raises(InputError, match=r"no sample_metadata.csv"):
        run_verify(str(tmp_path), None, samples=None)


def test_options_that_cannot_be_read():
    assert parse_day("2023-06-01") == dt.date(2023, 6, 1)
    assert parse_day(None) is None
    with pytest.raises(InputError, match="'June' is not a date"):
        parse_day("June")
    with pytest.raises(InputError, match="'train' is no share"):
        parse_shares(["train"])
