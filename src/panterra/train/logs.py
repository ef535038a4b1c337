"""What a run says while it runs."""

from __future__ import annotations

import importlib
import json
import math
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from panterra.errors import InputError
from panterra.files import write_whole

LOG_FILE = "log.jsonl"
Progress = Callable[[int, int, float], None]
"""Called with the steps done, all steps and samples per second."""


class Log(Protocol):
    """Takes the numbers of steps in order."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Note a step's numbers."""

    def close(self) -> None:
        """Put everything where it belongs."""


class JsonLines:
    """One JSON object a line; numbers that are not finite become null."""

    def __init__(self, path: Path, step: int) -> None:
        """Open a log that goes on after `step`: lines beyond it, or cut off by a kill, go."""
        lines = path.read_bytes().splitlines(keepends=True) if step and path.exists() else []
        write_whole(path, b"".join(line for line in lines if _belongs(line, step)))
        self._file = path.open("a", buffering=1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")

    def close(self) -> None:
        self._file.close()


def _belongs(line: bytes, step: int) -> bool:
    try:
        return bool(line.endswith(b"\n") and json.loads(line)["step"] <= step)
    except ValueError:
        return False


class TensorBoard:
    """Event files; TensorBoard itself hides what a resumed run does again."""

    def __init__(self, folder: Path, step: int) -> None:
        _need("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run; a resumed run goes on in it, and W&B ignores steps that it has."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        wandb = _need("wandb", "wandb")
        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            dir=str(folder),
            project="panterra",
            name=name,
            id=id_file.read_text(),
            resume="allow",
            config=dict(settings),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """An MLflow run, at MLFLOW_TRACKING_URI or where MLflow keeps its runs; a resumed run goes on in it."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self._mlflow = _need("mlflow", "mlflow")
        id_file = folder / "mlflow_id"
        known = id_file.read_text() if id_file.exists() else None
        run = self._mlflow.start_run(run_id=known, run_name=None if known else name)
        if known is None:
            id_file.write_text(run.info.run_id)
            self._mlflow.log_dict(dict(settings), "settings.json")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


LOGS: dict[str, Callable[[Path, int, str, Mapping[str, Any]], Log]] = {
    "jsonl": lambda folder, step, name, settings: JsonLines(folder / LOG_FILE, step),
    "tensorboard": lambda folder, step, name, settings: TensorBoard(folder / "tensorboard", step),
    "wandb": lambda folder, step, name, settings: WeightsAndBiases(folder, name, settings),
    "mlflow": lambda folder, step, name, settings: MLflow(folder, name, settings),
}
"""Each takes the run's folder, the step after which it goes on, the run's name and its settings."""


@contextmanager
def open_logs(
    names: Sequence[str], folder: Path, *, step: int, run: str, settings: Mapping[str, Any]
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Give a function that notes a step's numbers in all logs of the block."""
    if unknown := [name for name in names if name not in LOGS]:
        raise InputError(f"no log {unknown[0]!r}; known: {', '.join(LOGS)}")
    with ExitStack() as stack:
        logs = []
        for name in names:
            log = LOGS[name](folder, step, run, settings)
            stack.callback(log.close)
            logs.append(log)

        def write(step: int, values: Mapping[str, float]) -> None:
            for log in logs:
                log.write(step, values)

        yield write


@contextmanager
def progress_bar(what: str, *, shown: bool = True) -> Iterator[Progress]:
    """Show steps, samples per second and the time left on stderr; nothing where stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), disable=not (shown and sys.stderr.isatty())) as bar:
        task = bar.add_task(what, total=None, rate="")

        def update(done: int, total: int, rate: float) -> None:
            bar.update(task, completed=done, total=total, rate=f"{rate:.3g} samples/s" if rate else "")

        yield update


def _need(module: str, package: str) -> Any:
    """Import what only some people have."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise InputError(f"the log {package!r} came, but it is not installed: pip install {package}") from None
