"""A STAC API and its files on the loopback, with the faults that such servers have, and a small archive to serve."""

import json
import math
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import Transformer

from panterra.imagery import grids
from panterra.imagery.raster import write_cog
from panterra.modalities import MODALITIES
from panterra.planet import Planet

CONFORMS = ["https://api.stacspec.org/v1.0.0/core", "https://api.stacspec.org/v1.0.0/item-search"]


@dataclass
class Server:
    """What is served, what goes wrong, and what was asked for."""

    folder: Path
    items: list
    address: str = ""
    faults: dict = field(default_factory=dict)
    """Part of a path -> faults, each used up by one request: a status, "truncate", "hang", "drop", (429, "1")."""
    dead: dict = field(default_factory=dict)
    """Part of a path -> status that it always answers."""
    signature: str | None = None
    """What ?sig= must say for a file; None for public files."""
    ranges: bool = True
    slow_s: float = 0.0
    files_left: float = math.inf
    """How many requests for files are answered before all further ones hang."""
    log: list = field(default_factory=list)
    headers: list = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def asked(self, part):
        return [path for path in self.log if part in path]

    def fault(self, path):
        with self.lock:
            self.log.append(path)
            for part, status in self.dead.items():
                if part in path:
                    return status
            for part, faults in self.faults.items():
                if part in path and faults:
                    return faults.pop(0)
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        self.answer(body)

    def do_GET(self):
        self.answer({key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()})

    def answer(self, asked):
        server = self.server.state
        server.headers.append(dict(self.headers))
        path = urlsplit(self.path).path
        fault = server.fault(path)
        if fault in ("drop", "hang"):
            self.leave(wait=fault == "hang")
            return
        if isinstance(fault, int | tuple):
            status, after = fault if isinstance(fault, tuple) else (fault, None)
            self.send(b"no", status=status, headers={"Retry-After": after} if after else {})
            return
        if path.startswith("/data/"):
            self.file(server, path, asked, short=fault == "truncate")
            return
        content = json.dumps(self.api(server, path, asked)).replace("{address}", server.address).encode()
        self.send(content, short=fault == "truncate", headers={"Content-Type": "application/json"})

    def leave(self, *, wait):
        """Answer nothing, at once or when the client has given up."""
        if wait:
            self.rfile.read(1)
        self.close_connection = True

    def api(self, server, path, asked):
        if path == "/":
            links = [
                {"rel": "self", "href": server.address},
                {"rel": "root", "href": server.address},
                {"rel": "data", "href": f"{server.address}/collections"},
                {"rel": "search", "href": f"{server.address}/search", "method": "POST"},
            ]
            catalogue = {"type": "Catalog", "id": "archive", "stac_version": "1.0.0", "description": "An archive"}
            return catalogue | {"conformsTo": CONFORMS, "links": links}
        if path == "/collections":
            names = dict.fromkeys(item["collection"] for item in server.items)
            return {"collections": [collection(name) for name in names], "links": []}
        return self.search(server, asked)

    def search(self, server, asked):
        west, south, east, north = asked["bbox"]
        first, last = asked["datetime"].split("/") if "datetime" in asked else ("0", "9")
        found = [
            item
            for item in server.items
            if item["collection"] in asked["collections"]
            and reaches(item["bbox"], west, east)
            and item["bbox"][1] <= north
            and item["bbox"][3] >= south
            and first[:10] <= item["properties"]["datetime"][:10] <= last[:10]
        ]
        start, limit = int(asked.get("token", 0)), min(int(asked.get("limit", 10)), 3)
        links = []
        if start + limit < len(found):
            body = {**asked, "token": str(start + limit)}
            links = [{"rel": "next", "href": f"{server.address}/search", "method": "POST", "body": body}]
        return {"type": "FeatureCollection", "features": found[start : start + limit], "links": links}

    def file(self, server, path, asked, short):
        if server.signature is not None and asked.get("sig") != server.signature:
            self.send(b"expired", status=403)
            return
        with server.lock:
            server.files_left -= 1
            stuck = server.files_left < 0
        if stuck:
            self.leave(wait=True)
            return
        time.sleep(server.slow_s)
        try:
            content = (server.folder / path.removeprefix("/data/")).read_bytes()
        except FileNotFoundError:
            self.send(b"nothing", status=404)
            return
        wanted = self.headers.get("Range")
        if not wanted or not server.ranges:
            self.send(content, short=short)
            return
        first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
        last = min(last, len(content) - 1)
        part = content[first : last + 1]
        span = {"Content-Range": f"bytes {first}-{last}/{len(content)}", "ETag": f'"{len(content)}"'}
        self.send(part, status=206, headers=span, short=short)

    def send(self, content, *, status=200, headers=None, short=False):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if short else content)
        if short:
            self.close_connection = True


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_):
        """Clients that give up are part of the tests."""


@contextmanager
def serving(folder, items, **settings):
    """Serve items and files; the text {address} in items becomes the server's own address."""
    http = _Quiet(("127.0.0.1", 0), Handler)
    http.state = Server(folder, items, f"http://127.0.0.1:{http.server_port}", **settings)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield http.state
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def reaches(bbox, west, east):
    """Over the antimeridian the west of a bbox is greater than its east."""
    left, _, right, _ = bbox
    return left <= east and right >= west if left <= right else left <= east or right >= west


def collection(name):
    return {
        "type": "Collection",
        "id": name,
        "stac_version": "1.0.0",
        "description": name,
        "license": "other",
        "extent": {"spatial": {"bbox": [[-180, -90, 180, 90]]}, "temporal": {"interval": [[None, None]]}},
        "links": [],
    }


# A small archive ------------------------------------------------------------------------------------------------------

CRS = "EPSG:32633"
TILES = {
    "33TVM": GeoBox((96, 96), Affine(10, 0, 500400, 0, -10, 5000040), CRS),
    "33TWM": GeoBox((96, 96), Affine(10, 0, 501120, 0, -10, 5000040), CRS),
}
AREA = GeoBox((72, 120), Affine(10, 0, 500580, 0, -10, 4999920), CRS)
"""Lies over both tiles, on a grid of 30 m from the origin of the zone."""

FAR_TILES = {
    "60KYF": GeoBox((96, 96), Affine(10, 0, 819580, 0, -10, 8173900), "EPSG:32760"),
    "01KAB": GeoBox((96, 96), Affine(10, 0, 179460, 0, -10, 8173900), "EPSG:32701"),
}
"""Reach over the antimeridian at 16.5 degrees south, from either side."""
POLAR_TILE = GeoBox((96, 96), Affine(10, 0, 1999520, 0, -10, 2500480), "EPSG:5041")
"""At 85.5 degrees north, on either side of the antimeridian."""

S2_DAYS = ("2024-01-05", "2024-01-15", "2024-01-25", "2024-02-04")
RADAR_DAYS = ("2024-01-03", "2024-01-15")


def on_planet(box):
    """The planet has one projection; what other boxes show is what it has at the same coordinates."""
    return GeoBox(box.shape, box.affine, CRS)


def corners(box):
    """West, south, east, north in degrees of a rectangle a metre or so inside a box."""
    left, bottom, right, top = box.boundingbox
    left, bottom, right, top = left + 1, bottom + 1, right - 1, top - 1
    place = Transformer.from_crs(CRS, "EPSG:4326", always_xy=True)
    (x0, x1, x2, x3), (y0, y1, y2, y3) = place.transform((left, right, left, right), (bottom, bottom, top, top))
    return max(x0, x2), max(y0, y1), min(x1, x3), min(y2, y3)


def footprint(box):
    """Outline and bbox as providers make them that do not think of the antimeridian."""
    left, bottom, right, top = box.boundingbox
    place = Transformer.from_crs(str(box.crs), "EPSG:4326", always_xy=True)
    lon, lat = place.transform((left, right, right, left, left), (bottom, bottom, top, top, bottom))
    ring = [[x, y] for x, y in zip(lon, lat, strict=True)]
    return {"type": "Polygon", "coordinates": [ring]}, [min(lon), min(lat), max(lon), max(lat)]


def cut_footprint(box):
    """Outline and bbox as RFC 7946 asks."""
    geometry, bbox = grids.footprint(box)
    return json.loads(json.dumps(geometry)), bbox


def stac_item(name, collection, day, box, properties, assets):
    geometry, bbox = footprint(box)
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": name,
        "collection": collection,
        "geometry": geometry,
        "bbox": bbox,
        "properties": {"datetime": f"{day}T10:00:31.024000Z", "proj:epsg": box.crs.epsg, **properties},
        "assets": assets,
        "links": [{"rel": "self", "href": f"{{address}}/{name}"}],
        "stac_extensions": [],
    }


def asset(path, box):
    return {
        "href": f"{{address}}/data/{path}",
        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
        "proj:shape": list(box.shape),
        "proj:transform": list(box.affine)[:6],
    }


def sentinel2(folder, tile, day, *, cloud, made="20240301T000000", baseline="05.10", add=1000, classes=None):
    """Write an image as the Planetary Computer has it: digital numbers with the offset of 1000, bands at their GSD."""
    box = (TILES | FAR_TILES)[tile]
    platform = "Sentinel-2A"
    compact = day.replace("-", "")
    name = f"S2A_MSIL2A_{compact}T100031_R122_T{tile}_{made}"
    pixels, _ = Planet(3, clouds=0).observe("sentinel2_l2a", on_planet(box), day)
    if classes is None:
        classes = np.full((48, 48), 4, "uint8")
    assets = {"SCL": asset(f"{name}_SCL.tif", box.zoom_out(2))}
    write_cog(folder / f"{name}_SCL.tif", classes, box.zoom_out(2), nodata=0)
    for band, values in zip(MODALITIES["sentinel2_l2a"].bands, pixels, strict=True):
        factor = int(band.gsd / 10)
        grid, path = box.zoom_out(factor), f"{name}_{band.name}.tif"
        write_cog(folder / path, (values[::factor, ::factor] + add).astype("uint16"), grid, nodata=0)
        assets[band.name] = asset(path, grid)
    properties = {
        "platform": platform,
        "eo:cloud_cover": cloud,
        "s2:mgrs_tile": tile,
        "s2:processing_baseline": baseline,
        "s2:generation_time": f"{made[:4]}-{made[4:6]}-{made[6:8]}T00:00:00Z",
        "sat:relative_orbit": 122,
        "sat:orbit_state": "descending",
    }
    return stac_item(name, "sentinel-2-l2a", day, box, properties, assets)


def cloudy_classes():
    """A cloud with its shadow, thin cirrus and missing pixels."""
    classes = np.full((48, 48), 4, "uint8")
    classes[10:20, 12:24], classes[20:24, 12:24] = 9, 3
    classes[30:34, 30:40], classes[:3] = 10, 0
    return classes


def sentinel1(folder, day, orbit):
    """Write an image over both tiles."""
    return radar_at(folder, TILES["33TVM"] | TILES["33TWM"], day, orbit)


def radar_at(folder, box, day, orbit="ascending"):
    """Write an image as the Planetary Computer has it: linear gamma0, float32, -32768 where there is none."""
    name = f"S1A_IW_GRDH_1SDV_{day.replace('-', '')}_rtc"
    db, _ = Planet(3).observe("sentinel1", on_planet(box), day)
    linear = (10 ** (db.astype("float64") / 10)).astype("float32")
    linear[:, :, :3] = -32768
    assets = {}
    for key, values in zip(("vv", "vh"), linear, strict=True):
        write_cog(folder / f"{name}_{key}.tif", values, box, nodata=-32768)
        assets[key] = asset(f"{name}_{key}.tif", box)
    properties = {"platform": "SENTINEL-1A", "sat:orbit_state": orbit, "sat:relative_orbit": 44}
    return stac_item(name, "sentinel-1-rtc", day, box, properties, assets)


def landsat(folder, day):
    """Write a level-1 image as the USGS has it: pixel edges 15 m off the multiples of 30 m."""
    box = GeoBox((40, 64), Affine(30, 0, 500385, 0, -30, 5000145), CRS)
    name = f"LC08_L1TP_190028_{day.replace('-', '')}_20240401_02_T1"
    keys = ["pan", "coastal", "blue", "green", "red", "nir08", "swir16", "swir22", "cirrus", "lwir11", "lwir12"]
    rng = np.random.default_rng(5)
    assets = {}
    for key in keys:
        grid = box.zoom_out(0.5) if key == "pan" else box
        write_cog(folder / f"{name}_{key}.tif", rng.integers(6000, 20000, grid.shape).astype("uint16"), grid, nodata=0)
        assets[key] = asset(f"{name}_{key}.tif", grid)
    quality = np.full(box.shape, 21824, "uint16")
    quality[5:9, 20:30], quality[9:11, 20:30] = 22280, 21826
    write_cog(folder / f"{name}_qa.tif", quality, box, nodata=1)
    assets["qa_pixel"] = asset(f"{name}_qa.tif", box)
    properties = {
        "platform": "LANDSAT_8",
        "eo:cloud_cover": 12.5,
        "landsat:wrs_path": "190",
        "landsat:wrs_row": "028",
        "landsat:collection_category": "T1",
        "created": "2024-04-01T00:00:00Z",
    }
    return stac_item(name, "landsat-c2l1", day, box, properties, assets)


def make_archive(folder):
    """Write the files and return the items of an archive of Sentinel-2, Sentinel-1 and Landsat."""
    classes = cloudy_classes()
    return [
        # An older version of the first image, with numbers that would be seen.
        sentinel2(folder, "33TVM", S2_DAYS[0], cloud=1.0, made="20240105T120000", baseline="05.09", add=3000),
        sentinel2(folder, "33TVM", S2_DAYS[0], cloud=1.0),
        sentinel2(folder, "33TWM", S2_DAYS[0], cloud=3.0),
        sentinel2(folder, "33TVM", S2_DAYS[1], cloud=25.0, classes=classes),
        sentinel2(folder, "33TVM", S2_DAYS[2], cloud=5.0),
        sentinel2(folder, "33TWM", S2_DAYS[2], cloud=95.0),
        sentinel2(folder, "33TVM", S2_DAYS[3], cloud=2.0, baseline="03.00", add=0),
        *(sentinel1(folder, day, "ascending" if i else "descending") for i, day in enumerate(RADAR_DAYS)),
        landsat(folder, "2024-01-11"),
    ]


def make_far_archive(folder):
    """Write Sentinel-2 on both sides of the antimeridian, elevation in degrees on each, and radar near a pole."""
    west, east = (sentinel2(folder, tile, S2_DAYS[0], cloud=1.0) for tile in FAR_TILES)
    radar = radar_at(folder, POLAR_TILE, RADAR_DAYS[0])
    # The other image is not cut as RFC 7946 asks, as with some providers.
    for item, box in ((west, FAR_TILES["60KYF"]), (radar, POLAR_TILE)):
        item["geometry"], item["bbox"] = cut_footprint(box)
    return [west, east, *(elevation(folder, lon) for lon in (179, -180)), radar]


def elevation(folder, west):
    """Write a piece of one degree of elevation as the Planetary Computer has it."""
    box = GeoBox((360, 360), Affine(1 / 360, 0, west, 0, -1 / 360, -16), "EPSG:4326")
    name = f"Copernicus_DSM_COG_10_S17_{'E' if west > 0 else 'W'}{abs(west)}"
    lon = np.linspace(west % 360, west % 360 + 1, 361)[:-1] + 1 / 720
    write_cog(folder / f"{name}.tif", np.repeat(((lon - 179) * 100)[None], 360, 0).astype("float32"), box)
    return stac_item(name, "cop-dem-glo-30", "2021-04-22", box, {}, {"data": asset(f"{name}.tif", box)})
