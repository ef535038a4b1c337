import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from panterra.errors import InputError
from panterra.models.packed import Packed
from panterra.models.predictor import Chosen
from panterra.objectives.losses import (
    LOSSES,
    Pair,
    adjusted_patch_discrimination,
    all_discrimination,
    class_cross_entropy,
    cosine_similarity,
    distance,
    info_nce,
    join,
    koleo,
    pair_up,
    patch_discrimination,
    regularise,
    token_loss,
)

SIZES = {"sentinel2_l2a": 12, "sentinel1": 7, "worldcover": 9}


def draw(seed: int, *, batch: int = 5, dim: int = 6, share: float = 0.5) -> tuple[torch.Tensor, ...]:
    """Predictions, targets of which many are alike, and which tokens are decoded."""
    g = torch.Generator().manual_seed(seed)
    total = sum(SIZES.values())
    predicted = torch.randn(batch, total, dim, generator=g)
    target = torch.randn(batch, total, dim, generator=g)
    kinds = torch.randn(3, dim, generator=g)
    alike = torch.rand(batch, total, generator=g) < 0.6
    target[alike] = kinds[torch.randint(3, (int(alike.sum()),), generator=g)]
    wanted = torch.rand(batch, total, generator=g) < share
    wanted[0, :] = False
    wanted[1, :12] = False
    wanted[1, 3] = True
    wanted[2, 19:], target[2, 19:] = True, kinds[0]
    return predicted, target, wanted


def pairs_of(predicted, target, wanted):
    chosen = Chosen.of(wanted)
    return pair_up(chosen.take(predicted), chosen.take(target), chosen, SIZES)


def by_hand(predicted, target, *, temperature=0.1, same_target=None):
    """One sample's patch discrimination as the paper writes it; None where the sample is skipped."""
    p, t = F.normalize(predicted, dim=-1), F.normalize(target, dim=-1)
    losses = []
    for j in range(len(p)):
        others = [i for i in range(len(p)) if i != j]
        if same_target is not None and len(p) > 1:
            others = [i for i in others if float(t[j] @ t[i]) <= same_target]
            if not others:
                return None
        logits = torch.stack([p[j] @ t[i] / temperature for i in [j, *others]])
        losses.append(-logits.log_softmax(0)[0] * 2 * temperature)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("same_target", [None, 0.999])
@pytest.mark.parametrize("seed", range(6))
def test_patch_discrimination_is_that_of_sample_after_sample(seed, same_target):
    predicted, target, wanted = draw(seed)
    for name, rows in zip(SIZES, torch.arange(28).split(list(SIZES.values())), strict=True):
        losses = []
        for p, t, w in zip(predicted[:, rows], target[:, rows], wanted[:, rows], strict=True):
            if w.any():
                losses.append(by_hand(p[w], t[w], same_target=same_target))
        kept = [loss for loss in losses if loss is not None]
        expected = torch.stack(kept).mean() if kept else torch.tensor(0.0)
        got = patch_discrimination(pairs_of(predicted, target, wanted)[name], same_target=same_target)
        torch.testing.assert_close(got, expected)


def test_all_modalities_together_are_one_long_row():
    predicted, target, wanted = draw(1)
    whole = Pair(predicted=predicted, target=target, valid=wanted)
    joined = join(pairs_of(predicted, target, wanted))
    torch.testing.assert_close(patch_discrimination(joined), patch_discrimination(whole))
    torch.testing.assert_close(all_discrimination(joined), all_discrimination(whole))


def adjusted_by_hand(predicted, target, *, tau, mu, sigma):
    p, t = F.normalize(predicted, dim=-1), F.normalize(target, dim=-1)
    losses = []
    for j in range(len(p)):
        cosines = [float(p[j] @ t[i]) for i in range(len(p)) if i != j]
        weights = [math.exp(-((c - mu) ** 2) / (2 * sigma**2)) for c in cosines]
        mean = sum(weights) / max(len(weights), 1)
        rest = [math.exp(c * w / mean / tau) for c, w in zip(cosines, weights, strict=True)]
        own = math.exp(float(p[j] @ t[j]) / tau)
        losses.append(-math.log(own / (own + sum(rest))) * 2 * tau)
    return sum(losses) / len(losses)


def test_weights_of_negatives_are_those_of_the_options():
    predicted, target, wanted = draw(8)
    losses = [
        adjusted_by_hand(p[w], t[w], tau=0.3, mu=0.2, sigma=0.5)
        for p, t, w in zip(predicted, target, wanted, strict=True)
        if w.any()
    ]
    config = {"type": "adjusted_patch_discrimination", "tau": 0.3, "mu": 0.2, "sigma": 0.5, "weight": 2.0}
    (got,) = token_loss(pairs_of(predicted, target, wanted), config).values()
    assert float(got) == pytest.approx(2 * sum(losses) / len(losses), rel=1e-4)


def test_negatives_of_the_whole_batch_count_by_sample():
    predicted, target, wanted = draw(9)
    p, t = F.normalize(predicted[wanted], dim=-1), F.normalize(target[wanted], dim=-1)
    losses = -(p @ t.T / 0.2).log_softmax(1).diagonal() * 2 * 0.2
    each = [part.mean() for part in losses.split(wanted.sum(1).tolist()) if len(part)]
    (got,) = token_loss(pairs_of(predicted, target, wanted), {"type": "all_discrimination", "tau": 0.2}).values()
    torch.testing.assert_close(got, torch.stack(each).sum() / len(wanted))


def standardised_by_hand(predicted, wanted, sizes):
    """Predictions of each group of tokens with zero mean and unit variance per dimension over those to decode."""
    parts = []
    for x, w in zip(predicted.split(sizes, 1), wanted.split(sizes, 1), strict=True):
        chosen = x[w]
        parts.append((x - chosen.mean(0)) / (chosen.std(0) + 1e-4))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", [name for name in LOSSES if "discrimination" in name])
def test_predictions_are_standardised_where_the_options_say_so(name):
    predicted, target, wanted = draw(10)
    sizes = list(SIZES.values()) if name.startswith("modality") else [sum(SIZES.values())]
    before = pairs_of(standardised_by_hand(predicted, wanted, sizes), target, wanted)
    expected = sum(token_loss(before, {"type": name}).values())
    got = sum(token_loss(pairs_of(predicted, target, wanted), {"type": name, "pred2unit": True}).values())
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("wanted", [[], [0], [0, 1]])
def test_standardising_what_does_not_vary_keeps_numbers_finite(wanted):
    predicted, valid = torch.ones(1, 2, 3, requires_grad=True), torch.zeros(1, 2, dtype=torch.bool)
    valid[0, wanted] = True
    pair = Pair(predicted=predicted, target=torch.eye(2, 3)[None], valid=valid)
    loss = patch_discrimination(pair, pred2unit=True)
    loss.backward()
    assert loss.isfinite()
    assert predicted.grad.isfinite().all()


def test_a_token_that_is_found_for_sure_costs_nothing():
    x = torch.eye(4)[None] * 5
    pair = Pair(predicted=x, target=x, valid=torch.ones(1, 4, dtype=torch.bool))
    assert patch_discrimination(pair, temperature=0.01) == pytest.approx(0, abs=1e-6)
    assert adjusted_patch_discrimination(pair, temperature=0.01) == pytest.approx(0, abs=1e-6)


def test_blind_guessing_costs_the_logarithm_of_the_number_of_tokens():
    pair = Pair(
        predicted=torch.ones(2, 8, 3), target=torch.ones(2, 8, 3), valid=torch.arange(8) < torch.tensor([[8], [4]])
    )
    expected = (math.log(8) + math.log(4)) / 2 * 0.2
    assert patch_discrimination(pair) == pytest.approx(expected)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cross_entropy"])
def test_gradients_stay_finite_and_padding_gets_none(name):
    predicted, target, wanted = draw(3)
    wanted[:, 12:19] = False  # a modality that nobody decodes
    predicted.requires_grad_()
    loss = sum(token_loss(pairs_of(predicted, target, wanted), {"type": name}).values())
    loss.backward()
    assert loss.isfinite()
    assert predicted.grad.isfinite().all()
    assert (predicted.grad[~wanted] == 0).all()
    assert predicted.grad[wanted].abs().sum() > 0


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cross_entropy"])
def test_nothing_to_decode_costs_nothing(name):
    predicted, target, wanted = draw(4)
    pairs = pairs_of(predicted.requires_grad_(), target, torch.zeros_like(wanted))
    loss = sum(token_loss(pairs, {"type": name}).values())
    loss.backward()
    assert loss == 0
    assert predicted.grad.isfinite().all()


def test_half_precision_predictions_are_compared_in_full():
    pairs = pairs_of(*draw(5))
    low = {m: Pair(predicted=p.predicted.bfloat16(), target=p.target, valid=p.valid) for m, p in pairs.items()}
    for loss in token_loss(low, {"type": "modality_patch_discrimination"}).values():
        assert loss.dtype == torch.float32


def test_simple_distances_match_the_library():
    predicted, target, wanted = draw(6)
    pair = join(pairs_of(predicted, target, wanted))
    torch.testing.assert_close(distance(pair, power=1), F.l1_loss(predicted[wanted], target[wanted]))
    torch.testing.assert_close(distance(pair, power=2), F.mse_loss(predicted[wanted], target[wanted]))
    p, t = predicted[wanted], target[wanted]
    cosines = (p * t).sum(1) / (p.square().sum(1) * t.square().sum(1)).sqrt()
    torch.testing.assert_close(cosine_similarity(pair), -cosines.mean())
    classes = target.abs().argmax(-1, keepdim=True)
    labelled = Pair(predicted=predicted, target=classes.float(), valid=wanted)
    torch.testing.assert_close(class_cross_entropy(labelled), F.cross_entropy(predicted[wanted], classes[wanted][:, 0]))


def test_contrast_is_cross_entropy_of_the_diagonal():
    a, b = torch.randn(2, 7, 5).unbind()
    cosine = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    torch.testing.assert_close(info_nce(a, b, temperature=0.2), F.cross_entropy(cosine / 0.2, torch.arange(7)))


def test_koleo_rewards_spread():
    close, spread = torch.ones(4, 4) + 0.01 * torch.eye(4), torch.eye(4)
    assert koleo(spread) == pytest.approx(-math.log(math.sqrt(2)), rel=1e-5)
    assert koleo(close) > 3
    assert koleo(spread[:1]) == 0


def koleo_by_hand(rows):
    unit = [row / row.norm() for row in rows]
    nearest = [min(float((x - y).norm()) for j, y in enumerate(unit) if j != i) for i, x in enumerate(unit)]
    return -sum(math.log(distance) for distance in nearest) / len(nearest)


@pytest.mark.parametrize("mode", ["instance", "patch"])
def test_koleo_looks_at_samples_or_at_their_tokens(mode):
    lengths = (3, 1, 5, 2)
    sample = torch.arange(4).repeat_interleave(torch.tensor(lengths))
    seen = Packed.build(sample, torch.arange(11), samples=4)
    latent = torch.randn(11, 6, generator=torch.Generator().manual_seed(0))
    rows = [part.mean(0) for part in latent.split(lengths)] if mode == "instance" else latent
    got = regularise(latent, seen, {"type": "KoLeo", "mode": mode, "weight": 0.3})
    assert float(got) == pytest.approx(0.3 * koleo_by_hand(rows), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"type": "spread"}, {}, "no regulariser 'spread'; known: KoLeo"),
        ({"type": "KoLeo", "mode": "image"}, {}, "give instance"),
        ({"type": "KoLeo"}, {"across_ranks": True}, "within one process"),
    ],
)
def test_impossible_regularisers_are_refused(config, options, message):
    with pytest.raises(InputError, match=message):
        regularise(torch.ones(2, 3), Packed.of(torch.ones(2, 1, dtype=torch.bool)), config, **options)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"type": "nothing"}, "no loss 'nothing'; known: "), ({"type": "all_discrimination"}, "within one process")],
)
def test_impossible_losses_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        token_loss(pairs_of(*draw(0)), config, across_ranks=True)


def loss_of_all(predicted, target, wanted, views, *, across_ranks):
    pairs = pairs_of(predicted, target, wanted)
    terms = [
        *token_loss(
            pairs, {"type": "modality_patch_discrimination_masked_negatives"}, across_ranks=across_ranks
        ).values(),
        *token_loss(
            pairs, {"type": "modality_patch_discrimination", "pred2unit": True}, across_ranks=across_ranks
        ).values(),
        *token_loss(pairs, {"type": "l2"}, across_ranks=across_ranks).values(),
        info_nce(*views, across_ranks=across_ranks),
    ]
    return torch.stack(terms).sum()


def one_of_two(rank, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    predicted, target, wanted = (x.chunk(2)[rank] for x in draw(7, batch=6))
    views = (
        torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).chunk(2, dim=1)[rank].clone().requires_grad_()
    )
    predicted = predicted.clone().requires_grad_()
    loss = loss_of_all(predicted, target, wanted, views.unbind(), across_ranks=True)
    loss.backward()
    torch.save([loss.detach(), predicted.grad, views.grad], f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    torch.multiprocessing.spawn(one_of_two, args=(tmp_path / "store", tmp_path / "out"), nprocs=2)
    predicted, target, wanted = draw(7, batch=6)
    views = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = loss_of_all(predicted.requires_grad_(), target, wanted, views.unbind(), across_ranks=False)
    loss.backward()
    ranks = [torch.load(f"{tmp_path / 'out'}.{rank}") for rank in range(2)]
    torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, loss.detach())
    # Averaging over processes halves what each contributes.
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]) / 2, predicted.grad)
    torch.testing.assert_close(torch.cat([r[2] for r in ranks], dim=1) / 2, views.grad)
