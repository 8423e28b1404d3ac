"""A local server that imitates the part of W&B's API that runs and agents use; what an offline run has logged."""

import gzip
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = Callable[[str, dict[str, Any]], dict[str, Any] | None]


class WandbServer:
    """Answers GraphQL operations with `answer(operation, variables)`; where that is None, like an empty project.

    Where `answer` raises PermissionError, the server refuses the key with status 401.

    Use it as a context manager. `operations` lists the operations so far; `url` is the value for WANDB_BASE_URL.
    """

    def __init__(self, answer: Answer = lambda operation, variables: None) -> None:
        self.operations: list[str] = []
        self.answer = answer
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                status, content = 200, {}
                try:
                    content = {"data": outer.reply(json.loads(body)) if self.path == "/graphql" else {}}
                except PermissionError:
                    status, content = 401, {"error": "user is not logged in"}
                reply = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            do_GET = do_PUT = do_POST

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        operation = request.get("operationName") or request["query"].split("(")[0].split()[-1]
        variables = request.get("variables") or {}
        self.operations.append(operation)
        answered = self.answer(operation, variables)
        if answered is not None:
            return answered
        project = {"id": "P", "name": "hw1", "entity": {"id": "E", "name": "me"}}
        if operation == "UpsertBucket":
            bucket = {"id": "B", "name": variables["name"], "displayName": variables["name"], "config": "{}"}
            return {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True}}
        if operation == "RunResumeStatus":
            return {"model": {**project, "bucket": None}}
        return {}

    def __enter__(self) -> "WandbServer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Refuse all further connections."""
        self._server.shutdown()
        self._server.server_close()


def offline_records(folder: Path, run_id: str, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in the file of a run's newest offline W&B run."""
    paths = folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")
    newest = max(paths, key=lambda path: path.stat().st_mtime_ns)
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(newest)]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    entries = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return [entry for entry in entries if entry["type"] == kind]
