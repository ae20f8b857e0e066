"""What a training step costs at least: operations and bytes by part, and the floor they imply.

    python records/cost_model.py                       the record model on one of eight GPUs
    python records/cost_model.py --tokens 49152 --vocab-size 998
    NUM_LAYERS=9 python records/cost_model.py          settings as in train_gpt.py

The model counts, it does not measure. Operations: 2 per multiply-add, forward and backward, as in
`train_gpt.operations_per_token`. Bytes: what must pass through device memory when each part is as
well fused as torch.compile can make it - a matmul reads its inputs and writes its output, an
elementwise chain reads what enters it and writes what leaves it, once each, bf16 activations,
fp32 master weights. Floor of a part: the larger of operations / peak and bytes / bandwidth. Kernels
reach neither limit, so a step takes longer; how much longer is what a profile tells
(records/one_h100/run.py speed). Eager PyTorch's bytes are counted operation by operation on
tensors without memory, with RMSNorm as the sequence of operations that it is.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_gpt  # noqa: E402

# dense bf16 operations per second and bytes per second, NVIDIA's data sheets (SXM)
GPUS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
PUBLISHED = (  # ms per step on 8xH100: recurrence off, on (SPEC section 10)
    ("#549, no lanes, no recurrence", 83.5, None),
    ("#1019, XSA on all layers", 86.6, None),
    ("#1204, lanes and recurrence", 87.9, 104.0),
    ("#1274, Scylla-998", None, 102.1),
    ("#1855, other tokenizer", 96.0, 141.0),
    ("our bar", 60.0, 72.0),
    ("our goal", 51.0, 60.0),
)
BF16, FP32 = 2, 4
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


def matmuls(c: train_gpt.Config, vocab_size: int, recur: bool) -> Iterator[tuple[str, int, int]]:
    """(part, inputs, outputs) of every matmul that a token passes, in order."""
    if c.bigram_vocab_size:
        yield "matrices", c.bigram_dim, c.model_dim
    if c.ve_enabled:
        yield "matrices", c.ve_dim, c.kv_dim
    for _ in train_gpt.layer_plan(c, recur):
        yield "matrices", c.model_dim, c.model_dim + 2 * c.kv_dim  # q, k, v
        yield "matrices", c.model_dim, c.model_dim
        yield "matrices", c.model_dim, c.hidden_dim
        yield "matrices", c.hidden_dim, c.model_dim
    yield "head", c.model_dim, vocab_size


def chains(model: train_gpt.GPT, recur: bool) -> list[Chain]:
    """Elementwise chains between the matmuls and attention, all layers, as train_gpt computes."""
    c, plan = model.config, model.plans[recur]
    d, kv = c.model_dim, c.kv_dim
    lanes = sum(run.lanes for run in plan)
    serial, layers = len(plan) - lanes, len(plan)
    exclusive = sum(model.blocks[run.layer].attn.exclusive for run in plan)
    skips = sum((run.skip is not None) * (1 + run.lanes) for run in plan)
    vector = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    pair, row, scale = vector(2, d), vector(d), vector(d)
    rope = vector(TOKENS, 1, c.rope_dims // 2), vector(TOKENS, 1, c.rope_dims // 2)

    def sublayer(x: Tensor) -> Tensor:
        return train_gpt.norm(x) * 0.5

    def heads(x: Tensor) -> Tensor:
        return x.view(1, TOKENS, -1, c.head_dim)

    def mixed(x: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
        x = train_gpt.mix(x, x0, pair)
        return x, sublayer(x)

    def added(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x + scale * y
        return x, sublayer(x)

    def lane_update(lane_a: Tensor, lane_m: Tensor, a: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        r = vector(4)
        a, m = scale * a, scale * m
        return lane_a + r[0] * a + r[2] * m, lane_m + r[1] * a + r[3] * m

    def queries_and_keys(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q = train_gpt.rotate(train_gpt.norm(heads(q)), rope) * vector(c.num_heads, 1)
        return q, train_gpt.rotate(train_gpt.norm(heads(k)), rope)

    def smeared(embedding: Tensor, bigram: Tensor) -> Tensor:
        x = train_gpt.norm(embedding + bigram)
        return torch.lerp(x, x.roll(1, dims=1), row)

    return [
        Chain("mix, norm, scale (serial)", serial, mixed, (d, d)),
        Chain("add attention, norm, scale (serial)", serial, added, (d, d)),
        Chain("add MLP (serial)", serial, lambda x, y: x + scale * y, (d, d)),
        Chain("mix, norm, scale (one of two lanes)", 2 * lanes,
              lambda x, x0: sublayer(train_gpt.mix(x, x0, pair)), (d, d)),
        Chain("lane update", lanes, lane_update, (d,) * 4),
        Chain("q and k norm, RoPE, gain", layers, queries_and_keys, (d, kv)),
        Chain("LeakyReLU^2", layers,
              lambda x: F.leaky_relu(x, c.activation_neg_slope).square(), (c.hidden_dim,)),
        Chain("XSA", exclusive,
              lambda y, v: train_gpt.exclude_own_value(heads(y), heads(v)), (d, kv)),
        Chain("skips", skips, lambda x, y: x + scale * y, (d, d)),
        Chain("input: bigram, norm, SmearGate", 1, smeared, (d, d)),
    ]


def muon_operations(model: train_gpt.GPT, c: train_gpt.Config) -> float:
    """Newton-Schulz of all matrices: gram, its square and one product an iteration."""
    total = 0.0
    for name, p in model.named_parameters():
        if train_gpt.param_spec(name, c).optimizer == "muon":
            short, long = sorted(p.shape)
            total += c.muon_backend_steps * 2 * short * short * (2 * long + short)
    return total


def step_costs(model: train_gpt.GPT, c: train_gpt.Config, tokens: int, recur: bool,
               world: int) -> dict[str, Cost]:
    """Cost of each part of one step over `tokens` tokens on one of `world` ranks."""
    costs = dict.fromkeys(("matrices", "head"), Cost(0, 0))
    for part, inputs, outputs in matmuls(c, model.vocab_size, recur):
        moved = 3 * (inputs + outputs) * tokens + 3 * inputs * outputs
        costs[part] += Cost(6.0 * inputs * outputs * tokens, BF16 * moved)
    d, layers = c.model_dim, len(train_gpt.layer_plan(c, recur))
    heads = 2 * d + 2 * c.kv_dim  # q, k, v and the output
    moved = layers * (heads + 2 * heads) * tokens  # backward reads them and writes gradients
    costs["attention"] = Cost(6.0 * layers * c.train_seq_len * d * tokens, BF16 * moved)
    fused = sum(chain.fused_bytes() for chain in chains(model, recur))
    costs["elementwise"] = Cost(0, fused * tokens)
    # softcap and cross entropy read the bf16 logits twice and write their gradient
    costs["loss"] = Cost(0, BF16 * 3 * model.vocab_size * tokens)
    widths = d + c.ve_dim * c.ve_enabled + (c.bigram_dim if c.bigram_vocab_size else 0)
    costs["embedding"] = Cost(0, tokens * widths * (2 * BF16 + BF16 + 2 * FP32))
    specs = {n: (train_gpt.param_spec(n, c), p.numel()) for n, p in model.named_parameters()}
    muon = sum(count for spec, count in specs.values() if spec.optimizer == "muon")
    adam = sum(count for _, count in specs.values()) - muon
    # momentum and weights read and written, gradient read; Newton-Schulz: five passes in bf16
    muon_bytes = muon / world * (5 * FP32 + 6 * c.muon_backend_steps * BF16)
    costs["optimizer"] = Cost(muon_operations(model, c) / world, muon_bytes + adam * 7 * FP32)
    costs["EMA"] = Cost(0, (muon + adam) * 3 * FP32 if c.ema_decay else 0)
    costs["weights to bf16"] = Cost(0, (muon + adam) * (FP32 + BF16))
    return costs


def record_model(c: train_gpt.Config, vocab_size: int) -> train_gpt.GPT:
    """The model of a configuration, without memory."""
    runtime = argparse.Namespace(dtype=torch.bfloat16, attention=None, device="meta")
    with torch.device("meta"):
        return train_gpt.GPT(c, np.zeros(vocab_size, bool), runtime, initialize=False)


def report(model: train_gpt.GPT, c: train_gpt.Config, tokens: int, world: int) -> list[str]:
    """The tables, as Markdown."""
    lines = [f"{tokens} tokens a step and rank, V = {model.vocab_size}, {world} ranks.", ""]
    floors = {}
    for recur in (False, True):
        costs = step_costs(model, c, tokens, recur, world)
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


def main() -> int:
    """Print the tables for the settings of the environment."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", type=int, default=8, help="ranks that share Muon (8)")
    parser.add_argument("--tokens", type=int, help="tokens a step and rank (batch / world)")
    parser.add_argument("--vocab-size", type=int, default=1254, help="ids of the model (1254)")
    options = parser.parse_args()
    c = train_gpt.Config.from_env({"PRESET": "record"} | os.environ)
    tokens = options.tokens or c.train_batch_tokens // options.world
    model = record_model(c, options.vocab_size)
    print("\n".join(report(model, c, tokens, options.world)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
