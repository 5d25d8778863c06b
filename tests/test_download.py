"""Downloads from a server on this machine: resumed, checked, one sentence where they fail."""

import errno
import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dmd_tutorial import pretrained
from dmd_tutorial.edm import checkpoint
from dmd_tutorial.edm import download as room
from dmd_tutorial.edm.download import cache_folder, download

CONTENT = bytes(range(256)) * 4000


class Server(ThreadingHTTPServer):
    """Serves one file; what it does can be changed."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.tag = CONTENT, '"one"'
        self.breaks_after, self.ranges, self.status, self.shift = None, True, 200, 0
        self.asked = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/folder/network.pkl"


class Handler(BaseHTTPRequestHandler):
    """Knows Range and If-Range."""

    def do_GET(self):
        server = self.server
        server.asked.append(self.headers.get("Range"))
        if server.status != 200:
            self.send_error(server.status)
            return
        start, wanted = 0, self.headers.get("Range")
        if wanted and server.ranges and self.headers.get("If-Range") == server.tag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", server.tag)
        if start:
            first = start + server.shift
            self.send_header("Content-Range", f"bytes {first}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        if server.breaks_after is not None:
            body, server.breaks_after = body[: server.breaks_after], None
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(room.time, "sleep", lambda _: None)
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_file_is_fetched_once_and_checked_each_time(server, tmp_path):
    path = download(server.url, tmp_path)
    assert path == tmp_path / "network.pkl"
    assert path.read_bytes() == CONTENT
    assert download(server.url, tmp_path) == path
    assert server.asked == [None]
    kept = {p.name for p in tmp_path.iterdir() if p.suffix != ".lock"}
    assert kept == {"network.pkl", "network.pkl.sha256"}
    path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(ValueError, match=r"network\.pkl has SHA-256 .* it should have"):
        download(server.url, tmp_path)


def test_a_broken_download_goes_on_where_it_was(server, tmp_path):
    server.breaks_after = 300_000
    assert download(server.url, tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-"]


def test_a_download_is_not_continued_with_another_file(server, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "TRIES", 1)
    server.breaks_after = 300_000
    with pytest.raises(RuntimeError, match="300000 of 1024000 bytes arrived"):
        download(server.url, tmp_path)
    server.content, server.tag = CONTENT[::-1], '"two"'
    assert download(server.url, tmp_path).read_bytes() == CONTENT[::-1]


def test_a_server_that_knows_no_ranges_sends_everything_again(server, tmp_path):
    server.breaks_after, server.ranges = 1000, False
    assert download(server.url, tmp_path).read_bytes() == CONTENT


def test_an_answer_with_another_range_is_not_appended(server, tmp_path):
    server.breaks_after, server.shift = 1000, 5
    assert download(server.url, tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000-", None]


def test_of_several_that_want_a_file_one_fetches_it(server, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: download(server.url, tmp_path), range(4)))
    assert server.asked == [None]
    assert paths[0].read_bytes() == CONTENT


def test_two_addresses_that_end_alike_are_two_files(server, tmp_path, monkeypatch):
    from edm_files import edm_file
    from test_unpickle import small

    monkeypatch.setenv("DMD_TUTORIAL_CACHE", str(tmp_path))
    server.content = edm_file(small())
    assert pretrained.load(server.url).network.channels == 3
    server.content = b"another"
    with pytest.raises(ValueError, match="no published EDM checkpoint"):
        pretrained.load(server.url.replace("folder", "other"))
    assert pretrained.load(server.url).network.channels == 3  # from the cache


def test_an_address_without_a_file_and_a_folder_that_is_none_are_named(server, tmp_path):
    with pytest.raises(ValueError, match="no address of a file"):
        download("http://127.0.0.1/", tmp_path)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RuntimeError, match=r"network\.pkl cannot be written"):
        download(server.url, tmp_path / "file")


def test_a_full_disk_is_not_taken_for_the_network(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(room, "_continue", full)
    with pytest.raises(RuntimeError, match=r"cannot be written: .*No space left"):
        download(server.url, tmp_path)


def test_a_known_hash_is_asked_for(server, tmp_path):
    right = hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(ValueError, match="it should have 0000"):
        download(server.url, tmp_path / "wrong", sha256="0000")
    assert download(server.url, tmp_path / "right", sha256=right).exists()


def test_what_cannot_be_had_is_one_sentence(server, tmp_path):
    server.status = 404
    with pytest.raises(RuntimeError, match="answers 404"):
        download(server.url, tmp_path)
    assert len(server.asked) == 1  # it would not help to ask again
    server.status = 503
    with pytest.raises(RuntimeError, match=r"cannot be reached .*503") as error:
        download(server.url, tmp_path)
    assert len(str(error.value).splitlines()) == 1
    assert len(server.asked) == 1 + room.TRIES


def test_without_a_network_a_published_name_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("DMD_TUTORIAL_CACHE", str(tmp_path))
    monkeypatch.setattr(room.time, "sleep", lambda _: None)
    monkeypatch.setattr(checkpoint, "PUBLISHED_AT", "http://127.0.0.1:9/edm")
    with pytest.raises(RuntimeError, match="cannot be reached") as error:
        pretrained.load("edm-cifar10-32x32-cond-vp")
    assert f"put it at {tmp_path / 'edm-cifar10-32x32-cond-vp.pkl'}" in str(error.value)
    assert cache_folder() == tmp_path


def test_a_published_name_is_found_where_somebody_put_it(tmp_path, monkeypatch):
    from edm_files import edm_file
    from test_unpickle import small

    monkeypatch.setenv("DMD_TUTORIAL_CACHE", str(tmp_path))
    (tmp_path / "edm-cifar10-32x32-cond-vp.pkl").write_bytes(edm_file(small()))
    assert pretrained.load("edm-cifar10-32x32-cond-vp").network.config == small().network.config
