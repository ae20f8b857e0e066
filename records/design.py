"""Randomised designs: what many levers are worth, from runs that each differ in several of them.

A plan for records/ablate.py may have, instead of variants,

    "ends": {"record": {settings}, "frontier": {settings}}    configurations to stand near
    "levers": {name: {level: {settings}, ...}}                what is changed, and to what
    "at": {end: {lever: level}}                               which level an end has; else the first
    "pairs": [[lever, lever], ...]                            that are not taken to add up; optional
    "runs": 128, "share": 0.25                                runs at each end

In a run at an end each lever leaves the end's level with the probability `share`, for any of its
other levels alike. Which runs do is drawn so that every lever leaves in equally many runs, within
one. Runs take the plan's seeds in turn, so that a seed's order of the data and initial values are
shared by many. Every run then says something of every lever: of a comparison of one lever at a time
by as many runs, each would get but a few.

The effects are those of least squares: a score is the sum of its seed's effect, of its levers' and
of chance. An effect is thus an average over all that the other levers were, near an end. What does
not add up counts as chance, and so widens the intervals (Student's t, 95 %). Of levers without any
effect one in twenty would leave out zero. power_table has the pairs that add up least; a pair that
the plan names has a term of its own, what both changes are worth beyond their sum, and the effect
of either is then the one that it has while the other is at its first level.
"""

from __future__ import annotations

import bisect
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


def seeds_for_goal(std: float) -> int:
    """Over how many seeds half the interval of a difference is GOAL, if it deviates by std."""
    return 2 + bisect.bisect_left(range(2, 10**6), True,
                                  key=lambda n: Sample(0, std, n).interval <= GOAL)


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


def terms_of(plan: dict) -> dict[tuple[str, str], dict[str, str]]:
    """The effects that are looked for, by (lever, change), and the levels that a run has in each.

    The first level that the plan names is what a lever's others are compared with.
    """
    terms = {(lever, f"{first} -> {other}"): {lever: other}
             for lever, (first, *rest) in plan["levers"].items() for other in rest}
    for pair in plan.get("pairs", ()):
        for others in itertools.product(*([*plan["levers"][lever]][1:] for lever in pair)):
            key = " with ".join(pair), f"{' with '.join(others)}, beyond their sum"
            terms[key] = dict(zip(pair, others, strict=True))
    return terms


def column(plan: dict, names: list[str], term: dict[str, str]) -> np.ndarray:
    """Which of the runs have all levels of a term."""
    return np.array([term.items() <= plan["levels"][name].items() for name in names], float)


class Squares(NamedTuple):
    """The runs at an end that are done, and what least squares are made of."""

    names: list[str]
    matrix: np.ndarray  # (runs, terms, then seeds)
    scores: np.ndarray  # (runs,)
    freedom: int  # below 1 where the runs do not tell the terms apart


def squares_of(results: dict[str, list[dict]], plan: dict, end: str, before: str = "") -> Squares:
    """The matrix of an end's runs; `before` is as in `fit`."""
    names = [name for name in results if name.startswith(end + "_")]
    seed_of = np.array([plan["variants"][name]["SEED"] for name in names])
    matrix = np.stack([*(column(plan, names, term) for term in terms_of(plan).values()),
                       *(seed_of == seed for seed in sorted({*seed_of.tolist()}))], axis=1)
    scores = np.array([results[name][0][plan.get("change", "roundtrip_bpb")]
                       - (results[name][0][before] if before else 0) for name in names])
    full = names and np.linalg.matrix_rank(matrix) == matrix.shape[1]
    return Squares(names, matrix, scores, len(names) - matrix.shape[1] if full else 0)


def fit(results: dict[str, list[dict]], plan: dict, end: str, before: str = "") -> Fit:
    """Least squares over the runs at an end that are done; `plan` is expanded.

    With the name of a score in `before`, the effects are those on the way from it to the plan's
    score.
    """
    names, matrix, scores, freedom = squares_of(results, plan, end, before)
    hours = sum(hours_of(results[name][0]) for name in names)
    if freedom < 1:
        return Fit({}, len(names), hours, None)
    inverse = np.linalg.inv(matrix.T @ matrix)
    fitted = inverse @ matrix.T @ scores
    deviation = float(np.sqrt(np.sum((scores - matrix @ fitted) ** 2) / freedom))
    errors = deviation * np.sqrt(inverse.diagonal())
    return Fit({key: Sample(float(fitted[i]), float(errors[i]) * math.sqrt(freedom + 1),
                            freedom + 1) for i, key in enumerate(terms_of(plan))},
               len(names), hours, deviation)


def pairs_of(results: dict[str, list[dict]], plan: dict,
             end: str) -> dict[str, tuple[float, float]]:
    """What two levers' changes are worth beyond their sum at an end, and half its interval.

    Each pair that has no term yet is added alone to the fit. The intervals are wide enough for the
    strongest of so many: if all pairs add up, all of them hold zero 19 times in 20 (Bonferroni).
    """
    names, matrix, scores, freedom = squares_of(results, plan, end)
    if freedom < 2:
        return {}
    basis = np.linalg.qr(matrix)[0]
    rest, found = scores - basis @ (basis.T @ scores), {}
    single = [(key, term) for key, term in terms_of(plan).items() if len(term) == 1]
    for (one, a), (other, b) in itertools.combinations(single, 2):
        both = column(plan, names, a | b)
        both -= basis @ (basis.T @ both)
        if (square := both @ both) > 1e-9:  # not two levels of one lever
            gain = both @ rest / square
            chance = np.linalg.norm(rest - gain * both) / math.sqrt(freedom - 1)
            found[f"{' '.join(one)}, {' '.join(other)}"] = gain, chance / math.sqrt(square)
    width = t_quantile(0.025 / max(1, len(found)), freedom - 1)
    return {name: (gain, width * error) for name, (gain, error) in found.items()}


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
    """Markdown: for each end what chance is, and which effects its runs could have seen.

    A second table has the three strongest pairs of each end (`pairs_of`).
    """
    head = ["effects", "runs", "hours of all runs", "deviation of chance", "half a 95 % interval",
            "seen 19 times in 20", f"runs for {GOAL}"]
    rows = []
    for name, found in fits_of(results, plan).items():
        if not found.effects:
            rows.append([name, found.runs, f"{found.hours:.1f}", *[None] * 4])
            continue
        middle = sorted(found.effects.values(), key=lambda effect: effect.interval)[
            len(found.effects) // 2]
        rows.append([name, found.runs, f"{found.hours:.1f}",
                     f"{found.deviation:.4f}" if found.deviation else None,
                     f"{middle.interval:.4f}", f"{detectable(middle):.4f}",
                     runs_for_goal(middle, found.runs)])
    pairs = []
    for end in plan["ends"]:
        found = pairs_of(results, plan, end)
        strongest = sorted(found, key=lambda name: -abs(found[name][0]) / found[name][1])[:3]
        pairs += [[f"near {end}, of {len(found)}", name,
                   figures.interval_text(*found[name])] for name in strongest]
    return figures.markdown(head, rows) + "\n\n" + figures.markdown(
        ["pairs", "changes", "beyond their sum, 95 % for the strongest of so many"], pairs)
