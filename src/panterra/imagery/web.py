"""Requests to catalogues and files over a network that fails now and then."""

from __future__ import annotations

import email.utils
import io
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import InvalidSchema, InvalidURL, MissingSchema

from panterra.errors import InputError

AGAIN = {408, 425, 429, 500, 502, 503, 504}
"""Answers after which the same request may succeed."""

LONGEST_PAUSE_S = 120.0
"""Whatever a server asks for, or the back-off comes to."""

WHOLE_BYTES = 256 * 2**20
"""A server that ignores ranges sends whole files; larger ones are refused."""

CHUNK = 2**16
"""Bytes of a remote file are asked for in multiples of this; a file that is no longer comes with the first request."""

KEPT_CHUNKS = 256
"""Chunks that an open file keeps in memory."""

Headers = Mapping[str, str]
Signed = tuple[str, dict[str, str]]
Sign = Callable[..., Signed]
"""`sign(href, headers, fresh=False)` gives the address and the headers to send; `fresh` after a refusal."""

T = TypeVar("T")


class CredentialsError(InputError):
    """Nothing can be fetched until the person sets them, so it is no matter of a single file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The bytes that came, and the size of the whole file."""

    content: bytes
    total: int
    version: str | None = None
    """The server's tag of this state of the file."""


def unsigned(href: str, headers: Headers, *, fresh: bool = False) -> Signed:
    """Ask for a public file as it is."""
    return href, dict(headers)


class Web:
    """A patient and polite client: retries with back-off, one pace per host, and never a short answer.

    `per_second` limits the requests to each host, `pause_s` is the first pause of the back-off. Safe to share between
    threads; close it, or use it in a `with` block.
    """

    def __init__(
        self,
        sign: Sign = unsigned,
        *,
        per_second: float = 20.0,
        tries: int = 6,
        pause_s: float = 0.5,
        timeout_s: float = 60.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.received = 0
        self._sign = sign
        self._gap = 1 / per_second
        self._tries = tries
        self._pause_s = pause_s
        self._timeout = (min(20.0, timeout_s), timeout_s)
        self._sleep = sleep
        self._lock = threading.Lock()
        self._turns: dict[str, float] = {}
        self._session = requests.Session()
        # Else requests would send what ~/.netrc has for a host, in the place of a signature.
        self._session.auth = _as_it_is
        self._session.headers["User-Agent"] = "panterra"
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=32))

    def __enter__(self) -> Web:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections."""
        self._session.close()

    def read(self, href: str, first: int, last: int) -> Answer:
        """Fetch the bytes from `first` to `last`, both included, or as many as the file has."""
        span = {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
        return self._ask(href, span, lambda answer: _part(answer, href, first, last))

    def call(
        self, href: str, parse: Callable[[bytes], T], *, method: str = "GET", headers: Headers | None = None, body: Any
    ) -> T:
        """Send a request to a service; where `parse` raises ValueError the answer was not whole and is asked anew."""
        sent = dict(headers or {})
        options = {"params": body} if method == "GET" else {"json": body}
        return self._ask(href, sent, lambda answer: parse(answer.content), method=method, **options)

    def _ask(
        self, href: str, headers: Headers, parse: Callable[[requests.Response], T], method: str = "GET", **options: Any
    ) -> T:
        failure, fresh = "", False
        for attempt in range(self._tries):
            url, sent = self._sign(href, headers, fresh=fresh)
            host = urlsplit(url).netloc
            self._take_turn(host)
            try:
                with self._session.request(
                    method, url, headers=sent, timeout=self._timeout, stream=True, **options
                ) as answer:
                    status, asked = answer.status_code, answer.headers.get("Retry-After")
                    if status < 400:
                        _refuse_endless(answer, href)
                        result = parse(answer)
                        with self._lock:
                            self.received += len(answer.content)
                        return result
            except (InvalidSchema, InvalidURL, MissingSchema) as error:
                raise InputError(f"cannot fetch {plain(href)}: only http, https and s3 addresses are read") from error
            except (requests.RequestException, ValueError) as error:
                failure, status, asked = _reason(error), 0, None
            else:
                failure = f"the server answered {status}"
            if status in (401, 403) and not fresh:
                # A signature may have expired on the way: once more with a new one, at once.
                fresh = True
                continue
            if status and status not in AGAIN:
                raise InputError(f"cannot fetch {plain(href)}: {failure}")
            pause = min(self._pause_s * 2**attempt, LONGEST_PAUSE_S) * random.uniform(0.5, 1)
            wanted = _seconds(asked)
            if wanted is not None:
                self._hold(host, min(wanted, LONGEST_PAUSE_S))
            elif attempt < self._tries - 1:
                self._sleep(pause)
        raise InputError(f"cannot fetch {plain(href)}: {failure}; gave up after {self._tries} tries")

    def _take_turn(self, host: str) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(self._turns.get(host, now), now)
            self._turns[host] = turn + self._gap
        if turn > now:
            self._sleep(turn - now)

    def _hold(self, host: str, seconds: float) -> None:
        """Let nobody ask a host before it wants to be asked again."""
        with self._lock:
            self._turns[host] = max(self._turns.get(host, 0.0), time.monotonic() + seconds)


class RangeFile(io.RawIOBase):
    """A remote file, of which only the chunks that are read are fetched; what went wrong is kept in `failure`."""

    def __init__(self, web: Web, href: str) -> None:
        super().__init__()
        first = web.read(href, 0, CHUNK - 1)
        self.size = first.total
        self.failure: Exception | None = None
        self._web, self._href, self._version = web, href, first.version
        self._at = 0
        self._chunks: OrderedDict[int, bytes] = OrderedDict()
        self._keep(0, first.content)

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """Say that any place can be read."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go to a place."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def tell(self) -> int:
        """Return the place."""
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        """Read from the place on."""
        end = self.size if size < 0 else min(self._at + size, self.size)
        if self._at >= end:
            return b""
        try:
            content = self._between(self._at, end)
        except Exception as error:
            # GDAL would swallow it.
            self.failure = error
            raise
        self._at = end
        return content

    def _between(self, start: int, end: int) -> bytes:
        wanted = range(start // CHUNK, (end - 1) // CHUNK + 1)
        chunks = {number: self._chunks[number] for number in wanted if number in self._chunks}
        missing = [number for number in wanted if number not in chunks]
        while missing:
            run = 1
            while run < len(missing) and missing[run] == missing[0] + run:
                run += 1
            first = missing[0] * CHUNK
            answer = self._web.read(self._href, first, min(first + run * CHUNK, self.size) - 1)
            if answer.version != self._version:
                raise InputError(f"{plain(self._href)} was replaced while it was read; fetch it again")
            chunks |= self._keep(missing[0], answer.content)
            missing = missing[run:]
        for number in wanted:
            if number in self._chunks:
                self._chunks.move_to_end(number)
        content = b"".join(chunks[number] for number in wanted)
        return content[start - wanted[0] * CHUNK : end - wanted[0] * CHUNK]

    def _keep(self, number: int, content: bytes) -> dict[int, bytes]:
        parts = {number + i: content[i * CHUNK : (i + 1) * CHUNK] for i in range(-(-len(content) // CHUNK))}
        self._chunks |= parts
        while len(self._chunks) > KEPT_CHUNKS:
            self._chunks.popitem(last=False)
        return parts


def plain(href: str) -> str:
    """Return an address without its query, in which signatures stand."""
    return urlunsplit(urlsplit(href)._replace(query="", fragment=""))


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _part(answer: requests.Response, href: str, first: int, last: int) -> Answer:
    """Take a range out of an answer, whole or partial; ValueError where bytes are missing."""
    content, version = answer.content, answer.headers.get("ETag")
    if answer.status_code != 206:
        stated = answer.headers.get("Content-Length")
        if stated is not None and int(stated) != len(content):
            raise ValueError(f"{len(content)} of {stated} bytes came")
        return Answer(content=content[first : last + 1], total=len(content), version=version)
    span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", ""))
    if span is None:
        raise InputError(f"cannot fetch {plain(href)}: the server does not say which range it sends")
    start, end, total = (int(number) for number in span.groups())
    if (start, end) != (first, min(last, total - 1)) or len(content) != end - start + 1:
        raise ValueError(f"{len(content)} of the bytes {first} to {last} came")
    return Answer(content=content, total=total, version=version)


def _refuse_endless(answer: requests.Response, href: str) -> None:
    size = answer.headers.get("Content-Length", "0")
    if answer.status_code == 200 and size.isdigit() and int(size) > WHOLE_BYTES:
        raise InputError(
            f"cannot fetch {plain(href)}: its server knows no range requests and would send {int(size) >> 20} MiB"
        )


def _reason(error: Exception) -> str:
    if isinstance(error, requests.Timeout):
        return "the server did not answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError | ValueError):
        return (
            f"the answer was not whole ({error})"
            if not isinstance(error, requests.RequestException)
            else ("the answer was cut short")
        )
    return "the server cannot be reached" if isinstance(error, requests.ConnectionError) else str(error)


def _seconds(asked: str | None) -> float | None:
    """Read a Retry-After header: seconds or a date."""
    if asked is None:
        return None
    if asked.strip().isdigit():
        return float(asked)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except ValueError:
        return None
