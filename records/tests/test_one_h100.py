"""records/one_h100/run.py: the protocol rehearsed, its time limit, and the committed results."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "records" / "one_h100" / "run.py"


@pytest.fixture(scope="module")
def run():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("one_h100_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def protocol(run, folder: Path, limit: float = math.inf):
    """A protocol that has started nothing."""
    options = argparse.Namespace(rehearse=True, out=folder / "out", limit=limit, set=[], only=[])
    (folder / "work").mkdir()
    return run.Protocol(options, folder / "work")


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_ended_and_kept(run, tmp_path, capfd):
    """What each part has printed is in the summary; once time is up, no other part starts."""
    p = protocol(run, tmp_path, 4.0)
    code = "import time; print('begun', flush=True); time.sleep({})"
    began = time.monotonic()
    for name, seconds in (("quick", 0), ("slow", 60), ("late", 0)):
        p.run(name, [sys.executable, "-c", code.format(seconds)], {})
    parts = json.loads((p.out / "summary.json").read_text())["parts"]
    assert time.monotonic() - began < 20 and [*parts] == ["quick", "slow"]
    assert parts["quick"]["exit_code"] == 0 and "timed_out" not in parts["quick"]
    assert parts["slow"]["timed_out"] and parts["slow"]["last_lines"] == ["begun"]
    assert parts["slow"]["exit_code"] and (p.out / "logs.tar.gz").exists()
    assert "[late] not started" in capfd.readouterr().out


def test_an_interrupted_part_leaves_no_process(run, tmp_path, monkeypatch):
    """Ctrl-C ends the part that runs, whose process has a group of its own."""
    p, wait, started = protocol(run, tmp_path), subprocess.Popen.wait, []

    def interrupted(process, timeout=None):
        if process in started:
            return wait(process, timeout)
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        p.run("long", [sys.executable, "-c", "import time; time.sleep(60)"], {})
    assert started[0].poll() is not None


def test_only_the_protocol_sets_what_is_run(run, tmp_path, monkeypatch):
    """A setting that happens to be in the environment cannot change a measurement."""
    monkeypatch.setenv("MATRIX_LR", "9")
    p = protocol(run, tmp_path)
    code = "import os; print(os.environ.get('MATRIX_LR'), os.environ['SEED'])"
    p.run("env", [sys.executable, "-c", code], {"SEED": "3"})
    assert p.summary["parts"]["env"]["last_lines"] == ["None 3"]
    assert not {"MATRIX_LR"} & set(p.settings(**run.PARTS["steps"]))


@pytest.mark.parametrize("folder", sorted(SCRIPT.parent.glob("20*_*")), ids=lambda f: f.name)
def test_tables_of_a_result_are_those_of_its_summary(run, folder, tmp_path):
    """README.md of a committed folder is what `report` makes of its summary.json."""
    (tmp_path / "summary.json").write_bytes((folder / "summary.json").read_bytes())
    run.report(tmp_path)
    assert (folder / "README.md").read_text("utf-8") == (tmp_path / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """Every part on a CPU: all phases, every score, the artifact reloaded, the tables made."""
    subprocess.run([sys.executable, SCRIPT, "--rehearse", "--out", tmp_path, "--only",
                    "steps", "train", "profile", "frontier", "--set", "VAL_TOKENS_LIMIT=4000"],
                   check=True)
    parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert {name: part["exit_code"] for name, part in parts.items()} == dict.fromkeys(parts, 0)
    phases = {name: [(e["recur"], e["qat"]) for e in part["primed"]]
              for name, part in parts.items() if "primed" in part}
    assert phases == dict(steps=[(False, False), (True, False)],
                          frontier=[(False, False), (True, False)],
                          train=[(True, False), (True, True)])
    assert [e["mode"] for e in parts["train"]["final"]] == ["roundtrip", "sliding", "ttt"]
    assert [e["mode"] for e in parts["frontier"]["final"]] == ["roundtrip", "ttt"]
    assert parts["steps"]["losses"][-1][1] < parts["steps"]["losses"][0][1]
    assert set(parts["profile"]["profile"]) == {"inductor", "off", "on"}
    assert str(tmp_path) not in (tmp_path / "README.md").read_text()
