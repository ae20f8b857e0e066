"""Matched experiments: named sets of settings x seeds -> one table, resumable.

    python records/ablate.py records/plans/slopes.json --jobs 2
    python records/ablate.py records/plans/levers.json --list      what is left; runs nothing
    python records/ablate.py records/plans/levers.json --table     of the results that are kept
    python records/ablate.py records/plans/levers.json --power     which difference they could show
    python records/ablate.py records/plans/levers.json --figure levers.png
    python records/ablate.py records/plans/whole.json --only record,frontier       some variants

A plan is JSON: {"about": text, "base": {settings of every run}, "seeds": [...], "variants": {name:
{settings against the base}}}; the first variant is the baseline, but for those that "against":
{name: [baselines]} names. Optional: "seeds_of": {name: n} gives a variant only the first n seeds,
"change": score is what the changes are of, if not the roundtrip. Instead of variants a plan may
have a design, in which each run differs in several levers: records/design.py. In a value "{root}"
is this repository, "{seed}" the seed, and "{out}" the folder of the runs: a LOAD_ARTIFACT there is
scored after another variant has trained it.

All variants are run with the first seed, then all with the second, and so on. They begin alike: a
seed gives the same order of the data and, where shapes agree, the same initial values. All runs use
the copy of train_gpt.py that the first one made, each in a folder of its own, with an equal share
of the processor cores, pinned where the system can, and where there are GPUs with one of them. A
run whose log holds a summary is not repeated. results.json is copied to
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

import torch  # noqa: E402

import design  # noqa: E402
import figures  # noqa: E402
import train_gpt  # noqa: E402
from design import GOAL, detectable, hours_of, seeds_for_goal  # noqa: E402
from welch import Sample, sample  # noqa: E402

SCORES = ("post_ema_bpb", *(f"{mode}_bpb" for mode in train_gpt.EVAL_MODES if mode != "slot"),
          f"{train_gpt.FINAL_LINES['slot']}_bpb")


def events_of(folder: Path) -> dict[str, dict]:
    """The last event of each kind in a run's log."""
    log, events = folder / "logs" / "run.jsonl", {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError):  # a killed run may leave half a line
            event = json.loads(line)
            events[event["event"]] = event
    return events


def summary_of(folder: Path) -> dict | None:
    """The summary event of a finished run's log, or None."""
    return events_of(folder).get("summary")


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
    tasks, seeds_of = [], plan.get("seeds_of", {})
    for number, seed in enumerate(plan["seeds"], 1):
        for variant, changes in plan["variants"].items():
            if number > seeds_of.get(variant, number):
                continue
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


def list_runs(plan: dict, out: Path) -> None:
    """Print which runs of a plan are done, which are to come, and how long these will take."""
    tasks = tasks_of(plan, out)
    done = {folder: summary_of(folder) for _, folder, _ in tasks}
    for variant, folder, _ in tasks:
        print(f"{folder.name}: {'done' if done[folder] else 'to run'}, "
              f"{plan['variants'][variant] or 'the base'}")
    took = [hours_of(run) for run in done.values() if run]
    left = len(tasks) - len(took)
    hours = f", {left * statistics.fmean(took):.1f} hours one at a time" if took else ""
    print(f"{len(took)} of {len(tasks)} runs are done; {left} are to come{hours}")


def finished(plan: dict, out: Path) -> dict[str, list[dict]]:
    """Summaries of the runs that are done, by variant, up to the first seed that is not."""
    results, tasks = {}, tasks_of(plan, out)
    for variant in plan["variants"]:
        runs = (summary_of(folder) for name, folder, _ in tasks if name == variant)
        if done := list(itertools.takewhile(bool, runs)):
            results[variant] = done
    if not results:
        raise SystemExit(f"{out}: no run of the plan is done")
    return results


def results_text(results: dict[str, list[dict]]) -> str:
    """What a table is made of, as JSON, a line a run; it is small enough to keep with the plan."""
    keys = (*SCORES, "val_bpb", "bytes_total", "steps", "train_ms", "seconds_eval", "train_gpt")
    lines = [f' "{name}": [\n  ' + ",\n  ".join(
        json.dumps({key: run[key] for key in keys if key in run}) for run in runs) + "\n ]"
             for name, runs in results.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def baselines(results: dict[str, list[dict]], plan: dict, name: str) -> list[str]:
    """What a variant is compared with, of the variants that have run."""
    named = plan.get("against", {}).get(name, [next(iter(results))])
    return [other for other in named if other in results and other != name]


def change_of(results: dict[str, list[dict]], plan: dict, name: str, baseline: str) -> Sample:
    """The differences of a variant's score to a baseline's, seed by seed."""
    score = plan.get("change", "roundtrip_bpb")
    return sample([ours[score] - theirs[score] for ours, theirs in zip(
        results[name], results[baseline], strict=False)])


def table(results: dict[str, list[dict]], plan: dict) -> str:
    """Markdown: means over the seeds, and the spread and change of a score against a baseline.

    Where there are more scores than the roundtrip's, a second table has the change from each score
    to the next. Of a design it is the table of effects.
    """
    if "levers" in plan:
        return design.table(results, plan)
    present = [s for s in SCORES if any(s in run for runs in results.values() for run in runs)]
    head = ["variant", "seeds", *(s.removesuffix("_bpb").replace("_", "-") for s in present),
            "max - min", "change, 95 %", "against", "artifact + code bytes", "steps",
            "ms/step with calibration", "evaluation s"]
    rows: list[list] = []
    for name, runs in results.items():
        others = baselines(results, plan, name)
        means = [figures.mean_of((run.get(s) for run in runs), ".4f") for s in present]
        finals = [run[plan.get("change", "roundtrip_bpb")] for run in runs]
        texts = [figures.change_text(change_of(results, plan, name, other)) for other in others]
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
        return figures.change_text(sample([run[new] - run[old] for run in runs]))

    rows = [[variant, *(cell(runs, *pair) for pair in pairs)] for variant, runs in results.items()]
    return figures.markdown(["variant", *(f"{names[new]} against {names[old]}, 95 %"
                                          for old, new in pairs)], rows)


def power_table(results: dict[str, list[dict]], plan: dict) -> str:
    """Markdown: for each variant, which difference to its baseline its runs could have seen.

    Of a variant without a baseline only the deviation of its score over the seeds. The last
    columns: how many seeds would make half the interval GOAL, and the hours that the variant's runs
    would take.
    """
    if "levers" in plan:
        return design.power_table(results, plan)
    head = ["variant", "against", "seeds", "deviation over seeds", "deviation of the difference",
            "half a 95 % interval", "seen 19 times in 20", f"seeds for {GOAL}", f"hours for {GOAL}"]
    rows, score = [], plan.get("change", "roundtrip_bpb")
    for name, runs in results.items():
        alone = sample([run[score] for run in runs])
        hours = statistics.fmean(map(hours_of, runs))
        others = baselines(results, plan, name)
        if not others and alone.std is not None:
            rows.append([name, None, alone.n, f"{alone.std:.4f}", *[None] * 5])
        for other in others:
            change = change_of(results, plan, name, other)
            if change.interval is None:
                continue
            needed = seeds_for_goal(change.std)
            rows.append([name, other, change.n, f"{alone.std:.4f}", f"{change.std:.4f}",
                         f"{change.interval:.4f}", f"{detectable(change):.4f}", needed,
                         f"{hours * needed:.1f}"])
    return figures.markdown(head, rows)


def draw(results: dict[str, list[dict]], plan: dict, path: Path) -> None:
    """A PNG: the change of every variant with its interval, a panel for each baseline."""
    groups: dict[str, list[tuple[str, Sample]]] = {}
    if "levers" in plan:
        groups = {f"{title}, {fit.runs} runs": [(": ".join(key), effect)
                                                for key, effect in fit.effects.items()]
                  for title, fit in design.fits_of(results, plan).items()}
    for name in results if "levers" not in plan else ():
        for other in baselines(results, plan, name)[:1]:
            groups.setdefault(f"against {other}", []).append(
                (name, change_of(results, plan, name, other)))
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
    parser.add_argument("--list", action="store_true", help="say what is left, and run nothing")
    parser.add_argument("--table", action="store_true", help="only the table of kept results")
    parser.add_argument("--so-far", action="store_true",
                        help="table, power or figure of the runs that are done, not of those kept")
    parser.add_argument("--power", action="store_true",
                        help="which difference the kept results could show")
    parser.add_argument("--figure", type=Path, metavar="PNG",
                        help="draw the changes of the kept results with their intervals")
    options = parser.parse_args()
    plan = design.expand(read_json(options.plan))
    if options.only:
        plan["variants"] = chosen(plan["variants"], options.only.split(","))
    out = (options.out or ROOT / "data" / "ablations" / options.plan.stem).resolve()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    if options.table or options.power or options.figure:
        kept = options.plan.parent / "results" / options.plan.name
        results = finished(plan, out) if options.so_far else read_json(kept)
        if options.table:
            print(table(results, plan))
        if options.power:
            print(power_table(results, plan))
        if options.figure:
            draw(results, plan, options.figure)
        return 0
    if options.list:
        list_runs(plan, out)
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
