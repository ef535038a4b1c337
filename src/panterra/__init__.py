"""From satellite imagery to a checked map with an Earth-observation foundation model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from panterra.errors import InputError
    from panterra.imagery.declared import declare_modality
    from panterra.imagery.stac import Scene, open_scene
    from panterra.mapping.run import embed, map
    from panterra.modalities import MODALITIES, Band, Modality
    from panterra.models.features import Encoder, Features
    from panterra.models.weights import load_model
    from panterra.sample import Batch, Observation, collate

_HOMES = {
    "InputError": "panterra.errors",
    "MODALITIES": "panterra.modalities",
    "Band": "panterra.modalities",
    "Modality": "panterra.modalities",
    "declare_modality": "panterra.imagery.declared",
    "Batch": "panterra.sample",
    "Observation": "panterra.sample",
    "collate": "panterra.sample",
    "Encoder": "panterra.models.features",
    "Features": "panterra.models.features",
    "load_model": "panterra.models.weights",
    "Scene": "panterra.imagery.stac",
    "open_scene": "panterra.imagery.stac",
    "embed": "panterra.mapping.run",
    "map": "panterra.mapping.run",
}

__all__ = [
    "MODALITIES",
    "Band",
    "Batch",
    "Encoder",
    "Features",
    "InputError",
    "Modality",
    "Observation",
    "Scene",
    "collate",
    "declare_modality",
    "embed",
    "load_model",
    "map",
    "open_scene",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `import panterra` stays light."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'panterra' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
