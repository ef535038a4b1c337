import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from panterra import Batch, Observation, collate, load_model
from panterra.errors import InputError
from panterra.evaluate.benchmark import normalisations
from panterra.evaluate.suite import Plan, evaluate
from panterra.models.adapters.adapter import Adapter, FittedAdapter
from panterra.models.adapters.declaration import Input, Takes
from panterra.models.adapters.offers import ADAPTERS, Offer
from panterra.models.features import Encoder, Fitted
from panterra.models.weights import passport

BANDS = ("B04", "B08", "B02")
"""Where they stand in sentinel2_l2a: 2, 3, 0."""
INDEX = [2, 3, 0]


def observed(*shape, days=(19000,), seed=0, modality_bands=12, low=0, high=5000):
    generator = torch.Generator().manual_seed(seed)
    height, width = shape
    size = (1, len(days), modality_bands, height, width)
    return Observation(
        pixels=torch.randint(low, high, size, generator=generator).float(),
        dates=torch.tensor([days]),
        valid=torch.ones(1, len(days), height, width, dtype=torch.bool),
    )


def batch_of(lonlat=None, **observations):
    return Batch(observations=observations, lonlat=lonlat)


class Seen:
    """Keeps the views it is called with and says each patch's mean, band by band."""

    def __init__(self, patch_px):
        self.patch_px, self.views = patch_px, []

    def __call__(self, network, view):
        self.views.append(view)
        images = torch.cat([x.flatten(1, -3) for x in view.images.values()], dim=1)
        return nn.functional.avg_pool2d(images, self.patch_px)


def adapter(seen, dim=3, **takes):
    given = {"inputs": (Input(modality="sentinel2_l2a", bands=BANDS),), "patch_px": seen.patch_px} | takes
    return Adapter(nn.Identity(), Takes(**given), dim=dim, name="toy", call=seen)


def test_the_network_gets_its_bands_in_its_unit():
    seen, o = Seen(2), observed(4, 6)
    given = Input(
        modality="sentinel2_l2a",
        bands=BANDS,
        scale=(1e-4, 2e-4, 1e-4),
        offset=0.1,
        clip=(0, 0.5),
        mean=(0.1, 0.2, 0.3),
        std=(2.0, 4.0, 5.0),
    )
    out = adapter(seen, inputs=(given,)).encode(batch_of(sentinel2_l2a=o), patch_m=20)
    (view,) = seen.views
    for place, (band, scale, mean, std) in enumerate(
        zip(INDEX, (1e-4, 2e-4, 1e-4), (0.1, 0.2, 0.3), (2, 4, 5), strict=True)
    ):
        wanted = ((o.pixels[0, 0, band].double() * scale + 0.1).clamp(0, 0.5) - mean) / std
        torch.testing.assert_close(view.image[0, place].double(), wanted, atol=1e-6, rtol=0)
    assert out.patches.shape == (1, 2, 3, 3)
    torch.testing.assert_close(out.patches[0, 1, 2], view.image[0, :, 2:4, 4:6].mean((1, 2)))
    torch.testing.assert_close(out.summary, out.patches.mean((1, 2)))
    assert view.pixel_m == 10
    assert view.dates.tolist() == [19000]


def test_a_patch_is_scaled_to_the_patch_of_the_network():
    seen, o = Seen(4), observed(4, 6)
    out = adapter(seen).encode(batch_of(sentinel2_l2a=o), patch_m=20)
    wanted = nn.functional.interpolate(o.pixels[0, :, INDEX], (8, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(seen.views[0].image, wanted, atol=1e-2, rtol=0)
    assert seen.views[0].pixel_m == 5
    torch.testing.assert_close(
        out.patches[0], nn.functional.avg_pool2d(wanted, 4)[0].permute(1, 2, 0), atol=1e-2, rtol=0
    )


def test_a_fixed_size_sees_the_whole_sample_and_what_it_was_padded_by_is_cut_off():
    seen = Seen(4)
    o = observed(8, 4)
    wide = adapter(seen, image_px=16).encode(batch_of(sentinel2_l2a=o), patch_m=20)
    assert seen.views[0].image.shape == (1, 3, 16, 16)
    assert wide.patches.shape == (1, 4, 2, 3)
    assert seen.views[0].pixel_m == 5
    # The network sees patches of 4 pixels, and a sample of 4 x 2 patches fills half of it.
    torch.testing.assert_close(
        wide.patches, seen.views[0].image.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5))[:, :, :, :2].permute(0, 2, 3, 1)
    )


def test_a_fixed_size_with_other_patches_is_brought_to_those_that_were_asked_for():
    flat = replace(observed(8, 8), pixels=torch.full((1, 1, 12, 8, 8), 700.0))
    out = adapter(Seen(4), image_px=12).encode(batch_of(sentinel2_l2a=flat), patch_m=20)
    torch.testing.assert_close(out.patches, torch.full((1, 4, 4, 3), 700.0))


def test_missing_pixels_get_the_mean_of_the_rest_and_change_nothing_else():
    seen, o = Seen(2), observed(4, 4)
    hole = o.valid.clone()
    hole[0, 0, :2, :2] = False
    hole[0, 0, 3, 3] = False
    wild = o.pixels.clone()
    wild[0, 0, :, :2, :2] = float("nan")
    first = adapter(seen).encode(batch_of(sentinel2_l2a=replace(o, valid=hole)), patch_m=20)
    second = adapter(seen).encode(batch_of(sentinel2_l2a=replace(o, pixels=wild, valid=hole)), patch_m=20)
    torch.testing.assert_close(first.patches, second.patches)
    mean = o.pixels[0, 0, 2][hole[0, 0]].mean()
    torch.testing.assert_close(seen.views[0].image[0, 0, 0, 0], mean)
    assert first.valid[0].tolist() == [[False, True], [True, True]]
    assert first.patches[0, 0, 0].tolist() == [0, 0, 0]
    torch.testing.assert_close(first.summary, first.patches.sum((1, 2)) / 3)


def test_dates_are_shown_one_after_another_and_averaged_over_what_is_data():
    o = observed(2, 2, days=(19000, 19030, 19060))
    hole = o.valid.clone()
    hole[0, 1] = False
    seen = Seen(2)
    out = adapter(seen).encode(batch_of(sentinel2_l2a=replace(o, valid=hole)), patch_m=20)
    assert torch.cat([v.dates for v in seen.views]).tolist() == [19000, 19060]
    torch.testing.assert_close(out.patches[0, 0, 0], o.pixels[0, [0, 2]][:, INDEX].mean((0, 2, 3)))


def test_a_series_is_shown_whole():
    o = observed(2, 4, days=(19000, 19030))
    hole = o.valid.clone()
    hole[0, 1, :, :2] = False
    seen = Seen(2)
    out = adapter(seen, dim=6, series=True).encode(batch_of(sentinel2_l2a=replace(o, valid=hole)), patch_m=20)
    (view,) = seen.views
    assert view.image.shape == (1, 2, 3, 2, 4)
    assert view.valid["sentinel2_l2a"].tolist() == [[[[True, True]], [[False, True]]]]
    assert view.dates.tolist() == [[19000, 19030]]
    assert out.valid.tolist() == [[[True, True]]]


TWO = (Input(modality="sentinel2_l2a", bands=("B02",)), Input(modality="sentinel1", bands=("vh",)))


def one_number(network, view):
    return sum(x.mean((1, 2, 3)) for x in view.images.values())[:, None]


def test_sensors_that_looked_within_two_weeks_are_shown_together():
    seen = []

    def note(network, view):
        seen.append((sorted(view.images), view.dates.tolist()))
        return one_number(network, view)

    two = Adapter(nn.Identity(), Takes(inputs=TWO, patch_px=2), dim=1, name="two", call=note)
    batch = batch_of(
        sentinel2_l2a=observed(2, 2, days=(19000, 19100)),
        sentinel1=observed(2, 2, days=(19008, 19200), modality_bands=2, low=-30, high=0),
    )
    out = two.encode(batch, patch_m=20)
    assert sorted(seen) == [
        (["sentinel1"], [19200]),
        (["sentinel1", "sentinel2_l2a"], [19000]),
        (["sentinel2_l2a"], [19100]),
    ]
    s2, s1 = batch.observations["sentinel2_l2a"].pixels, batch.observations["sentinel1"].pixels
    wanted = (s2[0, :, 0].mean((1, 2)).sum() + s1[0, :, 1].mean((1, 2)).sum()) / 3
    torch.testing.assert_close(out.patches[0, 0, 0, 0], wanted)


def test_a_map_is_shown_with_every_date():
    inputs = (TWO[0], Input(modality="srtm", bands=("srtm",)))
    shown = []

    def note(network, view):
        shown.append(sorted(view.images))
        return one_number(network, view)

    model = Adapter(nn.Identity(), Takes(inputs=inputs, patch_px=2), dim=1, name="two", call=note)
    height = observed(2, 2, modality_bands=1)
    series = observed(2, 2, days=(19000, 19030))
    out = model.encode(batch_of(sentinel2_l2a=series, srtm=height), patch_m=20)
    assert shown == [["sentinel2_l2a", "srtm"]]
    wanted = series.pixels[0, :, 0].mean() + height.pixels.mean()
    torch.testing.assert_close(out.patches[0, 0, 0, 0], wanted)
    alone = model.encode(batch_of(srtm=height), patch_m=20)
    torch.testing.assert_close(alone.patches[0, 0, 0, 0], height.pixels.mean())


@pytest.mark.parametrize("takes", [{}, {"image_px": 16}, {"standardise": "image"}, {"series": True}])
def test_batch_mates_do_not_matter(takes):
    def call(network, view):
        x = view.image.mean(1) if view.image.ndim == 5 else view.image
        return nn.functional.avg_pool2d(x.sin(), 4)

    model = Adapter(
        nn.Identity(),
        Takes(inputs=(Input(modality="sentinel2_l2a", bands=BANDS),), patch_px=4, **takes),
        dim=3,
        name="toy",
        call=call,
    )
    short = batch_of(sentinel2_l2a=observed(8, 8))
    long = batch_of(sentinel2_l2a=observed(8, 8, days=(19000, 19040), seed=1))
    if takes.get("series"):
        long = batch_of(sentinel2_l2a=observed(8, 8, seed=1))
    alone = model.encode(short, patch_m=40)
    together = model.encode(collate([short, long]), patch_m=40)
    torch.testing.assert_close(together.patches[0], alone.patches[0])
    torch.testing.assert_close(together.summary[0], alone.summary[0])


def test_an_image_may_be_stretched_to_its_own_contrast():
    seen, o = Seen(2), observed(16, 16)
    adapter(seen, standardise="image").encode(batch_of(sentinel2_l2a=o), patch_m=20)
    band = o.pixels[0, 0, 2]
    low, high = band.mean() - 2 * band.std(), band.mean() + 2 * band.std()
    torch.testing.assert_close(seen.views[0].image[0, 0], ((band - low) / (high - low)).clamp(0, 1), atol=1e-5, rtol=0)


def test_statistics_of_the_data_are_fitted_and_kept():
    seen = Seen(2)
    model = FittedAdapter(adapter(seen, standardise="data"))
    assert isinstance(model, Fitted)
    assert isinstance(model, Encoder)
    batches = [batch_of(sentinel2_l2a=observed(4, 4, seed=i)) for i in range(3)]
    hole = batches[2].observations["sentinel2_l2a"].valid.clone()
    hole[:, :, 0] = False
    batches[2] = batch_of(sentinel2_l2a=replace(batches[2].observations["sentinel2_l2a"], valid=hole))
    with pytest.raises(InputError, match="no statistics of sentinel2_l2a yet"):
        model.encode(batches[0], patch_m=20)
    statistics = json.loads(json.dumps(model.fit_statistics(batches)))
    able = model.with_statistics(statistics)
    values = torch.cat(
        [
            b.observations["sentinel2_l2a"].pixels[0, 0, :, h[0, 0]]
            for b, h in ((b, b.observations["sentinel2_l2a"].valid) for b in batches)
        ],
        dim=1,
    )[INDEX]
    found = able.statistics_of("sentinel2_l2a")
    assert list(found) == list(BANDS)
    torch.testing.assert_close(torch.tensor([m for m, _ in found.values()]), values.mean(1))
    torch.testing.assert_close(torch.tensor([s for _, s in found.values()]), values.std(1, correction=0))
    able.encode(batches[0], patch_m=20)
    wanted = (batches[0].observations["sentinel2_l2a"].pixels[0, 0, 2] - found["B04"][0]) / found["B04"][1]
    torch.testing.assert_close(seen.views[0].image[0, 0], wanted, atol=1e-5, rtol=1e-5)
    assert model.missing_statistics(["sentinel2_l2a"]) == ("sentinel2_l2a",)
    assert passport(able)["statistics"] == statistics
    with pytest.raises(InputError, match="not for toy"):
        model.with_statistics({"landsat": {"bands": [], "mean": [], "std": []}})


def test_tokens_vectors_and_maps_are_understood():
    flat = batch_of(sentinel2_l2a=observed(4, 6))
    takes = Takes(inputs=(Input(modality="sentinel2_l2a", bands=BANDS),), patch_px=2)
    maps = nn.Conv2d(3, 5, 2, 2)

    def tokens(network, view):
        return network(view.image).flatten(2).mT

    def vector(network, view):
        return network(view.image).mean((2, 3))

    first = Adapter(maps, takes, dim=5, name="maps").encode(flat, patch_m=20)
    same = Adapter(maps, takes, dim=5, name="tokens", call=tokens).encode(flat, patch_m=20)
    torch.testing.assert_close(same.patches, first.patches)
    alike = Adapter(maps, takes, dim=5, name="v", call=vector).encode(flat, patch_m=20)
    torch.testing.assert_close(alike.patches, first.summary[:, None, None].expand(1, 2, 3, 5))


@pytest.mark.parametrize(
    ("batch", "patch_m", "takes", "message"),
    [
        (batch_of(landsat=observed(4, 4, modality_bands=11)), 20, {}, "toy does not know landsat; it takes sentinel2"),
        (batch_of(sentinel2_l2a=observed(5, 4)), 20, {}, "5 x 4 pixels of 10 m is not a whole number of patches of 20"),
        (batch_of(sentinel2_l2a=observed(4, 4)), 15, {}, "not a whole number of patches of 15 m"),
        (batch_of(sentinel2_l2a=observed(4, 4)), 20, {"needs_place": True}, "give the batch its lonlat"),
        (batch_of(sentinel2_l2a=observed(4, 4)), 20, {"patch_px": 1}, r"gave \[1, 3, 2, 2\]; wanted maps \[N, 4"),
    ],
)
def test_what_it_cannot_take_is_said(batch, patch_m, takes, message):
    with pytest.raises(InputError, match=message):
        adapter(Seen(takes.get("patch_px", 2)), dim=4 if takes.get("patch_px") else 3, **takes).encode(
            batch, patch_m=patch_m
        )


def test_tokens_that_are_no_patches_are_refused():
    model = Adapter(
        nn.Identity(),
        Takes(inputs=(Input(modality="sentinel2_l2a", bands=BANDS),), patch_px=2),
        dim=3,
        name="toy",
        call=lambda network, view: torch.zeros(1, 5, 3),
    )
    with pytest.raises(InputError, match="5 tokens for 2 x 2 patches"):
        model.encode(batch_of(sentinel2_l2a=observed(4, 4)), patch_m=20)
    with pytest.raises(InputError, match="no sub-patch features"):
        model.encode(batch_of(sentinel2_l2a=observed(4, 4)), patch_m=20, dense=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"modality": "sentinel2_l2a", "bands": ("B10",)}, "no band 'B10'; it has B02, B03"),
        ({"modality": "moon", "bands": ("B10",)}, "no modality 'moon'"),
        ({"modality": "era5_10", "bands": ()}, "has no pixels"),
        ({"modality": "sentinel1", "bands": ("vv", "vh"), "mean": (1.0,), "std": (1.0, 1.0)}, "1 numbers for 2 bands"),
        ({"modality": "sentinel1", "bands": ("vv",), "mean": (1.0,)}, "give both or neither"),
    ],
)
def test_a_wrong_declaration_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        Input(**given)


def test_inputs_that_are_normalised_already_are_only_put_in_order():
    seen, o = Seen(2), observed(4, 4)
    model = adapter(
        seen, inputs=(Input(modality="sentinel2_l2a", bands=BANDS, scale=1e-4, mean=(1.0,) * 3, std=(2.0,) * 3),)
    )
    assert normalisations(model) == ("model", "dataset", "published")
    model.normalized_input = True
    model.encode(batch_of(sentinel2_l2a=o), patch_m=20)
    torch.testing.assert_close(seen.views[0].image[0], o.pixels[0, 0, INDEX])


def test_load_model_says_which_package_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, offer in ADAPTERS.items():
        with pytest.raises(InputError, match=f"{name} comes with {offer.package}, which is not installed: pip install"):
            load_model(name, random=0)
    with pytest.raises(InputError, match="attention and missing are no behaviours of presto"):
        load_model("presto", attention="published_fast")
    with pytest.raises(InputError, match="of other packages: croma-base"):
        load_model("galileo")


def toy(*, pretrained):
    if pretrained:
        raise OSError("no network\nat all")
    takes = Takes(inputs=(Input(modality="sentinel2_l2a", bands=BANDS, scale=1e-4),), patch_px=4)
    return Adapter(nn.Conv2d(3, 8, 4, 4), takes, dim=8, name="toy")


@pytest.fixture
def toy_offer(monkeypatch):
    monkeypatch.setitem(ADAPTERS, "toy", Offer(build=toy, package="torch", needs="toy>=1"))


@pytest.mark.usefixtures("toy_offer")
def test_load_model_opens_an_adapter_by_name():
    model = load_model("toy", random=3)
    assert model.name == "toy (random weights, seed 3)"
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    again = load_model(model.name)
    torch.testing.assert_close(dict(again.named_parameters()), dict(model.named_parameters()))
    batch = batch_of(sentinel2_l2a=observed(8, 8))
    half = load_model("toy", random=3, dtype=torch.bfloat16).encode(batch, patch_m=40)
    torch.testing.assert_close(half.patches, model.encode(batch, patch_m=40).patches, atol=0.02, rtol=0.05)
    about = passport(model)
    assert about["family"] == "adapter"
    assert about["takes"]["inputs"][0]["scale"] == 1e-4
    assert about["weights_sha256"] != passport(load_model("toy", random=4))["weights_sha256"]
    with pytest.raises(InputError, match=r"weights of toy could not be fetched \(no network at all\); connect"):
        load_model("toy")


@pytest.mark.usefixtures("toy_offer")
def test_evaluate_takes_an_adapter_by_name(root, tmp_path):
    plan = Plan(models=("toy@random:0",), benchmarks=(("planet_classes", root),), protocols=("knn",), limit=20)
    (row,) = evaluate(plan, tmp_path / "out")
    assert row.error is None
    assert row.score.estimate > 0
