"""Settings: environment -> Config, and that every setting does something."""

from __future__ import annotations

import functools
import re
import shutil
import tempfile
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import harness as h
import train_gpt as t


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
    lines = [line for line in h.problems({name: value}).splitlines() if f"{name}={value}" in line]
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
    lines = h.problems(environ).splitlines()
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


@pytest.mark.parametrize("name, meant", [
    ("TRAIN_SEQLEN", "TRAIN_SEQ_LEN"), ("MATRIXLR", "MATRIX_LR"), ("EVAL_STRIDES", "EVAL_STRIDE"),
    ("NUM_LAYER", "NUM_LAYERS"), ("WARM_DOWN_ITERS", "WARMDOWN_ITERS"),
    ("TRAIN_BATCH_TOKEN", "TRAIN_BATCH_TOKENS"),
])  # fmt: skip
def test_near_misses_are_answered(name, meant):
    """A name that is nearly a setting is a mistake, and the answer names the setting."""
    assert f"{name}=7: no such setting; did you mean {meant}?" in h.problems({name: "7"})


def test_published_names_are_answered():
    """Every dropped spelling names the setting to use, and that setting exists."""
    for name in ("N_INT6_MLP_LAYERS", "SLIDING_WINDOW_ENABLED", "EMA_EVERY"):  # SPEC section 1
        assert name in t.DROPPED
    names = {f.name.upper() for f in fields(t.Config)}
    for name, remedy in t.DROPPED.items():
        text = h.problems({name: "7"})
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


def see_model(c, made):
    """Names, shapes and, with random weights, the logits of the model, recurrence on."""
    ids = torch.from_numpy(h.stream(64, 3)).view(2, 32)
    model = h.random_model(c)
    return [(n, tuple(p.shape)) for n, p in model.named_parameters()], h.digest(
        [("logits", model.logits(ids))])


def see_init(c, made):
    """Initial weights."""
    torch.manual_seed(c.seed)
    return h.digest(t.GPT(c, h.table().is_boundary, h.runtime()).named_parameters())


def trainer_on(c, data):
    """A Trainer on the tiny data, and its model."""
    path = tempfile.mkdtemp(dir=data.parent)
    c, runtime = replace(c, data_path=str(data), checkpoint_path=path), h.runtime()
    torch.manual_seed(c.seed)
    table = t.load_byte_table(c)
    model = t.GPT(c, table.is_boundary, runtime)
    loader = t.Loader(t.find_shards(c, "train"), c, runtime, model.vocab_size)
    return t.Trainer(model, loader, t.Evaluator(runtime, c, t.load_validation(c, table)))


def see_train(c, made):
    """Steps, accumulation, forward passes before the first step, and the weights to export."""
    trainer = trainer_on(c, made[1])
    passes, forward = [], trainer.forward
    trainer.forward = lambda *a: passes.append(trainer.clock.steps == trainer.steps == 0) or (
        forward(*a))
    trainer.run()
    trainer.average.store()
    return trainer.steps, trainer.accumulation, sum(passes), h.digest(
        trainer.model.named_parameters())


def see_hessians(c, made):
    """Second moments of the calibration after no step."""
    return h.digest(trainer_on(c, made[1]).hessians()[0].items())


def see_stored(c, made):
    """Codes and streams of the export of one and the same random model."""
    shape = {n: getattr(h.config(), n) for n in h.TINY if n not in ("n_int6_layers",)}
    model = h.random_model(t.Config(**shape))
    stored = t.quantize({n: p.detach() for n, p in model.named_parameters()}, c)
    streams = t.pack_streams(stored, c.compressor)
    return [(n, s.bits) for n, s in stored.items()], [(s.name, s.codec, s.data) for s in streams]


def see_table(c, made):
    """Which byte table is loaded, or why none."""
    try:
        return str(t.load_byte_table(replace(c, data_path=str(made[1]))).path)
    except t.RunError as error:
        return str(error)


def see_data(c, made):
    """The shards of the training split, or why there are none."""
    try:
        return t.find_shards(c, "train")
    except t.RunError as error:
        return str(error)


def see_batch(c, made):
    """Shape of an evaluation batch."""
    c = replace(c, data_path=str(made[1]))
    evaluator = t.Evaluator(h.runtime(), c, t.load_validation(c, t.load_byte_table(c)))
    return tuple(evaluator.score_batch(lambda x, y: y.float(), np.zeros(1, int)).shape)


def see_run(c, made):
    """A whole run: the files it makes, its lines without numbers, its scores, its error."""
    folder = Path(str(made[0])) / f"see{len(list(made[0].iterdir()))}"
    folder.mkdir()
    data = c.data_path if c.data_path != t.Config().data_path else str(made[1])
    error = ""
    with h.inside(folder) as console:
        try:
            t.run(replace(c, data_path=data, load_artifact=c.load_artifact and str(made[2])))
        except t.RunError as caught:
            error = re.sub(r"\d+", "N", str(caught))
    lines = console.getvalue().splitlines()
    files = sorted(str(p.relative_to(folder).with_suffix("") if p.name.startswith("commit.")
                       else p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return files, [re.split(r"[\d:]", line)[0] for line in lines], re.findall(
        r"bpb:\S+", console.getvalue()), error


def see_compile(c, made):
    """Whether a runtime on CUDA compiles."""
    with pytest.MonkeyPatch.context() as patch, h.inside(made[0]):
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


def see_choices(c, made):
    """The attention and the MLP that are chosen on CUDA where all work, each faster than before."""
    with pytest.MonkeyPatch.context() as patch:
        return h.choices(patch, c, [5.0, 4.0, 3.0], [2.0, 1.0])


def see_preset(c, made):
    """What PRESET makes of an empty environment."""
    return t.Config.from_env({"PRESET": c.preset}, cuda=True).model_dim


TTT = dict(load_artifact="made.ptz", ttt_chunk_tokens=128, ttt_lr=0.1)


NGRAM, SLOT = TTT | {"ngram_enabled": True}, TTT | {"slot_enabled": True}


FLIPS = {  # field: (observable, value, what must be set too)
    "preset": (see_preset, "demo", {}),
    "run_id": (see_run, "another", {}),
    "seed": (see_train, 1, {}),
    "data_path": (see_data, "elsewhere", {}),
    "tokenizer_path": (see_table, "elsewhere.vocab", {}),
    "tokenizer_meta_path": (see_table, "elsewhere.meta.npz", {}),
    "vocab_size": (see_table, h.VOCAB + 1, {}),
    "dry_run": (see_run, True, {}),
    "num_layers": (see_model, 5, {}),
    "model_dim": (see_model, 16, {}),
    "num_heads": (see_model, 4, {}),
    "num_kv_heads": (see_model, 2, {}),
    "mlp_mult": (see_model, 2.0, {}),
    "tie_embeddings": (see_model, False, {}),
    "rope_base": (see_model, 100.0, {}),
    "rope_dims": (see_model, 4, {}),
    "logit_softcap": (see_model, 5.0, {}),
    "qk_gain_init": (see_init, 1.0, {}),
    "ln_scale": (see_model, False, {}),
    "xsa_last_n": (see_model, 1, {}),
    "smear_enabled": (see_model, False, {}),
    "bigram_vocab_size": (see_model, 0, {}),
    "bigram_dim": (see_model, 4, {}),
    "ve_enabled": (see_model, False, {}),
    "ve_dim": (see_model, 4, {}),
    "ve_layers": (see_model, (1, 3), {}),
    "activation_neg_slope": (see_model, 0.1, {}),
    "parallel_start_layer": (see_model, 4, {}),
    "recur_layers": (see_model, (0, 1), {}),
    "recur_start_step": (see_train, 5.0, {}),
    "recur_untie_mlp": (see_model, False, {}),
    "train_batch_tokens": (see_train, 128, {}),
    "micro_batch_tokens": (see_train, 64, {}),
    "train_seq_len": (see_train, 16, {}),
    "iterations": (see_train, 7, {}),
    "warmdown_iters": (see_train, 10, {}),
    "warmup_steps": (see_train, 9, {}),
    "max_wallclock_seconds": (see_train, 0.26, {}),
    "matrix_lr": (see_train, 0.01, {}),
    "scalar_lr": (see_train, 0.01, {}),
    "tied_embed_lr": (see_train, 0.01, {}),
    "embed_lr": (see_train, 0.01, {"tie_embeddings": False}),
    "head_lr": (see_train, 0.01, {"tie_embeddings": False}),
    "tied_embed_init_std": (see_init, 0.02, {}),
    "min_lr": (see_train, 0.3, {}),
    "muon_momentum": (see_train, 0.9, {}),
    "muon_momentum_warmup_start": (see_train, 0.5, {}),
    "muon_momentum_warmup_steps": (see_train, 2, {}),
    "muon_backend_steps": (see_train, 3, {}),
    "muon_wd": (see_train, 0.5, {}),
    "muon_row_norm": (see_train, True, {}),
    "adam_wd": (see_train, 0.5, {}),
    "beta1": (see_train, 0.8, {}),
    "beta2": (see_train, 0.8, {}),
    "adam_eps": (see_train, 1e-4, {}),
    "grad_clip_norm": (see_train, 0.01, {}),
    "ema_decay": (see_train, 0.0, {}),
    "swa_enabled": (see_train, True, {}),
    "swa_every": (see_train, 2, {"swa_enabled": True}),
    "late_qat_threshold": (see_train, 0.0, {}),
    "n_int6_layers": (see_stored, 0, {}),
    "quant": (see_run, "rtn", {}),
    "gptq_calibration_seqs": (see_hessians, 3, {}),
    "class_bits": (see_stored, "attn=4", {}),
    "compressor": (see_stored, "lzma", {}),
    "size_limit": (see_run, 1000, {}),
    "artifact_path": (see_run, "another.ptz", {}),
    "load_artifact": (see_run, "made.ptz", {}),
    "eval_seq_len": (see_run, 16, {}),
    "eval_stride": (see_run, 16, {}),
    "eval_modes": (see_run, ("roundtrip",), {}),
    "ttt_enabled": (see_run, False, TTT),
    "ttt_lr": (see_run, 0.2, TTT),
    "ttt_epochs": (see_run, 1, TTT),
    "ttt_chunk_tokens": (see_run, 64, TTT),
    "ttt_freeze_blocks": (see_run, 0, TTT),
    "ttt_momentum": (see_run, 0.5, TTT),
    "ttt_batch_seqs": (see_run, 2, TTT),
    "ttt_grad_clip": (see_run, 0.01, TTT),
    "ngram_enabled": (see_run, True, TTT),
    "ngram_order": (see_run, 2, NGRAM),
    "ngram_weight": (see_run, 0.3, NGRAM),
    "slot_enabled": (see_run, True, TTT),
    "slot_steps": (see_run, 2, SLOT),
    "slot_lr": (see_run, 0.05, SLOT),
    "val_batch_size": (see_batch, 1024, {}),
    "val_loss_every": (see_run, 4, {}),
    "val_tokens_limit": (see_run, 500, {}),
    "scores_path": (see_run, "scores", {}),
    "train_log_every": (see_run, 100, {}),
    "checkpoint_every": (see_run, 1e-6, {}),
    "checkpoint_keep": (see_run, 1, {"checkpoint_every": 1e-6}),
    "checkpoint_path": (see_run, "another", {}),
    "resume": (see_run, True, {}),
    "attention": (see_choices, "cudnn", {}),
    "mlp_kernel": (see_choices, "torch", {}),
    "torch_compile_disable": (see_compile, True, {}),
}


RUN_BASE = dict(run_id="base", iterations=12)  # the first ten steps are always logged


@functools.cache
def seen(see, base, made):
    """What is seen of a tiny run with a few settings, given as sorted items."""
    common = RUN_BASE if see is see_run else {}
    return see(h.config(**(common | dict(base))), made)


def test_every_setting_has_a_row():
    """A new setting without a way to see it fails here."""
    assert set(FLIPS) == {f.name for f in fields(t.Config)}


@pytest.mark.parametrize("see, base", sorted({
    (row[0], tuple(row[2].items())) for row in FLIPS.values()}, key=str),
    ids=lambda v: getattr(v, "__name__", None))  # fmt: skip
def test_what_is_seen_repeats(see, base, made):
    """The same settings twice give the same, bit for bit; else the flips below prove nothing."""
    assert seen.__wrapped__(see, base, made) == seen(see, base, made)


@pytest.mark.parametrize("name", FLIPS)
def test_every_setting_does_something(name, made):
    """Another value of one setting changes what is seen."""
    see, value, base = FLIPS[name]
    before, after = tuple(base.items()), tuple((base | {name: value}).items())
    assert value != getattr(h.config(**base), name)
    assert seen(see, before, made) != seen(see, after, made)


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
    data = h.dataset(tmp_path / "data")
    if "tokenizer_path" in changes:
        (data / "manifest.json").unlink()
    for name, value in h.environ(**(dict(data_path=str(data), iterations=1) | changes)).items():
        monkeypatch.setenv(name, str(value))
    with h.inside(tmp_path):
        code = t.main([])
    error = capsys.readouterr().err
    assert code == 1 and error.startswith("error: ") and message in error


def test_layer_plan_refusals():
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


def test_what_changes_no_weight_may_change(two_checkpoints, data, tmp_path, undisturbed):
    """Logging, validation, evaluation and paths are free in a resumed run; the rest is bound."""
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    code, _ = h.run_switching(folder, moved, resume=True, train_log_every=3, val_loss_every=4,
                              eval_stride=16, checkpoint_every=1e-6, checkpoint_keep=5,
                              size_limit=10**7)
    assert code == 0
    assert (folder / "k.ptz").read_bytes() == (undisturbed[0] / "k.ptz").read_bytes()
    free = {f.name for f in fields(t.Config) if t.UNBOUND.fullmatch(f.name)}
    trained = {name for name, row in FLIPS.items() if row[0] in (see_train, see_model,
                                                                 see_init)}
    assert not free & trained and {"class_bits", "n_int6_layers", "vocab_size"}.isdisjoint(free)


def test_resume_is_implied_by_torchruns_restarts():
    """Where RUN_ID says which run; RESUME needs it, and cannot go with LOAD_ARTIFACT."""
    again = {"TORCHELASTIC_RESTART_COUNT": "1"}
    assert t.Config.from_env(again | {"RUN_ID": "x"}, True).resume
    assert not t.Config.from_env(again, True).resume
    assert not t.Config.from_env(again | {"RUN_ID": "x", "LOAD_ARTIFACT": "a"}, True).resume
    assert not t.Config.from_env({"TORCHELASTIC_RESTART_COUNT": "0", "RUN_ID": "x"}, True).resume
    assert "RESUME=1: needs the RUN_ID" in h.problems({"RESUME": "1"})
    assert "RESUME=1: cannot go with LOAD_ARTIFACT" in h.problems(
        {"RESUME": "1", "RUN_ID": "x", "LOAD_ARTIFACT": "a"})
