"""The bytes that BPB was counted over: the one place that decides whether a score is corrected.

Published runs on the 998-id Scylla vocabulary counted one-byte tokens as three bytes, so that their
BPB came out some 5 % too low. `counted` tells this from what the logs say, `corrected` gives runs
with BPB over the true bytes, and `results` gives the published results in the same way.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from runs import Run, Score, is_number

MARK = " (bytes corrected)"  # what the name of a corrected result ends with
SAME = 1e-3  # counts that differ by less are of the same text, rightly counted
MISCOUNT = 0.1  # a larger difference is no miscount: it is another text


class Counted(NamedTuple):
    """What was counted, in words, and the factor that takes BPB to the true bytes."""

    what: str = ""  # empty: nothing is known
    factor: float = 1.0  # counted over true bytes; 1.0 where nothing is to be corrected
    other_text: bool = False  # not FineWeb's validation text: nothing to compare with
    accepted: bool = False  # an earlier export of it, which was the challenge's text at the time


def published() -> dict[str, Any]:
    """published.json: the facts to judge results by, and the results as they were claimed."""
    path = Path(__file__).resolve().parent / "published.json"
    return json.loads(path.read_text(encoding="utf-8"))


def counted(runs: Iterable[Run], submission: dict[str, Any]) -> Counted:
    """What runs of one configuration counted, from their logs, else from what is claimed.

    A log tells it by its byte audit or by tokens, loss and BPB. Where no log does, the vocabulary
    that submission.json names and its loss and BPB do.
    """
    facts = published()["facts"]
    true, runs = facts["validation_bytes"], [*runs]
    for row in facts["other_texts"]:
        if row["tokens"] in [run.val_tokens for run in runs]:
            return Counted(row["note"], other_text=True, accepted=True)
    counts = [run.counted_bytes for run in runs if run.counted_bytes]
    if counts:
        worst = max(counts, key=lambda count: abs(count - true))
        difference = abs(worst / true - 1)
        proven = any(run.audit == "exact" for run in runs)
        if difference > MISCOUNT or proven and difference > SAME:
            return Counted(f"{worst:,.0f} bytes", other_text=True)
        return Counted(f"{worst:,.0f} of {true:,} bytes",
                       worst / true if difference > SAME else 1.0)
    return claimed(submission, facts["tokenizers"])


def claimed(submission: dict[str, Any], tokenizers: list[dict[str, Any]]) -> Counted:
    """What a submission's loss and BPB imply, if it names a vocabulary whose bytes are known."""
    text = json.dumps(submission).lower()
    seeds = next((submission[key] for key in ("seed_results", "seeds")
                  if isinstance(submission.get(key), dict)), {})
    scores = [claim for claim in (submission, *seeds.values()) if isinstance(claim, dict)
              and all(is_number(claim.get(key)) for key in ("val_loss", "val_bpb"))]
    for row in tokenizers:
        if scores and re.search(row["name"], text):
            implied = scores[0]["val_loss"] / math.log(2) / scores[0]["val_bpb"]
            factor = implied / row["bytes_per_token"]
            return Counted(f"{implied:.4f} of {row['bytes_per_token']:.4f} bytes per token",
                           factor if abs(factor - 1) > SAME else 1.0)
    return Counted()


def label(name: str, factor: float) -> str:
    """The name of a result, with a mark if its bytes were corrected."""
    return name + MARK if factor != 1 else name


def corrected(runs: Iterable[Run], factor: float) -> list[Run]:
    """Runs with every BPB, of scores and of curves, over the true bytes."""
    def scaled(scores: dict[str, Score]) -> dict[str, Score]:
        return {name: score._replace(bpb=factor * score.bpb) for name, score in scores.items()}

    return [*runs] if factor == 1 else [
        replace(run, scores=scaled(run.scores), named=scaled(run.named),
                val=[point._replace(bpb=factor * point.bpb) for point in run.val],
                facts={name: value / factor if name == "audited_bytes" else value
                       for name, value in run.facts.items()})
        for run in runs]


def results() -> list[dict[str, Any]]:
    """The published results with every BPB over the true bytes; `label` is the name that says so.

    `stages` holds BPB by stage and `seeds` the claims of each seed.
    """
    rows = published()["results"]
    for row in rows:
        factor = row.get("counted_over_true", 1.0)
        row |= dict(label=label(row["name"], factor), val_bpb=factor * row["val_bpb"],
                    stages={stage: factor * bpb for stage, bpb in row["stages"].items()},
                    seeds={seed: claim | dict(val_bpb=factor * claim["val_bpb"])
                           for seed, claim in row["seeds"].items()})
    return rows
