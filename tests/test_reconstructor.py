import torch

from panterra.models.olmoearth import OlmoEarthConfig
from panterra.models.patches import resize
from panterra.models.positions import TokenLine
from panterra.models.reconstructor import Reconstructor, patch_side
from panterra.objectives.pixels import pair_pixels

CONFIG = OlmoEarthConfig(dim=16, depth=1, heads=2, modalities=("landsat", "worldcover"))  # v1: B8 alone, then the rest


def test_a_patch_is_made_at_the_base_size_and_resized():
    torch.manual_seed(0)
    reconstructor, tokens = Reconstructor(CONFIG, 16), torch.randn(3, 16)
    whole = reconstructor(tokens, "landsat", 1, 8)
    layer = reconstructor.layers["landsat"][1]
    torch.testing.assert_close(whole, layer(tokens).view(3, 10, 8, 8))
    torch.testing.assert_close(reconstructor(tokens, "landsat", 1, 2), resize(whole, 2, 2))
    assert reconstructor(tokens[:0], "worldcover", 0, 2).shape == (0, 1, 2, 2)
    assert patch_side("naip_10", 2) == 8
    assert patch_side("era5_10", 2) == 1


def test_every_value_stands_beside_that_of_its_own_place_date_and_band():
    torch.manual_seed(0)
    reconstructor = Reconstructor(CONFIG, 16)
    inputs = {"landsat": torch.randn(2, 3, 11, 8, 12), "worldcover": torch.randn(2, 1, 1, 8, 12)}
    inputs["landsat"][1, 2, 4, 0, 0] = -99999.0
    shapes = {"landsat": torch.Size((2, 4, 6, 3, 2)), "worldcover": torch.Size((2, 4, 6, 1, 1))}
    line = TokenLine.of(shapes, torch.device("cpu"))
    # (row, column, date, band set) = (0, 0, 2, 1) of Landsat, (3, 5, 1, 0) of Landsat, (1, 2) of the map
    token = torch.tensor([2 * 2 + 1, ((3 * 6 + 5) * 3 + 1) * 2, 4 * 6 * 3 * 2 + 1 * 6 + 2])
    image, predicted = torch.tensor([1, 0, 1]), torch.randn(3, 16)
    pairs = pair_pixels(reconstructor, predicted, line, image, token, inputs, 2)
    first, second = inputs["landsat"][0, 1, :1, 6:, 10:], inputs["landsat"][1, 2, 1:, :2, :2]
    wanted = torch.cat([first.flatten(), second.flatten()])
    torch.testing.assert_close(pairs["landsat"].target[0, :, 0], wanted)
    assert (pairs["landsat"].valid[0] == (wanted != -99999.0)).all()
    assert pairs["landsat"].valid.sum() == 43
    torch.testing.assert_close(pairs["worldcover"].target.flatten(), inputs["worldcover"][1, 0, 0, 2:4, 4:6].flatten())
    made = reconstructor(predicted[1:2], "landsat", 0, 2).flatten(), reconstructor(predicted[:1], "landsat", 1, 2)
    torch.testing.assert_close(pairs["landsat"].predicted[0, :, 0], torch.cat([made[0], made[1].flatten()]))
