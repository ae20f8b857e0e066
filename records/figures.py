"""Tables and curves of runs: Markdown side by side, and one PNG with five panels."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from runs import PER_RUN, Run
from welch import Sample, sample

STAGES = ("post_ema", "roundtrip", "sliding", "ttt", "ngram")


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; None is a dash."""
    lines = ["| " + " | ".join(head) + " |", "|" + "--|" * len(head)]
    lines += ["| " + " | ".join("-" if cell is None else str(cell) for cell in row) + " |"
              for row in rows]
    return "\n".join(lines)


def mean_of(values: Iterable[float | None], form: str) -> str | None:
    """The mean of the values that are there, formatted; None if there are none."""
    there = [value for value in values if value is not None]
    return format(statistics.fmean(there), form) if there else None


def spread_of(found: Sample, form: str = ".5f") -> str:
    """mean, plus or minus half the 95 % interval."""
    half = f" +- {found.interval:{form}}" if found.interval is not None else ""
    return f"{found.mean:{form}}{half}"


def interval_text(mean: float, half: float | None) -> str:
    """A mean with half its interval, if it has one; bold where that leaves out zero."""
    text = f"{mean:+.4f}" if half is None else f"{mean:+.4f} +- {half:.4f}"
    return f"**{text}**" if half is not None and abs(mean) > half else text


def change_text(change: Sample) -> str:
    """A mean difference with its 95 % interval by Student's t; one seed has none."""
    return interval_text(change.mean, change.interval)


def stage_table(groups: dict[str, list[Run]], published: Iterable[Sequence[Any]] = ()) -> str:
    """Runs or groups of runs side by side: means over the seeds of what their logs say.

    `published` are rows of published_row, which stand below.
    """
    head = ["run", "seeds", "steps", "ms/step", *(s.replace("_", "-") for s in STAGES),
            "headline BPB, 95 %", "eval s", "artifact", "code", "total (largest)"]
    rows = []
    for name, runs in groups.items():
        scores = [mean_of((run.scores[stage].bpb if stage in run.scores else None
                           for run in runs), ".4f") for stage in STAGES]
        finals = [run.headline.bpb for run in runs if run.headline]
        rows.append([name, len(runs), mean_of((run.steps for run in runs), ".0f"),
                     mean_of((run.step_avg_ms for run in runs), ".1f"), *scores,
                     spread_of(sample(finals)) if runs and len(finals) == len(runs) else None,
                     mean_of((run.eval_seconds for run in runs), ".0f"),
                     mean_of((run.artifact_bytes for run in runs), ".0f"),
                     mean_of((run.code_bytes for run in runs), ".0f"),
                     max((run.total_bytes for run in runs if run.total_bytes), default=None)])
    return markdown(head, [*rows, *published])


def published_row(bpb: Sample, row: dict[str, Any]) -> list[Any]:
    """A published result, a row of denominator.results, as a row of stage_table."""
    return [row["label"], bpb.n, mean_of([row.get("steps")], ".0f"),
            mean_of([row.get("ms_per_step")], ".1f"),
            *(mean_of([row["stages"].get(stage)], ".4f") for stage in STAGES),
            spread_of(bpb), mean_of([row.get("eval_seconds")], ".0f"), None, row["bytes_code"],
            row["bytes_total"]]


def differing_settings(groups: dict[str, list[Run]]) -> str:
    """The settings in which groups of our runs differ, seeds and names of files left out."""
    ours = {name: runs[0].settings for name, runs in groups.items()
            if runs and runs[0].settings}
    names = sorted({key for settings in ours.values() for key in settings} - PER_RUN)
    rows = [[key, *(settings.get(key) for settings in ours.values())] for key in names
            if len({settings.get(key) for settings in ours.values()}) > 1]
    return markdown(["setting", *ours], rows) if rows else ""


def step_times(run: Run) -> tuple[list[int], list[float]]:
    """Steps and ms per step between the lines of a log that give a time."""
    points = [p for p in run.train if p.ms is not None]
    pairs = list(zip(points, points[1:], strict=False))
    longest = max((b.step - a.step for a, b in pairs), default=0)
    pairs = [(a, b) for a, b in pairs if b.step - a.step > longest / 10]  # the rest is rounding
    return [b.step for _, b in pairs], [(b.ms - a.ms) / (b.step - a.step) for a, b in pairs]


def plot(groups: dict[str, list[Run]], path: Path, title: str) -> None:
    """Loss, BPB, final stages, learning rate and step time of all runs, a colour a group: a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    (loss, bpb, final), (rate, pace, rest) = axes
    present = [stage for stage in STAGES
               if any(stage in run.scores for runs in groups.values() for run in runs)]
    colours = plt.get_cmap("tab10").colors
    for number, (name, runs) in enumerate(groups.items()):
        for order, run in enumerate(runs):
            style = dict(color=colours[number % 10], label=name if order == 0 else None,
                         linewidth=1.2, alpha=0.85)
            loss.plot([p.step for p in run.train], [p.loss for p in run.train], **style)
            points = [p for p in run.val if p.step]
            bpb.plot([p.step for p in points], [p.bpb for p in points], **style, marker=".")
            scored = [(present.index(stage), run.scores[stage].bpb) for stage in present
                      if stage in run.scores]
            final.plot(*zip(*scored, strict=True), **style, marker="o", linestyle=":")
            scales = [(p.step, p.lr_scale) for p in run.train if p.lr_scale is not None]
            if scales:
                rate.plot(*zip(*scales, strict=True), **style)
            pace.plot(*step_times(run), **style, marker=".")
    loss.set(title="Training loss", xlabel="step", ylabel="nats per token", yscale="log")
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter("{x:g}")
    bpb.set(title="Validation while training", xlabel="step", ylabel="bits per byte")
    bpb.set_xlim(0, None)
    ends = [run.headline.bpb for runs in groups.values() for run in runs if run.headline]
    lowest, highest = bpb.get_ylim()
    bpb.set_ylim(lowest, min(highest, 1.3 * max(ends, default=highest)))  # not the first steps
    final.set(title="Final stages", xlabel="stage", ylabel="bits per byte", xticks=range(
        len(present)), xticklabels=[stage.replace("_", "-") for stage in present])
    final.margins(x=0.1)
    rate.set(title="Learning rate", xlabel="step", ylabel="share of the peak")
    if not rate.get_lines():
        rate.text(0.5, 0.5, "not in these logs", ha="center", transform=rate.transAxes)
    pace.set(title="Step time", xlabel="step", ylabel="ms per step")
    slowest = max((max(line.get_ydata(), default=0) for line in pace.get_lines()), default=0)
    pace.set_ylim(0, 1.1 * slowest or None)
    for panel in (loss, bpb, final, rate, pace):
        panel.grid(alpha=0.3)
    rest.axis("off")
    rest.legend(*loss.get_legend_handles_labels(), loc="upper left", fontsize="small")
    figure.suptitle(textwrap.fill(title, 120))
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def plot_changes(groups: dict[str, list[tuple[str, Sample]]], path: Path) -> None:
    """Changes of BPB with their intervals, (name, change) by title, a panel each: a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tallest, first = max(map(len, groups.values())), next(iter(groups.values()))
    figure, axes = plt.subplots(1, len(groups), figsize=(4.5 * len(groups), 1.2 + 0.26 * tallest),
                                layout="constrained", squeeze=False, sharex=True)
    for panel, (title, rows) in zip(axes[0], groups.items(), strict=True):
        for place, (_, change) in enumerate(rows):
            half = change.interval or math.inf
            told = "#1a7f4b" if change.mean < 0 else "#b3412e"
            panel.errorbar(change.mean, place, xerr=change.interval, fmt="o", markersize=4,
                           capsize=3, color=told if abs(change.mean) > half else "#888888")
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set(title=title, yticks=range(len(rows)), ylim=(tallest - 0.5, -0.5),
                  yticklabels=[name.replace(" -> ", " \u2192 ") for name, _ in rows],
                  xlabel="change of BPB, 95 % interval (left is better)")
        panel.locator_params(axis="x", nbins=6)
        panel.grid(axis="x", alpha=0.3)
        if panel is not axes[0, 0] and [*dict(rows)] == [*dict(first)]:
            panel.set_yticklabels([])
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def nats_to_bpb(runs: Sequence[Run]) -> float | None:
    """BPB of one nat per token, of the tokenizer that the runs used."""
    factors = [run.bpb_per_nat for run in runs if run.bpb_per_nat]
    return statistics.fmean(factors) if factors else None


def bytes_per_token(factor: float) -> float:
    """Source bytes of a token, from the BPB of one nat."""
    return 1 / (math.log(2) * factor)
