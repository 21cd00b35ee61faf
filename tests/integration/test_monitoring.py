"""The Trainer logs what the engine does, wherever it logs to; a profile shows it beside the host's work."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import kt_sft

STEP = {"step_seconds", "forward_seconds", "backward_seconds", "waiting_seconds", "hidden_share", "gflops"}
STEP |= {"tokens_per_second", "imbalance", "dead_experts", "host_gib"}
if torch.accelerator.is_available():
    STEP |= {"device_gib"}


def train(folder: Path, out: Path, steps: int = 4, report_to: str = "none", **settings: Any) -> transformers.Trainer:
    config = kt_sft.KTConfig(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ids = torch.randint(0, 200, (8 * steps, 12), generator=torch.Generator().manual_seed(0))
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        logging_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="no",
        report_to=report_to,
        use_cpu=not torch.accelerator.is_available(),
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    return trainer


def ours(logs: dict[str, Any]) -> dict[str, float]:
    return {key.removeprefix("kt_sft/"): value for key, value in logs.items() if key.startswith("kt_sft/")}


def test_steps_are_logged(
    tiny_moe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "kt_sft"):
        trainer = train(tiny_moe, tmp_path)
    first, second, final = trainer.state.log_history
    assert "train_runtime" in final
    assert not ours(final)
    for logs in (first, second):
        figures = ours(logs)
        assert figures.keys() == STEP
        assert all(math.isfinite(value) for value in figures.values())
        # Two micro-batches of two rows of twelve tokens.
        assert figures["tokens_per_second"] == pytest.approx(48 / figures["step_seconds"])
        assert 0 < figures["waiting_seconds"] < figures["step_seconds"]
        assert figures["imbalance"] >= 1
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("step ")]
    assert [line.partition(":")[0] for line in lines] == ["step 2", "step 4"]
    assert "kt_sft/hidden_share" in capsys.readouterr().out  # what the Trainer itself prints
    assert all(e.meter is None for e in trainer.model.modules() if isinstance(e, kt_sft.CpuExperts))


def test_every_layer_is_logged_where_asked_for(tiny_moe: Path, tmp_path: Path) -> None:
    figures = ours(train(tiny_moe, tmp_path, metrics="layers").state.log_history[0])
    layers = {key.partition("/")[0] for key in figures if "/" in key}
    assert layers == {"layer_00", "layer_01"}
    assert figures["dead_experts"] == figures["layer_00/dead_experts"] + figures["layer_01/dead_experts"]


def test_nothing_is_logged_where_it_is_off(tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kt_sft.CpuExperts, "new_meter", None)  # nobody may ask for one
    trainer = train(tiny_moe, tmp_path, metrics="off")
    assert not any(ours(logs) for logs in trainer.state.log_history)


def test_a_model_without_our_experts_is_left_alone(tiny_moe: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_moe)
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 2
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert not any(ours(logs) for logs in trainer.state.log_history)


def lanes(trace: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The spans of our lanes, by their names."""
    names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name" and e["pid"] == 1}
    spans = [event for event in trace["traceEvents"] if event.get("cat") == "kt_sft"]
    return {name: [span for span in spans if span["tid"] == lane] for lane, name in names.items()}


@pytest.mark.parametrize(("steps", "profiled"), [(4, 2), (1, 1)])
def test_a_profile_has_the_engine_beside_the_host(tiny_moe: Path, tmp_path: Path, steps: int, profiled: int) -> None:
    path = tmp_path / "made" / "trace.json"
    train(tiny_moe, tmp_path / "out", steps, metrics="off", profile=str(path))
    assert [file.name for file in path.parent.iterdir()] == ["trace.json"]
    trace = json.loads(path.read_text())
    engine, waiting = lanes(trace)["CPU engine"], lanes(trace)["waiting for the engine"]
    # Each step has two micro-batches through two layers, forward and backward.
    order = ["layer_00 forward", "layer_01 forward", "layer_01 backward", "layer_00 backward"]
    assert sorted(span["name"] for span in engine) == sorted(order * 2 * profiled)
    in_time = sorted(engine, key=lambda span: span["ts"])
    assert [span["name"] for span in in_time] == order * 2 * profiled
    assert len(waiting) == len(engine)
    assert all(span["args"]["tokens"] == 24 for span in engine)
    # Both have one clock. Torch's own spans of the nodes that submit and await tell: the engine works on a pass while
    # one of them, or what lies between them, runs.
    host = {name: sorted((e["ts"], e["ts"] + e["dur"]) for e in trace["traceEvents"] if e.get("name") == name)
            for name in ("Submit", "Await", "SubmitBackward", "AwaitBackward")}  # fmt: skip
    forward = [span for span in in_time if "forward" in span["name"]]
    assert len(forward) == len(host["Submit"]) == len(host["Await"])
    (clock,) = (event for event in trace["traceEvents"] if event.get("name") == "kt_sft clock")
    for span, submit, wait in zip(forward, host["Submit"], host["Await"], strict=True):
        # Our clock was read within the span that ties it to the profiler's; the latter may be slewed to the time of
        # day, which kernels do by 500 parts in a million at most.
        slack = clock["dur"] + 1e-3 * (wait[1] - clock["ts"])
        assert submit[0] - slack <= span["ts"]
        assert span["ts"] + span["dur"] <= wait[1] + slack


def test_a_profile_that_cannot_be_written_is_an_error_before_training(tiny_moe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        train(tiny_moe, tmp_path / "out", profile=str(tmp_path / "file" / "trace.json"))


def records_of(file: Path) -> Iterator[bytes]:
    """What a file of W&B's holds: after a header of 7 bytes a log in LevelDB's format.

    Blocks of 32 KiB; in them fragments with a checksum (4 bytes), a length (2) and a kind (1: all of a record, 2: its
    first part, 3: one between, 4: its last). https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    content, block, header = file.read_bytes(), 32768, 7
    assert content[:4] == b":W&B"
    place, record = header, b""
    while place + header <= len(content):
        if block - place % block < header:  # too little for a fragment
            place += block - place % block
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + header : place + header + length]
        place += header + length
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_has_the_figures(tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run offline, read back from the file that `wandb sync` would send."""
    pytest.importorskip("wandb", reason="needs the extra kt_sft[wandb]")
    from wandb.proto import wandb_internal_pb2

    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    trainer = train(tiny_moe, tmp_path / "out", report_to="wandb")
    import wandb

    wandb.teardown()  # returns when its service has written everything and ended
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found: list[dict[str, float]] = []
    for data in records_of(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        found.append({key.removeprefix("train/kt_sft/"): value for key, value in items.items() if "kt_sft/" in key})
    expected = [ours(logs) for logs in trainer.state.log_history if ours(logs)]
    assert [figures for figures in found if figures] == expected


def test_tensorboard_has_the_figures(tiny_moe: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = train(tiny_moe, tmp_path / "out", report_to="tensorboard")
    (file,) = tmp_path.glob("**/events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    names = {key.removeprefix("train/kt_sft/") for key in events.Tags()["scalars"] if "kt_sft/" in key}
    assert names == STEP
    expected = [logs["kt_sft/gflops"] for logs in trainer.state.log_history if ours(logs)]
    assert [event.value for event in events.Scalars("train/kt_sft/gflops")] == pytest.approx(expected)


def test_what_the_trainer_calls_a_callback_by() -> None:
    """The seam: every Trainer makes a callback of each of these, ahead of those that report."""
    import inspect

    names = [getattr(callback, "__name__", "") for callback in transformers.trainer.DEFAULT_CALLBACKS]
    assert names.count("EngineCallback") == 1
    source = inspect.getsource(transformers.Trainer.__init__)
    assert re.search(r"DEFAULT_CALLBACKS \+ get_reporting_integration_callbacks\(", source)
    log = inspect.getsource(transformers.Trainer.log)
    assert log.index("log_history.append") < log.index("callback_handler.on_log(self.args, self.state, self.control, l")


def test_a_profile_has_micro_batches_that_are_interleaved(tiny_moe: Path, tmp_path: Path) -> None:
    """Whose forward runs in threads of their own, which torch's profiler has to record, too."""
    path = tmp_path / "trace.json"
    train(tiny_moe, tmp_path / "out", 3, metrics="off", profile=str(path), interleave_micro_batches=True)
    trace = json.loads(path.read_text())
    in_time = sorted(lanes(trace)["CPU engine"], key=lambda span: span["ts"])
    # Each layer's work for one micro-batch, then for the other.
    order = ["layer_00 forward"] * 2 + ["layer_01 forward"] * 2 + ["layer_01 backward"] * 2 + ["layer_00 backward"] * 2
    assert [span["name"] for span in in_time] == order * 2
    for name in ("Submit", "Await"):
        threads = [event["tid"] for event in trace["traceEvents"] if event.get("name") == name]
        assert len(threads) == 8
        assert len({*threads}) == 2
