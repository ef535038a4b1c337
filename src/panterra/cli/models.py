"""`panterra models`."""

from __future__ import annotations

from dataclasses import asdict

from panterra.cli.options import Json


def models(*, as_json: Json = False) -> None:
    """List the models, their sizes and the licences of their weights, and those that other packages offer."""
    from panterra.commands.models import other_models
    from panterra.commands.terminal import show_json, show_table
    from panterra.models.weights import MODELS

    others = other_models()
    if as_json:
        show_json({name: asdict(card) for name, card in MODELS.items()} | {m.name: asdict(m) for m in others})
        return
    show_table(
        ["name", "family", "parameters", "embedding", "licence", "weights from"],
        [(m.name, m.family, f"{m.parameters / 1e6:.1f} M", m.dim, m.licence or "-", m.source) for m in MODELS.values()],
    )
    for terms in dict.fromkeys(m.terms for m in MODELS.values()):
        print(f"\n{terms}")
    print("\nModels of other packages, whose weights have terms of their own:\n")
    show_table(["name", "package", "installed"], [(m.name, m.needs, m.installed or "no") for m in others])
