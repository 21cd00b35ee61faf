"""Many clients at once of `llamafactory-cli api`, on a model with adapters on its experts."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adapted_models import adapted, load
from serving import api_server, leave_early, stream_answer

CLIENTS = 16
#: Besides: clients that go away while they are answered.
LEAVING = 4
MOST_TOKENS = 24


def test_many_streaming_clients_get_what_one_gets(tiny_moe: Path, tmp_path: Path) -> None:
    adapted(load(tiny_moe, engine=False), lora_alpha=24).save_pretrained(tmp_path / "adapter")
    recipe = {
        "model_name_or_path": str(tiny_moe),
        "adapter_name_or_path": str(tmp_path / "adapter"),
        "template": "qwen",
        "infer_dtype": "float32",
        "kt_sft": {"lora_experts": True},
    }
    questions = [f"{verb} {word}" for verb in ("say", "give me", "what is", "no") for word in ("red", "7", "Who?", "-")]
    together = threading.Barrier(CLIENTS + LEAVING, timeout=60)

    # LLaMA-Factory answers one request after the other unless it is told how many at a time.
    with api_server(tmp_path, recipe, MAX_CONCURRENT=str(CLIENTS + LEAVING)) as url:
        alone = [stream_answer(url, question, MOST_TOKENS) for question in questions]

        def ask_with_the_others(question: str) -> str:
            together.wait()
            return stream_answer(url, question, MOST_TOKENS)

        def leave_the_others(question: str) -> None:
            together.wait()
            leave_early(url, question, MOST_TOKENS)

        with ThreadPoolExecutor(CLIENTS + LEAVING) as clients:
            leaving = [clients.submit(leave_the_others, question) for question in questions[:LEAVING]]
            at_once = list(clients.map(ask_with_the_others, questions))
            for left in leaving:
                left.result()
        afterwards = stream_answer(url, questions[0], MOST_TOKENS)

    assert at_once == alone
    assert afterwards == alone[0]
    assert all(answer.strip() for answer in alone)
    assert len({*alone}) >= CLIENTS // 2, "an answer that does not depend on the question shows nothing"
    assert "routed experts on the CPU" in (tmp_path / "log").read_text()
