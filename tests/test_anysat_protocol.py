"""What AnySat's published evaluation does otherwise is done so where it is asked for."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import miniatures
from panterra.data.labelled import DATASETS
from panterra.data.pastis import open_pastis_crops
from panterra.errors import InputError
from panterra.evaluate import metrics
from panterra.evaluate.anysat_protocol import freeze, validation_scores
from panterra.evaluate.published import ANYSAT
from panterra.evaluate.published_tuning import ANYSAT_TUNING
from panterra.models.anysat import AnySat, AnySatConfig, for_finetuning
from panterra.models.anysat_projectors import Grid, Input
from panterra.models.anysat_sensors import finetuning_sensors


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return AnySat(AnySatConfig(dim=64, depth=2, heads=4), name="small")


def series(encoder, *, seed=0):
    """What the projector of Sentinel-2 says of a series of which a third is masked."""
    drawn = torch.Generator().manual_seed(1)
    values = torch.randn(1, 3, 10, 4, 4, generator=drawn).to(next(encoder.parameters()))
    present = torch.rand(values.shape, generator=drawn) > 0.3
    torch.manual_seed(seed)
    given = Input(values=values, days=torch.tensor([[10, 50, 90]]), present=present)
    return encoder.projectors["s2"](given, Grid(rows=2, cols=2, scale=2))[0]


def test_a_frozen_encoder_says_the_same_twice(encoder):
    assert freeze(encoder.train()) == {}
    assert not any(p.requires_grad for p in encoder.parameters())
    assert torch.equal(series(encoder, seed=0), series(encoder, seed=1))
    assert not series(encoder).requires_grad


def test_as_published_it_drops_dates_and_learns_the_pad(encoder):
    learning = freeze(encoder, published=True, masked=("s2",))
    assert list(learning) == ["projectors.s2.pad"]
    assert [n for n, p in encoder.named_parameters() if p.requires_grad] == list(learning)
    assert not torch.equal(series(encoder, seed=0), series(encoder, seed=1))
    encoder.double()
    (pad,) = learning.values()

    def loss():
        tokens = series(encoder)
        return (tokens * torch.arange(tokens.numel()).view(tokens.shape).sin()).sum()

    loss().backward()
    slope, step, values = float(pad.grad), 1e-6, []
    with torch.no_grad():
        for sign in (1, -1):
            pad += sign * step
            values.append(float(loss()))
            pad -= sign * step
    assert abs(slope) > 1e-3
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


def test_fine_tuning_has_one_period_and_no_dropout():
    torch.manual_seed(0)
    model = AnySat(AnySatConfig(dim=64, depth=1, heads=2), name="any", normalized_input=True).eval()
    model.patch_encoder.requires_grad_(False)
    same = for_finetuning(model)
    config = replace(model.config, sensors=finetuning_sensors(model.config.sensors))
    wanted = AnySat(config).eval()
    wanted.load_state_dict(model.state_dict())
    days = torch.tensor([[3, 150, 360]])
    given = {"s1": Input(values=torch.randn(1, 3, 3, 2, 2), days=days)}
    with torch.no_grad():
        torch.testing.assert_close(same(given, scale=1).tile, wanted(given, scale=1).tile)
        assert not torch.allclose(same(given, scale=1).tile, model(given, scale=1).tile)
    assert same.train().projectors["s1"].stages[0].dropout == 0
    assert model.projectors["s1"].stages[0].dropout == 0.2
    assert not model.training
    for ours, theirs in zip(same.parameters(), model.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
        assert ours.requires_grad == theirs.requires_grad


def test_sensors_without_a_pad_are_refused(encoder):
    with pytest.raises(InputError, match="no projector with a pad for aerial"):
        freeze(encoder, published=True, masked=("aerial",))


def test_published_scores_are_of_all_looks_so_far():
    truth = np.array([0, 1, 1, 0])
    right, wrong = (metrics.confusion(truth, said, 2) for said in (truth, 1 - truth))
    looks = [right, wrong, wrong]
    assert validation_scores(looks, metrics.accuracy) == [1, 0, 0]
    assert validation_scores(looks, metrics.accuracy, published=True) == pytest.approx([1, 1 / 2, 1 / 3])
    rng = np.random.default_rng(0)
    drawn = [(rng.integers(0, 3, 20), rng.integers(0, 3, 20)) for _ in range(4)]
    found = validation_scores([metrics.confusion(*d, 3) for d in drawn], metrics.macro_f1, published=True)
    for n, score in enumerate(found, start=1):
        truth, said = (np.concatenate(part) for part in zip(*drawn[:n], strict=True))
        hit = [((truth == k) & (said == k)).sum() for k in range(3)]
        f1 = [2 * h / ((truth == k).sum() + (said == k).sum()) for k, h in enumerate(hit)]
        assert score == pytest.approx(np.mean(f1))


def test_the_crops_of_pastis_are_told_by_presence(tmp_path, monkeypatch):
    crops = replace(DATASETS["pastis_hd"], name="pastis_hd_crops", task="multilabel")
    monkeypatch.setitem(DATASETS, "pastis_hd_crops", crops)
    codes = miniatures.pastis_hd(tmp_path)["10004"]["TARGET"][0]
    (sample,) = labelled = open_pastis_crops(tmp_path, "val", name="pastis_hd_crops")
    assert (labelled.card.name, labelled.task, len(labelled.class_names)) == ("pastis_hd_crops", "multilabel", 18)
    assert sample.target.tolist() == [[float(code in codes) for code in range(1, 19)]]


def test_the_table_of_experiments():
    row = ANYSAT_TUNING["pastis_hd_crops"]
    assert (row.metric, row.batch, row.patch_m, row.dense) == ("macro_f1", 4, 40, None)
    assert row.modalities == ("spot", "sentinel2_l2a", "sentinel1")
    assert (row.full.rate, row.full.weight_decay, row.full.schedule) == (5e-5, 0, "epoch_cosine")
    for name in ("bradd_s1ts", "sickle", "timesen2crop"):
        tuned, probed = ANYSAT_TUNING[name], ANYSAT[name]
        for field in ("metric", "batch", "modalities", "patch_m", "dense"):
            assert getattr(tuned, field) == getattr(probed, field)
    assert ANYSAT_TUNING["timesen2crop"].full.epochs == 100
    shares = {name: sorted(set(row.date_shares.values())) for name, row in ANYSAT_TUNING.items() if row.date_shares}
    assert shares == {
        "flair": [0.3],
        "planted": [0.7, 0.9],
        "bradd_s1ts": [0.5],
        "sickle": [0.8],
        "timesen2crop": [0.7],
    }
    assert [name for name, row in ANYSAT_TUNING.items() if row.most_dates == 20] == ["pastis_hd", "pastis_hd_crops"]
    assert [name for name, row in ANYSAT_TUNING.items() if row.draw == "root"] == ["planted"]
    for row in ANYSAT_TUNING.values():
        assert set(row.date_shares) <= set(row.modalities)
