import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier

from panterra.errors import InputError
from panterra.evaluate.probes import FeatureSource, ProbeClass, fit, fit_probe, knn_scores, load_probe, regression
from panterra.evaluate.probes.probe import score
from panterra.evaluate.splits import split_by_group

GOLDEN = Path(__file__).parent / "golden" / "olmoearth"


def made_up(num=240, dim=12, classes=4, seed=0):
    """Features of overlapping classes, on badly unequal scales, in twelve groups."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, num)
    features = rng.normal(size=(classes, dim))[targets] + 1.5 * rng.normal(size=(num, dim))
    mixed = features @ rng.normal(size=(dim, dim)) * np.logspace(-2, 3, dim) + 50
    return mixed.astype(np.float32), targets, np.arange(num) % 12


def train_set(features, fold, f):
    """Standardise a fold's training data as a probe does inside."""
    rows = features.astype(np.float64)
    part = rows[fold != f]
    return (rows - part.mean(0)) / part.std(0)


@pytest.fixture(scope="module")
def recorded():
    data = load_file(GOLDEN / "eval_cases.safetensors")
    return {name.removeprefix("knn/"): torch.tensor(t) for name, t in data.items() if name.startswith("knn/")}


@pytest.mark.parametrize("k", [1, 5, 20])
def test_recorded_knn(recorded, k):
    answers = torch.nn.functional.one_hot(recorded["train_labels"]).float()
    scores = knn_scores(recorded["train"], answers, recorded["test"], neighbours=k)
    np.testing.assert_allclose(scores, recorded[f"scores_k{k}"], rtol=1e-6, atol=1e-7)
    assert scores.argmax(1).equal(recorded[f"pred_k{k}"])

    accuracy = json.loads((GOLDEN / "eval_cases.json").read_text())["knn"][f"accuracy_k{k}"]
    probe, _ = fit_probe(recorded["train"], recorded["train_labels"], kind="knn", neighbours=k, split="random")
    assert probe.predict(recorded["test"]).equal(recorded[f"pred_k{k}"])
    np.testing.assert_allclose(probe.probabilities(recorded["test"]), recorded[f"scores_k{k}"], rtol=1e-5, atol=1e-6)
    found = probe.predict(recorded["test"]) == recorded["test_labels"]
    assert found.float().mean().item() == pytest.approx(accuracy)


def test_recorded_knn_of_a_set_against_itself(recorded):
    answers = torch.nn.functional.one_hot(recorded["train_labels"]).float()
    scores = knn_scores(recorded["train"], answers, recorded["train"], skip_first=True)
    assert scores.argmax(1).equal(recorded["pred_skip_k20_train_vs_train"])


def test_knn_agrees_with_scikit_learn():
    features, targets, _ = made_up()
    probe, _ = fit_probe(features[:200], targets[:200], kind="knn", neighbours=7, split="random")
    oracle = KNeighborsClassifier(7, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    oracle.fit(features[:200], targets[:200])
    np.testing.assert_array_equal(probe.predict(features[200:]), oracle.predict(features[200:]))
    np.testing.assert_allclose(probe.probabilities(features[200:]), oracle.predict_proba(features[200:]), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_knn_of_half_precision_votes_in_single(dtype):
    """exp(1 / 0.07) is beyond the numbers of float16."""
    examples = torch.tensor(np.random.default_rng(0).normal(3, 1, (30, 8))).to(dtype)
    labels = torch.nn.functional.one_hot(torch.arange(30) % 3).to(dtype)
    shares = knn_scores(examples, labels, examples[:5])
    torch.testing.assert_close(shares, knn_scores(examples.float(), labels.float(), examples[:5].float()))
    assert shares.isfinite().all()


def test_knn_of_several_labels_scores_each_alone():
    rng = np.random.default_rng(1)
    examples, queries = torch.tensor(rng.normal(size=(50, 6))), torch.tensor(rng.normal(size=(9, 6)))
    several = torch.tensor(rng.random((50, 3)) < 0.4).double()
    together = knn_scores(examples, several, queries, neighbours=5)
    for k in range(3):
        binary = torch.stack([1 - several[:, k], several[:, k]], dim=1)
        np.testing.assert_allclose(together[:, k], knn_scores(examples, binary, queries, neighbours=5)[:, 1])


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("num", [240, 40])
def test_the_sweep_agrees_with_scikit_learn_on_every_member(classes, num, monkeypatch):
    """More samples than features, and fewer; both solvers go on to the end."""
    monkeypatch.setattr(regression, "_EXCESS", 1e-12)
    monkeypatch.setattr(regression, "_STEEP", 1e-8)
    features, targets, groups = made_up(num, dim=60, classes=classes)
    fold = split_by_group(groups, targets, folds=3)
    strengths = (0.1, 10.0, 500.0)
    x, label = torch.tensor(features, dtype=torch.float64), torch.tensor(targets)
    train = torch.tensor(fold != np.arange(3)[:, None])
    members, settled = fit._fit("logistic", x, torch.zeros(num, classes), label, train, strengths)
    assert settled
    for f in range(3):
        z = train_set(features, fold, f)
        for strength, tensors in zip(strengths, members[f], strict=True):
            # With two classes scikit-learn's single vector is the difference of our two.
            penalty = strength * (0.5 if classes == 2 else 1)
            oracle = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10000)
            oracle.fit(z[fold != f], targets[fold != f])
            ours = score("logistic", "classes", tensors, x, 0).numpy()
            np.testing.assert_allclose(ours, oracle.predict_proba(z), atol=1e-5)


@pytest.mark.parametrize("weights", ["balanced", {"0": 3.0, "2": 0.5}])
def test_classes_that_count_more_do_as_in_scikit_learn(weights):
    features, targets, groups = made_up()
    # A rare class, which the plain probe neglects.
    kept = (targets != 1) | (np.arange(len(targets)) % 5 == 0)
    features, targets, groups = features[kept], targets[kept], groups[kept]
    options = {"groups": groups, "folds": 3, "strengths": (1.0,)}
    probe, report = fit_probe(features, targets, class_weights=weights, **options)
    z = train_set(features, np.zeros(len(targets)), 1)
    known = weights if weights == "balanced" else {int(name): w for name, w in weights.items()}
    oracle = LogisticRegression(C=1.0, tol=1e-10, max_iter=10000, class_weight=known).fit(z, targets)
    np.testing.assert_allclose(probe.probabilities(features), oracle.predict_proba(z), atol=1e-3)
    if weights == "balanced":
        wanted = len(targets) / (4 * np.bincount(targets))
        assert report.class_weights == pytest.approx(tuple(wanted), rel=1e-5)
        _, plain = fit_probe(features, targets, **options)
        assert plain.class_weights == ()
        assert report.metrics["macro_accuracy"].estimate > plain.metrics["macro_accuracy"].estimate
    else:
        assert report.class_weights == (3.0, 1.0, 0.5, 1.0)
    for f in range(3):
        held = report.folds == f
        alone, _ = fit_probe(
            features[~held], targets[~held], class_weights=weights, groups=groups[~held], folds=2, strengths=(1.0,)
        )
        np.testing.assert_array_equal(report.predictions[held], alone.predict(features[held]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"class_weights": "even"}, "class_weights is 'even'; wanted none, balanced or weights"),
        ({"class_weights": "balanced", "kind": "ridge"}, "for logistic probes, not for ridge"),
        ({"class_weights": {"corn": 2.0}}, "a weight came for 'corn'; the classes are 0, 1, 2, 3"),
        ({"class_weights": {"1": 0.0}}, "a class weight is 0; wanted more than 0"),
    ],
)
def test_class_weights_that_make_no_sense_are_refused(options, said):
    features, targets, groups = made_up()
    with pytest.raises(InputError, match=said):
        fit_probe(features, targets, groups=groups, **options)


def test_solving_together_is_solving_alone():
    features, targets, groups = made_up(dim=20)
    fold = split_by_group(groups, targets, folds=4)
    x, label = torch.tensor(features, dtype=torch.float64), torch.tensor(targets)
    train = torch.tensor(fold != np.arange(4)[:, None])
    answers = torch.zeros(len(x), 4)
    together, _ = fit._fit("logistic", x, answers, label, train, (0.1, 1.0, 100.0))
    for f in range(4):
        for s, strength in enumerate((0.1, 1.0, 100.0)):
            alone, _ = fit._fit("logistic", x, answers, label, train[f : f + 1], (strength,))
            np.testing.assert_allclose(alone[0][0]["weight"], together[f][s]["weight"], rtol=1e-2, atol=1e-3)


def test_an_optimisation_cut_short_is_reported(monkeypatch):
    monkeypatch.setattr(regression, "_ITERATIONS", 2)
    features, targets, groups = made_up()
    assert not fit_probe(features, targets, groups=groups)[1].converged


@pytest.mark.parametrize("num", [240, 40])
def test_ridge_agrees_with_scikit_learn(num):
    features, targets, groups = made_up(num, dim=60)
    values = features[:, 3] * 0.1 + targets
    z = train_set(features, np.zeros(num), 1)
    probe, report = fit_probe(features, values, kind="ridge", task="values", groups=groups, folds=3)
    oracle = Ridge(alpha=report.strength).fit(z, values)
    np.testing.assert_allclose(probe.predict(features), oracle.predict(z), rtol=1e-3, atol=1e-3)

    probe, report = fit_probe(features, targets, kind="ridge", groups=groups, folds=3)
    oracle = RidgeClassifier(alpha=report.strength).fit(z, targets)
    np.testing.assert_array_equal(probe.predict(features), oracle.predict(z))
    np.testing.assert_allclose(probe.probabilities(features).sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("kind", ["logistic", "ridge", "knn"])
def test_the_report_is_of_predictions_for_unseen_groups(kind):
    """Recompute each out-of-fold prediction with a probe that never saw the fold."""
    features, targets, groups = made_up()
    options = {"kind": kind, "folds": 4}
    _, report = fit_probe(features, targets, groups=groups, **options, strengths=(10.0,))
    for f in range(4):
        held = report.folds == f
        assert not set(groups[held]) & set(groups[~held])
        alone, _ = fit_probe(features[~held], targets[~held], groups=groups[~held], **options, strengths=(10.0,))
        np.testing.assert_array_equal(report.predictions[held], alone.predict(features[held]))
    right = (report.predictions == targets).mean()
    accuracy = report.metrics["accuracy"]
    assert accuracy.estimate == pytest.approx(right)
    assert accuracy.low < right < accuracy.high
    assert np.trace(report.confusion) == round(right * 240)
    assert [c.support for c in report.classes] == np.bincount(targets).tolist()


def test_noise_scores_chance_though_the_strength_is_chosen():
    """Picking the best of nine strengths must not lift the score of features that say nothing."""
    rng = np.random.default_rng(5)
    scores = []
    for _ in range(12):
        targets = rng.integers(0, 2, 120)
        report = fit_probe(rng.normal(size=(120, 10)), targets, groups=np.arange(120) // 6, resamples=2)[1]
        scores.append(report.metrics["accuracy"].estimate)
    assert np.mean(scores) == pytest.approx(0.5, abs=0.04)


def test_a_random_split_flatters_where_neighbours_are_alike():
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(40), 10)
    features = rng.normal(size=(40, 30))[groups] + 0.1 * rng.normal(size=(400, 30))
    targets = rng.integers(0, 2, 40)[groups]
    blocks = fit_probe(features, targets, groups=groups, kind="knn", neighbours=3)[1]
    random = fit_probe(features, targets, split="random", kind="knn", neighbours=3)[1]
    assert random.metrics["accuracy"].estimate > 0.95
    assert blocks.metrics["accuracy"].estimate < 0.75
    assert (blocks.split, blocks.num_groups, random.split, random.num_groups) == ("blocks", 40, "random", 400)


def test_values_are_reported_in_their_unit():
    features, _, groups = made_up()
    values = 1000 + features[:, 0].astype(np.float64) * 30
    probe, report = fit_probe(features, values, kind="ridge", task="values", groups=groups)
    assert report.metrics["r2"].estimate > 0.99
    assert report.metrics["rmse"].estimate == pytest.approx(np.sqrt(np.mean((report.predictions - values) ** 2)))
    near, _ = fit_probe(features, values, kind="knn", task="values", groups=groups, neighbours=1)
    np.testing.assert_allclose(near.predict(features), values, rtol=1e-5)
    with pytest.raises(InputError, match="no class probabilities"):
        probe.probabilities(features)


def test_predictions_are_the_codes_of_the_targets():
    features, targets, groups = made_up()
    codes = np.array([10, 20, 95, 200])[targets]
    names = {10: "trees", 20: "shrub", 95: "mangrove", 200: "sea"}
    probe, report = fit_probe(features, codes, groups=groups, names=names, colours={10: (0, 100, 0)})
    assert probe.classes[0] == ProbeClass(name="trees", code=10, colour=(0, 100, 0))
    assert set(probe.predict(features)) <= set(names)
    assert set(report.predictions) <= set(names)
    assert [c.name for c in report.classes] == list(names.values())


@pytest.mark.parametrize("kind", ["logistic", "ridge", "knn"])
def test_any_shape_in_parts_of_any_size_and_either_library(kind, monkeypatch):
    features, targets, groups = made_up()
    probe, _ = fit_probe(features, targets, groups=groups, kind=kind)
    whole = probe.probabilities(features)
    monkeypatch.setattr("panterra.evaluate.probes.probe._ROWS", 7)
    grid = torch.tensor(features).reshape(2, 8, 15, -1)
    np.testing.assert_allclose(probe.probabilities(grid).reshape(240, -1).numpy(), whole, rtol=1e-5, atol=1e-6)
    assert probe.predict(grid).shape == (2, 8, 15)
    assert isinstance(probe.predict(grid), torch.Tensor)
    assert isinstance(probe.predict(features), np.ndarray)
    assert probe.predict(features).dtype == np.int64
    assert probe.predict(features[:0]).shape == (0,)
    assert int(probe.predict(features[3])) == probe.predict(features)[3]
    half = probe.probabilities(torch.tensor(features).to(torch.bfloat16))
    assert half.dtype == torch.float32


@pytest.mark.parametrize("kind", ["logistic", "ridge", "knn"])
def test_a_saved_probe_predicts_the_same(kind, tmp_path):
    features, targets, groups = made_up()
    source = FeatureSource(encoder="olmoearth-v1.2-nano", patch_m=40, modalities=("sentinel2_l2a",), window_px=64)
    probe, report = fit_probe(features, targets, groups=groups, kind=kind, names="abcd", block_m=500.0, source=source)
    assert probe.save(tmp_path / "new" / "probe") == tmp_path / "new" / "probe"
    back = load_probe(tmp_path / "new" / "probe")
    np.testing.assert_array_equal(back.probabilities(features), probe.probabilities(features))
    assert (back.classes, back.source, back.kind, back.neighbours) == (probe.classes, source, kind, 20)
    assert back.summary == report.as_dict()
    config = json.loads((tmp_path / "new" / "probe" / "config.json").read_text())
    assert config["classes"][1] == {"name": "b", "code": 1, "colour": None}
    assert {"encoder": "olmoearth-v1.2-nano", "patch_m": 40, "window_px": 64}.items() <= config.items()
    assert config["report"]["block_m"] == 500
    assert config["panterra"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["probe"]


def test_saving_again_replaces_a_probe_but_nothing_else(tmp_path):
    features, targets, groups = made_up()
    first, _ = fit_probe(features, targets, groups=groups, kind="ridge")
    second, _ = fit_probe(features, targets, groups=groups, kind="knn")
    first.save(tmp_path / "probe")
    before = (tmp_path / "probe" / "model.safetensors").read_bytes()
    first.save(tmp_path / "probe")
    assert (tmp_path / "probe" / "model.safetensors").read_bytes() == before
    second.save(tmp_path / "probe")
    assert load_probe(tmp_path / "probe").kind == "knn"
    (tmp_path / "probe" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is more than a probe; choose another name"):
        first.save(tmp_path / "probe")
    assert load_probe(tmp_path / "probe").kind == "knn"


def test_a_save_that_fails_leaves_nothing(tmp_path):
    features, targets, groups = made_up()
    probe, _ = fit_probe(features, targets, groups=groups, kind="ridge")
    with pytest.raises(TypeError):
        replace(probe, summary={"bad": {1, 2}}).save(tmp_path / "probe")
    assert not list(tmp_path.iterdir())


def drop(name):
    return lambda folder: (folder / name).unlink()


def rewrite(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:100])


def forget(key):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        del config[key]
        (folder / "config.json").write_text(json.dumps(config))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("config.json"), "is not a saved probe: config.json missing"),
        (drop("model.safetensors"), "is not a saved probe: model.safetensors missing"),
        (truncate("config.json"), "damaged probe"),
        (truncate("model.safetensors"), "damaged probe"),
        (rewrite(kind="forest"), "unknown kind 'forest'"),
        (rewrite(kind="knn"), "instead of \\['answers', 'examples'\\]"),
        (rewrite(dim=13), "mean is not finite float32 \\[13\\]"),
        (rewrite(classes=[]), "weight is not finite float32 \\[12, 0\\]|bias is not finite float32 \\[0\\]"),
        (rewrite(classes=[{"name": "a"}]), "no 'code'"),
        (rewrite(encoder="x"), "damaged probe"),
        (forget("classes"), "no 'classes'"),
    ],
)
def test_a_damaged_folder_gives_one_line(damage, message, tmp_path):
    features, targets, groups = made_up()
    folder = fit_probe(features, targets, groups=groups, kind="ridge")[0].save(tmp_path / "probe")
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_probe(folder)
    assert "\n" not in str(caught.value)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(InputError, match=r"is not a saved probe: config\.json and model\.safetensors missing"):
        load_probe(tmp_path / "nowhere")


def spoil(features):
    features[[3, 8, 8], [1, 2, 3]] = np.nan
    return features


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (spoil(x), y, {}), "2 of 240 feature rows hold NaN or infinity"),
        (lambda x, y: (x, y * 0, {"names": ["oats"]}), "all 240 targets are class 'oats'; a probe needs two classes"),
        (lambda x, y: (x[:3], np.arange(3) % 2, {}), "3 samples in 3 groups cannot make 5 parts"),
        (lambda x, y: (x, y, {"kind": "knn", "neighbours": 250}), "250 neighbours were asked for among 200 samples"),
        (lambda x, y: (x, y, {"kind": "knn", "neighbours": 0}), "0 neighbours were asked for among 200 samples"),
        (lambda x, y: (x, y, {"kind": "forest"}), "'forest' is none of logistic, ridge, knn"),
        (lambda x, y: (x, y, {"names": ["a", "b", "c"]}), "codes \\[3\\] that have no name among the 3 given"),
        (lambda x, y: (x, y, {"names": "abcde"}), "no sample of class 'e' came; drop its name"),
        (lambda x, y: (x, y, {"names": "abca"}), "names are not distinct"),
        (lambda x, y: (x, y[:9], {}), "targets are \\[9\\]; wanted \\[240\\]"),
        (lambda x, y: (x, y.astype(str), {}), "targets are not class codes"),
        (lambda x, y: (x, y - 1, {}), "wanted integers from 0"),
        (lambda x, y: (x, y + 0.5, {}), "targets are not class codes"),
        (lambda x, y: (x[0], y, {}), "features are \\[12\\]; wanted one row per sample"),
        (lambda x, y: (x, y, {"groups": None}), "no groups came for a split by blocks; give groups=spatial_blocks"),
        (lambda x, y: (x, y, {"groups": np.arange(3)}), "groups are \\[3\\]; wanted \\[240\\]"),
        (
            lambda x, y: (x, y, {"groups": y, "folds": 2, "names": ["oats", "rye", "hay", "fen"]}),
            "class 'oats', 'rye', 'hay', 'fen'",
        ),
        (lambda x, y: (x, y, {"strengths": (0.0, 1.0)}), "wanted one or more, all above 0"),
        (lambda x, y: (x, y, {"task": "values"}), "logistic probes know classes only"),
        (lambda x, y: (x, y * np.nan, {"task": "values", "kind": "ridge"}), "targets are not finite numbers"),
        (lambda x, y: (x, y * 0 + 3, {"task": "values", "kind": "ridge"}), "all 240 targets are 3"),
    ],
)
def test_unusable_input_says_what_to_do(change, message):
    features, targets, groups = made_up()
    features, targets, options = change(features, targets)
    options = {"groups": groups[: len(features)], **options}
    with pytest.raises(InputError, match=message):
        fit_probe(features, targets, **options)


def test_features_of_another_encoder_and_gaps_are_refused():
    features, targets, groups = made_up()
    probe, _ = fit_probe(features, targets, groups=groups, kind="ridge")
    with pytest.raises(InputError, match=r"features are \[240, 11\]; this probe wants \[\.\.\., 12\]"):
        probe.predict(features[:, :11])
    with pytest.raises(InputError, match="NaN or infinity; predict only where there is data"):
        probe.predict(spoil(features))


def test_a_constant_feature_changes_nothing():
    features, targets, groups = made_up()
    padded = np.concatenate([features, np.full((240, 1), 1e5, np.float32)], axis=1)
    one, other = (fit_probe(x, targets, groups=groups)[0].probabilities(x) for x in (features, padded))
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_the_report_is_plain_json():
    features, targets, groups = made_up()
    report = fit_probe(features, targets, groups=groups, block_m=1000.0)[1]
    plain = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert plain == report.as_dict()
    assert plain["metrics"]["accuracy"].keys() == {"estimate", "low", "high", "std"}
    assert (plain["num_samples"], plain["num_groups"], sum(plain["fold_sizes"])) == (240, 12, 240)
    assert plain["strength"] in plain["strengths"]
