import datetime as dt
import http.server
import json
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from panterra.errors import InputError
from panterra.imagery.signing import (
    EMPTY_SHA256,
    CopernicusTokens,
    copernicus_access,
    sign_planetary_computer,
    sign_s3,
    sign_v4,
)
from panterra.imagery.web import CHUNK, LONGEST_PAUSE_S, CredentialsError, RangeFile, Web, plain
from stac_server import serving

CONTENT = np.random.default_rng(0).integers(0, 256, 5 * CHUNK + 1234, dtype="uint8").tobytes()


@pytest.fixture
def server(tmp_path):
    (tmp_path / "file.bin").write_bytes(CONTENT)
    (tmp_path / "small.bin").write_bytes(b"small")
    with serving(tmp_path, []) as state:
        yield state


@contextmanager
def patient(**options):
    """A client that notes its pauses and does not wait."""
    pauses = []
    with Web(**{"per_second": 1e9, "sleep": pauses.append, **options}) as web:
        yield web, pauses


def read(web, server, name="file.bin"):
    with RangeFile(web, f"{server.address}/data/{name}") as file:
        return file.read()


# What goes wrong ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [429, 500, 502, 503, 504, 408, "truncate", "drop", "hang"])
def test_what_fails_twice_comes_the_third_time(server, fault):
    server.faults["file.bin"] = [fault, fault]
    with patient(timeout_s=2 if fault == "hang" else 60) as (web, pauses):
        assert read(web, server) == CONTENT
        assert web.received == len(CONTENT)
    assert len(pauses) == 2
    assert 0.25 <= pauses[0] <= 0.5 <= pauses[1] <= 1.0


def test_a_server_is_left_alone_as_long_as_it_asks(server):
    server.faults["small.bin"] = [(429, "100")]
    with patient() as (web, pauses):
        assert read(web, server, "small.bin") == b"small"
    assert len(pauses) == 1
    assert 70 < pauses[0] <= 100


def test_it_may_ask_by_a_date(server):
    later = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=30)
    server.faults["small.bin"] = [(503, later.strftime("%a, %d %b %Y %H:%M:%S GMT"))]
    with patient() as (web, pauses):
        read(web, server, "small.bin")
    assert 20 < pauses[0] <= 30


@pytest.mark.parametrize(("asked", "least", "most"), [("100000", 100, LONGEST_PAUSE_S), ("soon", 0.2, 0.5)])
def test_nobody_waits_for_ever(server, asked, least, most):
    server.faults["small.bin"] = [(429, asked)]
    with patient() as (web, pauses):
        assert read(web, server, "small.bin") == b"small"
    assert len(pauses) == 1
    assert least <= pauses[0] <= most


def test_what_never_comes_is_said_in_one_line(server):
    server.dead["file.bin"] = 500
    with patient(tries=3) as (web, _), pytest.raises(InputError, match=r"answered 500; gave up after 3 tries"):
        read(web, server)
    assert len(server.asked("file.bin")) == 3


def test_what_is_not_there_is_not_asked_for_again(server):
    with patient() as (web, pauses), pytest.raises(InputError, match=r"cannot fetch http.*/none\.bin.*404"):
        read(web, server, "none.bin")
    assert not pauses
    assert len(server.log) == 1


def test_files_of_this_machine_are_not_read_by_an_address(tmp_path):
    with patient() as (web, pauses):
        for address in (f"file://{tmp_path}/a", str(tmp_path), "/vsicurl/http://host/a"):
            with pytest.raises(InputError, match="only http, https and s3 addresses are read"):
                web.read(address, 0, 1)
    assert not pauses


def test_passwords_of_this_machine_are_not_sent(server, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with patient() as (web, _):
        read(web, server, "small.bin")
    assert server.headers
    assert not any("Authorization" in headers for headers in server.headers)


def test_an_expired_signature_is_made_anew(server):
    server.signature = "new"
    signed = []

    def sign(href, headers, *, fresh=False):
        signed.append(fresh)
        return f"{href}?sig={'new' if fresh else 'old'}", dict(headers)

    with patient(sign=sign) as (web, pauses):
        assert read(web, server, "small.bin") == b"small"
        assert signed == [False, True]
        server.signature = "lost"
        with pytest.raises(InputError, match="answered 403") as caught:
            read(web, server, "small.bin")
    assert "sig" not in str(caught.value)
    assert not pauses


def test_requests_to_a_host_keep_their_pace(server):
    with patient(per_second=0.01) as (web, pauses):
        for _ in range(3):
            read(web, server, "small.bin")
    # Nobody waited, so the turns add up.
    assert len(pauses) == 2
    assert 0 < pauses[0] <= 100 < pauses[1] <= 200


# Ranges ---------------------------------------------------------------------------------------------------------------


def test_a_remote_file_reads_like_a_local_one(server):
    with patient() as (web, _), RangeFile(web, f"{server.address}/data/file.bin") as file:
        assert file.size == len(CONTENT)
        rng = np.random.default_rng(1)
        for start, size in rng.integers(0, 2 * CHUNK, (40, 2)) * (2, 1):
            file.seek(int(start))
            assert file.read(int(size)) == CONTENT[start : start + size]
            assert file.tell() == min(start + size, len(CONTENT))
        file.seek(-10, 2)
        assert file.read(100) == CONTENT[-10:]
        assert file.read(1) == b""
        assert web.received == len(CONTENT)


def test_only_what_is_read_is_fetched_and_a_run_of_chunks_in_one_request(server):
    with patient() as (web, _), RangeFile(web, f"{server.address}/data/file.bin") as file:
        file.seek(2 * CHUNK + 5)
        file.read(2 * CHUNK)
        assert len(server.asked("file.bin")) == 2
        assert web.received == 4 * CHUNK


def test_a_server_without_ranges_serves_small_files(server):
    server.ranges = False
    with patient() as (web, _):
        assert read(web, server) == CONTENT


def test_a_file_that_changes_is_refused(server):
    with patient() as (web, _), RangeFile(web, f"{server.address}/data/file.bin") as file:
        (server.folder / "file.bin").write_bytes(CONTENT[: 4 * CHUNK])
        file.seek(2 * CHUNK)
        with pytest.raises(InputError, match="was replaced while it was read"):
            file.read(10)
        assert isinstance(file.failure, InputError)


# Signing --------------------------------------------------------------------------------------------------------------


def test_the_signature_is_that_of_amazons_example():
    # Amazon S3 API Reference, "Signature Calculations for the Authorization Header", example "GET Object".
    sent = sign_v4(
        "https://examplebucket.s3.amazonaws.com/test.txt",
        {"Range": "bytes=0-9"},
        access="AKIAIOSFODNN7EXAMPLE",
        secret="wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        region="us-east-1",
        now=dt.datetime(2013, 5, 24, tzinfo=dt.UTC),
    )
    assert sent["Authorization"].endswith("f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41")
    assert sent["x-amz-content-sha256"] == EMPTY_SHA256


def test_buckets_are_known_by_their_address(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "CDSE_S3_ACCESS_KEY", "CDSE_S3_SECRET_KEY"):
        monkeypatch.delenv(name, raising=False)
    url, headers = sign_s3("s3://copernicus-dem-30m/a b/c.tif", {"Range": "bytes=0-1"})
    assert url == "https://copernicus-dem-30m.s3.eu-central-1.amazonaws.com/a%20b/c.tif"
    assert headers == {"Range": "bytes=0-1"}
    assert sign_s3("https://host/a.tif", {}) == ("https://host/a.tif", {})
    for name, variable in (("usgs-landsat", "AWS_ACCESS_KEY_ID"), ("eodata", "CDSE_S3_ACCESS_KEY")):
        with pytest.raises(CredentialsError, match=f"s3://{name} asks for credentials: set {variable} and"):
            sign_s3(f"s3://{name}/a.tif", {})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    url, headers = sign_s3("s3://usgs-landsat/a.tif", {})
    assert url == "https://usgs-landsat.s3.us-west-2.amazonaws.com/a.tif"
    assert headers["x-amz-request-payer"] == "requester"
    assert "x-amz-request-payer" in headers["Authorization"]


class Tokens(http.server.BaseHTTPRequestHandler):
    """Gives tokens the way the Copernicus Data Space and the Planetary Computer do."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        form = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.asked.append(form)
        wrong = "password=right" not in form
        self.say({"access_token": f"token{len(self.server.asked)}", "expires_in": 600}, 401 if wrong else 200)

    def do_GET(self):
        self.server.asked.append(self.path)
        until = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
        self.say({"msft:expiry": until.isoformat(), "token": f"sig=token{len(self.server.asked)}"}, 200)

    def say(self, answer, status):
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def tokens():
    server = http.server.HTTPServer(("127.0.0.1", 0), Tokens)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_account_of_the_copernicus_data_space_gives_a_token_that_is_used_again(tokens, monkeypatch):
    monkeypatch.setenv("CDSE_USERNAME", "me")
    monkeypatch.setenv("CDSE_PASSWORD", "right")
    sign = CopernicusTokens(f"http://127.0.0.1:{tokens.server_port}/token")
    for fresh, number in ((False, 1), (False, 1), (True, 2)):
        assert sign("https://host/a", {"a": "b"}, fresh=fresh)[1] == {
            "a": "b",
            "Authorization": f"Bearer token{number}",
        }
    monkeypatch.setenv("CDSE_PASSWORD", "wrong")
    with pytest.raises(CredentialsError, match="check CDSE_USERNAME and CDSE_PASSWORD"):
        sign("https://host/a", {}, fresh=True)


def test_the_copernicus_data_space_takes_keys_or_an_account(monkeypatch):
    names = ("CDSE_S3_ACCESS_KEY", "CDSE_S3_SECRET_KEY", "CDSE_USERNAME", "CDSE_PASSWORD")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(CredentialsError, match="set CDSE_S3_ACCESS_KEY and CDSE_S3_SECRET_KEY"):
        copernicus_access()
    for name in names[2:]:
        monkeypatch.setenv(name, "x")
    assert copernicus_access().alternate == "https"
    for name in names:
        monkeypatch.setenv(name, "x")
    assert copernicus_access().alternate is None


def test_the_planetary_computer_gives_a_token_per_container(tokens, monkeypatch):
    sas = pytest.importorskip("planetary_computer.sas")
    monkeypatch.setenv("PC_SDK_SAS_URL", f"http://127.0.0.1:{tokens.server_port}/token")
    sas.Settings.get.cache_clear()
    sas.TOKEN_CACHE.clear()
    href = "https://sentinel2l2a01.blob.core.windows.net/sentinel2-l2/06/B02.tif"
    try:
        for fresh, number in ((False, 1), (False, 1), (True, 2)):
            assert sign_planetary_computer(href, {}, fresh=fresh) == (f"{href}?sig=token{number}", {})
        assert sign_planetary_computer("https://elsewhere/a.tif", {})[0] == "https://elsewhere/a.tif"
    finally:
        sas.Settings.get.cache_clear()
        sas.TOKEN_CACHE.clear()
    assert tokens.asked[0] == "/token/sentinel2l2a01/sentinel2-l2"


def test_signatures_stay_out_of_what_is_said():
    assert plain("https://host/a.tif?sig=secret#x") == "https://host/a.tif"


def test_several_threads_share_a_client(server):
    from concurrent.futures import ThreadPoolExecutor

    server.faults["file.bin"] = [500, "truncate", (429, "1")]
    with Web(per_second=1e4, pause_s=0.001) as web, ThreadPoolExecutor(8) as pool:
        began = time.monotonic()
        assert set(pool.map(lambda _: read(web, server), range(16))) == {CONTENT}
        assert time.monotonic() - began >= 0.9
