"""Randomised designs: what many levers are worth, from runs that each differ in several of them.

A plan for records/ablate.py may have, instead of variants,

    "ends": {"record": {settings}, "frontier": {settings}}    configurations to stand near
    "levers": {name: {level: {settings}, ...}}                what is changed, and to what
    "at": {end: {lever: level}}                               which level an end has; else the first
    "runs": 128, "share": 0.25                                runs at each end

In a run at an end each lever leaves the end's level with the probability `share`, for any of its
other levels alike. Which runs do is drawn so that every lever leaves in equally many runs, within
one. Runs take the plan's seeds in turn, so that a seed's order of the data and initial values are
shared by many. Every run then says something of every lever: of a comparison of one lever at a time
by as many runs, each would get but a few.

The effects are those of least squares: a score is the sum of its seed's effect, of its levers' and
of chance. An effect is thus an average over the company in which the lever was met: near an end,
with that share of the other levers changed. What does not add up counts as chance, and so widens
the intervals (Student's t, 95 %). Intervals of many levers: one in twenty leaves out zero by
chance.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

import figures
from welch import Sample, t_quantile

GOAL = 0.003  # BPB: the difference that an experiment should see


def hours_of(run: dict) -> float:
    """What a run took, training and evaluation."""
    return run.get("train_ms", 0) / 3.6e6 + run.get("seconds_eval", 0) / 3600


def detectable(change: Sample) -> float:
    """The true difference that would leave zero outside the interval 19 times in 20."""
    tails = (t_quantile(tail, change.n - 1) for tail in (0.05, 0.025))
    return sum(tails) * change.std / math.sqrt(change.n)


def runs_for_goal(effect: Sample, runs: int) -> int:
    """How many runs in place of `runs` would make half the effect's interval GOAL.

    Of so many runs a part fixes the other effects, and the rest, effect.n - 1, measures this one.
    """
    error, freedom = effect.std / math.sqrt(effect.n), effect.n - 1
    more = next(n for n in itertools.count(1)
                if t_quantile(0.025, n) * error * math.sqrt(freedom / n) <= GOAL)
    return math.ceil(runs - freedom + more)


def levels_of(plan: dict, end: str, lever: str) -> list[str]:
    """The levels of a lever, the end's first."""
    names = list(plan["levers"][lever])
    own = plan.get("at", {}).get(end, {}).get(lever, names[0])
    return [own, *(name for name in names if name != own)]


def drawn(plan: dict, end: str, number: int) -> list[dict[str, str]]:
    """The levels of every lever in each run at an end, the `number`-th."""
    random, runs = np.random.default_rng(number), plan["runs"]
    columns = {}
    for lever in plan["levers"]:
        own, *others = levels_of(plan, end, lever)
        away = round(runs * plan["share"])
        levels = [others[i % len(others)] for i in range(away)] + [own] * (runs - away)
        columns[lever] = [levels[i] for i in random.permutation(runs)]
    return [{lever: column[run] for lever, column in columns.items()} for run in range(runs)]


def expand(plan: dict) -> dict:
    """The plan with a variant for each run of its design, whose `levels` say which it has."""
    if "levers" not in plan:
        return plan
    variants, levels, seeds = {}, {}, plan["seeds"]
    for number, (end, settings) in enumerate(plan["ends"].items()):
        for run, chosen in enumerate(drawn(plan, end, number)):
            changes = [plan["levers"][lever][level] for lever, level in chosen.items()]
            name = f"{end}_{run:03}"
            levels[name] = chosen
            variants[name] = {k: v for part in (settings, *changes) for k, v in part.items()} | {
                "SEED": seeds[run % len(seeds)]}
    order = sorted(variants, key=lambda name: name.rsplit("_", 1)[1])  # both ends side by side
    return plan | {"variants": {name: variants[name] for name in order}, "levels": levels,
                   "seeds": seeds[:1]}


class Fit(NamedTuple):
    """What the runs at an end say: an effect for each lever's further levels, and of chance."""

    effects: dict[tuple[str, str], Sample]  # by (lever, "from -> to"); intervals are the fit's
    runs: int
    hours: float
    deviation: float | None  # of a score, seed and levers taken out; None with too few runs


def fit(results: dict[str, list[dict]], plan: dict, end: str, before: str = "") -> Fit:
    """Least squares over the runs at an end that are done; `plan` is expanded.

    The first level that the plan names is what a lever's others are compared with. With the name of
    a score in `before`, the effects are those on the way from it to the plan's score.
    """
    names = [name for name in results if name.startswith(end + "_")]
    keys = [(lever, first, other) for lever, (first, *rest) in plan["levers"].items()
            for other in rest]
    seeds = sorted({plan["variants"][name]["SEED"] for name in names})
    design = np.array([[plan["levels"][name][lever] == other for lever, _, other in keys]
                       + [plan["variants"][name]["SEED"] == seed for seed in seeds]
                       for name in names], float).reshape(len(names), -1)
    freedom = len(names) - design.shape[1]
    hours = sum(hours_of(results[name][0]) for name in names)
    if freedom < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
        return Fit({}, len(names), hours, None)
    scores = np.array([results[name][0][plan.get("change", "roundtrip_bpb")]
                       - (results[name][0][before] if before else 0) for name in names])
    inverse = np.linalg.inv(design.T @ design)
    fitted = inverse @ design.T @ scores
    deviation = float(np.sqrt(np.sum((scores - design @ fitted) ** 2) / freedom))
    errors = deviation * np.sqrt(inverse.diagonal())
    return Fit({(lever, f"{first} -> {other}"): Sample(
        float(fitted[i]), float(errors[i]) * math.sqrt(freedom + 1), freedom + 1)
        for i, (lever, first, other) in enumerate(keys)}, len(names), hours, deviation)


def fits_of(results: dict[str, list[dict]], plan: dict, before: str = "") -> dict[str, Fit]:
    """The fit near each end and, if all ends have one, the mean of their effects over the ends.

    The ends' runs are independent, so errors add up in squares, and the freedom is Welch's.
    """
    fits = {f"near {end}": fit(results, plan, end, before) for end in plan["ends"]}
    found = [one for one in fits.values() if one.effects]
    if len(found) < len(fits) or len(found) < 2:
        return fits
    effects = {}
    for key in found[0].effects:
        at = [one.effects[key] for one in found]
        squares = [effect.std**2 / effect.n for effect in at]
        n = 1 + sum(squares) ** 2 / sum(v**2 / (effect.n - 1)
                                        for v, effect in zip(squares, at, strict=True))
        error = math.sqrt(sum(squares)) / len(at)
        effects[key] = Sample(sum(effect.mean for effect in at) / len(at), error * math.sqrt(n), n)
    return fits | {"mean of them": Fit(
        effects, sum(one.runs for one in found), sum(one.hours for one in found), None)}


def reported(results: dict[str, list[dict]], plan: dict) -> dict[str, Fit]:
    """The fits of `fits_of`, and the last of them for what rounding costs.

    The artifact's score less that of the weights before it: chance has hardly a part in that.
    """
    name, rounding = [*fits_of(results, plan, "post_ema_bpb").items()][-1]
    return fits_of(results, plan) | {f"rounding alone, {name}": rounding}


def table(results: dict[str, list[dict]], plan: dict) -> str:
    """Markdown: the effect of every lever near each end; bold where its interval is without 0."""
    fits = reported(results, plan)
    head = ["lever", "change", *(f"{name}, {found.runs} runs" for name, found in fits.items())]
    keys = dict.fromkeys(key for found in fits.values() for key in found.effects)
    rows = [[*key, *(figures.change_text(found.effects[key]) if key in found.effects else None
                     for found in fits.values())] for key in keys]
    return figures.markdown(head, rows)


def power_table(results: dict[str, list[dict]], plan: dict) -> str:
    """Markdown: for each end what chance is, and which effects its runs could have seen."""
    head = ["effects", "runs", "hours of all runs", "deviation of chance", "half a 95 % interval",
            "seen 19 times in 20", f"runs for {GOAL}"]
    rows = []
    for name, found in reported(results, plan).items():
        if not found.effects:
            rows.append([name, found.runs, f"{found.hours:.1f}", *[None] * 4])
            continue
        middle = sorted(found.effects.values(), key=lambda effect: effect.interval)[
            len(found.effects) // 2]
        rows.append([name, found.runs, f"{found.hours:.1f}",
                     f"{found.deviation:.4f}" if found.deviation else None,
                     f"{middle.interval:.4f}", f"{detectable(middle):.4f}",
                     runs_for_goal(middle, found.runs)])
    return figures.markdown(head, rows)
