"""How to ask for files that not everybody may read."""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import requests

from panterra.errors import InputError
from panterra.imagery.web import CredentialsError, Headers, Sign, Signed, unsigned

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()

CDSE_TOKENS = "https://identity.dataspace.copernicus.eu/auth/realms/CDSE/protocol/openid-connect/token"

EARLY_S = 60
"""Seconds before its end from which a token is not used any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """A way to a provider's files."""

    sign: Sign
    alternate: str | None = None
    """Which of the alternate addresses of an asset to use, where it has that one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """An object store behind s3:// addresses."""

    endpoint: str
    """Address to which the key is appended."""
    region: str
    keys: tuple[str, str] | None = None
    """The environment variables of the access key and the secret; None for a public bucket."""
    reader_pays: bool = False
    about: str = ""
    """Where to get the credentials."""


_AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def _amazon(name: str, region: str, *, reader_pays: bool) -> Bucket:
    return Bucket(
        endpoint=f"https://{name}.s3.{region}.amazonaws.com",
        region=region,
        keys=_AWS if reader_pays else None,
        reader_pays=reader_pays,
        about="of an AWS account, which pays for the transfer",
    )


BUCKETS: Mapping[str, Bucket] = {
    "copernicus-dem-30m": _amazon("copernicus-dem-30m", "eu-central-1", reader_pays=False),
    "sentinel-s2-l1c": _amazon("sentinel-s2-l1c", "eu-central-1", reader_pays=True),
    "sentinel-s2-l2a": _amazon("sentinel-s2-l2a", "eu-central-1", reader_pays=True),
    "usgs-landsat": _amazon("usgs-landsat", "us-west-2", reader_pays=True),
    "naip-analytic": _amazon("naip-analytic", "us-west-2", reader_pays=True),
    "eodata": Bucket(
        endpoint="https://eodata.dataspace.copernicus.eu/eodata",
        region="default",
        keys=("CDSE_S3_ACCESS_KEY", "CDSE_S3_SECRET_KEY"),
        about="from https://eodata-s3keysmanager.dataspace.copernicus.eu, free of charge",
    ),
}


def sign_s3(href: str, headers: Headers, *, fresh: bool = False) -> Signed:
    """Turn an s3:// address into a request to its store, signed where that asks for it; others stay as they are."""
    if not href.startswith("s3://"):
        return unsigned(href, headers)
    name, _, key = href.removeprefix("s3://").partition("/")
    bucket = BUCKETS.get(name) or _amazon(name, "us-east-1", reader_pays=False)
    url = f"{bucket.endpoint}/{quote(key)}"
    if bucket.keys is None:
        return unsigned(url, headers)
    access, secret = (os.environ.get(variable, "") for variable in bucket.keys)
    if not access or not secret:
        raise CredentialsError(
            f"s3://{name} asks for credentials: set {' and '.join(bucket.keys)} in the environment, {bucket.about}"
        )
    sent = dict(headers)
    if bucket.reader_pays:
        sent["x-amz-request-payer"] = "requester"
    if bucket.keys == _AWS and os.environ.get("AWS_SESSION_TOKEN"):
        sent["x-amz-security-token"] = os.environ["AWS_SESSION_TOKEN"]
    return url, sign_v4(url, sent, access=access, secret=secret, region=bucket.region, now=dt.datetime.now(dt.UTC))


def sign_v4(url: str, headers: Headers, *, access: str, secret: str, region: str, now: dt.datetime) -> dict[str, str]:
    """Add the headers of AWS Signature Version 4 to those of a GET.

    Amazon S3 API Reference, "Authenticating Requests: Using the Authorization Header". The range, the host and all
    x-amz headers are signed.
    """
    parts = urlsplit(url)
    stamp, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    sent = {**headers, "x-amz-content-sha256": EMPTY_SHA256, "x-amz-date": stamp}
    signed = {k.lower(): v.strip() for k, v in sent.items() if k.lower().startswith("x-amz-") or k.lower() == "range"}
    signed["host"] = parts.netloc
    names = ";".join(sorted(signed))
    lines = "".join(f"{name}:{signed[name]}\n" for name in sorted(signed))
    request = f"GET\n{parts.path}\n{parts.query}\n{lines}\n{names}\n{EMPTY_SHA256}"
    scope = f"{day}/{region}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = f"AWS4{secret}".encode()
    for word in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, word.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    credential = f"Credential={access}/{scope}, SignedHeaders={names}, Signature={signature}"
    return {**sent, "Authorization": f"AWS4-HMAC-SHA256 {credential}"}


def sign_planetary_computer(href: str, headers: Headers, *, fresh: bool = False) -> Signed:
    """Append the access token of an Azure container (SAS), which the Planetary Computer gives to everybody."""
    from planetary_computer import sas

    if fresh:
        sas.TOKEN_CACHE.clear()
    try:
        return unsigned(sas.sign_url(href), headers)
    except requests.RequestException as error:
        raise InputError(f"the Planetary Computer gave no access token for {href}: {error}") from error


class CopernicusTokens:
    """Sign requests to the Copernicus Data Space by the OAuth token of an account, renewed before it ends."""

    def __init__(self, tokens: str = CDSE_TOKENS) -> None:
        self._tokens = tokens
        self._lock = threading.Lock()
        self._token, self._until = "", 0.0

    def __call__(self, href: str, headers: Headers, *, fresh: bool = False) -> Signed:
        """Sign one request."""
        with self._lock:
            if fresh or time.monotonic() > self._until:
                self._renew()
            return href, {**headers, "Authorization": f"Bearer {self._token}"}

    def _renew(self) -> None:
        user, password = os.environ.get("CDSE_USERNAME", ""), os.environ.get("CDSE_PASSWORD", "")
        form = {"grant_type": "password", "client_id": "cdse-public", "username": user, "password": password}
        try:
            answer = requests.post(self._tokens, data=form, timeout=60)
            answer.raise_for_status()
            content = answer.json()
        except requests.RequestException as error:
            raise CredentialsError(
                f"the Copernicus Data Space gave no access token ({error}); "
                "check CDSE_USERNAME and CDSE_PASSWORD in the environment"
            ) from error
        self._token = str(content["access_token"])
        self._until = time.monotonic() + float(content["expires_in"]) - EARLY_S


def copernicus_access() -> Access:
    """Take whatever credentials of the Copernicus Data Space there are, and say at once when there are none."""
    if os.environ.get("CDSE_S3_ACCESS_KEY") and os.environ.get("CDSE_S3_SECRET_KEY"):
        return Access(sign=sign_s3)
    if os.environ.get("CDSE_USERNAME") and os.environ.get("CDSE_PASSWORD"):
        return Access(sign=CopernicusTokens(), alternate="https")
    raise CredentialsError(
        "the Copernicus Data Space asks for an account: set CDSE_S3_ACCESS_KEY and CDSE_S3_SECRET_KEY in the "
        "environment (from https://eodata-s3keysmanager.dataspace.copernicus.eu), or CDSE_USERNAME and CDSE_PASSWORD"
    )
