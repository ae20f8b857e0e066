"""What a record folder says of its runs: submission.json and README.md, from their logs alone.

`make` writes them, and `verify` writes them again to compare.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import figures
from figures import markdown
from runs import PER_RUN, Run
from welch import sample

HERE = Path(__file__).resolve().parent
CAP_BYTES, CAP_MS, CAP_EVAL_SECONDS, RECORD_SEEDS = 16_000_000, 600_000, 600, 3
TYPED = ("author", "github_id", "name", "date", "track")  # all else comes from logs and files


def credits() -> list[dict[str, Any]]:
    """Who found what: technique, where, who, and the settings under which a run uses it."""
    return json.loads((HERE / "credits.json").read_text(encoding="utf-8"))


def attribution(settings: dict[str, str]) -> dict[str, str]:
    """technique -> who, where; those that a run with these settings uses."""
    used = [row for row in credits() if all(settings.get(name, "") in values
                                            for name, values in row.get("when", {}).items())]
    return {row["technique"]: f"{row['who']}, {row['where']}" for row in used}


def submission(runs: list[Run], typed: dict[str, Any], artifacts: dict[int, str]) -> dict[str, Any]:
    """submission.json of finished runs; `artifacts` are the SHA-256 of each seed's."""
    first = runs[0]
    bpb, loss = (sample([getattr(run.headline, key) for run in runs]) for key in ("bpb", "loss"))
    compliance = dict(
        training_seconds_max=max(run.train_ms for run in runs) / 1e3,
        evaluation_seconds_max=max(run.eval_seconds for run in runs),
        total_bytes_max=max(run.total_bytes for run in runs), seeds=len(runs),
        byte_audit_exact=all(run.audit == "exact" for run in runs),
        scored_bytes=first.audited_bytes, runs_resumed=sum(run.resumed for run in runs))
    return typed | dict(
        val_loss=round(loss.mean, 8), val_bpb=round(bpb.mean, 8),
        val_loss_std=round(loss.std, 8), val_bpb_std=round(bpb.std, 8),
        headline_mode=first.summary.get("headline_mode"), seeds=[run.seed for run in runs],
        seed_results={str(run.seed): seed_result(run, artifacts.get(run.seed)) for run in runs},
        bytes_total=max(run.total_bytes for run in runs), bytes_code=first.code_bytes,
        model_params=first.params, hardware=f"{first.world} x {first.device}",
        pytorch_version=first.torch, cuda_version=first.cuda or "none (CPU)",
        compliance=compliance, attribution=attribution(first.settings))


def seed_result(run: Run, artifact: str | None) -> dict[str, Any]:
    """What submission.json says of a seed."""
    result = dict(val_loss=run.headline.loss, val_bpb=run.headline.bpb)
    for stage in ("roundtrip", "sliding", "ttt", "ngram"):
        if stage in run.scores and run.scores[stage].compliant:
            result[f"{stage}_bpb"] = run.scores[stage].bpb
    return result | dict(
        artifact_bytes=run.artifact_bytes, artifact_sha256=artifact, steps=run.steps,
        step_avg_ms=round(run.step_avg_ms, 2), train_ms=run.train_ms,
        eval_seconds=run.eval_seconds)


def headline(about: dict[str, Any]) -> str:
    """The line of README.md that gives the score."""
    return (f"**{about['val_bpb']:.5f} BPB** ({about['headline_mode']}), mean of "
            f"{len(about['seeds'])} seeds, deviation {about['val_bpb_std']:.5f}; "
            f"{about['val_loss']:.5f} nats per token; the largest seed takes "
            f"{about['bytes_total']:,} bytes, {about['bytes_code']:,} of them code.")


def changed_settings(run: Run) -> dict[str, str]:
    """The preset of a run and the settings in which it differs from that, its names apart."""
    import train_gpt

    preset = run.settings["PRESET"]
    base = train_gpt.settings_listing(train_gpt.Config(**train_gpt.PRESETS[preset]))
    changed = {name: value for name, value in run.settings.items()
               if name not in PER_RUN | {"PRESET"} and f"{name}={value}" not in base.splitlines()}
    return {"PRESET": preset} | changed


def readme(runs: list[Run], about: dict[str, Any], statistics: str) -> str:
    """README.md of the folder; `statistics` is its text on means, tests and published results."""
    each = {f"seed {run.seed}": [run] for run in runs}
    changed = changed_settings(runs[0])
    command = " ".join([*(f"{name}='{value}'" for name, value in changed.items()), "SEED=<seed>",
                        "torchrun --standalone --nproc_per_node=" + str(runs[0].world),
                        "train_gpt.py"])
    limits = dict(training_seconds_max=CAP_MS // 1000,
                  evaluation_seconds_max=CAP_EVAL_SECONDS, total_bytes_max=f"{CAP_BYTES:,}",
                  seeds=f"at least {RECORD_SEEDS}",
                  byte_audit_exact=True, runs_resumed=0)
    model = runs[0].settings
    lines = [
        f"# {about['name']}", "",
        f"PROTEUS: {model['NUM_LAYERS']} layers of width {model['MODEL_DIM']}, "
        f"{about['model_params']:,} parameters, {model['ITERATIONS']} steps of "
        f"{model['TRAIN_BATCH_TOKENS']} tokens at most.", "",
        f"{about['author']} (@{about['github_id']}), {about['date']}, {about['track']}. Made by "
        "`records/make_record.py` from the logs beside this file; no number was typed.", "",
        headline(about), "",
        figures.stage_table(each | {"mean": runs}), "", "## Statistics", "",
        statistics, "", "## Curves", "",
        "![loss, BPB, learning rate, step time](curves.png)", "", "## Rules", "",
        markdown(["rule", "measured", "limit of a record"],
                 [[key.replace("_", " "), value, limits.get(key)]
                  for key, value in about["compliance"].items()]), "",
        "## Run it", "", "`DATA_PATH` is a folder of shards that retokenize_scylla.py wrote with "
        "the tokenizer beside this file (manifest.json is its ledger).", "", "```bash",
        "pip install -r requirements.txt", f"DATA_PATH=<shards> {command}", "```", "",
        f"Hardware (ranks x device) {about['hardware']}, torch {about['pytorch_version']}, CUDA "
        f"{about['cuda_version']}. Settings not named have their defaults.", "", "## Attribution",
        "", markdown(["technique", "who, where"], about["attribution"].items()), ""]
    return "\n".join(lines)
