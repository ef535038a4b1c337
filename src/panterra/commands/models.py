"""Which models there are, and what each needs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from panterra.models.adapters.offers import ADAPTERS


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherModel:
    """A network of others, offered by a package that is not part of Panterra."""

    name: str
    package: str
    needs: str
    """As pip takes it."""
    installed: str | None
    """Version of the package here; None where it is not installed."""


def other_models() -> list[OtherModel]:
    """List the networks of others; their packages are looked up and not imported, which would take seconds."""
    versions = {package: _version(package) for package in {offer.package for offer in ADAPTERS.values()}}
    return [
        OtherModel(name=name, package=offer.package, needs=offer.needs, installed=versions[offer.package])
        for name, offer in ADAPTERS.items()
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
