"""The download of the data set: whole and verified, whatever the network does."""

import contextlib
import hashlib
import http.server
import os
import threading
import time
from multiprocessing import get_context

import numpy as np
import pytest

from resnet import download
from resnet.command import InputError

CONTENT = np.random.RandomState(0).bytes(300_000)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``server.content``; records the ranges that were asked for."""

    def do_GET(self):
        server, content = self.server, self.server.content
        asked = self.headers.get("Range")
        server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if asked and server.ranges else server.status)
        if asked and server.ranges:
            end = len(content) - 1
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        if server.length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = server.breaks_at or len(content)
        with contextlib.suppress(ConnectionError):
            for begin in range(start, stop, server.piece or stop):
                self.wfile.write(content[begin : min(stop, begin + (server.piece or stop))])
                time.sleep(0.05 if server.piece else 0)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.asked, server.status = CONTENT, [], 200
        server.ranges, server.length, server.breaks_at = True, True, None
        server.piece = None  # bytes that come at once, twenty times a second
        server.url = f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "_dl_cache" / "archive"


def fetch(path, url, content=CONTENT):
    download.fetch(path, url, len(content), hashlib.md5(content).hexdigest())


def start_partial(path, content):
    path.parent.mkdir()
    path.with_name("archive.part").write_bytes(content)


def assert_whole(path):
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == ["archive"]


def test_download_fresh(server, path, capfd):
    fetch(path, server.url)
    assert_whole(path)
    shown = capfd.readouterr()
    assert "100 %" in shown.err
    assert "\r" not in shown.err  # no terminal
    assert len(shown.err.splitlines()) < 10
    assert shown.out == ""


def test_download_goes_on_from_a_partial_file(server, path):
    start_partial(path, CONTENT[:123_456])
    fetch(path, server.url)
    assert_whole(path)
    assert server.asked == ["bytes=123456-"]


def test_download_starts_again_where_the_server_knows_no_ranges(server, path):
    server.ranges = False
    start_partial(path, b"?" * 123_456)
    fetch(path, server.url)
    assert_whole(path)


def test_download_starts_again_if_the_part_is_too_long(server, path):
    start_partial(path, CONTENT + b"?")
    fetch(path, server.url)
    assert_whole(path)
    assert server.asked == [None]


def test_download_of_a_complete_part_only_verifies_it(server, path):
    start_partial(path, CONTENT)
    fetch(path, server.url)
    assert_whole(path)
    assert server.asked == []


@pytest.mark.parametrize("size", [100_000, 290_000])
def test_a_part_of_another_size_is_not_joined(server, path, size):
    """The server's file has another size than the archive: nothing wrong may be left behind."""
    server.content = CONTENT[:200_000]
    start_partial(path, CONTENT[:size])
    with pytest.raises(InputError, match="expected 300,000 bytes"):
        fetch(path, server.url)
    assert server.asked == [f"bytes={size}-", None]
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize(
    "content", [b"<html>Sign in</html>", b"?" * len(CONTENT), CONTENT + b"?" * 999_999]
)
def test_wrong_content_is_removed(server, path, content):
    server.content = content
    with pytest.raises(InputError) as caught:
        fetch(path, server.url)
    for word in (server.url, "300,000 bytes", hashlib.md5(CONTENT).hexdigest()):
        assert word in str(caught.value)
    assert os.listdir(path.parent) == []


def test_wrong_part_is_removed_and_the_next_try_succeeds(server, path):
    start_partial(path, b"?" * 1000)
    with pytest.raises(InputError):
        fetch(path, server.url)
    fetch(path, server.url)
    assert_whole(path)


@pytest.mark.parametrize("length", [True, False])
def test_interrupted_connection_keeps_the_part(server, path, length):
    server.breaks_at, server.length = 100_000, length
    with pytest.raises(InputError) as caught:
        fetch(path, server.url)
    for word in (server.url, "100,000 bytes", "same command", "--data", "CHAINER_DATASET_ROOT"):
        assert word in str(caught.value)
    assert not path.exists()
    server.breaks_at = None
    fetch(path, server.url)
    assert_whole(path)
    assert server.asked == [None, "bytes=100000-"]


def test_a_download_that_drips_ends_and_goes_on_from_there(server, path, monkeypatch):
    server.piece = 100
    monkeypatch.setattr(download, "DEADLINE", 0.3)
    with pytest.raises(InputError, match=r"it took longer than 0.3 s; [1-9],?\d* bytes are kept"):
        fetch(path, server.url)
    server.piece = None
    fetch(path, server.url)
    assert_whole(path)
    assert server.asked[1].startswith("bytes=")


def test_no_network_and_error_pages(server, path):
    with pytest.raises(InputError, match="CHAINER_DATASET_ROOT"):
        fetch(path, "http://127.0.0.1:1/cifar-10-python.tar.gz")
    server.content = b""  # every request is answered with an error
    with pytest.raises(InputError, match=server.url):
        fetch(path, server.url)
    assert not path.exists()


def test_download_into_a_place_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot write"):
        fetch(tmp_path / "file" / "archive", server.url)


def test_two_processes_at_once(server, path):
    context = get_context("fork")
    processes = [context.Process(target=fetch, args=(path, server.url)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert_whole(path)
    assert server.asked == [None]  # the others waited for the first


def test_the_process_that_waits_survives_a_failure_of_the_first(server, path):
    server.content = b"?" * len(CONTENT)
    start_partial(path, b"")
    held = download._open_locked(path.with_name("archive.part"))
    failed = []

    def wait():
        with contextlib.suppress(InputError):
            fetch(path, server.url)
            failed.append("no error")

    thread = threading.Thread(target=wait)
    thread.start()
    path.with_name("archive.part").unlink()  # as the first does with wrong content
    held.close()
    thread.join(30)
    assert not thread.is_alive()
    assert failed == []
    assert os.listdir(path.parent) == []
