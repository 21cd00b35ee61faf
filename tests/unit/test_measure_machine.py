"""One script that runs all checks and measurements of a machine, within a time."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import measure_machine  # noqa: E402


def test_a_part_that_fails_is_noted_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts = {"bad": ["echo before", "false", "echo after"], "good": ['echo it > "$OUT/it"', "pwd"]}
    monkeypatch.setattr(measure_machine, "PARTS", parts)
    assert measure_machine.main(["--out", str(tmp_path), "--parts", "bad,good"]) == 1
    assert (tmp_path / "bad.log").read_text() == "before\n"
    assert (tmp_path / "it").read_text() == "it\n"
    assert Path((tmp_path / "good.log").read_text().strip()) == measure_machine.REPOSITORY
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {part: facts["status"] for part, facts in summary.items()} == {"bad": 1, "good": 0}


def test_a_failure_in_a_pipe_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure_machine, "PARTS", {"pipe": ["false | cat"]})
    assert measure_machine.main(["--out", str(tmp_path), "--parts", "pipe"]) == 1


def test_what_takes_too_long_is_ended_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    of_pipe = select.poll()
    of_pipe.register(reader, select.POLLIN)

    class Process(subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            if timeout == 1234:  # it is over once the part has got as far as this
                assert of_pipe.poll(60_000), "nothing was started"
                assert os.read(reader, 1) == b"b"
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait(timeout)

    monkeypatch.setattr(measure_machine.subprocess, "Popen", Process)
    monkeypatch.setattr(measure_machine, "PARTS", {"long": [f"echo begun; (echo -n b; sleep 1000) > {pipe} & wait"]})
    assert measure_machine.run("long", tmp_path, 1234) is None
    assert (tmp_path / "long.log").read_text() == "begun\n"
    assert of_pipe.poll(60_000) == [(reader, select.POLLHUP)], "sleep still holds the pipe"
    os.close(reader)


def test_parts_after_the_end_of_the_time_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure_machine, "PARTS", {"late": ["echo it"]})
    summary = measure_machine.measure(["late"], tmp_path, 0.0, lambda line: None)
    assert summary["late"]["status"] == "out of time"
    assert not (tmp_path / "late.log").exists()


def test_an_unknown_part_is_named(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        measure_machine.main(["--parts", "facts,banch"])
    assert "no part 'banch'; parts are facts, cxx" in capsys.readouterr().err
