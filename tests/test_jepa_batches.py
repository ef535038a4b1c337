import datetime as dt
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from panterra.errors import InputError
from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.anysat_projectors import Input
from panterra.models.anysat_sensors import SENSORS
from panterra.models.anysat_statistics import fit_statistics
from panterra.objectives.jepa_batches import MixedBatches, Source, crop, draw_turns, join, standardise
from panterra.sample import Batch, Observation, collate, to_days

AERIAL = Source(
    name="aerial", sensors=("aerial", "s2"), batch=4, cells=6, scales=(1, 2), crop_px={"aerial": 300}, max_dates=5
)
RADAR = Source(name="radar", sensors=("s2", "s1"), batch=2, cells=12, scales=(3,), weight=3)


class Tiles:
    """Standardised samples whose pixels hold their number."""

    def __init__(self, count, sensors, cells):
        self.count, self.sensors, self.cells = count, sensors, cells

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        sample = {}
        for name in self.sensors:
            if name == "aerial":
                sample[name] = torch.full((4, 304, 304), float(index))
            else:
                dates = 4 + index % 3
                sample[name] = torch.full((dates, SENSORS[name].channels, self.cells, self.cells), float(index))
                sample[f"{name}_dates"] = torch.arange(dates) * 30 + 1
        return sample


SAMPLES = {"aerial": Tiles(25, AERIAL.sensors, 6), "radar": Tiles(9, RADAR.sensors, 12)}


def mix(**options):
    return MixedBatches((AERIAL, RADAR), SAMPLES, **{"seed": 1, **options})


def numbers(tiles):
    return [int(x) for tile in tiles for x in tile.inputs["s2"].values[:, 0, 0, 0, 0]]


def test_a_step_depends_on_seed_step_and_rank_alone():
    one, other = mix(), mix()
    for step in (7, 0, 3, 20):
        (a,), (b,) = one[step], other[step]
        assert a.grid == b.grid
        assert torch.equal(a.masks.targets, b.masks.targets)
        assert torch.equal(a.kept, b.kept)
        assert all(torch.equal(a.dates[name].index, b.dates[name].index) for name in a.dates)
        assert all(torch.equal(a.inputs[name].values, b.inputs[name].values) for name in a.inputs)
    assert any(numbers(one[step]) != numbers(mix(seed=2)[step]) for step in range(4))


def test_an_epoch_reads_every_sample_once_and_the_next_in_another_order():
    batches = mix()
    assert len(batches) == 25 // 4 + 9 // 2
    orders = []
    for epoch in range(2):
        seen = {4: [], 2: []}
        for step in range(10):
            found = numbers(batches[10 * epoch + step])
            seen[len(found)] += found
        assert len(set(seen[4])) == 24
        assert len(set(seen[2])) == 8
        orders.append(seen[4])
    assert orders[0] != orders[1]


def test_ranks_share_data_set_and_sizes_and_read_different_samples():
    ranks = [mix(rank=rank, world=2) for rank in range(2)]
    assert len(ranks[0]) == 25 // 8 + 9 // 4
    for step in range(5):
        (a,), (b,) = (rank[step] for rank in ranks)
        assert a.grid == b.grid
        assert list(a.inputs) == list(b.inputs)
        assert a.masks.targets.shape == b.masks.targets.shape
        assert not set(numbers([a])) & set(numbers([b]))
        assert not torch.equal(a.masks.targets, b.masks.targets)


def test_micro_batches_are_masked_each_by_itself():
    batches = mix(micro_batch=1)
    step = next(step for step in range(10) if len(batches[step]) == 4)
    tiles = batches[step]
    assert [tile.samples for tile in tiles] == [1] * 4
    assert numbers(tiles) == numbers(mix()[step])
    assert len({tuple(tile.masks.targets.flatten().tolist()) for tile in tiles}) == 4


def test_data_sets_come_by_weight_until_they_are_exhausted():
    turns = draw_turns((3000, 1000, 0), (1.0, 2.0, 5.0), 4000, 0, 0)
    assert Counter(turns[:, 0].tolist()) == {0: 3000, 1: 1000}
    for source in range(2):
        assert turns[turns[:, 0] == source, 1].tolist() == list(range(3000 if source == 0 else 1000))
    assert 0.6 < (turns[:900, 0] == 1).mean() < 0.73
    assert np.flatnonzero(turns[:, 0] == 1).max() < 1700
    assert len(draw_turns((3000, 1000), (1.0, 2.0), 50, 0, 0)) == 50


def test_scales_are_drawn_and_tiles_cropped():
    batches = mix()
    grids = set()
    for step in range(20):
        (tile,) = batches[step]
        grids.add((next(iter(tile.inputs)), tile.grid.rows, tile.grid.scale))
        if "aerial" in tile.inputs:
            assert tile.inputs["aerial"].values.shape[-2:] == (300, 300)
            assert tile.inputs["s2"].values.shape[1] <= 5
    assert grids == {("aerial", 6, 1), ("aerial", 3, 2), ("s2", 4, 3)}


def test_a_crop_is_a_window_of_all_that_belongs_together():
    values = torch.arange(40.0 * 40).view(1, 1, 1, 40, 40)
    given = Input(values=values, valid=values[:, :, 0] > 100)
    cut = crop(given, 30, torch.Generator().manual_seed(0))
    first = int(cut.values[0, 0, 0, 0, 0])
    assert torch.equal(cut.values[0, 0, 0], values[0, 0, 0, first // 40 :, first % 40 :][:30, :30])
    assert torch.equal(cut.valid, cut.values[:, :, 0] > 100)
    assert torch.equal(crop(given, 50, torch.Generator()).values, values)


def test_shorter_series_are_padded_by_dates_without_data():
    long, short = SAMPLES["radar"][2], SAMPLES["radar"][0]
    samples = [
        {name: Input(values=x[name][None], days=x[f"{name}_dates"][None]) for name in ("s2", "s1")}
        for x in (long, short)
    ]
    del samples[1]["s1"]
    inputs = join(samples, ("s2", "s1"))
    assert inputs["s2"].values.shape == (2, 6, 10, 12, 12)
    assert inputs["s2"].valid[:, :, 0, 0].sum(1).tolist() == [6, 4]
    assert inputs["s1"].valid[:, :, 0, 0].sum(1).tolist() == [6, 0]
    assert join(samples[:1], ("s2", "s1"))["s2"].valid is None
    published = join(samples, ("s2",), published=True)["s2"]
    assert published.valid is None
    assert published.days[1].tolist() == [1, 31, 61, 91, 0, 0]


def observed(seed):
    g = torch.Generator().manual_seed(seed)
    days = torch.tensor([[to_days(dt.date(2021, month, 5)) for month in (2, 5, 9)]])
    valid = torch.rand(1, 3, 12, 12, generator=g) < 0.9
    s2 = Observation(pixels=1000 * torch.rand(1, 3, 12, 12, 12, generator=g), dates=days, valid=valid)
    s1 = Observation(pixels=-10 + torch.randn(1, 3, 2, 12, 12, generator=g), dates=days, valid=valid)
    return Batch(observations={"sentinel2_l2a": s2, "sentinel1": s1})


def test_samples_in_declared_units_become_what_the_encoder_takes():
    batches = [observed(seed) for seed in range(4)]
    statistics = fit_statistics(batches)
    torch.manual_seed(0)
    encoder = AnySat(AnySatConfig(dim=96, depth=1, heads=4), statistics=statistics).eval()
    mixed = MixedBatches([RADAR], {"radar": batches}, seed=0, statistics={"radar": statistics})
    (tiles,) = mixed[0]
    order = [next(i for i, b in enumerate(batches) if same(b, tiles, k)) for k in range(2)]
    with torch.no_grad():
        expected = encoder.encode(collate([batches[i] for i in order]), patch_m=30).summary
        got = encoder(tiles.inputs, scale=3).tile
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="no statistics"):
        MixedBatches([RADAR], {"radar": batches}, seed=0)[0]
    with pytest.raises(InputError, match="no statistics of s1"):
        standardise(batches[0], {"s2": statistics["s2"]})


@pytest.mark.parametrize("masked", [True, False])
def test_published_masks_are_those_of_the_data_set(masked):
    batches = [observed(seed) for seed in range(4)]
    statistics = {"radar": fit_statistics(batches)}
    source = replace(RADAR, masked=masked)
    (tiles,) = MixedBatches([source], {"radar": batches}, seed=0, statistics=statistics, published=True)[0]
    (plain,) = MixedBatches([source], {"radar": batches}, seed=0, statistics=statistics)[0]
    for name, given in tiles.inputs.items():
        assert given.valid is None
        assert (given.present is not None) == masked
        valid = plain.inputs[name].valid[:, :, None].expand_as(given.values)
        assert not valid.all()
        assert given.present is None or torch.equal(given.present, valid)
        assert not given.values[~valid].any()  # which is what stands for them, as it is never trained


def same(batch, tiles, k):
    return torch.equal(batch.observations["sentinel2_l2a"].valid[0], tiles.inputs["s2"].valid[k])


def test_what_cannot_be_mixed_says_so():
    with pytest.raises(InputError, match=r"no samples of \['radar'\]"):
        MixedBatches((AERIAL, RADAR), {"aerial": SAMPLES["aerial"]}, seed=0)
    with pytest.raises(InputError, match="samples enough for one batch"):
        MixedBatches([RADAR], {"radar": Tiles(1, RADAR.sensors, 12)}, seed=0)
    large = Source(name="radar", sensors=("s2", "s1"), batch=2, cells=12, scales=(3, 12))
    with pytest.raises(InputError, match="fewer than 2 x 2 patches at scale 12"):
        MixedBatches([large], SAMPLES, seed=0)
    with pytest.raises(InputError, match="none of the sensors l7"):
        join([{}], ("l7",))
    small = Input(values=torch.zeros(1, 1, 3, 8, 8))
    with pytest.raises(InputError, match="comes in several sizes"):
        join([{"spot": small}, {"spot": Input(values=torch.zeros(1, 1, 3, 9, 9))}], ("spot",))
