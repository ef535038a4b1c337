"""How tiles are read: before they are asked for, and again where that fails."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from rasterio.errors import RasterioError

from panterra.errors import InputError
from panterra.mapping.parts import Failure

WAITS_S = (0.5, 2.0)
"""How long to wait before a tile that failed is tried again, each time; in between a host may come back."""

In = TypeVar("In")
Out = TypeVar("Out")


def ahead(
    function: Callable[[In], Out], items: Iterable[In], workers: int, *, most: int | None = None
) -> Iterator[tuple[In, Out]]:
    """Apply a function to items in threads, in order, at most `most` (default: `workers`) ahead of who asks."""
    with ThreadPoolExecutor(workers, "panterra-tile") as pool:
        waiting: deque[tuple[In, Future[Out]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) > (most or workers):
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        finally:
            for _, result in waiting:
                result.cancel()


def attempt(read: Callable[[], Out]) -> Out | Failure:
    """Read, and say why where that is not possible."""
    try:
        return read()
    except (InputError, OSError, RasterioError) as error:
        return Failure(reason=f"cannot be read: {error}")


def attempts(read: Callable[[], Out]) -> Out | Failure:
    """Read, several times where that is not possible."""
    for wait in WAITS_S:
        result = attempt(read)
        if not isinstance(result, Failure):
            return result
        time.sleep(wait)
    return attempt(read)
