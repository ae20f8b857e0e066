"""Settings: environment -> Config, and that every setting does something."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
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
                "tuple[int, ...]": "4, 5", "tuple[float, ...]": "0.5, 1",
                "tuple[str, ...]": "a,b"}[f.type]
        text = f.metadata["choices"][0] if f.metadata["choices"] else text
        problems = []
        low = f.metadata["low"]
        text = str(low) if low is not None and text != "auto" and float(text) < low else text
        values = t.parse_settings({f.name.upper(): text}, problems)
        assert problems == [] and list(values) == [f.name]
        assert type(values[f.name]) is type(f.default)
    assert t.parse_settings({"RECUR_LAYERS": " 4, 5 "}, [])["recur_layers"] == (4, 5)
    assert t.parse_settings({"RECUR_LAYERS": ""}, [])["recur_layers"] == ()
    assert t.parse_settings({"MUON_WD_TAPER": "0.7, 1"}, [])["muon_wd_taper"] == (0.7, 1.0)
    assert t.parse_settings({"PRESET": "frontier, demo"}, [])["preset"] == ("frontier", "demo")
    assert t.parse_settings({"EVAL_MODES": "ttt, slot,"}, [])["eval_modes"] == ("ttt", "slot")
    for text, value in {"1": True, "0": False, "true": True, "False": False}.items():
        assert t.parse_settings({"SWA_ENABLED": text}, [])["swa_enabled"] is value


BAD_VALUES = {  # what is expected: settings that are not
    "expected a whole number": "ITERATIONS=many ITERATIONS=1.5 ITERATIONS= N_INT6_LAYERS=two",
    "expected a finite number": "MATRIX_LR=nan MATRIX_LR=inf MATRIX_LR=",
    "expected 0 or 1": "SWA_ENABLED=2",
    "expected a comma list of whole numbers": "RECUR_LAYERS=4;5",
    "expected a comma list of numbers": "MUON_WD_TAPER=0.7;0.5",
    "allowed are record,published,frontier,demo": "PRESET=fast PRESET=demo,fast PRESET=",
    "allowed are quintic,polar": "MUON_COEFFICIENTS=cubic",
    "allowed are auto,rans,lzma,zlib,zstd": "COMPRESSOR=brotli",
    "must be at least": "SEED=-1 NUM_LAYERS=1 NUM_HEADS=0 NUM_KV_HEADS=0 TRAIN_SEQ_LEN=1 "
    "ITERATIONS=0 MATRIX_LR=-0.1 MUON_BACKEND_STEPS=0 LATE_QAT_THRESHOLD=-0.5 LOGIT_SOFTCAP=0.0 "
    "EVAL_STRIDE=0 VAL_BATCH_SIZE=0 SIZE_LIMIT=0 VAL_TOKENS_LIMIT=-5 RECUR_PASSES=0 "
    "ATTN_GATE_DIMS=-1",
    "and at most": "VOCAB_SIZE=65537 MUON_MOMENTUM=1.0 BETA2=1.0 MIN_LR=1.5 EMA_DECAY=1.0",
}  # fmt: skip


def test_a_bad_value_is_named_with_what_is_allowed():
    """Variable, value and what is allowed; a limit itself is allowed, the next value is not."""
    for message, cases in BAD_VALUES.items():
        for case in cases.split():
            problems = []
            assert t.parse_settings(dict([case.split("=")]), problems) == {}
            assert len(problems) == 1 and problems[0].startswith(f"{case}: "), case
            assert message in problems[0], case
    for f in fields(t.Config):
        for key, step in (("low", -1), ("high", 1)):
            limit, inside, outside = f.metadata[key], [], []
            if limit is not None:
                t.parse_settings({f.name.upper(): repr(limit)}, inside)
                t.parse_settings({f.name.upper(): repr(limit + step)}, outside)
                assert inside == [] and len(outside) == 1 and str(limit) in outside[0], f.name


CONTRADICTIONS = {  # change of the tiny settings: what is said of it
    "MODEL_DIM=33": "MODEL_DIM=33: not a multiple of NUM_HEADS=2",
    "NUM_KV_HEADS=3": "NUM_HEADS=2: not a multiple of NUM_KV_HEADS=3",
    "ROPE_DIMS=7": "even", "ROPE_DIMS=18": "head dimension 16",
    "TRAIN_BATCH_TOKENS=257": "multiple of TRAIN_SEQ_LEN=32",
    "MICRO_BATCH_TOKENS=5": "multiple of TRAIN_SEQ_LEN=32",
    "EVAL_STRIDE=33": "EVAL_SEQ_LEN=32",
    "PARALLEL_START_LAYER=1": r"2\.\.4", "PARALLEL_START_LAYER=5": r"2\.\.4",
    "RECUR_LAYERS=0,2": "consecutive", "RECUR_LAYERS=2,1": "consecutive",
    "RECUR_LAYERS=3,4": r"0\.\.3", "RECUR_LAYERS=2,3": "crosses PARALLEL_START_LAYER=3",
    "RECUR_START_STEP=2.5": "fraction below 1", "WARMDOWN_ITERS=2.5": "fraction below 1",
    "RECUR_PASSES=3 RECUR_LAYERS=": "RECUR_PASSES=3: .*no RECUR_LAYERS.* RECUR_PASSES=1",
    "ATTN_GATE_DIMS=33": "at most MODEL_DIM=32, or 0",
    "MUON_WD_TAPER=0.7,1.5": "START,END", "MUON_WD_TAPER=-0.1,0.5": "START,END",
    "MUON_WD_TAPER=0.7": "START,END", "MUON_WD_TAPER=0.7,nan": "START,END",
    "ATTENTION=flex": "flash_attention_3,cudnn,flash,mem_efficient,math can",
    "ATTENTION=flash DOC_ATTENTION=1": "flash_attention_3,flex,cudnn,mem_efficient,math can",
    "VE_LAYERS=1,4": r"0\.\.3", "VE_LAYERS=2,2": "once", "VE_LAYERS=": "VE_ENABLED=0",
    "BIGRAM_VOCAB_SIZE=1": "at least 2",
    "N_INT6_LAYERS=3": "even and at most 4", "N_INT6_LAYERS=6": "even and at most 4",
    "VAL_TOKENS_LIMIT=1": "at least 2", "RUN_ID=a/b": "file name",
    "ARTIFACT_PATH=": "name a file", "CHECKPOINT_PATH=": "name a folder",
    "RESUME=1": "needs the RUN_ID", "RESUME=1 RUN_ID=x LOAD_ARTIFACT=a": "go with LOAD_ARTIFACT",
    "DRY_RUN=1 LOAD_ARTIFACT=a": "go with LOAD_ARTIFACT",
    "EVAL_MODES=": "roundtrip,sliding", "EVAL_MODES=sliding,sliding": "once",
    "EVAL_MODES=roundtrip,swa": "roundtrip,sliding",
    "EVAL_MODES=slot SLOT_ENABLED=1": "besides slot", "EVAL_MODES=ngram": "enabled",
    "TTT_CHUNK_TOKENS=31": "EVAL_SEQ_LEN=32", "TTT_FREEZE_BLOCKS=4": "TTT_ENABLED=0",
    "CLASS_BITS=mlp=9": r"CLASS=2\.\.8", "CLASS_BITS=vector=4": "embed", "CLASS_BITS=mlp": "CLASS",
    "CLASS_BITS=mlp=22": "CLASS",
}  # fmt: skip
POSSIBLE = [
    "RECUR_LAYERS=", "RECUR_LAYERS=3", "PARALLEL_START_LAYER=4", "RECUR_START_STEP=0",
    "PARALLEL_START_LAYER=2 RECUR_LAYERS=", "N_INT6_LAYERS=4", "N_INT6_LAYERS=0",
    "RECUR_START_STEP=0.4", "VE_ENABLED=0 VE_LAYERS=", "BIGRAM_VOCAB_SIZE=0", "ROPE_DIMS=16",
    "CLASS_BITS=mlp=2,attn=8,repeat=4,embed=6", "EVAL_STRIDE=32", "XSA_LAST_N=9",
    "MICRO_BATCH_TOKENS=64", "TTT_CHUNK_TOKENS=32", "TTT_FREEZE_BLOCKS=4 TTT_ENABLED=0",
    "NUM_LAYERS=5 N_INT6_LAYERS=6", "RECUR_LAYERS= RECUR_PASSES=1", "RECUR_PASSES=16",
    "WARMDOWN_ITERS=0.85", "WARMDOWN_ITERS=0", "ATTN_GATE_DIMS=32", "MUON_WD_TAPER=0,1",
    "MUON_WD_TAPER=1,0", "DOC_ATTENTION=1 ATTENTION=flex",
]  # fmt: skip


def test_contradictions_are_named():
    """Each rule speaks for itself: one problem, with variable and reason; and refuses no more."""
    def variables(change):
        return h.environ() | dict(pair.split("=", 1) for pair in change.split())

    for change, message in CONTRADICTIONS.items():
        lines = h.problems(variables(change)).splitlines()
        assert len(lines) == 2 and re.search(message, lines[1]), (change, lines)
        assert change.split()[0] in lines[1], (change, lines)
    for change in POSSIBLE:
        t.Config.from_env(variables(change), cuda=True)


NEAR_MISSES = dict(
    TRAIN_SEQLEN="TRAIN_SEQ_LEN", MATRIXLR="MATRIX_LR", EVAL_STRIDES="EVAL_STRIDE",
    NUM_LAYER="NUM_LAYERS", WARM_DOWN_ITERS="WARMDOWN_ITERS",
    TRAIN_BATCH_TOKEN="TRAIN_BATCH_TOKENS")


def test_names_that_are_no_settings_are_answered():
    """Near misses name the setting that is meant; published spellings the one to use, which is."""
    for name, meant in NEAR_MISSES.items():
        assert f"{name}=7: no such setting; did you mean {meant}?" in h.problems({name: "7"})
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
    assert demo.preset == ("demo",) and demo.model_dim < 512
    assert {k: v for k, v in asdict(demo).items() if k in t.PRESETS["demo"]} == t.PRESETS["demo"]
    assert t.Config.from_env({}, cuda=True).preset == ("record",)
    assert t.Config.from_env({"DATA_PATH": "d"}, cuda=False) == t.Config(data_path="d")
    assert t.Config.from_env({"PRESET": "published"}, cuda=False).preset == ("published",)
    assert t.Config.from_env({"PRESET": "demo"}, cuda=True) == demo
    assert t.Config.from_env({"SEED": "5"}, cuda=False) == replace(demo, seed=5)


def test_the_demo_s_data_are_built_for_its_preset(tmp_path, monkeypatch):
    """Alone or among others, in the demo's folder only."""
    built = []
    monkeypatch.setattr(t, "build_demo", lambda c, _: built.append(c.preset) or {})
    folder = t.PRESETS["demo"]["data_path"]
    for names, path in ((("demo",), folder), (("frontier", "demo"), folder),
                        (("frontier",), folder), (("demo",), "elsewhere")):
        with h.inside(tmp_path), pytest.raises(t.RunError, match="no shards match"):
            t.run(h.config(preset=names, data_path=path))
    assert built == [("demo",), ("frontier", "demo")]


def test_explicit_values_win_over_the_preset():
    """Even where the explicit value is the default of the record run."""
    config = t.Config.from_env({"PRESET": "demo", "MODEL_DIM": "512", "ITERATIONS": "9"})
    assert (config.model_dim, config.iterations) == (512, 9)
    assert config.train_seq_len == t.PRESETS["demo"]["train_seq_len"]
    for preset in t.PRESETS:
        assert t.contradictions(t.Config(**t.PRESETS[preset])) == []


def test_presets_combine():
    """The levers of one and the sizes and schedules of the other; the later one wins, always."""
    both = t.Config.from_env({"PRESET": "frontier,demo"}, cuda=True)
    frontier, demo = t.PRESETS["frontier"], t.PRESETS["demo"]
    assert {"muon_momentum", "recur_start_step", "eval_seq_len"} <= {*frontier} & {*demo}
    for name, value in (frontier | demo).items():
        assert getattr(both, name) == value, name
    other = t.Config.from_env({"PRESET": "demo,frontier", "TTT_CHUNK_TOKENS": "4096"}, cuda=True)
    assert (other.muon_momentum, other.model_dim) == (0.97, 64)
    assert t.Config.from_env({"PRESET": "frontier,demo", "RECUR_PASSES": "2"}, True) == replace(
        both, recur_passes=2)
    for preset in t.PRESETS:
        assert t.contradictions(t.Config(**t.preset_values((preset, "demo")))) == [], preset


def test_the_frontier_is_frontier_md():
    """FRONTIER.md sections 2 and 3, value by value; what they do not name is the record's."""
    c = h.config(
        h.RECORD, preset=("frontier",), xsa_last_n=11, mlp_mult=4.0, muon_wd=0.095,
        muon_wd_taper=(0.7, 0.5), muon_row_norm=True, muon_coefficients="polar", qk_gain_init=5.25,
        matrix_lr=0.026, tied_embed_lr=0.03, scalar_lr=0.02, beta2=0.99, min_lr=0.1,
        ema_decay=0.9965, muon_momentum=0.97, warmdown_iters=0.85, recur_layers=(3, 4, 5),
        recur_passes=3, recur_untie_mlp=False, recur_start_step=0.35, parallel_start_layer=8,
        attn_gate_dims=12, skip_gate=True, doc_attention=True, asym_softcap=True,
        gptq_calibration_seqs=256, eval_seq_len=2560, ttt_kind="document", ttt_global_docs=2500)
    assert t.Config.from_env({"PRESET": "frontier"}, cuda=True) == c
    assert (c.ttt_doc_chunk, c.ttt_lora_rank, c.ttt_lora_alpha, c.ttt_lora_lr, t.LORA_BETA2) == (
        48, 80, 144, 1e-4, 0.99) and 0.5 <= c.ttt_lora_wd <= 2


def test_help_prints_the_table(capsys, monkeypatch):
    """--help shows every setting; any other argument shows it too and fails."""
    monkeypatch.setattr(t.signal, "signal", lambda *given: None)  # of pytest's process
    for arguments, code in ((["--help"], 0), (["-h"], 0), (["--iterations=5"], 1)):
        assert t.main(arguments) == code
        out = capsys.readouterr().out
        assert t.settings_table() in out and "torchrun" in out


@pytest.mark.parametrize("command", [
    "train_gpt.py", "retokenize_scylla.py", "retokenize_scylla.py --build-vocab 300",
    "records/make_record.py"])
def test_help_may_be_cut_short(command):
    """`--help | head -1` ends without a traceback."""
    command = [sys.executable, *command.split(), "--help"]
    with subprocess.Popen(command, cwd=h.ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.close()  # before the first line
        assert process.stderr.read() == b""


def test_settings_table_shows_defaults_demo_and_choices():
    """One row for each setting: name, values of four presets, meaning; as one would type it."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")]
            for row in t.settings_table().splitlines()[2:]]
    for row, f in zip(rows, fields(t.Config), strict=True):
        others = [t.show(t.PRESETS[preset][f.name]) if f.name in t.PRESETS[preset] else ""
                  for preset in ("published", "frontier", "demo")]
        assert row[:5] == [f.name.upper(), t.show(f.default), *others] and len(row) == 6 and row[5]
        assert all(choice in row[5] for choice in f.metadata["choices"])
    assert [t.show(value) for value in (7, (4, 5), (), 1e4, 1e-8, 0.1 + 0.2, True, None,
                                        (0.7, 1.0), ("frontier", "demo"))] == [
        "7", "4,5", "", "10000", "1e-08", "0.30000000000000004", "1", "auto", "0.7,1",
        "frontier,demo"]


def see_model(c, made):
    """Names, shapes and, with random weights, the logits of the model, recurrence on."""
    ids = torch.from_numpy(h.stream(64, 3)).view(2, 32)
    model = h.random_model(c)
    return [(n, tuple(p.shape)) for n, p in model.named_parameters()], h.digest(
        [("logits", model.logits(ids))])


def see_init(c, made):
    """Initial weights."""
    return h.digest(t.GPT(c, h.table().is_boundary, h.runtime()).named_parameters())


def trainer_on(c, data):
    """A Trainer on the tiny data that neither validates nor writes."""
    c = replace(c, data_path=str(data), checkpoint_path=str(data / "none"))
    trainer = h.build_trainer(c, h.runtime())
    trainer.save = trainer.validate = lambda: None
    return trainer


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
    model = h.random_model(h.config(**BASE))
    stored = t.quantize({n: p.detach() for n, p in model.named_parameters()}, c)
    streams = t.pack_streams(stored, c.compressor)
    return [(n, s.bits) for n, s in stored.items()], [(s.name, s.codec, s.data) for s in streams]


def see_inputs(c, made):
    """The byte table and the shards of the training split, or why there are none."""
    seen = []
    for find in (lambda: t.load_byte_table(replace(c, data_path=str(made[1]))),
                 lambda: t.find_shards(c, "train")):
        try:
            seen.append(str(find()))
        except t.RunError as error:
            seen.append(str(error))
    return seen


def see_batch(c, made):
    """Shape of an evaluation batch."""
    c = replace(c, data_path=str(made[1]))
    evaluator = t.Evaluator(h.runtime(), c, t.load_validation(c, t.load_byte_table(c)))
    return tuple(evaluator.score_batch(lambda x, y: y.float(), np.zeros(1, int)).shape)


def see_run(c, made):
    """A whole run: the files it makes, its lines without numbers, its scores, its error."""
    folder = Path(tempfile.mkdtemp(dir=made[0]))
    error = ""
    with h.inside(folder) as console:
        try:
            t.run(replace(c, data_path=str(made[1]),
                          load_artifact=c.load_artifact and str(made[2])))
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
        patch.setattr(t, "select_mlp", lambda *_: ("torch", "no CUDA"))
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
    return t.Config.from_env({"PRESET": t.show(c.preset)}, cuda=True).model_dim


BASE = h.SHALLOW | dict(  # what a run needs least of
    run_id="base", train_batch_tokens=64, val_tokens_limit=64, iterations=6, warmup_steps=1,
    gptq_calibration_seqs=4, compressor="zlib", eval_modes=("roundtrip",), ttt_enabled=False)
LOADED = dict(load_artifact="made.ptz", val_tokens_limit=300, ttt_chunk_tokens=128, ttt_lr=0.1,
              eval_modes=("sliding", "ttt", "ngram", "slot"))
TTT, NGRAM, SLOT = (LOADED | {f"{mode}_enabled": True} for mode in ("ttt", "ngram", "slot"))
DOCUMENTS = TTT | dict(eval_modes=("ttt",), ttt_kind="document", ttt_doc_chunk=9,
                   ttt_doc_batch=2, ttt_lora_lr=0.01, val_tokens_limit=150)
FLIPS = [  # (what is seen, settings that it needs, another value of each of these settings)
    (see_preset, {}, dict(preset=("demo",))),
    (see_inputs, {}, dict(
        data_path="elsewhere", vocab_size=h.VOCAB + 1, tokenizer_path="elsewhere.vocab",
        tokenizer_meta_path="elsewhere.meta.npz")),
    (see_model, h.TINY, dict(
        num_layers=5, model_dim=16, num_heads=4, num_kv_heads=2, mlp_mult=2.0,
        tie_embeddings=False, rope_base=100.0, rope_dims=4, logit_softcap=5.0, ln_scale=False,
        xsa_last_n=1, smear_enabled=False, bigram_vocab_size=0, bigram_dim=4, ve_enabled=False,
        ve_dim=4, ve_layers=(1, 3), activation_neg_slope=0.1, parallel_start_layer=4,
        recur_layers=(0, 1), recur_untie_mlp=False, recur_passes=3, attn_gate_dims=8,
        skip_gate=True, asym_softcap=True, doc_attention=True)),
    (see_init, {}, dict(qk_gain_init=1.0, tied_embed_init_std=0.02)),
    (see_train, {}, dict(
        seed=1, data_seed=2, recur_start_step=5.0, train_batch_tokens=128, micro_batch_tokens=32,
        train_seq_len=16, iterations=5, warmdown_iters=10, warmup_steps=9,
        max_wallclock_seconds=0.26, matrix_lr=0.01, scalar_lr=0.01, tied_embed_lr=0.01, min_lr=0.3,
        muon_momentum=0.9, muon_momentum_warmup_start=0.5, muon_momentum_warmup_steps=2,
        muon_backend_steps=3, muon_coefficients="polar", muon_wd=0.5, muon_wd_taper=(0.5, 0.0),
        muon_row_norm=True, adam_wd=0.5, beta1=0.8, beta2=0.8,
        adam_eps=1e-4, grad_clip_norm=0.01, ema_decay=0.0, swa_enabled=True,
        late_qat_threshold=0.0)),
    (see_train, dict(tie_embeddings=False), dict(embed_lr=0.01, head_lr=0.02)),
    (see_train, dict(swa_enabled=True), dict(swa_every=2)),
    (see_hessians, {}, dict(gptq_calibration_seqs=3)),
    (see_stored, {}, dict(n_int6_layers=0, class_bits="attn=4", compressor="lzma")),
    (see_batch, {}, dict(val_batch_size=128)),
    (see_run, {}, dict(
        run_id="another", dry_run=True, quant="rtn", size_limit=1000, artifact_path="another.ptz",
        load_artifact="made.ptz", val_loss_every=4, scores_path="scores",
        checkpoint_every=1e-6, checkpoint_path="another", resume=True)),
    (see_run, dict(checkpoint_every=1e-6, iterations=3), dict(checkpoint_keep=1)),
    (see_run, dict(iterations=11), dict(train_log_every=100)),  # the first ten are always logged
    (see_run, LOADED, dict(
        eval_seq_len=16, eval_stride=16, eval_modes=("roundtrip",), val_tokens_limit=200,
        ttt_enabled=True, ngram_enabled=True, slot_enabled=True)),
    (see_run, TTT, dict(ttt_lr=0.2, ttt_epochs=1, ttt_chunk_tokens=64, ttt_freeze_blocks=0,
                        ttt_momentum=0.5, ttt_batch_seqs=2, ttt_grad_clip=0.01)),
    (see_run, DOCUMENTS, dict(
        ttt_kind="chunk", ttt_doc_chunk=7, ttt_doc_batch=1, ttt_global_docs=3, ttt_lora_rank=4,
        ttt_lora_alpha=50.0, ttt_lora_lr=0.05, ttt_lora_wd=9.0)),
    (see_run, NGRAM, dict(ngram_order=2, ngram_weight=0.3)),
    (see_run, SLOT, dict(slot_steps=2, slot_lr=0.05)),
    (see_choices, {}, dict(attention="cudnn", mlp_kernel="torch")),
    (see_compile, {}, dict(torch_compile_disable=True)),
]  # fmt: skip


def test_every_setting_has_a_row():
    """A new setting without a way to see it fails here."""
    assert sorted(name for row in FLIPS for name in row[2]) == sorted(
        f.name for f in fields(t.Config))


def test_an_artifact_names_what_makes_its_model():
    """All settings that change shapes or logits, and no other, are in its header."""
    changed = {name for see, _, others in FLIPS if see is see_model for name in others}
    assert sorted(t.MODEL_FIELDS) == sorted(changed)


@pytest.mark.parametrize("see, needs, others", FLIPS, ids=lambda v: getattr(v, "__name__", ""))
def test_every_setting_does_something(see, needs, others, made):
    """Another value of one setting changes what is seen, and no change changes nothing."""
    base = BASE | needs
    before = see(h.config(**base), made)
    assert see(h.config(**base), made) == before, "not repeatable, so the rest proves nothing"
    assert [name for name, value in others.items()
            if see(h.config(**(base | {name: value})), made) == before] == []


def test_user_mistakes_end_with_a_message(tmp_path, capsys):
    """Exit code 1 and one message on stderr, no traceback, whatever was wrong."""
    data = h.dataset(tmp_path / "data")
    (data / "manifest.json").unlink()
    for changes, message in (
            (dict(num_kv_heads=3), "NUM_KV_HEADS=3"), (dict(data_path="none"), "no shards match"),
            (dict(load_artifact="none.ptz"), "none.ptz: No such file"),
            (dict(tokenizer_path="no.vocab", tokenizer_meta_path=str(data / "tiny.meta.npz")),
             "no.vocab")):
        code, _ = h.run_main(tmp_path, **(dict(data_path=str(data), iterations=1) | changes))
        error = capsys.readouterr().err
        assert code == 1 and error.startswith("error: ") and message in error, changes


def test_what_changes_no_weight_may_change(made, tmp_path):
    """Logging, evaluation and paths, of the data too, are free in a resumed run; the rest binds."""
    bound = []
    for folder in (made[1], shutil.copytree(made[1], tmp_path / "moved")):
        trainer = trainer_on(h.config(**(BASE | dict(iterations=1))), folder)
        trainer.run()
        bound.append(trainer.checkpoints.bound)
    assert bound[0] == bound[1]
    trained = {name for see, _, others in FLIPS for name in others
               if see in (see_model, see_init, see_train, see_hessians, see_stored, see_choices,
                          see_compile)}
    assert set(bound[0]) == {name.upper() for name in trained - {"compressor"}} | {
        "VOCAB_SIZE", "QUANT", "CHECKPOINT_FORMAT", "WORLD_SIZE", "DTYPE", "DATA"}


def test_resume_is_implied_by_torchruns_restarts():
    """Where RUN_ID says which run, and no artifact is to be loaded."""
    again = {"TORCHELASTIC_RESTART_COUNT": "1"}
    assert t.Config.from_env(again | {"RUN_ID": "x"}, True).resume
    assert not t.Config.from_env(again, True).resume
    assert not t.Config.from_env(again | {"RUN_ID": "x", "LOAD_ARTIFACT": "a"}, True).resume
    assert not t.Config.from_env({"TORCHELASTIC_RESTART_COUNT": "0", "RUN_ID": "x"}, True).resume
