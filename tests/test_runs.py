"""Whole runs: the log, the files that a run leaves, several ranks."""

from __future__ import annotations

import json
import re
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
