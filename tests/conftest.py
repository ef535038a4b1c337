"""What several test files need."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from panterra.files import claimed

# What is tried is the same in each run, and how long it takes, on a machine that may be busy, does not matter.
settings.register_profile("panterra", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("panterra")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real samples, or a skip that says so."""
    folder = (ROOT / os.environ.get("PANTERRA_DATA", "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"real samples are absent: no folder {folder}; set PANTERRA_DATA to it")
    return folder


def pytest_runtest_setup() -> None:
    """Let what a test and its fixtures draw not depend on the tests before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def own_ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the jobs of the tests out of the user's ledger, and the user's place out of the tests."""
    folder = tmp_path_factory.mktemp("ledger")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("COUNTRY", "GRAMS_PER_KWH", "PUE", "WUE", "MACHINE_KG_PER_HOUR"):
            patch.delenv(f"PANTERRA_{name}", raising=False)
        patch.setenv("PANTERRA_LEDGER", str(folder))
        yield folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the small labelled sets of `planet_benchmarks`, which are known by name meanwhile."""
    import planet_benchmarks
    from panterra.data.labelled import DATASETS

    with pytest.MonkeyPatch.context() as patch:
        for name, card in planet_benchmarks.cards().items():
            patch.setitem(DATASETS, name, card)
        yield planet_benchmarks.write_planet(tmp_path_factory.mktemp("planet") / "tiles")


@pytest.fixture
def claimed_elsewhere() -> Iterator[Callable[[Path], Callable[[], None]]]:
    """Let another process claim a folder; what is returned kills it."""
    children: list[int] = []

    def kill() -> None:
        while children:
            child = children.pop()
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    def begin(folder: Path) -> Callable[[], None]:
        ours, theirs = multiprocessing.get_context("fork").Pipe()
        child = os.fork()
        if child == 0:
            with claimed(folder, "it"):
                theirs.send("claimed")
                signal.pause()
        children.append(child)
        assert ours.recv() == "claimed"
        return kill

    yield begin
    kill()
