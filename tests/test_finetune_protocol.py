"""Fine-tuning as the papers do it: schedules, heads and what is averaged, against plain torch."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from panterra.errors import InputError
from panterra.evaluate import metrics
from panterra.evaluate.anysat_protocol import merge_crops, validation_scores
from panterra.evaluate.scoring import FIGURES, sums_of
from panterra.finetune import run, score
from panterra.finetune.arrays import examples_from_arrays
from panterra.finetune.augment import NONE
from panterra.finetune.dealing import classes_of, deal, draw_dates
from panterra.finetune.heads import HeadConfig, build_head
from panterra.finetune.run import Settings, fit
from panterra.finetune.step import Plateau, Tuning
from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.features import Features
from panterra.models.olmoearth import OlmoEarth, OlmoEarthConfig
from panterra.sample import Batch, Observation, collate


@pytest.mark.parametrize(("factor", "patience", "cooldown"), [(0.2, 2, 10), (0.1, 10, 0), (0.5, 0, 1)])
def test_rates_fall_as_torchs_plateau_has_them(factor, patience, cooldown):
    figures = np.random.default_rng(0).normal(0.5, 0.1, 60).round(2).tolist()
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, "max", factor=factor, patience=patience, cooldown=cooldown, eps=0
    )
    ours = Plateau(factor=factor, patience=patience, cooldown=cooldown)
    for n, value in enumerate(figures, start=1):
        theirs.step(value)
        assert ours.share(figures[:n]) == pytest.approx(optimiser.param_groups[0]["lr"])
    assert ours.share([]) == 1.0


def features(rows=3, dim=8):
    torch.manual_seed(1)
    valid = torch.ones(2, rows, rows, dtype=torch.bool)
    valid[0, 0, 0] = False
    patches = torch.randn(2, rows, rows, dim) * valid[..., None]
    return Features(patches=patches, summary=torch.randn(2, dim), valid=valid, patch_m=40)


def head_of(kind, **options):
    return build_head(HeadConfig(kind=kind, **({"dense": True, "dim": 8, "outputs": 5} | options)))


def test_the_decoder_repeats_and_convolves():
    head, given = head_of("nearest", side=4), features()
    assert sum(isinstance(m, nn.Conv2d) for m in head.modules()) == 4
    assert not any(isinstance(m, nn.LayerNorm) for m in head.modules())
    x = given.patches.movedim(-1, 1)
    first, second, third = head.steps
    x = F.relu(first(x))
    for step in (second, third):
        x = F.relu(step(x.repeat_interleave(2, 2).repeat_interleave(2, 3)))
    torch.testing.assert_close(head(given), head.scores(x))
    with pytest.raises(InputError, match="a patch of 6 cells is no power of two"):
        head_of("nearest", side=6)


def test_plain_heads_are_one_linear_map():
    given = features()
    scene = head_of("plain", dense=False)
    torch.testing.assert_close(scene(given), scene.layers(given.summary))
    assert [tuple(p.shape) for p in head_of("plain", side=4).parameters()] == [(80, 8), (80,)]
    smooth = head_of("plain", side=4, outputs=1, smooth=True)
    coarse = smooth.layers(given.patches).movedim(-1, 1)
    wanted = F.interpolate(coarse, size=(12, 12), mode="bilinear", align_corners=True)
    torch.testing.assert_close(smooth(given), wanted)


def test_pooled_heads_leave_out_what_had_no_data():
    given = features()
    seen = given.patches[0].reshape(-1, 8)[1:]
    for kind, pooled in (("mean", seen.mean(0)), ("max", seen.amax(0))):
        head = head_of(kind, dense=False)
        torch.testing.assert_close(head(given)[0], head.layers(pooled))
    mlp = head_of("batch_mlp", dense=False)
    assert [type(layer).__name__ for layer in mlp.layers][:4] == ["LayerNorm", "Linear", "BatchNorm1d", "GELU"]
    assert mlp(given).shape == (2, 5)


# Training


def arrays():
    rng = np.random.default_rng(0)
    targets = np.arange(18) % 3
    pixels = rng.normal(1000, 300, (18, 12, 8, 8)) + 500 * targets[:, None, None, None]
    return examples_from_arrays(
        {"sentinel2_l2a": pixels},
        targets,
        dates={"sentinel2_l2a": ["2023-06-01"]},
        parts=["train"] * 10 + ["val"] * 4 + ["test"] * 4,
    )


ALL = torch.ones(1, 1, 8, 8, dtype=torch.bool)


def arrays_of_dates(count):
    rng = np.random.default_rng(0)
    return examples_from_arrays(
        {"sentinel2_l2a": rng.normal(1000, 300, (8, count, 12, 8, 8))},
        np.arange(8) % 2,
        dates={"sentinel2_l2a": [f"2023-06-{day:02d}" for day in range(1, count + 1)]},
        parts=["train"] * 4 + ["val"] * 2 + ["test"] * 2,
    )


def encoder(drop_path=0.0):
    torch.manual_seed(0)
    config = OlmoEarthConfig(
        dim=32, depth=1, heads=2, position="rope_3d_mixed", pixel_hidden=(8,), convolution=False, drop_path=drop_path
    )
    return OlmoEarth(config, name="small").eval().requires_grad_(False)


PUBLISHED = Tuning(
    epochs=5,
    batch_size=4,
    lr=1e-3,
    encoder_lr=1e-3,
    layer_decay=1.0,
    head_first=1,
    after_head=0.1,
    frozen_drop_path=True,
    weight_decay=0.01,
    decay_all=True,
    schedule=Plateau(factor=0.2, patience=0, cooldown=0),
    clip_norm=None,
    patience=5,
    augmentation=NONE,
)


def test_training_is_the_plain_loop(tmp_path):
    examples = arrays()
    model, state = fit(
        examples, encoder(), tmp_path / "fit", Settings(head="plain", patch_m=40, tuning=PUBLISHED, device="cpu")
    )
    # The same, written down.
    theirs, ours = encoder().train(), nn.Linear(32, 3)
    torch.manual_seed(PUBLISHED.seed)
    ours.load_state_dict(nn.Linear(32, 3).state_dict())
    moving = [p for name, p in theirs.named_parameters() if not name.endswith("encodings.month")]
    optimiser = torch.optim.AdamW([*ours.parameters(), *moving], lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, "max", factor=0.2, patience=0)

    def scores_of(index):
        batch = collate([examples[int(i)].batch for i in index])
        return ours(theirs.encode(batch, patch_m=40).summary), torch.cat([examples[int(i)].target for i in index])

    best, kept = -1.0, None
    for epoch in range(5):
        for p in moving:
            p.requires_grad_(epoch > 0)
        if epoch == 1:
            optimiser.param_groups[0]["lr"] *= 0.1
        theirs.train()
        order = np.random.default_rng([42, epoch]).permutation(examples.of("train"))
        for index in np.split(order, [4, 8]):
            loss = F.cross_entropy(*scores_of(index))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        theirs.eval()
        with torch.no_grad():
            said, truth = scores_of(examples.of("val"))
        counts = np.bincount(truth * 3 + said.argmax(1), minlength=9).reshape(3, 3)
        value = examples.task.figure("macro_f1", counts[None])
        schedule.step(value)
        if value > best:
            best, best_epoch = value, epoch + 1
            kept = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    assert (state.best, state.best_epoch) == (pytest.approx(best), best_epoch)
    for name, p in model.encoder.named_parameters():
        torch.testing.assert_close(p, kept[name], rtol=1e-4, atol=1e-6)


def test_as_published_the_figure_that_decides_is_of_all_epochs(tmp_path):
    # Rates that never fall leave the epochs of a shorter run as they are in a longer one.
    steady = Plateau(factor=0.2, patience=9)
    tuning = replace(PUBLISHED, batch_size=3, schedule=steady, lr=0.3, encoder_lr=0.03, as_published=True)
    totals, states = [np.zeros((3, 3), np.int64)], []
    for epochs in (1, 2, 3, 4):
        settings = Settings(head="plain", tuning=replace(tuning, epochs=epochs, patience=9), device="cpu")
        _, state = fit(arrays(), encoder(), tmp_path / str(epochs), settings)
        totals.append(np.array(state.mixed))
        states.append(state)
    looks = np.diff(totals, axis=0)
    # Of four samples in batches of three the last is left out.
    assert looks.sum((1, 2)).tolist() == [3, 3, 3, 3]
    lines = [json.loads(line) for line in (tmp_path / "4" / "log.jsonl").read_text().splitlines()]
    told = [line["val/macro_f1"] for line in lines if "val/macro_f1" in line]
    assert told == pytest.approx(validation_scores(looks, metrics.macro_f1))
    mixed = validation_scores(looks, metrics.macro_f1, published=True)
    assert mixed != told
    assert [state.best for state in states] == pytest.approx(np.maximum.accumulate(mixed))
    assert states[-1].best_epoch == 1 + int(np.argmax(mixed))


def test_as_published_what_stands_for_masked_pixels_learns(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.normal(1000, 300, (12, 2, 12, 4, 4))
    seen = rng.random((12, 2, 4, 4)) > 0.3
    shown = examples_from_arrays(
        {"sentinel2_l2a": pixels},
        np.arange(12) % 2,
        dates={"sentinel2_l2a": ["2023-06-01", "2023-08-01"]},
        valid={"sentinel2_l2a": seen},
        parts=["train"] * 6 + ["val"] * 3 + ["test"] * 3,
    )
    for published in (False, True):
        torch.manual_seed(0)
        given = AnySat(AnySatConfig(dim=32, depth=1, heads=2), name="any", missing="published")
        tuning = replace(PUBLISHED, epochs=1, head_first=0, method="projector", as_published=published)
        model, _ = fit(shown, given, tmp_path / str(published), Settings(patch_m=20, tuning=tuning, device="cpu"))
        pads = {name: float(p.detach()) for name, p in model.encoder.named_parameters() if name.endswith(".pad")}
        assert {name for name, value in pads.items() if value} == ({"projectors.s2.pad"} if published else set())


def test_a_training_sample_shows_some_of_its_dates():
    shown = arrays_of_dates(10)[0]
    still = Observation(pixels=torch.ones(1, 1, 3, 8, 8), dates=torch.zeros(1, 1, dtype=torch.int64), valid=ALL)
    sample = replace(shown, batch=Batch(observations={**shown.batch.observations, "spot": still}))
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(300):
        drawn = draw_dates(sample, generator, shares={"sentinel2_l2a": 0.7}, most=None).batch.observations
        assert drawn["spot"] is still
        o = drawn["sentinel2_l2a"]
        assert o.dates[0].tolist() == sorted(set(o.dates[0].tolist()))
        for k, day in enumerate(o.dates[0]):
            before = shown.batch.observations["sentinel2_l2a"]
            assert torch.equal(o.pixels[0, k], before.pixels[0, int((before.dates[0] == day).nonzero())])
        seen += o.dates[0].tolist()
    counts = np.unique(seen, return_counts=True)[1]
    assert counts.sum() == 300 * 7
    assert (np.abs(counts - 210) < 4 * np.sqrt(300 * 0.7 * 0.3)).all()
    sizes = [
        draw_dates(arrays_of_dates(n)[0], generator, shares={"sentinel2_l2a": share}, most=most)
        .batch.observations["sentinel2_l2a"]
        .pixels.shape[1]
        for n, share, most in ((1, 0.3, None), (9, 0.5, None), (30, 1.0, 20), (12, 1.0, 20), (10, 0.3, None))
    ]
    assert sizes == [1, 4, 20, 12, 3]


def test_dates_are_left_out_in_training_alone(tmp_path, monkeypatch):
    seen = {"run": set(), "score": set()}
    for name, module in (("run", run), ("score", score)):

        def joined(batches, name=name):
            seen[name] |= {b.observations["sentinel2_l2a"].pixels.shape[1] for b in batches}
            return collate(batches)

        monkeypatch.setattr(module, "collate", joined)
    tuning = replace(PUBLISHED, epochs=1, most_dates=2)
    fit(arrays_of_dates(5), encoder(), tmp_path / "fit", Settings(head="plain", tuning=tuning, device="cpu"))
    assert seen == {"run": {2}, "score": {5}}
    for wrong in ({"date_shares": {"sentinel1": 0.0}}, {"most_dates": 0}, {"draw": "all"}):
        with pytest.raises(InputError):
            replace(PUBLISHED, **wrong)


def test_classes_are_drawn_by_the_root_of_their_frequency(tmp_path):
    train, classes = np.arange(5, 105), np.repeat([3, 7], [90, 10])
    rng = np.random.default_rng(0)
    drawn = np.concatenate([deal(train, rng, classes=classes) for _ in range(200)])
    times = np.bincount(drawn, minlength=105)[5:]
    share = 90**0.5 / (90**0.5 + 10**0.5)
    assert times[:90].sum() / len(drawn) == pytest.approx(share, abs=0.015)
    assert times[:90].std() == pytest.approx(times[:90].mean() ** 0.5, rel=0.3)  # all of a class alike
    assert sorted(deal(train, rng)) == train.tolist()
    examples = arrays()
    assert classes_of(examples).tolist() == [i % 3 for i in range(10)]
    tuning = replace(PUBLISHED, epochs=2, draw="root")
    models = [
        fit(examples, encoder(), tmp_path / t.draw, Settings(head="plain", tuning=t, device="cpu"))[0]
        for t in (tuning, replace(tuning, draw="each"))
    ]
    assert not torch.equal(*(m.head.layers.weight for m in models))


def test_parts_of_a_batch_make_the_same_step(tmp_path):

    tuning = replace(PUBLISHED, epochs=2, batch_size=10, clip_norm=None)
    found = []
    for parts in (1, 2):
        model, _ = fit(
            arrays(),
            encoder(),
            tmp_path / str(parts),
            Settings(head="plain", patch_m=40, tuning=replace(tuning, accumulate=parts), device="cpu"),
        )
        found.append(model.head.layers.weight)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_batch_norm_remembers_over_a_stop(tmp_path):

    tuning = replace(PUBLISHED, epochs=3, drop_last=True, schedule="epoch_cosine")
    call = {"head": "batch_mlp", "patch_m": 40, "tuning": tuning, "device": "cpu"}
    whole, _ = fit(arrays(), encoder(), tmp_path / "whole", Settings(**call))
    seen = []

    def stop(done, total, rate):
        seen.append((done, total))
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(arrays(), encoder(), tmp_path / "stopped", Settings(**call), progress=stop)
    again, _ = fit(arrays(), encoder(), tmp_path / "stopped", Settings(**call))
    # Ten samples in batches of four make two steps, the rest is left out.
    assert seen[-1] == (5, 6)
    for name, value in whole.head.state_dict().items():
        torch.testing.assert_close(again.head.state_dict()[name], value, rtol=0, atol=0)
    assert int(again.head.layers[2].num_batches_tracked) > 0


# Scores


def test_overlapping_crops_say_what_the_published_sum_says():
    torch.manual_seed(0)
    places = ((0, 0), (0, 2), (2, 0), (2, 2), (1, 1))
    outputs = torch.randn(5, 3, 8, 8)
    merged = merge_crops(outputs, places, 10)
    total = torch.zeros(3, 10, 10)
    for crop, (row, col) in zip(outputs, places, strict=True):
        total[:, row : row + 8, col : col + 8] += crop
    assert (merged.argmax(0) == total.argmax(0)).all()
    torch.testing.assert_close(merged[:, 0, 0], outputs[0, :, 0, 0])
    torch.testing.assert_close(
        merged[:, 5, 5], torch.stack([o[:, 5 - r, 5 - c] for o, (r, c) in zip(outputs, places, strict=True)]).mean(0)
    )


def test_weighted_f1_and_iou_but_the_last_class():
    from sklearn.metrics import f1_score, jaccard_score

    rng = np.random.default_rng(0)
    truth, said = rng.random((40, 4)) > 0.6, rng.random((40, 4)) > 0.5
    sums = sums_of("multilabel", said, truth.astype(np.float32), classes=4).sum(0)
    assert FIGURES["multilabel"]["weighted_f1"](sums) == pytest.approx(f1_score(truth, said, average="weighted"))
    codes, guesses = rng.integers(0, 4, (1, 500)), rng.integers(0, 4, (1, 500))
    counts = sums_of("segmentation", guesses, codes, classes=4).sum(0)
    kept = (codes < 3) & (guesses < 3)
    wanted = jaccard_score(codes[kept], guesses[kept], average="macro")
    assert FIGURES["segmentation"]["iou_but_last"](counts) == pytest.approx(wanted)


@pytest.mark.parametrize(("part", "said"), [("train", "training samples hold no label"), ("val", "validation samples")])
def test_without_labels_nothing_is_learned_nor_chosen(tmp_path, part, said):
    examples = arrays()
    read = examples.read

    def unlabelled(number):
        sample = read(number)
        return replace(sample, target=torch.full_like(sample.target, -1)) if examples.parts[number] == part else sample

    with pytest.raises(InputError, match=said):
        fit(
            replace(examples, read=unlabelled),
            encoder(),
            tmp_path / "fit",
            Settings(head="plain", patch_m=40, tuning=PUBLISHED, device="cpu"),
        )
