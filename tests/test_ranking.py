"""How well scores rank, and how embeddings spread."""

import numpy as np
import pytest
import torch

from panterra.evaluate import metrics
from panterra.evaluate.calibration import expected_calibration_error
from panterra.evaluate.diagnostics import diagnose
from panterra.evaluate.ranking import ScoreCounts, ranked
from panterra.train.monitors import effective_rank, uniformity


def made(n=400, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[truth]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    # Ties, as votes have them.
    return truth, np.round(shares, 2) / np.round(shares, 2).sum(1, keepdims=True)


def test_ranks_are_scikit_learns():
    from sklearn.metrics import average_precision_score, roc_auc_score

    truth, shares = made()
    there = np.eye(4)[truth] > 0
    found = ranked(there, shares, probabilities=True)
    assert found["auroc"].estimate == pytest.approx(roc_auc_score(truth, shares, multi_class="ovr", average="macro"))
    assert found["prauc"].estimate == pytest.approx(average_precision_score(there, shares, average="macro"))
    assert found["auroc"].estimate == pytest.approx(metrics.auroc(truth, shares))
    assert found["ece"].estimate == pytest.approx(expected_calibration_error(shares, truth))
    for name in ("auroc", "prauc"):
        assert found[name].low < found[name].estimate < found[name].high
        assert 0 < found[name].std < 0.05
    # A class that nobody has says nothing.
    alone = np.concatenate([there, np.zeros((400, 1), bool)], axis=1), np.concatenate([shares, shares[:, :1]], axis=1)
    assert ranked(*alone, probabilities=False)["auroc"] == found["auroc"]
    assert "ece" not in ranked(*alone, probabilities=False)


def test_counted_pixels_give_nearly_the_same():
    truth, shares = made(5000)
    shares = np.random.default_rng(1).dirichlet(np.ones(4), 5000) * 0.3 + shares * 0.7
    counts = ScoreCounts(classes=4)
    labels = torch.from_numpy(truth)
    labels[:100] = -1
    for part, own in zip(torch.from_numpy(shares).split(999), labels.split(999), strict=True):
        counts.add(part, own)
    found = counts.figures()
    assert found["auroc"].estimate == pytest.approx(metrics.auroc(labels.numpy(), shares), abs=1e-4)
    assert found["prauc"].estimate == pytest.approx(metrics.prauc(labels.numpy(), shares), abs=1e-3)
    wanted = expected_calibration_error(shares[100:], truth[100:])
    assert found["ece"].estimate == pytest.approx(wanted, abs=2e-3)
    assert np.isnan(found["auroc"].low)


def test_pixels_of_one_class_have_no_rank():
    counts = ScoreCounts(classes=2)
    assert np.isnan(counts.figures()["ece"].estimate)
    counts.add(torch.tensor([[0.9, 0.1]]), torch.tensor([0]))
    assert np.isnan(counts.figures()["auroc"].estimate)
    assert counts.figures()["ece"].estimate == pytest.approx(0.1, abs=1e-3)


def test_diagnostics_are_those_of_the_vectors():
    torch.manual_seed(0)
    x = torch.randn(50, 8)
    found = diagnose(x)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    cosines = (unit @ unit.T)[~torch.eye(50, dtype=torch.bool)]
    assert found["effective_rank"] == pytest.approx(effective_rank(x))
    assert found["uniformity"] == pytest.approx(uniformity(x))
    assert found["mean_cosine"] == pytest.approx(float(cosines.mean()))
    assert found["max_cosine"] == pytest.approx(float(cosines.max()))
    assert found["min_norm"] == pytest.approx(float(x.norm(dim=1).min()))
    lost = torch.cat([x, torch.full((1, 8), torch.nan)])
    assert diagnose(lost) == found
    assert diagnose(torch.full((3, 8), torch.nan)) == {}


def test_images_are_looked_at_one_by_one():
    torch.manual_seed(0)
    # Within an image all vectors point one way.
    x = torch.randn(20, 1, 1, 8) * torch.rand(20, 3, 3, 1)
    found = diagnose(x)
    assert found["image_effective_rank"] == pytest.approx(1, abs=1e-4)
    assert found["image_mean_cosine"] == pytest.approx(1)
    assert found["effective_rank"] > 5
