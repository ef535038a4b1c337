import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn import metrics as sk

from panterra.errors import InputError
from panterra.evaluate import anysat_protocol, metrics

GOLDEN = Path(__file__).parent / "golden" / "olmoearth"
AVERAGES = ("macro", "micro", "weighted")


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def guesses(rng):
    """Targets of five classes, of which one never occurs, and predictions that are right about half of the time."""
    targets = rng.integers(0, 4, 300)
    return targets, np.where(rng.random(300) < 0.5, targets, rng.integers(0, 5, 300))


def test_recorded_segmentation_metrics():
    data = load_file(GOLDEN / "eval_cases.safetensors")
    expected = json.loads((GOLDEN / "eval_cases.json").read_text())["segmentation_metrics"]
    scores = np.moveaxis(data["seg/scores"], 1, -1)
    conf = metrics.confusion(data["seg/labels"], scores.argmax(-1), 4)
    figures = {
        "miou": metrics.mean_iou(conf),
        "overall_acc": metrics.accuracy(conf),
        "macro_acc": metrics.macro_accuracy(conf),
        "macro_f1": metrics.macro_f1(conf),
        "micro_f1": metrics.accuracy(conf),
        "auroc": metrics.auroc(data["seg/labels"].reshape(-1), scores.reshape(-1, 4)),
        "prauc": metrics.prauc(data["seg/labels"].reshape(-1), scores.reshape(-1, 4)),
        **{f"f1_class_{k}": f for k, f in enumerate(metrics.per_class(conf)["f1"])},
    }
    assert figures == pytest.approx(expected, rel=2e-7)


def test_class_metrics_agree_with_scikit_learn(guesses):
    conf = metrics.confusion(*guesses)
    np.testing.assert_array_equal(conf, sk.confusion_matrix(*guesses))
    precision, recall, f1, support = sk.precision_recall_fscore_support(*guesses, zero_division=np.nan)
    figures = metrics.per_class(conf)
    np.testing.assert_allclose(figures["precision"], precision)
    np.testing.assert_allclose(figures["recall"], recall)
    # Class 4 is predicted but never met: its F1 is zero.
    np.testing.assert_allclose(figures["f1"], f1)
    np.testing.assert_array_equal(figures["support"], support)
    present = [0, 1, 2, 3]
    assert metrics.accuracy(conf) == pytest.approx(sk.accuracy_score(*guesses))
    assert metrics.macro_f1(conf) == pytest.approx(sk.f1_score(*guesses, labels=present, average="macro"))
    assert metrics.macro_accuracy(conf) == pytest.approx(sk.recall_score(*guesses, labels=present, average="macro"))
    assert metrics.mean_iou(conf) == pytest.approx(sk.jaccard_score(*guesses, average="macro"))


def test_value_metrics_agree_with_scikit_learn(rng):
    truth = rng.normal(1e6, 3, 200)
    guess = truth + rng.normal(size=200)
    sums = metrics.moments(truth, guess)
    assert metrics.r2(sums) == pytest.approx(sk.r2_score(truth, guess))
    assert metrics.rmse(sums) == pytest.approx(sk.root_mean_squared_error(truth, guess))
    assert metrics.mae(sums) == pytest.approx(sk.mean_absolute_error(truth, guess))
    by_group = metrics.moments(truth, guess, groups=rng.integers(0, 7, 200))
    np.testing.assert_allclose(by_group.sum(0), sums, atol=1e-9)


def test_multilabel_and_ranking_metrics_agree_with_scikit_learn(rng):
    targets, scores = rng.random((60, 5)) < 0.3, rng.random((60, 5)).round(1)
    predictions = scores > 0.5
    micro, macro = metrics.multilabel_f1(targets, predictions)
    assert micro == pytest.approx(sk.f1_score(targets, predictions, average="micro"))
    assert macro == pytest.approx(sk.f1_score(targets, predictions, average="macro"))
    ranked = metrics.average_precision(targets, scores)
    assert ranked == pytest.approx(sk.average_precision_score(targets, scores, average="micro"))
    labels = rng.integers(0, 5, 60)
    expected = np.mean([sk.roc_auc_score(labels == k, scores[:, k]) for k in range(5)])
    assert metrics.auroc(labels, scores) == pytest.approx(expected)


def test_unlabelled_samples_are_left_out(guesses):
    targets, predictions = guesses
    hidden = np.where(np.arange(300) % 3 == 0, -1, targets)
    kept = hidden >= 0
    expected = metrics.confusion(targets[kept], predictions[kept], 5)
    np.testing.assert_array_equal(metrics.confusion(hidden, predictions, 5), expected)


def test_groups_of_a_confusion_matrix_add_up(guesses, rng):
    groups = rng.integers(0, 9, 300)
    by_group = metrics.confusion(*guesses, groups=groups)
    np.testing.assert_array_equal(by_group.sum(0), metrics.confusion(*guesses))
    inside = groups == 4
    np.testing.assert_array_equal(by_group[4], metrics.confusion(*(a[inside] for a in guesses), 5))


def test_undefined_figures_are_nan_and_have_no_interval():
    assert np.isnan(metrics.accuracy(np.zeros((2, 2), int)))
    assert np.isnan(metrics.r2(metrics.moments(np.full(4, 3.1), np.arange(4))))
    assert np.isnan(metrics.auroc(np.zeros(3, int), np.ones((3, 2))))
    interval = metrics.bootstrap(metrics.accuracy, np.zeros((3, 2, 2)))
    assert np.isnan([interval.estimate, interval.low, interval.high]).all()


def test_bootstrap_over_blocks_is_the_plain_loop(guesses, rng):
    """The interval agrees with drawing whole blocks one resample after another."""
    groups = rng.integers(0, 12, 300)
    interval = metrics.bootstrap(metrics.macro_f1, metrics.confusion(*guesses, groups=groups), n=4000)
    members = [np.flatnonzero(groups == g) for g in range(12)]
    loop = []
    for _ in range(1500):
        drawn = np.concatenate([members[g] for g in rng.integers(0, 12, 12)])
        loop.append(metrics.macro_f1(metrics.confusion(guesses[0][drawn], guesses[1][drawn], 5)))
    assert (interval.low, interval.high) == pytest.approx(np.percentile(loop, [2.5, 97.5]), abs=0.01)
    assert interval.std == pytest.approx(np.std(loop), rel=0.1)
    assert interval.estimate == metrics.macro_f1(metrics.confusion(*guesses))


def test_bootstrap_of_samples_has_the_binomial_spread(guesses):
    conf = metrics.confusion(*guesses)
    share = metrics.accuracy(conf)
    drawn = metrics.accuracy(metrics.resample_samples(conf, n=4000))
    assert drawn.std() == pytest.approx(np.sqrt(share * (1 - share) / 300), rel=0.05)
    one_by_one = metrics.confusion(*guesses, groups=np.arange(300))
    assert metrics.bootstrap(metrics.accuracy, one_by_one, n=4000).std == pytest.approx(drawn.std(), rel=0.05)


def test_blocks_that_agree_inside_widen_the_interval(rng):
    """Thirty samples of one opinion count as one, which resampling samples singly would not notice."""
    block_is_right = rng.random(10) < 0.6
    predictions, groups = np.repeat(block_is_right, 30).astype(int), np.repeat(np.arange(10), 30)
    targets = np.ones(300, int)
    honest = metrics.bootstrap(metrics.accuracy, metrics.confusion(targets, predictions, groups=groups))
    naive = metrics.bootstrap(metrics.accuracy, metrics.confusion(targets, predictions, groups=np.arange(300)))
    assert honest.high - honest.low > 4 * (naive.high - naive.low)


def test_resampling_depends_on_the_seed_alone():
    blocks = np.arange(60).reshape(15, 2, 2)
    np.testing.assert_array_equal(metrics.resample(blocks, seed=7), metrics.resample(blocks, seed=7))
    assert (metrics.resample(blocks, seed=7) != metrics.resample(blocks, seed=8)).any()
    assert metrics.resample(np.ones((9, 1))).tolist() == [[9.0]] * 1000


def test_unequal_lengths_and_unknown_classes_are_named():
    with pytest.raises(InputError, match="3 targets came with 2 predictions"):
        metrics.confusion(np.zeros(3, int), np.zeros(2, int))
    with pytest.raises(InputError, match="beyond 0 to 1; give num_classes=3"):
        metrics.confusion(np.array([0, 2]), np.array([0, 1]), 2)


def test_nothing_gives_no_figure_rather_than_an_error():
    assert np.isnan(metrics.average_precision(np.zeros(0, bool), np.zeros(0)))
    # As scikit-learn's zero_division and torchmetrics have it.
    assert metrics.multilabel_f1(np.zeros((3, 2), bool), np.zeros((3, 2), bool)) == (0.0, 0.0)
    assert not metrics.resample_samples(np.zeros((2, 2), int), n=3).any()


def test_anysats_scores_of_labels_that_are_nowhere():
    none = np.zeros((3, 2), bool)
    assert set(anysat_protocol.multilabel_f1_scores(none, none).values()) == {0.0}
    assert anysat_protocol.multilabel_f1_scores(none, ~none)["F1_Score_weighted"] == 0
    assert anysat_protocol.f1_scores(np.zeros((3, 3), int))["F1_Score_weighted"] == 0
    assert np.isnan(anysat_protocol.pooled_iou(np.zeros((2, 2), int)))
    conf = np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    truth, guess = (np.repeat(side.ravel(), conf.ravel()) for side in np.indices((3, 3)))
    expected = {a: sk.f1_score(truth, guess, labels=[0, 1, 2], average=a, zero_division=0) for a in AVERAGES}
    assert anysat_protocol.f1_scores(conf) == pytest.approx({f"F1_Score_{a}": f for a, f in expected.items()})
