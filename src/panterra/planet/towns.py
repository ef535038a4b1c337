"""Towns, and the roads that join them."""

from __future__ import annotations

import math

import numpy as np

from panterra.planet.canvas import Canvas
from panterra.planet.chance import draw, make_noise, mix
from panterra.planet.ground import Grid
from panterra.planet.shapes import (
    cover_line,
    distance_from_lines,
    divide,
    find_span,
    list_sites,
    make_blocks,
    make_voronoi,
)
from panterra.planet.surfaces import KIND

_TOWN_SPACING = 4600.0


def paint_roads(canvas: Canvas) -> None:
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


def paint_motorways(canvas: Canvas) -> None:
    """Draw motorways: two carriageways and a strip of grass, bending over the country every few kilometres."""
    grid = Grid(canvas.x, canvas.y, canvas.step, 1, (0, 0, 0, 0))
    away = distance_from_lines(grid, {3200: 1, 1200: 0.12}, canvas.seed, "motorway")
    canvas.lay(cover_line(away, 19.0, canvas.step), "margin", np.zeros(1, np.uint64))
    canvas.trees *= away > 22
    canvas.lay(cover_line(away - 8.5, 6.5, canvas.step), "motorway", np.zeros(1, np.uint64))


def paint_towns(canvas: Canvas) -> None:
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
