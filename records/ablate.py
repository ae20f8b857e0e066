"""Matched experiments: named sets of settings x seeds -> one table, resumable.

    python records/ablate.py records/plans/demo_features.json --jobs 2

A plan is JSON: {"about": text, "base": {settings of every run}, "seeds": [...],
"variants": {name: {settings against the base}}}; the first variant is the baseline, and the
optional "seeds_of": {name: n} gives a variant only the first n seeds. "{root}" in a value is this
repository. All runs use the copy of train_gpt.py that the first one made, each in a folder of its
own, with an equal share of the processor cores, pinned where the system can. A run whose log holds
a summary is not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402

SCORES = ("post_ema_bpb", "roundtrip_bpb", "sliding_bpb")


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


def run_one(folder: Path, settings: dict[str, str], cores: list[int]) -> dict:
    """Run train_gpt.py in `folder` on `cores` unless it is done; returns its summary.

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
    env |= {"RUN_ID": "run", "RESUME": "1", "OMP_NUM_THREADS": str(len(cores))} | settings

    def pin() -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)

    with open(folder / "console.txt", "w", encoding="utf-8") as console:
        subprocess.run([sys.executable, folder.parent / "train_gpt.py"], cwd=folder, env=env,
                       check=False, stdout=console, stderr=subprocess.STDOUT, preexec_fn=pin)
    done = summary_of(folder)
    if done is None:
        tail = (folder / "console.txt").read_text(encoding="utf-8").splitlines()[-3:]
        raise SystemExit(f"{folder}: the run failed; its console ends: {' | '.join(tail)}")
    print(f"{folder.name}: " + " ".join(f"{k}:{done.get(k)}" for k in SCORES), flush=True)
    return done


def keep_code(out: Path) -> None:
    """Copy train_gpt.py beside the runs; another version's runs there are an error."""
    code, kept = (ROOT / "train_gpt.py").read_bytes(), out / "train_gpt.py"
    out.mkdir(parents=True, exist_ok=True)
    if not kept.exists():
        kept.write_bytes(code)
    elif kept.read_bytes() != code:
        raise SystemExit(f"{out} holds runs of another train_gpt.py; remove it or give --out")


def run_plan(plan: dict, out: Path, jobs: int) -> dict[str, list[dict]]:
    """All runs of a plan, `jobs` at a time; variant -> summaries in the order of the seeds."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    share = max(1, len(cores) // jobs)
    free: queue.Queue[list[int]] = queue.Queue()
    for job in range(jobs):
        free.put(cores[job * share : (job + 1) * share] or cores)

    def work(task: tuple[str, int]) -> dict:
        variant, seed = task
        settings = plan["base"] | plan["variants"][variant] | {"SEED": seed}
        mine = free.get()
        try:
            texts = {name: str(value).format(root=ROOT) for name, value in settings.items()}
            return run_one(out / f"{variant}_seed{seed}", texts, mine)
        finally:
            free.put(mine)

    seeds = {name: plan["seeds"][: plan.get("seeds_of", {}).get(name)] for name in plan["variants"]}
    tasks = [(name, seed) for name in plan["variants"] for seed in seeds[name]]
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(work, tasks))
    grouped: dict[str, list[dict]] = {name: [] for name in plan["variants"]}
    for (name, _), result in zip(tasks, results, strict=True):
        grouped[name].append(result)
    return grouped


def table(results: dict[str, list[dict]]) -> str:
    """Markdown: means over the seeds, spread, and the change against the first, seed by seed."""
    rows = ["| variant | seeds | post-EMA | roundtrip | sliding | roundtrip, max - min "
            "| roundtrip - baseline, same seeds | artifact + code bytes | steps | ms/step |",
            "|--|--|--|--|--|--|--|--|--|--|"]
    baseline = [run["roundtrip_bpb"] for run in next(iter(results.values()))]
    for name, runs in results.items():
        means = [statistics.mean(run[score] for run in runs) if score in runs[0] else None
                 for score in SCORES]
        trips = [run["roundtrip_bpb"] for run in runs]
        change = statistics.mean(trip - base for trip, base in zip(trips, baseline, strict=False))
        steps = statistics.mean(run["steps"] for run in runs)
        milliseconds = statistics.mean(run["train_ms"] for run in runs)
        cells = [name, str(len(runs)), *("-" if m is None else f"{m:.4f}" for m in means),
                 f"{max(trips) - min(trips):.4f}" if len(trips) > 1 else "-", f"{change:+.4f}",
                 f"{statistics.mean(run['bytes_total'] for run in runs):.0f}", f"{steps:.0f}",
                 f"{milliseconds / steps:.0f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> int:
    """Run a plan and print its table; also written to <out>/table.md with all summaries."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--out", type=Path, help="default: data/ablations/<plan>")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    plan = json.loads(options.plan.read_text(encoding="utf-8"))
    out = options.out or ROOT / "data" / "ablations" / options.plan.stem
    keep_code(out)
    results = run_plan(plan, out.resolve(), options.jobs)
    text = table(results)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    (out / "summaries.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
