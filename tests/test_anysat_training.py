"""The published training checkpoint of AnySat."""

import re
from functools import partial

import pytest
import torch

from panterra.errors import InputError
from panterra.models.anysat import AnySat, AnySatConfig, anysat_config
from panterra.models.anysat_convert import load_anysat
from panterra.models.anysat_predictor import AnySatPredictor, AnySatPredictorConfig
from panterra.models.anysat_training import AnySatTraining, load_anysat_training, published_training_state
from panterra.models.olmoearth import OlmoEarth, OlmoEarthConfig
from panterra.objectives.jepa import JEPA, JEPAConfig

BLOCK = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def layers(*names):
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def encoder_names(images, series, depth):
    """List the names of the published encoder, from its description."""
    names = {"cls_token", "spatial_encoder.cls_token", *layers("spatial_encoder.predictor_norm")}
    for name in images:
        home = f"projector_{name}"
        names |= {f"{home}.patch_embed.weight", *layers(*(f"{home}.mlp.{i}" for i in (0, 1, 3, 4)))}
    for name in series:
        home = f"projector_{name}.patch_embed"
        stages = [f"{home}.inconv.{i}" for i in (0, 1, 4, 5, 8, 9, 12, 13, 16, 17)]
        rest = ["attention_heads.fc1_k", "out_norm", "mlp.0", "mlp.1", *(["in_norm"] if name == "s2" else [])]
        names |= {f"projector_{name}.pad_parameter", f"{home}.attention_heads.Q"}
        names |= layers(*stages, *(f"{home}.{part}" for part in rest))
    table = "attn.rpe_k.lookup_table_weight"
    for i in range(depth):
        home = f"spatial_encoder.predictor_blocks.{i}"
        names |= layers(*(f"{home}.{part}" for part in BLOCK), *(f"blocks.{i}.{part}" for part in BLOCK))
        names.add(f"{home}.{table}")
    parts = ("norm1", "norm2", "attn.wk", "attn.wv", "attn.proj", "mlp.fc1", "mlp.fc2")
    names |= {f"blocks.{depth}.{table}", f"blocks.{depth}.attn.q_learned"}
    return names | layers(*(f"blocks.{depth}.{part}" for part in parts))


def predictor_names(depth):
    blocks = (f"predictor_blocks.{i}.{part}" for i in range(depth) for part in BLOCK)
    return {"mask_token", "cls_token", *layers("predictor_embed", "predictor_norm", "predictor_proj", *blocks)}


def checkpoint_names(depth):
    images = ("aerial", "aerial-flair", "naip", "spot")
    series = ("alos", "l7", "l8", "modis", "s1", "s1-asc", "s2")
    encoder = encoder_names(images, series, depth)
    return {
        "model.masked_token",
        *(f"model.encoder.{name}" for name in encoder),
        *(f"model.predictor.{name}" for name in predictor_names(4)),
        *(f"target_encoder.{name}" for name in encoder),
    }


def a_training(config, *, device="cpu", **predictor):
    """Draw a training's entries, each with values of its own."""
    sizes = AnySatPredictorConfig(dim=config.dim, **predictor)
    with torch.device("meta"):
        jepa = JEPA(JEPAConfig(encoder=config, predictor=sizes))
    draw = partial(torch.randn, device=device)
    state = {key: draw(value.shape) for key, value in jepa.state_dict().items()}
    return AnySatTraining(encoder=config, predictor=sizes, state=state)


def test_every_name_of_the_published_checkpoint_has_its_place():
    base = a_training(anysat_config("base"), device="meta")
    published = published_training_state(base)
    assert set(published) == checkpoint_names(6)
    assert len(published) == 1 + 2 * 418 + 56
    assert sum(v.numel() for k, v in published.items() if k.startswith("target_encoder.")) == 125_905_447
    assert published["model.predictor.predictor_blocks.3.attn.qkv.weight"].shape == (2304, 768)
    assert published["model.predictor.mask_token"].shape == published["model.masked_token"].shape == (1, 1, 768)


@pytest.mark.parametrize("size", ["tiny", "hub-small"])
def test_a_full_size_checkpoint_is_read_whole(tmp_path, size):
    given = a_training(anysat_config(size))
    path = tmp_path / "AnySat_full.pth"
    torch.save({"state_dict": published_training_state(given), "epoch": 12}, path)
    read = load_anysat_training(path)
    assert (read.encoder, read.predictor) == (given.encoder, given.predictor)
    assert read.predictor == AnySatPredictorConfig(dim=given.encoder.dim, depth=4, heads=16)
    assert read.state.keys() == given.state.keys()
    assert all(torch.equal(read.state[key], value) for key, value in given.state.items())


def small(tmp_path, **changes):
    config = AnySatConfig(dim=32, depth=1, heads=2)
    given = a_training(config, depth=2, heads=4)
    published = {**published_training_state(given), **changes}
    path = tmp_path / "AnySat_full.pth"
    torch.save({"state_dict": {key: value for key, value in published.items() if value is not None}}, path)
    return path, given


def test_pretraining_goes_on_from_it(tmp_path):
    path, given = small(tmp_path)
    read = load_anysat_training(path, predictor_heads=4)
    jepa = JEPA(JEPAConfig(encoder=read.encoder, predictor=read.predictor))
    jepa.load_state_dict(read.state)
    for part, module in (("encoder", jepa.encoder), ("predictor", jepa.predictor), ("teacher", jepa.teacher)):
        for key, value in module.state_dict().items():
            assert torch.equal(value, given.state[f"{part}.{key}"]), key
    assert torch.equal(jepa.masked_token, given.state["masked_token"])
    teacher = load_anysat(path)
    assert all(torch.equal(value, jepa.teacher.state_dict()[key]) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model.decoder.weight": torch.zeros(2)},
            "holds model.decoder.weight; wanted a training checkpoint of AnySat",
        ),
        ({"a": torch.zeros(2), "b": torch.zeros(2)}, "holds a and 1 more; wanted"),
        ({"model.predictor.predictor_extra.weight": torch.zeros(2)}, "unexpected predictor.predictor_extra.weight"),
        ({"model.encoder.blocks.0.attn.gate": torch.zeros(2)}, "unexpected encoder.blocks.0.attn.gate"),
        ({"target_encoder.projector_s9.pad_parameter": torch.zeros(())}, "unexpected teacher.projectors.s9.pad"),
        ({"model.encoder.projector_s9.pad_parameter": torch.zeros(())}, "a projector for 's9'"),
        ({"model.masked_token": None}, "missing masked_token"),
        ({"target_encoder.cls_token": None}, "missing teacher.class_token"),
        ({"model.predictor.mask_token": None}, "has no predictor in it"),
        ({"model.predictor.predictor_proj.bias": torch.zeros(7)}, "predictor.output.bias is [7] instead of [32]"),
    ],
)
def test_what_is_no_training_checkpoint_is_refused_in_one_sentence(tmp_path, changes, said):
    path, _ = small(tmp_path, **changes)
    with pytest.raises(InputError, match=re.escape(said)) as error:
        load_anysat_training(path, predictor_heads=4)
    assert "\n" not in str(error.value)


def test_weights_alone_are_no_training(tmp_path):
    torch.save({"state_dict": {"cls_token": torch.zeros(1, 1, 32)}}, tmp_path / "AnySat.pth")
    with pytest.raises(InputError, match="holds cls_token; wanted a training checkpoint"):
        load_anysat_training(tmp_path / "AnySat.pth")


@pytest.mark.parametrize(("dim", "heads"), [(100, 4), (48, 4), (96, 5), (0, 4), (96, 0)])
def test_odd_widths_are_refused_before_anything_is_built(dim, heads):
    said = f"a width of {dim} with {heads} heads in the encoder; take a multiple of 32 and of the heads"
    with pytest.raises(InputError, match=said):
        AnySat(AnySatConfig(dim=dim, depth=1, heads=heads))
    with pytest.raises(InputError, match=f"a width of {dim} with {heads} heads in the predictor"):
        AnySatPredictor(AnySatPredictorConfig(dim=dim, heads=heads), 96)


@pytest.mark.parametrize(
    ("dim", "heads", "position", "said"),
    [
        (36, 3, "absolute", "a width of 36 with 3 heads; take a multiple of 16 and of the heads"),
        (32, 5, "absolute", "take a multiple of 16 and of the heads"),
        (48, 8, "rope_3d_mixed", "take a multiple of 16 and of 4 per head"),
        (32, 0, "rope", "a width of 32 with 0 heads"),
    ],
)
def test_odd_widths_of_olmoearth_are_refused_too(dim, heads, position, said):
    with pytest.raises(InputError, match=said):
        OlmoEarth(OlmoEarthConfig(dim=dim, depth=1, heads=heads, position=position))
    if dim == 48:
        assert OlmoEarth(OlmoEarthConfig(dim=dim, depth=1, heads=heads)).dim == dim
