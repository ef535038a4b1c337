"""Fields, meadows and forests, and the ways between them."""

from __future__ import annotations

import numpy as np

from panterra.planet.canvas import Canvas
from panterra.planet.chance import Array, add_octaves, draw, make_noise, mix
from panterra.planet.shapes import (
    Voronoi,
    cover_line,
    divide,
    make_blocks,
    make_voronoi,
    smooth_step,
)
from panterra.planet.surfaces import KIND


def paint_country(canvas: Canvas, relief: Array, river: Array, stream: Array, south: float) -> None:
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


def _plant_south(canvas: Canvas, south: float, district: Voronoi, block: Array) -> None:
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


def _paint_rows(canvas: Canvas, t: Array, parcel: Array, forest: Array) -> None:
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
