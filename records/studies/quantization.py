"""What rounding costs, class by class: the studies behind the steps of PARAM_TABLE.

    SIZE_LIMIT=1 LATE_QAT_THRESHOLD=0 PRESET=demo python train_gpt.py   # keeps <artifact>.fp32
    Q="python records/studies/quantization.py"
    $Q bits   --weights data/demo.int6.ptz.fp32     # one class at 3, 4, 5, 6 and 8 bits
    $Q steps  --weights data/demo.int6.ptz.fp32     # loss per weight and squared step
    $Q gap    --weights data/demo.int6.ptz.fp32     # rtn and gptq in equal bytes
    $Q cosine --weights data/demo.int6.ptz.fp32     # how alike the layers' activations are

The data is that of --data; --tokens of the validation stream are scored, the same each time.
Every table is Markdown, BPB against the unquantized weights.
"""

from __future__ import annotations

import argparse
import math
import re
import signal
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_gpt as t  # noqa: E402

CLASSES = {  # rows of PARAM_TABLE that are stored as codes
    "embed": r"embed\.weight",
    "tables": r"(bigram|value)\.table\.weight",
    "attn q k": r"blocks\.\d+\.attn\.(q|k)\.weight",
    "attn v out": r"blocks\.\d+\.attn\.(v|out)\.weight",
    "mlp up": r"blocks\.\d+\.mlp\.up\.weight",
    "mlp down": r"blocks\.\d+\.mlp\.down\.weight",
    "repeat": r"repeat_mlps\.\d+\.(up|down)\.weight",
}
MATRICES = r".*\.(q|k|v|out|up|down)\.weight"


class Bench:
    """A trained model, its Hessians, and the BPB of any weights in its place."""

    def __init__(self, weights: str, data: str, tokens: int, sequences: int) -> None:
        names = ("RUN_ID", "DATA_PATH")
        base = dict(PRESET="demo", DATA_PATH=data, VAL_TOKENS_LIMIT=str(tokens))
        self.config = t.Config.from_env(base | dict.fromkeys(names[:1], "study"))
        self.runtime = object.__new__(t.Runtime)  # one process, without a log
        self.runtime.rank, self.runtime.world, self.runtime.cuda = 0, 1, False
        self.runtime.device, self.runtime.dtype = torch.device("cpu"), torch.float32
        self.runtime.attention, self.runtime.compiles = t.sdpa, False
        self.runtime.fused_mlp = False
        self.runtime.log = types.SimpleNamespace(line=print, event=lambda *_, **__: None)
        table = t.load_byte_table(self.config)
        val = t.load_validation(self.config, table)
        self.model = t.load_model(weights, val, table, self.runtime, self.config)
        self.state = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        loader = t.Loader(t.find_shards(self.config, "train"), self.config, self.runtime,
                          self.model.vocab_size)
        self.ids = torch.stack([torch.from_numpy(loader.sequence(10**6 + i)[:-1].astype("int64"))
                                for i in range(sequences)])
        self.hessians = t.input_hessians(self.model, self.ids.split(16), self.runtime)
        self.evaluator = t.Evaluator(self.runtime, self.config, val)
        self.reference = self.bpb({})

    def bpb(self, changed: dict[str, torch.Tensor]) -> float:
        """BPB with some weights exchanged."""
        self.model.load_state_dict(self.state | changed)
        return self.evaluator.score(self.model, self.config.eval_seq_len)[0].bpb

    def rounded(self, name: str, bits: int, step: float = 0.0, method: str = "rtn",
                group: int = 0) -> torch.Tensor:
        """A tensor on a grid, by `method`; `group` columns share a scale (0: a whole row)."""
        weight = self.state[name]
        if group:
            weight = weight.reshape(-1, min(group, weight.size(1)))
        scales = t.row_scales(weight, bits, step)
        if method == "gptq" and name in self.hessians:
            codes = t.gptq(weight[None], self.hessians[name][None], scales[None],
                           torch.full((1, 1, 1), float(bits)))[0]
        else:
            codes = t.round_to_grid(weight, scales, bits)
        return (codes * scales).view_as(self.state[name])

    def cost(self, pattern: str, **grid: object) -> float:
        """BPB lost when the tensors that match `pattern` are rounded, and no other."""
        names = [name for name in self.state if re.fullmatch(pattern, name)]
        return self.bpb({n: self.rounded(n, **grid) for n in names}) - self.reference

    def weights_of(self, pattern: str) -> int:
        """How many weights match."""
        return sum(p.numel() for n, p in self.state.items() if re.fullmatch(pattern, n))


def study_bits(bench: Bench) -> None:
    """One class at a time at 3, 4, 5, 6 and 8 bits; then all matrices at INT4, row and group."""
    print("| class | weights | rounding | INT3 | INT4 | INT5 | INT6 | INT8 |")
    print("|--|--|--|--|--|--|--|--|")
    for name, pattern in CLASSES.items():
        for method in ("rtn", "gptq"):
            if method == "gptq" and name == "tables":
                continue  # their inputs are single rows: nothing to make up for
            costs = [bench.cost(pattern, bits=bits, method=method) for bits in (3, 4, 5, 6, 8)]
            print(f"| {name} | {bench.weights_of(pattern)} | {method} | "
                  + " | ".join(f"{cost:+.4f}" for cost in costs) + " |", flush=True)
    rows = [("per row, rtn", {}), ("per group of 64, rtn", {"group": 64}),
            ("per row, gptq", {"method": "gptq"})]
    print(f"\nAll attention and MLP matrices at INT4, unquantized {bench.reference:.4f} BPB:\n")
    print("| scales, rounding | BPB |\n|--|--|")
    for text, grid in rows:
        print(f"| {text} | {bench.reference + bench.cost(MATRICES, bits=4, **grid):.4f} |",
              flush=True)


def study_steps(bench: Bench, wanted: tuple[float, ...] = (0.35, 0.7)) -> None:
    """Loss per weight and squared step by class, and the steps that make their slopes equal."""
    print(f"| class | weights | {' | '.join(f'rtn {s:g}, gptq {s:g}' for s in wanted)} "
          "| per weight and step^2, relative | step |\n|--|--|" + "--|" * (len(wanted) + 2))
    found = {}
    for name, pattern in CLASSES.items():
        costs = {(m, s): bench.cost(pattern, bits=8, step=s, method=m)
                 for s in wanted for m in ("rtn", "gptq")}
        power = sum(s * s for s in wanted)
        slope = sum(max(costs["gptq", s], 1e-6) for s in wanted) / power
        found[name] = bench.weights_of(pattern), slope / bench.weights_of(pattern), costs
    total = sum(n for n, _, _ in found.values())
    middle = math.exp(sum(n * math.log(slope) for n, slope, _ in found.values()) / total)
    for name, (count, slope, costs) in found.items():
        pairs = " | ".join(f"{costs['rtn', s]:+.4f}, {costs['gptq', s]:+.4f}" for s in wanted)
        print(f"| {name} | {count} | {pairs} | {slope / middle:.2f} | "
              f"{(slope / middle) ** -0.5:.2f} |", flush=True)


def study_gap(bench: Bench) -> None:
    """The published plain rounding, then GPTQ and plain rounding fitted to the same bytes."""
    config = replace(bench.config, quant="rtn", n_int6_layers=4)

    def packed(c: t.Config, at: float, hessians: dict | None) -> tuple[int, float]:
        stored = t.quantize(bench.state, c, at, hessians, bench.runtime)
        size = sum(len(s.data) for s in t.pack_streams(stored, "rans"))
        return size, bench.bpb({n: s.restore() for n, s in stored.items()}) - bench.reference

    print(f"unquantized: {bench.reference:.4f} BPB\n")
    print("| bits a weight, in all | published rounding, k as told | fitted rtn | fitted gptq |")
    print("|--|--|--|--|")
    count, free = sum(p.numel() for p in bench.state.values()), replace(config, n_int6_layers=None)
    for text in ("", "attn=5,mlp=4,repeat=5,embed=7", "attn=4,mlp=4,repeat=4,embed=6"):
        target, plain = packed(replace(config, class_bits=text), 0.0, None)
        gaps = []
        for hessians in (None, bench.hessians):
            low, high = 0.0, t.COARSEST
            for _ in range(9):  # the size first, then one score
                middle = (low + high) / 2
                stored = t.quantize(bench.state, free, middle, hessians, bench.runtime)
                size = sum(len(s.data) for s in t.pack_streams(stored, "rans"))
                low, high = (low, middle) if size <= target else (middle, high)
            gaps.append(packed(free, high, hessians)[1])
        print(f"| {8 * target / count:.2f} | {plain:+.4f} {text or 'N_INT6_LAYERS=4'} "
              f"| {gaps[0]:+.4f} | {gaps[1]:+.4f} |", flush=True)


@torch.no_grad()
def study_cosine(bench: Bench) -> None:
    """Mean cosine of every block's output with all matrices rounded (rtn) against unrounded."""
    def outputs(changed: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        bench.model.load_state_dict(bench.state | changed)
        seen: list[torch.Tensor] = []
        hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out[0]))
                 for block in bench.model.blocks]
        bench.model.hidden(bench.ids[:8])
        for hook in hooks:
            hook.remove()
        return seen

    plain, columns = outputs({}), []
    for bits in (3, 4, 5, 6, 8):
        rounded = {n: bench.rounded(n, bits) for n in bench.state if re.fullmatch(MATRICES, n)}
        columns.append([F.cosine_similarity(a, b, dim=-1).mean() for a, b in
                        zip(plain, outputs(rounded), strict=True)])
    print("| block, as they run | INT3 | INT4 | INT5 | INT6 | INT8 |\n|--|--|--|--|--|--|")
    runs = bench.model.plans[bench.model.recur]
    for run, values in zip(runs, zip(*columns, strict=True), strict=True):
        print(f"| {run.layer} | " + " | ".join(f"{v:.5f}" for v in values) + " |", flush=True)


STUDIES = {"bits": study_bits, "steps": study_steps, "gap": study_gap, "cosine": study_cosine}


def main() -> int:
    """Run one study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--weights", required=True, help="an artifact, best one in fp32")
    parser.add_argument("--data", default="data/demo/scylla")
    parser.add_argument("--tokens", type=int, default=65537)
    parser.add_argument("--sequences", type=int, default=64, help="for the Hessians")
    options = parser.parse_args()
    start = time.perf_counter()
    STUDIES[options.study](Bench(options.weights, options.data, options.tokens, options.sequences))
    print(f"\n{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    sys.exit(main())
