"""What the logs of runs say: one reader for our logs and for the field's.

    run = read_run(Path("logs/seed42.txt"))      scores, clocks, bytes, curves of one run

Every number that the tools of records/ print comes from here or from the size of a file. Our own
logs begin with the code, then environment and settings; published logs are uneven, and what one
does not say is None, never a guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import dropwhile
from pathlib import Path
from typing import Any, NamedTuple

NUMBER = r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)"
TRAIN = re.compile(rf"(?:step:)?(\d+)/\d+ train_loss: ?{NUMBER}(?: train_time: ?{NUMBER}(ms|m))?")
VAL = re.compile(rf"(?:step:)?(\d+)/\d+ val_loss: ?{NUMBER} val_bpb: ?{NUMBER}"
                 rf"(?: train_time: ?{NUMBER}(ms|m))?")
SCORE = re.compile(r"([A-Za-z][A-Za-z0-9_ -]*?)(_exact)? (?:non_compliant |stride:\d+ )?"
                   rf"val_loss: ?{NUMBER} val_bpb: ?{NUMBER}")
CLOCK = re.compile(r"(?:train_clock slowest_rank|gptq_calibration train_time):(\d+)ms")
STOP = re.compile(r"stopping_early: \S+ train_time: ?(\d+)ms step: ?(\d+)/")
SETTING = re.compile(r"([A-Z][A-Z0-9_]+)=(.*)$")
SUMMARY = re.compile(r"([a-z][a-z0-9_]*): (\S+)$")
CHUNK = re.compile(r"\s*ttt_chunk \[(\d+)/(\d+)\]")
FACTS = {  # name -> pattern of the line; the last one in the log counts
    "seed": r"seed: ?(\d+)$",
    "params": r"model_params: ?(\d+)",
    "world": r"world_size: ?(\d+)",
    "code_bytes": r"Code size(?: \(compressed\))?: (\d+) bytes",
    "artifact_bytes": r"Serialized model [^\s:]+: (\d+) bytes",
    "total_bytes": r"Total submission size(?: [^\s:]+)?: (\d+) bytes",
    "val_tokens": r"val_loader:.* tokens:(\d+)",
    "audited_bytes": r"byte_audit:\w+ bytes:(\d+)",
}
TEXTS = {
    "audit": r"byte_audit:(\w+)",
    "code_sha256": r"code_sha256:(\w{64})",
    "device": r"run_id:.* device:(.+) dtype:",
    "torch": r"(?:python .* torch|Running PyTorch) (\S+)",
    "cuda": r"cuda (\S+) _CudaDeviceProperties",
    "run_id": r"run_id:(\S+)",
}
FACT_PATTERNS = {name: re.compile(pattern) for name, pattern in (FACTS | TEXTS).items()}
STAGES = (  # pattern of a score's name -> stage of the run
    ("headline", r"final_int8_zlib_roundtrip"),
    ("post_ema", r".*post[_-]ema"),
    ("slot", r".*slot"),
    ("ngram", r".*ngram"),
    ("ttt", r".*ttt"),
    ("sliding", r".*sliding"),
    ("roundtrip", r".*(roundtrip|quantized)"),
)


PER_RUN = {"SEED", "RUN_ID", "ARTIFACT_PATH", "SCORES_PATH", "DATA_PATH"}  # may differ by seed


class RecordError(Exception):
    """The user's input cannot be used; the message says what, the value and the remedy."""


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class Score(NamedTuple):
    """A line with a loss and its BPB."""

    loss: float
    bpb: float
    eval_ms: float | None = None
    compliant: bool = True


class Point(NamedTuple):
    """A step of the curves; `ms` since the start of training, None where the log has no time."""

    step: int
    loss: float
    bpb: float | None = None
    ms: float | None = None
    lr_scale: float | None = None


@dataclass
class Run:
    """One log, read. Facts that it does not hold are None."""

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)  # by stage
    named: dict[str, Score] = field(default_factory=dict)  # by the name on the line
    train: list[Point] = field(default_factory=list)
    val: list[Point] = field(default_factory=list)
    chunks: list[tuple[int, int]] = field(default_factory=list)  # (chunk, of) in order of scoring
    settings: dict[str, str] = field(default_factory=dict)
    summary: dict[str, str] = field(default_factory=dict)
    source: str = ""  # the code, as the log holds it
    resumed: bool = False
    finished: bool = False  # the headline is the last line
    stopped: tuple[float, int] | None = None  # (ms, step) of stopping_early
    conflicts: list[str] = field(default_factory=list)  # of what it says two things
    clocks: list[float] = field(default_factory=list)  # ms: the slowest rank's, after calibration

    def __getattr__(self, name: str) -> Any:
        """A fact by its name, or None."""
        if name in FACT_PATTERNS:
            return self.facts.get(name)
        raise AttributeError(name)

    def say(self, place: dict[str, Any], name: str, value: Any) -> None:
        """Enter what a line says; it is a conflict if a line before it says something else."""
        if place.setdefault(name, value) != value:
            self.conflicts.append(f"{name} {place[name]} and {value}")
        place[name] = value

    @property
    def seed(self) -> int | None:
        """The seed on the log's own line, else the number in the name of the file."""
        digits = re.findall(r"seed_?(\d+)", self.path.stem) or re.findall(r"\d+", self.path.stem)
        return self.facts.get("seed", int(digits[0]) if digits else None)

    @property
    def ours(self) -> bool:
        """Whether train_gpt.py of this repository wrote the log."""
        return bool(self.settings and self.facts.get("code_sha256"))

    @property
    def losses(self) -> tuple[Any, ...]:
        """All losses and scores, without times: no two runs have the same."""
        return (*((p.step, p.loss, p.bpb) for p in self.train + self.val),
                *((name, score.loss, score.bpb) for name, score in self.named.items()))

    @property
    def stepped_ms(self) -> float | None:
        """Milliseconds to the last step."""
        times = [p.ms for p in self.train + self.val if p.ms is not None]
        return max(times + [self.stopped[0]] if self.stopped else times, default=None)

    @property
    def train_ms(self) -> float | None:
        """Milliseconds of training, calibration included: the latest time on any line."""
        times = [self.stepped_ms or 0.0, *self.clocks, float(self.summary.get("train_ms", 0))]
        return max(times) or None

    @property
    def steps(self) -> int | None:
        """Steps of training."""
        seen = [p.step for p in self.train + self.val]
        return max(seen + [self.stopped[1]] if self.stopped else seen, default=None)

    @property
    def step_avg_ms(self) -> float | None:
        """Milliseconds a step, without calibration."""
        return self.stepped_ms / self.steps if self.stepped_ms and self.steps else None

    @property
    def eval_seconds(self) -> float | None:
        """Seconds of all evaluation of the artifact: the summary's or the lines' sum, if longer."""
        spent = [s.eval_ms for name, s in self.named.items() if s.eval_ms and "ema" not in name]
        return max(sum(spent) / 1e3, float(self.summary.get("seconds_eval", 0))) or None

    @property
    def mode(self) -> str | None:
        """The last mode that the settings of our run enable: the one whose score is the run's."""
        modes = self.settings.get("EVAL_MODES", "").split(",")
        return next((mode for mode in ("ngram", "ttt", "sliding", "roundtrip") if mode in modes
                     and self.settings.get(f"{mode.upper()}_ENABLED") != "0"), None)

    @property
    def headline(self) -> Score | None:
        """The run's score: the line of its historical name where ours, else the last stage."""
        if self.ours:
            return self.scores.get("headline")
        order = ("ttt", "ngram", "sliding", "headline", "roundtrip")
        return next((self.scores[stage] for stage in order if stage in self.scores), None)

    @property
    def counted_bytes(self) -> float | None:
        """The denominator of BPB: as audited, else as the loss, the BPB and the tokens imply."""
        if self.audited_bytes:
            return float(self.audited_bytes)
        score = self.headline
        if not score or not self.val_tokens:
            return None
        return self.val_tokens * score.loss / (math.log(2) * score.bpb)

    @property
    def bpb_per_nat(self) -> float | None:
        """BPB of one nat per token with this tokenizer and text."""
        return self.headline.bpb / self.headline.loss if self.headline else None


def read_run(path: Path) -> Run:
    """Read a log; raises RecordError if there is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}; name a log that exists") from error
    lines = text.split("\n")  # not at form feeds, which source may hold
    run = Run(path)
    start = next((i for i, line in enumerate(lines) if re.match(r"python \d", line)), 0)
    code = [*dropwhile(lambda line: line.startswith("demo: "), lines[:start])]  # built before it
    run.source = "\n".join(code) + "\n" if code else ""
    for line in lines[start:]:
        read_line(run, line)
    last = next((line for line in reversed(lines) if line.strip()), "")
    run.resumed = run.resumed or run.summary.get("resumed", "0") not in ("0", "False")
    run.finished = last.startswith("final_int8_zlib_roundtrip_exact ")
    return run


def milliseconds(number: str | None, unit: str | None) -> float | None:
    """A time of the log, in ms; public logs also count minutes."""
    return float(number) * {"ms": 1.0, "m": 6e4}[unit] if number else None


def read_line(run: Run, line: str) -> None:
    """Enter one line of a log into the run."""
    for pattern, enter in LINES:
        if match := pattern.match(line):
            enter(run, match)
            break
    run.resumed = run.resumed or bool(re.match(r"resumed step:0*[1-9]", line))
    for name, pattern in FACT_PATTERNS.items():
        if match := pattern.match(line):
            run.say(run.facts, name, int(match[1]) if name in FACTS else match[1])


def read_train(run: Run, match: re.Match[str]) -> None:
    """Enter a step of training."""
    step, loss, time, unit = match.groups()
    scale = re.search(rf" lr_scale:{NUMBER}", match.string)
    run.train.append(Point(int(step), float(loss), None, milliseconds(time, unit),
                           float(scale[1]) if scale else None))


def read_val(run: Run, match: re.Match[str]) -> None:
    """Enter a validation while training."""
    step, loss, bpb, time, unit = match.groups()
    run.val.append(Point(int(step), float(loss), float(bpb), milliseconds(time, unit)))


def read_stop(run: Run, match: re.Match[str]) -> None:
    """Enter the step at which the clock ended training."""
    run.stopped = float(match[1]), int(match[2])


def read_score(run: Run, match: re.Match[str]) -> None:
    """Enter a line with a loss and a BPB; an exact one replaces its rounded twin."""
    line, (name, exact, loss, bpb) = match.string, match.groups()
    time = re.search(r"eval_time: ?(\d+)ms", line)
    before = run.named.get(name)
    spent = float(time[1]) if time else before.eval_ms if before and exact else None
    score = Score(float(loss), float(bpb), spent, "non_compliant" not in line
                  and (before is None or before.compliant))
    if before and max(abs(a - b) for a, b in zip(score[:2], before[:2], strict=True)) > 1e-4:
        run.conflicts.append(f"{name} {before.bpb} and {score.bpb}")
    run.named[name] = score
    stage = next((stage for stage, pattern in STAGES if re.match(pattern, name)), None)
    if stage:
        run.scores[stage] = score


LINES: tuple[tuple[re.Pattern[str], Callable[[Run, re.Match[str]], None]], ...] = (
    (TRAIN, read_train), (VAL, read_val), (SCORE, read_score), (STOP, read_stop),
    (CLOCK, lambda run, match: run.clocks.append(float(match[1]))),
    (CHUNK, lambda run, match: run.chunks.append((int(match[1]), int(match[2])))),
    (SETTING, lambda run, match: run.say(run.settings, *match.groups())),
    (SUMMARY, lambda run, match: run.say(run.summary, *match.groups())),
)  # of these a line is the first that it matches


def find_logs(folder: Path) -> list[Path]:
    """Logs of a record folder, wherever in it they are."""
    return sorted(p for p in folder.rglob("*") if p.suffix == ".log"
                  or p.suffix == ".txt" and p.name.lower().startswith("train"))


def find_run_log(name: str) -> Path:
    """The text log of a run: a path, or the RUN_ID of one under logs/."""
    for path in (Path(name), Path(name).with_suffix(".txt"), Path("logs") / f"{name}.txt"):
        if path.is_file() and path.suffix in (".txt", ".log"):
            return path
    raise RecordError(f"{name} is no log, folder or published result; give logs/<RUN_ID>.txt, a "
                      "RUN_ID of ./logs, a folder, or as much of a published name as is only its")
