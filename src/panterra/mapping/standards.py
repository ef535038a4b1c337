"""Statistics of a scene, for encoders that have none of what they are to be shown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

from odc.geo.geobox import GeoBox

from panterra.energy.ledger import Note
from panterra.errors import InputError
from panterra.files import read_json, write_whole
from panterra.imagery.stac import Scene
from panterra.mapping.parts import Parts
from panterra.mapping.sources import Encoding
from panterra.modalities import MODALITIES
from panterra.models import weights
from panterra.models.features import Fitted
from panterra.sample import Batch

STATISTICS_BYTES = 2**25
"""What the pixels of a block may take where statistics are fitted; several copies of it are made."""


def standardise(work: Encoding, parts: Parts, note: Note | None) -> None:
    """Fit what statistics the encoder lacks to all that it will be shown; a job that goes on finds them in its parts.

    They follow from what `Encoding.job` names already, so they are no part of it: rounding, which depends on threads,
    must not make two jobs of one.
    """
    encoder, saved = work.encoder, parts.folder / "statistics.json"
    missing = encoder.missing_statistics(work.modalities) if isinstance(encoder, Fitted) else ()
    if not isinstance(encoder, Fitted) or not missing:
        return
    if not saved.is_file():
        if note:
            note(f"{work.encoder.name} has no statistics of {', '.join(missing)} yet: fitting them to the scene, once")
        try:
            fitted = encoder.fit_statistics(in_blocks(work.scene, work.box, missing))
        except (InputError, OSError) as error:
            if not len(parts):
                parts.remove()
            raise InputError(f"statistics of {', '.join(missing)} cannot be fitted to the scene: {error}") from error
        with parts.guard():
            write_whole(saved, json.dumps(fitted), sync=True)
    work.encoder = encoder.with_statistics(read_json(saved, "remove it to have them fitted again"))
    work.about["model"] = work.origin["panterra:model"] = weights.passport(work.encoder)


def in_blocks(scene: Scene, box: GeoBox, modalities: Sequence[str]) -> Iterator[Batch]:
    """Read all of a scene in a box, one modality after the other, in blocks that fit into memory."""
    height, width = box.shape
    for name in modalities:
        spec, dates = MODALITIES[name], len(scene.dates(name))
        finer = 10.0 / spec.gsd if spec.kind == "still" else 1.0
        side = max(1, int(math.sqrt(STATISTICS_BYTES / (4 * dates * len(spec.bands) * max(finer, 1.0) ** 2))))
        for row in range(0, height, side):
            for col in range(0, width, side):
                yield scene.batch(box[row : min(row + side, height), col : min(col + side, width)], [name])
