"""`llamafactory-cli api` on a port of this machine's own, for as long as a test asks it."""

from __future__ import annotations

import contextlib
import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from commands import ENVIRONMENT

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from quickstart_steps.api import serve, stream_answer

__all__ = ["api_server", "leave_early", "stream_answer"]


def leave_early(url: str, question: str, max_tokens: int) -> None:
    """Asks for a streamed answer, and breaks the connection at its first piece."""
    body = {"model": "served", "messages": [{"role": "user", "content": question}], "max_tokens": max_tokens}
    request = urllib.request.Request(
        f"{url}/chat/completions",
        json.dumps(body | {"temperature": 0, "stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=180) as stream:
        assert stream.readline().startswith(b"data:")


@contextlib.contextmanager
def api_server(folder: Path, recipe: dict[str, Any], **environment: str) -> Iterator[str]:
    """The base URL of a server that answers; its output is in `folder / "log"`, and shown if anything fails."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    try:
        with serve(folder / "recipe.yaml", folder / "log", ENVIRONMENT | environment) as url:
            yield url
    except BaseException:
        sys.stderr.write((folder / "log").read_text())
        raise
