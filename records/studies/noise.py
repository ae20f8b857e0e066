"""Where the noise of a score comes from: from the run, and from the documents that are scored.

    python records/studies/noise.py records/plans/noise.json

reads the finished runs of a plan whose base has SCORES_PATH=scores and the mode roundtrip. A row is
a variant, or the difference of one to its baseline, seed by seed. The first table has the standard
deviation of the BPB over the seeds: of the last weights, of their average and of the artifact, this
with its 95 % interval (the runs taken as normally distributed).

The second table parts every score in two. A token is repeated if it stood before after the same two
tokens in its document; a model that has learned to copy from its context finds it there. The bits
of these and of the other tokens, both divided by all bytes, add up to the BPB.

The third table asks how long a validation set has to be, for the difference of two variants: in the
row of a variant of two runs with different seeds that have its chance, in the row of a difference
of two runs with the same seed. With other documents of the same kind, such a difference would move
by the documents' deviation (that of a ratio of sums over documents). The runs' deviation is the
rest of what it varies over the seeds: scoring more text cannot remove it. Both are root mean
squares over all pairs of runs. "Of the mean" is the documents' deviation of the mean over the
seeds. Documents are cut to their first tokens; effective documents are as many of equal size as
give the same deviation (Kish). The last columns have how many seeds of both variants make half a
95 % interval of their difference 0.003 BPB, and the core hours that all these runs take, with the
training and with the scoring of these tokens. Two runs alone are too few for these.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import figures  # noqa: E402
from ablate import ROOT, baselines, events_of, read_json, summary_of  # noqa: E402
from design import GOAL, expand, hours_of, seeds_for_goal  # noqa: E402

STAGES = {"val": "last weights", "post_ema": "average", "summary": "artifact"}
LENGTHS = (64, 256, 1024, None)  # tokens of each document; None: all


class Pair(NamedTuple):
    """A run, and its baseline's where a row is of differences."""

    run: Path
    baseline: Path | None


def groups_of(folder: Path, plan: dict) -> dict[str, list[Pair]]:
    """The finished runs by row, where there are two or more: those of a variant, without baseline,
    and those of "variant - baseline", with the baseline's run of the same seed."""
    done = {run.name: run for run in folder.glob("*_seed*") if summary_of(run)}

    def runs(variant: str) -> dict[int, Path]:
        names = ((seed, f"{variant}_seed{seed}") for seed in plan["seeds"])
        return {seed: done[name] for seed, name in names if name in done}

    groups: dict[str, list[Pair]] = {
        name: [Pair(run, None) for run in runs(name).values()] for name in plan["variants"]}
    for name in plan["variants"]:
        for other in baselines(plan["variants"], plan, name):
            theirs = runs(other)
            groups[f"{name} - {other}"] = [Pair(run, theirs[seed])
                                           for seed, run in runs(name).items() if seed in theirs]
    groups = {name: pairs for name, pairs in groups.items() if len(pairs) > 1}
    if not groups:
        raise SystemExit(f"{folder}: no two finished runs of a variant; records/ablate.py with the "
                         "plan makes them")
    return groups


def read(pair: Pair, of: Callable[[Path], np.ndarray]) -> np.ndarray:
    """What `of` reads of a run, less what it reads of the baseline's."""
    return of(pair.run) - (of(pair.baseline) if pair.baseline else 0)


def bpb_of(run: Path) -> np.ndarray:
    """A run's BPB by stage, from the last event of each kind in its log."""
    events = events_of(run)
    return np.array([events[stage]["val_bpb"] for stage in STAGES])


def spread_interval(std: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a standard deviation of n normal values: by chi-square, drawn."""
    drawn = np.random.default_rng(0).chisquare(n - 1, 1_000_000)
    low, high = np.quantile((n - 1) / drawn, (0.025, 0.975))
    return std * math.sqrt(low), std * math.sqrt(high)


def spread_table(groups: dict[str, list[Pair]]) -> str:
    """Markdown: the deviation over the seeds of each row."""
    rows = []
    for name, pairs in groups.items():
        scores = np.stack([read(pair, bpb_of) for pair in pairs])
        stds = scores.std(axis=0, ddof=1)
        low, high = spread_interval(stds[-1], len(pairs))
        rows.append([name, len(pairs), f"{scores[:, -1].mean():.4f}",
                     *(f"{std:.4f}" for std in stds), f"{low:.4f} to {high:.4f}"])
    return figures.markdown(["row", "seeds", "BPB", *STAGES.values(), "95 % of the artifact's"],
                            rows)


def scores_of(run: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, nats and bytes of all tokens that the artifact was scored on, in their order."""
    path = run / "scores" / "roundtrip.npz"
    if not path.exists():
        raise SystemExit(f"{path} is missing; the plan's base needs SCORES_PATH=scores and "
                         "the mode roundtrip")
    with np.load(path) as scores:
        return scores["ids"], scores["nats"], scores["bytes"]


def repeated(ids: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """For each token, whether it stood before after the same two tokens in its document."""
    rows = np.stack([np.cumsum(sizes == 0), np.roll(ids, 2), np.roll(ids, 1), ids], axis=1)
    found = np.ones(len(ids), bool)
    found[np.unique(rows, axis=0, return_index=True)[1]] = False
    return found


def two_parts(run: Path) -> np.ndarray:
    """The BPB of a run's repeated tokens, and of its others."""
    ids, nats, sizes = scores_of(run)
    again = repeated(ids, sizes)
    bits = [nats[part].sum(dtype=float) / math.log(2) for part in (again, ~again)]
    return np.divide(bits, sizes.sum())


def repeat_table(groups: dict[str, list[Pair]]) -> str:
    """Markdown: BPB and deviation of repeated tokens and of the others, by row."""
    rows = []
    for name, pairs in groups.items():
        parts = np.stack([read(pair, two_parts) for pair in pairs])
        values = np.stack([parts.mean(axis=0), parts.std(axis=0, ddof=1)], axis=1)
        rows.append([name, len(pairs), *(f"{value:.4f}" for value in values.flat)])
    return figures.markdown(["row", "seeds", "BPB of repeated tokens", "their deviation",
                             "BPB of the others", "their deviation"], rows)


def documents_of(run: Path, length: int | None) -> np.ndarray:
    """(documents, 3): tokens, bits and bytes of the first `length` tokens of each document.

    The first id of a document, which has no bytes, is left out.
    """
    ids, nats, sizes = scores_of(run)
    ends = [*np.flatnonzero(sizes == 0), len(ids)]
    begins = [0, *(end + 1 for end in ends[:-1])]
    spans = [slice(a, b if length is None else min(b, a + length))
             for a, b in zip(begins, ends, strict=True) if b > a]
    return np.array([(span.stop - span.start, nats[span].sum(dtype=float) / math.log(2),
                      sizes[span].sum()) for span in spans], float)


def parts_of(change: np.ndarray, size: np.ndarray) -> tuple[float, float]:
    """Squares of a difference in BPB, and of what other documents would change in it.

    Of each document: the difference in bits, and the bytes.
    """
    mean = change.sum() / size.sum()
    rest = np.square(change - mean * size).sum() * len(size) / (len(size) - 1)
    return mean**2, rest / size.sum() ** 2


def document_table(groups: dict[str, list[Pair]]) -> str:
    """Markdown: by row and length, what documents and runs add to a difference of two variants."""
    rows = []
    for (name, pairs), length in itertools.product(groups.items(), LENGTHS):
        tokens, _, size = documents_of(pairs[0].run, length).T
        bits = [read(pair, lambda run, n=length: documents_of(run, n)[:, 1]) for pair in pairs]
        squares = [parts_of(one - other, size) for one, other in itertools.combinations(bits, 2)]
        of_mean, share = None, 1.0
        if pairs[0].baseline:  # the differences of two seeds differ by twice the square
            of_mean, share = f"{math.sqrt(parts_of(np.mean(bits, axis=0), size)[1]):.4f}", 0.5
        both, documents = share * np.mean(squares, axis=0)
        part = tokens.sum() / documents_of(pairs[0].run, None)[:, 0].sum()
        runs = [summary_of(run) for pair in pairs for run in (pair.run, pair.baseline or pair.run)]
        hours = [hours_of(run | {"seconds_eval": run["seconds_eval"] * part}) for run in runs]
        seeds = seeds_for_goal(math.sqrt(both)) if pairs[2:] else None  # two runs say little
        rows.append([name, length or "all", f"{tokens.sum():.0f}",
                     f"{size.sum() ** 2 / np.square(size).sum():.0f}",
                     f"{math.sqrt(documents):.4f}", of_mean,
                     f"{math.sqrt(max(0.0, both - documents)):.4f}",
                     seeds, seeds and f"{2 * seeds * statistics.fmean(hours):.1f}"])
    return figures.markdown(["row", "tokens of each", "tokens", "effective documents",
                             "documents' deviation", "of the mean", "runs' deviation",
                             f"seeds for {GOAL}", "core hours"], rows)


def main() -> int:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--out", type=Path, help="of its runs; default: data/ablations/<plan>")
    options = parser.parse_args()
    folder = options.out or ROOT / "data" / "ablations" / options.plan.stem
    groups = groups_of(folder, expand(read_json(options.plan)))
    print(spread_table(groups), repeat_table(groups), document_table(groups), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
