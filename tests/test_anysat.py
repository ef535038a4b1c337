"""The AnySat encoder."""

import datetime as dt
import json
import math
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from panterra.errors import InputError
from panterra.modalities import MODALITIES, Band, Modality
from panterra.models.anysat import SIZES, AnySat, AnySatConfig, anysat_config, cells_to_image
from panterra.models.anysat_attention import PatchEncoder, buckets, fusion_block, places
from panterra.models.anysat_convert import (
    anysat_from_json,
    anysat_json,
    anysat_state,
    load_anysat,
    published_anysat_state,
)
from panterra.models.anysat_inputs import memory_of
from panterra.models.anysat_new_sensor import add_modality, nearest_sensor, resize_kernel, train_only
from panterra.models.anysat_projectors import CellProjector, Grid, Input, SeriesProjector, pixel_order
from panterra.models.anysat_sensors import SENSORS, day_of_year, new_sensor, to_pixel_size
from panterra.models.anysat_statistics import Statistics, fit_statistics
from panterra.models.features import Encoder
from panterra.sample import Batch, Observation, collate, to_days

TILE_M = 60
SPRING = to_days("2023-03-01")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def observe(modality: str, *, samples: int = 1, dates: int = 3, tile_m: int | tuple[int, int] = TILE_M, seed: int = 0):
    row = MODALITIES[modality]
    dates = 1 if row.kind == "still" else dates
    sides = (tile_m, tile_m) if isinstance(tile_m, int) else tile_m
    size = (1, 1) if modality == "modis" else tuple(round(side / row.gsd) for side in sides)
    days = SPRING + 16 * torch.arange(dates).expand(samples, -1) + seed
    return Observation(
        pixels=random(samples, dates, len(row.bands), *size, seed=seed),
        dates=days.clone(),
        valid=torch.ones(samples, dates, *size, dtype=torch.bool),
    )


def batch_of(*modalities: str, **options) -> Batch:
    seed = options.pop("seed", 0)
    return Batch(observations={m: observe(m, seed=seed + i, **options) for i, m in enumerate(modalities)})


@pytest.fixture(scope="module")
def encoder() -> AnySat:
    """A small model with weights that are all in use, in float64: group norms blow up rounding."""
    torch.manual_seed(0)
    model = AnySat(AnySatConfig(dim=96, depth=2, heads=2), normalized_input=True).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.requires_grad_(False)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_it_is_an_encoder(encoder):
    assert isinstance(encoder, Encoder)
    assert encoder.modalities[:3] == ("sentinel2_l2a", "sentinel1", "landsat")
    assert {"modis", "landsat7", "alos2", "aerial", "aerial_flair", "spot", "naip"} <= set(encoder.modalities)


@pytest.mark.parametrize(
    ("modalities", "tile_m", "patch_m"),
    [
        (["sentinel2_l2a"], 60, 10),
        (["sentinel2_l2a", "sentinel1", "landsat"], (60, 40), 20),
        (["aerial", "sentinel2_l2a"], (20, 40), 20),
        (["aerial_flair"], 20, 10),
        (["spot", "naip"], 40, 40),
        (["naip_10"], 40, 20),
        (["landsat7", "alos2"], 60, 10),
        (["landsat7", "alos2", "sentinel2_l2a"], 60, 20),
        (["sentinel2_l2a", "landsat7"], 120, 60),
        (["modis", "sentinel2_l2a"], (60, 30), 30),
        (["modis", "landsat7"], 60, 60),
        (["modis"], 250, 250),
    ],
)
def test_any_mix_of_sensors_and_sizes_gives_a_vector_per_patch(encoder, modalities, tile_m, patch_m):
    found = encoder.encode(batch_of(*modalities, samples=2, tile_m=tile_m), patch_m=patch_m)
    height, width = (tile_m, tile_m) if isinstance(tile_m, int) else tile_m
    assert found.patches.shape == (2, height // patch_m, width // patch_m, 96)
    assert found.summary.shape == (2, 96)
    assert found.valid.all()
    assert torch.isfinite(found.patches).all()
    assert not torch.allclose(found.summary[0], found.summary[1])


@pytest.mark.parametrize("modality", ["modis", "landsat7", "alos2", "sentinel1", "aerial"])
def test_every_sensor_changes_the_result(encoder, modality):
    batch = batch_of("sentinel2_l2a", modality)
    other = observe(modality, seed=9)
    changed = Batch(observations={**batch.observations, modality: other})
    before, after = (encoder.encode(b, patch_m=20).patches for b in (batch, changed))
    assert (before - after).abs().amax(-1).min() > 1e-4


def test_the_order_of_modalities_does_not_matter(encoder):
    batch = batch_of("sentinel2_l2a", "landsat", "modis")
    turned = Batch(observations=dict(reversed(batch.observations.items())))
    same(encoder.encode(batch, patch_m=20).patches, encoder.encode(turned, patch_m=20).patches)


def test_batch_mates_and_padding_do_not_matter(encoder):
    short = batch_of("sentinel2_l2a", "aerial", dates=2)
    others = [batch_of("sentinel2_l2a", "sentinel1", dates=5, seed=3), batch_of("sentinel1", "modis", dates=1, seed=7)]
    together = encoder.encode(collate([short, *others]), patch_m=20, dense="sentinel2_l2a")
    for i, one in enumerate([short, *others]):
        alone = encoder.encode(one, patch_m=20)
        same(together.patches[i], alone.patches[0])
        same(together.summary[i], alone.summary[0])
        assert torch.equal(together.valid[i], alone.valid[0])
    same(together.dense[0], encoder.encode(short, patch_m=20, dense="sentinel2_l2a").dense[0])
    assert not together.dense[2].any()


def spoil(o: Observation, valid: Tensor, value: float) -> Observation:
    pixels = torch.where(valid[:, :, None], o.pixels, value)
    return replace(o, pixels=pixels, valid=valid)


@pytest.mark.parametrize("modality", ["sentinel2_l2a", "landsat7", "aerial", "naip"])
def test_what_is_not_valid_never_reaches_a_result(encoder, modality):
    o = observe(modality, samples=2, dates=4, tile_m=180 if modality == "landsat7" else TILE_M)
    patch_m = 60 if modality == "landsat7" else 20
    valid = torch.rand(o.valid.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    valid[0, :, :, : valid.shape[-1] // 3] = False
    batches = [Batch(observations={modality: spoil(o, valid, value)}) for value in (math.nan, 1e30, -7.0)]
    first, *rest = (encoder.encode(batch, patch_m=patch_m, dense=True) for batch in batches)
    assert torch.isfinite(first.dense).all()
    assert not first.valid[0, :, 0].any()
    assert first.valid[:, :, 1:].all()
    assert not first.patches[0, :, 0].any()
    for other in rest:
        same(first.patches, other.patches)
        same(first.dense, other.dense)


def test_an_invalid_date_is_as_good_as_none(encoder):
    o = observe("sentinel2_l2a", dates=4)
    valid = o.valid.clone()
    valid[:, 2] = False
    kept = [0, 1, 3]
    without = replace(o, pixels=o.pixels[:, kept], dates=o.dates[:, kept], valid=o.valid[:, kept])
    a, b = (Batch(observations={"sentinel2_l2a": x}) for x in (spoil(o, valid, 0.0), without))
    same(encoder.encode(a, patch_m=20).patches, encoder.encode(b, patch_m=20).patches)


def test_a_sample_without_data_is_zeros(encoder):
    o = observe("sentinel2_l2a", samples=2)
    valid = o.valid.clone()
    valid[1] = False
    found = encoder.encode(Batch(observations={"sentinel2_l2a": replace(o, valid=valid)}), patch_m=20)
    assert not found.summary[1].any()
    assert not found.patches[1].any()
    assert not found.valid[1].any()
    assert found.valid[0].all()
    nothing = encoder.encode(
        Batch(observations={"sentinel2_l2a": replace(o, valid=torch.zeros_like(valid))}), patch_m=20
    )
    assert not nothing.summary.any()
    assert not nothing.patches.any()


def test_published_behaviour_attends_to_padding(encoder):
    short, long = batch_of("sentinel2_l2a", dates=2), batch_of("sentinel2_l2a", dates=5, seed=2)
    published = AnySat(encoder.config, missing="published", normalized_input=True).double().eval()
    published.load_state_dict(encoder.state_dict())
    same(published.encode(short, patch_m=20).patches, encoder.encode(short, patch_m=20).patches)
    together = published.encode(collate([short, long]), patch_m=20).patches[0]
    o = short.observations["sentinel2_l2a"]
    padded = torch.cat([o.pixels, torch.zeros(1, 3, *o.pixels.shape[2:])], dim=1)
    order = [MODALITIES["sentinel2_l2a"].band_names.index(b) for b in SENSORS["s2"].bands]
    days = torch.cat([day_of_year(o.dates), torch.zeros(1, 3, dtype=torch.int64)], dim=1)
    wanted = encoder({"s2": Input(values=padded[:, :, order].double(), days=days)}, scale=2).patches[0]
    same(together, wanted)
    assert not torch.allclose(together, encoder.encode(short, patch_m=20).patches[0])


def test_the_published_mask_puts_the_pad_value(encoder):
    o = observe("sentinel1", dates=3)
    values, days = torch.cat([o.pixels, o.pixels[:, :, :1]], dim=2).double(), day_of_year(o.dates)
    present = torch.ones_like(values, dtype=torch.bool)
    present[:, 1, 0] = False
    pad = float(encoder.projectors["s1"].pad)
    masked = encoder({"s1": Input(values=values, days=days, present=present)}, scale=1)
    plain = encoder({"s1": Input(values=torch.where(present, values, pad), days=days)}, scale=1)
    same(masked.patches, plain.patches)


def test_gradients_and_small_parts_do_not_change_the_result(encoder, monkeypatch):
    batch = batch_of("sentinel2_l2a", "aerial", "modis", "alos2", samples=2)
    fast = encoder.encode(batch, patch_m=20, dense=True)
    for module in ("anysat_attention", "anysat_projectors"):
        monkeypatch.setattr(f"panterra.models.{module}.chunk_rows", lambda x: 7)
    small = encoder.encode(batch, patch_m=20, dense=True)
    with torch.enable_grad():
        slow = encoder.encode(batch, patch_m=20, dense=True)
    for other in (small, slow):
        same(fast.patches, other.patches)
        same(fast.dense, other.dense)
        same(fast.summary, other.summary)


def test_the_tile_alone_is_the_same_vector(encoder):
    o = observe("landsat")
    given = {"l8": Input(values=o.pixels.double(), days=day_of_year(o.dates))}
    alone = encoder(given, scale=2, patches=False)
    assert alone.patches.shape[1:3] == (0, 0)
    same(alone.tile, encoder(given, scale=2).tile)


def test_training_reaches_every_weight_and_drops_out():
    torch.manual_seed(0)
    sensors = tuple(replace(s, dropout=0.2) for s in SENSORS.values())
    model = AnySat(AnySatConfig(dim=64, depth=2, heads=2, sensors=sensors), normalized_input=True).train()
    batch = batch_of("sentinel2_l2a", "aerial", "modis", samples=2)
    first, second = (model.encode(batch, patch_m=20, dense=True) for _ in range(2))
    assert not torch.equal(first.patches, second.patches)
    (first.patches.square().sum() + first.dense.square().sum()).backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    unused = [name for name in SENSORS if name not in ("s2", "aerial", "modis")]
    assert all(name.startswith(tuple(f"projectors.{u}." for u in unused)) or name.endswith(".pad") for name in idle)


def test_half_precision_stays_close():
    torch.manual_seed(0)
    model = AnySat(AnySatConfig(dim=128, depth=1, heads=2), normalized_input=True).eval().requires_grad_(False)
    batch = batch_of("sentinel2_l2a", "naip", samples=2)
    whole = model.encode(batch, patch_m=20).summary
    half = model.bfloat16().encode(batch, patch_m=20).summary
    assert half.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(whole, half.float()).min() > 0.99


@pytest.mark.parametrize(
    ("name", "scale", "rows", "cols"), [("aerial", 1, 2, 3), ("aerial", 3, 2, 1), ("spot", 2, 3, 2), ("naip", 4, 1, 1)]
)
def test_cells_come_back_where_they_were(name, scale, rows, cols):
    sensor = SENSORS[name]
    side, k = sensor.cells * scale, sensor.kernel
    image = random(1, 1, rows * side * k, cols * side * k)
    cells = CellProjector(sensor, 32)._cells(image, Grid(rows=rows, cols=cols, scale=scale))
    back = cells_to_image(cells[..., 0, :1], Grid(rows=rows, cols=cols, scale=scale), sensor)
    assert torch.equal(back[0, :, :, 0], image[0, 0, ::k, ::k])


@pytest.mark.parametrize(("name", "scale", "size"), [("s2", 2, 6), ("l7", 6, 4), ("l7", 1, 2), ("alos", 2, 4)])
def test_sub_patches_take_the_pixel_at_their_centre(name, scale, size):
    sensor = SENSORS[name]
    patches = int(size * sensor.cell_m / (10 * scale))
    grid = Grid(rows=patches, cols=patches, scale=scale)
    used, back = pixel_order(sensor, grid, size, size)
    image = cells_to_image(used[back].view(1, patches**2, -1, 1), grid, sensor)[0, :, :, 0]
    side = sensor.side(scale)
    centre = [(i // side) * 10 * scale + (i % side + 0.5) * 10 * scale / side for i in range(patches * side)]
    pixel = torch.tensor([int(c // sensor.cell_m) for c in centre])
    assert torch.equal(image, pixel[:, None] * size + pixel)
    assert len(used) == len(set(used.tolist()))


def test_places_are_computed_in_float32():
    # Metres of the 10 m cells of a tile of 1280 m; in float64 some differ by more than parity allows.
    found = places(128, 128, 10, 96).view(128, 128, 96)
    frequencies = 1 / 10000 ** (torch.arange(24, dtype=torch.float32) / 24)
    for row, col in ((0, 0), (5, 127), (127, 64)):
        halves = [torch.tensor(10.0 * n) * frequencies for n in (col, row)]
        wanted = torch.cat([wave for angle in halves for wave in (angle.sin(), angle.cos())])
        assert torch.equal(found[row, col], wanted)


def test_buckets_follow_the_formula():
    def published(distance: float) -> int:
        d = round(distance)
        if d <= 1.9:
            return d
        return int(min(round(1.9 + math.log(d / 1.9) / math.log(8) * 1.9), 3.8))

    found = buckets(3, 7, 2)
    assert (found[:2] == 7).all()
    assert (found[:, :2] == 7).all()
    for i in range(21):
        for j in range(21):
            distance = math.hypot(i // 7 - j // 7, i % 7 - j % 7)
            assert found[i + 2, j + 2] == published(distance) + 3


def test_the_class_row_alone_is_the_class_row():
    torch.manual_seed(0)
    part = PatchEncoder(32, 2, 2).double().eval()
    for block in part.blocks:
        torch.nn.init.normal_(block.attn.distance)
    x, visible = random(3, 9, 32).double(), torch.rand(3, 9) > 0.3
    same(part(x, visible=visible), part(x, visible=visible, dense=True)[:, :1])


def test_in_the_heads_layout_tokens_stay_apart():
    torch.manual_seed(0)
    block = fusion_block(32, 2, layout="heads").double().eval()
    x = random(2, 5, 32).double()
    changed = x.clone()
    changed[:, 0] += 1
    with torch.no_grad():
        a, b = block(x), block(changed)
        same(a[:, 1:], b[:, 1:])
        assert not torch.allclose(a[:, 0], b[:, 0])
        block.update(x)
    same(x, a)


def test_days_count_from_the_first_of_january():
    dates = ["2023-01-01", "2024-12-31", "2023-12-31", "1969-02-01"]
    days = torch.tensor([[to_days(d) for d in dates]])
    assert day_of_year(days).tolist() == [[dt.date.fromisoformat(d).timetuple().tm_yday for d in dates]]


# Statistics


def test_statistics_are_those_of_all_valid_pixels():
    o = observe("sentinel1", samples=3, dates=4)
    o = replace(o, pixels=o.pixels * 3 - 1000, valid=torch.rand(o.valid.shape) > 0.4)
    parts = [
        Batch(observations={"sentinel1": Observation(pixels=o.pixels[a], dates=o.dates[a], valid=o.valid[a])})
        for a in (slice(0, 1), slice(1, 3))
    ]
    values = o.pixels.movedim(2, -1)[o.valid].double().numpy()
    values = np.concatenate([values, (values[:, :1] - values[:, 1:])], axis=1)
    found = fit_statistics(iter(parts))["s1"]
    np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.std, values.std(0), rtol=1e-6)
    assert found.count == len(values)
    assert found.channels == ("vv", "vh", "vv/vh")


def test_statistics_by_sample_are_the_means_of_the_samples_own():
    o = observe("sentinel1", samples=4)
    valid = o.valid.clone()
    valid[0, 1:], valid[2], valid[3] = False, False, False
    valid[3, 0, 2, 2] = True
    batch = Batch(observations={"sentinel1": replace(o, valid=valid)})
    pixels = o.pixels.double().movedim(2, -1)
    own = [torch.cat([x, x[:, :1] - x[:, 1:]], dim=1).numpy() for x in (pixels[i][valid[i]] for i in (0, 1, 3))]
    found = fit_statistics([batch], by_sample=True)["s1"]
    assert found.count == valid.sum()
    np.testing.assert_allclose(found.mean, np.mean([x.mean(0) for x in own], axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.std, np.mean([x.std(0, ddof=1) for x in own[:2]], axis=0), rtol=1e-5)


def test_statistics_standardise_what_is_encoded(encoder):
    batch = batch_of("sentinel2_l2a", "naip", "modis")
    shifted = Batch(observations={m: replace(o, pixels=o.pixels * 50 + 300) for m, o in batch.observations.items()})
    model = AnySat(encoder.config, statistics=fit_statistics([shifted])).double().eval()
    model.load_state_dict(encoder.state_dict())
    plain = AnySat(encoder.config, statistics=fit_statistics([batch])).double().eval()
    plain.load_state_dict(encoder.state_dict())
    a, b = (m.encode(x, patch_m=20).summary for m, x in ((model, shifted), (plain, batch)))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_constant_band_becomes_zero():
    o = observe("spot")
    found = fit_statistics([Batch(observations={"spot": replace(o, pixels=torch.full_like(o.pixels, 5.0))})])["spot"]
    assert not found.standardise(torch.full((1, 1, 3, 2, 2), 5.0)).any()


def test_statistics_refuse_what_they_cannot_use():
    o = observe("spot")
    with pytest.raises(InputError, match="no pixel of spot is valid"):
        fit_statistics([Batch(observations={"spot": replace(o, valid=torch.zeros_like(o.valid))})])
    with pytest.raises(InputError, match="valid pixels of spot hold NaN or infinity"):
        fit_statistics([Batch(observations={"spot": replace(o, pixels=o.pixels / 0)})])
    with pytest.raises(InputError, match="no sensor for hls"):
        fit_statistics([batch_of("hls")])


# Errors


@pytest.mark.parametrize(
    ("modalities", "options", "message"),
    [
        (["sentinel2_l2a"], {"patch_m": 25}, "multiples of 10 m"),
        (["sentinel2_l2a"], {"patch_m": 40}, "60 x 60 m is not a whole number of 40 m patches"),
        (["hls"], {"patch_m": 30}, "does not know hls"),
        (["modis"], {"patch_m": 30}, "ask for patch_m=250"),
        (["modis"], {"patch_m": 250, "dense": True}, "dense features need"),
        (["sentinel2_l2a", "modis"], {"patch_m": 20, "dense": "modis"}, "dense features need one of sentinel2_l2a"),
        (["sentinel2_l2a", "sentinel2"], {"patch_m": 20}, "both read by the projector of s2"),
    ],
)
def test_errors_say_what_to_do(encoder, modalities, options, message):
    with pytest.raises(InputError, match=message):
        encoder.encode(batch_of(*modalities), **options)


def test_more_patches_than_memory_has_distances_for_are_refused(encoder):
    side = 4096
    shape = (1, 1, len(MODALITIES["sentinel2_l2a"].bands), side, side)
    wide = Observation(
        pixels=torch.zeros(1, 1, 1, 1, 1).expand(shape),
        dates=torch.full((1, 1), SPRING),
        valid=torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(1, 1, side, side),
    )
    with pytest.raises(InputError, match=r"4096 x 4096 patches of 10 m came; .* take [\d,]+ GB") as refused:
        encoder.encode(Batch(observations={"sentinel2_l2a": wide}), patch_m=10)
    patch_m = int(re.search(r"take patch_m=(\d+)", str(refused.value))[1])
    patches = (10 * side // patch_m) ** 2
    assert 10 * side % patch_m == 0
    assert 20 * patches**2 <= memory_of(torch.device("cpu")) < 20 * (4 * patches) ** 2


def test_more_errors_say_what_to_do(encoder):
    s2, spot = observe("sentinel2_l2a"), observe("spot", tile_m=40)
    with pytest.raises(InputError, match="cover different ground"):
        encoder.encode(Batch(observations={"sentinel2_l2a": s2, "spot": spot}), patch_m=20)
    with pytest.raises(InputError, match="a grid of 10 m"):
        encoder.encode(Batch(observations={"sentinel2_l2a": s2}, pixel_m=20), patch_m=20)
    both = [torch.cat([x, x], dim=1) for x in (spot.pixels, spot.dates, spot.valid)]
    twice = Observation(pixels=both[0], dates=both[1], valid=both[2])
    with pytest.raises(InputError, match="still image, give one"):
        encoder.encode(Batch(observations={"spot": twice}), patch_m=20)
    with pytest.raises(InputError, match="has no statistics of sentinel2_l2a yet"):
        AnySat(AnySatConfig(dim=32, depth=1, heads=2)).encode(Batch(observations={"sentinel2_l2a": s2}), patch_m=20)
    with pytest.raises(InputError, match="without dates"):
        encoder({"s2": Input(values=torch.zeros(1, 2, 10, 6, 6).double())}, scale=1)
    with pytest.raises(InputError, match="smaller than one patch"):
        encoder({"spot": Input(values=torch.zeros(1, 1, 3, 20, 20).double())}, scale=3)
    with pytest.raises(InputError, match="one value for the whole tile"):
        encoder({"modis": Input(values=torch.zeros(1, 1, 7, 2, 2).double(), days=torch.ones(1, 1))}, scale=3)
    with pytest.raises(InputError, match="give any of aerial"):
        encoder({"s3": Input(values=torch.zeros(1, 1, 3, 20, 20))}, scale=3)
    with pytest.raises(InputError, match="no size 'huge'"):
        anysat_config("huge")


# Weights


@pytest.mark.parametrize(("size", "parameters"), [("base", 125905447), ("hub-small", 43811271), ("hub-tiny", 8135015)])
def test_sizes_are_the_published_ones(size, parameters):
    with torch.device("meta"):
        model = AnySat(anysat_config(size))
    published = published_anysat_state(model.state_dict(), model.config)
    assert sum(value.numel() for value in published.values()) == parameters
    parts = list(dict.fromkeys(key.partition(".")[0] for key in published))
    assert parts == ["cls_token", *sorted(f"projector_{name}" for name in SENSORS), "spatial_encoder", "blocks"]
    if size == "base":
        assert len(published) == 418
        assert published["projector_aerial-flair.patch_embed.weight"].shape == (768, 5, 10, 10)
        assert published["projector_s2.patch_embed.inconv.12.weight"].shape == (1536, 768)
        assert published["blocks.6.attn.rpe_k.lookup_table_weight"].shape == (1, 64, 8)
        assert published["projector_modis.pad_parameter"].shape == ()


def random_published(size: str = "hub-tiny") -> dict[str, Tensor]:
    config = anysat_config(size)
    with torch.device("meta"):
        model = AnySat(config)
    published = published_anysat_state(model.state_dict(), config)
    return {name: torch.randn(value.shape) for name, value in published.items()}


def test_published_weights_load_at_full_size(tmp_path):
    published = random_published()
    (tmp_path / "models").mkdir()
    torch.save({"state_dict": published}, tmp_path / "models" / "AnySat.pth")
    model = load_anysat(tmp_path)
    back = published_anysat_state(model.state_dict(), model.config)
    assert {name: torch.equal(back[name], value) for name, value in published.items()} == dict.fromkeys(back, True)
    assert model.config == anysat_config("hub-tiny")
    assert (model.licence, model.training) == ("MIT", False)


def test_of_a_training_checkpoint_the_teacher_is_taken(tmp_path):
    config = AnySatConfig(dim=32, depth=1, heads=2)
    student, teacher = (AnySat(config) for _ in range(2))
    state = {"model.masked_token": torch.zeros(1, 1, 32)}
    state |= published_anysat_state(student.state_dict(), config, prefix="model.encoder.")
    state |= published_anysat_state(teacher.state_dict(), config, prefix="target_encoder.")
    torch.save({"state_dict": state}, tmp_path / "AnySat_full.pth")
    loaded = load_anysat(tmp_path / "AnySat_full.pth").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in teacher.state_dict().items())
    assert set(anysat_state(state, prefix="model.encoder.")) == set(student.state_dict())


class Danger:
    def __reduce__(self):
        return print, ("opened",)


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path):
    path = tmp_path / "AnySat.pth"
    with pytest.raises(InputError, match=r"has no AnySat\.pth; fetch it"):
        load_anysat(path)
    with pytest.raises(InputError, match=r"has no AnySat\.pth"):
        load_anysat(tmp_path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"AnySat\.pth"):
        load_anysat(path)
    path.write_bytes(pickle.dumps(Danger(), protocol=2))
    with pytest.raises(InputError, match="holds more than tensors"):
        load_anysat(path)
    torch.save({"state_dict": {"layer.weight": torch.zeros(2)}}, path)
    with pytest.raises(InputError, match="no AnySat encoder in it"):
        load_anysat(path)
    published = random_published()
    torch.save({key: value for key, value in published.items() if key != "blocks.0.norm1.bias"}, path)
    with pytest.raises(InputError, match=r"missing blocks\.0\.norm1\.bias"):
        load_anysat(path)
    torch.save({**published, "projector_radar9.pad_parameter": torch.zeros(())}, path)
    with pytest.raises(InputError, match="a projector for 'radar9'"):
        load_anysat(path)


# New sensors


DRONE = Modality(
    name="drone_rgb_test",
    title="Drone",
    unit="dn",
    gsd=0.1,
    kind="still",
    bands=(Band(name="R", gsd=0.1, wavelength=0.65), Band(name="G", gsd=0.1, wavelength=0.56)),
)


@pytest.fixture
def registry():
    """Forget the modalities that a test declares."""
    before = dict(MODALITIES)
    yield
    MODALITIES.clear()
    MODALITIES.update(before)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return AnySat(AnySatConfig(dim=64, depth=1, heads=2), normalized_input=True).eval()


def test_a_sensor_that_sees_the_same_starts_the_same(small, registry):
    twin = replace(MODALITIES["landsat7"], name="landsat7_twin", title="Another Landsat 7")
    sensor = add_modality(small, twin)
    assert nearest_sensor(sensor, small.config).name in ("l7", "landsat7_twin")
    o = observe("landsat7")
    with torch.no_grad():
        a, b = (small.encode(Batch(observations={m: o}), patch_m=30).patches for m in ("landsat7", "landsat7_twin"))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("modality", "like"), [("hls", "l8"), ("planet", "spot"), (DRONE, "aerial"), ("ndvi", None)])
def test_new_sensors_encode_and_train_alone(small, registry, modality, like):
    sensor = new_sensor(modality if isinstance(modality, Modality) else MODALITIES[modality])
    if like:
        found = nearest_sensor(sensor, small.config)
        assert found.dated == SENSORS[like].dated
    added = add_modality(small, modality, like="nearest" if like else None, freeze=True)
    name = modality if isinstance(modality, str) else modality.name
    assert name in small.modalities
    batch = batch_of(name, "sentinel2_l2a", samples=2, tile_m=120)
    out = small.encode(batch, patch_m=60, dense=name)
    assert out.patches.shape == (2, 2, 2, 64)
    out.dense.square().sum().backward()
    moved = {key for key, p in small.named_parameters() if p.grad is not None}
    assert moved
    assert all(key.startswith(f"projectors.{added.name}.") for key in moved)


def test_planet_alone_is_cut_along_its_own_pixels(small, registry):
    add_modality(small, "planet")
    pixels = random(1, 1, 3, 64, 64)
    o = Observation(pixels=pixels, dates=torch.zeros(1, 1, dtype=torch.int64), valid=torch.ones(1, 1, 64, 64).bool())
    with torch.no_grad():
        found = small.encode(Batch(observations={"planet": o}), patch_m=48, dense="planet")
        wanted = small({"planet": Input(values=pixels)}, scale=4, dense="planet")
    assert found.dense.shape == (1, 16, 16, 128)  # as published: cells of 4 pixels, 16 of them in a patch
    same(found.dense, wanted.dense)
    same(found.summary, wanted.tile)
    with pytest.raises(InputError, match="whole number of 96 m"):
        small.encode(Batch(observations={"planet": observe("planet")}), patch_m=96)


def test_saved_models_keep_sensors_statistics_and_results(small, registry):
    add_modality(small, DRONE)
    batch = batch_of(DRONE.name, "sentinel1", tile_m=20)
    small.statistics, small.normalized_input = fit_statistics([batch], small.sensors), False
    with torch.no_grad():
        before = small.encode(batch, patch_m=20).summary
    saved = json.loads(json.dumps(anysat_json(small)))
    del MODALITIES[DRONE.name]
    again = anysat_from_json(saved, name="again")
    again.load_state_dict(small.state_dict())
    assert again.config == small.config
    assert again.statistics == small.statistics
    with torch.no_grad():
        assert torch.equal(again.eval().encode(batch, patch_m=20).summary, before)
    with pytest.raises(InputError, match="incomplete"):
        anysat_from_json({**saved, "config": {}}, name="again")
    with pytest.raises(InputError, match="update panterra"):
        anysat_from_json({**saved, "format": "panterra-anysat-9"}, name="again")


def test_new_sensors_are_refused_where_they_cannot_be(small, registry):
    with pytest.raises(InputError, match="reads sentinel2_l2a already, as s2"):
        add_modality(small, "sentinel2_l2a")
    with pytest.raises(InputError, match="no modality 'balloon' is declared"):
        add_modality(small, "balloon")
    with pytest.raises(InputError, match="cannot start like 's2'; choose one that takes still images: aerial"):
        add_modality(small, DRONE, like="s2")
    with pytest.raises(InputError, match="series and still images"):
        add_modality(small, "era5_10")
    with pytest.raises(InputError, match="a different modality 'hls' is known already"):
        add_modality(small, replace(DRONE, name="hls"))
    with pytest.raises(InputError, match="has no sensor 'x'"):
        train_only(small, ["x"])


def test_a_resized_kernel_sees_an_even_surface_alike():
    weight = random(4, 3, 10, 10)
    for size in (4, 20):
        resized = resize_kernel(weight, size)
        torch.testing.assert_close(resized.sum((2, 3)), weight.sum((2, 3)), rtol=1e-4, atol=1e-4)


def test_still_images_come_to_the_pixels_of_their_cells():
    sensor = SENSORS["naip"]
    o = observe("naip", tile_m=10)
    valid = o.valid.clone()
    valid[..., :2, :2] = False
    valid[..., 0, 2] = False
    pixels, seen = to_pixel_size(replace(o, valid=valid), sensor, 0.625)
    assert pixels.shape[-2:] == (8, 8)
    assert not seen[..., 0, 0].any()
    assert seen.sum() == 63
    torch.testing.assert_close(pixels[0, 0, :, 3, 5], o.pixels[0, 0, :, 6:8, 10:12].mean((1, 2)))
    torch.testing.assert_close(pixels[0, 0, :, 0, 1], o.pixels[0, 0, :, :2, 2:4].flatten(1)[:, 1:].mean(1))
    coarse, _ = to_pixel_size(observe("naip_10", tile_m=10), sensor, 2.5)
    assert torch.equal(coarse[..., ::2, 1::2], observe("naip_10", tile_m=10).pixels)


def test_series_projector_ignores_dates_without_data():
    torch.manual_seed(0)
    part = SeriesProjector(SENSORS["s2"], 32).double().eval()
    part.initialise()
    x, codes = random(5, 4, 10).double(), random(5, 4, 2).double()
    valid = torch.rand(5, 4) > 0.4
    valid[:, 0] = True
    with torch.no_grad():
        found = part.embed(x, codes, valid)
        for i in range(5):
            same(found[i : i + 1], part.embed(x[i : i + 1, valid[i]], codes[i : i + 1, valid[i]]))


def test_statistics_are_plain_numbers():
    found = Statistics(channels=("a",), mean=(2.0,), std=(4.0,), count=3)
    assert float(found.standardise(torch.full((1, 1, 1, 1, 1), 10.0))) == 2.0


def test_all_sizes_have_a_configuration():
    assert {anysat_config(size).dim for size in SIZES} == {192, 256, 384, 512, 768}
