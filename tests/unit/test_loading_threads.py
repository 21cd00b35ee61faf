"""Pools whose threads compute with torch: one thread each, and nothing is lost."""

from __future__ import annotations

import threading

import pytest
import torch

from kt_sft.loading import threads


def test_torch_works_on_one_thread_in_each_and_on_as_many_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cpus", lambda: [0, 1, 2])
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        threads.run_all(lambda item: seen.append((item, torch.get_num_threads())), range(20), most_threads=2)
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert sorted(seen) == [(item, 1) for item in range(20)]
        assert (torch.get_num_threads(), later) == (3, [3])
    finally:
        torch.set_num_threads(before)


def test_an_error_comes_out() -> None:
    before = torch.get_num_threads()

    def work(item: int) -> None:
        if item == 7:
            raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 7"):
        threads.run_all(work, range(20), most_threads=4)

    assert torch.get_num_threads() == before
