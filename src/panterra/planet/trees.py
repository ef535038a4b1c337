"""Trees, as crowns or as their share of a pixel."""

from __future__ import annotations

import numpy as np

from panterra.planet.canvas import Canvas
from panterra.planet.chance import add_octaves, draw, make_noise, mix
from panterra.planet.surfaces import KIND


def paint_trees(canvas: Canvas) -> None:
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
