"""Asking STAC APIs what they have."""

from __future__ import annotations

import datetime as dt
import json
import warnings
from collections.abc import Mapping
from typing import Any

import pystac
from pystac_client import Client
from pystac_client.errors import ClientTypeError
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from pystac_client.warnings import PystacClientWarning

from panterra.errors import InputError
from panterra.imagery.providers import Provider, collections_of
from panterra.imagery.web import Web, plain
from panterra.modalities import MODALITIES

MOST_ITEMS = 20_000
"""A search that finds more is refused: the area or the time wants to be smaller."""


class _PatientIo(StacApiIO):
    """Let pystac-client send its requests as everything else is sent."""

    def __init__(self, web: Web) -> None:
        super().__init__(max_retries=None)
        self._web = web

    def request(
        self,
        href: str,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> str:
        return self._web.call(href, _json_text, method=(method or "GET").upper(), headers=headers, body=parameters)


def search(
    provider: Provider,
    modality: str,
    bounds: tuple[float, float, float, float],
    first: dt.date,
    last: dt.date,
    web: Web,
) -> list[dict[str, Any]]:
    """Find the items of a modality whose footprint touches west, south, east, north; maps of any date.

    In the provider's own order, as it describes them, without links.
    """
    with warnings.catch_warnings():
        # Some APIs do not list what they conform to; the search itself shows it.
        warnings.simplefilter("ignore", PystacClientWarning)
        try:
            client = Client.open(provider.api, stac_io=_PatientIo(web))
            for ability in ("ITEM_SEARCH", "COLLECTIONS"):
                client.add_conforms_to(ability)
            names = provider.collections.get(modality) or _known_collections(client, modality)
            found = client.search(
                collections=list(names),
                bbox=bounds,
                datetime=None if MODALITIES[modality].kind == "still" else f"{first}/{last}",
                limit=provider.page,
                max_items=MOST_ITEMS + 1,
            )
            items = [_without_links(item) for item in found.items_as_dicts()]
        except (APIError, pystac.STACError, pystac.STACTypeError, ClientTypeError, KeyError) as error:
            raise InputError(f"{plain(provider.api)} does not answer as a STAC API: {error!r}") from error
    if len(items) > MOST_ITEMS:
        raise InputError(f"{provider.name} has over {MOST_ITEMS:,} items of {modality} there; ask for less at once")
    return items


def _known_collections(client: Client, modality: str) -> list[str]:
    """Ask an API that we do not know which of the collections that we can read it has."""
    present = [collection.id for collection in client.get_collections()]
    names = [name for name in collections_of(modality) if name in present]
    if not names:
        raise InputError(
            f"{plain(str(client.get_self_href()))} has no collection that can be read as {modality} "
            f"({', '.join(collections_of(modality))}); it has: {', '.join(sorted(present)[:12])}"
        )
    return names


def _json_text(content: bytes) -> str:
    """Pass on an answer that is whole; json.JSONDecodeError is a ValueError."""
    text = content.decode("utf-8")
    json.loads(text)
    return text


def _without_links(item: Mapping[str, Any]) -> dict[str, Any]:
    return {**item, "links": []}
