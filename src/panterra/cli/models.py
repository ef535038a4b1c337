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
    # Eighty columns: the address of the weights is in --json.
    show_table(
        ["name", "parameters", "dim", "licence", "weights"],
        [
            (
                m.name,
                f"{m.parameters / 1e6:.1f} M",
                m.dim,
                m.licence or "-",
                "Hugging Face" if m.address else m.source if m.packaged else "none",
            )
            for m in MODELS.values()
        ],
    )
    for terms in dict.fromkeys(m.terms for m in MODELS.values()):
        print(f"\n{terms}")
    print("\nModels of other packages, whose weights have terms of their own:\n")
    show_table(["name", "package", "installed"], [(m.name, m.needs, m.installed or "no") for m in others])
