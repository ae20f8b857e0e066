"""A record folder, ours or anybody's: what it claims, the logs in it, and the files beside them."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from runs import Run, find_logs, read_run


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Folder:
    """A record folder, read; `mirror` stands in for files that a copy of a folder leaves out."""

    def __init__(self, path: Path) -> None:
        self.path, self.problem = path, ""
        self.submission = self.read_json("submission.json")
        self.mirror = self.read_json("source.json") if self.has("source.json") else {}
        self.names = {p.name for p in path.iterdir()} | set(self.mirror.get("other_files", ()))
        self.left_out = [name for name in self.mirror.get("other_files", ()) if name.endswith(
            (".log", ".txt")) and name != "requirements.txt"]  # logs that the copy lacks
        self.runs = without_copies([read_run(log) for log in find_logs(path)])

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
    def is_record(self) -> bool:
        """Whether the folder claims the record track."""
        track = self.submission.get("track") or self.mirror.get("folder") or str(self.path.parent)
        place = self.path.resolve().parent.name
        track = place if place.startswith("track_") else track
        return "non_record" not in str(track) and "non-record" not in str(track)

    @property
    def date(self) -> str:
        """The day in the folder's name, YYYY-MM-DD."""
        return self.path.resolve().name[:10]

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
    def claimed_runs(self) -> list[Run]:
        """One log for each seed that is claimed; of every seed, if none is named."""
        seeds = set(self.claims) or {run.seed for run in self.runs}
        return [*{run.seed: run for run in self.runs if run.seed in seeds}.values()]

    @cached_property
    def code_bytes(self) -> int | None:
        """Bytes of train_gpt.py, measured; None where it is not known."""
        if self.has("train_gpt.py"):
            return (self.path / "train_gpt.py").stat().st_size
        return self.mirror.get("code_bytes") or None


def without_copies(runs: list[Run]) -> list[Run]:
    """Runs without the copies of a log: those of the same seed, or of none, and the same losses."""
    kept = {(run.losses or run.path, run.seed): run for run in runs}
    seeded = {losses for losses, seed in kept if seed is not None}
    return [run for (losses, seed), run in kept.items() if seed is not None
            or losses not in seeded]
