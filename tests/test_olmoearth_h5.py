import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from panterra.data.olmoearth_h5 import (
    MISSING,
    CropSize,
    PretrainingBatch,
    PretrainingBatches,
    Sample,
    collate_items,
    draw_crop_size,
    missing_tokens,
    num_dates,
    open_corpus,
    read_item,
    turn_batch,
    write_corpus,
)
from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models import normalize
from panterra.models.normalize import normalize_olmoearth
from panterra.models.olmoearth import released_config

pytest.importorskip("hdf5plugin")

V1_GROUPS = released_config("v1", "nano").groups
ALL = ("sentinel2_l2a", "sentinel1", "naip_10", "worldcover", "era5_10")
SIDE = 16


def bands(m):
    return len(MODALITIES[m].bands)


def make_sample(seed, *, present=None, without=()):
    rng = np.random.Generator(np.random.PCG64(seed))
    present = present or {"sentinel2_l2a": np.ones(12, bool), "sentinel1": np.ones(12, bool)}
    pixels = {
        m: rng.integers(0, 5000, (SIDE, SIDE, int(which.sum()), bands(m))).astype(np.uint16)
        for m, which in present.items()
        if m not in without
    }
    pixels |= {
        "naip_10": rng.integers(0, 255, (4 * SIDE, 4 * SIDE, 1, 4)).astype(np.uint8),
        "worldcover": rng.choice([10, 20, 60], (SIDE, SIDE, 1, 1)).astype(np.uint8),
        "era5_10": rng.normal(size=(12, 6)).astype(np.float32),
    }
    months = np.arange(12)
    timestamps = np.stack([1 + rng.integers(0, 28, 12), months, np.full(12, 2020)], axis=1)
    kept = {m: x for m, x in pixels.items() if m not in without}
    which = {m: x for m, x in present.items() if m in kept}
    return Sample(latlon=(seed + 0.5, -seed), timestamps=timestamps, pixels=kept, present=which)


def gaps(*there):
    which = np.zeros(12, bool)
    which[list(there)] = True
    return which


GAPPY = {"sentinel2_l2a": gaps(2, 3, 5, 6, 9), "sentinel1": gaps(3, 4, 5, 10)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    samples = [
        make_sample(0),
        make_sample(1, present=GAPPY),
        make_sample(2, without=("naip_10", "sentinel1")),
        make_sample(3, without=("sentinel2_l2a", "sentinel1")),
        *(make_sample(i) for i in range(4, 10)),
    ]
    folder = write_corpus(tmp_path_factory.mktemp("corpus"), iter(samples), tiles_per_sample=4)
    return open_corpus(folder), samples


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def whole(corpus, index, modalities=ALL):
    return read_item(corpus.path(index), modalities, rng=rng())


def test_the_layout_is_the_published_one(corpus):
    folder = corpus[0].folder
    names = "era5_10_naip_10_sentinel1_sentinel2_l2a_worldcover"
    assert folder.parts[-3:] == ("h5py_data_w_missing_timesteps_zstd_3_16_x_4", names, "10")
    table = (folder / "sample_metadata.csv").read_text().splitlines()
    assert table[0] == "sample_index,era5_10,naip_10,sentinel1,sentinel2_l2a,worldcover"
    assert table[3] == "2,1,0,0,1,1"
    settings = json.loads((folder / "compression_settings.json").read_text())
    assert settings == {"compression": "zstd", "compression_opts": 3, "shuffle": None}
    assert np.load(folder / "latlon_distribution.npy")[3].tolist() == [3.5, -3]
    assert len(list(folder.iterdir())) == 13


def test_what_was_written_is_read(corpus):
    corpus, samples = corpus
    got, sample = whole(corpus, 0), samples[0]
    for m in ("sentinel2_l2a", "sentinel1", "naip_10", "worldcover"):
        np.testing.assert_array_equal(got.inputs[m].permute(2, 3, 0, 1), sample.pixels[m])
    np.testing.assert_array_equal(got.inputs["era5_10"][..., 0, 0], sample.pixels["era5_10"])
    np.testing.assert_array_equal(got.timestamps, sample.timestamps)
    assert got.latlon.tolist() == [0.5, 0]


def test_gaps_and_absent_modalities_are_missing(corpus):
    corpus, samples = corpus
    got, sample = whole(corpus, 1), samples[1]
    # The first and last dates that any series has are 2 and 10.
    np.testing.assert_array_equal(got.timestamps[:9], sample.timestamps[2:11])
    assert (got.timestamps[9:] == got.timestamps[8]).all()
    there = [0, 1, 3, 4, 7]
    pixels = got.inputs["sentinel2_l2a"]
    np.testing.assert_array_equal(pixels[there].permute(2, 3, 0, 1), sample.pixels["sentinel2_l2a"])
    assert (pixels[[i for i in range(12) if i not in there]] == MISSING).all()
    absent = whole(corpus, 2).inputs
    assert absent["sentinel1"].shape == (12, 2, SIDE, SIDE)
    assert absent["naip_10"].shape == (1, 4, 4 * SIDE, 4 * SIDE)
    assert (absent["sentinel1"] == MISSING).all()
    assert (absent["naip_10"] == MISSING).all()


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_a_crop_is_a_part_of_the_whole(corpus, index, seed):
    """Found again by its dates and by its place on a map of coordinates."""
    corpus, _ = corpus
    dates = num_dates(3, 300, ALL, V1_GROUPS)
    assert dates == 7
    crop = CropSize(patch_px=2, side_patches=3, dates=dates)
    part = read_item(corpus.path(index), ALL, rng=rng(seed), crop=crop)
    all_of_it = whole(corpus, index)
    again = rng(seed)
    span = 9 if index == 1 else 12
    present = np.any([GAPPY[m][2:11] for m in GAPPY], axis=0) if index == 1 else np.ones(12, bool)
    starts = [s for s in range(span - dates + 1) if present[s]]
    start, row, col = again.choice(starts), again.choice(SIDE - 5), again.choice(SIDE - 5)
    np.testing.assert_array_equal(part.timestamps, all_of_it.timestamps[start : start + dates])
    for m, x in all_of_it.inputs.items():
        scale = 4 if m == "naip_10" else 1
        if MODALITIES[m].kind in ("series", "weather"):
            x = x[start : start + dates]
        if m != "era5_10":
            x = x[..., row * scale : (row + 6) * scale, col * scale : (col + 6) * scale]
            np.testing.assert_array_equal(part.inputs[m], x)


def test_normalised_values_are_those_of_the_model(corpus):
    corpus, _ = corpus
    raw, done = (
        whole(corpus, 1).inputs,
        read_item(corpus.path(1), ALL[:2], rng=rng(), normalise=normalize_olmoearth).inputs,
    )
    for m in done:
        expected = normalize_olmoearth(raw[m].movedim(1, -1), m).movedim(-1, 1)
        torch.testing.assert_close(done[m], expected, rtol=0, atol=0)
        assert ((raw[m] == MISSING) == (done[m] == MISSING)).all()


def test_derived_modalities(corpus):
    corpus, samples = corpus
    got = whole(corpus, 1, ("ndvi", "worldcover_onehot")).inputs
    names = MODALITIES["sentinel2_l2a"].band_names
    stored = samples[1].pixels["sentinel2_l2a"].astype(np.float32)
    red, infrared = (stored[..., names.index(band)] for band in ("B04", "B08"))
    np.testing.assert_allclose(got["ndvi"][0, 0], ((infrared - red) / (infrared + red))[:, :, 0], rtol=1e-6)
    assert (got["ndvi"][2] == MISSING).all()
    classes = samples[1].pixels["worldcover"][..., 0, 0]
    assert torch.equal(got["worldcover_onehot"][0, 5], torch.from_numpy(classes == 60).float())
    assert (got["worldcover_onehot"].sum(1) == 1).all()


def test_places_are_read_as_what_never_varies(corpus):
    corpus, samples = corpus
    names = ("sentinel2_l2a", "latlon")
    items = [read_item(corpus.path(i), names, rng=rng(), normalise=normalize_olmoearth) for i in (0, 4)]
    batch = collate_items(items, patch_px=4, groups=V1_GROUPS)
    low, high = normalize.olmoearth_range("latlon")
    wanted = torch.tensor([samples[i].latlon for i in (0, 4)], dtype=torch.float64)
    torch.testing.assert_close(batch.inputs["latlon"][:, 0, :, 0, 0], ((wanted - low) / (high - low)).float())
    assert batch.missing["latlon"].shape == (2, 1, 1, 1, 1)
    assert not batch.missing["latlon"].any()


def test_tokens_are_missing_where_the_first_pixel_lacks_a_band():
    pixels = torch.zeros(1, 2, 12, 8, 8)
    bands_ = MODALITIES["sentinel2_l2a"].band_names
    pixels[0, 1, bands_.index("B05"), 4, 0] = MISSING
    pixels[0, 0, bands_.index("B02"), 1, 1] = MISSING
    gone = missing_tokens(pixels, "sentinel2_l2a", 4, V1_GROUPS("sentinel2_l2a"))
    assert gone.shape == (1, 2, 2, 2, 3)
    assert gone.nonzero().tolist() == [[0, 1, 0, 1, 1]]


def test_missing_values_are_what_the_model_takes_for_missing():
    assert MISSING == normalize.MISSING


def test_usable_samples_have_a_series(corpus):
    corpus, _ = corpus
    assert corpus.usable(ALL).tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert corpus.usable(("sentinel1", "worldcover")).tolist() == [0, 1, 4, 5, 6, 7, 8, 9]
    assert corpus.usable(("ndvi", "worldcover")).tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert corpus.usable(ALL, only=[3, 4, 9]).tolist() == [4, 9]
    half = corpus.usable(ALL, fraction=0.5, seed=1)
    assert len(half) == 4
    assert half.tolist() == corpus.usable(ALL, fraction=0.5, seed=1).tolist()


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_other_compressions_are_read_too(tmp_path, compression):
    sample = make_sample(1)
    folder = write_corpus(tmp_path, [sample], compression=compression, level=4, shuffle=True)
    assert folder.parts[-3].startswith(
        f"h5py_data_w_missing_timesteps{'_gzip_4' if compression else ''}_shuffle_16_x_1"
    )
    got = whole(open_corpus(tmp_path), 0).inputs["sentinel1"]
    np.testing.assert_array_equal(got.permute(2, 3, 0, 1), sample.pixels["sentinel1"])


def stream(corpora, **options):
    settings = {
        "modalities": ("sentinel2_l2a", "sentinel1", "worldcover"),
        "normalise": normalize_olmoearth,
        "groups": V1_GROUPS,
        "budget_groups": V1_GROUPS,
        "batch_size": 4,
        "seed": 3,
        "patch_px": (1, 2, 4),
        "side_patches": range(1, 10),
        "token_budget": 900,
    }
    return PretrainingBatches(corpora, **(settings | options))


def same(a, b):
    return a.patch_px == b.patch_px and all(torch.equal(a.inputs[m], b.inputs[m]) for m in a.inputs)


def test_an_epoch_visits_every_sample_once_in_an_order_of_its_own(corpus):
    batches = stream([corpus[0], corpus[0]])
    assert len(batches.places) == 18
    assert len(batches) == 4
    epochs = [np.concatenate([batches.order(4 * epoch + i) for i in range(4)]).tolist() for epoch in range(2)]
    for epoch in epochs:
        assert len(set(epoch)) == 16
    assert epochs[0] != epochs[1]


def test_ranks_share_a_batch(corpus):
    one, halves = stream([corpus[0]]), [stream([corpus[0]], rank=rank, world=2) for rank in range(2)]
    for step in range(5):
        merged = np.stack([half.order(step) for half in halves], axis=1).reshape(-1)
        assert merged.tolist() == one.order(step).tolist()


def test_a_batch_depends_on_its_step_alone(corpus):
    first = [stream([corpus[0]])[step] for step in range(4)]
    again = stream([corpus[0]])
    resumed = DataLoader(again, batch_size=None, sampler=range(2, 4), num_workers=1)
    for batch, expected in zip(resumed, first[2:], strict=True):
        assert same(batch, expected)
    assert not same(stream([corpus[0]], seed=4)[0], first[0])


def test_a_batch_is_what_the_encoder_takes(corpus):
    batch = stream([corpus[0]])[0]
    b, dates, channels, height, width = batch.inputs["sentinel2_l2a"].shape
    assert (b, channels, batch.timestamps.shape) == (4, 12, (4, dates, 3))
    side = height // batch.patch_px
    assert height == width == side * batch.patch_px
    assert batch.missing["sentinel2_l2a"].shape == (4, side, side, dates, 3)
    assert batch.missing["worldcover"].shape == (4, side, side, 1, 1)
    assert batch.inputs["worldcover"].shape == (4, 1, 1, height, width)


def test_the_eight_symmetries_move_pixels_and_tokens_alike():
    pixels = torch.arange(64.0).reshape(1, 1, 1, 8, 8).expand(1, 1, 12, 8, 8).clone()
    pixels[..., 4:6, 2:4] = MISSING
    missing = missing_tokens(pixels, "sentinel2_l2a", 2, V1_GROUPS("sentinel2_l2a"))
    weather = torch.rand(1, 1, 6, 1, 1)
    batch = PretrainingBatch(
        inputs={"sentinel2_l2a": pixels, "era5_10": weather},
        timestamps=torch.zeros(1, 1, 3),
        missing={"sentinel2_l2a": missing, "era5_10": torch.zeros(1, 1, 1, 1, 1, dtype=torch.bool)},
        latlon=torch.zeros(1, 2),
        patch_px=2,
    )
    corners = set()
    for symmetry in range(8):
        turned = turn_batch(batch, symmetry)
        x = turned.inputs["sentinel2_l2a"]
        again = missing_tokens(x, "sentinel2_l2a", 2, V1_GROUPS("sentinel2_l2a"))
        assert torch.equal(turned.missing["sentinel2_l2a"], again)
        assert turned.inputs["era5_10"] is weather
        corners.add((x[0, 0, 0, 0, 0].item(), x[0, 0, 0, 0, -1].item()))
    assert len(corners) == 8
    assert turn_batch(batch, 1).inputs["sentinel2_l2a"][0, 0, 0, -1, 0] == pixels[0, 0, 0, 0, 0]  # counter-clockwise


def test_crop_sizes_cover_all_that_fits():
    drawn = {
        (c.patch_px, c.side_patches)
        for c in (
            draw_crop_size(
                rng(i), tile_px=16, patch_px=(2, 8), side_patches=range(1, 13), dates=lambda side: 12 // side
            )
            for i in range(400)
        )
    }
    assert drawn == {(2, s) for s in range(1, 9)} | {(8, 1), (8, 2)}


def test_budget_that_holds_no_date_is_refused():
    with pytest.raises(InputError, match="12 x 12 patches need more than 200 tokens"):
        num_dates(12, 200, ALL, V1_GROUPS)


def test_without_the_plugin_the_published_layout_is_read_and_others_say_what_to_install(corpus, tmp_path):
    shuffled = open_corpus(write_corpus(tmp_path, [make_sample(0)], shuffle=True))
    script = (
        "import sys; sys.modules['hdf5plugin'] = None\n"
        "import numpy as np\n"
        "from panterra.data.olmoearth_h5 import read_item\n"
        f"for path in ({str(corpus[0].path(0))!r}, {str(shuffled.path(0))!r}):\n"
        "    print(read_item(path, ['sentinel1'], rng=np.random.default_rng()).inputs['sentinel1'].shape)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "torch.Size([12, 2, 16, 16])\n"
    assert "is compressed with zstd; install the package hdf5plugin to read it" in done.stderr


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"compression": "gzip"}, {"chunk_px": 5}])
def test_how_a_corpus_is_compressed_does_not_matter(tmp_path, options):
    samples = [make_sample(0), make_sample(1, present=GAPPY)]
    plain = open_corpus(write_corpus(tmp_path / "plain", samples, compression=None))
    packed = open_corpus(write_corpus(tmp_path / "packed", samples, **options))
    for index in range(2):
        for seed in range(4):
            crop = CropSize(patch_px=2, side_patches=3, dates=4) if seed else None
            one, other = (read_item(c.path(index), ALL, rng=rng(seed), crop=crop).inputs for c in (plain, packed))
            assert all(torch.equal(one[m], other[m]) for m in ALL)


def test_a_failed_write_leaves_nothing(tmp_path):
    wrong = make_sample(0)
    wrong.present["sentinel1"][4] = False
    with pytest.raises(InputError, match="sentinel1 has 12 dates and 2 bands; wanted 11 and 2"):
        write_corpus(tmp_path, [make_sample(1), wrong])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="no samples came"):
        write_corpus(tmp_path, [])


def test_damage_is_named(tmp_path, corpus):
    with pytest.raises(InputError, match=r"holds no sample_metadata\.csv"):
        open_corpus(tmp_path)
    (tmp_path / "sample_0.h5").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read as HDF5"):
        read_item(tmp_path / "sample_0.h5", ALL, rng=rng())
    with pytest.raises(InputError, match="none of the modalities asked for"):
        read_item(corpus[0].path(3), ("landsat",), rng=rng())
    with pytest.raises(InputError, match="is 16 px wide; a crop of 20 px does not fit"):
        read_item(corpus[0].path(0), ALL, rng=rng(), crop=CropSize(patch_px=4, side_patches=5, dates=1))
    with pytest.raises(InputError, match="a batch of 4 cannot be shared by 3 processes"):
        stream([corpus[0]], world=3)
    with pytest.raises(InputError, match="9 usable samples do not fill a batch of 64"):
        stream([corpus[0]], batch_size=64)
