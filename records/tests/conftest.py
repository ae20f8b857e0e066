"""Three tiny runs, as the record tools read them, and the folder made of them."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

import harness as h
import make_record

NAME = "2030-01-02_Tiny"


def tiny_run(script: Path, seed: int, data: Path) -> tuple[ModuleType, Path]:
    """A train_gpt.py, packed or not, as a module, and the log of a tiny run of it beside it.

    The run has the name that run_8xh100.sh gives it.
    """
    spec = importlib.util.spec_from_file_location(f"script_{script.parent.name}", script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    name = f"seed{seed}"
    assert h.run_main(script.parent, module, data_path=str(data), seed=seed, run_id=name,
                      artifact_path=f"{name}.ptz", ttt_chunk_tokens=64)[0] == 0
    return module, script.parent / "logs" / f"{name}.txt"


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> tuple[Path, Path, list[Path]]:
    """Three tiny runs of a copy of the script: (its path, data, logs)."""
    folder = tmp_path_factory.mktemp("runs")
    code, vocabulary = folder / "train_gpt.py", folder / "tiny.yaml"
    shutil.copy(h.SCRIPT, code)
    vocabulary.write_bytes(h.vocabulary(case="ascii"))
    for seed, (split, count) in enumerate((("train", 60), ("val", 12))):
        documents = h.write_documents(folder / f"{split}.jsonl", h.texts(count, seed))
        h.retokenized(documents, vocabulary, split, folder / "data")
    (folder / "data" / "other.yaml").write_bytes(h.vocabulary([]))  # which the ledger does not name
    return code, folder / "data", [tiny_run(code, s, folder / "data")[1] for s in (42, 1337, 2024)]


@pytest.fixture(scope="session")
def packed(runs, tmp_path_factory) -> tuple[Path, ModuleType, Path]:
    """The packed script and a tiny run of it: (its path, module, log)."""
    script = tmp_path_factory.mktemp("packed") / "train_gpt.py"
    script.write_bytes(h.tool("pack").pack(h.SCRIPT.read_text()))
    return script, *tiny_run(script, 42, runs[1])


def make(code: Path, logs: list[Path], records: Path, *more: str) -> int:
    """Exit code of `make` on runs."""
    return make_record.main(
        ["make", "--name", "Tiny", "--author", "A. Nobody", "--github-id", "nobody", "--date",
         "2030-01-02", "--code", str(code), "--records", str(records), *more, *map(str, logs)])


@pytest.fixture(scope="session")
def made_folder(runs, tmp_path_factory) -> Path:
    """A record folder made of the tiny runs, artifacts included."""
    records = tmp_path_factory.mktemp("records")
    assert make(*runs[::2], records, "--track", "track_non_record_16mb", "--artifacts") == 0
    return records / "track_non_record_16mb" / NAME
