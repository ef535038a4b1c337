import math

import pytest
import torch

from panterra.train.monitors import collapse_check, effective_rank, latent_mim_vectors, mean_cosine, uniformity
from test_latent_mim import make, views


def draw(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_equal_singular_values_count_one_each(rank):
    basis = torch.linalg.qr(draw(20, 8)).Q
    assert effective_rank(basis[:, :rank] @ torch.linalg.qr(draw(8, 8)).Q[:rank]) == pytest.approx(rank, rel=1e-5)


def test_the_effective_rank_is_that_of_the_definition():
    x = draw(30, 5) * torch.tensor([1.0, 2, 3, 4, 5])
    share = torch.linalg.eigvalsh(x.T @ x).sqrt()
    share /= share.sum()
    assert effective_rank(x) == pytest.approx(math.exp(-float((share * share.log()).sum())), rel=1e-5)
    assert effective_rank(7 * x) == pytest.approx(effective_rank(x))


def test_pairs_are_those_of_a_double_loop():
    x = draw(6, 3)
    unit = [row / row.norm() for row in x]
    pairs = [(a, b) for i, a in enumerate(unit) for b in unit[i + 1 :]]
    assert mean_cosine(x) == pytest.approx(sum(float(a @ b) for a, b in pairs) / len(pairs), rel=1e-4)
    expected = math.log(sum(math.exp(-2 * float((a - b).square().sum())) for a, b in pairs) / len(pairs))
    assert uniformity(x) == pytest.approx(expected, rel=1e-4)


def test_a_collapse_shows():
    same, spread = torch.ones(3000, 16), draw(3000, 16)
    found = collapse_check(lambda objective: {"same": same, "spread": spread}, every=1).run(torch.nn.Identity(), 0)
    assert found["same_effective_rank"] == pytest.approx(1)
    assert found["same_uniformity"] == pytest.approx(0, abs=1e-5)
    assert found["same_mean_cosine"] == pytest.approx(1)
    assert found["spread_effective_rank"] > 15.5
    assert found["spread_uniformity"] < -3
    assert abs(found["spread_mean_cosine"]) < 0.01
    assert "similarity" not in found


def test_nothing_at_all_has_no_direction():
    assert effective_rank(torch.zeros(4, 3)) == pytest.approx(1)


def test_latent_mim_is_watched_where_it_is_trained():
    model, pair = make().eval(), views()
    check = collapse_check(latent_mim_vectors(pair), every=5)
    vectors = latent_mim_vectors(pair)(model)
    assert vectors["summary"].shape == (4, 32)
    assert vectors["prediction"].shape == vectors["target"].shape
    found = check.run(model, 0)
    assert found["similarity"] == pytest.approx(
        float(torch.cosine_similarity(vectors["prediction"], vectors["target"]).mean()), rel=1e-5
    )
    assert set(found) == {"similarity"} | {
        f"{what}_{sign}"
        for what in ("summary", "prediction", "target")
        for sign in ("effective_rank", "uniformity", "mean_cosine")
    }
