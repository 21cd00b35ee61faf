"""`llamafactory-cli api` on a port of this machine's own, for as long as a test asks it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml
from commands import BIN, ENVIRONMENT


@contextlib.contextmanager
def api_server(folder: Path, recipe: dict[str, Any], **environment: str) -> Iterator[str]:
    """The base URL of a server that answers; its output is in `folder / "log"`, and shown if anything fails."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | ENVIRONMENT | {"API_HOST": "127.0.0.1", "API_PORT": str(port)} | environment
    command = [str(BIN / "llamafactory-cli"), "api", str(folder / "recipe.yaml")]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}/v1"
        _wait_until_up(url, server)
        yield url
    except BaseException:
        sys.stderr.write((folder / "log").read_text())
        raise
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=30)


def _wait_until_up(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            httpx.get(f"{url}/models", timeout=60).raise_for_status()
            return
        except httpx.ConnectError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.2)  # waits for another process to listen; there is nothing else to wait on
