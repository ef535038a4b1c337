import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from panterra import MODALITIES, Batch, InputError, Observation, load_model
from panterra.evaluate.cache import identity
from panterra.models.anysat import AnySat, anysat_config, for_finetuning
from panterra.models.anysat_convert import published_anysat_state
from panterra.models.anysat_new_sensor import add_modality
from panterra.models.features import Encoder, Fitted
from panterra.models.olmoearth import OBSERVED, TARGET_ONLY, V1_BAND_SETS
from panterra.models.weights import MODELS, passport, save_model, weights_checksum

PREFIX = "olmoearth_pretrain.nn"
NINE = OBSERVED + TARGET_ONLY
SIZES = {"nano": (128, 4, 8), "tiny": (192, 12, 3)}


def published_config(version, size):
    dim, depth, heads = SIZES[size]
    encoder = {
        "_CLASS_": f"{PREFIX}.flexi_vit.EncoderConfig",
        "supported_modality_names": list(NINE),
        "embedding_size": dim,
        "max_patch_size": 8,
        "num_heads": heads,
        "mlp_ratio": 4.0,
        "depth": depth,
        "drop_path": 0.1,
        "a_field_of_the_future": 1,
    }
    if version != "v1":
        overrides = {
            name: {"_CLASS_": f"{PREFIX}.tokenization.ModalityTokenization", "band_groups": [list(m.band_names)]}
            for name, m in MODALITIES.items()
            if name in ("sentinel2_l2a", "landsat")
        }
        encoder |= {
            "tokenization_config": {"_CLASS_": "x", "overrides": overrides},
            "use_linear_patch_embed": True,
            "patch_embed_hidden_sizes": [12 if size == "nano" else 64],
        }
    if version == "v1.2":
        encoder |= {
            "position_encoding": "rope_3d_mixed",
            "rope_mixed_base": 10000.0,
            "rope_temporal_coordinate_scale": 1 / 30,
        }
    return {"model": {"_CLASS_": f"{PREFIX}.latent_mim.LatentMIMConfig", "encoder_config": encoder}, "launch": None}


def published_state(version, size, seed=0):
    """Every encoder entry of the published layout, with random values, and a few of the rest of the file."""
    dim, depth, heads = SIZES[size]
    hidden = 12 if size == "nano" else 64
    shapes = {}
    for name in NINE:
        bands = MODALITIES[name].band_names
        groups = V1_BAND_SETS.get(name, (bands,)) if version == "v1" else (bands,)
        for s, group in enumerate(groups):
            home = f"patch_embeddings.per_modality_embeddings.{name}.{name}__{s}"
            if version == "v1":
                shapes[f"{home}.proj.weight"] = (dim, len(group), 8, 8)
            else:
                shapes[f"{home}.pixel_proj.0.weight"] = (hidden, len(group))
                shapes[f"{home}.pixel_proj.0.bias"] = (hidden,)
                shapes[f"{home}.proj.weight"] = (dim, 64 * hidden)
            shapes[f"{home}.proj.bias"] = (dim,)
        shapes[f"composite_encodings.per_modality_channel_embeddings.{name}"] = (len(groups), dim // 4)
    shapes["composite_encodings.month_embed.weight"] = (12, dim // 4)
    for i in range(depth):
        block = f"blocks.{i}"
        for norm in ("norm1", "norm2"):
            shapes[f"{block}.{norm}.weight"] = shapes[f"{block}.{norm}.bias"] = (dim,)
        for layer in ("q", "k", "v", "proj"):
            shapes[f"{block}.attn.{layer}.weight"], shapes[f"{block}.attn.{layer}.bias"] = (dim, dim), (dim,)
        shapes[f"{block}.mlp.fc1.weight"], shapes[f"{block}.mlp.fc1.bias"] = (4 * dim, dim), (4 * dim,)
        shapes[f"{block}.mlp.fc2.weight"], shapes[f"{block}.mlp.fc2.bias"] = (dim, 4 * dim), (dim,)
        if version == "v1.2":
            shapes[f"{block}.attn.rope_mixed_freqs"] = (3, heads, dim // heads // 2)
    shapes["norm.weight"] = shapes["norm.bias"] = (dim,)
    shapes["project_and_aggregate.projection.0.weight"] = (dim, dim)
    shapes["project_and_aggregate.projection.0.bias"] = (dim,)
    generator = torch.Generator().manual_seed(seed)
    state = {f"encoder.{key}": torch.randn(shape, generator=generator) * 0.05 for key, shape in shapes.items()}
    count = sum(value.numel() for value in state.values())
    state |= {"decoder.mask_token": torch.zeros(dim), "target_encoder.norm.weight": torch.ones(dim)}
    if version == "v1":
        state["encoder.composite_encodings.pos_embed"] = torch.zeros(12, dim // 4)
    return state, count


def write_published(folder, version, size):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published_config(version, size)))
    state, count = published_state(version, size)
    torch.save(state, folder / "weights.pth")
    return state, count


def batch():
    pixels = np.random.default_rng(0).normal(1500, 800, (2, 12, 16, 16)).astype(np.float32)
    return Batch(observations={"sentinel2_l2a": Observation.build(pixels, ["2023-03-01", "2023-07-01"])})


@pytest.mark.parametrize("size", ["nano", "tiny"])
@pytest.mark.parametrize("version", ["v1", "v1.1", "v1.2"])
def test_published_folders_load_and_survive_a_round_trip(tmp_path, version, size):
    state, count = write_published(tmp_path / "published", version, size)
    model = load_model(tmp_path / "published")
    assert count == MODELS[f"olmoearth-{version}-{size}"].parameters
    q, k, v = (state[f"encoder.blocks.1.attn.{x}.weight"] for x in "qkv")
    torch.testing.assert_close(model.blocks[1].attn.qkv.weight, torch.cat([q, k, v]))
    again = load_model(save_model(model, tmp_path / "ours"))
    assert again.config == model.config
    assert weights_checksum(again) == weights_checksum(model)
    assert torch.equal(again.encode(batch(), patch_m=40).patches, model.encode(batch(), patch_m=40).patches)


def test_passport_names_weights_and_licence():
    model = load_model("olmoearth-v1.2-nano", random=0)
    assert "random" in passport(model)["name"]
    assert len(passport(model)["weights_sha256"]) == 64
    assert passport(model)["weights_sha256"] != passport(load_model("olmoearth-v1.2-nano", random=1))["weights_sha256"]


def test_a_models_name_leads_back_to_it(tmp_path):
    drawn = load_model("olmoearth-v1.2-nano", random=4)
    assert drawn.licence is None
    write_published(tmp_path / "published", "v1", "nano")
    published = load_model(tmp_path / "published")
    saved = load_model(save_model(published, tmp_path / "saved"))
    assert saved.licence == published.licence == "OlmoEarth Artifact License"
    for model in (drawn, published, saved):
        assert weights_checksum(load_model(model.name)) == weights_checksum(model)


def test_random_weights_repeat_and_leave_the_generator_alone():
    before = torch.random.get_rng_state()
    first, second = (weights_checksum(load_model("olmoearth-v1-nano", random=3)) for _ in range(2))
    assert first == second
    assert torch.equal(before, torch.random.get_rng_state())


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def spoil(folder, how):
    weights, config = folder / "weights.pth", folder / "config.json"
    if how == "malicious":
        weights.write_bytes(pickle.dumps({"encoder.norm.weight": Malicious(folder / "was-here")}, protocol=2))
    elif how == "malicious zip":
        torch.save({"encoder.norm.weight": Malicious(folder / "was-here")}, weights)
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "absent":
        weights.unlink()
    elif how == "no tensors":
        torch.save([1, 2], weights)
    elif how == "other size":
        torch.save(published_state("v1.2", "tiny")[0], weights)
    elif how == "other version":
        torch.save(published_state("v1", "nano")[0], weights)
    elif how == "half a layer":
        state = published_state("v1.2", "nano")[0]
        del state["encoder.blocks.2.attn.k.weight"]
        torch.save(state, weights)
    elif how == "no config":
        config.unlink()
    elif how == "config cut":
        config.write_text('{"model": {')
    elif how == "other config":
        config.write_text('{"architectures": ["Bert"]}')
    elif how == "unknown modality":
        changed = published_config("v1.2", "nano")
        changed["model"]["encoder_config"]["supported_modality_names"].append("sentinel9")
        config.write_text(json.dumps(changed))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("malicious", "more than tensors"),
        ("malicious zip", "more than tensors"),
        ("truncated", "damaged or cut short"),
        ("empty", "damaged or cut short"),
        ("absent", "has no weights.pth"),
        ("no tensors", "not a dictionary of tensors"),
        ("other size", "does not fit its configuration .*wrong shape"),
        ("other version", "does not fit its configuration .*missing"),
        ("half a layer", "incomplete"),
        ("no config", "has no config.json"),
        ("config cut", "is not JSON"),
        ("other config", 'has no "model"'),
        ("unknown modality", "sentinel9"),
    ],
)
def test_a_spoilt_folder_gets_one_line(tmp_path, how, message):
    write_published(tmp_path, "v1.2", "nano")
    spoil(tmp_path, how)
    with pytest.raises(InputError, match=message) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize(("file", "keep"), [("model.safetensors", 1000), ("config.json", 20)])
def test_our_own_folder_cut_short_gets_one_line(tmp_path, file, keep):
    save_model(load_model("olmoearth-v1-nano", random=0), tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:keep])
    with pytest.raises(InputError, match=r"cannot be read|is not JSON"):
        load_model(tmp_path)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(InputError, match=r"no model or folder 'olmo'.*olmoearth-v1.2-nano"):
        load_model("olmo")
    with pytest.raises(InputError, match="random weights need the name of an architecture"):
        load_model("olmo", random=1)


@pytest.mark.parametrize("name", ["olmoearth-v1.2-nano", "allenai/OlmoEarth-v1_2-Nano"])
def test_names_and_addresses_lead_to_the_same_repository(monkeypatch, tmp_path, name):
    write_published(tmp_path, "v1.2", "nano")
    asked = []

    def download(repo_id, **options):
        asked.append(repo_id)
        return str(Path(tmp_path))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_model(name).name == "olmoearth-v1.2-nano"
    assert asked == ["allenai/OlmoEarth-v1_2-Nano"]


def test_being_offline_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"could not be fetched.*give its folder"):
        load_model("olmoearth-v1.2-nano")


@pytest.fixture(scope="module")
def anysat_file(tmp_path_factory):
    """Weights in the published layout, at a size that is quick to write."""
    torch.manual_seed(0)
    small = AnySat(replace(anysat_config("tiny"), dim=96, depth=1, heads=2))
    folder = tmp_path_factory.mktemp("published") / "models"
    folder.mkdir()
    torch.save(published_anysat_state(small.state_dict(), small.config), folder / "AnySat.pth")
    return folder / "AnySat.pth", weights_checksum(small)


def test_anysat_comes_from_a_file_its_folder_or_the_repository(anysat_file, monkeypatch):
    path, checksum = anysat_file
    asked = []

    def download(repo_id, **options):
        asked.append((repo_id, options["allow_patterns"]))
        return str(path.parent.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for given in (path, path.parent, path.parent.parent, "anysat-base", "g-astruc/AnySat"):
        model = load_model(given)
        assert isinstance(model, Encoder)
        assert isinstance(model, Fitted)
        assert weights_checksum(model) == checksum
        assert weights_checksum(load_model(model.name)) == checksum
        assert model.licence == "MIT"
        assert not model.training
    assert asked[0] == ("g-astruc/AnySat", ["models/AnySat.pth"])
    assert {repo for repo, _ in asked} == {"g-astruc/AnySat"}
    assert passport(load_model("anysat-base"))["source"] == "https://huggingface.co/g-astruc/AnySat"


def test_a_saved_anysat_is_the_same_model(tmp_path):
    drawn = load_model("anysat-tiny", random=2)
    assert drawn.name == "anysat-tiny (random weights, seed 2)"
    assert weights_checksum(load_model(drawn.name)) == weights_checksum(drawn)
    add_modality(drawn, "hls")
    drawn = drawn.with_statistics(drawn.fit_statistics([batch()]))
    again = load_model(save_model(drawn, tmp_path / "ours"))
    assert again.config == drawn.config
    assert again.statistics == drawn.statistics
    assert torch.equal(again.encode(batch(), patch_m=40).patches, drawn.encode(batch(), patch_m=40).patches)
    about = passport(again)
    assert about["weights_sha256"] == passport(drawn)["weights_sha256"]
    assert (about["family"], about["missing"], about["layout"]) == ("anysat", "masked", "tokens")
    assert about["statistics"]["s2"]["count"] == 2 * 16 * 16
    assert about["statistics"] == json.loads(json.dumps(about["statistics"]))


def test_an_anysats_passport_tells_what_its_sensors_have_differently(tmp_path):
    usual = load_model("anysat-tiny", random=0)
    assert "sensors" not in passport(usual)
    tuned = for_finetuning(usual)
    about = passport(tuned)
    assert about["weights_sha256"] == passport(usual)["weights_sha256"]
    assert set(about["sensors"]) == set(usual.sensors) - {"l8"}
    assert about["sensors"]["s2"] == about["sensors"]["s1"] == {"period": 366}
    assert about["sensors"] == json.loads(json.dumps(about["sensors"]))
    assert passport(load_model(save_model(tuned, tmp_path / "m")))["sensors"] == about["sensors"]
    assert identity(tuned) != identity(usual)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_cards_of_anysat_count_its_parameters(size):
    with torch.device("meta"):
        model = AnySat(anysat_config(size))
    card = MODELS[f"anysat-{size}"]
    assert (sum(p.numel() for p in model.parameters()), model.dim) == (card.parameters, card.dim)


def test_statistics_belong_to_a_copy(tmp_path):
    model = load_model("anysat-tiny", random=0)
    assert model.missing_statistics(["sentinel2_l2a", "sentinel1"]) == ("sentinel2_l2a", "sentinel1")
    fitted = model.with_statistics(model.fit_statistics([batch()]))
    assert fitted.missing_statistics(["sentinel2_l2a", "sentinel1"]) == ("sentinel1",)
    assert model.missing_statistics(["sentinel2_l2a"]) == ("sentinel2_l2a",)
    pixels = batch().observations["sentinel2_l2a"].pixels
    mean, std = fitted.statistics_of("sentinel2_l2a")["B02"]
    assert mean == pytest.approx(float(pixels[:, :, 0].mean()), rel=1e-5)
    assert std == pytest.approx(float(pixels[:, :, 0].std(correction=0)), rel=1e-5)
    assert model.statistics_of("sentinel2_l2a") == {}
    assert load_model("anysat-tiny", random=0, normalized_input=True).missing_statistics(["sentinel1"]) == ()
    assert not isinstance(load_model("olmoearth-v1.2-nano", random=0), Fitted)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: {"s9": s["s2"]}, "no sensor 's9'"),
        (lambda s: {"s2": {"mean": [1]}}, "damaged"),
        (lambda s: {"s1": s["s2"]}, "of other channels"),
    ],
)
def test_statistics_of_another_model_are_refused(spoil, message):
    model = load_model("anysat-tiny", random=0)
    with pytest.raises(InputError, match=message):
        model.with_statistics(spoil(model.fit_statistics([batch()])))


@pytest.mark.parametrize("name", ["anysat-tiny", "anysat-small"])
def test_sizes_without_published_weights_say_so(name):
    assert MODELS[name].address is None
    assert "Only base was published" in MODELS[name].terms
    with pytest.raises(InputError, match=f"no weights of {name} were published.*--random 0"):
        load_model(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "x"}, "attention is 'x'; wanted one of masked, published_eval, published_fast"),
        ({"missing": "x"}, "missing is 'x'; wanted one of masked, published"),
        ({"device": "mars"}, "cannot compute on 'mars' here; give cpu"),
    ],
)
@pytest.mark.parametrize("name", ["olmoearth-v1.2-nano", "anysat-tiny"])
def test_behaviours_and_devices_that_there_are_not_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        load_model(name, random=0, **options)


def test_behaviours_belong_to_a_family():
    assert load_model("anysat-tiny", random=0, missing="published").missing == "published"
    with pytest.raises(InputError, match="attention='published_fast' is no behaviour of anysat-tiny"):
        load_model("anysat-tiny", random=0, attention="published_fast")
    with pytest.raises(InputError, match=r"missing='published' is no behaviour of olmoearth-v1\.2-nano"):
        load_model("olmoearth-v1.2-nano", random=0, missing="published")
