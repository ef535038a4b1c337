"""The plain AnySat of the benchmarks is the same function as ours."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.anysat_convert import anysat_config_of, anysat_state, published_anysat_state
from panterra.models.anysat_projectors import Input
from panterra.models.anysat_sensors import SENSORS, hub_sensors

sys.path.insert(0, "benchmarks")
GOLDEN = Path(__file__).parent / "golden" / "anysat"
SIDES = {"aerial": 300, "spot": 60, "naip": 48, "alos": 2, "l7": 2, "modis": 1}
"""In pixels on a tile of 60 m, where they are not the six of 10 m."""


def random_model(**options) -> AnySat:
    torch.manual_seed(0)
    model = AnySat(AnySatConfig(dim=64, depth=2, heads=2, **options), normalized_input=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def tiles(*names: str, dates: int = 5, samples: int = 2) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random numbers for both, [B, T, C, Y, X], and the days of series."""
    torch.manual_seed(1)
    sides = {name: SIDES.get(name, 6) for name in names}
    values = {
        name: torch.randn(samples, dates if SENSORS[name].dated else 1, SENSORS[name].channels, side, side)
        for name, side in sides.items()
    }
    days = {name: torch.randint(1, 366, (samples, dates)) for name in names if SENSORS[name].dated}
    return values, days


def plain_values(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x if SENSORS[name].dated else x[:, 0] for name, x in values.items()}


def close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)


def rows_of(out) -> Tensor:
    return torch.cat([out.tile[:, None], out.patches.flatten(1, 2)], dim=1)


@pytest.mark.parametrize(
    "case", ["rel_s2_s1_60m", "rel_s2_s1_flashlayout_60m", "rel_s2_s1_70m_nondivisible", "rel_s2_zero_padded_time"]
)
@torch.no_grad()
def test_the_plain_version_gives_the_recorded_numbers(case):
    from anysat_plain import PlainAnySat

    listing, recorded = json.loads((GOLDEN / f"{case}.json").read_text()), load_file(GOLDEN / f"{case}.safetensors")
    published = load_file(GOLDEN / listing["weights"])
    config = anysat_config_of(published, layout="heads" if listing["config"]["flash_attn"] else "tokens")
    model = AnySat(replace(config, sensors=tuple(s for s in hub_sensors() if s in config.sensors)))
    model.load_state_dict(anysat_state(published))
    plain = PlainAnySat(model.eval())
    values = {name: recorded[f"in.{name}"].float() for name in listing["modality_order"]}
    days = {name: recorded[f"in.{name}_dates"] for name in values}
    for entry in listing["outputs"]:
        dense = (entry["output_modality"] or next(iter(values))) if entry["output"] == "dense" else None
        rows, image = plain(values, days, scale=entry["patch_size"] // 10, dense=dense)
        found = {"tile": rows[:, 0], "all": rows, "patch": rows[:, 1:], "dense": image}[entry["output"]]
        wanted = recorded[entry["tensor"]]
        close(found.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("layout", ["tokens", "heads"])
@pytest.mark.parametrize(
    ("names", "scale"),
    [
        (["s2"], 1),
        (["s2", "s1-asc"], 4),
        (["aerial", "s2", "s1-asc"], 2),
        (["spot", "l8", "naip"], 3),
        (["s2", "modis", "l7", "alos"], 3),
    ],
)
@torch.no_grad()
def test_both_encode_alike(names, scale, layout):
    from anysat_plain import PlainAnySat

    model = random_model(layout=layout)
    values, days = tiles(*names)
    inputs = {name: Input(values=x, days=days.get(name)) for name, x in values.items()}
    ours = model(inputs, scale=scale, dense=names[0], published_order=True)
    rows, image = PlainAnySat(model)(plain_values(values), days, scale=scale, dense=names[0])
    close(rows_of(ours), rows)
    close(ours.dense, image)
    close(model(inputs, scale=scale, patches=False).tile, rows[:, 0])


@pytest.mark.parametrize("name", ["s2", "s1-asc"])
@torch.no_grad()
def test_ragged_dates_count_alike(name):
    from anysat_plain import PlainAnySat

    model = random_model()
    values, days = tiles(name)
    valid = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])
    everywhere = valid[:, :, None, None].expand(-1, -1, 6, 6)
    ours = model({name: Input(values=values[name], days=days[name], valid=everywhere)}, scale=2)
    rows, _ = PlainAnySat(model)(values, days, scale=2, valid={name: valid})
    close(rows_of(ours), rows)


@pytest.mark.parametrize("name", ["s2", "s1-asc"])
@torch.no_grad()
def test_padded_dates_that_count_do_so_alike(name):
    from anysat_plain import PlainAnySat

    model = random_model()
    values, days = tiles(name)
    values[name][0, 2:] = 0
    days[name][0, 2:] = 0
    ours = model({name: Input(values=values[name], days=days[name])}, scale=1)
    rows, _ = PlainAnySat(model)(values, days, scale=1)
    close(rows_of(ours), rows)


@torch.no_grad()
def test_padded_dates_pass_through_the_layers_once():
    model, seen = random_model(), []
    values, days = tiles("s2")
    values["s2"][:, 3:] = 0
    model.projectors["s2"].stages[0].register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    model({"s2": Input(values=values["s2"], days=days["s2"])}, scale=1)
    assert seen == [2 * 6 * 6 * 3 + 1]


def test_gradients_are_alike():
    from anysat_plain import PlainAnySat

    model = random_model()
    plain = PlainAnySat(model)
    values, days = tiles("aerial", "s2", "s1-asc")
    inputs = {name: Input(values=x, days=days.get(name)) for name, x in values.items()}
    rows_of(model(inputs, scale=2)).square().mean().backward()
    plain(plain_values(values), days, scale=2)[0].square().mean().backward()
    found = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    wanted = {name: x.grad for name, x in plain.named_parameters() if x.grad is not None}
    for name, gradient in published_anysat_state(found, model.config).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=2e-5)
