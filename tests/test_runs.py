"""Whole runs: the log, the files that a run leaves, several ranks."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import fields

import pytest

import harness as h
import train_gpt as t


def test_sizes_and_counts_in_the_log_are_those_of_the_files(script_run):
    """Measured from files, never computed."""
    folder, out = script_run
    code, artifact = (h.ROOT / "train_gpt.py").stat().st_size, (folder / "made.ptz").stat().st_size
    assert f"Code size: {code} bytes" in out
    assert re.search(rf"mixed_quant\+\w+: {artifact} bytes", out)
    assert f"Total submission size: {code + artifact} bytes" in out
    model = t.GPT(h.config(), h.table().is_boundary, h.runtime())
    assert f"model_params:{sum(p.numel() for p in model.parameters())}" in out
    assert "seed:1337" in out and "world_size:1 grad_accum_steps:1" in out


def test_the_log_files_hold_everything(script_run):
    """logs/<RUN_ID>.txt has the console, the code and the settings; .jsonl parses line by line."""
    folder, out = script_run
    text = (folder / "logs/made.txt").read_text(encoding="utf-8")
    for line in out.splitlines():
        assert f"{line}\n" in text
    assert (h.ROOT / "train_gpt.py").read_text(encoding="utf-8") in text
    for f in fields(t.Config):
        assert f"\n{f.name.upper()}=" in text
    events = [json.loads(line) for line in (folder / "logs/made.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert {"config", "bytes", "code", "machine", "primed", "train", "phase", "val", "calibration",
            "post_ema", "stream", "size", "final", "checkpoint", "clock", "summary"} == set(kinds)
    assert kinds[-1] == "summary" and kinds.count("train") == 8 and kinds.count("final") == 3
    train = [event for event in events if event["event"] == "train"]
    shown = re.findall(r"train_loss:(\S+)", out)
    assert [f"{event['loss']:.4f}" for event in train] == shown
    config = next(event for event in events if event["event"] == "config")
    assert config["model_dim"] == 32 and config["ve_layers"] == [2, 3]


def test_the_summary_is_a_block_for_grep(script_run):
    """After ---, `key: value` lines with scores, bytes and seconds; then the headline, last."""
    folder, out = script_run
    block = out.split("\n---\n")[1].splitlines()
    values = dict(line.split(": ", 1) for line in block[:-1])
    assert {"steps", "train_ms", "weights", "post_ema_bpb", "roundtrip_bpb", "sliding_bpb",
            "ttt_bpb", "seconds_ttt", "ttt_us_per_token_and_device",
            "headline_mode", "val_bpb", "bytes_total", "peak_memory_mib", "byte_audit",
            "seconds_train", "seconds_export", "seconds_eval"} <= set(values)
    assert values["steps"] == "8" and values["weights"] == "ema"
    assert values["headline_mode"] == "ttt" and values["byte_audit"] == "exact"
    exact = float(re.search(r"val_bpb:(\S+)", block[-1])[1])
    assert abs(float(values["val_bpb"]) - exact) < 1e-6
    assert values["val_bpb"] == values["ttt_bpb"]


@pytest.mark.slow
def test_two_ranks_stop_together_on_an_error(data, tmp_path):
    """Over SIZE_LIMIT: every rank ends, with exit code 1 and the message."""
    done = h.run_ranks(tmp_path, 2, h.environ(data_path=str(data), size_limit=1000, iterations=1))
    assert done.returncode == 1 and "bytes over SIZE_LIMIT=1000" in done.stderr


def test_dry_run_prints_and_leaves(made, tmp_path):
    """Configuration, parameters, predicted bytes and memory; nothing is written."""
    with h.inside(tmp_path) as console:
        t.run(h.config(data_path=str(made[1]), dry_run=True, run_id="dry"))
    out = console.getvalue()
    for f in fields(t.Config):
        assert f"{f.name.upper()}=" in out
    assert "model_params:" in out and "predicted_mib" in out
    assert not list(tmp_path.rglob("*.ptz")) and "train_loss" not in out
    predicted = int(re.search(r"predicted_bytes code:\d+ total:(\d+)", out)[1])
    measured = int(re.search(r"Total submission size: (\d+) bytes", made[3])[1])
    assert abs(predicted - measured) < 0.1 * measured


@pytest.mark.slow
def test_the_frontier_in_small(data, tmp_path):
    """PRESET=frontier,demo as a user starts it: every phase and score; its log names both."""
    variables = dict(PRESET="frontier,demo", DATA_PATH=str(data), RUN_ID="k", ITERATIONS="12",
                     TRAIN_LOG_EVERY="1", VAL_TOKENS_LIMIT="600", ARTIFACT_PATH="k.ptz",
                     GPTQ_CALIBRATION_SEQS="8", WARMDOWN_ITERS="0.85", LATE_QAT_THRESHOLD="0.3",
                     CHECKPOINT_PATH="checkpoints", OMP_NUM_THREADS="1")
    done = h.python([h.SCRIPT], tmp_path, variables, timeout=600)
    assert done.returncode == 0, done.stderr
    (machine,), (config,) = (h.events(tmp_path, kind) for kind in ("machine", "config"))
    assert machine["preset"] == "frontier,demo" and config["recur_passes"] == 3
    assert machine["attention"] == "sdpa, dense_mask (no CUDA)"
    assert [e["name"] for e in h.events(tmp_path, "phase")] == ["recur", "qat"]
    assert [e["mode"] for e in h.events(tmp_path, "final")] == ["roundtrip", "sliding", "ttt"]
    losses = h.losses(tmp_path, "k")
    assert losses[-1] < losses[0] - 0.3 and len(losses) == 12


@pytest.mark.slow
def test_levers_survive_a_kill(data, tmp_path):
    """Stopped by a signal and resumed: the artifact and the losses are those of a run that was not.

    With more passes, tied and untied, gates, softcaps, taper and shares of the run.
    """
    for untied in (False, True):
        settings = h.LEVERS | dict(recur_untie_mlp=untied, muon_wd_taper=(0.3, 0.2),
                                   muon_coefficients="polar", warmdown_iters=0.6)
        folders = [tmp_path / f"{name}{untied}" for name in ("whole", "killed")]
        assert h.run_switching(folders[0], data, **settings)[0] == 0
        with h.after_step(13, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
            assert h.run_switching(folders[1], data, **settings)[0] == 75
        assert h.run_switching(folders[1], data, **settings, resume=True)[0] == 0
        whole, killed = (folder / "k.ptz" for folder in folders)
        assert whole.read_bytes() == killed.read_bytes()
        seen = [{e["step"]: e["loss"] for e in h.events(folder, "train")} for folder in folders]
        assert seen[0] == seen[1] and len(seen[0]) == 24
