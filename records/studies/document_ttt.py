"""What TTT_KIND=document costs: operations by counting, and its speed against training by timing.

    PRESET=frontier python records/studies/document_ttt.py operations SHARD.bin META.npz
    PRESET=frontier,demo OMP_NUM_THREADS=1 python records/studies/document_ttt.py speed

Settings are those of train_gpt.py, from the environment. `operations` takes the lengths of the
documents from a validation shard and its byte table, as they are and scaled to --mean tokens, plans
the steps of one of eight H100s for --tokens tokens, and gives the operations of the whole and the
seconds at --utilisation of 989 TFLOP/s, dense bf16. All of it is computed, nothing measured.
`speed` times the mode on this processor, on random documents, and a plain training pass (forward
and backward) over batches of the same shape and of as many tokens as the mode reads, padding
included; the two alternate.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import signal
import statistics
import sys
import time
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import train_gpt  # noqa: E402
from cost_model import record_model, step_costs  # noqa: E402

PEAK = 989e12  # dense bf16 operations a second of an H100, NVIDIA's data sheet


def operations(model: train_gpt.GPT, sizes: dict[int, int]) -> dict[str, float]:
    """By part: the operations of reading so many windows of each size and training on them.

    A weight of the model takes 2 operations a token forward and 2 backward, as only its inputs get
    gradients; one of an adapter 2 and 4. Attention takes 7 T D a token and layer pass: causal, and
    its backward computes the scores again. The head reads a chunk of each window only.
    """
    c, passes = model.config, len(model.plans[model.recur])
    D, R, V = c.model_dim, c.ttt_lora_rank, len(model.padding)
    weights = step_costs(model, 1, model.recur, 1)["matrices"].operations / 6
    outputs = model.adapter_outputs()
    tokens = sum(size * count for size, count in sizes.items())
    heads = c.ttt_doc_chunk * sum(sizes.values())
    return dict(
        matrices=4 * weights * tokens,
        attention=sum(7.0 * passes * D * size * size * count for size, count in sizes.items()),
        adapters=6.0 * R * (sum(D + out for out in outputs[:-1]) * tokens + (D + V) * heads),
        head=4.0 * D * V * heads)


def document_ttt(model: train_gpt.GPT, ids: np.ndarray, boundary: int, **of: Any
                 ) -> train_gpt.DocumentTTT:  # fmt: skip
    """The mode on a stream in which `boundary` begins a document, on a runtime with these `of`."""
    runtime = types.SimpleNamespace(**dict(
        rank=0, world=1, cuda=False, device=torch.device("cpu"), compile=lambda module: module,
        all_reduce=lambda tensor: tensor, send=torch.from_numpy,
        log=types.SimpleNamespace(line=lambda text: None)) | of)
    val = train_gpt.Validation(ids, np.ones(len(ids) - 1, np.int16), "unverified", "")
    model.set_phase(train_gpt.Phase(recur=bool(model.config.repeated)))
    model.is_boundary = torch.arange(model.vocab_size) == boundary
    with mock.patch.object(torch.cuda, "get_device_properties",
                           lambda _: types.SimpleNamespace(total_memory=80e9)):
        return train_gpt.DocumentTTT(model, train_gpt.Evaluator(runtime, model.config, val))


def windows(ttt: train_gpt.DocumentTTT) -> dict[int, int]:
    """Windows of each size that a rank reads, those of free slots included."""
    return {size: ttt.slots * sum(step[0] == size for plan in ttt.plans for step in plan)
            for size in ttt.sizes}


def operations_report(c: train_gpt.Config, shard: Path, meta: Path, tokens: int, mean: int,
                      utilisation: float) -> list[str]:
    """The tables, as Markdown."""
    table = train_gpt.table_from_meta(meta)
    ids, rows = np.asarray(train_gpt.open_shard(shard)), []
    model = record_model(dataclasses.replace(c, ttt_global_docs=0), len(table.base_bytes))
    found = np.diff(np.append(np.flatnonzero(table.is_boundary[ids[:-1]]), len(ids) - 1))
    for scale in (1.0, mean / found.mean()):
        lengths = np.maximum(1, np.round(found * scale)).astype(int)
        lengths = np.tile(lengths, math.ceil(tokens / lengths.sum()))
        lengths = lengths[: np.searchsorted(lengths.cumsum(), tokens) + 1]
        stream = np.zeros(lengths.sum() + 1, np.uint16)
        stream[lengths.cumsum() - lengths] = 1  # boundaries
        ttt = document_ttt(model, stream, 1, world=8, cuda=True)
        parts, read = operations(model, windows(ttt)), 8 * ttt.slots * ttt.work / lengths.sum()
        seconds = sum(parts.values()) / PEAK / utilisation
        rows.append([f"{lengths.mean():.0f}", len(lengths), f"{read:.1f}",
                     *(f"{8 * value / 1e15:.0f}" for value in parts.values()), f"{seconds:.0f}"])
    head = ["mean length", "documents", "tokens read for each scored", *(
        f"{part}, PFLOP" for part in parts), f"seconds on 8xH100 at {utilisation:.0%}"]
    return [f"{tokens} tokens, V = {model.vocab_size}, chunks of {c.ttt_doc_chunk}, windows of up "
            f"to {c.eval_seq_len}, {ttt.slots} documents at once on each of 8 H100s.", "",
            f"| {' | '.join(head)} |", "|--" * len(head) + "|",
            *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def speed(c: train_gpt.Config, documents: int, vocab_size: int, rounds: int) -> str:
    """The mode's time over that of a plain training pass of as many tokens, in pairs."""
    torch.manual_seed(0)
    c = dataclasses.replace(c, ttt_global_docs=0)  # which is training itself
    runtime = types.SimpleNamespace(
        device="cpu", dtype=torch.float32, attention=train_gpt.sdpa,
        document_mask=train_gpt.dense_mask, fused_mlp=False)
    random, last = np.random.default_rng(0), vocab_size - 1
    lengths = np.ceil(np.exp(random.normal(np.log(c.eval_seq_len), 0.7, documents))).astype(int)
    ids = np.concatenate([[last, *random.integers(0, last, n)] for n in lengths]).astype(np.uint16)
    model = train_gpt.GPT(c, np.zeros(vocab_size, bool), runtime)
    ttt = document_ttt(model, ids, last)
    sizes = [size for plan in ttt.plans for size, _ in plan]
    ratios, seconds = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        ttt.score()
        seconds.append(time.perf_counter() - began)
        model.train_only(model.is_trained)
        began = time.perf_counter()
        for size in sizes:
            batch = torch.randint(vocab_size, (ttt.slots, size + 1))
            model.zero_grad()
            model(batch[:, :-1], batch[:, 1:]).mean().backward()
        ratios.append(seconds[-1] / (time.perf_counter() - began))
    return (f"width {c.model_dim}, rank {c.ttt_lora_rank}, {documents} documents, {len(ids) - 1} "
            f"targets, {ttt.slots * ttt.work} tokens read: {statistics.median(seconds):.1f} s, "
            f"{statistics.median(ratios):.2f} of a training pass over as many tokens (from "
            f"{min(ratios):.2f} to {max(ratios):.2f} in {rounds} rounds)")


def main() -> int:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ways = parser.add_subparsers(dest="way", required=True)
    count = ways.add_parser("operations", help="count them, and project seconds on 8xH100")
    count.add_argument("shard", type=Path, help="validation shard whose documents' lengths count")
    count.add_argument("meta", type=Path, help="its byte table")
    count.add_argument("--tokens", type=int, default=62_000_000, help="to score (62,000,000)")
    count.add_argument("--mean", type=int, default=1240, help="tokens of FineWeb's documents")
    count.add_argument("--utilisation", type=float, default=0.3, help="of the peak (0.3)")
    timed = ways.add_parser("speed", help="time it against training, on this processor")
    timed.add_argument("--documents", type=int, default=12)
    timed.add_argument("--vocab-size", type=int, default=1254)
    timed.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    c = train_gpt.Config.from_env({"PRESET": "frontier"} | os.environ)
    if options.way == "speed":
        print(speed(c, options.documents, options.vocab_size, options.rounds))
    else:
        print("\n".join(operations_report(c, options.shard, options.meta, options.tokens,
                                          options.mean, options.utilisation)))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    sys.exit(main())
