"""train_gpt.py as `run` of ../shared/nullcuda sets it up; $NULL_OUT/report.json says what it did.

Nothing is computed there, so what the script reads gets its values here: facts of a step, the check
of a Cholesky factor, nats, this rank's peers. UNTIL_CLOCK=1 ends where the clock starts.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT.parent / "shared" / "nullcuda")]

import launches  # noqa: E402, I001  # of ../shared/nullcuda, after torch
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

import train_gpt as t  # noqa: E402

report: dict[str, Any] = dict(steps=[], graphs={})
cholesky_ex, world = torch.linalg.cholesky_ex, int(os.environ.get("WORLD_SIZE", "1"))
warm_up, train_step, resume = t.Trainer.warm_up, t.Trainer.train_step, t.TrainClock.resume
score_batch, evaluate_artifact = t.Evaluator.score_batch, t.evaluate_artifact
score_documents, adapt = t.DocumentTTT.score, t.DocumentTTT.adapt


def count(when: str) -> None:
    """Note, once, the graphs so far: traced, found in inductor's cache, and not found there."""
    cache, graphs = counters["inductor"], counters["stats"]["unique_graphs"]
    missed = cache["fxgraph_cache_miss"] + cache["fxgraph_cache_bypass"]
    report["graphs"].setdefault(when, (graphs, cache["fxgraph_cache_hit"], missed))


def counted_warm_up(trainer: t.Trainer) -> None:
    """Count what it compiles, and note the sizes that decide what a step sends."""
    c = trainer.config
    roles = [(t.param_spec(name, c).optimizer == "muon", p.numel())
             for name, p in trainer.model.named_parameters()]
    count("start")
    warm_up(trainer)
    report.update(muon=sum(n for muon, n in roles if muon),
                  small=sum(n for muon, n in roles if not muon))


def watched_step(trainer: t.Trainer, step: int) -> None:
    """Note a step's peak of memory, and its calls but for kernels; then put in its facts."""
    torch.cuda.reset_peak_memory_stats()
    launches.start()
    train_step(trainer, step)
    calls = [c for c in launches.stop() if c.startswith(("COPY", "SYNC", "NCCL"))]
    report["row"] = trainer.optimizer.muon.grads.size(1)
    report["steps"].append(dict(calls=[c for c in calls if not c.startswith("COPY D2D")],
                                phase=trainer.phase, mib=torch.cuda.max_memory_allocated() >> 20))
    clock = trainer.clock
    trainer.unread[-1][2].copy_(torch.tensor([4, 0, 0, 0, clock.elapsed_ms, clock.step_ms, 1]))


def counted_resume(clock: t.TrainClock) -> None:
    """Count what was compiled before the clock starts for the first time."""
    count("clock")
    if os.environ.get("UNTIL_CLOCK"):
        sys.exit(0)
    resume(clock)


def watched_adapt(ttt: t.DocumentTTT, size: int, rows: Any) -> None:
    """Note the calls of a step of documents, but for kernels, and its peak of memory."""
    torch.cuda.reset_peak_memory_stats()
    launches.start()
    adapt(ttt, size, rows)
    calls = [c for c in launches.stop() if c.startswith(("COPY", "SYNC", "NCCL"))]
    report.setdefault("documents", []).append(dict(
        size=size, calls=[c for c in calls if not c.startswith("COPY D2D")],
        mib=torch.cuda.max_memory_allocated() >> 20))


def scored_documents(ttt: t.DocumentTTT) -> tuple[t.Score, Any]:
    """Put in the nats of document TTT."""
    _, nats = score_documents(ttt)
    nats[:] = 1
    return ttt.evaluator.total(nats), nats


def counted_evaluation(*arguments: Any) -> dict[str, t.Score]:
    """Count what was compiled up to the end of training."""
    count("trained")
    return evaluate_artifact(*arguments)


torch.linalg.cholesky = lambda x: cholesky_ex(x)[0]
dist.rendezvous = lambda url: iter([(dist.HashStore(), 0, world)])  # one process stands for all
t.Trainer.warm_up, t.Trainer.train_step = counted_warm_up, watched_step
t.TrainClock.resume, t.evaluate_artifact = counted_resume, counted_evaluation
t.DocumentTTT.so_far = lambda ttt: t.Score(1.0, 1, 1)
t.DocumentTTT.score, t.DocumentTTT.adapt = scored_documents, watched_adapt
t.Evaluator.score_batch = lambda *batch: torch.ones(score_batch(*batch).shape)
try:
    sys.exit(t.main([]))
finally:
    count("end")
    Path(os.environ["NULL_OUT"], "report.json").write_text(json.dumps(report))
