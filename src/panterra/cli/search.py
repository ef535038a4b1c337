"""`panterra search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from panterra.cli.options import Json, Overwrite

SHOWN = 10


def search(
    stores: Annotated[list[Path], Parameter(help="Embeddings that panterra embed or panterra chips wrote.")],
    /,
    *,
    like: Annotated[Path | None, Parameter(help="Examples: points or polygons (GeoJSON, GPKG, ...).")] = None,
    at: Annotated[list[float] | None, Parameter(consume_multiple=True, help="Examples as LON LAT, in degrees.")] = None,
    unlike: Annotated[Path | None, Parameter(help="Counter-examples: points or polygons.")] = None,
    like_store: Annotated[
        list[Path] | None,
        Parameter(consume_multiple=True, help="Embeddings to take the examples from, of another scene."),
    ] = None,
    polygons: Annotated[
        Literal["mean", "all"], Parameter(help="A polygon is one example, the mean of its patches, or each is one.")
    ] = "mean",
    method: Annotated[
        Literal["cosine", "logistic"], Parameter(help="Likeness to the mean of examples, or a fitted probability.")
    ] = "cosine",
    unlike_weight: Annotated[float, Parameter(help="Of counter-examples in the mean.")] = 1.0,
    top: Annotated[int, Parameter(help="How many places.")] = 100,
    apart: Annotated[float, Parameter(help="Metres between places at least; 0 allows neighbours.")] = 200,
    keep_examples: Annotated[bool, Parameter(show_default=False, help="Find the examples as well.")] = False,
    out: Annotated[Path | None, Parameter(help="GeoJSON of the places, best first.")] = None,
    similarity: Annotated[
        Path | None, Parameter(name="--map", help="GeoTIFF with the score of every patch; of one store.")
    ] = None,
    build_index: Annotated[
        bool, Parameter(show_default=False, help="Only build the index that --approximate uses.")
    ] = False,
    recall: Annotated[
        float, Parameter(help="For --build-index: share of the true neighbours that it has to find.")
    ] = 0.95,
    approximate: Annotated[
        bool, Parameter(show_default=False, help="Use the index instead of comparing every patch.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find places like these and unlike those in stored embeddings."""
    from panterra.commands import search as command
    from panterra.commands.terminal import show_json, show_table

    if build_index:
        built = command.build_indexes(stores, recall=recall)
        if as_json:
            show_json(
                [
                    {
                        "index": str(i.folder),
                        "vectors": i.count,
                        "lists": i.lists,
                        "probes": i.probes,
                        "recall": i.recall,
                    }
                    for i in built
                ]
            )
            return
        for i in built:
            print(f"{i.folder}: {i.count:,} vectors, recall {i.recall:.3f} with {i.probes} of {i.lists} lists")
        return
    done = command.run_search(
        stores,
        like=like,
        at=at or [],
        unlike=unlike,
        like_stores=like_store or [],
        polygons=polygons,
        method=method,
        unlike_weight=unlike_weight,
        top=top,
        apart_m=apart,
        keep_examples=keep_examples,
        approximate=approximate,
        out=out,
        similarity=similarity,
        overwrite=overwrite,
    )
    result = done.as_dict()
    if as_json:
        show_json(result)
        return
    show_table(
        ["score", "lon", "lat", "store"],
        [(f"{p['score']:.4f}", f"{p['lon']:.6f}", f"{p['lat']:.6f}", p["store"]) for p in result["found"][:SHOWN]],
    )
    where = f"; all of them are in {out}" if out else ""
    print(f"\n{len(result['found'])} places, {min(SHOWN, len(result['found']))} shown{where}")
