"""Models by name: where their weights come from, what may be done with them, how they are opened."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from panterra.errors import InputError
from panterra.files import saving_tensors, unfinished, write_whole
from panterra.models.adapters.adapter import Adapter, FittedAdapter, adapter_passport
from panterra.models.adapters.offers import ADAPTERS, open_adapter
from panterra.models.anysat import SIZES as ANYSAT_SIZES
from panterra.models.anysat import AnySat, Missing, anysat_config
from panterra.models.anysat_convert import ANYSAT_LICENCE, anysat_from_json, anysat_json, load_anysat
from panterra.models.anysat_convert import FORMAT as ANYSAT_FORMAT
from panterra.models.anysat_sensors import changed_settings
from panterra.models.convert import check_fit, olmoearth_config, olmoearth_encoder_state, open_state_dict
from panterra.models.exported import FORMAT as EXPORT_FORMAT
from panterra.models.exported import Exported, open_exported
from panterra.models.features import Encoder
from panterra.models.olmoearth import SIZES, Attend, OlmoEarth, OlmoEarthConfig, released_config
from panterra.models.sub_patches import SubPatches
from panterra.plain import as_lists, as_tuples

OLMOEARTH_LICENCE = "OlmoEarth Artifact License"
OLMOEARTH_TERMS = (
    "Weights by Ai2 under the OlmoEarth Artifact License: attribution is required; military, surveillance and "
    "extractive-industry uses are among those not allowed, and derivatives must pass the restrictions on."
)
ANYSAT_TERMS = (
    "Weights of AnySat (Astruc et al., CVPR 2025) under the MIT licence: keep its notice when passing them on. Only "
    "base was published; tiny and small are the architectures of its training, to be trained or drawn at random."
)
PANTERRA_TERMS = (
    "Weights of Panterra under Apache-2.0, which come with it: OlmoEarth's architecture, trained on invented planets "
    "alone. For trials and teaching; released weights know far more of the Earth."
)
OLMOEARTH_FORMAT = "panterra-olmoearth-1"

Model = OlmoEarth | AnySat
"""An `Encoder` of one of the families, with weights that can be trained and saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What a person should know before choosing a model."""

    name: str
    family: str
    size: str
    dim: int
    parameters: int
    """Of the encoder."""
    address: str | None
    """Hugging Face id; None where no weights of this size were published, or where they come with Panterra."""
    licence: str | None
    """Of the published weights."""
    terms: str
    packaged: bool = False
    """Whether its weights come with Panterra."""

    @property
    def source(self) -> str:
        """Say in words where its weights come from."""
        return "this package" if self.packaged else self.address or "not published"

    @property
    def page(self) -> str | None:
        """Give the page of its published weights."""
        return f"https://huggingface.co/{self.address}" if self.address else None


_PARAMETERS = {
    "v1": {"nano": 1_361_024, "tiny": 6_202_560, "base": 88_953_600, "large": 307_770_368},
    "v1.1": {"nano": 1_697_328, "tiny": 12_461_296, "base": 113_973_952},
    "v1.2": {"nano": 1_698_096, "tiny": 12_464_752, "small": 35_615_200, "base": 113_987_776},
}

_ANYSAT_PARAMETERS = {"tiny": 8_262_991, "small": 31_998_871, "base": 125_905_447}

_OLMOEARTH = {
    f"olmoearth-{version}-{size}": ModelCard(
        name=f"olmoearth-{version}-{size}",
        family=f"olmoearth-{version}",
        size=size,
        dim=int(SIZES[size]["dim"]),
        parameters=parameters,
        address=f"allenai/OlmoEarth-{version.replace('.', '_')}-{size.capitalize()}",
        licence=OLMOEARTH_LICENCE,
        terms=OLMOEARTH_TERMS,
    )
    for version, sizes in _PARAMETERS.items()
    for size, parameters in sizes.items()
}
_ANYSAT = {
    f"anysat-{size}": ModelCard(
        name=f"anysat-{size}",
        family="anysat",
        size=size,
        dim=int(ANYSAT_SIZES[size]["dim"]),
        parameters=parameters,
        address="g-astruc/AnySat" if size == "base" else None,
        licence=ANYSAT_LICENCE if size == "base" else None,
        terms=ANYSAT_TERMS,
    )
    for size, parameters in _ANYSAT_PARAMETERS.items()
}

_OURS = {
    "panterra-nano": ModelCard(
        name="panterra-nano",
        family="olmoearth-v1.2",
        size="nano",
        dim=128,
        parameters=1_106_736,
        address=None,
        licence="Apache-2.0",
        terms=PANTERRA_TERMS,
        packaged=True,
    )
}

MODELS: dict[str, ModelCard] = {**_OURS, **_OLMOEARTH, **_ANYSAT}
_PUBLISHED = {card.address.lower(): card for card in MODELS.values() if card.address}


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    normalized_input: bool = False,
    attention: Attend = "masked",
    missing: Missing = "masked",
    random: int | None = None,
) -> Model | Exported | Adapter | FittedAdapter:
    """Load an encoder, ready for inference.

    `name_or_path` is a name (`panterra models` lists them), a Hugging Face id, a folder with the published files
    (`config.json` and `weights.pth`, or `AnySat.pth`), a checkpoint of AnySat's published training, a folder that
    `save_model` or `panterra export` wrote, or one of `panterra.models.adapters.offers.ADAPTERS`, networks of others
    that come with their own packages. Exports and those can be used for nothing but encoding. `random` gives a named
    architecture random weights from that seed and downloads nothing.
    `dtype=torch.bfloat16` halves memory and time where the processor has it. `normalized_input` skips the
    normalisation, for inputs that already had it. `attention` (OlmoEarth, see `panterra.models.olmoearth.Attend`) and
    `missing` (AnySat, see `panterra.models.anysat.Missing`) pick a published behaviour for parity. Raises InputError.
    """
    for asked, value, known in (("attention", attention, get_args(Attend)), ("missing", missing, get_args(Missing))):
        if value not in known:
            raise InputError(f"{asked} is {value!r}; wanted one of {', '.join(known)}")
    _check_device(device)
    name = str(name_or_path)
    if drawn := _DRAWN.fullmatch(name):
        name, random = drawn[1], int(drawn[2])
    if random is None and _config(Path(name)).get("format") == EXPORT_FORMAT:
        if (str(device), dtype, normalized_input, attention, missing) != ("cpu", None, False, "masked", "masked"):
            raise InputError(f"{name} is an export, whose device, precision and behaviour are fixed; leave them out")
        return open_exported(name)
    if name.lower() in ADAPTERS and not Path(name).exists():
        if (attention, missing) != ("masked", "masked"):
            raise InputError(f"attention and missing are no behaviours of {name}; leave them out")
        return _ready_adapter(open_adapter(name.lower(), random=random), device, dtype, normalized_input)
    if random is not None:
        model = _random(name, random)
    elif name in _OURS:
        model = _from_folder(packaged_folder(name), name=name)
    elif Path(name).is_dir():
        model = _from_folder(Path(name))
    elif Path(name).is_file():
        model = load_anysat(name)
    else:
        model = _from_hub(name)
    if isinstance(model, OlmoEarth):
        model.attention = attention
    else:
        model.missing = missing
    other, value = ("missing", missing) if isinstance(model, OlmoEarth) else ("attention", attention)
    if value != "masked":
        raise InputError(f"{other}={value!r} is no behaviour of {model.name}'s family; leave it out")
    model.normalized_input = normalized_input
    model.to(device=device, dtype=dtype)
    return model.eval().requires_grad_(False)


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(
            f"PyTorch cannot compute on {str(device)!r} here; give cpu, or cuda where it sees a GPU"
        ) from None


def _ready_adapter(
    model: Adapter | FittedAdapter, device: str | torch.device, dtype: torch.dtype | None, normalized_input: bool
) -> Adapter | FittedAdapter:
    if normalized_input and isinstance(model, FittedAdapter):
        raise InputError(f"{model.name} standardises by the data at hand; leave normalized_input out")
    if isinstance(model, Adapter):
        model.normalized_input = normalized_input
    model.to(device=device, dtype=dtype)
    return model.eval().requires_grad_(False)


_DRAWN = re.compile(r"(\S+) \(random weights, seed (\d+)\)")
"""The name of a model with random weights, which `load_model` also takes."""


def packaged_folder(name: str) -> Path:
    """Find the files of a model that comes with Panterra."""
    return Path(__file__).with_name(name.replace("-", "_"))


def save_model(model: Model, folder: Path | str, *, dtype: torch.dtype | None = None) -> Path:
    """Write a model as `config.json` and `model.safetensors`, whole or not at all.

    `dtype=torch.float16` halves the file; what is read from it computes in float32 again.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = anysat_json(model) if isinstance(model, AnySat) else _olmoearth_json(model)
    tensors = {key: value.to(dtype).contiguous() for key, value in model.state_dict().items()}
    with unfinished(folder / "model.safetensors") as path, saving_tensors(folder):
        save_file(tensors, path)
    write_whole(folder / "config.json", json.dumps(config, indent=1) + "\n")
    return folder


def passport(model: Encoder) -> dict[str, Any]:
    """Say which model this is and whatever of its set-up changes results: checksum, licence, source, precision."""
    if isinstance(model, SubPatches):
        cut = {"sub_patches": model.modality, "sub_patches_of_m": model.patch_m}
        return {**passport(model.encoder), "name": model.name, "dim": model.dim, **cut}
    about: dict[str, Any] = {"name": model.name, "dim": model.dim}
    if isinstance(model, Exported):
        about |= model.about
    if isinstance(model, torch.nn.Module):
        about["weights_sha256"] = weights_checksum(model)
        first = next(model.parameters(), None)
        if first is not None:
            about |= {"dtype": str(first.dtype).removeprefix("torch."), "device": first.device.type}
    if isinstance(model, OlmoEarth):
        about |= {"family": "olmoearth", "attention": model.attention}
    elif isinstance(model, AnySat):
        statistics = anysat_json(model)["statistics"]
        about |= {"family": "anysat", "missing": model.missing, "layout": model.config.layout, "statistics": statistics}
        about |= {"sensors": changed} if (changed := changed_settings(model.config.sensors)) else {}
    elif isinstance(model, Adapter | FittedAdapter):
        about |= {"family": "adapter", **adapter_passport(model)}
    if isinstance(model, Model):
        card = MODELS.get(model.name)
        about |= {
            "normalized_input": model.normalized_input,
            "licence": model.licence,
            "source": None if card is None else card.page or card.source,
        }
    return about


def weights_checksum(model: torch.nn.Module) -> str:
    """Hash every parameter's name and bytes."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _random(name: str, seed: int) -> Model:
    card = MODELS.get(name)
    if card is None:
        raise InputError(f"random weights need the name of an architecture, not {name!r}; known: {', '.join(MODELS)}")
    drawn = f"{name} (random weights, seed {seed})"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in _ANYSAT:
            return AnySat(anysat_config(card.size), name=drawn)
        if card.packaged:
            return OlmoEarth(_architecture(_config(packaged_folder(name))), name=drawn)
        return OlmoEarth(released_config(card.family.removeprefix("olmoearth-"), card.size), name=drawn)


def _from_hub(name: str) -> Model:
    card = MODELS.get(name.lower()) or _PUBLISHED.get(name.lower())
    if card is None:
        known = ", ".join(MODELS)
        raise InputError(
            f"no model or folder {name!r}; give a folder with a model's files, or one of {known}; "
            f"of other packages: {', '.join(ADAPTERS)}"
        )
    if card.address is None:
        raise InputError(
            f"no weights of {card.name} were published; give the folder of a model that was trained, or draw random "
            "weights for trials (random=0, on the command line --random 0)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = ["models/AnySat.pth"] if card.name in _ANYSAT else ["config.json", "weights.pth"]
    try:
        folder = snapshot_download(card.address, allow_patterns=files)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).split("\n")[0][:200]
        raise InputError(
            f"the weights of {card.name} could not be fetched from huggingface.co/{card.address} ({reason}); "
            f"connect, or download that repository and give its folder"
        ) from None
    return _from_folder(Path(folder), name=card.name)


def _from_folder(folder: Path, *, name: str | None = None) -> Model:
    name, config_path = name or str(folder.resolve()), folder / "config.json"
    config = _config(folder)
    if str(config.get("format", "")).startswith("panterra-"):
        return _from_ours(folder, config, name=name)
    if any((folder / path).is_file() for path in ("AnySat.pth", "models/AnySat.pth")):
        return load_anysat(folder, name=name)
    if not config_path.is_file():
        raise InputError(f"{folder} has no config.json and no AnySat.pth; wanted a folder with a model's files")
    model = _build(olmoearth_config(config), name)
    model.licence = OLMOEARTH_LICENCE  # the published layout has no other source
    state = olmoearth_encoder_state(open_state_dict(folder / "weights.pth"))
    check_fit(model.state_dict(), state, source=str(folder / "weights.pth"))
    model.load_state_dict(state)
    return model


def _config(folder: Path) -> dict[str, Any]:
    """Read `config.json`, empty where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}); fetch it again") from None
    return config


def _from_ours(folder: Path, config: Mapping[str, Any], *, name: str) -> Model:
    builders: dict[str, Callable[..., Model]] = {
        OLMOEARTH_FORMAT: _olmoearth_from_json,
        ANYSAT_FORMAT: anysat_from_json,
    }
    if config["format"] not in builders:
        raise InputError(f"{folder} holds {config['format']!r}, which this version cannot read; update panterra")
    model = builders[config["format"]](config, name=name)
    path = folder / "model.safetensors"
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({str(error)[:200]}); copy or save it again") from None
    check_fit(model.state_dict(), state, source=str(path))
    model.load_state_dict(state)
    return model


def _olmoearth_json(model: OlmoEarth) -> dict[str, Any]:
    return {
        "format": OLMOEARTH_FORMAT,
        "name": model.name,
        "licence": model.licence,
        "config": as_lists(asdict(model.config)),
    }


def _olmoearth_from_json(saved: Mapping[str, Any], *, name: str) -> OlmoEarth:
    try:
        config = _architecture(saved)
    except (KeyError, TypeError) as error:
        raise InputError(f"the configuration in {name} is incomplete ({error}); save the model again") from None
    model = _build(config, name)
    model.licence = saved.get("licence")
    return model


def _architecture(saved: Mapping[str, Any]) -> OlmoEarthConfig:
    """Read the architecture from what `save_model` writes to `config.json`."""
    return OlmoEarthConfig(**as_tuples(saved["config"]))


def _build(config: OlmoEarthConfig, name: str) -> OlmoEarth:
    with torch.random.fork_rng(devices=[]):
        return OlmoEarth(config, name=name)
