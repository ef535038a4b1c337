"""`panterra models`."""

from __future__ import annotations

from dataclasses import asdict

from panterra.cli.options import Json


def models(*, as_json: Json = False) -> None:
    """List the models, their sizes and the licences of their weights."""
    from panterra.commands.terminal import show_json, show_table
    from panterra.models.weights import MODELS

    if as_json:
        show_json({name: asdict(card) for name, card in MODELS.items()})
        return
    show_table(
        ["name", "family", "parameters", "embedding", "licence", "weights from"],
        [(m.name, m.family, f"{m.parameters / 1e6:.1f} M", m.dim, m.licence or "-", m.source) for m in MODELS.values()],
    )
    for terms in dict.fromkeys(m.terms for m in MODELS.values()):
        print(f"\n{terms}")
