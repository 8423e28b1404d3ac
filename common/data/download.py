"""Download a file, resume an interrupted download, and check the file's MD5."""

import os
import shutil
import time
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from tqdm import tqdm

from common.errors import Fault
from common.files import digest, flush, locked

PATIENCE = 20  # seconds to wait for an answer of the server
TRIES = 4
PAUSE = 0.5  # seconds before the second try, and twice as many before each later one


def download(url: str, path: Path, md5: str) -> None:
    """Download `url` to `path`. An interrupted download stays in `<path>.part`, and the next call resumes it.

    The folder of `path` is created when the server has answered. Raises Fault where every try fails, or where the
    downloaded file has another MD5.
    """
    for attempt in range(1, TRIES + 1):
        try:
            _download_once(url, path, md5)
            return
        except (OSError, HTTPException) as error:  # URLError is an OSError
            if attempt == TRIES:
                reason = getattr(error, "reason", error)
                raise Fault(f"{path}: no such file, and the download failed ({reason})") from error
            time.sleep(PAUSE * 2 ** (attempt - 1))


def _download_once(url: str, path: Path, md5: str) -> None:
    part = path.with_name(f"{path.name}.part")
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        answer = urllib.request.urlopen(request, timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        answer = error  # the server has no bytes after `start`: the part is whole, or wrong
    with answer, locked(path.with_name(f".{path.name}.lock"), wait=True):
        if path.exists():  # another process has downloaded it while this one waited for the lock
            return
        if answer.status != 416:
            _write(answer, part, start if answer.status == 206 else 0)  # 200: the server sends the whole file
        found = digest(part, "md5")
        if found != md5:
            part.unlink()
            raise Fault(f"{path}: no such file, and the download has the MD5 {found}, not {md5}")
        part.replace(path)
        flush(path.parent)


def _write(answer: HTTPResponse, part: Path, start: int) -> None:
    """Write the content of `answer` to the file `part`, from byte `start` on."""
    total = None if answer.length is None else start + answer.length
    with (
        tqdm.wrapattr(answer, "read", total, initial=start, desc=part.stem, leave=False, disable=None) as content,
        open(part, "r+b" if start else "wb") as file,
    ):
        file.seek(start)
        shutil.copyfileobj(content, file)
        if total is not None and file.tell() < total:
            raise OSError("the connection ended early")
        os.fsync(file.fileno())
