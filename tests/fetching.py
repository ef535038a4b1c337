"""What the tests of fetching share: an archive, its server, and a fetch from it that does not wait."""

import pytest

from panterra.imagery.providers import find_provider
from panterra.imagery.pull import pull
from panterra.imagery.web import Web
from panterra.imagery.wish import Wish
from stac_server import AREA, corners, make_archive, serving

WHERE = ",".join(f"{edge:.9f}" for edge in corners(AREA))
ALL = ("sentinel2_l2a", "sentinel1", "landsat")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    return folder, make_archive(folder)


@pytest.fixture
def server(archive):
    with serving(*archive) as state:
        yield state


def connect(provider, access):
    return Web(access.sign, per_second=1e6, pause_s=0.001, tries=4)


def fetch(server, out, modalities=("sentinel2_l2a",), *, aoi=WHERE, dates="2024-01/2024-02", options=None, **wishes):
    wish = Wish(aoi=aoi, dates=dates, modalities=modalities, **wishes)
    return pull(wish, [find_provider(server.address)], out, connect=connect, **(options or {}))


def command(server, out, modalities, *more):
    return [
        *("fetch", f"--aoi={WHERE}", "--dates", "2024-01/2024-02", "--source", server.address, "--out", str(out)),
        *("--modalities", modalities, "--title", "t", *more),
    ]


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
