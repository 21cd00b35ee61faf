"""Serves a model with `llamafactory-cli api` on this machine's loopback, and asks it with the openai client.

Run as `python -m quickstart_steps.api --arguments FILE --questions FILE --out FILE`; the arguments are a YAML recipe of
LLaMA-Factory's, the questions a JSON list. The server's output goes beside the arguments, as api.server.log.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from quickstart_steps.processes import OFFLINE, StepError, llamafactory_cli

MAX_ANSWER_TOKENS = 20
SECONDS_TO_START = 180
SECONDS_TO_STOP = 30


@contextlib.contextmanager
def serve(recipe: Path, log: Path, environment: dict[str, str] | None = None) -> Iterator[str]:
    """The base URL of a server that answers, until the block is left.

    Args:
        recipe: A YAML file; what it names by relative paths is looked for from the working directory.
        log: Where the server's output goes.
        environment: Variables that it gets beside ours.

    Raises:
        StepError: The server ended, or does not answer in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"API_HOST": "127.0.0.1", "API_PORT": str(port)}
    with log.open("w") as output:
        server = subprocess.Popen(
            [llamafactory_cli(), "api", str(recipe)],
            env={**os.environ, **OFFLINE, **(environment or {}), **address},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}/v1"
        _wait_until_up(f"{url}/models", server, log)
        yield url
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(timeout=SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until_up(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        try:
            direct.open(url, timeout=SECONDS_TO_START).close()
            return
        except urllib.error.URLError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise StepError(f"llamafactory-cli api does not answer ({error}); its output: {log}") from error
            time.sleep(0.2)  # waits for another process to listen; there is nothing else to wait on


def stream_answer(url: str, question: str, max_tokens: int = MAX_ANSWER_TOKENS) -> str:
    """A streamed greedy answer.

    Raises:
        StepError: The stream ended before the server said that the answer is complete.
    """
    import openai

    with openai.OpenAI(
        base_url=url,
        api_key="none",
        timeout=SECONDS_TO_START,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as client:
        stream = client.chat.completions.create(
            model="served",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=max_tokens,
            stream=True,
        )
        choices = [chunk.choices[0] for chunk in stream]
    if [choice.finish_reason for choice in choices if choice.finish_reason] != ["stop"] or not choices[
        -1
    ].finish_reason:
        raise StepError(f"the answer to {question!r} is not complete: {choices}")
    return "".join(choice.delta.content or "" for choice in choices)


def main(arguments: list[str] | None = None) -> int:
    """Command line of this step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arguments", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    questions = json.loads(options.questions.read_text())
    with serve(options.arguments, options.arguments.with_suffix(".server.log")) as url:
        answers = [{"question": question, "answer": stream_answer(url, question)} for question in questions]
    options.out.write_text(json.dumps(answers, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
