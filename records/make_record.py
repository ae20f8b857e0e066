"""From run logs to a record folder that cannot be wrong, and from any folder to its faults.

    make_record.py make --name N --author A --github-id G LOG...   a folder from runs
    make_record.py verify FOLDER...         every rule; exit code 1 if one is broken
    make_record.py compare RUN...           runs, folders and published results side by side
    make_record.py stats RUN... --against R mean, deviation, Welch's t-test, the 0.005-nat bar
    make_record.py plot RUN... --output PNG loss, BPB, learning rate, step time
    make_record.py survey FOLDER...         verify many folders: one table, and published.json

A RUN is a log, a RUN_ID of ./logs, a record folder, or the name of a published result. Every number
is read from a log or measured from a file; none is typed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import figures  # noqa: E402
import generated  # noqa: E402
import rules  # noqa: E402
from figures import markdown, spread_of  # noqa: E402
from runs import RecordError, Run, find_run_log, read_run  # noqa: E402
from welch import Sample, sample, welch  # noqa: E402

TRACKS = ("track_10min_16mb", "track_non_record_16mb")
BAR_NATS, BAR_P = 0.005, 0.01  # a record beats the one before by this, at this level

# --- groups of runs: what compare, stats and plot work on -----------------------------------


class Group(NamedTuple):
    """Results that belong together: the seeds of one configuration."""

    name: str
    runs: list[Run]  # empty for a published result without logs
    bpb: Sample
    nats: Sample | None
    published: dict[str, Any] = {}  # what published.json says of it


def published_group(name: str) -> Group | None:
    """A published result by its name or the start of it, over corrected bytes where needed."""
    rows = [row for row in rules.published()["results"] if row["name"].startswith(name)]
    if len(rows) > 1:
        raise RecordError(f"{name} begins {len(rows)} published names, such as "
                          f"{', '.join(row['name'] for row in rows[:3])}; give more of one")
    if not rows:
        return None
    row = rows[0]
    factor = row.get("counted_over_true", 1.0)
    values = [seed["val_bpb"] * factor for seed in row["seeds"].values()] or [
        row["val_bpb"] * factor]
    losses = [seed["val_loss"] for seed in row["seeds"].values() if seed.get("val_loss")]
    label = row["name"] + (" (bytes corrected)" if factor != 1 else "")
    return Group(label, [], sample(values), sample(losses) if losses else None, row)


def find_group(name: str) -> Group:
    """A log, a RUN_ID, a folder or a published result; raises RecordError for anything else."""
    if Path(name).is_dir():
        folder = rules.Folder(Path(name))
        claimed = set(folder.claims) or {run.seed for run in folder.runs}
        runs = list({run.seed: run for run in folder.runs if run.seed in claimed}.values())
        if not runs:
            raise RecordError(f"{name}: holds no log of a seed that it claims; give another folder")
        return group_of(Path(name).resolve().name, runs)
    found = published_group(name)
    return found or group_of(Path(name).stem, [read_run(find_run_log(name))])


def find_groups(names: list[str]) -> list[Group]:
    """Groups under different labels: those that share one are labelled as they were given."""
    groups = [find_group(name) for name in names]
    labels = [group.name for group in groups]
    groups = [group._replace(name=given) if labels.count(group.name) > 1 else group
              for group, given in zip(groups, names, strict=True)]
    if len({group.name for group in groups}) < len(groups):
        raise RecordError(f"{', '.join(names)}: one of these is given twice")
    return groups


def group_of(name: str, runs: list[Run]) -> Group:
    """Runs as a group; raises RecordError if one has no score."""
    for run in runs:
        if not run.headline:
            raise RecordError(f"{run.path}: holds no final score; give logs of finished runs")
    return Group(name, runs, sample([run.headline.bpb for run in runs]),
                 sample([run.headline.loss for run in runs]))


def one_group(names: list[str]) -> Group:
    """All of several logs as one group."""
    groups = find_groups(names)
    if len(groups) == 1:
        return groups[0]
    if not all(group.runs for group in groups):
        raise RecordError("several RUNs make one group only if all have logs; give one at a time")
    differ = figures.differing_settings({group.name: group.runs for group in groups})
    if differ:
        raise RecordError(f"runs of different settings are no seeds of one group:\n{differ}")
    return group_of(", ".join(g.name for g in groups), [r for g in groups for r in g.runs])


# --- statistics and comparison --------------------------------------------------------------


def scored_bytes(group: Group) -> float:
    """The bytes that a group was scored on; published results are of FineWeb's validation text."""
    return next((run.counted_bytes for run in group.runs if run.counted_bytes),
                rules.published()["facts"]["validation_bytes"])


def statistics_text(ours: Group, against: Group | None, bar_nats: float = BAR_NATS) -> str:
    """Means with 95 % intervals and, against another result, Welch's t-test over the bar."""
    rows = [[g.name, g.bpb.n, spread_of(g.bpb), f"{g.bpb.std:.5f}",
             spread_of(g.nats) if g.nats else None] for g in filter(None, (ours, against))]
    lines = [markdown(["result", "seeds", "BPB, 95 %", "deviation", "nats/token, 95 %"], rows)]
    if not against:
        return lines[0]
    if abs(scored_bytes(ours) / scored_bytes(against) - 1) > 1e-3:
        return "\n\n".join([*lines, f"{scored_bytes(ours):.0f} and {scored_bytes(against):.0f} "
                            "bytes were scored: not the same text, so there is no test."])
    basis = against if against.nats else ours
    factor = basis.bpb.mean / basis.nats.mean if basis.nats else None
    if factor is None:
        return "\n\n".join([*lines, "No loss in nats is known, so the bar has no size in BPB."])
    bar = bar_nats * factor
    lines.append(f"The bar: {bar_nats:g} nats x {factor:.5f} BPB per nat "
                 f"({figures.bytes_per_token(factor):.4f} bytes per token, of {basis.name}) = "
                 f"{bar:.5f} BPB.")
    difference = against.bpb.mean - ours.bpb.mean
    moved = f"{abs(difference):.5f} BPB {'better' if difference > 0 else 'worse'}"
    test, plain = welch(ours.bpb, against.bpb, bar), welch(ours.bpb, against.bpb)
    if test is None:
        lines.append(f"{moved}; too few seeds or no spread for a t-test.")
        return "\n\n".join(lines)
    verdict = "passes" if test.p < BAR_P else "does NOT pass"
    lines.append(f"{moved}; Welch's t = {plain.t:.3f} with {plain.freedom:.2f}"
                 f" degrees of freedom, one-sided p = {plain.p:.3g}. Better by more than the bar: "
                 f"t = {test.t:.3f}, p = {test.p:.3g}: {verdict} at p < {BAR_P:g}.")
    return "\n\n".join(lines)


def standing(group: Group) -> str:
    """Where a result stands among the published ones, over corrected bytes."""
    results = rules.published()
    true_bytes = results["facts"]["validation_bytes"]
    counted = next((run.counted_bytes for run in group.runs if run.counted_bytes), None)
    if group.runs and (counted is None or abs(counted / true_bytes - 1) > 1e-3):
        text = "an unknown number of" if counted is None else f"{counted:.0f}"
        return (f"{group.name}: scored on {text} bytes, not on FineWeb's validation text "
                f"({true_bytes}); it has no place among the published results.")
    rows = [(row["val_bpb"] * row.get("counted_over_true", 1.0), row["name"])
            for row in results["results"] if row["track"] == TRACKS[0] and not row.get("excluded")]
    better = [row for row in sorted(rows) if row[0] < group.bpb.mean and row[1] != group.name]
    rest = len([row for row in rows if row[1] != group.name])
    text = f"{group.name}: {group.bpb.mean:.4f} BPB, {len(better)} of {rest} published are better"
    return text + (f", the nearest {better[-1][1]} at {better[-1][0]:.4f}." if better else ".")


def comparison(names: list[str]) -> str:
    """Groups side by side in Markdown: numbers, settings that differ, place in the field."""
    groups = find_groups(names)
    logged = {group.name: group.runs for group in groups if group.runs}
    parts = [figures.stage_table(logged, [figures.published_row(g.name, g.bpb, g.published)
                                          for g in groups if not g.runs])]
    parts += [text for text in (figures.differing_settings(logged),) if text]
    parts += [standing(group) for group in groups]
    return "\n\n".join(parts)


# --- make -----------------------------------------------------------------------------------


def beside(run: Run, name: str) -> Path:
    """A path of a run's settings: relative to the folder that the run was started in."""
    return run.path.resolve().parent.parent / run.settings[name]


def check_runs(runs: list[Run], code: Path) -> None:
    """Raise RecordError unless all runs are finished, of this code and of different seeds."""
    digest = rules.sha256(code)
    for run in runs:
        if not run.ours or not run.headline:
            raise RecordError(f"{run.path}: no finished run of train_gpt.py; run the seed again")
        if run.code_sha256 != digest:
            raise RecordError(f"{run.path}: of code with sha256 {run.code_sha256}, but {code} has "
                              f"{digest}; give the file that ran with --code")
        artifact = beside(run, "ARTIFACT_PATH")
        size = artifact.stat().st_size if artifact.is_file() else None
        if size != run.artifact_bytes:
            raise RecordError(f"{artifact}: {size} bytes, but {run.path} says "
                              f"{run.artifact_bytes}; give every seed an ARTIFACT_PATH of its own")
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise RecordError(f"seeds {seeds}: give one log for each seed")


def make(options: argparse.Namespace) -> int:
    """Write the folder, verify it, and keep it only if no rule is broken."""
    runs = sorted((read_run(find_run_log(name)) for name in options.logs), key=lambda r: r.seed)
    check_runs(runs, options.code)
    against = find_group(options.against) if options.against else None
    target = options.records / options.track / f"{options.date}_{options.name.replace(' ', '_')}"
    if target.exists():
        raise RecordError(f"{target} exists; remove it or give another --name")
    part = target.with_name(f".{target.name}.part") / target.name
    shutil.rmtree(part.parent, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write_folder(part, runs, options, against)
        found = rules.verify(part)
        for finding in found:
            print(finding)
        if found:
            raise RecordError(f"{len(found)} rules are broken; {target} was not made")
        part.rename(target)
    finally:
        shutil.rmtree(part.parent)
    print(f"made {target}")
    return 0


def write_folder(part: Path, runs: list[Run], options: argparse.Namespace,
                 against: Group | None) -> None:
    """Every file of a record folder."""
    about = generated.submission(
        runs, {key: getattr(options, key) for key in generated.TYPED},
        {run.seed: rules.sha256(beside(run, "ARTIFACT_PATH")) for run in runs})
    data = beside(runs[0], "DATA_PATH")
    kept = [p for p in sorted(data.iterdir()) if p.suffix in (".yaml", ".model", ".npz", ".vocab")
            or p.name == "manifest.json"]
    for path in [options.code, HERE.parent / "requirements.txt", *kept]:
        shutil.copyfile(path, part / (path.name if path != options.code else "train_gpt.py"))
    for run in runs:
        shutil.copyfile(run.path, part / f"train_seed{run.seed}.log")
        if options.artifacts:
            shutil.copyfile(beside(run, "ARTIFACT_PATH"), part / f"model_seed{run.seed}.ptz")
    figures.plot({f"seed {run.seed}": [run] for run in runs}, part / "curves.png", options.name)
    text = json.dumps(about, indent=1, ensure_ascii=False)
    (part / "submission.json").write_text(text + "\n", encoding="utf-8")
    group = group_of(options.name, runs)
    statistics = f"{statistics_text(group, against)}\n\n{standing(group)}"
    (part / "README.md").write_text(generated.readme(runs, about, statistics), encoding="utf-8")


# --- survey: many folders -------------------------------------------------------------------


def means(runs: list[Run]) -> dict[str, Any]:
    """Steps, clocks and the stages' BPB as data: the mean of each that a log has."""
    columns = {name: [getattr(run, key) for run in runs] for name, key in (
        ("steps", "steps"), ("ms_per_step", "step_avg_ms"), ("eval_seconds", "eval_seconds"))}
    there = {name: [value for value in values if value is not None]
             for name, values in columns.items()}
    stages = {stage: [run.scores[stage].bpb for run in runs if stage in run.scores]
              for stage in figures.STAGES}
    row = {name: round(statistics.fmean(values), 2) for name, values in there.items() if values}
    return row | dict(stages={stage: round(statistics.fmean(values), 6)
                              for stage, values in stages.items() if values})


def survey_row(folder: rules.Folder) -> dict[str, Any]:
    """A published folder as data: what it claims, from its submission or else its logs."""
    said, mirror = folder.submission, folder.mirror
    bpb = next((said[key] for key in ("val_bpb", "mean_val_bpb", "mean_bpb")
                if rules.is_number(said.get(key))), None)
    finals = [run.headline.bpb for run in folder.runs if run.headline]
    seeds = {str(seed): {key: claim[key] for key in rules.SCORED if rules.is_number(claim.get(key))}
             for seed, claim in folder.claims.items() if rules.is_number(claim.get("val_bpb"))}
    pull = re.search(r"pull/(\d+)", mirror.get("ref", ""))
    row = dict(name=folder.path.name, pull=int(pull[1]) if pull else None,
               author=said.get("github_id") or said.get("author"), track=TRACKS[
                   not folder.is_record],
               val_bpb=bpb if bpb is not None else statistics.fmean(finals) if finals else None,
               val_loss=said.get("val_loss"), seeds=seeds, bytes_total=max(
                   (run.total_bytes for run in folder.runs if run.total_bytes),
                   default=said.get("bytes_total")), bytes_code=folder.code_bytes)
    row |= means([run for run in folder.runs if run.headline and (
        not folder.claims or run.seed in folder.claims)])
    _, factor = rules.denominator(folder)
    if factor and abs(factor - 1) > 1e-3:
        row["counted_over_true"] = round(factor, 6)
    return row


def alarms(folder: rules.Folder) -> list[str]:
    """A row of the survey: the folder, the first fault of each rule of all, our rules it breaks."""
    found = rules.verify(folder.path)
    by_rule: dict[str, list[rules.Finding]] = {}
    for finding in found:
        by_rule.setdefault(finding.rule.name, []).append(finding)
    texts = [f"{name}: {some[0].where}: {some[0].what}"
             + (f" (and {len(some) - 1} more)" if len(some) > 1 else "")
             for name, some in by_rule.items() if not some[0].rule.ours]
    ours = sorted(name for name, some in by_rule.items() if some[0].rule.ours)
    return [folder.path.name, "; ".join(texts).replace("|", "/") or "none", ", ".join(ours)]


def published_text(rows: list[dict[str, Any]]) -> str:
    """published.json with these results, a line each; facts and notes stay as they are."""
    known = rules.published()
    kept = {row["name"]: {k: row[k] for k in ("excluded", "note") if k in row}
            for row in known["results"]}
    text = ",\n  ".join(json.dumps(row | kept.get(row["name"], {}), ensure_ascii=False)
                        for row in rows if rules.is_number(row["val_bpb"]))
    head = json.dumps({k: v for k, v in known.items() if k != "results"}, indent=1,
                      ensure_ascii=False)
    return f'{head[:-2]},\n "results": [\n  {text}\n ]\n}}\n'


def survey(options: argparse.Namespace) -> int:
    """Verify many folders; the table of alarms, and with --json the results as data."""
    folders = [rules.Folder(path) for path in options.folders]
    print(markdown(["folder", "faults by the challenge's rules", "our rules"],
                   map(alarms, folders)))
    if options.json:
        rows = [survey_row(folder) for folder in folders if len(folder.names) > 1]
        options.json.write_text(published_text(rows), encoding="utf-8")
    return 0


# --- command line ---------------------------------------------------------------------------


def verify(options: argparse.Namespace) -> int:
    """Print what is wrong with each folder; 1 if anything is."""
    worst = 0
    for path in options.folders:
        if not path.is_dir():
            raise RecordError(f"{path} is no folder; give a record folder")
        found, name = rules.verify(path), path.resolve().name
        for finding in found:
            print(f"{name}: {finding}")
        if not [*path.glob("model_seed*.ptz")]:
            print(f"{name}: note: no artifact is in the folder; sizes are the logs'")
        print(f"{name}: " + (f"{len(found)} faults" if found else "no fault found"))
        worst = worst or int(bool(found))
    return worst


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("make", help="a record folder from finished runs")
    one.add_argument("logs", nargs="+", metavar="LOG", help="logs/<RUN_ID>.txt, one for each seed")
    for name, text in (("name", "of the record"), ("author", "your name"),
                       ("github-id", "your GitHub handle")):
        one.add_argument(f"--{name}", required=True, help=text)
    one.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="YYYY-MM-DD (today)")
    one.add_argument("--track", choices=TRACKS, default=TRACKS[0])
    one.add_argument("--code", type=Path, default=HERE.parent / "train_gpt.py",
                     help="the file that ran, packed or not")
    one.add_argument("--records", type=Path, default=HERE, help="where the tracks are")
    one.add_argument("--against", help="a result to test against: folder, log or published name")
    one.add_argument("--artifacts", action="store_true", help="put the artifacts in, too")
    for name, text in (("verify", "name each fault of record folders"),
                       ("survey", "one table of the faults of many folders")):
        many = commands.add_parser(name, help=text)
        many.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
        if name == "survey":
            many.add_argument("--json", type=Path, help="also write the results as data")
    for name, text in (("compare", "results side by side"), ("stats", "means and t-test"),
                       ("plot", "curves as a PNG")):
        some = commands.add_parser(name, help=text)
        some.add_argument("names", nargs="+", metavar="RUN")
        if name == "stats":
            some.add_argument("--against", metavar="RUN", help="the result to beat")
            some.add_argument("--bar", type=float, default=BAR_NATS, metavar="NATS")
        if name == "plot":
            some.add_argument("--output", type=Path, default=Path("curves.png"), metavar="PNG",
                              help="curves.png here, if not given")
            some.add_argument("--title", help="the names of the runs, if not given")
    return parser.parse_args(arguments)


def draw(options: argparse.Namespace) -> int:
    """Plot runs; names of published results without logs are refused."""
    groups = {group.name: group.runs for group in find_groups(options.names)}
    empty = [name for name, runs in groups.items() if not runs]
    if empty:
        raise RecordError(f"{', '.join(empty)}: no log to draw; give logs or folders")
    figures.plot(groups, options.output, options.title or ", ".join(groups))
    print(f"wrote {options.output}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; 0, or 1 with a message."""
    options = parse(arguments)
    try:
        if options.command == "compare":
            print(comparison(options.names))
        elif options.command == "stats":
            against = find_group(options.against) if options.against else None
            print(statistics_text(one_group(options.names), against, options.bar))
        else:
            return {"make": make, "verify": verify, "survey": survey, "plot": draw}[
                options.command](options)
    except (RecordError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
