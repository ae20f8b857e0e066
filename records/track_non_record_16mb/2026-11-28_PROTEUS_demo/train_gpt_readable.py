"""PROTEUS v1.6 for Parameter Golf: shards -> model -> artifact on disk -> honest bits per byte.

    python train_gpt.py                                       CPU or one GPU; without data: the demo
    torchrun --standalone --nproc_per_node=8 train_gpt.py     the record run (all defaults)
    python train_gpt.py --help                                every setting, set by environment

Read it top to bottom, in the order in which data flows:
    1 configuration      environment -> Config, every problem reported at once
    2 runtime and log    ranks, device, collectives, attention backend, RunLog
    3 data               shards -> batches that depend on (seed, step) only
    4 byte accounting    ids -> source bytes, the only denominator of BPB
    5 model              layer plan, lanes, recurrence; the table of all parameters
    6 optimization       schedules, Newton-Schulz, Muon over ranks, AdamW, averages
    7 quantization       weights -> integer codes: GPTQ, the fit to SIZE_LIMIT
    8 artifact           codes -> compressed streams -> file -> weights
    9 evaluation         one window plan, one scoring loop, Score; n-gram cache; SLOT
   10 test-time training a chunk is scored, then trained on, of the stream or of a document
   11 training           the clock, checkpoints, the phases, the loop
   12 main

Letters: B batch, T time, D model, H heads, G kv-heads, K head dim, V vocabulary.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import io
import json
import linecache
import lzma
import math
import os
import platform
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

# Before torch: its threads sleep while they wait. Spinning, they stop a machine that others share.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# --- 1 configuration: field `train_seq_len` <=> variable TRAIN_SEQ_LEN ---


class RunError(RuntimeError):
    """The run cannot go on; the message says what is wrong and what to do."""

    code = 1  # of the process


class Stopped(RunError):
    """A signal ended the run; RESUME=1 goes on."""

    code = 75  # EX_TEMPFAIL: try again later


def require(holds: Any, message: str, error: type[RunError] = RunError) -> None:
    """Raise `error` with `message` unless `holds`."""
    if not holds:
        raise error(message)


def setting(default: Any, text: str, low: float | None = None, high: float | None = None,
            choices: tuple[str, ...] = ()) -> Any:
    """A Config field with its help text and its allowed range (inclusive) or choices."""
    return field(default=default, metadata=dict(help=text, low=low, high=high, choices=choices))


# the last one that runs is the headline, except slot: that one is not compliant
EVAL_MODES = ("roundtrip", "sliding", "ttt", "ngram", "slot")
STORED_AS_CODES = ("attn", "mlp", "repeat", "embed")
CODECS = ("rans", "lzma", "zlib", "zstd")
SDPA_KERNELS = ("cudnn", "flash", "mem_efficient", "math")  # PyTorch's
ATTENTIONS = ("flash_attention_3", "flex", *SDPA_KERNELS)
CODE_BYTES = os.path.getsize(__file__)  # of the file that runs


@dataclass(frozen=True)
class Config:
    """Every setting of a run. The defaults are the record run on 8xH100."""

    # run, data, tokenizer
    preset: tuple[str, ...] = setting(("record",), "sets of defaults, later ones win", choices=(
        "record", "published", "frontier", "demo"))
    run_id: str = setting("", "name of logs/<RUN_ID>.txt and .jsonl; empty: time and a random tag")
    seed: int = setting(1337, "initial weights and order of the data", 0, 2**31 - 1)
    data_seed: int = setting(0, "order of the data; 0: that of SEED", 0, 2**31 - 1)
    data_path: str = setting("./data/datasets/fineweb10B_scylla", "folder of the shards")
    tokenizer_path: str = setting("", "vocabulary or SentencePiece .model; empty: in DATA_PATH")
    tokenizer_meta_path: str = setting("", "byte table (.meta.npz); empty: beside the vocabulary")
    vocab_size: int = setting(0, "ids of the model; 0: from the tokenizer", 0, 65536)
    dry_run: bool = setting(False, "print configuration, sizes and memory, then exit")
    # model: MODEL_FIELDS, all that an artifact says of its model
    num_layers: int = setting(11, "layers", 2, 64)
    model_dim: int = setting(512, "width D of the residual stream", 8)
    num_heads: int = setting(8, "query heads H", 1)
    num_kv_heads: int = setting(4, "key and value heads G", 1)
    mlp_mult: float = setting(3.0, "hidden width of the MLP over D", 0.25, 16)
    tie_embeddings: bool = setting(True, "the embedding is the output head too")
    rope_base: float = setting(10000.0, "base of the rotary frequencies", 1)
    rope_dims: int = setting(16, "rotated dimensions of each head (even)", 2)
    logit_softcap: float = setting(30.0, "logits are cap * tanh(z / cap)", 1e-3, 40)
    asym_softcap: bool = setting(False, "positive and negative logits have caps of their own, "
                                 "equal until TTT trains them")
    ln_scale: bool = setting(True, "scale normalised inputs of layer i by 1 / sqrt(i + 1)")
    xsa_last_n: int = setting(4, "layers from the end with exclusive self-attention", 0)
    attn_gate_dims: int = setting(0, "each head's output is gated by so many dimensions of the "
                                  "attention's input; 0: no gate", 0)
    doc_attention: bool = setting(False, "a token attends to its own document only")
    smear_enabled: bool = setting(True, "SmearGate: blend in the previous token's embedding")
    bigram_vocab_size: int = setting(2048, "rows of the bigram hash table; 0: no table", 0)
    bigram_dim: int = setting(128, "width of the bigram table", 1)
    ve_enabled: bool = setting(True, "value embeddings on VE_LAYERS")
    ve_dim: int = setting(128, "width of the value embedding table", 1)
    ve_layers: tuple[int, ...] = setting((9, 10), "layers whose values get a value embedding")
    activation_neg_slope: float = setting(0.5, "negative slope of LeakyReLU^2", 0, 1)
    parallel_start_layer: int = setting(7, "first layer with two lanes; NUM_LAYERS: none", 1)
    skip_gate: bool = setting(True, "each skip is gated, dimension by dimension")
    recur_layers: tuple[int, ...] = setting((4, 5), "layers run again, as one block; empty: none, "
                                            "with RECUR_PASSES=1")
    recur_passes: int = setting(2, "passes over RECUR_LAYERS in all; 1: no recurrence", 1, 16)
    recur_untie_mlp: bool = setting(True, "each further pass has MLPs of its own")
    # batch and length of training
    train_batch_tokens: int = setting(786432, "tokens per step over all ranks", 1)
    micro_batch_tokens: int = setting(0, "tokens per forward pass and device; 0: by memory", 0)
    train_seq_len: int = setting(2048, "tokens per training sequence", 2)
    iterations: int = setting(20000, "steps at most", 1)
    warmdown_iters: float = setting(3500.0, "steps of the final linear decay of the learning rate; "
                                    "< 1: share of the run", 0)
    recur_start_step: float = setting(3000.0, "recurrence starts here; < 1: share of the run", 0)
    warmup_steps: int = setting(20, "priming steps on random tokens before the clock", 0)
    max_wallclock_seconds: float = setting(600.0, "training time at most; 0: no cap", 0)
    # optimization
    matrix_lr: float = setting(0.026, "Muon, for matrices", 0)
    scalar_lr: float = setting(0.02, "AdamW, for vectors, scalars and small projections", 0)
    tied_embed_lr: float = setting(0.03, "AdamW, for embedding tables", 0)
    embed_lr: float = setting(0.6, "AdamW, for embedding tables when TIE_EMBEDDINGS=0", 0)
    head_lr: float = setting(0.008, "AdamW, for the head when TIE_EMBEDDINGS=0", 0)
    tied_embed_init_std: float = setting(0.005, "initial standard deviation of the embedding", 0)
    qk_gain_init: float = setting(1.5, "initial gain of the normalised queries", 0)
    min_lr: float = setting(0.1, "learning rate at the end, as a fraction of the peak", 0, 1)
    muon_momentum: float = setting(0.99, "momentum of Muon", 0, 0.9999)
    muon_momentum_warmup_start: float = setting(0.92, "momentum of Muon at step 0", 0, 0.9999)
    muon_momentum_warmup_steps: int = setting(1500, "steps until MUON_MOMENTUM is reached", 0)
    muon_backend_steps: int = setting(5, "Newton-Schulz iterations", 1, 20)
    muon_coefficients: str = setting("quintic", "of Newton-Schulz: one triple, or Polar Express's "
                                     "five", choices=("quintic", "polar"))
    muon_wd: float = setting(0.04, "decoupled weight decay of Muon", 0)
    muon_wd_taper: tuple[float, ...] = setting((), "START,END: from that share of the run on "
                                               "linear to END times MUON_WD; empty: never")
    muon_row_norm: bool = setting(True, "MuonEq-R: normalise rows before Newton-Schulz")
    adam_wd: float = setting(0.04, "weight decay of embeddings and projections", 0)
    beta1: float = setting(0.9, "AdamW", 0, 0.9999)
    beta2: float = setting(0.99, "AdamW", 0, 0.9999)
    adam_eps: float = setting(1e-8, "AdamW", 0)
    grad_clip_norm: float = setting(0.3, "bound on the global gradient norm; 0: none", 0)
    ema_decay: float = setting(0.997, "decay of the average that is exported; 0: none", 0, 0.99999)
    swa_enabled: bool = setting(False, "export the mean of snapshots instead of the EMA")
    swa_every: int = setting(50, "steps between snapshots once the lr scale is under 0.2", 1)
    late_qat_threshold: float = setting(0.15, "fake-quantize once the lr scale is lower", 0, 1)
    # export
    quant: str = setting("gptq", "rounding: GPTQ, or to the nearest", choices=("gptq", "rtn"))
    gptq_calibration_seqs: int = setting(64, "training sequences for GPTQ", 1)
    n_int6_layers: int | None = setting(None, "MLP layers at INT6, half first, half last (even), "
                                        "the others INT5; auto: as SIZE_LIMIT allows", 0)
    class_bits: str = setting("", "bits by class against the table, such as 'mlp=4,attn=8' (2..8)")
    compressor: str = setting("auto", "auto: the smallest per stream", choices=("auto", *CODECS))
    size_limit: int = setting(16_000_000, "code and artifact at most, in bytes", 1)
    artifact_path: str = setting("final_model.int6.ptz", "where the artifact is written")
    load_artifact: str = setting("", "evaluate this artifact instead of training")
    # evaluation and log
    eval_seq_len: int = setting(2048, "tokens per evaluation window", 2)
    eval_stride: int = setting(64, "step of the sliding window", 1)
    eval_modes: tuple[str, ...] = setting(EVAL_MODES, "scores to compute, where enabled")
    ttt_enabled: bool = setting(True, "test-time training: score a chunk, then train on it")
    ttt_kind: str = setting("chunk", "what TTT trains: the model, on chunks of the stream; or "
                            "adapters, on each document by itself", choices=("chunk", "document"))
    ttt_lr: float = setting(0.005, "SGD at the first step; cosine over chunks or global phase", 0)
    ttt_epochs: int = setting(3, "passes over a chunk", 0)
    ttt_chunk_tokens: int = setting(32768, "targets of a chunk, also of the n-gram cache", 2)
    ttt_freeze_blocks: int = setting(2, "first layers that stay; above 0 the embedding too", 0)
    ttt_momentum: float = setting(0.9, "SGD", 0, 0.9999)
    ttt_batch_seqs: int = setting(32, "sequences of a step at most, over all ranks", 1)
    ttt_grad_clip: float = setting(1.0, "bound on the gradient norm; 0: none", 0)
    ttt_doc_chunk: int = setting(48, "targets of a chunk of a document", 1)
    ttt_doc_batch: int = setting(0, "documents at once on a device at most; 0: by its memory", 0)
    ttt_global_docs: int = setting(0, "first documents, on which SGD trains the model once they "
                                   "are scored; 0: none", 0)
    ttt_lora_rank: int = setting(80, "rank of a document's adapters", 1)
    ttt_lora_alpha: float = setting(144.0, "what adapters add is scaled by this over the rank", 0)
    ttt_lora_lr: float = setting(1e-4, "AdamW without momentum, beta2 0.99, for adapters", 0)
    ttt_lora_wd: float = setting(1.0, "decoupled weight decay of adapters", 0)
    ngram_enabled: bool = setting(False, "mix a cache of scored text into the last score")
    ngram_order: int = setting(5, "longest n-gram of the cache", 1, 16)
    ngram_weight: float = setting(0.05, "weight of the cache in the mixture", 0, 1)
    slot_enabled: bool = setting(False, "the SLOT ablation, which is not compliant")
    slot_steps: int = setting(8, "AdamW steps on a batch's own targets", 0)
    slot_lr: float = setting(0.005, "AdamW", 0)
    val_batch_size: int = setting(524288, "tokens per evaluation batch over all ranks", 1)
    val_loss_every: int = setting(4000, "steps between validations; 0: only at the end", 0)
    val_tokens_limit: int = setting(0, "validation tokens at most; 0: all", 0)
    scores_path: str = setting("", "folder for one <mode>.npz of scores per token; empty: none")
    train_log_every: int = setting(500, "steps between training log lines", 1)
    checkpoint_every: float = setting(0.0, "seconds; 0: at SIGTERM, SIGINT and the end only", 0)
    checkpoint_keep: int = setting(2, "checkpoints that are kept, the newest", 1)
    checkpoint_path: str = setting("checkpoints", "parent of the folder <RUN_ID> of checkpoints")
    resume: bool = setting(False, "go on from RUN_ID's newest checkpoint (torchrun's restarts do)")
    attention: str = setting("auto", "attention on CUDA; auto: the fastest at this shape, timed at "
                             "the start; flex for DOC_ATTENTION only, flash without it only",
                             choices=("auto", *ATTENTIONS))
    mlp_kernel: str = setting("auto", "the training MLP on CUDA: PyTorch's operations or a Triton "
                              "kernel; auto: the faster, timed at the start",
                              choices=("auto", "torch", "triton"))
    torch_compile_disable: bool = setting(False, "run eagerly on CUDA too (a CPU always does)")

    @property
    def head_dim(self) -> int:
        """K, dimensions of a head."""
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        """G * K, width of keys and values."""
        return self.num_kv_heads * self.head_dim

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the MLP."""
        return int(self.mlp_mult * self.model_dim)

    @property
    def repeated(self) -> tuple[int, ...]:
        """The layers of all further passes, in their order; empty without recurrence."""
        return self.recur_layers * (self.recur_passes - 1)

    @property
    def modes(self) -> list[str]:
        """The scores to compute: modes of EVAL_MODES that are enabled, in a fixed order."""
        return [mode for mode in EVAL_MODES if mode in self.eval_modes
                and getattr(self, f"{mode}_enabled", True)]

    @classmethod
    def from_env(cls, environ: Mapping[str, str], cuda: bool = False) -> Config:
        """Config from environment variables; raises RunError naming every problem.

        `cuda` says whether a GPU is there: without one and without DATA_PATH, PRESET is demo.
        """
        problems = unknown_names(environ)
        explicit = parse_settings(environ, problems)
        if not cuda and not {"preset", "data_path"} & set(explicit):
            explicit["preset"] = ("demo",)
        if environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # by torchrun, after a fault
            explicit["resume"] = bool(explicit.get("run_id")) and "load_artifact" not in explicit
        config = cls(**(preset_values(explicit.get("preset", ())) | explicit))
        problems += contradictions(config)
        require(not problems, "\n  ".join(["the settings are wrong:", *problems]))
        return config


PRESETS: dict[str, dict[str, Any]] = {
    "record": {},
    "published": dict(  # PROTEUS v1.6, with its rounding: the yardstick of every A/B
        skip_gate=False, matrix_lr=0.025, scalar_lr=0.025, tied_embed_lr=0.035, min_lr=0.0,
        muon_row_norm=False, beta2=0.95, quant="rtn", n_int6_layers=4),
    "frontier": dict(  # what else the field found after PROTEUS v1.6
        mlp_mult=4.0, qk_gain_init=5.25, xsa_last_n=11, attn_gate_dims=12, doc_attention=True,
        asym_softcap=True, parallel_start_layer=8, recur_layers=(3, 4, 5), recur_passes=3,
        recur_start_step=0.35, recur_untie_mlp=False, warmdown_iters=0.85, muon_momentum=0.97,
        muon_coefficients="polar", muon_wd=0.095, muon_wd_taper=(0.7, 0.5), ema_decay=0.9965,
        gptq_calibration_seqs=256, eval_seq_len=2560, ttt_kind="document", ttt_global_docs=2500),
    "demo": dict(
        data_path="./data/demo/scylla", artifact_path="data/demo.int6.ptz",
        checkpoint_path="data/checkpoints", model_dim=64, num_heads=2, num_kv_heads=1,
        bigram_dim=32, ve_dim=32, recur_start_step=0.4, train_batch_tokens=2048,
        train_seq_len=256, iterations=900, warmdown_iters=360, warmup_steps=4,
        max_wallclock_seconds=0.0, muon_momentum=0.95, muon_momentum_warmup_start=0.85,
        muon_momentum_warmup_steps=100, ema_decay=0.98, swa_every=10, eval_seq_len=256,
        val_batch_size=16384, val_loss_every=0, train_log_every=50, ttt_lr=0.03,
        ttt_chunk_tokens=2048, ttt_lora_rank=8, ttt_lora_lr=2e-3, ttt_global_docs=8),
}
DROPPED = {  # spellings of published scripts -> what to set here
    "N_INT6_MLP_LAYERS": "N_INT6_LAYERS", "SLIDING_WINDOW_ENABLED": "EVAL_MODES",
    "EMA_ENABLED": "EMA_DECAY (0: none)", "EMA_EVERY": "EMA_DECAY; it averages every step",
    "QAT_ENABLED": "LATE_QAT_THRESHOLD (0: never)", "LATE_QAT": "LATE_QAT_THRESHOLD (0: never)",
    "SMEAR_GATE": "SMEAR_ENABLED", "TRAIN_FILES": "DATA_PATH", "VAL_FILES": "DATA_PATH",
    "GRAD_ACCUM_STEPS": "MICRO_BATCH_TOKENS",
}


def preset_values(names: tuple[str, ...]) -> dict[str, Any]:
    """What presets set, by the name of the field; of several the last one counts."""
    return {field: value for name in names for field, value in PRESETS[name].items()}


def unknown_names(environ: Mapping[str, str]) -> list[str]:
    """A line for each variable that looks like a setting but is none."""
    names, problems = [f.name.upper() for f in fields(Config)], []
    for name in sorted({*environ} - {*names, "SEEDS"}):  # SEEDS is run_8xh100.sh's
        near = difflib.get_close_matches(name, names, 1, 0.88)
        if name in DROPPED:
            problems.append(f"{name}={environ[name]}: not a setting here; set {DROPPED[name]}")
        elif near:
            problems.append(f"{name}={environ[name]}: no such setting; did you mean {near[0]}?")
    return problems


def split_list(text: str) -> list[str]:
    """'4, 5' -> ['4', '5']; empty -> []."""
    return [part.strip() for part in text.split(",") if part.strip()]


PARSERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "int": ("a whole number", int),
    "int | None": ("a whole number or auto", lambda t: None if t == "auto" else int(t)),
    "float": ("a finite number", float),
    "bool": ("0 or 1", lambda t: {"0": False, "1": True, "false": False, "true": True}[t.lower()]),
    "str": ("text", str),
    "tuple[int, ...]": ("a comma list of whole numbers", lambda t: tuple(map(int, split_list(t)))),
    "tuple[float, ...]": ("a comma list of numbers", lambda t: tuple(map(float, split_list(t)))),
    "tuple[str, ...]": ("a comma list of names", lambda t: tuple(split_list(t))),
}


def parse_settings(environ: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    """Values of the settings that `environ` names; what is not allowed goes to `problems`."""
    values = {}
    for f in fields(Config):
        name, (expected, parse) = f.name.upper(), PARSERS[f.type]
        low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
        if name not in environ:
            continue
        try:
            value = parse(environ[name])
        except (ValueError, KeyError):
            value = math.nan  # not readable
        chosen = set(value if isinstance(value, tuple) else [value])
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name}={environ[name]}: expected {expected}")
        elif choices and not set() < chosen <= set(choices):
            problems.append(f"{name}={environ[name]}: allowed are {show(choices)}")
        elif None not in (value, low) and not low <= value <= (math.inf if high is None else high):
            upper = "" if high is None else f" and at most {high}"
            problems.append(f"{name}={value}: must be at least {low}{upper}")
        else:
            values[f.name] = value
    return values


def contradictions(c: Config) -> list[str]:
    """A line for each way in which the settings contradict each other."""
    return [f"{name.upper()}={show(getattr(c, name))}: {reason}"
            for holds, name, reason in [*model_rules(c), *run_rules(c)] if not holds]


def model_rules(c: Config) -> list[tuple[Any, str, str]]:
    """What must hold of a model: (whether it does, setting, what is wrong otherwise)."""
    recur, lanes, layers = c.recur_layers, c.parallel_start_layer, c.num_layers
    block = tuple(range(recur[0], recur[0] + len(recur))) if recur else ()
    valued = c.ve_layers if c.ve_enabled else (0,)
    return [
        (c.model_dim % c.num_heads == 0, "model_dim", f"not a multiple of NUM_HEADS={c.num_heads}"),
        (c.num_heads % c.num_kv_heads == 0, "num_heads",
         f"not a multiple of NUM_KV_HEADS={c.num_kv_heads}"),
        (c.rope_dims % 2 == 0 and c.rope_dims <= c.head_dim, "rope_dims",
         f"must be even and at most the head dimension {c.head_dim}"),
        (c.attn_gate_dims <= c.model_dim, "attn_gate_dims",
         f"wider than the input: at most MODEL_DIM={c.model_dim}, or 0 for no gate"),
        (layers // 2 <= lanes <= layers, "parallel_start_layer",
         f"must be in {layers // 2}..{layers}, as skips are stored from one stream"),
        (recur == block and set(recur) <= set(range(layers)), "recur_layers",
         f"must be consecutive layers of 0..{layers - 1}, as they run again as one block"),
        (not recur or max(recur) < lanes or min(recur) >= lanes, "recur_layers", "crosses "
         f"PARALLEL_START_LAYER={lanes}; two lanes cannot run a one-lane layer again"),
        (recur or c.recur_passes <= 2, "recur_passes",
         "there are no RECUR_LAYERS to pass over; name some, or set RECUR_PASSES=1"),
        (0 < len(valued) == len(set(valued)) and set(valued) <= set(range(layers)), "ve_layers",
         f"name layers of 0..{layers - 1}, each once; VE_ENABLED=0 turns them off"),
        (c.n_int6_layers in (None, *range(0, layers + 2, 2)), "n_int6_layers",
         f"must be auto, or even and at most {layers + layers % 2}"),
        (c.bigram_vocab_size != 1, "bigram_vocab_size", "must be 0 (off) or at least 2"),
        (parse_class_bits(c.class_bits) is not None, "class_bits",
         f"must be a list of CLASS=2..8 with CLASS of {show(STORED_AS_CODES)}"),
    ]


def run_rules(c: Config) -> list[tuple[Any, str, str]]:
    """What must hold of a run, in the same form."""
    window, chosen, taper = c.eval_seq_len, set(c.eval_modes), c.muon_wd_taper
    whole = "must be whole, or a fraction below 1"
    return [
        *((getattr(c, name) % c.train_seq_len == 0, name,
           f"not a multiple of TRAIN_SEQ_LEN={c.train_seq_len}")
          for name in ("train_batch_tokens", "micro_batch_tokens")),
        *((getattr(c, name) < 1 or getattr(c, name) % 1 == 0, name, whole)
          for name in ("recur_start_step", "warmdown_iters")),
        (len(taper) in (0, 2) and all(0 <= share <= 1 for share in taper), "muon_wd_taper",
         "must be START,END, both in 0..1, such as 0.7,0.5; empty for none"),
        (c.attention in ("auto", *attentions(c)), "attention", f"cannot do DOC_ATTENTION="
         f"{c.doc_attention:d}; {show(tuple(attentions(c)))} can, and auto takes the fastest"),
        (c.eval_stride <= window, "eval_stride", f"over EVAL_SEQ_LEN={window}: would skip tokens"),
        (c.val_tokens_limit != 1, "val_tokens_limit", "must be 0 (all) or at least 2"),
        (not set("/\\") & set(c.run_id), "run_id", "must be a file name"),
        (c.artifact_path, "artifact_path", "must name a file"),
        (c.checkpoint_path, "checkpoint_path", "must name a folder"),
        (c.run_id or not c.resume, "resume", "needs the RUN_ID of the run that is to go on"),
        (not (c.dry_run and c.load_artifact), "dry_run", "cannot go with LOAD_ARTIFACT"),
        (not (c.resume and c.load_artifact), "resume", "cannot go with LOAD_ARTIFACT"),
        (len(c.eval_modes) == len(chosen & {*EVAL_MODES}) and {*c.modes} - {"slot"}, "eval_modes",
         f"name some of {show(EVAL_MODES)}, each once, with one besides slot that is enabled"),
        (c.ttt_chunk_tokens >= window, "ttt_chunk_tokens",
         f"smaller than a window, EVAL_SEQ_LEN={window}"),
        (c.ttt_doc_chunk <= window or c.ttt_kind == "chunk", "ttt_doc_chunk",
         f"larger than a window, EVAL_SEQ_LEN={window}"),
        (c.ttt_freeze_blocks < c.num_layers or not c.ttt_enabled, "ttt_freeze_blocks",
         f"leaves none of {c.num_layers} layers to train; TTT_ENABLED=0 turns training off"),
    ]


def parse_class_bits(text: str) -> dict[str, int] | None:
    """'mlp=4,attn=8' -> {'mlp': 4, 'attn': 8}; None if it does not read so."""
    pairs = [part.partition("=") for part in split_list(text)]
    good = all(name in STORED_AS_CODES and bits in list("2345678") for name, _, bits in pairs)
    return {name: int(bits) for name, _, bits in pairs} if good else None


def show(value: Any) -> str:
    """A setting's value as one would type it."""
    if value is None:
        return "auto"
    if isinstance(value, tuple):
        return ",".join(map(show, value))
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)


def settings_listing(c: Config) -> str:
    """NAME=value of every setting, a line each."""
    return "\n".join(f"{name.upper()}={show(value)}" for name, value in asdict(c).items())


def settings_table() -> str:
    """Every setting as a Markdown table: the table of docs/settings.md and the answer to --help."""
    presets = ("published", "frontier", "demo")
    rows = [f"| setting | record | {' | '.join(presets)} | what it is |", "|--|--|--|--|--|--|"]
    for f in fields(Config):
        values = [show(f.default), *(show(PRESETS[p].get(f.name, "")) for p in presets)]
        text = f.metadata["help"]
        text += " (" + ", ".join(f.metadata["choices"]) + ")" if f.metadata["choices"] else ""
        rows.append(f"| {f.name.upper()} | {' | '.join(values)} | {text} |")
    return "\n".join(rows)


# --- 2 runtime and log ------------------------------------------------


class RunLog:
    """logs/<run_id>.txt for people and .jsonl for programs; silent unless opened (on rank 0)."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id or time.strftime("%Y%m%d_%H%M%S_") + os.urandom(3).hex()
        self.text = self.events = None

    def open(self, append: bool) -> None:
        """Take the run id; RunError if it is in use or, unless we append, was used."""
        import fcntl  # Unix only

        path = Path("logs", f"{self.run_id}.txt")
        try:
            path.parent.mkdir(exist_ok=True)
            self.text = open(path, "a", encoding="utf-8")
            fcntl.flock(self.text, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the end of the process frees it
            require(append or not self.text.tell(), f"{path}: RUN_ID={self.run_id} has been used; "
                    "set another one, or RESUME=1 to go on with that run")
            self.events = open(path.with_suffix(".jsonl"), "a", encoding="utf-8")
        except BlockingIOError as error:
            raise RunError(f"{path}: another run is writing it; set another RUN_ID") from error
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}; run where logs/ can be written") from error

    def line(self, text: str, console: bool = True) -> None:
        """Text to the log, and to the console."""
        for stream in (self.text, sys.stdout)[: 1 + console] if self.text else ():
            print(text, file=stream, flush=True)

    def event(self, kind: str, template: str = "", **values: Any) -> None:
        """One JSON object of `kind` with `values`, and the line that `template` makes of them."""
        if self.events:
            print(json.dumps({"event": kind} | values), file=self.events, flush=True)
        if template:
            self.line(template.format(**values))

    def close(self) -> None:
        """Close both files."""
        for stream in filter(None, (self.text, self.events)):
            stream.close()
        self.text = self.events = None


class HostEvent(float):
    """torch.cuda.Event on a machine without one: seconds of the monotonic clock."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None

    def elapsed_time(self, later: HostEvent) -> float:
        return 1e3 * (later - self)


class Runtime:
    """This process among its peers: rank, device, compute dtype, collectives, log."""

    def __init__(self, c: Config) -> None:
        self.rank, self.world = (int(os.environ.get(name, default)) for name, default in (
            ("RANK", "0"), ("WORLD_SIZE", "1")))
        self.local_rank, self.local_world = (int(os.environ.get(name, of)) for name, of in (
            ("LOCAL_RANK", self.rank), ("LOCAL_WORLD_SIZE", self.world)))  # in this node
        self.signal, self.defer_signals = 0, False
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.cuda else torch.device("cpu")  # see find_gpu
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        if self.cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        self.compiles, self.compiler = select_compiler(self.device, c)
        if self.world > 1:
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives one
            store = dist.PrefixStore(attempt, next(dist.rendezvous("env://"))[0])
            dist.init_process_group(
                "nccl" if self.cuda else "gloo", store=store, rank=self.rank,
                world_size=self.world, device_id=self.device if self.cuda else None)
        rank_seqs = max(1, c.train_batch_tokens // c.train_seq_len // self.world)
        shape = self, c, micro_batch_seqs(rank_seqs, c, self)  # in which training runs
        backend, times = self.on_first_rank(lambda: select_attention(*shape))
        self.attention, self.document_mask = use_attention(backend)
        if backend == "flex" and self.compiles:  # for GPTQ's hooks, which run the model eagerly
            self.attention = torch.compile(flex, fullgraph=True, dynamic=False)
        kind = f", {self.document_mask.__name__}" * c.doc_attention
        self.attention_name = f"{backend}{kind} ({times})"
        kernel, times = self.on_first_rank(lambda: select_mlp(*shape))
        self.fused_mlp, self.mlp_name = kernel == "triton", f"{kernel} ({times})"
        self.log = RunLog(c.run_id)
        self.on_first_rank(lambda: self.log.open(c.resume))

    def handicaps(self) -> list[str]:
        """What makes this machine slower than the one that a record is run on, each with why."""
        if not self.cuda:
            return ["it runs on a CPU"]
        gpu = torch.cuda.get_device_name()
        fast = (self.attention_name.startswith(("flash_attention_3", "flex", "cudnn"))
                and "dense_mask" not in self.attention_name)
        return [text for slow, text in (
            ("H100" not in gpu, f"it runs on {gpu}, not on an H100"),
            (not self.compiles, f"nothing is compiled ({self.compiler})"),
            (not fast, f"attention is {self.attention_name}, some 14 ms a step slower than "
             "FlashAttention-3 or cuDNN")) if slow]

    def close(self) -> None:
        """Leave the process group and close the log."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self.log.close()

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """A signal raises Stopped or, if deferred, is noted."""
        def note(number: int, _: Any) -> None:
            self.signal = number
            require(self.defer_signals, f"stopped by signal {number}; start again, or with "
                    f"RESUME=1 RUN_ID={self.log.run_id} from the last checkpoint, if there is one",
                    Stopped)

        before = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        except RuntimeError as error:  # the compiler wraps what a signal raises in it
            require(isinstance(error, RunError) or not self.signal, f"stopped by signal "
                    f"{self.signal}: {first_line(error)}", Stopped)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum of `tensor` over ranks, on the device it came from."""
        if self.world == 1:
            return tensor
        shared = tensor.to(self.device)
        dist.all_reduce(shared)
        return shared.to(tensor.device)

    def all_reduce_packed(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over ranks, in place; all of them travel in one all-reduce."""
        packed = self.all_reduce(torch.cat([t.flatten() for t in tensors]))
        for t, part in zip(tensors, packed.split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        """This rank's row of the sum over ranks of `rows` (world, n)."""
        if self.world == 1:
            return rows[0]
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        own = torch.empty_like(rows[0])  # torch 2.13 has renamed both collectives
        scatter(own, rows.view(-1))
        return own

    def all_gather(self, rows: Tensor) -> Callable[[], Any]:
        """Fill in the other ranks' rows of `rows` (world, n); returns what waits for them."""
        if self.world == 1:
            return lambda: None
        begin = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return begin(rows.view(-1), rows[self.rank], async_op=True).wait

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Rank 0's values to every rank, in place."""
        for tensor in tensors if self.world > 1 else []:
            dist.broadcast(tensor.detach(), 0)

    def in_turns(self, jobs: list[Callable[[], Any]]) -> list[float]:
        """Run every job on every rank, each on one rank of a node first; returns their seconds.

        What that rank compiles is in the node's cache when the others come to it. Jobs are dealt
        out, so that different ones compile side by side; they must not communicate.
        """
        seconds = [0.0] * len(jobs)
        for first in (True, False):
            for i, job in enumerate(jobs):
                if (i % self.local_world == self.local_rank) == first:
                    start = time.perf_counter()
                    job()
                    self.synchronize()
                    seconds[i] = time.perf_counter() - start
            every = self.gather(seconds)  # all have to be here before the others begin
        return [max(times) for times in zip(*every, strict=True)]

    def on_first_rank(self, work: Callable[[], Any]) -> Any:
        """Result of `work` on rank 0, given to every rank; its RunError stops every rank."""
        outcome = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except RunError as error:
                outcome[1] = error
        if self.world > 1:
            dist.broadcast_object_list(outcome)
        if outcome[1]:
            raise outcome[1]
        return outcome[0]

    def share_of(self, count: int) -> slice:
        """This rank's contiguous share of `count` items; shares differ by one at most."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def event(self) -> Any:
        """A timing event of the device, recorded now."""
        if not self.cuda:
            return HostEvent(time.perf_counter())
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def send(self, array: np.ndarray) -> Tensor:
        """An array on the device; its memory is pinned, so that the host need not wait."""
        tensor = torch.from_numpy(array)
        return (tensor.pin_memory() if self.cuda else tensor).to(self.device, non_blocking=True)

    def random_tokens(self, rows: int, length: int, vocab_size: int,
                      random: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets (rows, length) to prime with: no token of the data is seen."""
        random = random or torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size, (rows, length + 1), generator=random).to(self.device)
        return ids[:, :-1], ids[:, 1:]

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def compile(self, module: nn.Module) -> Callable:
        """`module`, on CUDA as one graph for each phase, shape and grad mode."""
        if not self.compiles:
            return module
        from torch._dynamo import config as dynamo
        from torch._inductor import config as inductor

        dynamo.recompile_limit = 64
        if hasattr(inductor.triton, "mix_order_reduction"):
            inductor.triton.mix_order_reduction = False  # torch 2.11 fails at it in our backward
        return torch.compile(module, fullgraph=True, dynamic=False)

    def reset_peak_memory(self) -> None:
        """Forget the peak so far; a process cannot."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak_memory_mib(self) -> tuple[int, int]:
        """MiB allocated and reserved at most: of the GPU, or resident of this process."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
        import resource  # Unix only

        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,) * 2


def find_gpu(environ: MutableMapping[str, str], devices: str = "/dev") -> bool:
    """Whether this process has a GPU; RunError if the machine has some and torch does not see it.

    A rank of torchrun sees its own only, as cuda:0: the compiler's cache knows a graph by its
    device too, so that ranks can share it only under one name. To be called before CUDA is used.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    ranks = int(environ.get("LOCAL_WORLD_SIZE", environ.get("WORLD_SIZE", 1)))
    if visible in ("", "-1"):
        return False  # the CPU, asked for by name
    if "LOCAL_RANK" in environ:
        listed = [*map(str, range(ranks))] if visible is None else split_list(visible)
        require(ranks <= len(listed), f"{ranks} ranks, but CUDA_VISIBLE_DEVICES={visible} lists "
                f"{len(listed)} GPUs; start torchrun with --nproc_per_node={len(listed)}")
        environ["CUDA_VISIBLE_DEVICES"] = listed[int(environ["LOCAL_RANK"])]
    if torch.cuda.is_available():
        return True
    found = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True, check=True,
                               timeout=60).stdout
    count, driver, cuda = ([*re.findall(rf"{name}[^:\n]*: *(\S+)", found), "unknown"][0]
                           for name in ("Attached GPUs", "Driver Version", "CUDA"))
    files = len([*Path(devices).glob("nvidia[0-9]*")])
    gpus = int(count) if count.isdecimal() else files
    require(not 0 < gpus < ranks, f"{ranks} ranks, but this machine has {gpus} GPUs; start "
            f"torchrun with --nproc_per_node={gpus}")
    asked = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible}"
    require(not gpus, f"this machine has {gpus} GPUs (driver {driver}, for CUDA {cuda} at most), "
            f"and torch {torch.__version__} (made for CUDA {torch.version.cuda}) sees none of "
            f"them{asked}. Install a torch for that CUDA ('torch>=2.9,<2.11' is for 12.8) or a "
            "newer driver (580 for CUDA 13); for the CPU, set CUDA_VISIBLE_DEVICES= ")
    return False


def first_line(error: Exception) -> str:
    """What an error says first, cut to a part of a log line; it may say nothing."""
    return (str(error) or repr(error)).partition("\n")[0][:100]


def select_compiler(device: torch.device, c: Config) -> tuple[bool, str]:
    """Whether models are compiled on this device, and by what or why not."""
    if device.type == "cpu" or c.torch_compile_disable:
        return False, "no CUDA" if device.type == "cpu" else "TORCH_COMPILE_DISABLE=1"
    try:
        torch.compile(torch.square)(torch.ones(8, device=device))
    except Exception as error:  # of any kind: no Triton, no headers, a chip it does not know
        return False, f"inductor is broken: {first_line(error)}"
    return True, "inductor"


def attentions(c: Config) -> list[str]:
    """Those of ATTENTIONS that can do what DOC_ATTENTION asks for: flex is for masks, flash not."""
    return [name for name in ATTENTIONS if name != ("flash" if c.doc_attention else "flex")]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal grouped-query attention; q (B, T, H, K), k and v (B, T, G, K) -> (B, T, H, K).

    `mask` is what `dense_mask` makes of the documents of these tokens; None: they are one.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
    return y.transpose(1, 2)


def dense_mask(starts: Tensor) -> Tensor:
    """Which tokens a token attends to, bool (B, 1, T, T); `starts` (B, T): it begins a document."""
    document = starts.cumsum(1)
    return (document[:, :, None] == document[:, None]).tril().unsqueeze(1)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """The same by FlexAttention, with what `block_mask` makes of the documents."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


def block_mask(starts: Tensor) -> Any:
    """`dense_mask` as FlexAttention wants it: it leaves out blocks without an entry.

    Its kernel steps from sequence to sequence by the stride of heads. Compiled by torch 2.11, one
    head has none of use, and scores read past the mask; 32 alike have one that is never padded.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    document, (B, T) = starts.cumsum(1), starts.shape

    def attended(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[b, query] == document[b, key])

    mask = create_block_mask(attended, B, None, T, T, device=starts.device)
    for name, part in mask.__dict__.items():
        if isinstance(part, Tensor):
            setattr(mask, name, part.repeat(1, 32, *[1] * (part.ndim - 2)))
    return mask


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None = None) -> Tensor:
    """The same by FlashAttention-3, with `document_bounds`; ImportError where it is not installed.

    Tokens beyond the last bound, which no document has, get NaN.
    """
    import flash_attn_interface as flash

    if bounds is None:
        out = flash.flash_attn_func(q, k, v, causal=True)
    else:
        out = flash.flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens_q=bounds, cu_seqlens_k=bounds,
            max_seqlen_q=q.size(1), max_seqlen_k=q.size(1), causal=True)
    out = out[0] if isinstance(out, tuple) else out
    if bounds is None:
        return out
    inside = torch.arange(len(out), device=q.device) < bounds[-1]
    return out.where(inside[:, None, None], math.nan).view_as(q)


def document_bounds(starts: Tensor) -> Tensor:
    """Where the documents of a batch (B, T) begin as one row of tokens, then its length; int32.

    A graph needs a fixed length: there is room for B documents, and one for every 128 tokens in
    training (its kernels pay for room) and 16 in scoring (whose windows see the same ones).
    """
    room = len(starts) + starts.numel() // (128 if torch.is_grad_enabled() else 16)
    places = torch.arange(starts.numel(), device=starts.device)
    return places.where(starts.flatten(), starts.numel()).sort().values[: room + 1].int()


SHORT_DOCUMENTS = ("; or documents are too short for DOC_ATTENTION on flash_attention_3: set "
                   "ATTENTION=flex")


def use_attention(backend: str) -> tuple[Callable, Callable]:
    """Attention and mask of a backend, PyTorch's only one from now on; sdpa: any of them."""
    for name in SDPA_KERNELS:
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(backend in (name, "sdpa"))
    special = dict(flash_attention_3=(flash_attention_3, document_bounds), flex=(flex, block_mask))
    return special.get(backend, (sdpa, dense_mask))


def device_ms(work: Callable[[], Any]) -> float:
    """Milliseconds of the device for `work`; the fastest of three rounds, after one to compile."""
    rounds = []
    for _ in range(4):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        torch.cuda._sleep(10**8)  # cycles, in which the host runs ahead: it is the slower one here
        begin.record()
        for _ in range(10):
            work()
        end.record()
        torch.cuda.synchronize()
        rounds.append(begin.elapsed_time(end) / 10)
    return min(rounds[1:])


def fastest(what: str, names: list[str], build: Callable[[str], Callable], inputs: tuple,
            slow: tuple[str, ...] = ()) -> tuple[str, str]:
    """The fastest of `names`, forward and backward; all times and failures. `slow` ones come last.

    `build` gives the forward pass of one. Of two within 5 % it is the first: noise may not decide.
    """
    notes, times = [], dict[str, float]()
    for name in names:
        if times and name in slow:
            break
        try:
            forward = build(name)
            times[name] = device_ms(lambda forward=forward: torch.autograd.grad(
                forward(), inputs, inputs[0].detach()))
            notes.append(f"{name} {times[name]:.2f} ms")
        except Exception as error:  # of any kind: the others are tried, and the log says why
            notes.append(f"{name}: {first_line(error)}")
    told = "; ".join(notes)
    require(times, f"no {what} works on this GPU: {told}")
    return next(name for name, ms in times.items() if ms <= 1.05 * min(times.values())), told


def select_attention(runtime: Runtime, c: Config, seqs: int) -> tuple[str, str]:
    """The attention for `seqs` sequences: its name, and why it."""
    if not runtime.cuda:
        return "sdpa", "no CUDA"
    if c.attention != "auto":
        return c.attention, "as ATTENTION says"
    q, k, v = (torch.ones(seqs, c.train_seq_len, heads, c.head_dim, device=runtime.device,
                          dtype=runtime.dtype, requires_grad=True)
               for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads))
    starts = torch.arange(c.train_seq_len, device=q.device).expand(seqs, -1) % 1000 == 0

    def build(name: str) -> Callable:
        attend, mask = use_attention(name)
        require(name != "flex" or runtime.compiles, "nothing is compiled")
        if attend is not sdpa and runtime.compiles:
            attend = torch.compile(attend, fullgraph=True)  # some builds cannot be traced
        return functools.partial(attend, q, k, v, *[mask(starts)] * c.doc_attention)

    return fastest("attention", attentions(c), build, (q, k, v),
                   SDPA_KERNELS[0 if c.doc_attention else 2 :])  # many times slower, and large


def select_mlp(runtime: Runtime, c: Config, seqs: int) -> tuple[str, str]:
    """The training MLP for `seqs` sequences, torch or triton, and why it."""
    if not runtime.cuda:
        return "torch", "no CUDA"
    if c.mlp_kernel != "auto":
        return c.mlp_kernel, "as MLP_KERNEL says"
    x = torch.randn(seqs, c.train_seq_len, c.model_dim, device=runtime.device,
                    dtype=runtime.dtype, requires_grad=True)
    scale, mlp = vector(1).to(runtime.device), MLP(c).to(runtime.device)

    def build(name: str) -> Callable:
        mlp.fused = name == "triton"
        return functools.partial(runtime.compile(mlp), x, scale)

    return fastest("MLP", ["torch", "triton"], build, (x, *mlp.parameters()))


# --- 3 data -----------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 256 * 4


def open_shard(path: Path) -> np.ndarray:
    """The uint16 ids of a shard, memory-mapped; raises RunError naming the file."""
    size, again = path.stat().st_size, "fetch or re-tokenize this shard again"
    require(size >= SHARD_HEADER, f"{path}: {size} bytes, shorter than a shard's header; {again}")
    magic, version, count = np.fromfile(path, "<i4", 3).tolist()
    require((magic, version) == (SHARD_MAGIC, SHARD_VERSION), f"{path}: magic {magic} version "
            f"{version}, expected {SHARD_MAGIC} version {SHARD_VERSION}; {again}")
    require(size == SHARD_HEADER + 2 * count, f"{path}: {size} bytes, but the {count} tokens of "
            f"its header take {SHARD_HEADER + 2 * count}; {again}")
    return np.memmap(path, "<u2", "r", SHARD_HEADER, (count,)) if count else np.empty(0, "<u2")


def find_shards(c: Config, split: str) -> list[Path]:
    """Sorted paths of a split's shards; none is an error."""
    pattern = Path(c.data_path, f"fineweb_{split}_*.bin")
    paths = sorted(pattern.parent.glob(pattern.name))
    require(paths, f"no shards match {pattern}; set DATA_PATH to a folder that "
            "retokenize_scylla.py has written (PRESET=demo makes its own)")
    return paths


def check_ids(ids: np.ndarray, vocab_size: int, path: Path) -> np.ndarray:
    """`ids`; raises RunError naming their file if one is not of the vocabulary."""
    top = ids.max(initial=0)
    require(top < vocab_size, f"{path}: id {top} is not under VOCAB_SIZE={vocab_size}; set "
            "DATA_PATH and TOKENIZER_PATH to a matching pair")
    return ids


class Loader:
    """Batches of training sequences, a pure function of (seed, step), read ahead on a thread.

    An epoch is a random permutation of all sequence blocks of all shards, each shard cut at a
    random phase. Ranks take slices of one global batch, the same for any number of ranks.
    """

    def __init__(self, paths: list[Path], c: Config, runtime: Runtime, vocab_size: int) -> None:
        self.seq_len, self.vocab_size = c.train_seq_len, vocab_size
        self.seed = c.data_seed or c.seed
        self.runtime, self.batch_seqs = runtime, c.train_batch_tokens // c.train_seq_len
        self.paths = [path for path in paths if len(open_shard(path)) > self.seq_len]
        self.shards = [open_shard(path) for path in self.paths]
        require(self.paths, f"{paths[0]} and its siblings hold no sequence of {self.seq_len + 1} "
                "tokens; lower TRAIN_SEQ_LEN or add shards")
        require(self.batch_seqs % runtime.world == 0,
                f"WORLD_SIZE={runtime.world} does not divide the {self.batch_seqs} sequences of a "
                f"step; make TRAIN_BATCH_TOKENS a multiple of {runtime.world * self.seq_len}")
        self.slice = runtime.share_of(self.batch_seqs)
        targets = np.array([len(ids) - 1 for ids in self.shards])
        self.blocks = np.maximum(targets // self.seq_len - 1, 1)  # leaves room for the phase
        self.room, self.ends = targets - self.blocks * self.seq_len, np.cumsum(self.blocks)
        self.epoch = functools.lru_cache(maxsize=2)(self.shuffle)
        self.pool = ThreadPoolExecutor(1)
        self.ahead = 0, self.pool.submit(self.read, 0)

    def shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the blocks and phase of each shard in an epoch."""
        random = np.random.default_rng((self.seed, epoch))
        return random.permutation(self.ends[-1]), random.integers(0, self.room + 1)

    def sequence(self, index: int) -> np.ndarray:
        """The `seq_len + 1` ids of the index-th sequence of the run."""
        epoch, place = divmod(index, int(self.ends[-1]))
        order, phases = self.epoch(epoch)
        shard = int(np.searchsorted(self.ends, order[place], side="right"))
        block = int(order[place] - self.ends[shard] + self.blocks[shard])
        start = int(phases[shard]) + block * self.seq_len
        ids = self.shards[shard][start : start + self.seq_len + 1]
        return check_ids(ids, self.vocab_size, self.paths[shard])

    def read(self, step: int) -> Tensor:
        """This rank's sequences of a step on the host, int64 (sequences, seq_len + 1)."""
        first = step * self.batch_seqs
        ids = [self.sequence(first + i) for i in range(self.slice.start, self.slice.stop)]
        block = torch.from_numpy(np.stack(ids).astype(np.int64))
        return block.pin_memory() if self.runtime.cuda else block

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step on the device, each (sequences, seq_len)."""
        coming, reading = self.ahead
        block = reading.result() if coming == step else self.read(step)
        self.ahead = step + 1, self.pool.submit(self.read, step + 1)
        block = block.to(self.runtime.device, non_blocking=True)
        return block[:, :-1], block[:, 1:]


# --- 4 byte accounting: the only denominator in the file --------------


class ByteTable(NamedTuple):
    """Source bytes of each id: base, and one for a leading space unless after a boundary."""

    base_bytes: np.ndarray  # int64 (V,)
    has_leading_space: np.ndarray  # bool (V,)
    is_boundary: np.ndarray  # bool (V,): ids that begin a document, control ids
    path: Path

    def count(self, previous: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Bytes of each of `ids` after `previous`, int64, same shape."""
        return self.base_bytes[ids] + (self.has_leading_space[ids] & ~self.is_boundary[previous])


def table_from_meta(path: Path) -> ByteTable:
    """Byte table from a `.meta.npz`; raises RunError for what is missing or inconsistent."""
    try:
        with np.load(path, allow_pickle=False) as meta:
            base, space, boundary, vocab_size = (meta[name] for name in (
                "base_bytes", "has_leading_space", "is_boundary_token", "vocab_size"))
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path}: {error}; write it with retokenize_scylla.py") from error
    require({len(base), len(space), len(boundary)} == {int(vocab_size)},
            f"{path}: arrays of {len(base)} ids, but vocab_size is {int(vocab_size)}")
    return ByteTable(base.astype(np.int64), space.astype(bool), boundary.astype(bool), path)


def table_from_sentencepiece(path: Path) -> ByteTable:
    """Byte table of a SentencePiece model: byte pieces 1, control pieces 0 and boundary."""
    try:
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_file=str(path))
    except ImportError as error:
        raise RunError(f"{path} needs sentencepiece: pip install sentencepiece") from error
    except (OSError, RuntimeError) as error:
        raise RunError(f"{path}: not a SentencePiece model ({error}); fetch it again") from error
    require(model.piece_to_id("\u2581") != model.unk_id(), f"{path}: has no piece for a lone "
            "U+2581 (space), so bytes would be miscounted; train it with byte_fallback and U+2581")
    ids = range(model.vocab_size())
    boundary = [model.is_control(i) or model.is_unknown(i) or model.is_unused(i) for i in ids]
    texts = ["." if model.is_byte(i) else "" if boundary[i] else model.id_to_piece(i) for i in ids]
    space = np.array([text.startswith("\u2581") for text in texts])
    base = np.array([len(text.replace("\u2581", " ").encode()) for text in texts]) - space
    return ByteTable(base, space, np.array(boundary), path)


def load_byte_table(c: Config) -> ByteTable:
    """The byte table of the tokenizer that the settings name, else the manifest, else DATA_PATH."""
    named, folder = [Path(p) for p in (c.tokenizer_path, c.tokenizer_meta_path) if p], c.data_path
    with manifest_of(c) as manifest:
        kind = manifest.get("tokenizer", {}).get("kind")
    found = [path for pattern in ("*.meta.npz", "*.model") for path in Path(folder).glob(pattern)
             if kind is None or (path.suffix == ".model") == (kind == "sentencepiece")]
    if named:  # a vocabulary's table stands beside it
        found = [named[-1] if named[-1].suffix in (".model", ".npz") else
                 named[-1].with_suffix(".meta.npz")]
    require(len(found) == 1 and all(path.is_file() for path in found + named),
            "no single tokenizer: " + (show((*named, *sorted(found))) or "none in " + folder)
            + "; set TOKENIZER_PATH to a .model, or to a vocabulary with its .meta.npz beside it")
    table = (table_from_sentencepiece if found[0].suffix == ".model" else table_from_meta)(found[0])
    require(c.vocab_size in (0, len(table.base_bytes)), f"VOCAB_SIZE={c.vocab_size} but "
            f"{found[0]} has {len(table.base_bytes)} ids; leave VOCAB_SIZE unset")
    return table


class Validation(NamedTuple):
    """The validation stream with the bytes of every scored token."""

    ids: np.ndarray  # uint16 (N,)
    bytes: np.ndarray  # int16 (N - 1,): source bytes of ids[1:]
    audit: str  # exact, partial or unverified
    vocab_sha256: str  # of the vocabulary (manifest), else of the tokenizer's file


def load_validation(c: Config, table: ByteTable) -> Validation:
    """All validation ids with their audited bytes; raises RunError if the bytes are wrong."""
    paths = find_shards(c, "val")
    ids = np.concatenate([check_ids(np.asarray(open_shard(path)), len(table.base_bytes), path)
                          for path in paths])
    require(len(ids) > 1, f"{paths[0]}: {len(ids)} validation tokens; at least 2 are needed")
    require(not c.doc_attention or table.is_boundary[ids].any(), "DOC_ATTENTION=1, but by "
            f"{table.path} no validation token begins a document; set DOC_ATTENTION=0, or "
            "re-tokenize with a vocabulary that has such an id")
    cuts = range(1 << 22, len(ids) - 1, 1 << 22)  # bounds memory
    pieces = zip(np.split(ids[:-1], cuts), np.split(ids[1:], cuts), strict=True)
    scored = np.concatenate([table.count(*piece).astype(np.int16) for piece in pieces])
    counted = int(table.base_bytes[ids[0]]) + int(scored.sum(dtype=np.int64))
    source, bad, sha256 = read_ledger(c, paths)
    require(source in (None, counted) and not bad, "byte audit failed: the byte table counts "
            f"{counted} bytes, manifest.json {source} with {bad} bad documents; re-tokenize the "
            "data, or set TOKENIZER_PATH to the tokenizer it was made with")
    limit = c.val_tokens_limit or len(ids)
    audit = "unverified" if source is None else "partial" if limit < len(ids) else "exact"
    sha256 = sha256 or sha256_file(c.tokenizer_path or table.path)
    return Validation(ids[:limit], scored[: limit - 1], audit, sha256)


def read_ledger(c: Config, paths: list[Path]) -> tuple[int | None, int, str | None]:
    """Source bytes (None: not proven) and bad documents of shards, and the vocabulary's SHA-256."""
    with manifest_of(c) as manifest:
        tokenizer = manifest.get("tokenizer", {})
        if not tokenizer.get("byte_exact"):
            return None, 0, tokenizer.get("sha256")
        shards = [manifest["shards"][shard.name] for shard in paths]
        bad = sum(shard.get("bad_documents", 0) for shard in shards)
        return sum(shard["source_bytes"] for shard in shards), bad, tokenizer.get("sha256")


@contextlib.contextmanager
def manifest_of(c: Config) -> Iterator[dict[str, Any]]:
    """DATA_PATH's manifest.json, empty if there is none; RunError if the block cannot read it."""
    path = Path(c.data_path) / "manifest.json"
    try:
        yield json.loads(path.read_bytes()) if path.exists() else {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: no manifest of retokenize_scylla.py ({error!r}); re-tokenize the "
                       "data, or remove it and go without a byte audit") from error


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# --- 5 model ----------------------------------------------------------

RMS_EPS = torch.finfo(torch.float32).eps


def norm(x: Tensor) -> Tensor:
    """RMSNorm without weights over the last dimension."""
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)


def fake_quantize(weight: Tensor, bits: int, step: float = 0.0) -> Tensor:
    """`weight` on its export grid, with the gradient of the identity; bits 0: as it is."""
    if not bits:
        return weight
    scales = row_scales(weight.detach(), bits, step)
    return weight + (round_to_grid(weight.detach(), scales, bits) * scales - weight).detach()


class Matrix:
    """A module's fp32 master weight."""

    qat_bits, qat_step = 0, 0.0  # set by GPT.set_phase

    def values(self) -> Tensor:
        """What this phase computes with, before it is cast."""
        return fake_quantize(self.weight, self.qat_bits, self.qat_step)


class Linear(Matrix, nn.Linear):
    """Linear without bias, computed in the input's dtype."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def matrix(self, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        """The weight, its rows times `scale` (outputs, or 1): cheaper than to scale outputs."""
        weight = self.values() if scale is None else scale.unsqueeze(1) * self.values()
        return weight.to(dtype)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return F.linear(x, self.matrix(x.dtype, scale))


class Table(Matrix, nn.Embedding):
    """Embedding table, looked up in fp32: its gradient sums thousands of tokens in a row."""

    dtype = torch.float32  # of what it gives; set by GPT

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.values()).to(self.dtype)


def vector(*shape: int, value: float = 1.0) -> nn.Parameter:
    """A learned vector or scalar, filled with `value`."""
    return nn.Parameter(torch.full(shape, value))


def per_token(scalars: Tensor, x: Tensor) -> Tensor:
    """Scalars (n,) for each token of x (B, T, ...) -> (B, T, n, 1).

    Their gradients are summed token by token first, in a pass that reads those values anyway.
    """
    return scalars.view(-1, 1).expand(*x.shape[:2], -1, -1).to(x.dtype)


NO_ADAPTERS = (None,) * 4  # of a layer pass: for q, v, out and MLP


def adapted(y: Tensor, x: Tensor, adapter: tuple[Tensor, Tensor] | None) -> Tensor:
    """`y`, what a matrix gives for x (B, T, D), and what its adapter adds to it, if it has one.

    An adapter is A (B, R, D) and B (B, outputs, R): every row of the batch has its own.
    """
    return y if adapter is None else y + (x @ adapter[0].mT @ adapter[1].mT).view_as(y)


class BigramHash(nn.Module):
    """Embedding of the hashed pair (previous id, id); the last row where there is no pair."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.table = Table(c.bigram_vocab_size, c.bigram_dim)
        self.proj = Linear(c.bigram_dim, c.model_dim)
        self.scale = vector(1, value=0.05)

    def rows(self, ids: Tensor, starts: Tensor) -> Tensor:
        """Row of each position; `starts` (B, T) marks positions without a previous id."""
        rows, ids = self.table.num_embeddings, ids.to(torch.int32)
        hashed = (36313 * ids) ^ (27191 * ids.roll(1, dims=1))
        return torch.where(starts, rows - 1, hashed.remainder(rows - 1))

    def forward(self, ids: Tensor, starts: Tensor) -> Tensor:
        return self.proj(self.table(self.rows(ids, starts)), self.scale)


class SmearGate(nn.Module):
    """x <- (1 - g) x + g x_prev per dimension, except where a document starts."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate = vector(c.model_dim, value=0.0)

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate).to(x.dtype) * (~starts).unsqueeze(-1)
        return torch.lerp(x, x.roll(1, dims=1), g)


class ValueEmbedding(nn.Module):
    """One table of value embeddings shared by VE_LAYERS, with a scalar for each layer."""

    def __init__(self, c: Config, vocab_size: int) -> None:
        super().__init__()
        self.table, self.proj = Table(vocab_size, c.ve_dim), Linear(c.ve_dim, c.kv_dim)
        self.scale, self.layer_scale = vector(1, value=0.1), vector(len(c.ve_layers))

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """(B, T) -> (B, T, G * K) for each layer."""
        out = self.proj(self.table(ids))
        scales = (self.scale * self.layer_scale).to(out.dtype)
        return (scales.view(-1, 1, 1, 1) * out).unbind()


class Attention(nn.Module):
    """Causal GQA: RMS-normalised q and k, partial RoPE, query gain; optional XSA and head gates."""

    def __init__(self, c: Config, layer: int, attend: Callable) -> None:
        super().__init__()
        self.attend, self.head_dim, self.rope_dims = attend, c.head_dim, c.rope_dims
        self.exclusive = layer >= c.num_layers - c.xsa_last_n
        D, kv = c.model_dim, c.kv_dim
        self.q, self.k, self.v, self.out = Linear(D, D), Linear(D, kv), Linear(D, kv), Linear(D, D)
        self.q_gain = vector(c.num_heads, value=c.qk_gain_init)
        self.gate = vector(c.num_heads, c.attn_gate_dims, value=0.0) if c.attn_gate_dims else None

    def forward(self, x: Tensor, scale: Tensor, adapters: tuple, rope: tuple[Tensor, ...],
                value: Tensor | None, masks: tuple[Any, ...]) -> Tensor:
        B, T, _ = x.shape
        parts = [part.values() for part in (self.q, self.k, self.v)]  # one matmul reads x once
        y = F.linear(x, torch.cat(parts).to(x.dtype)).view(B, T, -1, self.head_dim)
        q, k, v = y.split([len(part) // self.head_dim for part in parts], dim=2)
        q, v = adapted(q, x, adapters[0]), adapted(v, x, adapters[1])
        v = v if value is None else v + value.view_as(v)
        q = rotate(norm(q) * per_token(self.q_gain, q), rope, self.rope_dims // 2)
        k = rotate(norm(k), rope, self.rope_dims // 2)
        y = self.attend(q, k, v, *masks)
        y = exclude_own_value(y, v) if self.exclusive else y
        if self.gate is not None:
            gate = F.linear(x[..., : self.gate.size(1)], self.gate.to(x.dtype))
            y = y * torch.sigmoid(0.5 * gate).unsqueeze(-1)
        y = y.reshape(B, T, -1)
        return adapted(self.out(y, scale), y, adapters[2])


def rope_table(length: int, c: Config) -> Tensor:
    """Factors of `rotate`, fp32 (3, length, 1, K): of a value and of its partner after or before.

    Beyond ROPE_DIMS they are 1, 0, 0.
    """
    frequencies = c.rope_base ** (-torch.arange(0, c.rope_dims, 2) / c.rope_dims)
    angles = torch.outer(torch.arange(length).float(), frequencies).unsqueeze(1)
    cos, sin, rest = angles.cos(), angles.sin(), (0, c.head_dim - c.rope_dims)
    halves = torch.stack((torch.cat((cos, cos), -1), F.pad(-sin, (0, c.rope_dims // 2)),
                          F.pad(sin, (c.rope_dims // 2, 0))))
    return torch.cat((F.pad(halves[:1], rest, value=1.0), F.pad(halves[1:], rest)))


def rotate(x: Tensor, rope: tuple[Tensor, ...], half: int) -> Tensor:
    """Rotate-half RoPE on the first 2 * half dimensions of each head; x (B, T, heads, K).

    Whole heads are rolled: inductor's kernels are a third faster than with slices joined again.
    """
    own, after, before = rope
    return x * own + x.roll(-half, dims=-1) * after + x.roll(half, dims=-1) * before


def exclude_own_value(y: Tensor, v: Tensor) -> Tensor:
    """XSA: remove from each head's output its component along the token's own value."""
    grouped = y.unflatten(2, (v.size(2), -1))  # (B, T, G, H / G, K)
    v = v.unsqueeze(3).expand_as(grouped)
    share = (grouped * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp_min(1e-24)
    return (grouped - share * v).view_as(y)


MLP_TILE = 128, 128, 64  # rows, columns and depth of a program's part of a product


@functools.cache
def mlp_kernel() -> Callable:
    """Triton's kernel for sm_90, both ways: up, u = a @ b.T and out = leaky_relu(u)^2; back,
    out = a @ b times the derivative of that at u.

    Arguments in capitals are given as tl.constexpr: packing takes annotations away.
    """
    import triton
    from triton import language as tl

    @triton.jit
    def kernel(a, b, u, out, rows, UP, SLOPE, K, N, ROWS, COLS, DEPTH):  # noqa: PLR0913
        across = tl.cdiv(N, COLS)
        tiles = tl.cdiv(rows, ROWS) * across
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=UP):
            row, col = tile // across * ROWS, tile % across * COLS
            total = tl.zeros((ROWS, COLS), tl.float32)
            for k in tl.range(0, K, DEPTH):
                right = b.load([col, k]).T if UP else b.load([k, col])
                total = tl.dot(a.load([row, k]), right, total)
            halves = tl.split(total.reshape(ROWS, 2, COLS // 2).permute(0, 2, 1))
            for half in tl.static_range(2):
                at, x = col + half * (COLS // 2), halves[half].to(tl.bfloat16)
                if UP:
                    u.store([row, at], x)
                    x = x.to(tl.float32)
                    x = tl.where(x > 0, x, SLOPE * x)
                    out.store([row, at], (x * x).to(tl.bfloat16))
                else:
                    y = u.load([row, at]).to(tl.float32)
                    y = tl.where(y > 0, 2 * y, 2 * SLOPE * SLOPE * y)
                    out.store([row, at], (x.to(tl.float32) * y).to(tl.bfloat16))

    return kernel


def launch_mlp(up: bool, a: Tensor, b: Tensor, u: Tensor, out: Tensor, slope: float) -> None:
    """Fill `out`, and `u` if up, by `mlp_kernel`; bf16, contiguous, widths multiples of 8."""
    from triton.language import constexpr
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows, cols, depth = MLP_TILE
    part, right = [rows, cols // 2], [cols, depth] if up else [depth, cols]
    operands = [TensorDescriptor.from_tensor(x, block) for x, block in (
        (a, [rows, depth]), (b, right), (u, part), (out, part))]
    programs = 1  # in Triton's interpreter
    if a.is_cuda:  # two on each multiprocessor: one computes while the other stores
        programs = 2 * torch.cuda.get_device_properties(a.device).multi_processor_count
    constants = map(constexpr, (up, slope, a.size(1), u.size(1), *MLP_TILE))
    mlp_kernel()[(programs,)](*operands, a.size(0), *constants, num_warps=4, num_stages=3)


@torch.library.custom_op("proteus::mlp", mutates_args=(),
                         schema="(Tensor x, Tensor up, Tensor down, float slope) -> Tensor[]")
def fused_mlp(x: Tensor, up: Tensor, down: Tensor, slope: float) -> list[Tensor]:
    """y = act @ down.T, u = x @ up.T and act = leaky_relu(u)^2, bf16; x (N, D), up (hidden, D)."""
    u, act = x.new_empty(len(x), len(up)), x.new_empty(len(x), len(up))
    launch_mlp(True, x.contiguous(), up.contiguous(), u, act, slope)
    return [act @ down.T, u, act]


@torch.library.custom_op("proteus::mlp_back", mutates_args=(),
                         schema="(Tensor dy, Tensor down, Tensor u, float slope) -> Tensor")
def fused_mlp_back(dy: Tensor, down: Tensor, u: Tensor, slope: float) -> Tensor:
    """The gradient for u: dy @ down times the derivative of leaky_relu(u)^2."""
    du = torch.empty_like(u)
    launch_mlp(False, dy.contiguous(), down.contiguous(), u, du, slope)
    return du


def save_for_mlp_back(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    """Keep what `differentiate_mlp` needs."""
    x, up, down, ctx.slope = inputs
    ctx.save_for_backward(x, up, down, *output[1:])


def differentiate_mlp(ctx: Any, grads: list[Tensor]) -> tuple:
    """Gradients for x, up and down; those for u and act are not there."""
    x, up, down, u, act = ctx.saved_tensors
    du = fused_mlp_back(grads[0], down, u, ctx.slope)
    return du @ up, du.T @ x, grads[0].T @ act, None


fused_mlp.register_fake(lambda x, up, down, slope: [
    torch.empty_like(x), *(x.new_empty(len(x), len(up)) for _ in "ua")])
fused_mlp_back.register_fake(lambda dy, down, u, slope: torch.empty_like(u))
fused_mlp.register_autograd(differentiate_mlp, setup_context=save_for_mlp_back)


class MLP(nn.Module):
    """up -> LeakyReLU(slope)^2 -> down."""

    fused = False  # whether training goes by `fused_mlp`; set by GPT

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.slope = c.activation_neg_slope
        self.up, self.down = Linear(c.model_dim, c.hidden_dim), Linear(c.hidden_dim, c.model_dim)

    def forward(self, x: Tensor, scale: Tensor, adapters: tuple = NO_ADAPTERS) -> Tensor:
        if self.fused and torch.is_grad_enabled():
            weights = self.up.matrix(x.dtype), self.down.matrix(x.dtype, scale)
            y = fused_mlp(x.flatten(0, -2), *weights, self.slope)[0].view_as(x)
        else:
            y = self.down(F.leaky_relu(self.up(x), self.slope).square(), scale)
        return adapted(y, x, adapters[3])


class Block(nn.Module):
    """One layer: attention and MLP on one residual stream in turn, or on two lanes at once."""

    def __init__(self, c: Config, layer: int, attend: Callable) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(c, layer, attend), MLP(c)
        self.norm_scale = 1 / math.sqrt(layer + 1) if c.ln_scale else 1.0
        self.attn_scale, self.mlp_scale = vector(c.model_dim), vector(c.model_dim)
        self.resid_mix = vector(2, c.model_dim)
        if layer >= c.parallel_start_layer:
            self.resid_mix_mlp, self.route = vector(2, c.model_dim), vector(4)

    def norm(self, x: Tensor) -> Tensor:
        """A sublayer's input."""
        return norm(x) * self.norm_scale

    def forward(self, lanes: tuple[Tensor, ...], x0: Tensor, mlp: MLP, adapters: tuple,
                *context: Any) -> tuple:
        """One or two lanes (B, T, D) -> as many; `context` is attention's rope, value and masks."""
        if len(lanes) == 1:
            x = mix(lanes[0], x0, self.resid_mix)
            x = x + self.attn(self.norm(x), self.attn_scale, adapters, *context)
            return (x + mlp(self.norm(x), self.mlp_scale, adapters),)
        lane_a, lane_m = lanes
        a = self.norm(mix(lane_a, x0, self.resid_mix))
        a = self.attn(a, self.attn_scale, adapters, *context)
        m = mlp(self.norm(mix(lane_m, x0, self.resid_mix_mlp)), self.mlp_scale, adapters)
        r = per_token(self.route, a).unbind(2)
        return lane_a + r[0] * a + r[2] * m, lane_m + r[1] * a + r[3] * m


def mix(x: Tensor, x0: Tensor, weights: Tensor) -> Tensor:
    """The input of a sublayer: weights[0] * x + weights[1] * x0; weights (2, D)."""
    weights = weights.to(x.dtype)
    return weights[0] * x + weights[1] * x0


class Phase(NamedTuple):
    """What the forward pass includes; each phase is one compiled graph."""

    recur: bool = False
    qat: bool = False


class LayerPass(NamedTuple):
    """One run of a layer: which one, with whose MLP, and what happens to lanes and skips."""

    layer: int
    repeat: int | None  # on an untied further pass, whose MLP it has; None: the layer's own
    lanes: bool
    store: bool  # keep the output for a skip
    skip: int | None  # index of the skip weight that adds the last stored output


def layer_plan(c: Config, recur: bool) -> list[LayerPass]:
    """The layers in the order in which they run; further passes neither store nor add skips."""
    half, plan = c.num_layers // 2, []
    for i in range(c.num_layers):
        lanes = i >= c.parallel_start_layer
        plan.append(LayerPass(i, None, lanes, i < half, i - half if half <= i < 2 * half else None))
        if recur and i == max(c.recur_layers, default=None):
            plan += [LayerPass(j, n if c.recur_untie_mlp else None, lanes, False, None)
                     for n, j in enumerate(c.repeated)]
    return plan


class GPT(nn.Module):
    """The model of a run; `forward` gives nats for each target.

    Initialisation:
        embed N(0, TIED_EMBED_INIT_STD)    value.table N(0, 0.01)    q, k, v, up orthogonal
        bigram.proj orthogonal (zero, like its table, it would never get a gradient)
        head, bigram.table, value.proj, out, down, all gates 0    lane_merge 0.5
        attn_scale, mlp_scale, route, skip_weights, value.layer_scale 1    q_gain QK_GAIN_INIT
        resid_mix, resid_mix_mlp (1, 0)    bigram.scale 0.05    value.scale 0.1
        softcap LOGIT_SOFTCAP, for positive and for negative logits
    """

    def __init__(self, c: Config, is_boundary: np.ndarray, runtime: Runtime,
                 initialize: bool = True) -> None:
        super().__init__()
        self.config, self.vocab_size = c, len(is_boundary)
        self.embed = Table(self.vocab_size, c.model_dim)
        self.head = None if c.tie_embeddings else Linear(c.model_dim, self.vocab_size)
        self.bigram = BigramHash(c) if c.bigram_vocab_size else None
        self.smear = SmearGate(c) if c.smear_enabled else None
        self.value = ValueEmbedding(c, self.vocab_size) if c.ve_enabled else None
        self.blocks = nn.ModuleList(Block(c, i, runtime.attention) for i in range(c.num_layers))
        self.repeat_mlps = nn.ModuleList(MLP(c) for _ in c.repeated if c.recur_untie_mlp)
        self.skip_weights = vector(c.num_layers // 2, c.model_dim)
        self.skip_gates = vector(*self.skip_weights.shape, value=0.0) if c.skip_gate else None
        self.softcap = vector(2, value=c.logit_softcap) if c.asym_softcap else None
        if c.parallel_start_layer < c.num_layers:
            self.lane_merge = vector(1, value=0.5)
        self.document_mask = runtime.document_mask if c.doc_attention else None
        self.plans = {recur: layer_plan(c, recur) for recur in (False, True)}
        self.recur, self.coarseness = False, 0.0  # of the grid that late QAT trains on
        rope = rope_table(max(c.train_seq_len, c.eval_seq_len), c).to(runtime.dtype)
        self.register_buffer("rope", rope, persistent=False)
        self.register_buffer("is_boundary", torch.tensor(is_boundary), persistent=False)
        padding = F.pad(torch.zeros(self.vocab_size), (0, -self.vocab_size % 8), value=-math.inf)
        self.register_buffer("padding", padding, persistent=False)  # of the logits
        self.settle(runtime)
        self.train_only(self.is_trained)
        if initialize:
            self.init_weights()
            self.to(runtime.device)

    def settle(self, runtime: Runtime) -> None:
        """Tell tables and MLPs in what dtype and by what kernel they compute."""
        for module in self.modules():
            if isinstance(module, Table):
                module.dtype = runtime.dtype
            elif isinstance(module, MLP):
                module.fused = runtime.fused_mlp and runtime.dtype == torch.bfloat16

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill all matrices and mixes as the class docstring says.

        A value depends on SEED and its parameter's name and shape alone, so that runs which differ
        in a feature begin alike in all else.
        """
        c = self.config
        normal = {"embed.weight": c.tied_embed_init_std, "value.table.weight": 0.01}
        for name, parameter in self.named_parameters():
            torch.manual_seed(zlib.crc32(f"{c.seed} {name}".encode()))
            if name in normal:
                nn.init.normal_(parameter, std=normal[name])
            elif re.fullmatch(r"(.*\.(q|k|v|up)|bigram\.proj)\.weight", name):
                nn.init.orthogonal_(parameter)
            elif name.endswith(".weight"):
                parameter.zero_()
            elif "resid_mix" in name:
                parameter[1] = 0

    def is_trained(self, name: str) -> bool:
        """Whether a parameter is trained before TTT."""
        return param_spec(name, self.config).optimizer != "ttt"

    def train_only(self, chosen: Callable[[str], bool]) -> list[nn.Parameter]:
        """Have gradients for the parameters whose names are `chosen` only; returns these."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(chosen(name))
        return [p for p in self.parameters() if p.requires_grad]

    def set_phase(self, phase: Phase) -> None:
        """Switch recurrence and fake quantization for the following calls."""
        self.recur = phase.recur
        for name, module in self.named_modules():
            if isinstance(module, Matrix):
                bits, module.qat_step = grid_of(f"{name}.weight", self.config, self.coarseness)
                module.qat_bits = bits if phase.qat and bits <= 8 else 0

    def repeats(self) -> list[tuple[Tensor, Tensor]]:
        """(base weight, repeat's weight) for each weight of the repeats' MLPs."""
        mlps = zip(self.config.repeated, self.repeat_mlps, strict=False)
        return [pair for layer, repeat in mlps for pair in zip(
            self.blocks[layer].mlp.parameters(), repeat.parameters(), strict=True)]

    def starts(self, ids: Tensor) -> Tensor:
        """Where a document begins, as far as `ids` (B, T) tell; bool, the same shape."""
        return self.is_boundary[ids].index_fill(1, ids.new_zeros(1), True)

    def embed_tokens(self, ids: Tensor, starts: Tensor) -> Tensor:
        """(B, T) -> (B, T, D): embedding and bigram, normalised, smeared within documents."""
        x = self.embed(ids)
        x = norm(x if self.bigram is None else x + self.bigram(ids, starts))
        return x if self.smear is None else self.smear(x, starts)

    def adapter_outputs(self) -> list[int]:
        """Outputs of the matrices that have an adapter: those of each pass, then the head."""
        c = self.config
        layer = [c.model_dim, c.kv_dim, c.model_dim, c.model_dim]
        return layer * len(self.plans[self.recur]) + [len(self.padding)]

    def adapters(self, a: Tensor, b: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Those of A (B, adapters, R, D) and B (B, outputs, R), scaled by TTT_LORA_ALPHA / R."""
        dtype = self.embed.dtype
        b = b.to(dtype) * (self.config.ttt_lora_alpha / b.size(2))
        return tuple(zip(a.to(dtype).unbind(1), b.split(self.adapter_outputs(), 1), strict=True))

    def hidden(self, ids: Tensor, adapters: tuple = ()) -> Tensor:
        """(B, T) -> (B, T, D): the normalised state that the head reads."""
        rope, layers = self.rope[:, : ids.size(1)].unbind(), self.config.ve_layers
        starts = self.starts(ids)
        x0 = self.embed_tokens(ids, starts)
        masks = (self.document_mask(starts),) if self.document_mask else ()
        values = {} if self.value is None else dict(zip(layers, self.value(ids), strict=True))
        lanes, stored = (x0,), []
        for i, run in enumerate(self.plans[self.recur]):
            block = self.blocks[run.layer]
            if run.skip is not None:
                weight = self.skip_weights[run.skip]
                if self.skip_gates is not None:
                    weight = weight * torch.sigmoid(self.skip_gates[run.skip])
                skip = weight.to(x0.dtype) * stored.pop()
                lanes = tuple(lane + skip for lane in lanes)
            if run.lanes and len(lanes) == 1:
                lanes = lanes * 2
            mlp = block.mlp if run.repeat is None else self.repeat_mlps[run.repeat]
            here = adapters[4 * i : 4 * i + 4] or NO_ADAPTERS
            lanes = block(lanes, x0, mlp, here, rope, values.get(run.layer), masks)
            if run.store:
                stored.append(lanes[0])
        if len(lanes) == 2:
            lanes = (torch.lerp(lanes[1], lanes[0], per_token(self.lane_merge, x0).squeeze(2)),)
        return norm(lanes[0])

    def padded_logits(self, ids: Tensor, h: Tensor | None = None,
                      adapters: tuple = (None,)) -> Tensor:
        """Logits with columns of -inf up to a multiple of 8: GEMMs need rows of whole 16 bytes."""
        h, cap = self.hidden(ids) if h is None else h, self.config.logit_softcap
        weight = F.pad((self.head or self.embed).values(), (0, 0, 0, -self.vocab_size % 8))
        z = F.linear(h, weight.to(h.dtype))
        z = adapted(z, h, adapters[-1]).float()
        if self.softcap is not None:
            cap = torch.where(z > 0, *self.softcap)
        return cap * torch.tanh(z / cap) + self.padding

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, V), fp32, softcapped."""
        return self.padded_logits(ids)[..., : self.vocab_size]

    def forward(self, ids: Tensor, targets: Tensor, h: Tensor | None = None,
                adapters: tuple = (None,)) -> Tensor:
        """Nats of each target given the ids up to its position; all (B, T), result fp32.

        `h` (B, T, D): the hidden state, if it is known; `adapters`: those that it was made with.
        """
        logits = self.padded_logits(ids, h, adapters).flatten(0, 1)
        cap = self.config.logit_softcap
        cap = cap if self.softcap is None else self.softcap[0].detach()  # of the largest logits
        total = (logits - cap).exp().sum(-1).log() + cap  # softcapped, they need no maximum
        return (total + F.nll_loss(logits, targets.flatten(), reduction="none")).view_as(targets)


class ParamSpec(NamedTuple):
    """How a parameter is trained and stored; bits <= 8: codes, 16: fp16, 32: fp32."""

    kind: str
    optimizer: str
    decay: bool
    bits: int
    step: float = 0.0  # quantization step against the other classes', in row standard deviations


# The one table of all parameters, first match wins: pattern, kind, optimizer, decay, bits, step.
# Steps are reverse water-filling, (measured loss per weight and squared step) ** -1/2: what the
# last bytes buy is then the same in every class (records/studies/quantization.py steps).
PARAM_TABLE = (
    (r"embed\.weight", "embed", "embed", True, 8, 0.1),
    (r"(bigram|value)\.table\.weight", "embed", "embed", True, 8, 0.7),
    (r"head\.weight", "embed", "head", True, 8, 0.1),
    (r"blocks\.\d+\.attn\.(q|k|v|out)\.weight", "attn", "muon", True, 6, 1.3),
    (r"repeat_mlps\.\d+\.(up|down)\.weight", "repeat", "muon", True, 6, 1.4),
    (r"blocks\.(?P<layer>\d+)\.mlp\.up\.weight", "mlp", "muon", True, 5, 0.65),
    (r"blocks\.(?P<layer>\d+)\.mlp\.down\.weight", "mlp", "muon", True, 5, 1.0),
    (r"(bigram|value)\.proj\.weight", "projection", "scalar", True, 16),
    (r".*(scale|mix|mix_mlp|gain|gates?|route|merge|skip_weights)", "vector", "scalar", False, 32),
    (r"softcap", "vector", "ttt", False, 32),  # training leaves it alone
)


@functools.cache
def param_spec(name: str, c: Config) -> ParamSpec:
    """The table's row for a parameter, INT6 layers and CLASS_BITS applied."""
    edge = c.num_layers if c.n_int6_layers is None else c.n_int6_layers // 2
    for pattern, *row in PARAM_TABLE:
        if match := re.fullmatch(pattern, name):
            spec = ParamSpec(*row)
            if spec.kind == "mlp" and not edge <= int(match["layer"]) < c.num_layers - edge:
                spec = spec._replace(bits=6)
            return spec._replace(bits=parse_class_bits(c.class_bits).get(spec.kind, spec.bits))
    raise AssertionError(f"parameter {name} is in no row of PARAM_TABLE")


def grid_of(name: str, c: Config, coarseness: float) -> tuple[int, float]:
    """(bits, least step in row deviations) at a coarseness, the one knob of the fit.

    0 is as fine as the bits allow; with N_INT6_LAYERS=auto, MLPs whose steps are wide are INT5.
    """
    kind, _, _, bits, step = param_spec(name, c)
    free = kind in ("mlp", "repeat") and c.n_int6_layers is None and kind not in c.class_bits
    wide = largest_code(5) * coarseness * step >= HARMLESS_CLIP
    return 5 if free and wide else bits, coarseness * step


# --- 6 optimization ---------------------------------------------------

CLOCK_RESERVE_MS = 250.0  # of MAX_WALLCLOCK_SECONDS, kept free for timing noise


def usable_ms(c: Config) -> float:
    """Milliseconds that training steps may take: the cap less the reserve, or without end."""
    cap_ms = 1e3 * c.max_wallclock_seconds or math.inf
    return max(1.0, cap_ms - CLOCK_RESERVE_MS)


def share_of_run(step: float, elapsed_ms: float, c: Config) -> float:
    """How much of the run is over, of its steps or of the time that it may take."""
    return max(step / c.iterations, elapsed_ms / usable_ms(c))


def lr_scale(step: float, elapsed_ms: float, step_ms: float, c: Config) -> float:
    """Learning rate over its peak: 1, then linear to MIN_LR over WARMDOWN_ITERS.

    Steps are left by ITERATIONS, and by the clock at `step_ms` a step; below 1 it is a share.
    """
    left = c.iterations - step
    if c.warmdown_iters < 1:
        left = 1 - share_of_run(step, elapsed_ms, c)
    elif step_ms > 0:
        left = min(left, (usable_ms(c) - elapsed_ms) / step_ms)
    share = min(1.0, max(0.0, left / c.warmdown_iters)) if c.warmdown_iters else 1.0
    return c.min_lr + (1 - c.min_lr) * share


def muon_taper(step: float, elapsed_ms: float, c: Config) -> float:
    """Muon's weight decay over MUON_WD: 1, and from MUON_WD_TAPER's START linearly to its END."""
    start, end = c.muon_wd_taper or (1.0, 1.0)
    late = max(0.0, share_of_run(step, elapsed_ms, c) - start) / max(1 - start, 1e-9)
    return 1 + (end - 1) * min(1.0, late)


def muon_momentum(step: int, c: Config) -> float:
    """Momentum at a step: linear from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM."""
    share = min(1.0, step / c.muon_momentum_warmup_steps) if c.muon_momentum_warmup_steps else 1.0
    return (1 - share) * c.muon_momentum_warmup_start + share * c.muon_momentum


def recurrence_due(step: int, elapsed_ms: float, c: Config) -> bool:
    """Whether recurrence runs at a step; RECUR_START_STEP < 1 is a share of the run."""
    reached = step if c.recur_start_step >= 1 else share_of_run(step, elapsed_ms, c)
    return bool(c.repeated) and reached >= c.recur_start_step


# (a, b, c) of x <- a x + b x^3 + c x^5 on singular values; the last serves all further steps.
# Polar Express (Amsel et al. 2025): of all such steps these leave the largest distance from 1
# smallest, if at first all values are in 0.001..1 (computed by Remez' algorithm; a test checks it).
# Divided by powers of 1.01, so that rounding does not carry a value beyond what they are made for.
COEFFICIENTS = dict(
    quintic=((3.4445, -4.7750, 2.0315),),
    polar=((8.386464, -24.369650, 17.725117), (4.141420, -3.017275, 0.552427),
           (3.922631, -2.867185, 0.535652), (3.254046, -2.392233, 0.482733),
           (2.251238, -1.596291, 0.395991)))


def newton_schulz(g: Tensor, steps: int, coefficients: str = "quintic") -> Tensor:
    """Nearly orthogonal matrices with the singular vectors of g (n, rows, cols); Muon."""
    x, triples = g.mT if g.size(-2) > g.size(-1) else g, COEFFICIENTS[coefficients]
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for step in range(steps):
        a, b, c = triples[min(step, len(triples) - 1)]
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if g.size(-2) > g.size(-1) else x


def deal(costs: list[float], ranks: int) -> list[int]:
    """The owner of each item: the most costly first, each to the rank with the least so far."""
    loads, owners = [0.0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


class Stack(NamedTuple):
    """Matrices of one owner, group and shape, and where they begin in the owner's row."""

    owner: int
    params: list[nn.Parameter]
    start: int

    def view(self, row: Tensor) -> Tensor:
        """Their part of a row, (n, rows, cols)."""
        n, shape = len(self.params), self.params[0].shape
        return row[self.start : self.start + n * shape.numel()].view(n, *shape)


class Muon:
    """Momentum, orthogonalised, for matrices, each of which one rank owns as a whole.

    What travels lies packed in a buffer with a row for each owner:
        reduce   one reduce-scatter sums the gradients at their owners
        start    owners alone have momentum, and orthogonalise same shapes at once; one all-gather
                 of the updates begins, in the compute dtype
        finish   once it has ended (AdamW runs meanwhile) every rank moves all weights alike
    Nothing overlaps with backward: compiled, it is one graph, all gradients appear at its end.
    A group without gradients (repeats before recurrence starts) is neither moved nor decayed.
    """

    def __init__(self, groups: list[list[nn.Parameter]], c: Config, runtime: Runtime) -> None:
        self.config, self.runtime = c, runtime
        items = [(p, number) for number, group in enumerate(groups) for p in group]
        owners = deal([p.numel() * min(p.shape) for p, _ in items], runtime.world)
        alike: dict[tuple[int, int, torch.Size], list[nn.Parameter]] = {}
        for (p, number), owner in zip(items, owners, strict=True):
            alike.setdefault((owner, number, p.shape), []).append(p)
        self.stacks, filled = [], [0] * runtime.world
        for (owner, _, shape), params in alike.items():
            self.stacks.append(Stack(owner, params, filled[owner]))
            filled[owner] += len(params) * shape.numel()
        self.grads = torch.zeros(runtime.world, max(filled), device=runtime.device)
        self.updates = torch.zeros_like(self.grads, dtype=runtime.dtype)
        self.momentum = torch.zeros_like(self.grads[0])  # of this rank's own matrices

    def matrices(self, rows: Tensor, stacks: list[Stack]) -> list[Tensor]:
        """The matrices of `stacks` in `rows` (world, n), as views."""
        return [m for stack in stacks for m in stack.view(rows[stack.owner])]

    @torch.no_grad()
    def reduce(self) -> Tensor:
        """Sum gradients at their owners; returns the sum of squares of this rank's own, (1,)."""
        self.moving = [stack for stack in self.stacks if stack.params[0].grad is not None]
        self.moved = [p for stack in self.moving for p in stack.params]
        torch._foreach_copy_(self.matrices(self.grads, self.moving), [p.grad for p in self.moved])
        row = self.runtime.reduce_scatter(self.grads)
        self.own = [(stack.view(row), stack) for stack in self.moving
                    if stack.owner == self.runtime.rank]
        return sum((g.square().sum() for g, _ in self.own), row.new_zeros(1))

    @torch.no_grad()
    def start(self, factor: Tensor, momentum: float) -> None:
        """Updates of this rank's matrices from `factor` times their gradients, sent to all."""
        for grads, stack in self.own:
            buffer = stack.view(self.momentum)
            buffer.mul_(momentum).add_(grads.mul_(factor))
            update = grads.add_(buffer, alpha=momentum).to(self.runtime.dtype)
            if self.config.muon_row_norm:
                update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7)
            update = newton_schulz(update, self.config.muon_backend_steps,
                                   self.config.muon_coefficients)
            stack.view(self.updates[stack.owner]).copy_(update)
        self.arrived = self.runtime.all_gather(self.updates)

    @torch.no_grad()
    def finish(self, lr: float, taper: float = 1.0) -> None:
        """Decay, by `taper` times MUON_WD, and update every weight at `lr`."""
        self.arrived()
        updates = self.matrices(self.updates.float(), self.moving)
        rates = [-lr * math.sqrt(max(1.0, p.size(0) / p.size(1))) for p in self.moved]
        torch._foreach_mul_(self.moved, 1 - lr * self.config.muon_wd * taper)
        torch._foreach_add_(self.moved, torch._foreach_mul(updates, rates))

    def copy_momentum(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Give the second of each pair the momentum of the first, whoever owns them."""
        rows = torch.zeros_like(self.grads)
        rows[self.runtime.rank] = self.momentum
        self.runtime.all_gather(rows)()
        found = {p: m for stack in self.stacks
                 for p, m in zip(stack.params, stack.view(rows[stack.owner]), strict=True)}
        for first, second in pairs:
            found[second].copy_(found[first])
        self.momentum.copy_(rows[self.runtime.rank])


class Optimizer:
    """Muon and AdamW over all parameters, dealt out by PARAM_TABLE, each to exactly one group."""

    def __init__(self, model: GPT, c: Config, runtime: Runtime) -> None:
        self.config, self.runtime = c, runtime
        alike: dict[tuple[str, str, bool], list[nn.Parameter]] = {}  # by kind, optimizer, decay
        for name, parameter in model.named_parameters():
            alike.setdefault(param_spec(name, c)[:3], []).append(parameter)
        self.muon = Muon([ps for (_, role, _), ps in alike.items() if role == "muon"], c, runtime)
        rates = {"embed": c.tied_embed_lr if c.tie_embeddings else c.embed_lr,
                 "head": c.head_lr, "scalar": c.scalar_lr}
        groups = [dict(params=params, peak=rates[role], weight_decay=c.adam_wd * decay)
                  for (_, role, decay), params in alike.items() if role in rates]
        self.adam = torch.optim.AdamW(groups, betas=(c.beta1, c.beta2), eps=c.adam_eps,
                                      fused=runtime.cuda)
        self.small = [p for group in groups for p in group["params"]]
        for p in self.small:  # as AdamW would make it, so that a checkpoint can be read into it
            self.adam.state[p] = dict(step=torch.zeros((), device=runtime.device),
                                      exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))

    @torch.no_grad()
    def step(self, facts: Tensor, scale: float, momentum: float, taper: float = 1.0) -> Tensor:
        """One update of all parameters with gradients, at `scale` times the peak rates.

        Clips the mean gradient of all ranks; returns the sums of their `facts`, and its norm.
        Muon has its `momentum`, and `taper` times its weight decay.
        """
        squares, world = self.muon.reduce(), self.runtime.world
        grads = [p.grad for p in self.small if p.grad is not None]
        sizes = [g.numel() for g in grads]
        packed = self.runtime.all_reduce(torch.cat([*(g.flatten() for g in grads), facts, squares]))
        small, facts, squares = packed.split([sum(sizes), len(facts), 1])
        norm = (squares + small.square().sum()).sqrt() / world
        factor = ((self.config.grad_clip_norm or math.inf) / (norm + 1e-6)).clamp(max=1.0) / world
        self.muon.start(factor, momentum)
        parts = (small * factor).split(sizes)
        torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])
        for group in self.adam.param_groups:
            group["lr"] = scale * group["peak"]
        self.adam.step()
        self.muon.finish(scale * self.config.matrix_lr, taper)
        return torch.cat((facts, norm))


class Average:
    """EMA of all weights with warmed-up decay, and the mean of snapshots (SWA)."""

    def __init__(self, model: GPT, c: Config) -> None:
        self.config, self.params, self.snapshots = c, list(model.parameters()), 0
        self.ema = [p.detach().clone() for p in self.params] if c.ema_decay else []
        self.swa = [torch.zeros_like(p) for p in self.params] if c.swa_enabled else []

    @torch.no_grad()
    def update(self, step: int, scale: float) -> None:
        """Take in the weights after `step` (from 0), made at learning rate scale `scale`."""
        if self.ema:
            decay = min(self.config.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.ema, self.params, 1 - decay)
        if self.swa and scale < 0.2 and (step + 1) % self.config.swa_every == 0:
            self.snapshots += 1
            torch._foreach_lerp_(self.swa, self.params, 1 / self.snapshots)

    @torch.no_grad()
    def store(self) -> str:
        """Write the weights to export into the model; returns which: swa, ema or last.

        A run that was too short for a snapshot is not lost: it falls back on the EMA.
        """
        swa = self.swa if self.snapshots else []
        if swa or self.ema:
            torch._foreach_copy_(self.params, swa or self.ema)
        return "swa" if swa else "ema" if self.ema else "last"


# --- 7 quantization ---------------------------------------------------

QUANTILES = (1.0, 0.99999, 0.9999, 0.9995, 0.999)  # of |row|, candidates for the largest code
SMALLEST_SCALE = 2.0**-24  # of fp16; the scale of a row of zeros
HARMLESS_CLIP = 6.0  # row standard deviations: beyond this the largest code cuts next to nothing
COARSEST = 2.0  # row standard deviations; with larger steps little is left of a matrix
FIT_MARGIN = 0.003  # of the room for the artifact: what the fit leaves free, or up to twice that


def largest_code(bits: int) -> int:
    """Codes are -n..n: 31 at INT6, 15 at INT5."""
    return 2 ** (bits - 1) - 1


def round_to_grid(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Integer codes, as floats, of a matrix (R, C) with row scales (R, 1)."""
    return (weight / scales).round().clamp(-largest_code(bits), largest_code(bits))


def row_quantiles(magnitudes: Tensor) -> Tensor:
    """QUANTILES of each row (R, C), interpolated linearly -> (R, quantiles); no full sort."""
    places = [(1 - q) * (magnitudes.size(1) - 1) for q in QUANTILES]
    columns, top = torch.arange(magnitudes.size(1), device=magnitudes.device), []
    for _ in range(math.ceil(max(places)) + 1):  # the largest, and the row goes on without it
        largest, column = magnitudes.max(1, keepdim=True)
        top.append(largest)
        magnitudes = magnitudes.masked_fill(columns == column, -1)
    return torch.cat([torch.lerp(top[int(place)], top[math.ceil(place)], place % 1)
                      for place in places], dim=1)


def as_stored(scales: Tensor) -> Tensor:
    """Scales (not negative) rounded to fp16, as fp32.

    Their sign bit is cleared because inductor would drop a mere cast and back (torch 2.11 does).
    """
    return (scales.half().view(torch.int16) & 0x7FFF).view(torch.float16).float()


def row_scales(weight: Tensor, bits: int, step: float = 0.0) -> Tensor:
    """Row scales (R, 1), exact in fp16: of all QUANTILES the one with the least squared error.

    None is under `step` row standard deviations: wider steps are what makes codes cheaper.
    """
    clips = row_quantiles(weight.abs()) / largest_code(bits)
    scales = as_stored(clips.clamp_min(SMALLEST_SCALE)).unsqueeze(2)  # (R, quantiles, 1)
    grids = round_to_grid(weight.unsqueeze(1), scales, bits) * scales
    errors = (grids - weight.unsqueeze(1)).square().sum(2)
    best = scales.squeeze(2).gather(1, errors.argmin(1, keepdim=True))
    return best.maximum(as_stored(step * weight.std(1, correction=0, keepdim=True)))


@torch.no_grad()
def input_hessians(model: GPT, batches: tuple[Tensor, ...], runtime: Runtime) -> dict[str, Tensor]:
    """Sum of x x^T over all ranks' inputs x of each matrix, fp32 (C, C), by the matrix's name.

    q, k and v share one; both passes of a shared layer add up; the head reads the final states.
    """
    def add(total: Tensor, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        total.addmm_(x.mT, x)

    head = "embed.weight" if model.head is None else "head.weight"
    sums, hooks = {head: torch.zeros(2 * (model.config.model_dim,), device=runtime.device)}, []
    for name, module in model.named_modules():
        if re.search(r"\.(attn|out|up|down)$", name):
            width = getattr(module, "in_features", model.config.model_dim)
            total = torch.zeros(width, width, device=runtime.device)
            hooks.append(module.register_forward_pre_hook(functools.partial(add, total)))
            sums[f"{name}.weight"] = total
    for ids in batches:
        add(sums[head], model, (model.hidden(ids),))
    for hook in hooks:
        hook.remove()
    sums = {name: runtime.all_reduce(total) for name, total in sums.items()}
    return {name.replace("attn.weight", f"attn.{leaf}.weight"): total
            for name, total in sums.items() for leaf in "qkv"}


def gptq(weight: Tensor, hessian: Tensor, scales: Tensor, bits: Tensor) -> Tensor:
    """Codes (n, R, C), as floats, whose outputs on the inputs behind `hessian` (n, C, C) err least.

    Column by column, each rounding error is made up for by the columns after it, in the order of
    descending diagonal (Frantar et al. 2022); scales (n, R, 1), bits (n, 1, 1).
    """
    hessian, C = hessian.double(), weight.size(2)
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30).view(-1, 1, 1)
    eye = torch.eye(C, dtype=hessian.dtype, device=hessian.device)
    hessian = hessian / mean + 0.01 * eye  # inputs that are always 0 keep a diagonal of 0.01
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    hessian = hessian.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None], 2)
    # H = R R^T with R upper, so H^-1 = U^T U with U = R^-1 upper: what GPTQ needs, in one inversion
    upper = torch.linalg.cholesky(hessian.flip(1, 2)).flip(1, 2)
    upper = torch.linalg.solve_triangular(upper, eye.expand_as(upper), upper=True).float()
    weight = weight.take_along_dim(order[:, None], 2)
    codes = torch.empty_like(weight)
    for start in range(0, C, 128):
        stop = min(start + 128, C)
        part, inner = weight[:, :, start:stop].clone(), upper[:, start:stop, start:stop]
        errors = torch.empty_like(part)
        for i in range(stop - start):
            now = slice(i, i + 1)
            code = round_to_grid(part[:, :, now], scales, bits)
            errors[:, :, now] = (part[:, :, now] - code * scales) / inner[:, now, now]
            codes[:, :, start + i] = code.squeeze(2)
            part[:, :, i:].baddbmm_(errors[:, :, now], inner[:, now, i:], alpha=-1)
        weight[:, :, stop:].baddbmm_(errors, upper[:, start:stop, stop:], alpha=-1)
    return codes.take_along_dim(order.argsort(1)[:, None], 2)


class Stored(NamedTuple):
    """A tensor as it is stored: integer codes with row scales, or plain values without."""

    kind: str  # of PARAM_TABLE; tensors of one kind and bits share a stream
    bits: int
    values: np.ndarray  # int8 codes, float16 or float32, in the tensor's shape
    scales: np.ndarray | None  # float16 (rows,)

    def restore(self) -> Tensor:
        """The weights that these values stand for, fp32."""
        scales = 1.0 if self.scales is None else torch.tensor(self.scales).float().unsqueeze(1)
        return torch.tensor(self.values).float() * scales


def gptq_codes(state: Mapping[str, Tensor], grids: Mapping[str, tuple[int, Tensor | None]],
               hessians: Mapping[str, Tensor], runtime: Runtime) -> dict[str, Tensor]:
    """int8 codes of every matrix with a Hessian; ranks share the work, equal shapes are batched."""
    names = sorted(hessians.keys() & state.keys(), key=lambda name: (*state[name].shape, name))
    codes = {name: torch.zeros_like(state[name], dtype=torch.int8) for name in names}
    mine = names[runtime.rank :: runtime.world]
    for shape in dict.fromkeys(state[name].shape for name in mine):
        same = [name for name in mine if state[name].shape == shape]
        weights, moments = (torch.stack([of[name] for name in same]) for of in (state, hessians))
        bits, scales = zip(*(grids[name] for name in same), strict=True)
        bits = weights.new_tensor(bits).view(-1, 1, 1)
        batch = gptq(weights, moments, torch.stack(scales), bits)
        codes |= zip(same, batch.to(torch.int8), strict=True)
    return {name: runtime.all_reduce(codes[name]) for name in names}


def quantize(state: Mapping[str, Tensor], c: Config, coarseness: float = 0.0,
             hessians: Mapping[str, Tensor] | None = None,
             runtime: Runtime | None = None) -> dict[str, Stored]:
    """Every tensor of `state` as PARAM_TABLE stores it; raises RunError if one is not finite.

    Matrices with a Hessian by GPTQ on all ranks of `runtime`, the others to the nearest.
    """
    stored, grids = {}, {}
    for name, tensor in state.items():
        require(torch.isfinite(tensor).all(), f"{name} is not finite; nothing was exported")
        bits, step = grid_of(name, c, coarseness)
        grids[name] = bits, row_scales(tensor.float(), bits, step) if bits <= 8 else None
    codes = gptq_codes(state, grids, hessians, runtime) if hessians else {}
    for name, (bits, scales) in grids.items():
        values = state[name].half() if bits == 16 else state[name].float()
        if bits <= 8:
            values = codes[name] if name in codes else round_to_grid(values, scales, bits)
            values, scales = values.to(torch.int8), scales.squeeze(1).half().cpu().numpy()
        stored[name] = Stored(param_spec(name, c).kind, bits, values.cpu().numpy(), scales)
    return stored


def predicted_bytes(model: GPT, c: Config, coarseness: float) -> dict[str, float]:
    """Artifact bytes by kind, without training: a code takes 2.05 - log2 step bits, step in sigma.

    At coarseness 0 the largest code lies at 6 sigma for trained rows: then the published artifact
    (its repeats at INT5) comes out at its 15.8 MB.
    """
    expected: dict[str, float] = {}
    for name, p in model.named_parameters():
        bits, step = grid_of(name, c, coarseness)
        coded, kind = bits <= 8, param_spec(name, c).kind
        bits = 2.05 - math.log2(max(step, 6 / 2 ** (bits - 1))) if coded else bits
        expected[kind] = expected.get(kind, 0) + p.numel() * bits / 8 + 2 * p.size(0) * coded
    return expected


def sampled_bytes(state: Mapping[str, Tensor], c: Config, coarseness: float) -> float:
    """Artifact bytes by the entropies of some 64 rows of each tensor, rounded to the nearest."""
    sample = {name: p[:: max(1, len(p) // 64)] for name, p in state.items()}
    sizes = {n: s.values.nbytes if s.scales is None else entropy_bytes(s.values) + s.scales.nbytes
             for n, s in quantize(sample, c, coarseness).items()}
    return sum(size * state[n].numel() / sample[n].numel() for n, size in sizes.items())


def least_coarseness(bytes_at: Callable[[float], float], c: Config) -> float:
    """The smallest coarseness at which code and artifact are within SIZE_LIMIT; bisected.

    0 where nothing is to be solved: QUANT=rtn with a fixed N_INT6_LAYERS.
    """
    room, low, high = c.size_limit - CODE_BYTES, 0.0, COARSEST
    if (c.quant == "rtn" and c.n_int6_layers is not None) or bytes_at(low) <= room:
        return low
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (low, middle) if bytes_at(middle) <= room else (middle, high)
    return high


# --- 8 artifact -------------------------------------------------------

ARTIFACT_MAGIC = b"PROTEUS 4\n"  # the number is that of the format
SETTINGS = [f.name for f in fields(Config)]
MODEL_FIELDS = SETTINGS[SETTINGS.index("num_layers"):SETTINGS.index("train_batch_tokens")]
LZMA_FILTERS = [dict(id=lzma.FILTER_LZMA2, preset=9 | lzma.PRESET_EXTREME, lc=0, lp=0, pb=0)]
RANS_BITS, RANS_LEAST = 14, 1 << 16  # of a probability; least state of a lane
RANS_STEPS, RANS_BLOCK = 16384, 2048  # bytes of a lane; those of them that share a model


class ArtifactError(RunError):
    """An artifact that cannot be trusted, or not read here; the message says why."""


def rans_shape(size: int) -> tuple[int, int, int]:
    """(lanes, steps, blocks of a lane) for `size` bytes: about RANS_STEPS of any size."""
    lanes = max(1, size // RANS_STEPS)
    steps = max(1, -(-size // lanes))
    return lanes, steps, -(-steps // RANS_BLOCK)


def rans_encode(raw: bytes) -> bytes:
    """Range asymmetric numeral systems (Duda 2013): lanes of bytes are coded side by side.

    A block is coded by one of up to 4 order-0 models, dealt out by its mean magnitude as int8.
    """
    lanes, steps, _ = rans_shape(len(raw))
    symbols = np.pad(np.frombuffer(raw, np.int8), (0, lanes * steps - len(raw)))
    symbols = symbols.reshape(lanes, steps).T.copy()
    starts, models = np.arange(0, steps, RANS_BLOCK), min(4, 1 + len(raw) // 65536)
    levels = np.add.reduceat(np.abs(symbols, dtype=np.float32), starts)
    levels /= np.diff(starts, append=steps)[:, None]
    kinds = np.searchsorted(np.quantile(levels, np.arange(1, models) / models), levels)
    places = (kinds << 8).repeat(RANS_BLOCK, 0)[:steps] + symbols.view(np.uint8)
    counts = np.bincount(places.ravel(), minlength=models << 8).reshape(models, 256)
    used = counts > 0
    spare = (1 << RANS_BITS) - used.sum(1, keepdims=True)
    share = used + counts * spare // counts.sum(1, keepdims=True).clip(1)
    share[np.arange(models), counts.argmax(1)] += (1 << RANS_BITS) - share.sum(1)
    frequency, below = (a.ravel().astype(np.uint64) for a in (share, share.cumsum(1) - share))
    state, words = np.full(lanes, RANS_LEAST, np.uint64), []
    for place in places[::-1]:
        spill = state >= frequency[place] << (32 - RANS_BITS)
        words.append(state[spill].astype("<u2").tobytes())
        state[spill] >>= 16
        whole, rest = np.divmod(state, frequency[place])
        state = (whole << RANS_BITS) + rest + below[place]
    head = zlib.compress(share.astype("<u2").tobytes() + kinds.astype(np.uint8).tobytes(), 9)
    head = struct.pack("<BI", models, len(head)) + head + state.astype("<u4").tobytes()
    return head + b"".join(reversed(words))


def rans_decode(data: bytes, size: int) -> bytes:
    """Inverse of rans_encode; raises ValueError on data that it cannot have made.

    A lane has at least 4 bytes, so `size` and the work are bounded by what `data` can stand for.
    """
    lanes, steps, blocks = rans_shape(size)
    models, length = struct.unpack_from("<BI", data)
    state = np.frombuffer(data, "<u4", lanes, 5 + length).astype(np.uint64)
    words = np.frombuffer(data[5 + length + 4 * lanes :], "<u2").astype(np.uint64)
    head = zlib.decompressobj().decompress(data[5 : 5 + length], (models << 9) + blocks * lanes)
    share = np.frombuffer(head, "<u2", models << 8).reshape(models, 256).astype(np.uint64)
    kinds = np.frombuffer(head, np.uint8, blocks * lanes, models << 9).reshape(blocks, lanes)
    if (share.sum(1) != 1 << RANS_BITS).any() or kinds.max() >= models:
        raise ValueError("impossible models")
    frequency, below = share.ravel(), (share.cumsum(1) - share).ravel()
    place_at = np.arange(models << 8).repeat(frequency.astype(np.int64))
    starts = (kinds.astype(np.uint64) << RANS_BITS).repeat(RANS_BLOCK, 0)
    symbols, done = np.empty((steps, lanes), np.uint8), 0
    for step in range(steps):
        slot = state & ((1 << RANS_BITS) - 1)
        place = place_at[starts[step] + slot]
        symbols[step] = place & 255
        state = frequency[place] * (state >> RANS_BITS) + slot - below[place]
        low = state < RANS_LEAST
        count = np.count_nonzero(low)
        state[low] = (state[low] << 16) + words[done : done + count]
        done += count
    if done != len(words) or (state != RANS_LEAST).any():
        raise ValueError("its end does not fit its beginning")
    return symbols.T.tobytes()[:size]


def zstandard_module() -> Any:
    """The zstandard package, or None where it is not installed."""
    with contextlib.suppress(ImportError):
        import zstandard

        return zstandard
    return None


def coder(codec: str) -> tuple[Callable[[bytes], bytes], Callable[[bytes, int], bytes]]:
    """(encode, decode) of a codec; decode gets the size of the raw bytes, its bound."""
    if codec == "rans":
        return rans_encode, rans_decode
    if codec == "lzma":
        plain = dict(format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)
        return functools.partial(lzma.compress, **plain), lzma.LZMADecompressor(**plain).decompress
    if codec == "zlib":
        only = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        return lambda raw: only.compress(raw) + only.flush(), zlib.decompressobj(-15).decompress
    zstd = zstandard_module()
    require(codec == "zstd" and zstd, f"codec {codec!r} is unknown or not installed; for zstd: pip "
            "install zstandard, or COMPRESSOR=auto", ArtifactError)
    return (zstd.ZstdCompressor(level=22, write_content_size=False).compress,
            lambda data, size: zstd.ZstdDecompressor().stream_reader(data).read(size))


def decompress(data: bytes, codec: str, size: int) -> bytes:
    """The raw bytes of a stream; raises ArtifactError unless exactly `size` bytes come out."""
    try:
        raw = coder(codec)[1](data, size)
        if len(raw) != size:
            raise ValueError(f"it ends after {len(raw)} of {size} bytes")
    except (lzma.LZMAError, zlib.error, struct.error, ValueError,
            getattr(zstandard_module(), "ZstdError", OSError)) as error:
        raise ArtifactError(f"a {codec} stream is damaged: {error}") from error
    return raw


def smallest(raw: bytes, compressor: str) -> tuple[str, bytes]:
    """(codec, data) under COMPRESSOR; auto tries every codec that is installed."""
    codecs = [codec for codec in CODECS if codec != "zstd" or zstandard_module()]
    codecs = codecs if compressor == "auto" else [compressor]
    with ThreadPoolExecutor() as pool:  # compressors leave the interpreter to others
        packed = pool.map(lambda codec: coder(codec)[0](raw), codecs)
        return min(zip(codecs, packed, strict=True), key=lambda pair: len(pair[1]))


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all: temporary file, fsync, rename."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RunError(f"cannot write {path}: {error.strerror}; nothing was replaced: make room, "
                       "or set another path") from error


def entropy_bytes(values: np.ndarray) -> float:
    """Order-0 entropy of an array's bytes, in bytes."""
    counts = np.bincount(np.frombuffer(values.tobytes(), np.uint8))
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum() / 8)


class Stream(NamedTuple):
    """One compressed stream of the artifact."""

    name: str
    codec: str
    data: bytes
    raw: bytes
    weights: int
    floor: float  # bytes: order-0 entropy of codes, tensor by tensor; raw size of the rest


def layout(kind: str, bits: int) -> tuple[str, str]:
    """(stream, dtype) of a tensor's values; row scales, fp16, have a stream of their own."""
    return (f"{kind}.int{bits}", "i1") if bits <= 8 else (f"{kind}.fp{bits}", f"<f{bits // 8}")


def pack_streams(stored: Mapping[str, Stored], compressor: str) -> list[Stream]:
    """Values and scales of all tensors, stream by stream, in the tensors' order."""
    members: dict[str, list[np.ndarray]] = {}
    for tensor in stored.values():
        stream, dtype = layout(tensor.kind, tensor.bits)
        members.setdefault(stream, []).append(tensor.values.astype(dtype).ravel())
        if tensor.scales is not None:
            members.setdefault("scales", []).append(tensor.scales.astype("<f2"))
    streams = []
    for name, arrays in members.items():
        flat = np.concatenate(arrays)
        # all first bytes, then all second bytes, ...: codecs see like with like
        raw = flat.view(np.uint8).reshape(-1, flat.itemsize).T.tobytes()
        floor = sum(map(entropy_bytes, arrays)) if flat.itemsize == 1 else float(len(raw))
        streams.append(Stream(name, *smallest(raw, compressor), raw, flat.size, floor))
    return streams


def unpack_streams(tensors: list[list], raw: Mapping[str, bytes]) -> dict[str, Stored]:
    """Inverse of pack_streams: tensors by the header's list of (name, kind, bits, shape)."""
    used, stored = dict.fromkeys(raw, 0), {}

    def take(stream: str, dtype: str, shape: list[int]) -> np.ndarray:
        planes = np.frombuffer(raw[stream], np.uint8).reshape(np.dtype(dtype).itemsize, -1)
        start, used[stream] = used[stream], used[stream] + math.prod(shape)
        return np.frombuffer(planes[:, start : used[stream]].T.tobytes(), dtype).reshape(shape)

    for name, kind, bits, shape in tensors:
        scales = take("scales", "<f2", shape[:1]) if bits <= 8 else None
        stored[name] = Stored(kind, bits, take(*layout(kind, bits), shape), scales)
    return stored


def write_artifact(path: Path, header: dict[str, Any], stored: Mapping[str, Stored],
                   compressor: str) -> list[Stream]:
    """Write the container; returns its streams.

    Layout: magic, SHA-256 of what follows and of the raw streams, size of the header (uint32),
    header (JSON under zlib), compressed streams.
    """
    streams = pack_streams(stored, compressor)
    header = header | dict(
        tensors=[[n, t.kind, t.bits, t.values.shape] for n, t in stored.items()],
        streams=[[s.name, s.codec, len(s.data), len(s.raw), zlib.crc32(s.data)] for s in streams])
    packed = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    body = b"".join((struct.pack("<I", len(packed)), packed, *(s.data for s in streams)))
    digest = hashlib.sha256(b"".join((body, *(s.raw for s in streams)))).digest()
    write_atomic(path, ARTIFACT_MAGIC + digest + body)
    return streams


def read_artifact(path: str) -> tuple[dict[str, Any], dict[str, Stored]]:
    """(header, tensors) of an artifact; executes nothing; raises ArtifactError on any damage."""
    try:
        data = Path(path).read_bytes()
        magic, digest, body = data[:10], data[10:42], data[42:]
        require(magic == ARTIFACT_MAGIC, f"it begins with {magic}, not {ARTIFACT_MAGIC}: not an "
                "artifact of this script", ArtifactError)
        end = 4 + struct.unpack_from("<I", body)[0]
        header, raw = json.loads(zlib.decompressobj().decompress(body[4:end], 1 << 24)), {}
        for name, codec, size, raw_size, crc in header["streams"]:
            packed, end = body[end : end + size], end + size
            require(zlib.crc32(packed) == crc and 0 < raw_size < 1 << 32,
                    f"stream {name} is damaged (CRC), or not of {raw_size} bytes", ArtifactError)
            raw[name] = decompress(packed, codec, raw_size)
        require(hashlib.sha256(b"".join((body, *raw.values()))).digest() == digest,
                "damaged: its content has another SHA-256", ArtifactError)
        return header, unpack_streams(header["tensors"], raw)
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}; name an artifact that exists") from error
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    except (struct.error, zlib.error, ValueError, LookupError, TypeError, ArithmeticError,
            RecursionError) as error:
        raise ArtifactError(f"{path}: the header is not readable ({error!r})") from error


def export_model(model: GPT, hessians: Mapping[str, Tensor], val: Validation, runtime: Runtime,
                 c: Config) -> int:
    """Quantize and write ARTIFACT_PATH, log every size; returns code and artifact in bytes.

    The entropies of a sample give a first coarseness, the size of the artifact corrects it.
    Raises RunError over SIZE_LIMIT; the weights then stay in fp32 beside the artifact.
    """
    path = Path(c.artifact_path)
    shape = {name.upper(): show(getattr(c, name)) for name in MODEL_FIELDS}
    state = {name: p.detach().float() for name, p in model.named_parameters()}
    if not model.recur:  # a run that ended before recurrence started is a model without it
        shape |= dict(RECUR_LAYERS="", RECUR_PASSES="1")
        state = {name: p for name, p in state.items() if not name.startswith("repeat_mlps")}
    header = dict(model=shape, vocab_size=model.vocab_size, vocab_sha256=val.vocab_sha256)
    margin = unforeseen = FIT_MARGIN * (c.size_limit - CODE_BYTES)
    streams: list[Stream] = []  # on the first rank

    def expected(at: float) -> float:
        return sampled_bytes(state, c, at) + unforeseen

    def write() -> int:
        streams[:] = write_artifact(path, header, stored, c.compressor)
        return CODE_BYTES + path.stat().st_size

    for _ in range(6):
        coarseness = runtime.on_first_rank(lambda: least_coarseness(expected, c))
        stored = quantize(state, c, coarseness, hessians, runtime)
        total = runtime.on_first_rank(write)
        free = c.size_limit - total
        runtime.log.line(f"fit coarseness:{coarseness:.4f} total:{total} free:{free}")
        if 0 <= free <= 2 * margin or (coarseness == 0 <= free) or coarseness == COARSEST:
            break
        unforeseen = margin + total - CODE_BYTES - sampled_bytes(state, c, coarseness)
    runtime.on_first_rank(lambda: log_sizes(state, stored, streams, total, runtime.log))
    if free < 0:
        kept = path.with_name(path.name + ".fp32")
        plain = {n: Stored("kept", 32, p.cpu().numpy(), None) for n, p in state.items()}
        runtime.on_first_rank(lambda: write_artifact(kept, header, plain, "zlib") and None)
        raise RunError(f"Total submission size {total} is {-free} bytes over "
                       f"SIZE_LIMIT={c.size_limit}; lower N_INT6_LAYERS or CLASS_BITS. The fp32 "
                       f"weights are kept: LOAD_ARTIFACT={kept}")
    return total


def log_sizes(state: Mapping[str, Tensor], stored: Mapping[str, Stored], streams: list[Stream],
              total: int, log: RunLog) -> None:
    """What every stream takes, how far from the weights its codes are, and the totals."""
    for s in streams:
        size, measured = len(s.data), {}
        coded = [(t, state[name].cpu()) for name, t in stored.items()
                 if t.scales is not None and layout(t.kind, t.bits)[0] == s.name]
        if coded:
            vectors = zip(*((w.flatten(), (t.restore() - w).flatten()) for t, w in coded),
                          strict=True)
            weight, error = (torch.cat(parts).norm().clamp_min(1e-15) for parts in vectors)
            measured = dict(error=(error / weight).item())
        log.event("stream", "stream {name} codec:{codec} weights:{weights} bytes:{bytes} "
                  "bits_per_weight:{bits:.3f} floor_bytes:{floor:.0f}"
                  + " relative_error:{error:.5f}" * bool(coded),
                  name=s.name, codec=s.codec, weights=s.weights, bytes=size, floor=s.floor,
                  bits=8 * size / s.weights, **measured)
    artifact, floor = total - CODE_BYTES, sum(s.floor for s in streams)
    log.event("size", "artifact_floor_bytes:{floor:.0f} above_floor:{above:+.2%}\n"
              "Code size: {code} bytes\nSerialized model mixed_quant+{codec}: {artifact} bytes\n"
              "Total submission size: {total} bytes", code=CODE_BYTES, artifact=artifact,
              total=total, floor=floor, above=artifact / floor - 1,
              codec=max(streams, key=lambda s: len(s.data)).codec)


def load_model(path: str, val: Validation, table: ByteTable, runtime: Runtime, c: Config) -> GPT:
    """The model of an artifact on disk; raises ArtifactError if it does not fit the data."""
    header, stored = runtime.on_first_rank(lambda: read_artifact(path))  # others lack the file
    texts, problems = header.get("model"), []
    complete = (isinstance(texts, dict) and set(texts) == {name.upper() for name in MODEL_FIELDS}
                and all(isinstance(text, str) for text in texts.values()))
    config = replace(c, n_int6_layers=None, **parse_settings(texts if complete else {}, problems))
    require(not complete or config.doc_attention == c.doc_attention, f"{path}: its model has "
            f"DOC_ATTENTION={config.doc_attention:d}; set that, as attention was chosen for "
            f"DOC_ATTENTION={c.doc_attention:d}", ArtifactError)
    problems += contradictions(config)
    require(complete and not problems,
            f"{path}: impossible model configuration: {problems or texts}", ArtifactError)
    ours = len(table.base_bytes), val.vocab_sha256
    made_for = header.get("vocab_size"), header.get("vocab_sha256")
    require(made_for == ours, f"{path}: made for a vocabulary of {made_for[0]} ids, sha256 "
            f"{made_for[1]}, the data's has {ours[0]}, {ours[1]}; set DATA_PATH and TOKENIZER_PATH "
            "to what it was trained on", ArtifactError)
    expected = {}
    with contextlib.suppress(RuntimeError, TypeError, OverflowError), torch.device("meta"):
        plan = GPT(config, table.is_boundary, runtime, initialize=False)  # takes no memory
        expected = {name: tuple(p.shape) for name, p in plan.named_parameters()}
    require(expected == {name: t.values.shape for name, t in stored.items()},
            f"{path}: its tensors are not those of its model configuration", ArtifactError)
    model = GPT(config, table.is_boundary, runtime, initialize=False)
    model.load_state_dict({name: t.restore() for name, t in stored.items()})
    model.set_phase(Phase(recur=bool(config.repeated)))
    return model.to(runtime.device)


# --- 9 evaluation -----------------------------------------------------


def plan_windows(targets: int, seq_len: int, stride: int) -> np.ndarray:
    """Windows over a stream of `targets` targets, int64 (windows, 2): start, first scored.

    Every window spans min(seq_len, targets) targets and scores those from `first` on: the first
    all, each later one what lies beyond the window before, which ended up to `stride` earlier.
    """
    length = min(seq_len, targets)
    ends = np.append(np.arange(length, targets, stride), targets)
    return np.stack((ends - length, length - np.diff(ends, prepend=0)), axis=1)


class Score(NamedTuple):
    """What a mode scored; the sums are made in float64 and divided once."""

    nats: float
    tokens: int
    bytes: int
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        """Bits per source byte; nan where no target has bytes (marks of capitals have none)."""
        return self.nats / math.log(2) / (self.bytes or math.nan)


class Evaluator:
    """Scores the validation stream; modes differ in stride, forward pass and what follows a chunk.

    A window belongs to the chunk of its first scored target; ranks share each chunk's windows.
    """

    def __init__(self, runtime: Runtime, c: Config, val: Validation) -> None:
        self.runtime, self.config, self.val = runtime, c, val
        self.targets = len(val.ids) - 1
        self.length = min(c.eval_seq_len, self.targets)
        share = math.ceil(min(c.ttt_chunk_tokens, self.targets) / c.eval_stride / runtime.world)
        most = max(1, c.val_batch_size // self.length // runtime.world)
        self.batch_windows = math.ceil(share / math.ceil(share / most))  # batches nearly full
        self.start_clock({})

    def start_clock(self, to_come: dict[str, float]) -> None:
        """An evaluation begins, of modes `to_come` that take the time of so many windows."""
        self.to_come, self.began = to_come, time.perf_counter()
        self.reported = self.began

    def score(self, forward: Callable, stride: int, label: str = "", chunk: int = 0,
              learn: Callable | None = None) -> tuple[Score, np.ndarray]:
        """(Score, nats of every target); `label` names a mode whose progress is logged.

        After each chunk of `chunk` targets (0: one chunk), whose scores are final then, `learn`
        gets its number, the edges of all chunks and this rank's nats.
        """
        windows = plan_windows(self.targets, self.length, stride)
        edges = [*range(0, self.targets, chunk or self.targets), self.targets]
        places = np.searchsorted(windows.sum(1), edges).tolist()  # by first scored target
        nats, began = torch.zeros(self.targets), time.perf_counter()
        for number, group in enumerate(np.split(windows, places[1:-1])):
            mine = group[self.runtime.share_of(len(group))]
            for i in range(0, len(mine), self.batch_windows):
                batch = mine[i : i + self.batch_windows]
                scored = self.score_batch(forward, batch[:, 0])
                for (start, first), row in zip(batch.tolist(), scored, strict=False):
                    nats[start + first : start + self.length] = row[first:]
                done = places[number] + len(group) * (i + len(batch)) // len(mine)
                self.report(label, done, len(windows), time.perf_counter() - began)
            if learn:
                learn(number, edges, nats)
        nats = self.runtime.all_reduce(nats).numpy()  # each target was scored on one rank
        return self.total(nats), nats

    def total(self, nats: np.ndarray) -> Score:
        """Score of the first targets of the stream, given their nats."""
        source = int(self.val.bytes[: len(nats)].sum(dtype=np.int64))
        return Score(float(nats.sum(dtype=np.float64)), len(nats), source)

    def score_batch(self, forward: Callable, starts: np.ndarray) -> Tensor:
        """Nats (batch_windows, length) on the host."""
        batch = self.tokens(starts, self.batch_windows)
        with torch.inference_mode():
            return forward(*batch).cpu()

    def tokens(self, starts: np.ndarray, rows: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (rows, length); too few windows are repeated: one shape, one graph."""
        ids = self.val.ids[np.resize(starts, rows)[:, None] + np.arange(self.length + 1)]
        ids = self.runtime.send(ids.astype(np.int64))
        return ids[:, :-1], ids[:, 1:]

    def prime(self, forward: Callable, vocab_size: int) -> None:
        """Compile and run the scoring of a batch."""
        batch = self.runtime.random_tokens(self.batch_windows, self.length, vocab_size)
        with torch.inference_mode():
            forward(*batch)

    def report(self, label: str, done: int, total: int, seconds: float) -> None:
        """Every 20 s a line of progress; it warns if the modes to come look like over 600 s."""
        now, left = time.perf_counter(), seconds * (total / done - 1)
        if label and now - self.reported > 20:
            self.reported, to_come = now, sum(self.to_come.values()) * seconds / done
            over = now - self.began + left + to_come > 600
            self.runtime.log.line(f"eval {label} windows:{done}/{total} eta:{left:.0f}s"
                                  + " warning: evaluation will pass 600 s" * over)

    def save_scores(self, mode: str, nats: np.ndarray) -> None:
        """SCORES_PATH/<mode>.npz: ids, nats and bytes of every scored token in stream order."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, ids=self.val.ids[1:], nats=nats, bytes=self.val.bytes)
        write_atomic(Path(self.config.scores_path) / f"{mode}.npz", buffer.getvalue())


class NgramCache:
    """Counts of scored n-grams; Witten-Bell down to uniform: each distribution sums to 1.

    The stream's n-grams are numbered first: exact names, which hold no count. A context reaches
    back to its document's boundary id at most. Memory: up to 28 bytes a token and order.
    """

    def __init__(self, ids: np.ndarray, is_boundary: np.ndarray, order: int) -> None:
        self.vocab_size, places = len(is_boundary), np.arange(len(ids))
        reach = places - np.maximum.accumulate(places * is_boundary[ids])
        number, self.levels = 0 * places, []  # number[i] of the k ids that end at i
        for k in range(order):
            context = np.where(reach >= k - 1, number + 1, 0)[:-1]  # 0: it would cross documents
            keys = np.roll(number, 1) * self.vocab_size + ids  # under 2^63
            names, number = np.unique(keys, return_inverse=True)
            totals, kinds = np.zeros((2, context.max() + 1), np.int32)  # targets, different ones
            counts = np.zeros(len(names), np.int32)
            self.levels.append((context, number[1:], totals, kinds, counts))

    def probabilities(self, part: slice) -> np.ndarray:
        """Of the targets in `part`, by the counts so far."""
        p = np.full(part.stop - part.start, 1 / self.vocab_size)
        for context, gram, totals, kinds, counts in self.levels:
            total, kind = totals[context[part]], kinds[context[part]]
            mixed = (counts[gram[part]] + kind * p) / np.maximum(total + kind, 1)
            p = np.where(total > 0, mixed, p)
        return p

    def update(self, part: slice) -> None:
        """Count the targets in `part`, which have been scored."""
        for contexts, grams, totals, kinds, counts in self.levels:
            inside = contexts[part] > 0
            context, gram = contexts[part][inside], grams[part][inside]
            fresh = np.flatnonzero(counts[gram] == 0)
            fresh = fresh[np.unique(gram[fresh], return_index=True)[1]]  # each n-gram once
            for table, index in ((kinds, context[fresh]), (totals, context), (counts, gram)):
                np.add.at(table, index, np.int32(1))  # an int would be 30 times slower


def mix_ngram(evaluator: Evaluator, nats: np.ndarray, is_boundary: np.ndarray) -> tuple:
    """(Score, nats) of the mixture of a mode's probabilities and the cache's, on every rank."""
    c, mixed = evaluator.config, np.empty_like(nats)
    cache = NgramCache(evaluator.val.ids, is_boundary, c.ngram_order)
    for begin in range(0, len(nats), c.ttt_chunk_tokens):
        part = slice(begin, min(begin + c.ttt_chunk_tokens, len(nats)))
        model, cached = np.exp(-nats[part].astype(float)), cache.probabilities(part)
        mixed[part] = -np.log((1 - c.ngram_weight) * model + c.ngram_weight * cached)
        cache.update(part)
    return evaluator.total(mixed), mixed


def slot_forward(model: GPT, runtime: Runtime, c: Config) -> Callable:
    """SLOT, not compliant: a shift of the last hidden state that fits a batch's last strides."""
    hidden = runtime.compile(model.hidden)

    @torch.inference_mode(False)
    def forward(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            h = hidden(inputs)
        shift = torch.zeros(h.size(-1), device=h.device, requires_grad=True)
        adam = torch.optim.AdamW([shift], c.slot_lr, weight_decay=0.0)
        for _ in range(c.slot_steps):
            nats = model(inputs, targets, h + shift.to(h.dtype))[:, -c.eval_stride :]
            shift.grad = torch.autograd.grad(nats.mean(), shift)[0]
            adam.step()
        return model(inputs, targets, h + shift.to(h.dtype)).detach()

    return forward


# --- 10 test-time training --------------------------------------------


def first_layer(name: str, c: Config) -> int:
    """The first layer that a parameter acts in; repeats, merge and head come after all layers."""
    root, layer = re.match(r"(\w+)\.?(\d*)", name).groups()
    skips = c.num_layers // 2
    starts = dict(embed=0, bigram=0, smear=0, skip_weights=skips, skip_gates=skips,
                  value=min(c.ve_layers, default=0), blocks=int(layer or 0))
    return starts.get(root, c.num_layers)


class TTT:
    """Score-first test-time training: SGD on a chunk's targets, all of which have been scored.

    The weights are restored for the next mode. TTT_LR=0 is sliding, bit for bit: equal batches.
    """

    def __init__(self, model: GPT, evaluator: Evaluator) -> None:
        self.model, self.evaluator, self.config = model, evaluator, evaluator.config
        self.runtime, self.forward = evaluator.runtime, evaluator.runtime.compile(model)
        self.params, self.jobs = model.train_only(self.is_trained), [self.prime]
        c, targets = self.config, evaluator.targets
        self.scores = c.ttt_enabled and {"ttt", "ngram"} & {*c.modes}
        targets = min(targets, c.ttt_chunk_tokens) if c.ttt_kind == "chunk" else targets
        seqs = min(c.ttt_batch_seqs, math.ceil(targets / evaluator.length))
        self.rank_seqs = math.ceil(seqs / self.runtime.world)
        self.windows = evaluator.targets * (  # whose forward pass takes as long; training: three
            1 / c.eval_stride + 3 * c.ttt_epochs / c.eval_seq_len)

    def is_trained(self, name: str) -> bool:
        """Whether SGD trains a parameter."""
        return first_layer(name, self.model.config) >= self.config.ttt_freeze_blocks

    def prime(self) -> None:
        """Compile and run scoring and training on random tokens; no weight moves."""
        c, evaluator, vocab_size = self.config, self.evaluator, self.model.vocab_size
        evaluator.prime(self.forward, vocab_size)
        if self.scores and (c.ttt_kind == "chunk" or c.ttt_global_docs):
            batch = self.runtime.random_tokens(self.rank_seqs, evaluator.length, vocab_size)
            self.forward(*batch).sum().backward()
            self.model.zero_grad()

    def score(self) -> tuple[Score, np.ndarray]:
        """(Score, nats of every target), each by weights that have seen earlier chunks only."""
        c, self.began = self.config, time.perf_counter()
        saved = [p.detach().clone() for p in self.params]
        self.optimizer = torch.optim.SGD(self.params, c.ttt_lr, c.ttt_momentum)
        scored = self.evaluator.score(self.forward, c.eval_stride, "ttt", c.ttt_chunk_tokens,
                                      self.learn)
        with torch.no_grad():
            torch._foreach_copy_(self.params, saved)
        return scored

    def learn(self, number: int, edges: list[int], nats: Tensor) -> None:
        """Train on a chunk that has been scored; after the last one nothing is left to score."""
        c, last, (begin, end) = self.config, len(edges) - 2, edges[number : number + 2]
        self.tell(number, last + 1, lambda: self.evaluator.total(
            self.runtime.all_reduce(nats[:end].clone()).numpy()))
        for batch in self.batches(begin, end) * c.ttt_epochs * (number < last):
            self.step(batch, end, number / max(last, 1))

    def tell(self, number: int, count: int, score: Callable[[], Score]) -> None:
        """A line for every twentieth chunk and the last one: the score so far."""
        if number % math.ceil((count + 1) / 20) == 0 or number == count - 1:
            self.runtime.log.line(f"ttt_chunk [{number + 1}/{count}] bpb={score().bpb:.6f} "
                                  f"time={time.perf_counter() - self.began:.1f}s")

    def batches(self, begin: int, end: int) -> list[np.ndarray]:
        """Windows (n, 2) that cover the targets from `begin` to `end`: start, first counted."""
        length, most = self.evaluator.length, self.config.ttt_batch_seqs
        rows = plan_windows(end - begin, length, length) + (begin, 0)
        return [rows[i : i + most] for i in range(0, len(rows), most)]

    def step(self, batch: np.ndarray, end: int, share: float) -> None:
        """SGD on the mean of a batch's targets before `end`, after a `share` of all of it."""
        c, length = self.config, self.evaluator.length
        self.optimizer.param_groups[0]["lr"] = c.ttt_lr * (1 + math.cos(math.pi * share)) / 2
        total = int(np.minimum(end - batch[:, 0], length).sum() - batch[:, 1].sum())
        rows, places = batch[self.runtime.share_of(len(batch))], np.arange(length)
        first = np.append(rows[:, 1], np.full(self.rank_seqs - len(rows), length))  # fills up
        stop = end - np.resize(rows[:, 0], self.rank_seqs)  # within it, of few documents only
        counted = self.runtime.send((places >= first[:, None]) & (places < stop[:, None]))
        nats = self.forward(*self.evaluator.tokens(rows[:, 0], self.rank_seqs))
        self.optimizer.zero_grad()
        ((nats * counted).sum() / total).backward()
        if self.runtime.world > 1:
            self.runtime.all_reduce_packed([p.grad for p in self.params])
        torch.nn.utils.clip_grad_norm_(self.params, c.ttt_grad_clip or math.inf)
        self.optimizer.step()


def plan_documents(lengths: np.ndarray, slots: int, chunk: int, sizes: list[int]) -> list[tuple]:
    """Steps through documents of `lengths` targets, `slots` at a time: (tokens of a window, rows).

    rows (slots, 2): a document, -1 for none, and the number of its chunk. They begin in order.
    While whole windows are read anyway, a free slot takes the next one at once. Else all begin
    together, so that, ordered by length, they need windows of one size.
    """
    waiting, chunks = deque(range(len(lengths))), -(-lengths // chunk)
    running, steps = [(-1, 0)] * slots, []
    while True:
        running = [(d, n + 1) if d >= 0 and n + 1 < chunks[d] else (-1, 0) for d, n in running]
        ends = [(n + 1) * chunk for d, n in running if d >= 0]
        if not ends and not waiting:
            return steps
        if not ends or max(ends) >= sizes[-1]:
            running = [(waiting.popleft(), 0) if d < 0 and waiting else (d, n) for d, n in running]
        needed = max([chunk, *ends])
        steps.append((next((s for s in sizes if s >= needed), sizes[-1]), np.array(running)))


LORA_BETA2 = 0.99


def adamw(p: Tensor, v: Tensor, g: Tensor, rate: Tensor, correction: Tensor,
          decay: float) -> None:
    """AdamW without momentum, in place, on rows with rates of their own; `correction` is v's."""
    v.lerp_(g.square(), 1 - LORA_BETA2)
    p.sub_(rate * (g / ((v / correction).sqrt() + 1e-10) + decay * p))


class DocumentTTT(TTT):
    """Score-first training of adapters on each document by itself, from its first id on.

    A chunk is scored by the adapters as they are, then they make one step on it; not on the last
    one. All documents begin with the same A and with B = 0, so that their order, batches and ranks
    do not matter. What passes from some to others is the global phase: SGD on the first documents
    of the stream, all of which are scored then. That batches are made by the lengths of documents,
    which are those of the stream, therefore tells no score anything.
    """

    def __init__(self, model: GPT, evaluator: Evaluator) -> None:
        super().__init__(model, evaluator)
        c, runtime, is_boundary = self.config, self.runtime, model.is_boundary.cpu().numpy()
        begins = is_boundary[evaluator.val.ids[:-1]]
        begins[0] = True  # also in the middle of a document
        begins = np.flatnonzero(begins)
        self.documents = np.stack((begins, np.diff(begins, append=evaluator.targets)), axis=1)
        self.padding = int(is_boundary.argmin())  # an id that begins no document
        self.sizes = sorted({max(c.ttt_doc_chunk, c.eval_seq_len * n // 4) for n in range(1, 5)})
        chunks = -(-self.documents[:, 1] // c.ttt_doc_chunk)
        useful = math.ceil(chunks.sum() / chunks.max() / runtime.world)  # the longest takes as long
        self.outputs = model.adapter_outputs()
        values = c.ttt_lora_rank * (len(self.outputs) * c.model_dim + sum(self.outputs))
        room = tokens_at_once(c, runtime) // (self.sizes[-1] + 20 * values // BYTES_PER_TOKEN)
        self.slots = min(c.ttt_doc_batch or max(1, room), useful)
        self.plans = [self.plan(group) for group in np.split(self.documents, [c.ttt_global_docs])]
        self.work = sum(size for plan in self.plans for size, _ in plan)
        first = int(self.documents[: c.ttt_global_docs, 1].sum())  # read once more, in training
        self.share = 3 * self.slots * runtime.world / c.eval_seq_len  # of a token that a slot reads
        self.windows = self.work * self.share + 3 * first / c.eval_seq_len
        self.score_chunk, self.adamw = runtime.compile(self.nats_of), runtime.compile(adamw)
        self.jobs += [functools.partial(self.prime_size, n) for n in self.sizes if self.scores]

    def plan(self, documents: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """This rank's steps: tokens of a window; (slots, 3) where a document begins, its
        targets, number of the chunk.

        A free slot has no targets.
        """
        order = np.argsort(-documents[:, 1], kind="stable")[self.runtime.rank :: self.runtime.world]
        mine = np.append(documents[order], [(0, 0)], axis=0)
        steps = plan_documents(mine[:-1, 1], self.slots, self.config.ttt_doc_chunk, self.sizes)
        return [(size, np.column_stack((mine[rows[:, 0]], rows[:, 1]))) for size, rows in steps]

    def allocate(self) -> None:
        """A and B of every slot, their second moments, and the A that documents begin with."""
        c, device, D = self.config, self.runtime.device, self.model.config.model_dim
        shapes = (len(self.outputs), c.ttt_lora_rank, D), (sum(self.outputs), c.ttt_lora_rank)
        a = 2 * torch.rand(shapes[0], generator=torch.Generator().manual_seed(c.seed)) - 1
        self.first_a = a.to(device) / math.sqrt(D)
        self.pair = [torch.zeros(self.slots, *shape, device=device, requires_grad=True)
                     for shape in shapes]
        self.moments = [torch.zeros_like(p) for p in self.pair]

    def prime_size(self, size: int) -> None:
        """Compile and run scoring and training in windows of `size` random tokens."""
        self.allocate()
        self.model.train_only(lambda name: False)
        ids, _ = self.runtime.random_tokens(self.slots, size, self.model.vocab_size)
        chunk, one = ids[:, : self.config.ttt_doc_chunk].contiguous(), ids[:, :1]
        nats = self.score_chunk(ids.contiguous(), chunk, 0 * chunk, *self.pair)
        self.learn_chunk(nats.sum(), one + 1.0, one + 1.0)  # two tensors, or it is another graph
        self.pair = self.moments = []  # the memory is training's until then
        self.model.train_only(self.is_trained)

    def nats_of(self, ids: Tensor, targets: Tensor, places: Tensor, *pair: Tensor) -> Tensor:
        """Nats of targets (B, chunk), which follow those `places` of ids (B, T)."""
        adapters = self.model.adapters(*pair)
        h = self.model.hidden(ids, adapters).take_along_dim(places.unsqueeze(-1), dim=1)
        return self.model(ids, targets, h, adapters)

    def learn_chunk(self, loss: Tensor, rate: Tensor, correction: Tensor) -> None:
        """One step of the adapters; rate and correction (B, 1)."""
        c, grads = self.config, torch.autograd.grad(loss, self.pair)
        with torch.no_grad():
            for p, v, g in zip(self.pair, self.moments, grads, strict=True):
                self.adamw(p.flatten(1), v.flatten(1), g.flatten(1), rate, correction,
                           c.ttt_lora_wd)

    def score(self) -> tuple[Score, np.ndarray]:
        """(Score, nats of every target), each by adapters that have seen earlier chunks only."""
        runtime, evaluator, self.began = self.runtime, self.evaluator, time.perf_counter()
        split, read, number = self.config.ttt_global_docs, 0, 0
        saved = [p.detach().clone() for p in self.params]
        self.nats = torch.zeros(evaluator.targets + 1, device=runtime.device)  # the last: of none
        self.allocate()
        memory = 4 * sum(p.nbytes for p in self.pair)  # moments, gradients, copies in bf16
        runtime.log.line(f"ttt documents:{len(self.documents)} at_once:{self.slots} windows:"
                         f"{show(tuple(self.sizes))} adapters:{memory >> 20}MiB")
        self.model.train_only(lambda name: False)
        for plan, learn in zip(self.plans, (False, 0 < split < len(self.documents)), strict=True):
            if learn:
                self.learn_documents(int(self.documents[split, 0]))
            for step in plan:
                self.adapt(*step)
                self.tell(number, sum(map(len, self.plans)), self.so_far)
                number, read = number + 1, read + step[0]
                evaluator.report("ttt", math.ceil(read * self.share), math.ceil(
                    self.work * self.share), time.perf_counter() - self.began)
        self.pair = self.moments = []
        self.model.train_only(self.is_trained)
        with torch.no_grad():
            torch._foreach_copy_(self.params, saved)
        nats = runtime.all_reduce(self.nats[:-1].cpu()).numpy()  # each was scored on one rank
        return evaluator.total(nats), nats

    def so_far(self) -> Score:
        """Of this rank's targets, those that have been scored."""
        nats = self.nats[:-1].cpu().numpy()
        source = int(self.evaluator.val.bytes[nats != 0].sum(dtype=np.int64))
        return Score(float(nats.sum(dtype=np.float64)), np.count_nonzero(nats), source)

    def learn_documents(self, end: int) -> None:
        """The global phase: one pass of SGD over the targets before `end`, scored on all ranks."""
        self.optimizer = torch.optim.SGD(self.params, self.config.ttt_lr, self.config.ttt_momentum)
        self.model.train_only(self.is_trained)
        batches = self.batches(0, end)
        for i, batch in enumerate(batches):
            self.step(batch, end, i / len(batches))
        self.runtime.log.line(f"ttt global_phase targets:{end} steps:{len(batches)}")
        self.model.train_only(lambda name: False)

    @torch.no_grad()
    def begin(self, new: Tensor) -> None:
        """Give the slots of new documents, bool (B, 1), the first A, B = 0 and no moments."""
        self.pair[0].copy_(self.first_a.where(new.view(-1, 1, 1, 1), self.pair[0]))
        for values in (self.pair[1], *self.moments):
            values.flatten(1).masked_fill_(new, 0.0)

    def adapt(self, size: int, rows: np.ndarray) -> None:
        """Score a chunk of each document; then train on those after which there is more of it."""
        chunk, send, ids = self.config.ttt_doc_chunk, self.runtime.send, self.evaluator.val.ids
        begin, length, number = np.split(rows, 3, axis=1)
        end = np.minimum(length, (number + 1) * chunk)
        start = np.maximum((number + 1) * chunk - size, 0)  # wherever the document ends

        def tokens(places: np.ndarray, ahead: int) -> Tensor:  # none that is after the chunk
            at = np.minimum(begin + places, len(ids) - 2) + ahead
            return send(np.where(places < end, ids[at], self.padding).astype(np.int64))

        target = number * chunk + np.arange(chunk)
        scored, more = target < end, end < length
        if (number == 0).any():
            self.begin(send(number == 0))
        nats = self.score_chunk(tokens(start + np.arange(size), 0), tokens(target, 1),
                                send(target - start), *self.pair)
        self.nats[send(np.where(scored, begin + target, len(ids) - 1))] = nats.detach()
        if self.config.ttt_lora_lr and more.any():
            weight = scored * more / np.maximum(scored.sum(1, keepdims=True), 1)
            facts = weight, self.config.ttt_lora_lr * more, 1 - LORA_BETA2 ** (number + 1.0)
            weight, rate, correction = map(send, map(np.float32, facts))
            self.learn_chunk((nats * weight).sum(), rate, correction)


TTT_KINDS = dict(chunk=TTT, document=DocumentTTT)
FINAL_LINES = dict(roundtrip="final_int6_roundtrip", sliding="final_int6_sliding_window",
                   ttt="legal_ttt", ngram="legal_ngram", slot="non_compliant_slot")


def evaluate_artifact(path: str, evaluator: Evaluator, table: ByteTable) -> dict[str, Score]:
    """Every mode of Config.modes on the model reloaded from disk; slot under its full name."""
    runtime, c, log = evaluator.runtime, evaluator.config, evaluator.runtime.log
    model = load_model(path, evaluator.val, table, runtime, c)
    ttt, chunk = TTT_KINDS[c.ttt_kind](model, evaluator), c.ttt_chunk_tokens
    base = ("sliding", "ttt")[c.ttt_enabled]
    plain, sliding = evaluator.targets / c.eval_seq_len, evaluator.targets / c.eval_stride
    runs = {  # mode: windows that it takes the time of, what it does
        "roundtrip": (plain, lambda: evaluator.score(ttt.forward, c.eval_seq_len, "roundtrip")),
        "sliding": (sliding, lambda: evaluator.score(ttt.forward, c.eval_stride, "sliding", chunk)),
        "ttt": (ttt.windows, ttt.score),
        "ngram": (0, lambda: mix_ngram(evaluator, scored(base)[1], table.is_boundary)),
        "slot": (sliding, lambda: evaluator.score(
            slot_forward(model, runtime, c), c.eval_stride, FINAL_LINES["slot"], chunk)),
    }
    scored, scores = functools.cache(lambda mode: runs[mode][1]()), {}
    runtime.in_turns(ttt.jobs)
    evaluator.start_clock({mode: runs[mode][0] for mode in c.modes})
    for mode in c.modes:
        start, name = time.perf_counter(), FINAL_LINES[mode]
        label = name if mode == "slot" else mode
        del evaluator.to_come[mode]
        score, nats = scored(mode)
        require(math.isfinite(score.nats),
                f"{name}: scores are not finite; lower TTT_LR or TTT_LORA_LR"
                + SHORT_DOCUMENTS * c.doc_attention)
        scores[label] = score = score._replace(seconds=time.perf_counter() - start)
        if c.scores_path:
            runtime.on_first_rank(functools.partial(evaluator.save_scores, label, nats))
        stride = " stride:{stride}" * (mode == "sliding")
        log.event("final", "{line} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}" + stride
                  + " eval_time:{eval_ms:.0f}ms", line=name, mode=label, val_loss=score.loss,
                  val_bpb=score.bpb, stride=c.eval_stride, eval_ms=1e3 * score.seconds,
                  **score._asdict())
        log.line(f"{name}_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
    return scores


# --- 11 training ------------------------------------------------------

CALIBRATION_MARGIN = 1.5  # time set aside for the Hessians over that measured before the clock
SPIKE = 1.25  # a loss beyond this many medians of the last 50 is logged as an event
CHECKPOINT_FORMAT = 2  # changes with what a shard holds, the order of Muon's rows included
UNBOUND = re.compile(  # settings that change no trained weight, so that a resumed run may
    r"(run_id|preset|dry_run|resume|compressor|size_limit|load_artifact|train_log_every|\w+_path"
    r"|(val|eval|ttt|ngram|slot|checkpoint)_\w+)")


class TrainClock:
    """Training milliseconds from asynchronous events; stands still between pause and resume."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.elapsed_ms, self.steps = 0.0, 0  # of the steps that the device has finished
        self.marks: deque[Any] = deque()  # ends of the steps that it has not
        self.recent: deque[float] = deque(maxlen=20)  # last durations

    def resume(self) -> None:
        """Start, or go on."""
        self.last = self.runtime.event()

    def mark(self) -> Any:
        """The event at which the step that was just launched ends; never waits."""
        event = self.runtime.event()
        self.marks.append(event)
        self.poll()
        return event

    def poll(self) -> None:
        """Take in the steps that the device has finished."""
        while self.marks and self.marks[0].query():
            begin, self.last = self.last, self.marks.popleft()
            self.recent.append(begin.elapsed_time(self.last))
            self.elapsed_ms += self.recent[-1]
            self.steps += 1

    def pause(self) -> None:
        """Wait for the device and stand still."""
        self.runtime.synchronize()
        self.poll()

    @property
    def step_ms(self) -> float:
        """Median of the recent steps; 0 while there are fewer than three."""
        return statistics.median(self.recent) if len(self.recent) > 2 else 0.0

    def expected_ms(self, step: int) -> float:
        """When `step` ends if each from now on takes as long as the slowest recent one."""
        return self.elapsed_ms + (step + 1 - self.steps) * max(self.recent, default=0.0)


def read_checked(path: Path, crc: int) -> bytes:
    """A file of a checkpoint; raises ArtifactError unless its CRC-32 is `crc`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from error
    require(zlib.crc32(data) == crc, f"{path} is damaged (CRC)", ArtifactError)
    return data


class Checkpoints:
    """CHECKPOINT_PATH/<RUN_ID>/step<n>/: rank<r>, arrays of each rank, and last commit.<CRC-32>.

    The commit has the run's state, all that binds it (settings, data, ranks) and the ranks' CRCs.
    """

    def __init__(self, c: Config, runtime: Runtime, data: str) -> None:
        self.keep, self.runtime = c.checkpoint_keep, runtime
        self.root = Path(c.checkpoint_path, runtime.log.run_id)
        self.bound = {name.upper(): show(value) for name, value in asdict(c).items()
                      if not UNBOUND.fullmatch(name)}
        self.bound |= dict(CHECKPOINT_FORMAT=CHECKPOINT_FORMAT, WORLD_SIZE=runtime.world,
                           DTYPE=str(runtime.dtype), DATA=data)

    def write(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Write a checkpoint and remove old ones; a rank that cannot is a RunError on all."""
        rank, buffer, problem = self.runtime.rank, io.BytesIO(), ""
        folder = self.root / "step{steps:08d}".format(**state)
        np.savez(buffer, **arrays)
        try:
            write_atomic(folder / f"rank{rank}", buffer.getbuffer())
        except RunError as error:
            problem = f"rank {rank}: {error}"
        outcomes = self.runtime.gather((problem, zlib.crc32(buffer.getbuffer())))

        def commit() -> None:
            problems, crcs = zip(*outcomes, strict=True)
            about = json.dumps(dict(state=state, bound=self.bound, crcs=crcs)).encode()
            require(not any(problems), max(problems))
            write_atomic(folder / f"commit.{zlib.crc32(about):08x}", about)

        try:
            self.runtime.on_first_rank(commit)
        finally:  # what has no commit goes too, from each node's disk: for room
            kept = self.runtime.on_first_rank(self.commits)[: self.keep]
            for other in set(self.root.glob("step*")) - {path.parent for path in kept}:
                shutil.rmtree(other, ignore_errors=True)

    def commits(self) -> list[Path]:
        """The commits of this run, the newest first."""
        return sorted(self.root.glob("step????????/commit.????????"), reverse=True)

    def load(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """State and arrays of the newest whole checkpoint; both are empty if there is none.

        A damaged one is renamed and passed over; one that is bound to anything else is a RunError.
        """
        runtime = self.runtime
        for path in runtime.on_first_rank(self.commits):
            folder, problem = path.parent, ""
            read = functools.partial(read_checked, path, int(path.suffix[1:], 16))
            try:
                about = json.loads(runtime.on_first_rank(read))
                theirs = about["bound"]
                differ = ", ".join(f"{name}={theirs.get(name)} (now {ours})" for name, ours
                                   in self.bound.items() if ours != theirs.get(name))
                require(not differ, f"{folder} was made with {differ}: set that again, or another "
                        "RUN_ID")
                data = read_checked(folder / f"rank{runtime.rank}", about["crcs"][runtime.rank])
            except ArtifactError as error:
                problem = str(error)
            problem = max(runtime.gather(problem))
            if not problem:
                return about["state"], dict(np.load(io.BytesIO(data), allow_pickle=False))
            runtime.log.event("refused", "checkpoint passed over: {reason}", reason=problem)
            runtime.on_first_rank(functools.partial(folder.rename, f"{folder}.damaged"))
        return {}, {}


class Facts(NamedTuple):
    """What every rank knows of a step: global values that travelled with its gradients."""

    loss: float = 0.0
    late: float = 0.0  # ranks whose clock says that the run must end
    quit: float = 0.0  # ranks that a signal told to end
    save: float = 0.0  # whether rank 0 wants a checkpoint
    elapsed_ms: float = 0.0  # rank 0's clock when the step was launched
    step_ms: float = 0.0  # rank 0's median step time
    grad_norm: float = 0.0


class Trainer:
    """The training loop: phases, schedules, averages, clock, checkpoints and log.

    The host runs up to `lag` steps ahead of the device: step s is decided by the facts of step
    s - lag, the same on every rank, so all of them stop and save at the same step.
    """

    def __init__(self, model: GPT, loader: Loader, evaluator: Evaluator) -> None:
        self.model, self.loader, self.evaluator = model, loader, evaluator
        self.config, self.runtime = c, runtime = evaluator.config, evaluator.runtime
        self.log, self.clock, self.phase = runtime.log, TrainClock(runtime), Phase()
        self.forward, self.params = runtime.compile(model), list(model.parameters())
        runtime.broadcast(self.params)
        self.average = Average(model, c)
        self.lag = 2 if runtime.cuda else 1
        self.unread: deque[tuple[int, float, Tensor, Any]] = deque()
        self.facts, self.losses = Facts(), deque(maxlen=50)
        rank_seqs = loader.batch_seqs // runtime.world
        self.micro_seqs = micro_batch_seqs(rank_seqs, c, runtime)
        self.accumulation = rank_seqs // self.micro_seqs
        self.steps = self.saved = 0  # steps done, and those of the last checkpoint
        self.saved_at, self.resumed = time.monotonic(), False
        self.reserve_ms = 0.0  # of the clock, for what comes after the last step

    def run(self) -> None:
        """Train until ITERATIONS, the clock or a signal; leaves the model with its last weights."""
        c, runtime, loader = self.config, self.runtime, self.loader
        data = repr(([p.name for p in loader.paths], [len(ids) for ids in loader.shards],
                     self.evaluator.val.vocab_sha256))
        self.checkpoints = Checkpoints(c, runtime, hashlib.sha256(data.encode()).hexdigest())
        require(c.resume or not runtime.on_first_rank(self.checkpoints.commits),
                f"{self.checkpoints.root} holds checkpoints of another run; set another RUN_ID or "
                "CHECKPOINT_PATH, or RESUME=1 to go on with that run")
        self.warm_up()
        self.optimizer = Optimizer(self.model, c, runtime)
        if c.resume:
            self.resume()
        runtime.defer_signals = True
        self.clock.resume()
        while self.steps < c.iterations and not (self.facts.late or self.facts.quit):
            self.train_step(self.steps)
            self.steps += 1
            self.read_facts(self.steps - self.lag)
            if self.facts.save:
                self.save()
            if c.val_loss_every and self.steps % c.val_loss_every == 0 < c.iterations - self.steps:
                self.validate()
        if self.saved < self.steps:
            self.save()
        self.end()
        self.validate()

    def end(self) -> None:
        """Log how training ended, on every rank alike; raises Stopped if a signal ended it."""
        c, step, runtime = self.config, self.steps, self.runtime
        ranks = runtime.gather((step, self.clock.elapsed_ms, runtime.signal))
        runtime.defer_signals = False
        steps, times, signals = zip(*ranks, strict=True)
        assert set(steps) == {step}, f"ranks stopped at different steps: {steps}"
        name = signal.Signals(max(signals)).name if any(signals) else ""
        known = dict(step=step, total=c.iterations, reason=name or "wallclock_cap",
                     train_ms=max(times), cap_ms=1e3 * c.max_wallclock_seconds,
                     reserve_ms=CLOCK_RESERVE_MS + self.reserve_ms)
        self.log.event("clock", "train_clock slowest_rank:{train_ms:.0f}ms cap:{cap_ms:.0f}ms "
                       "reserve:{reserve_ms:.0f}ms all_ranks_at_step:{step}", **known)
        if step < c.iterations:
            self.log.event("stop", "stopping_early: {reason} train_time:{train_ms:.0f}ms "
                           "step:{step}/{total}", **known)
        if name:
            require(self.saved == step, f"stopped by {name}, and no checkpoint could be written")
            raise Stopped(f"stopped by {name}, with a checkpoint of step {step}: RESUME=1 "
                          f"RUN_ID={runtime.log.run_id} goes on")

    def train_step(self, step: int) -> None:
        """One optimizer step, launched without waiting for the device."""
        c, clock, runtime, rank_0 = self.config, self.clock, self.runtime, self.runtime.rank == 0
        now = self.facts.elapsed_ms + self.lag * self.facts.step_ms + self.reserve_ms
        scale = lr_scale(step, now, self.facts.step_ms, c)
        phase = Phase(self.phase.recur or recurrence_due(step, now, c),
                      self.phase.qat or scale < c.late_qat_threshold)
        if phase != self.phase:
            self.enter(phase, step)
        late = clock.expected_ms(step + self.lag) + self.reserve_ms > usable_ms(c)
        due = rank_0 and 0 < c.checkpoint_every <= time.monotonic() - self.saved_at
        self.saved_at = time.monotonic() if due else self.saved_at
        loss = self.backward(*self.loader.batch(step)) / runtime.world
        facts = torch.tensor([late, bool(runtime.signal), due, clock.elapsed_ms * rank_0,
                              clock.step_ms * rank_0], pin_memory=runtime.cuda)
        facts = torch.cat((loss.view(1), facts.to(runtime.device, non_blocking=True)))
        facts = self.optimizer.step(facts, scale, muon_momentum(step, c), muon_taper(step, now, c))
        self.average.update(step, scale)
        host = torch.empty(facts.shape, pin_memory=runtime.cuda)
        host.copy_(facts, non_blocking=True)
        self.unread.append((step, scale, host, clock.mark()))

    def backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Gradients of this rank's mean loss, micro-batch by micro-batch; returns that loss."""
        self.model.zero_grad()
        total = torch.zeros((), device=self.runtime.device)
        for x, y in zip(inputs.split(self.micro_seqs), targets.split(self.micro_seqs), strict=True):
            loss = self.forward(x, y).mean() / self.accumulation
            loss.backward()
            total += loss.detach()
        return total

    def read_facts(self, last: int) -> None:
        """Take in the facts of the steps up to `last`; a value that is not finite ends the run."""
        while self.unread and self.unread[0][0] <= last:
            step, scale, host, event = self.unread.popleft()
            event.synchronize()
            facts = Facts(*host.tolist())
            self.facts = facts._replace(late=self.facts.late + facts.late)  # once late, always
            known = dict(step=step + 1, loss=facts.loss, grad_norm=facts.grad_norm)
            require(math.isfinite(facts.loss + facts.grad_norm), "loss {loss}, gradient norm "
                    "{grad_norm} at step {step}: the run diverged; lower the learning rates{also} "
                    "(the last checkpoint is of step {saved})".format(**known, saved=self.saved,
                    also=SHORT_DOCUMENTS * self.config.doc_attention))
            usual = statistics.median(self.losses) if len(self.losses) > 9 else math.inf
            if facts.loss > SPIKE * usual:
                self.log.event("spike", "loss_spike step:{step} train_loss:{loss:.4f} "
                               "median:{usual:.4f}", **known, usual=usual)
            self.losses.append(facts.loss)
            self.clock.poll()
            if step < 10 or (step + 1) % self.config.train_log_every == 0:
                train_ms = self.clock.elapsed_ms
                self.log.event("train", "step:{step}/{total} train_loss:{loss:.4f} train_time:"
                               "{train_ms:.0f}ms step_avg:{step_avg:.2f}ms lr_scale:{lr_scale:.4f} "
                               "grad_norm:{grad_norm:.4f}", **known, total=self.config.iterations,
                               train_ms=train_ms, step_avg=train_ms / max(self.clock.steps, 1),
                               step_ms=self.clock.step_ms, lr_scale=scale)

    def enter(self, phase: Phase, step: int) -> None:
        """Switch to a phase; as recurrence starts, the repeats become copies of their bases."""
        if phase.recur and not self.phase.recur:
            self.copy_to_repeats()
        for name in phase._fields:
            if getattr(phase, name) != getattr(self.phase, name):
                self.log.event("phase", "phase {name}:on step:{step}", name=name, step=step)
        self.phase = phase
        self.model.set_phase(phase)

    @torch.no_grad()
    def copy_to_repeats(self) -> None:
        """Weights, momentum and averages of the base MLPs, bit for bit, to their repeats."""
        pairs, place = self.model.repeats(), {p: i for i, p in enumerate(self.params)}
        self.optimizer.muon.copy_momentum(pairs)
        for tensors in filter(None, (self.params, self.average.ema, self.average.swa)):
            for base, repeat in pairs:
                tensors[place[repeat]].copy_(tensors[place[base]])

    def validate(self) -> None:
        """Plain validation of the current weights; the clock stands still."""
        self.clock.pause()
        score, _ = self.evaluator.score(self.forward, self.config.eval_seq_len)
        train_ms = self.clock.elapsed_ms
        self.log.event("val", "step:{step}/{total} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                       "train_time:{train_ms:.0f}ms step_avg:{step_avg:.2f}ms", step=self.steps,
                       total=self.config.iterations, val_loss=score.loss, val_bpb=score.bpb,
                       train_ms=train_ms, step_avg=train_ms / max(self.steps, 1))
        self.clock.resume()

    def tensors(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """All that a step changes: what this rank's shard holds, and what rank 0's has for all."""
        adam, average, small = self.optimizer.adam.state, self.average, self.optimizer.small
        kinds = dict(weight=self.params, ema=average.ema, swa=average.swa) | {
            key: [adam[p][key] for p in small] for key in ("step", "exp_avg", "exp_avg_sq")}
        same = {f"{kind}{i}": t for kind, tensors in kinds.items() for i, t in enumerate(tensors)}
        own = {"momentum": self.optimizer.muon.momentum}
        return own | (same if self.runtime.rank == 0 else {}), list(same.values())

    def save(self) -> None:
        """Checkpoint this step boundary while the clock stands still; a failure is but logged."""
        self.clock.pause()
        self.read_facts(self.steps)  # a step that diverged is never kept
        state = dict(steps=self.steps, phase=self.phase, snapshots=self.average.snapshots,
                     facts=self.facts._replace(quit=0.0, save=0.0),
                     elapsed_ms=self.clock.elapsed_ms, recent=list(self.clock.recent))
        try:
            arrays = {name: t.detach().cpu().numpy() for name, t in self.tensors()[0].items()}
            self.checkpoints.write(arrays, state)
            self.saved = self.steps
            self.log.event("checkpoint", "checkpoint step:{step}", step=self.steps)
        except RunError as error:
            self.log.event("checkpoint_failed", "warning: no checkpoint at step:{step}: {reason}",
                           step=self.steps, reason=str(error))
        self.clock.resume()

    @torch.no_grad()
    def resume(self) -> None:
        """Go on from the newest checkpoint, or from the start, saying so, where there is none."""
        state, arrays = self.checkpoints.load()
        own, same = self.tensors()
        for name, array in arrays.items():
            own[name].copy_(torch.from_numpy(array))
        if state:
            self.runtime.broadcast(same)
            self.steps = self.saved = self.clock.steps = state["steps"]
            self.clock.elapsed_ms = state["elapsed_ms"]
            self.clock.recent.extend(state["recent"])
            self.facts, self.average.snapshots = Facts(*state["facts"]), state["snapshots"]
            self.phase = Phase(*state["phase"])
            self.model.set_phase(self.phase)
        self.resumed = bool(state)
        self.log.event("resume", "resumed step:{step} of {folder}", step=self.steps,
                       folder=str(self.checkpoints.root) if state else "nothing: no checkpoint")

    def warm_up(self) -> None:
        """Compile and prime every graph of the run on random tokens, then restore all state."""
        c, runtime, phases = self.config, self.runtime, self.phases()
        saved = [p.detach().clone() for p in self.params]
        jobs = [functools.partial(self.compile, phase) for phase in phases] + self.ttt_jobs()
        seconds = runtime.in_turns(jobs if runtime.compiles and c.warmup_steps else [])
        random = torch.Generator().manual_seed(c.seed)
        shape = self.micro_seqs * self.accumulation, c.train_seq_len, self.model.vocab_size
        optimizer, average = Optimizer(self.model, c, runtime), Average(self.model, c)
        for phase, compile_s in zip_longest(phases, seconds[: len(phases)], fillvalue=0.0):
            self.model.set_phase(phase)
            runtime.reset_peak_memory()
            marks = [runtime.event()]
            for _ in range(math.ceil(c.warmup_steps / len(phases))):
                loss = self.backward(*runtime.random_tokens(*shape, random))
                optimizer.step(loss.repeat(6), 1.0, c.muon_momentum)
                average.update(0, 1.0)
                marks.append(runtime.event())
            runtime.synchronize()
            times = [begin.elapsed_time(end) for begin, end in pairwise(marks)]
            self.log.event("primed", "primed recurrence:{recur:d} qat:{qat:d} compile:"
                           "{compile_s:.1f}s step:{step_ms:.2f}ms peak:{peak_mib}MiB",
                           **phase._asdict(), compile_s=compile_s,
                           step_ms=min(times, default=0.0), peak_mib=runtime.peak_memory_mib()[0])
        with torch.no_grad():
            torch._foreach_copy_(self.params, saved)
        if c.quant == "gptq" and c.max_wallclock_seconds:
            for _ in range(2):  # the first time primes
                self.reserve_ms = CALIBRATION_MARGIN * self.hessians()[1]
        self.model.set_phase(self.phase)
        runtime.synchronize()

    def phases(self) -> list[Phase]:
        """The phases that steps of this run may be in: by a clock, all that settings allow."""
        c, qat = self.config, self.config.late_qat_threshold
        if not c.max_wallclock_seconds:
            steps = range(c.iterations)
            return list(dict.fromkeys(Phase(recurrence_due(step, 0.0, c),
                                            lr_scale(step, 0.0, 0.0, c) < qat) for step in steps))
        first = recurrence_due(0, 0.0, c)  # then no step is without it
        return [Phase(recur, late) for late in (False, True)[: 1 + bool(qat)]
                for recur in (False, True)[first : 1 + bool(c.repeated)]]

    def compile(self, phase: Phase) -> None:
        """Compile training and validation in a phase."""
        self.model.set_phase(phase)
        self.backward(*self.runtime.random_tokens(
            self.micro_seqs, self.config.train_seq_len, self.model.vocab_size))
        self.evaluator.prime(self.forward, self.model.vocab_size)

    def ttt_jobs(self) -> list[Callable[[], None]]:
        """What compiles all that the reloaded artifact will do, with this model in its place."""
        phase = Phase(recur=bool(self.config.repeated))
        self.model.set_phase(phase)
        ttt = TTT_KINDS[self.config.ttt_kind](self.model, self.evaluator)

        def job(prime: Callable[[], None]) -> None:
            self.model.set_phase(phase)
            self.model.train_only(ttt.is_trained)
            prime()
            self.model.train_only(self.model.is_trained)

        self.model.train_only(self.model.is_trained)
        return [functools.partial(job, prime) for prime in ttt.jobs]

    def hessians(self) -> tuple[dict[str, Tensor], float]:
        """Hessians on the training data after the last step so far, and the milliseconds taken."""
        c, begin, first = self.config, self.runtime.event(), self.steps * self.loader.batch_seqs
        wanted = range(first, first + c.gptq_calibration_seqs)
        ids = [self.loader.sequence(i)[:-1] for i in wanted[self.runtime.share_of(len(wanted))]]
        ids = torch.from_numpy(np.array(ids, np.int64).reshape(-1, c.train_seq_len))
        batches = ids.to(self.runtime.device).split(self.micro_seqs)
        hessians, end = input_hessians(self.model, batches, self.runtime), self.runtime.event()
        self.runtime.synchronize()
        return hessians, begin.elapsed_time(end)

    def finish(self) -> tuple[str, dict[str, Tensor]]:
        """Average, then calibrate on the clock; returns which weights these are, and Hessians."""
        weights, hessians = self.average.store(), {}
        self.model.set_phase(Phase(recur=self.phase.recur))
        if self.config.quant == "gptq":
            hessians, milliseconds = self.hessians()
            self.clock.elapsed_ms += milliseconds
            self.log.event("calibration", "gptq_calibration train_time:{train_ms:.0f}ms "
                           "cap:{cap_ms:.0f}ms", train_ms=self.clock.elapsed_ms,
                           cap_ms=1e3 * self.config.max_wallclock_seconds)
        return weights, hessians


BYTES_PER_TOKEN = 250_000  # of memory that a pass takes, measured with the record model


def tokens_at_once(c: Config, runtime: Runtime) -> int:
    """Tokens of a training pass that memory should hold: estimated for 80 GB, scaled to others."""
    if not runtime.cuda:
        return 16384
    memory = torch.cuda.get_device_properties(runtime.device).total_memory
    return int(98304 * min(1.0, memory / 75e9) * 512 / c.model_dim)


def micro_batch_seqs(rank_seqs: int, c: Config, runtime: Runtime) -> int:
    """Sequences per forward pass: MICRO_BATCH_TOKENS, or the most that memory should hold."""
    if most := c.micro_batch_tokens // c.train_seq_len:
        require(rank_seqs % most == 0, f"MICRO_BATCH_TOKENS={c.micro_batch_tokens} does not divide "
                f"the {rank_seqs * c.train_seq_len} tokens of a rank's step")
        return most
    most = min(rank_seqs, max(1, tokens_at_once(c, runtime) // c.train_seq_len))
    return max(n for n in range(1, most + 1) if rank_seqs % n == 0)


# --- 12 main ----------------------------------------------------------


def dry_run(model: GPT, runtime: Runtime, c: Config) -> None:
    """Print configuration, parameters, predicted bytes and memory."""
    line, count = runtime.log.line, sum(p.numel() for p in model.parameters())
    line(settings_listing(c))
    coarseness = least_coarseness(lambda at: sum(predicted_bytes(model, c, at).values()), c)
    expected = predicted_bytes(model, c, coarseness)
    for kind, size in expected.items():
        line(f"predicted_bytes {kind}:{size:.0f}")
    line(f"predicted_bytes code:{CODE_BYTES} total:{sum(expected.values()) + CODE_BYTES:.0f} "
         f"coarseness:{coarseness:.3f}")
    tokens = c.train_batch_tokens // runtime.world
    micro = micro_batch_seqs(tokens // c.train_seq_len, c, runtime) * c.train_seq_len
    kept = len(layer_plan(c, True)) * (14 * c.model_dim + 2 * c.hidden_dim)  # for backward
    activations = micro * (kept * runtime.dtype.itemsize + 8 * model.vocab_size)
    state = 4 * count * (5 + c.swa_enabled)  # weights, gradients (packed too), moments, averages
    line(f"model_params:{count} predicted_mib state:{state >> 20} activations:{activations >> 20}")


@contextlib.contextmanager
def stage(name: str, summary: dict[str, Any]) -> Iterator[None]:
    """Enter the seconds of the body into the summary."""
    start = time.perf_counter()
    yield
    summary[f"seconds_{name}"] = round(time.perf_counter() - start, 1)


def log_start(runtime: Runtime, c: Config, val: Validation, table: ByteTable) -> None:
    """Code, environment and configuration to the log; what matters to the console."""
    log, total = runtime.log, int(val.bytes.sum(dtype=np.int64))
    log.line("".join(linecache.getlines(run.__code__.co_filename)), console=False)  # also if packed
    log.line(f"python {sys.version} torch {torch.__version__} on {platform.platform()}", False)
    if runtime.cuda:
        log.line(f"cuda {torch.version.cuda} {torch.cuda.get_device_properties(0)}", console=False)
    log.event("code", "code_sha256:{sha256} bytes:{bytes}", sha256=sha256_file(__file__),
              bytes=CODE_BYTES)
    log.event("config", **asdict(c))
    log.line(settings_listing(c), console=False)
    device = torch.cuda.get_device_name() if runtime.cuda else f"cpu x{torch.get_num_threads()}"
    handicaps = runtime.handicaps()
    log.event("machine", "run_id:{run_id} preset:{preset} device:{device} dtype:{dtype}\n"
              "attention:{attention} mlp:{mlp}\ncompile:{compiles:d} ({compiler})\nseed:{seed}",
              run_id=log.run_id, preset=show(c.preset), device=device, dtype=str(runtime.dtype),
              attention=runtime.attention_name, mlp=runtime.mlp_name, compiles=runtime.compiles,
              compiler=runtime.compiler, seed=c.seed, world_size=runtime.world, handicaps=handicaps)
    if handicaps and "demo" not in c.preset:
        log.line("warning: slower than a record run: " + "; ".join(handicaps))
    inside = not table.is_boundary[val.ids[0]]
    note = " (the first id is context only: its bytes are not counted)" if inside else ""
    log.event("bytes", "byte_audit:{audit} bytes:{bytes}" + note, audit=val.audit, bytes=total)


def train(model: GPT, evaluator: Evaluator, summary: dict[str, Any]) -> None:
    """Train, average, diagnose and export."""
    runtime, config, log = evaluator.runtime, evaluator.config, evaluator.runtime.log
    loader = Loader(find_shards(config, "train"), config, runtime, model.vocab_size)
    trainer = Trainer(model, loader, evaluator)
    log.line(f"model_params:{sum(p.numel() for p in model.parameters())}")
    log.line(f"world_size:{runtime.world} grad_accum_steps:{trainer.accumulation}")
    model.coarseness = least_coarseness(
        lambda at: sum(predicted_bytes(model, config, at).values()), config)
    with stage("train", summary):
        trainer.run()
        weights, hessians = trainer.finish()
    allocated, reserved = runtime.peak_memory_mib()
    log.line(f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB")
    with stage("post_ema", summary):
        score, _ = evaluator.score(trainer.forward, config.eval_seq_len)
    log.event("post_ema", "DIAGNOSTIC post_ema val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
              "eval_time:{eval_ms:.0f}ms", val_loss=score.loss, val_bpb=score.bpb,
              eval_ms=1e3 * summary["seconds_post_ema"])
    with stage("export", summary):
        total = export_model(model, hessians, evaluator.val, runtime, config)
    summary |= dict(
        steps=trainer.steps, resumed=int(trainer.resumed), weights=weights, bytes_total=total,
        train_ms=round(trainer.clock.elapsed_ms), peak_memory_mib=allocated,
        bytes_artifact=total - CODE_BYTES, post_ema_bpb=round(score.bpb, 6))


def summarize(runtime: Runtime, summary: dict[str, Any], scores: dict[str, Score]) -> None:
    """The `key: value` block, then the headline score under its historical name, last."""
    headline = max(scores.keys() & set(EVAL_MODES), key=EVAL_MODES.index)
    for mode, score in scores.items():
        device_us = 1e6 * score.seconds * runtime.world / score.tokens
        summary |= {f"{mode}_bpb": round(score.bpb, 6), f"seconds_{mode}": round(score.seconds, 1),
                    f"{mode}_us_per_token_and_device": round(device_us, 3)}
    summary |= dict(headline_mode=headline, val_bpb=round(scores[headline].bpb, 6))
    order = ("bpb", "bytes", "seconds")  # what one looks for first
    runtime.log.line("---")
    for key in sorted(summary, key=lambda key: [word not in key for word in order]):
        runtime.log.line(f"{key}: {summary[key]}")
    runtime.log.event("summary", **summary)
    runtime.log.line(f"final_int8_zlib_roundtrip_exact val_loss:{scores[headline].loss:.8f} "
                     f"val_bpb:{scores[headline].bpb:.8f}")


def build_demo(c: Config, runtime: Runtime) -> dict[str, Any]:
    """Build the demo's shards unless they are there; returns its yardstick."""
    try:
        from records import demo_data  # the one import from this repository, in the demo only

        built = demo_data.build_demo(Path(c.data_path).parent, runtime.log.line)
    except (ImportError, OSError, ValueError) as error:
        raise RunError(f"cannot build the demo's data: {error}") from error
    bpb = demo_data.byte_model_bpb(built["train_text"], built["val_text"])
    return {"order2_byte_model_bpb": round(bpb, 4)}


def run(c: Config) -> None:
    """From shards to a scored artifact; raises RunError for whatever stops the run."""
    with contextlib.closing(Runtime(c)) as runtime, runtime.guarded():
        summary: dict[str, Any] = {}
        if "demo" in c.preset and c.data_path == PRESETS["demo"]["data_path"]:
            with stage("data", summary):
                summary |= runtime.on_first_rank(lambda: build_demo(c, runtime))
        if c.dry_run:
            vocab_size = c.vocab_size or len(load_byte_table(c).base_bytes)
            return dry_run(GPT(c, np.zeros(vocab_size, bool), runtime), runtime, c)
        find_shards(c, "val")  # its message tells a newcomer what to do
        table = load_byte_table(c)
        val = load_validation(c, table)
        log_start(runtime, c, val, table)
        evaluator = Evaluator(runtime, c, val)
        if not c.load_artifact:
            train(GPT(c, table.is_boundary, runtime), evaluator, summary)
        with stage("eval", summary):
            scores = evaluate_artifact(c.load_artifact or c.artifact_path, evaluator, table)
        summarize(runtime, summary | {"byte_audit": val.audit}, scores)


def main(arguments: list[str]) -> int:
    """Run as the environment says; after a message on stderr 1, or 75 if RESUME=1 can go on."""
    if arguments:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # into `head`, say
        print(f"{__doc__}\n{settings_table()}")
        return 0 if arguments in (["--help"], ["-h"]) else 1
    try:
        run(Config.from_env(os.environ, find_gpu(os.environ)))
    except RunError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.code
    except (RuntimeError, MemoryError) as error:
        if not re.search("out of memory|allocate", str(error)):
            raise
        print(f"error: {error}\nout of memory: lower MICRO_BATCH_TOKENS (then TRAIN_BATCH_TOKENS), "
              "or in evaluation VAL_BATCH_SIZE, TTT_BATCH_SEQS or TTT_DOC_BATCH", file=sys.stderr,
              flush=True)
        return 1
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    if "RANK" in os.environ:  # gloo's threads can abort a finished rank while Python is torn down
        os._exit(status)
    sys.exit(status)
