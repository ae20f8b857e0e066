"""The rules of a record folder, ours or anybody's: one function for each, one table of all.

A rule yields (where, what) for whatever breaks it. Rules of the challenge bind every folder; rules
marked `ours` ask for evidence that our generator always gives and others may not.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import generated
import pack
from generated import CAP_BYTES, CAP_EVAL_SECONDS, CAP_MS, RECORD_SEEDS, TYPED
from runs import PER_RUN, Run, Score, find_logs, read_run

HERE = Path(__file__).resolve().parent
SCORED = ("val_loss", "val_bpb")
REQUIRED = {"author": str, "github_id": str, "name": str, "date": str, "val_bpb": float,
            "bytes_total": int}
SCHEMA = {  # what our submission.json also holds
    "track": str, "val_loss": float, "val_bpb_std": float, "seeds": list, "seed_results": dict,
    "bytes_code": int, "model_params": int, "hardware": str, "pytorch_version": str,
    "cuda_version": str, "compliance": dict, "attribution": dict,
}
SEED_SCHEMA = ("val_loss", "val_bpb", "roundtrip_bpb", "sliding_bpb", "artifact_bytes", "steps",
               "step_avg_ms")
Found = Iterator[tuple[str, str]]


def published() -> dict[str, Any]:
    """Published results and the facts to judge them by."""
    return json.loads((HERE / "published.json").read_text(encoding="utf-8"))


class Folder:
    """A record folder, read; `mirror` stands in for files that a copy of a folder leaves out."""

    def __init__(self, path: Path) -> None:
        self.path, self.problem = path, ""
        self.submission = self.read_json("submission.json")
        self.mirror = self.read_json("source.json") if self.has("source.json") else {}
        self.names = {p.name for p in path.iterdir()} | set(self.mirror.get("other_files", ()))
        self.runs = [read_run(log) for log in find_logs(path)]

    def has(self, name: str) -> bool:
        """Whether the folder itself holds a file."""
        return (self.path / name).is_file()

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file; what is wrong with it goes to `problem`."""
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            self.problem = f"{name} is missing or no JSON ({error})"
            return {}
        if not isinstance(value, dict):
            self.problem = f"{name} holds no object"
            return {}
        return value

    @property
    def ours(self) -> bool:
        """Whether runs of this repository's train_gpt.py are claimed."""
        return any(run.ours for run in self.runs)

    @property
    def is_record(self) -> bool:
        """Whether the folder claims the record track."""
        track = self.submission.get("track") or self.mirror.get("folder") or str(self.path.parent)
        place = self.path.resolve().parent.name
        track = place if place.startswith("track_") else track
        return "non_record" not in str(track) and "non-record" not in str(track)

    @cached_property
    def claims(self) -> dict[int, dict[str, Any]]:
        """What submission.json says of each seed."""
        for key in ("seed_results", "seeds"):
            results = self.submission.get(key)
            if isinstance(results, dict):
                return {int(seed): claim for seed, claim in results.items()
                        if isinstance(claim, dict) and str(seed).isdigit()}
        return {}

    @cached_property
    def code_bytes(self) -> int | None:
        """Bytes of train_gpt.py, measured; None where it is not known."""
        if self.has("train_gpt.py"):
            return (self.path / "train_gpt.py").stat().st_size
        return self.mirror.get("code_bytes") or None

    def runs_of(self, seed: int) -> list[Run]:
        """The logs of a seed."""
        return [run for run in self.runs if run.seed == seed]


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def same(claimed: Any, logged: float | None) -> bool:
    """Whether a number is a logged one, to the last digit that is given, three at least."""
    if not is_number(claimed) or logged is None:
        return False
    digits = len(repr(claimed).partition(".")[2]) if "e" not in repr(claimed) else 8
    return abs(claimed - logged) < 10.0 ** -min(max(digits, 3), 8) * 1.0001


def check_submission(folder: Folder) -> Found:
    """submission.json can be read and names author, name, date, score and bytes."""
    if folder.problem:
        yield "submission.json", folder.problem
        return
    for key, kind in REQUIRED.items():
        value = folder.submission.get(key)
        given = isinstance(value, str) and value.strip()
        if not (is_number(value) if kind in (int, float) else given):
            yield "submission.json", f"{key} is {value!r}, expected {kind.__name__}"


def check_schema(folder: Folder) -> Found:
    """submission.json holds what ours hold, for every seed."""
    for key, kind in SCHEMA.items():
        value = folder.submission.get(key)
        good = is_number(value) if kind in (int, float) else isinstance(value, kind)
        if not good:
            yield "submission.json", f"{key} is {value!r}, expected {kind.__name__}"
    for seed, claim in folder.claims.items():
        missing = [key for key in SEED_SCHEMA if not is_number(claim.get(key))]
        if missing:
            yield f"submission.json seed {seed}", f"no {', '.join(missing)}"
        if not re.fullmatch(r"[0-9a-f]{64}", str(claim.get("artifact_sha256"))):
            yield f"submission.json seed {seed}", "artifact_sha256 is no SHA-256"
    for key, value in dict(folder.submission.get("compliance") or {}).items():
        if isinstance(value, str) or value is False:
            yield f"submission.json compliance.{key}", f"{value!r} is not a yes or a number"


def check_files(folder: Folder) -> Found:
    """README.md, train_gpt.py and a training log are there."""
    for name in ("README.md", "train_gpt.py"):
        if name not in folder.names:
            yield name, "missing"
    if not folder.runs:
        yield "train_seed<k>.log", "no training log"


def check_evidence(folder: Folder) -> Found:
    """What it takes to run and audit it again: requirements, curves, the ledger of bytes."""
    for name in ("requirements.txt", "curves.png", "manifest.json"):
        if name not in folder.names:
            yield name, "missing"
        elif folder.has(name) and not (folder.path / name).stat().st_size:
            yield name, "empty"


def check_ledger(folder: Folder) -> Found:
    """The ledger is exact, its totals are its shards', and its tokenizer is in the folder."""
    if not folder.has("manifest.json"):
        return
    manifest = folder.read_json("manifest.json")
    tokenizer = manifest.get("tokenizer") or {}
    for split in ("train", "val"):
        count = (manifest.get("totals") or {}).get(split) or {}
        shards = [s for name, s in manifest["shards"].items() if f"_{split}_" in name]
        summed = {key: sum(shard[key] for shard in shards) for key in ("tokens", "source_bytes")}
        if count.get("bad_documents") or not shards or any(
                count.get(key) != value for key, value in summed.items()):
            yield "manifest.json", f"totals of {split} {count}, its {len(shards)} shards {summed}"
    if tokenizer.get("byte_exact") is not True:
        yield "manifest.json", f"byte_exact of its tokenizer is {tokenizer.get('byte_exact')!r}"
    source = folder.path / Path(str(tokenizer.get("path"))).name
    digest = sha256(source) if source.is_file() else None
    if digest is None or digest != tokenizer.get("sha256"):
        yield "manifest.json", (f"made with a vocabulary of sha256 {tokenizer.get('sha256')}, "
                                f"{source.name} in the folder has {digest}")


def check_byte_table(folder: Folder) -> Found:
    """The byte table behind BPB is that of the vocabulary, token by token."""
    vocabularies = sorted(folder.path.glob("*.yaml"))
    if not vocabularies:
        return
    import retokenize_scylla

    try:
        vocabulary = retokenize_scylla.load_vocabulary(vocabularies[0])
        (path,) = folder.path.glob("*.meta.npz")
        with np.load(path, allow_pickle=False) as meta:
            right = (np.array_equal(meta["base_bytes"], vocabulary.base_bytes())
                     and not meta["has_leading_space"].any()
                     and [*meta["is_boundary_token"].nonzero()[0]] == [vocabulary.bos_id])
    except Exception as error:  # of any kind: the files are a stranger's
        yield "*.meta.npz", f"no byte table of {vocabularies[0].name} can be read ({error!r})"
        return
    if not right:
        yield path.name, f"counts other bytes than the tokens of {vocabularies[0].name} have"


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_seeds(folder: Folder) -> Found:
    """A record has three seeds; every claimed seed has a log, every log's seed is claimed."""
    logged = {run.seed for run in folder.runs}
    listed = folder.submission.get("seeds")
    claimed = set(folder.claims) | set(listed if isinstance(listed, list) else [])
    for seed in sorted(s for s in claimed - logged if isinstance(s, int)):
        yield "submission.json", f"seed {seed} is claimed, but no log is of it"
    for run in folder.runs:
        if claimed and run.seed not in claimed:
            yield run.path.name, f"of seed {run.seed}, which submission.json does not name"
        named = re.search(r"seed_?(\d+)", run.path.stem)
        if named and run.seed is not None and int(named[1]) != run.seed:
            yield run.path.name, f"its name says seed {named[1]}, its text seed {run.seed}"
    if folder.is_record and len(logged) < RECORD_SEEDS:
        yield "train_seed<k>.log", f"logs of {len(logged)} seeds, at least {RECORD_SEEDS}"


def check_duplicates(folder: Folder) -> Found:
    """No two logs hold the same run."""
    seen: dict[tuple[Any, ...], str] = {}
    for run in filter(lambda run: run.losses, folder.runs):
        twin = seen.setdefault(run.losses, run.path.name)
        if twin != run.path.name:
            yield run.path.name, f"holds the same losses as {twin}, line by line"
    seen = {}
    for run in filter(lambda run: run.ours and run.headline, folder.runs):
        same_as = {seen.setdefault(mark, run.path.name) for mark in (
            run.headline.loss, folder.claims.get(run.seed, {}).get("artifact_sha256")) if mark}
        for twin in same_as - {run.path.name}:
            yield run.path.name, f"ends with the score or the artifact of {twin}"


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
    """Every run came to its end, in one piece."""
    for run in folder.runs:
        if run.ours and not run.finished:
            yield run.path.name, "does not end with final_int8_zlib_roundtrip_exact"
        elif not run.headline:
            yield run.path.name, "holds no final score"
        if run.resumed:
            yield run.path.name, "the run was resumed from a checkpoint"
        for conflict in run.conflicts if run.ours else ():
            yield run.path.name, f"says two things: {conflict}"
        said = run.summary.get("byte_audit"), run.summary.get("bytes_total")
        if run.ours and said != (run.audit, str(run.total_bytes)):
            yield run.path.name, f"its summary says {said}, its lines {run.audit, run.total_bytes}"


def known_scores(run: Run) -> list[Score]:
    """Scores that may be claimed for a run: its headline where ours, else any."""
    return [run.headline] if run.ours and run.headline else list(run.named.values())


def check_headline(folder: Folder) -> Found:
    """The last line is the score of the last mode that the settings enable, as its line says."""
    for run in filter(lambda run: run.ours and run.headline, folder.runs):
        enabled = [mode for mode in ("roundtrip", "sliding", "ttt", "ngram")
                   if mode in run.settings["EVAL_MODES"].split(",")
                   and run.settings.get(f"{mode.upper()}_ENABLED") != "0"]
        mode = run.summary.get("headline_mode")
        stage = run.scores.get(mode)
        if enabled[-1:] != [mode] or (stage and stage[:2]) != run.headline[:2]:
            yield run.path.name, (f"ends with {run.headline[:2]} as {mode}, enabled are {enabled}, "
                                  f"and that line says {stage and stage[:2]}")


def check_scores(folder: Folder) -> Found:
    """Scores and sizes of each seed are those of its log."""
    for seed, claim in folder.claims.items():
        for run in folder.runs_of(seed)[:1]:
            where = f"submission.json seed {seed}"
            for key in SCORED:
                logged = [getattr(s, key[4:]) for s in known_scores(run)]
                if key in claim and not any(same(claim[key], value) for value in logged):
                    yield where, (f"{key} {claim[key]}, but {run.path.name} says "
                                  f"{', '.join(map(str, logged)) or 'nothing'}")
            for key, stage in (("roundtrip_bpb", "roundtrip"), ("sliding_bpb", "sliding")):
                score = run.scores.get(stage)
                if key in claim and not same(claim[key], score and score.bpb):
                    yield where, f"{key} {claim[key]}, but the log says {score and score.bpb}"
            for key, logged, slack in (("steps", run.steps, 1),  # the field rounds in several
                                       ("step_avg_ms", run.step_avg_ms, 0.1)):  # ways
                if key in claim and logged and abs(claim[key] - logged) > slack:
                    yield where, f"{key} {claim[key]}, but {run.path.name} says {logged:.6g}"


def check_means(folder: Folder) -> Found:
    """The folder's score is the mean over its seeds, and the spread is theirs."""
    for key in SCORED:
        values = [claim[key] for claim in folder.claims.values() if is_number(claim.get(key))]
        claimed = folder.submission.get(key)
        if len(values) < 2:
            one = [getattr(score, key[4:]) for run in folder.runs for score in known_scores(run)]
            values = values or [run_score(run, key) for run in folder.runs if run.headline]
            if is_number(claimed) and one and not any(same(claimed, v) for v in one) and not same(
                    claimed, statistics.fmean(values)):
                yield "submission.json", f"{key} {claimed} is in no log"
            continue
        mean, spread = statistics.fmean(values), statistics.stdev(values)
        if is_number(claimed) and not same(claimed, mean):
            yield "submission.json", f"{key} {claimed}, but the seeds' mean is {mean:.8f}"
        claimed = folder.submission.get(f"{key}_std")
        either = (spread, statistics.pstdev(values))
        if is_number(claimed) and not any(same(claimed, s) for s in either):
            yield "submission.json", f"{key}_std {claimed}, but the seeds' is {spread:.8f}"


def run_score(run: Run, key: str) -> float:
    """val_loss or val_bpb of a run's headline."""
    return getattr(run.headline, key[4:])


def check_sizes(folder: Folder) -> Found:
    """Code and artifact of every seed add up and fit; sizes are measured where files are there."""
    totals = []
    for run in folder.runs:
        artifact, total = run.artifact_bytes, run.total_bytes
        model = folder.path / f"model_seed{run.seed}.ptz"
        if model.is_file() and model.stat().st_size != artifact:
            yield model.name, f"{model.stat().st_size} bytes, but its log says {artifact}"
        if None not in (artifact, total, run.code_bytes) and total != artifact + run.code_bytes:
            yield run.path.name, f"total {total} is not artifact {artifact} + code {run.code_bytes}"
        if total is None:
            yield run.path.name, "holds no total size"
            continue
        totals.append(total)
        if total > CAP_BYTES:
            yield run.path.name, f"total {total} bytes, {total - CAP_BYTES} over {CAP_BYTES}"
        claimed = folder.claims.get(run.seed, {}).get("artifact_bytes")
        if claimed is not None and claimed not in (artifact, total):
            yield f"submission.json seed {run.seed}", (
                f"artifact_bytes {claimed}, but the log says {artifact} (with code {total})")
    for claim in (folder.submission.get("bytes_total"),
                  *(c.get("artifact_bytes") for c in folder.claims.values())):
        if is_number(claim) and claim > CAP_BYTES:
            yield "submission.json", f"claims {claim} bytes, {claim - CAP_BYTES} over {CAP_BYTES}"
    claimed = folder.submission.get("bytes_total")
    if totals and is_number(claimed) and claimed not in totals:
        yield "submission.json", f"bytes_total {claimed}, but the logs say {totals}"
    elif totals and folder.ours and claimed != max(totals):
        yield "submission.json", f"bytes_total {claimed} is not the largest, {max(totals)}"


def check_code(folder: Folder) -> Found:
    """The code in the folder is the code that ran."""
    size = folder.code_bytes
    for run in folder.runs:
        if size and run.code_bytes and run.code_bytes != size:
            yield run.path.name, f"ran code of {run.code_bytes} bytes, train_gpt.py has {size}"
    claimed = folder.submission.get("bytes_code", folder.submission.get("code_bytes"))
    if size and is_number(claimed) and claimed != size:
        yield "submission.json", f"bytes_code {claimed}, train_gpt.py has {size}"


def check_code_text(folder: Folder) -> Found:
    """Each log names the file's hash and begins with its source."""
    if not folder.has("train_gpt.py"):
        return
    digest = sha256(folder.path / "train_gpt.py")
    try:
        source = pack.unpack((folder.path / "train_gpt.py").read_bytes()).rstrip()
    except pack.PackError as error:
        yield "train_gpt.py", str(error)
        return
    for run in folder.runs:
        if run.code_sha256 != digest:
            yield run.path.name, f"of code with sha256 {run.code_sha256}, train_gpt.py has {digest}"
        if run.source.rstrip() != source:
            yield run.path.name, "begins with other source than train_gpt.py runs"


def check_clock(folder: Folder) -> Found:
    """Training took at most 600 s in every run."""
    for run in folder.runs:
        if run.train_ms and run.train_ms > CAP_MS:
            yield run.path.name, f"trained for {run.train_ms / 1e3:.3f} s, at most {CAP_MS / 1e3:g}"
    for seed, claim in folder.claims.items():
        spent = claim.get("train_time_ms")
        if is_number(spent) and spent > CAP_MS and not folder.runs_of(seed):
            yield f"submission.json seed {seed}", f"trained for {spent / 1e3:.3f} s, at most 600"


def check_evaluation_clock(folder: Folder) -> Found:
    """Evaluation took at most 600 s in every run."""
    for run in folder.runs:
        if (run.eval_seconds or 0) > CAP_EVAL_SECONDS:
            yield run.path.name, f"evaluated for {run.eval_seconds:.1f} s, at most 600"


def check_hardware(folder: Folder) -> Found:
    """Eight ranks; ours say on which GPU."""
    for run in folder.runs:
        if run.world not in ((8,) if run.ours else (None, 8)):
            yield run.path.name, f"ran on {run.world} ranks, a record on 8"
        if run.ours and "H100" not in (run.device or ""):
            yield run.path.name, f"ran on {run.device}, a record on 8xH100"


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
        if re.search(rf"(?<!no[_ -]){word}", text):
            yield "submission.json", f"names a method that is not compliant: {word}"


def check_audit(folder: Folder) -> Found:
    """The bytes of BPB are proven: each log says exact, and they are the ledger's."""
    manifest = folder.read_json("manifest.json") if folder.has("manifest.json") else {}
    ledger = (manifest.get("totals") or {}).get("val")
    counted = {run.audited_bytes for run in folder.runs}
    for run in folder.runs:
        if run.audit != "exact":
            yield run.path.name, f"byte_audit:{run.audit or 'not in the log'}"
        elif ledger and run.audited_bytes != ledger.get("source_bytes"):
            yield run.path.name, (f"scored {run.audited_bytes} bytes, manifest.json holds "
                                  f"{ledger.get('source_bytes')}")
        elif ledger and run.headline:
            expected = (run.headline.loss * (ledger["tokens"] - 1)
                        / math.log(2) / run.audited_bytes)
            if abs(expected - run.headline.bpb) > 1e-6:
                yield run.path.name, (f"val_bpb {run.headline.bpb}, but its loss over the "
                                      f"ledger's tokens and bytes is {expected:.8f}")
    if len(counted) > 1:
        yield "train_seed<k>.log", f"the logs count different bytes: {counted}"


def check_denominator(folder: Folder) -> Found:
    """BPB is over the bytes of the FineWeb validation text."""
    counted, factor = denominator(folder)
    if counted and factor is None:
        yield "val_bpb", f"is of another text: {counted}"
    elif factor and abs(factor - 1) > 1e-3:
        bpb = folder.submission.get("val_bpb")
        yield "val_bpb", (f"counts {counted} bytes, {factor - 1:+.2%}" + (
            f"; over the true ones {bpb} is {bpb * factor:.4f}" if is_number(bpb) else ""))


def denominator(folder: Folder) -> tuple[str, float | None]:
    """What a folder counts, and that over the true bytes of FineWeb's validation text.

    From the logs' tokens, else from the bytes per token of the tokenizer that it names.
    """
    facts = published()["facts"]
    true_bytes = facts["validation_bytes"]
    found = [run.counted_bytes for run in folder.runs if run.counted_bytes]
    for row in facts["other_texts"]:
        if row["tokens"] in [run.val_tokens for run in folder.runs]:
            return row["note"], None
    if found:
        worst = max(found, key=lambda count: abs(count - true_bytes))
        return f"{worst:.0f} of {true_bytes}", worst / true_bytes
    for row in facts["tokenizers"]:
        text = json.dumps(folder.submission).lower()
        claims = [c for c in (folder.submission, *folder.claims.values())
                  if all(is_number(c.get(key)) for key in SCORED)]
        if claims and re.search(row["name"], text):
            implied = claims[0]["val_loss"] / math.log(2) / claims[0]["val_bpb"]
            return (f"{implied:.4f} of {row['bytes_per_token']:.4f} per token",
                    implied / row["bytes_per_token"])
    return "", None


def check_attribution(folder: Folder) -> Found:
    """Who found what is said, for everything that the runs use."""
    given = folder.submission.get("attribution")
    if not isinstance(given, dict) or not given:
        yield "submission.json", "no attribution"
        return
    for technique, who in generated.attribution(
            folder.runs[0].settings).items() if folder.ours else ():
        if given.get(technique) != who:
            yield "submission.json", f"attribution of {technique!r} is not {who!r}"


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """A JSON object's values by dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part, inner in value.items()
            for key, leaf in flat(inner, f"{name}.{part}".strip(".")).items()}


def check_generated(folder: Folder) -> Found:
    """submission.json and README.md are, to the letter, what the logs give.

    README.md may say more; its statistics and its command are not compared.
    """
    runs = sorted(folder.runs, key=lambda run: run.seed or 0)
    if not all(run.ours and run.finished and run.headline for run in runs) or not runs:
        return
    typed = {key: folder.submission.get(key) for key in TYPED}
    try:
        datetime.date.fromisoformat(typed["date"])
    except (TypeError, ValueError):
        yield "submission.json", f"date {typed['date']!r} is no YYYY-MM-DD"
    place = folder.path.resolve().parent.name
    if place.startswith("track_") and typed["track"] != place:
        yield "submission.json", f"track {typed['track']!r}, but the folder is in {place}"
    name = f"{typed['date']}_{typed['name']}".replace(" ", "_")
    if folder.path.resolve().name != name:
        yield "submission.json", f"date and name make {name}, but the folder has another name"
    models = {run.seed: folder.path / f"model_seed{run.seed}.ptz" for run in runs}
    hashes = {seed: sha256(path) if path.is_file() else
              folder.claims.get(seed, {}).get("artifact_sha256") for seed, path in models.items()}
    about = generated.submission(runs, typed, hashes)
    expected, given = flat(about), flat(folder.submission)
    for name in dict.fromkeys((*expected, *given)):
        if expected.get(name) != given.get(name):
            yield "submission.json", (f"{name} {given.get(name, 'missing')}, but the logs give "
                                      f"{expected.get(name, 'nothing')}")
    path = folder.path / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if folder.has(path.name) else ""
    for line in generated.readme(runs, about, "").splitlines() if text else ():
        if line not in text.splitlines() and not line.startswith("DATA_PATH="):
            yield "README.md", f"does not hold the line {line!r}"


class Rule(NamedTuple):
    """One rule: what it asks, and what to do about a folder that breaks it."""

    name: str
    check: Callable[[Folder], Found]
    remedy: str
    record: bool = False  # of the record track only
    ours: bool = False  # asks for evidence that only our generator always gives


AGAIN = "make the folder again with make_record.py make"
RULES = (
    Rule("submission", check_submission, "write the missing field; see records/README.md"),
    Rule("files", check_files, "add the file: a folder without it cannot be checked"),
    Rule("seeds", check_seeds, "add the log of every seed that counts, and name each seed"),
    Rule("duplicates", check_duplicates, "every seed needs a run of its own; run it again"),
    Rule("configuration", check_configuration, "run every seed with the same settings on the same "
         "machine; only SEED and names of files may differ"),
    Rule("complete", check_complete, "use a run that ended by itself and was not resumed"),
    Rule("scores", check_scores, "copy the number from the log, or " + AGAIN),
    Rule("means", check_means, "compute it from the seeds, or " + AGAIN),
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
    Rule("schema", check_schema, AGAIN, ours=True),
    Rule("evidence", check_evidence, AGAIN, ours=True),
    Rule("ledger", check_ledger, "re-tokenize with retokenize_scylla.py, which writes it, and run "
         "again", ours=True),
    Rule("byte table", check_byte_table, "put in the .meta.npz that retokenize_scylla.py wrote "
         "with this vocabulary; if it is another, score again", ours=True),
    Rule("headline", check_headline, "run again; the mode is fixed by the settings", ours=True),
    Rule("code text", check_code_text, "run the seed again with this train_gpt.py", ours=True),
    Rule("audit", check_audit, "re-tokenize with retokenize_scylla.py, which writes the ledger, "
         "and score again", ours=True),
    Rule("generated", check_generated, AGAIN, ours=True),
    Rule("attribution", check_attribution, "add it from records/credits.json, or " + AGAIN,
         ours=True),
)


class Finding(NamedTuple):
    """A rule that a folder breaks."""

    rule: Rule
    where: str
    what: str

    def __str__(self) -> str:
        whose = " (our rule)" if self.rule.ours else ""
        return f"{self.rule.name}{whose}: {self.where}: {self.what}. Remedy: {self.rule.remedy}"


def verify(path: Path) -> list[Finding]:
    """Everything that is wrong with a record folder; empty if nothing is."""
    folder = Folder(path)
    found = []
    for rule in RULES:
        if rule.record and not folder.is_record:
            continue
        if rule.check is check_denominator and folder.ours and not folder.is_record:
            continue  # a demonstration on other text; `audit` proves its bytes
        try:
            found += [Finding(rule, where, what) for where, what in rule.check(folder)]
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            found.append(Finding(rule, "the folder", f"something in it has no form that this rule "
                                 f"can read ({error!r})"))
    return found
