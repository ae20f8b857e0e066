"""The smoke test's figures against what the machine should reach, and GO or NO GO.

    torchrun ... records/smoke.py collectives OUT.json     those of a step of the run that is set
    records/smoke.py report LOG.jsonl [COLLECTIVES.json]   the table; exit code 1 on NO GO

Bandwidth is that of the busiest link (the "bus bandwidth" of NCCL's own tests): it can be compared
with what a link carries, whatever the collective and the number of ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_gpt as t  # noqa: E402


class Yardstick(NamedTuple):
    """What a GPU should reach with the record's model."""

    step_ms: tuple[float, float]  # without and with recurrence, for TOKENS tokens on a GPU
    peak_mib: int  # at most; the rest of the card is for CUDA and NCCL
    gb_s: dict[str, float]  # at least


TOKENS, SLOWER = 98_304, 1.25  # 1 / 8 of the record's batch; how much slower is no fault yet
# Steps were measured on one H100 (records/one_h100, 2026-11-26). Bandwidths are estimates: NVLink
# gives several times as much, PCIe half or less. All-reduce carries little: latency bounds it.
YARDSTICKS = {"H100": Yardstick((89.8, 104.1), 76_000, dict(
    reduce_scatter=100.0, all_gather=100.0, all_reduce=50.0))}
ROUNDS, CALLS = 5, 5  # timed, after one more round to warm up


def milliseconds(call: Callable[[], Any], runtime: t.Runtime) -> float:
    """Of one call: the median over rounds, on the slowest rank."""
    times = []
    for _ in range(ROUNDS + 1):
        runtime.synchronize()
        begin = runtime.event()
        for _ in range(CALLS):
            call()
        end = runtime.event()
        runtime.synchronize()
        times.append(begin.elapsed_time(end) / CALLS)
    return max(runtime.gather(statistics.median(times[1:])))


def collectives(output: Path) -> None:
    """Time the three collectives of a step, on the buffers that the optimizer sends."""
    c = t.Config.from_env(os.environ, t.find_gpu(os.environ))
    c = replace(c, run_id="collectives", resume=True, torch_compile_disable=True)
    with contextlib.closing(t.Runtime(c)) as runtime:
        ids = c.vocab_size or len(t.load_byte_table(c).base_bytes)
        optimizer = t.Optimizer(t.GPT(c, np.zeros(ids, bool), runtime), c, runtime)
        grads, updates = optimizer.muon.grads, optimizer.muon.updates
        small = grads.new_zeros(sum(p.numel() for p in optimizer.small))
        calls = dict(reduce_scatter=(grads, 1, lambda: runtime.reduce_scatter(grads)),
                     all_gather=(updates, 1, lambda: runtime.all_gather(updates)()),
                     all_reduce=(small, 2, lambda: runtime.all_reduce(small)))
        found = {}
        for name, (sent, passes, call) in calls.items() if runtime.world > 1 else ():
            took, mb = milliseconds(call, runtime), sent.nbytes / 1e6
            on_a_link = passes * mb * (runtime.world - 1) / runtime.world
            found[name] = dict(mb=mb, ms=took, gb_s=on_a_link / took)
        if runtime.rank == 0:
            t.write_atomic(output, json.dumps(found, indent=1).encode())


class Figure(NamedTuple):
    """A measured value and, where there is a yardstick, the most or the least that it may be."""

    name: str
    value: float
    unit: str
    bound: float | None = None
    least: bool = False

    @property
    def wanted(self) -> str:
        """The bound as text."""
        side = "least" if self.least else "most"
        return "" if self.bound is None else f"at {side} {self.bound:.1f}"

    @property
    def broken(self) -> bool:
        """Whether the value is beyond its bound."""
        return self.bound is not None and (
            self.value < self.bound if self.least else self.value > self.bound)

    def __str__(self) -> str:
        return f"{self.name:<44} {self.value:>9.1f} {self.unit:<5} {self.wanted}".rstrip()


def yardstick(machine: dict[str, Any]) -> Yardstick | None:
    """That of the GPU of a `machine` event; none for other models than the record's."""
    return next((known for name, known in YARDSTICKS.items() if name in machine["device"]
                 and machine["preset"] in ("record", "published")), None)


def figures(primed: list[dict[str, Any]], links: dict[str, dict[str, float]], share: float,
            known: Yardstick | None) -> list[Figure]:
    """All of them, a step of `share` times TOKENS on a GPU."""
    found = []
    for event in primed:
        name = f"recurrence {'on' if event['recur'] else 'off'}{', QAT' if event['qat'] else ''}"
        slowest = known and known.step_ms[event["recur"]] * share * SLOWER
        found += [Figure(f"{name}: a step", event["step_ms"], "ms", slowest),
                  Figure(f"{name}: memory", event["peak_mib"], "MiB", known and known.peak_mib),
                  Figure(f"{name}: compilation", event["compile_s"], "s")]
    return found + [
        Figure(f"{name} of {link['mb']:.1f} MB in {link['ms']:.2f} ms", link["gb_s"], "GB/s",
               known and known.gb_s[name], least=True) for name, link in links.items()]


def report(log: Path, measured: Path | None) -> int:
    """Print all figures of a log and the collectives, and GO or NO GO with the reasons."""
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    last = {event["event"]: event for event in events}
    primed = [event for event in events if event["event"] == "primed"]
    if not primed:
        print(f"NO GO: {log} tells of no phase: the smoke test did not get that far")
        return 1
    machine, known = last["machine"], yardstick(last["machine"])
    tokens = last["config"]["train_batch_tokens"] // machine["world_size"]
    links = json.loads(measured.read_text(encoding="utf-8")) if measured else {}
    found = figures(primed, links, tokens / TOKENS, known)
    print(f"{machine['world_size']} x {machine['device']}, {tokens} tokens each\nattention "
          f"{machine['attention']}, compiler {machine['compiler']}", *found, sep="\n")
    against = [f"{f.name} {f.value:.1f} {f.unit}, {f.wanted} is wanted" for f in found if f.broken]
    against += machine["handicaps"] if known else []
    if against:
        print("NO GO: " + "; ".join(against))
    else:
        print("GO" if known else "GO: there is no yardstick for this run on this device")
    return int(bool(against))


def main(arguments: list[str]) -> int:
    """Measure or report, as the head of this file says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("collectives").add_argument("output", type=Path)
    tell = commands.add_parser("report")
    tell.add_argument("log", type=Path)
    tell.add_argument("measured", type=Path, nargs="?")
    options = parser.parse_args(arguments)
    try:
        if options.command == "report":
            return report(options.log, options.measured)
        collectives(options.output)
    except (t.RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    if "RANK" in os.environ:  # as train_gpt.py does: gloo can abort a rank that has finished
        os._exit(status)
    sys.exit(status)
