import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss

from panterra.errors import InputError
from panterra.evaluate.calibration import (
    brier,
    calibrated_probe,
    expected_calibration_error,
    fit_isotonic,
    fit_temperature,
    fit_vector_scaling,
    reliability,
)
from panterra.evaluate.probes import Probe, ProbeClass, fit_probe


def softmax(logits):
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def drawn(num, *, temperature=1.0, classes=4, seed=0):
    """Draw targets from known probabilities, and spoil the probabilities by a temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num, classes)) * 2
    true = softmax(logits)
    targets = (true.cumsum(1) < rng.random((num, 1))).sum(1)
    return softmax(logits * temperature), targets, true


def test_the_temperature_that_spoiled_the_probabilities_is_found():
    spoiled, targets, true = drawn(8000, temperature=3)
    scaling = fit_temperature(spoiled, targets)
    assert 1 / scaling.scale[0] == pytest.approx(3, rel=0.05)
    np.testing.assert_allclose(scaling(spoiled), true, atol=0.015)
    assert (scaling(spoiled).argmax(1) == spoiled.argmax(1)).all()
    # No other temperature does better.
    logits = np.log(spoiled)
    losses = [log_loss(targets, softmax(logits / t)) for t in np.linspace(2.5, 3.5, 21)]
    assert log_loss(targets, scaling(spoiled)) <= min(losses) + 1e-9


def test_vector_scaling_of_two_classes_is_a_logistic_regression():
    spoiled, targets, _ = drawn(3000, temperature=2, classes=2)
    spoiled = softmax(np.log(spoiled) + np.array([0.7, 0]))
    scaled = fit_vector_scaling(spoiled, targets)(spoiled)
    # Scale and shift of two log-probabilities: any weights in front of each.
    oracle = LogisticRegression(C=np.inf, tol=1e-9, max_iter=10_000).fit(np.log(spoiled), targets)
    assert log_loss(targets, scaled) == pytest.approx(
        log_loss(targets, oracle.predict_proba(np.log(spoiled))), abs=1e-4
    )


def test_vector_scaling_repairs_what_a_temperature_cannot():
    spoiled, targets, true = drawn(8000, seed=2)
    spoiled = softmax(np.log(spoiled) * [1, 2, 0.5, 1.5] + [1, 0, -1, 0])
    one, each = fit_temperature(spoiled, targets)(spoiled), fit_vector_scaling(spoiled, targets)(spoiled)
    assert log_loss(targets, each) < log_loss(targets, one) - 0.02
    assert np.abs(each - true).mean() < 0.3 * np.abs(one - true).mean()


def test_classes_that_are_told_apart_perfectly_do_not_run_off():
    shares = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    for fit in (fit_temperature, fit_vector_scaling):
        scaled = fit(shares, np.array([0, 0, 1]))(shares)
        assert np.isfinite(scaled).all()
        assert scaled[[0, 1, 2], [0, 0, 1]].min() > 0.99


def test_probabilities_that_are_the_wrong_way_round_are_refused():
    spoiled, targets, _ = drawn(200, classes=2)
    with pytest.raises(InputError, match="check that targets and columns go together"):
        fit_temperature(spoiled[:, ::-1], targets)


def test_isotonic_curves_are_those_of_scikit_learn():
    spoiled, targets, _ = drawn(500, temperature=3)
    spoiled, targets = np.repeat(spoiled, 3, axis=0), np.concatenate([targets, drawn(1000, seed=5)[1]])  # with ties
    new = drawn(500, temperature=3, seed=1)[0]
    curves = [IsotonicRegression(out_of_bounds="clip").fit(spoiled[:, k], targets == k) for k in range(4)]
    wanted = np.stack([c.predict(new[:, k]) for k, c in enumerate(curves)], axis=1)
    np.testing.assert_allclose(fit_isotonic(spoiled, targets)(new), wanted / wanted.sum(1, keepdims=True), atol=1e-9)


def test_what_every_curve_calls_impossible_keeps_its_probabilities():
    shares = np.array([[0.9, 0.1, 0], [0.1, 0.9, 0], [0.5, 0.5, 0], [0.4, 0.6, 0]])
    fitted = fit_isotonic(shares, np.array([0, 1, 0, 1]))
    np.testing.assert_allclose(fitted(np.array([[0.2, 0.2, 0.6]])), [[0.2, 0.2, 0.6]])
    np.testing.assert_allclose(fitted(np.array([[[0.9, 0.1, 0]]])), [[[1, 0, 0]]])


def test_calibration_lowers_error_and_score_on_new_samples():
    spoiled, targets, _ = drawn(4000, temperature=2.5)
    fresh, truth, _ = drawn(4000, temperature=2.5, seed=9)
    for fit in (fit_temperature, fit_vector_scaling, fit_isotonic):
        better = fit(spoiled, targets)(fresh)
        assert expected_calibration_error(better, truth) < 0.3 * expected_calibration_error(fresh, truth)
        assert brier(better, truth) < brier(fresh, truth) - 0.01
        np.testing.assert_allclose(better.sum(1), 1)


def test_reliability_is_that_of_scikit_learn():
    spoiled, targets, _ = drawn(3000, temperature=2)
    table = reliability(spoiled, targets, bins=10)
    right = spoiled.argmax(1) == targets
    accuracy, confidence = calibration_curve(right, spoiled.max(1), n_bins=10, strategy="quantile")
    np.testing.assert_allclose(table.accuracy, accuracy)
    np.testing.assert_allclose(table.confidence, confidence)
    assert np.ptp(table.count) <= 1
    gap = (np.abs(accuracy - confidence) * table.count).sum() / 3000
    assert expected_calibration_error(spoiled, targets, bins=10) == pytest.approx(gap)


def test_the_calibration_error_by_hand():
    shares = np.array([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.1, 0.9]])
    # Of two said with 0.6 one is right, of two said with 0.9 both.
    assert expected_calibration_error(shares, [0, 1, 1, 1], bins=2) == pytest.approx((0.1 + 0.1) / 2)
    assert reliability(shares, [0, 1, 1, 1], bins=50).count.sum() == 4


def test_brier_is_that_of_scikit_learn():
    spoiled, targets, _ = drawn(500)
    assert brier(spoiled, targets) == pytest.approx(brier_score_loss(targets, spoiled, scale_by_half=False))


def test_a_temperature_is_built_into_a_probe():
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(400, 6)).astype(np.float32), rng.integers(0, 3, 400)
    features[:, 0] += 1.5 * targets
    probe, _ = fit_probe(features, targets + 1, split="random")
    scaling = fit_temperature(
        probe.probabilities(features) ** 2 / (probe.probabilities(features) ** 2).sum(1)[:, None], targets
    )
    calibrated = calibrated_probe(probe, scaling)
    wanted = scaling(probe.probabilities(features))
    np.testing.assert_allclose(calibrated.probabilities(features), wanted, atol=1e-5)
    assert (calibrated.predict(features) == probe.predict(features)).all()
    with pytest.raises(InputError, match="only one temperature"):
        calibrated_probe(probe, fit_vector_scaling(probe.probabilities(features), targets))


def test_a_knn_probe_has_no_temperature():
    classes = (ProbeClass(name="a", code=1), ProbeClass(name="b", code=2))
    tensors = {"examples": torch.eye(2), "answers": torch.eye(2)}
    probe = Probe(kind="knn", task="classes", classes=classes, tensors=tensors, neighbours=1)
    with pytest.raises(InputError, match="a knn probe has no logits"):
        calibrated_probe(probe, fit_temperature(np.full((4, 2), 0.5), np.array([0, 1, 0, 1])))


@pytest.mark.parametrize(
    ("probabilities", "targets", "message"),
    [
        (np.ones((2, 2)), [0, 1], "not shares that sum to 1"),
        (np.full((2, 2), np.nan), [0, 1], "not shares that sum to 1"),
        (np.full((2, 2), 0.5), [0], r"wanted \[n, classes\] and \[n\]"),
        (np.full((2, 2), 0.5), [1, 2], "targets go from 1 to 2; wanted columns 0 to 1"),
    ],
)
def test_what_a_person_can_put_right(probabilities, targets, message):
    with pytest.raises(InputError, match=message):
        fit_temperature(probabilities, np.array(targets))
