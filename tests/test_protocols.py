"""What frozen evaluations do with gaps: unknown labels, missing data, half precision, too few samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from panterra.errors import InputError
from panterra.evaluate.protocols import Trial, run
from panterra.evaluate.sweep import Recipe, Table

COUNTS = {"train": 30, "val": 9, "test": 17}
RECIPE = Recipe(rates=(0.03,), epochs=3, batch=8, check_every=1)


def tables(task, classes=4, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    made = {}
    for role, count in COUNTS.items():
        x = torch.tensor(rng.normal(size=(count, dim)), dtype=torch.float32)
        y = torch.tensor(rng.integers(0, classes, count))
        if task == "multilabel":
            y = torch.tensor((rng.random((count, classes)) < 0.4).astype(np.float32))
        elif task == "segmentation":
            x, y = x[:, None, None].repeat(1, 2, 2, 1), torch.tensor(rng.integers(-1, classes, (count, 4, 4)))
        elif task == "regression":
            y = x[:, 0] * 2 + 5
        made[role] = Table(x=x, y=y)
    return made


def judged(protocol, task, made, classes=4, **options):
    classes = 1 if task == "regression" else classes
    trial = Trial(benchmark="own", task=task, classes=classes, tables=lambda _: made, recipe=RECIPE, **options)
    return run(protocol, trial, ("the only view",)).figures


def changed(made, role, **parts):
    return {**made, role: replace(made[role], **parts)}


def vote(train, labels, query, neighbours=20):
    """Give the weighted share of a label among the nearest, one query after another."""
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train.double().numpy(), query.double().numpy())]
    shares = []
    for cosine in unit[1] @ unit[0].T:
        near = np.argsort(-cosine)[:neighbours]
        weight = np.exp(cosine[near] / 0.07)
        shares.append(weight @ labels[near] / weight.sum())
    return np.array(shares)


def test_samples_of_which_a_label_is_unknown_neither_vote_nor_are_ranked():
    made = tables("multilabel")
    made["train"].y[3, 1], made["train"].y[7] = torch.nan, torch.nan
    made["test"].y[2, 0], made["test"].y[5] = torch.nan, torch.nan
    figures = judged("knn", "multilabel", made)
    kept = made["train"].y.isfinite().all(1)
    shares = vote(made["train"].x[kept], made["train"].y[kept].numpy(), made["test"].x)
    truth = made["test"].y.numpy()
    every = np.isfinite(truth).all(1)
    ranked = average_precision_score(truth[every] > 0.5, shares[every], average="micro")
    assert figures["average_precision"].estimate == pytest.approx(ranked)
    # Of a sample whose other labels are known, these are counted.
    single = [f1_score(truth[k, c] > 0.5, shares[k, c] > 0.5) for c in range(4) for k in [np.isfinite(truth[:, c])]]
    assert figures["macro_f1"].estimate == pytest.approx(np.mean(single))


@pytest.mark.parametrize("protocol", ["linear", "anysat"])
def test_unknown_labels_of_a_test_sample_are_no_mistakes(protocol):
    made = tables("multilabel")
    whole = judged(protocol, "multilabel", changed(made, "test", x=made["test"].x[2:], y=made["test"].y[2:]))
    made["test"].y[:2] = torch.nan
    gaps = judged(protocol, "multilabel", made)
    assert [gaps[f].estimate for f in ("micro_f1", "auroc")] == [whole[f].estimate for f in ("micro_f1", "auroc")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("protocol", "task"), [("knn", "classification"), ("linear", "segmentation"), ("anysat", "regression")]
)
def test_half_precision_is_taken_as_single(protocol, task, dtype):
    made = tables(task)
    half = {role: replace(t, x=t.x.to(dtype)) for role, t in made.items()}
    single = {role: replace(t, x=t.x.float()) for role, t in half.items()}
    assert str(judged(protocol, task, half)) == str(judged(protocol, task, single))


@pytest.mark.parametrize(
    ("protocol", "task"),
    [("knn", "classification"), ("linear", "multilabel"), ("interpolate", "segmentation"), ("anysat", "regression")],
)
@pytest.mark.parametrize(("role", "said"), [("train", "learn from"), ("val", "validate with"), ("test", "test on")])
def test_each_split_must_have_labels(protocol, task, role, said):
    made = tables(task)
    y = made[role].y
    bare = changed(made, role, y=torch.full_like(y, torch.nan if y.is_floating_point() else -1))
    if protocol == "knn" and role == "val":
        # Where there is nothing to choose, nothing is validated.
        assert judged(protocol, task, bare)["accuracy"].estimate == judged(protocol, task, made)["accuracy"].estimate
        return
    with pytest.raises(InputError, match=f"no sample to {said} has a label"):
        judged(protocol, task, bare)


@pytest.mark.parametrize(("protocol", "task"), [("knn", "classification"), ("linear", "segmentation")])
@pytest.mark.parametrize("role", ["train", "test"])
def test_classes_that_there_are_not_are_named(protocol, task, role):
    made = tables(task)
    made[role].y[2] = 255
    with pytest.raises(InputError, match="has class 255, but there are classes 0 to 3 only; recode the labels"):
        judged(protocol, task, made)


@pytest.mark.parametrize("protocol", ["knn", "linear", "anysat"])
def test_samples_with_data_must_have_labels_too(protocol):
    made = tables("classification")
    made["train"].x[:15], made["train"].y[15:] = torch.nan, -1
    with pytest.raises(InputError, match="none of 30 samples to learn from has both data and a label"):
        judged(protocol, "classification", made)


@pytest.mark.parametrize(("samples", "batch"), [(1, 8), (30, 1)])
def test_a_batch_norm_wants_two_samples(samples, batch):
    made = tables("classification")
    made["train"] = made["train"].take(np.arange(samples))
    with pytest.raises(InputError, match="a batch of one sample came"):
        judged("linear", "classification", made, batch=batch)
    # A last one alone is left out.
    made = tables("classification")
    made["train"] = made["train"].take(np.arange(9))
    assert judged("linear", "classification", made)["accuracy"].estimate >= 0
