"""What a training step costs at least: operations and bytes by part, and the floor they imply.

    python records/studies/cost_model.py                 the record model on one of eight GPUs
    python records/studies/cost_model.py --tokens 49152 --vocab-size 998
    NUM_LAYERS=9 python records/studies/cost_model.py    settings as in train_gpt.py
    python records/studies/cost_model.py --budget off on    what the compiler writes, an estimate

The model counts, it does not measure. Bytes are what must pass through device memory when each part
is as well fused as torch.compile can make it - a matmul reads its inputs and writes its output, an
elementwise chain reads what enters it and writes what leaves it, once each, bf16 activations, fp32
master weights. Floor of a part: the larger of operations / peak and bytes / bandwidth. Kernels
reach neither limit, so a step takes longer; how much longer is what a profile tells
(records/one_h100/run.py --only profile). Eager PyTorch's bytes are counted operation by operation
on tensors without memory, with RMSNorm as the sequence of operations that it is.

`--budget` needs a stand-in for a CUDA driver that the authors have and this repository does not
hold; without it the command ends with an error. It compiles phases (off, on, qat_off, qat_on) for
that stand-in, which computes nothing, and counts the bytes that inductor's kernels would move. The
estimate of a step adds up matrix products at 650 TFLOP/s, attention at the rates that
FlashAttention-3's authors publish for head dimension 64, causal, T = 2048, the bytes at 87 % of the
bandwidth (2.93 TB/s on an H100, what a copy reaches), 1 us for each launch and 2.5 ms for the
optimizer. It ranks changes, and is no measurement.
"""

from __future__ import annotations

import argparse
import ast
import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt  # noqa: E402

# dense bf16 operations per second and bytes per second, NVIDIA's data sheets (SXM)
GPUS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
PUBLISHED = (  # ms per step on 8xH100: recurrence off, on
    ("#549, no lanes, no recurrence", 83.5, None),
    ("#1019, XSA on all layers", 86.6, None),
    ("#1204, lanes and recurrence", 87.9, 104.0),
    ("#1274, Scylla-998", None, 102.1),
    ("#1855, other tokenizer", 96.0, 141.0),
    ("ours, measured on one H100 ([one_h100](../one_h100/README.md))", 79.7, 92.8),
    ("our goal", 70.0, 81.0),
)
STANDIN = Path(__file__).resolve().parents[3] / "shared" / "nullcuda" / "run"
PRODUCTS, FORWARD, BACKWARD = 650e12, 350e12, 310e12  # operations a second that are reached
REACHED, LAUNCH_MS, OPTIMIZER_MS = 2.93 / 3.35, 1e-3, 2.5
BF16 = 2
TOKENS = 256  # of the tensors by which chains are counted; the result is per token


class Cost(NamedTuple):
    """Operations and bytes of one step on one rank."""

    operations: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def milliseconds(self, gpu: str) -> float:
        """The larger of the two floors."""
        peak, bandwidth = GPUS[gpu]
        return 1e3 * max(self.operations / peak, self.bytes / bandwidth)


class Chain(NamedTuple):
    """An elementwise chain: how often a token passes it, what it computes, widths of its inputs."""

    name: str
    times: int
    compute: Callable[..., Any]  # (1, T, width) tensors -> one tensor or several
    widths: tuple[int, ...]

    def tensors(self) -> list[Tensor]:
        """Inputs for one pass of TOKENS tokens, bf16, without memory."""
        return [torch.empty(1, TOKENS, width, dtype=torch.bfloat16, device="meta",
                            requires_grad=True) for width in self.widths]

    def fused_bytes(self) -> float:
        """Bytes a token, all passes: forward and backward each one kernel.

        Forward reads the inputs and writes the outputs; backward reads the inputs again and the
        gradients of the outputs, and writes the gradients of the inputs.
        """
        inputs = self.tensors()
        outputs = tree_leaves(self.compute(*inputs))
        sizes = [sum(x.numel() for x in group) for group in (inputs, outputs)]
        return BF16 * self.times * (3 * sizes[0] + 2 * sizes[1]) / TOKENS

    def eager_bytes(self) -> float:
        """Bytes a token, all passes: what the operations of eager PyTorch read and write."""
        inputs = self.tensors()
        with CountBytes() as counted:
            outputs = tree_leaves(self.compute(*inputs))
            torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
        return self.times * counted.bytes / TOKENS


class CountBytes(TorchDispatchMode):
    """Sums what every operation reads and writes; views are free, expanded tensors count once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if not operation.is_view and name not in ("detach", "_unsafe_view", "empty_like"):
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.bytes += sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
                              for x in tensors)
        return result


def chains(model: train_gpt.GPT, recur: bool) -> list[Chain]:
    """Elementwise chains between the matmuls and attention, all layers, as train_gpt computes."""
    c, plan = model.config, model.plans[recur]
    d, kv = c.model_dim, c.kv_dim
    lanes = sum(run.lanes for run in plan)
    serial, layers = len(plan) - lanes, len(plan)
    exclusive = sum(model.blocks[run.layer].attn.exclusive for run in plan)
    skips = sum((run.skip is not None) * (1 + run.lanes) for run in plan)
    vector = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    pair, row = vector(2, d), vector(d)
    rope, half = 3 * (vector(TOKENS, 1, c.head_dim),), c.rope_dims // 2

    def sublayer(x: Tensor) -> Tensor:
        return train_gpt.norm(x) * 0.5

    def heads(x: Tensor) -> Tensor:
        return x.view(1, TOKENS, -1, c.head_dim)

    def mixed(x: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
        x = train_gpt.mix(x, x0, pair)
        return x, sublayer(x)

    def added(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x + y
        return x, sublayer(x)

    def lane_update(lane_a: Tensor, lane_m: Tensor, a: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        r = train_gpt.per_token(vector(4), a).unbind(2)
        return lane_a + r[0] * a + r[2] * m, lane_m + r[1] * a + r[3] * m

    def queries_and_keys(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = train_gpt.norm(heads(q)), train_gpt.norm(heads(k))
        q = q * train_gpt.per_token(vector(c.num_heads), q)
        return train_gpt.rotate(q, rope, half), train_gpt.rotate(k, rope, half)

    def smeared(embedding: Tensor, bigram: Tensor) -> Tensor:
        x = train_gpt.norm(embedding + bigram)
        return torch.lerp(x, x.roll(1, dims=1), row)

    return [
        Chain("mix, norm, scale (serial)", serial, mixed, (d, d)),
        Chain("add attention, norm, scale (serial)", serial, added, (d, d)),
        Chain("add MLP (serial)", serial, torch.add, (d, d)),
        Chain("mix, norm, scale (one of two lanes)", 2 * lanes,
              lambda x, x0: sublayer(train_gpt.mix(x, x0, pair)), (d, d)),
        Chain("lane update", lanes, lane_update, (d,) * 4),
        Chain("q and k norm, RoPE, gain", layers, queries_and_keys, (d, kv)),
        Chain("LeakyReLU^2", layers,
              lambda x: F.leaky_relu(x, c.activation_neg_slope).square(), (c.hidden_dim,)),
        Chain("XSA", exclusive,
              lambda y, v: train_gpt.exclude_own_value(heads(y), heads(v)), (d, kv)),
        Chain("skips", skips, lambda x, y: x + row * y, (d, d)),
        Chain("input: bigram, norm, SmearGate", 1, smeared, (d, d)),
    ]


def record_model(c: train_gpt.Config, vocab_size: int) -> train_gpt.GPT:
    """The model of a configuration, without memory."""
    runtime = argparse.Namespace(dtype=torch.bfloat16, attention=None, document_mask=None,
                                 fused_mlp=False, device="meta")
    with torch.device("meta"):
        return train_gpt.GPT(c, np.zeros(vocab_size, bool), runtime, initialize=False)


def step_costs(model: train_gpt.GPT, tokens: int, recur: bool, ranks: int) -> dict[str, Cost]:
    """By part, of one rank's step over `tokens` tokens: bf16, every elementwise chain fused whole.

    6 operations per weight of a matmul and token, 7 T D per causal attention, whose backward
    computes the scores again; both move their operands once a pass; master weights are fp32.
    """
    c, n, V = model.config, len(model.plans[recur]), len(model.padding)
    D, kv = c.model_dim, c.kv_dim
    extra = [module for module in (model.bigram, model.value) if module is not None]
    shapes = n * [(D, D + 2 * kv), (D, D), (D, c.hidden_dim), (c.hidden_dim, D)]
    shapes += [(m.proj.in_features, m.proj.out_features) for m in extra]
    muon = [p for name, p in model.named_parameters()
            if train_gpt.param_spec(name, c).optimizer == "muon"]
    owned, steps = sum(p.numel() for p in muon), c.muon_backend_steps
    count = sum(p.numel() for p in model.parameters())
    products = sum(min(p.shape) ** 2 * (2 * max(p.shape) + min(p.shape)) for p in muon)
    per_token = dict(
        matrices=(sum(6.0 * a * b for a, b in shapes), sum(6.0 * (a + b) for a, b in shapes)),
        head=(6.0 * D * V, 6.0 * (D + V)),
        attention=(7.0 * n * c.train_seq_len * D, 12.0 * n * (D + kv)),
        elementwise=(0.0, sum(chain.fused_bytes() for chain in chains(model, recur))),
        loss=(0.0, 6.0 * V),
        embedding=(0.0, 14.0 * (D + sum(m.table.embedding_dim for m in extra))))
    costs = {part: Cost(tokens * work, tokens * moved)
             for part, (work, moved) in per_token.items()}
    return costs | dict(
        optimizer=Cost(2.0 * steps * products / ranks,
                       owned / ranks * (20.0 + 12 * steps) + 28.0 * (count - owned)),
        average=Cost(0.0, 12.0 * count * bool(c.ema_decay)), casts=Cost(0.0, 6.0 * count))


def report(model: train_gpt.GPT, tokens: int, world: int) -> list[str]:
    """The tables, as Markdown."""
    lines = [f"{tokens} tokens a step and rank, V = {model.vocab_size}, {world} ranks.", ""]
    floors = {}
    for recur in (False, True):
        costs = step_costs(model, tokens, recur, world)
        lines += [f"### Recurrence {'on' if recur else 'off'}", "",
                  "| part | TFLOP | GB | " + " | ".join(f"floor {gpu}, ms" for gpu in GPUS) + " |",
                  "|--" * (3 + len(GPUS)) + "|"]
        for part, cost in costs.items():
            times = " | ".join(f"{cost.milliseconds(gpu):.2f}" for gpu in GPUS)
            lines.append(f"| {part} | {cost.operations / 1e12:.2f} | {cost.bytes / 1e9:.2f} | "
                         f"{times} |")
        total = sum(costs.values(), Cost(0, 0))
        for gpu in GPUS:
            floors[gpu, recur] = sum(cost.milliseconds(gpu) for cost in costs.values())
        lines += [f"| **sum** | {total.operations / 1e12:.2f} | {total.bytes / 1e9:.2f} | "
                  + " | ".join(f"**{floors[gpu, recur]:.1f}**" for gpu in GPUS) + " |", ""]
    lines += ["### Where step times stand (H100)", "",
              "| run | ms off / on | over the floor, off / on |", "|--|--|--|"]
    for name, *times in PUBLISHED:
        shown = " / ".join("-" if ms is None else f"{ms:g}" for ms in times)
        over = " / ".join("-" if ms is None else f"{ms / floors['H100', recur]:.2f}"
                          for recur, ms in zip((False, True), times, strict=True))
        lines.append(f"| {name} | {shown} | {over} |")
    lines += ["", "### Elementwise chains (H100, recurrence on)", "",
              "| chain | fused, ms | in eager PyTorch, ms | price of not fusing, ms |",
              "|--|--|--|--|"]
    moved = {chain.name: (chain.fused_bytes(), chain.eager_bytes())
             for chain in chains(model, True)}
    moved["all"] = tuple(map(sum, zip(*moved.values(), strict=True)))
    for name, per_token in moved.items():
        fused, eager = (1e3 * size * tokens / GPUS["H100"][1] for size in per_token)
        lines.append(f"| {name} | {fused:.2f} | {eager:.2f} | {eager - fused:.2f} |")
    return lines


class Budget(NamedTuple):
    """What a compiled phase does in a step: forward and backward, without the optimizer."""

    kernels: int  # of inductor
    parts: dict[str, float]  # GB that they move
    fused_mlp: tuple[float, float]  # operations of the MLP's own kernel, and GB beside its product
    products: list[tuple[int, int, int]]  # other matrix products, rows, columns and depth
    attention: tuple[float, float]  # operations, forward and backward
    launches: int

    def gigabytes(self) -> float:
        """Of all elementwise traffic."""
        return sum(self.parts.values()) + self.fused_mlp[1]

    def milliseconds(self, gpu: str) -> float:
        """The estimate."""
        bandwidth = REACHED * GPUS[gpu][1]
        seconds = sum(max(2.0 * a * b * k / PRODUCTS, 2.0 * (a * b + a * k + b * k) / bandwidth)
                      for a, b, k in self.products) + self.fused_mlp[0] / PRODUCTS
        seconds += self.attention[0] / FORWARD + self.attention[1] / BACKWARD
        seconds += 1e9 * self.gigabytes() / bandwidth
        return 1e3 * seconds + LAUNCH_MS * self.launches + OPTIMIZER_MS


def budget(phase: str, mlp_kernel: str, work: Path) -> Budget:
    """Compile a phase at full width for the stand-in; `work`: a folder for what it writes."""
    c, tokens = train_gpt.Config(), 98304
    done = subprocess.run(
        [STANDIN, "budget", phase, "ATTENTION=cudnn", f"MLP_KERNEL={mlp_kernel}"], text=True,
        cwd=Path(__file__).resolve().parents[2], check=True, stdout=subprocess.PIPE,
        env=os.environ | dict(NULLCUDA_WORK=str(work)))
    calls = ast.literal_eval(re.search(r"^calls (.*)$", done.stdout, re.M)[1])
    rows = re.findall(r"^ *\d+ +[\d.]+ +[\d.]+ +([\d.]+)  (.*)$", done.stdout, re.M)
    launched = (work / phase / "launches.log").read_text().splitlines()
    products = [tuple(map(int, found.groups())) for line in launched
                if (found := re.match(r"GEMM \w+ \w+ m=(\d+) n=(\d+) k=(\d+)", line))]
    plan = train_gpt.layer_plan(c, "on" in phase)
    wide = len(plan) * tokens * c.hidden_dim if mlp_kernel == "triton" else 0
    per_pass = len(plan) * tokens * c.train_seq_len * c.model_dim
    return Budget(
        sum(count for (_, kind), count in calls.items() if kind == "triton"),
        {part: float(size) for size, part in rows}, (4.0 * wide * c.model_dim, 4e-9 * wide),
        products, (2.0 * per_pass, 5.0 * per_pass),
        sum(line.startswith(("KERNEL", "GEMM", "MEMSET")) for line in launched))


def budget_report(phases: list[str], work: Path) -> list[str]:
    """Bytes and estimates, by phase, without and with the MLP's kernel; Markdown.

    By part without it: with it, kernels of the residual stream are called the MLP's.
    """
    c = train_gpt.Config()
    model = record_model(c, 1254)
    columns = {(phase, kernel): budget(phase, kernel, work)
               for phase in phases for kernel in ("torch", "triton")}
    names = dict.fromkeys(part for made in columns.values() for part in made.parts)
    lines = ["| GB a step | " + " | ".join(f"{phase}, MLP by {kernel}" for phase, kernel in columns)
             + " |", "|--" * (1 + len(columns)) + "|"]
    table: dict[str, list[str]] = {
        part: ["" if kernel == "triton" else f"{made.parts.get(part, 0):.1f}"
               for (_, kernel), made in columns.items()] for part in names}
    table["**all**"] = [f"**{made.gigabytes():.1f}**" for made in columns.values()]
    table["of these, the MLP's kernel beside its products"] = [
        f"{made.fused_mlp[1]:.1f}" for made in columns.values()]
    table["kernels of inductor"] = [str(made.kernels) for made in columns.values()]
    for gpu in GPUS:
        floors = [sum(cost.milliseconds(gpu) for cost in step_costs(
            model, 98304, recur, 8).values()) for recur in (False, True)]
        table[f"estimate, {gpu}, ms a step"] = [
            f"{made.milliseconds(gpu):.1f}" for made in columns.values()]
        table[f"floor, {gpu}, ms a step"] = [f"{floors['on' in phase]:.1f}" for phase, _ in columns]
    return lines + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in table.items()]


def main() -> int:
    """Print the tables for the settings of the environment."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", type=int, default=8, help="ranks that share Muon (8)")
    parser.add_argument("--tokens", type=int, help="tokens a step and rank (batch / world)")
    parser.add_argument("--vocab-size", type=int, default=1254, help="ids of the model (1254)")
    parser.add_argument("--budget", nargs="+", metavar="PHASE", help="compile phases and estimate",
                        choices=["off", "on", "qat_off", "qat_on"])
    options = parser.parse_args()
    if options.budget:
        if not STANDIN.exists():
            parser.error(f"--budget needs the authors' stand-in for a CUDA driver, and {STANDIN} "
                         "is absent; the tables without --budget need none")
        with tempfile.TemporaryDirectory() as work:
            print("\n".join(budget_report(options.budget, Path(work))))
        return 0
    c = train_gpt.Config.from_env({"PRESET": "record"} | os.environ)
    tokens = options.tokens or c.train_batch_tokens // options.world
    model = record_model(c, options.vocab_size)
    print("\n".join(report(model, tokens, options.world)))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    sys.exit(main())
