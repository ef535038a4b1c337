"""Where windows and tiles lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

from panterra.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A rectangle of rows and columns."""

    row: int
    col: int
    height: int
    width: int

    def scaled(self, factor: int) -> Window:
        """Express the window in a grid `factor` times finer."""
        return Window(
            row=self.row * factor, col=self.col * factor, height=self.height * factor, width=self.width * factor
        )

    def within(self, other: Window) -> Window:
        """Express the window relative to the corner of another."""
        return Window(row=self.row - other.row, col=self.col - other.col, height=self.height, width=self.width)

    @property
    def slices(self) -> tuple[slice, slice]:
        """Its rows and columns, to index an array with."""
        return slice(self.row, self.row + self.height), slice(self.col, self.col + self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Borders:
    """Where windows give way to each other along rows or columns."""

    middles: tuple[int, ...]
    """Patches before which they do."""
    lag: int
    """How many patches apart two must be for windows not to be blended between them, or as far as windows allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Windows and tiles along rows or columns, in patches.

    Windows start every `stride` patches from 0, and a last one ends at the border; a size below a window makes the
    window smaller. A tile is `tile` patches long and owns the windows that start in it, so each window has one owner.
    """

    size: int
    window: int
    stride: int
    tile: int

    @classmethod
    def cut(cls, size: int, *, window: int, overlap: int, tile: int) -> Axis:
        """Choose the tile as the whole number of strides that fits into `tile`, but never below a window.

        Then what a tile's windows cover reaches the next tile at most, never the one behind it.
        """
        window = min(window, size)
        stride = max(window - overlap, 1)
        return cls(size=size, window=window, stride=stride, tile=max(tile // stride, -(-window // stride)) * stride)

    @property
    def num_tiles(self) -> int:
        return -(-self.size // self.tile)

    @property
    def num_windows(self) -> int:
        return -(-(self.size - self.window) // self.stride) + 1

    def start(self, window: int) -> int:
        """Return where a window starts."""
        return min(window * self.stride, self.size - self.window)

    def owned(self, tile: int) -> range:
        """Number the windows that start in a tile; none does in a short last one."""
        first, stop = (min(t * (self.tile // self.stride), self.num_windows) for t in (tile, tile + 1))
        # The last window is shifted back to end at the border, which may be into the tile before.
        last = self.num_windows - 1
        home = self.start(last) // self.tile
        if tile == home:
            stop = self.num_windows
        elif tile > home:
            first = stop = self.num_windows
        return range(first, stop)

    def core(self, tile: int) -> tuple[int, int]:
        """Return where a tile begins and how long it is."""
        begin = tile * self.tile
        return begin, min(self.tile, self.size - begin)

    def borders(self) -> Borders:
        """Return where one window gives way to the next: before the patch in the middle of what both cover."""
        starts = [self.start(i) for i in range(self.num_windows)]
        middles = [(start + before + self.window) // 2 for before, start in pairwise(starts)]
        return Borders(middles=tuple(middles), lag=max(1, min(self.window - self.stride + 1, self.stride // 2)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A unit of work; all windows in patches of the whole map."""

    row: int
    col: int
    """Its number along the rows and columns of tiles."""
    core: Window
    """The patches that it finishes."""
    windows: tuple[Window, ...]
    """The windows that start in the core, by rows."""
    reach: Window
    """The core and all that its windows cover."""

    @property
    def name(self) -> str:
        return f"{self.row:05d}_{self.col:05d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lattice:
    """Windows and tiles of a map."""

    rows: Axis
    cols: Axis

    @classmethod
    def cut(cls, height: int, width: int, *, window: int, overlap: int, tile: int) -> Lattice:
        """Lay windows and tiles over `height` x `width` patches; all lengths in patches."""
        if height < 1 or width < 1:
            raise InputError(f"the area is {height} x {width} patches; give one that holds at least one patch")
        if window < 1 or not 0 <= overlap < window:
            raise InputError(f"windows of {window} patches overlap by {overlap}; wanted 0 <= overlap < window")
        rows, cols = (Axis.cut(size, window=window, overlap=overlap, tile=tile) for size in (height, width))
        return cls(rows=rows, cols=cols)

    @property
    def window_shape(self) -> tuple[int, int]:
        return self.rows.window, self.cols.window

    @property
    def num_tiles(self) -> int:
        return self.rows.num_tiles * self.cols.num_tiles

    @property
    def num_windows(self) -> int:
        return self.rows.num_windows * self.cols.num_windows

    def tiles(self) -> Iterator[Tile]:
        """Go through the tiles by rows."""
        return (self.tile(i, j) for i, j in product(range(self.rows.num_tiles), range(self.cols.num_tiles)))

    def tile(self, row: int, col: int) -> Tile:
        """Return a tile by its number along rows and columns."""
        (top, height), (left, width) = self.rows.core(row), self.cols.core(col)
        owned = [
            (self.rows.start(i), self.cols.start(j)) for i, j in product(self.rows.owned(row), self.cols.owned(col))
        ]
        size_y, size_x = self.window_shape
        bottom = max([top + height, *(y + size_y for y, _ in owned)])
        right = max([left + width, *(x + size_x for _, x in owned)])
        return Tile(
            row=row,
            col=col,
            core=Window(row=top, col=left, height=height, width=width),
            windows=tuple(Window(row=y, col=x, height=size_y, width=size_x) for y, x in owned),
            reach=Window(row=top, col=left, height=bottom - top, width=right - left),
        )


def blocks(height: int, width: int, *, rows: int, cols: int) -> Iterator[Tile]:
    """Cut an area into tiles of `rows` x `cols` patches without windows, by rows."""
    for (i, top), (j, left) in product(enumerate(range(0, height, rows)), enumerate(range(0, width, cols))):
        core = Window(row=top, col=left, height=min(rows, height - top), width=min(cols, width - left))
        yield Tile(row=i, col=j, core=core, windows=(), reach=core)
