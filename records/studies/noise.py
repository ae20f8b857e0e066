"""Where the noise of a score comes from: from the run, and from the documents that are scored.

    python records/studies/noise.py data/ablations/noise

reads the finished runs of records/plans/noise.json. The first table has the standard deviation of
the BPB over the seeds, by group, of the last weights, of their average and of the artifact, this
with its 95 % interval (the runs taken as normally distributed).

The second table asks how long a validation set has to be. Two runs of a group differ by something
on every document; with other documents of the same kind, the difference of their BPB would move by
the first deviation (that of a ratio of sums over documents). The second is the rest of what the
difference itself varies over pairs of seeds: scoring more text cannot remove it. Both are root mean
squares over all pairs. Documents are cut to their first tokens. The last columns take two variants
whose chance is that of the group, each by itself: so many seeds of both make half a 95 % interval
of their difference 0.003 BPB, and take so many core hours, with the training and with the scoring
of these tokens. Two runs alone are too few for these.

The third table parts every score in two. A token is repeated if it stood before after the same two
tokens in its document; a model that has learned to copy from its context finds it there. The bits
of these and of the other tokens, both divided by all bytes, add up to the BPB. The last rows are
differences to a baseline, seed by seed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import figures  # noqa: E402
from ablate import events_of, read_json, summary_of  # noqa: E402
from design import GOAL, hours_of, seeds_for_goal  # noqa: E402

PLAN = Path(__file__).resolve().parents[1] / "plans" / "noise.json"
STAGES = {"val": "last weights", "post_ema": "average", "summary": "artifact"}
LENGTHS = (64, 256, 1024, None)  # tokens of each document; None: all


def groups_of(folder: Path) -> dict[str, list[Path]]:
    """The finished runs of a plan by variant, where there are two or more."""
    groups: dict[str, list[Path]] = {}
    for run in filter(summary_of, sorted(folder.glob("*_seed*"))):
        groups.setdefault(run.name.rsplit("_seed", 1)[0], []).append(run)
    groups = {name: runs for name, runs in groups.items() if len(runs) > 1}
    if not groups:
        raise SystemExit(f"{folder}: no two finished runs of a variant; records/ablate.py with the "
                         "plan makes them")
    return groups


def bpb_of(run: Path) -> dict[str, float]:
    """A run's BPB by stage, from the last event of each kind in its log."""
    events = events_of(run)
    return {stage: events[stage]["val_bpb"] for stage in STAGES}


def spread_interval(std: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a standard deviation of n normal values: by chi-square, drawn."""
    drawn = np.random.default_rng(0).chisquare(n - 1, 1_000_000)
    low, high = np.quantile((n - 1) / drawn, (0.025, 0.975))
    return std * math.sqrt(low), std * math.sqrt(high)


def spread_table(groups: dict[str, list[Path]]) -> str:
    """Markdown: the deviation over the seeds of each group."""
    rows = []
    for name, runs in groups.items():
        scores = [bpb_of(run) for run in runs]
        stds = [statistics.stdev(score[stage] for score in scores) for stage in STAGES]
        low, high = spread_interval(stds[-1], len(runs))
        mean = statistics.fmean(score["summary"] for score in scores)
        rows.append([name, len(runs), f"{mean:.4f}", *(f"{std:.4f}" for std in stds),
                     f"{low:.4f} to {high:.4f}"])
    return figures.markdown(["group", "runs", "BPB", *STAGES.values(), "95 % of the last"], rows)


def documents_of(run: Path, length: int | None) -> np.ndarray:
    """(documents, 3): tokens, bits and bytes of the first `length` tokens of each document.

    The first id of a document, which has no bytes, is left out.
    """
    scores = np.load(run / "scores" / "roundtrip.npz")
    ends = [*np.flatnonzero(scores["bytes"] == 0), len(scores["ids"])]
    begins = [0, *(end + 1 for end in ends[:-1])]
    spans = [slice(a, b if length is None else min(b, a + length))
             for a, b in zip(begins, ends, strict=True) if b > a]
    return np.array([(span.stop - span.start, scores["nats"][span].sum(dtype=float) / math.log(2),
                      scores["bytes"][span].sum()) for span in spans], float)


def parts_of(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Squares of the difference of two runs' BPB, and of what other documents would change in it.

    Both are given as `documents_of` returns them.
    """
    size, change = one[:, 2], one[:, 1] - other[:, 1]
    mean = change.sum() / size.sum()
    rest = np.square(change - mean * size).sum() * len(size) / (len(size) - 1)
    return mean**2, rest / size.sum() ** 2


def document_table(groups: dict[str, list[Path]]) -> str:
    """Markdown: by group and length, what documents and runs add to one difference."""
    rows = []
    for name, length in itertools.product(groups, LENGTHS):
        runs = groups[name]
        read = [documents_of(run, length) for run in runs]
        both, documents = map(statistics.fmean, zip(*itertools.starmap(
            parts_of, itertools.combinations(read, 2)), strict=True))
        tokens, size = read[0][:, 0].sum(), read[0][:, 2]
        alike = size.sum() ** 2 / np.square(size).sum()
        part = tokens / documents_of(runs[0], None)[:, 0].sum()
        hours = [hours_of(run | {"seconds_eval": run["seconds_eval"] * part})
                 for run in map(summary_of, runs)]
        seeds = seeds_for_goal(math.sqrt(both)) if runs[2:] else None  # a single pair says little
        rows.append([name, length or "all", len(size), f"{alike:.0f}", f"{tokens:.0f}",
                     f"{math.sqrt(documents):.4f}", f"{math.sqrt(max(0.0, both - documents)):.4f}",
                     seeds, seeds and f"{2 * seeds * statistics.fmean(hours):.1f}"])
    return figures.markdown(["group", "tokens of each", "documents", "as many of one size",
                             "tokens", "documents' deviation", "runs' deviation",
                             f"seeds for {GOAL}", "core hours"], rows)


def repeated(ids: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """For each token, whether it stood before after the same two tokens in its document."""
    rows = np.stack([np.cumsum(sizes == 0), np.roll(ids, 2), np.roll(ids, 1), ids], axis=1)
    found = np.ones(len(ids), bool)
    found[np.unique(rows, axis=0, return_index=True)[1]] = False
    return found


def two_parts(run: Path) -> np.ndarray:
    """The BPB of a run's repeated tokens, and of its others."""
    scores = np.load(run / "scores" / "roundtrip.npz")
    again = repeated(scores["ids"], scores["bytes"])
    bits = [scores["nats"][part].sum(dtype=float) / math.log(2) for part in (again, ~again)]
    return np.divide(bits, scores["bytes"].sum())


def repeat_table(groups: dict[str, list[Path]], plan: dict) -> str:
    """Markdown: BPB and deviation of repeated tokens and of others, by group and by difference."""
    parts = {name: {run.name.removeprefix(name): two_parts(run) for run in runs}
             for name, runs in groups.items()}
    parts |= {f"{name} - {other}": {seed: part - parts[other][seed]
                                    for seed, part in parts[name].items() if seed in parts[other]}
              for name in groups for other in plan["against"][name]}
    rows = []
    for name, of in parts.items():
        means, stds = np.mean([*of.values()], axis=0), np.std([*of.values()], axis=0, ddof=1)
        rows.append([name, len(of), *(f"{value:.4f}" for value in np.stack([means, stds], 1).flat)])
    return figures.markdown(["group", "runs", "BPB of repeated tokens", "their deviation",
                             "BPB of the others", "their deviation"], rows)


def main() -> int:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="the folder of the plan's runs")
    groups = groups_of(parser.parse_args().runs)
    plan = read_json(PLAN)
    print(spread_table(groups), document_table(groups), repeat_table(groups, plan), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
