import pytest
import torch

from panterra.models.convert import olmoearth_predictor_config, olmoearth_predictor_state, published_predictor_state
from panterra.models.olmoearth import OlmoEarthConfig, released_config
from panterra.models.predictor import DECODE, MISSING, TEACHER_ONLY, VISIBLE, Chosen, Predictor, predictor_config

MODALITIES = ("sentinel2_l2a", "sentinel1", "worldcover")
POSITIONS = ("absolute", "rope", "rope_mixed", "rope_3d", "rope_3d_mixed", "none")


def small(**options):
    return OlmoEarthConfig(**{"dim": 32, "depth": 2, "heads": 2, "modalities": MODALITIES, **options})


def make(config, *, seed=0):
    torch.manual_seed(seed)
    model = Predictor(predictor_config(config, depth=2), config.dim).eval()
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def draw(batch=3, *, seed=0, dim=32):
    """Encoder output, masks with different counts per sample, timestamps."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"sentinel2_l2a": (2, 3, 2, 3), "sentinel1": (2, 3, 2, 1), "worldcover": (2, 3, 1, 1)}
    masks = {m: torch.randint(4, (batch, *shape), generator=g) for m, shape in shapes.items()}
    tokens = {m: torch.randn(batch, *shape, dim, generator=g) for m, shape in shapes.items()}
    months = torch.randint(12, (batch, 2), generator=g)
    timestamps = torch.stack([torch.full((batch, 2), 15), months, torch.full((batch, 2), 2020)], dim=-1)
    return tokens, masks, timestamps


def only(sample, tokens, masks, timestamps):
    pick = slice(sample, sample + 1)
    return {m: x[pick] for m, x in tokens.items()}, {m: x[pick] for m, x in masks.items()}, timestamps[pick]


@pytest.mark.parametrize("position", POSITIONS)
def test_batch_mates_do_not_matter(position):
    model, given = make(small(position=position)), draw()
    together = model(*given, patch_px=4)
    for i in range(3):
        alone = model(*only(i, *given), patch_px=4)
        kept = together.chosen.valid[i]
        torch.testing.assert_close(together.tokens[i, kept], alone.tokens[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("position", POSITIONS)
def test_only_what_is_visible_matters(position):
    model, (tokens, masks, timestamps) = make(small(position=position)), draw()
    other = {m: torch.where((masks[m] == VISIBLE)[..., None], x, x * 7 - 3) for m, x in tokens.items()}
    torch.testing.assert_close(
        model(other, masks, timestamps, patch_px=4).tokens, model(tokens, masks, timestamps, patch_px=4).tokens
    )


def test_queries_do_not_look_at_each_other():
    model, (tokens, masks, timestamps) = make(small()), draw(1)
    masks["sentinel1"][:] = DECODE
    fewer = masks | {"sentinel1": masks["sentinel1"].clone()}
    fewer["sentinel1"][:, 0] = TEACHER_ONLY
    both, less = (model(tokens, m, timestamps, patch_px=4) for m in (masks, fewer))
    shared = torch.isin(both.chosen.index[0], less.chosen.index[0])
    torch.testing.assert_close(both.tokens[0, shared], less.tokens[0])


def test_modalities_that_nobody_sees_may_be_left_out():
    model, (tokens, masks, timestamps) = make(small()), draw()
    masks["sentinel1"] = torch.where(masks["sentinel1"] == VISIBLE, DECODE, masks["sentinel1"])
    whole = model(tokens, masks, timestamps, patch_px=4)
    part = model({m: tokens[m] for m in ("sentinel2_l2a", "worldcover")}, masks, timestamps, patch_px=4)
    assert dict(part.sizes) == {"sentinel2_l2a": 36, "worldcover": 6, "sentinel1": 12}
    for i in range(3):
        a, b = (out.tokens[i, out.chosen.valid[i]].sum(0) for out in (whole, part))
        torch.testing.assert_close(a, b)


def test_a_query_knows_when_and_where_it_is():
    model, (tokens, masks, timestamps) = make(small(position="rope_3d_mixed", rope_time_scale=1 / 30)), draw(1)
    masks["sentinel2_l2a"][:] = DECODE
    out = model(tokens, masks, timestamps, patch_px=4).tokens[0]
    assert torch.cdist(out, out).fill_diagonal_(1).min() > 1e-4


def test_samples_without_anything_to_see_or_to_predict_stay_finite():
    model, (tokens, masks, timestamps) = make(small(position="rope_3d_mixed")), draw()
    for mask in masks.values():
        mask[0][mask[0] == VISIBLE] = MISSING
        mask[1][mask[1] == DECODE] = TEACHER_ONLY
    out = model(tokens, masks, timestamps, patch_px=4)
    assert out.tokens.isfinite().all()
    assert out.chosen.valid.sum(1)[1] == 0
    nothing = {m: torch.full_like(mask, MISSING) for m, mask in masks.items()}
    assert not model(tokens, nothing, timestamps, patch_px=4).chosen.valid.any()


def test_chosen_tokens_return_to_their_places():
    x, wanted = torch.randn(4, 9, 5), torch.rand(4, 9) < torch.tensor([[0.0], [0.3], [0.8], [1.0]])
    chosen = Chosen.of(wanted)
    torch.testing.assert_close(chosen.put(chosen.take(x), 9), torch.where(wanted[..., None], x, 0.0))
    assert torch.equal(chosen.valid.sum(1), wanted.sum(1))


COUNTS = [
    ("v1", "nano", 827_520),
    ("v1", "tiny", 1_855_680),
    ("v1", "base", 29_541_120),
    ("v1", "large", 52_495_360),
    ("v1.1", "nano", 827_424),
    ("v1.1", "tiny", 1_855_536),
    ("v1.1", "base", 29_540_544),
    ("v1.2", "nano", 828_192),
    ("v1.2", "tiny", 1_856_688),
    ("v1.2", "small", 7_399_776),
    ("v1.2", "base", 29_545_152),
]


@pytest.mark.parametrize(("version", "size", "parameters"), COUNTS)
def test_released_predictors_have_the_published_number_of_parameters(version, size, parameters):
    config = released_config(version, size)
    with torch.device("meta"):
        model = Predictor(predictor_config(config), config.dim)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_published_names_lead_back():
    config = small(position="rope_3d_mixed", qk_norm=True)
    model = make(config)
    published = published_predictor_state(model.state_dict(), model.config)
    assert "decoder.blocks.1.attn.rope_mixed_freqs" in published
    back = olmoearth_predictor_state(published)
    assert set(back) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(back[name], value), name


def test_published_configuration_of_a_wider_predictor():
    decoder = {
        "supported_modality_names": ["sentinel2_l2a"],
        "encoder_embedding_size": 24,
        "decoder_embedding_size": 32,
        "depth": 3,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "position_encoding": "rope",
    }
    config, encoder_dim = olmoearth_predictor_config({"model": {"decoder_config": decoder}})
    assert (encoder_dim, config.dim, config.depth, config.heads, config.output_dim) == (24, 32, 3, 4, 24)
    assert config.position == "rope"
