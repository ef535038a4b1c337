"""What OpenStreetMap says is where."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyogrio
import pyproj
import shapely
from jaxtyping import Int, UInt8
from odc.geo.geobox import GeoBox
from rasterio.features import rasterize

from panterra.data.windows import Cell, cells_touched, outlines
from panterra.errors import InputError
from panterra.imagery.labels import LATITUDES, LONGITUDES
from panterra.imagery.raster import crs_for_rasterio
from panterra.modalities import OSM_CATEGORIES

RASTER_M = 2.5
"""Pixel size at which features are burned."""

Rules = Mapping[str, tuple[str, ...]]
"""Category -> tags, one of which a feature must have: `key=value`, `key=*` for any value but "no", joined with &."""

CATEGORIES: Rules = {
    # Masts, towers and other things that stand alone
    "aerialway_pylon": ("aerialway=pylon",),
    "chimney": ("man_made=chimney",),
    "communications_tower": (
        "man_made=communications_tower",
        "man_made=tower & tower:type=communication",
        "man_made=mast & tower:type=communication",
    ),
    "cooling_tower": ("man_made=tower & tower:type=cooling",),
    "crane": ("man_made=crane",),
    "flagpole": ("man_made=flagpole",),
    "fountain": ("amenity=fountain",),
    "lighthouse": ("man_made=lighthouse",),
    "obelisk": ("man_made=obelisk",),
    "observatory": ("man_made=observatory",),
    "satellite_dish": ("man_made=satellite_dish",),
    "telescope": ("man_made=telescope",),
    "water_tower": ("man_made=water_tower",),
    "windmill": ("man_made=windmill",),
    # Aviation
    "aerodrome": ("aeroway=aerodrome",),
    "airstrip": ("aeroway=airstrip",),
    "apron": ("aeroway=apron",),
    "hangar": ("aeroway=hangar", "building=hangar"),
    "helipad": ("aeroway=helipad",),
    "runway": ("aeroway=runway",),
    "taxiway": ("aeroway=taxiway",),
    "terminal": ("aeroway=terminal",),
    # Energy
    "gasometer": ("man_made=gasometer",),
    "generator_solar": ("power=generator & generator:source=solar",),
    "generator_wind": ("power=generator & generator:source=wind",),
    "petroleum_well": ("man_made=petroleum_well",),
    "pipeline": ("man_made=pipeline",),
    "power_line": ("power=line",),
    "power_plant": ("power=plant",),
    "power_plant_hydro": ("power=plant & plant:source=hydro",),
    "power_plant_solar": ("power=plant & plant:source=solar",),
    "power_substation": ("power=substation",),
    "power_tower": ("power=tower",),
    # Industry and mining
    "adit": ("man_made=adit", "man_made=mineshaft"),
    "bunker_silo": ("man_made=bunker_silo",),
    "construction": ("landuse=construction",),
    "industrial": ("landuse=industrial",),
    "kiln": ("man_made=kiln",),
    "landfill": ("landuse=landfill",),
    "port": ("landuse=port", "industrial=port"),
    "quarry": ("landuse=quarry",),
    "salt_pond": ("landuse=salt_pond",),
    "scrap_yard": ("industrial=scrap_yard",),
    "silo": ("man_made=silo",),
    "spoil_heap": ("man_made=spoil_heap",),
    "storage_tank": ("man_made=storage_tank",),
    "tailings_pond": ("man_made=tailings_pond",),
    "wastewater_plant": ("man_made=wastewater_plant",),
    "water_works": ("man_made=water_works",),
    "works": ("man_made=works",),
    # Roads, rails and ships
    "amenity_fuel": ("amenity=fuel",),
    "bridge": ("man_made=bridge", "bridge=yes & highway=*", "bridge=yes & railway=*"),
    "cable_car": ("aerialway=cable_car", "aerialway=gondola", "aerialway=chair_lift"),
    "ferry_terminal": ("amenity=ferry_terminal",),
    "highway": ("highway=*",),
    "marina": ("leisure=marina",),
    "motorway": ("highway=motorway", "highway=trunk"),
    "parking": ("amenity=parking",),
    "pier": ("man_made=pier",),
    "rail": ("railway=rail",),
    "railway_station": ("railway=station",),
    "railway_yard": ("landuse=railway",),
    "roundabout": ("junction=roundabout",),
    "track": ("highway=track",),
    # Water and coast
    "aquaculture": ("landuse=aquaculture",),
    "beach": ("natural=beach",),
    "breakwater": ("man_made=breakwater", "man_made=groyne"),
    "canal": ("waterway=canal",),
    "coastline": ("natural=coastline",),
    "dam": ("waterway=dam",),
    "glacier": ("natural=glacier",),
    "lake": ("water=lake",),
    "lock": ("waterway=lock_gate", "lock=yes", "water=lock"),
    "mangrove": ("natural=wetland & wetland=mangrove",),
    "mudflat": ("natural=mud", "natural=wetland & wetland=tidalflat"),
    "reef": ("natural=reef",),
    "reservoir": ("water=reservoir", "landuse=reservoir"),
    "river": ("waterway=river", "water=river"),
    "saltmarsh": ("natural=wetland & wetland=saltmarsh",),
    "stream": ("waterway=stream",),
    "swamp": ("natural=wetland & wetland=swamp", "natural=wetland & wetland=bog"),
    "waterfall": ("waterway=waterfall",),
    "weir": ("waterway=weir",),
    "wetland": ("natural=wetland",),
    # Land cover and farming
    "bare_rock": ("natural=bare_rock",),
    "cliff": ("natural=cliff",),
    "farmland": ("landuse=farmland",),
    "farmyard": ("landuse=farmyard",),
    "forest": ("landuse=forest", "natural=wood"),
    "grassland": ("natural=grassland",),
    "greenhouse": ("landuse=greenhouse_horticulture", "building=greenhouse"),
    "heath": ("natural=heath",),
    "meadow": ("landuse=meadow",),
    "orchard": ("landuse=orchard",),
    "peak": ("natural=peak",),
    "sand": ("natural=sand", "natural=dune"),
    "scree": ("natural=scree",),
    "scrub": ("natural=scrub",),
    "tree_row": ("natural=tree_row",),
    "vineyard": ("landuse=vineyard",),
    "volcano": ("natural=volcano",),
    # Settlements and what people do there
    "archaeological_site": ("historic=archaeological_site",),
    "building": ("building=*",),
    "campsite": ("tourism=camp_site", "tourism=caravan_site"),
    "castle": ("historic=castle", "historic=fort"),
    "cemetery": ("landuse=cemetery",),
    "commercial": ("landuse=commercial", "landuse=retail"),
    "golf_course": ("leisure=golf_course",),
    "hospital": ("amenity=hospital",),
    "leisure": ("leisure=*",),
    "military": ("landuse=military", "military=*"),
    "nature_reserve": ("leisure=nature_reserve", "boundary=national_park"),
    "place_of_worship": ("amenity=place_of_worship",),
    "prison": ("amenity=prison",),
    "residential": ("landuse=residential",),
    "school": ("amenity=school", "amenity=university"),
    "ski_piste": ("piste:type=downhill",),
    "stadium": ("leisure=stadium",),
    "swimming_pool": ("leisure=swimming_pool",),
    "village": ("place=village", "place=hamlet"),
    "town": ("place=town", "place=city"),
}
"""Among these the places of a corpus are balanced; the names of the raster's categories are those of the published."""

RASTER_CATEGORIES: Rules = {name: CATEGORIES[name] for name in OSM_CATEGORIES}

LINES = frozenset(
    (
        *("breakwater", "bridge", "cable_car", "canal", "cliff", "coastline", "dam", "highway", "motorway", "pier"),
        *("pipeline", "power_line", "rail", "river", "roundabout", "ski_piste", "stream", "taxiway", "track"),
        *("tree_row", "weir"),
    )
)
"""Categories in which a closed line is a line; in the others it bounds an area."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Things on the map, one row per category that a thing belongs to."""

    names: tuple[str, ...]
    """Of the categories."""
    category: Int[np.ndarray, " n"]
    """Number of the category in `names`."""
    geometry: np.ndarray
    """shapely, in degrees."""

    def __len__(self) -> int:
        return len(self.category)

    def take(self, which: np.ndarray) -> Features:
        """Return some of the rows."""
        return Features(names=self.names, category=self.category[which], geometry=self.geometry[which])


# Tags


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    category: int
    conditions: tuple[tuple[str, str], ...]

    def fits(self, tags: Mapping[str, str]) -> bool:
        return all(_meets(tags.get(key), value) for key, value in self.conditions)


def _meets(has: str | None, wanted: str) -> bool:
    # OpenStreetMap separates several values with semicolons.
    return has is not None and (has != "no" if wanted == "*" else wanted in has.replace(" ", "").split(";"))


def _compile(rules: Rules) -> dict[str, list[_Rule]]:
    """Sort rules by the key that they look at first."""
    compiled: dict[str, list[_Rule]] = {}
    for number, (name, alternatives) in enumerate(rules.items()):
        for text in alternatives:
            parts = [part.strip().partition("=") for part in text.split("&")]
            conditions = tuple((key, value) for key, _, value in parts)
            if not all(key and value for key, value in conditions):
                raise InputError(f"rule {text!r} of category {name!r} is not understood; write key=value & key=value")
            compiled.setdefault(conditions[0][0], []).append(_Rule(category=number, conditions=conditions))
    return compiled


def _categorise(tags: Mapping[str, str], compiled: Mapping[str, Sequence[_Rule]]) -> list[int]:
    return sorted({rule.category for key in tags for rule in compiled.get(key, ()) if rule.fits(tags)})


def categories_of(tags: Mapping[str, str], rules: Rules = CATEGORIES) -> tuple[str, ...]:
    """Name the categories that tags belong to, in the order of the rules."""
    names = tuple(rules)
    return tuple(names[i] for i in _categorise(tags, _compile(rules)))


_PAIR = re.compile(r'"((?:[^"\\]|\\.)*)"=>"((?:[^"\\]|\\.)*)"', re.DOTALL)


def _parse_tags(value: Any) -> dict[str, str]:
    """Read tags as GDAL writes them ("key"=>"value"), as JSON, or as a map or struct of Parquet."""
    if isinstance(value, str):
        if value.lstrip().startswith("{"):
            try:
                value = json.loads(value)
            except ValueError:
                return {}
        else:
            return {re.sub(r"\\(.)", r"\1", k): re.sub(r"\\(.)", r"\1", v) for k, v in _PAIR.findall(value)}
    pairs = value.items() if isinstance(value, Mapping) else value or ()
    return {str(key): str(text) for key, text in pairs if text is not None}


# Reading


def iter_features(path: str | Path, rules: Rules = CATEGORIES) -> Iterator[Features]:
    """Read the features of some categories in batches of bounded memory.

    Takes what GDAL reads, OSM extracts (.osm.pbf, .osm) among it, and GeoParquet. Tags are columns by the name of their
    key, or all in a column `tags` or `other_tags`: as GDAL writes them, JSON, or a map. Relations that are neither
    areas nor lines are left out.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no file {path}")
    compiled = _compile(rules)
    keys = sorted({key for rules_of in compiled.values() for rule in rules_of for key, _ in rule.conditions})
    names = tuple(rules)
    tagged = False
    for batch, geometry in _batches(path):
        present = [k for k in keys if k in batch.schema.names]
        packed = [k for k in ("tags", "other_tags") if k in batch.schema.names]
        tagged = tagged or bool(present or packed)
        rows = _maybe(batch, present, packed, keys)
        if not len(rows):
            continue
        chosen = batch.take(pa.array(rows))
        columns = {k: chosen.column(k).to_pylist() for k in (*present, *packed)}
        owner, category = [], []
        for i in range(len(rows)):
            tags = {k: str(columns[k][i]) for k in present if columns[k][i] is not None}
            for k in packed:
                tags |= _parse_tags(columns[k][i])
            found = _categorise(tags, compiled)
            owner += [i] * len(found)
            category += found
        if owner:
            shapes = geometry(chosen)[np.array(owner)]
            yield _clean(Features(names=names, category=np.array(category, np.int64), geometry=shapes))
    if not tagged:
        raise InputError(
            f"{path} has no column tags or other_tags and none named after a key such as {', '.join(keys[:3])}; "
            "give an OpenStreetMap extract or a table that keeps the tags"
        )


def _clean(features: Features) -> Features:
    """Leave out what has no place; make areas of closed lines where their category is no line."""
    kept = features.take(~(shapely.is_missing(features.geometry) | shapely.is_empty(features.geometry)))
    lines = np.array([name in LINES for name in kept.names])
    closed = shapely.is_ring(kept.geometry) & (shapely.get_type_id(kept.geometry) == 1) & ~lines[kept.category]
    shapes = kept.geometry.copy()
    for i in np.flatnonzero(closed):
        shapes[i] = shapely.Polygon(shapes[i].coords)
    return Features(names=kept.names, category=kept.category, geometry=shapes)


def _maybe(
    batch: pa.RecordBatch, present: Sequence[str], packed: Sequence[str], keys: Sequence[str]
) -> Int[np.ndarray, " k"]:
    """List the rows that have any of the keys, so that few are looked at one by one."""
    some = np.zeros(batch.num_rows, bool)
    for key in present:
        some |= np.asarray(batch.column(key).is_valid())
    pattern = '"(' + "|".join(re.escape(key) for key in keys) + ')"'
    for key in packed:
        column = batch.column(key)
        text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        some |= np.asarray(
            pc.fill_null(pc.match_substring_regex(column, pattern), False) if text else column.is_valid()
        )
    return np.flatnonzero(some)


def _batches(path: Path) -> Iterator[tuple[pa.RecordBatch, Any]]:
    """Yield tables with a function that makes the geometries, in degrees, of one like them."""
    if path.suffix.lower() in (".parquet", ".pq", ".geoparquet"):
        yield from _parquet_batches(path)
        return
    try:
        for layer in pyogrio.list_layers(path)[:, 0]:
            if layer == "other_relations":
                continue
            with pyogrio.open_arrow(path, layer=layer, use_pyarrow=True, batch_size=65_536) as (meta, reader):
                column = meta["geometry_name"] or "wkb_geometry"
                for batch in reader:
                    if column not in batch.schema.names:
                        raise InputError(f"layer {layer} of {path} has no geometries; features need places")
                    yield batch, _from_wkb(column, meta["crs"])
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError) as error:
        raise InputError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def _from_wkb(column: str, crs: Any) -> Any:
    source = None if crs is None else pyproj.CRS.from_user_input(crs)
    degrees = source is None or source.equals(pyproj.CRS(4326), ignore_axis_order=True) or source.is_geographic
    to_degrees = None if degrees else pyproj.Transformer.from_crs(source, 4326, always_xy=True)

    def geometry(batch: pa.RecordBatch) -> np.ndarray:
        shapes: np.ndarray = shapely.from_wkb(np.array(batch.column(column).to_pylist(), dtype=object))
        if to_degrees is not None:
            shapes = shapely.transform(shapes, to_degrees.transform, interleaved=False)
        return shapes

    return geometry


def _parquet_batches(path: Path) -> Iterator[tuple[pa.RecordBatch, Any]]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"cannot read {path} as Parquet: {str(error).splitlines()[0]}") from None
    geo = json.loads((file.schema_arrow.metadata or {}).get(b"geo", b"{}"))
    if geo:
        column = geo["primary_column"]
        about = geo["columns"][column]
        if about.get("encoding", "WKB").upper() != "WKB":
            raise InputError(f"{path} keeps geometries as {about['encoding']}; write them as WKB")
        geometry = _from_wkb(column, about["crs"] if about.get("crs") else None)
    else:
        by_name = {name.lower(): name for name in file.schema_arrow.names}
        lon, lat = (next((by_name[n] for n in names if n in by_name), None) for names in (LONGITUDES, LATITUDES))
        if lon is None or lat is None:
            raise InputError(f"{path} is neither GeoParquet nor a table with lon and lat; convert it to GeoParquet")

        def geometry(batch: pa.RecordBatch) -> np.ndarray:
            x, y = (np.asarray(batch.column(name).to_pylist(), np.float64) for name in (lon, lat))
            points: np.ndarray = shapely.points(x, y)
            return points

    for batch in file.iter_batches(batch_size=65_536):
        yield batch, geometry


def read_features(path: str | Path, rules: Rules = RASTER_CATEGORIES, *, cells: Sequence[Cell] = ()) -> Features:
    """Read the features of some categories, where `cells` are given only those that reach one of them."""
    tree = shapely.STRtree(outlines(cells)) if cells else None
    kept = []
    for batch in iter_features(path, rules):
        near = np.arange(len(batch)) if tree is None else np.unique(tree.query(batch.geometry, "intersects")[0])
        kept.append(batch.take(near))
    return Features(
        names=tuple(rules),
        category=np.concatenate([np.empty(0, np.int64), *(f.category for f in kept)]),
        geometry=np.concatenate([np.empty(0, object), *(f.geometry for f in kept)]),
    )


def cells_by_category(batches: Iterable[Features]) -> dict[str, set[Cell]]:
    """Collect the cells that hold a feature of each category."""
    found: dict[str, set[Cell]] = {}
    for features in batches:
        for number, cell in zip(*cells_touched(features.geometry, features.category), strict=True):
            found.setdefault(features.names[number], set()).add(cell)
    return found


# Rasters


def rasterise(features: Features, box: GeoBox) -> UInt8[np.ndarray, "c h w"]:
    """Burn features into one layer of 0 and 1 per category.

    Areas are filled where they hold the centre of a pixel, their holes left out, and mark at least one pixel; lines are
    one pixel wide, points one pixel.
    """
    height, width = box.shape
    out = np.zeros((len(features.names), height, width), np.uint8)
    to_box = pyproj.Transformer.from_crs(4326, crs_for_rasterio(box.crs).to_wkt(), always_xy=True)
    shapes = shapely.transform(features.geometry, to_box.transform, interleaved=False)
    bounds = box.boundingbox
    near = shapely.intersects(shapely.box(bounds.left, bounds.bottom, bounds.right, bounds.top), shapes)
    for number in np.unique(features.category[near]):
        here = shapes[near & (features.category == number)]
        areas = shapely.get_dimensions(here) == 2
        # An area narrower than a pixel may hold no centre; a point inside it always lies in some pixel.
        burned = np.concatenate([here, shapely.point_on_surface(here[areas])])
        rasterize(((shape, 1) for shape in burned), out=out[number], transform=box.affine)
    return out


def to_common_grid(raster: UInt8[np.ndarray, "c h w"], *, keep_all: bool) -> UInt8[np.ndarray, "c hh ww"]:
    """Bring 2.5 m to 10 m: the first pixel of each 4 x 4, as published, or, with `keep_all`, whether any is marked.

    The first pixel misses most points and many lines.
    """
    if not keep_all:
        return raster[:, ::4, ::4]
    bands, height, width = raster.shape
    marked: UInt8[np.ndarray, "c hh ww"] = raster.reshape(bands, height // 4, 4, width // 4, 4).max((2, 4))
    return marked
