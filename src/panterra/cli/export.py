"""`panterra export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from panterra.cli.options import Json, Overwrite, PatchM, RandomSeed


def export(
    model: Annotated[str, Parameter(help="A name (see: panterra models), or a folder.")],
    /,
    *,
    out: Annotated[Path, Parameter(help="A folder, which --model of other commands takes.")],
    format: Annotated[
        Literal["torch", "onnx", "openvino"],
        Parameter(help="torch.export program, ONNX for ONNX Runtime, or OpenVINO's intermediate representation."),
    ] = "onnx",
    modalities: Annotated[
        list[str], Parameter(consume_multiple=True, help="Which modalities it takes; a batch may lack some of them.")
    ],
    dates: Annotated[int, Parameter(help="Images of each modality at most; a batch may have fewer.")] = 4,
    window_px: Annotated[int, Parameter(help="Side of the windows it takes, in pixels of 10 m.")] = 64,
    patch_m: PatchM = 40,
    dtype: Annotated[Literal["float32", "bfloat16", "int8"], Parameter(help="How it calculates.")] = "float32",
    batch: Annotated[
        str, Parameter(help="How many windows it takes at a time: a number, or dynamic for any.")
    ] = "dynamic",
    statistics: Annotated[
        str | None,
        Parameter(help="For models without statistics of their own (AnySat): a scene to fit them to, or a probe."),
    ] = None,
    calibration: Annotated[
        str | None,
        Parameter(help="For openvino in int8: a scene whose windows the ranges are fitted to; default: the planet."),
    ] = None,
    random: RandomSeed = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write an encoder, its normalisation inside, for another engine; it is compared with the encoder first."""
    from panterra.commands.export import export as run
    from panterra.commands.terminal import note, show_json

    exported, equality = run(
        model,
        out,
        engine=format,
        modalities=modalities,
        dates=dates,
        window_px=window_px,
        patch_m=patch_m,
        dtype=dtype,
        batch=batch,
        statistics=statistics,
        calibration=calibration,
        random=random,
        overwrite=overwrite,
        note=note,
    )
    if as_json:
        show_json({"export": str(out), **exported, "equality": equality})
    else:
        print(
            f"{out}: largest difference from the encoder {equality['max_difference']:.2g}, "
            f"cosine similarity {equality['min_cosine']:.6f} or more"
        )
