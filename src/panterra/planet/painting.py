"""The ground, painted from the country down to single trees."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from odc.geo.geobox import GeoBox

from panterra.planet.chance import Array, add_octaves, draw, draw_normal, make_noise, mix
from panterra.planet.ground import SHADOW_REACH, Grid, Ground, Layer, make_grid, number_along
from panterra.planet.shapes import (
    Voronoi,
    cover_line,
    differentiate,
    distance_from_lines,
    divide,
    find_span,
    list_sites,
    make_blocks,
    make_voronoi,
    smooth_step,
)
from panterra.planet.surfaces import COVERS, KIND, SURFACES, VARIANTS

_TOWN_SPACING = 4600.0
# The sun that casts the shadows of trees and houses, whatever the date: half past ten in early summer.
_SHADOW_AZIMUTH, _SHADOW_SLOPE = math.radians(152.0), math.tan(math.radians(53.0))


def paint_ground(seed: int, box: GeoBox, *, south: float = 0.0, motorways: bool = False) -> Ground:
    """Work out what lies where on the planet of a seed."""
    grid = make_grid(box)
    x, y, step = grid.x, grid.y, grid.step
    river = distance_from_lines(grid, {11000: 1, 3600: 0.34, 1400: 0.1, 600: 0.02}, seed, "river")
    stream = distance_from_lines(grid, {4200: 1, 1500: 0.3, 520: 0.07, 190: 0.012}, seed, "stream")
    valley = river / (river + 1000)
    hills = add_octaves(x, y, {9000: 1, 3600: 0.45, 1500: 0.2, 600: 0.08, 250: 0.03}, seed, "hills")
    rolling = 0.62 + 0.42 * hills
    relief = 0.5 * (rolling + np.sqrt(rolling * rolling + np.float32(0.04))) * valley
    elevation = 240 + 30 * make_noise(x, y, 40000, seed, "plain") + 430 * relief
    elevation += valley * 3 * add_octaves(x, y, {400: 1, 130: 0.4, 40: 0.12}, seed, "bumps") + 4 * smooth_step(
        stream, 0, 60
    )
    east, north = differentiate(elevation, step)

    canvas = _Canvas(seed, grid)
    wet = _find_water(canvas, relief, river, stream)
    _paint_country(canvas, relief, river, stream, south)
    _paint_water(canvas, wet, stream)
    _paint_roads(canvas)
    if motorways:
        _paint_motorways(canvas)
    _paint_towns(canvas)
    _paint_trees(canvas)

    texture = np.array([surface.texture for surface in SURFACES.values()], np.float32)
    speck = draw_normal(number_along(x, step), number_along(y, step), seed, "texture")
    speck *= np.float32(min(1, 0.2 + step / 12))
    canvas.shade *= 1 + texture.take(canvas.kind) * (
        0.75 * speck + 0.8 * make_noise(x, y, max(45.0, 3 * step), seed, "texture")
    )
    canvas.shade *= _cast(canvas.height, step)
    canvas.vigour += (
        0.9 * add_octaves(x, y, {420: 1, 140: 0.7, 50: 0.45, 16: 0.35, 5: 0.3, 1.6: 0.3}, seed, "vigour") + 0.18 * speck
    )
    damp = add_octaves(x, y, {600: 1, 230: 0.8, 90: 0.5, 30: 0.25}, seed, "wet")

    # Tables: stands of this window, then the surfaces that lie over others.
    keys, first, stand = np.unique(mix(canvas.key, canvas.kind), return_index=True, return_inverse=True)
    covers = np.repeat([KIND[name] for name in COVERS], VARIANTS)
    cover_keys = mix(seed, "cover", np.arange(len(covers)))
    layers = tuple(Layer(layer.where, layer.cover, layer.row + len(keys)) for layer in canvas.layers)
    codes = np.array([surface.code for surface in SURFACES.values()], np.uint8)
    kind = np.concatenate([canvas.kind.ravel()[first].astype(np.intp), covers])
    code = codes.take(canvas.kind)
    for layer in layers:
        name = kind[layer.row]
        seen = (layer.cover > 0.5) & np.isin(name, [KIND[seen] for seen in ("road", "motorway", "tree", "stream")])
        flat, where = code.ravel(), layer.where[seen]
        flat[where] = np.where(flat[where] == codes[KIND["road"]], flat[where], codes[name[seen]])
    return Ground(
        seed=seed,
        box=box,
        grid=grid,
        stand=stand.reshape(canvas.key.shape),
        kind=kind,
        key=np.concatenate([keys, cover_keys]),
        layers=layers,
        vigour=canvas.vigour,
        wet=damp,
        elevation=elevation,
        east=east,
        north=north,
        shade=canvas.shade,
        height=canvas.height,
        code=code,
    )


class _Canvas:
    """The ground while it is being painted."""

    def __init__(self, seed: int, grid: Grid) -> None:
        self.seed, self.x, self.y, self.step = seed, grid.x, grid.y, grid.step
        shape = (len(grid.y), len(grid.x))
        self.kind = np.empty(shape, np.uint8)
        self.key = np.empty(shape, np.uint64)
        # Share of the ground under trees outside forests.
        self.trees = np.zeros(shape, np.float32)
        self.height = np.zeros(shape, np.float32)
        self.vigour = np.zeros(shape, np.float32)
        self.shade = np.ones(shape, np.float32)
        self.district = np.empty(shape, np.uint64)
        self.lake = np.zeros(shape, bool)
        # Water, marsh and bare ground; roads and roofs, where no tree grows.
        self.wild = np.zeros(shape, bool)
        self.built = np.zeros(shape, bool)
        self.layers: list[Layer] = []

    def lay(self, cover: Array, name: str, variant: Array, window: tuple[slice, slice] | None = None) -> None:
        """Lay a partly covering surface over a window (or all): nothing lies on lakes, few things on wild land."""
        away = self.wild if name in ("track", "margin") else self.lake
        where = np.flatnonzero((cover > 0.02) & ~away[window or ...])
        row = COVERS.index(name) * VARIANTS + np.broadcast_to(variant, cover.shape).ravel()[where] % VARIANTS
        covered = cover.ravel()[where]
        if window is not None:
            rows, cols = np.divmod(where, cover.shape[1])
            where = (rows + window[0].start) * len(self.x) + cols + window[1].start
        self.layers.append(Layer(where, covered, row.astype(np.intp)))
        if name not in ("margin", "tree"):
            self.built.ravel()[where] |= covered > 0.3


def _paint_country(canvas: _Canvas, relief: Array, river: Array, stream: Array, south: float) -> None:
    """Paint fields, meadows and forests, with the ways between them."""
    x, y, step, seed = canvas.x, canvas.y, canvas.step, canvas.seed
    district = make_voronoi(x, y, 1900, seed, "district")
    bend = np.float32(35) * make_noise(x, y, 2300, seed, "bend")
    u, v, key = district.u - bend, district.v + bend, district.key
    canvas.district[:] = key
    block = make_blocks(u, v, 260 + 420 * district.draw("length"), 170 + 260 * district.draw("width"), key)
    across = draw(block.key, "across") < 0.3
    t = np.where(across, u, v)
    start, end = np.where(across, block.u0, block.v0), np.where(across, block.u1, block.v1)
    wanted = 38 + 190 * draw(block.key, "wanted") * district.draw("strips")
    number, low, high = divide(t, start, end, np.maximum(1, np.floor((end - start) / wanted)))
    parcel = mix(block.key, number)

    # Crops come by chance, with a taste of the district; wet ground and hills are grass.
    meadows = smooth_step(make_noise(*district.centres, 9000, seed, "pasture"), -0.3, 2)
    pasture = 0.1 + 0.25 * meadows.ravel()[district.cell]
    chance = (draw(parcel, "crop") - pasture) / (1 - pasture)
    canvas.kind[:] = KIND["grassland"]
    for name, least in (("wheat", 0.0), ("rapeseed", 0.34), ("maize", 0.51), ("alfalfa", 0.81)):
        canvas.kind[chance >= least] = KIND[name]
    flood = river < 160 + 90 * make_noise(x, y, 700, seed, "flood")
    high_ground = relief + 0.35 * draw(block.key, "hill") > 0.95
    canvas.kind[(flood & (draw(parcel, "flooded") < 0.8)) | high_ground] = KIND["grassland"]
    canvas.key[:] = parcel

    # Forest grows on hills; its border follows parcels here and its own will there.
    wood = add_octaves(x, y, {3200: 1, 1300: 0.55, 480: 0.3, 160: 0.12, 50: 0.05}, seed, "forest")
    forest = wood + 2.2 * (relief - 0.42) + 0.9 * (draw(parcel, "wood") - 0.5) > 0.62
    forest &= river > 60
    needles = (
        add_octaves(x, y, {2600: 1, 800: 0.6, 200: 0.3}, seed, "needles")
        + 1.1 * (relief - 0.45)
        + 1.2 * (draw(block.key, "planted") - 0.5)
        > 0.1
    )
    canvas.kind[forest] = np.where(needles, KIND["conifer"], KIND["broadleaf"])[forest]
    clearing = forest & (draw(parcel, "felled") < 0.035)
    canvas.kind[clearing] = KIND["grassland"]
    if south:
        _plant_south(canvas, south, district, block.key)
        forest &= canvas.kind < KIND["orchard"]

    # Machines work along the strips; one pass differs a little from the next.
    passes = draw(parcel, "pass", np.floor(np.where(across, u, v) / 21).astype(np.int64)) - 0.5
    canvas.vigour += np.where(canvas.kind == KIND["grassland"], 0.25, 0.55) * passes * ~forest
    if step < 3:
        _paint_rows(canvas, t - low, parcel, forest)

    # Ways and hedges lie on borders: which ones is the border's own secret, so that both sides agree.
    along = np.minimum(v - block.v0, block.v1 - v)
    border = mix(key, block.row + (block.v1 - v < v - block.v0), "border")
    fate = draw(border, "fate")
    canvas.lay(cover_line(np.minimum(t - low, high - t), 0.9, step) * ~forest, "margin", parcel)
    way = np.where(fate < 0.45, 1.8, 0.0)
    canvas.lay(cover_line(along, way, step), "track", border)
    hedged = district.draw("hedges") * 0.45
    canvas.trees = np.maximum(
        canvas.trees, cover_line(along - 4, np.where((fate > 0.5) & (fate < 0.5 + hedged), 3.5, 0), step)
    )
    ends = np.minimum(u - block.u0, block.u1 - u)
    canvas.lay(cover_line(ends, np.where(district.draw("ends") < 0.6, 1.6, 0), step), "track", block.row)
    main = draw(district.pair, "main")
    canvas.lay(cover_line(district.edge, np.where(main < 0.55, 2.8, 0), step), "road", district.pair)
    canvas.lay(cover_line(district.edge, np.where(main < 0.55, 0, 2.2), step), "track", district.pair)
    canvas.trees = np.maximum(canvas.trees, cover_line(district.edge - 8, np.where(main < 0.2, 3.5, 0), step))
    canvas.trees = np.maximum(canvas.trees, 0.9 * cover_line(stream - 11, 7.0, step))
    canvas.trees[forest] = 0


def _plant_south(canvas: _Canvas, south: float, district: Voronoi, block: Array) -> None:
    """Let orchards, vines and olives take the place of crops, and scrub and dry grass that of meadows and woods."""
    x, y, seed, kind, parcel = canvas.x, canvas.y, canvas.seed, canvas.kind, canvas.key
    grassland = kind == KIND["grassland"]
    forest = (kind == KIND["broadleaf"]) | (kind == KIND["conifer"])
    tended = ~grassland & ~forest & (draw(parcel, "tended") < south * (0.4 + 1.2 * district.draw("tended")))
    taste = 0.75 * district.draw("grove") + 0.25 * draw(parcel, "grove")
    for name, least in (("orchard", 0.0), ("vineyard", 0.36), ("olive grove", 0.66)):
        kind[tended & (taste >= least)] = KIND[name]
    # What nobody tends keeps to no parcel: scrub and dry grass lie in patches, and reach into the woods.
    dry = add_octaves(x, y, {1100: 1, 400: 0.7, 150: 0.4, 60: 0.3}, seed, "dry")
    left = grassland & (draw(block, "left") < south * (0.4 + 1.2 * district.draw("left")))
    left |= forest & (dry > 1.2 - 2 * south)
    patch = mix(district.key, "patch", np.floor(2 * dry).astype(np.int64))
    shrubs = add_octaves(x, y, {500: 1, 170: 0.8, 70: 0.6, 30: 0.5}, seed, "shrubs") > district.draw("shrubs") - 0.6
    kind[left], canvas.key[left] = np.where(shrubs, KIND["scrub"], KIND["steppe"])[left], patch[left]


def _paint_rows(canvas: _Canvas, t: Array, parcel: Array, forest: Array) -> None:
    """Add what only a camera close by sees of a field: wheel tracks, mowing, rows."""
    step = canvas.step
    width = 15 + 12 * draw(parcel, "boom")
    offset = np.abs(np.mod(t, width) - width / 2)
    wheels = np.maximum(cover_line(offset - 0.9, 0.25, step), cover_line(offset + 0.9, 0.25, step))
    tilled = (canvas.kind >= KIND["wheat"]) & (canvas.kind <= KIND["maize"])
    canvas.vigour -= np.float32(2.5) * wheels * tilled
    swath = np.floor(t / 3).astype(np.int64)
    planted = (canvas.kind >= KIND["orchard"]) & (canvas.kind <= KIND["olive grove"])
    canvas.vigour += (draw(parcel, "swath", swath) - 0.5) * np.float32(0.9) * (~tilled & ~forest & ~planted)
    apart = np.where(canvas.kind == KIND["vineyard"], 2.4, 6.0)
    canvas.vigour += (
        np.float32(2.5) * np.cos(t * (2 * np.pi / apart)).astype(np.float32) * (planted & (apart > 2 * step))
    )
    if step < 0.5:
        row = np.where(canvas.kind == KIND["maize"], 1.5, 0.9)
        canvas.vigour += np.float32(0.5) * np.cos(t * (2 * np.pi / row)).astype(np.float32) * tilled


class _Wet(NamedTuple):
    """Where water and what it leaves lies, bool [H, W]."""

    marsh: Array
    bare: Array
    water: Array
    owner: Array
    """uint64 [H, W], the number of the lake or river."""


def _find_water(canvas: _Canvas, relief: Array, river: Array, stream: Array) -> _Wet:
    """Find rivers, lakes, wet land, gravel banks, pits and rock."""
    x, y, seed = canvas.x, canvas.y, canvas.seed
    wander = make_noise(x, y, 900, seed, "wander")
    ragged = wander + 0.6 * make_noise(x, y, 170, seed, "ragged") + 0.25 * make_noise(x, y, 45, seed, "ragged")
    half = 27 + 9 * wander
    lake = np.full(canvas.kind.shape, 1e6, np.float32)
    pit, owner = lake.copy(), np.full(canvas.kind.shape, mix(seed, "river"))
    for target, size, odds, least, most, name in (
        (lake, 5200.0, 0.62, 130, 560, "lake"),
        (pit, 3100.0, 0.6, 80, 230, "pit"),
    ):
        for site in list_sites(x, y, size, 1200, seed, name):
            if float(draw(site.key, "odds")) > odds:
                continue
            radius = least + (most - least) * float(draw(site.key, "radius")) ** 2
            rows, cols = find_span(y, site.y - 1200, site.y + 1200), find_span(x, site.x - 1200, site.x + 1200)
            away = np.hypot((x[cols] - site.x), 1.4 * (y[rows, None] - site.y)).astype(np.float32)
            away += (0.22 * radius + 6) * ragged[rows, cols] - radius
            np.copyto(owner[rows, cols], site.key, where=away < 0)
            np.minimum(target[rows, cols], away, out=target[rows, cols])
    lake = np.where(relief < 0.62, lake, 1e6)
    wet = np.minimum(lake, river - half)
    marsh = (wet < 45 + 55 * ragged) & (make_noise(x, y, 1500, seed, "marsh") > 0.15)
    marsh |= (stream < 14 + 9 * ragged) & (relief < 0.3) & (make_noise(x, y, 2600, seed, "fen") > 0.9)
    bare = (pit < 0) | ((river - half < 6 + 13 * ragged) & (ragged > 0.75)) | (relief + 0.08 * ragged > 1.3)
    pond = pit < -26 - 12 * ragged
    water = (wet < 0) | pond
    canvas.lake |= (lake < 0) | pond
    canvas.wild |= marsh | bare | water
    return _Wet(marsh=marsh, bare=bare, water=water, owner=owner)


def _paint_water(canvas: _Canvas, wet: _Wet, stream: Array) -> None:
    one, other = (np.floor(make_noise(canvas.x, canvas.y, size, canvas.seed, "patch")) for size in (420, 260))
    patch = mix(canvas.district, one.astype(np.int64), other.astype(np.int64))
    for mask, name, key in (
        (wet.marsh, "wetland", patch),
        (wet.bare, "bare", patch),
        (wet.water, "water", wet.owner),
    ):
        canvas.kind[mask] = KIND[name]
        canvas.key[mask] = key[mask]
        canvas.trees[mask] = 0
        canvas.vigour[mask] = 0
    canvas.lay(cover_line(stream, 2.2, canvas.step), "stream", np.zeros(1, np.uint64))


def _paint_roads(canvas: _Canvas) -> None:
    """Join the towns by roads that bend gently."""
    x, y, step, seed = canvas.x, canvas.y, canvas.step, canvas.seed
    towns = {(site.col, site.row): site for site in list_sites(x, y, _TOWN_SPACING, 2.5 * _TOWN_SPACING, seed, "town")}
    for (col, row), a in towns.items():
        for i, j in ((1, 0), (0, 1), (1, 1), (1, -1)):
            b = towns.get((col + i, row + j))
            link = mix(a.key, i, j)
            if b is None or float(draw(link, "odds")) > (0.8 if i * j == 0 else 0.2):
                continue
            length = math.hypot(b.x - a.x, b.y - a.y)
            east, north = (b.x - a.x) / length, (b.y - a.y) / length
            sway = [(float(draw(link, n)) - 0.5) * 0.16 * length / n for n in (1, 2, 3)]
            reach = sum(map(abs, sway)) + 60
            rows = find_span(y, min(a.y, b.y) - reach, max(a.y, b.y) + reach)
            cols = find_span(x, min(a.x, b.x) - reach, max(a.x, b.x) + reach)
            if rows.stop == rows.start or cols.stop == cols.start:
                continue
            dx, dy = (x[cols] - a.x).astype(np.float32), (y[rows, None] - a.y).astype(np.float32)
            along, aside = (dx * east + dy * north) / length, dy * east - dx * north
            bend, lean = np.zeros_like(along), np.zeros_like(along)
            for n, size in enumerate(sway, start=1):
                bend += size * np.sin(n * math.pi * along)
                lean += size * n * math.pi / length * np.cos(n * math.pi * along)
            away = np.abs(aside - bend) / np.sqrt(1 + lean * lean)
            away[(along < 0) | (along > 1)] = 1e6
            canvas.lay(cover_line(away, 3.6 + 2.4 * float(draw(link, "width")), step), "road", link, (rows, cols))
            if float(draw(link, "avenue")) < 0.5:
                canvas.trees[rows, cols] = np.maximum(canvas.trees[rows, cols], 0.8 * cover_line(away - 11, 4.0, step))


def _paint_motorways(canvas: _Canvas) -> None:
    """Draw motorways: two carriageways and a strip of grass, bending over the country every few kilometres."""
    grid = Grid(canvas.x, canvas.y, canvas.step, 1, (0, 0, 0, 0))
    away = distance_from_lines(grid, {3200: 1, 1200: 0.12}, canvas.seed, "motorway")
    canvas.lay(cover_line(away, 19.0, canvas.step), "margin", np.zeros(1, np.uint64))
    canvas.trees *= away > 22
    canvas.lay(cover_line(away - 8.5, 6.5, canvas.step), "motorway", np.zeros(1, np.uint64))


def _paint_towns(canvas: _Canvas) -> None:
    """Paint towns: quarters with their own street grid, lots, houses and gardens."""
    x, y, step, seed = canvas.x, canvas.y, canvas.step, canvas.seed
    for site in list_sites(x, y, _TOWN_SPACING, 2300, seed, "town"):
        hill = float(make_noise(np.array([site.x]), np.array([site.y]), 9000, seed, "hills", 9000)[0, 0])
        radius = 170 + (1100 if hill < 0.5 else 200) * float(draw(site.key, "radius")) ** 2.2
        rows = find_span(y, site.y - 1.7 * radius, site.y + 1.7 * radius)
        cols = find_span(x, site.x - 1.7 * radius, site.x + 1.7 * radius)
        if rows.stop == rows.start or cols.stop == cols.start:
            continue
        quarter = make_voronoi(x[cols], y[rows], 620, site.key, "quarter")
        middle = np.hypot(quarter.centres[0] - site.x, quarter.centres[1][:, None] - site.y).ravel()[quarter.cell]
        core = (middle < 0.45 * radius) & (radius > 450)
        works = (quarter.draw("works") < 0.2) & (radius > 450) & ~core
        length = np.where(works, 190, 125).astype(np.float32) - np.float32(40) * core
        block = make_blocks(quarter.u, quarter.v, length, np.where(works, 150, 78).astype(np.float32), quarter.key)
        # A lot belongs to the town or not as a whole: its middle and its block decide.
        u, v = quarter.u, quarter.v
        wide = np.where(works, 45 + 50 * draw(block.key, "hall"), 17 + 9 * quarter.draw("lot"))
        i, u0, u1 = divide(u, block.u0, block.u1, np.maximum(1, np.rint((block.u1 - block.u0) / wide)))
        deep = np.where(works, 80, 36).astype(np.float32)
        j, v0, v1 = divide(v, block.v0, block.v1, np.maximum(1, np.rint((block.v1 - block.v0) / deep)))
        lot = mix(block.key, i, j)
        to_u, to_v = (u0 + u1) / 2 - u, (v0 + v1) / 2 - v
        dx = (x[cols] - site.x).astype(np.float32) + to_u * quarter.cos - to_v * quarter.sin
        dy = (y[rows, None] - site.y).astype(np.float32) + to_u * quarter.sin + to_v * quarter.cos
        bearing, lobes = np.arctan2(dy, dx), 6.3 * float(draw(site.key, "lobes"))
        outline = radius * (1 + 0.22 * np.cos(2 * bearing + lobes) + 0.16 * np.cos(3 * bearing - 2 * lobes))
        away = np.hypot(dx, dy) / outline + 0.3 * (draw(block.key, "edge") - 0.5) + 0.15 * (draw(lot, "edge") - 0.5)
        urban = (away < 1) & ~canvas.wild[rows, cols]
        if not urban.any():
            continue
        park = urban & ~works & (draw(block.key, "park") < 0.07)

        kind, key, trees, height = (
            layer[rows, cols] for layer in (canvas.kind, canvas.key, canvas.trees, canvas.height)
        )
        paved = works | (draw(lot, "paved") < np.where(core, 0.75, 0.1))
        kind[urban] = np.where(park, KIND["grassland"], np.where(paved, KIND["yard"], KIND["garden"]))[urban]
        key[urban] = np.where(park, block.key, lot)[urban]
        leafy = np.where(park, 0.55, np.where(paved, 0.04, 0.12 + 0.3 * draw(lot, "leafy"))).astype(np.float32)
        trees[urban] = leafy[urban]

        window = (rows, cols)
        street = np.minimum(np.minimum(u - block.u0, block.u1 - u), np.minimum(v - block.v0, block.v1 - v))
        street = np.minimum(street, quarter.edge - 1)
        street_cover = cover_line(street, np.where(works, 5.0, 3.9), step) * urban
        trees *= 1 - street_cover
        canvas.lay(street_cover, "road", block.row, window)

        # Houses stand back from the street, halls fill their lot, old centres are closed rows.
        r, q = draw(lot, "house"), draw(lot, "depth")
        side = np.where(core, -0.5, np.where(works, 6.0, 2.2 + 2 * r))
        front = np.where(core, 4.5, np.where(works, 9.0, 7.0 + 3 * q))
        back = np.where(works, 7.0, np.maximum(4.0, (v1 - v0) - front - (9.5 + 4 * r)))
        facing = np.where(j == 0, v - v0, v1 - v)
        behind = np.where(j == 0, v1 - v, v - v0)
        inside = np.minimum(np.minimum(u - u0, u1 - u) - side, np.minimum(facing - front, behind - back))
        inside = np.minimum(inside, street - 4.5)
        roof = np.clip(0.5 + inside / step, 0, 1).astype(np.float32)
        roof *= urban & ~park & (draw(lot, "empty") > np.where(works, 0.25, 0.08))
        trees *= 1 - roof
        storeys = np.where(core, 12.0, np.where(works, 9.0, 6.5)).astype(np.float32) * (0.8 + 0.5 * r)
        tint = draw(lot, "roof")
        metal = works & (tint < 0.45)
        tiled = ~works & (tint < 0.68)
        for name, mask in (("metal roof", metal), ("tile roof", tiled), ("slate roof", ~metal & ~tiled)):
            canvas.lay(roof * mask, name, lot, window)
        ridge = np.clip(np.minimum(facing - front, behind - back), 0, 6).astype(np.float32)
        gable = np.where(works, 0.3, np.where(step < 3, 0.6 * ridge, 1.5))
        np.copyto(height, (storeys + gable) * roof, where=roof > 0.3)


def _paint_trees(canvas: _Canvas) -> None:
    """Let trees stand: single crowns where pixels show them, else their share of a pixel."""
    x, y, step, seed = canvas.x, canvas.y, canvas.step, canvas.seed
    forest = (canvas.kind == KIND["broadleaf"]) | (canvas.kind == KIND["conifer"])
    tall = np.where(canvas.kind == KIND["conifer"], 25.0, 21.0).astype(np.float32) * (
        0.45 + 0.6 * draw(canvas.key, "age")
    )
    if step > 2.6:
        cover = canvas.trees * np.clip(0.85 + 0.3 * make_noise(x, y, 35, seed, "crowns"), 0, 1)
        canvas.lay(cover, "tree", np.zeros(1, np.uint64))
        canvas.height = np.where(forest, tall, np.maximum(canvas.height, 9 * cover))
        return
    size = 6.0
    col, row = np.floor(x / size), np.floor(y / size)
    cols, rows = np.arange(col.min() - 1, col.max() + 2), np.arange(row.min() - 1, row.max() + 2)
    key = mix(seed, "crown", rows[:, None].astype(np.int64), cols.astype(np.int64))
    centre_x, centre_y = (0.1 + 0.8 * draw(key, "x")) * size, (0.1 + 0.8 * draw(key, "y")) * size
    # A tree is what the ground at its foot says, wherever its crown reaches.
    foot_col = np.floor((cols * size + centre_x) / step) - np.floor(x[0] / step)
    foot_row = np.floor(y[0] / step) - np.floor((rows[:, None] * size + centre_y) / step)
    foot = np.clip(foot_row, 0, len(y) - 1).astype(np.intp), np.clip(foot_col, 0, len(x) - 1).astype(np.intp)
    wooded = forest[foot]
    stem = np.where(wooded, tall[foot] - 5, 4).astype(np.float32)
    spread = 2.2 + 2.6 * draw(key, "spread")
    wanted = np.where(wooded, 1.0, canvas.trees[foot]) * ~canvas.built[foot]
    spread[draw(key, "chance") >= wanted] = 1e-3
    in_x, in_y = (x - col * size).astype(np.float32), (y - row * size).astype(np.float32)[:, None]
    base = (row - rows[0]).astype(np.intp)[:, None] * len(cols) + (col - cols[0]).astype(np.intp)
    dome = np.zeros(base.shape, np.float32)
    owner = base.copy()
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            at = base + (i * len(cols) + j)
            dx = in_x - (centre_x.take(at) + np.float32(j * size))
            dy = in_y - (centre_y.take(at) + np.float32(i * size))
            wide = spread.take(at)
            high = wide - (dx * dx + dy * dy) / wide
            taller = high > dome
            np.copyto(dome, high, where=taller)
            np.copyto(owner, at, where=taller)
    crown = np.clip(dome / np.float32(max(step, 0.3)), 0, 1)
    leaves = add_octaves(x, y, {2.2: 1, 0.8: 0.8}, seed, "leaves")
    canvas.lay(np.where(forest & ~canvas.built, 0, crown).astype(np.float32), "tree", key.take(owner))
    pointed = np.where(canvas.kind == KIND["conifer"], 2.4, 1.3).astype(np.float32)
    canvas.height = np.maximum(canvas.height, (stem.take(owner) + pointed * dome + 0.25 * leaves) * (crown > 0.4))
    bright = (0.82 + 0.36 * draw(key, "bright")).take(owner) + np.float32(0.08) * leaves
    canvas.shade *= np.where(crown > 0, bright, np.where(forest & ~canvas.built, np.float32(0.55), np.float32(1)))


def _cast(height: Array, step: float) -> Array:
    """Give the light that trees and houses leave: their sunny sides are brighter, their shadows dark."""
    east, north = math.sin(_SHADOW_AZIMUTH), math.cos(_SHADOW_AZIMUTH)
    rows, cols = height.shape
    light = np.ones_like(height)
    blocked = np.full_like(height, -1e6)
    stride = max(step, 0.4)
    for n in range(1, math.ceil(SHADOW_REACH / stride) + 1):
        down, right = round(-north * n * stride / step), round(east * n * stride / step)
        if down >= rows or right >= cols:
            break
        lower = height[down:, right:] - np.float32(n * stride * _SHADOW_SLOPE)
        target = blocked[: rows - down, : cols - right]
        np.maximum(target, lower, out=target)
        if n == 1:
            rise = height[: rows - down, : cols - right] - height[down:, right:]
            light[: rows - down, : cols - right] += np.clip(rise * np.float32(0.3 / stride), -0.35, 0.35)
    return light * (1 - np.float32(0.62) * np.clip((blocked - height) / np.float32(1.2 + 0.6 * step), 0, 1))
