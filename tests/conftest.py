"""What several test files need."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real samples, or a skip that says so."""
    folder = (ROOT / os.environ.get("PANTERRA_DATA", "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"real samples are absent: no folder {folder}; set PANTERRA_DATA to it")
    return folder
