"""Networks that transformers offers: DINOv3."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from jaxtyping import Float
from torch import Tensor

from panterra.models.adapters.adapter import Adapter
from panterra.models.adapters.declaration import Input, Takes, View

# image_mean and image_std of the model cards' preprocessor configurations.
WEB: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SATELLITE: dict[str, Any] = {"mean": (0.430, 0.411, 0.296), "std": (0.213, 0.156, 0.143)}

SIZES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "dinov3-small": (
        "facebook/dinov3-vits16-pretrain-lvd1689m",
        WEB,
        {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12, "intermediate_size": 1536},
    ),
    "dinov3-base": (
        "facebook/dinov3-vitb16-pretrain-lvd1689m",
        WEB,
        {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "intermediate_size": 3072},
    ),
    "dinov3-large": (
        "facebook/dinov3-vitl16-pretrain-lvd1689m",
        WEB,
        {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24, "intermediate_size": 4096},
    ),
    "dinov3-large-satellite": (
        "facebook/dinov3-vitl16-pretrain-sat493m",
        SATELLITE,
        {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24, "intermediate_size": 4096},
    ),
}
"""Address, statistics, and the shape that random weights have."""


def dinov3(name: str, *, pretrained: bool, **shape: Any) -> Adapter:
    """Open DINOv3 (Siméoni et al. 2025): red, green and blue of any sensor, of any size.

    It was trained on pictures, so digital numbers of aerial images are divided by 255; reflectance from 0 to 0.3 is
    stretched over the same range, which is our choice.
    """
    transformers: Any = import_module("transformers")
    address, statistics, size = SIZES[name]
    if pretrained:
        network = transformers.DINOv3ViTModel.from_pretrained(address)
    else:
        shape = {**size, "patch_size": 16, "num_register_tokens": 4, **shape}
        network = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**shape))
    colour: dict[str, Any] = {"scale": 1 / 3000, "clip": (0, 1), **statistics}
    camera: dict[str, Any] = {**colour, "scale": 1 / 255}
    takes = Takes(
        inputs=(
            Input(modality="sentinel2_l2a", bands=("B04", "B03", "B02"), **colour),
            Input(modality="sentinel2", bands=("B04", "B03", "B02"), **colour),
            Input(modality="hls", bands=("B4", "B3", "B2"), **colour),
            *(
                Input(modality=m, bands=("R", "G", "B"), **camera)
                for m in ("naip", "naip_10", "aerial", "spot", "planet")
            ),
        ),
        patch_px=16,
    )
    adapter = Adapter(network, takes, dim=network.config.hidden_size, name=name, call=_call_dinov3)
    adapter.licence, adapter.source = "DINOv3 License", f"https://huggingface.co/{address}"
    return adapter


def _call_dinov3(network: Any, view: View) -> Float[Tensor, "n p d"]:
    tokens = [
        network(images).last_hidden_state[:, 1 + network.config.num_register_tokens :]
        for images in view.images.values()
    ]
    mean: Tensor = sum(tokens) / len(tokens)
    return mean
