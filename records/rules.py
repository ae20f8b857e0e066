"""The rules of a record folder, ours or anybody's: one function for each, one table of all.

A rule yields (where, what) for whatever breaks it, and (where, what, True) for what is worth a note
but no fault. The challenge's rules bind every folder. Strict rules ask for evidence that our
generator always gives and that others need not give.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import denominator
import generated
from folders import Folder, sha256
from generated import CAP_BYTES, CAP_EVAL_SECONDS, CAP_MS, RECORD_SEEDS
from runs import PER_RUN, Run, is_number

SCORED = ("val_loss", "val_bpb")
REQUIRED = {"author": str, "github_id": str, "name": str, "date": str, "val_bpb": float}
LATE_MS = 200  # a clock over by no more is a note: the challenge accepted such runs
THREE_SEEDS_SINCE = "2026-03-21"  # records of the challenge's first days have one or two
LEDGER = "manifest.json"
Found = Iterator[tuple[Any, ...]]

# --- the challenge's rules ------------------------------------------------------------------


def check_files(folder: Folder) -> Found:
    """README.md, train_gpt.py, a training log and a submission.json that names its author."""
    yield from missing(folder, "README.md", "train_gpt.py")
    if not folder.runs:
        yield "train_seed<k>.log", "no training log", bool(folder.left_out)
    if folder.problem:
        yield "submission.json", folder.problem
        return
    bad = [key for key, kind in REQUIRED.items() if not (
        is_number(folder.submission.get(key)) if kind is float
        else str(folder.submission.get(key) or "").strip())]
    if bad:
        yield "submission.json", f"no {', '.join(bad)} in submission.json"


def missing(folder: Folder, *names: str) -> Found:
    """Those of the files that are not there, or that are empty."""
    for name in names:
        if name not in folder.names:
            yield name, f"no {name}"
        elif folder.has(name) and not (folder.path / name).stat().st_size:
            yield name, f"{name} is empty"


def check_seeds(folder: Folder) -> Found:
    """A record has three seeds, and each seed that is claimed has a log of its own run."""
    logged, listed = {run.seed for run in folder.runs}, folder.submission.get("seeds")
    claimed = {*folder.claims, *(int(seed) for seed in listed if str(seed).isdigit())} if (
        isinstance(listed, list)) else {*folder.claims}
    elsewhere = {int(n) for name in folder.left_out for n in re.findall(r"s(?:eed)?_?(\d+)", name)}
    for seed in sorted(claimed - logged):
        yield "submission.json", f"no log of seed {seed}", seed in elsewhere
    for run in folder.runs:
        if claimed and run.seed not in claimed:
            yield run.path.name, f"of seed {run.seed}, which submission.json does not name"
        named = re.search(r"seed_?(\d+)", run.path.stem)
        if named and run.seed is not None and int(named[1]) != run.seed:
            yield run.path.name, f"its name says seed {named[1]}, its text seed {run.seed}"
    if folder.is_record and 0 < len(logged) < RECORD_SEEDS:
        enough = folder.date < THREE_SEEDS_SINCE or len(logged | elsewhere) >= RECORD_SEEDS
        yield "train_seed<k>.log", f"{len(logged)} of {RECORD_SEEDS} seeds", enough
    yield from shared_runs(folder)


def shared_runs(folder: Folder) -> Found:
    """Logs of different seeds with the same losses, or ours with the same score or artifact."""
    seen: dict[Any, Run] = {}
    for run in folder.runs:
        artifact = folder.claims.get(run.seed, {}).get("artifact_sha256")
        for mark, what in ((run.losses, "holds the same losses as"),
                           (run.ours and run.headline and run.headline.loss, "has the score of"),
                           (str(artifact or ""), "has the artifact of")):
            twin = seen.setdefault(mark, run) if mark else run
            if twin.seed != run.seed:
                yield run.path.name, f"{what} {twin.path.name}"


def check_configuration(folder: Folder) -> Found:
    """All seeds ran with the same settings, on the same devices, under the same torch."""
    ours = [run for run in folder.runs if run.ours]
    for run in ours:
        first = ours[0]
        pairs = {name: (getattr(first, name), getattr(run, name))
                 for name in ("world", "device", "torch", "cuda", "params")}
        pairs |= {name: (first.settings.get(name), run.settings.get(name))
                  for name in sorted({*first.settings, *run.settings} - PER_RUN)}
        pairs["SEED"] = str(run.facts.get("seed")), run.settings.get("SEED")
        pairs["LOAD_ARTIFACT"] = "", run.settings.get("LOAD_ARTIFACT")
        for name, (expected, found) in pairs.items():
            if found != expected:
                yield run.path.name, f"{name} is {found!r}, expected {expected!r}"
        if (run.steps or 0) > int(run.settings["ITERATIONS"]):
            yield run.path.name, f"{run.steps} steps of {run.settings['ITERATIONS']}"


def check_complete(folder: Folder) -> Found:
    """Every run came to its end in one piece, and no line of its log contradicts another."""
    for run in folder.runs:
        if run.ours and not run.finished:
            yield run.path.name, "does not end with final_int8_zlib_roundtrip_exact"
        elif not run.headline:
            cut = bool(folder.mirror)
            yield run.path.name, "no final score" + cut * ", the copy at hand is cut", cut
        if run.resumed:
            yield run.path.name, "resumed from a checkpoint"
        if run.ours and run.headline:
            stage = run.scores.get(run.mode)
            pairs = [(f"{run.mode} score", run.headline[:2], stage and stage[:2]), *(
                (name, str(value), run.summary.get(name)) for name, value in (
                    ("headline_mode", run.mode), ("byte_audit", run.audit), ("steps", run.steps),
                    ("bytes_artifact", run.artifact_bytes), ("bytes_total", run.total_bytes)))]
            for conflict in (*run.conflicts, *(f"{name} {one} and {two}" for name, one, two in pairs
                                               if one != two)):
                yield run.path.name, f"says two things: {conflict}"


def known(run: Run, key: str) -> list[float]:
    """What a submission may claim of a log: of ours the last score, else any of the artifact."""
    if key == "artifact_bytes":
        return [size for size in (run.artifact_bytes, run.total_bytes) if size is not None]
    scores = [run.headline] if run.ours and run.headline else [
        score for name, score in run.named.items() if "ema" not in name]
    return [getattr(score, key.removeprefix("val_")) for score in scores]


def same(claimed: Any, logged: float) -> bool:
    """Whether a number is a logged one, to the last digit that is given, three at least."""
    if not is_number(claimed):
        return False
    digits = -Decimal(repr(claimed)).as_tuple().exponent
    return abs(claimed - logged) < 10.0 ** -min(max(digits, 3), 8) * 1.0001


def check_scores(folder: Folder) -> Found:
    """Scores and bytes that are claimed are those of the logs, and the mean is over the seeds."""
    cut = bool(folder.left_out)  # what is in none of these logs may be in one that is not here
    for seed, claim in folder.claims.items():
        for key in (*SCORED, "artifact_bytes"):
            logged = [n for run in folder.runs if run.seed == seed for n in known(run, key)]
            if logged and key in claim and not any(same(claim[key], value) for value in logged):
                nearest = min(logged, key=lambda value: abs(value - claim[key])
                              if is_number(claim[key]) else 0)
                yield f"submission.json seed {seed}", (
                    f"{key} {claim[key]}, its log says {nearest}"), cut
    for key in SCORED:
        yield from check_mean(folder, key)
    totals = [run.total_bytes for run in folder.runs if run.total_bytes]
    claimed = folder.submission.get("bytes_total")
    if totals and is_number(claimed) and claimed not in totals:
        yield "submission.json", (f"bytes_total {claimed:,} is in no log, the largest is "
                                  f"{max(totals):,}"), cut


def check_mean(folder: Folder, key: str) -> Found:
    """The folder's loss or BPB is the mean of its seeds, or else in a log; so is the spread."""
    claimed, spread = (folder.submission.get(name) for name in (key, f"{key}_std"))
    values = [claim[key] for claim in folder.claims.values() if is_number(claim.get(key))]
    if len(values) > 1:
        if is_number(claimed) and not same(claimed, statistics.fmean(values)):
            yield "submission.json", (f"{key} {claimed}, the mean of the seeds is "
                                      f"{statistics.fmean(values):.8f}")
        either = statistics.stdev(values), statistics.pstdev(values)
        if is_number(spread) and not any(same(spread, value) for value in either):
            yield "submission.json", f"{key}_std {spread}, that of the seeds is {either[0]:.8f}"
        return
    logged = [value for run in folder.runs for value in known(run, key)]
    finals = values or [getattr(run.headline, key.removeprefix("val_"))
                        for run in folder.runs if run.headline]
    if is_number(claimed) and finals and not any(
            same(claimed, value) for value in (*logged, statistics.fmean(finals))):
        yield "submission.json", f"{key} {claimed} is in no log"


def check_sizes(folder: Folder) -> Found:
    """Code and artifact of every seed add up and fit; sizes are measured where files are there."""
    for run in folder.runs:
        artifact, total, code = run.artifact_bytes, run.total_bytes, run.code_bytes
        model = folder.path / f"model_seed{run.seed}.ptz"
        if model.is_file() and model.stat().st_size != artifact:
            yield model.name, f"{model.stat().st_size} bytes, but its log says {artifact}"
        if None not in (artifact, total, code) and total != artifact + code:
            yield run.path.name, f"total {total} is not artifact {artifact} + code {code}"
        over = (total or (artifact or 0) + (code or 0)) - CAP_BYTES
        if over > 0:
            yield run.path.name, f"{over:,} bytes over {CAP_BYTES:,}"
    for claim in (folder.submission.get("bytes_total"),
                  *(c.get("artifact_bytes") for c in folder.claims.values())):
        if is_number(claim) and claim > CAP_BYTES:
            yield "submission.json", f"claims {claim - CAP_BYTES:,} bytes over {CAP_BYTES:,}"


def check_code(folder: Folder) -> Found:
    """The code in the folder is the code that ran, and its size is the one that counts."""
    size, path = folder.code_bytes, folder.path / "train_gpt.py"
    digest = sha256(path) if path.is_file() else None
    for run in folder.runs:
        if size and run.code_bytes and run.code_bytes != size:
            yield run.path.name, f"{run.code_bytes:,} bytes ran, the file has {size:,}"
        elif digest and run.code_sha256 not in (None, digest):
            yield run.path.name, f"of code with sha256 {run.code_sha256}, train_gpt.py has {digest}"
    claimed = folder.submission.get("bytes_code", folder.submission.get("code_bytes"))
    if size and is_number(claimed) and claimed != size:
        yield "submission.json", f"bytes_code {claimed:,}, the file has {size:,}"


def check_clock(folder: Folder) -> Found:
    """Training took at most 600 s in every run."""
    spent = [(run.path.name, run.train_ms) for run in folder.runs if run.train_ms]
    spent += [(f"submission.json seed {seed}", claim["train_time_ms"])
              for seed, claim in folder.claims.items() if is_number(claim.get("train_time_ms"))
              and seed not in {run.seed for run in folder.runs}]
    for where, ms in sorted(spent, key=lambda pair: -pair[1]):  # the longest first
        if ms > CAP_MS:
            yield where, f"{(ms - CAP_MS) / 1e3:+.3f} s", ms <= CAP_MS + LATE_MS


def check_evaluation_clock(folder: Folder) -> Found:
    """Evaluation took at most 600 s in every run."""
    for run in folder.runs:
        if (run.eval_seconds or 0) > CAP_EVAL_SECONDS:
            yield run.path.name, f"{run.eval_seconds - CAP_EVAL_SECONDS:+.1f} s"


def check_hardware(folder: Folder) -> Found:
    """Eight ranks; ours say on which GPU."""
    for run in folder.runs:
        if run.world not in ((8,) if run.ours else (None, 8)):
            yield run.path.name, f"{run.world} ranks, a record has 8"
        if run.ours and "H100" not in (run.device or ""):
            yield run.path.name, f"on {run.device}, a record on 8xH100"


def check_order(folder: Folder) -> Found:
    """TTT scores every chunk once, in order, before it trains on it; the log shows the last."""
    for run in folder.runs:
        for (before, _), (chunk, of) in zip(run.chunks, run.chunks[1:], strict=False):
            if chunk <= before or chunk > of:
                yield run.path.name, f"chunk {chunk} of {of} is scored after chunk {before}"
                break
        ttt, chunks = run.scores.get("ttt"), [chunk for chunk, _ in run.chunks]
        if run.ours and ttt:  # the log has every second one or so, at equal distances, and the last
            last = run.chunks[-1][1] if chunks else 0
            every = (chunks + [2, 2])[1] - 1
            if chunks != sorted({*range(1, last + 1, max(every, 1)), last}):
                yield run.path.name, f"the chunks of TTT in the log are {chunks} of {last}"


def check_compliance(folder: Folder) -> Found:
    """No score that has looked at its own targets or at text twice is claimed."""
    for run in folder.runs:
        tainted = {s.bpb for s in run.named.values() if not s.compliant}
        claimed = [run.headline.bpb] if run.ours and run.headline else []
        claimed += [folder.claims.get(run.seed, {}).get("val_bpb"),
                    folder.submission.get("val_bpb")]
        if any(same(c, bad) for c in claimed for bad in tainted):
            yield run.path.name, "a non_compliant score is claimed"
    text = json.dumps({"seeds": folder.claims, **folder.submission}).lower()
    for word in ("non_compliant", "slot_bpb", "full-rescore", "full_rescore", "two-pass"):
        if "" in re.findall(rf"(\b(?:no|non|nor|not|without)[_ -]|){word}", text):
            yield "submission.json", f"names {word}, which is not score-first"


def check_denominator(folder: Folder) -> Found:
    """BPB is over the bytes of the FineWeb validation text."""
    found = denominator.counted(folder.runs, folder.submission)
    bpb = folder.submission.get("val_bpb")
    if found.other_text and folder.is_record:
        yield "val_bpb", f"of another text, {found.what}", found.accepted
    elif found.factor != 1:
        yield (f"val_bpb over {found.what}", f"{found.factor - 1:+.2%} bytes" + (
            f", truly {bpb * found.factor:.5f} BPB" if is_number(bpb) else ""))


# --- strict rules: evidence that our generator always gives ----------------------------------


def check_evidence(folder: Folder) -> Found:
    """What it takes to run and audit it again: requirements, curves, the ledger of bytes."""
    if folder.mirror:
        yield "source.json", "a copy of a folder, which may leave out any file, proves nothing"
    yield from missing(folder, "requirements.txt", "curves.png", LEDGER)


def check_vocabulary(folder: Folder) -> Found:
    """The vocabulary of the ledger is in the folder, and the byte table is that of its tokens."""
    if not folder.has(LEDGER):
        return
    tokenizer = folder.read_json(LEDGER).get("tokenizer") or {}
    source = folder.path / Path(str(tokenizer.get("path"))).name
    digest = sha256(source) if source.is_file() else None
    if digest is None or digest != tokenizer.get("sha256"):
        yield LEDGER, (f"names {source.name} with sha256 {tokenizer.get('sha256')}, in the "
                       f"folder it is {digest or 'missing'}")
        return
    import retokenize_scylla

    for table in sorted(folder.path.glob("*.meta.npz")) or [folder.path / "*.meta.npz"]:
        try:
            vocabulary = retokenize_scylla.load_vocabulary(source)
            with np.load(table, allow_pickle=False) as meta:
                right = (np.array_equal(meta["base_bytes"], vocabulary.base_bytes)
                         and not meta["has_leading_space"].any()
                         and [*meta["is_boundary_token"].nonzero()[0]] == [vocabulary.bos_id])
        except Exception as error:  # of any kind: the files are a stranger's
            yield table.name, f"no byte table of {source.name} can be read ({error!r})"
            continue
        if not right:
            yield table.name, f"counts other bytes than the tokens of {source.name} have"


def check_ledger(folder: Folder) -> Found:
    """The bytes of BPB are proven: the ledger is exact and adds up, and the logs count as it."""
    manifest = folder.read_json(LEDGER) if folder.has(LEDGER) else {}
    totals = manifest.get("totals") or {}
    for split in ("train", "val") if folder.has(LEDGER) else ():
        count = totals.get(split) or {}
        shards = [s for name, s in manifest["shards"].items() if f"_{split}_" in name]
        summed = {key: sum(shard[key] for shard in shards) for key in ("tokens", "source_bytes")}
        if count.get("bad_documents") or not shards or any(
                count.get(key) != value for key, value in summed.items()):
            yield LEDGER, f"totals of {split} {count}, its {len(shards)} shards {summed}"
    if folder.has(LEDGER) and manifest["tokenizer"].get("byte_exact") is not True:
        yield LEDGER, f"its tokenizer has byte_exact {manifest['tokenizer'].get('byte_exact')!r}"
    for run in folder.runs:
        yield from check_audit(run, totals.get("val") or {})
    counts = {run.audited_bytes for run in folder.runs}
    if len(counts) > 1:
        yield "train_seed<k>.log", f"the logs count different bytes: {counts}"


def check_audit(run: Run, ledger: dict[str, Any]) -> Found:
    """A log's audit is exact, its bytes are the ledger's, and its BPB is its loss over them."""
    if run.audit != "exact":
        yield run.path.name, f"byte_audit:{run.audit or 'not in the log'}"
    elif ledger and run.audited_bytes != ledger.get("source_bytes"):
        yield run.path.name, (f"scored {run.audited_bytes} bytes, {LEDGER} holds "
                              f"{ledger.get('source_bytes')}")
    elif ledger and run.headline:
        bpb = run.headline.loss * (ledger["tokens"] - 1) / math.log(2) / run.audited_bytes
        if abs(bpb - run.headline.bpb) > 1e-6:
            yield run.path.name, (f"val_bpb {run.headline.bpb}, but its loss over the ledger's "
                                  f"tokens and bytes is {bpb:.8f}")


# --- all of them -----------------------------------------------------------------------------


class Rule(NamedTuple):
    """One rule: what it asks, and what to do about a folder that breaks it."""

    name: str
    check: Callable[[Folder], Found]
    remedy: str
    record: bool = False  # of the record track only
    strict: bool = False  # asks for evidence that only our generator always gives

    @property
    def asks(self) -> str:
        """What the rule asks, a sentence."""
        return str(self.check.__doc__).splitlines()[0]


AGAIN = "make the folder again with make_record.py make"
RULES = (
    Rule("files", check_files, "add the file or the field that is missing"),
    Rule("seeds", check_seeds, "add the log of a run of its own for each seed, and name each seed "
         "in submission.json"),
    Rule("configuration", check_configuration, "run every seed with the same settings on the same "
         "machine; only SEED and names of files may differ"),
    Rule("complete", check_complete, "use a run that ended by itself and was not resumed"),
    Rule("scores", check_scores, "copy the number from the log, or " + AGAIN),
    Rule("sizes", check_sizes, "export smaller (SIZE_LIMIT fits by itself) and run the seed again"),
    Rule("code", check_code, "put the train_gpt.py that ran into the folder, or run it again"),
    Rule("clock", check_clock, "run again with MAX_WALLCLOCK_SECONDS=600, which keeps a reserve",
         record=True),
    Rule("evaluation clock", check_evaluation_clock, "evaluate faster: EVAL_STRIDE, TTT_EPOCHS",
         record=True),
    Rule("hardware", check_hardware, "run on 8xH100, or enter track_non_record_16mb", record=True),
    Rule("order", check_order, "score each chunk once, before training on it; run again"),
    Rule("compliance", check_compliance, "claim the score-first or sliding score instead"),
    Rule("denominator", check_denominator, "count source bytes: re-tokenize with "
         "retokenize_scylla.py and score again"),
    Rule("evidence", check_evidence, AGAIN, strict=True),
    Rule("vocabulary", check_vocabulary, "copy in the vocabulary and the .meta.npz with which the "
         "shards were made; if other ones were used, score again", strict=True),
    Rule("ledger", check_ledger, "re-tokenize with retokenize_scylla.py, which writes the ledger, "
         "and score again", strict=True),
    Rule("generated", generated.differences, AGAIN, strict=True),
)


class Finding(NamedTuple):
    """A rule that a folder breaks or, as a note, all but breaks."""

    rule: Rule
    where: str
    what: str
    note: bool = False

    def __str__(self) -> str:
        return f"{self.rule.name}: {self.where}: {self.what}. Remedy: {self.rule.remedy}"


def verify(path: Path, strict: bool = False) -> list[Finding]:
    """Faults and notes of a record folder by the challenge's rules; `strict`: by ours, too."""
    folder, found = Folder(path), []
    for rule in RULES:
        if rule.strict > strict or rule.record > folder.is_record:
            continue
        try:
            found += [Finding(rule, *each) for each in rule.check(folder)]
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            found.append(Finding(rule, "the folder", f"something in it has no form that this rule "
                                 f"can read ({error!r})"))
    return found
