import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from panterra import MODALITIES, Batch, InputError, Observation, load_model
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
    with pytest.raises(InputError, match="random weights need a released name"):
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
