"""The command line: parse, one call, answer."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence

from cyclopts import App, CycloptsError, Parameter

from panterra import __version__
from panterra.cli import (
    accuracy,
    change,
    chips,
    data,
    demo,
    detect,
    doctor,
    embed,
    evaluate,
    export,
    fetch,
    finetune,
    map,
    models,
    plan,
    pretrain,
    probe,
    report,
    sample,
    search,
)
from panterra.errors import InputError, RunError

app = App(
    name="panterra",
    help="From satellite imagery to a checked map with an Earth-observation foundation model.",
    help_epilogue="Start with: panterra demo. The --help of each command ends in an example.",
    help_format="plaintext",
    version=__version__,
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,
)

# In the order of --help: what a command does, and an example of its use.
COMMANDS: tuple[tuple[Callable[..., None], str], ...] = (
    (demo.demo, "panterra demo --scene my-scene --labels plots.gpkg --model olmoearth-v1.2-tiny"),
    (models.models, "panterra models"),
    (doctor.doctor, "panterra doctor scene --model olmoearth-v1.2-nano --repair repaired"),
    (
        fetch.fetch,
        "panterra fetch --aoi area.geojson --dates 2024-01/2024-12 --modalities sentinel2_l2a sentinel1 --out scene",
    ),
    (plan.plan, "panterra plan scene --model olmoearth-v1.2-nano --country FRA"),
    (embed.embed, "panterra embed scene --model olmoearth-v1.2-nano --out embeddings.zarr --dtype int8"),
    (search.search, "panterra search embeddings.zarr --like points.geojson --top 100 --out found.geojson"),
    (chips.chips, "panterra chips embeddings.zarr --out chips.parquet --side 4"),
    (change.change, "panterra change y2023.zarr y2024.zarr --out change.tif --polygons change.geojson"),
    (probe.probe, "panterra probe embeddings.zarr --labels plots.gpkg --out probe --column crop"),
    (finetune.finetune, "panterra finetune scene --labels plots.gpkg --model olmoearth-v1.2-nano --out model"),
    (map.map, "panterra map scene --probe probe --out map.tif --probabilities"),
    (detect.detect, "panterra detect scene --model ship-model --out ships.geojson"),
    (sample.sample, "panterra sample map.tif --out points.geojson --users-accuracy water=0.95"),
    (accuracy.accuracy, "panterra accuracy map.tif --reference points.geojson"),
    (
        evaluate.evaluate,
        "panterra evaluate --models olmoearth-v1.2-nano raw --benchmarks m_eurosat=geobench/m-eurosat --out results",
    ),
    (report.report, "panterra report --since 2026-01 --html report.html"),
    (export.export, "panterra export olmoearth-v1.2-nano --out nano-onnx --format onnx --modalities sentinel2_l2a"),
    (pretrain.pretrain, "panterra pretrain olmoearth-v1.2-nano --data corpus --out run --set batch=64"),
)
for position, (command, example) in enumerate(COMMANDS):
    app.command(command, sort_key=position, help_epilogue=f"Example: {example}")
app.command(data.app)

OUT_OF_MEMORY = re.compile(r"allocate memory|not enough memory|out of memory|bad_alloc|can't start new thread")
"""What RuntimeErrors of PyTorch and of Python say where memory ran out."""
NO_MEMORY = (
    "memory ran out; free some, or let the command take less at once (workers, batch, window), and start it again: it "
    "goes on from what is finished where it can"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0 is done, 1 a run that broke off, 2 what a person can put right, 130 Ctrl-C, 141 a reader that left.
    """
    # Threads that wait for each other by spinning take several times as long where other programs want the cores too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _open_streams()
    try:
        app(
            sys.argv[1:] if arguments is None else list(arguments),
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
        sys.stdout.flush()
    except (CycloptsError, InputError) as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("panterra"):
            raise
        return _fail(f"this command needs {error.name}; install it with: pip install 'panterra[all]'", 2)
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "stopped", 130)
    except BrokenPipeError:  # the reader left, as `head` does; nothing more can be said on stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and OUT_OF_MEMORY.search(str(error)) is None:
            raise
        return _fail(NO_MEMORY, 1)
    except UnicodeEncodeError as error:
        what = f"{error.object[error.start : error.end]!a} is no text in {error.encoding}"
        return _fail(f"{what}, the encoding of this terminal or locale; set PYTHONUTF8=1 and start again", 2)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            return _fail(NO_MEMORY, 1)
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return _fail("too few files may be open at once; raise the limit, as by ulimit -n 4096", 2)
        if error.strerror is None:  # not of the operating system's, but of a library's
            raise
        where = f" at {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror}{where}; check that the path is right, may be written and has room", 2)
    return 0


def _open_streams() -> None:
    """Let nothing read or written be where standard streams are closed, as some schedulers start their jobs."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number, which is this one
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")


def _fail(message: str, status: int) -> int:
    print(f"panterra: {' '.join(message.split())}", file=sys.stderr)
    return status
