"""The pre-flight: everything that can be proven without a GPU.

    python -m pytest test_cpu.py             the default tier, a few minutes on two cores
    python -m pytest -m slow test_cpu.py     full width, several ranks, kills, compilers

Tests that compare with reference data skip, with the reason, where ../shared is absent.
"""

from __future__ import annotations

import ast
import base64
import bz2
import contextlib
import functools
import gzip
import hashlib
import http.server
import importlib
import importlib.util
import io
import json
import linecache
import lzma
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import unicodedata
import urllib.error
import urllib.parse
import zlib
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import retokenize_scylla as R
import train_gpt as t

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no reference data in {SHARED}")

torch.set_num_threads(1)  # tiny tensors: threads only cost, and much where cores are shared

# ==========================================================================================
# settings, data, bytes, artifact, evaluation, whole runs
# ==========================================================================================

# helpers: a tiny model, a tiny dataset, runs inside this process

A_VOCAB, A_BOS = 300, 299
A_TINY = dict(
    num_layers=4, model_dim=32, num_heads=2, num_kv_heads=1, rope_dims=8, xsa_last_n=2,
    bigram_vocab_size=64, bigram_dim=8, ve_dim=8, ve_layers=(2, 3), parallel_start_layer=3,
    recur_layers=(1, 2), recur_start_step=3.0, train_batch_tokens=256, train_seq_len=32,
    iterations=8, warmdown_iters=20, warmup_steps=2, max_wallclock_seconds=0.0,
    muon_momentum=0.95, muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=4,
    ema_decay=0.9, swa_every=1, late_qat_threshold=0.25, n_int6_layers=2, eval_seq_len=32,
    eval_stride=8, val_batch_size=512, val_loss_every=0, train_log_every=1, ttt_freeze_blocks=1,
)  # fmt: skip
A_MODEL_BITS = {"embed": 8, "attn": 6, "mlp": 5, "repeat": 6, "projection": 16, "vector": 32}


def a_config(**overrides):
    """A tiny Config that contradicts nothing."""
    config = t.Config(**(A_TINY | overrides))
    assert t.contradictions(config) == []
    return config


def a_environ(**overrides):
    """The same as environment variables."""
    return {k.upper(): t.show(v) for k, v in (A_TINY | overrides).items()}


def a_problems(environ, cuda=True):
    """Text of the RunError that an environment raises."""
    with pytest.raises(t.RunError) as caught:
        t.Config.from_env(environ, cuda)
    return str(caught.value)


def a_runtime(rank=0, world=1):
    """A CPU Runtime without log, process group or files; its collectives do nothing."""
    runtime = object.__new__(t.Runtime)
    runtime.rank, runtime.world, runtime.cuda, runtime.compiles = rank, world, False, False
    runtime.local_rank, runtime.local_world = rank, world
    runtime.device, runtime.dtype = torch.device("cpu"), torch.float32
    runtime.attention, runtime.attention_name, runtime.fused_mlp = t.sdpa, "sdpa", False
    runtime.signal, runtime.defer_signals = 0, False
    runtime.log = types.SimpleNamespace(line=lambda *_, **__: None, event=lambda *_, **__: None,
                                        run_id="none")
    runtime.all_reduce = lambda tensor: tensor
    return runtime


def a_table(vocab=A_VOCAB, path=Path("none")):
    """A byte table: 1 to 3 bytes, every third id with a leading space, the last id a boundary."""
    ids = np.arange(vocab)
    boundary = ids == vocab - 1
    return t.ByteTable(np.where(boundary, 0, 1 + ids % 3), (ids % 3 == 0) & ~boundary, boundary,
                       path)


def a_write_meta(path, table, **changes):
    """Write a byte table as the retokenizer does."""
    arrays = dict(base_bytes=table.base_bytes.astype(np.int16), vocab_size=len(table.base_bytes),
                  has_leading_space=table.has_leading_space, is_boundary_token=table.is_boundary)
    arrays = {k: v for k, v in (arrays | changes).items() if v is not None}
    np.savez(path, **arrays)
    return path


def a_write_shard(path, ids, magic=20240520, version=1, count=None):
    """Write a shard; wrong headers on request."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.parent.mkdir(parents=True, exist_ok=True)
    return a_replace(path, header.tobytes() + np.asarray(ids).astype("<u2").tobytes())


def a_replace(path, data):
    """Put a new file in the place of one that a loader's thread may still have mapped.

    Truncating a mapped file under its reader is a bus error, whoever does it.
    """
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def a_stream(count, seed, vocab=A_VOCAB):
    """Ids with structure to learn: documents of 5 to 60 ids, each after the boundary id."""
    random, ids = np.random.default_rng(seed), []
    while len(ids) < count:
        length = int(random.integers(5, 60))
        ids += [vocab - 1, *((random.zipf(1.5, length) * 7 + np.arange(length)) % (vocab - 1))]
    return np.array(ids[:count])


def a_source_bytes(ids, table):
    """Bytes of a shard, counted one id at a time."""
    total, previous = 0, None
    for i in ids:
        total += int(table.base_bytes[i])
        after_text = previous is not None and not table.is_boundary[previous]
        total += bool(table.has_leading_space[i]) and after_text
        previous = i
    return total


def a_dataset(folder, vocab=A_VOCAB, val=(400, 300), byte_exact=True):
    """Shards, byte table and manifest; returns the folder."""
    table = a_table(vocab)
    folder.mkdir(parents=True, exist_ok=True)
    a_write_meta(folder / "tiny.meta.npz", table)
    entries = {}
    for split, sizes in (("train", (3000, 2000)), ("val", val)):
        for n, size in enumerate(sizes):
            ids = a_stream(size, seed=17 * n + (split == "val"), vocab=vocab)
            path = a_write_shard(folder / f"fineweb_{split}_{n:06d}.bin", ids)
            entries[path.name] = dict(source_bytes=a_source_bytes(ids, table), bad_documents=0)
    manifest = dict(tokenizer=dict(byte_exact=byte_exact, sha256="5" * 64), shards=entries)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@contextlib.contextmanager
def a_inside(folder):
    """Work in a folder, as a CPU without ranks, with stdout captured; gives the capture."""
    old, captured = os.getcwd(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(captured):
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # on a machine with GPUs too
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        os.chdir(folder)
        try:
            yield captured
        finally:
            os.chdir(old)


@pytest.fixture(scope="module")
def a_made(tmp_path_factory):
    """A dataset and an artifact trained on it: (folder, data folder, artifact, console)."""
    folder = tmp_path_factory.mktemp("made")
    data = a_dataset(folder / "data")
    with a_inside(folder) as console:
        t.run(a_config(data_path=str(data), artifact_path="made.ptz", run_id="made"))
    return folder, data, folder / "made.ptz", console.getvalue()


def a_random_model(config, seed=0, table=None, recur=True):
    """A model in which every tensor is random (by name), so that no path is dead."""
    torch.manual_seed(seed)
    model = t.GPT(config, (table or a_table()).is_boundary, a_runtime())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            random = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
    model.set_phase(t.Phase(recur=recur and bool(config.recur_layers)))
    return model


def a_digest(tensors):
    """Names, shapes and bits of tensors as one comparable value."""
    return [(n, tuple(p.shape), hashlib.sha256(p.detach().numpy().tobytes()).hexdigest())
            for n, p in tensors]


def a_python(code_or_file, folder, environ=(), timeout=120):
    """Run python in a folder without CUDA and without settings from outside."""
    names = {f.name.upper() for f in fields(t.Config)} | {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    clean = {k: v for k, v in os.environ.items() if k not in names}
    env = clean | dict(CUDA_VISIBLE_DEVICES="", PYTHONDONTWRITEBYTECODE="1") | dict(environ)
    return subprocess.run([sys.executable, *code_or_file], cwd=folder, env=env, timeout=timeout,
                          capture_output=True, text=True)


# 1 configuration

A_RECORD = dict(  # SPEC section 1
    data_path="./data/datasets/fineweb10B_scylla", tokenizer_path="", tokenizer_meta_path="",
    run_id="", seed=1337, vocab_size=0, num_layers=11, model_dim=512, num_heads=8,
    num_kv_heads=4, mlp_mult=3.0, tie_embeddings=True, rope_base=10000.0, rope_dims=16,
    logit_softcap=30.0, qk_gain_init=1.5, ln_scale=True, xsa_last_n=4, bigram_vocab_size=2048,
    bigram_dim=128, ve_enabled=True, ve_dim=128, ve_layers=(9, 10), activation_neg_slope=0.5,
    parallel_start_layer=7, recur_layers=(4, 5), recur_start_step=3000.0, recur_untie_mlp=True,
    train_batch_tokens=786432, train_seq_len=2048, eval_seq_len=2048, iterations=20000,
    warmdown_iters=3500, warmup_steps=20, max_wallclock_seconds=600.0, matrix_lr=0.025,
    scalar_lr=0.025, tied_embed_lr=0.035, embed_lr=0.6, head_lr=0.008, tied_embed_init_std=0.005,
    muon_momentum=0.99, muon_momentum_warmup_start=0.92, muon_momentum_warmup_steps=1500,
    muon_backend_steps=5, muon_wd=0.04, adam_wd=0.04, beta1=0.9, beta2=0.95, adam_eps=1e-8,
    grad_clip_norm=0.3, ema_decay=0.997, swa_enabled=False, swa_every=50, late_qat_threshold=0.15,
    n_int6_layers=None, quant="gptq", gptq_calibration_seqs=64, eval_stride=64,
    torch_compile_disable=False, preset="record",
    micro_batch_tokens=0, compressor="auto", size_limit=16_000_000, min_lr=0.0,
    muon_row_norm=False, load_artifact="", artifact_path="final_model.int6.ptz", scores_path="",
    eval_modes=("roundtrip", "sliding", "ttt", "ngram", "slot"), val_tokens_limit=0, dry_run=False,
    smear_enabled=True, ttt_enabled=True, ttt_lr=0.005, ttt_epochs=3, ttt_chunk_tokens=32768,
    ttt_freeze_blocks=2, ttt_momentum=0.9, ttt_batch_seqs=32, ttt_grad_clip=1.0,
    ngram_enabled=False, ngram_order=5, ngram_weight=0.05, slot_enabled=False, slot_steps=8,
    slot_lr=0.005,
    checkpoint_every=0.0, checkpoint_keep=2, checkpoint_path="checkpoints", resume=False,
)  # fmt: skip


@pytest.mark.parametrize("environ", [{}, {"PRESET": "record"}, {"PRESET": "published"}])
def test_defaults_are_the_record_run(environ):
    """SPEC section 1, value by value, and the same types; published differs in its rounding."""
    config = t.Config.from_env(environ, cuda=True)
    if config.preset == "published":
        assert (config.quant, config.n_int6_layers) == ("rtn", 4)
        config = replace(config, quant="gptq", n_int6_layers=None)
    values = asdict(config) | {"preset": "record"}
    free = {"val_batch_size", "val_loss_every", "train_log_every", "class_bits", "attention",
            "mlp_kernel"}  # not in SPEC 1
    assert set(values) - set(A_RECORD) == free
    assert {k: (v, type(v)) for k, v in values.items() if k not in free} == {
        k: (v, type(v)) for k, v in A_RECORD.items()}


def test_every_setting_is_read_from_its_variable():
    """Each field takes a typed value from the variable of its name, lists and booleans too."""
    for f in fields(t.Config):
        text = {"int": "12", "int | None": "auto", "float": "0.5", "bool": "1", "str": "text",
                "tuple[int, ...]": "4, 5", "tuple[str, ...]": "a,b"}[f.type]
        text = f.metadata["choices"][0] if f.metadata["choices"] else text
        problems = []
        low = f.metadata["low"]
        text = str(low) if low is not None and text != "auto" and float(text) < low else text
        values = t.parse_settings({f.name.upper(): text}, problems)
        assert problems == [] and list(values) == [f.name]
        assert type(values[f.name]) is type(f.default)
    assert t.parse_settings({"RECUR_LAYERS": " 4, 5 "}, [])["recur_layers"] == (4, 5)
    assert t.parse_settings({"RECUR_LAYERS": ""}, [])["recur_layers"] == ()
    for text, value in {"1": True, "0": False, "true": True, "False": False}.items():
        assert t.parse_settings({"SWA_ENABLED": text}, [])["swa_enabled"] is value


@pytest.mark.parametrize("name, value, message", [
    ("ITERATIONS", "many", "expected a whole number"),
    ("ITERATIONS", "1.5", "expected a whole number"),
    ("ITERATIONS", "", "expected a whole number"),
    ("MATRIX_LR", "nan", "expected a finite number"),
    ("MATRIX_LR", "inf", "expected a finite number"),
    ("SWA_ENABLED", "2", "expected 0 or 1"),
    ("RECUR_LAYERS", "4;5", "expected a comma list of whole numbers"),
    ("PRESET", "fast", "allowed are record, published, demo"),
    ("COMPRESSOR", "brotli", "allowed are auto, rans, lzma, zlib, zstd"),
    ("SEED", "-1", "must be at least 0 and at most 2147483647"),
    ("NUM_LAYERS", "1", "must be at least 2 and at most 64"),
    ("NUM_HEADS", "0", "must be at least 1"),
    ("NUM_KV_HEADS", "0", "must be at least 1"),
    ("VOCAB_SIZE", "65537", "at most 65536"),
    ("TRAIN_SEQ_LEN", "1", "must be at least 2"),
    ("ITERATIONS", "0", "must be at least 1"),
    ("MATRIX_LR", "-0.1", "must be at least 0"),
    ("MUON_MOMENTUM", "1", "at most 0.9999"),
    ("BETA2", "1", "at most 0.9999"),
    ("MIN_LR", "1.5", "at most 1"),
    ("EMA_DECAY", "1", "at most 0.99999"),
    ("MUON_BACKEND_STEPS", "0", "must be at least 1"),
    ("LATE_QAT_THRESHOLD", "-0.5", "must be at least 0"),
    ("LOGIT_SOFTCAP", "0", "must be at least 0.001"),
    ("EVAL_STRIDE", "0", "must be at least 1"),
    ("VAL_BATCH_SIZE", "0", "must be at least 1"),
    ("SIZE_LIMIT", "0", "must be at least 1"),
    ("VAL_TOKENS_LIMIT", "-5", "must be at least 0"),
])  # fmt: skip
def test_a_bad_value_is_named_with_what_is_allowed(name, value, message):
    """Variable, value and what is allowed, on one line."""
    lines = [line for line in a_problems({name: value}).splitlines() if f"{name}={value}" in line]
    assert len(lines) == 1 and message.replace(", ", ",") in lines[0].replace(", ", ",")


def test_ranges_include_their_ends():
    """A limit itself is allowed, the next value is not."""
    for f in fields(t.Config):
        for key, step in (("low", -1), ("high", 1)):
            limit = f.metadata[key]
            if limit is None:
                continue
            inside, outside = [], []
            t.parse_settings({f.name.upper(): repr(limit)}, inside)
            t.parse_settings({f.name.upper(): repr(limit + step)}, outside)
            assert inside == [] and len(outside) == 1, f.name


@pytest.mark.parametrize("environ, message", [
    (dict(MODEL_DIM="516"), "MODEL_DIM=516: not a multiple of NUM_HEADS=8"),
    (dict(NUM_KV_HEADS="3"), "NUM_HEADS=8: not a multiple of NUM_KV_HEADS=3"),
    (dict(ROPE_DIMS="15"), "ROPE_DIMS=15: .*even"),
    (dict(ROPE_DIMS="66"), "ROPE_DIMS=66: .*head dimension 64"),
    (dict(TRAIN_BATCH_TOKENS="2049"), "TRAIN_BATCH_TOKENS=2049: .*multiple of TRAIN_SEQ_LEN"),
    (dict(MICRO_BATCH_TOKENS="5"), "MICRO_BATCH_TOKENS=5: .*multiple of TRAIN_SEQ_LEN=2048"),
    (dict(EVAL_STRIDE="4096"), "EVAL_STRIDE=4096: .*EVAL_SEQ_LEN=2048"),
    (dict(PARALLEL_START_LAYER="4"), r"PARALLEL_START_LAYER=4: .*5\.\.11"),
    (dict(PARALLEL_START_LAYER="12"), r"PARALLEL_START_LAYER=12: .*5\.\.11"),
    (dict(RECUR_LAYERS="4,6"), "RECUR_LAYERS=4,6: .*consecutive"),
    (dict(RECUR_LAYERS="5,4"), "RECUR_LAYERS=5,4: .*consecutive"),
    (dict(RECUR_LAYERS="11,12"), r"RECUR_LAYERS=11,12: .*0\.\.10"),
    (dict(RECUR_LAYERS="6,7"), "RECUR_LAYERS=6,7: crosses PARALLEL_START_LAYER=7"),
    (dict(RECUR_START_STEP="2.5"), "RECUR_START_STEP=2.5: .*fraction below 1"),
    (dict(VE_LAYERS="9,11"), r"VE_LAYERS=9,11: .*0\.\.10"),
    (dict(VE_LAYERS="9,9"), "VE_LAYERS=9,9: .*once"),
    (dict(VE_LAYERS=""), "VE_LAYERS=: .*VE_ENABLED=0"),
    (dict(XSA_LAST_N="12"), "XSA_LAST_N=12: .*11 layers"),
    (dict(N_INT6_LAYERS="3"), "N_INT6_LAYERS=3: .*even and at most 12"),
    (dict(N_INT6_LAYERS="14"), "N_INT6_LAYERS=14: .*even and at most 12"),
    (dict(BIGRAM_VOCAB_SIZE="1"), "BIGRAM_VOCAB_SIZE=1: .*at least 2"),
    (dict(EVAL_MODES=""), "EVAL_MODES=: .*roundtrip, ?sliding"),
    (dict(EVAL_MODES="sliding,sliding"), "EVAL_MODES=sliding,sliding: .*once"),
    (dict(EVAL_MODES="roundtrip,swa"), "EVAL_MODES=roundtrip,swa: .*roundtrip, ?sliding"),
    (dict(EVAL_MODES="slot", SLOT_ENABLED="1"), "EVAL_MODES=slot: .*besides slot"),
    (dict(EVAL_MODES="ngram"), "EVAL_MODES=ngram: .*enabled"),
    (dict(TTT_CHUNK_TOKENS=1000), "TTT_CHUNK_TOKENS=1000: smaller than a window.*2048"),
    (dict(TTT_FREEZE_BLOCKS=11), "TTT_FREEZE_BLOCKS=11: .*TTT_ENABLED=0"),
    (dict(CLASS_BITS="mlp=9"), r"CLASS_BITS=mlp=9: .*CLASS=2\.\.8"),
    (dict(CLASS_BITS="vector=4"), "CLASS_BITS=vector=4: .*embed"),
    (dict(CLASS_BITS="mlp"), "CLASS_BITS=mlp: "),
    (dict(CLASS_BITS="mlp=22"), "CLASS_BITS=mlp=22: "),
])  # fmt: skip
def test_contradictions_are_named(environ, message):
    """Each rule speaks for itself: exactly one problem, with the variable and the reason."""
    lines = a_problems(environ).splitlines()
    assert len(lines) == 2 and re.search(message, lines[1])


@pytest.mark.parametrize("environ", [
    dict(RECUR_LAYERS=""), dict(RECUR_LAYERS="7,8"), dict(PARALLEL_START_LAYER="11"),
    dict(PARALLEL_START_LAYER="5", RECUR_LAYERS=""), dict(N_INT6_LAYERS="12"),
    dict(RECUR_START_STEP="0"), dict(RECUR_START_STEP="0.4"), dict(VE_ENABLED="0", VE_LAYERS=""),
    dict(BIGRAM_VOCAB_SIZE="0"), dict(CLASS_BITS="mlp=2, attn=8,repeat=4,embed=6"),
    dict(EVAL_STRIDE="2048"), dict(XSA_LAST_N="11"), dict(MICRO_BATCH_TOKENS="4096"),
])  # fmt: skip
def test_what_is_possible_is_allowed(environ):
    """The rules refuse no more than they must."""
    t.Config.from_env(environ, cuda=True)


def test_all_problems_are_reported_at_once():
    """One RunError for values, ranges, contradictions, near misses and unknown names."""
    text = a_problems(dict(ITERATIONS="x", SEED="-1", NUM_KV_HEADS="3", TRAIN_SEQLEN="9",
                           EMA_ENABLED="1", PRESET="fast", RESUME="1"), cuda=False)
    for name in ("ITERATIONS", "SEED", "NUM_KV_HEADS", "TRAIN_SEQLEN", "EMA_ENABLED", "PRESET",
                 "RESUME"):
        assert sum(line.strip().startswith(f"{name}=") or f" {name}=" in line
                   for line in text.splitlines()) >= 1, name
    assert len(text.splitlines()) == 8


@pytest.mark.parametrize("name, meant", [
    ("TRAIN_SEQLEN", "TRAIN_SEQ_LEN"), ("MATRIXLR", "MATRIX_LR"), ("EVAL_STRIDES", "EVAL_STRIDE"),
    ("NUM_LAYER", "NUM_LAYERS"), ("WARM_DOWN_ITERS", "WARMDOWN_ITERS"),
    ("TRAIN_BATCH_TOKEN", "TRAIN_BATCH_TOKENS"),
])  # fmt: skip
def test_near_misses_are_answered(name, meant):
    """A name that is nearly a setting is a mistake, and the answer names the setting."""
    assert f"{name}=7: no such setting; did you mean {meant}?" in a_problems({name: "7"})


def test_published_names_are_answered():
    """Every dropped spelling names the setting to use, and that setting exists."""
    for name in ("N_INT6_MLP_LAYERS", "SLIDING_WINDOW_ENABLED", "EMA_EVERY"):  # SPEC section 1
        assert name in t.DROPPED
    names = {f.name.upper() for f in fields(t.Config)}
    for name, remedy in t.DROPPED.items():
        text = a_problems({name: "7"})
        assert f"{name}=7: not a setting" in text and remedy in text
        assert len(text.splitlines()) == 2 and name not in names
        assert names & set(re.findall(r"[A-Z][A-Z0-9_]+", remedy)), name


def test_foreign_variables_are_left_alone():
    """What a shell, torchrun, CI or run_8xh100.sh sets is no setting and no problem."""
    foreign = ("PATH HOME LANG USER PWD RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR OMP_NUM_THREADS "
               "CUDA_VISIBLE_DEVICES PYTHONPATH NPROC SEEDS DATA_DIR HF_HOME TERM CI SHELL").split()
    assert t.Config.from_env(dict.fromkeys(foreign, "1"), cuda=True) == t.Config()


def test_demo_is_chosen_only_without_cuda_and_without_data():
    """PRESET and DATA_PATH and CUDA each keep the record configuration."""
    demo = t.Config.from_env({}, cuda=False)
    assert demo.preset == "demo" and demo.model_dim < 512
    assert {k: v for k, v in asdict(demo).items() if k in t.PRESETS["demo"]} == t.PRESETS["demo"]
    assert t.Config.from_env({}, cuda=True).preset == "record"
    assert t.Config.from_env({"DATA_PATH": "d"}, cuda=False) == t.Config(data_path="d")
    assert t.Config.from_env({"PRESET": "published"}, cuda=False).preset == "published"
    assert t.Config.from_env({"PRESET": "demo"}, cuda=True) == demo
    assert t.Config.from_env({"SEED": "5"}, cuda=False) == replace(demo, seed=5)


def test_explicit_values_win_over_the_preset():
    """Even where the explicit value is the default of the record run."""
    config = t.Config.from_env({"PRESET": "demo", "MODEL_DIM": "512", "ITERATIONS": "9"})
    assert (config.model_dim, config.iterations) == (512, 9)
    assert config.train_seq_len == t.PRESETS["demo"]["train_seq_len"]
    for preset in t.PRESETS:
        assert t.contradictions(t.Config(**t.PRESETS[preset])) == []


@pytest.mark.parametrize("arguments, code", [(["--help"], 0), (["-h"], 0), (["--iterations=5"], 1)])
def test_help_prints_the_table(arguments, code, capsys):
    """--help shows every setting; any other argument shows it too and fails."""
    assert t.main(arguments) == code
    out = capsys.readouterr().out
    assert t.settings_table() in out and "torchrun" in out
    for f in fields(t.Config):
        assert f"| {f.name.upper()} |" in out


def test_settings_table_shows_defaults_demo_and_choices():
    """One row for each setting: name, record value, demo value, meaning."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")]
            for row in t.settings_table().splitlines()[2:]]
    assert [row[0] for row in rows] == [f.name.upper() for f in fields(t.Config)]
    table = {row[0]: row[1:] for row in rows}
    demo = t.show(t.PRESETS["demo"]["train_batch_tokens"])
    assert table["TRAIN_BATCH_TOKENS"][:2] == ["786432", demo]
    assert table["RECUR_LAYERS"][:2] == ["4,5", ""] and table["ADAM_EPS"][0] == "1e-08"
    assert table["TIE_EMBEDDINGS"][0] == "1"
    assert re.search("lzma, ?zlib, ?zstd", table["COMPRESSOR"][2])
    assert all(len(row) == 4 and row[3] for row in rows)


def test_readme_holds_the_settings_table():
    """The README's table is the code's, line for line."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    table = t.settings_table().splitlines()
    assert table[0] in lines
    start = lines.index(table[0])
    assert lines[start : start + len(table)] == table
    assert not lines[start + len(table)].startswith("|")


# every setting does something that a test sees


def a_see_model(c, made):
    """Names, shapes and, with random weights, the logits of the model, recurrence on."""
    ids = torch.from_numpy(a_stream(64, 3)).view(2, 32)
    model = a_random_model(c)
    return [(n, tuple(p.shape)) for n, p in model.named_parameters()], a_digest(
        [("logits", model.logits(ids))])


def a_see_init(c, made):
    """Initial weights."""
    torch.manual_seed(c.seed)
    return a_digest(t.GPT(c, a_table().is_boundary, a_runtime()).named_parameters())


def a_trainer(c, data):
    """A Trainer on the tiny data, and its model."""
    path = tempfile.mkdtemp(dir=data.parent)
    c, runtime = replace(c, data_path=str(data), checkpoint_path=path), a_runtime()
    torch.manual_seed(c.seed)
    table = t.load_byte_table(c)
    model = t.GPT(c, table.is_boundary, runtime)
    loader = t.Loader(t.find_shards(c, "train"), c, runtime, model.vocab_size)
    return t.Trainer(model, loader, t.Evaluator(runtime, c, t.load_validation(c, table)))


def a_see_train(c, made):
    """Steps, accumulation, forward passes before the first step, and the weights to export."""
    trainer = a_trainer(c, made[1])
    passes, forward = [], trainer.forward
    trainer.forward = lambda *a: passes.append(trainer.clock.steps == trainer.steps == 0) or (
        forward(*a))
    trainer.run()
    trainer.average.store()
    return trainer.steps, trainer.accumulation, sum(passes), a_digest(
        trainer.model.named_parameters())


def a_see_hessians(c, made):
    """Second moments of the calibration after no step."""
    return a_digest(a_trainer(c, made[1]).hessians()[0].items())


def a_see_stored(c, made):
    """Codes and streams of the export of one and the same random model."""
    shape = {n: getattr(a_config(), n) for n in A_TINY if n not in ("n_int6_layers",)}
    model = a_random_model(t.Config(**shape))
    stored = t.quantize({n: p.detach() for n, p in model.named_parameters()}, c)
    streams = t.pack_streams(stored, c.compressor)
    return [(n, s.bits) for n, s in stored.items()], [(s.name, s.codec, s.data) for s in streams]


def a_see_table(c, made):
    """Which byte table is loaded, or why none."""
    try:
        return str(t.load_byte_table(replace(c, data_path=str(made[1]))).path)
    except t.RunError as error:
        return str(error)


def a_see_data(c, made):
    """The shards of the training split, or why there are none."""
    try:
        return t.find_shards(c, "train")
    except t.RunError as error:
        return str(error)


def a_see_batch(c, made):
    """Shape of an evaluation batch."""
    c = replace(c, data_path=str(made[1]))
    evaluator = t.Evaluator(a_runtime(), c, t.load_validation(c, t.load_byte_table(c)))
    return tuple(evaluator.score_batch(lambda x, y: y.float(), np.zeros(1, int)).shape)


def a_see_run(c, made):
    """A whole run: the files it makes, its lines without numbers, its scores, its error."""
    folder = Path(str(made[0])) / f"see{len(list(made[0].iterdir()))}"
    folder.mkdir()
    data = c.data_path if c.data_path != t.Config().data_path else str(made[1])
    error = ""
    with a_inside(folder) as console:
        try:
            t.run(replace(c, data_path=data, load_artifact=c.load_artifact and str(made[2])))
        except t.RunError as caught:
            error = re.sub(r"\d+", "N", str(caught))
    lines = console.getvalue().splitlines()
    files = sorted(str(p.relative_to(folder).with_suffix("") if p.name.startswith("commit.")
                       else p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return files, [re.split(r"[\d:]", line)[0] for line in lines], re.findall(
        r"bpb:\S+", console.getvalue()), error


def a_see_compile(c, made):
    """Whether a runtime on CUDA compiles."""
    with pytest.MonkeyPatch.context() as patch, a_inside(made[0]):
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(t, "select_attention", lambda *_: ("sdpa", "no CUDA"))
        patch.setattr(t, "select_mlp", lambda *_: (False, "no CUDA"))
        patch.setattr(t, "micro_batch_seqs", lambda *_: 1)
        patch.setattr(torch, "ones", lambda *_, **__: None)
        patch.setattr(torch, "compile", lambda function, **_: lambda x: x)
        runtime = t.Runtime(c)
        runtime.close()
        module = torch.nn.Identity()
        return runtime.compile(module) is module


def a_see_choices(c, made):
    """The attention and the MLP that are chosen on CUDA where all work, each faster than before."""
    with pytest.MonkeyPatch.context() as patch:
        return a_choices(patch, c, [5.0, 4.0, 3.0], [2.0, 1.0])


def a_choices(patch, c, attention, mlp):
    """What a runtime on CUDA chooses and says, if candidates take so long or raise an error."""
    def timed(results):
        left = iter(results)

        def device_ms(work):
            if isinstance(ms := next(left), Exception):
                raise ms
            return ms

        patch.setattr(t, "device_ms", device_ms)
        return runtime, c, 1

    runtime = a_runtime()
    runtime.cuda = True
    patch.setattr(t, "use_attention", lambda name: name)
    return *t.select_attention(*timed(attention)), *t.select_mlp(*timed(mlp))


def a_see_preset(c, made):
    """What PRESET makes of an empty environment."""
    return t.Config.from_env({"PRESET": c.preset}, cuda=True).model_dim


A_TTT = dict(load_artifact="made.ptz", ttt_chunk_tokens=128, ttt_lr=0.1)
A_NGRAM, A_SLOT = A_TTT | {"ngram_enabled": True}, A_TTT | {"slot_enabled": True}
A_FLIPS = {  # field: (observable, value, what must be set too)
    "preset": (a_see_preset, "demo", {}),
    "run_id": (a_see_run, "another", {}),
    "seed": (a_see_train, 1, {}),
    "data_path": (a_see_data, "elsewhere", {}),
    "tokenizer_path": (a_see_table, "elsewhere.vocab", {}),
    "tokenizer_meta_path": (a_see_table, "elsewhere.meta.npz", {}),
    "vocab_size": (a_see_table, A_VOCAB + 1, {}),
    "dry_run": (a_see_run, True, {}),
    "num_layers": (a_see_model, 5, {}),
    "model_dim": (a_see_model, 16, {}),
    "num_heads": (a_see_model, 4, {}),
    "num_kv_heads": (a_see_model, 2, {}),
    "mlp_mult": (a_see_model, 2.0, {}),
    "tie_embeddings": (a_see_model, False, {}),
    "rope_base": (a_see_model, 100.0, {}),
    "rope_dims": (a_see_model, 4, {}),
    "logit_softcap": (a_see_model, 5.0, {}),
    "qk_gain_init": (a_see_init, 1.0, {}),
    "ln_scale": (a_see_model, False, {}),
    "xsa_last_n": (a_see_model, 1, {}),
    "smear_enabled": (a_see_model, False, {}),
    "bigram_vocab_size": (a_see_model, 0, {}),
    "bigram_dim": (a_see_model, 4, {}),
    "ve_enabled": (a_see_model, False, {}),
    "ve_dim": (a_see_model, 4, {}),
    "ve_layers": (a_see_model, (1, 3), {}),
    "activation_neg_slope": (a_see_model, 0.1, {}),
    "parallel_start_layer": (a_see_model, 4, {}),
    "recur_layers": (a_see_model, (0, 1), {}),
    "recur_start_step": (a_see_train, 5.0, {}),
    "recur_untie_mlp": (a_see_model, False, {}),
    "train_batch_tokens": (a_see_train, 128, {}),
    "micro_batch_tokens": (a_see_train, 64, {}),
    "train_seq_len": (a_see_train, 16, {}),
    "iterations": (a_see_train, 7, {}),
    "warmdown_iters": (a_see_train, 10, {}),
    "warmup_steps": (a_see_train, 9, {}),
    "max_wallclock_seconds": (a_see_train, 0.26, {}),
    "matrix_lr": (a_see_train, 0.01, {}),
    "scalar_lr": (a_see_train, 0.01, {}),
    "tied_embed_lr": (a_see_train, 0.01, {}),
    "embed_lr": (a_see_train, 0.01, {"tie_embeddings": False}),
    "head_lr": (a_see_train, 0.01, {"tie_embeddings": False}),
    "tied_embed_init_std": (a_see_init, 0.02, {}),
    "min_lr": (a_see_train, 0.3, {}),
    "muon_momentum": (a_see_train, 0.9, {}),
    "muon_momentum_warmup_start": (a_see_train, 0.5, {}),
    "muon_momentum_warmup_steps": (a_see_train, 2, {}),
    "muon_backend_steps": (a_see_train, 3, {}),
    "muon_wd": (a_see_train, 0.5, {}),
    "muon_row_norm": (a_see_train, True, {}),
    "adam_wd": (a_see_train, 0.5, {}),
    "beta1": (a_see_train, 0.8, {}),
    "beta2": (a_see_train, 0.8, {}),
    "adam_eps": (a_see_train, 1e-4, {}),
    "grad_clip_norm": (a_see_train, 0.01, {}),
    "ema_decay": (a_see_train, 0.0, {}),
    "swa_enabled": (a_see_train, True, {}),
    "swa_every": (a_see_train, 2, {"swa_enabled": True}),
    "late_qat_threshold": (a_see_train, 0.0, {}),
    "n_int6_layers": (a_see_stored, 0, {}),
    "quant": (a_see_run, "rtn", {}),
    "gptq_calibration_seqs": (a_see_hessians, 3, {}),
    "class_bits": (a_see_stored, "attn=4", {}),
    "compressor": (a_see_stored, "lzma", {}),
    "size_limit": (a_see_run, 1000, {}),
    "artifact_path": (a_see_run, "another.ptz", {}),
    "load_artifact": (a_see_run, "made.ptz", {}),
    "eval_seq_len": (a_see_run, 16, {}),
    "eval_stride": (a_see_run, 16, {}),
    "eval_modes": (a_see_run, ("roundtrip",), {}),
    "ttt_enabled": (a_see_run, False, A_TTT),
    "ttt_lr": (a_see_run, 0.2, A_TTT),
    "ttt_epochs": (a_see_run, 1, A_TTT),
    "ttt_chunk_tokens": (a_see_run, 64, A_TTT),
    "ttt_freeze_blocks": (a_see_run, 0, A_TTT),
    "ttt_momentum": (a_see_run, 0.5, A_TTT),
    "ttt_batch_seqs": (a_see_run, 2, A_TTT),
    "ttt_grad_clip": (a_see_run, 0.01, A_TTT),
    "ngram_enabled": (a_see_run, True, A_TTT),
    "ngram_order": (a_see_run, 2, A_NGRAM),
    "ngram_weight": (a_see_run, 0.3, A_NGRAM),
    "slot_enabled": (a_see_run, True, A_TTT),
    "slot_steps": (a_see_run, 2, A_SLOT),
    "slot_lr": (a_see_run, 0.05, A_SLOT),
    "val_batch_size": (a_see_batch, 1024, {}),
    "val_loss_every": (a_see_run, 4, {}),
    "val_tokens_limit": (a_see_run, 500, {}),
    "scores_path": (a_see_run, "scores", {}),
    "train_log_every": (a_see_run, 100, {}),
    "checkpoint_every": (a_see_run, 1e-6, {}),
    "checkpoint_keep": (a_see_run, 1, {"checkpoint_every": 1e-6}),
    "checkpoint_path": (a_see_run, "another", {}),
    "resume": (a_see_run, True, {}),
    "attention": (a_see_choices, "cudnn", {}),
    "mlp_kernel": (a_see_choices, "torch", {}),
    "torch_compile_disable": (a_see_compile, True, {}),
}
A_RUN_BASE = dict(run_id="base", iterations=12)  # the first ten steps are always logged


@functools.cache
def a_seen(see, base, made):
    """What is seen of a tiny run with a few settings, given as sorted items."""
    common = A_RUN_BASE if see is a_see_run else {}
    return see(a_config(**(common | dict(base))), made)


def test_every_setting_has_a_row():
    """A new setting without a way to see it fails here."""
    assert set(A_FLIPS) == {f.name for f in fields(t.Config)}


@pytest.mark.parametrize("see, base", sorted({
    (row[0], tuple(row[2].items())) for row in A_FLIPS.values()}, key=str),
    ids=lambda v: getattr(v, "__name__", None))  # fmt: skip
def test_what_is_seen_repeats(see, base, a_made):
    """The same settings twice give the same, bit for bit; else the flips below prove nothing."""
    assert a_seen.__wrapped__(see, base, a_made) == a_seen(see, base, a_made)


@pytest.mark.parametrize("name", A_FLIPS)
def test_every_setting_does_something(name, a_made):
    """Another value of one setting changes what is seen."""
    see, value, base = A_FLIPS[name]
    before, after = tuple(base.items()), tuple((base | {name: value}).items())
    assert value != getattr(a_config(**base), name)
    assert a_seen(see, before, a_made) != a_seen(see, after, a_made)


# 2 data


@pytest.mark.parametrize("change, message", [
    (dict(magic=1), "magic 1 version 1, expected 20240520 version 1"),
    (dict(version=7), "magic 20240520 version 7, expected 20240520 version 1"),
    (dict(count=99), "1224 bytes, but the 99 tokens of its header take 1222"),
    (dict(count=101), "1224 bytes, but the 101 tokens of its header take 1226"),
    (dict(count=-100), "1224 bytes, but the -100 tokens"),
])  # fmt: skip
def test_bad_shards_are_refused_by_name(change, message, tmp_path):
    """Wrong magic, version or count: the file, what is wrong, what to do."""
    path = a_write_shard(tmp_path / "bad_shard.bin", **(dict(ids=range(100)) | change))
    with pytest.raises(t.RunError, match=re.escape(message)) as caught:
        t.open_shard(path)
    assert str(path) in str(caught.value)


def test_truncated_shards_are_refused_at_every_length(tmp_path):
    """Cut anywhere, header included; and the whole one reads back."""
    whole = a_write_shard(tmp_path / "shard.bin", range(100))
    assert t.open_shard(whole).tolist() == list(range(100))
    assert isinstance(t.open_shard(whole), np.memmap)
    data, cut = whole.read_bytes(), tmp_path / "cut.bin"
    for size in (0, 3, 11, 12, 1023, 1024, 1025, len(data) - 2, len(data) - 1):
        cut.write_bytes(data[:size])
        with pytest.raises(t.RunError, match="cut.bin"):
            t.open_shard(cut)
    cut.write_bytes(data + b"\0\0")
    with pytest.raises(t.RunError, match="1226 bytes"):
        t.open_shard(cut)


def test_empty_shards_change_nothing(tmp_path):
    """A shard without tokens is passed over; a split without tokens is refused."""
    data = a_dataset(tmp_path)
    config = a_config(data_path=str(data))
    load = functools.partial(t.Loader, c=config, runtime=a_runtime(), vocab_size=A_VOCAB)
    table, before = t.load_byte_table(config), a_audit(data)
    steps = [load(t.find_shards(config, "train")).read(step) for step in range(40)]
    for name in ("train_0000005", "val_0000005"):
        a_write_shard(data / f"fineweb_{name}.bin", [])
    a_manifest(data, lambda m: m["shards"].update({"fineweb_val_0000005.bin": {"source_bytes": 0}}))
    loader = load(t.find_shards(config, "train"))
    assert all(torch.equal(loader.read(step), want) for step, want in enumerate(steps))
    assert t.load_validation(config, table).ids.tolist() == before.ids.tolist()
    for split in ("train", "val"):
        for path in data.glob(f"fineweb_{split}_*.bin"):
            a_write_shard(path, [])
    with pytest.raises(t.RunError, match="fineweb_val"):
        t.load_validation(config, table)
    with pytest.raises(t.RunError, match="train"):
        load(t.find_shards(config, "train"))


def test_no_shards_is_an_error_with_the_pattern(tmp_path):
    """An empty glob says which, and what to do; shards are sorted by name."""
    with pytest.raises(t.RunError, match=r"fineweb_train_\*\.bin; set DATA_PATH"):
        t.find_shards(a_config(data_path=str(tmp_path)), "train")
    for n in (2, 10, 1):
        a_write_shard(tmp_path / f"fineweb_val_{n:06d}.bin", [1, 2])
    names = [p.name[-6:-4] for p in t.find_shards(a_config(data_path=str(tmp_path)), "val")]
    assert names == ["01", "02", "10"]


def test_ids_out_of_range_name_the_file(tmp_path):
    """In training as in validation; the largest id that is allowed passes."""
    data = a_dataset(tmp_path)
    config = a_config(data_path=str(data))
    table, runtime = t.load_byte_table(config), a_runtime()
    for split, n in (("val", 1), ("train", 0)):
        path = data / f"fineweb_{split}_{n:06d}.bin"
        good = path.read_bytes()
        a_write_shard(path, np.full(2000, A_VOCAB))
        with pytest.raises(t.RunError, match=rf"{path.name}: id 300 is not under VOCAB_SIZE=300"):
            if split == "val":
                t.load_validation(config, table)
            for step in range(40):
                t.Loader(t.find_shards(config, "train"), config, runtime, A_VOCAB).batch(step)
        a_replace(path, good)


def a_loader(folder, rank=0, world=1, **changes):
    """A loader over shards in which every id occurs once, so that ids tell where they are from."""
    if not list(folder.glob("*.bin")):
        for n, (start, size) in enumerate([(0, 1000), (1000, 531), (1531, 40), (1571, 33)]):
            a_write_shard(folder / f"fineweb_train_{n}.bin", np.arange(start, start + size))
    config = a_config(**(dict(data_path=str(folder)) | changes))
    return t.Loader(t.find_shards(config, "train"), config, a_runtime(rank, world), 65536)


def test_every_rank_count_sees_the_same_global_batch(tmp_path):
    """Ranks in order make up the batch of one rank, for 1, 2, 4 and 8 ranks."""
    whole = a_loader(tmp_path)
    for step in (0, 1, 7, 50):
        x, y = whole.batch(step)
        assert x.shape == y.shape == (8, 32) and x.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
        for world in (2, 4, 8):
            parts = [a_loader(tmp_path, rank, world).batch(step) for rank in range(world)]
            assert torch.equal(torch.cat([p[0] for p in parts]), x)
            assert torch.equal(torch.cat([p[1] for p in parts]), y)


def test_batches_depend_on_seed_and_step_only(tmp_path):
    """Whatever was read before, prefetched or not; other seeds and steps read other batches."""
    walked = a_loader(tmp_path)
    batches = [walked.batch(step) for step in range(20)]  # from the second on, prefetched
    for step in (0, 5, 19, 3):
        fresh = a_loader(tmp_path)
        assert torch.equal(fresh.batch(step)[0], batches[step][0])
        assert torch.equal(fresh.read(step)[:, 1:], batches[step][1])
        assert torch.equal(walked.batch(step)[0], batches[step][0])  # back in time
        assert not torch.equal(a_loader(tmp_path, seed=2).batch(step)[0], batches[step][0])
    assert len({b[0].numpy().tobytes() for b in batches}) == 20


def test_the_next_batch_is_read_ahead_on_a_thread(tmp_path):
    """After a batch is handed out, the next one is already on its way."""
    loader = a_loader(tmp_path)
    loader.batch(0)
    assert loader.ahead[0] == 1 and loader.ahead[1].result().shape == (8, 33)
    loader.read = None  # the coming batch must not be read again
    loader.pool = types.SimpleNamespace(submit=lambda *_: None)
    assert loader.batch(1)[0].shape == (8, 32)


def test_an_epoch_is_a_permutation_of_blocks_of_all_shards(tmp_path):
    """No token twice as an input, most tokens once, every shard, random order and phase."""
    loader = a_loader(tmp_path)
    blocks = int(loader.ends[-1])
    assert blocks == 30 + 15 + 1 + 1
    orders = []
    for epoch in range(4):
        starts = []
        for i in range(epoch * blocks, (epoch + 1) * blocks):
            ids = loader.sequence(i)
            assert len(ids) == 33 and (np.diff(ids.astype(int)) == 1).all()  # within one shard
            starts.append(int(ids[0]))
        inputs = np.concatenate([np.arange(s, s + 32) for s in starts])
        assert len(np.unique(inputs)) == 32 * blocks
        assert {np.searchsorted([1000, 1531, 1571], s, "right") for s in starts} == {0, 1, 2, 3}
        assert starts != sorted(starts)
        assert np.abs(np.diff(starts)).mean() > 200  # shuffled over all shards, not nearby
        orders.append(starts)
    assert len({tuple(order) for order in orders}) == 4
    assert len({min(order) for order in orders}) > 1  # the phase moves
    assert len({s % 32 for order in orders for s in order if s < 1000}) > 1


def test_a_batch_may_span_the_border_of_epochs(tmp_path):
    """The last blocks of an epoch and the first of the next share a batch; nothing is dropped."""
    loader = a_loader(tmp_path)
    blocks = int(loader.ends[-1])
    step = blocks // 8
    assert blocks % 8
    want = np.stack([loader.sequence(i) for i in range(8 * step, 8 * step + 8)])
    assert loader.read(step).tolist() == want.tolist()
    first = [int(row[0]) for row in want[: blocks % 8]]
    seen = [int(loader.sequence(i)[0]) for i in range(8 * step)]
    assert not set(first) & set(seen)


def test_batches_that_ranks_cannot_share_are_refused(tmp_path):
    """The message says which batch size would do."""
    with pytest.raises(t.RunError, match=r"WORLD_SIZE=3 does not divide the 8 sequences of a step; "
                       "make TRAIN_BATCH_TOKENS a multiple of 96"):
        a_loader(tmp_path, 0, 3)
    with pytest.raises(t.RunError, match="lower TRAIN_SEQ_LEN or add shards"):
        a_loader(tmp_path, train_seq_len=1024, train_batch_tokens=1024, eval_seq_len=1024)


def test_micro_batches_divide_the_step_of_a_rank():
    """Automatic ones by memory, given ones exactly or not at all."""
    c, cpu = a_config(), a_runtime()
    assert t.micro_batch_seqs(8, c, cpu) == 8
    assert t.micro_batch_seqs(600, a_config(train_seq_len=256), cpu) == 60  # at most 16384 tokens
    assert t.micro_batch_seqs(8, a_config(micro_batch_tokens=64), cpu) == 2
    with pytest.raises(t.RunError, match="MICRO_BATCH_TOKENS=96 does not divide the 256 tokens"):
        t.micro_batch_seqs(8, a_config(micro_batch_tokens=96), cpu)


# 3 bytes


def test_byte_table_from_meta(tmp_path):
    """The table of the file, and bytes that depend on the previous id."""
    table = t.table_from_meta(a_write_meta(tmp_path / "x.meta.npz", a_table()))
    for have, want in zip(table[:3], a_table()[:3], strict=True):
        assert have.tolist() == want.tolist()
    assert table.base_bytes.dtype == np.int64 and table.is_boundary.dtype == bool
    previous, ids = np.array([A_BOS, 1, 1, 5, 3]), np.array([3, 3, 4, A_BOS, 2])
    assert table.count(previous, ids).tolist() == [1, 2, 2, 0, 3]


@pytest.mark.parametrize("changes", [
    dict(base_bytes=None), dict(has_leading_space=None), dict(is_boundary_token=None),
    dict(vocab_size=None), dict(vocab_size=A_VOCAB - 1), dict(base_bytes=np.ones(A_VOCAB + 1)),
])  # fmt: skip
def test_bad_meta_is_refused_by_name(changes, tmp_path):
    """A missing array or lengths that do not fit."""
    path = a_write_meta(tmp_path / "bad.meta.npz", a_table(), **changes)
    with pytest.raises(t.RunError, match="bad.meta.npz"):
        t.table_from_meta(path)


def test_damaged_meta_is_refused_by_name(tmp_path):
    """Garbage, nothing, and a file cut or changed anywhere."""
    path = a_write_meta(tmp_path / "bad.meta.npz", a_table())
    data = bytearray(path.read_bytes())
    for damaged in (b"", b"garbage", bytes(data[:-30]), bytes(data[: len(data) // 2])):
        path.write_bytes(damaged)
        with pytest.raises(t.RunError, match="bad.meta.npz"):
            t.table_from_meta(path)
    data[400] ^= 255  # within the values of base_bytes: the CRC of the zip member
    path.write_bytes(bytes(data))
    with pytest.raises(t.RunError, match="bad.meta.npz"):
        t.table_from_meta(path)


@pytest.mark.parametrize("settings, files, message", [
    ({}, [], "no single tokenizer: none in"),
    ({}, ["a.meta.npz", "b.meta.npz"], "a.meta.npz,.*b.meta.npz"),
    (dict(tokenizer_path="{}/no.model"), [], "no.model; set TOKENIZER_PATH"),
    (dict(tokenizer_path="{}/no.vocab"), [], "no.meta.npz; set TOKENIZER_PATH"),
    (dict(vocab_size=301), ["a.meta.npz"], "VOCAB_SIZE=301 but .*a.meta.npz has 300 ids"),
])  # fmt: skip
def test_missing_or_ambiguous_tokenizers_are_refused(settings, files, message, tmp_path):
    """Which files were found and which setting decides."""
    for name in files:
        a_write_meta(tmp_path / name, a_table())
    settings = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(t.RunError, match=message):
        t.load_byte_table(a_config(data_path=str(tmp_path), **settings))


def test_tokenizers_are_found_where_the_settings_say(tmp_path):
    """TOKENIZER_META_PATH, then TOKENIZER_PATH (table beside the vocabulary), then DATA_PATH."""
    paths = {n: a_write_meta(tmp_path / n / "v.meta.npz", a_table())
             for n in "abc" if not (tmp_path / n).mkdir()}
    config = a_config(data_path=str(tmp_path / "a"), vocab_size=A_VOCAB)
    assert t.load_byte_table(config).path == paths["a"]
    (tmp_path / "b" / "v.vocab").touch()
    config = replace(config, tokenizer_path=str(tmp_path / "b" / "v.vocab"))
    assert t.load_byte_table(config).path == paths["b"]
    config = replace(config, tokenizer_path=str(paths["b"]))
    assert t.load_byte_table(config).path == paths["b"]
    assert t.load_byte_table(replace(config, tokenizer_meta_path=str(paths["c"]))).path == (
        paths["c"])


A_TEXT = ["The cat sat on the mat, and the dog was not amused at all.",
          "Numbers 12 345 and   runs of spaces; na\u00efve caf\u00e9 \u4f60\u597d \U0001f600 end",
          " leading and trailing ", "line", "a b c d e f g h i j", "don't stop 3.14159 %"] * 20


@functools.cache
def a_sentencepiece(folder, lone_space=True):
    """A SentencePiece model trained on a few lines, with a piece for a lone space or without."""
    spm = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    text, prefix = folder / f"text{lone_space}.txt", folder / f"sp{int(lone_space)}"
    kept = [line if lone_space else line.replace(" ", "") for line in A_TEXT]
    text.write_text("\n".join(kept), encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(prefix), vocab_size=400, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, character_coverage=0.98,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, add_dummy_prefix=lone_space)
    return prefix.with_suffix(".model")


def a_check_sentencepiece(path, documents, folder):
    """Shards of documents: counted bytes equal the bytes of the decoded text, document by one."""
    spm = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    sp, table = spm.SentencePieceProcessor(model_file=str(path)), t.table_from_sentencepiece(path)
    encoded = [sp.encode(document) for document in documents]
    sizes = [len(sp.decode(ids).encode("utf-8")) for ids in encoded]
    for ids, size in zip(encoded, sizes, strict=True):
        ids = np.array([sp.bos_id(), *ids])
        assert int(table.count(ids[:-1], ids[1:]).sum()) == size
    stream = np.concatenate([[sp.bos_id(), *ids] for ids in encoded])
    shard = a_write_shard(folder / "fineweb_val_000000.bin", stream)
    a_write_shard(folder / "fineweb_train_000000.bin", stream)
    manifest = dict(tokenizer=dict(byte_exact=True, sha256=t.sha256_file(path)),
                    shards={shard.name: dict(source_bytes=sum(sizes), bad_documents=0)})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    config = a_config(data_path=str(folder), tokenizer_path=str(path))
    validation = t.load_validation(config, table)
    assert validation.audit == "exact" and int(validation.bytes.sum()) == sum(sizes)
    return table, sp, sum(sizes)


def test_byte_table_of_a_sentencepiece_model(tmp_path):
    """Byte pieces 1, control and unknown 0 and boundary; counts equal the decoded text."""
    path = a_sentencepiece(tmp_path)
    table, sp, _ = a_check_sentencepiece(path, [s for s in A_TEXT if s == s.strip()], tmp_path)
    for i in range(sp.vocab_size()):
        if i < 4:
            assert table.is_boundary[i] and not table.base_bytes[i]
        elif sp.is_byte(i):
            assert table.base_bytes[i] == 1 and not table.is_boundary[i]
        else:
            assert table.base_bytes[i] + table.has_leading_space[i] == len(
                sp.id_to_piece(i).replace("\u2581", " ").encode())
    lone = sp.piece_to_id("\u2581")
    assert table.base_bytes[lone] == 0 and table.has_leading_space[lone]


def test_sentencepiece_models_without_a_lone_space_are_refused(tmp_path):
    """Their counts would be wrong; the message names U+2581."""
    path = a_sentencepiece(tmp_path, lone_space=False)
    with pytest.raises(t.RunError, match=r"sp0\.model: has no piece for a lone U\+2581"):
        t.table_from_sentencepiece(path)


def test_damaged_sentencepiece_models_are_refused_by_name(tmp_path):
    """A file that is no model is the user's mistake, not a traceback."""
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    path = tmp_path / "bad.model"
    path.write_bytes(b"this is no model")
    with pytest.raises(t.RunError, match="bad.model"):
        t.table_from_sentencepiece(path)


def test_real_text_is_counted_exactly_and_scored(tmp_path):
    """120 real FineWeb documents as SP1024 shards: exact bytes, then a tiny run to its scores."""
    model, documents = SHARED / "data/fineweb_1024_bpe.model", SHARED / "data/fineweb_docs.jsonl"
    if not (model.exists() and documents.exists()):
        pytest.skip(f"no real data: {documents} is not there")
    texts = [json.loads(line)["text"] for line in documents.read_text("utf-8").splitlines()]
    assert len(texts) == 120
    _, _, source = a_check_sentencepiece(model, texts, tmp_path)
    config = a_config(data_path=str(tmp_path), tokenizer_path=str(model), val_tokens_limit=20000,
                      run_id="real", train_seq_len=128, eval_seq_len=128, eval_stride=64,
                      train_batch_tokens=2048, val_batch_size=8192, iterations=12)
    with a_inside(tmp_path) as console:
        t.run(config)
    bpb = dict(re.findall(r"(final_int\S+_exact) \S+ val_bpb:(\S+)", console.getvalue()))
    assert 0.5 < float(bpb["final_int6_sliding_window_exact"]) < 8
    assert bpb["final_int8_zlib_roundtrip_exact"] == bpb["final_int6_sliding_window_exact"]
    counted = re.search(r"byte_audit:partial bytes:(\d+)", console.getvalue())
    assert 40000 < int(counted[1]) < source


@pytest.mark.parametrize("file", ["scylla.meta.npz", "candidate.meta.npz"])
def test_published_byte_tables_load(file):
    """The byte tables that circulate are read as they are."""
    path = SHARED / "data" / file
    if not path.exists():
        pytest.skip(f"no published table: {path} is not there")
    table = t.table_from_meta(path)
    assert len(table.base_bytes) == {"scylla": 1254, "candidate": 998}[file.split(".")[0]]


def a_manifest(data, change):
    """Rewrite the manifest of a dataset through `change`."""
    path = data / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def a_audit(data, **settings):
    """Validation data of a dataset."""
    config = a_config(data_path=str(data), **settings)
    return t.load_validation(config, t.load_byte_table(config))


def test_byte_audit_states(tmp_path):
    """exact, partial, unverified (no manifest, or a lossy tokenizer), and the bytes."""
    data = a_dataset(tmp_path / "d")
    ids = [np.fromfile(p, "<u2")[512:] for p in sorted(data.glob("fineweb_val_*"))]
    exact = a_audit(data)
    assert exact.audit == "exact" and exact.vocab_sha256 == "5" * 64
    assert exact.ids.tolist() == np.concatenate(ids).tolist() and len(exact.bytes) == 699
    want = sum(a_source_bytes(part, a_table()) for part in ids)
    assert int(exact.bytes.sum()) == want
    partial = a_audit(data, val_tokens_limit=450)
    assert partial.audit == "partial" and len(partial.ids) == 450
    assert partial.bytes.tolist() == exact.bytes[:449].tolist()
    for limit in (700, 10000):
        assert a_audit(data, val_tokens_limit=limit).audit == "exact"
    a_manifest(data, lambda m: m["shards"].pop("fineweb_val_000001.bin"))
    with pytest.raises(t.RunError, match="manifest.json.*fineweb_val_000001.bin"):
        a_audit(data)
    lossy = a_dataset(tmp_path / "lossy", byte_exact=False)
    assert a_audit(lossy).audit == "unverified"
    assert a_audit(lossy, val_tokens_limit=450).audit == "unverified"
    (lossy / "manifest.json").unlink()
    without = a_audit(lossy)
    assert without.audit == "unverified"
    assert without.vocab_sha256 == t.sha256_file(lossy / "tiny.meta.npz")


@pytest.mark.parametrize("off", [1, -1, 1000])
def test_byte_audit_stops_the_run(off, tmp_path):
    """One byte more or less is an error that names both counts."""
    data = a_dataset(tmp_path)
    entry = "fineweb_val_000000.bin"
    a_manifest(data, lambda m: m["shards"][entry].update(
        source_bytes=m["shards"][entry]["source_bytes"] + off))
    for limit in (0, 100):
        with pytest.raises(t.RunError, match=r"byte audit failed: .* manifest\.json \d+ "):
            a_audit(data, val_tokens_limit=limit)


def test_bad_documents_and_bad_manifests_stop_the_run(tmp_path):
    """A document that does not decode back, or a manifest that is not JSON."""
    data = a_dataset(tmp_path)
    a_manifest(data, lambda m: m["shards"]["fineweb_val_000001.bin"].update(bad_documents=1))
    with pytest.raises(t.RunError, match="byte audit failed.*1 bad documents"):
        a_audit(data)
    entry = '{"shards": {"fineweb_val_000000.bin": {"x": 1}, "fineweb_val_000001.bin": {"x": 1}}, '
    for text in ("{", "[]", '{"tokenizer": 3}', '{"shards": 3, "tokenizer": {"byte_exact": true}}',
                 entry + '"tokenizer": {"byte_exact": true}}'):
        (data / "manifest.json").write_text(text)
        with pytest.raises(t.RunError, match=r"manifest\.json: no manifest of retokenize_scylla"):
            a_audit(data)


def test_first_id_is_context_only(tmp_path):
    """If the stream does not start with a boundary, its first bytes are not in the denominator."""
    data = a_dataset(tmp_path)
    path = data / "fineweb_val_000000.bin"
    ids = np.fromfile(path, "<u2")[512:]
    ids[0] = 5  # three bytes
    a_write_shard(path, ids)
    source = a_source_bytes(ids, a_table())
    a_manifest(data, lambda m: m["shards"][path.name].update(source_bytes=source))
    second = np.fromfile(data / "fineweb_val_000001.bin", "<u2")[512:]
    total = source + a_source_bytes(second, a_table())
    audited = a_audit(data)
    assert audited.audit == "exact" and int(audited.bytes.sum()) == total - 3
    with a_inside(tmp_path) as console:
        t.run(a_config(data_path=str(data), iterations=1, eval_modes=("roundtrip",)))
    assert f"byte_audit:exact bytes:{total - 3} (the first id is context only" in console.getvalue()


@pytest.mark.parametrize("limit", [1, 2])
def test_the_shortest_validation(limit, tmp_path):
    """Two tokens make one target; one makes none and is refused."""
    data = a_dataset(tmp_path)
    if limit == 1:
        assert "VAL_TOKENS_LIMIT=1" in a_problems(a_environ(val_tokens_limit=limit))
    else:
        config = a_config(data_path=str(data), val_tokens_limit=limit)
        evaluator = t.Evaluator(a_runtime(), config, a_audit(data, val_tokens_limit=limit))
        score, nats = evaluator.score(lambda x, y: y.float(), 32)
        assert score.tokens == len(nats) == 1


# 4 quantization and artifact


def a_hard_rows(columns=700):
    """Rows that are Gaussian, heavy-tailed, one-sided, with outliers, tiny, large, or zero."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(12, columns, generator=random)
    rows[1] = rows[1] ** 5
    rows[2] = rows[2].abs()
    rows[3, 17] = 1000.0
    rows[4] *= 1e-9
    rows[5] *= 3000
    rows[6] = 0
    rows[7] = 0
    rows[7, 3] = -2.5
    rows[8, :3] = torch.tensor([50.0, -70.0, 90.0])
    rows[9] = 0.25
    rows[10] *= 1e-6
    return rows


@pytest.mark.parametrize("columns", [1, 2, 3, 32, 700, 1999])
def test_row_quantiles_are_torch_quantiles(columns):
    """Without a full sort, for every candidate."""
    magnitudes = a_hard_rows(columns + 99)[:, 99 * (columns < 99) :][:, :columns].abs()
    quantiles = torch.tensor(t.QUANTILES, dtype=torch.float64)
    want = torch.quantile(magnitudes.double(), quantiles, dim=1).T.float()
    torch.testing.assert_close(t.row_quantiles(magnitudes), want, rtol=3e-5, atol=0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_row_scales_are_the_least_squares_candidates(bits):
    """Each row takes the quantile with the smallest error, as it will be stored: in fp16."""
    weight, largest = a_hard_rows(), 2 ** (bits - 1) - 1
    assert largest == t.largest_code(bits)
    scales = t.row_scales(weight, bits)
    assert torch.equal(scales, scales.half().float()) and (scales > 0).all()
    best = np.full(len(weight), np.inf)
    for q in (1.0, 0.99999, 0.9999, 0.9995, 0.999):
        clip = np.quantile(weight.abs().double().numpy(), q, axis=1)
        step = np.maximum(clip / largest, 2.0**-24).astype(np.float16).astype(np.float64)
        codes = np.clip(np.round(weight.double().numpy() / step[:, None]), -largest, largest)
        best = np.minimum(best, ((codes * step[:, None] - weight.double().numpy()) ** 2).sum(1))
    have = (t.round_to_grid(weight, scales, bits) * scales - weight).double().square().sum(1)
    np.testing.assert_allclose(have.numpy(), best, rtol=1e-3, atol=1e-30)
    assert torch.equal(t.round_to_grid(weight, scales, bits)[6], torch.zeros(700))


@pytest.mark.parametrize("bits", range(2, 9))
def test_qat_grid_is_the_stored_grid(bits):
    """What training computes with late QAT is what the artifact restores, bit for bit."""
    weight = a_hard_rows().requires_grad_()
    fake = t.fake_quantize(weight, bits)
    config = a_config(class_bits=f"attn={bits}")
    name = "blocks.0.attn.q.weight"
    stored = t.quantize({name: weight.detach()}, config)[name]
    assert stored.bits == bits and stored.values.dtype == np.int8
    assert stored.scales.dtype == np.float16 and stored.scales.shape == (12,)
    assert np.abs(stored.values.astype(int)).max() == 2 ** (bits - 1) - 1
    fake.backward(torch.ones_like(weight))
    assert torch.equal(weight.grad, torch.ones_like(weight))  # straight through
    assert torch.equal(fake.detach(), stored.restore())
    assert t.fake_quantize(weight, 0) is weight


def test_a_model_under_qat_is_the_reloaded_model(a_made):
    """Logits with fake quantization equal those of the weights restored from codes."""
    config = a_config()
    model, ids = a_random_model(config, seed=4), torch.from_numpy(a_stream(64, 3)).view(2, 32)
    plain = model.logits(ids)
    stored = t.quantize({n: p.detach() for n, p in model.named_parameters()}, config)
    model.set_phase(t.Phase(recur=True, qat=True))
    faked = model.logits(ids)
    assert not torch.equal(faked, plain)
    other = a_random_model(config, seed=5)
    codes = {n: s.restore() if s.bits <= 8 else model.state_dict()[n] for n, s in stored.items()}
    other.load_state_dict(codes)
    torch.testing.assert_close(other.logits(ids), faked, rtol=1e-5, atol=1e-5)


def test_the_table_decides_bits():
    """Attention and repeats 6, MLP 6 at both ends and 5 between, tables 8, projections fp16."""
    model = t.GPT(a_config(num_layers=8, n_int6_layers=4, parallel_start_layer=5,
                           recur_layers=(3, 4), ve_layers=(6,)), a_table().is_boundary, a_runtime())
    for name, parameter in model.named_parameters():
        spec = t.param_spec(name, model.config)
        layer = int(name.split(".")[1]) if name.startswith("blocks") else None
        edge = layer in (0, 1, 6, 7)
        want = (8 if name.endswith(("embed.weight", "table.weight")) else
                16 if name.endswith("proj.weight") else
                6 if ".attn." in name and parameter.dim() == 2 or name.startswith("repeat") else
                6 if ".mlp." in name and edge else 5 if ".mlp." in name else 32)
        assert spec.bits == want, name
        assert (parameter.dim() == 2) == (want < 32) or name.endswith(("mix", "mix_mlp", "weights"))
    untied = t.GPT(a_config(tie_embeddings=False), a_table().is_boundary, a_runtime())
    assert t.param_spec("head.weight", untied.config).bits == 8
    with pytest.raises(AssertionError, match="in no row of PARAM_TABLE"):
        t.param_spec("blocks.0.attn.new.weight", untied.config)


@pytest.mark.parametrize("count, at6", [(0, ""), (2, "0 3"), (4, "0 1 2 3")])
def test_n_int6_layers(count, at6):
    """Half of them first, half last."""
    config = a_config(n_int6_layers=count)
    bits = {i: t.param_spec(f"blocks.{i}.mlp.up.weight", config).bits for i in range(4)}
    assert bits == {i: 6 if str(i) in at6.split() else 5 for i in range(4)}
    assert t.param_spec("repeat_mlps.0.up.weight", config).bits == 6


def test_class_bits():
    """Each class follows CLASS_BITS, all its tensors, and no other does."""
    names = {"embed": ("embed.weight", "value.table.weight"), "attn": ("blocks.1.attn.k.weight",),
             "mlp": ("blocks.0.mlp.up.weight", "blocks.1.mlp.down.weight"),
             "repeat": ("repeat_mlps.1.down.weight",), "projection": ("bigram.proj.weight",),
             "vector": ("blocks.0.resid_mix",)}
    plain = a_config(n_int6_layers=0)
    for kind in ("embed", "attn", "mlp", "repeat"):
        for bits in range(2, 9):
            config = replace(plain, class_bits=f"{kind}={bits}")
            for other, members in names.items():
                want = bits if other == kind else A_MODEL_BITS[other]
                assert all(t.param_spec(n, config).bits == want for n in members)


def test_values_that_are_not_finite_are_not_exported():
    """The message names the tensor."""
    for bad in (math.nan, math.inf):
        with pytest.raises(t.RunError, match="embed.weight is not finite"):
            t.quantize({"embed.weight": torch.tensor([[1.0, bad]])}, a_config())


def a_artifact(path, compressor="auto", **settings):
    """An artifact of a random tiny model; returns (config, stored tensors)."""
    config = a_config(**settings)
    model = a_random_model(config)
    stored = t.quantize({n: p.detach() for n, p in model.named_parameters()}, config)
    shape = {name.upper(): t.show(getattr(config, name)) for name in t.MODEL_FIELDS}
    header = dict(model=shape, vocab_size=A_VOCAB, vocab_sha256="5" * 64)
    t.write_artifact(path, header, stored, compressor)
    return config, stored


def a_codecs():
    """Codecs that are installed."""
    return [c for c in t.CODECS if c != "zstd" or t.zstandard_module()]


@pytest.mark.parametrize("codec", ["rans", "lzma", "zlib", "zstd", "auto"])
@pytest.mark.parametrize("bits", ["", "embed=2,attn=3,mlp=4,repeat=7", "mlp=8,attn=8"])
def test_container_round_trip(codec, bits, tmp_path):
    """Every tensor comes back bit for bit: codes, scales, fp16 and fp32 values."""
    if codec not in (*a_codecs(), "auto"):
        pytest.skip(f"{codec} is not installed")
    path = tmp_path / "x.ptz"
    config, stored = a_artifact(path, codec, class_bits=bits)
    header, loaded = t.read_artifact(str(path))
    assert list(loaded) == list(stored)
    for name, want in stored.items():
        have = loaded[name]
        assert (have.kind, have.bits) == (want.kind, want.bits)
        assert have.values.shape == want.values.shape and have.values.dtype == want.values.dtype
        assert have.values.tobytes() == want.values.tobytes()
        assert (have.scales is None) == (want.scales is None)
        assert want.scales is None or have.scales.tobytes() == want.scales.tobytes()
        assert torch.equal(have.restore(), want.restore())
    assert {s[1] for s in header["streams"]} <= set(a_codecs() if codec == "auto" else [codec])
    assert header["vocab_sha256"] == "5" * 64 and header["model"]["VE_LAYERS"] == "2,3"
    assert t.write_artifact(tmp_path / "y.ptz", {k: header[k] for k in (
        "model", "vocab_size", "vocab_sha256")}, loaded, codec)
    assert (tmp_path / "y.ptz").read_bytes() == path.read_bytes()


def test_auto_is_the_smallest_stream_by_stream(tmp_path):
    """No codec alone beats auto in any stream; sizes are those of the file."""
    _, stored = a_artifact(tmp_path / "x.ptz")
    auto = t.pack_streams(stored, "auto")
    for codec in a_codecs():
        for best, other in zip(auto, t.pack_streams(stored, codec), strict=True):
            assert best.name == other.name and len(best.data) <= len(other.data)
    assert len({t.smallest(raw, "auto")[0] for raw in (
        bytes(5000), np.random.default_rng(0).normal(0, 5, 20000).astype("i1").tobytes())}) == 2


def test_sizes_stay_near_the_floor():
    """Gaussian codes at full row width: at most 0.3 % above their entropy."""
    random = torch.Generator().manual_seed(0)
    state = {f"blocks.{i}.mlp.up.weight": torch.randn(512, 512, generator=random) for i in (1, 2)}
    streams = t.pack_streams(t.quantize(state, a_config()), "auto")
    assert {s.name for s in streams} == {"mlp.int5", "scales"}
    size, floor = sum(len(s.data) for s in streams), sum(s.floor for s in streams)
    assert floor <= size * 1.01 and size <= 1.003 * floor


def a_parts(path):
    """(header, streams) of an artifact, read without the code under test."""
    data = path.read_bytes()
    assert data[:10] == b"PROTEUS 3\n"
    end = 46 + struct.unpack("<I", data[42:46])[0]
    return json.loads(zlib.decompress(data[46:end])), data[end:]


def a_forge(path, header, body, digest=None):
    """Write an artifact with any header; its digest is right for zlib streams, unless given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    packed = zlib.compress(text)
    rest, raw, left = struct.pack("<I", len(packed)) + packed + body, b"", body
    with contextlib.suppress(zlib.error):
        while left:
            stream = zlib.decompressobj(-15)
            raw, left = raw + stream.decompress(left), stream.unused_data
    path.write_bytes(b"PROTEUS 3\n" + (digest or hashlib.sha256(rest + raw).digest()) + rest)


def a_refused(path, action):
    """The ArtifactError that `action` raises; it must name the file."""
    with pytest.raises(t.ArtifactError) as caught:
        action()
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def a_small(tmp_path_factory):
    """Path of a small artifact."""
    path = tmp_path_factory.mktemp("small") / "small.ptz"
    a_artifact(path, "zlib", model_dim=16, num_layers=2, ve_layers=(1,), recur_layers=(0,),
               mlp_mult=0.5, parallel_start_layer=1, n_int6_layers=0, bigram_dim=2, ve_dim=2)
    return path


def test_a_flipped_byte_is_damage(a_small, tmp_path):
    """Every byte of the head and the header, and 400 bytes anywhere, one at a time."""
    data, path = bytearray(a_small.read_bytes()), tmp_path / "flipped.ptz"
    random = np.random.default_rng(0)
    places = [*range(200), *random.integers(200, len(data), 400).tolist(), len(data) - 1]
    for place in places:
        bit = 1 << int(random.integers(8))
        data[place] ^= bit
        path.write_bytes(data)
        a_refused(path, lambda: t.read_artifact(str(path)))
        data[place] ^= bit


def test_a_truncated_or_longer_artifact_is_damage(a_small, tmp_path):
    """At every length of the head, at 60 others, and with bytes appended."""
    data, path = a_small.read_bytes(), tmp_path / "cut.ptz"
    for size in [*range(30), *np.linspace(30, len(data) - 1, 60).astype(int)]:
        path.write_bytes(data[:size])
        a_refused(path, lambda: t.read_artifact(str(path)))
    path.write_bytes(data + b"\0")
    a_refused(path, lambda: t.read_artifact(str(path)))
    a_refused(tmp_path / "none.ptz", lambda: t.read_artifact(str(tmp_path / "none.ptz")))
    a_refused(tmp_path, lambda: t.read_artifact(str(tmp_path)))


def test_foreign_files_are_refused(a_small, tmp_path):
    """Wrong magic, another format, another script's pickle."""
    path = tmp_path / "foreign.ptz"
    torch.save({"a": 1}, path)
    assert "not an artifact of this script" in a_refused(path, lambda: t.read_artifact(str(path)))
    header, body = a_parts(a_small)
    a_forge(path, header, body)
    t.read_artifact(str(path))  # a forger who changes nothing is not noticed
    for magic in (b"PROTEUS 1\n", b"PROTEUS 4\n", b"PROTEUS\nxy"):
        path.write_bytes(magic + a_small.read_bytes()[10:])
        message = a_refused(path, lambda: t.read_artifact(str(path)))
        assert f"begins with {magic}, not {b'PROTEUS 3' + bytes([10])}" in message


def a_set(where, value):
    """A change of one place in a header, such as ('tensors', 0, 3, 0)."""
    def change(header):
        for key in where[:-1]:
            header = header[key]
        header[where[-1]] = value
    return change


A_TAMPERED = [
    (("tensors", 0, 3, 0), 7), (("tensors", 0, 3, 0), 0), (("tensors", 0, 3, 0), -300),
    (("tensors", 0, 3, 0), 2**23), (("tensors", 0, 3, 0), 10**18), (("tensors", 0, 3, 0), 3.5),
    (("tensors", 0, 3, 0), "300"), (("tensors", 0, 3, 0), None), (("tensors", 0, 3, 0), [300]),
    (("tensors", 0, 3), [300]), (("tensors", 0, 3), []), (("tensors", 0, 3), 300),
    (("tensors", 0, 3), [300, 4, 4]), (("tensors", 0, 3), [600, 8]), (("tensors", 0, 3), [16, 300]),
    (("tensors", 0, 2), 5), (("tensors", 0, 2), 9), (("tensors", 0, 2), 16), (("tensors", 0, 2), 0),
    (("tensors", 0, 2), -1), (("tensors", 0, 2), "8"), (("tensors", 0, 2), None),
    (("tensors", 0, 2), 4.0), (("tensors", 0, 1), "attn"), (("tensors", 0, 1), "scales"),
    (("tensors", 0, 1), None), (("tensors", 0, 0), "blocks.0.attn.q.weight"),
    (("tensors", 0, 0), None), (("tensors", 0, 0), ["x"]), (("tensors", 0, 0), "unknown"),
    (("tensors", 0), []), (("tensors", 0), None), (("tensors",), []), (("tensors",), {}),
    (("tensors",), None), (("tensors",), 3), (("streams",), []), (("streams",), None),
    (("streams", 0), []), (("streams", 0), None), (("streams", 0, 0), "x"),
    (("streams", 0, 1), "lzma"), (("streams", 0, 1), "brotli"), (("streams", 0, 1), None),
    (("streams", 0, 1), ["zlib"]), (("streams", 0, 2), 1), (("streams", 0, 2), -1),
    (("streams", 0, 2), 10**18), (("streams", 0, 2), "5"), (("streams", 0, 2), 2.5),
    (("streams", 0, 3), 0), (("streams", 0, 3), None), (("streams", 0, 3), -1),
    (("streams", 0, 3), 2**40), (("streams", 0, 3), "9"), (("streams", 0, 3), 2.5),
    (("streams", 0, 3), 1), (("streams", 0, 4), 0), (("streams", 0, 4), None),
    (("tensors", 0, 3, 0), 2**70), (("model",), None), (("model",), []),
    (("model",), {}), (("model", "NUM_LAYERS"), 3), (("model", "NUM_LAYERS"), 0),
    (("model", "NUM_LAYERS"), -2), (("model", "NUM_LAYERS"), 4), (("model", "NUM_LAYERS"), 2.5),
    (("model", "MODEL_DIM"), 2**21), (("model", "MODEL_DIM"), 0), (("model", "MODEL_DIM"), 24),
    (("model", "MODEL_DIM"), -16), (("model", "NUM_HEADS"), 0), (("model", "NUM_HEADS"), None),
    (("model", "NUM_KV_HEADS"), 0), (("model", "MLP_MULT"), 1e300), (("model", "MLP_MULT"), "x"),
    (("model", "MLP_MULT"), None), (("model", "MLP_MULT"), -1.0), (("model", "ROPE_BASE"), "x"),
    (("model", "ROPE_BASE"), 0), (("model", "ROPE_DIMS"), -4), (("model", "LOGIT_SOFTCAP"), "x"),
    (("model", "LOGIT_SOFTCAP"), 0), (("model", "LOGIT_SOFTCAP"), None),
    (("model", "ACTIVATION_NEG_SLOPE"), "x"), (("model", "TIE_EMBEDDINGS"), False),
    (("model", "BIGRAM_VOCAB_SIZE"), 10**12), (("model", "BIGRAM_VOCAB_SIZE"), -3),
    (("model", "BIGRAM_DIM"), 10**12), (("model", "VE_DIM"), "x"), (("model", "VE_LAYERS"), [0, 1]),
    (("model", "VE_LAYERS"), ["x"]), (("model", "VE_LAYERS"), [9]), (("model", "XSA_LAST_N"), "x"),
    (("model", "PARALLEL_START_LAYER"), 9), (("model", "PARALLEL_START_LAYER"), "x"),
    (("model", "RECUR_LAYERS"), [5]), (("model", "RECUR_LAYERS"), [0, 1]),
    (("model", "ARTIFACT_PATH"), "/etc/passwd"), (("model", "NO_SUCH"), 1),
    (("vocab_size",), 299), (("vocab_size",), None), (("vocab_sha256",), "6" * 64),
]  # fmt: skip


A_TAMPERED += [  # the same as texts, which is how a header states the model's settings
    (where, t.show(tuple(value) if isinstance(value, list) else value))
    for where, value in A_TAMPERED if where[0] == "model" and len(where) == 2
]


@pytest.mark.parametrize("where, value", A_TAMPERED, ids=str)
def test_a_tampered_header_is_refused(where, value, a_small, tmp_path):
    """With the digest recomputed: only ArtifactError, whatever the header claims."""
    path = tmp_path / "tampered.ptz"
    header, body = a_parts(a_small)
    a_set(where, value)(header)
    a_forge(path, header, body)
    validation = types.SimpleNamespace(vocab_sha256="5" * 64)
    a_refused(path, lambda: t.load_model(str(path), validation, a_table(), a_runtime(), a_config()))


@pytest.mark.parametrize("text", [b"", b"[]", b"7", b"null", b"{}", b"{", b"\xff\xfe", b"NaN",
                                  b"[" * 200000, b'{"a":' * 200000, b" " * (1 << 25)],
                         ids=lambda text: repr(text[:6]))  # fmt: skip
def test_a_header_that_is_no_header_is_refused(text, tmp_path):
    """Not JSON, not an object, nested without end, or a decompression bomb."""
    path = tmp_path / "forged.ptz"
    a_forge(path, text, b"")
    a_refused(path, lambda: t.read_artifact(str(path)))


@pytest.mark.parametrize("codec", ["rans", "lzma", "zlib", "zstd"])
def test_streams_that_do_not_decompress_are_refused(codec, tmp_path):
    """Garbage, and streams that end early."""
    if codec not in a_codecs():
        pytest.skip(f"{codec} is not installed")
    path, raw = tmp_path / "forged.ptz", bytes(range(100)) * 3
    for data in (b"", b"garbage" * 9, t.coder(codec)[0](raw[:-1]),
                 t.coder(codec)[0](raw)[:-9]):
        header = dict(model={}, vocab_size=A_VOCAB, vocab_sha256="",
                      tensors=[["w", "v", 32, [75]]],
                      streams=[["v.fp32", codec, len(data), 300, zlib.crc32(data)]])
        a_forge(path, header, data)
        assert "SHA-256" not in a_refused(path, lambda: t.read_artifact(str(path)))
    assert t.decompress(t.coder(codec)[0](raw), codec, 300) == raw
    with pytest.raises(t.ArtifactError):
        t.decompress(b"", "rot13", 4)


def test_loading_executes_nothing():
    """No pickle, no torch.load, no eval or exec anywhere in the file."""
    tree = ast.parse((ROOT / "train_gpt.py").read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imported = {alias.name for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert not {"eval", "exec", "__import__"} & names
    assert not {"pickle", "marshal", "shelve", "dill"} & (names | imported)
    calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert not {"torch.load", "torch.save"} & calls and "eval" not in attributes
    pickles = [k.value.value for n in ast.walk(tree) if isinstance(n, ast.Call)
               for k in n.keywords if k.arg == "allow_pickle"]
    assert pickles and not any(pickles)


@pytest.mark.parametrize("broken", ["fsync", "replace", "open"])
def test_writing_is_atomic(broken, tmp_path, monkeypatch):
    """A failure at any point leaves the old file, no temporary one, and names the path."""
    path = tmp_path / "new" / "x.ptz"
    t.write_atomic(path, b"old")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if broken == "open":
            patch.setattr("builtins.open", fail)
        else:
            patch.setattr(os, broken, fail)
        with pytest.raises(t.RunError, match=r"cannot write .*x\.ptz: No space left on device"):
            t.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["x.ptz"]
    t.write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in path.parent.iterdir()] == ["x.ptz"]


def test_writing_is_renamed_when_whole(tmp_path, monkeypatch):
    """The temporary file is on the disk, synced, before it takes the name."""
    events, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append("sync") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(
        Path(a).read_bytes()) or rename(a, b))
    t.write_atomic(tmp_path / "x", b"data")
    assert events == ["sync", b"data"]


def test_load_model_restores_what_was_stored(tmp_path):
    """Names, values and recurrence; the reloaded weights quantize to the same codes."""
    config, stored = a_artifact(tmp_path / "x.ptz")
    validation = types.SimpleNamespace(vocab_sha256="5" * 64)
    other = t.Config()  # the artifact's shape wins over the settings of the run
    model = t.load_model(str(tmp_path / "x.ptz"), validation, a_table(), a_runtime(), replace(
        other, train_seq_len=32, eval_seq_len=32, eval_stride=32))
    assert model.recur and model.config.model_dim == 32
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name].restore())


def test_artifacts_of_another_vocabulary_are_refused(a_made, tmp_path):
    """Another size or another hash of the vocabulary, in the run itself."""
    message = r"made\.ptz: made for a vocabulary of 300 ids, sha256 5555"
    for vocab, sha256 in ((310, "5" * 64), (A_VOCAB, "6" * 64)):
        data = a_dataset(tmp_path / str(vocab), vocab)
        a_manifest(data, lambda m, sha256=sha256: m["tokenizer"].update(sha256=sha256))
        with a_inside(tmp_path), pytest.raises(t.ArtifactError, match=message):
            t.run(a_config(data_path=str(data), load_artifact=str(a_made[2])))


@pytest.mark.parametrize("untied", [True, False])
def test_a_run_that_ends_before_recurrence_stores_no_repeats(untied, a_made, tmp_path):
    """Neither tensors nor the setting; and it reloads and scores like the model in memory."""
    config = a_config(data_path=str(a_made[1]), recur_start_step=100.0, recur_untie_mlp=untied)
    with a_inside(tmp_path) as console:
        t.run(config)
    header, stored = t.read_artifact(str(tmp_path / config.artifact_path))
    assert header["model"]["RECUR_LAYERS"] == ""
    assert not [name for name in stored if name.startswith("repeat_mlps")]
    header, stored = t.read_artifact(str(a_made[2]))
    assert header["model"]["RECUR_LAYERS"] == "1,2"
    assert len([name for name in stored if name.startswith("repeat_mlps")]) == 4
    post = float(re.search(r"post_ema val_loss:\S+ val_bpb:(\S+)", console.getvalue())[1])
    final = float(re.search(r"roundtrip_exact val_loss:\S+ val_bpb:(\S+)", console.getvalue())[1])
    assert abs(post - final) < 0.05


def test_over_the_size_limit(a_made, tmp_path, monkeypatch, capsys):
    """Exit code 1, the bytes over from file sizes, and fp32 weights that reload bit for bit."""
    settings = a_environ(data_path=str(a_made[1]), artifact_path="out/over.ptz", run_id="over")
    for name, value in (settings | {"SIZE_LIMIT": "40000"}).items():
        monkeypatch.setenv(name, value)
    with a_inside(tmp_path):
        assert t.main([]) == 1
    error = capsys.readouterr().err
    total = (tmp_path / "out/over.ptz").stat().st_size + (ROOT / "train_gpt.py").stat().st_size
    assert error.startswith("error: ")
    assert f"{total} is {total - 40000} bytes over SIZE_LIMIT=40000" in error
    assert "LOAD_ARTIFACT=out/over.ptz.fp32" in error
    log = (tmp_path / "logs/over.txt").read_text()
    assert "final_" not in log.split("Total submission size: ")[-1]
    post = float(re.findall(r"post_ema val_loss:\S+ val_bpb:(\S+)", log)[-1])
    monkeypatch.setenv("LOAD_ARTIFACT", "out/over.ptz.fp32")
    monkeypatch.setenv("RUN_ID", "kept")  # the log of the first run is not overwritten
    with a_inside(tmp_path) as console:
        assert t.main([]) == 0
    bpb = re.search(r"roundtrip_exact val_loss:\S+ val_bpb:(\S+)", console.getvalue())[1]
    assert f"{float(bpb):.4f}" == f"{post:.4f}"  # unquantized: post-EMA exactly


def test_the_limit_itself_is_allowed(a_made, tmp_path):
    """A total equal to SIZE_LIMIT passes, one byte less does not."""
    config = a_config()
    model = a_random_model(config)
    validation = types.SimpleNamespace(vocab_sha256="5" * 64)
    path = str(tmp_path / "x.ptz")
    runtime = a_runtime()
    runtime.on_first_rank = lambda work: work()
    config = replace(config, quant="rtn")  # plain rounding: nothing to fit
    export = functools.partial(t.export_model, model, {}, validation, runtime)
    total = export(replace(config, artifact_path=path))
    assert total == os.path.getsize(path) + os.path.getsize(ROOT / "train_gpt.py")
    assert export(replace(config, artifact_path=path, size_limit=total)) == total
    assert not Path(path + ".fp32").exists()
    with pytest.raises(t.RunError, match=f"is 1 bytes over SIZE_LIMIT={total - 1}"):
        export(replace(config, artifact_path=path, size_limit=total - 1))
    _, kept = t.read_artifact(path + ".fp32")
    for name, parameter in model.named_parameters():
        assert torch.equal(kept[name].restore(), parameter)


# 5 evaluation

A_GRID = [(targets, seq_len, stride)
          for targets in (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 100, 101)
          for seq_len in (2, 8, 16, 32) for stride in (1, 2, 3, 5, 8, 16, 31, 32)
          if stride <= seq_len]  # fmt: skip


def test_every_target_is_scored_once_with_the_longest_context():
    """Over a grid of lengths, windows, strides and world sizes; in order, inside the stream."""
    for targets, seq_len, stride in A_GRID:
        windows = t.plan_windows(targets, seq_len, stride)
        length = min(seq_len, targets)
        scored = []
        for start, first in windows.tolist():
            assert 0 <= start and start + length <= targets and 0 <= first < length
            for place in range(first, length):
                scored.append(start + place)
                assert place >= min(seq_len - stride, start + place)  # context
        assert scored == list(range(targets)), (targets, seq_len, stride)
        for world in (1, 2, 3, 4, 8):
            shares = [windows[a_runtime(rank, world).share_of(len(windows))]
                      for rank in range(world)]
            assert np.concatenate(shares).tolist() == windows.tolist()
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def a_evaluator(data, rank=0, world=1, **settings):
    """An Evaluator on the tiny validation data."""
    config = a_config(data_path=str(data), **settings)
    validation = t.load_validation(config, t.load_byte_table(config))
    return t.Evaluator(a_runtime(rank, world), config, validation)


@pytest.mark.parametrize("targets", [1, 5, 31, 32, 33, 64, 100, 699])
@pytest.mark.parametrize("stride", [1, 8, 32])
def test_scores_belong_to_their_tokens(targets, stride, a_made):
    """A stand-in model that tells its input, target and place: all in order, context as planned."""
    evaluator = a_evaluator(a_made[1], val_tokens_limit=targets + 1)
    ids = evaluator.val.ids.astype(int)
    score, nats = evaluator.score(lambda x, y: (1000 * x + y).float(), stride)
    assert nats.tolist() == (1000 * ids[:-1] + ids[1:]).tolist()
    assert score.tokens == targets and score.bytes == int(evaluator.val.bytes.sum())
    assert score.nats == float(nats.astype(np.float64).sum())
    _, places = evaluator.score(lambda x, y: torch.arange(x.size(1)) + 0.0 * y, stride)
    assert (places >= np.minimum(32 - stride, np.arange(targets))).all()
    assert places[0] == 0


def test_scores_do_not_depend_on_batches_or_ranks(a_made):
    """Any VAL_BATCH_SIZE, down to one window, and any split over ranks."""
    model = a_random_model(a_config())
    for stride in (8, 32):
        score, nats = a_evaluator(a_made[1]).score(model, stride)
        for size in (1, 100, 4096):
            other, others = a_evaluator(a_made[1], val_batch_size=size).score(model, stride)
            np.testing.assert_allclose(others, nats, rtol=2e-5, atol=2e-5)
            assert math.isclose(other.bpb, score.bpb, rel_tol=1e-6)
        for world in (2, 3, 64):
            parts = [a_evaluator(a_made[1], rank, world).score(model, stride)[1]
                     for rank in range(world)]
            assert (sum((part != 0).astype(int) for part in parts) <= 1).all()
            np.testing.assert_allclose(sum(parts), nats, rtol=2e-5, atol=2e-5)


def test_evaluation_batches_have_one_shape(a_made):
    """The last batch is filled up, so that one compiled graph serves; rows are not lost."""
    shapes = set()

    def forward(x, y):
        shapes.add(tuple(x.shape))
        return y.float()

    evaluator = a_evaluator(a_made[1], val_batch_size=160)
    score, nats = evaluator.score(forward, 7)
    assert shapes == {(5, 32)} and nats.tolist() == evaluator.val.ids[1:].tolist()


def test_score_arithmetic():
    """Mean nats per token, bits per byte."""
    score = t.Score(nats=200 * math.log(2), tokens=50, bytes=100)
    assert score.bpb == pytest.approx(2.0, abs=1e-15)
    assert score.loss == pytest.approx(4 * math.log(2), abs=1e-15)


def a_score_files(folder):
    """SCORES_PATH as {mode: arrays}."""
    return {p.stem: dict(np.load(p, allow_pickle=False)) for p in sorted(folder.glob("*.npz"))}


def test_dumped_scores_recompute_the_result(a_made, tmp_path):
    """SCORES_PATH: ids, nats, bytes in stream order; anybody gets the same val_bpb."""
    config = a_config(data_path=str(a_made[1]), load_artifact=str(a_made[2]), run_id="dump",
                      scores_path="dumped")
    with a_inside(tmp_path) as console:
        t.run(config)
    files = a_score_files(tmp_path / "dumped")
    assert set(files) == {"roundtrip", "sliding", "ttt"}
    lines = dict(re.findall(r"(\S+_exact) val_loss:\S+ val_bpb:(\S+)", console.getvalue()))
    loss = dict(re.findall(r"(\S+_exact) val_loss:(\S+)", console.getvalue()))
    want = a_audit(a_made[1])
    for mode, name in (("roundtrip", "final_int6_roundtrip_exact"),
                       ("sliding", "final_int6_sliding_window_exact"), ("ttt", "legal_ttt_exact")):
        scores = files[mode]
        assert scores["ids"].tolist() == want.ids[1:].tolist()
        assert scores["bytes"].tolist() == want.bytes.tolist()
        assert scores["nats"].dtype == np.float32 and (scores["nats"] > 0).all()
        nats = scores["nats"].astype(np.float64).sum()
        assert f"{nats / math.log(2) / scores['bytes'].sum():.8f}" == lines[name]
        assert f"{nats / len(scores['ids']):.8f}" == loss[name]
    assert not np.array_equal(files["roundtrip"]["nats"], files["sliding"]["nats"])


def test_plain_equals_sliding_with_full_stride(a_made, tmp_path):
    """EVAL_STRIDE=EVAL_SEQ_LEN: bit for bit the same nats, and the same score."""
    config = a_config(data_path=str(a_made[1]), load_artifact=str(a_made[2]), scores_path="s",
                      eval_stride=32)
    with a_inside(tmp_path):
        t.run(config)
    files = a_score_files(tmp_path / "s")
    assert files["roundtrip"]["nats"].tobytes() == files["sliding"]["nats"].tobytes()


def test_the_headline_is_fixed_by_the_settings(a_made, tmp_path):
    """The last mode of the design's order, whatever order was asked for and whoever is better."""
    for modes, name in ((("sliding", "roundtrip"), "sliding_window"), (("roundtrip",), "roundtrip"),
                        (("sliding",), "sliding_window")):
        with a_inside(tmp_path) as console:
            t.run(a_config(data_path=str(a_made[1]), load_artifact=str(a_made[2]),
                           eval_modes=modes))
        lines = console.getvalue().splitlines()
        exact = next(line for line in lines if line.startswith(f"final_int6_{name}_exact"))
        assert lines[-1] == exact.replace(f"final_int6_{name}", "final_int8_zlib_roundtrip")
        ran = {line.split("_")[2] for line in lines if re.match(r"final_int6_\w+_exact", line)}
        assert ran == {mode.split("_")[0] for mode in modes}


def test_a_better_score_is_no_headline():
    """Even if the plain score is the better one, sliding is what the settings fixed."""
    lines, runtime = [], a_runtime()
    runtime.log.line = lambda text, *_: lines.append(text)
    t.summarize(runtime, {}, {"sliding": t.Score(200.0, 50, 100), "roundtrip": t.Score(
        100.0, 50, 100)})
    assert lines[-1] == (
        f"final_int8_zlib_roundtrip_exact val_loss:4.00000000 val_bpb:{2 / math.log(2):.8f}")
    assert "headline_mode: sliding" in lines


def test_an_enabled_mode_that_does_not_run_is_an_error(a_made, tmp_path, monkeypatch):
    """A mode that settings know but evaluation does not: never a run without its score."""
    monkeypatch.setattr(t, "EVAL_MODES", ("roundtrip", "sliding", "future"))
    config = a_config(data_path=str(a_made[1]), load_artifact=str(a_made[2]),
                      eval_modes=("roundtrip", "future"))
    with a_inside(tmp_path) as console, pytest.raises((KeyError, AssertionError, t.RunError)):
        t.run(config)
    assert "final_int8_zlib_roundtrip_exact" not in console.getvalue()


def test_loading_says_what_it_evaluates(a_made, tmp_path):
    """LOAD_ARTIFACT trains and writes nothing; the scores are those of the run that wrote it."""
    with a_inside(tmp_path) as console:
        t.run(a_config(data_path=str(a_made[1]), load_artifact=str(a_made[2]), run_id="load"))
    pattern = r"final_\S+_exact val_loss:\S+ val_bpb:\S+"
    assert re.findall(pattern, console.getvalue()) == re.findall(pattern, a_made[3])
    assert not re.search(r"train_loss|Serialized", console.getvalue())
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["load.jsonl", "load.txt"]
    assert re.search(r"byte_audit: ?exact", console.getvalue())


# whole runs: log lines, determinism, ranks

A_LOG_LINES = [  # STYLE.md, "Log lines are an API", in the order of a run
    r"model_params:\d+", r"seed:\d+", r"world_size:\d+ grad_accum_steps:\d+",
    r"step:\d+/\d+ train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms( \w+:\S+)*",
    r"step:\d+/\d+ val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
    r"peak memory allocated: \d+ MiB reserved: \d+ MiB",
    r"DIAGNOSTIC post_ema val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} eval_time:\d+ms",
    r"Code size: \d+ bytes", r"Serialized model mixed_quant\+(lzma|zlib|zstd): \d+ bytes",
    r"Total submission size: \d+ bytes",
    r"final_int6_roundtrip val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} eval_time:\d+ms",
    r"final_int6_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}",
    r"final_int6_sliding_window val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} stride:\d+ eval_time:\d+ms",
    r"final_int6_sliding_window_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}",
    r"ttt_chunk \[1/1\] bpb=\d+\.\d{6} time=\d+\.\ds",
    r"legal_ttt val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} eval_time:\d+ms",
    r"legal_ttt_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}",
    r"final_int8_zlib_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}",
]  # fmt: skip
A_STOP_LINE = r"stopping_early: wallclock_cap train_time:\d+ms step:\d+/\d+"


@pytest.fixture(scope="module")
def a_process(a_made, tmp_path_factory):
    """A run as a user starts it, in a process of its own: (folder, console)."""
    folder = tmp_path_factory.mktemp("process")
    environ = a_environ(data_path=str(a_made[1]), artifact_path="made.ptz", run_id="made")
    environ |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "VAL_LOSS_EVERY": "4"}
    done = a_python([ROOT / "train_gpt.py"], folder, environ)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return folder, done.stdout


def test_log_lines_are_the_public_patterns(a_process):
    """Every line of STYLE.md, to the letter, in order, the train line once for each early step."""
    lines = a_process[1].splitlines()
    places = []
    for pattern in A_LOG_LINES:
        found = [i for i, line in enumerate(lines) if re.fullmatch(pattern, line)]
        assert found, pattern
        places.append(found[-1])
        names = re.match(r"[A-Za-z_ ]+", pattern.replace("\\", ""))[0]
        if not pattern.startswith("step"):
            assert len(found) == 1, (pattern, names)
    assert places[3:] == sorted(places[3:]) and max(places[:3]) < places[3]
    assert [line.split()[0] for line in lines if " train_loss:" in line] == [
        f"step:{n}/8" for n in range(1, 9)]
    assert [line.split()[0] for line in lines if re.match(r"step:\d+/8 val_", line)] == [
        "step:4/8", "step:8/8"]
    assert lines[-1].startswith("final_int8_zlib_roundtrip_exact")
    assert "phase recur:on step:3" in lines and any("phase qat:on" in line for line in lines)
    assert "byte_audit:exact bytes:" in a_process[1] and "\r" not in a_process[1]


def test_sizes_and_counts_in_the_log_are_those_of_the_files(a_process):
    """Measured from files, never computed."""
    folder, out = a_process
    code, artifact = (ROOT / "train_gpt.py").stat().st_size, (folder / "made.ptz").stat().st_size
    assert f"Code size: {code} bytes" in out
    assert re.search(rf"mixed_quant\+\w+: {artifact} bytes", out)
    assert f"Total submission size: {code + artifact} bytes" in out
    model = t.GPT(a_config(), a_table().is_boundary, a_runtime())
    assert f"model_params:{sum(p.numel() for p in model.parameters())}" in out
    assert "seed:1337" in out and "world_size:1 grad_accum_steps:1" in out


def test_the_log_files_hold_everything(a_process):
    """logs/<RUN_ID>.txt has the console, the code and the settings; .jsonl parses line by line."""
    folder, out = a_process
    text = (folder / "logs/made.txt").read_text(encoding="utf-8")
    for line in out.splitlines():
        assert f"{line}\n" in text
    assert (ROOT / "train_gpt.py").read_text(encoding="utf-8") in text
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


def test_the_summary_is_a_block_for_grep(a_process):
    """After ---, `key: value` lines with scores, bytes and seconds; then the headline, last."""
    folder, out = a_process
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


def test_training_learns_and_the_gap_is_small(a_process):
    """Losses fall, and the artifact scores like the model before quantization."""
    losses = [float(x) for x in re.findall(r"train_loss:(\S+)", a_process[1])]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.1
    assert abs(losses[0] - math.log(A_VOCAB)) < 0.1
    values = dict(re.findall(r"(\w+_bpb): (\S+)", a_process[1]))
    assert abs(float(values["roundtrip_bpb"]) - float(values["post_ema_bpb"])) < 0.05


def a_losses(folder, run_id="made", key="loss"):
    """Losses, or gradient norms, of a run's steps, to the last digit."""
    events = map(json.loads, (folder / f"logs/{run_id}.jsonl").read_text().splitlines())
    return [event[key] for event in events if event["event"] == "train"]


def test_runs_are_deterministic(a_made, a_process):
    """Two processes, one with validations on the way: same losses, artifact and scores, exactly."""
    assert a_losses(a_made[0]) == a_losses(a_process[0])
    assert a_made[2].read_bytes() == (a_process[0] / "made.ptz").read_bytes()
    exact = r"final_\S+_exact val_loss:\S+ val_bpb:\S+"
    assert re.findall(exact, a_made[3]) == re.findall(exact, a_process[1])


@pytest.mark.slow
def test_two_ranks_do_what_one_does(a_made, tmp_path):
    """torchrun with gloo: same losses and score, one log, sizes and scores of one."""
    environ = a_environ(data_path=str(a_made[1]), artifact_path="made.ptz", run_id="made")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = a_python([*launch, ROOT / "train_gpt.py"], tmp_path,
                    environ | {"SCORES_PATH": "scores", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(a_losses(tmp_path), a_losses(a_made[0]), atol=1e-4)
    norms = [a_losses(folder, key="grad_norm") for folder in (tmp_path, a_made[0])]
    np.testing.assert_allclose(*norms, rtol=1e-2)  # of the global gradient, not of a share
    scores = [dict(re.findall(r"(final_\S+_exact) val_loss:\S+ val_bpb:(\S+)", text))
              for text in (done.stdout, a_made[3])]
    assert set(scores[0]) == set(scores[1])
    for name in scores[0]:
        assert abs(float(scores[0][name]) - float(scores[1][name])) < 1e-3
    assert "world_size:2 grad_accum_steps:1" in done.stdout
    assert done.stdout.count("final_int8_zlib_roundtrip_exact") == 1
    assert len(a_losses(tmp_path)) == 8 and len(list((tmp_path / "logs").iterdir())) == 2
    files = a_score_files(tmp_path / "scores")
    for arrays in files.values():
        assert (arrays["nats"] > 0).all()  # no target was left to the other rank


@pytest.mark.slow
def test_two_ranks_stop_together_on_an_error(a_made, tmp_path):
    """Over SIZE_LIMIT: every rank ends, with exit code 1 and the message."""
    environ = a_environ(data_path=str(a_made[1]), size_limit=1000, iterations=1)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = a_python([*launch, ROOT / "train_gpt.py"], tmp_path, environ)
    assert done.returncode == 1 and "bytes over SIZE_LIMIT=1000" in done.stderr


def test_the_wallclock_cap_stops_early(a_made, tmp_path):
    """The line of STYLE.md, fewer steps than asked for, all later stages as ever."""
    config = a_config(data_path=str(a_made[1]), max_wallclock_seconds=0.6, iterations=100000)
    with a_inside(tmp_path) as console:
        t.run(config)
    lines = console.getvalue().splitlines()
    stops = [line for line in lines if re.fullmatch(A_STOP_LINE, line)]
    assert len(stops) == 1 and "stopping_early" not in a_made[3]
    step, total = map(int, re.search(r"step:(\d+)/(\d+)", stops[0]).groups())
    assert 0 < step < total == 100000
    assert f"steps: {step}" in lines
    assert any(line.startswith(f"step:{step}/100000 val_loss:") for line in lines)


@pytest.mark.parametrize("changes, message", [
    (dict(data_path="nowhere", run_id="bad"), "no shards match"),
    (dict(num_kv_heads="3"), "NUM_KV_HEADS=3"),
    (dict(load_artifact="none.ptz"), "none.ptz: No such file"),
    (dict(artifact_path=""), "ARTIFACT_PATH"),
    (dict(run_id="a/b"), "RUN_ID"),
    (dict(tokenizer_path="tiny.vocab", tokenizer_meta_path="data/tiny.meta.npz"), "tiny.vocab"),
], ids=lambda v: ",".join(v) if isinstance(v, dict) else "")  # fmt: skip
def test_user_mistakes_end_with_a_message(changes, message, tmp_path, monkeypatch, capsys):
    """Exit code 1 and one message on stderr, no traceback, whatever was wrong."""
    data = a_dataset(tmp_path / "data")
    if "tokenizer_path" in changes:
        (data / "manifest.json").unlink()
    for name, value in a_environ(**(dict(data_path=str(data), iterations=1) | changes)).items():
        monkeypatch.setenv(name, str(value))
    with a_inside(tmp_path):
        code = t.main([])
    error = capsys.readouterr().err
    assert code == 1 and error.startswith("error: ") and message in error


def test_a_run_that_diverges_says_so(a_made, tmp_path):
    """A loss that is not finite stops the run, naming the step."""
    config = a_config(data_path=str(a_made[1]), scalar_lr=1e30, grad_clip_norm=0.0)
    with a_inside(tmp_path), pytest.raises(t.RunError, match=r"at step \d+: the run diverged"):
        t.run(config)
    assert not (tmp_path / config.artifact_path).exists()


def test_dry_run_prints_and_leaves(a_made, tmp_path):
    """Configuration, parameters, predicted bytes, memory and operations; nothing is written."""
    with a_inside(tmp_path) as console:
        t.run(a_config(data_path=str(a_made[1]), dry_run=True, run_id="dry"))
    out = console.getvalue()
    for f in fields(t.Config):
        assert f"{f.name.upper()}=" in out
    for key in ("predicted_bytes", "model_params:", "predicted_mib", "tflop_per_step",
                *(f"step_cost recurrence:1 {part} tflop:" for part in (
                    "matrices", "head", "attention", "elementwise", "loss", "embedding",
                    "optimizer", "average", "casts"))):
        assert key in out
    assert not list(tmp_path.rglob("*.ptz")) and "train_loss" not in out
    predicted = int(re.search(r"predicted_bytes code:\d+ total:(\d+)", out)[1])
    measured = int(re.search(r"Total submission size: (\d+) bytes", a_made[3])[1])
    assert abs(predicted - measured) < 0.1 * measured


# 6 import, 7 shape of the file


def test_import_has_no_side_effects(tmp_path):
    """No file, thread, output, seed or optional package; torch and numpy only."""
    code = ("import sys, threading, os, torch, numpy\n"
            "before = set(sys.modules), threading.active_count(), torch.initial_seed(), "
            "dict(os.environ), torch.get_num_threads(), torch.get_float32_matmul_precision()\n"
            f"sys.path.insert(0, {str(ROOT)!r})\n"
            "import train_gpt\n"
            "assert before[1:] == (threading.active_count(), torch.initial_seed(), "
            "dict(os.environ), torch.get_num_threads(), torch.get_float32_matmul_precision())\n"
            "new = {m.split('.')[0] for m in set(sys.modules) - before[0]}\n"
            "own = new - set(sys.stdlib_module_names) - {'torch', 'numpy', 'train_gpt'}\n"
            "assert not own, own\n"
            "assert not {'sentencepiece', 'numba', 'zstandard', 'resource'} & set(sys.modules)\n"
            "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()\n")
    done = a_python(["-c", code], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_imports_are_torch_numpy_and_the_standard_library():
    """At module level; optional packages only inside the function that needs them."""
    tree = ast.parse((ROOT / "train_gpt.py").read_text(encoding="utf-8"))
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"torch", "numpy"}
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    inner = {(n.module if isinstance(n, ast.ImportFrom) else n.names[0].name) for n in imports
             if n not in tree.body}
    assert {name.split(".")[0] for name in inner} <= {
        "fcntl", "sentencepiece", "zstandard", "flash_attn_interface", "retokenize_scylla",
        "resource", "torch", "triton"}


def test_the_file_keeps_its_shape():
    """100 columns, ASCII; no function over 50 lines."""
    data = (ROOT / "train_gpt.py").read_bytes()
    assert max(map(len, data.decode("ascii").splitlines())) <= 100
    long = {}
    for node in ast.walk(ast.parse(data)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            size = node.end_lineno - node.lineno + 1
            if size > 50:
                long[node.name] = size
    assert not long


# ==========================================================================================
# model, optimization, training, the ten pre-flight checks, compilation
# ==========================================================================================

# ---------------------------------------------------------------------------- helpers

B_VOCAB = 67
B_BOUNDARY = np.arange(B_VOCAB) == 0


def b_runtime(device: str = "cpu") -> SimpleNamespace:
    """A Runtime without a log or process group, as GPT, Muon and Optimizer need it."""
    runtime = a_runtime()
    runtime.device = torch.device(device)
    return runtime


def b_config(**settings) -> t.Config:
    """A tiny configuration with every feature on; contradictions fail here."""
    base = dict(
        num_layers=6, model_dim=32, num_heads=4, num_kv_heads=2, mlp_mult=2.0, rope_dims=4,
        logit_softcap=5.0, xsa_last_n=3, bigram_vocab_size=50, bigram_dim=8, ve_dim=8,
        ve_layers=(1, 4), parallel_start_layer=4, recur_layers=(2, 3), n_int6_layers=2,
        train_seq_len=16, eval_seq_len=16, eval_stride=8, train_batch_tokens=64,
        val_batch_size=256, iterations=8, warmdown_iters=4, warmup_steps=0,
        max_wallclock_seconds=0.0, recur_start_step=3.0, val_loss_every=0, train_log_every=1,
        muon_momentum_warmup_steps=4, compressor="zlib", ttt_freeze_blocks=1,
    )  # fmt: skip
    c = t.Config(**(t.PRESETS["demo"] | base | settings))
    assert t.contradictions(c) == []
    return c


def b_randomize(model: t.GPT, seed: int = 0) -> t.GPT:
    """Every tensor random: matrices N(0, 0.3), vectors moved off their initial value."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = 0.3 * torch.randn(p.shape, generator=g)
            p.copy_(noise if name.endswith(".weight") else p + noise)
    return model


def b_model(c: t.Config, recur: bool = True, seed: int | None = 0, vocab: int = B_VOCAB) -> t.GPT:
    """A model on the CPU, randomised unless `seed` is None, in the given phase."""
    torch.manual_seed(1)
    model = t.GPT(c, np.arange(vocab) == 0, b_runtime())
    if seed is not None:
        b_randomize(model, seed)
    model.set_phase(t.Phase(recur=recur))
    return model


def b_ids(shape=(2, 16), seed: int = 3, bos=((0, 5), (1, 1), (1, 9))) -> torch.Tensor:
    """Random ids without boundaries except at `bos`."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, B_VOCAB, shape, generator=g)
    for row, place in bos:
        ids[row, place] = 0
    return ids


def b_write_shard(path: Path, ids: np.ndarray) -> None:
    """A token shard as SCYLLA.md section 3 says."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    a_replace(path, header.tobytes() + ids.astype("<u2").tobytes())


def b_write_data(folder: Path) -> Path:
    """Train and validation shards of a learnable stream, with a byte table."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(5)
    for split, count in (("train", 4000), ("val", 150)):
        ids = random.integers(1, 20, count)
        ids[1::2] = ids[::2] + 20  # half of the tokens follow from the one before
        ids[::50] = 0
        b_write_shard(folder / f"fineweb_{split}_000000.bin", ids)
    base = np.where(B_BOUNDARY, 0, 2).astype(np.int16)
    np.savez(folder / "v.meta.npz", base_bytes=base, has_leading_space=np.zeros(B_VOCAB, bool),
             is_boundary_token=B_BOUNDARY, vocab_size=np.int64(B_VOCAB))
    return folder


@pytest.fixture
def b_make(tmp_path, monkeypatch):
    """A function that builds a Trainer in its own folder with the given settings."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: threads only wait for each other
    data, made = b_write_data(tmp_path / "data"), []

    def make(**settings) -> t.Trainer:
        c = b_config(data_path=str(data), run_id=f"run{len(made)}",
                     artifact_path=str(tmp_path / "model.ptz"), **settings)
        runtime = t.Runtime(c)
        made.append(runtime)
        torch.manual_seed(c.seed)
        table = t.load_byte_table(c)
        val = t.load_validation(c, table)
        model = t.GPT(c, table.is_boundary, runtime)
        loader = t.Loader(t.find_shards(c, "train"), c, runtime, B_VOCAB)
        return t.Trainer(model, loader, t.Evaluator(runtime, c, val))

    yield make
    torch.set_num_threads(threads)
    for runtime in made:
        runtime.close()


def b_events(trainer: t.Trainer, kind: str) -> list[dict]:
    """The events of a kind in the run's .jsonl."""
    lines = Path(f"logs/{trainer.log.run_id}.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


def b_losses(trainer: t.Trainer) -> list[float]:
    """The losses of all logged steps, every digit."""
    return [e["loss"] for e in b_events(trainer, "train")]


# ---------------------------------------------------------------------------- model: shape


def b_count(c: t.Config, vocab: int) -> int:
    """Parameters of a model, built without memory."""
    with torch.device("meta"):
        model = t.GPT(c, np.zeros(vocab, bool), b_runtime("meta"))
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("vocab, expected", [(1254, 30_290_797), (998, 30_126_957)])
def test_b_parameter_count(vocab, expected, monkeypatch):
    """SPEC section 3: the exact counts, and 1,028 more for each further lane layer."""
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda w: w)
    assert b_count(t.Config(), vocab) == expected
    assert b_count(t.Config(parallel_start_layer=6), vocab) == expected + 1028
    assert b_count(t.Config(parallel_start_layer=5), vocab) == expected + 2 * 1028
    assert b_count(t.Config(recur_untie_mlp=False), vocab) == expected - 4 * 512 * 1536


def test_b_every_tensor_in_one_row():
    """Each parameter matches exactly one row of PARAM_TABLE; a stranger is refused."""
    import re

    model = b_model(b_config(tie_embeddings=False))
    for name, _ in model.named_parameters():
        rows = [r[0] for r in t.PARAM_TABLE if re.fullmatch(r[0], name)]
        assert len(rows) == 1, (name, rows)
    with pytest.raises(AssertionError, match="stranger"):
        t.param_spec("stranger.weight", model.config)


def test_b_param_table_bits():
    """SPEC section 5: bits by class; edges and repeats INT6, middle INT5, tables INT8."""
    auto = t.Config()  # INT6 until the fit says otherwise
    assert {t.param_spec(f"blocks.{i}.mlp.up.weight", auto).bits for i in range(11)} == {6}
    c = t.Config(n_int6_layers=4)
    for i in range(11):
        for n in ("q", "k", "v", "out"):
            assert t.param_spec(f"blocks.{i}.attn.{n}.weight", c).bits == 6
        for n in ("up", "down"):
            bits = t.param_spec(f"blocks.{i}.mlp.{n}.weight", c).bits
            assert bits == (6 if i in (0, 1, 9, 10) else 5)
    assert t.param_spec("repeat_mlps.0.up.weight", c).bits == 6
    for n in ("embed", "bigram.table", "value.table", "head"):
        assert t.param_spec(f"{n}.weight", c).bits == 8
    assert t.param_spec("value.proj.weight", c).bits == 16
    for n in ("blocks.0.resid_mix", "smear.gate", "lane_merge", "blocks.0.attn.q_gain"):
        assert t.param_spec(n, c).bits == 32
    c = t.Config(class_bits="mlp=4,attn=8", n_int6_layers=0)
    assert t.param_spec("blocks.0.mlp.up.weight", c).bits == 4
    assert t.param_spec("blocks.0.attn.q.weight", c).bits == 8


def test_b_layer_plan_record():
    """The record plan, run by run: order, stores, skips in reverse, lanes."""
    c = t.Config()
    off, on = t.layer_plan(c, False), t.layer_plan(c, True)
    assert [r.layer for r in off] == list(range(11))
    assert [r.layer for r in on] == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 10]
    assert [r.repeat for r in on] == [None] * 6 + [0, 1] + [None] * 5
    assert [r.layer for r in on if r.store] == [0, 1, 2, 3, 4]
    assert not any(r.store or r.skip is not None for r in on if r.repeat is not None)
    assert [(r.layer, r.skip) for r in on if r.skip is not None] == [
        (5, 0), (6, 1), (7, 2), (8, 3), (9, 4)]
    for plan in (off, on):
        assert [r.layer for r in plan if r.lanes] == [7, 8, 9, 10]
        stack, pairs = [], []
        for r in plan:
            if r.skip is not None:
                pairs.append((r.layer, stack.pop()))
            if r.store:
                stack.append(r.layer)
        assert pairs == [(5, 4), (6, 3), (7, 2), (8, 1), (9, 0)] and not stack


@pytest.mark.parametrize("layers", [2, 3, 4, 7, 12])
def test_b_layer_plan_depths(layers):
    """Any depth: each stored output is added once; no lanes at NUM_LAYERS; recurrence in lanes."""
    c = b_config(num_layers=layers, parallel_start_layer=layers, recur_layers=(),
                 ve_layers=(0,), xsa_last_n=1)
    plan = t.layer_plan(c, True)
    assert [r.layer for r in plan] == list(range(layers))
    assert not any(r.lanes for r in plan)
    half = layers // 2
    assert [r.layer for r in plan if r.store] == list(range(half))
    assert [r.layer for r in plan if r.skip is not None] == list(range(half, 2 * half))
    c = replace(c, parallel_start_layer=half, recur_layers=(layers - 1,))
    assert t.contradictions(c) == []
    plan = t.layer_plan(c, True)
    assert [r.layer for r in plan] == [*range(layers), layers - 1]
    assert [r.lanes for r in plan] == [False] * half + [True] * (layers - half + 1)
    b_model(c).logits(b_ids())  # runs: recurrence inside the lanes


def test_b_layer_plan_refusals():
    """Crossing blocks, gaps, lanes in the encoder half and layers out of range are refused."""
    good = t.Config()
    for change, word in [
        (dict(recur_layers=(6, 7)), "RECUR_LAYERS"), (dict(recur_layers=(4, 6)), "RECUR_LAYERS"),
        (dict(recur_layers=(5, 4)), "RECUR_LAYERS"), (dict(recur_layers=(11,)), "RECUR_LAYERS"),
        (dict(parallel_start_layer=4), "PARALLEL_START_LAYER"),
        (dict(parallel_start_layer=12), "PARALLEL_START_LAYER"),
        (dict(ve_layers=(11,)), "VE_LAYERS"),
    ]:  # fmt: skip
        problems = t.contradictions(replace(good, **change))
        assert problems and word in problems[0], change
    for fine in (dict(recur_layers=(7, 8)), dict(recur_layers=()), dict(recur_layers=(5, 6)),
                 dict(parallel_start_layer=11), dict(parallel_start_layer=6)):
        assert t.contradictions(replace(good, **fine)) == [], fine


def test_b_initial_values():
    """The table of GPT's docstring, and orthogonality of q, k, v and up."""
    c = b_config(tie_embeddings=False, tied_embed_init_std=0.005, qk_gain_init=1.7)
    model = b_model(c, seed=None, vocab=4000)
    p = {n: x.detach() for n, x in model.named_parameters()}
    assert abs(p["embed.weight"].std() / 0.005 - 1) < 0.02 and p["embed.weight"].mean() < 1e-3
    assert abs(p["value.table.weight"].std() / 0.01 - 1) < 0.03
    assert torch.equal(p["bigram.scale"], torch.tensor([0.05]))
    assert torch.equal(p["value.scale"], torch.tensor([0.1]))
    for name, x in p.items():
        leaf = name.removesuffix(".weight").split(".")[-1]
        if leaf in ("q", "k", "v", "up"):
            small = x if x.size(0) <= x.size(1) else x.T
            torch.testing.assert_close(small @ small.T, torch.eye(len(small)), atol=1e-5, rtol=0)
        elif leaf in ("out", "down", "gate", "head") or name == "value.proj.weight":
            assert not x.any(), name
        elif leaf in ("attn_scale", "mlp_scale", "route", "skip_weights", "layer_scale"):
            assert torch.equal(x, torch.ones_like(x)), name
        elif leaf in ("resid_mix", "resid_mix_mlp"):
            assert x[0].eq(1).all() and x[1].eq(0).all(), name
        elif leaf == "lane_merge":
            assert x.item() == 0.5
        elif leaf == "q_gain":
            assert torch.equal(x, torch.full_like(x, 1.7))
        else:
            assert name.startswith(("embed", "bigram", "value")), name
    ids = b_ids()
    starts = torch.from_numpy(B_BOUNDARY)[ids]
    assert not model.bigram(ids, starts).any()  # adds nothing at the start of training
    assert all(x.dtype == torch.float32 for x in p.values())


# ---------------------------------------------------------------------------- model: reference


def b_ref_norm(x: np.ndarray) -> np.ndarray:
    """RMSNorm without weights, epsilon of float32."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.finfo(np.float32).eps)


def b_ref_rows(ids: np.ndarray, boundary: np.ndarray, rows: int) -> np.ndarray:
    """Bigram rows in Python integers, wrapped to int32 by hand."""
    wrap = lambda n: (n + 2**31) % 2**32 - 2**31  # noqa: E731
    out = np.full(ids.shape, rows - 1)
    for b, i in np.ndindex(ids.shape):
        if i > 0 and not boundary[ids[b, i]]:
            pair = wrap(36313 * int(ids[b, i])) ^ wrap(27191 * int(ids[b, i - 1]))
            out[b, i] = pair % (rows - 1)
    return out


def b_ref_input(p: dict, c: t.Config, boundary: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """SPEC section 3, Input."""
    x = p["embed.weight"][ids]
    if c.bigram_vocab_size:
        rows = b_ref_rows(ids, boundary, c.bigram_vocab_size)
        x = x + p["bigram.scale"] * (p["bigram.table.weight"][rows] @ p["bigram.proj.weight"].T)
    x = b_ref_norm(x)
    if not c.smear_enabled:
        return x
    gate, out = 1 / (1 + np.exp(-p["smear.gate"])), x.copy()
    for b, i in np.ndindex(ids.shape):
        if i > 0 and not boundary[ids[b, i]]:
            out[b, i] = (1 - gate) * x[b, i] + gate * x[b, i - 1]
    return out


def b_ref_rope(x: np.ndarray, c: t.Config) -> np.ndarray:
    """Rotate-half on the first ROPE_DIMS of each head; x (B, T, heads, K)."""
    half, out = c.rope_dims // 2, x.copy()
    for i in range(x.shape[1]):
        for j in range(half):
            angle = i * c.rope_base ** (-2 * j / c.rope_dims)
            a, b = x[:, i, :, j], x[:, i, :, j + half]
            out[:, i, :, j] = a * math.cos(angle) - b * math.sin(angle)
            out[:, i, :, j + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def b_ref_attention(p: dict, c: t.Config, i: int, x: np.ndarray, value) -> np.ndarray:
    """SPEC section 3, Attention of layer i."""
    w = {n: p[f"blocks.{i}.attn.{n}.weight"] for n in ("q", "k", "v", "out")}
    B, T, D = x.shape
    H, G = c.num_heads, c.num_kv_heads
    K = D // H
    q, k, v = x @ w["q"].T, x @ w["k"].T, x @ w["v"].T
    v = v if value is None else v + value
    q, k, v = q.reshape(B, T, H, K), k.reshape(B, T, G, K), v.reshape(B, T, G, K)
    q = b_ref_rope(b_ref_norm(q), c) * p[f"blocks.{i}.attn.q_gain"][:, None]
    k = b_ref_rope(b_ref_norm(k), c)
    y = np.zeros((B, T, H, K))
    for h in range(H):
        kv = h // (H // G)
        scores = q[:, :, h] @ k[:, :, kv].swapaxes(1, 2) / math.sqrt(K)
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y[:, :, h] = weights / weights.sum(-1, keepdims=True) @ v[:, :, kv]
        if i >= c.num_layers - c.xsa_last_n:
            own = v[:, :, kv] / np.linalg.norm(v[:, :, kv], axis=-1, keepdims=True)
            y[:, :, h] -= (y[:, :, h] * own).sum(-1, keepdims=True) * own
    return y.reshape(B, T, D) @ w["out"].T


def b_ref_mlp(p: dict, c: t.Config, prefix: str, x: np.ndarray) -> np.ndarray:
    """SPEC section 3, MLP."""
    z = x @ p[f"{prefix}.up.weight"].T
    z = np.where(z > 0, z, c.activation_neg_slope * z)
    return (z * z) @ p[f"{prefix}.down.weight"].T


def b_ref_logits(model: t.GPT, ids: torch.Tensor, recur: bool) -> np.ndarray:
    """Logits of a model in one of its phases, by `b_ref_scores`."""
    p = {n: x.detach().double().numpy() for n, x in model.named_parameters()}
    return b_ref_scores(p, model.config, model.is_boundary.numpy(), ids.numpy(), recur)


def b_ref_scores(p: dict, c, boundary: np.ndarray, ids: np.ndarray, recur: bool) -> np.ndarray:
    """SPEC section 3 from ids to logits in float64 NumPy; p: arrays by name, c: the settings."""
    x0 = b_ref_input(p, c, boundary, ids)
    order = [(i, None) for i in range(c.num_layers)]
    if recur and c.recur_layers:
        after = order.index((c.recur_layers[-1], None)) + 1
        order[after:after] = [(i, n) for n, i in enumerate(c.recur_layers)]
    half, stored, a_lane, m_lane = c.num_layers // 2, [], x0, x0
    for i, again in order:
        pre, scale = f"blocks.{i}.", (i + 1) ** -0.5 if c.ln_scale else 1.0
        if again is None and half <= i < 2 * half:
            skip = p["skip_weights"][i - half] * stored.pop()
            a_lane, m_lane = a_lane + skip, m_lane + skip
        value = None
        if c.ve_enabled and i in c.ve_layers:
            value = p["value.table.weight"][ids] @ p["value.proj.weight"].T
            value = value * p["value.scale"] * p["value.layer_scale"][c.ve_layers.index(i)]
        mlp = pre + "mlp" if again is None or not c.recur_untie_mlp else f"repeat_mlps.{again}"
        mix_a = p[pre + "resid_mix"]
        if i < c.parallel_start_layer:
            x = mix_a[0] * a_lane + mix_a[1] * x0
            x = x + p[pre + "attn_scale"] * b_ref_attention(p, c, i, b_ref_norm(x) * scale, value)
            x = x + p[pre + "mlp_scale"] * b_ref_mlp(p, c, mlp, b_ref_norm(x) * scale)
            a_lane = m_lane = x
        else:
            mix_m, r = p[pre + "resid_mix_mlp"], p[pre + "route"]
            a = b_ref_norm(mix_a[0] * a_lane + mix_a[1] * x0) * scale
            m = b_ref_norm(mix_m[0] * m_lane + mix_m[1] * x0) * scale
            a = p[pre + "attn_scale"] * b_ref_attention(p, c, i, a, value)
            m = p[pre + "mlp_scale"] * b_ref_mlp(p, c, mlp, m)
            a_lane, m_lane = a_lane + r[0] * a + r[2] * m, m_lane + r[1] * a + r[3] * m
        if again is None and i < half:
            stored.append(a_lane)
    w = p.get("lane_merge", 0.5)
    h = b_ref_norm(w * a_lane + (1 - w) * m_lane)
    z = h @ p["embed.weight" if c.tie_embeddings else "head.weight"].T
    return c.logit_softcap * np.tanh(z / c.logit_softcap)


@pytest.mark.parametrize("settings", [
    dict(),
    dict(num_layers=11, parallel_start_layer=7, recur_layers=(4, 5), ve_layers=(9, 10),
         xsa_last_n=4, logit_softcap=30.0),
    dict(tie_embeddings=False, parallel_start_layer=3, recur_layers=(4, 5), num_layers=7,
         num_kv_heads=4, rope_base=100.0),
    dict(recur_untie_mlp=False, parallel_start_layer=6, num_kv_heads=1, ln_scale=False,
         activation_neg_slope=0.1, rope_dims=8, xsa_last_n=6),
    dict(bigram_vocab_size=0, smear_enabled=False, ve_enabled=False, xsa_last_n=0,
         recur_layers=()),
], ids=["tiny", "record_depth", "untied_recur_in_lanes", "shared_repeats", "plain"])  # fmt: skip
@pytest.mark.parametrize("recur", [False, True])
def test_b_forward_equals_reference(settings, recur):
    """Logits equal an independent NumPy reading of SPEC section 3, everything randomised."""
    model = b_model(b_config(**settings), recur)
    ids = b_ids()
    with torch.no_grad():
        logits = model.logits(ids).numpy()
        nats = model(ids[:, :-1], ids[:, 1:]).numpy()
    expected = b_ref_logits(model, ids, recur)
    assert logits.std() > 0.5 and np.abs(logits - expected).max() < 1e-4
    z = expected[:, :-1]
    lse = np.log(np.exp(z).sum(-1))
    own = np.take_along_axis(z, ids[:, 1:, None].numpy(), -1)[..., 0]
    assert np.abs(nats - (lse - own)).max() < 1e-4
    assert nats.dtype == logits.dtype == np.float32


def test_b_bigram_rows_int32():
    """The hash wraps as int32 does, for ids whose products pass 2^31."""
    c = b_config(bigram_vocab_size=2048)
    bigram = t.BigramHash(c)
    ids = torch.tensor([[1, 1253, 65535, 60000, 0, 59137, 65535, 65534]])
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[0, [0, 4]] = True
    boundary = np.arange(65536) == 0
    expected = b_ref_rows(ids.numpy(), boundary, 2048)
    assert bigram.rows(ids, starts).tolist() == expected.tolist()
    assert expected[0, 0] == expected[0, 4] == 2047 and expected[0, 1] < 2047


def test_b_causality_every_position():
    """Changing token t changes no earlier logit, bit for bit, and does change later ones."""
    model = b_model(b_config(num_layers=7, parallel_start_layer=4))
    ids = b_ids((1, 14), bos=((0, 5),))
    with torch.no_grad():
        before = model.logits(ids)
        for place in range(14):
            for new in (0, int(ids[0, place]) % (B_VOCAB - 1) + 1):
                if new == ids[0, place]:
                    continue
                changed = ids.clone()
                changed[0, place] = new
                after = model.logits(changed)
                assert torch.equal(after[:, :place], before[:, :place]), place
                assert not after[:, place:].eq(before[:, place:]).all(-1).any(), place


def test_b_document_boundaries():
    """Nothing before a boundary reaches it or what follows through SmearGate and bigram."""
    model = b_model(b_config())
    ids = b_ids((1, 12), bos=((0, 6),))
    changed = ids.clone()
    changed[0, :6] = ids[0, :6] % (B_VOCAB - 1) + 1
    with torch.no_grad():
        a, b = model.embed_tokens(ids), model.embed_tokens(changed)
        assert torch.equal(a[:, 6:], b[:, 6:]) and not a[:, :6].eq(b[:, :6]).any(-1).any()
        no_bos = torch.where(ids == 0, 7, ids)
        last = no_bos.clone()
        last[0, 5] = no_bos[0, 5] % (B_VOCAB - 1) + 1
        a, b = model.embed_tokens(no_bos), model.embed_tokens(last)
    moved = (~a.eq(b).all(-1))[0].nonzero().flatten().tolist()
    assert moved == [5, 6, 7]  # else the bigram of 6 feels it, and SmearGate's next, 7


def test_b_every_parameter_gets_a_gradient():
    """From the real initial values, every parameter has a gradient after at most two updates.

    lane_merge needs a third: until routes differ, both lanes hold the same.
    """
    for settings in (dict(), dict(parallel_start_layer=3, recur_layers=(3, 4))):
        c = b_config(grad_clip_norm=0.0, **settings)
        model = b_model(c, seed=None)
        with torch.no_grad():
            for base, repeat in model.repeats():
                repeat.copy_(base)
        optimizer = t.Optimizer(model, c, b_runtime())
        updates: dict[str, int] = {}  # before the first gradient
        ids = b_ids((4, 17), bos=((0, 3), (2, 9)))
        for done in range(4):
            model.zero_grad()
            model(ids[:, :-1], ids[:, 1:]).mean().backward()
            for n, p in model.named_parameters():
                if p.grad is not None and p.grad.abs().max() > 0:
                    updates.setdefault(n, done)
            optimizer.step(torch.zeros(1), 1.0, 0.9)
        late = {n: updates.get(n) for n, _ in model.named_parameters() if updates.get(n, 9) > 2}
        assert late == {"lane_merge": 3}


@pytest.mark.parametrize("settings", [dict(), dict(parallel_start_layer=3, recur_layers=(3, 4))])
def test_b_silent_repeats_change_nothing(settings):
    """Zero out and down projections and mixes (1, 0): the repeats are the identity, exactly."""
    model = b_model(b_config(**settings))
    with torch.no_grad():
        for layer in model.config.recur_layers:
            block = model.blocks[layer]
            for mix in [n for n in ("resid_mix", "resid_mix_mlp") if hasattr(block, n)]:
                getattr(block, mix)[0], getattr(block, mix)[1] = 1, 0
            block.attn.out.weight.zero_()
            block.mlp.down.weight.zero_()
        for base, repeat in model.repeats():
            repeat.copy_(base)
        on = model.logits(b_ids())
        model.set_phase(t.Phase(recur=False))
        assert torch.equal(model.logits(b_ids()), on)
        model.repeat_mlps[1].down.weight.normal_()
        assert torch.equal(model.logits(b_ids()), on)  # off: the repeats' MLPs are not used
        model.set_phase(t.Phase(recur=True))
        assert not torch.equal(model.logits(b_ids()), on)


@pytest.mark.parametrize("change", [
    dict(parallel_start_layer=6), dict(parallel_start_layer=5), dict(recur_layers=()),
    dict(recur_layers=(2,)), dict(recur_untie_mlp=False), dict(xsa_last_n=0), dict(xsa_last_n=2),
    dict(bigram_vocab_size=0), dict(smear_enabled=False), dict(ve_enabled=False),
    dict(ve_layers=(1, 5)), dict(ln_scale=False), dict(logit_softcap=6.0),
    dict(activation_neg_slope=0.4), dict(tie_embeddings=False), dict(rope_base=5000.0),
    dict(rope_dims=6),
], ids=str)  # fmt: skip
def test_b_every_switch_changes_the_output(change):
    """Each feature switch is felt at every position that it can reach."""
    c = b_config()
    model, other = b_model(c), b_model(replace(c, **change), seed=9)
    state = model.state_dict()
    other.load_state_dict({n: state.get(n, x) for n, x in other.state_dict().items()})
    ids = b_ids(bos=())
    with torch.no_grad():
        gap = (model.logits(ids) - other.logits(ids)).abs().amax(-1)
    assert (gap[:, 2:] > 1e-5).all(), gap


# ---------------------------------------------------------------------------- optimization


def b_matrices(*shapes, seed: int = 2) -> list[torch.Tensor]:
    """Random matrices."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g) for s in shapes]


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96), (16, 128)])
def test_b_newton_schulz(shape):
    """Five steps bring singular values near 1 and keep the vectors; batched is one by one."""
    stack = torch.stack(b_matrices(shape, shape, shape))
    out = t.newton_schulz(stack, 5)
    for g, x in zip(stack, out, strict=True):
        u, s, v = torch.linalg.svd(g.double(), full_matrices=False)
        values = torch.linalg.svdvals(x.double())
        big = int((s / s.norm() > 0.01).sum())  # five steps do not lift vanishing values
        assert values.max() < 1.3 and values[:big].min() > 0.6
        inside = u.T @ x.double() @ v.T
        assert (inside - torch.diag(inside.diagonal())).abs().max() < 1e-3
        torch.testing.assert_close(t.newton_schulz(g[None], 5)[0], x, atol=1e-5, rtol=0)
    scaled = t.newton_schulz(1e4 * stack, 5)
    torch.testing.assert_close(scaled, out, atol=1e-4, rtol=0)
    assert torch.isfinite(t.newton_schulz(torch.zeros(1, 8, 8), 5)).all()


def b_ref_muon(weights, grads, lr, momentum, wd, steps, row_norm) -> list[np.ndarray]:
    """Muon as SPEC section 4 writes it, float64, one matrix after the other."""
    out = []
    for w, history in zip(weights, grads, strict=True):
        w, buf = w.astype(np.float64), np.zeros(w.shape)
        for g in history:
            buf = momentum * buf + g
            x = g + momentum * buf
            x = x / np.linalg.norm(x, axis=1, keepdims=True) if row_norm else x
            x = x / np.linalg.norm(x)
            x = x.T if w.shape[0] > w.shape[1] else x
            for _ in range(steps):
                a = x @ x.T
                x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
            x = x.T if w.shape[0] > w.shape[1] else x
            w = w * (1 - lr * wd) - lr * math.sqrt(max(1, w.shape[0] / w.shape[1])) * x
        out.append(w)
    return out


B_SHAPES = [(24, 24), (48, 16), (16, 48), (24, 24), (16, 48)]


def b_muon_step(muon: t.Muon, scale: float, momentum: float) -> None:
    """One unclipped update at `scale` times MATRIX_LR."""
    muon.reduce()
    muon.start(torch.ones(1), momentum)
    muon.finish(scale * muon.config.matrix_lr)


def b_momentum(muon: t.Muon) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The momentum of each matrix, with one rank."""
    params = [p for stack in muon.stacks for p in stack.params]
    return dict(zip(params, muon.matrices(muon.momentum[None], muon.stacks), strict=True))


def b_run_muon(c: t.Config, dtype, scale: float, momentum: float, steps: int):
    """Our Muon over B_SHAPES for some steps; returns (initial, gradients, final weights)."""
    params = [torch.nn.Parameter(w) for w in b_matrices(*B_SHAPES)]
    start = [p.detach().clone() for p in params]
    grads = [b_matrices(*B_SHAPES, seed=10 + s) for s in range(steps)]
    runtime = b_runtime()
    runtime.dtype = dtype
    muon = t.Muon([params[:2], params[2:]], c, runtime)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        b_muon_step(muon, scale, momentum)
    return start, grads, [p.detach() for p in params]


@pytest.mark.parametrize("row_norm", [False, True])
@pytest.mark.parametrize("iterations", [5, 3])
def test_b_muon_equals_formula(row_norm, iterations):
    """Square, tall, wide, and two of a shape in a stack, over four steps."""
    c = b_config(matrix_lr=0.05, muon_wd=0.1, muon_row_norm=row_norm, muon_backend_steps=iterations)
    start, grads, ours = b_run_muon(c, torch.float32, 0.5, 0.9, 4)
    histories = [[step[i].double().numpy() for step in grads] for i in range(len(B_SHAPES))]
    theirs = b_ref_muon([w.numpy() for w in start], histories, 0.025, 0.9, 0.1, iterations,
                        row_norm)
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a.numpy() - b).max() < 2e-5


@pytest.mark.parametrize("momentum", [0.5, 0.95])
def test_b_muon_equals_torch(momentum):
    """torch.optim.Muon, which iterates in bfloat16: updates agree to 4 % of their norm."""
    c = b_config(matrix_lr=0.02, muon_wd=0.1)
    for dtype in (torch.bfloat16, torch.float32):
        start, grads, ours = b_run_muon(c, dtype, 1.0, momentum, 4)
        theirs = [torch.nn.Parameter(w.clone()) for w in start]
        optimizer = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=momentum,
                                     nesterov=True, ns_steps=5, adjust_lr_fn="original")
        for step in grads:
            for p, g in zip(theirs, step, strict=True):
                p.grad = g.clone()
            optimizer.step()
        for w, a, b in zip(start, ours, theirs, strict=True):
            b = b.detach()
            assert (a - b).norm() < 0.04 * (b - w).norm(), (tuple(w.shape), dtype)


def test_b_muon_group_without_gradients():
    """Parameters without gradients are neither moved nor decayed, nor is their momentum."""
    params = [torch.nn.Parameter(w) for w in b_matrices((8, 8), (8, 8))]
    muon = t.Muon([params[:1], params[1:]], b_config(muon_wd=0.5), b_runtime())
    before = params[1].detach().clone()
    params[0].grad = torch.ones(8, 8)
    b_muon_step(muon, 1.0, 0.9)
    momentum = b_momentum(muon)
    assert torch.equal(params[1], before) and not momentum[params[1]].any()
    assert momentum[params[0]].any()


@pytest.mark.parametrize("tied", [True, False])
def test_b_each_parameter_in_one_group(tied):
    """Roles, learning rates and decay by name, as SPEC section 4 says."""
    c = b_config(tie_embeddings=tied, matrix_lr=0.011, scalar_lr=0.012, tied_embed_lr=0.013,
                 embed_lr=0.014, head_lr=0.015, adam_wd=0.07)
    model = b_model(c)
    optimizer = t.Optimizer(model, c, b_runtime())
    found: dict[torch.nn.Parameter, list] = {}
    for stack in optimizer.muon.stacks:
        for p in stack.params:
            found.setdefault(p, []).append(("muon", None))
    for group in optimizer.adam.param_groups:
        for p in group["params"]:
            found.setdefault(p, []).append((group["peak"], group["weight_decay"]))
    assert set(b_momentum(optimizer.muon)) == {p for p, g in found.items() if g[0][0] == "muon"}
    for name, p in model.named_parameters():
        matrix = p.dim() == 2 and (".attn." in name or "mlp" in name) and name.endswith("weight")
        table = name in ("embed.weight", "bigram.table.weight", "value.table.weight")
        expected = ("muon", None) if matrix else (0.012, 0.0)
        expected = (0.013 if tied else 0.014, 0.07) if table else expected
        expected = (0.015, 0.07) if name == "head.weight" else expected
        expected = (0.012, 0.07) if name.endswith("proj.weight") else expected
        assert found.pop(p) == [expected], name
    assert not found


def test_b_optimizer_step_rates_and_betas():
    """Peaks are scaled, not compounded; the first AdamW update is lr * sign, plus decay."""
    c = b_config(scalar_lr=0.01, tied_embed_lr=0.02, adam_wd=0.5, beta1=0.8, beta2=0.9)
    model = b_model(c)
    optimizer = t.Optimizer(model, c, b_runtime())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(torch.zeros(1), 0.25, 0.9)
    after = dict(model.named_parameters())
    for name, lr, wd in (("embed.weight", 0.005, 0.5), ("bigram.proj.weight", 0.0025, 0.5),
                         ("blocks.0.attn_scale", 0.0025, 0.0)):
        expected = before[name] * (1 - lr * wd) - lr
        torch.testing.assert_close(after[name].detach(), expected, atol=1e-6, rtol=0)
    optimizer.step(torch.zeros(1), 0.5, 0.9)
    assert {g["lr"] for g in optimizer.adam.param_groups} == {0.005, 0.01}
    assert all(g["betas"] == (0.8, 0.9) for g in optimizer.adam.param_groups)


def test_b_repeats_untouched_without_gradients():
    """Before recurrence the optimizer moves every parameter except the repeats' MLPs."""
    c = b_config(muon_wd=0.3)
    model = b_model(c, recur=False)
    optimizer = t.Optimizer(model, c, b_runtime())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = b_ids((4, 17))
    for _ in range(2):
        model.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).mean().backward()
        optimizer.step(torch.zeros(1), 1.0, 0.9)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("repeat_mlps"), name


def b_averaged(c: t.Config, steps: int, scale: float) -> tuple[t.Average, list[np.ndarray]]:
    """An Average fed with known weights, and the history of one of them."""
    model = b_model(c)
    average, history = t.Average(model, c), []
    watched = model.blocks[0].attn.q.weight
    history.append(watched.detach().double().numpy().copy())
    for step in range(steps):
        b_randomize(model, 100 + step)
        average.update(step, scale)
        history.append(watched.detach().double().numpy().copy())
    average.watched = watched
    return average, history


def test_b_ema_closed_form():
    """The exported EMA with decay min(EMA_DECAY, (1 + t) / (10 + t)) from the initial weights."""
    average, history = b_averaged(b_config(ema_decay=0.4), 12, 1.0)
    expected = history[0]
    for step, weights in enumerate(history[1:]):
        decay = min(0.4, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights
    assert average.store() == "ema"
    assert np.abs(average.watched.detach().numpy() - expected).max() < 1e-6
    assert np.abs(history[-1] - expected).max() > 1e-2
    average, history = b_averaged(b_config(ema_decay=0.0), 3, 1.0)
    assert average.store() == "last"
    assert np.array_equal(average.watched.detach().double().numpy(), history[-1])


def test_b_swa_mean_of_snapshots():
    """SWA exports the mean of every SWA_EVERY-th weights under scale 0.2; if none, the EMA."""
    c = b_config(swa_enabled=True, swa_every=3)
    average, history = b_averaged(c, 10, 0.19)
    assert average.store() == "swa"
    expected = np.mean([history[3], history[6], history[9]], axis=0)
    assert np.abs(average.watched.detach().numpy() - expected).max() < 1e-6
    average, _ = b_averaged(c, 10, 0.2)
    ema = average.ema[0].clone()
    assert average.store() == "ema" and torch.equal(average.params[0], ema)


def test_b_lr_scale():
    """Constant, then linear to MIN_LR, by steps or by the clock, whichever ends first."""
    c = t.Config(iterations=1000, warmdown_iters=100, max_wallclock_seconds=0)
    for step, expected in ((0, 1), (500, 1), (900, 1), (925, 0.75), (950, 0.5), (1000, 0)):
        assert t.lr_scale(step, 9e9, 50.0, c) == pytest.approx(expected)
    assert t.lr_scale(950, 0, 0, replace(c, min_lr=0.1)) == pytest.approx(0.55)
    assert t.lr_scale(1000, 0, 0, replace(c, warmdown_iters=0)) == 1
    c = t.Config(iterations=10**6)
    usable = 600_000 - t.CLOCK_RESERVE_MS
    assert t.lr_scale(10, 1e3, 0.0, c) == 1  # no step time known yet
    assert t.lr_scale(10, usable - 3500 * 100, 100.0, c) == pytest.approx(1)
    assert t.lr_scale(10, usable - 1750 * 100, 100.0, c) == pytest.approx(0.5)
    assert t.lr_scale(10, usable - 1750 * 100, 200.0, c) == pytest.approx(0.25)
    assert t.lr_scale(10, 601e3, 100.0, replace(c, min_lr=0.2)) == pytest.approx(0.2)
    assert 0 < t.CLOCK_RESERVE_MS < 1000


def test_b_muon_momentum():
    """Linear from start to peak over the warm-up steps, then constant."""
    c = t.Config()
    for step, expected in ((0, 0.92), (750, 0.955), (1500, 0.99), (9999, 0.99)):
        assert t.muon_momentum(step, c) == pytest.approx(expected)
    assert t.muon_momentum(0, replace(c, muon_momentum_warmup_steps=0)) == 0.99


def test_b_recurrence_due():
    """A step, a share of steps or of time, from the first step, or never."""
    c = t.Config()
    assert [t.recurrence_due(s, 9e9, c) for s in (0, 2999, 3000, 3001)] == [0, 0, 1, 1]
    c = t.Config(recur_start_step=0.5, iterations=100, max_wallclock_seconds=0)
    assert [t.recurrence_due(s, 9e9, c) for s in (0, 49, 50)] == [False, False, True]
    c = replace(c, max_wallclock_seconds=10.0)
    assert [t.recurrence_due(1, ms, c) for ms in (0, 4999, 5000)] == [False, False, True]
    assert t.recurrence_due(50, 0, c)
    assert t.recurrence_due(0, 0, replace(c, recur_start_step=0.0))
    assert not t.recurrence_due(99, 9e9, replace(c, recur_start_step=0.0, recur_layers=()))


class BEvent:
    """A device event that is done at a given time of a fake clock."""

    def __init__(self, runtime: SimpleNamespace, done: float) -> None:
        self.runtime, self.done = runtime, done

    def query(self) -> bool:
        """Whether the device has passed the event."""
        return self.runtime.now >= self.done

    def elapsed_time(self, later: BEvent) -> float:
        """Milliseconds between two events."""
        return later.done - self.done

    def synchronize(self) -> None:
        """Waiting is a failure here."""
        raise AssertionError("the clock waited for an event")


def test_b_train_clock():
    """Finished steps only, never waiting; pauses are excluded; the slowest step is expected."""
    runtime = SimpleNamespace(now=1000.0, done=1000.0, waits=0)
    runtime.event = lambda: BEvent(runtime, runtime.done)

    def synchronize() -> None:
        runtime.waits, runtime.now = runtime.waits + 1, max(runtime.now, runtime.done)

    runtime.synchronize = synchronize
    clock = t.TrainClock(runtime)
    clock.resume()
    assert clock.elapsed_ms == clock.step_ms == clock.expected_ms(5) == 0
    for now, done in ((1010, 1100), (1020, 1300)):  # two steps launched ahead of the device
        runtime.now, runtime.done = now, done
        clock.mark()
    assert (clock.steps, clock.elapsed_ms, runtime.waits) == (0, 0, 0)
    runtime.now = 1150
    clock.poll()
    assert (clock.steps, clock.elapsed_ms, clock.step_ms) == (1, 100, 0)
    assert clock.expected_ms(2) == 100 + 2 * 100
    assert runtime.waits == 0
    clock.pause()
    assert (clock.steps, clock.elapsed_ms, runtime.waits) == (2, 300, 1)
    runtime.now = runtime.done = 9000.0
    assert clock.elapsed_ms == 300
    clock.resume()
    runtime.now = runtime.done = 9050.0
    clock.mark()
    assert (clock.steps, clock.elapsed_ms) == (3, 350)
    assert clock.step_ms == 100  # the median: no single slow step moves the schedules
    assert clock.expected_ms(3) == 350 + 200 and clock.expected_ms(4) == 350 + 400
    clock.pause()
    clock.pause()
    assert clock.elapsed_ms == 350


# ---------------------------------------------------------------------------- training loop


def test_b_recurrence_switch(b_make):
    """Until the switch the repeats rest; then weights, momentum, EMA and SWA are copies."""
    trainer = b_make(iterations=7, recur_start_step=4.0, swa_enabled=True, swa_every=1,
                     warmdown_iters=100, late_qat_threshold=0.0, warmup_steps=2)
    model, seen = trainer.model, []
    start = [(a.detach().clone(), b.detach().clone()) for a, b in model.repeats()]
    place = {p: i for i, p in enumerate(trainer.params)}
    copy = trainer.copy_to_repeats

    def spy() -> None:
        momentum, ema, swa = (b_momentum(trainer.optimizer.muon), trainer.average.ema,
                              trainer.average.swa)
        for (base, repeat), (base_0, repeat_0) in zip(model.repeats(), start, strict=True):
            assert torch.equal(repeat, repeat_0) and not momentum[repeat].any()
            assert not torch.equal(base, base_0) and momentum[base].any()
            torch.testing.assert_close(ema[place[repeat]], repeat_0, atol=1e-6, rtol=0)
        copy()
        for base, repeat in model.repeats():
            assert torch.equal(base, repeat) and torch.equal(momentum[base], momentum[repeat])
            for average in (ema, swa):
                assert torch.equal(average[place[base]], average[place[repeat]])
                assert not torch.equal(average[place[base]], base)
        with torch.no_grad():
            repeats = [p for _, p in model.repeats()]
            assert len(repeats) == 4 and len({p.data_ptr() for p in repeats}) == 4
        seen.append(trainer.steps)

    trainer.copy_to_repeats = spy
    trainer.run()
    assert seen == [4] and trainer.average.snapshots == 7
    for base, repeat in model.repeats():
        assert not torch.equal(base, repeat)  # from then on each has a life of its own
    phases = [(e["name"], e["step"]) for e in b_events(trainer, "phase")]
    assert phases == [("recur", 4)] and model.recur


def test_b_phases_are_logged(b_make):
    """Both switches are announced once, with their step, to the log and the events."""
    trainer = b_make(iterations=8, warmdown_iters=8, recur_start_step=0.5, late_qat_threshold=0.4)
    trainer.run()
    text = Path(f"logs/{trainer.log.run_id}.txt").read_text()
    assert "phase recur:on step:4\n" in text and "phase qat:on step:5\n" in text
    assert text.count("phase ") == 2 and trainer.phase == t.Phase(True, True)


def test_b_warm_up_changes_nothing(b_make):
    """Weights are restored bit for bit, and losses are those of a run without warm-up."""
    settings = dict(iterations=7, recur_start_step=2.0, warmdown_iters=6, late_qat_threshold=0.5)
    cold, warm = b_make(warmup_steps=0, **settings), b_make(warmup_steps=4, **settings)
    before = [p.detach().clone() for p in warm.params]
    calls = []
    backward = warm.backward
    warm.backward = lambda *batch: calls.append(warm.model.recur) or backward(*batch)
    warm.warm_up()
    assert calls == [False, False, True, True, True, True]  # two priming steps in each phase
    assert all(map(torch.equal, before, warm.params))
    assert {m.qat_bits for m in warm.model.modules() if isinstance(m, t.Linear)} == {0}
    assert not warm.model.recur
    cold.run()
    warm.run()
    assert b_losses(cold) == b_losses(warm) and len(set(b_losses(warm))) == 7
    assert all(map(torch.equal, cold.params, warm.params))
    assert b_losses(warm)[-1] < b_losses(warm)[0]


def test_b_wallclock_stop(b_make):
    """A run ends before its cap, says so, and its learning rate has come down by the clock."""
    trainer = b_make(iterations=2000, max_wallclock_seconds=3.0, warmdown_iters=20, quant="rtn",
                     warmup_steps=4, recur_start_step=0.3, late_qat_threshold=0.15)
    trainer.run()
    (stop,) = b_events(trainer, "stop")
    assert trainer.clock.elapsed_ms == stop["train_ms"]
    assert 300 < trainer.clock.elapsed_ms < 3000
    text = Path(f"logs/{trainer.log.run_id}.txt").read_text()
    line = [x for x in text.splitlines() if x.startswith("stopping_early: wallclock_cap ")]
    assert len(line) == 1
    assert line[0].endswith(f"ms step:{trainer.steps}/2000")
    events = b_events(trainer, "train")
    assert events[-1]["lr_scale"] < 0.5 and events[0]["lr_scale"] == 1
    assert [e["name"] for e in b_events(trainer, "phase")][0] == "recur"


def test_b_non_finite_loss(b_make):
    """The run stops at the step whose loss is not finite, and names it."""
    trainer = b_make(iterations=8)
    forward, calls = trainer.forward, []

    def broken(x, y):
        calls.append(1)
        return forward(x, y) * (math.nan if len(calls) == 5 else 1.0)

    trainer.forward = broken
    with pytest.raises(t.RunError, match=r"loss nan.* at step 5:"):
        trainer.run()
    assert len(calls) == 5


def b_manual_gradients(trainer: t.Trainer, step: int) -> tuple[float, list]:
    """Loss and gradients of a whole global batch in one pass."""
    x, y = trainer.loader.batch(step)
    loss = trainer.model(x, y).mean()
    grads = torch.autograd.grad(loss, trainer.params, allow_unused=True)
    return float(loss.detach()), grads


def b_captured_step(trainer: t.Trainer) -> list:
    """The gradients that AdamW is given in step 0, and Muon (its first momentum is just that)."""
    captured = {}
    optimizer = trainer.optimizer
    adam_step = optimizer.adam.step

    def spy() -> None:
        captured.update({p: p.grad.clone() for p in optimizer.small})
        adam_step()

    optimizer.adam.step = spy
    trainer.clock.resume()
    trainer.train_step(0)
    trainer.read_facts(0)
    captured |= {p: buffer for p, buffer in b_momentum(optimizer.muon).items() if buffer.any()}
    return [captured.get(p) for p in trainer.params]


@pytest.mark.parametrize("world", [1, 2])
def test_b_clipping_on_the_global_gradient(b_make, world):
    """The optimizer sees the mean over ranks, clipped by its own norm; the log has that norm."""
    trainer = b_make(grad_clip_norm=0.05)
    b_randomize(trainer.model)
    trainer.optimizer = t.Optimizer(trainer.model, trainer.config, trainer.runtime)
    loss, grads = b_manual_gradients(trainer, 0)
    factor = 1.0
    if world == 2:  # a second rank whose loss and gradients are three times as large
        trainer.runtime.world, factor = 2, 2.0
        trainer.runtime.all_reduce = lambda packed: torch.cat((4 * packed[:-1], packed[-1:]))
        trainer.runtime.reduce_scatter = lambda rows: 4 * rows[0]
        trainer.runtime.all_gather = lambda rows: lambda: None
    captured = b_captured_step(trainer)
    trainer.runtime.world = 1
    norm = factor * math.sqrt(sum(float(g.double().square().sum()) for g in grads if g is not None))
    assert norm > 0.05
    assert trainer.facts.grad_norm == pytest.approx(norm, rel=1e-4)
    assert trainer.facts.loss == pytest.approx(factor * loss, rel=1e-5)
    for ours, g in zip(captured, grads, strict=True):
        assert (ours is None) == (g is None)
        if g is not None:
            torch.testing.assert_close(ours, factor * g * 0.05 / norm, atol=1e-6, rtol=1e-3)


def test_b_no_clipping_below_the_bound_or_without(b_make):
    """A small gradient, or GRAD_CLIP_NORM=0, passes unchanged."""
    for bound in (1e9, 0.0):
        trainer = b_make(grad_clip_norm=bound)
        b_randomize(trainer.model)
        trainer.optimizer = t.Optimizer(trainer.model, trainer.config, trainer.runtime)
        _, grads = b_manual_gradients(trainer, 0)
        for ours, g in zip(b_captured_step(trainer), grads, strict=True):
            if g is not None:
                torch.testing.assert_close(ours, g, atol=1e-6, rtol=1e-4)


def test_b_accumulation_equals_larger_micro_batch(b_make):
    """MICRO_BATCH_TOKENS changes neither loss nor gradients beyond rounding."""
    results = []
    for micro in (16, 32, 64):
        trainer = b_make(micro_batch_tokens=micro)
        b_randomize(trainer.model)
        assert trainer.accumulation == 64 // micro
        loss = trainer.backward(*trainer.loader.batch(0))
        results.append((loss, [p.grad for p in trainer.params if p.grad is not None]))
    for loss, grads in results[:2]:
        torch.testing.assert_close(loss, results[2][0], atol=1e-6, rtol=1e-6)
        for a, b in zip(grads, results[2][1], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------------------- late QAT


@pytest.mark.parametrize("settings", [dict(), dict(class_bits="mlp=4,embed=6"),
                                      dict(tie_embeddings=False)])
def test_b_qat_forward_is_the_quantized_model(settings):
    """In the QAT phase the model computes with exactly the weights that export would store."""
    c = b_config(**settings)
    model, other = b_model(c), b_model(c, seed=4)
    state = {n: p.detach() for n, p in model.named_parameters()}
    other.load_state_dict({n: s.restore() for n, s in t.quantize(state, c).items()})
    with torch.no_grad():
        plain = model.logits(b_ids())
        model.set_phase(t.Phase(recur=True, qat=True))
        faked = model.logits(b_ids())
        stored = other.logits(b_ids())
    # fp16 of the two projections is storage, not QAT: allow its rounding
    torch.testing.assert_close(faked, stored, atol=2e-2, rtol=0)
    with torch.no_grad():
        for name in ("bigram.proj.weight", "value.proj.weight"):
            dict(other.named_parameters())[name].copy_(state[name])
        torch.testing.assert_close(faked, other.logits(b_ids()), atol=2e-5, rtol=0)
    assert (plain - faked).abs().max() > 0.05


def test_b_qat_bits_only_where_codes_are_stored():
    """Fake quantization touches each tensor stored as codes with its bits, and no other."""
    c = b_config(tie_embeddings=False)
    model = b_model(c)
    for phase in (t.Phase(True, True), t.Phase(True, False)):
        model.set_phase(phase)
        for name, module in model.named_modules():
            if not hasattr(module, "qat_bits"):
                continue
            expected = 0 if name.endswith("proj") else 8
            if ".attn." in name or name.startswith("repeat_mlps"):
                expected = 6
            elif ".mlp." in name:
                expected = 6 if name.split(".")[1] in "05" else 5
            assert module.qat_bits == (expected if phase.qat else 0), name


@pytest.mark.parametrize("bits", [2, 5, 6, 8])
def test_b_straight_through(bits):
    """The value is on the grid, the gradient is the identity's; bits 0 is no operation."""
    (w,), (g,) = b_matrices((6, 40)), b_matrices((6, 40), seed=8)
    w[2] = 0
    w = w.requires_grad_()
    out = t.fake_quantize(w, bits)
    out.backward(g)
    assert torch.equal(w.grad, g)
    scales = t.row_scales(w.detach(), bits)
    codes = out.detach() / scales
    assert (codes - codes.round()).abs().max() < 1e-3
    assert codes.abs().max() < 2 ** (bits - 1) - 1 + 1e-3
    assert t.fake_quantize(w, 0) is w


# ---------------------------------------------------------------------------- pre-flight


@pytest.fixture(scope="module")
def b_full():
    """The record model at full width: its initial weights, then two steps on a tiny batch."""
    c = t.Config(warmup_steps=0, compressor="zlib", quant="rtn", n_int6_layers=4)
    torch.manual_seed(c.seed)
    model = t.GPT(c, np.arange(1254) == 0, b_runtime())
    model.set_phase(t.Phase(recur=True))
    with torch.no_grad():
        for base, repeat in model.repeats():
            repeat.copy_(base)
    initial = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = t.Optimizer(model, c, b_runtime())
    ids = torch.randint(1254, (1, 97), generator=torch.Generator().manual_seed(1))
    losses, norms = [], []
    for _ in range(2):
        model.zero_grad()
        loss = model(ids[:, :-1], ids[:, 1:]).mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip_norm)))
        optimizer.step(torch.zeros(1), 1.0, 0.92)
        losses.append(float(loss.detach()))
    with torch.no_grad():
        losses.append(float(model(ids[:, :-1], ids[:, 1:]).mean()))
    return SimpleNamespace(config=c, model=model, initial=initial, losses=losses, norms=norms)


def b_report(capsys, *lines: str) -> None:
    """Print lines past pytest's capture."""
    with capsys.disabled():
        print("", *lines, sep="\n    ")


def test_preflight_01_imports(tmp_path):
    """The import needs torch and numpy only, opens no socket, writes and prints nothing."""
    code = """
import socket, sys
import numpy, torch
def refuse(*a, **k): raise SystemExit("network at import")
socket.socket.connect = refuse
before = set(sys.modules)
import train_gpt
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names) - {"train_gpt", "torch", "numpy"}))
"""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    env |= {"PYTHONPATH": str(Path(t.__file__).parent), "CUDA_VISIBLE_DEVICES": "",
            "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True,
                          capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
    assert not list(tmp_path.iterdir())


def test_preflight_02_hyperparameters():
    """The defaults are the record run, agree with SPEC section 1 and with each other."""
    c = t.Config.from_env({"PRESET": "record"}, cuda=True)
    assert c == t.Config() == t.Config.from_env({}, cuda=True)
    spec = """VOCAB_SIZE=0 NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=3
        TIE_EMBEDDINGS=1 ROPE_BASE=10000 ROPE_DIMS=16 LOGIT_SOFTCAP=30 QK_GAIN_INIT=1.5 LN_SCALE=1
        XSA_LAST_N=4 BIGRAM_VOCAB_SIZE=2048 BIGRAM_DIM=128 VE_ENABLED=1 VE_DIM=128 VE_LAYERS=9,10
        ACTIVATION_NEG_SLOPE=0.5 PARALLEL_START_LAYER=7 RECUR_LAYERS=4,5 RECUR_START_STEP=3000
        RECUR_UNTIE_MLP=1 TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048 EVAL_SEQ_LEN=2048
        ITERATIONS=20000 WARMDOWN_ITERS=3500 WARMUP_STEPS=20 MAX_WALLCLOCK_SECONDS=600
        MATRIX_LR=0.025 SCALAR_LR=0.025 TIED_EMBED_LR=0.035 EMBED_LR=0.6 HEAD_LR=0.008
        TIED_EMBED_INIT_STD=0.005 MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92
        MUON_MOMENTUM_WARMUP_STEPS=1500 MUON_BACKEND_STEPS=5 MUON_WD=0.04 ADAM_WD=0.04 BETA1=0.9
        BETA2=0.95 ADAM_EPS=1e-8 GRAD_CLIP_NORM=0.3 EMA_DECAY=0.997 SWA_EVERY=50 MIN_LR=0
        LATE_QAT_THRESHOLD=0.15 EVAL_STRIDE=64 SIZE_LIMIT=16000000 MUON_ROW_NORM=0"""
    written = dict(pair.split("=") for pair in spec.split())
    assert t.Config.from_env(written | {"PRESET": "record"}, cuda=True) == c
    published = t.Config.from_env(written | {"PRESET": "published"}, cuda=True)
    assert published.n_int6_layers == 4
    assert (c.head_dim, c.kv_dim, c.hidden_dim) == (64, 256, 1536)
    assert (c.train_batch_tokens // c.train_seq_len) % 8 == 0
    assert c.train_batch_tokens // 8 == 98_304
    assert c.val_batch_size % (8 * c.eval_seq_len) == 0
    for preset in ("record", "published", "demo"):
        assert t.contradictions(t.Config(**(t.PRESETS[preset] | {"preset": preset}))) == []


def test_preflight_03_model_creation(b_full):
    """The record model has 30,290,797 parameters in 11 layers and two repeats."""
    assert sum(p.numel() for p in b_full.model.parameters()) == 30_290_797
    assert len(b_full.model.blocks) == 11 and len(b_full.model.repeat_mlps) == 2
    assert all(p.dtype == torch.float32 for p in b_full.model.parameters())


def test_preflight_04_forward_and_backward(b_full, capsys):
    """Full width: loss starts at log V, is finite, and falls on a repeated batch."""
    b_report(capsys, f"losses {b_full.losses} gradient norms {b_full.norms}")
    assert all(map(math.isfinite, b_full.losses + b_full.norms))
    assert abs(b_full.losses[0] - math.log(1254)) < 0.1
    assert b_full.losses[2] < b_full.losses[1] < b_full.losses[0]
    for name, p in b_full.model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert torch.isfinite(p).all(), name


def test_preflight_05_code_size(capsys):
    """train_gpt.py is a bounded ASCII file; a record counts the packed file."""
    data = (ROOT / "train_gpt.py").read_bytes()
    b_report(capsys, f"train_gpt.py {len(data)} bytes, {data.count(10)} lines")
    assert data.isascii() and len(data) < 0.02 * t.Config().size_limit


def b_export(c: t.Config, model: t.GPT, folder: Path) -> tuple[int, list, t.GPT]:
    """Export and reload: returned total, logged events and the model from disk."""
    c = replace(c, artifact_path=str(folder / "full.ptz"))
    events = []
    log = SimpleNamespace(line=lambda *a: events.append(a[0]),
                          event=lambda kind, template="", **v: events.append((kind, v)))
    runtime = b_runtime()
    runtime.log = log
    V = model.vocab_size
    val = t.Validation(np.zeros(2, np.uint16), np.ones(1, np.int16), "unverified", "none")
    table = t.ByteTable(np.ones(V, np.int64), np.zeros(V, bool), np.arange(V) == 0, Path("none"))
    total = t.export_model(model, {}, val, runtime, c)
    return total, events, t.load_model(c.artifact_path, val, table, runtime, c)


def test_preflight_06_artifact_size(b_full, tmp_path, capsys, monkeypatch):
    """Full width: every byte of the file is accounted for; the reloaded model is the stored one."""
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda w: w.fill_(math.nan))  # overwritten
    total, events, loaded = b_export(replace(b_full.config, size_limit=1 << 40), b_full.model,
                                     tmp_path)
    path = tmp_path / "full.ptz"
    streams = [v for e in events if e[0] == "stream" for v in [e[1]]]
    head = path.read_bytes()[:46]
    header = 46 + int.from_bytes(head[42:46], "little")
    code = Path(t.__file__).stat().st_size
    assert path.stat().st_size == header + sum(s["bytes"] for s in streams)
    assert total == code + path.stat().st_size
    size = dict(e for e in events if e[0] == "size")["size"]
    assert (size["code"], size["artifact"], size["total"]) == (code, total - code, total)
    rows = {n: p.size(0) for n, p in b_full.model.named_parameters()
            if t.param_spec(n, b_full.config).bits <= 8}
    assert sum(s["weights"] for s in streams) == 30_290_797 + sum(rows.values())
    assert size["floor"] <= size["artifact"] < 1.05 * size["floor"]
    b_report(capsys, f"artifact {size} over 16,000,000: {total - 16_000_000}",
             *(f"{s['name']} {s['bytes']} bytes" for s in streams))
    state = {n: p.detach() for n, p in b_full.model.named_parameters()}
    stored = t.quantize(state, b_full.config)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, stored[name].restore()), name
    assert loaded.recur and not list(tmp_path.glob("*.tmp"))


def test_b_over_the_limit(tmp_path):
    """One byte over SIZE_LIMIT is an error that names it; the weights stay beside, exactly."""
    c = b_config(quant="rtn")
    model = b_model(c)
    total, _, _ = b_export(replace(c, size_limit=1 << 30), model, tmp_path)
    assert b_export(replace(c, size_limit=total), model, tmp_path)[0] == total
    with pytest.raises(t.RunError, match=rf"{total} is 1 bytes over SIZE_LIMIT={total - 1}"):
        b_export(replace(c, size_limit=total - 1), model, tmp_path)
    _, kept = t.read_artifact(str(tmp_path / "full.ptz.fp32"))
    for name, p in model.named_parameters():
        assert torch.equal(kept[name].restore(), p), name


def test_b_export_without_recurrence(tmp_path):
    """A run that ended before recurrence stores no repeats and reloads as the same function."""
    c = b_config(size_limit=1 << 30)
    model = b_model(c, recur=False)
    _, _, loaded = b_export(c, model, tmp_path)
    assert loaded.config.recur_layers == () and not loaded.recur
    assert not any(n.startswith("repeat") for n, _ in loaded.named_parameters())
    model.set_phase(t.Phase(recur=False, qat=True))
    with torch.no_grad():
        gap = (model.logits(b_ids()) - loaded.logits(b_ids())).abs().max()
    assert gap < 2e-2


def b_operations(c, vocab_size, recur):
    """Of a token's forward and backward, by DRY_RUN's cost model; a model without memory."""
    costs = t.step_costs(b_cost_model().record_model(c, vocab_size), 1, recur, 1)
    return sum(operations for part, (operations, _) in costs.items() if part != "optimizer")


def test_preflight_07_step_time_projection(capsys):
    """24 and 28 ms at 989 TFLOP/s; the rest is a report.

    SPEC section 10 has 23 and 27: without the scores that attention's backward computes again.
    """
    c, lines = t.Config(), []
    for recur, at_peak in ((False, 24), (True, 28)):
        work = 98_304 * b_operations(c, 1254, recur)
        ms = {use: 1e3 * work / (use * 989e12) for use in (0.28, 0.38, 0.45, 1.0)}
        shown = " ".join(f"{use:.0%}:{value:.1f}ms" for use, value in ms.items())
        lines.append(f"8xH100 step, recurrence {int(recur)}: {shown}")
        assert round(ms[1.0]) == at_peak
    b_report(capsys, *lines)


def test_preflight_08_quantization_error(b_full, capsys):
    """Relative RMS error of each class is that of its bits on Gaussian rows, not more."""
    bounds = {8: (0.003, 0.012), 6: (0.015, 0.045), 5: (0.03, 0.085), 16: (0, 5e-4), 32: (0, 0)}
    g = torch.Generator().manual_seed(0)
    sums: dict[tuple[str, int], list[float]] = {}
    for name, p in b_full.initial.items():
        w = torch.randn(p.shape, generator=g) * 0.04
        (stored,) = t.quantize({name: w}, b_full.config).values()
        both = sums.setdefault((stored.kind, stored.bits), [0.0, 0.0])
        both[0] += float((stored.restore() - w).double().square().sum())
        both[1] += float(w.double().square().sum())
    lines = []
    for (kind, bits), (error, power) in sums.items():
        relative = math.sqrt(error / power)
        lines.append(f"{kind} {bits} bits: relative RMS error {relative:.5f}")
        low, high = bounds[bits]
        assert low <= relative <= high, (kind, bits, relative)
    b_report(capsys, *lines)
    assert {k for k, _ in sums} == {"embed", "attn", "mlp", "repeat", "projection", "vector"}


def test_preflight_09_scaling(capsys):
    """Operations at the record shape, and how they grow with width, depth and length."""
    c = t.Config()
    off, on = (98_304 * b_operations(c, 1254, r) / 1e12 for r in (False, True))
    assert off == pytest.approx(23.7, rel=0.003) and on == pytest.approx(27.9, rel=0.003)
    plain = replace(c, bigram_vocab_size=0, ve_enabled=False, recur_layers=())
    head = 6 * 512 * 8  # of eight ids, the fewest that are computed
    base = b_operations(plain, 8, False) - head
    wide = {d: b_operations(replace(plain, model_dim=d, train_seq_len=2), 1, False)
            for d in (512, 1024)}
    assert wide[1024] / wide[512] == pytest.approx(4, rel=0.01)  # matrices: quadratic in width
    assert b_operations(replace(plain, num_layers=22), 8, False) - head == 2 * base
    long = b_operations(replace(plain, train_seq_len=4096), 8, False) - head
    assert long - base == 7 * 11 * 2048 * 512
    lines = []
    for width, depth in ((32, 4), (64, 4), (128, 4), (64, 8)):
        k = b_config(model_dim=width, num_layers=depth, parallel_start_layer=depth, ve_layers=(1,),
                     recur_layers=(), train_seq_len=64)
        model, ids = b_model(k), b_ids((4, 65))
        times = []
        for _ in range(3):
            start = torch.tensor(0.0), t.time.perf_counter()
            model(ids[:, :-1], ids[:, 1:]).mean().backward()
            times.append(1e3 * (t.time.perf_counter() - start[1]))
        lines.append(f"width {width} depth {depth}: {min(times):.1f} ms forward and backward")
    b_report(capsys, *lines)


def test_preflight_10_weight_distribution(b_full):
    """Initial spreads at full width, and after two steps: finite, moved, in range."""
    orthogonal = {"q": 512**-0.5, "k": 512**-0.5, "v": 512**-0.5, "up": 1536**-0.5}
    for name, p in b_full.initial.items():
        leaf = name.removesuffix(".weight").split(".")[-1]
        if leaf in orthogonal:
            assert float(p.std()) == pytest.approx(orthogonal[leaf], rel=0.02), name
    assert float(b_full.initial["embed.weight"].std()) == pytest.approx(0.005, rel=0.01)
    assert float(b_full.initial["value.table.weight"].std()) == pytest.approx(0.01, rel=0.01)
    for name, p in b_full.model.named_parameters():
        moved = (p.detach() - b_full.initial[name]).abs()
        assert torch.isfinite(p).all() and moved.max() < 0.2, name
        spec = t.param_spec(name, b_full.config)
        if spec.optimizer == "muon":  # a step's RMS is lr * sqrt(max(1, rows/cols) / max side)
            rms, sides = float(moved.square().mean().sqrt()), sorted(p.shape)
            step = 0.025 * math.sqrt(max(1, p.size(0) / p.size(1)) / sides[1])
            assert 0.2 * step < rms < 2.5 * step, (name, rms / step)  # the batch has low rank
            assert 2e-4 < p.std() < 0.1, name


# ---------------------------------------------------------------------------- compilation

B_SHALLOW = dict(num_layers=2, parallel_start_layer=1, recur_layers=(0,), ve_layers=(0, 1),
                 xsa_last_n=1)
B_PHASES = [t.Phase(recur, qat) for qat in (False, True) for recur in (False, True)]


def b_compile_phases(backend) -> tuple[list, list]:
    """(eager, compiled) losses and gradients of two passes over the four phases."""
    torch._dynamo.reset()
    model = b_model(b_config(**B_SHALLOW))
    if backend == "inductor":  # as a run on CUDA compiles
        compiled = t.Runtime.compile(SimpleNamespace(compiles=True), model)
    else:
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    ids, results = b_ids((2, 17)), ([], [])
    for phase in B_PHASES * 2:
        model.set_phase(phase)
        for out, forward in zip(results, (model, compiled), strict=True):
            model.zero_grad()
            loss = forward(ids[:, :-1], ids[:, 1:]).mean()
            loss.backward()
            out.append((loss.detach(), model.blocks[0].attn.q.weight.grad.clone()))
    return results


def test_b_compiles_to_one_graph_for_each_phase():
    """fullgraph, no recompilation on the second pass, and the result of the eager model."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    eager, compiled = b_compile_phases(counter)
    assert counter.frame_count == len(B_PHASES)
    assert not torch._dynamo.utils.counters["graph_break"]
    for (a, ga), (b, gb) in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        torch.testing.assert_close(ga, gb, atol=1e-6, rtol=0)
    assert len({float(a) for a, _ in eager}) == 4  # the phases are different functions


class BWatch(TorchDispatchMode):
    """Names every operation that hands a tensor's value to the host."""

    asking = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.seen += [name] if name in self.asking else []
        return operation(*args, **(kwargs or {}))


B_SWITCHING = dict(**B_SHALLOW, iterations=10, warmup_steps=4, recur_start_step=3.0,
                   warmdown_iters=6, late_qat_threshold=0.5, micro_batch_tokens=32)


def b_around_steps(trainer, monkeypatch, around) -> None:
    """Run to the end with every step launched by `around(launch, step)`."""
    launch = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda step: around(launch, step))
    trainer.run()
    assert trainer.phase == t.Phase(True, True) and trainer.accumulation > 1
    assert trainer.steps == 10


def test_b_steps_compile_nothing_that_warm_up_has_not(b_make, monkeypatch):
    """One graph for each phase that the schedule visits, all of them before the first step."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, counts = CompileCounter(), []
    monkeypatch.setattr(t.Runtime, "compile", lambda self, module: torch.compile(
        module, fullgraph=True, dynamic=False, backend=counter))

    def around(launch, step):
        launch(step)
        counts.append(counter.frame_count)

    trainer = b_make(**B_SWITCHING)
    b_around_steps(trainer, monkeypatch, around)
    assert set(counts) == {len(trainer.phases())} == {3}


def test_b_nothing_compiles_after_warm_up(b_make, monkeypatch):
    """Validation in every phase, the averaged weights and all scores of the artifact's kind."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, counts = CompileCounter(), []
    monkeypatch.setattr(t.Runtime, "compile", lambda self, module: torch.compile(
        module, fullgraph=True, dynamic=False, backend=counter))
    trainer = b_make(**B_SWITCHING, val_loss_every=2)
    trainer.runtime.compiles = True
    validate, warm_up = trainer.validate, trainer.warm_up
    for name, inner in (("validate", validate), ("warm_up", warm_up)):
        monkeypatch.setattr(trainer, name, lambda inner=inner: (
            inner(), counts.append((trainer.phase, counter.frame_count))))
    trainer.run()
    trainer.finish()
    trainer.evaluator.score(trainer.forward, trainer.config.eval_seq_len)
    t.TTT(trainer.model, trainer.evaluator).score()
    assert {phase for phase, _ in counts} == {*trainer.phases()}
    assert {count for _, count in counts} == {counter.frame_count}
    torch._dynamo.reset()


def test_b_phases_are_those_that_can_occur():
    """Without a clock those of the schedule, in order; with one, all that the settings allow."""
    def phases(**settings):
        trainer = SimpleNamespace(config=b_config(**settings))
        return [tuple(map(int, phase)) for phase in t.Trainer.phases(trainer)]

    late = dict(iterations=20, warmdown_iters=10, late_qat_threshold=0.3)
    assert phases(**late, recur_start_step=5.0) == [(0, 0), (1, 0), (1, 1)]
    assert phases(**late, recur_start_step=19.0) == [(0, 0), (0, 1), (1, 1)]
    assert phases(**late, recur_start_step=0.0) == [(1, 0), (1, 1)]
    late |= dict(max_wallclock_seconds=9.0)
    assert phases(**late, recur_start_step=5.0) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert phases(**late, recur_start_step=0.0) == [(1, 0), (1, 1)]
    assert phases(**late | dict(late_qat_threshold=0.0), recur_layers=()) == [(0, 0)]


@pytest.mark.parametrize("world, nodes", [(1, 1), (3, 1), (8, 2)])
def test_b_each_job_runs_on_one_rank_of_a_node_first(world, nodes):
    """Before the ranks meet every job has run once in each node, then on all the other ranks."""
    ran, local = {}, world // nodes
    for rank in range(world):
        runtime, order = a_runtime(), ran.setdefault(rank, [])
        runtime.local_rank, runtime.local_world = rank % local, local
        runtime.gather = lambda value, order=order: order.append("meet") or [value]
        runtime.in_turns([functools.partial(order.append, job) for job in range(5)])
    for node in range(nodes):
        orders = [ran[rank] for rank in range(node * local, (node + 1) * local)]
        first = [job for order in orders for job in order[: order.index("meet")]]
        assert sorted(first) == [*range(5)]
        assert all(sorted(job for job in order if job != "meet") == [*range(5)]
                   and order.count("meet") == 2 and order[-1] == "meet" for order in orders)


def test_b_handicaps_are_named(monkeypatch):
    """A record's machine has none; each other GPU, attention or lack of a compiler is one."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    runtime = a_runtime()
    runtime.compiles, runtime.compiler, runtime.cuda = True, "inductor", True
    for name in ("flash_attention_3 (installed)", "cudnn (flash_attention_3: none)"):
        runtime.attention_name = name
        assert runtime.handicaps() == []
    runtime.attention_name = "flash (cudnn: none)"
    assert [text.split(",")[0] for text in runtime.handicaps()] == [
        "attention is flash (cudnn: none)"]
    runtime.attention_name, runtime.compiles, runtime.compiler = "cudnn", False, "no Triton"
    assert runtime.handicaps() == ["nothing is compiled (no Triton)"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    assert runtime.handicaps()[0] == "it runs on NVIDIA A100, not on an H100"
    runtime.cuda = False
    assert runtime.handicaps() == ["it runs on a CPU"]


def test_b_steps_never_wait_for_a_value(b_make, monkeypatch):
    """No operation of a step hands a value of the device to the host."""
    watch, adam_step = BWatch(), torch.optim.AdamW.step

    def unwatched(adam):  # its step count lives on the host; on CUDA it is fused and has none
        with torch.utils._python_dispatch._disable_current_modes():
            adam_step(adam)

    def around(launch, step):
        monkeypatch.setattr(torch.optim.AdamW, "step", unwatched)
        with watch:
            launch(step)

    b_around_steps(b_make(**B_SWITCHING), monkeypatch, around)
    assert not watch.seen


def test_b_backward_keeps_the_logits_once_in_bf16():
    """What the compiled forward saves for backward holds no fp32 array of logits."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    saved = []

    def keep_saved(graph, inputs):
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        saved.extend(node.meta["val"] for node in outputs if hasattr(node, "meta"))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    runtime = b_runtime()
    runtime.dtype = torch.bfloat16
    model = t.GPT(b_config(**B_SHALLOW), np.arange(B_VOCAB) == 0, runtime)
    forward = torch.compile(model, fullgraph=True, dynamic=False, backend=aot_autograd(
        fw_compiler=keep_saved, bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition, decompositions=select_decomp_table()))
    ids = b_ids((3, 17), bos=())
    forward(ids[:, :-1], ids[:, 1:]).mean().backward()
    logits = [x.dtype for x in saved if x.numel() == 3 * 16 * len(model.padding)]
    assert logits == [torch.bfloat16]


@pytest.mark.parametrize("name", ["embed", "bigram.table", "value.table"])
def test_b_tables_sum_their_gradients_in_fp32(name):
    """A row that every token reads: in bf16 the sum of its gradients would stop growing."""
    runtime = b_runtime()
    runtime.dtype = torch.bfloat16
    table = t.GPT(b_config(), np.arange(B_VOCAB) == 0, runtime).get_submodule(name)
    out = table(torch.full((4, 1000), 3))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert table.weight.grad.dtype == torch.float32
    assert (table.weight.grad[3] == 4000).all() and table.weight.grad.sum() == 4000 * out.size(-1)


def test_b_a_broken_compiler_means_eager_with_the_reason(monkeypatch):
    """Inductor is probed once on the GPU; the log says what it answered."""
    gpu = torch.device("meta")  # stands for a device that is no CPU

    def broken(function):
        def compiled(x):
            raise RuntimeError("Python.h: no such file\nand a long trace")
        return compiled

    monkeypatch.setattr(torch, "compile", broken)
    works, reason = t.select_compiler(gpu, b_config())
    assert not works and reason == "inductor is broken: Python.h: no such file"
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert t.select_compiler(gpu, b_config()) == (True, "inductor")
    disabled = b_config(torch_compile_disable=True)
    assert t.select_compiler(gpu, disabled) == (False, "TORCH_COMPILE_DISABLE=1")
    assert t.select_compiler(torch.device("cpu"), b_config()) == (False, "no CUDA")


@pytest.mark.slow
def test_b_compilations_of_a_whole_run_fit_the_limit():
    """Training phases, validations in every phase and the reloaded model: no limit is hit."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    c = b_config(**B_SHALLOW)
    model, ids, val = b_model(c), b_ids((2, 17)), b_ids((3, 17), bos=())
    forward = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for phase in B_PHASES:  # warm-up
        model.set_phase(phase)
        forward(ids[:, :-1], ids[:, 1:]).mean().backward()
    for phase in B_PHASES:  # validation in any phase, post_ema
        model.set_phase(phase)
        with torch.inference_mode():
            forward(val[:, :-1], val[:, 1:])
    loaded = b_model(c)
    again = torch.compile(loaded, fullgraph=True, dynamic=False, backend=counter)
    with torch.inference_mode():
        again(val[:, :-1], val[:, 1:])
    assert counter.frame_count <= 9


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_b_inductor_equals_eager():
    """The real compiler on the CPU: losses and gradients of all phases within rounding."""
    eager, compiled = b_compile_phases("inductor")
    for (a, ga), (b, gb) in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ga, gb, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("bits", [5, 6, 8])
def test_b_inductor_keeps_the_export_grid(bits):
    """Compiled fake quantization is the stored grid bit for bit: fp16 scales are not fused away."""
    weight = b_matrices((96, 64))[0]
    scales = t.row_scales(weight, bits)
    stored = t.round_to_grid(weight, scales, bits) * scales
    fake = t.Runtime.compile(SimpleNamespace(compiles=True),
                             lambda w: t.fake_quantize(w, bits))  # fmt: skip
    assert torch.equal(fake(weight), stored)


# ---------------------------------------------------------------------------- cost model


@functools.cache
def b_cost_model():
    """records/cost_model.py as a module."""
    return d_tool("cost_model")


@pytest.mark.parametrize("recur", [False, True])
def test_b_costs_are_those_of_the_model(recur):
    """Matmuls and their operands as run, chains as traced, Newton-Schulz by hand."""
    c, cost = t.Config(), b_cost_model()
    model = cost.record_model(c, 1254)
    costs = t.step_costs(model, 98304, recur, 8)
    assert sum(costs[part][0] for part in ("matrices", "head", "attention")) == pytest.approx(
        27.91e12 if recur else 23.69e12, rel=2e-3)
    seen = []

    def spy(x, weight):
        seen.append(weight.shape)
        return torch.empty(*x.shape[:-1], len(weight), device="meta", dtype=x.dtype)

    model.set_phase(t.Phase(recur))
    for block in model.blocks:
        block.attn.attend = lambda q, k, v: torch.empty_like(q)
    model.register_buffer("rope", torch.empty(3, 2048, 1, 64, device="meta", dtype=torch.bfloat16))
    model.is_boundary = torch.empty(1254, dtype=torch.bool, device="meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.F, "linear", spy)
        model.logits(torch.zeros(1, 4, dtype=torch.long, device="meta"))
    for part, shapes in (("matrices", seen[:-1]), ("head", seen[-1:])):
        assert costs[part] == (98304 * sum(6 * a * b for a, b in shapes),
                               98304 * sum(6 * (a + b) for a, b in shapes))
    traced = sum(chain.fused_bytes() for chain in cost.chains(model, recur))
    assert costs["elementwise"] == (0, 98304 * traced)
    specs = [(p, t.param_spec(name, c).optimizer) for name, p in model.named_parameters()]
    assert costs["optimizer"][0] * 8 == pytest.approx(sum(
        10 * min(p.shape) ** 2 * (2 * max(p.shape) + min(p.shape))
        for p, role in specs if role == "muon"))
    assert costs["average"][1] == 12 * sum(p.numel() for p, _ in specs)


def test_b_cost_of_a_chain_counts_reads_and_writes():
    """By hand: x * y + x of width 6, bf16; fused 3 x inputs + 2 x outputs, eager by operation."""
    cost = b_cost_model()
    chain = cost.Chain("by hand", 5, lambda x, y: x * y + x, (6, 6))
    assert chain.fused_bytes() == 5 * 2 * (3 * 12 + 2 * 6)
    # forward: 3 + 3; backward: two products of 3; one addition of gradients of 3
    assert chain.eager_bytes() == 5 * 2 * 6 * (3 + 3 + 3 + 3 + 3)
    assert all(c.eager_bytes() > c.fused_bytes() > 0 or "add" in c.name or "skip" in c.name
               for c in cost.chains(cost.record_model(t.Config(), 1254), True))


def test_b_cost_model_report_stands():
    """The report's sums are the sums of its rows, and records/ quotes the script's own output."""
    cost, c = b_cost_model(), t.Config()
    lines = cost.report(cost.record_model(c, 1254), 98304, 8)
    rows = [line.split(" | ") for line in lines if re.match(r"\| [a-zE\*]", line)]
    floors = [float(row[3]) for row in rows if len(row) == 5 and re.match(r"[\d.]+$", row[3])]
    sums = [float(row[3].strip("*")) for row in rows if row[0] == "| **sum**"]
    assert len(sums) == 2 and sum(floors) == pytest.approx(sum(sums), abs=0.2)
    assert "\n".join(lines) in (ROOT / "records" / "README.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------- attention


def b_softmax_attention(q, k, v):
    """Explicit causal grouped-query attention, (B, T, heads, K), scale 1 / sqrt(K)."""
    group = q.size(2) // k.size(2)
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.size(-1))
    T = q.size(1)
    scores = scores.masked_fill(~torch.ones(T, T).tril().bool(), -math.inf)
    return torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v)


def b_qkv(groups: int) -> list[torch.Tensor]:
    """Random q, k, v with four query heads."""
    return b_matrices((2, 9, 4, 8), (2, 9, groups, 8), (2, 9, groups, 8))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_b_sdpa_equals_softmax(groups):
    """sdpa is causal grouped-query attention in our layout."""
    q, k, v = b_qkv(groups)
    torch.testing.assert_close(t.sdpa(q, k, v), b_softmax_attention(q, k, v), atol=1e-5, rtol=0)


def test_b_select_attention_on_cpu():
    """Without CUDA the choice is sdpa, and the log's name says why."""
    assert t.select_attention(a_runtime(), t.Config(), 8) == ("sdpa", "no CUDA")
    assert t.use_attention("sdpa") is t.sdpa


def test_b_the_fastest_kernels_are_chosen(monkeypatch):
    """Of those that work the one with the least time; the log's text has every time and reason."""
    missing, c = ImportError("no FA3\nmore"), t.Config()
    chosen = functools.partial(a_choices, monkeypatch, c)
    assert chosen([missing, 2.3, 3.6], [1.8, 1.5]) == (
        "cudnn", "flash_attention_3: no FA3; cudnn 2.30 ms; flash 3.60 ms",
        True, "torch 1.80 ms; triton 1.50 ms")
    assert chosen([2.0, 2.5, 1.5], [1.8, 1.9])[::2] == ("flash", False)
    assert chosen([2.0, 1.92, 1.95], [1.8, 1.72])[::2] == ("flash_attention_3", False)  # noise
    assert chosen([missing] * 3 + [9.0], [1.8, RuntimeError("sm_80")]) == (
        "mem_efficient", "flash_attention_3: no FA3; cudnn: no FA3; flash: no FA3; "
        "mem_efficient 9.00 ms", False, "torch 1.80 ms; triton: sm_80")
    with pytest.raises(t.RunError, match="no attention works on this GPU: .*; math: no FA3"):
        chosen([missing] * 5, [])


@pytest.mark.parametrize("as_tuple", [False, True])
def test_b_flash_attention_3_dispatch(monkeypatch, as_tuple):
    """Dispatch only, the kernel is not executed: a stub module is called, causally."""
    calls = []

    def flash_attn_func(q, k, v, causal=False):
        calls.append(causal)
        out = b_softmax_attention(q, k, v)
        return (out, None) if as_tuple else out

    stub = types.ModuleType("flash_attn_interface")
    stub.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", stub)
    q, k, v = b_qkv(2)
    torch.testing.assert_close(t.flash_attention_3(q, k, v), t.sdpa(q, k, v), atol=1e-5, rtol=0)
    assert calls == [True]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(ImportError):
        t.flash_attention_3(q, k, v)


def b_plain_rotate(x, base, dims):
    """Rotate-half RoPE by slices."""
    angles = torch.outer(torch.arange(x.size(1)), base ** (-torch.arange(0, dims, 2) / dims))
    cos, sin = angles.cos()[:, None].to(x), angles.sin()[:, None].to(x)
    a, b, rest = x.split((dims // 2, dims // 2, x.size(-1) - dims), dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), dim=-1)


def b_plain_exclusion(y, v):
    """XSA by directions of length 1."""
    direction = F.normalize(v, dim=-1).repeat_interleave(y.size(2) // v.size(2), dim=2)
    return y - (y * direction).sum(-1, keepdim=True) * direction


def b_folds():
    """Name -> (as the model computes it, as one would write it down, shapes of their inputs)."""
    c, linear = b_config(rope_dims=6, model_dim=40), t.Linear(8, 12).double()
    rope = t.rope_table(5, c).double().unbind()
    model = t.GPT(b_config(**B_SHALLOW), np.arange(B_VOCAB) == 0, b_runtime()).double()
    torch.nn.init.normal_(model.embed.weight)
    targets, cap = b_ids((2, 5), bos=()), model.config.logit_softcap

    def plain_loss(h):
        logits = cap * torch.tanh(h @ model.embed.weight.T / cap)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")

    return dict(
        scale=(linear, lambda x, scale: scale * linear(x), ((2, 5, 8), (12,))),
        scalars=(lambda x, r: x * t.per_token(r, x), lambda x, r: x * r[:, None],
                 ((2, 5, 3, 8), (3,))),
        rotate=(lambda x: t.rotate(x, rope, 3), lambda x: b_plain_rotate(x, 1e4, 6),
                ((2, 5, 3, 10),)),
        exclusion=(t.exclude_own_value, b_plain_exclusion, ((2, 5, 4, 8), (2, 5, 2, 8))),
        loss=(lambda h: model(targets, targets, h).flatten(), plain_loss,
              ((2, 5, model.config.model_dim),)))


@pytest.mark.parametrize("name", ["scale", "scalars", "rotate", "exclusion", "loss"])
def test_b_folds_equal_what_they_stand_for(name):
    """What is written so that a GPU moves fewer bytes: same values, same gradients."""
    folded, plain, shapes = b_folds()[name]
    assert name != "loss" or B_VOCAB % 8  # its last columns are padding
    results = []
    for function in (folded, plain):
        inputs = [x.double().requires_grad_() for x in b_matrices(*shapes)]
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, out.detach().cos())])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)  # tables and norms are fp32


def test_b_only_training_goes_by_the_mlp_kernel(monkeypatch):
    """Without gradients, as in scores and GPTQ's hooks, PyTorch's operations; in bf16 only."""
    monkeypatch.setattr(t, "fused_mlp", lambda x, up, down, slope: [x @ up.T @ down.T])
    runtime = b_runtime()
    runtime.fused_mlp, runtime.dtype = True, torch.bfloat16
    model = t.GPT(b_config(), np.arange(B_VOCAB) == 0, runtime)
    mlp, (x,) = model.blocks[0].mlp, b_matrices((2, 5, 32))
    torch.nn.init.normal_(mlp.down.weight)
    seen, scale = [], torch.ones(32)
    mlp.down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    linear = mlp(x, scale)
    assert not seen and all(m.fused for m in model.modules() if isinstance(m, t.MLP))
    with torch.no_grad():
        squared = mlp(x, scale)
    assert len(seen) == 1 and not torch.allclose(linear, squared)
    runtime.dtype = torch.float32
    assert not t.GPT(b_config(), np.arange(B_VOCAB) == 0, runtime).blocks[0].mlp.fused


def test_b_exclusive_attention_is_orthogonal():
    """XSA leaves nothing of a head's output along its own value, and nothing else is touched."""
    y, v = b_matrices((2, 5, 4, 8), (2, 5, 2, 8))
    out = t.exclude_own_value(y, v)
    own = F.normalize(v, dim=-1).repeat_interleave(2, dim=2)
    assert (out * own).sum(-1).abs().max() < 1e-5
    removed = y - out
    along = (removed * own).sum(-1, keepdim=True) * own
    torch.testing.assert_close(removed, along, atol=1e-5, rtol=0)


# ==========================================================================================
# retokenize_scylla.py
# ==========================================================================================

# --- helpers --------------------------------------------------------------------------------


def retok_vocabulary(extra: list[bytes]) -> R.Vocabulary:
    """A byte-exact vocabulary of all bytes and some longer tokens, through its YAML form."""
    tokens = [bytes([k]) for k in range(256)] + extra
    return R.load_vocabulary(R.vocabulary_yaml(tokens), "toy.yaml")


RETOK_TOKENS = [b" the", b"the", b"th", b"he", b" t", b"in", b"ing", b" and", b"and", b", ", b". ",
                b" a", b"er", b"on", b"\xc3\xa9", b"123", b"12", b"ation", b"at", b" of the",
                b" of"]
RETOK_WORDS = ("the cat and the hat, 123 things of the nation. caf\u00e9 \u201cquoted\u201d "
               "\u65e5\u672c other moaning rings 42 Zebra_x").split()


def retok_texts(count: int, seed: int = 0) -> list[str]:
    """Random documents of a few words each."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(RETOK_WORDS, rng.integers(1, 60))) for _ in range(count)]


@functools.cache
def retok_model_bytes() -> bytes:
    """A small SentencePiece model of the same kind as SP1024."""
    return R.train_sentencepiece([text.encode() for text in retok_texts(200)], 300)


def retok_write_shard(path: Path, ids, count: int | None = None, magic: int = 20240520) -> None:
    """A shard file, by default a right one."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, 1, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype="<u2").tobytes())


def retok_read_shard(path: Path) -> list[int]:
    """Ids of a shard file, its header checked."""
    header, ids = np.fromfile(path, "<i4", 256), np.fromfile(path, "<u2", offset=1024)
    assert header[:3].tolist() == [20240520, 1, ids.size] and not header[3:].any()
    return ids.tolist()


class RetokCase:
    """A folder with a model, a vocabulary and four input shards whose documents cross borders."""

    def __init__(self, folder: Path, documents: int = 40, shards: int = 4):
        self.folder, self.output = folder, folder / "out"
        (folder / "in").mkdir(parents=True)
        self.model, self.vocab = folder / "sp.model", folder / "toy.yaml"
        self.model.write_bytes(retok_model_bytes())
        self.vocab.write_bytes(retok_vocabulary(RETOK_TOKENS).data)
        self.processor = R.SentencePieceModel(self.model).processor
        self.documents = [[1, *ids] for ids in self.processor.encode(retok_texts(documents, 1))]
        stream = [k for ids in self.documents for k in ids]
        cuts = [round(k * len(stream) / shards) for k in range(shards + 1)]
        starts = np.cumsum([0] + [len(ids) for ids in self.documents])
        for k in range(shards):
            cuts[k] += int(cuts[k] in starts) if k else 0
        for k in range(shards):
            retok_write_shard(self.shard(k), stream[cuts[k]:cuts[k + 1]])
        self.first_of_shard = np.searchsorted(starts[:-1], cuts)

    def shard(self, k: int) -> Path:
        return self.folder / "in" / f"fineweb_train_{k:06d}.bin"

    def arguments(self, *more: str) -> list[str]:
        return ["--sp-shards", str(self.folder / "in" / "*.bin"), "--sp-model", str(self.model),
                "--vocab", str(self.vocab), "--output-dir", str(self.output), "--workers", "1",
                *more]

    def source(self, k: int) -> list[bytes]:
        """Source text of the documents that begin in a shard, by sp.decode."""
        chosen = self.documents[self.first_of_shard[k]:self.first_of_shard[k + 1]]
        return [self.processor.decode(ids).encode() for ids in chosen]


@pytest.fixture
def retok_case(tmp_path: Path) -> RetokCase:
    return RetokCase(tmp_path / "case")


@pytest.fixture
def retok_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Call main in this process, without its signal handlers; returns (exit code, all output)."""
    monkeypatch.setattr(R, "stop_on_signals", lambda: None)

    def run(arguments: list[str]) -> tuple[int, str]:
        code = R.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def retok_folder(path: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included."""
    return {str(file.relative_to(path)): file.read_bytes()
            for file in sorted(path.rglob("*")) if file.is_file()}


def retok_manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def retok_process(arguments: list[str], prelude: str = "", **environment: str) -> subprocess.Popen:
    """The tool in a process of its own, after some statements that disturb it."""
    code = (f"import os, signal, sys, time, resource\nimport retokenize_scylla as R\n{prelude}\n"
            "sys.exit(R.main(sys.argv[1:]))")
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment},
        start_new_session=True)


# --- vocabulary and segmenter ---------------------------------------------------------------


def retok_slow_rune(text: bytes) -> tuple[str, int]:
    """First character and its size, by section 4.2."""
    if not text:
        return "\ufffd", 0
    for size in (1, 2, 3, 4):
        try:
            return text[:size].decode(), size if len(text) >= size else 1
        except UnicodeDecodeError:
            pass
    return "\ufffd", 1


def retok_slow_last(text: bytes) -> str:
    """Last character: the decoding from some start that ends exactly at the end."""
    for size in (1, 2, 3, 4):
        if size <= len(text):
            char, used = retok_slow_rune(text[-size:])
            if used == size and (char != "\ufffd" or text[-size:] == b"\xef\xbf\xbd"):
                return char
    return "\ufffd"


def retok_L(char: str) -> bool:  # noqa: N802
    return unicodedata.category(char) in ("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me")


def retok_N(char: str) -> bool:  # noqa: N802
    return unicodedata.category(char) in ("Nd", "Nl", "No")


def retok_S(char: str) -> bool:  # noqa: N802
    return char.isspace() and char not in "\x1c\x1d\x1e\x1f"


class RetokSlow:
    """Section 4 of SCYLLA.md, line by line, as slow as it likes."""

    def __init__(self, entries: list[bytes]):
        self.id_of = {}
        for k, token in enumerate(entries):
            if 0 < len(token) <= 40:
                self.id_of[token] = k
        self.longest_length = max(map(len, self.id_of))
        self.fields = {token: self.make_fields(token) for token in self.id_of}

    def make_fields(self, t: bytes) -> dict:
        chars, rest = [], t
        while rest:
            char, size = retok_slow_rune(rest)
            chars.append(char)
            rest = rest[size:]
        r, r2 = chars[0], chars[1] if len(chars) > 1 else "\ufffd"
        words, lo, space, starts, oneword = 0, 1, False, False, False
        if r == " ":
            space = True
            if retok_L(r2) or retok_N(r2):
                words, lo = 1, 2
        elif retok_L(r):
            starts = True
        for p, q in zip(chars[1:], chars[2:], strict=False):
            words += p == " " and (retok_L(q) or retok_N(q))
        letters, digits, punct = self.make_kinds(t, r, r2, chars[2:])
        z = retok_slow_last(t)
        if lo == 2 and retok_L(z) and letters and words == 1:
            oneword = True
        if lo == 2 and words <= 1:
            lo = 1
        return {"words": words, "space": space, "starts": starts, "ends": retok_L(z),
                "oneword": oneword, "same": letters or digits or punct,
                "alternatives": self.make_alternatives(t, lo)}

    @staticmethod
    def make_kinds(t: bytes, r: str, r2: str, further: list[str]) -> tuple[bool, bool, bool]:
        letters = digits = punct = False
        if len(t) == 1:
            punct = True
        elif (r == " " or retok_L(r)) and retok_L(r2):
            letters = True
        elif (r == " " or retok_N(r)) and retok_N(r2):
            digits = True
        elif not any(retok_L(char) or retok_N(char) for char in (r, r2)):
            punct = True
        for q in further:
            if retok_L(q):
                punct = digits = False
            elif retok_N(q):
                punct = letters = False
            elif q != " ":
                letters = digits = False
        return letters, digits, punct

    def make_alternatives(self, t: bytes, lo: int) -> list[bytes]:
        a, b = (0, 0, b""), (0, 0, b"")
        for k in range(len(t) - 1, lo - 1, -1):
            if t[:k] not in self.id_of:
                continue
            priority = self.priority(t, k)
            if a[0] < b[0] or (a[0] == b[0] and a[1] <= b[1]):
                a = (priority, k, t[:k]) if a[0] < priority else a
            else:
                b = (priority, k, t[:k]) if b[0] < priority else b
        if b[2] and (b[0] > a[0] or (b[0] == a[0] and b[1] > a[1])):
            a, b = b, a
        return [slot[2] for slot in (a, b) if slot[2]]

    @staticmethod
    def priority(t: bytes, k: int) -> int:
        x, y = retok_slow_last(t[:k]), retok_slow_rune(t[k:])[0]
        after = retok_slow_rune(t[k + 1:])[0]
        if k <= len(t) - 2 and t[k:k + 1] == b" " and (retok_L(after) or retok_N(after)):
            return 10
        if (not retok_L(x) and x != "_" and (retok_L(y) or y == "_")) or (
                not retok_N(x) and retok_N(y)):
            return 9
        if ((retok_L(x) or x == "_") and not retok_L(y) and y != "_") or (
                retok_N(x) and not retok_N(y)):
            return 9
        if retok_S(x) and not retok_S(y):
            return 7
        return 8 if not retok_S(x) and retok_S(y) else 1

    @functools.cache  # noqa: B019
    def byte_class(self, value: int) -> int:
        counts = {1: 0, 12: 0, 10: 0, 0: 0}
        for token in self.id_of:
            if token[0] == value:
                r = retok_slow_rune(token)[0]
                counts[12 if r == " " else 1 if retok_L(r) else 0 if retok_N(r) else 10] += 1
        for kind, count in counts.items():
            if count > 2 and 2 * count > sum(counts.values()):
                return kind
        return 0

    def longest(self, data: bytes) -> bytes:
        return next((data[:k] for k in range(min(self.longest_length, len(data)), 0, -1)
                     if data[:k] in self.id_of), b"")

    def value(self, t: bytes, c: bytes, data: bytes) -> int | None:
        """Score of candidate c for the longest token t, data beginning at both."""
        s = self.longest(data[len(c):])
        if not s:
            return None
        q = len(c) + len(s)
        nb = self.byte_class(data[q]) if q < len(data) else 0
        f, g = self.fields[c], self.fields[s]
        v = (len(c) + len(s) + f["same"] + g["same"] + max(0, f["words"] - 1)
             + max(0, g["words"] - 1) + g["space"] + (nb == 12)
             + 100 * (f["words"] + g["words"] + (nb in (10, 12)))
             - 103 * (f["ends"] and g["starts"]) - 3 * (g["ends"] and nb == 1))
        if c != t:
            v -= 100 if q < len(t) else 10000 if q == len(t) else 0
        return v

    def encode(self, data: bytes) -> list[int]:
        ids = []
        while data:
            t = choice = self.longest(data)
            f = self.fields[t]
            rest = data[len(t):]
            if rest and not (f["oneword"] and self.byte_class(rest[0]) == 12):
                best = -1000000
                for c in [t, *f["alternatives"]]:
                    v = self.value(t, c, data)
                    if v is not None and v > best:
                        best, choice = v, c
            ids.append(self.id_of[choice])
            data = data[len(choice):]
        return ids


RETOK_ATOMS = [b" ", b"  ", b"a", b"b", b"Z", b"the", b" a", b"1", b"23", b".", b",", b"_", b"'",
               b"\n", b"\t", "\u00e9".encode(), "\u0301".encode(), "\u4e2d".encode(), b"\xe4\xb8",
               b"\xff",
               b"\x80", "\u00a0".encode(), "\u0663".encode(), b"\xed\xa0\x80", b"\xc0\xaf",
               "\U0001f600".encode(), b"\xef\xbf\xbd", b"\x1c"]


def retok_draw(rng: random.Random, pieces: list[bytes], most: int) -> bytes:
    """A few random pieces in a row."""
    return b"".join(rng.choices(pieces, k=rng.randint(1, most)))


@pytest.mark.parametrize("seed", range(8))
def test_retok_segmenter_agrees_with_the_page_on_random_vocabularies(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        retok_check_random_vocabulary(rng)


def retok_check_random_vocabulary(rng: random.Random) -> None:
    """One vocabulary and thirty documents: the page's ids, lossless, whatever stands beside."""
    atoms = rng.sample(RETOK_ATOMS, 6) + [b" ", b"a", bytes([rng.randrange(256)])]
    tokens = [retok_draw(rng, atoms, 7) for _ in range(rng.randrange(13))] + [b" a", b" aa", b"."]
    tokens += [token[:rng.randint(1, len(token))] for token in tokens for _ in range(4)]
    entries = [bytes([k]) for k in range(256)] + tokens
    documents = [retok_draw(rng, tokens + atoms, 12) for _ in range(30)] + [rng.randbytes(30), b""]
    vocabulary = R.load_vocabulary(R.vocabulary_yaml(entries), "random.yaml")
    engine, slow = R.ScyllaEngine(vocabulary), RetokSlow(entries)
    block = engine.encode_documents(documents)
    for k, document in enumerate(documents):
        ids = block.ids[block.starts[k]:block.starts[k + 1]].tolist()
        assert ids == [vocabulary.bos_id, *slow.encode(document)]
        assert b"".join(entries[identity] for identity in ids[1:]) == document
        assert engine.segmenter.encode(document) == ids[1:]


def test_retok_fields_of_the_page() -> None:
    rng = random.Random(9)
    for _ in range(3000):
        token = retok_draw(rng, RETOK_ATOMS, 5)
        for cut in range(1, len(token)):
            assert R.cut_priority(token, cut) == RetokSlow.priority(token, cut), (token, cut)
    assert [R.cut_priority(b"._ .", cut) for cut in (1, 2, 3)] == [9, 9, 7]
    assert R.cut_priority(b". .", 1) == 8 and R.cut_priority(b". a", 1) == 10
    letters = [b"\xc3\xa9", b"\xc3\xa9a", b"\xc3\xa9b"]
    others = [b"\xc3", b"\xc3 ", b"\xc3."]
    for keys, kind in ((letters + others, 0), (letters + others[:2], R.LETTER_CLASS),
                       (letters[:2] + others, R.OTHER_CLASS), (letters[:2], 0)):
        assert R.byte_classes(dict.fromkeys(keys, 0))[0xC3] == kind


@needs_shared
@pytest.mark.parametrize("name", ["scylla1254.jsonl", "scylla1254_spdec.jsonl"])
def test_retok_vectors_id_for_id(name: str) -> None:
    segmenter = R.Segmenter(R.load_vocabulary(SHARED / "data" / "scylla.yaml"))
    for line in (SHARED / "vectors" / name).read_text().splitlines():
        vector = json.loads(line)
        assert segmenter.encode(base64.b64decode(vector["text_b64"])) == vector["ids"], (
            vector["name"])


@needs_shared
def test_retok_published_vocabulary_and_its_byte_table() -> None:
    vocabulary = R.load_vocabulary(SHARED / "data" / "scylla.yaml")
    assert (vocabulary.vocab_size, vocabulary.bos_id, vocabulary.lossy) == (1254, 1253, "")
    published = np.load(SHARED / "data" / "scylla.meta.npz")
    np.testing.assert_array_equal(vocabulary.base_bytes(), published["base_bytes"])
    classes = R.byte_classes({token: k for k, token in enumerate(vocabulary.tokens) if token})
    of_class = [bytes(np.flatnonzero(classes == kind).tolist()) for kind in (1, 2, 3)]
    assert of_class == [b"CDWabcdefgiklmnopqrstuvwy", b"\n),-.:\\_{\xe2", b" "]


def test_retok_yaml_scalars_duplicates_and_hex() -> None:
    lines = ["charset: none", "capcode: 0", "normalization: 'none'", "training-param: 3", "tokens:"]
    scalars = ['"\\x41\\n\\"\\\\\\u00e9"', "'it''s'", "plain", '"TokenMonsterHexEncode{ff00}"',
               '""', f'"{"x" * 41}"', "plain"]
    scalars += [f'"TokenMonsterHexEncode{{{value:02x}}}"' for value in range(256)]
    for k, scalar in enumerate(scalars):
        lines += [f"    - token:   {scalar}", f"      id:      {k}", "      score:   0.1"]
    vocabulary = R.load_vocabulary("\n".join(lines).encode(), "scalars.yaml")
    assert vocabulary.tokens[:7] == (b'A\n"\\\xc3\xa9', b"it's", b"", b"\xff\0", b"", b"", b"plain")
    assert (vocabulary.vocab_size, vocabulary.lossy) == (264, "")
    awkward = [b'a"\\b', b"TokenMonsterHexEncode{41}", b"'", b" # x: y", b"\x85\xe2\x80\xa8", b"\n"]
    again = R.load_vocabulary(R.vocabulary_yaml(awkward))
    assert again.tokens == (*awkward, b"") and "no token for" in again.lossy


@pytest.mark.parametrize(("data", "message"), [
    (b"\xff\xfe\x00 nothing", "neither a TokenMonster YAML"),
    (b"tokens:\n    - token: \"a\n      id: 0\n", "unclosed quote"),
    (b"tokens:\n    - token: \"\\q\"\n      id: 0\n", "is not YAML"),
    (b"tokens:\n    - token: a\n      id: 1\n", "ids must be 0..0"),
    (b"tokens:\n    - token: a\n", "needs a token and a numeric id"),
    (b"{\"model\": 1}\n", "cannot read the line"),
    (b"charset: none\n", "0 tokens"),
    (b"\x02\x07" + bytes(30), "charset 7"),
])
def test_retok_unknown_vocabulary_is_refused_by_name(tmp_path: Path, data: bytes, message: str
                                                     ) -> None:
    path = tmp_path / "strange.yaml"
    path.write_bytes(data)
    with pytest.raises(R.InputError, match="strange.yaml.*unknown vocabulary") as error:
        R.load_vocabulary(path)
    assert message in str(error.value)


# --- SentencePiece table --------------------------------------------------------------------


def retok_check_table(model: R.SentencePieceModel, documents: list[list[int]]) -> None:
    ids = np.array([k for document in documents for k in document], dtype=np.uint16)
    text, starts = model.decode(ids, R.document_starts(ids, model.bos_id))
    for k, document in enumerate(documents):
        assert text[starts[k]:starts[k + 1]].tobytes().decode() == model.processor.decode(document)


def test_retok_table_equals_sp_decode_on_random_ids(tmp_path: Path) -> None:
    (tmp_path / "sp.model").write_bytes(retok_model_bytes())
    model = R.SentencePieceModel(tmp_path / "sp.model")
    assert model.table is not None
    rng = np.random.default_rng(1)
    space = model.processor.piece_to_id(R.SPACE_MARK)
    special = [0, 2, 3, space, space, 299, *(4 + k for k in (0xE2, 0x80, 0x99, 0xF0, 0xC0, 0, 65))]
    documents = [[1, *rng.choice(special, rng.integers(0, 9)).tolist()] for _ in range(3000)]
    documents += [[1, *(k for k in rng.integers(0, 300, 12).tolist() if k != 1)]
                  for _ in range(1000)]
    retok_check_table(model, documents)


@pytest.mark.parametrize("options", [{"remove_extra_whitespaces": False},
                                     {"add_dummy_prefix": False}])
def test_retok_table_follows_the_normalizer_of_the_model(tmp_path: Path, options: dict) -> None:
    import sentencepiece
    with open(tmp_path / "other.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(retok_texts(100)), model_writer=file, vocab_size=300, pad_id=0,
            model_type="bpe", byte_fallback=True, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
            **options)
    model = R.SentencePieceModel(tmp_path / "other.model")
    space = model.processor.piece_to_id(R.SPACE_MARK)
    rng = np.random.default_rng(2)
    retok_check_table(model, [[1, *rng.choice([space, 0, 299, 298, 290, 69], 5).tolist()]
                              for _ in range(300)])


@needs_shared
def test_retok_table_equals_sp_decode_on_every_real_document() -> None:
    model = R.SentencePieceModel(SHARED / "data" / "fineweb_1024_bpe.model")
    lines = (SHARED / "data" / "fineweb_docs.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    documents = [[1, *ids] for ids in model.processor.encode(texts)]
    assert len(documents) == 120 and model.table is not None
    retok_check_table(model, documents)
    odd = model.table.join(np.concatenate(documents).astype(np.uint16), np.array(
        np.cumsum([0] + [len(ids) for ids in documents])))[2]
    assert not odd.any(), "real documents need no fall-back"


# --- shards, ledger -------------------------------------------------------------------------


def retok_check_output(case: RetokCase, shards: int = 4) -> None:
    """Every output shard decodes to the documents that begin in its input shard, and so counts."""
    vocabulary = R.load_vocabulary(case.vocab)
    slow = RetokSlow([bytes([k]) for k in range(256)] + RETOK_TOKENS)
    manifest, total = retok_manifest(case.output), dict.fromkeys(R.COUNTS, 0)
    assert sorted(manifest["shards"]) == [case.shard(k).name for k in range(shards)]
    base = np.load(case.output / "scylla.meta.npz")["base_bytes"]
    for k in range(shards):
        path, source = case.output / case.shard(k).name, case.source(k)
        ids = retok_read_shard(path)
        assert ids == [i for text in source for i in [vocabulary.bos_id, *slow.encode(text)]]
        entry, size = manifest["shards"][path.name], sum(map(len, source))
        assert entry["sha256"] == R.file_sha256(path) and entry["status"] == "exact"
        counts = {"tokens": len(ids), "documents": len(source), "source_bytes": size,
                  "decoded_bytes": size, "bad_documents": 0}
        assert {key: entry[key] for key in R.COUNTS} == counts
        assert size == base[ids].sum(dtype=np.int64)
        total = {key: total[key] + counts[key] for key in R.COUNTS}
    assert manifest["totals"]["all"] == manifest["totals"]["train"] == total


def test_retok_shards_with_documents_across_borders(retok_case: RetokCase, retok_run,
                                                    monkeypatch) -> None:
    monkeypatch.setattr(R, "BLOCK_IDS", 97)
    code, text = retok_run(retok_case.arguments())
    assert code == 0 and "4 made" in text and "exact" in text
    assert all(retok_read_shard(retok_case.shard(k))[0] != 1 for k in (1, 2, 3)), "must cross"
    retok_check_output(retok_case)
    manifest = retok_manifest(retok_case.output)
    assert manifest["tokenizer"] == {
        "kind": "tokenmonster", "path": "toy.yaml", "sha256": R.file_sha256(retok_case.vocab),
        "vocab_size": 278, "byte_exact": True, "bos_id": 277}
    assert manifest["source"] == {"kind": "sp-shards",
                                  "model_sha256": R.file_sha256(retok_case.model)}
    meta = np.load(retok_case.output / "scylla.meta.npz")
    assert meta["is_boundary_token"].nonzero()[0].tolist() == [277]
    assert not meta["has_leading_space"].any() and meta["base_bytes"].dtype == np.int16
    assert (int(meta["format_version"]), str(meta["tokenizer_kind"]), int(meta["vocab_size"])) == (
        1, "tokenmonster", 278)
    assert (retok_case.output / "toy.yaml").read_bytes() == retok_case.vocab.read_bytes()


def test_retok_document_longer_than_a_shard(tmp_path: Path, retok_run) -> None:
    case = RetokCase(tmp_path / "long", documents=1, shards=3)
    assert retok_run(case.arguments())[0] == 0
    retok_check_output(case, shards=3)
    assert retok_read_shard(case.output / case.shard(1).name) == []


def test_retok_invalid_utf8_documents_take_the_slow_way(retok_case: RetokCase, retok_run) -> None:
    retok_case.documents = [[1, 4 + 0xE2, 4 + 0x80, 290], [1, 291, 4 + 0xFF, 292], [1], [1, 290]]
    for path in (retok_case.folder / "in").iterdir():
        path.unlink()
    retok_write_shard(retok_case.shard(0), [k for ids in retok_case.documents for k in ids])
    retok_case.first_of_shard = [0, 4]
    assert retok_run(retok_case.arguments())[0] == 0
    retok_check_output(retok_case, shards=1)
    assert b"\xef\xbf\xbd" in retok_case.source(0)[0]


@needs_shared
def test_retok_real_documents_are_exact_to_the_byte(tmp_path: Path, retok_run) -> None:
    data = SHARED / "data"
    model = ["--sp-model", data / "fineweb_1024_bpe.model"]
    code, _ = retok_run(["--docs", data / "fineweb_docs.jsonl", "--split", "val", *model,
                         "--output-dir", tmp_path / "sp", "--workers", "1"])
    assert code == 0
    ids = retok_read_shard(tmp_path / "sp" / "fineweb_val_000000.bin")
    for k, cut in enumerate([0, 100_001, 250_003]):
        end = [100_001, 250_003, len(ids)][k]
        (tmp_path / "in").mkdir(exist_ok=True)
        retok_write_shard(tmp_path / "in" / f"fineweb_val_{k:06d}.bin", ids[cut:end])
    code, _ = retok_run(["--sp-shards", tmp_path / "in" / "*.bin", *model, "--vocab",
                         data / "scylla.yaml", "--output-dir", tmp_path / "out", "--workers", "1"])
    totals = retok_manifest(tmp_path / "out")["totals"]["val"]
    base = np.load(tmp_path / "out" / "scylla.meta.npz")["base_bytes"]
    counted = sum(int(base[retok_read_shard(path)].sum(dtype=np.int64))
                  for path in (tmp_path / "out").glob("*.bin"))
    processor = R.SentencePieceModel(model[1]).processor
    texts = [json.loads(line)["text"]
             for line in (data / "fineweb_docs.jsonl").read_text().splitlines()]
    source = sum(len(processor.decode(ids).encode()) for ids in processor.encode(texts))
    assert code == 0 and totals["documents"] == 120 and totals["bad_documents"] == 0
    assert totals["source_bytes"] == totals["decoded_bytes"] == counted == source
    sp_totals = retok_manifest(tmp_path / "sp")["totals"]["val"]
    assert sp_totals["source_bytes"] == sp_totals["decoded_bytes"] == source


def test_retok_wrong_segmentation_is_never_published(retok_case: RetokCase, retok_run,
                                                     monkeypatch) -> None:
    original = R.Segmenter.segment

    def damaged(self, text, starts):
        ids = original(self, text, starts)
        ids[np.flatnonzero(ids < 256)[-1]] ^= 1  # another token of the same length
        return ids

    monkeypatch.setattr(R.Segmenter, "segment", damaged)
    code, text = retok_run(retok_case.arguments())
    assert code == 1 and "does not decode to its source" in text
    assert not list(retok_case.output.glob("*.bin"))


# --- restart, signals -----------------------------------------------------------------------


def test_retok_restart_skips_what_is_finished_and_redoes_the_rest(retok_case: RetokCase, retok_run
                                                                  ) -> None:
    assert retok_run(retok_case.arguments())[0] == 0
    before = retok_folder(retok_case.output)
    stamps = {path.name: path.stat().st_ino for path in retok_case.output.glob("*.bin")}
    code, text = retok_run(retok_case.arguments())
    assert code == 0 and "0 made, 4 skipped" in text
    assert stamps == {path.name: path.stat().st_ino for path in retok_case.output.glob("*.bin")}
    shards = [retok_case.output / retok_case.shard(k).name for k in range(4)]
    data = bytearray(shards[0].read_bytes())
    data[2000] ^= 1
    shards[0].write_bytes(data)
    shards[1].unlink()
    (retok_case.output / ".ledger" / f"{shards[2].name}.json").write_text("torn {")
    code, text = retok_run(retok_case.arguments())
    assert code == 0 and "3 made, 1 skipped" in text
    assert retok_folder(retok_case.output) == before


def test_retok_restart_redoes_changed_sources_and_vocabularies(retok_case: RetokCase, retok_run
                                                               ) -> None:
    retok_run(retok_case.arguments())
    last = retok_read_shard(retok_case.shard(3))
    retok_write_shard(retok_case.shard(3), last[:-1])
    assert "1 made, 3 skipped" in retok_run(retok_case.arguments())[1]
    retok_write_shard(retok_case.shard(3), [299, *last[1:]])
    assert "1 made, 3 skipped" not in retok_run(retok_case.arguments())[1], "2 has its tail there"
    retok_case.vocab.write_bytes(retok_vocabulary(RETOK_TOKENS[:5]).data)
    assert "4 made, 0 skipped" in retok_run(retok_case.arguments())[1]


RETOK_KILL = """
def kill_at(owner, name, number, after=False):
    original, calls = getattr(owner, name), []
    def patched(*arguments, **options):
        calls.append(1)
        if len(calls) == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if len(calls) == number and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, patched)
"""


@pytest.mark.parametrize("point", [
    'R.ShardWriter, "append", 2', 'R.ShardWriter, "seal", 1', 'os, "fsync", 1', 'os, "replace", 1',
    'os, "replace", 1, True', 'os, "replace", 2', 'os, "replace", 3, True', 'os, "replace", 6',
    'R, "put_tokenizer", 1'])
def test_retok_killed_at_any_point_ends_byte_identical(retok_case: RetokCase, retok_run, point: str
                                                       ) -> None:
    retok_run(retok_case.arguments())
    undisturbed = retok_folder(retok_case.output)
    retok_case.output = retok_case.folder / "killed"
    process = retok_process(retok_case.arguments(), RETOK_KILL + f"kill_at({point})")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert retok_folder(retok_case.output) != undisturbed
    if (retok_case.output / "manifest.json").exists():
        for name, entry in retok_manifest(retok_case.output)["shards"].items():
            assert R.file_sha256(retok_case.output / name) == entry["sha256"]
    assert retok_run(retok_case.arguments())[0] == 0
    assert retok_folder(retok_case.output) == undisturbed


def test_retok_manifest_is_right_when_a_redo_is_killed(retok_case: RetokCase, retok_run) -> None:
    retok_run(retok_case.arguments())
    retok_write_shard(retok_case.shard(3), retok_read_shard(retok_case.shard(3))[:-1] + [290])
    point = 'kill_at(os, "replace", 2, True)'  # the first is the manifest's without the shard
    process = retok_process(retok_case.arguments(), RETOK_KILL + point)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    shards = retok_manifest(retok_case.output)["shards"]
    assert len(shards) == 3 and all(
        R.file_sha256(retok_case.output / name) == entry["sha256"]
        for name, entry in shards.items())
    assert "1 made, 3 skipped" in retok_run(retok_case.arguments())[1]
    assert len(retok_manifest(retok_case.output)["shards"]) == 4


RETOK_SLOW_APPEND = """
original = R.ShardWriter.append
def slow(self, block):
    original(self, block)
    print("appended", file=sys.stderr, flush=True)
    time.sleep(60)
R.ShardWriter.append = slow
"""


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_retok_stop_leaves_no_partial_output(retok_case: RetokCase, retok_run, workers: str,
                                             signum: signal.Signals) -> None:
    process = retok_process(retok_case.arguments("--workers", workers), RETOK_SLOW_APPEND)
    assert "appended" in process.stderr.readline()
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    _, error = process.communicate(timeout=30)
    assert not list(retok_case.output.glob("*.bin"))
    if signum == signal.SIGKILL:
        assert process.returncode == -signum
    else:
        assert process.returncode == 128 + signum and "stopped" in error
        assert "Traceback" not in error
        assert [p.name for p in (retok_case.output / ".ledger").iterdir()] == ["lock"]
    assert retok_run(retok_case.arguments())[0] == 0
    assert not list((retok_case.output / ".ledger").glob("*.part"))
    retok_check_output(retok_case)


def test_retok_stop_between_making_and_guarding(retok_case: RetokCase, retok_run, monkeypatch
                                                ) -> None:
    """A partial file that nothing guards yet is cleared by the stop itself."""
    part = R.OutputFolder.part

    def stopped(self, name):
        file, path = part(self, name)
        if name.endswith(".bin"):
            file.close()
            raise R.Stopped(int(signal.SIGTERM))
        return file, path

    monkeypatch.setattr(R.OutputFolder, "part", stopped)
    assert retok_run(retok_case.arguments("--workers", "1"))[0] == 128 + signal.SIGTERM
    assert not list((retok_case.output / ".ledger").glob("*.part"))


# --- workers, ranks -------------------------------------------------------------------------


def test_retok_workers_and_ranks_make_the_same_folder(retok_case: RetokCase, retok_run, monkeypatch
                                                      ) -> None:
    retok_run(retok_case.arguments())
    alone = retok_folder(retok_case.output)
    retok_case.output = retok_case.folder / "workers"
    assert retok_run(retok_case.arguments("--workers", "3"))[0] == 0
    assert retok_folder(retok_case.output) == alone
    retok_case.output = retok_case.folder / "ranks"
    for rank in ("1", "0"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        code, text = retok_run(retok_case.arguments())
        assert code == 0 and "2 made, 0 skipped" in text
    assert retok_folder(retok_case.output) == alone
    monkeypatch.setenv("RANK", "2")
    code, text = retok_run(retok_case.arguments())
    assert code == 1 and "RANK=2" in text


def test_retok_manifest_grows_over_invocations(retok_case: RetokCase, retok_run) -> None:
    source = retok_case.folder / "val.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in retok_texts(5)))
    documents = ["--docs", source, "--split", "val", "--vocab", retok_case.vocab, "--workers", "1",
                 "--output-dir", retok_case.output]
    assert retok_run(documents)[0] == 0 and retok_run(retok_case.arguments())[0] == 0
    manifest = retok_manifest(retok_case.output)
    assert len(manifest["shards"]) == 5 and manifest["source"]["kind"] == "mixed"
    totals = manifest["totals"]
    assert totals["val"]["documents"] == 5 and totals["train"]["documents"] == 40
    assert all(totals["all"][key] == totals["val"][key] + totals["train"][key] for key in R.COUNTS)
    retok_case.vocab.write_bytes(retok_vocabulary(RETOK_TOKENS[:5]).data)
    code, text = retok_run(documents)
    assert code == 1 and "fineweb_train_000000.bin: was made with another vocabulary" in text


def test_retok_manifest_sees_entries_that_come_while_it_is_written(tmp_path: Path, monkeypatch
                                                                   ) -> None:
    folder = R.OutputFolder(tmp_path / "out")
    entry = {**dict.fromkeys(R.COUNTS, 0), "identity": {"kind": "docs", "model_sha256": None}}
    original = R.OutputFolder.put

    def late(self, target, data):
        original(self, target, data)
        if target.name == "manifest.json" and not (self.path / "b.bin").exists():
            retok_write_shard(self.path / "b.bin", [])
            self.record("b.bin", entry)

    monkeypatch.setattr(R.OutputFolder, "put", late)
    folder.publish({})
    assert list(retok_manifest(folder.path)["shards"]) == ["b.bin"]


def test_retok_a_dying_worker_is_reported(retok_case: RetokCase) -> None:
    prelude = "R.ShardWriter.append = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    process = retok_process(retok_case.arguments("--workers", "2"), prelude)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "worker process died (exit code -9" in error
    assert not list(retok_case.output.glob("*.bin"))


# --- bad input ------------------------------------------------------------------------------


def retok_append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


RETOK_DAMAGE = {
    "truncated": (lambda case: os.truncate(case.shard(1), 1500),
                  "fineweb_train_000001.bin: truncated"),
    "no header": (lambda case: os.truncate(case.shard(1), 100), "100 bytes are less than the 1024"),
    "magic": (lambda case: retok_write_shard(case.shard(1), [1, 5], magic=7), "magic 7"),
    "count": (lambda case: retok_write_shard(case.shard(1), [1, 5], count=1),
              "too long: the header counts 1 tokens, the file holds 2"),
    "odd length": (lambda case: retok_append(case.shard(0), b"x"), "too long"),
    "range": (lambda case: retok_write_shard(case.shard(3), [1, 5, 300]),
              "fineweb_train_000003.bin: id 300 is out of range: the model has 300 ids"),
    "no BOS": (lambda case: case.shard(0).unlink(), "fineweb_train_000001.bin: the first id is"),
    "gap": (lambda case: case.shard(2).unlink(),
            "fineweb_train_000003.bin: the shard before it is missing"),
    "empty shard": (lambda case: retok_write_shard(case.shard(0), []), "empty source"),
    "no shard": (lambda case: [case.shard(k).unlink() for k in range(4)],
                 "empty source: no file matches"),
    "no model": (lambda case: case.model.unlink(), "sp.model: no such SentencePiece model"),
    "bad model": (lambda case: case.model.write_bytes(b"x"), "not a SentencePiece model"),
    "no vocabulary": (lambda case: case.vocab.unlink(), "toy.yaml: no such vocabulary"),
    "output": (lambda case: case.output.write_text("a file"), "cannot write the output folder"),
    "duplicate": (lambda case: ((case.folder / "in" / "x.bin").mkdir(), retok_write_shard(
        case.folder / "in" / "x.bin" / case.shard(0).name, [1])), "duplicate shard name"),
    "in place": (lambda case: (case.shard(0).rename(case.folder / "a_0.bin"), setattr(
        case, "output", case.folder / "in")), "is the folder of the input"),
}


@pytest.mark.parametrize("kind", RETOK_DAMAGE)
def test_retok_bad_shards_are_refused_by_name(retok_case: RetokCase, retok_run, kind: str) -> None:
    damage, message = RETOK_DAMAGE[kind]
    damage(retok_case)
    arguments = retok_case.arguments()
    if kind == "duplicate":
        arguments[1] = str(retok_case.folder / "in" / "**" / "fineweb*.bin")
        (retok_case.folder / "in" / "y").mkdir()
        retok_write_shard(retok_case.folder / "in" / "y" / retok_case.shard(0).name, [1])
    before = {path: path.read_bytes() for path in (retok_case.folder / "in").glob("*.bin")
              if path.is_file()}
    code, text = retok_run(arguments)
    assert code == 1 and message in text and text.startswith("error: "), text
    assert {path: path.read_bytes() for path in before} == before, "the input is never touched"
    if kind in ("output", "in place"):
        return
    ledger = retok_case.output / ".ledger"
    assert not list(ledger.glob("*.part"))
    finished = {path.name for path in retok_case.output.glob("*.bin")}
    assert finished == {path.name[:-5] for path in ledger.glob("*.json")}
    assert not finished or kind == "range"


def test_retok_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    retok_case = RetokCase(tmp_path / "case", documents=200)
    prelude = "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))"
    process = retok_process(retok_case.arguments(), prelude)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "make room and run again" in error
    assert "cannot write" in error and "fineweb_train_000000.bin" in error
    assert [path.name for path in retok_case.output.iterdir()] == [".ledger"]
    assert [path.name for path in (retok_case.output / ".ledger").iterdir()] == ["lock"]


@pytest.mark.parametrize(("lines", "message"), [
    ("", "empty source: no documents"), ("{\"text\": 3}\n", "bad.jsonl:1: no string \"text\""),
    ("{\"text\": \"a\"}\n\n{\"body\": \"a\"}\n", "bad.jsonl:3: no \"text\""),
    ("{\"text\": \"a\n", "bad.jsonl:1: not JSON"), ("[1]\n", "no string \"text\""),
    ("{\"text\": \"a\\ud800\"}\n", "lone surrogate at character 1")])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_retok_bad_documents_are_refused_by_line(retok_case: RetokCase, retok_run, lines: str,
                                                 message: str, workers: str) -> None:
    path = retok_case.folder / "bad.jsonl"
    path.write_text(lines)
    code, text = retok_run(["--docs", path, "--vocab", retok_case.vocab, "--output-dir",
                            retok_case.output, "--workers", workers])
    assert code == 1 and message in text
    assert not list(retok_case.output.glob("*.bin"))


# --- documents ------------------------------------------------------------------------------


def retok_compress(data: bytes, suffix: str) -> bytes:
    """Data as a file of that suffix would hold it, in two concatenated parts."""
    if suffix == ".zst":
        pack = pytest.importorskip("zstandard").ZstdCompressor().compress
    else:
        pack = {"": bytes, ".gz": functools.partial(gzip.compress, mtime=0), ".xz": lzma.compress}[
            suffix]
    return pack(data[:1000]) + pack(data[1000:])


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_retok_compressed_documents_and_shard_size(retok_case: RetokCase, retok_run, suffix: str,
                                                   monkeypatch) -> None:
    monkeypatch.setattr(R, "BLOCK_BYTES", 3000)
    texts = [*retok_texts(60, 3), "", "caf\u00e9\n\x00 raw"]
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path = retok_case.folder / f"docs.jsonl{suffix}"
    path.write_bytes(retok_compress(data, suffix))
    arguments = ["--docs", path, "--split", "val", "--vocab", retok_case.vocab, "--shard-tokens",
                 "1500", "--output-dir", retok_case.output, "--workers", "2"]
    code, text = retok_run(arguments)
    shards = sorted(retok_case.output.glob("fineweb_val_*.bin"))
    assert code == 0 and len(shards) > 2 and shards[0].name == "fineweb_val_000000.bin"
    slow = RetokSlow([bytes([k]) for k in range(256)] + RETOK_TOKENS)
    expected, stream = [[277, *slow.encode(text.encode())] for text in texts], []
    for shard in shards:
        ids = retok_read_shard(shard)
        stream += ids
        last_bos = len(ids) - 1 - ids[::-1].index(277)
        assert ids[0] == 277 and last_bos < 1500, "a shard ends with the document that fills it"
        assert shard == shards[-1] or len(ids) >= 1500
    assert stream == [k for ids in expected for k in ids]
    totals = retok_manifest(retok_case.output)["totals"]["val"]
    size = sum(len(text.encode()) for text in texts)
    assert [totals[key] for key in ("documents", "source_bytes", "decoded_bytes")] == [
        62, size, size]
    before = retok_folder(retok_case.output)
    assert f"0 made, {len(shards)} skipped" in retok_run(arguments)[1]
    shards[1].unlink()
    assert f"{len(shards) - 1} made, 1 skipped" in retok_run(arguments)[1]
    assert retok_folder(retok_case.output) == before
    arguments[arguments.index("1500")] = "1000000"
    assert "1 made, 0 skipped" in retok_run(arguments)[1]
    assert [path.name for path in retok_case.output.glob("*.bin")] == ["fineweb_val_000000.bin"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_retok_truncated_archives_are_refused(retok_case: RetokCase, retok_run, suffix: str
                                              ) -> None:
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in retok_texts(50))
    path = retok_case.folder / f"docs.jsonl{suffix}"
    whole = retok_compress(data, suffix)
    for damaged in (whole[:-20], b"not an archive" * 9):
        path.write_bytes(damaged)
        code, text = retok_run(["--docs", path, "--vocab", retok_case.vocab, "--output-dir",
                                retok_case.output, "--workers", "1"])
        assert code == 1 and f"{path.name}: damaged or truncated" in text
        assert not list(retok_case.output.glob("*.bin"))


def test_retok_documents_to_sentencepiece_shards(retok_case: RetokCase, retok_run) -> None:
    path = retok_case.folder / "docs.jsonl"
    texts = [*retok_texts(30, 4), " two  spaces\nand a line", "\u2581\u00ff"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    code, _ = retok_run(["--docs", path, "--sp-model", retok_case.model, "--output-dir",
                         retok_case.output, "--workers", "1"])
    parts = [[1, *ids] for ids in retok_case.processor.encode(texts)]
    assert retok_read_shard(retok_case.output / "fineweb_train_000000.bin") == sum(parts, [])
    manifest = retok_manifest(retok_case.output)
    source = sum(len(retok_case.processor.decode(ids).encode()) for ids in parts)
    assert code == 0 and manifest["tokenizer"]["kind"] == "sentencepiece"
    assert manifest["source"] == {"kind": "docs", "model_sha256": R.file_sha256(retok_case.model)}
    assert manifest["totals"]["train"]["source_bytes"] == source
    assert manifest["totals"]["train"]["decoded_bytes"] == source


# --- lossy vocabularies ---------------------------------------------------------------------


class RetokTokenmonster(types.ModuleType):
    """A stand-in for the tokenmonster package: UTF-8, one id per byte, non-ASCII bytes dropped."""

    def __init__(self, error: Exception | None = None):
        super().__init__("tokenmonster")
        self.error, self.loaded = error, None

    def load(self, path: str):
        if self.error:
            raise self.error
        self.loaded = Path(path).read_bytes()
        return self

    def __len__(self) -> int:
        return 998

    def tokenize(self, text: bytes):
        assert isinstance(text, bytes)
        return np.array([k for k in text if k < 128], dtype=np.uint16) if text else None

    def decode(self, ids):
        return "".join(map(chr, (k if k < 128 else 63 for k in ids))) if len(ids) else None


def retok_lossy_arguments(case: RetokCase, *more: str) -> list[str]:
    case.vocab = case.folder / "candidate.vocab"
    header = bytes.fromhex("0201010130000000ffffffe60300e60300cd040025000e01")
    case.vocab.write_bytes(header + bytes(100))
    return case.arguments(*more)


def test_retok_lossy_vocabulary_is_refused_by_its_header(retok_case: RetokCase, retok_run) -> None:
    code, text = retok_run(retok_lossy_arguments(retok_case))
    assert code == 1 and "candidate.vocab: refused: not byte-exact" in text
    assert "998 tokens with capcode 2, charset UTF-8, normalization NFD" in text
    assert "--allow-lossy" in text and not retok_case.output.exists()


@needs_shared
def test_retok_the_published_lossy_vocabulary_is_recognised() -> None:
    vocabulary = R.load_vocabulary(SHARED / "data" / "candidate.vocab")
    assert "998 tokens with capcode 2, charset UTF-8, normalization NFD" in vocabulary.lossy
    with pytest.raises(R.InputError, match="refused"):
        R.make_engine(vocabulary, allow_lossy=False)


def test_retok_lossy_yaml_is_refused_with_its_reasons() -> None:
    data = R.vocabulary_yaml([bytes([k]) for k in range(200)])
    data = data.replace(b"capcode: 0", b"capcode: 2").replace(b"charset: none", b"charset: utf-8")
    vocabulary = R.load_vocabulary(data, "half.yaml")
    for reason in ("capcode 2", "charset utf-8", "no token for 56 of the 256"):
        assert reason in vocabulary.lossy
    with pytest.raises(R.InputError, match="half.yaml: refused"):
        R.make_engine(vocabulary, allow_lossy=False)


def test_retok_allow_lossy_needs_the_package_and_its_helper(retok_case: RetokCase, retok_run,
                                                            monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenmonster", None)
    code, text = retok_run(retok_lossy_arguments(retok_case, "--allow-lossy"))
    assert code == 1 and "pip install tokenmonster" in text
    error = urllib.error.URLError(OSError(-2, "Name or service not known"))
    monkeypatch.setitem(sys.modules, "tokenmonster", RetokTokenmonster(error))
    code, text = retok_run(retok_lossy_arguments(retok_case, "--allow-lossy"))
    assert code == 1 and "cannot load its helper" in text and "needs a network once" in text
    assert "Name or service not known" in text and not retok_case.output.exists()


def test_retok_allow_lossy_states_what_is_wrong(retok_case: RetokCase, retok_run, monkeypatch
                                                ) -> None:
    module = RetokTokenmonster()
    monkeypatch.setitem(sys.modules, "tokenmonster", module)
    code, text = retok_run(retok_lossy_arguments(retok_case, "--allow-lossy", "--workers", "2"))
    assert code == 0 and "NOT EXACT" in text and module.loaded == retok_case.vocab.read_bytes()
    manifest = retok_manifest(retok_case.output)
    assert manifest["tokenizer"]["byte_exact"] is False
    assert (manifest["tokenizer"]["bos_id"], manifest["tokenizer"]["vocab_size"]) == (998, 999)
    source = [text for k in range(4) for text in retok_case.source(k)]
    kept = [bytes(k for k in text if k < 128) for text in source]
    bad = sum(a != b for a, b in zip(source, kept, strict=True))
    totals = manifest["totals"]["all"]
    assert (totals["bad_documents"], totals["source_bytes"], totals["decoded_bytes"]) == (
        bad, sum(map(len, source)), sum(map(len, kept)))
    assert 0 < bad and totals["source_bytes"] > totals["decoded_bytes"]
    assert all(entry["status"] == "lossy" for entry in manifest["shards"].values())


# --- demo, bench, memory --------------------------------------------------------------------


def test_retok_demo_is_built_once_and_is_honest(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(R.DEMO, "packages", [])
    monkeypatch.setitem(R.DEMO, "val_bytes", 30_000)
    monkeypatch.setitem(R.DEMO, "sample_bytes", 100_000)
    monkeypatch.setitem(R.DEMO, "vocabulary_ids", 400)
    sources = R.demo_sources()
    assert ("pydoc_data/topics.py" in dict(sources)) and not any(
        {"test", "tests"} & set(name.split("/")) for name, _ in sources)
    monkeypatch.setattr(R, "demo_sources", lambda: [source for source in sources
                                                    if source[0][0] in "abcdefg"])
    lines: list[str] = []
    paths = R.build_demo(tmp_path / "demo", lines.append)
    assert lines and all(path.exists() for path in paths.values())
    before = retok_folder(tmp_path / "demo")
    assert R.build_demo(tmp_path / "demo", lines.clear) == paths
    texts = {}
    for split in ("train", "val"):
        texts[split] = [json.loads(line)["text"] for line in open(paths[f"{split}_text"])]
        size = sum(len(text.encode()) for text in texts[split])
        for folder in (paths["data_path"], paths["sp_data_path"]):
            totals = retok_manifest(folder)["totals"][split]
            assert (totals["source_bytes"], totals["decoded_bytes"], totals["bad_documents"]) == (
                size, size, 0)
        vocabulary = R.load_vocabulary(paths["tokenizer_path"])
        ids = retok_read_shard(paths["data_path"] / f"fineweb_{split}_000000.bin")
        decoded = b"".join(b"\0" if k == vocabulary.bos_id else vocabulary.tokens[k] for k in ids)
        assert decoded.decode() == "".join("\0" + text for text in texts[split])
    assert not set(texts["train"]) & set(texts["val"]) and len(texts["val"]) > 3
    model = R.SentencePieceModel(paths["sp_model"])
    assert [model.processor.id_to_piece(k) for k in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert model.vocab_size == 1024 and model.processor.piece_to_id("\u2581") > 258
    monkeypatch.setitem(R.DEMO, "version", 2)
    R.build_demo(tmp_path / "demo", lines.append)
    after = retok_folder(tmp_path / "demo")
    assert {name for name in before if before[name] != after[name]} == {"stamp"}


def test_retok_demo_texts_are_never_in_both_splits(tmp_path: Path) -> None:
    sources = []
    for k in range(60):
        path = tmp_path / f"m{k}.py"
        shared = f"A docstring that several modules have,\nas number {k % 20} shows to readers."
        path.write_text(f'"""Module {k} with a text of its own,\nwhich is long enough."""\n'
                        f'def f():\n    """{shared}"""\n')
        sources.append((path.name, path))
    splits = R.demo_documents(sources, 1)
    texts = [text for split in splits.values() for document in split
             for text in document.decode().split("\n\n")]
    assert len(texts) == len(set(texts)) == 80


def test_retok_bench_reports_the_yardstick(retok_case: RetokCase, retok_run) -> None:
    code, text = retok_run(retok_case.arguments("--bench"))
    assert code == 0 and "sp.decode:" in text and "x sp.decode" in text
    assert not list(retok_case.output.glob("*.bin"))


def test_retok_import_is_light() -> None:
    code = ("import sys, retokenize_scylla; print([name for name in ('numba', 'sentencepiece', "
            "'tokenmonster', 'zstandard', 'torch') if name in sys.modules])")
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"


@pytest.mark.slow
def test_retok_memory_is_bounded_for_a_full_shard(retok_case: RetokCase) -> None:
    ids = np.array([k for ids in retok_case.documents for k in ids], dtype=np.uint16)
    for k in (1, 2, 3):
        retok_case.shard(k).unlink()
    retok_write_shard(retok_case.shard(0), np.resize(ids, 100_000_000))
    prelude = ("import atexit, re\natexit.register(lambda: print(re.search("
               "r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]))")
    process = retok_process(retok_case.arguments(), prelude)
    output, error = process.communicate(timeout=300)
    peak = int(output.split()[-1]) / 1024
    print(f"peak {peak:.0f} MiB; {error.splitlines()[-1]}")
    assert process.returncode == 0 and peak < 1000


# ==========================================================================================
# the vocabulary builder
# ==========================================================================================

VOCAB_SYLLABLES = ("ba", "ke", "lin", "tor", "ma", "shi", "ed", "ing", "\u00e9t", "-", "'s", "qu")


def vocab_made_up_documents(count: int, seed: int = 1) -> list[bytes]:
    """Documents of words that follow Zipf's law, with stops, new lines and some invalid UTF-8."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(VOCAB_SYLLABLES, k=draw.randint(1, 4))) for _ in range(600)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    documents = []
    for _ in range(count):
        chosen = draw.choices(words, weights, k=draw.randint(1, 120))
        text = " ".join(word + draw.choice(("", "", "", ",", ".\n")) for word in chosen)
        documents.append(text.encode() + draw.randbytes(draw.randint(0, 3)))
    return documents


def vocab_proxy_documents(limit: int) -> list[bytes]:
    """The first `limit` bytes of the proxy corpus."""
    with lzma.open(SHARED / "data" / "proxy_train.jsonl.xz", "rt", encoding="utf-8") as lines:
        texts = (json.loads(line)["text"].encode() for line in lines)
        documents, size = [], 0
        while size < limit:
            documents.append(next(texts))
            size += len(documents[-1])
    return documents


def vocab_jsonl_documents(name: str) -> list[bytes]:
    """Documents of an uncompressed file of ../shared/data."""
    lines = (SHARED / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"].encode() for line in lines]


def vocab_bytes_per_token(vocabulary: bytes | Path, documents: list[bytes]) -> float:
    """Bytes per token of the exact segmenter, BOS not counted."""
    segmenter = R.Segmenter(R.load_vocabulary(vocabulary))
    return sum(map(len, documents)) / sum(len(segmenter.encode(one)) for one in documents)


def vocab_byte_pair_vocabulary(documents: list[bytes], size: int) -> bytes:
    """Plain byte-pair encoding over words with their leading space: the baseline to beat."""
    words = Counter(tuple(bytes([value]) for value in word)
                    for document in documents for word in re.split(rb"(?= )", document))
    tokens = [bytes([value]) for value in range(256)]
    while len(tokens) < size - 1:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        if left + right not in tokens:
            tokens.append(left + right)
        words = Counter({vocab_joined(word, left, right): count for word, count in words.items()})
    return R.vocabulary_yaml(tokens)


def vocab_joined(word: tuple[bytes, ...], left: bytes, right: bytes) -> tuple[bytes, ...]:
    """`word` with every adjacent `left`, `right` as one piece."""
    pieces: list[bytes] = []
    for piece in word:
        if pieces and pieces[-1] == left and piece == right:
            pieces[-1] = left + right
        else:
            pieces.append(piece)
    return tuple(pieces)


@pytest.mark.parametrize("size", [257, 300, 700])
def test_built_vocabulary_loads_with_every_id_alive(size):
    documents = vocab_made_up_documents(300)
    vocabulary = R.load_vocabulary(R.build_vocab(documents, size, rounds=3))
    assert vocabulary.vocab_size == size and vocabulary.bos_id == size - 1 and not vocabulary.lossy
    tokens = vocabulary.tokens
    assert tokens[:256] == tuple(bytes([value]) for value in range(256)) and tokens[-1] == b""
    assert len(set(tokens)) == size and max(map(len, tokens)) <= R.MAX_TOKEN_BYTES
    segmenter = R.Segmenter(vocabulary)
    for identity, token in enumerate(tokens[:-1]):
        assert segmenter.encode(token) == [identity]


def test_building_is_deterministic_and_ignores_empty_documents():
    documents = vocab_made_up_documents(200)
    built = R.build_vocab(documents, 500, rounds=4)
    assert built == R.build_vocab(iter([b"", *documents, b""]), 500, rounds=4)
    assert built != R.build_vocab(documents[100:], 500, rounds=4)


def test_built_vocabulary_is_lossless_on_random_bytes():
    vocabulary = R.load_vocabulary(R.build_vocab(vocab_made_up_documents(200), 600, rounds=2))
    segmenter, draw = R.Segmenter(vocabulary), random.Random(2)
    for document in [draw.randbytes(draw.randint(0, 300)) for _ in range(50)]:
        ids = segmenter.encode(document)
        assert b"".join(vocabulary.tokens[identity] for identity in ids) == document


def test_built_vocabulary_beats_byte_pairs_on_unseen_text():
    documents = vocab_made_up_documents(500)
    train, unseen = documents[:350], documents[350:]
    built = vocab_bytes_per_token(R.build_vocab(train, 500), unseen)
    assert built > 1.03 * vocab_bytes_per_token(vocab_byte_pair_vocabulary(train, 500), unseen)


def test_more_rounds_never_make_it_worse_on_the_text_it_is_built_from():
    documents = vocab_made_up_documents(200)
    reached = [vocab_bytes_per_token(R.build_vocab(documents, 500, rounds), documents)
               for rounds in (0, 12)]
    assert reached[0] <= reached[1]


def test_losses_are_the_tokens_that_removal_costs():
    draft = R._Draft([b"abab abab", b"ab"])
    draft.take((*R.BYTES, b"ab", b"abab"))
    assert draft.ids.tolist() == [258, 257, 32, 257, 258, 256]
    losses = draft.losses()
    assert losses[256:].tolist() == [1, 2]  # "ab" once -> 2 bytes; "abab" twice -> 2 x "ab"
    assert losses[ord("a")] == 0


def test_pairs_count_what_can_join():
    draft = R._Draft([b"aaaa", b"xyxyxy", b"xy"])
    assert draft.pairs(258) == [b"xy", b"yx"]
    assert draft.pairs(300) == [b"xy", b"yx"]  # "aaaa" holds "aa" three times, but one can join


def test_log_reports_every_round():
    lines: list[str] = []
    documents = vocab_made_up_documents(100)
    R.build_vocab(documents, 400, 3, lines.append)
    assert [line.split(":")[0] for line in lines] == [
        f"vocabulary round {number}/3" for number in (1, 2, 3)]


@pytest.mark.parametrize("documents, size, told", [
    ([b"some text"], 256, "size must be 257"),
    ([b"some text"], 70000, "size must be 257"),
    ([], 300, "holds no text"),
    ([b"", b""], 300, "holds no text"),
    ([b"too little text"], 300, "repeat too little for more than"),
])
def test_impossible_vocabularies_are_refused(documents, size, told):
    with pytest.raises(R.InputError, match=told):
        R.build_vocab(documents, size)


def test_command_line_builds_a_vocabulary(tmp_path, capsys):
    source, output = tmp_path / "docs.jsonl", tmp_path / "vocab.yaml"
    texts = [document.decode("latin-1") for document in vocab_made_up_documents(150)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["--docs", str(source), "--output", str(output), "--build-rounds", "2"]
    assert R.main(["--build-vocab", "400", *arguments]) == 0
    assert R.load_vocabulary(output).vocab_size == 400
    assert output.read_bytes() == R.build_vocab([text.encode() for text in texts], 400, 2)
    before = output.read_bytes()
    assert R.main(["--build-vocab", "400", "--build-bytes", "50", *arguments]) == 1
    assert "error: --build-vocab 400" in capsys.readouterr().err
    assert output.read_bytes() == before and sorted(tmp_path.iterdir()) == [source, output]


@needs_shared
def test_small_build_beats_scylla_on_unseen_text():
    vocabulary = R.build_vocab(vocab_proxy_documents(1_000_000), 1254, rounds=4)
    unseen = vocab_jsonl_documents("proxy_val.jsonl")[:100]
    assert vocab_bytes_per_token(vocabulary, unseen) > 1.1 * vocab_bytes_per_token(
        SHARED / "data" / "scylla.yaml", unseen)


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("size, bar", [(998, 2.45), (1254, 2.60)])
def test_build_reaches_its_bar_on_real_documents(size, bar):
    vocabulary = R.build_vocab(vocab_proxy_documents(6_000_000), size)
    assert vocab_bytes_per_token(vocabulary, vocab_jsonl_documents("fineweb_docs.jsonl")) >= bar
    assert np.all(R.load_vocabulary(vocabulary).base_bytes()[:-1] > 0)


# ==========================================================================================
# the re-tokenizer and the trainer together; the other tools of records/
# ==========================================================================================

@pytest.mark.parametrize("engine", ["vocab", "sp-model"])
def test_d_trainer_calls_these_shards_exact(engine, tmp_path):
    """Shards, byte table and manifest satisfy the audit; a manifest one byte off does not."""
    texts, out = retok_texts(30), tmp_path / "out"
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = tmp_path / ("v.yaml" if engine == "vocab" else "v.model")
    source.write_bytes(retok_model_bytes() if engine == "sp-model" else R.vocabulary_yaml(
        [bytes([k]) for k in range(256)] + RETOK_TOKENS))
    assert R.main(["--docs", str(documents), f"--{engine}", str(source), "--split", "val",
                   "--output-dir", str(out), "--workers", "1"]) == 0
    config = replace(t.Config(), data_path=str(out))
    val = t.load_validation(config, t.load_byte_table(config))
    assert val.audit == "exact" and len(val.ids) == len(val.bytes) + 1
    if engine == "vocab":
        assert val.bytes.sum() == sum(len(text.encode()) for text in texts)
        assert val.vocab_sha256 == t.sha256_file(source)
    manifest = json.loads((out / "manifest.json").read_text())
    assert val.bytes.sum() == manifest["totals"]["val"]["source_bytes"]
    next(iter(manifest["shards"].values()))["source_bytes"] += 1
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(t.RunError, match="byte audit failed"):
        t.load_validation(config, t.load_byte_table(config))


def test_d_weights_start_as_rank_0s(monkeypatch):
    """With several ranks every tensor is broadcast from rank 0; with one nothing is sent."""
    sent = []
    monkeypatch.setattr(t.dist, "broadcast", lambda tensor, src: sent.append((tensor, src)))
    weights = [torch.ones(2, requires_grad=True), torch.zeros(3, requires_grad=True)]
    a_runtime().broadcast(weights)
    assert not sent
    a_runtime(rank=1, world=2).broadcast(weights)
    assert [(x.data_ptr(), src) for x, src in sent] == [(w.data_ptr(), 0) for w in weights]


def test_d_out_of_memory_names_the_settings(monkeypatch, capsys):
    """Exit code 1 and the settings to lower, no traceback."""
    def fail(config):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(t, "run", fail)
    assert t.main([]) == 1
    error = capsys.readouterr().err
    assert all(n in error for n in ("MICRO_BATCH_TOKENS", "TRAIN_BATCH_TOKENS", "VAL_BATCH_SIZE"))


def test_d_byte_model_is_witten_bell(tmp_path):
    """The yardstick's closed form, by hand on a few bytes: contexts, orders, what is scored."""
    train, val = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    train.write_text(json.dumps({"text": "ab"}) + "\n" + json.dumps({"text": "ac"}) + "\n")
    val.write_text(json.dumps({"text": "ab"}) + "\n")

    def mixed(count, total, kinds, lower):
        return (count + kinds * lower) / (total + kinds)

    # counted symbols after the two leading zeros: a b 0 0 a c; in contexts of 0, 1 and 2 bytes
    a0, b0 = mixed(2, 6, 4, 1 / 256), mixed(1, 6, 4, 1 / 256)
    a1 = mixed(2, 3, 2, a0)  # after 0: a, 0, a
    b1 = mixed(1, 2, 2, b0)  # after a: b, c
    a2 = mixed(2, 2, 1, a1)  # after 0 0: a, a
    b2 = mixed(1, 2, 2, b1)  # after 0 a: b, c
    expected = -np.log2([a2, b2]).mean()
    assert R.byte_model_bpb(train, val) == pytest.approx(expected, abs=1e-12)


def d_tool(name):
    """A script of records/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "records" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_d_ablation_table_and_plans():
    """Means, spread and change against the first variant; every plan names only settings."""
    ablate = d_tool("ablate")
    runs = {"base": [dict(post_ema_bpb=1.0, roundtrip_bpb=r, bytes_total=10, steps=4, train_ms=40,
                          ttt_bpb=1.9, seconds_eval=3.0)
                     for r in (2.0, 2.2)],
            "less": [dict(post_ema_bpb=1.5, roundtrip_bpb=2.5, bytes_total=8, steps=5,
                          train_ms=100)]}
    rows = ablate.table(runs).splitlines()
    assert rows[2] == "| base | 2 | 1.0000 | 2.1000 | 1.9000 | 0.2000 | - | - | 10 | 4 | 10 | 3 |"
    assert rows[3] == "| less | 1 | 1.5000 | 2.5000 | - | - | +0.5000 | base | 8 | 5 | 20 | - |"
    runs["more"] = [dict(run, roundtrip_bpb=r) for run, r in zip(
        runs["base"], (2.4, 2.8), strict=True)]
    change = ablate.table(runs).splitlines()[4].split("|")[7]  # +0.4 and +0.6: 0.5 +- t * 0.1
    assert change.strip() == f"+0.5000 +- {12.7062 * 0.1:.4f}"
    rows = ablate.table(runs, {"more": "less"}).splitlines()
    assert "| -0.1000 | less |" in rows[4] and "| +0.5000 | base |" in rows[3]
    assert ablate.table(json.loads(ablate.results_text(runs))) == ablate.table(runs)
    plans = sorted((ROOT / "records" / "plans").glob("*.json"))
    assert plans
    for path in plans:
        plan = json.loads(path.read_text())
        assert set(plan.get("seeds_of", {})) <= set(plan["variants"])
        against = plan.get("against", {})
        assert {*against, *against.values()} <= set(plan["variants"])
        for changes in plan["variants"].values():
            texts = {k: str(v).format(root=ROOT) for k, v in (plan["base"] | changes).items()}
            t.Config.from_env(texts, cuda=True)


def test_d_ablation_results_are_the_tables(capsys, monkeypatch):
    """Every table of kept results stands in records/README.md as `--table` prints it."""
    ablate, text = d_tool("ablate"), (ROOT / "records" / "README.md").read_text()
    results = sorted((ROOT / "records" / "plans" / "results").glob("*.json"))
    assert results
    for path in results:
        plan = ROOT / "records" / "plans" / path.name
        monkeypatch.setattr(sys, "argv", ["ablate", str(plan), "--table"])
        assert ablate.main() == 0
        printed = capsys.readouterr().out
        assert printed in text, path.name
        assert {*json.loads(path.read_text())} == {*json.loads(plan.read_text())["variants"]}


@pytest.mark.slow
def test_d_ablation_runs_and_resumes(tmp_path):
    """Two variants of a tiny run; a second call repeats none of them and gives the same table."""
    out, data = tmp_path / "out", tmp_path / "data"
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": x}) + "\n" for x in retok_texts(300)))
    vocabulary = tmp_path / "v.yaml"
    vocabulary.write_bytes(R.vocabulary_yaml([bytes([k]) for k in range(256)] + RETOK_TOKENS))
    for split in ("train", "val"):
        assert R.main(["--docs", str(documents), "--vocab", str(vocabulary), "--split", split,
                       "--output-dir", str(data), "--workers", "1"]) == 0
    base = dict(PRESET="demo", DATA_PATH=str(data), ITERATIONS=3, VAL_TOKENS_LIMIT=2000,
                MODEL_DIM=16, TRAIN_BATCH_TOKENS=256, EVAL_MODES="roundtrip", ROPE_DIMS=4)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(dict(base=base, seeds=[1, 2], seeds_of={"flat": 1}, variants={
        "all": {}, "flat": {"PARALLEL_START_LAYER": 11}})))
    command = [sys.executable, ROOT / "records" / "ablate.py", plan, "--out", out, "--jobs", "2"]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    times = {p: p.stat().st_mtime_ns for p in out.glob("*/console.txt")}
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(times) == 3 and times == {p: p.stat().st_mtime_ns for p in times}
    assert first.splitlines()[-4:] == again.splitlines()[-4:]
    assert (out / "table.md").read_text().splitlines() == again.splitlines()[-4:]
    kept = next(out.glob("flat_*")) / "settings.json"
    kept.write_text(kept.read_text().replace("11", "10"))
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "other settings" in refused.stderr
    (out / "train_gpt.py").write_text("another version")
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "another train_gpt.py" in refused.stderr


# ==========================================================================================
# evaluation: legality of every mode, test-time training, n-gram cache, independent scorer
# ==========================================================================================

# --- a scoring procedure: ids -> nats of every target, and what happened on the way ----------

E_VOCAB = 24  # its last id is the boundary
E_TINY = dict(
    num_layers=3, model_dim=16, num_heads=2, num_kv_heads=1, rope_dims=4, xsa_last_n=1,
    bigram_vocab_size=16, bigram_dim=4, ve_dim=4, ve_layers=(2,), parallel_start_layer=2,
    recur_layers=(1,), eval_seq_len=16, eval_stride=4, val_batch_size=64, ttt_chunk_tokens=24,
    ttt_freeze_blocks=1, ttt_lr=0.5, ttt_epochs=2, ttt_batch_seqs=1, ngram_weight=0.3,
    ngram_order=3, scores_path="kept by the harness", slot_lr=0.1,
)  # fmt: skip
E_MODES = {  # name: settings of a run whose last mode is the one meant
    "roundtrip": dict(eval_modes=("roundtrip",)),
    "sliding": dict(eval_modes=("sliding",)),
    "ttt": dict(eval_modes=("ttt",)),
    "ngram_sliding": dict(eval_modes=("ngram",), ngram_enabled=True, ttt_enabled=False),
    "ngram_ttt": dict(eval_modes=("ngram",), ngram_enabled=True),
}
E_PLANS = [dict(), dict(eval_stride=16, ttt_chunk_tokens=16), dict(
    eval_seq_len=8, eval_stride=3, ttt_chunk_tokens=20, ttt_batch_seqs=2)]


def e_stream(count=75, seed=0):
    """Random ids in documents of 4 to 12; no two windows are alike."""
    random, ids = np.random.default_rng(seed), []
    while len(ids) < count:
        ids += [E_VOCAB - 1, *random.integers(0, E_VOCAB - 1, int(random.integers(4, 12)))]
    return np.array(ids[:count], np.uint16)


def e_score(mode, ids, runtime=None, watch=True, **settings):
    """Run evaluate_artifact itself on a random model: (last nats dumped, events, scores).

    Events, in order: ("plan", windows), ("score" or "train", starts, nats), ("update",), ("read" or
    "count", targets, n). Rows that are no window of the stream are left out, n is the number of
    targets in the counts. What happens before the evaluation's clock starts is not recorded.
    """
    runtime = runtime or a_runtime()
    c = a_config(**(E_TINY | E_MODES[mode] | settings))
    table, events, dumps = a_table(E_VOCAB), [], {}
    model = a_random_model(c, table=table)
    evaluator = t.Evaluator(runtime, c, t.Validation(
        ids, np.ones(len(ids) - 1, np.int16), "unverified", ""))
    places = {tuple(ids[i : i + evaluator.length].tolist()): i
              for i in range(len(ids) - evaluator.length)}

    def begin(to_come, start=evaluator.start_clock):
        events.clear()
        start(to_come)

    def hook(module, inputs, outputs):
        kind = "score" if torch.is_inference_mode_enabled() else "train"
        starts = [places.get(tuple(row)) for row in inputs[0].tolist()]
        rows = [i for i, start in enumerate(starts) if start is not None]
        events.append((kind, [starts[i] for i in rows], outputs.detach().numpy()[rows].copy()))

    def recorded(kind, function):
        def wrapped(self, part):
            result = function(self, part)
            counted = int(self.levels[0][2].sum())  # all targets that any count holds
            events.append((kind, list(range(*part.indices(len(ids) - 1))), counted))
            return result
        return wrapped

    def plan(*arguments, original=t.plan_windows):
        windows = original(*arguments)
        events.append(("plan", windows))
        return windows

    step = torch.optim.SGD.step
    with pytest.MonkeyPatch.context() as patch:
        if watch:
            evaluator.start_clock, _ = begin, model.register_forward_hook(hook)
        evaluator.save_scores = lambda label, nats: dumps.update({label: nats.copy()})
        patch.setattr(t, "load_model", lambda *_: model)
        patch.setattr(t, "plan_windows", plan)
        patch.setattr(t.NgramCache, "probabilities", recorded("read", t.NgramCache.probabilities))
        patch.setattr(t.NgramCache, "update", recorded("count", t.NgramCache.update))
        patch.setattr(torch.optim.SGD, "step",
                      lambda self: events.append(("update",)) or step(self))
        scores = t.evaluate_artifact("", evaluator, table)
    return list(dumps.values())[-1], events, scores


# --- the four conditions, each for any procedure; a breach is an AssertionError that names it --


def e_condition_1(score, ids, places):
    """Altering all tokens after a place, boundaries kept, changes no score up to it by a bit."""
    before, random = score(ids)[0], np.random.default_rng(1)
    for place in places:
        other, boundary = ids.copy(), ids == E_VOCAB - 1
        new = (ids + random.integers(1, E_VOCAB - 1, len(ids))) % (E_VOCAB - 1)  # never the same
        other[place + 1 :] = np.where(boundary, ids, new)[place + 1 :]
        after = score(other)[0]  # target k is ids[k + 1]
        assert after[:place].tobytes() == before[:place].tobytes(), f"condition 1 at {place}"
        assert not np.array_equal(after, before)  # else nothing was altered


def e_condition_2(score, ids, places):
    """exp(-nats) over every id put in as the target sums to 1."""
    for place in places:
        total = 0.0
        for v in range(E_VOCAB):
            other = ids.copy()
            other[place] = v
            total += math.exp(-float(score(other)[0][place - 1]))
        assert abs(total - 1) < 1e-4, f"condition 2 at {place}: {total}"


def e_condition_3(ranks, length, targets):
    """No weight or count sees a target before its final score; `ranks`: (nats, events) of each.

    The final score is the one that the first forward pass over a target gave.
    """
    updates = max(sum(event[0] == "update" for event in events) for _, events in ranks)
    first, mixed = {}, any(event[0] == "read" for _, events in ranks for event in events)
    for _, events in ranks:
        assert sum(event[0] == "update" for event in events) == updates, "condition 3: ranks"
    for number in range(updates + 1):  # weights change when all ranks have come to the update
        scored, trained = set(), set()
        for _, events in ranks:
            seen = 0
            for event in events:
                seen += event[0] == "update"
                if seen > number:
                    break
                if event[0] == "score":
                    for start, row in zip(event[1], event[2], strict=True):
                        for place, value in enumerate(row):
                            first.setdefault(start + place, (value, number))
                            scored.add(start + place)
                if event[0] == "train":
                    trained |= {s + i for s in event[1] for i in range(length)}
        assert trained <= scored, f"condition 3: trained on {sorted(trained - scored)} too early"
    for nats, events in ranks:
        assert mixed or len(ranks) > 1 or all(
            nats[target] == first[target][0] for target in range(targets)), "condition 3: replaced"
        for event in events:  # counts hold what was read before, and never more
            assert event[0] != "read" or event[2] <= event[1][0], "condition 3: counted too early"


def e_condition_4(ranks, targets):
    """Each target is scored exactly once, left to right."""
    for _, events in ranks:
        windows = next(event[1] for event in events if event[0] == "plan")
        length = len(next(event[2] for event in events if event[0] == "score")[0])
        scored = [place for start, first in windows.tolist()
                  for place in range(start + first, start + length)]
        assert scored == list(range(targets)), "condition 4: not each target once, in order"
        starts = dict.fromkeys(s for event in events if event[0] == "score" for s in event[1])
        assert list(starts) == sorted(starts), "condition 4: not from left to right"
        read = [target for event in events if event[0] == "read" for target in event[1]]
        assert read in ([], list(range(targets))), "condition 4: cache"


def e_check(mode, seed=0, places=(20, 37, 66), sums=(), **settings):
    """All conditions on one process; the sums only at some places, as they take V runs each."""
    ids = e_stream(seed=seed)
    score = functools.partial(e_score, mode, **settings)
    nats, events, _ = score(ids)
    assert len(nats) == len(ids) - 1 and np.isfinite(nats).all()
    length = a_config(**(E_TINY | settings)).eval_seq_len
    e_condition_4([(nats, events)], len(nats))
    e_condition_3([(nats, events)], length, len(nats))
    e_condition_1(score, ids, places)
    e_condition_2(score, ids, sums)
    return nats, events


@pytest.mark.parametrize("settings", E_PLANS, ids=["sliding", "plain", "uneven"])
@pytest.mark.parametrize("mode", E_MODES)
def test_e_every_mode_is_legal(mode, settings):
    """The four conditions; the events that they are about did happen."""
    sums = (58,) if settings == E_PLANS[-1] else ()
    nats, events = e_check(mode, sums=sums, **settings)
    kinds = Counter(event[0] for event in events)
    chunks = math.ceil(74 / a_config(**(E_TINY | settings)).ttt_chunk_tokens)
    assert kinds["read"] == kinds["count"] == (chunks if "ngram" in mode else 0)
    assert kinds["train"] == kinds["update"]
    assert kinds["update"] >= 2 * (chunks - 1) if "ttt" in mode else kinds["update"] == 0
    # the last chunk is not trained on
    last = max((s for event in events if event[0] == "train" for s in event[1]), default=0)
    assert last < 74 - (74 % a_config(**(E_TINY | settings)).ttt_chunk_tokens)


def test_e_modes_differ():
    """Training and counting do change scores, or the conditions would say nothing of them."""
    nats = [e_score(mode, e_stream())[0] for mode in E_MODES]
    for i, one in enumerate(nats):
        assert all(not np.array_equal(one, other) for other in nats[:i])


# --- mutants: every condition has teeth -----------------------------------------------------


def e_mutant_two_pass(patch):
    def init(self, *arguments, original=t.NgramCache.__init__):
        original(self, *arguments)
        self.update(slice(0, len(arguments[0]) - 1))
    patch.setattr(t.NgramCache, "__init__", init)


def e_mutant_count_one_more(patch):
    def update(self, part, original=t.NgramCache.update):
        original(self, slice(part.start, min(part.stop + 1, 74)))
    patch.setattr(t.NgramCache, "update", update)


def e_mutant_count_first(patch):
    def probabilities(self, part, original=t.NgramCache.probabilities):
        self.update(part)
        return original(self, part)
    patch.setattr(t.NgramCache, "probabilities", probabilities)


def e_mutant_train_first(patch):
    def learn(self, number, edges, nats, original=t.TTT.learn):
        if number + 2 < len(edges):
            original(self, number + 1, edges, nats)
    patch.setattr(t.TTT, "learn", learn)


def e_mutant_tail_twice(patch):
    def plan(*arguments, original=t.plan_windows):
        windows = original(*arguments)
        windows[-1, 1] = 0
        return windows
    patch.setattr(t, "plan_windows", plan)


def e_mutant_score_again(patch):
    def score(self, original=t.TTT.score):
        first, nats = original(self)
        with torch.no_grad():
            self.params[-1].add_(0.1)
        return self.evaluator.score(self.forward, self.config.eval_stride)
    patch.setattr(t.TTT, "score", score)


def e_mutant_unnormalised(patch):
    def probabilities(self, part, original=t.NgramCache.probabilities):
        return np.maximum(original(self, part), 0.1)
    patch.setattr(t.NgramCache, "probabilities", probabilities)


@pytest.mark.parametrize("mode, mutant, condition", [
    ("ngram_sliding", e_mutant_two_pass, "1"), ("ngram_sliding", e_mutant_two_pass, "3"),
    ("ngram_ttt", e_mutant_count_one_more, "2"), ("ngram_ttt", e_mutant_count_one_more, "3"),
    ("ngram_sliding", e_mutant_count_first, "2"), ("ngram_sliding", e_mutant_unnormalised, "2"),
    ("ttt", e_mutant_train_first, "1"), ("ttt", e_mutant_train_first, "3"),
    ("ttt", e_mutant_score_again, "3"), ("sliding", e_mutant_tail_twice, "4"),
    ("ttt", e_mutant_tail_twice, "4"),
])  # fmt: skip
def test_e_mutants_are_caught(mode, mutant, condition, monkeypatch):
    """Each illegal procedure breaks the condition that forbids it."""
    mutant(monkeypatch)
    ids, score = e_stream(), functools.partial(e_score, mode)
    with pytest.raises(AssertionError, match=f"condition {condition}"):
        if condition == "1":
            e_condition_1(score, ids, range(20, 70, 7))
        if condition == "2":
            e_condition_2(score, ids, (25,))  # the first target of a chunk
        ranks = [score(ids)[:2]]
        if condition == "3":
            e_condition_3(ranks, 16, 74)
        if condition == "4":
            e_condition_4(ranks, 74)


@pytest.mark.parametrize("condition", [e_condition_1, e_condition_2])
def test_e_slot_is_caught(condition):
    """SLOT fits what it scores: later targets of a batch and the target itself move a score."""
    def score(ids):
        return e_score("roundtrip", ids, eval_modes=("slot", "roundtrip"), slot_enabled=True)
    number = condition.__name__[-1]
    with pytest.raises(AssertionError, match=f"condition {number}"):
        condition(score, e_stream(), (58,))


def e_check_documents(mode):
    """With attention muted, a document's tokens change no score of another document's."""
    ids = e_stream()
    starts = np.flatnonzero(ids == E_VOCAB - 1)

    def random_model(c, *arguments, original=a_random_model, **more):
        model = original(c, *arguments, **more)
        with torch.no_grad():
            for block in model.blocks:
                block.attn.out.weight.zero_()  # SmearGate and bigram are what is left
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "a_random_model", random_model)
        before = e_score(mode, ids)[0]
        for begin in starts[2:6]:
            other = ids.copy()
            other[begin - 1] = (ids[begin - 1] + 1) % (E_VOCAB - 1)
            after = e_score(mode, other)[0]
            assert after[begin:].tobytes() == before[begin:].tobytes(), "documents leak"
            assert after[begin - 1] != before[begin - 1]  # the boundary is predicted from inside


@pytest.mark.parametrize("mode", ["roundtrip", "sliding"])
@pytest.mark.parametrize("broken", [None, t.SmearGate, t.BigramHash])
def test_e_documents_do_not_leak(mode, broken, monkeypatch):
    """SmearGate and bigram stop at boundaries in scoring; one that does not is caught."""
    if broken is None:
        return e_check_documents(mode)
    method = "forward" if broken is t.SmearGate else "rows"
    original = getattr(broken, method)

    def crossing(self, x, starts):
        edge = torch.zeros_like(starts)
        edge[:, 0] = True  # a window's first position has no previous one
        return original(self, x, edge)

    monkeypatch.setattr(broken, method, crossing)
    with pytest.raises(AssertionError, match="documents leak"):
        e_check_documents(mode)


# --- two ranks ------------------------------------------------------------------------------

E_RANK_CODE = """
import json, os, pickle, sys
sys.path.insert(0, {root!r})
import test_cpu as T
runtime = T.t.Runtime(T.a_config(run_id="rank"))
runtime.on_first_rank = lambda work: work()  # every rank keeps what it would dump
jobs, out = json.load(open("jobs.json")), []
for mode, seed, altered, settings in jobs:
    ids = T.e_stream(seed=seed)
    if altered:
        ids[altered + 1 :] = T.np.where(ids == T.E_VOCAB - 1, ids, (ids + 5) % (T.E_VOCAB - 1))[
            altered + 1 :]
    nats, events, scores = T.e_score(mode, ids, runtime, **settings)
    out.append((nats, events))
with open("rank%d.pickle" % runtime.rank, "wb") as file:
    pickle.dump(out, file)
runtime.close()
sys.stdout.flush()
os._exit(0)  # as train_gpt.py ends a rank: gloo's threads can abort Python's teardown
"""


@pytest.mark.slow
def test_e_two_ranks_are_legal_and_equal_one(tmp_path):
    """One pair of gloo processes: the conditions, equal scores on both, those of one process."""
    plans = [E_PLANS[0] | dict(ttt_batch_seqs=2), E_PLANS[2], E_PLANS[2] | dict(ttt_lr=0.0)]
    jobs = [(mode, 0, place, plan) for plan in plans for mode in E_MODES for place in (0, 37)]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    environ = dict(MASTER_ADDR="127.0.0.1", WORLD_SIZE="2", OMP_NUM_THREADS="1",
                   CUDA_VISIBLE_DEVICES="")
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        environ["MASTER_PORT"] = str(free.getsockname()[1])
    names = {f.name.upper() for f in fields(t.Config)}
    clean = {k: v for k, v in os.environ.items() if k not in names}
    processes = [subprocess.Popen(
        [sys.executable, "-c", E_RANK_CODE.format(root=str(ROOT))], cwd=tmp_path, text=True,
        env=clean | environ | dict(RANK=str(rank), LOCAL_RANK="0"), stderr=subprocess.PIPE)
        for rank in range(2)]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    ranks = [pickle.loads((tmp_path / f"rank{rank}.pickle").read_bytes()) for rank in range(2)]
    results = {}
    for (mode, _, place, plan), *both in zip(jobs, *ranks, strict=True):
        nats = both[0][0]
        assert nats.tobytes() == both[1][0].tobytes()
        length = a_config(**(E_TINY | plan)).eval_seq_len
        e_condition_3(both, length, len(nats))
        e_condition_4(both, len(nats))
        results[mode, place, plan["ttt_batch_seqs"], plan.get("ttt_lr")] = nats
        if not place:
            alone = e_score(mode, e_stream(), **plan)[0]
            np.testing.assert_allclose(nats, alone, rtol=1e-3, atol=1e-3)
            untrained = e_score("sliding", e_stream(), **plan)[0]
            if mode == "ttt" and plan.get("ttt_lr") is None:
                assert np.abs(nats - untrained).max() > 0.02  # far more than ranks differ
    for (mode, place, *plan), nats in results.items():
        assert nats[:place].tobytes() == results[mode, 0, *plan][:place].tobytes(), "condition 1"
    assert results["ttt", 0, 2, 0.0].tobytes() == results["sliding", 0, 2, 0.0].tobytes()


# --- test-time training ---------------------------------------------------------------------


def e_ttt(ids=None, runtime=None, **settings):
    """A TTT on a random model and stream, with its optimizer, and the config."""
    c = a_config(**(E_TINY | settings))
    ids = e_stream() if ids is None else ids
    model = a_random_model(c, table=a_table(E_VOCAB))
    evaluator = t.Evaluator(runtime or a_runtime(), c, t.Validation(
        ids, np.ones(len(ids) - 1, np.int16), "unverified", ""))
    ttt = t.TTT(model, evaluator)
    ttt.optimizer, ttt.began = torch.optim.SGD(ttt.params, c.ttt_lr, c.ttt_momentum), 0.0
    return ttt, c


@pytest.mark.parametrize("settings", [*E_PLANS, dict(val_batch_size=32), dict(eval_stride=5)])
def test_e_ttt_without_learning_rate_is_sliding(settings):
    """Bit for bit, on any processor: the batches are the same; with a rate the scores differ."""
    (nats, events, _), (moved, _, _) = (
        e_score("ttt", e_stream(), ttt_lr=lr, **settings) for lr in (0.0, 0.01))
    sliding, plain, _ = e_score("sliding", e_stream(), **settings)
    assert nats.tobytes() == sliding.tobytes() != moved.tobytes()
    batches, same = ([event[1] for event in log if event[0] == "score"] for log in (events, plain))
    assert batches == same and len(batches) > 3


@pytest.mark.parametrize("settings", E_PLANS)
def test_e_a_window_belongs_to_the_chunk_of_its_first_target(settings):
    """What is scored before the n-th chunk is trained on: windows whose first target is in it."""
    c, chunk, done = a_config(**(E_TINY | settings)), 0, set()
    _, events, _ = e_score("ttt", e_stream(), **(settings | dict(ttt_epochs=1, ttt_batch_seqs=9)))
    windows = next(event[1] for event in events if event[0] == "plan").tolist()
    for event in events:
        if event[0] == "score":
            done |= set(event[1])
        if event[0] == "update":
            chunk += 1
            assert done == {start for start, first in windows
                            if start + first < chunk * c.ttt_chunk_tokens}
    assert chunk == math.ceil(74 / c.ttt_chunk_tokens) - 1


@pytest.mark.parametrize("freeze, frozen", [
    (0, ""), (1, r"embed|bigram|smear|blocks\.0\."),
    (2, r"embed|bigram|smear|blocks\.[01]\.|skip_weights"),
    (3, r"embed|bigram|smear|blocks\.[012]\.|skip_weights|value\."),
])  # fmt: skip
@pytest.mark.parametrize("more", [dict(), dict(recur_untie_mlp=False), dict(tie_embeddings=False)])
def test_e_frozen_is_frozen(freeze, frozen, more):
    """Not a bit of what is frozen moves; everything else does; afterwards all is as before."""
    ttt, c = e_ttt(num_layers=4, ve_layers=(2, 3), parallel_start_layer=3, recur_layers=(1, 2),
                   ttt_freeze_blocks=freeze, **more)
    assert ttt.model.config.num_layers // 2 == 2  # skips are added from layer 2 on
    before = {n: p.detach().clone() for n, p in ttt.model.named_parameters()}
    frozen = frozen.replace("|skip_weights", "" if freeze == 2 else "|skip_weights")
    ttt.learn(0, [0, 24, 48, 74], torch.zeros(74))
    for name, parameter in ttt.model.named_parameters():
        still = bool(frozen and re.match(frozen, name))
        assert torch.equal(parameter, before[name]) == still, name
    ttt.model.load_state_dict(before, strict=False)
    ttt.score()
    for name, parameter in ttt.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_e_chunk_line_is_the_score_so_far():
    """ttt_chunk: the BPB of the targets up to the chunk's end, though windows reach beyond it."""
    runtime, lines, ids = a_runtime(), [], e_stream()
    runtime.log.line = lambda text, *_: lines.append(text)
    nats, _, _ = e_score("ttt", ids, runtime)
    shown = [re.match(r"ttt_chunk \[(\d)/4\] bpb=(\d+\.\d{6}) time=\d+\.\ds$", line)
             for line in lines if line.startswith("ttt_chunk")]
    ends = [24, 48, 72, 74]
    assert [match[1] for match in shown] == list("1234")
    assert [match[2] for match in shown] == [  # the harness counts one byte a target
        f"{nats[:end].astype(float).sum() / math.log(2) / end:.6f}" for end in ends]


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_e_training_is_the_formula(world, clip, monkeypatch):
    """Plain SGD on the mean over each batch's targets, however many ranks share the sequences."""
    settings = dict(ttt_chunk_tokens=40, ttt_batch_seqs=2, ttt_grad_clip=clip, ttt_freeze_blocks=0,
                    ttt_lr=0.5 if clip else 0.02)
    edges, ids = [0, 40, 80, 99], e_stream(100)
    ttt, c = e_ttt(ids, **settings)
    model, momentum = ttt.model, {}
    for chunk in (0, 1):
        lr = c.ttt_lr * 0.5 * (1 + math.cos(math.pi * chunk / 2))
        for _ in range(c.ttt_epochs):
            for batch in ([(0, 0), (16, 0)], [(24, 8)]):  # (start, first counted): 16 + 16 + 8
                model.zero_grad()
                total, count = 0.0, 0
                for start, first in batch:
                    row = torch.from_numpy(ids[edges[chunk] + start :][:17].astype(np.int64))
                    nats = model(row[None, :-1], row[None, 1:])[0, first:]
                    total, count = total + nats.sum(), count + len(nats)
                (total / count).backward()
                norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
                factor = min(1.0, clip / float(norm)) if clip else 1.0
                with torch.no_grad():
                    for p in model.parameters():
                        momentum[p] = c.ttt_momentum * momentum.get(p, 0) + factor * p.grad
                        p -= lr * momentum[p]
    wanted = {n: p.detach() for n, p in model.named_parameters()}
    barrier, sums = threading.Barrier(world), {}

    def all_reduce(tensor):  # sums over the threads that stand for ranks
        place = threading.current_thread().name
        sums[place] = tensor.clone()
        barrier.wait()
        total = sum(sums[f"e{rank}"] for rank in range(world))
        barrier.wait()
        return total

    shapes, steps, results = set(), Counter(), {}

    def work(rank):
        runtime = a_runtime(rank, world)
        runtime.all_reduce = all_reduce if world > 1 else (lambda tensor: tensor)
        mine = ttts[rank]
        mine.runtime = mine.evaluator.runtime = runtime
        mine.model.register_forward_hook(lambda m, x, y: shapes.add(tuple(x[0].shape)) or
                                         steps.update([rank]))
        for chunk in (0, 1, 2):
            mine.learn(chunk, edges, torch.zeros(99))
        results[rank] = a_digest(mine.model.named_parameters())

    ttts = [e_ttt(ids, a_runtime(rank, world), **settings)[0] for rank in range(world)]
    threads = [threading.Thread(target=work, args=(rank,), name=f"e{rank}") for rank in
               range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == world and len({str(r) for r in results.values()}) == 1
    assert set(steps.values()) == {2 * 2 * c.ttt_epochs}  # the same on every rank
    assert shapes == {(math.ceil(2 / world), 16)}
    for name, parameter in ttts[0].model.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name], rtol=1e-4, atol=2e-5)


def test_e_modes_do_not_influence_each_other():
    """Each mode alone, and all in one evaluation: the same nats, bit for bit."""
    alone = {mode: e_score(mode, e_stream())[0] for mode in ("roundtrip", "sliding", "ttt")}
    for last in alone:
        order = dict(eval_modes=tuple(mode for mode in alone if mode != last) + (last,))
        both, _, scores = e_score("ttt", e_stream(), **(order | dict(ngram_enabled=True)))
        assert set(scores) == set(alone) and both.tobytes() == alone["ttt"].tobytes()
        for mode, nats in alone.items():
            assert scores[mode].nats == float(nats.astype(np.float64).sum())


def test_e_bf16():
    """Computed in bf16, trained in fp32: learns on a stream that repeats itself."""
    runtime, ids = a_runtime(), np.tile(e_stream(25), 8).astype(np.uint16)
    runtime.dtype = torch.bfloat16
    ttt, _ = e_ttt(ids, runtime, ttt_freeze_blocks=0, ttt_chunk_tokens=50, ttt_lr=0.1)
    model = t.GPT(ttt.config, a_table(E_VOCAB).is_boundary, runtime)
    model.load_state_dict(ttt.model.state_dict())
    ttt = t.TTT(model, ttt.evaluator)
    plain, _ = ttt.evaluator.score(model, 4, chunk=50)
    ttt.config = ttt.evaluator.config = replace(ttt.config, ttt_epochs=4)
    learned, nats = ttt.score()
    assert learned.nats < 0.97 * plain.nats and nats.dtype == np.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_e_everything_is_compiled_before_the_clock(monkeypatch):
    """One graph for scoring, one for training, both on random tokens; none after the clock."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, runtime, frames = CompileCounter(), a_runtime(), []
    runtime.compile = functools.partial(torch.compile, fullgraph=True, dynamic=False,
                                        backend=counter)
    monkeypatch.setattr(t.Evaluator, "start_clock", lambda self, to_come: (
        frames.append(counter.frame_count), setattr(self, "to_come", to_come),
        setattr(self, "began", 0.0), setattr(self, "reported", math.inf)))
    nats, _, _ = e_score("ttt", e_stream(), runtime, watch=False,
                         eval_modes=("roundtrip", "sliding", "ttt"))
    assert frames == [0, counter.frame_count] and counter.frame_count == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    eager = e_score("ttt", e_stream())[0]
    np.testing.assert_allclose(nats, eager, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_e_priming_sees_no_validation_token_and_moves_nothing():
    """Random ids in the shapes of scoring and training; weights as they were."""
    ttt, _ = e_ttt()
    seen, before = [], a_digest(ttt.model.named_parameters())
    ttt.model.register_forward_hook(lambda m, x, y: seen.append(x[0]))
    ttt.prime()
    assert [tuple(x.shape) for x in seen] == [
        (ttt.evaluator.batch_windows, 16), (ttt.rank_seqs, 16)]
    stream = ttt.evaluator.val.ids.astype(int)
    windows = {tuple(stream[i : i + 16]) for i in range(len(stream) - 16)}
    assert not windows & {tuple(row.tolist()) for x in seen for row in x}
    assert a_digest(ttt.model.named_parameters()) == before and len(stream) == 75


# --- n-gram cache ---------------------------------------------------------------------------


def e_witten_bell(ids, boundary, order, chunk, vocab):
    """Probability of each target by dictionaries, one target at a time."""
    counts, out = {}, []
    for target in range(len(ids) - 1):
        if target % chunk == 0:  # all before this chunk have been scored
            for done in range(max(0, target - chunk), target):
                for context in e_contexts(ids, boundary, done, order):
                    counts.setdefault(context, Counter())[int(ids[done + 1])] += 1
        p = 1 / vocab
        for context in e_contexts(ids, boundary, target, order):
            seen = counts.get(context, Counter())
            if seen:
                n, kinds = sum(seen.values()), len(seen)
                p = (seen[int(ids[target + 1])] + kinds * p) / (n + kinds)
        out.append(p)
    return np.array(out)


def e_contexts(ids, boundary, target, order):
    """Contexts of a target, the empty one first; none reaches over a boundary."""
    for k in range(order):
        context = tuple(int(i) for i in ids[max(0, target + 1 - k) : target + 1])
        if len(context) < k or any(boundary[i] for i in context[1:]):
            return
        yield context


@pytest.mark.parametrize("order, chunk, vocab", [
    (1, 10, 24), (2, 1, 24), (3, 24, 24), (5, 50, 24), (5, 1000, 24), (16, 20, 65536)])
def test_e_ngram_is_witten_bell(order, chunk, vocab):
    """Equal to a dictionary of contexts, ids up to 65,535 at order 16 included."""
    ids = np.tile(e_stream(60), 4).astype(np.int64)
    boundary = np.arange(vocab) == vocab - 1
    ids = np.where(ids == E_VOCAB - 1, vocab - 1, (ids * (vocab // E_VOCAB)) % (vocab - 1))
    cache, p = t.NgramCache(ids, boundary, order), []
    for begin in range(0, len(ids) - 1, chunk):
        part = slice(begin, min(begin + chunk, len(ids) - 1))
        p.append(cache.probabilities(part))
        cache.update(part)
    wanted = e_witten_bell(ids, boundary, order, chunk, vocab)
    np.testing.assert_allclose(np.concatenate(p), wanted, rtol=1e-12)
    assert len(set(wanted.round(9))) > 5 or chunk == 1000  # then nothing was counted in time


def test_e_ngram_mixture():
    """The log of the weighted sum; weight 0 is the base, weight 1 the cache alone."""
    ids = e_stream(200)
    base, _, _ = e_score("sliding", ids)
    p = e_witten_bell(ids, np.arange(E_VOCAB) == E_VOCAB - 1, 3, 24, E_VOCAB)
    for weight in (0.0, 0.3, 1.0):
        nats, _, scores = e_score("ngram_sliding", ids, ngram_weight=weight)
        wanted = -np.log((1 - weight) * np.exp(-base.astype(float)) + weight * p)
        np.testing.assert_allclose(nats, wanted, rtol=1e-5)
        assert set(scores) == {"ngram"} and scores["ngram"].tokens == 199


# --- settings, labels, clocks ---------------------------------------------------------------


def test_e_slot_is_labelled_everywhere(a_made, tmp_path):
    """Every line, event, file and key that it makes says so; it is no headline."""
    with a_inside(tmp_path) as console:
        t.run(a_config(data_path=str(a_made[1]), load_artifact=str(a_made[2]), run_id="x",
                       slot_enabled=True, scores_path="s", slot_lr=0.5))
    lines = console.getvalue().splitlines()
    slot = [line for line in lines if "slot" in line.lower()]
    assert len(slot) == 5 and all("non_compliant" in line for line in slot)
    assert sorted(a_score_files(tmp_path / "s")) == [
        "non_compliant_slot", "roundtrip", "sliding", "ttt"]
    bpb = {line.split(": ")[0]: line.split(": ")[1] for line in lines if "_bpb: " in line}
    assert float(bpb["non_compliant_slot_bpb"]) < float(bpb["ttt_bpb"]) == float(bpb["val_bpb"])
    assert set(bpb) - {"val_bpb"} <= set(d_tool("ablate").SCORES)  # its table shows them all
    events = map(json.loads, (tmp_path / "logs/x.jsonl").read_text().splitlines())
    for event in events:
        if event["event"] == "final" and "slot" in json.dumps(event):
            assert event["mode"] == event["line"] == "non_compliant_slot"


@pytest.mark.parametrize("settings, headline", [
    (dict(), "ttt"), (dict(ttt_enabled=False), "sliding"), (dict(ngram_enabled=True), "ngram"),
    (dict(ngram_enabled=True, ttt_enabled=False), "ngram"),
    (dict(eval_modes=("roundtrip", "ttt"), ttt_enabled=False), "roundtrip"),
    (dict(eval_modes=("slot", "sliding"), slot_enabled=True), "sliding"),
])
def test_e_the_headline_follows_from_the_settings(settings, headline):
    """n-gram, else TTT, else sliding, else roundtrip; slot never; worse scores or not."""
    c, lines, runtime = a_config(**settings), [], a_runtime()
    assert [mode for mode in c.modes if mode != "slot"][-1] == headline
    runtime.log.line = lambda text, *_: lines.append(text)
    labels = ["non_compliant_slot" if mode == "slot" else mode for mode in c.modes]
    t.summarize(runtime, {}, {label: t.Score(100.0 + i * (label == headline), 50, 100, 2.0)
                              for i, label in enumerate(labels)})
    assert f"headline_mode: {headline}" in lines
    assert f"{headline}_us_per_token_and_device: 40000.0" in lines


def test_e_an_evaluation_over_600_s_is_announced():
    """By the first line of progress, counting the modes to come at the rate of this one."""
    ttt, _ = e_ttt()
    evaluator, lines = ttt.evaluator, []
    evaluator.runtime.log.line = lines.append
    for to_come, warns in (({"sliding": 100, "ttt": 850}, False), ({"ttt": 980}, True)):
        evaluator.start_clock(to_come)
        evaluator.report("roundtrip", 5, 10, 3.0)  # soon after the last line: silent
        evaluator.reported -= 25
        evaluator.began -= 25
        evaluator.report("", 5, 10, 3.0)  # validation during training: silent
        assert not lines
        evaluator.report("roundtrip", 5, 10, 3.0)  # 25 s, 3 s left, 0.6 s a window
        assert lines.pop() == "eval roundtrip windows:5/10 eta:3s" + (
            " warning: evaluation will pass 600 s" * warns)


def test_e_progress_of_a_slow_evaluation(monkeypatch):
    """A clock that jumps: lines with windows done and left for each mode, and the warning."""
    now, lines, runtime = [0.0], [], a_runtime()
    monkeypatch.setattr(t.time, "perf_counter", lambda: now.__setitem__(0, now[0] + 30) or now[0])
    runtime.log.line = lambda text, *_: lines.append(text)
    e_score("ttt", e_stream(), runtime, eval_modes=("roundtrip", "sliding", "ttt"))
    shown = [line for line in lines if line.startswith("eval ")]
    assert {line.split()[1] for line in shown} == {"roundtrip", "sliding", "ttt"}
    for line in shown:
        form = r"eval \w+ windows:(\d+)/(\d+) eta:\d+s( warning: evaluation will pass 600 s)?"
        done, total = map(int, re.fullmatch(form, line).groups()[:2])
        assert 0 < done <= total in (5, 16)
    assert any("warning" in line for line in shown)


def test_e_work_to_come_is_that_of_the_modes(monkeypatch):
    """Windows of each mode; training on a sequence costs three windows."""
    seen, start = [], t.Evaluator.start_clock
    monkeypatch.setattr(t.Evaluator, "start_clock", lambda self, to_come: seen.append(
        dict(to_come)) or start(self, to_come))
    e_score("ttt", e_stream(), eval_modes=("roundtrip", "sliding", "ttt", "ngram"),
            ngram_enabled=True)
    assert seen[-1] == {"roundtrip": 74 / 16, "sliding": 74 / 4, "ngram": 0,
                        "ttt": 74 / 4 + 3 * 2 * 74 / 16}


@pytest.mark.parametrize("count", [2, 3, 10, 17, 18])
def test_e_short_validation_works(count):
    """One token, less than a window, a window and one more: every mode scores each target."""
    for mode in E_MODES:
        nats, _, _ = e_score(mode, e_stream(count))
        assert len(nats) == count - 1 and (nats > 0).all()


def test_e_scores_that_are_not_finite_are_no_result():
    """A learning rate that destroys the model ends the run, naming the setting."""
    with pytest.raises(t.RunError, match="legal_ttt: .*lower TTT_LR"):
        e_score("ttt", e_stream(), ttt_lr=1e30, ttt_grad_clip=0.0)


def test_e_freezing_all_layers_of_a_loaded_artifact_is_refused(a_made):
    """The artifact decides the number of layers, so it is asked too."""
    c = a_config(data_path=str(a_made[1]), num_layers=6, ttt_freeze_blocks=5)
    table = t.load_byte_table(c)
    val = t.load_validation(c, table)
    with pytest.raises(t.ArtifactError, match="TTT_FREEZE_BLOCKS=5: leaves none of 4 layers"):
        t.load_model(str(a_made[2]), val, table, a_runtime(), c)


# --- dumps, artifacts, bytes ----------------------------------------------------------------


def test_e_readme_recomputes_the_score(a_made, tmp_path):
    """The README's own lines, on the dump of a run, print what the run logged."""
    with a_inside(tmp_path) as console:
        t.run(a_config(data_path=str(a_made[1]), load_artifact=str(a_made[2]),
                       scores_path="scores", ttt_chunk_tokens=128, ttt_lr=0.1))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.S)
                if "np.load" in block)
    assert len(code.strip().splitlines()) <= 10
    done = a_python(["-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    logged = dict(re.findall(r"(\w+)_exact (val_loss:\S+ val_bpb:\S+)", console.getvalue()))
    for mode, line in (("roundtrip", "final_int6_roundtrip"), ("ttt", "legal_ttt"),
                       ("sliding", "final_int6_sliding_window")):
        assert f"{mode} {logged[line]}" in done.stdout.splitlines()


def test_e_load_artifact_reproduces_the_run_bit_for_bit(a_made, tmp_path):
    """The training run's dumps and those of its artifact, evaluated later, are the same bytes."""
    more = dict(data_path=str(a_made[1]), scores_path="scores", ttt_chunk_tokens=128, ttt_lr=0.1,
                ngram_enabled=True, iterations=3)
    dumps = []
    for name in ("", str(tmp_path / "0" / "x.ptz")):
        folder = tmp_path / str(len(dumps))
        folder.mkdir()
        with a_inside(folder):
            t.run(a_config(artifact_path="x.ptz", load_artifact=name, **more))
        dumps.append(a_score_files(folder / "scores"))
    assert set(dumps[0]) == set(dumps[1]) == {"roundtrip", "sliding", "ttt", "ngram"}
    for mode, arrays in dumps[0].items():
        for name, array in arrays.items():
            assert array.tobytes() == dumps[1][mode][name].tobytes(), (mode, name)


def e_read_artifact(path):
    """(settings as text, ids of the vocabulary, {name: float64 array}) from the container's bytes.

    Written from SPEC section 5 and the layout: magic, digest, size of the header, header, streams.
    """
    data = Path(path).read_bytes()
    at = 46 + struct.unpack_from("<I", data, 42)[0]
    assert data[:10] == b"PROTEUS 3\n"
    header, seen = json.loads(zlib.decompress(data[46:at])), hashlib.sha256(data[42:])
    filters = [dict(id=lzma.FILTER_LZMA2, preset=9 | lzma.PRESET_EXTREME, lc=0, lp=0, pb=0)]
    streams = {}
    for name, codec, length, size, crc in header["streams"]:
        body, at = data[at : at + length], at + length
        assert zlib.crc32(body) == crc
        if codec == "lzma":
            streams[name] = lzma.decompress(body, lzma.FORMAT_RAW, filters=filters)
        elif codec == "zlib":
            streams[name] = zlib.decompress(body, -15)
        else:
            streams[name] = pytest.importorskip("zstandard").ZstdDecompressor().stream_reader(
                body).read()
        assert len(streams[name]) == size
        seen.update(streams[name])
    assert at == len(data) and seen.digest() == data[10:42]
    used, tensors = Counter(), {}

    def take(stream, kind, shape):
        width, count = np.dtype(kind).itemsize, math.prod(shape)
        planes = np.frombuffer(streams[stream], np.uint8).reshape(width, -1)
        begin = used[stream]
        used[stream] += count
        return np.frombuffer(planes[:, begin : begin + count].T.tobytes(), kind).astype(
            np.float64).reshape(shape)

    for name, kind, bits, shape in header["tensors"]:
        if bits > 8:
            tensors[name] = take(f"{kind}.fp{bits}", f"<f{bits // 8}", shape)
        else:
            tensors[name] = take(f"{kind}.int{bits}", "i1", shape) * take(
                "scales", "<f2", shape[:1])[:, None]
    return header["model"], header["vocab_size"], tensors


def e_parse(text):
    """A setting's text as a value."""
    if "," in text or text == "":
        return tuple(int(part) for part in text.split(",") if part)
    return float(text) if "." in text or "e" in text else int(text)


@pytest.mark.parametrize("settings", [
    dict(), dict(recur_untie_mlp=False, ve_layers=(3,)), dict(tie_embeddings=False, iterations=2)])
def test_e_independent_scorer(settings, a_made, tmp_path):
    """NumPy alone, from the artifact's bytes, gives the roundtrip nats within 1e-4 per token."""
    with a_inside(tmp_path):
        t.run(a_config(data_path=str(a_made[1]), scores_path="s", artifact_path="x.ptz",
                       eval_modes=("roundtrip",), matrix_lr=0.1, **settings))
    model, vocab, tensors = e_read_artifact(tmp_path / "x.ptz")
    c = {name.lower(): e_parse(text) for name, text in model.items()}
    c["ve_layers"], c["recur_layers"] = (  # lists even when of one entry, or none
        value if isinstance(value, tuple) else (value,)
        for value in (c["ve_layers"], c["recur_layers"]))
    with np.load(a_made[1] / "tiny.meta.npz") as meta:
        boundary = meta["is_boundary_token"]
    stream = np.concatenate([np.fromfile(path, "<u2", offset=1024)
                             for path in sorted(a_made[1].glob("fineweb_val_*.bin"))])
    ids = stream[: 10 * 32 + 1].astype(np.int64)  # ten windows of EVAL_SEQ_LEN
    logits = b_ref_scores(tensors, SimpleNamespace(**c), boundary, ids[:-1].reshape(10, 32),
                          bool(c["recur_layers"])).reshape(320, vocab)
    top = logits.max(-1)
    nats = top + np.log(np.exp(logits - top[:, None]).sum(-1)) - logits[np.arange(320), ids[1:]]
    dumped = a_score_files(tmp_path / "s")["roundtrip"]["nats"][:320]
    assert np.abs(nats - dumped).max() < 1e-4 and dumped.std() > 0.01


@needs_shared
@pytest.mark.parametrize("engine", ["scylla.yaml", "fineweb_1024_bpe.model"])
def test_e_bytes_of_every_real_document_are_exact(engine, tmp_path):
    """retokenize --docs, load, score, dump: per document, dumped bytes are its source bytes."""
    documents, flag = SHARED / "data" / "fineweb_docs.jsonl", "--sp-model"
    flag = "--vocab" if engine.endswith("yaml") else flag
    assert R.main(["--docs", str(documents), flag, str(SHARED / "data" / engine), "--split", "val",
                   "--output-dir", str(tmp_path / "out"), "--workers", "1"]) == 0
    c = a_config(data_path=str(tmp_path / "out"), eval_stride=32, val_batch_size=1 << 16,
                 scores_path=str(tmp_path))
    table = t.load_byte_table(c)
    evaluator = t.Evaluator(a_runtime(), c, t.load_validation(c, table))
    evaluator.save_scores("x", evaluator.score(lambda x, y: y.float(), 32)[1])
    dump = np.load(tmp_path / "x.npz")
    assert evaluator.val.audit == "exact" and np.array_equal(dump["ids"], dump["nats"])
    ids = np.append(evaluator.val.ids[0], dump["ids"])  # the first id is context only
    begins = np.flatnonzero(table.is_boundary[ids])
    texts = [json.loads(line)["text"] for line in documents.read_text(
        encoding="utf-8").splitlines()]
    assert begins[0] == 0 and len(begins) == len(texts) == 120
    if flag == "--sp-model":  # its source text is what it decodes to
        sp = pytest.importorskip("sentencepiece").SentencePieceProcessor(
            model_file=str(SHARED / "data" / engine))
        texts = [sp.decode(ids[a + 1 : b].tolist()) for a, b in zip(
            begins, [*begins[1:], len(ids)], strict=True)]
    counted = np.add.reduceat(np.append(0, dump["bytes"]), begins)
    assert counted.tolist() == [len(text.encode()) for text in texts]


# ==========================================================================================
# packing, record folders, plans, run_8xh100.sh
# ==========================================================================================

# helpers: the tools of records/, tiny runs of packed code, a record folder made of them

@functools.cache
def r_tool(name):
    """A script of records/ as a module; the modules that it imports are shared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "records")
        return importlib.import_module(name)


def r_data(folder):
    """Byte-exact shards of both splits with vocabulary and ledger, made by the re-tokenizer."""
    vocabulary = folder / "tiny.yaml"
    vocabulary.write_bytes(R.vocabulary_yaml([bytes([k]) for k in range(256)] + RETOK_TOKENS))
    for seed, (split, count) in enumerate((("train", 60), ("val", 12))):
        documents = folder / f"{split}.jsonl"
        documents.write_text("".join(json.dumps({"text": text}) + "\n"
                                     for text in retok_texts(count, seed)))
        assert R.main(["--docs", str(documents), "--vocab", str(vocabulary), "--split", split,
                       "--output-dir", str(folder / "data"), "--workers", "1"]) == 0
    return folder / "data"


def r_load(path):
    """A train_gpt.py, packed or not, as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"r_{path.parent.name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def r_run(module, folder, seed, data):
    """A tiny run of a module in a folder, under the name that run_8xh100.sh gives it."""
    environ = a_environ(data_path=str(data), seed=seed, run_id=f"seed{seed}",
                        artifact_path=f"seed{seed}.ptz", ttt_chunk_tokens=64)
    with a_inside(folder), pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        assert module.main([]) == 0
    return folder / "logs" / f"seed{seed}.txt"


@pytest.fixture(scope="module")
def r_runs(tmp_path_factory):
    """Three tiny runs of a copy of the script: (its path, data, logs)."""
    folder = tmp_path_factory.mktemp("runs")
    code, data = folder / "train_gpt.py", r_data(folder)
    shutil.copy(ROOT / "train_gpt.py", code)
    return code, data, [r_run(r_load(code), folder, s, data) for s in (42, 1337, 2024)]


@pytest.fixture(scope="module")
def r_packed(r_runs, tmp_path_factory):
    """The packed script and a tiny run of it: (its path, module, log)."""
    packed = tmp_path_factory.mktemp("packed") / "train_gpt.py"
    packed.write_bytes(r_tool("pack").pack((ROOT / "train_gpt.py").read_text()))
    module = r_load(packed)
    return packed, module, r_run(module, packed.parent, 42, r_runs[1])


def r_make(code, logs, records, *more):
    """Exit code of `make` on runs."""
    return r_tool("make_record").main(
        ["make", "--name", "Tiny", "--author", "A. Nobody", "--github-id", "nobody", "--date",
         "2030-01-02", "--code", str(code), "--records", str(records), *more, *map(str, logs)])


@pytest.fixture(scope="module")
def r_folder(r_runs, tmp_path_factory):
    """A record folder made of the tiny runs, artifacts included."""
    records = tmp_path_factory.mktemp("records")
    assert r_make(r_runs[0], r_runs[2], records, "--track", "track_non_record_16mb",
                  "--artifacts") == 0
    return records / "track_non_record_16mb" / "2030-01-02_Tiny"


def r_edit(path, old, new):
    """Replace text in a file; it must be there."""
    text = path.read_text()
    assert old in text, (path, old)
    path.write_text(text.replace(old, new))


def r_submission(folder, **changes):
    """Change submission.json; a dotted name goes inside, None removes."""
    path = folder / "submission.json"
    about = json.loads(path.read_text())
    for name, value in changes.items():
        *inside, last = name.split("__")
        place = about
        for key in inside:
            place = place[key]
        place[last] = value
        if value is None:
            del place[last]
    path.write_text(json.dumps(about))


@pytest.fixture
def r_record(r_folder, tmp_path, monkeypatch):
    """A copy of the folder as if it had run on 8xH100 and its text were all of FineWeb's."""
    folder = tmp_path / "track_10min_16mb" / "2030-01-02_Tiny"
    shutil.copytree(r_folder, folder)
    for log in folder.glob("*.log"):
        r_edit(log, "\nworld_size:1 ", "\nworld_size:8 ")
        log.write_text(re.sub(r"device:cpu x\d+ ", "device:NVIDIA H100 80GB HBM3 ",
                              log.read_text()))
    r_submission(folder, track="track_10min_16mb", hardware="8 x NVIDIA H100 80GB HBM3")
    r_edit(folder / "README.md", "track_non_record_16mb", "track_10min_16mb")
    (folder / "README.md").write_text(re.sub(r"1 x cpu x\d+", "8 x NVIDIA H100 80GB HBM3",
                                             (folder / "README.md").read_text()))
    rules = r_tool("rules")
    known = rules.published()
    known["facts"]["validation_bytes"] = json.loads(
        (folder / "submission.json").read_text())["compliance"]["scored_bytes"]
    monkeypatch.setattr(rules, "published", lambda: known)
    return folder


# packing


@pytest.mark.slow
def test_r_packed_code_runs_the_same(r_runs, r_packed):
    """Losses, scores and artifact of the packed script are those of the readable one."""
    ours, theirs = r_packed[2], r_runs[2][0]
    folders = [log.parent.parent for log in (ours, theirs)]
    assert len({tuple(a_losses(folder, "seed42")) for folder in folders}) == 1
    assert len({(folder / "seed42.ptz").read_bytes() for folder in folders}) == 1
    exact = r"\w+_exact val_loss:[\d.]+ val_bpb:[\d.]+"
    assert re.findall(exact, ours.read_text()) == re.findall(exact, theirs.read_text()) != []


@pytest.mark.slow
def test_r_packed_code_is_complete(r_packed):
    """The same program and settings."""
    pack, (packed, small, _) = r_tool("pack"), r_packed
    source = (ROOT / "train_gpt.py").read_text()
    readable = "".join(linecache.getlines(f"{packed} (unpacked)"))
    assert ast.dump(pack.bare(readable)) == ast.dump(pack.bare(source))
    assert vars(small).keys() >= {n for n in vars(t) if not n.startswith("__")}
    assert [(f.name, f.type, f.default) for f in fields(small.Config)] == [
        (f.name, f.type, f.default) for f in fields(t.Config)]


@pytest.mark.slow
def test_r_packed_code_is_small():
    """At most 32,000 bytes, stub and decoder with them."""
    pack = r_tool("pack")
    assert len(pack.pack((ROOT / "train_gpt.py").read_text())) <= pack.LARGEST == 32_000


def test_r_pack_is_a_command(tmp_path, monkeypatch):
    """A file packed whole, an exit code; what is not packed is read as it is."""
    pack, source = r_tool("pack"), (ROOT / "train_gpt.py").read_text()
    assert pack.unpack(source.encode()) == source
    (tmp_path / "tiny.py").write_text(R_SOURCE)
    assert pack.main([str(tmp_path / "tiny.py"), "--output", str(tmp_path / "a" / "p.py")]) == 0
    assert (tmp_path / "a" / "p.py").read_bytes() == pack.pack(R_SOURCE)
    for wrong in (["none.py", "--output", "x"], ["--unpack", str(tmp_path / "none.py")]):
        assert pack.main(wrong) == 2
    monkeypatch.setattr(pack, "LARGEST", 1000)  # the file is there, and the code says so
    assert pack.main([str(tmp_path / "tiny.py"), "--output", str(tmp_path / "a" / "p.py")]) == 1


R_SOURCE = ('"""Doc."""\n\n\nclass A(NamedTuple):\n    """Gone."""\n\n    x: int = 1  # gone\n\n'
            '    def f(self, a: int = 2, *b: str) -> dict[str, int]:\n        """Gone."""\n'
            '        text: str = """kept # here\n            and indented\n        """\n'
            '        if a:\n            return {"->": "#\\u2581",\n                    text: a}\n'
            '        return b\n\n    def g(self):\n        """All of it."""\n\n\n'
            '@dataclass\nclass B(A):\n    y: int = setting(3, "help", 1)  # an int\n'
            '    if A:\n        z: int\n\n'
            'async def h(a: int):\n    b: int\n    return A.setting(a, "kept", c=setting(4))\n')


def test_r_minify_keeps_strings_types_of_dataclasses_and_nesting(monkeypatch):
    """Comments, docstrings, help and other annotations go; text that looks like them stays."""
    pack = r_tool("pack")
    assert pack.minify(R_SOURCE) == (
        f"{pack.ABOUT}\n\nclass A(NamedTuple):\n x: 0 = 1\n\n def f(self, a=2, *b):\n"
        "  text = 'kept # here\\n            and indented\\n        '\n"
        "  if a:\n   return {'->': '#\\u2581', text: a}\n  return b\n\n"
        " def g(self):\n  pass\n\n@dataclass\nclass B(A):\n y: int = setting(3, '', 1)\n"
        " if A:\n  z: int\n\n"
        "async def h(a):\n b: int\n return A.setting(a, 'kept', c=setting(4))\n")
    monkeypatch.setattr(pack, "written", lambda tree: ast.unparse(tree).replace("3", "4"))
    with pytest.raises(pack.PackError, match="not the same"):
        pack.minify(R_SOURCE)


def test_r_every_python_writes_the_packed_program_alike():
    """No f-string has a string in its braces, which Python 3.12 alone quotes otherwise."""
    for path in ("train_gpt.py", "records/mixing.py"):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            held = [c.value for part in getattr(node, "values", ()) for c in ast.walk(part)
                    if isinstance(part, ast.FormattedValue) and isinstance(c, ast.Constant)
                    and c not in ast.walk(part.format_spec or ast.Pass())]
            assert not any(isinstance(value, str) for value in held), ast.unparse(node)


def test_r_packed_file_is_read_without_running_it(tmp_path):
    """Its source comes back; damage, another decoder and another stub are named, never run."""
    pack = r_tool("pack")
    good = pack.pack(R_SOURCE)
    assert pack.unpack(good) == pack.minify(R_SOURCE)
    (tmp_path / "packed.py").write_bytes(good)
    assert pack.main([str(tmp_path / "packed.py"), "--unpack"]) == 0
    place = good.index(b'S=D["decode"]("') + 60
    digit = good[place : place + 1]
    bad_digit = good[:place] + (b"a" if digit != b"a" else b"b") + good[place + 1 :]
    marker = tmp_path / "ran"
    evil = zlib.compress(f"open({str(marker)!r}, 'w')\ndecode = lambda d, n: ''".encode())
    other = good.replace(pack.literal(zlib.compress(pack.decoder().encode(), 9)).encode("latin-1"),
                         pack.literal(evil).encode("latin-1"))
    assert other != good
    digit_0 = chr(r_tool("mixing").DIGITS[0]).encode("latin-1")
    more = b'12 * x".encode("latin-1"),1,S);open("ran","w");("'.replace(b"12 * x", 12 * digit_0)
    text_end = good.index(b'".encode("latin-1"),%d,S)' % len(pack.minify(R_SOURCE)))
    injected = good[:text_end] + more + good[text_end:]
    long = pack.decoder() + "\n" * (1 << 16) + "open('ran', 'w')\n"
    deep = pack.decoder().replace("32700", "32701")

    def carrying(text, size=None):
        """The packed file with another decoder, or another number of characters."""
        small, data = pack.minify(R_SOURCE), zlib.compress(text.encode(), 9)
        parts = data, r_tool("mixing").encode(small, pack.decoder())
        return (pack.STUB % (*map(pack.literal, parts), size or len(small),
                             zlib.crc32(small.encode()))).encode("latin-1")

    assert carrying(pack.decoder()) == good and deep != pack.decoder()
    for data, reason in ((bad_digit, "CRC-32"), (other, "decoder is not"),
                         (injected, "this version"), (carrying(long), "decoder is not"),
                         (carrying(deep), "decoder is not"), (carrying("def ("), "damaged"),
                         (carrying(pack.decoder(), 9_999_999_999), "this version"),
                         (carrying("#" * (1 << 27)), "decoder is not"),
                         (good + b"import os\n", "this version"),
                         (good.replace(b"exec(compile", b"exit(compile"), "this version"),
                         (good.replace(b"\nS=", b"\nimport os\nS="), "this version"),
                         (good.replace(b'S=zlib.decompress("x', b'S=zlib.decompress("y'),
                          "damaged")):
        with pytest.raises(pack.PackError, match=reason):
            pack.unpack(data)
    assert not marker.exists() and pack.unpack(b"\xff") == "\ufffd"  # somebody else's packer
    assert pack.unpack(b"a = 1\r\nb = 2\r\n") == "a = 1\nb = 2\n"  # as Python reads it
    pairs = bytes(value for a in range(256) for b in range(256) for value in (a, b))
    assert ast.literal_eval(f'"{pack.literal(pairs)}"').encode("latin-1") == pairs


def test_r_mixing_gives_every_text_back():
    """Empty, short, repetitive and random texts; only characters that a literal can hold."""
    mixing, random = r_tool("mixing"), np.random.default_rng(0)
    noise = "".join(map(chr, random.integers(0, 128, 300)))
    texts = ("", "a", "\0", "\x7f" * 500, noise, "def f(x):\n    return {x: ['(']}\n" * 20)
    for text in texts:
        data = mixing.encode(text, "known")
        assert mixing.decode(data, len(text), "known") == text, text
        assert not set(data) & set(b'\0\n\r"\\') and len(data) <= 1.1 * len(text) + 6
    alone, twice = (len(mixing.encode(texts[-1], known)) for known in ("", texts[-1]))
    assert twice < alone / 2 < len(texts[-1]) / 24
    with pytest.raises(ValueError, match="section not found"):
        mixing.decode(b"\n", 5, "")


def test_r_mixing_rounds_alike_everywhere():
    """No entry of its two tables is near enough to a tie for another libm to round it otherwise."""
    source = Path(r_tool("mixing").__file__).read_text()
    tables = re.findall(r"round\((.*)\) for (\w) in (\w+|range\(.*?\))[ \]]", source)
    assert len(tables) == source.count("math.") == 2  # nothing else asks the libm
    for formula, name, places in tables:
        for value in eval(places, dict(odds=range(1, 4096))):
            exact = eval(formula, {"math": math, name: value})
            assert abs(exact % 1 - 0.5) > 1e-8, (formula, value)


@pytest.mark.slow
def test_r_mixing_is_arithmetic_coding():
    """The file is as long as the model's probabilities say, and shorter than bzip2 by a quarter."""
    mixing, pack = r_tool("mixing"), r_tool("pack")
    text, nats = pack.minify((ROOT / "train_gpt.py").read_text()), 0.0
    told = mixing.bits_of(text)

    def choose(p):
        nonlocal nats
        bit = next(told)
        nats -= math.log((p if bit else 65536 - p) / 65536)
        return bit

    assert mixing.model(choose, len(text)) == text
    size = len(mixing.encode(text, ""))
    assert abs(size - nats / math.log(251)) < 10
    assert size < 0.8 * len(bz2.compress(text.encode(), 9))


@pytest.mark.slow
def test_r_packed_code_names_itself(r_packed):
    """The log begins with the source that runs and names the file's hash and size."""
    packed, _, log = r_packed
    text = log.read_text()
    assert text.startswith("".join(linecache.getlines(f"{packed} (unpacked)")))
    assert f"\ncode_sha256:{t.sha256_file(packed)} bytes:{packed.stat().st_size}\n" in text
    assert f"\nCode size: {packed.stat().st_size} bytes\n" in text


@pytest.mark.slow
def test_r_packed_code_starts_as_a_script(r_packed):
    """A line for a user's error, a traceback with source for its own; packed alike elsewhere."""
    packed = r_packed[0]
    again = packed.with_name("again.py")
    a_python([ROOT / "records" / "pack.py", ROOT / "train_gpt.py", "--output", again],
             packed.parent, dict(PYTHONHASHSEED="7"))
    assert again.read_bytes() == packed.read_bytes()
    done = a_python([packed], packed.parent, dict(PRESET="demo", DATA_PATH="nowhere"))
    assert done.returncode == 1 and done.stderr.startswith("error: no shards match")
    assert "QK_GAIN_INIT" in a_python([packed, "--help"], packed.parent, {}).stdout
    code = ("import runpy, sys\nsys.argv = ['train_gpt.py']\nimport torch\n"
            f"torch.manual_seed = None\nrunpy.run_path({str(packed)!r}, run_name='__main__')")
    broken = a_python(["-c", code], packed.parent, dict(PRESET="demo"))
    assert "torch.manual_seed(c.seed)" in broken.stderr, broken.stderr


# reading logs, statistics


def test_r_student_t_is_exact():
    """Tails and quantiles against mpmath's incomplete beta function and the printed tables."""
    import mpmath  # comes with torch

    welch = r_tool("welch")
    for tail, freedom in ((0.3, 1.5), (2.0, 2.0), (-1.2, 3.7), (5.0, 40.0), (30.0, 2.2)):
        x = mpmath.mpf(freedom) / (freedom + tail * tail)
        half = mpmath.betainc(freedom / 2, 0.5, 0, x, regularized=True) / 2
        exact = float(half if tail >= 0 else 1 - half)
        assert welch.t_tail(tail, freedom) == pytest.approx(exact, rel=1e-12)
    for freedom, value in ((1, 12.7062), (2, 4.30265), (4, 2.77645), (30, 2.04227)):
        assert welch.t_quantile(0.025, freedom) == pytest.approx(value, abs=1e-5)


def test_r_welch_by_hand():
    """Mean, deviation, interval, t, degrees of freedom and the bar, worked out by hand."""
    welch = r_tool("welch")
    ours, theirs = welch.sample([1.0, 2.0, 3.0]), welch.sample([5.0, 9.0])
    assert (ours.mean, ours.std, ours.n) == (2.0, 1.0, 3)
    assert ours.interval == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)
    test = welch.welch(ours, theirs, 1.0)
    error = 1 / 3 + 8 / 2
    assert test.difference == 5.0 and test.t == pytest.approx(4.0 / math.sqrt(error))
    assert test.freedom == pytest.approx(error**2 / ((1 / 3) ** 2 / 2 + 4.0**2 / 1))
    assert test.p == welch.t_tail(test.t, test.freedom) < 0.5
    assert welch.welch(ours, welch.sample([5.0])) is None and welch.sample([5.0]).interval is None


def test_r_reader_knows_both_dialects(r_runs, tmp_path):
    """Our log and two published dialects give the same kinds of facts."""
    runs = r_tool("runs")
    run = runs.read_run(r_runs[2][0])
    assert run.ours and run.finished and run.seed == 42 and not run.resumed
    assert run.settings["MODEL_DIM"] == "32" and run.steps == 8 and len(run.train) == 8
    assert run.headline == run.scores["ttt"]._replace(eval_ms=None)
    assert run.audit == "exact" and run.total_bytes == run.artifact_bytes + run.code_bytes
    field = tmp_path / "train_seed7.log"
    field.write_text(
        "1/20000 train_loss: 9.0087 train_time: 0.5m tok/s: 17\nseed:7\n"
        "4945/20000 val_loss: 2.3539 val_bpb: 1.0756\nmodel_params:123\n"
        "stopping_early: wallclock_cap train_time: 599592ms step: 4945/20000\n"
        "diagnostic pre-quantization post-ema val_loss:2.3284 val_bpb:1.0639 eval_time:6718ms\n"
        "Code size (uncompressed): 157868 bytes\nCode size (compressed): 31999 bytes\n"
        "Serialized model: 135417533 bytes\nSerialized model quantized+x: 15865260 bytes\n"
        "Total submission size quantized+x: 15897259 bytes\n"
        "final_sliding_window_eval stride:64 val_loss:1.9511 val_bpb:1.1556 eval_time:75096ms\n"
        "final_sliding_window_eval_exact stride:64 val_loss:1.95110428 val_bpb:1.15555486\n"
        "quantized_ttt_phased val_loss:2.31944212 val_bpb:1.05989454 eval_time:508785ms\n")
    run = runs.read_run(field)
    assert (run.seed, run.steps, run.train_ms, run.params) == (7, 4945, 599592.0, 123)
    assert run.train[0] == runs.Point(1, 9.0087, None, 30000.0)
    assert (run.code_bytes, run.artifact_bytes, run.total_bytes) == (31999, 15865260, 15897259)
    assert run.scores["sliding"] == (1.95110428, 1.15555486, 75096.0, True)
    assert run.headline.bpb == 1.05989454 and run.eval_seconds == pytest.approx(583.881)
    assert not run.ours and run.audit is None
    with pytest.raises(runs.RecordError, match="nothing"):
        runs.find_run_log("nothing")


# the folder: made, refused, verified


def test_r_made_folder_is_right(r_folder, r_runs):
    """All files are there, every number is the logs', and nothing is wrong with it."""
    about = json.loads((r_folder / "submission.json").read_text())
    names = {p.name for p in r_folder.iterdir()}
    assert names >= {"README.md", "requirements.txt", "train_gpt.py", "manifest.json", "curves.png",
                     "tiny.yaml", "scylla.meta.npz", "train_seed42.log", "model_seed42.ptz"}
    scores = [float(re.search(r"exact val_loss:\S+ val_bpb:(\S+)\n\Z", log.read_text())[1])
              for log in r_runs[2]]
    assert [about["seed_results"][k]["val_bpb"] for k in ("42", "1337", "2024")] == scores
    assert about["val_bpb"] == pytest.approx(np.mean(scores), abs=1e-8)
    assert about["val_bpb_std"] == pytest.approx(np.std(scores, ddof=1), abs=1e-8)
    assert about["bytes_code"] == r_runs[0].stat().st_size
    assert about["bytes_total"] == max(
        (r_folder / f"model_seed{k}.ptz").stat().st_size for k in about["seeds"]) + about[
            "bytes_code"]
    assert about["attribution"]["Muon"] == "@KellerJordan, Keller Jordan et al."
    assert "MuonEq-R with depth recurrence" not in about["attribution"]
    text = (r_folder / "README.md").read_text()
    assert f"**{np.mean(scores):.5f} BPB**" in text
    command = re.search(r"\nDATA_PATH=<shards> (.*) SEED=<seed> torchrun", text)[1]
    changed = {k: v for k, v in a_environ(ttt_chunk_tokens=64).items()
               if t.show(getattr(t.Config(), k.lower())) != v}
    assert dict(re.findall(r"(\w+)='(.*?)'", command)) == changed | {"PRESET": "record"}
    assert r_tool("rules").verify(r_folder) == []


@pytest.mark.slow
def test_r_committed_folders_are_right():
    """Every record folder of this repository breaks no rule."""
    folders = [path for path in (ROOT / "records").glob("track_*/*") if path.is_dir()]
    assert folders
    for path in folders:
        assert r_tool("rules").verify(path) == [], path


def test_r_make_refuses(r_runs, tmp_path, capsys):
    """Other code, a missing artifact, one seed twice, a run cut short: an error and no folder."""
    code, _, logs = r_runs
    cases = [([logs[0], logs[0]], code, "one log for each seed"),
             (logs, ROOT / "retokenize_scylla.py", "give the file that ran with --code")]
    copy = tmp_path / "run"
    shutil.copytree(code.parent / "logs", copy / "logs")
    cases.append(([copy / "logs" / "seed42.txt"], code, "ARTIFACT_PATH of its own"))
    torn = copy / "logs" / "torn.txt"
    torn.write_text(logs[0].read_text()[:-300])
    cases.append(([torn], code, "run the seed again"))
    for some, code, message in cases:
        assert r_make(code, some, tmp_path / "records") == 1
        assert message in capsys.readouterr().err
    assert r_make(code, logs, tmp_path / "records") == 1  # on a CPU it is no record
    assert "hardware" in capsys.readouterr().out
    assert not [p for p in (tmp_path / "records").rglob("*") if p.is_file()]


def r_meta(folder, more):
    """Count one id's bytes otherwise."""
    with np.load(folder / "scylla.meta.npz") as meta:
        arrays = dict(meta)
    arrays["base_bytes"][65] += more
    np.savez(folder / "scylla.meta.npz", **arrays)


def r_log(folder, old, new, seed=42):
    r_edit(folder / f"train_seed{seed}.log", old, new)


def r_chunks(folder, *chunks):
    r_log(folder, "\nfinal_int6_roundtrip ", "".join(
        f"\nttt_chunk [{n}/9] bpb=1.0 time=1.0s" for n in chunks) + "\nfinal_int6_roundtrip ")


def r_headline(folder, seed=42):
    return re.search(r"exact val_loss:(\S+) val_bpb:(\S+)\n\Z",
                     (folder / f"train_seed{seed}.log").read_text())


def r_train_time(folder, ms):
    path = folder / "train_seed42.log"
    path.write_text(re.sub(r"(val_bpb:\S+ train_time:)\d+ms", rf"\g<1>{ms}ms", path.read_text()))


def r_time_on(line, folder):
    path = folder / "train_seed42.log"
    text, count = re.subn(rf"(?m)^({line})\d+", r"\g<1>600100", path.read_text())
    path.write_text(text)
    assert count == 1


def r_again(folder, pattern, text):
    """Replace a pattern in the first log."""
    path = folder / "train_seed42.log"
    altered, count = re.subn(pattern, text, path.read_text())
    assert count == 1, count
    path.write_text(altered)


def r_claims(folder):
    return json.loads((folder / "submission.json").read_text())["seed_results"]


def r_least(folder):
    about = json.loads((folder / "submission.json").read_text())
    return about["bytes_code"] + min(c["artifact_bytes"] for c in r_claims(folder).values())


def r_credit(folder):
    """Take the first credit for oneself."""
    path = folder / "submission.json"
    about = json.loads(path.read_text())
    about["attribution"][next(iter(about["attribution"]))] = "me"
    path.write_text(json.dumps(about))


def r_totals(folder, factor):
    """Totals of the validation text that are not the sum of its shards."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["totals"]["val"]["source_bytes"] *= factor
    path.write_text(json.dumps(manifest))


def r_over_the_cap(folder):
    log = folder / "train_seed42.log"
    total = 16_000_001
    artifact = total - json.loads((folder / "submission.json").read_text())["bytes_code"]
    log.write_text(re.sub(r"(Total submission size:) \d+", rf"\1 {total}", re.sub(
        r"(Serialized model \S+:) \d+", rf"\1 {artifact}", log.read_text())))
    (folder / "model_seed42.ptz").unlink()
    r_submission(folder, bytes_total=total, seed_results__42__artifact_bytes=artifact)


R_BROKEN = {  # what is done to the folder -> rule, and a part of where it is found
    "altered val_bpb of a seed": (lambda f: r_submission(
        f, seed_results__42__val_bpb=float(r_headline(f)[2]) - 1e-6), "scores", "seed 42"),
    "altered roundtrip": (lambda f: r_submission(f, seed_results__42__roundtrip_bpb=1.5),
                          "scores", "seed 42"),
    "altered mean": (lambda f: r_submission(f, val_bpb=1.0), "means", "submission.json"),
    "altered deviation": (lambda f: r_submission(f, val_bpb_std=0.5), "means", "submission.json"),
    "missing log": (lambda f: (f / "train_seed1337.log").unlink(), "seeds", "submission.json"),
    "two seeds": (lambda f: [(f / "train_seed1337.log").unlink(), r_submission(
        f, seeds=[42, 2024], seed_results__1337=None)], "seeds", "train_seed"),
    "a log under another seed's name": (lambda f: (f / "train_seed42.log").rename(
        f / "train_seed7.log"), "seeds", "train_seed7.log"),
    "steps of another run": (lambda f: r_submission(f, seed_results__42__steps=10), "scores",
                             "seed 42"),
    "log of a seed that is not claimed": (lambda f: r_submission(
        f, seed_results__1337=None, seeds=[42, 2024]), "seeds", "train_seed1337.log"),
    "duplicated log": (lambda f: shutil.copy(f / "train_seed42.log", f / "train_seed1337.log"),
                       "duplicates", "train_seed"),
    "the log of another seed": (lambda f: (f / "train_seed1337.log").write_text(
        (f / "train_seed42.log").read_text().replace("\nseed:42\n", "\nseed:1337\n").replace(
            "\nSEED=42\n", "\nSEED=1337\n")), "duplicates", "train_seed"),
    "a log with one loss altered": (lambda f: (f / "train_seed1337.log").write_text(re.sub(
        r"(step:4/.*loss:)\S+", r"\g<1>3.0", (f / "train_seed42.log").read_text())), "duplicates",
        "train_seed"),
    "one artifact for two seeds": (lambda f: r_submission(
        f, seed_results__42__artifact_sha256=r_claims(f)["1337"]["artifact_sha256"]), "duplicates",
        "train_seed"),
    "a log with other times only": (lambda f: (f / "train_seed1337.log").write_text(re.sub(
        r"time:\d+", "time:7", (f / "train_seed42.log").read_text())), "duplicates", "train_seed"),
    "a seed with another setting": (lambda f: r_log(f, "\nMATRIX_LR=", "\nMATRIX_LR=9"),
                                    "configuration", "train_seed"),
    "a seed with another torch": (lambda f: r_log(f, " torch 2", " torch 9", 2024),
                                  "configuration", "train_seed2024.log"),
    "a seed on another GPU": (lambda f: r_log(f, "device:NVIDIA H100", "device:a H100"),
                              "configuration", "train_seed"),
    "no seed in the log": (lambda f: r_log(f, "\nseed:42\n", "\n"), "configuration",
                           "train_seed42.log"),
    "an artifact that was there": (lambda f: r_again(
        f, "\nLOAD_ARTIFACT=", "\nLOAD_ARTIFACT=x.ptz"), "configuration", "train_seed42.log"),
    "more steps than settings": (lambda f: [r_log(f, "\nITERATIONS=8", "\nITERATIONS=7", seed)
                                            for seed in (42, 1337, 2024)], "configuration",
                                 "train_seed42.log"),
    "another seed in the settings": (lambda f: r_log(f, "\nSEED=42\n", "\nSEED=1337\n"),
                                     "configuration", "train_seed42.log"),
    "log of other code": (lambda f: r_log(f, "\ncode_sha256:", "\ncode_sha256:0" * 1),
                          "code text", "train_seed42.log"),
    "other source in the log": (lambda f: r_log(f, "def main(", "def man("), "code text",
                                "train_seed42.log"),
    "code of another size": (lambda f: r_log(f, "\nCode size: ", "\nCode size: 1"), "code",
                             "train_seed42.log"),
    "bytes_code": (lambda f: r_submission(f, bytes_code=5), "code", "submission.json"),
    "over the cap": (r_over_the_cap, "sizes", "train_seed42.log"),
    "a total that does not add up": (lambda f: r_again(
        f, r"(Total submission size: )\d+", r"\g<1>9"), "sizes", "train_seed42.log"),
    "artifact of another size": (lambda f: (f / "model_seed42.ptz").write_bytes(b"x"), "sizes",
                                 "model_seed42.ptz"),
    "bytes_total": (lambda f: r_submission(f, bytes_total=5), "sizes", "submission.json"),
    "not the largest total": (lambda f: r_submission(f, bytes_total=r_least(f)), "sizes",
                              "submission.json"),
    "training for 600.1 s": (lambda f: r_train_time(f, 600100), "clock", "train_seed42.log"),
    "a step at 600.1 s": (lambda f: r_again(
        f, r"(\nstep:5/.*train_time:)\d+", r"\g<1>600100"), "clock", "train_seed42.log"),
    **{f"{line} at 600.1 s": (functools.partial(r_time_on, line), "clock", "train_seed42.log")
       for line in ("train_clock slowest_rank:", "gptq_calibration train_time:", "train_ms: ")},
    "evaluation for 601 s": (lambda f: (f / "train_seed42.log").write_text(re.sub(
        r"seconds_eval: \S+", "seconds_eval: 601.0", (f / "train_seed42.log").read_text())),
        "evaluation clock", "train_seed42.log"),
    "a chunk scored again": (lambda f: r_again(f, r"(\nttt_chunk \[3/.*)", r"\1\1"), "order",
                             "train_seed42.log"),
    "a chunk too many": (lambda f: r_again(f, r"(\nttt_chunk \[)31(/31.*)", r"\g<1>31\2\g<1>33\2"),
                         "order", "train_seed42.log"),
    "601 s on the line of a stage": (lambda f: r_again(
        f, r"(\nfinal_int6_sliding_window .*eval_time:)\d+", r"\g<1>601000"), "evaluation clock",
        "train_seed42.log"),
    "a chunk left out": (lambda f: (f / "train_seed42.log").write_text(re.sub(
        r"(\nttt_chunk.*)\nttt_chunk.*", r"\1", (f / "train_seed42.log").read_text(), count=1)),
        "order", "train_seed42.log"),
    "the last chunk left out": (lambda f: (f / "train_seed42.log").write_text(re.sub(
        r"\nttt_chunk \[(\d+)/\1\]", "\nchunk", (f / "train_seed42.log").read_text())), "order",
        "train_seed42.log"),
    "a chunk out of order": (lambda f: r_chunks(f, 2, 1), "order", "train_seed42.log"),
    "TTT's headline without TTT": (lambda f: (f / "train_seed42.log").write_text(re.sub(
        r"\nlegal_ttt.*", "", (f / "train_seed42.log").read_text())), "headline", "train_seed42"),
    "an invented headline": (lambda f: r_again(f, r"exact (\S+) val_bpb:\S+\n\Z", (
        r"exact \1 val_bpb:1.00000000\n")), "headline", "train_seed42.log"),
    "another mode's headline": (lambda f: r_again(
        f, "\nheadline_mode: ttt", "\nheadline_mode: sliding"), "headline", "train_seed42.log"),
    "another mode's score": (lambda f: r_submission(f, seed_results__42__val_bpb=json.loads(
        (f / "submission.json").read_text())["seed_results"]["42"]["sliding_bpb"]), "scores",
        "submission.json seed 42"),
    "bytes not proven": (lambda f: r_log(f, "\nbyte_audit:exact", "\nbyte_audit:unverified"),
                         "audit", "train_seed42.log"),
    "bytes of another text": (lambda f: r_edit(f / "manifest.json", '"source_bytes": ',
                                               '"source_bytes": 1'), "audit", "train_seed42"),
    "score a little off those bytes": (lambda f: r_log(
        f, r_headline(f)[2], f"{float(r_headline(f)[2]) + 2e-6:.8f}"), "audit", "train_seed42"),
    "bytes that differ by seed": (lambda f: r_again(f, r"(\nbyte_audit:exact bytes:)", r"\g<1>1"),
                                  "audit", "train_seed<k>.log"),
    "score not over those bytes": (lambda f: r_log(
        f, r_headline(f)[2], f"{float(r_headline(f)[2]) * 0.95:.8f}"), "audit", "train_seed42"),
    "no attribution": (lambda f: r_submission(f, attribution={}), "attribution", "submission"),
    "the first credit": (r_credit, "attribution", "submission.json"),
    "wrong credit": (lambda f: r_submission(f, attribution__Muon="me"), "attribution",
                     "submission.json"),
    "resumed, says the summary": (lambda f: r_again(f, "\nresumed: 0", "\nresumed: 1"), "complete",
                                  "train_seed42.log"),
    "more after the end": (lambda f: (f / "train_seed42.log").write_text(
        (f / "train_seed42.log").read_text() + "more\n"), "complete", "train_seed42.log"),
    "two audits": (lambda f: r_again(f, "\nbyte_audit:exact", "\nbyte_audit:unverified bytes:1"
                                     "\nbyte_audit:exact"), "complete", "train_seed42.log"),
    "another total in the summary": (lambda f: r_again(f, r"\nbytes_total: \d+",
                                                       "\nbytes_total: 17000000"), "complete",
                                     "train_seed42.log"),
    "resumed run": (lambda f: r_log(f, "\nseed:42\n", (
        "\nseed:42\nresumed step:3 of checkpoints/seed42\n")), "complete", "train_seed42.log"),
    "log cut short": (lambda f: (f / "train_seed42.log").write_text(
        (f / "train_seed42.log").read_text().rsplit("\n", 2)[0]), "complete", "train_seed42.log"),
    "a fourth log, hidden": (lambda f: (f / "worse").mkdir() or shutil.copy(
        f / "train_seed42.log", f / "worse" / "seed7.log"), "duplicates", "seed7.log"),
    "another GPU": (lambda f: r_log(f, "NVIDIA H100", "NVIDIA A100"), "hardware", "train_seed42"),
    "no ranks": (lambda f: r_again(f, r"\nworld_size:8 ", "\n"), "hardware", "train_seed42.log"),
    "four ranks": (lambda f: r_log(f, "\nworld_size:8", "\nworld_size:4"), "hardware",
                   "train_seed42.log"),
    "its score in the claims": (lambda f: [r_again(f, "\nfinal_int6_roundtrip ", (
        "\nslot non_compliant val_loss:1.0 val_bpb:0.9\nfinal_int6_roundtrip ")), r_submission(
            f, seed_results__42__val_bpb=0.9)], "compliance", "train_seed42.log"),
    "a score that saw its targets": (lambda f: r_log(f, "\nfinal_int6_roundtrip ", (
        f"\nslot non_compliant val_loss:{r_headline(f)[1]} val_bpb:{r_headline(f)[2]}"
        "\nfinal_int6_roundtrip ")), "compliance", "train_seed42.log"),
    "its name in the claims": (lambda f: r_submission(f, seed_results__42__slot_bpb=1.0),
                               "compliance", "submission.json"),
    "no README": (lambda f: (f / "README.md").unlink(), "files", "README.md"),
    "no requirements": (lambda f: (f / "requirements.txt").unlink(), "evidence", "requirements"),
    "empty requirements": (lambda f: (f / "requirements.txt").write_text(""), "evidence", "requi"),
    "no curves": (lambda f: (f / "curves.png").unlink(), "evidence", "curves.png"),
    "another vocabulary": (lambda f: r_edit(f / "tiny.yaml", "a", "b"), "ledger", "manifest"),
    "a lossy vocabulary": (lambda f: r_edit(f / "manifest.json", '"byte_exact": true',
                                            '"byte_exact": false'), "ledger", "manifest.json"),
    "a bad document": (lambda f: r_edit(f / "manifest.json", '"bad_documents": 0',
                                        '"bad_documents": 7'), "ledger", "manifest.json"),
    "totals of other shards": (lambda f: r_totals(f, 2), "ledger", "manifest.json"),
    "no totals": (lambda f: r_edit(f / "manifest.json", '"totals"', '"total"'), "ledger",
                  "manifest.json"),
    "no byte table": (lambda f: (f / "scylla.meta.npz").unlink(), "byte table", "meta.npz"),
    "another byte table": (lambda f: r_meta(f, 1), "byte table", "scylla.meta.npz"),
    "a promise in compliance": (lambda f: r_submission(
        f, compliance__artifact_under_16mb="TBD"), "schema", "compliance"),
    "no author": (lambda f: r_submission(f, author=""), "submission", "submission.json"),
    "no JSON": (lambda f: (f / "submission.json").write_text("{"), "submission", "submission"),
    "a promise not kept": (lambda f: r_submission(f, compliance__byte_audit_exact=False), "schema",
                           "compliance"),
    "no hash of the artifact": (lambda f: r_submission(f, seed_results__42__artifact_sha256="0"),
                                "schema", "seed 42"),
    "no number": (lambda f: r_submission(f, model_params=None), "schema", "submission.json"),
    **{f"altered {name}": (functools.partial(r_submission, **{name: value}), "generated",
                           "submission.json") for name, value in {
        "val_bpb": 2, "val_loss_std": 0.5, "headline_mode": "ngram", "seeds": [42], "extra": 1,
        "hardware": "8 x NVIDIA B200", "model_params": 5, "pytorch_version": "9",
        "cuda_version": "9", "date": "2030-01-02x", "track": "track_non_record_16mb",
        "compliance__training_seconds_max": 599.0, "seed_results__42__ttt_bpb": 1.25,
        "seed_results__42__train_ms": 1, "seed_results__42__artifact_sha256": "0"}.items()},
    "another name": (lambda f: r_submission(f, name="Huge"), "generated", "submission.json"),
    "altered table in the README": (lambda f: r_edit(f / "README.md", "| mean | 3 | 8 ", (
        "| mean | 3 | 9 ")), "generated", "README.md"),
    "no credits in the README": (lambda f: (f / "README.md").write_text(
        (f / "README.md").read_text().partition("## Attribution")[0]), "generated", "README.md"),
    "altered deviation in the README": (lambda f: r_edit(f / "README.md", ", deviation 0.", (
        ", deviation 9.")), "generated", "README.md"),
    "altered score in the README": (lambda f: (f / "README.md").write_text(re.sub(
        r"\*\*\d", "**0", (f / "README.md").read_text())), "generated", "README.md"),
    "counted bytes": (lambda f: r_edit(f / "train_seed42.log", "\nbyte_audit:exact bytes:",
                                       "\nbyte_audit:exact bytes:9"), "denominator", "val_bpb"),
}


@pytest.mark.parametrize("case", R_BROKEN)
def test_r_verify_names_each_fault(case, r_record, capsys):
    """Of a folder that was right, verify names rule, place and remedy, and exits 1."""
    action, rule, where = R_BROKEN[case]
    (remedy,) = (each.remedy for each in r_tool("rules").RULES if each.name == rule)
    action(r_record)
    assert r_tool("make_record").main(["verify", str(r_record)]) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"(?m)^2030-01-02_Tiny: {rule}( \(our rule\))?: [^:]*{re.escape(where)}"
                     rf"[^:]*: .* Remedy: {re.escape(remedy)}$", printed), printed


R_FIELD_LOG = (
    "model_params:123\nworld_size:8 grad_accum_steps:1\nseed:7\n"
    "stopping_early: wallclock_cap train_time:599000ms step:4000/20000\n"
    "Code size: 100 bytes\nSerialized model int6+zlib: 15000000 bytes\n"
    "Total submission size int6+zlib: 15000100 bytes\n"
    "final_int6_sliding_window_exact val_loss:1.95000000 val_bpb:1.15000000\n"
    "final_int6_sliding_window val_loss:1.9500 val_bpb:1.1500 eval_time:90000ms\n")


@pytest.mark.parametrize(("rule", "log", "claims"), [
    (None, ("", ""), {}),
    ("means", ("", ""), dict(val_bpb=1.148)), ("sizes", ("", ""), dict(bytes_total=16_000_001)),
    ("sizes", ("Total submission size int6+zlib: 1", "Total submission size int6+zlib: 2"), {}),
    ("code", ("Code size: 1", "Code size: 2"), {}), ("seeds", ("seed:7", "seed:8"), {}),
    ("clock", ("599000ms", "600001ms"), {}), ("evaluation clock", ("90000ms", "601000ms"), {}),
    ("hardware", ("world_size:8", "world_size:4"), {}),
    ("complete", ("sliding_window", "x"), {}),
    ("compliance", ("", ""), dict(blurb="scored by two-pass evaluation")),
    ("submission", ("", ""), dict(author=None)),
])
def test_r_rules_bind_everybody(rule, log, claims, tmp_path):
    """A folder in the field's dialect: only our own rules break; a fault breaks its rule too."""
    (tmp_path / "train_seed7.log").write_text(R_FIELD_LOG.replace(*log) if log[0] else R_FIELD_LOG)
    (tmp_path / "train_gpt.py").write_text("#" * 100)
    (tmp_path / "README.md").write_text("A record.\n")
    about = dict(author="A", github_id="a", name="B", date="2026-04-01", val_bpb=1.15,
                 val_loss=1.95, bytes_total=15_000_100, track="10min_16mb", blurb="")
    (tmp_path / "submission.json").write_text(json.dumps(about | claims))
    found = {f.rule.name for f in r_tool("rules").verify(tmp_path) if not f.rule.ours
             and "at least 3" not in f.what}  # seeds
    assert found >= {rule} if rule else not found, found


@pytest.mark.parametrize("change", [
    dict(compliance=["x"]), dict(compliance=7), dict(seeds=[[42]]), dict(seed_results="none"),
    dict(seed_results__42__steps="many"), dict(attribution=3)])
def test_r_verify_reads_what_strangers_write(change, r_record):
    """Values of any kind, and files that are no text: a finding, never a traceback."""
    r_submission(r_record, **change)
    (r_record / "README.md").write_bytes(b"\xff\xfe")
    (r_record / "manifest.json").write_text('{"tokenizer": "scylla", "totals": {"val": 3}}')
    names = {finding.rule.name for finding in r_tool("rules").verify(r_record)}
    assert names >= {"ledger", "audit", "generated"}


def test_r_limits_are_inclusive(r_record, r_folder, capsys):
    """Exactly 600 s and 16,000,000 bytes break no rule of them; the worst folder counts."""
    verify = r_tool("rules").verify
    assert verify(r_record) == []  # what the cases above break is right
    r_train_time(r_record, 600000)
    size = 16_000_000 - json.loads((r_record / "submission.json").read_text())["bytes_code"]
    r_again(r_record, r"(Total submission size:) \d+", r"\1 16000000")
    r_again(r_record, r"(Serialized model \S+:) \d+", rf"\1 {size}")
    texts = [str(f) for f in verify(r_record) if f.rule.name in ("clock", "sizes")]
    assert not [text for text in texts if "at most" in text or " over " in text]
    assert r_tool("make_record").main(["verify", str(r_record), str(r_folder)]) == 1
    assert capsys.readouterr().out.endswith("2030-01-02_Tiny: no fault found\n")


def test_r_every_rule_is_broken_by_a_test():
    """No rule without a folder that breaks it and a row of records/README.md; no rule twice."""
    rules = r_tool("rules").RULES
    names = [rule.name for rule in rules]
    rows = [f"| {rule.name} | {'record: ' * rule.record}{'ours: ' * rule.ours}"
            f"{rule.check.__doc__.splitlines()[0]} |" for rule in rules]
    assert "\n|--|--|\n" + "\n".join(rows) + "\n\n" in (ROOT / "records" / "README.md").read_text()
    assert len(set(names)) == len(names)
    assert {rule for _, rule, _ in R_BROKEN.values()} == set(names)


# comparison, statistics, curves, published results


def test_r_compare_stats_and_plot(r_folder, r_runs, tmp_path, capsys):
    """One table of stages, the settings that differ, the bar; refusals are messages."""
    tool, logs = r_tool("make_record"), [str(log) for log in r_runs[2]]
    assert tool.main(["compare", str(r_folder), logs[0]]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n| 2030-01-02_Tiny | 3 | 8 |") == 1 and "| seed42 | 1 |" in printed
    assert "not on FineWeb's validation text" in printed
    assert tool.main(["stats", *logs[:2], "--against", logs[2]]) == 0
    bpb = float(re.search(r"The bar: 0.005 nats x (\S+) BPB", capsys.readouterr().out)[1])
    run = r_tool("runs").read_run(r_runs[2][2])
    assert bpb == pytest.approx(run.headline.bpb / run.headline.loss, abs=1e-5)
    assert tool.main(["stats", *logs, "--against", "2026-03-31_ParallelResiduals"]) == 0
    assert "not the same text" in capsys.readouterr().out
    output = tmp_path / "curves.png"
    assert tool.main(["plot", str(r_folder), "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG") and output.stat().st_size > 30_000
    for wrong in (["compare", "nothing"], ["plot", "2026-03-31_ParallelResiduals"],
                  ["compare", logs[0], logs[0]], ["compare", "2026-04"],
                  ["plot", logs[0], "--output", "/no/such/x.png"]):
        assert tool.main(wrong) == 1 and "error: " in capsys.readouterr().err
    assert tool.main(["compare", str(r_folder), "2026-03-31_ParallelResiduals"]) == 0
    row = re.search(r"\n\| 2026-03-31_Par.*", capsys.readouterr().out)[0]  # SPEC section 10's
    assert "| 3 | 6243 | 96.1 | 1.1228 | 1.1308 | 1.1063 | - |" in row
    assert tool.main(["verify", str(r_folder)]) == 0
    other = tmp_path / "other" / Path(logs[0]).name  # the same file name, another setting
    other.parent.mkdir()
    other.write_text(re.sub(r"(?m)^MATRIX_LR=.*", "MATRIX_LR=9", Path(logs[0]).read_text()))
    assert tool.main(["compare", logs[0], str(other)]) == 0
    printed = capsys.readouterr().out
    assert f"| {logs[0]} | 1 |" in printed and f"| {other} | 1 |" in printed
    assert tool.main(["stats", logs[0], str(other)]) == 1
    assert "MATRIX_LR" in capsys.readouterr().err


def test_r_published_results_take_the_bar():
    """Stats of two published results: the test of #1204 over #1019 as its numbers give it."""
    tool = r_tool("make_record")
    ours, theirs = map(tool.find_group, ("2026-03-31_Parallel", "2026-03-25_ValCalib"))
    text = tool.statistics_text(ours, theirs)
    assert "0.00296 BPB" in text and "\n0.00848 BPB better" in text and "does NOT pass" in text
    assert "\n0.00848 BPB worse" in tool.statistics_text(theirs, ours)
    assert tool.statistics_text(ours, theirs, 0.003).endswith("passes at p < 0.01.")
    assert "(bytes corrected)" in tool.find_group("2026-04-02_PROTEUS").name
    assert tool.find_group("2026-04-02_PROTEUS").bpb.mean == pytest.approx(1.1423, abs=1e-4)


def test_r_curves_are_labelled(r_runs, tmp_path, monkeypatch):
    """Five panels with title, units on both axes, a legend and a line for every run."""
    import matplotlib.pyplot as plt

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    runs = [r_tool("runs").read_run(log) for log in r_runs[2]]
    r_tool("figures").plot({f"seed {r.seed}": [r] for r in runs}, tmp_path / "c.png", "Tiny")
    monkeypatch.undo()
    *panels, rest = kept[0].axes
    assert [panel.get_title() for panel in panels] == [
        "Training loss", "Validation while training", "Final stages", "Learning rate", "Step time"]
    for panel in panels:
        assert panel.get_xlabel() in ("step", "stage") and panel.get_ylabel()
        assert len(panel.get_lines()) >= 3
        assert all(len(line.get_xdata()) for line in panel.get_lines())
    names = [text.get_text() for text in rest.get_legend().get_texts()]
    assert names == ["seed 42", "seed 1337", "seed 2024"]
    stages = [text.get_text() for text in panels[2].get_xticklabels()]
    assert stages == ["post-ema", "roundtrip", "sliding", "ttt"]
    for run, line in zip(runs, panels[2].get_lines(), strict=True):
        assert line.get_ydata()[-1] == run.headline.bpb
    plt.close(kept[0])


@needs_shared
def test_r_public_folders(tmp_path, capsys):
    """All 63 are read; those with miscounted bytes are flagged; the data and the table are ours."""
    folders = sorted((SHARED / "data" / "public_records").iterdir())
    rules, output = r_tool("rules"), tmp_path / "published.json"
    assert len(folders) == 63
    assert r_tool("make_record").main(["survey", *map(str, folders), "--json", str(output)]) == 0
    committed = ROOT / "records" / "published.json"
    assert json.loads(output.read_text()) == json.loads(committed.read_text())
    assert capsys.readouterr().out.strip() in (ROOT / "records" / "SURVEY.md").read_text()
    wrong = {f.name for f in folders if any(
        x.rule.name == "denominator" and "counts" in x.what for x in rules.verify(f))}
    assert wrong == {"2026-03-30_tm0054_AutoresearchTokenizer_LegalTTT",
                     "2026-04-02_PROTEUS_v16_Scylla",
                     "2026-04-02_Scylla_ParallelResiduals_DepthRecurrence_TTT"}


def test_r_credits_are_one_table():
    """records/credits.json holds the README's table, and CREDITS.md's where that is there."""
    rows = [f"| {row['technique']} | {row['where']} | {row['who']} |"
            for row in r_tool("generated").credits()]
    for path in (ROOT / "README.md", SHARED / "CREDITS.md"):
        text = path.read_text() if path.exists() else "\n".join(rows)
        found = text[text.index("| PROTEUS v1.6: the combination") :].split("\n\n")[0]
        assert [line for line in found.splitlines() if line.startswith("|")] == rows, path
    names = {f.name.upper() for f in fields(t.Config)}
    for row in r_tool("generated").credits():
        for name in row.get("when", {}):
            assert name in names, name


# plans


def test_r_ablation_slots_and_list(tmp_path, monkeypatch, capsys):
    """One GPU for each run where there are any; --list runs nothing and tells what is done."""
    ablate = d_tool("ablate")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [slot.gpu for slot in ablate.slots(2)] == [0, 1]
    with pytest.raises(SystemExit, match="2 GPUs"):
        ablate.slots(3)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(dict(base={}, seeds=[1, 2], variants={"a": {}, "b": {"SEED": 3}})))
    done = tmp_path / "out" / "a_seed2" / "logs" / "run.jsonl"
    done.parent.mkdir(parents=True)
    done.write_text('{"event": "summary"}\n')
    monkeypatch.setattr(sys, "argv", ["ablate", str(plan), "--out", str(tmp_path / "out"),
                                      "--list"])
    monkeypatch.setattr(ablate, "run_one", None)
    assert ablate.main() == 0
    states = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert states == ["a_seed1: to run", "a_seed2: done", "b_seed1: to run", "b_seed2: to run"]
    with pytest.raises(SystemExit, match="--jobs 0"):
        ablate.slots(0)
    monkeypatch.setattr(sys, "argv", ["ablate", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match="none.json: nothing to read"):
        ablate.main()
    code = tmp_path / "out" / "train_gpt.py"
    code.write_text("another")
    with pytest.raises(SystemExit, match="another train_gpt.py"):
        ablate.keep_code(code.parent)
    shutil.rmtree(done.parent)  # nothing has begun: the copy may be replaced
    ablate.keep_code(code.parent)
    assert code.read_bytes() == (ROOT / "train_gpt.py").read_bytes()


# from a bare machine to a folder


class RHub(http.server.BaseHTTPRequestHandler):
    """A Hugging Face hub with one dataset repository, on loopback."""

    files: dict[str, bytes] = {}
    cut: set[str] = set()  # files whose first answer breaks off in the middle
    wrong: set[str] = set()  # files whose bytes are not those of the listing
    asked: list[str] = []
    starts: list[int] = []  # where the answers to `asked` begin

    def log_message(self, *_):
        """Silence."""

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def tree(self, folder):
        """The listing of a folder, as the hub gives it; shards are large files."""
        for name in sorted(self.files):
            data = self.files[name]
            if name.startswith(folder + "/"):
                entry = dict(type="file", path=name, size=len(data), oid=hashlib.sha1(
                    b"blob %d\0" % len(data) + data).hexdigest())
                if name.endswith(".bin"):
                    entry["lfs"] = dict(oid=hashlib.sha256(data).hexdigest(), size=len(data),
                                        pointerSize=1)
                yield entry

    def do_GET(self):
        path = urllib.parse.unquote(self.path.split("?")[0])
        if match := re.fullmatch(r"/api/datasets/[^/]+/[^/]+/tree/main/(.+)", path):
            body = json.dumps(list(self.tree(match[1]))).encode()
            return self.answer(200, body, {"Content-Type": "application/json"})
        name = re.fullmatch(r"/datasets/[^/]+/[^/]+/resolve/[^/]+/(.+)", path)
        if not name or name[1] not in self.files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = self.files[name[1]]
        start = int(re.match(r"bytes=(\d+)", self.headers.get("Range") or "bytes=0")[1])
        if self.command == "GET":
            self.asked.append(name[1])
            self.starts.append(start)
            data = data[::-1] if name[1] in self.wrong else data
        tags = {"ETag": f'"{hashlib.sha256(self.files[name[1]]).hexdigest()}"',
                "X-Repo-Commit": "c" * 40, "Accept-Ranges": "bytes"}
        if self.command == "GET" and name[1] in self.cut:
            self.cut.discard(name[1])
            self.send_response(200)
            for key, value in (tags | {"Content-Length": str(len(data))}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return None
        if start:
            tags["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.answer(206 if start else 200, data[start:], tags)

    do_HEAD = do_GET


@pytest.fixture
def r_hub(tmp_path):
    """A hub that serves SentencePiece shards of a tiny text: (environment, handler)."""
    model, shards = tmp_path / "fineweb_1024_bpe.model", tmp_path / "sp"
    model.write_bytes(retok_model_bytes())
    for seed, (split, count) in enumerate((("train", 200), ("val", 12))):
        documents = tmp_path / f"{split}.jsonl"
        documents.write_text("".join(json.dumps({"text": text}) + "\n"
                                     for text in retok_texts(count, seed)))
        assert R.main(["--docs", str(documents), "--sp-model", str(model), "--split", split,
                       "--output-dir", str(shards), "--workers", "1", "--shard-tokens",
                       "5000"]) == 0
    hub = type("Hub", (RHub,), dict(cut=set(), wrong=set(), asked=[], starts=[], files={
        f"datasets/datasets/fineweb10B_sp1024/{p.name}": p.read_bytes()
        for p in shards.glob("*.bin")} | {
        "datasets/tokenizers/fineweb_1024_bpe.model": model.read_bytes()}))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path / "hf"),
               NO_PROXY="127.0.0.1", HF_HUB_DISABLE_TELEMETRY="1"), hub
    server.shutdown()
    thread.join()
    server.server_close()


def test_r_fetch_resumes_and_checks(r_hub, tmp_path):
    """A broken download goes on, nothing is fetched twice, wrong bytes are refused."""
    environ, hub = r_hub
    first = "datasets/datasets/fineweb10B_sp1024/fineweb_train_000000.bin"
    hub.files[first] = bytes(range(256)) * 100_000  # more than one read of its library
    hub.cut.add(first)
    command = [ROOT / "records" / "fetch.py", "--output", tmp_path / "got", "--shards", "1"]
    done = a_python(command, tmp_path, environ)
    assert done.returncode == 0, done.stderr
    for name, data in hub.files.items():
        there = tmp_path / "got" / name
        assert there.exists() == ("train" not in name or name == first)
        assert not there.exists() or there.read_bytes() == data
    starts = [start for name, start in zip(hub.asked, hub.starts, strict=True) if name == first]
    assert len(starts) == 2 and starts[0] == 0 < starts[1]  # it went on where it broke off
    away = environ | dict(HF_ENDPOINT=environ["HF_ENDPOINT"] + "/nothing")
    assert "0 of them fetched now" in a_python(command, tmp_path, away).stdout
    assert hub.asked.count(first) == 2
    second = first.replace("000000", "000001")
    hub.wrong.add(second)
    done = a_python([*command[:-1], "2"], tmp_path, environ)
    assert done.returncode == 1 and "size or hash" in done.stderr and second in done.stderr
    assert not (tmp_path / "got" / second).exists()
    done = a_python([*command[:-1], "80"], tmp_path, environ)
    assert done.returncode == 1 and "of 80 training shards" in done.stderr
    (tmp_path / "got" / first).unlink()
    done = a_python(command, tmp_path, away)
    assert done.returncode == 1 and "check the network" in done.stderr


@pytest.mark.parametrize(("change", "message"), [
    (dict(AUTHOR=""), "AUTHOR and GITHUB_ID are not set"),
    (dict(PRESET=""), "PRESET=demo"),
    (dict(NNODES="2"), "RDZV_ENDPOINT"),
    (dict(NNODES="2", RDZV_ENDPOINT="a:1"), "NODE_RANK"),
    (dict(SHARDS="10000000"), "GB free"),
    (dict(SHARDS="abc"), "SHARDS=abc: must be a whole number"),
    (dict(SEEDS="1,2"), "SEEDS=1,2: must be different numbers"),
    (dict(SEEDS="1 2 1"), "must be different numbers"),
    (dict(TRACK="10min"), "TRACK=10min: must be"),
    (dict(TRACK="track_10min_16mb"), "on 8 ranks on H100s"),
    (dict(DATA_PATH="/no/such"), "DATA_PATH=/no/such: there is no such file"),
    (dict(VOCAB="/no/such"), "VOCAB=/no/such"),
    (dict(DATA_DIR="/dev/null/x"), "DATA_DIR=/dev/null/x cannot be made"),
    (dict(AGAINST="2026-0"), "AGAINST=2026-0 names no result"),
    (dict(MATRIX_LR="abc"), "MATRIX_LR=abc: expected a finite number"),
    (dict(PYTHON="/bin/false"), "requirements.txt"),
])
def test_r_script_says_what_is_missing(change, message, tmp_path):
    """The script stops before any work, with the remedy."""
    environ = dict(AUTHOR="A", GITHUB_ID="a", PRESET="demo", DATA_DIR=str(tmp_path), SHARDS="1",
                   PYTHON=sys.executable) | change
    done = subprocess.run(["bash", ROOT / "run_8xh100.sh"], env=os.environ | environ,
                          capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr, done


@pytest.mark.parametrize(("name", "count", "message"), [
    ("H100 80GB HBM3", 8, "lacks a package"), ("H100 80GB HBM3", 4, "on 4 on GPU 0: NVIDIA H100"),
    ("A100-SXM4-80GB", 8, "on 8 on GPU 0: NVIDIA A100")])
def test_r_script_knows_the_machine_of_a_record(name, count, message, tmp_path):
    """Eight H100s go on to the environment; other machines are named, with the way out."""
    listing = "".join(f"GPU {i}: NVIDIA {name} (UUID: GPU-{i:036d})\n" for i in range(count))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'E'\n{listing}E\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environ = dict(AUTHOR="A", GITHUB_ID="a", DATA_DIR=str(tmp_path), DATA_PATH=str(tmp_path),
                   PYTHON="/bin/false", PATH=f"{tmp_path}:{os.environ['PATH']}")
    done = subprocess.run(["bash", ROOT / "run_8xh100.sh"], env=os.environ | environ,
                          capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr, done
    assert ("TRACK=track_non_record_16mb" in done.stderr) == ("on GPU 0" in message)
    assert f"{count} GPUs, {count} processes" in done.stdout


@pytest.mark.slow
def test_r_script_from_bare_machine_to_folder(r_hub, tmp_path):
    """Fetch, find the vocabulary, re-tokenize, pre-flight, smoke, two seeds on two ranks, folder.

    A second run does nothing again, and ends in the same folder.
    """
    environ, hub = r_hub
    vocabulary = tmp_path / "repo" / "deep" / "tiny.yaml"
    vocabulary.parent.mkdir(parents=True)
    vocabulary.write_bytes(R.vocabulary_yaml([bytes([k]) for k in range(256)] + RETOK_TOKENS))
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(tmp_path / "repo")]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "v"],
                    ["update-ref", "refs/pull/1/head", "HEAD"]):
        subprocess.run([*git, *command], check=True)
    tiny = {k.upper(): t.show(v) for k, v in A_TINY.items() if k != "train_log_every"}
    environ |= tiny | dict(
        PRESET="demo", AUTHOR="A", GITHUB_ID="a", SHARDS="2", SEEDS="7 8", NPROC="2",
        DATA_DIR=str(tmp_path / "work"), RECORDS=str(tmp_path / "records"), PYTHON=sys.executable,
        VOCAB_REPO=str(tmp_path / "repo"), VOCAB_REF="refs/pull/1/head",
        VOCAB_SHA256=t.sha256_file(vocabulary), PREFLIGHT="-k file_keeps_its_shape",
        RECUR_START_STEP="0.3", ITERATIONS="6", OMP_NUM_THREADS="1")
    command = ["bash", str(ROOT / "run_8xh100.sh")]
    done = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = next((tmp_path / "records" / "track_non_record_16mb").iterdir())
    about = json.loads((folder / "submission.json").read_text())
    assert about["seeds"] == [7, 8] and about["hardware"].startswith("2 x cpu")
    assert about["compliance"]["byte_audit_exact"]
    assert done.stdout.rstrip().endswith("no fault found")
    assert re.search("recurrence on.*: a step .* ms\n", done.stdout)
    assert re.search("all_reduce of .* GB/s\nGO: there is no yardstick", done.stdout)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.[lbp][oit][gnz]")}
    asked = len(hub.asked)
    again = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True)
    assert again.returncode == 0 and len(times) > 5, again.stderr
    assert asked == len(hub.asked)
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.[lbp][oit][gnz]")}
    smoke = next(tmp_path.rglob("smoke.txt")).read_text()  # every mode that the seeds are scored in
    modes = [set(re.findall(r"\n(\w+)_exact ", text)) for text in (
        smoke, next(tmp_path.rglob("logs/seed7.txt")).read_text())]
    assert modes[0] == modes[1] >= {"legal_ttt"}
    more = subprocess.run(command, env=os.environ | environ | dict(SEEDS="7 8 9"),
                          capture_output=True, text=True)  # a third seed: the folder is in its way
    assert more.returncode == 1 and "exists" in more.stderr and "RECORD_NAME" in more.stderr
    shutil.rmtree(folder)
    more = subprocess.run(command, env=os.environ | environ | dict(SEEDS="7 8 9"),
                          capture_output=True, text=True)
    assert more.returncode == 0, more.stderr
    assert json.loads((folder / "submission.json").read_text())["seeds"] == [7, 8, 9]
    shard = next((tmp_path / "work" / "scylla").glob("fineweb_train_*.bin"))
    shard.unlink()  # other data: no finished seed counts
    other = subprocess.run(command, env=os.environ | environ | dict(
        DATA_PATH=str(shard.parent), PREFLIGHT="--help", RECORD_NAME="Other"),
        capture_output=True, text=True)
    assert other.returncode == 0, other.stderr
    assert len([*(tmp_path / "work" / "runs").iterdir()]) == 2


# ==========================================================================================
# quantization at the limit: GPTQ, the fit to SIZE_LIMIT, rANS, damaged artifacts
# ==========================================================================================

Q_BITS = 5.0


def q_inputs(columns, count=1500, seed=0):
    """Correlated inputs (count, columns) of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=g) * torch.linspace(0.05, 2, columns)
    return torch.randn(count, columns, generator=g) @ mixed


def q_problem(n=2, rows=20, columns=150):
    """Weights, Hessians, scales, bits and inputs of n matrices; more columns than one block."""
    x = torch.stack([q_inputs(columns, seed=i) for i in range(n)])
    weight = torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(9))
    scales = torch.stack([t.row_scales(w, int(Q_BITS), 0.4) for w in weight])
    return weight, x.mT @ x, scales, torch.full((n, 1, 1), Q_BITS), x


def q_output_error(weight, codes, scales, x):
    """Squared error of the outputs on the inputs, one number for each matrix."""
    return (x @ (codes * scales - weight).mT).double().square().sum((1, 2))


def q_obq(weight, hessian, scale, bits):
    """Codes of one matrix by the definition: one column, then the optimal update of the rest."""
    h = hessian.double()
    h = h / h.diagonal().mean() + 0.01 * torch.eye(len(h))
    order = h.diagonal().argsort(descending=True, stable=True)
    h, w = h[order][:, order], weight.double()[:, order].clone()
    codes, largest = torch.zeros_like(w), 2 ** (bits - 1) - 1
    for i in range(len(h)):
        inverse = torch.linalg.inv(h[i:, i:])
        codes[:, i] = (w[:, i] / scale[:, 0]).round().clamp(-largest, largest)
        error = (w[:, i] - codes[:, i] * scale[:, 0]) / inverse[0, 0]
        w[:, i:] -= error[:, None] * inverse[0]
    return torch.empty_like(codes).index_copy_(1, order, codes)


def test_q_gptq_is_its_definition():
    """Blocks, order, batches and the one inversion change nothing against the plain algorithm."""
    weight, hessian, scales, bits, _ = q_problem()
    codes = t.gptq(weight, hessian, scales, bits)
    for i in range(2):
        want = q_obq(weight[i], hessian[i], scales[i], Q_BITS)
        assert (codes[i] != want).float().mean() < 2e-3  # fp32 ties
        alone = t.gptq(*(a[i : i + 1] for a in (weight, hessian, scales, bits)))[0]
        assert (codes[i] != alone).float().mean() < 2e-3


def test_q_gptq_beats_rounding_at_equal_steps():
    """Less than half of the output error of plain rounding, on fresh inputs too."""
    weight, hessian, scales, bits, x = q_problem()
    codes, plain = t.gptq(weight, hessian, scales, bits), t.round_to_grid(weight, scales, Q_BITS)
    assert codes.abs().max() <= t.largest_code(5) and torch.equal(codes, codes.round())
    ratio = q_output_error(weight, codes, scales, x) / q_output_error(weight, plain, scales, x)
    assert ratio.max() < 0.5, ratio


@pytest.mark.parametrize("hessian", ["identity", "diagonal", "zero"])
def test_q_gptq_without_correlation_is_plain_rounding(hessian):
    """Nothing to make up for: independent inputs, and matrices that never ran."""
    weight, _, scales, bits, _ = q_problem()
    diagonal = {"identity": torch.ones(150), "zero": torch.zeros(150),
                "diagonal": torch.arange(150.0)}[hessian]
    codes = t.gptq(weight, torch.diag(diagonal).expand(2, -1, -1), scales, bits)
    assert torch.equal(codes, t.round_to_grid(weight, scales, Q_BITS))


def test_q_dead_inputs_and_rows_of_zeros():
    """A dead input's weights are rounded to the nearest, a row of zeros stays one."""
    weight, _, _, bits, x = q_problem()
    x[:, :, 7], weight[:, 3] = 0, 0
    scales = torch.stack([t.row_scales(w, 5, 0.4) for w in weight])
    codes = t.gptq(weight, x.mT @ x, scales, bits)
    assert torch.isfinite(codes).all() and not codes[:, 3].any()
    assert torch.equal(codes[..., 7], t.round_to_grid(weight, scales, Q_BITS)[..., 7])


@pytest.mark.parametrize("tied", [True, False])
def test_q_hessians_are_those_of_the_inputs(tied, monkeypatch):
    """X^T X by hand for every matrix: shared by q, k, v; both passes; repeats their own; head."""
    model = b_model(b_config(tie_embeddings=tied))
    ids, seen = b_ids((3, 16)), {}
    names = {module: name for name, module in model.named_modules()}

    def spied(forward):
        def spy(self, x, *context):
            for leaf in ("q", "k", "v") if isinstance(self, t.Attention) else ("",):
                name = f"{names[self]}.{leaf}.weight".replace("..", ".")
                seen.setdefault(name, []).append(x.detach().flatten(0, 1).double())
            return forward(self, x, *context)
        return spy

    with monkeypatch.context() as patch, torch.no_grad():
        for kind in (t.Linear, t.Attention):
            patch.setattr(kind, "forward", spied(kind.forward))
        hidden = model.hidden(ids).flatten(0, 1).double()
    have = t.input_hessians(model, (ids,), a_runtime())
    matrices = {n for n in seen if not n.endswith("proj.weight")}
    head = "embed.weight" if tied else "head.weight"
    assert set(have) == matrices | {head}
    for name in matrices:
        x = torch.cat(seen[name])
        again = name.startswith(("blocks.2.attn", "blocks.3.attn"))
        assert len(x) == ids.numel() * (1 + again), name
        torch.testing.assert_close(have[name].double(), x.mT @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(have[head].double(), hidden.mT @ hidden, rtol=1e-4, atol=1e-4)
    shares = [t.input_hessians(model, part, a_runtime()) for part in ((ids[:1],), ids[1:].split(1))]
    for name in have:
        torch.testing.assert_close(shares[0][name] + shares[1][name], have[name], rtol=1e-4,
                                   atol=1e-3)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_q_ranks_share_the_matrices():
    """What the ranks make adds up to what one makes, each matrix on one rank only."""
    c = b_config()
    model = b_model(c)
    state = {n: p.detach() for n, p in model.named_parameters()}
    hessians = t.input_hessians(model, (b_ids((3, 16)),), a_runtime())
    whole = t.quantize(state, c, 0.4, hessians, a_runtime())
    parts = [t.quantize(state, c, 0.4, hessians, a_runtime(rank, 3)) for rank in range(3)]
    for name in hessians:
        made = [part[name].values.any() for part in parts]
        assert sum(made) == 1
        total = sum(part[name].values.astype(int) for part in parts)
        assert (total != whole[name].values).mean() < 2e-3
    plain = t.quantize(state, c, 0.4)
    differ = {n for n in state if not np.array_equal(plain[n].values, whole[n].values)}
    assert differ <= set(hessians) and len(differ) > len(hessians) // 2


def test_q_calibration_is_inside_the_clock(b_make, monkeypatch):
    """Training stops early enough for the slow Hessians that the warm-up measured."""
    real = t.input_hessians

    def slow(*arguments):
        t.time.sleep(0.8)  # more than CLOCK_RESERVE_MS hides
        return real(*arguments)

    monkeypatch.setattr(t, "input_hessians", slow)
    trainer = b_make(max_wallclock_seconds=3.2, iterations=10**6, gptq_calibration_seqs=8)
    trainer.run()
    assert trainer.reserve_ms >= 1200
    trained = trainer.clock.elapsed_ms
    weights, hessians = trainer.finish()
    assert weights == "ema" and len(hessians) == 6 * 6 + 2 * 2 + 1
    assert trained + 800 <= trainer.clock.elapsed_ms <= 3200
    (event,) = b_events(trainer, "calibration")
    assert event["train_ms"] == trainer.clock.elapsed_ms
    ids = np.stack([trainer.loader.sequence(4 * trainer.steps + i)[:-1] for i in range(8)])
    want = real(trainer.model, (torch.from_numpy(ids.astype(np.int64)),), trainer.runtime)
    for name in want:  # of the averaged weights, on the sequences after the last step
        torch.testing.assert_close(hessians[name], want[name], rtol=1e-4, atol=1e-4)
    plain = b_make(max_wallclock_seconds=1.5, iterations=1, quant="rtn")
    plain.run()
    assert plain.reserve_ms == 0 and plain.finish() == ("ema", {})


def q_export(model, c, folder, hessians=None):
    """(total or None where it does not fit, log lines, stream events) of an export."""
    lines, events = [], []
    runtime = a_runtime()
    runtime.on_first_rank = lambda work: work()
    runtime.log = SimpleNamespace(
        line=lines.append, event=lambda kind, template="", **v: events.append((kind, v)))
    val = SimpleNamespace(vocab_sha256="none")
    c = replace(c, artifact_path=str(folder / "fit.ptz"))
    try:
        total = t.export_model(model, hessians or {}, val, runtime, c)
    except t.RunError as error:
        assert "over SIZE_LIMIT" in str(error) and Path(c.artifact_path + ".fp32").exists()
        return None, lines, events
    assert total == Path(c.artifact_path).stat().st_size + Path(t.__file__).stat().st_size
    return total, lines, [v for kind, v in events if kind == "stream"]


@pytest.fixture(scope="module")
def q_fit_model():
    """A model of middle size with random weights of different sizes, its Hessians and code size."""
    c = replace(b_config(num_layers=4, parallel_start_layer=2, ve_layers=(1,), recur_layers=(1,),
                         mlp_mult=3.0, compressor="rans"), n_int6_layers=None)
    model = b_model(c, vocab=300)
    ids = torch.randint(300, (16, 16), generator=torch.Generator().manual_seed(2))
    return c, model, t.input_hessians(model, (ids,), a_runtime()), Path(t.__file__).stat().st_size


def test_q_the_fit_lands_under_every_limit(q_fit_model, tmp_path):
    """Random limits from far too small to far too large: never over, and what binds is used."""
    c, model, hessians, code = q_fit_model
    loosest = q_export(model, c, tmp_path, hessians)[0] - code
    random, bound, failed = np.random.default_rng(3), 0, 0
    for share in [0.05, 1.2, *random.uniform(0.45, 1.05, 5)]:
        limit = code + int(share * loosest)
        total, lines, _ = q_export(model, replace(c, size_limit=limit), tmp_path, hessians)
        if total is None:
            failed += 1
            assert share < 0.45, share
            continue
        assert share < 1.05 or "coarseness:0.0000" in lines[0]
        assert total <= limit
        if share < 0.99:
            bound += 1
            assert limit - total <= 0.01 * (limit - code), (share, lines)
    assert bound >= 4 and failed == 1


def test_q_fixed_bits_are_honoured(q_fit_model, tmp_path):
    """CLASS_BITS and N_INT6_LAYERS stay under a limit that binds; auto goes to INT5 by itself."""
    c, model, hessians, code = q_fit_model
    loosest = q_export(model, c, tmp_path, hessians)[0] - code
    limit = code + loosest * 2 // 3
    for settings, names in (
            ({}, {"attn.int6", "mlp.int6", "repeat.int5", "embed.int8"}),
            (dict(n_int6_layers=2), {"attn.int6", "mlp.int5", "mlp.int6", "repeat.int6"}),
            (dict(class_bits="attn=4,repeat=6"), {"attn.int4", "repeat.int6"})):
        total, _, streams = q_export(model, replace(c, size_limit=limit, **settings), tmp_path,
                                     hessians)
        assert total <= limit and names <= {s["name"] for s in streams}, settings
    tight = replace(c, size_limit=limit, quant="rtn", n_int6_layers=2)
    assert q_export(model, tight, tmp_path)[0] is None  # nothing to solve: over is over


def test_q_the_log_measures_what_is_stored(q_fit_model, tmp_path):
    """Bits per weight, entropy, k and error of a class, from the file, by hand."""
    c, model, hessians, code = q_fit_model
    limit = code + 40_000
    _, _, streams = q_export(model, replace(c, size_limit=limit), tmp_path, hessians)
    by_name = {s["name"]: s for s in streams}
    _, stored = t.read_artifact(str(tmp_path / "fit.ptz"))
    attn = {n: s for n, s in stored.items() if s.kind == "attn"}
    state = dict(model.named_parameters())
    error = sum(float((s.restore() - state[n]).detach().double().square().sum())
                for n, s in attn.items())
    power = sum(float(state[n].detach().double().square().sum()) for n in attn)
    seen = by_name["attn.int6"]
    assert seen["error"] == pytest.approx(math.sqrt(error / power), rel=1e-3)
    assert seen["weights"] == sum(s.values.size for s in attn.values())
    assert seen["bits"] == pytest.approx(8 * seen["bytes"] / seen["weights"])
    clips = np.concatenate([31 * s.scales.astype(float) for s in attn.values()])
    deviations = np.concatenate([state[n].detach().numpy().std(1) for n in attn])
    k = math.sqrt((clips**2).sum() / (deviations**2).sum())
    assert seen["k"] == pytest.approx(k, rel=1e-2)


def test_q_late_qat_trains_on_the_coarse_grid():
    """At the coarseness that the run expects, QAT computes with the values of the export."""
    c = b_config(n_int6_layers=None)
    model, other = b_model(c), b_model(c, seed=4)
    model.coarseness = 0.5
    stored = t.quantize({n: p.detach() for n, p in model.named_parameters()}, c, 0.5)
    assert {s.bits for s in stored.values() if s.kind == "repeat"} == {5}
    model.set_phase(t.Phase(recur=True, qat=True))
    for name, module in model.named_modules():
        if getattr(module, "qat_bits", 0):
            weight = t.fake_quantize(module.weight, module.qat_bits, module.qat_step)
            assert torch.equal(weight.detach(), stored[f"{name}.weight"].restore()), name
    state = {n: p.detach() for n, p in model.named_parameters()}
    codes = {n: s.restore() if s.bits <= 8 else state[n] for n, s in stored.items()}
    other.load_state_dict(codes)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(b_ids()), other.logits(b_ids()), atol=2e-5, rtol=0)


def test_q_the_run_expects_the_limit(a_made, tmp_path, monkeypatch):
    """Before training, the coarseness is the predictor's for SIZE_LIMIT."""
    seen = []
    monkeypatch.setattr(t.Trainer, "run", lambda self: seen.append(self.model.coarseness) or 1 / 0)
    code = Path(t.__file__).stat().st_size
    for room in (10**6, 30_000):
        c = a_config(data_path=str(a_made[1]), size_limit=code + room, n_int6_layers=None)
        with a_inside(tmp_path), pytest.raises(ZeroDivisionError):
            t.run(c)
    assert seen[0] == 0 < seen[1] < t.COARSEST
    model = t.GPT(c, a_table().is_boundary, a_runtime())
    predicted = sum(t.predicted_bytes(model, c, seen[1]).values())
    assert 0.99 * 30_000 < predicted <= 30_000


# codec

Q_CODES = {
    "gaussian": lambda n, r: np.clip(np.round(r.normal(0, 5, n)), -31, 31),
    "constant": lambda n, r: np.full(n, -3), "two": lambda n, r: r.integers(0, 2, n),
    "every symbol": lambda n, r: np.resize(np.arange(-128, 128), n),
    "rare": lambda n, r: (r.random(n) < 1e-4) * 100,
    "mixed": lambda n, r: np.round(r.normal(0, np.repeat([1, 40], -(-n // 2))[:n]).clip(-127, 127)),
}  # fmt: skip


@pytest.mark.parametrize("kind", Q_CODES)
def test_q_rans_is_exact(kind):
    """decode(encode(x)) == x for every length around the borders of lanes and blocks."""
    r = np.random.default_rng(1)
    for n in (0, 1, 2, 255, 2049, 16385, 140_001):
        raw = Q_CODES[kind](n, r).astype(np.int8).tobytes()
        data = t.rans_encode(raw)
        assert t.rans_decode(data, n) == raw, n
        for wrong in {n - 1, n + 1, 2 * n + 7} - {-1}:
            with contextlib.suppress(ValueError):
                assert t.rans_decode(data, wrong) != raw  # never the same for another length


def test_q_rans_is_at_the_entropy():
    """Half a million Gaussian codes: at most 0.3 % above order 0; under it where rows differ."""
    r = np.random.default_rng(2)
    for kind, low, high in (("gaussian", 0.999, 1.003), ("mixed", 0.8, 0.97)):
        codes = Q_CODES[kind](500_000, r).astype(np.int8)
        assert low < len(t.rans_encode(codes.tobytes())) / t.entropy_bytes(codes) < high


def test_q_rans_refuses_what_it_cannot_have_made():
    """Claims of absurd sizes, models and lengths end at once, without memory."""
    raw = Q_CODES["gaussian"](40_000, np.random.default_rng(3)).astype(np.int8).tobytes()
    data = t.rans_encode(raw)
    for size in (1 << 29, 1 << 40):
        with pytest.raises(t.ArtifactError, match="a rans stream is damaged"):
            t.decompress(data, "rans", size)
    for bad in (b"", data[:4], data[:40], data[:-2], data + b"\0\0", b"\xff" + data[1:],
                data[:1] + b"\xff\xff\xff\xff" + data[5:], b"\0" + data[1:]):
        with pytest.raises(t.ArtifactError):
            t.decompress(bad, "rans", 40_000)


# damage


@pytest.fixture(scope="module")
def q_small(tmp_path_factory):
    """A tiny artifact whose streams use every codec; (path, header, body)."""
    path = tmp_path_factory.mktemp("damage") / "small.ptz"
    with pytest.MonkeyPatch.context() as patch:
        turn = iter(["rans", "zlib", "lzma", *(["zstd"] if t.zstandard_module() else []), *9 * [
            "rans"]])
        patch.setattr(t, "smallest", lambda raw, _: (c := next(turn), t.coder(c)[0](raw)))
        a_artifact(path, "auto", model_dim=16, num_layers=2, ve_layers=(1,), recur_layers=(0,),
                   mlp_mult=0.5, parallel_start_layer=1, n_int6_layers=0, bigram_dim=2, ve_dim=2)
    header, body = a_parts(path)
    assert len({s[1] for s in header["streams"]}) >= 3
    return path, header, body


def q_load(path):
    """Load a model as an evaluation does."""
    validation = SimpleNamespace(vocab_sha256="5" * 64)
    return t.load_model(str(path), validation, a_table(), b_runtime(), a_config())


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_q_corruptions(q_small, tmp_path, count):
    """Bytes changed, cut out, inserted, swapped, and truncations: ArtifactError every time."""
    path, data = tmp_path / "broken.ptz", q_small[0].read_bytes()
    random = np.random.default_rng(4)
    assert q_load(q_small[0]).recur
    for n in range(count):
        a, b = sorted(random.integers(0, len(data), 2).tolist())
        broken = [data[:a], data[:a] + data[b:] if b > a else data[:-1],
                  data[:a] + random.bytes(1 + n % 7) + data[a:],
                  data[:a] + bytes([data[a] ^ int(random.integers(1, 256))]) + data[a + 1 :],
                  data[:a] + random.bytes(b - a + 1) + data[b + 1 :]][n % 5]
        if broken == data:
            continue
        path.write_bytes(broken)
        with pytest.raises(t.ArtifactError, match=r"broken\.ptz"):
            t.read_artifact(str(path))


def q_forged_header(header, random):
    """A header with one thing wrong, and what it was."""
    header = json.loads(json.dumps(header))
    numbers = [0, -1, 1, 2**31, 2**40, 10**18, 2.5, None, "7", [], {}, True]
    values = [*numbers, "rans", "lzma", "zlib", "zstd", "attn", "scales", "../x", "\x00"]
    spot = header
    path = []
    while isinstance(spot, (dict, list)) and spot:
        keys = sorted(spot) if isinstance(spot, dict) else range(len(spot))
        path.append((spot, keys[int(random.integers(len(keys)))]))
        spot = spot[path[-1][1]]
        if random.random() < 0.08:
            break
    holder, key = path[-1]
    holder[key] = values[int(random.integers(len(values)))]
    return header, f"{[k for _, k in path]} = {holder[key]!r}"


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_q_forgeries(q_small, tmp_path, count):
    """Changed headers, and changed streams with their CRC made right: under the old digest none
    is ever scored."""
    whole, header, body = q_small
    path, random = tmp_path / "forged.ptz", np.random.default_rng(5)
    digest, done = whole.read_bytes()[10:42], 0
    while done < count:
        changed, data = header, bytearray(body)
        if done % 3:
            changed, what = q_forged_header(header, random)
            if json.dumps(changed) == json.dumps(header):
                continue
        else:
            what, changed = "stream", json.loads(json.dumps(header))
            sizes = [s[2] for s in changed["streams"]]
            which = int(random.integers(len(sizes)))
            start, size = sum(sizes[:which]), sizes[which]
            data[start + int(random.integers(size))] ^= 1 << int(random.integers(8))
            changed["streams"][which][4] = zlib.crc32(data[start : start + size])
        done += 1
        a_forge(path, changed, bytes(data), digest)
        with pytest.raises(t.ArtifactError, match=r"forged\.ptz"):
            q_load(path)
            pytest.fail(what)


# full width


@pytest.mark.slow
def test_q_full_width_export(tmp_path, capsys):
    """30.3 million parameters, fitted by GPTQ: inside 16,000,000 bytes, 10 minutes and 6 GB."""
    code = textwrap.dedent(f"""
        import sys, time, resource, types
        sys.path[:0] = [{str(ROOT)!r}]
        import numpy as np, torch, train_gpt as t, test_cpu as own
        torch.set_num_threads(2)
        c = t.Config(artifact_path="full.ptz", train_seq_len=256, eval_seq_len=256)
        V = 1254
        runtime = own.a_runtime()
        runtime.on_first_rank = lambda work: work()
        runtime.log = types.SimpleNamespace(line=print, event=lambda kind, template="", **v:
                                            print(template.format(**v)))
        model = t.GPT(c, np.arange(V) == 0, runtime)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(".weight"):  # heavier tails than a Gaussian's, as in training
                    p.normal_().mul_(torch.rand_like(p).add_(0.5)).mul_(0.03)
        model.set_phase(t.Phase(recur=True))
        start = time.perf_counter()
        hessians = t.input_hessians(model, torch.randint(V, (8, 256)).split(4), runtime)
        val = types.SimpleNamespace(vocab_sha256="none")
        total = t.export_model(model, hessians, val, runtime, c)
        exported = time.perf_counter() - start
        table = types.SimpleNamespace(base_bytes=np.ones(V), is_boundary=np.arange(V) == 0)
        start = time.perf_counter()
        t.load_model("full.ptz", val, table, runtime, c)
        loaded = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"result total:{{total}} export:{{exported:.1f}} load:{{loaded:.1f}} kib:{{peak}}")
    """)
    done = a_python(["-c", code], tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print("", done.stdout)
    pattern = r"result total:(\S+) export:(\S+) load:(\S+) kib:(\S+)"
    total, exported, loaded, kib = map(float, re.search(pattern, done.stdout).groups())
    assert 16_000_000 - 100_000 <= total <= 16_000_000
    assert exported < 600 and loaded < 20 and kib < 6e6
    above = float(re.search(r"above_floor:(\S+)%", done.stdout)[1])
    assert above <= 0.3


# ==========================================================================================
# ranks, checkpoints, faults
# ==========================================================================================

K_TINY = dict(  # switches inside: recurrence at step 8, QAT from step 20 on, SWA beside the EMA
    iterations=24, recur_start_step=8.0, warmdown_iters=16, late_qat_threshold=0.3,
    swa_enabled=True, swa_every=2, eval_modes=("roundtrip",), run_id="k", artifact_path="k.ptz",
)  # fmt: skip
K_TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


@pytest.fixture(scope="module")
def k_data(tmp_path_factory):
    """The tiny dataset of these tests."""
    return a_dataset(tmp_path_factory.mktemp("k") / "data")


def k_environ(data, **settings):
    """Environment of a tiny run."""
    return a_environ(**(K_TINY | dict(data_path=str(data)) | settings)) | {"OMP_NUM_THREADS": "1"}


def k_ranks(folder, ranks, environ, *options):
    """A finished run of the script under torchrun."""
    return a_python([*K_TORCHRUN, f"--nproc_per_node={ranks}", *options, ROOT / "train_gpt.py"],
                    folder, environ)


def k_start(folder, environ, *launch):
    """A running script, whose output goes to `console` in its folder."""
    names = {f.name.upper() for f in fields(t.Config)} | {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    clean = {k: v for k, v in os.environ.items() if k not in names}
    with open(folder / "console", "ab") as console:
        return subprocess.Popen([sys.executable, "-u", *launch, ROOT / "train_gpt.py"], cwd=folder,
                                env=clean | {"CUDA_VISIBLE_DEVICES": ""} | environ, stdout=console,
                                stderr=subprocess.STDOUT, start_new_session=True)


def k_wait(folder, pattern, process, seconds=60):
    """Wait until the console of a running script matches; its end before that is a failure."""
    deadline = time.monotonic() + seconds
    while not re.search(pattern, (text := (folder / "console").read_text())):
        assert process.poll() is None and time.monotonic() < deadline, text
        time.sleep(0.005)
    return text


def k_ranks_of(process):
    """{rank: process id} of the workers that a torchrun has started."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            values = dict(x.split("=", 1) for x in path.read_text().split("\0") if "=" in x)
            parent = re.search(r"PPid:\s*(\d+)", (path.parent / "status").read_text())
            if "RANK" in values and parent and int(parent[1]) == process.pid:
                found[int(values["RANK"])] = int(path.parent.name)
    return found


def k_events(folder, kind, run_id="k"):
    """The events of a kind."""
    lines = (folder / f"logs/{run_id}.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


def k_run(folder, data, **settings):
    """A tiny run in this process: (exit code, console)."""
    folder.mkdir(exist_ok=True, parents=True)
    with pytest.MonkeyPatch.context() as patch, a_inside(folder) as console:
        for name, value in k_environ(data, **settings).items():
            patch.setenv(name, value)
        code = t.main([])
    return code, console.getvalue()


@contextlib.contextmanager
def k_after_step(step, action):
    """Do something in the training loop when a step has been launched."""
    train_step = t.Trainer.train_step

    def spy(trainer, number):
        train_step(trainer, number)
        if number == step:
            action(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Trainer, "train_step", spy)
        yield


@pytest.fixture(scope="module")
def k_undisturbed(k_data, tmp_path_factory):
    """A run without faults or checkpoints on the way: (folder, weights of its last checkpoint)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, console = k_run(folder, k_data)
    assert code == 0 and "resumed: 0" in console and "phase recur:on step:8" in console
    assert "phase qat:on" in console
    state = k_state(folder, 24)
    assert {name.rstrip("0123456789") for name in state} == {
        "weight", "ema", "swa", "step", "exp_avg", "exp_avg_sq", "momentum", "rng"}
    return folder, state


def k_state(folder, step, rank=0, run_id="k"):
    """Names and bits of the arrays in a shard."""
    path = folder / "checkpoints" / run_id / f"step{step:08d}" / f"rank{rank}"
    with np.load(path, allow_pickle=False) as shard:
        return {n: (a.dtype, a.shape, a.tobytes()) for n, a in shard.items()}


def k_same_run(folder, undisturbed, resumed=True):
    """The artifact, all state and all losses are bit for bit those of the undisturbed run."""
    assert (folder / "k.ptz").read_bytes() == (undisturbed[0] / "k.ptz").read_bytes()
    assert k_state(folder, 24) == undisturbed[1]
    losses = {e["step"]: (e["loss"], e["grad_norm"]) for e in k_events(folder, "train")}
    assert losses == {e["step"]: (e["loss"], e["grad_norm"])
                      for e in k_events(undisturbed[0], "train")}
    assert k_events(folder, "summary")[-1]["resumed"] == resumed


# muon on several ranks


def test_k_matrices_are_dealt_by_cost():
    """Every item has one owner; loads differ by one item at most; the record's are even."""
    for seed in range(20):
        costs = np.random.default_rng(seed).integers(1, 9, 40).astype(float)
        for ranks in (1, 2, 3, 8):
            owners = np.array(t.deal(list(costs), ranks))
            loads = [costs[owners == rank].sum() for rank in range(ranks)]
            assert sum(loads) == costs.sum() and max(loads) - min(loads) <= max(costs)
    c, runtime = t.Config(), b_runtime("meta")
    with torch.device("meta"):
        model = t.GPT(c, np.zeros(1254, bool), runtime)
    runtime.world = 8
    muon = t.Optimizer(model, c, runtime).muon
    assert {stack.owner for stack in muon.stacks} == set(range(8))
    matrices = [p for stack in muon.stacks for p in stack.params]
    assert muon.grads.numel() < 1.12 * sum(p.numel() for p in matrices)  # little padding


def k_muons(c, world, calls):
    """Muon on several ranks in this one thread, whose collectives read each other's rows."""
    params = [[torch.nn.Parameter(w) for w in b_matrices(*B_SHAPES)] for _ in range(world)]
    runtimes = [a_runtime(rank, world) for rank in range(world)]
    muons = [t.Muon([p[:2], p[2:]], c, r) for p, r in zip(params, runtimes, strict=True)]

    def reduced(rank, rows):
        calls.append("reduce")
        return sum(muon.grads[rank] for muon in muons)

    def gathered(rank, rows):
        calls.append("gather")
        return lambda: [rows[r].copy_(muons[r].updates[r]) for r in range(world)]

    for rank, runtime in enumerate(runtimes):
        runtime.reduce_scatter = functools.partial(reduced, rank)
        runtime.all_gather = functools.partial(gathered, rank)
    return params, muons


def k_muon_step(params, muons, grads):
    """One update from gradients whose mean over ranks is `grads`; returns the sum of squares."""
    world = len(muons)
    for rank, muon in enumerate(muons):
        for p, g in zip(params[rank], grads, strict=True):
            p.grad = g * (2 * (rank + 1) / (world + 1))
        torch._foreach_copy_(muon.matrices(muon.grads, muon.stacks),  # before anybody reads them
                             [p.grad for s in muon.stacks for p in s.params])
    squares = sum(muon.reduce() for muon in muons)
    for muon in muons:
        muon.start(torch.full((1,), 1 / world), 0.9)
    for muon in muons:
        muon.finish(0.025)
    return float(squares)


def test_k_muon_of_several_ranks_is_muon_of_one():
    """Means over ranks, momentum on its owner only, one reduction and one gather a step."""
    c = b_config(muon_wd=0.1, muon_row_norm=True)
    calls, steps = [], [b_matrices(*B_SHAPES, seed=10 + step) for step in range(3)]
    (alone, one), (several, three) = k_muons(c, 1, []), k_muons(c, 3, calls)
    for grads in steps:
        expected = sum(float(g.square().sum()) for g in grads)
        assert k_muon_step(alone, one, grads) == pytest.approx(expected, rel=1e-4)
        assert k_muon_step(several, three, grads) == pytest.approx(9 * expected, rel=1e-4)
    assert calls == (["reduce"] * 3 + ["gather"] * 3) * 3
    for params in several:
        for ours, theirs, first in zip(params, alone[0], several[0], strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
            assert torch.equal(ours, first)  # every rank has the same bits
    assert sum(int(muon.momentum.count_nonzero()) for muon in three) == sum(
        math.prod(shape) for shape in B_SHAPES)  # on the owner and nowhere else


def test_k_momentum_is_copied_across_owners():
    """What a repeat's owner gets is the momentum that the base's owner has, bit for bit."""
    params, muons = k_muons(b_config(), 3, [])
    for muon in muons:
        muon.momentum.normal_()
    before = torch.stack([muon.momentum.clone() for muon in muons])
    owner = {p: s.owner for muon in muons for s in muon.stacks for p in s.params}
    pairs = ((0, 3), (2, 4))
    assert any(owner[params[0][a]] != owner[params[0][b]] for a, b in pairs)
    for rank, muon in enumerate(muons):
        def gathered(rows, rank=rank):
            assert not rows[[r for r in range(3) if r != rank]].any()  # not known here
            return lambda: [rows[r].copy_(before[r]) for r in range(3) if r != rank]

        muon.runtime.all_gather = gathered
        muon.copy_momentum([(params[rank][a], params[rank][b]) for a, b in pairs])
    after, own = torch.stack([muon.momentum for muon in muons]), muons[0]
    order = [p for s in own.stacks for p in s.params]
    old, new = (dict(zip(order, own.matrices(rows, own.stacks), strict=True))
                for rows in (before, after))
    source = {b: a for a, b in pairs}
    for i, p in enumerate(params[0]):
        assert torch.equal(new[p], old[params[0][source.get(i, i)]])


def k_compare(tmp_path, data, *rank_counts, **settings):
    """Check losses and artifact sizes of runs on several ranks against one rank's."""
    settings |= dict(iterations=30, swa_enabled=False, late_qat_threshold=0.0)
    assert k_run(tmp_path / "ranks1", data, **settings)[0] == 0
    for ranks in rank_counts:
        folder = tmp_path / f"ranks{ranks}"
        folder.mkdir()
        done = k_ranks(folder, ranks, k_environ(data, **settings))
        assert done.returncode == 0 and "all_ranks_at_step:30\n" in done.stdout, done.stderr
        losses = [[e["loss"] for e in k_events(path, "train")]
                  for path in (tmp_path / "ranks1", folder)]
        assert len(losses[0]) == 30
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
        sizes = [(path / "k.ptz").stat().st_size for path in (tmp_path / "ranks1", folder)]
        assert max(sizes) < 1.002 * min(sizes)


def test_k_two_ranks_are_one(tmp_path, k_data):
    """30 steps, recurrence inside: losses within 1e-5 relative, artifact within 0.2 %."""
    k_compare(tmp_path, k_data, 2)


@pytest.mark.slow
def test_k_four_and_eight_ranks_are_one(tmp_path, k_data):
    """The same; and with micro-batches that are larger on few ranks than on many."""
    k_compare(tmp_path, k_data, 4, 8)
    k_compare(tmp_path / "accumulated", k_data, 2, 8, micro_batch_tokens=32)


# checkpoints


@pytest.mark.parametrize("step", [3, 8, 21])
def test_k_a_signal_checkpoints_and_resume_goes_on(step, tmp_path, k_data, k_undisturbed):
    """SIGTERM or SIGINT: exit code 75 at the next boundary; RESUME=1 ends bit-identical.

    Before recurrence, at its switch, under QAT; with other logging and validations on the way.
    """
    number = signal.SIGINT if step == 8 else signal.SIGTERM
    with k_after_step(step, lambda trainer: os.kill(os.getpid(), number)):
        code, console = k_run(tmp_path, k_data, val_loss_every=5, train_log_every=2)
    assert code == 75 and f"stopping_early: {number.name} " in console
    (kept,) = (tmp_path / "checkpoints/k").iterdir()
    assert kept.name == f"step{k_events(tmp_path, 'stop')[0]['step']:08d}"
    assert step < int(kept.name[4:]) <= step + 3
    assert not (tmp_path / "k.ptz").exists()
    code, console = k_run(tmp_path, k_data, resume=True, checkpoint_every=1e-6, val_loss_every=7)
    assert code == 0 and "resumed: 1" in console
    assert [e["step"] for e in k_events(tmp_path, "resume")] == [int(kept.name[4:])]
    assert len(k_events(tmp_path, "checkpoint")) >= 2
    assert len(list((tmp_path / "checkpoints/k").iterdir())) == 2  # CHECKPOINT_KEEP
    logged = {e["step"] for e in k_events(tmp_path, "train")}
    assert (tmp_path / "k.ptz").read_bytes() == (k_undisturbed[0] / "k.ptz").read_bytes()
    assert k_state(tmp_path, 24) == k_undisturbed[1] and 24 in logged


def test_k_a_fault_after_training_loses_nothing(tmp_path, k_data, k_undisturbed, monkeypatch):
    """The checkpoint at the end of training: RESUME=1 goes on to the export without a step."""
    with monkeypatch.context() as patch:
        patch.setattr(t, "export_model", lambda *_: t.require(False, "no export today"))
        code, _ = k_run(tmp_path, k_data)
    assert code == 1 and not (tmp_path / "k.ptz").exists()
    with k_after_step(0, lambda _: pytest.fail("trained again")):
        code, console = k_run(tmp_path, k_data, resume=True)
    assert code == 0 and "resumed step:24 of checkpoints/k" in console
    k_same_run(tmp_path, k_undisturbed)


def test_k_signals_outside_training_stop_too(tmp_path, k_data, monkeypatch, capsys):
    """In evaluation SIGTERM ends with 75 as well, and the handlers are put back."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(t, "evaluate_artifact", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    code, _ = k_run(tmp_path, k_data, iterations=2)
    assert code == 75 and "RESUME=1" in capsys.readouterr().err
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


@pytest.fixture(scope="module")
def k_two_checkpoints(k_data, tmp_path_factory):
    """A run stopped with two checkpoints: its folder."""
    folder = tmp_path_factory.mktemp("two")
    with k_after_step(13, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
        assert k_run(folder, k_data, checkpoint_every=1e-6)[0] == 75
    assert len(list((folder / "checkpoints/k").iterdir())) == 2
    return folder


def k_damage_byte(folder, name):
    """Flip one bit in the middle of a file."""
    (path,) = folder.glob(name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    a_replace(path, bytes(data))


K_DAMAGE = {
    "bit in the shard": lambda folder: k_damage_byte(folder, "rank0"),
    "bit in the commit": lambda folder: k_damage_byte(folder, "commit.*"),
    "truncated": lambda folder: a_replace(folder / "rank0", (folder / "rank0").read_bytes()[:-9]),
    "no shard": lambda folder: (folder / "rank0").unlink(),
    "another's shard": lambda folder: shutil.copy(
        min(folder.parent.iterdir()) / "rank0", folder / "rank0"),
    "no commit": lambda folder: next(folder.glob("commit.*")).unlink(),
    "torn file": lambda folder: [next(folder.glob("commit.*")).unlink(), (
        folder / "rank0").rename(folder / "rank0.77.tmp")],
}


@pytest.mark.parametrize("damage", K_DAMAGE)
def test_k_the_one_before_a_damaged_checkpoint(damage, k_two_checkpoints, k_data, tmp_path,
                                               k_undisturbed):
    """Whatever is wrong with the newest one, the run goes on from the one before, and says so."""
    folder = tmp_path / "run"
    shutil.copytree(k_two_checkpoints, folder)
    before, newest = sorted((folder / "checkpoints/k").iterdir())
    K_DAMAGE[damage](newest)
    code, console = k_run(folder, k_data, resume=True, checkpoint_keep=1)
    assert code == 0 and f"resumed step:{int(before.name[4:])} " in console
    torn = damage in ("no commit", "torn file")
    assert (f"passed over: checkpoints/k/{newest.name}" in console) != torn
    kept = {path.name for path in (folder / "checkpoints/k").iterdir()}
    assert kept == {"step00000024"}
    k_same_run(folder, k_undisturbed)


@pytest.mark.parametrize("changes, named", [
    (dict(matrix_lr=0.01), "MATRIX_LR=0.025 (now 0.01)"),
    (dict(seed=4), "SEED=1337 (now 4)"),
    (dict(iterations=99), "ITERATIONS=24 (now 99)"),
    (dict(micro_batch_tokens=32), "MICRO_BATCH_TOKENS=0 (now 32)"),
    (dict(n_int6_layers=0), "N_INT6_LAYERS=2 (now 0)"),
    (dict(data_path="other"), "DATA="),
    (dict(), "WORLD_SIZE=1 (now 2)"),
    (dict(), "CHECKPOINT_FORMAT=1 (now 2)"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_k_foreign_checkpoints_are_refused_by_name(changes, named, k_two_checkpoints, k_data,
                                                   tmp_path, monkeypatch, capsys):
    """Another configuration, data, rank count or format: an error that names what differs."""
    folder = tmp_path / "run"
    shutil.copytree(k_two_checkpoints, folder)
    if "data_path" in changes:
        changes = {"data_path": str(a_dataset(tmp_path / "other", val=(500, 300)))}
        manifest = tmp_path / "other/manifest.json"
        manifest.write_text(manifest.read_text().replace("5" * 64, "6" * 64))
    if "FORMAT" in named:
        monkeypatch.setattr(t, "CHECKPOINT_FORMAT", 2)
    if "WORLD" in named:
        init = t.Checkpoints.__init__

        def as_two(self, *arguments):
            init(self, *arguments)
            self.bound["WORLD_SIZE"] = 2

        monkeypatch.setattr(t.Checkpoints, "__init__", as_two)
    files = {p: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()}
    code, console = k_run(folder, **({"data": k_data, "resume": True} | changes
                                     if "data_path" not in changes else
                                     {"data": changes["data_path"], "resume": True}))
    error = capsys.readouterr().err
    assert code == 1 and named in error and error.count("(now ") == 1
    assert files == {p: p.read_bytes() for p in files} and "train_loss" not in console


def test_k_what_changes_no_weight_may_change(k_two_checkpoints, k_data, tmp_path, k_undisturbed):
    """Logging, validation, evaluation and paths are free in a resumed run; the rest is bound."""
    folder = tmp_path / "run"
    shutil.copytree(k_two_checkpoints, folder)
    moved = tmp_path / "moved"
    shutil.copytree(k_data, moved)
    code, _ = k_run(folder, moved, resume=True, train_log_every=3, val_loss_every=4, eval_stride=16,
                    checkpoint_every=1e-6, checkpoint_keep=5, size_limit=10**7)
    assert code == 0
    assert (folder / "k.ptz").read_bytes() == (k_undisturbed[0] / "k.ptz").read_bytes()
    free = {f.name for f in fields(t.Config) if t.UNBOUND.fullmatch(f.name)}
    trained = {name for name, row in A_FLIPS.items() if row[0] in (a_see_train, a_see_model,
                                                                   a_see_init)}
    assert not free & trained and {"class_bits", "n_int6_layers", "vocab_size"}.isdisjoint(free)


def test_k_resume_without_a_checkpoint_starts(tmp_path, k_data, k_undisturbed):
    """And says so; the result is that of a run without RESUME."""
    code, console = k_run(tmp_path, k_data, resume=True)
    assert code == 0 and "resumed step:0 of nothing: no checkpoint" in console
    k_same_run(tmp_path, k_undisturbed, resumed=False)


def test_k_resume_is_implied_by_torchruns_restarts():
    """Where RUN_ID says which run; RESUME needs it, and cannot go with LOAD_ARTIFACT."""
    again = {"TORCHELASTIC_RESTART_COUNT": "1"}
    assert t.Config.from_env(again | {"RUN_ID": "x"}, True).resume
    assert not t.Config.from_env(again, True).resume
    assert not t.Config.from_env(again | {"RUN_ID": "x", "LOAD_ARTIFACT": "a"}, True).resume
    assert not t.Config.from_env({"TORCHELASTIC_RESTART_COUNT": "0", "RUN_ID": "x"}, True).resume
    assert "RESUME=1: needs the RUN_ID" in a_problems({"RESUME": "1"})
    assert "RESUME=1: cannot go with LOAD_ARTIFACT" in a_problems(
        {"RESUME": "1", "RUN_ID": "x", "LOAD_ARTIFACT": "a"})


def test_k_checkpoints_of_another_run_are_not_mixed_with(b_make):
    """A fresh run under a name whose checkpoints are still there is refused, nothing is removed."""
    trainer = b_make(iterations=2)
    trainer.run()
    kept = sorted(trainer.checkpoints.root.rglob("*"))
    assert kept
    with pytest.raises(t.RunError, match="holds checkpoints of another run; set another RUN_ID"):
        t.Trainer(trainer.model, trainer.loader, trainer.evaluator).run()
    assert sorted(trainer.checkpoints.root.rglob("*")) == kept


def test_k_the_clock_stands_still_and_goes_on(b_make, monkeypatch):
    """A slow checkpoint costs no training time; elapsed time and step times are carried over."""
    write, written = t.Checkpoints.write, []

    def slow(self, arrays, state):
        time.sleep(0.6)
        write(self, arrays, state)
        written.append(state)

    monkeypatch.setattr(t.Checkpoints, "write", slow)
    trainer = b_make(iterations=6, checkpoint_every=1e-6)
    trainer.run()
    assert len(written) == 6 and trainer.clock.elapsed_ms < 600 * 5
    assert written[-1]["elapsed_ms"] == trainer.clock.elapsed_ms
    again = t.Trainer(trainer.model, trainer.loader, trainer.evaluator)
    again.checkpoints, again.optimizer = trainer.checkpoints, t.Optimizer(
        trainer.model, trainer.config, trainer.runtime)
    again.resume()
    assert again.clock.elapsed_ms == trainer.clock.elapsed_ms and again.clock.steps == 6
    assert list(again.clock.recent) == list(trainer.clock.recent)
    assert (again.phase, again.average.snapshots) == (trainer.phase, trainer.average.snapshots)


# faults


def test_k_a_run_id_is_used_once(tmp_path, k_data, capsys):
    """Not while another run has it, not when it is finished; RESUME=1 appends."""
    first = t.RunLog("x")
    with a_inside(tmp_path):
        first.open(False)
        first.line("kept")
        for append in (False, True):
            with pytest.raises(t.RunError, match="logs/x.txt: another run is writing it; "):
                t.RunLog("x").open(append)
        first.close()
        with pytest.raises(t.RunError, match="RUN_ID=x has been used; set another one, or RESUME"):
            t.RunLog("x").open(False)
        again = t.RunLog("x")
        again.open(True)
        again.line("added")
        again.close()
    (tmp_path / "elsewhere").mkdir()
    with a_inside(tmp_path / "elsewhere"), pytest.raises(t.RunError, match="logs/x.txt: .*logs/"):
        Path("logs").touch()
        t.RunLog("x").open(False)
    assert (tmp_path / "logs/x.txt").read_text() == "kept\nadded\n"
    assert k_run(tmp_path, k_data, run_id="x", iterations=1)[0] == 1
    assert "RUN_ID=x has been used" in capsys.readouterr().err


@pytest.mark.parametrize("wrong, lag", [("loss", 1), ("gradient", 2)])
def test_k_non_finite_keeps_the_last_checkpoint(wrong, lag, tmp_path, k_data, monkeypatch, capsys):
    """Exit code 1, the step is named, and no checkpoint or artifact holds what came of it.

    Also where, as on CUDA, the host learns of a loss two steps later.
    """
    backward, init = t.Trainer.backward, t.Trainer.__init__

    def lagging(trainer, *arguments):
        init(trainer, *arguments)
        trainer.lag = lag

    monkeypatch.setattr(t.Trainer, "__init__", lagging)

    def broken(trainer, x, y):
        loss = backward(trainer, x, y)
        if trainer.steps == 9 and trainer.clock.steps:
            if wrong == "loss":
                return loss * math.nan
            trainer.model.blocks[0].attn.out.weight.grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(t.Trainer, "backward", broken)
    code, _ = k_run(tmp_path, k_data, checkpoint_every=1e-6)
    error = capsys.readouterr().err
    assert code == 1 and "at step 10: the run diverged" in error
    assert not (tmp_path / "k.ptz").exists()
    newest = max((tmp_path / "checkpoints/k").iterdir()).name
    assert newest == "step00000009" and "the last checkpoint is of step 9" in error
    for _, _, data in k_state(tmp_path, 9).values():
        if len(data) % 4 == 0:
            assert np.isfinite(np.frombuffer(data, np.float32)).all() or len(data) > 5000
    monkeypatch.setattr(t.Trainer, "backward", backward)
    assert k_run(tmp_path, k_data, resume=True)[0] == 0


@pytest.mark.parametrize("broken", ["write", "commit"])
def test_k_a_full_disk_leaves_nothing_that_looks_whole(broken, tmp_path, k_data, monkeypatch,
                                                       k_undisturbed):
    """The run goes on with a warning, and the last checkpoint stays; a later one succeeds."""
    fsync, full = os.fsync, []

    def failing(descriptor):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        if name.startswith("rank" if broken == "write" else "commit"):
            full.append(name)
            if 2 <= len(full) <= 4:
                raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    looks = []
    with k_after_step(3, lambda trainer: looks.extend(
            sorted(p.name for p in trainer.checkpoints.root.iterdir()))):
        code, console = k_run(tmp_path, k_data, checkpoint_every=1e-6)
    assert code == 0 and console.count("warning: no checkpoint at step:") == 3
    assert "No space left on device; nothing was replaced" in console
    assert len(looks) == 1 and not list(tmp_path.rglob("*.tmp"))
    k_same_run(tmp_path, k_undisturbed, resumed=False)


def test_k_a_signal_without_room_is_an_error(tmp_path, k_data, monkeypatch, capsys):
    """Exit code 1, not 75: there is nothing newer to go on from."""
    def full(*_):
        raise t.RunError("cannot write: No space left on device")

    monkeypatch.setattr(t, "write_atomic", full)
    with k_after_step(3, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
        code, console = k_run(tmp_path, k_data)
    assert code == 1 and "no checkpoint could be written" in capsys.readouterr().err
    assert "warning: no checkpoint" in console and not (tmp_path / "checkpoints/k").exists()


def test_k_a_signal_that_the_compiler_wraps_is_a_signal():
    """Exit code 75: dynamo hands on what a handler raises in it as an error of its own."""
    runtime = a_runtime()
    with pytest.raises(t.Stopped, match="stopped by signal 15: wrapped") as caught:
        with runtime.guarded():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except t.Stopped as error:
                raise RuntimeError("wrapped") from error
    assert caught.value.code == 75
    with pytest.raises(RuntimeError, match="no signal"), a_runtime().guarded():
        raise RuntimeError("no signal")


def test_k_out_of_memory_on_a_cpu_names_the_settings(monkeypatch, capsys):
    """As on a GPU: exit code 1 and what to lower."""
    monkeypatch.setattr(t, "run", lambda config: torch.empty(1 << 60))
    assert t.main([]) == 1
    error = capsys.readouterr().err
    assert "MICRO_BATCH_TOKENS" in error and "TRAIN_BATCH_TOKENS" in error


def test_k_a_loss_spike_is_an_event(b_make):
    """With step, loss and the median it is measured by; ordinary losses are none."""
    trainer = b_make(iterations=16)
    backward = trainer.backward
    trainer.backward = lambda x, y: backward(x, y) * (2.0 if trainer.steps == 12 else 1.0)
    trainer.run()
    (spike,) = b_events(trainer, "spike")
    assert spike["step"] == 13 and spike["loss"] > t.SPIKE * spike["usual"]
    losses = b_losses(trainer)
    assert losses[12] == spike["loss"] and spike["usual"] == np.median(losses[:12])


K_BLOCKED = """
import ctypes, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import train_gpt as t
runtime, libc = t.Runtime(t.Config(run_id="blocked")), ctypes.CDLL(None)
with runtime.guarded():
    runtime.defer_signals = True
    if runtime.rank == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # the second waits for ever, and no signal ends that
        libc.pthread_mutex_lock(mutex)
"""


def k_launcher_names(text: str) -> list[str]:
    """The rank and exit code that torchrun gives as the root cause."""
    cause = text.partition("Root Cause")[2]
    return re.findall(r" (?:rank|exitcode) +: (-?\d+)", cause)[:2]


def test_k_a_dying_rank_is_named(tmp_path, k_data):
    """SIGKILL to rank 1 of 2: rank 0 ends within seconds, and the launcher names rank 1."""
    environ = k_environ(k_data, iterations=100000, run_id="dying")
    process = k_start(tmp_path, environ, *K_TORCHRUN, "--nproc_per_node=2")
    try:
        k_wait(tmp_path, r"step:9/", process)
        os.kill(k_ranks_of(process)[1], signal.SIGKILL)
        assert process.wait(30) == 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert k_launcher_names((tmp_path / "console").read_text()) == ["1", "-9"]
    assert not (tmp_path / "k.ptz").exists() and not list(tmp_path.rglob("commit.*"))


@pytest.mark.slow
def test_k_a_rank_that_waits_in_the_driver_ends_with_a_dead_one(tmp_path):
    """As under NCCL: rank 0 hears no SIGTERM; the launcher ends it after 30 s and names rank 1."""
    (tmp_path / "blocked.py").write_text(K_BLOCKED)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *K_TORCHRUN, "--nproc_per_node=2", "blocked.py", ROOT], cwd=tmp_path,
        capture_output=True, text=True, timeout=90,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and 25 < time.monotonic() - began < 60
    assert k_launcher_names(done.stderr) == ["1", "-9"]


@pytest.mark.slow
def test_k_killed_at_random_moments_ends_bit_identical(tmp_path, k_data, k_undisturbed):
    """SIGKILL six times in one run, with a checkpoint being written at every step."""
    environ = k_environ(k_data, checkpoint_every=1e-6, resume=True)
    rng, kills = random.Random(6), 0
    while True:
        process = k_start(tmp_path, environ)
        if kills == 6:
            break
        before = len((tmp_path / "console").read_text())
        while "train_time" not in (tmp_path / "console").read_text()[before:]:
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.15))
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    process.wait(60)
    assert process.returncode == 0, (tmp_path / "console").read_text()
    resumed = [e["step"] for e in k_events(tmp_path, "resume")]
    assert len(set(resumed)) > 3 and resumed == sorted(resumed)
    k_same_run(tmp_path, k_undisturbed)


@pytest.mark.slow
def test_k_two_ranks_restart_and_resume_by_themselves(tmp_path, k_data):
    """torchrun --max-restarts: one rank after the other is killed; the run ends bit-identical."""
    environ = k_environ(k_data, checkpoint_every=1e-6, iterations=120, warmdown_iters=80)
    (tmp_path / "calm").mkdir()
    calm = k_ranks(tmp_path / "calm", 2, environ)
    assert calm.returncode == 0, calm.stderr
    launch = (*K_TORCHRUN, "--nproc_per_node=2", "--max-restarts=3")
    process = k_start(tmp_path, environ, *launch)
    try:
        for rank, step in ((1, 20), (0, 60)):
            k_wait(tmp_path, rf"step:{step}/120 train", process)
            os.kill(k_ranks_of(process)[rank], signal.SIGKILL)
            k_wait(tmp_path, rf"resumed step:\d+ of checkpoints/k\n(.*\n)*step:{step + 10}/",
                   process)
        assert process.wait(120) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "k.ptz").read_bytes() == (tmp_path / "calm/k.ptz").read_bytes()
    for rank in (0, 1):
        assert k_state(tmp_path, 120, rank) == k_state(tmp_path / "calm", 120, rank)
    assert len(k_events(tmp_path, "resume")) == 2


@pytest.mark.slow
def test_k_a_signal_to_torchrun_checkpoints_all_ranks(tmp_path, k_data):
    """SIGTERM to the launcher: one checkpoint of both ranks at one step; RESUME=1 goes on."""
    environ = k_environ(k_data, iterations=100000)
    process = k_start(tmp_path, environ, *K_TORCHRUN, "--nproc_per_node=2")
    k_wait(tmp_path, r"step:9/", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(40) != 0
    (kept,) = (tmp_path / "checkpoints/k").iterdir()
    names = sorted(path.name.split(".")[0] for path in kept.iterdir())
    assert names == ["commit", "rank0", "rank1"]
    process = k_start(tmp_path, environ | {"RESUME": "1"}, *K_TORCHRUN, "--nproc_per_node=2")
    k_wait(tmp_path, rf"resumed step:{int(kept.name[4:])} ", process)
    k_wait(tmp_path, rf"step:{int(kept.name[4:]) + 1}/100000 train", process)
    process.send_signal(signal.SIGTERM)
    process.wait(40)


@pytest.mark.slow
def test_k_nodes_may_have_disks_of_their_own(tmp_path, k_data):
    """Each rank in a folder of its own: old checkpoints go from both, and RESUME=1 goes on."""
    (tmp_path / "node.py").write_text(
        "import os, runpy, sys\nfolder = 'node' + os.environ['RANK']\n"
        "os.makedirs(folder, exist_ok=True)\nos.chdir(folder)\ndel sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n")
    environ = k_environ(k_data, iterations=100000, checkpoint_every=1e-6)
    launch = (*K_TORCHRUN, "--nproc_per_node=2", "node.py")
    resumed = "step:9/"
    for _ in range(2):
        process = k_start(tmp_path, environ, *launch)
        k_wait(tmp_path, resumed, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) != 0
        kept = [sorted((tmp_path / f"node{rank}/checkpoints/k").iterdir()) for rank in (0, 1)]
        names = [[path.name for path in folders] for folders in kept]
        assert names[0] == names[1] and len(names[0]) == 2  # CHECKPOINT_KEEP
        assert [path.name for path in kept[1][-1].iterdir()] == ["rank1"]
        step = int(names[0][-1][4:])
        environ["RESUME"], resumed = "1", rf"resumed step:{step} (.*\n)*step:{step + 3}/"


@pytest.mark.slow
def test_k_two_ranks_stop_before_the_cap_at_one_step(tmp_path, k_data):
    """The log proves it: the slowest rank's clock is under the cap, all ranks at one step."""
    environ = k_environ(k_data, iterations=100000, max_wallclock_seconds=4.0)
    done = k_ranks(tmp_path, 2, environ)
    assert done.returncode == 0, done.stderr
    (clock,), (stop,) = k_events(tmp_path, "clock"), k_events(tmp_path, "stop")
    assert clock["cap_ms"] == 4000 and clock["reserve_ms"] >= t.CLOCK_RESERVE_MS
    assert 500 < clock["train_ms"] < 4000 and stop["step"] == clock["step"] < 100000
    assert re.search(r"train_clock slowest_rank:\d+ms cap:4000ms reserve:\d+ms all_ranks_at_step:"
                     rf"{clock['step']}\n", done.stdout)


@pytest.mark.slow
def test_k_memory_is_constant(tmp_path, k_data):
    """400 steps, checkpoints on the way: the resident size does not grow after the first 100."""
    environ = k_environ(k_data, iterations=400, warmdown_iters=100, recur_start_step=40.0,
                        checkpoint_every=0.5)
    process, sizes = k_start(tmp_path, environ), []
    k_wait(tmp_path, "step:100/", process)
    while process.poll() is None and "post_ema" not in (tmp_path / "console").read_text():
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            sizes += [int(kib) for kib in re.findall(r"VmRSS:\s+(\d+)", status)]
        time.sleep(0.05)
    assert process.wait(60) == 0 and len(sizes) > 10
    assert max(sizes[len(sizes) // 2 :]) < 1.03 * max(sizes[: len(sizes) // 4])
