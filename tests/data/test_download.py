"""Downloads from a server on this machine: whole, resumed, and refused."""

import hashlib
import http.server
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.data import download as module
from common.data.download import download
from common.errors import Fault
from common.files import digest, locked

CONTENT = bytes(range(256)) * 100
MD5 = hashlib.md5(CONTENT).hexdigest()
Serve = Callable[..., "FileServer"]


class FileServer:
    """Serves CONTENT. `ranges` lists the Range headers of the requests; only a `resumable` server follows them.

    The first answer ends after `cut` bytes, where `cut` is given.
    """

    def __init__(self, resumable: bool = True, cut: int | None = None) -> None:
        self.ranges: list[str | None] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                asked = self.headers.get("Range")
                outer.ranges.append(asked)
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and resumable else 0
                if start >= len(CONTENT):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(CONTENT) - start))
                self.end_headers()
                end = start + cut if cut and len(outer.ranges) == 1 else len(CONTENT)
                self.wfile.write(CONTENT[start:end])

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/file.npz"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    servers: list[FileServer] = []
    monkeypatch.setattr(module, "PAUSE", 0)

    def start(**options: Any) -> FileServer:
        servers.append(FileServer(**options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def test_a_file_is_downloaded_into_a_new_folder(tmp_path: Path, serve: Serve) -> None:
    server, path = serve(), tmp_path / "new" / "file.npz"
    download(server.url, path, MD5)
    assert server.ranges == [None]
    assert path.read_bytes() == CONTENT
    assert digest(path, "md5") == MD5


def test_the_content_of_a_download_is_flushed_to_disk_before_it_gets_its_name(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, flushed = os.fsync, []

    def recorded(descriptor: int) -> None:
        flushed.append((Path(f"/proc/self/fd/{descriptor}").readlink(), (tmp_path / "file.npz").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    download(serve().url, tmp_path / "file.npz", MD5)
    assert flushed == [(tmp_path / "file.npz.part", False), (tmp_path, True)]


def test_a_broken_connection_is_resumed(tmp_path: Path, serve: Serve) -> None:
    server = serve(cut=1000)
    download(server.url, tmp_path / "file.npz", MD5)
    assert server.ranges == [None, "bytes=1000-"]
    assert (tmp_path / "file.npz").read_bytes() == CONTENT


@pytest.mark.parametrize("resumable", [True, False])
def test_a_part_of_the_file_is_completed_or_replaced(resumable: bool, tmp_path: Path, serve: Serve) -> None:
    server = serve(resumable=resumable)
    (tmp_path / "file.npz.part").write_bytes(CONTENT[:2000])
    download(server.url, tmp_path / "file.npz", MD5)
    assert server.ranges == ["bytes=2000-"]
    assert (tmp_path / "file.npz").read_bytes() == CONTENT
    assert not (tmp_path / "file.npz.part").exists()


def test_a_part_that_is_the_whole_file_is_kept(tmp_path: Path, serve: Serve) -> None:
    (tmp_path / "file.npz.part").write_bytes(CONTENT)
    download(serve().url, tmp_path / "file.npz", MD5)
    assert (tmp_path / "file.npz").read_bytes() == CONTENT


def test_a_download_with_another_md5_is_deleted(tmp_path: Path, serve: Serve) -> None:
    path = tmp_path / "file.npz"
    with pytest.raises(Fault, match=f"file.npz: no such file, and the download has the MD5 {MD5}, not {'0' * 32}"):
        download(serve().url, path, "0" * 32)
    assert not list(tmp_path.glob("file*"))


def test_without_a_server_the_reason_is_named_and_no_folder_is_created(tmp_path: Path, serve: Serve) -> None:
    server = serve()
    server.stop()
    with pytest.raises(Fault, match=r"file.npz: no such file, and the download failed \(.*refused\)"):
        download(server.url, tmp_path / "new" / "file.npz", MD5)
    assert not list(tmp_path.iterdir())


def test_a_file_that_appears_while_the_download_waits_is_kept(tmp_path: Path, serve: Serve) -> None:
    server, path = serve(), tmp_path / "file.npz"
    with locked(tmp_path / ".file.npz.lock"):
        thread = threading.Thread(target=download, args=(server.url, path, MD5))
        thread.start()
        while not server.ranges:
            time.sleep(0.01)
        path.write_bytes(b"of another process")
    thread.join()
    assert path.read_bytes() == b"of another process"


def test_processes_that_download_at_the_same_time_get_one_whole_file(tmp_path: Path, serve: Serve) -> None:
    server, path = serve(), tmp_path / "new" / "file.npz"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=download, args=(server.url, path, MD5)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert path.read_bytes() == CONTENT
    assert not path.with_name("file.npz.part").exists()
