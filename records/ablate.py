"""Matched experiments: named sets of settings x seeds -> one table, resumable.

    python records/ablate.py records/plans/demo_features.json --jobs 2
    python records/ablate.py records/plans/levers.json --list      what would run; runs nothing
    python records/ablate.py records/plans/slopes.json --table     of the results that are kept
    python records/ablate.py records/plans/levers.json --power     which difference they could show
    python records/ablate.py records/plans/levers.json --figure levers.png
    python records/ablate.py records/plans/frontier.json --only record,frontier    some variants

A plan is JSON: {"about": text, "base": {settings of every run}, "seeds": [...], "variants": {name:
{settings against the base}}}; the first variant is the baseline, but for those that "against":
{name: [baselines]} names. Optional: "seeds_of": {name: n} gives a variant only the first n seeds,
"change": score is what the changes are of, if not the roundtrip. In a value "{root}" is this
repository, "{seed}" the seed, and "{out}" the folder of the runs: a LOAD_ARTIFACT there is scored
after another variant has trained it.

"alike": {baseline: [variants]} names variants that differ from a baseline by chance alone, such as
by a LOGIT_SOFTCAP of 30.001: others are compared with the mean of them all. With "pooled": true the
intervals take what a whole family of variants, those against one baseline, says of chance: variants
and seeds are its rows and columns, and chance is what is left of their scores when both have been
taken out. Its standard deviation is taken to be the same for all of them.

All runs use the copy of train_gpt.py that the first one made, each in a folder of its own, with an
equal share of the processor cores, pinned where the system can, and where there are GPUs with one
of them. A run whose log holds a summary is not repeated. results.json is copied to
records/plans/results/<plan>.json to be kept: only then may a document quote figures of the plan.
docs/studies.md has the plans and their tables.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import queue
import shutil
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "records"), str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import figures  # noqa: E402
import train_gpt  # noqa: E402
from welch import sample, t_quantile  # noqa: E402

SCORES = ("post_ema_bpb", *(f"{mode}_bpb" for mode in train_gpt.EVAL_MODES if mode != "slot"),
          f"{train_gpt.FINAL_LINES['slot']}_bpb")


def summary_of(folder: Path) -> dict | None:
    """The summary event of a finished run's log, or None."""
    log = folder / "logs" / "run.jsonl"
    if not log.exists():
        return None
    for line in reversed(log.read_text(encoding="utf-8").splitlines()):
        with contextlib.suppress(ValueError):  # a killed run may leave half a line
            event = json.loads(line)
            if event["event"] == "summary":
                return event
    return None


class Slot(NamedTuple):
    """What one run at a time has to itself."""

    cores: list[int]
    gpu: int | None


def slots(jobs: int) -> list[Slot]:
    """An equal share of the cores, and a GPU where there are any, for each of `jobs`."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    if jobs < 1:
        raise SystemExit(f"--jobs {jobs}: one run at a time is the least")
    share, gpus = max(1, len(cores) // jobs), torch.cuda.device_count()
    if gpus and jobs > gpus:
        raise SystemExit(f"--jobs {jobs}, but there are {gpus} GPUs; one run needs one")
    return [Slot(cores[job * share : (job + 1) * share] or cores, job if gpus else None)
            for job in range(jobs)]


def run_one(folder: Path, settings: dict[str, str], slot: Slot) -> dict:
    """Run train_gpt.py in `folder` on a slot unless it is done; returns its summary.

    Settings in this process's environment are ignored: only the plan's count.
    """
    kept, text = folder / "settings.json", json.dumps(settings, indent=1, sort_keys=True)
    if kept.exists() and kept.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{folder} holds a run with other settings; remove it or give --out")
    done = summary_of(folder)
    if done is not None:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(text, encoding="utf-8")
    names = {f.name.upper() for f in dataclasses.fields(train_gpt.Config)}
    env = {name: value for name, value in os.environ.items() if name not in names}
    resume = "LOAD_ARTIFACT" not in settings
    if not resume:  # a run that only scores begins again
        shutil.rmtree(folder / "logs", ignore_errors=True)
    env |= {"RUN_ID": "run", "RESUME": str(int(resume)),
            "OMP_NUM_THREADS": str(len(slot.cores))} | settings
    if slot.gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = str(slot.gpu)

    def pin() -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, slot.cores)

    with open(folder / "console.txt", "w", encoding="utf-8") as console:
        subprocess.run([sys.executable, folder.parent / "train_gpt.py"], cwd=folder, env=env,
                       check=False, stdout=console, stderr=subprocess.STDOUT, preexec_fn=pin)
    done = summary_of(folder)
    if done is None:
        tail = (folder / "console.txt").read_text(encoding="utf-8").splitlines()[-3:]
        raise SystemExit(f"{folder}: the run failed; its console ends: {' | '.join(tail)}")
    print(f"{folder.name}: " + " ".join(f"{k}:{done[k]}" for k in SCORES if k in done), flush=True)
    return done


def keep_code(out: Path) -> str:
    """Copy train_gpt.py beside the runs; runs that another version began are an error.

    Returns the first twelve digits of its SHA-256.
    """
    code, kept = (ROOT / "train_gpt.py").read_bytes(), out / "train_gpt.py"
    out.mkdir(parents=True, exist_ok=True)
    if not any(out.glob("*/logs")):
        kept.write_bytes(code)
    elif kept.read_bytes() != code:
        raise SystemExit(f"{out} holds runs of another train_gpt.py; remove it or give --out")
    return hashlib.sha256(code).hexdigest()[:12]


def tasks_of(plan: dict, out: Path) -> list[tuple[str, Path, dict[str, str]]]:
    """(variant, folder, settings) of every run of a plan."""
    tasks = []
    for variant, changes in plan["variants"].items():
        for seed in plan["seeds"][: plan.get("seeds_of", {}).get(variant)]:
            settings = plan["base"] | {"SEED": seed} | changes
            texts = {name: str(value).format(root=ROOT, out=out, seed=seed)
                     for name, value in settings.items()}
            try:
                train_gpt.Config.from_env(texts, torch.cuda.is_available())
            except train_gpt.RunError as error:
                raise SystemExit(f"variant {variant}: {error}") from error
            tasks.append((variant, out / f"{variant}_seed{seed}", texts))
    return tasks


def run_plan(plan: dict, out: Path, jobs: int) -> dict[str, list[dict]]:
    """All runs of a plan, `jobs` at a time; variant -> summaries in the order of the seeds."""
    free: queue.Queue[Slot] = queue.Queue()
    for slot in slots(jobs):
        free.put(slot)

    def work(task: tuple[str, Path, dict[str, str]]) -> dict:
        mine = free.get()
        try:
            return run_one(*task[1:], mine)
        finally:
            free.put(mine)

    def loads(task: tuple[str, Path, dict[str, str]]) -> bool:
        return "LOAD_ARTIFACT" in task[2]

    tasks = sorted(tasks_of(plan, out), key=loads)
    with ThreadPoolExecutor(jobs) as pool:
        results = [result for _, stage in itertools.groupby(tasks, loads)
                   for result in list(pool.map(work, stage))]
    grouped: dict[str, list[dict]] = {name: [] for name in plan["variants"]}
    for (name, _, _), result in zip(tasks, results, strict=True):
        grouped[name].append(result)
    return grouped


def results_text(results: dict[str, list[dict]]) -> str:
    """What a table is made of, as JSON, a line a run; it is small enough to keep with the plan."""
    keys = (*SCORES, "val_bpb", "bytes_total", "steps", "train_ms", "seconds_eval", "train_gpt")
    lines = [f' "{name}": [\n  ' + ",\n  ".join(
        json.dumps({key: run[key] for key in keys if key in run}) for run in runs) + "\n ]"
             for name, runs in results.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


class Family:
    """The runs that are compared with one baseline, and what they say of chance.

    `results` are summaries by variant, in the order of the seeds; `score` names one of theirs.
    """

    def __init__(self, results: dict[str, list[dict]], plan: dict, baseline: str) -> None:
        alike, score = plan.get("alike", {}).get(baseline, []), plan.get("change", "roundtrip_bpb")
        self.baseline, self.pooled = baseline, plan.get("pooled", False)
        self.scores = {name: [run[score] for run in runs] for name, runs in results.items()}
        self.alike = [name for name in (baseline, *alike) if name in results]
        self.members = [name for name in results if name in self.alike
                        or baseline in baselines(results, plan, name)[:1]]

    def chance(self) -> tuple[float, int] | None:
        """Standard deviation of a score, its variant and seed taken out, and degrees of freedom."""
        cells = [(row, seed, score) for row, name in enumerate(self.members)
                 for seed, score in enumerate(self.scores[name])]
        rows, seeds, scores = map(np.array, zip(*cells, strict=True))
        design = np.concatenate((np.eye(rows.max() + 1)[rows], np.eye(seeds.max() + 1)[seeds]), 1)
        fitted, _, rank, _ = np.linalg.lstsq(design, scores, rcond=None)
        freedom = len(scores) - int(rank)
        rest = scores - design @ fitted
        return (math.sqrt(rest @ rest / freedom), freedom) if freedom > 0 else None

    def change(self, name: str) -> tuple[float, float | None]:
        """Mean difference of a variant to the baseline, and half its 95 % interval if there is one.

        Seed by seed. One that is alike is compared with the baseline only.
        """
        alike = [self.baseline] if name in self.alike else self.alike
        base = [statistics.fmean(scores) for scores in zip(*(self.scores[n] for n in alike),
                                                           strict=False)]
        ours = sample([a - b for a, b in zip(self.scores[name], base, strict=False)])
        chance = self.chance() if self.pooled else None
        if chance is None:
            return ours.mean, ours.interval
        return ours.mean, half_interval(*chance, ours.n, len(alike))


def baselines(results: dict[str, list[dict]], plan: dict, name: str) -> list[str]:
    """What a variant is compared with, of the variants that have run."""
    named = plan.get("against", {}).get(name, [next(iter(results))])
    return [other for other in named if other in results and other != name]


def families(results: dict[str, list[dict]], plan: dict) -> list[Family]:
    """One for each baseline."""
    first = (other for name in results for other in baselines(results, plan, name)[:1])
    return [Family(results, plan, baseline) for baseline in dict.fromkeys(first)]


def half_interval(deviation: float, freedom: float, seeds: int, alike: int) -> float:
    """Half the 95 % interval of a difference of means over `seeds` to `alike` baselines."""
    return t_quantile(0.025, freedom) * deviation * math.sqrt((1 + 1 / alike) / seeds)


def change_text(mean: float, half: float | None) -> str:
    """A change with half its interval; bold where that leaves out zero."""
    text = f"{mean:+.4f}" if half is None else f"{mean:+.4f} +- {half:.4f}"
    return f"**{text}**" if half is not None and abs(mean) > half else text


def table(results: dict[str, list[dict]], plan: dict) -> str:
    """Markdown: means over the seeds, and the spread and change of a score against a baseline.

    Where there are more scores than the roundtrip's, a second table has the change from each score
    to the next.
    """
    present = [s for s in SCORES if any(s in run for runs in results.values() for run in runs)]
    head = ["variant", "seeds", *(s.removesuffix("_bpb").replace("_", "-") for s in present),
            "max - min", "change, 95 %", "against", "artifact + code bytes", "steps",
            "ms/step with calibration", "evaluation s"]
    rows: list[list] = []
    for name, runs in results.items():
        others = baselines(results, plan, name)
        means = [figures.mean_of((run.get(s) for run in runs), ".4f") for s in present]
        finals = [run[plan.get("change", "roundtrip_bpb")] for run in runs]
        texts = [change_text(*Family(results, plan, other).change(name)) for other in others]
        trained = [run for run in runs if "steps" in run]
        steps, ms = (statistics.fmean(run[key] for run in trained) if trained else math.nan
                     for key in ("steps", "train_ms"))
        rows.append([name, len(runs), *means, f"{max(finals) - min(finals):.4f}"
                     if len(runs) > 1 else None,
                     "; ".join(texts) or "-", "; ".join(others) or "-",
                     figures.mean_of((run.get("bytes_total") for run in runs), ".0f"),
                     f"{steps:.0f}" if trained else None, f"{ms / steps:.0f}" if trained else None,
                     figures.mean_of((run.get("seconds_eval") for run in runs), ".0f")])
    tables = [figures.markdown(head, rows)]
    if len(present) > 2:
        tables.append(score_to_score(results, present))
    return "\n\n".join(tables)


def score_to_score(results: dict[str, list[dict]], scores: list[str]) -> str:
    """Markdown: by variant, the change from each of `scores` to the next, as change_text gives."""
    pairs = list(zip(scores, scores[1:], strict=False))
    names = {s: s.removesuffix("_bpb").replace("_", "-") for s in scores}

    def cell(runs: list[dict], old: str, new: str) -> str | None:
        if not all(old in run and new in run for run in runs):
            return None
        found = sample([run[new] - run[old] for run in runs])
        return change_text(found.mean, found.interval)

    rows = [[variant, *(cell(runs, *pair) for pair in pairs)] for variant, runs in results.items()]
    return figures.markdown(["variant", *(f"{names[new]} against {names[old]}, 95 %"
                                          for old, new in pairs)], rows)


GOAL = 0.003  # BPB: the difference that an experiment should see


def power_table(results: dict[str, list[dict]], plan: dict) -> str:
    """Markdown: for each family of variants, which difference its runs could have seen.

    "seen 19 times in 20" is a true difference that would leave zero outside the interval so often.
    The last columns: how many seeds make half an interval GOAL, and the hours of all their runs.
    """
    head = ["baseline", "variants", "seeds", "deviation over seeds", "deviation of chance",
            "half a 95 % interval", "seen 19 times in 20", f"seeds for {GOAL}", "hours a run",
            f"hours for {GOAL}"]
    rows = []
    for family in families(results, plan):
        found, variants = family.chance(), len(family.members)
        if found is None:
            continue
        seeds, alike = max(len(family.scores[name]) for name in family.members), len(family.alike)
        spread = math.sqrt(statistics.fmean(
            statistics.variance(family.scores[name]) for name in family.members
            if len(family.scores[name]) > 1))
        half = half_interval(*found, seeds, alike)
        seen = half * (1 + t_quantile(0.05, found[1]) / t_quantile(0.025, found[1]))
        needed = next(n for n in itertools.count(2) if half_interval(
            found[0], (variants - 1) * (n - 1), n, alike) <= GOAL)
        hours = statistics.fmean((run.get("train_ms", 0) / 1e3 + run.get("seconds_eval", 0)) / 3600
                                 for name in family.members for run in results[name])
        rows.append([family.baseline, variants, seeds, f"{spread:.4f}", f"{found[0]:.4f}",
                     f"{half:.4f}", f"{seen:.4f}", needed, f"{hours:.2f}",
                     f"{hours * variants * needed:.0f}"])
    return figures.markdown(head, rows)


def draw(results: dict[str, list[dict]], plan: dict, path: Path) -> None:
    """A PNG: the change of every variant with its interval, family by family."""
    groups = {}
    for family in families(results, plan):
        names = [name for name in family.members if name not in family.alike]
        groups[family.baseline] = [(name, *family.change(name)) for name in names]
    figures.plot_changes(groups, path)


def chosen(variants: dict[str, dict], names: list[str]) -> dict[str, dict]:
    """The variants of a plan that are named, in the plan's order; SystemExit if one is none."""
    if strange := [name for name in names if name not in variants]:
        raise SystemExit(f"--only {','.join(strange)}: the plan has {', '.join(variants)}")
    return {name: changes for name, changes in variants.items() if name in names}


def read_json(path: Path) -> dict:
    """A plan or kept results; SystemExit if there are none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: nothing to read ({error}); see records/plans/") from error


def main() -> int:
    """Run a plan and print its table; it is also written, with results.json beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--out", type=Path, help="default: data/ablations/<plan>")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", metavar="NAMES", help="some variants, separated by commas")
    parser.add_argument("--list", action="store_true", help="say what would run, and run nothing")
    parser.add_argument("--table", action="store_true", help="only the table of kept results")
    parser.add_argument("--power", action="store_true",
                        help="which difference the kept results could show")
    parser.add_argument("--figure", type=Path, metavar="PNG",
                        help="draw the changes of the kept results with their intervals")
    options = parser.parse_args()
    plan = read_json(options.plan)
    if options.only:
        plan["variants"] = chosen(plan["variants"], options.only.split(","))
    out = (options.out or ROOT / "data" / "ablations" / options.plan.stem).resolve()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    if options.table or options.power or options.figure:
        results = read_json(options.plan.parent / "results" / options.plan.name)
        if options.table:
            print(table(results, plan))
        if options.power:
            print(power_table(results, plan))
        if options.figure:
            draw(results, plan, options.figure)
        return 0
    if options.list:
        for variant, folder, _ in tasks_of(plan, out):
            state = "done" if summary_of(folder) else "to run"
            print(f"{folder.name}: {state}, {plan['variants'][variant] or 'the base'}")
        return 0
    code = keep_code(out)
    results = {variant: [run | {"train_gpt": code} for run in runs]
               for variant, runs in run_plan(plan, out, options.jobs).items()}
    text = table(results, plan)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    (out / "results.json").write_text(results_text(results), encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
