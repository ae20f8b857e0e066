"""From run logs to a record folder that cannot be wrong, and from any folder to its faults.

    make_record.py make --name N --author A --github-id G LOG...   a folder from runs
    make_record.py verify FOLDER...         valid by the challenge's rules, or why not; exit code 1
    make_record.py compare RUN...           runs, folders and published results side by side
    make_record.py stats RUN... --against R mean, deviation, Welch's t-test, the 0.005-nat bar
    make_record.py plot RUN... --output PNG loss, BPB, learning rate, step time
    make_record.py survey FOLDER...         verify many folders: SURVEY.md, and published.json

A RUN is a log, a RUN_ID of ./logs, a record folder, or the name of a published result. Every number
is read from a log or measured from a file; none is typed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import statistics
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import denominator  # noqa: E402
import figures  # noqa: E402
import generated  # noqa: E402
import pack  # noqa: E402
import rules  # noqa: E402
from figures import markdown, spread_of  # noqa: E402
from folders import Folder, sha256  # noqa: E402
from runs import RecordError, Run, find_run_log, is_number, read_run  # noqa: E402
from welch import Sample, sample, welch  # noqa: E402

TRACKS = ("track_10min_16mb", "track_non_record_16mb")
BAR_NATS, BAR_P = 0.005, 0.01  # a record beats the one before by this, at this level

# --- groups of runs: what compare, stats and plot work on -----------------------------------


class Group(NamedTuple):
    """Results that belong together: the seeds of one configuration, over the true bytes."""

    name: str
    runs: list[Run]  # empty for a published result without logs
    bpb: Sample | None
    nats: Sample | None
    published: dict[str, Any] = {}  # what denominator.results says of it
    problem: str = ""  # why there is no score, if there is none


def published_group(name: str) -> Group | None:
    """A published result by its name or the start of it."""
    rows = [row for row in denominator.results() if row["name"].startswith(name)]
    if len(rows) > 1:
        raise RecordError(f"{name} begins {len(rows)} published names, such as "
                          f"{', '.join(row['name'] for row in rows[:3])}; give more of one")
    if not rows:
        return None
    row, seeds = rows[0], rows[0]["seeds"].values()
    losses = [seed["val_loss"] for seed in seeds if seed.get("val_loss")]
    return Group(row["label"], [], sample([seed["val_bpb"] for seed in seeds] or [row["val_bpb"]]),
                 sample(losses) if losses else None, row)


def find_group(name: str) -> Group:
    """A log, a RUN_ID, a folder or a published result; raises RecordError for anything else."""
    if Path(name).is_dir():
        folder = Folder(Path(name))
        return group_of(Path(name).resolve().name, folder.claimed_runs, folder.submission)
    found = published_group(name)
    return found or group_of(Path(name).stem, [read_run(find_run_log(name))])


def group_of(name: str, runs: list[Run], submission: dict[str, Any] | None = None) -> Group:
    """Runs as a group, their BPB over the true bytes; `problem` says why it has no score."""
    factor = denominator.counted(runs, submission or {}).factor
    runs, label = denominator.corrected(runs, factor), denominator.label(name, factor)
    unscored = [str(run.path) for run in runs if not run.headline]
    if unscored or not runs:
        return Group(label, runs, None, None, problem=f"{', '.join(unscored)}: no final score"
                     if runs else "no log of a seed that it claims")
    return Group(label, runs, sample([run.headline.bpb for run in runs]),
                 sample([run.headline.loss for run in runs]))


def scored(group: Group) -> Group:
    """The group; raises RecordError if it has no score."""
    if group.problem:
        raise RecordError(f"{group.name}: {group.problem}; give logs of finished runs")
    return group


def find_groups(names: list[str]) -> list[Group]:
    """Groups under different labels: those that share one are labelled as they were given."""
    groups = [find_group(name) for name in names]
    labels = [group.name for group in groups]
    groups = [group._replace(name=given + denominator.MARK * (group.name.endswith(
        denominator.MARK))) if labels.count(group.name) > 1 else group
        for group, given in zip(groups, names, strict=True)]
    if len({group.name for group in groups}) < len(groups):
        raise RecordError(f"{', '.join(names)}: one of these is given twice")
    return groups


def one_group(names: list[str]) -> Group:
    """All of several logs as one group."""
    groups = [scored(group) for group in find_groups(names)]
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
                denominator.published()["facts"]["validation_bytes"])


def statistics_text(ours: Group, against: Group | None, bar_nats: float = BAR_NATS) -> str:
    """Means with 95 % intervals and, against another result, Welch's t-test over the bar."""
    rows = [[g.name, g.bpb.n, spread_of(g.bpb), figures.mean_of([g.bpb.std], ".5f"),
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
    true_bytes = denominator.published()["facts"]["validation_bytes"]
    counted = next((run.counted_bytes for run in group.runs if run.counted_bytes), None)
    if group.runs and (counted is None or abs(counted / true_bytes - 1) > 1e-3):
        text = "an unknown number of" if counted is None else f"{counted:.0f}"
        return (f"{group.name}: scored on {text} bytes, not on FineWeb's validation text "
                f"({true_bytes}); it has no place among the published results.")
    rows = sorted((row["val_bpb"], row["label"]) for row in denominator.results()
                  if row["track"] == TRACKS[0] and not row.get("excluded")
                  and row["label"] != group.name)
    better, rest = [row for row in rows if row[0] < group.bpb.mean], len(rows)
    text = f"{group.name}: {group.bpb.mean:.4f} BPB, {len(better)} of {rest} published are better"
    return text + (f", the nearest {better[-1][1]} at {better[-1][0]:.4f}." if better else ".")


def comparison(names: list[str]) -> str:
    """Groups side by side in Markdown: numbers, settings that differ, place in the field."""
    groups = find_groups(names)
    logged = {group.name: group.runs for group in groups if not group.published}
    parts = [figures.stage_table(logged, [figures.published_row(group.bpb, group.published)
                                          for group in groups if group.published])]
    parts += [text for text in (figures.differing_settings(logged),) if text]
    parts += [f"{group.name}: {group.problem}, so it has no score." if group.problem
              else standing(group) for group in groups]
    return "\n\n".join(parts)


# --- make -----------------------------------------------------------------------------------


def beside(run: Run, name: str) -> Path:
    """A path of a run's settings: relative to the folder that the run was started in."""
    return run.path.resolve().parent.parent / run.settings[name]


def check_runs(runs: list[Run], code: Path) -> None:
    """Raise RecordError unless all runs are finished, of this code and of different seeds."""
    digest = sha256(code)
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


def readable_source(options: argparse.Namespace) -> Path | None:
    """The source of the packed file that ran, None if that is not packed; RecordError if another.
    """
    data = options.code.read_bytes()
    try:
        if not generated.is_packed(data):
            return None
    except pack.PackError as error:
        raise RecordError(f"{options.code}: {error}; pack it again with records/pack.py") from error
    fault = generated.packing_fault(data, options.source.read_text(encoding="utf-8"))
    if fault:
        raise RecordError(f"{options.source} {fault}; give the source of {options.code} "
                          "with --source")
    return options.source


def make(options: argparse.Namespace) -> int:
    """Write the folder, verify it strictly, and keep it only if no rule is broken."""
    runs = sorted((read_run(find_run_log(name)) for name in options.logs), key=lambda r: r.seed)
    check_runs(runs, options.code)
    against = scored(find_group(options.against)) if options.against else None
    text = options.about.read_text(encoding="utf-8") if options.about else generated.idea(runs)
    files = {"train_gpt.py": options.code, "requirements.txt": HERE.parent / "requirements.txt"}
    if readable := readable_source(options):
        files[generated.READABLE] = readable
    target = options.records / options.track / f"{options.date}_{options.name.replace(' ', '_')}"
    if target.exists():
        raise RecordError(f"{target} exists; remove it or give another --name")
    part = target.with_name(f".{target.name}.part") / target.name
    shutil.rmtree(part.parent, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        copy_files(part, runs, files, options.artifacts)
        write_texts(part, runs, options, against, text)
        found = rules.verify(part, strict=True)
        print(verdict(part, found))
        if not valid(found):
            raise RecordError(f"{target} was not made")
        part.rename(target)
    finally:
        shutil.rmtree(part.parent)
    print(f"made {target}")
    return 0


def copy_files(part: Path, runs: list[Run], files: dict[str, Path], artifacts: bool) -> None:
    """Put in the files of a folder that are copies: name -> where from, tokenizer, ledger, logs."""
    kept = {path.name: path for path in beside(runs[0], "DATA_PATH").iterdir()
            if path.suffix in (".yaml", ".model", ".npz", ".vocab") or path.name == rules.LEDGER}
    if rules.LEDGER in kept:  # it names the vocabulary; others may have been left there
        about = json.loads(kept[rules.LEDGER].read_bytes()).get("tokenizer", {})
        kept = {name: path for name, path in kept.items()
                if name in (rules.LEDGER, about.get("path"))
                or path.suffix == ".npz" and about.get("kind") != "sentencepiece"}
    logs = {f"train_seed{run.seed}.log": run.path for run in runs}
    models = {f"model_seed{run.seed}.ptz": beside(run, "ARTIFACT_PATH") for run in runs}
    for name, path in (kept | files | logs | (models if artifacts else {})).items():
        shutil.copyfile(path, part / name)


def write_texts(part: Path, runs: list[Run], options: argparse.Namespace, against: Group | None,
                text: str) -> None:
    """Write what a folder says of its runs: submission.json, README.md and the curves."""
    about = generated.submission(
        runs, {key: getattr(options, key) for key in generated.TYPED},
        {run.seed: sha256(beside(run, "ARTIFACT_PATH")) for run in runs})
    (part / "submission.json").write_text(
        json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    figures.plot({f"seed {run.seed}": [run] for run in runs}, part / "curves.png", options.name)
    group = group_of(options.name, runs)
    statistics = f"{statistics_text(group, against)}\n\n{standing(group)}"
    packed = (part / generated.READABLE).is_file()
    (part / "README.md").write_text(
        generated.readme(runs, about, packed, statistics, text), encoding="utf-8")


# --- verify ---------------------------------------------------------------------------------


def valid(found: list[rules.Finding]) -> bool:
    """Whether there is no fault; notes are none."""
    return all(finding.note for finding in found)


def cells(found: list[rules.Finding]) -> list[str]:
    """For each rule of findings a few words: the first, and how many more there are."""
    by_rule: dict[str, list[rules.Finding]] = {}
    for finding in sorted(found, key=lambda finding: finding.note):  # the faults of a rule first
        by_rule.setdefault(finding.rule.name, []).append(finding)
    return [f"{name}{' ' if some[0].what[0] in '+-' else ': '}"
            + textwrap.shorten(some[0].what, 90, placeholder=" ...")
            + bracketed(*["note"] * some[0].note, *[f"and {len(some) - 1} more"] * (len(some) > 1))
            for name, some in by_rule.items()]


def bracketed(*words: str) -> str:
    """" (a, b)", or nothing of no words."""
    return f" ({', '.join(words)})" if words else ""


def verdict(path: Path, found: list[rules.Finding]) -> str:
    """One line on what a folder is, and below it each fault with its remedy."""
    folder, name = Folder(path), path.resolve().name
    if folder.mirror:
        name += " (a copy without all files; its source.json is believed)"
    faults = [finding for finding in found if not finding.note]
    notes = "; ".join(cells([finding for finding in found if finding.note]))
    if not faults:
        said = folder.submission
        size = said["bytes_total"] if is_number(said.get("bytes_total")) else max(
            (run.total_bytes for run in folder.runs if run.total_bytes), default=None)
        seeds = len({run.seed for run in folder.runs})
        return (f"{name}: valid: {seeds} seed{'s' * (seeds != 1)}, {said['val_bpb']:.5f} BPB, "
                + (f"{size:,} bytes" if size else "bytes unknown") + (notes and f"; {notes}"))
    broken = cells(faults)
    more = bracketed(*[f"and {len(broken) - 2} more"] * (len(broken) > 2))
    return "\n  ".join([f"{name}: not valid: {'; '.join(broken[:2])}{more}", *map(str, faults),
                        *([f"notes: {notes}"] if notes else [])])


def verify(options: argparse.Namespace) -> int:
    """Say of each folder whether it is valid; 1 if one is not."""
    worst = 0
    for path in options.folders:
        if not path.is_dir():
            raise RecordError(f"{path} is no folder; give a record folder")
        found = rules.verify(path, options.strict)
        print(verdict(path, found))
        worst = worst or int(not valid(found))
    return worst


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


def survey_row(folder: Folder) -> dict[str, Any]:
    """A published folder as data: what it claims, from its submission or else its logs."""
    said, mirror = folder.submission, folder.mirror
    bpb = next((said[key] for key in ("val_bpb", "mean_val_bpb", "mean_bpb")
                if is_number(said.get(key))), None)
    finals = [run.headline.bpb for run in folder.runs if run.headline]
    seeds = {str(seed): {key: claim[key] for key in rules.SCORED if is_number(claim.get(key))}
             for seed, claim in folder.claims.items() if is_number(claim.get("val_bpb"))}
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
    factor = denominator.counted(folder.runs, said).factor
    return row | ({"counted_over_true": round(factor, 6)} if factor != 1 else {})


def survey_text(folders: list[Path]) -> str:
    """SURVEY.md: what each rule finds in how many folders and what that means; then each folder."""
    found = {path: rules.verify(path) for path in folders}
    meanings = denominator.published()["facts"]["survey"]
    counts = []
    for rule in rules.RULES:
        names = [{finding.note for finding in some if finding.rule is rule}
                 for some in found.values()]
        faults, notes = sum(False in name for name in names), sum(name == {True} for name in names)
        if not rule.strict:
            counts.append([rule.name, faults, notes, meanings.get(rule.name, "No folder breaks it.")
                           if faults + notes else "No folder breaks it."])
    rows = [[path.name, "; ".join(cells(some)).replace("|", "/") or "no fault"]
            for path, some in found.items()]
    return "\n\n".join([
        "# The public record folders, verified",
        f"`records/make_record.py survey FOLDER...` wrote this file from {len(found)} folders of "
        "the challenge's\nrepository and its pull requests. They are judged by the challenge's "
        f"rules alone.\n{sum(map(valid, found.values()))} of them show no fault. A note is no "
        "fault: it says what was accepted, or what cannot be\ntold from the copies at hand.",
        "## What the rules found",
        markdown(["rule", "folders with a fault", "with a note only", "what it means"], counts),
        "## Folder by folder", "A cell names each rule with the first thing that it found.",
        markdown(["folder", "what was found"], rows)])


def published_text(rows: list[dict[str, Any]]) -> str:
    """published.json with these results, a line each; facts and notes stay as they are."""
    known = denominator.published()
    kept = {row["name"]: {k: row[k] for k in ("excluded", "note") if k in row}
            for row in known["results"]}
    text = ",\n  ".join(json.dumps(row | kept.get(row["name"], {}), ensure_ascii=False)
                        for row in rows if is_number(row["val_bpb"]))
    head = json.dumps({k: v for k, v in known.items() if k != "results"}, indent=1,
                      ensure_ascii=False)
    return f'{head[:-2]},\n "results": [\n  {text}\n ]\n}}\n'


def survey(options: argparse.Namespace) -> int:
    """Verify many folders: SURVEY.md, and with --json the results as data."""
    print(survey_text(options.folders))
    if options.json:
        rows = [survey_row(folder) for folder in map(Folder, options.folders)
                if len(folder.names) > 1]
        options.json.write_text(published_text(rows), encoding="utf-8")
    return 0


# --- command line ---------------------------------------------------------------------------


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
    one.add_argument("--source", type=Path, default=HERE.parent / "train_gpt.py",
                     help="the readable source of a packed --code (train_gpt.py here)")
    one.add_argument("--about", type=Path, metavar="FILE", help="your text on the idea, for the "
                     "folder's README.md; without it a paragraph names what was switched on")
    one.add_argument("--records", type=Path, default=HERE, help="where the tracks are")
    one.add_argument("--against", help="a result to test against: folder, log or published name")
    one.add_argument("--artifacts", action="store_true", help="put the artifacts in, too")
    about = "\n".join(f"  {rule.name}{' (record)' * rule.record}{' (strict)' * rule.strict}: "
                      f"{rule.asks}" for rule in rules.RULES)
    some = commands.add_parser(
        "verify", help="whether record folders are valid", epilog="The rules; those of the record "
        "track bind no other, and the strict ones are\nours and asked for with --strict only:\n"
        + about, formatter_class=argparse.RawDescriptionHelpFormatter)
    some.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    some.add_argument("--strict", action="store_true", help="by our own rules, too")
    some = commands.add_parser("survey", help="SURVEY.md: the faults of many folders")
    some.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    some.add_argument("--json", type=Path, help="also write the results as data")
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
    if options.output.suffix != ".png":
        raise RecordError(f"{options.output}: curves are drawn as a PNG; give a name.png")
    groups = {group.name: scored(group).runs for group in find_groups(options.names)}
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
            against = scored(find_group(options.against)) if options.against else None
            print(statistics_text(one_group(options.names), against, options.bar))
        else:
            return {"make": make, "verify": verify, "survey": survey, "plot": draw}[
                options.command](options)
    except (RecordError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # a reader that has seen enough, such as head, ends the program
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
