import pytest
import torch

from panterra.models import positions
from panterra.models.anysat_attention import buckets, places
from panterra.models.normalize import olmoearth_range
from panterra.models.patches import bicubic_matrix
from panterra.models.positions import (
    TokenLine,
    days_since_2000,
    rotate,
    sincos1d,
    sincos2d,
    token_coordinates,
    turn_heads,
)

SHAPES = {
    "sentinel2_l2a": (3, 2, 4, 3, 2),
    "worldcover": (3, 2, 4, 1, 1),
    "era5_10": (3, 1, 1, 3, 1),
    "latlon": (3, 1, 1, 1, 1),
}


def test_chosen_tokens_are_where_and_when_all_of_them_are():
    shapes = {m: torch.Size(shape) for m, shape in SHAPES.items()}
    stamps = torch.tensor([[[5, 2, 2020], [9, 7, 2021], [30, 11, 2022]]]).repeat(3, 1, 1)
    stamps[1, :, 2] += 1
    days = days_since_2000(stamps[..., 0], stamps[..., 1], stamps[..., 2])
    expected = token_coordinates(shapes, days, 2.5)
    sample, token = torch.randint(3, (50,)), torch.randint(expected.shape[1], (50,))
    line = TokenLine.of(shapes, torch.device("cpu"))
    assert sum(line.sizes.values()) == expected.shape[1]
    assert torch.equal(line.coordinates(sample, token, stamps, 2.5), expected[sample, token])


def test_heads_turn_as_rotations_of_each_do():
    torch.manual_seed(0)
    x, angle = torch.randn(2, 5, 3, 4, 6, requires_grad=True), torch.randn(2, 5, 4, 3, requires_grad=True)
    turn = torch.polar(torch.ones_like(angle), angle)
    q, k, v = x.unbind(2)
    expected = torch.stack([rotate(q, turn), rotate(k, turn), v], dim=2)
    got = torch.stack(turn_heads(x, angle, 2), dim=2)
    torch.testing.assert_close(got, expected)
    g = torch.randn_like(got)
    wanted = torch.autograd.grad((expected * g).sum(), (x, angle))
    for a, b in zip(torch.autograd.grad((got * g).sum(), (x, angle)), wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "table",
    [
        lambda: sincos1d(5, 8),
        lambda: sincos2d(3, 4, 16),
        lambda: places(3, 4, 1.0, 16),
        lambda: buckets(3, 4),
        lambda: bicubic_matrix(7, 5),
        lambda: olmoearth_range("sentinel1")[0],
        lambda: TokenLine.of({"sentinel1": torch.Size((1, 2, 2, 1, 1))}, torch.device("cpu")).band_set,
    ],
    ids=["sincos1d", "sincos2d", "places", "buckets", "bicubic", "range", "line"],
)
def test_a_table_that_inference_asked_for_first_can_be_trained_with(table):
    for kept in (sincos1d, sincos2d, places, buckets, bicubic_matrix, olmoearth_range, positions._line):
        kept.cache_clear()
    with torch.inference_mode():
        assert not table().is_inference()
