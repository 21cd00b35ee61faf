"""The report of `kt-sft compare`: Markdown, JSON, and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kt_sft.cli.compare_plan import IN_TURN

#: Whom the table compares with, in this order.
_BASELINES = ("zero3_tuned", "zero3", "llamafactory")
#: Of T* / T, what kt_sft must at least be faster by than streaming of all experts.
_SHARE_OF_CROSSOVER = 0.8


def write_report(report: dict[str, Any], folder: Path) -> str:
    """Writes report.json, report.md and report.png; returns what to tell the user.

    Args:
        report: From `Comparison.run`.
        folder: Where they go.
    """
    (folder / "report.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    text = markdown(report)
    (folder / "report.md").write_text(text)
    draw(report, folder / "report.png")
    return f"{text}\nreport: {folder / 'report.md'}, report.json, report.png"


def markdown(report: dict[str, Any]) -> str:
    """The report for people: the table first, the full configuration last."""
    parts = [
        f"# kt_sft compared, {report['date'][:10]}",
        _setting(report),
        _tables(report),
        _agreement(report),
        _model(report),
    ]
    if report["missing"]:
        missing = "\n".join(f"- {name}: {_first_lines(reason)}" for name, reason in report["missing"].items())
        parts.append(f"## What did not run\n\n{missing}")
    parts.append(_configuration(report))
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(report: dict[str, Any]) -> str:
    machine, model, settings = report["machine"], report["model"], report["settings"]
    devices = ", ".join(device["name"] for device in machine["accelerators"])
    random = model["random"]
    what = model["path"] if random is None else f"{random['name']}, random weights"
    layers = "" if model["layers"] is None else f", {model['layers']} layers"
    weights = "" if model["weight_bytes"] is None else f", {model['weight_bytes'] / 2**30:.2f} GiB of weights"
    lines = [
        f"- Model: {what}{layers}{weights}.",
        f"- Machine: {machine['cpu']}, {machine['cpus']} CPUs, {machine['memory_bytes'] / 2**30:.0f} GiB; "
        + (f"accelerator {devices}." if devices else "no accelerator: every contender computes on the CPU.")
        + f" Tier {machine['engine']['tier']}; threads: {settings['threads'] or 'as every program chooses'}.",
        f"- {settings['rounds']} alternating rounds of {settings['steps']} steps, the first {settings['warmup']} not "
        "measured. Ratios are taken within a round; their median and range are shown. Only ratios mean something "
        "on a machine that does other work, too.",
    ]
    live = min(
        (config["zero_optimization"].get("stage3_max_live_parameters", 1e9) for config in report["deepspeed"].values()),
        default=0,
    )
    if model["weight_bytes"] is not None and model["weight_bytes"] / 2 < live:
        lines.append(
            f"- The model's {model['weight_bytes'] / 2e9:.2f}e9 weights are fewer than ZeRO-3 may keep gathered "
            f"({live / 1e9:.0f}e9), so it moves less than it would with a whole model."
        )
    if not devices and any(name.startswith("zero3") for name in report["descriptions"]):
        lines.append(
            "- Without an accelerator ZeRO-3 copies its parameters within host memory; what a link costs is not part "
            "of these figures."
        )
    return "\n".join(lines)


def _tables(report: dict[str, Any]) -> str:
    return "\n\n".join(_table(report, result) for result in report["results"])


def _table(report: dict[str, Any], result: dict[str, Any]) -> str:
    contenders = result["contenders"]
    baselines = [name for name in _BASELINES if name in contenders]
    devices = any(own["peak_device_bytes"] is not None for own in contenders.values())
    heads = ["", "tokens/s", "spread", "s a step", "host GiB", *(["device GiB"] if devices else [])]
    heads += [f"x {name}" for name in baselines]
    rows = []
    for name, own in contenders.items():
        row = [
            name,
            f"{own['tokens_per_second']:.4g}",
            f"{own['spread']:.0%}",
            f"{own['step_seconds']:.3g}",
            f"{own['peak_host_bytes'] / 2**30:.2f}",
        ]
        if devices:
            row.append("" if own["peak_device_bytes"] is None else f"{own['peak_device_bytes'] / 2**30:.2f}")
        row += [_ratio(own["ratios"].get(baseline)) for baseline in baselines]
        rows.append(row)
    title = f"## {result['tokens']} tokens a step ({result['batch']} x {result['cutoff_len']} a micro-batch)"
    table = "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])
    logged = contenders.get("kt_sft", {}).get("logged") or {}
    split = "".join(f"\n- {name}: {value:.4g}" for name, value in logged.items())
    return f"{title}\n\n{table}" + (f"\n\nWhat kt_sft logged, mean over the measured steps:\n{split}" if split else "")


def _ratio(ratio: dict[str, float] | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['greatest']:.2f})"


def _agreement(report: dict[str, Any]) -> str:
    rows = []
    for result in report["results"]:
        for name, own in result["contenders"].items():
            found = own["agreement"]
            if found is not None:
                verdict = {True: "yes", False: "NO", None: "not judged"}[found["agrees"]]
                rows.append(
                    f"| {name} to {result['reference']} | {result['tokens']} | {_found(found, 'loss_first', '.2e')} "
                    f"| {_found(found, 'gradient_first', '.2%')} | {_found(found, 'loss_mean', '.2e')} | {verdict} |"
                )
    if not rows:
        return ""
    return (
        "## Do they compute the same?\n\nAll start from the same weights and take the same data in the same order. At "
        "the first step, before any update, the loss and the gradient's norm must agree within what rounding to BF16 "
        "explains; over all steps the losses may differ in the mean by as much, or by 5 % of the reference's fall "
        "(kt_sft/cli/compare_figures.py derives the bounds). In parentheses: what is allowed. Where kt_sft stores "
        "experts in another format than the checkpoint, differences are shown and not judged.\n\n"
        "| | tokens | loss, first step | gradient norm, first step | loss, mean | agree |\n"
        "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(rows)
    )


def _found(agreement: dict[str, Any], name: str, form: str) -> str:
    """A difference, and what is allowed."""
    allowed = agreement["allowed"]
    return f"{agreement[name]:{form}}" + ("" if allowed is None else f" ({allowed[name]:{form}})")


def _model(report: dict[str, Any]) -> str:
    """Predicted against measured, for kt_sft."""
    rows, links = [], False
    for result in report["results"]:
        found = result["prediction"]
        if found is None:
            continue
        own = result["contenders"].get("kt_sft")
        measured = None if own is None else own["step_seconds"]
        beside, crossover = found["side_by_side"], found["crossover_tokens"]
        links = links or beside is not None
        cells = [
            str(result["tokens"]),
            f"{found['rates']['expert_forward'] / 1e9:.0f} / {found['rates']['expert_backward'] / 1e9:.0f}",
            f"{found['rates']['dense'] / 1e9:.0f}",
            f"{found['cpu']:.3g}",
            f"{found['device']:.3g}",
            f"{found['in_turn']:.3g}",
            "" if beside is None else f"{beside:.3g}",
            "" if measured is None else f"{measured:.3g}",
            "" if measured is None else f"{measured / found['in_turn']:.2f}",
            _gain(result),
            "" if crossover is None else f"{crossover:.0f}",
            "" if crossover is None else _goal(crossover, result["batch"] * result["cutoff_len"]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    if not rows:
        return ""
    heads = ["tokens", "engine GFLOP/s", "dense GFLOP/s", "experts, s", "rest, s", "in turn, s", "side by side, s"]
    heads += ["measured, s", "measured / in turn", "gain (predicted, most)", "T*, tokens", "goal, x zero3_tuned"]
    alone = "" if links else " Here experts and the rest share one CPU, so they can only take turns."
    return (
        "## The model of the step\n\nPredicted from speeds measured before the runs, at these sizes "
        "(kt_sft/offload/step_model.py), against what kt_sft took. The model counts products only: optimizer, LoRA, "
        "norms and what Python takes between operations come on top, and so does whatever else the machine did. The "
        "gain is what interleaving makes of kt_sft_in_turn's speed; at most it is (c + g) / max(c, g), with c the "
        "experts' time and g that of the rest."
        f"{alone}\n\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}\n" + "\n".join(rows)
    )


def _gain(result: dict[str, Any]) -> str:
    """Of interleaving: measured, and in parentheses predicted and at most possible."""
    found, own = result["prediction"], result["contenders"].get("kt_sft")
    if found["gain"] is None:
        return ""
    measured = None if own is None else own["ratios"].get(IN_TURN)
    predicted = f"({found['gain']:.2f}, {found['most_gain']:.2f})"
    return predicted if measured is None else f"{measured['median']:.2f} {predicted}"


def _goal(crossover: float, tokens: int) -> str:
    """What kt_sft must reach against streaming: 0.8 T* / T, and never less than 1 below T*; beyond there is no goal."""
    return "" if tokens >= crossover else f"{max(1.0, _SHARE_OF_CROSSOVER * crossover / tokens):.2f}"


def _configuration(report: dict[str, Any]) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    variables = ", ".join(f"{name}={value}" for name, value in machine["environment"].items() if value)
    parts = [
        "## Configuration",
        f"Command: `{' '.join(report['command'])}`. Python {machine['python']}, {machine['platform']}; {versions}."
        + (f" Environment: {variables}." if variables else ""),
        "\n".join(f"- {name}: {text}." for name, text in report["descriptions"].items()),
        f"The recipe, which only kt_sft runs with its last block:\n\n{_block(report['recipe'])}",
        *(f"DeepSpeed's configuration, {name}:\n\n{_block(config)}" for name, config in report["deepspeed"].items()),
    ]
    return "\n\n".join(parts)


def _block(content: dict[str, Any]) -> str:
    return f"```json\n{json.dumps(content, indent=2)}\n```"


def _first_lines(reason: str) -> str:
    """The sentence, and the last line of the output that follows it."""
    lines = [line.strip(" |") for line in reason.splitlines() if line.strip(" |")]
    errors = [line for line in lines[1:] if "Error" in line]
    return lines[0].partition(": ")[0] + (f": {errors[-1]}" if errors else "") if len(lines) > 1 else lines[0]


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws the speeds with their range over the rounds, and the losses of the first workload."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = report["results"]
    names = list(dict.fromkeys(name for result in results for name in result["contenders"]))
    figure = Figure(figsize=(11.0, 4.5), layout="tight")
    FigureCanvasAgg(figure)
    speeds, losses = figure.subplots(1, 2)
    for number, name in enumerate(names):
        points = [(result["tokens"], result["contenders"][name]) for result in results if name in result["contenders"]]
        medians = [own["tokens_per_second"] for _, own in points]
        runs = [[run["tokens_per_second"] for run in own["runs"]] for _, own in points]
        errors = [
            [median - min(run) for median, run in zip(medians, runs, strict=True)],
            [max(run) - median for median, run in zip(medians, runs, strict=True)],
        ]
        if len(results) == 1:
            speeds.bar(number, medians, yerr=errors, capsize=4, label=name)
        else:
            speeds.errorbar([at for at, _ in points], medians, yerr=errors, marker="o", capsize=3, label=name)
        curve = results[0]["contenders"].get(name, {}).get("losses", [])
        losses.plot(range(1, len(curve) + 1), curve, marker=".", label=name)
    if len(results) == 1:
        speeds.set_xticks(range(len(names)), names)
    else:
        speeds.set_xscale("log", base=2)
        speeds.set_xlabel("tokens a step")
        speeds.legend(fontsize=8)
    speeds.set_ylim(bottom=0)
    speeds.set_ylabel("tokens/s")
    losses.set_xlabel(f"step ({results[0]['tokens']} tokens each)")
    losses.set_ylabel("loss")
    losses.legend(fontsize=8)
    for axes in (speeds, losses):
        axes.grid(alpha=0.3)
    machine = report["machine"]
    devices = ", ".join(device["name"] for device in machine["accelerators"]) or "no accelerator"
    figure.suptitle(f"{machine['cpu']}, {machine['cpus']} CPUs; {devices}", fontsize=10)
    figure.savefig(path, format="png", dpi=140)
