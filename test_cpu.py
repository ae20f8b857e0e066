"""The pre-flight: what a record run depends on, each guarantee by its sharpest test.

    python -m pytest test_cpu.py      under two minutes on two idle cores, no GPU needed

Everything else is tested in tests/ and records/tests/; what all share is in tests/harness.py.

settings
  every mistake in the environment is reported at once, before anything runs
      -> all_problems_are_reported_at_once

data
  a shard that is cut, or has a wrong header, stops the run
      -> truncated_shards_are_refused_at_every_length
  so does an id that the vocabulary does not have -> ids_out_of_range_name_the_file
  any number of ranks trains on the same global batch -> every_rank_count_sees_the_same_global_batch
  which depends on seed and step only -> batches_depend_on_seed_and_step_only
  an epoch reads every block of every shard once, shuffled
      -> an_epoch_is_a_permutation_of_blocks_of_all_shards

bytes
  the segmenter gives the ids of the published page, with capitals as marks too
      -> segmenter_agrees_with_the_page_on_random_vocabularies
  and those that the original tokenizer gave -> vectors_id_for_id
  bytes are counted exactly, or the log says that they are not -> byte_audit_states
  one byte too many or too few stops the run -> byte_audit_stops_the_run
  shards of our re-tokenizer are exact to the trainer -> trainer_calls_these_shards_exact

model
  logits and losses are those of the formulas -> forward_equals_reference
  attention is causal softmax attention -> sdpa_equals_softmax
  no token changes what is predicted before it -> causality_every_position
  SmearGate and the bigram hash stop at documents -> document_boundaries
  every parameter learns -> every_parameter_gets_a_gradient
  each phase compiles to one graph, with the same result -> compiles_to_one_graph_for_each_phase

optimization
  Muon is its formula -> muon_equals_formula
  and on several ranks the same as on one -> muon_of_several_ranks_is_muon_of_one
  each parameter has one optimizer, rate and decay -> each_parameter_in_one_group
  the EMA that is exported is its closed form -> ema_closed_form
  SWA exports the mean of its snapshots -> swa_mean_of_snapshots

training
  every step has its rates, phase and average, and the last one ends before the cap
      -> every_step_follows_its_schedules
  recurrence begins from copies of weights, momentum and averages -> recurrence_switch
  warm-up changes no weight -> warm_up_changes_nothing
  the gradient of all ranks is clipped by its own norm, if at all -> clipping_on_the_global_gradient
  micro-batches change nothing -> accumulation_equals_larger_micro_batch

quantization
  late QAT computes with the grid that is stored -> qat_grid_is_the_stored_grid
  in the whole model -> qat_forward_is_the_quantized_model
  each tensor has the bits of its row in the table -> the_table_decides_bits
  GPTQ is its definition -> gptq_is_its_definition
  on the inputs that the matrices see -> hessians_are_those_of_the_inputs
  the fit lands just under every SIZE_LIMIT -> the_fit_lands_under_every_limit
  rANS gives every stream back -> rans_is_exact

artifact
  every tensor comes back from the file bit for bit -> container_round_trip
  a flipped byte is noticed -> a_flipped_byte_is_damage
  a file appears under its name when it is whole -> writing_is_renamed_when_whole
  an artifact is scored with its own vocabulary only -> artifacts_of_another_vocabulary_are_refused
  a run that never came to recurrence stores no repeats
      -> a_run_that_ends_before_recurrence_stores_no_repeats
  too many bytes are an error, and the weights are kept -> over_the_size_limit

evaluation
  each target is scored once, with the longest context
      -> every_target_is_scored_once_with_the_longest_context
  its score is stored at its place -> scores_belong_to_their_tokens
  batches and ranks change no score -> scores_do_not_depend_on_batches_or_ranks
  every mode keeps the four conditions of a legal score -> every_mode_is_legal
  TTT without a learning rate is sliding evaluation -> ttt_without_learning_rate_is_sliding
  a window is scored with the chunk of its first target
      -> a_window_belongs_to_the_chunk_of_its_first_target
  what TTT freezes does not move -> frozen_is_frozen
  the n-gram cache is Witten-Bell -> ngram_is_witten_bell
  the settings fix the headline before anything is scored -> the_headline_follows_from_the_settings
  anybody can recompute a score from the dump -> dumped_scores_recompute_the_result
  and from the artifact's bytes alone -> independent_scorer

whole runs and faults
  the log's lines are those that the field's tools read -> log_lines_are_the_public_patterns
  a run repeats bit for bit -> runs_are_deterministic
  two ranks train as one -> two_ranks_are_one
  a signal writes a checkpoint, and RESUME=1 goes on from it, bit for bit
      -> a_signal_checkpoints_and_resume_goes_on
  a damaged checkpoint is passed over -> the_one_before_a_damaged_checkpoint
  a loss that is not finite ends the run before it is saved -> non_finite_keeps_the_last_checkpoint
  a full disk ends no run and leaves no torn file -> a_full_disk_leaves_nothing_that_looks_whole

the ten published checks, at full width
  the script imports torch and numpy only, without side effects -> preflight_01_imports
  the defaults are the record run -> preflight_02_hyperparameters
  the model has its 30,293,357 parameters -> preflight_03_model_creation
  the loss begins at log V and falls -> preflight_04_forward_and_backward
  the bytes of the code are counted from its file -> preflight_05_code_size
  every byte of the artifact is accounted for -> preflight_06_artifact_size
  a step's operations, and the time that they imply -> preflight_07_step_time_projection
  quantization errs as its bits imply -> preflight_08_quantization_error
  operations grow as they should -> preflight_09_scaling
  weights are spread as they should be, before and after two steps
      -> preflight_10_weight_distribution
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cost_model
import harness as h
import references as ref
import retokenize_scylla as R
import train_gpt as t
from records.vocabulary import FIRST, vocabulary_yaml

# ----------------------------------------------------------------------------------------- settings


def test_all_problems_are_reported_at_once():
    """One RunError for values, ranges, contradictions, near misses and unknown names."""
    text = h.problems(dict(ITERATIONS="x", SEED="-1", NUM_KV_HEADS="3", TRAIN_SEQLEN="9",
                           EMA_ENABLED="1", PRESET="fast", RESUME="1"), cuda=False)
    for name in ("ITERATIONS", "SEED", "NUM_KV_HEADS", "TRAIN_SEQLEN", "EMA_ENABLED", "PRESET",
                 "RESUME"):
        assert sum(line.strip().startswith(f"{name}=") or f" {name}=" in line
                   for line in text.splitlines()) >= 1, name
    assert len(text.splitlines()) == 8

# --------------------------------------------------------------------------------------------- data


def test_truncated_shards_are_refused_at_every_length(tmp_path):
    """Cut anywhere, header included; and the whole one reads back."""
    whole = h.write_shard(tmp_path / "shard.bin", range(100))
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


def test_ids_out_of_range_name_the_file(tmp_path):
    """In training as in validation; the largest id that is allowed passes."""
    data = h.dataset(tmp_path)
    config = h.config(data_path=str(data))
    table, runtime = t.load_byte_table(config), h.runtime()
    for split, n in (("val", 1), ("train", 0)):
        path = data / f"fineweb_{split}_{n:06d}.bin"
        good = path.read_bytes()
        h.write_shard(path, np.full(2000, h.VOCAB))
        with pytest.raises(t.RunError, match=rf"{path.name}: id 300 is not under VOCAB_SIZE=300"):
            if split == "val":
                t.load_validation(config, table)
            for step in range(40):
                t.Loader(t.find_shards(config, "train"), config, runtime, h.VOCAB).batch(step)
        h.replace_file(path, good)


def test_every_rank_count_sees_the_same_global_batch(tmp_path):
    """Ranks in order make up the batch of one rank, for 1, 2, 4 and 8 ranks."""
    whole = h.loader(tmp_path)
    for step in (0, 1, 7, 50):
        x, y = whole.batch(step)
        assert x.shape == y.shape == (8, 32) and x.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
        for world in (2, 4, 8):
            parts = [h.loader(tmp_path, rank, world).batch(step) for rank in range(world)]
            assert torch.equal(torch.cat([p[0] for p in parts]), x)
            assert torch.equal(torch.cat([p[1] for p in parts]), y)


def test_batches_depend_on_seed_and_step_only(tmp_path):
    """Whatever was read before, prefetched or not; other seeds and steps read other batches."""
    walked = h.loader(tmp_path)
    batches = [walked.batch(step) for step in range(20)]  # from the second on, prefetched
    for step in (0, 5, 19, 3):
        fresh = h.loader(tmp_path)
        assert torch.equal(fresh.batch(step)[0], batches[step][0])
        assert torch.equal(fresh.read(step)[:, 1:], batches[step][1])
        assert torch.equal(walked.batch(step)[0], batches[step][0])  # back in time
        assert not torch.equal(h.loader(tmp_path, seed=2).batch(step)[0], batches[step][0])
        ordered = h.loader(tmp_path, data_seed=2).batch(step)[0]
        assert torch.equal(ordered, h.loader(tmp_path, seed=2).batch(step)[0])
    assert len({b[0].numpy().tobytes() for b in batches}) == 20


def test_an_epoch_is_a_permutation_of_blocks_of_all_shards(tmp_path):
    """No token twice as an input, most tokens once, every shard, random order and phase."""
    loader = h.loader(tmp_path)
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

# -------------------------------------------------------------------------------------------- bytes


def check_random_vocabulary(rng: random.Random, case: str) -> None:
    """One vocabulary and thirty documents: the page's ids, lossless, whatever stands beside.

    With case the page's ids are those of the text whose capitals are marks.
    """
    atoms = rng.sample(ref.ATOMS, 6) + [b" ", b"a", bytes([rng.randrange(256)])]
    tokens = [ref.drawn(rng, atoms, 7) for _ in range(rng.randrange(13))] + [b" a", b" aa", b"."]
    tokens += [token[:rng.randint(1, len(token))] for token in tokens for _ in range(4)]
    entries = [*FIRST[case], *tokens]
    documents = [ref.drawn(rng, tokens + atoms, 12) for _ in range(30)] + [rng.randbytes(30), b""]
    if case == "ascii":
        entries += [b"\xffz", b"\xfe a", b" \xff", b"a\xff", b"a\xffb"]
        documents = [text.translate(None, R.MARKS) for text in documents]
    segmenter = R.Segmenter(R.load_vocabulary(vocabulary_yaml(entries, case), "random.yaml"))
    slow, block = ref.Segmenter(entries), segmenter.encode_documents(R.Documents.joined(documents))
    for ids, document in zip(block.ids.split(), documents, strict=True):
        form = ref.marked(document) if case == "ascii" else document
        assert ids.tolist() == [segmenter.bos_id, *slow.encode(form)]
        assert b"".join(entries[identity] for identity in ids[1:]) == form
        assert segmenter.base_bytes[ids].sum() == len(document)
        assert segmenter.encode(document) == ids[1:].tolist()


@pytest.mark.parametrize("case", ["none", "ascii"])
@pytest.mark.parametrize("seed", range(8))
def test_segmenter_agrees_with_the_page_on_random_vocabularies(seed, case):
    rng = random.Random(seed)
    for _ in range(20 if case == "none" else 8):
        check_random_vocabulary(rng, case)


@pytest.mark.parametrize(("vocabulary", "vectors"), [
    (h.ROOT / "tests" / "vectors" / "ours.yaml", h.ROOT / "tests" / "vectors" / "ours.jsonl"),
    *(pytest.param(h.SHARED / "data" / "scylla.yaml", h.SHARED / "vectors" / name,
                   marks=h.needs_shared)
      for name in ("scylla1254.jsonl", "scylla1254_spdec.jsonl"))], ids=lambda path: path.name)
def test_vectors_id_for_id(vocabulary, vectors, tmp_path):
    """A text's ids are the stored ones, and the trainer's table counts its bytes exactly.

    A lone byte is one byte: the published table counted three, and BPB came out 5 % too good.
    """
    segmenter = R.Segmenter(R.load_vocabulary(vocabulary))
    R.OutputFolder(tmp_path).publish(segmenter)
    table = t.load_byte_table(h.config(data_path=str(tmp_path)))
    for line in vectors.read_text().splitlines():
        vector = json.loads(line)
        text, stream = base64.b64decode(vector["text_b64"]), [segmenter.bos_id, *vector["ids"]]
        assert segmenter.encode(text) == vector["ids"], vector["name"]
        assert table.count(stream[:-1], stream[1:]).sum() == len(text), vector["name"]


def test_byte_audit_states(tmp_path):
    """exact, partial, unverified (no manifest, or a lossy tokenizer), and the bytes."""
    data = h.dataset(tmp_path / "d")
    ids = [np.fromfile(p, "<u2")[512:] for p in sorted(data.glob("fineweb_val_*"))]
    exact = h.audit(data)
    assert exact.audit == "exact" and exact.vocab_sha256 == "5" * 64
    assert exact.ids.tolist() == np.concatenate(ids).tolist() and len(exact.bytes) == 699
    want = sum(h.source_bytes(part, h.table()) for part in ids)
    assert int(exact.bytes.sum()) == want
    partial = h.audit(data, val_tokens_limit=450)
    assert partial.audit == "partial" and len(partial.ids) == 450
    assert partial.bytes.tolist() == exact.bytes[:449].tolist()
    for limit in (700, 10000):
        assert h.audit(data, val_tokens_limit=limit).audit == "exact"
    h.edit_manifest(data, lambda m: m["shards"].pop("fineweb_val_000001.bin"))
    with pytest.raises(t.RunError, match="manifest.json.*fineweb_val_000001.bin"):
        h.audit(data)
    lossy = h.dataset(tmp_path / "lossy", byte_exact=False)
    assert h.audit(lossy).audit == "unverified"
    assert h.audit(lossy, val_tokens_limit=450).audit == "unverified"
    (lossy / "manifest.json").unlink()
    without = h.audit(lossy)
    assert without.audit == "unverified"
    assert without.vocab_sha256 == t.sha256_file(lossy / "tiny.meta.npz")


@pytest.mark.parametrize("off", [1, -1, 1000])
def test_byte_audit_stops_the_run(off, tmp_path):
    """One byte more or less is an error that names both counts."""
    data = h.dataset(tmp_path)
    entry = "fineweb_val_000000.bin"
    h.edit_manifest(data, lambda m: m["shards"][entry].update(
        source_bytes=m["shards"][entry]["source_bytes"] + off))
    for limit in (0, 100):
        with pytest.raises(t.RunError, match=r"byte audit failed: .* manifest\.json \d+ "):
            h.audit(data, val_tokens_limit=limit)


@pytest.mark.parametrize("engine", ["vocab", "sp-model"])
def test_trainer_calls_these_shards_exact(engine, tmp_path):
    """Shards, byte table and manifest satisfy the audit; a manifest one byte off does not."""
    texts, out = h.texts(30), tmp_path / "out"
    documents = tmp_path / "documents.jsonl"
    h.write_documents(documents, texts)
    source = tmp_path / ("v.yaml" if engine == "vocab" else "v.model")
    source.write_bytes(h.sentencepiece_model() if engine == "sp-model" else vocabulary_yaml(
        [bytes([k]) for k in range(256)] + h.TOKENS))
    assert R.main(["--docs", str(documents), f"--{engine}", str(source), "--split", "val",
                   "--output-dir", str(out), "--workers", "1"]) == 0
    config = h.config(data_path=str(out))
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

# -------------------------------------------------------------------------------------------- model


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
    h.LEVERS,
    h.LEVERS | dict(recur_untie_mlp=True, parallel_start_layer=3, recur_layers=(4, 5), num_layers=7,
                    tie_embeddings=False, attn_gate_dims=32),
], ids=["tiny", "record_depth", "untied_recur_in_lanes", "shared_repeats", "plain", "levers",
        "untied_levers_in_lanes"])  # fmt: skip
@pytest.mark.parametrize("recur", [False, True])
def test_forward_equals_reference(settings, recur):
    """Logits equal an independent NumPy reading of SPEC section 3, everything randomised."""
    model = h.random_model(h.config(h.DEEP, **settings), recur)
    ids = h.ids()
    with torch.no_grad():
        logits = model.logits(ids).numpy()
        nats = model(ids[:, :-1], ids[:, 1:]).numpy()
    trained = model(ids[:, :-1], ids[:, 1:]).detach().numpy()  # with gradients, as in training
    assert np.abs(trained - nats).max() < 1e-5
    expected = ref.logits(model, ids, recur)
    assert logits.std() > 0.5 and np.abs(logits - expected).max() < 1e-4
    z = expected[:, :-1]
    lse = np.log(np.exp(z).sum(-1))
    own = np.take_along_axis(z, ids[:, 1:, None].numpy(), -1)[..., 0]
    assert np.abs(nats - (lse - own)).max() < 1e-4
    assert nats.dtype == logits.dtype == np.float32


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_sdpa_equals_softmax(groups):
    """sdpa is causal grouped-query attention in our layout."""
    q, k, v = h.matrices((2, 9, 4, 8), (2, 9, groups, 8), (2, 9, groups, 8))
    torch.testing.assert_close(t.sdpa(q, k, v), ref.softmax_attention(q, k, v), atol=1e-5, rtol=0)


@pytest.mark.parametrize("levers", [{}, h.LEVERS], ids=["off", "levers"])
def test_causality_every_position(levers):
    """Changing token t changes no earlier logit, bit for bit, and does change later ones."""
    model = h.random_model(h.config(h.DEEP, num_layers=7, parallel_start_layer=4, **levers))
    ids = h.ids((1, 14), bos=() if levers else ((0, 5),))
    with torch.no_grad():
        before = model.logits(ids)
        for place in range(14):
            for new in (0, int(ids[0, place]) % (h.VOCAB - 1) + 1):
                if new == ids[0, place]:
                    continue
                changed = ids.clone()
                changed[0, place] = new
                after = model.logits(changed)
                assert torch.equal(after[:, :place], before[:, :place]), place
                assert not after[:, place:].eq(before[:, place:]).all(-1).any(), place


def test_document_boundaries():
    """Nothing before a boundary reaches it or what follows through SmearGate and bigram.

    With DOC_ATTENTION nothing does through anything, in every layer and pass.
    """
    model = h.random_model(h.config(h.DEEP))
    isolated = h.random_model(h.config(h.DEEP, **h.LEVERS))
    ids = h.ids((1, 12), bos=((0, 6),))
    changed = ids.clone()
    changed[0, :6] = (ids[0, :6] + 1) % h.BOS
    with torch.no_grad():
        for see in (lambda ids: model.embed_tokens(ids, model.starts(ids)), isolated.logits):
            a, b = see(ids), see(changed)
            assert torch.equal(a[:, 6:], b[:, 6:]) and not a[:, :6].eq(b[:, :6]).all(-1).any()
        assert not model.logits(ids)[:, 6:].eq(model.logits(changed)[:, 6:]).all(-1).any()
        no_bos = torch.where(ids == h.BOS, 7, ids)
        last = no_bos.clone()
        last[0, 5] = (no_bos[0, 5] + 1) % h.BOS
        a, b = (model.embed_tokens(x, model.starts(x)) for x in (no_bos, last))
    moved = (~a.eq(b).all(-1))[0].nonzero().flatten().tolist()
    assert moved == [5, 6, 7]  # else the bigram of 6 feels it, and SmearGate's next, 7


def test_every_parameter_gets_a_gradient():
    """From the real initial values, every parameter has a gradient after at most two updates.

    lane_merge needs a third: until routes differ, both lanes hold the same. Softcaps are TTT's.
    """
    for settings in (dict(), dict(parallel_start_layer=3, recur_layers=(3, 4)), h.LEVERS):
        c = h.config(h.DEEP, grad_clip_norm=0.0, **settings)
        model = h.random_model(c, seed=None)
        with torch.no_grad():
            for base, repeat in model.repeats():
                repeat.copy_(base)
        optimizer = t.Optimizer(model, c, h.runtime())
        updates: dict[str, int] = {}  # before the first gradient
        ids = h.ids((4, 17), bos=((0, 3), (2, 9)))
        for done in range(4):
            model.zero_grad()
            model(ids[:, :-1], ids[:, 1:]).mean().backward()
            for n, p in model.named_parameters():
                if p.grad is not None and p.grad.abs().max() > 0:
                    updates.setdefault(n, done)
            optimizer.step(torch.zeros(1), 1.0, 0.9)
        late = {n: updates.get(n) for n, _ in model.named_parameters() if updates.get(n, 9) > 2}
        assert late == dict(lane_merge=3) | ({"softcap": None} if c.asym_softcap else {})


def test_compiles_to_one_graph_for_each_phase():
    """fullgraph, no recompilation on the second pass, and the result of the eager model."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    eager, compiled = h.compile_phases(counter)
    assert counter.frame_count == len(h.PHASES)
    assert not torch._dynamo.utils.counters["graph_break"]
    for (a, ga), (b, gb) in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        torch.testing.assert_close(ga, gb, atol=1e-6, rtol=0)
    assert len({float(a) for a, _ in eager}) == 4  # the phases are different functions

# ------------------------------------------------------------------------------------- optimization


QUINTIC = (3.4445, -4.7750, 2.0315)  # SPEC section 4


@pytest.mark.parametrize("row_norm", [False, True])
@pytest.mark.parametrize("coefficients, triples", [
    ("quintic", [QUINTIC] * 5), ("quintic", [QUINTIC] * 3),
    ("polar", t.COEFFICIENTS["polar"]),  # a test in tests/test_training.py computes these
    ("polar", [*t.COEFFICIENTS["polar"], t.COEFFICIENTS["polar"][-1]])])
def test_muon_equals_formula(row_norm, coefficients, triples):
    """Square, tall, wide, and two of a shape in a stack, over four steps."""
    c = h.config(h.DEEP, matrix_lr=0.05, muon_wd=0.1, muon_row_norm=row_norm,
                 muon_backend_steps=len(triples), muon_coefficients=coefficients)
    start, grads, ours = h.run_muon(c, torch.float32, 0.5, 0.9, 4)
    histories = [[step[i].double().numpy() for step in grads] for i in range(len(h.SHAPES))]
    theirs = ref.muon([w.numpy() for w in start], histories, 0.025, 0.9, 0.1, triples, row_norm)
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a.numpy() - b).max() < 2e-5


def muons_step(params, muons, grads):
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


def test_muon_of_several_ranks_is_muon_of_one():
    """Means over ranks, momentum on its owner only, one reduction and one gather a step."""
    c = h.config(h.DEEP, muon_wd=0.1, muon_row_norm=True)
    calls, steps = [], [h.matrices(*h.SHAPES, seed=10 + step) for step in range(3)]
    (alone, one), (several, three) = h.muons_of(c, 1, []), h.muons_of(c, 3, calls)
    for grads in steps:
        expected = sum(float(g.square().sum()) for g in grads)
        assert muons_step(alone, one, grads) == pytest.approx(expected, rel=1e-4)
        assert muons_step(several, three, grads) == pytest.approx(9 * expected, rel=1e-4)
    assert calls == (["reduce"] * 3 + ["gather"] * 3) * 3
    for params in several:
        for ours, theirs, first in zip(params, alone[0], several[0], strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
            assert torch.equal(ours, first)  # every rank has the same bits
    assert sum(int(muon.momentum.count_nonzero()) for muon in three) == sum(
        math.prod(shape) for shape in h.SHAPES)  # on the owner and nowhere else


@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_in_one_group(tied):
    """Roles, learning rates and decay by name, as SPEC section 4 says."""
    c = h.config(h.DEEP, tie_embeddings=tied, matrix_lr=0.011, scalar_lr=0.012, tied_embed_lr=0.013,
                 embed_lr=0.014, head_lr=0.015, adam_wd=0.07)
    model = h.random_model(c)
    optimizer = t.Optimizer(model, c, h.runtime())
    found: dict[torch.nn.Parameter, list] = {}
    for stack in optimizer.muon.stacks:
        for p in stack.params:
            found.setdefault(p, []).append(("muon", None))
    for group in optimizer.adam.param_groups:
        for p in group["params"]:
            found.setdefault(p, []).append((group["peak"], group["weight_decay"]))
    assert set(h.momentum(optimizer.muon)) == {p for p, g in found.items() if g[0][0] == "muon"}
    for name, p in model.named_parameters():
        matrix = p.dim() == 2 and (".attn." in name or "mlp" in name) and name.endswith("weight")
        table = name in ("embed.weight", "bigram.table.weight", "value.table.weight")
        expected = ("muon", None) if matrix else (0.012, 0.0)
        expected = (0.013 if tied else 0.014, 0.07) if table else expected
        expected = (0.015, 0.07) if name == "head.weight" else expected
        expected = (0.012, 0.07) if name.endswith("proj.weight") else expected
        assert found.pop(p) == [expected], name
    assert not found


def averaged(c: t.Config, steps: int, scale: float) -> tuple[t.Average, list[np.ndarray]]:
    """An Average fed with known weights, and the history of one of them."""
    model = h.random_model(c)
    average, history = t.Average(model, c), []
    watched = model.blocks[0].attn.q.weight
    history.append(watched.detach().double().numpy().copy())
    for step in range(steps):
        h.randomize(model, 100 + step)
        average.update(step, scale)
        history.append(watched.detach().double().numpy().copy())
    average.watched = watched
    return average, history


def test_ema_closed_form():
    """The exported EMA with decay min(EMA_DECAY, (1 + t) / (10 + t)) from the initial weights."""
    average, history = averaged(h.config(h.DEEP, ema_decay=0.4), 12, 1.0)
    expected = history[0]
    for step, weights in enumerate(history[1:]):
        decay = min(0.4, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights
    assert average.store() == "ema"
    assert np.abs(average.watched.detach().numpy() - expected).max() < 1e-6
    assert np.abs(history[-1] - expected).max() > 1e-2
    average, history = averaged(h.config(h.DEEP, ema_decay=0.0), 3, 1.0)
    assert average.store() == "last"
    assert np.array_equal(average.watched.detach().double().numpy(), history[-1])


def test_swa_mean_of_snapshots():
    """SWA exports the mean of every SWA_EVERY-th weights under scale 0.2; if none, the EMA."""
    c = h.config(h.DEEP, swa_enabled=True, swa_every=3)
    average, history = averaged(c, 10, 0.19)
    assert average.store() == "swa"
    expected = np.mean([history[3], history[6], history[9]], axis=0)
    assert np.abs(average.watched.detach().numpy() - expected).max() < 1e-6
    average, _ = averaged(c, 10, 0.2)
    ema = average.ema[0].clone()
    assert average.store() == "ema" and torch.equal(average.params[0], ema)

# ----------------------------------------------------------------------------------------- training


def planned(c: t.Config, lag: int, ms: list[int], save: int, reserve: float) -> list[tuple]:
    """What a run does whose steps take `ms`, with a checkpoint before step `save` and at the end.

    Step s is planned by what had ended as step s - lag was launched, after a wait for s - 2 lag.
    """
    cap, peak, first = 1e3 * c.max_wallclock_seconds, c.muon_momentum, c.muon_momentum_warmup_start
    usable = cap - t.CLOCK_RESERVE_MS - reserve
    told, trace, done, recur, qat = [(0, 0, False)] * lag, [], 0, False, False
    for step in range(len(ms)):
        pauses = ["save"] * (step == save) + ["validate"] * (step % c.val_loss_every == 0 < step)
        trace += [(name, step) for name in pauses]
        now, usual, late = told[step]
        if late:
            break
        done = step if pauses else max(done, step + 1 - lag)
        ended, recent = sum(ms[:done]), ms[:done][-20:]
        ends = ended + (step + lag + 1 - done) * max(recent, default=0)  # of step + lag
        told.append((ended, np.median(recent) if done > 2 else 0, ends > usable))
        now += lag * usual
        left = (usable - now) / usual if usual else c.iterations - step
        scale = c.min_lr + (1 - c.min_lr) * min(1, left / c.warmdown_iters)
        over, (begin, end) = 1 - (usable - now) / (cap - t.CLOCK_RESERVE_MS), c.muon_wd_taper
        taper = 1 - (1 - end) * min(1, max(0, over - begin) / (1 - begin))
        recur, qat = recur or over >= c.recur_start_step, qat or scale < c.late_qat_threshold
        momentum = first + (peak - first) * min(1, step / c.muon_momentum_warmup_steps)
        trace += [("forward", recur, qat), ("momentum", momentum), ("adam", scale * c.scalar_lr),
                  ("muon", scale * c.matrix_lr, taper), ("average", step, scale)]
    return trace + [("save", step)] * (step != save) + [("validate", step)]


@pytest.mark.parametrize("lag, stop", [(1, 44), (2, 33)])
def test_every_step_follows_its_schedules(lag, stop, make_trainer, monkeypatch):
    """Rates, decay, phase, average, pauses and stop of each step, on a fake device that lags.

    The scale rises within late QAT, as steps get faster. With lag 2 the checkpoint takes in two
    steps at once: the first is late for the slow step, which the second no longer looks back to.
    """
    ms = [80 + step % 7 if step >= 12 else 140 + 10 * (step % 3) for step in range(60)]
    ms[10], save, calibrations = 300, 33, [900, 400, 450]  # priming, measured, after the run
    reserve = t.CALIBRATION_MARGIN * calibrations[1]
    trainer = make_trainer(
        **h.SHALLOW, iterations=1000, val_loss_every=10, checkpoint_every=save - lag, min_lr=0.1,
        max_wallclock_seconds=(4640 + t.CLOCK_RESERVE_MS + reserve) / 1e3, warmdown_iters=16,
        recur_start_step=0.4, late_qat_threshold=0.85, muon_momentum_warmup_steps=12,
        scalar_lr=0.02, tied_embed_lr=0.02, muon_wd_taper=(0.6, 0.1),
        gptq_calibration_seqs=4)  # fmt: skip
    device, trace, model, runtime = h.Device(), [], trainer.model, trainer.runtime
    runtime.event, runtime.synchronize = device.event, device.synchronize
    trainer.lag, trainer.saved_at = lag, 0.0
    steps_as_seconds = vars(time) | dict(monotonic=lambda: trainer.steps)  # for CHECKPOINT_EVERY
    monkeypatch.setattr(t, "time", SimpleNamespace(**steps_as_seconds))

    def spy(owner, name, entry, *costs) -> None:
        inner, costs = getattr(owner, name), iter(costs)

        def spied(*arguments):
            trace.append(entry(*arguments))
            device.work(next(costs, 0))
            return inner(*arguments)

        monkeypatch.setattr(owner, name, spied)

    spy(trainer, "backward", lambda *_: ("forward", model.recur, model.embed.qat_bits > 0))
    spy(t.Muon, "start", lambda _, factor, momentum: ("momentum", momentum))
    spy(torch.optim.AdamW, "step", lambda adam: ("adam", *{g["lr"] for g in adam.param_groups}))
    spy(t.Muon, "finish", lambda _, lr, taper: ("muon", lr, taper))
    spy(trainer.average, "update", lambda *arguments: ("average", *arguments), *ms)
    spy(t.Checkpoints, "write", lambda *_: ("save", trainer.steps), 3000)
    spy(trainer.evaluator, "score", lambda *_: ("validate", trainer.steps), *[5000] * 9)
    spy(t, "input_hessians", lambda *_: ("calibrate",), *calibrations)
    trainer.run()
    want = [("calibrate",)] * 2 + planned(trainer.config, lag, ms, save, reserve)
    assert trace == [pytest.approx(entry) for entry in want] and trainer.steps == stop
    scales = [entry[2] for entry in want if entry[0] == "average"]
    assert scales[22] < trainer.config.late_qat_threshold < max(scales[23:])
    phases = [entry[1:] for entry in want if entry[0] == "forward"]  # (recurrence, QAT)
    assert [(e["name"], e["step"]) for e in h.trainer_events(trainer, "phase")] == [
        ("recur", phases.index((True, False))), ("qat", phases.index((True, True)))]
    assert [(e["step"], e["train_ms"]) for e in h.trainer_events(trainer, "val")] == [
        (step, sum(ms[:step])) for step in (*range(10, stop, 10), stop)]
    trainer.finish()
    assert trainer.clock.elapsed_ms == sum(ms[:stop]) + calibrations[2]


@pytest.mark.parametrize("passes", [2, 3])
def test_recurrence_switch(make_trainer, passes):
    """Until the switch the repeats rest; then weights, momentum, EMA and SWA are copies."""
    trainer = make_trainer(iterations=7, recur_start_step=4.0, swa_enabled=True, swa_every=1,
                           recur_passes=passes,
                           warmdown_iters=100, late_qat_threshold=0.0, warmup_steps=2)
    model, seen = trainer.model, []
    start = [(a.detach().clone(), b.detach().clone()) for a, b in model.repeats()]
    place = {p: i for i, p in enumerate(trainer.params)}
    copy = trainer.copy_to_repeats

    def spy() -> None:
        momentum, ema, swa = (h.momentum(trainer.optimizer.muon), trainer.average.ema,
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
            assert len(repeats) == len({p.data_ptr() for p in repeats}) == 4 * (passes - 1)
        seen.append(trainer.steps)

    trainer.copy_to_repeats = spy
    trainer.run()
    assert seen == [4] and trainer.average.snapshots == 7
    for base, repeat in model.repeats():
        assert not torch.equal(base, repeat)  # from then on each has a life of its own
    phases = [(e["name"], e["step"]) for e in h.trainer_events(trainer, "phase")]
    assert phases == [("recur", 4)] and model.recur


def test_warm_up_changes_nothing(make_trainer):
    """Weights are restored bit for bit, and losses are those of a run without warm-up."""
    settings = dict(iterations=7, recur_start_step=2.0, warmdown_iters=6, late_qat_threshold=0.5)
    cold, warm = make_trainer(warmup_steps=0, **settings), make_trainer(warmup_steps=4, **settings)
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
    losses = h.trainer_losses(warm)
    assert h.trainer_losses(cold) == losses and len(set(losses)) == 7
    assert all(map(torch.equal, cold.params, warm.params))
    assert h.trainer_losses(warm)[-1] < h.trainer_losses(warm)[0]


def manual_gradients(trainer: t.Trainer, step: int) -> tuple[float, list]:
    """Loss and gradients of a whole global batch in one pass."""
    x, y = trainer.loader.batch(step)
    loss = trainer.model(x, y).mean()
    grads = torch.autograd.grad(loss, trainer.params, allow_unused=True)
    return float(loss.detach()), grads


def captured_step(trainer: t.Trainer) -> list:
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
    captured |= {p: buffer for p, buffer in h.momentum(optimizer.muon).items() if buffer.any()}
    return [captured.get(p) for p in trainer.params]


@pytest.mark.parametrize("world, bound", [(1, 0.05), (2, 0.05), (1, 1e9), (1, 0.0)])
def test_clipping_on_the_global_gradient(make_trainer, world, bound):
    """The optimizer sees the mean over ranks, clipped by its own norm; the log has that norm.

    A gradient below the bound, or GRAD_CLIP_NORM=0, passes unchanged.
    """
    trainer = make_trainer(grad_clip_norm=bound)
    h.randomize(trainer.model)
    trainer.optimizer = t.Optimizer(trainer.model, trainer.config, trainer.runtime)
    loss, grads = manual_gradients(trainer, 0)
    factor = 1.0
    if world == 2:  # a second rank whose loss and gradients are three times as large
        trainer.runtime.world, factor = 2, 2.0
        trainer.runtime.all_reduce = lambda packed: torch.cat((4 * packed[:-1], packed[-1:]))
        trainer.runtime.reduce_scatter = lambda rows: 4 * rows[0]
        trainer.runtime.all_gather = lambda rows: lambda: None
    captured = captured_step(trainer)
    trainer.runtime.world = 1
    norm = factor * math.sqrt(sum(float(g.double().square().sum()) for g in grads if g is not None))
    assert norm > 0.05
    clipped = bound / norm if 0 < bound < norm else 1.0
    assert trainer.facts.grad_norm == pytest.approx(norm, rel=1e-4)
    assert trainer.facts.loss == pytest.approx(factor * loss, rel=1e-5)
    for ours, g in zip(captured, grads, strict=True):
        assert (ours is None) == (g is None)
        if g is not None:
            torch.testing.assert_close(ours, factor * g * clipped, atol=1e-6, rtol=1e-3)


def test_accumulation_equals_larger_micro_batch(make_trainer):
    """MICRO_BATCH_TOKENS changes neither loss nor gradients beyond rounding."""
    results = []
    for micro in (16, 32, 64):
        trainer = make_trainer(micro_batch_tokens=micro)
        h.randomize(trainer.model)
        assert trainer.accumulation == 64 // micro
        loss = trainer.backward(*trainer.loader.batch(0))
        results.append((loss, [p.grad for p in trainer.params if p.grad is not None]))
    for loss, grads in results[:2]:
        torch.testing.assert_close(loss, results[2][0], atol=1e-6, rtol=1e-6)
        for a, b in zip(grads, results[2][1], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)

# ------------------------------------------------------------------------------------- quantization


@pytest.mark.parametrize("bits", range(2, 9))
def test_qat_grid_is_the_stored_grid(bits):
    """What training computes with late QAT is what the artifact restores, bit for bit."""
    weight = h.hard_rows().requires_grad_()
    fake = t.fake_quantize(weight, bits)
    config = h.config(class_bits=f"attn={bits}")
    name = "blocks.0.attn.q.weight"
    stored = t.quantize({name: weight.detach()}, config)[name]
    assert stored.bits == bits and stored.values.dtype == np.int8
    assert stored.scales.dtype == np.float16 and stored.scales.shape == (12,)
    assert np.abs(stored.values.astype(int)).max() == 2 ** (bits - 1) - 1
    fake.backward(torch.ones_like(weight))
    assert torch.equal(weight.grad, torch.ones_like(weight))  # straight through
    assert torch.equal(fake.detach(), stored.restore())
    assert t.fake_quantize(weight, 0) is weight


@pytest.mark.parametrize("settings", [dict(), dict(class_bits="mlp=4,embed=6"),
                                      dict(tie_embeddings=False)])
def test_qat_forward_is_the_quantized_model(settings):
    """In the QAT phase the model computes with exactly the weights that export would store."""
    c = h.config(h.DEEP, **settings)
    model, other = h.random_model(c), h.random_model(c, seed=4)
    state = {n: p.detach() for n, p in model.named_parameters()}
    other.load_state_dict({n: s.restore() for n, s in t.quantize(state, c).items()})
    with torch.no_grad():
        plain = model.logits(h.ids())
        model.set_phase(t.Phase(recur=True, qat=True))
        faked = model.logits(h.ids())
        stored = other.logits(h.ids())
    # fp16 of the two projections is storage, not QAT: allow its rounding
    torch.testing.assert_close(faked, stored, atol=2e-2, rtol=0)
    with torch.no_grad():
        for name in ("bigram.proj.weight", "value.proj.weight"):
            dict(other.named_parameters())[name].copy_(state[name])
        torch.testing.assert_close(faked, other.logits(h.ids()), atol=2e-5, rtol=0)
    assert (plain - faked).abs().max() > 0.05


def test_the_table_decides_bits():
    """Attention and repeats 6, MLP 6 at both ends and 5 between, tables 8, projections fp16."""
    model = t.GPT(h.config(num_layers=8, n_int6_layers=4, parallel_start_layer=5,
                           recur_layers=(3, 4), ve_layers=(6,),
                           **h.LEVERS | dict(recur_untie_mlp=True)), h.table().is_boundary,
                  h.runtime())
    for name, parameter in model.named_parameters():
        spec = t.param_spec(name, model.config)
        layer = int(name.split(".")[1]) if name.startswith("blocks") else None
        edge = layer in (0, 1, 6, 7)
        want = (8 if name.endswith(("embed.weight", "table.weight")) else
                16 if name.endswith("proj.weight") else
                32 if name.endswith("gate") else  # of heads
                6 if ".attn." in name and parameter.dim() == 2 or name.startswith("repeat") else
                6 if ".mlp." in name and edge else 5 if ".mlp." in name else 32)
        assert spec.bits == want, name
        assert (parameter.dim() == 2) == (want < 32) or name.endswith(
            ("mix", "mix_mlp", "weights", "gate", "gates"))
    untied = t.GPT(h.config(tie_embeddings=False), h.table().is_boundary, h.runtime())
    assert t.param_spec("head.weight", untied.config).bits == 8
    with pytest.raises(AssertionError, match="in no row of PARAM_TABLE"):
        t.param_spec("blocks.0.attn.new.weight", untied.config)


def test_gptq_is_its_definition():
    """Blocks, order, batches and the one inversion change nothing against the plain algorithm."""
    weight, hessian, scales, bits, _ = h.gptq_problem()
    codes = t.gptq(weight, hessian, scales, bits)
    for i in range(2):
        want = ref.obq(weight[i], hessian[i], scales[i], 5)
        assert (codes[i] != want).float().mean() < 2e-3  # fp32 ties
        alone = t.gptq(*(a[i : i + 1] for a in (weight, hessian, scales, bits)))[0]
        assert (codes[i] != alone).float().mean() < 2e-3


@pytest.mark.parametrize("tied", [True, False])
def test_hessians_are_those_of_the_inputs(tied, monkeypatch):
    """X^T X by hand for every matrix: shared by q, k, v; both passes; repeats their own; head."""
    model = h.random_model(h.config(h.DEEP, tie_embeddings=tied))
    ids, seen = h.ids((3, 16)), {}
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
    have = t.input_hessians(model, (ids,), h.runtime())
    matrices = {n for n in seen if not n.endswith("proj.weight")}
    head = "embed.weight" if tied else "head.weight"
    assert set(have) == matrices | {head}
    for name in matrices:
        x = torch.cat(seen[name])
        again = name.startswith(("blocks.2.attn", "blocks.3.attn"))
        assert len(x) == ids.numel() * (1 + again), name
        torch.testing.assert_close(have[name].double(), x.mT @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(have[head].double(), hidden.mT @ hidden, rtol=1e-4, atol=1e-4)
    shares = [t.input_hessians(model, part, h.runtime()) for part in ((ids[:1],), ids[1:].split(1))]
    for name in have:
        torch.testing.assert_close(shares[0][name] + shares[1][name], have[name], rtol=1e-4,
                                   atol=1e-3)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_fit_lands_under_every_limit(fit_model, tmp_path):
    """Random limits from far too small to far too large: never over, and what binds is used."""
    c, model, hessians, code = fit_model
    loosest = h.export(model, c, tmp_path, hessians)[0] - code
    bound = 0
    for share in [1.2, *np.random.default_rng(3).uniform(0.45, 1.05, 3)]:
        limit = code + int(share * loosest)
        total, lines, _ = h.export(model, replace(c, size_limit=limit), tmp_path, hessians)
        assert share < 1.05 or "coarseness:0.0000" in lines[0]
        assert total <= limit
        if share < 0.99:
            bound += 1
            assert limit - total <= 0.01 * (limit - code), (share, lines)
    assert bound >= 2
    with pytest.raises(t.RunError, match="over SIZE_LIMIT"):
        h.export(model, replace(c, size_limit=code + loosest // 20), tmp_path, hessians)
    assert (tmp_path / "x.ptz.fp32").exists()


@pytest.mark.parametrize("kind", h.CODES)
def test_rans_is_exact(kind):
    """decode(encode(x)) == x for every length around the borders of lanes and blocks."""
    r = np.random.default_rng(1)
    for n in (0, 1, 2, 255, 2049, 16385, *[140_001] * (kind in ("gaussian", "mixed"))):
        raw = h.CODES[kind](n, r).astype(np.int8).tobytes()
        data = t.rans_encode(raw)
        assert t.rans_decode(data, n) == raw, n
        for wrong in {n - 1, n + 1, 2 * n + 7} - {-1} if n < 9999 else ():
            with contextlib.suppress(ValueError):
                assert t.rans_decode(data, wrong) != raw  # never the same for another length

# ----------------------------------------------------------------------------------------- artifact


@pytest.mark.parametrize("codec, bits", [
    ("auto", ""), *((codec, "embed=2,attn=3,mlp=4,repeat=7") for codec in t.CODECS)])
def test_container_round_trip(codec, bits, tmp_path):
    """Every tensor comes back bit for bit: codes, scales, fp16 and fp32 values."""
    if codec not in (*h.codecs(), "auto"):
        pytest.skip(f"{codec} is not installed")
    path = tmp_path / "x.ptz"
    config, stored = h.artifact(path, codec, class_bits=bits)
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
    assert {s[1] for s in header["streams"]} <= set(h.codecs() if codec == "auto" else [codec])
    assert header["vocab_sha256"] == "5" * 64 and header["model"]["VE_LAYERS"] == "2,3"
    assert t.write_artifact(tmp_path / "y.ptz", {k: header[k] for k in (
        "model", "vocab_size", "vocab_sha256")}, loaded, codec)
    assert (tmp_path / "y.ptz").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("levers", [{}, h.LEVERS], ids=["off", "levers"])
def test_a_flipped_byte_is_damage(levers, tmp_path):
    """Every byte of the head and the header, and 400 bytes anywhere, one at a time."""
    path = tmp_path / "flipped.ptz"
    h.artifact(path, "zlib", **h.SMALLEST, **levers)
    assert h.load_tiny(path, doc_attention=bool(levers)).config.skip_gate == bool(levers)
    data = bytearray(path.read_bytes())
    random = np.random.default_rng(0)
    places = [*range(200), *random.integers(200, len(data), 400).tolist(), len(data) - 1]
    for place in places:
        bit = 1 << int(random.integers(8))
        data[place] ^= bit
        path.write_bytes(data)
        h.refused(path, lambda: t.read_artifact(str(path)))
        data[place] ^= bit


def test_writing_is_renamed_when_whole(tmp_path, monkeypatch):
    """The temporary file is on the disk, synced, before it takes the name."""
    events, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append("sync") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(
        Path(a).read_bytes()) or rename(a, b))
    t.write_atomic(tmp_path / "x", b"data")
    assert events == ["sync", b"data"]


def test_artifacts_of_another_vocabulary_are_refused(made, tmp_path):
    """Another size or another hash of the vocabulary, in the run itself."""
    message = r"made\.ptz: made for a vocabulary of 300 ids, sha256 5555"
    for vocab, sha256 in ((310, "5" * 64), (h.VOCAB, "6" * 64)):
        data = h.dataset(tmp_path / str(vocab), vocab)
        h.edit_manifest(data, lambda m, sha256=sha256: m["tokenizer"].update(sha256=sha256))
        with h.inside(tmp_path), pytest.raises(t.ArtifactError, match=message):
            t.run(h.config(data_path=str(data), load_artifact=str(made[2])))


@pytest.mark.parametrize("untied, passes", [(True, 2), (False, 3)])
def test_a_run_that_ends_before_recurrence_stores_no_repeats(untied, passes, made, tmp_path):
    """Neither tensors nor the setting; and it reloads and scores like the model in memory."""
    config = h.config(data_path=str(made[1]), recur_start_step=100.0, recur_untie_mlp=untied,
                      recur_passes=passes, eval_modes=("roundtrip",), compressor="zlib")
    with h.inside(tmp_path) as console:
        t.run(config)
    header, stored = t.read_artifact(str(tmp_path / config.artifact_path))
    assert header["model"]["RECUR_LAYERS"] == ""
    assert not [name for name in stored if name.startswith("repeat_mlps")]
    header, stored = t.read_artifact(str(made[2]))
    assert header["model"]["RECUR_LAYERS"] == "1,2"
    assert len([name for name in stored if name.startswith("repeat_mlps")]) == 4
    post = float(re.search(r"post_ema val_loss:\S+ val_bpb:(\S+)", console.getvalue())[1])
    final = float(re.search(r"roundtrip_exact val_loss:\S+ val_bpb:(\S+)", console.getvalue())[1])
    assert abs(post - final) < 0.05


def test_over_the_size_limit(made, tmp_path, monkeypatch, capsys):
    """Exit code 1, the bytes over from file sizes, and fp32 weights that reload bit for bit."""
    settings = h.environ(data_path=str(made[1]), artifact_path="out/over.ptz", run_id="over")
    for name, value in (settings | {"SIZE_LIMIT": "40000"}).items():
        monkeypatch.setenv(name, value)
    with h.inside(tmp_path):
        assert t.main([]) == 1
    error = capsys.readouterr().err
    total = (tmp_path / "out/over.ptz").stat().st_size + (h.ROOT / "train_gpt.py").stat().st_size
    assert error.startswith("error: ")
    assert f"{total} is {total - 40000} bytes over SIZE_LIMIT=40000" in error
    assert "LOAD_ARTIFACT=out/over.ptz.fp32" in error
    log = (tmp_path / "logs/over.txt").read_text()
    assert "final_" not in log.split("Total submission size: ")[-1]
    post = float(re.findall(r"post_ema val_loss:\S+ val_bpb:(\S+)", log)[-1])
    monkeypatch.setenv("LOAD_ARTIFACT", "out/over.ptz.fp32")
    monkeypatch.setenv("RUN_ID", "kept")  # the log of the first run is not overwritten
    with h.inside(tmp_path) as console:
        assert t.main([]) == 0
    bpb = re.search(r"roundtrip_exact val_loss:\S+ val_bpb:(\S+)", console.getvalue())[1]
    assert f"{float(bpb):.4f}" == f"{post:.4f}"  # unquantized: post-EMA exactly

# --------------------------------------------------------------------------------------- evaluation


GRID = [(targets, seq_len, stride)
        for targets in (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 100, 101)
        for seq_len in (2, 8, 16, 32) for stride in (1, 2, 3, 5, 8, 16, 31, 32)
        if stride <= seq_len]  # fmt: skip


def test_every_target_is_scored_once_with_the_longest_context():
    """Over a grid of lengths, windows, strides and world sizes; in order, inside the stream."""
    for targets, seq_len, stride in GRID:
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
            shares = [windows[h.runtime(rank, world).share_of(len(windows))]
                      for rank in range(world)]
            assert np.concatenate(shares).tolist() == windows.tolist()
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("targets", [1, 5, 31, 32, 33, 64, 100, 699])
@pytest.mark.parametrize("stride", [1, 8, 32])
def test_scores_belong_to_their_tokens(targets, stride, made):
    """A stand-in model that tells its input, target and place: all in order, context as planned."""
    evaluator = h.evaluator(made[1], val_tokens_limit=targets + 1)
    ids = evaluator.val.ids.astype(int)
    score, nats = evaluator.score(lambda x, y: (1000 * x + y).float(), stride)
    assert nats.tolist() == (1000 * ids[:-1] + ids[1:]).tolist()
    assert score.tokens == targets and score.bytes == int(evaluator.val.bytes.sum())
    assert score.nats == float(nats.astype(np.float64).sum())
    _, places = evaluator.score(lambda x, y: torch.arange(x.size(1)) + 0.0 * y, stride)
    assert (places >= np.minimum(32 - stride, np.arange(targets))).all()
    assert places[0] == 0


def test_scores_do_not_depend_on_batches_or_ranks(made):
    """Any VAL_BATCH_SIZE, down to one window, and any split over ranks."""
    model = h.random_model(h.config())
    for stride in (8, 32):
        score, nats = h.evaluator(made[1]).score(model, stride)
        for size in (1, 100, 4096):
            other, others = h.evaluator(made[1], val_batch_size=size).score(model, stride)
            np.testing.assert_allclose(others, nats, rtol=2e-5, atol=2e-5)
            assert math.isclose(other.bpb, score.bpb, rel_tol=1e-6)
        for world in (2, 3, 64):
            parts = [h.evaluator(made[1], rank, world).score(model, stride)[1]
                     for rank in range(world)]
            assert (sum((part != 0).astype(int) for part in parts) <= 1).all()
            np.testing.assert_allclose(sum(parts), nats, rtol=2e-5, atol=2e-5)


def check_mode(mode, seed=0, places=(20, 37, 66), sums=(), **settings):
    """All conditions on one process; the sums only at some places, as they take V runs each."""
    ids = h.short_stream(seed=seed)
    score = functools.partial(h.score, mode, **settings)
    nats, events, _ = score(ids)
    assert len(nats) == len(ids) - 1 and np.isfinite(nats).all()
    c = h.config(**(h.SHORT | h.MODES[mode] | settings))
    if c.ttt_kind == "document":
        ref.conditions_of_documents([(nats, events)], ids, c)
    else:
        ref.condition_4([(nats, events)], len(nats))
        ref.condition_3([(nats, events)], c.eval_seq_len, len(nats))
    ref.condition_1(score, ids, places)
    ref.condition_2(score, ids, sums)
    return nats, events


@pytest.mark.parametrize("settings", [*h.PLANS, h.LEVERS],
                         ids=["sliding", "plain", "uneven", "levers"])
@pytest.mark.parametrize("mode", h.MODES)
def test_every_mode_is_legal(mode, settings):
    """The four conditions; the events that they are about did happen."""
    long = settings == h.PLANS[-1] and mode not in ("ttt", "documents")  # V runs; others have both
    sums = (58,) if long or settings == h.LEVERS and mode in ("sliding", "ttt") else ()
    nats, events = check_mode(mode, sums=sums, **settings)
    if "documents" in mode:
        return
    kinds = Counter(event[0] for event in events)
    chunks = math.ceil(74 / h.config(**(h.SHORT | settings)).ttt_chunk_tokens)
    assert kinds["read"] == kinds["count"] == (chunks if "ngram" in mode else 0)
    assert kinds["train"] == kinds["update"]
    assert kinds["update"] >= 2 * (chunks - 1) if "ttt" in mode else kinds["update"] == 0
    # the last chunk is not trained on
    last = max((s for event in events if event[0] == "train" for s in event[1]), default=0)
    assert last < 74 - (74 % h.config(**(h.SHORT | settings)).ttt_chunk_tokens)


@pytest.mark.parametrize("settings", [*h.PLANS, dict(val_batch_size=32), dict(eval_stride=5)])
def test_ttt_without_learning_rate_is_sliding(settings):
    """Bit for bit, on any processor: the batches are the same; with a rate the scores differ."""
    (nats, events, _), (moved, _, _) = (
        h.score("ttt", h.short_stream(), ttt_lr=lr, **settings) for lr in (0.0, 0.01))
    sliding, plain, _ = h.score("sliding", h.short_stream(), **settings)
    assert nats.tobytes() == sliding.tobytes() != moved.tobytes()
    batches, same = ([event[1] for event in log if event[0] == "score"] for log in (events, plain))
    assert batches == same and len(batches) > 3


@pytest.mark.parametrize("settings", h.PLANS)
def test_a_window_belongs_to_the_chunk_of_its_first_target(settings):
    """What is scored before the n-th chunk is trained on: windows whose first target is in it."""
    c, chunk, done = h.config(**(h.SHORT | settings)), 0, set()
    _, events, _ = h.score("ttt", h.short_stream(), **(
        settings | dict(ttt_epochs=1, ttt_batch_seqs=9)))
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
    (2, r"embed|bigram|smear|blocks\.[01]\."),  # skips are added from layer 2 on
    (3, r"embed|bigram|smear|blocks\.[012]\.|skip_|value\."),
])  # fmt: skip
@pytest.mark.parametrize("more", [dict(), h.LEVERS, dict(tie_embeddings=False)])
def test_frozen_is_frozen(freeze, frozen, more):
    """Not a bit of what is frozen moves; everything else does; afterwards all is as before."""
    ttt, c = h.ttt_trainer(num_layers=4, ve_layers=(2, 3), parallel_start_layer=3,
                           recur_layers=(1, 2), ttt_freeze_blocks=freeze, **more)
    before = {n: p.detach().clone() for n, p in ttt.model.named_parameters()}
    ttt.learn(0, [0, 24, 48, 74], torch.zeros(74))
    for name, parameter in ttt.model.named_parameters():
        still = bool(frozen and re.match(frozen, name))
        assert torch.equal(parameter, before[name]) == still, name
    ttt.model.load_state_dict(before, strict=False)
    ttt.score()
    for name, parameter in ttt.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("order, chunk, vocab", [
    (1, 10, 24), (2, 1, 24), (3, 24, 24), (5, 50, 24), (5, 1000, 24), (16, 20, 65536)])
def test_ngram_is_witten_bell(order, chunk, vocab):
    """Equal to a dictionary of contexts, ids up to 65,535 at order 16 included."""
    ids = np.tile(h.short_stream(60), 4).astype(np.int64)
    boundary = np.arange(vocab) == vocab - 1
    ids = np.where(ids == h.SHORT_VOCAB - 1, vocab - 1,
                   (ids * (vocab // h.SHORT_VOCAB)) % (vocab - 1))
    cache, p = t.NgramCache(ids, boundary, order), []
    for begin in range(0, len(ids) - 1, chunk):
        part = slice(begin, min(begin + chunk, len(ids) - 1))
        p.append(cache.probabilities(part))
        cache.update(part)
    wanted = ref.witten_bell(ids, boundary, order, chunk, vocab)
    np.testing.assert_allclose(np.concatenate(p), wanted, rtol=1e-12)
    assert len(set(wanted.round(9))) > 5 or chunk == 1000  # then nothing was counted in time


@pytest.mark.parametrize("settings, headline", [
    (dict(), "ttt"), (dict(ttt_enabled=False), "sliding"), (dict(ngram_enabled=True), "ngram"),
    (dict(ngram_enabled=True, ttt_enabled=False), "ngram"),
    (dict(eval_modes=("roundtrip", "ttt"), ttt_enabled=False), "roundtrip"),
    (dict(eval_modes=("slot", "sliding"), slot_enabled=True), "sliding"),
])
def test_the_headline_follows_from_the_settings(settings, headline):
    """n-gram, else TTT, else sliding, else roundtrip; slot never; worse scores or not."""
    c, lines, runtime = h.config(**settings), [], h.runtime()
    assert [mode for mode in c.modes if mode != "slot"][-1] == headline
    runtime.log.line = lambda text, *_: lines.append(text)
    labels = ["non_compliant_slot" if mode == "slot" else mode for mode in c.modes]
    t.summarize(runtime, {}, {label: t.Score(100.0 + i * (label == headline), 50, 100, 2.0)
                              for i, label in enumerate(labels)})
    assert f"headline_mode: {headline}" in lines
    assert f"{headline}_us_per_token_and_device: 40000.0" in lines


def test_dumped_scores_recompute_the_result(made, tmp_path):
    """SCORES_PATH: ids, nats, bytes in stream order; anybody gets the same val_bpb."""
    config = h.config(data_path=str(made[1]), load_artifact=str(made[2]), run_id="dump",
                      scores_path="dumped")
    with h.inside(tmp_path) as console:
        t.run(config)
    files = h.score_files(tmp_path / "dumped")
    assert set(files) == {"roundtrip", "sliding", "ttt"}
    lines = dict(re.findall(r"(\S+_exact) val_loss:\S+ val_bpb:(\S+)", console.getvalue()))
    loss = dict(re.findall(r"(\S+_exact) val_loss:(\S+)", console.getvalue()))
    want = h.audit(made[1])
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


SERIALIZED = r"Serialized model mixed_quant\+(rans|lzma|zlib|zstd): \d+ bytes"


def parse_setting(text):
    """A setting's text as a value."""
    if "," in text or text == "":
        return tuple(int(part) for part in text.split(",") if part)
    return float(text) if "." in text or "e" in text else int(text)


@pytest.mark.parametrize("settings", [
    dict(), dict(recur_untie_mlp=False, ve_layers=(3,)), h.LEVERS, dict(
        tie_embeddings=False, iterations=2, compressor="rans", mlp_mult=8.0, n_int6_layers=0)])
def test_independent_scorer(settings, made, tmp_path):
    """NumPy alone, from the artifact's bytes, gives the roundtrip nats within 1e-4 per token.

    Once all streams are rANS, the MLPs' with several lanes and models; else their codecs differ,
    and the log names that of the largest.
    """
    with h.inside(tmp_path) as console:
        t.run(h.config(data_path=str(made[1]), scores_path="s", artifact_path="x.ptz",
                       eval_modes=("roundtrip",), matrix_lr=0.1, **settings))
    streams = h.parts(tmp_path / "x.ptz")[0]["streams"]  # (name, codec, bytes, ...)
    assert ({s[1] for s in streams} == {"rans"}) == ("compressor" in settings)
    assert re.search(f"(?m)^{SERIALIZED}$", console.getvalue())[1] == max(
        streams, key=lambda s: s[2])[1]
    model, vocab, tensors = ref.read_artifact(tmp_path / "x.ptz")
    c = {name.lower(): parse_setting(text) for name, text in model.items()}
    c["ve_layers"], c["recur_layers"] = (  # lists even when of one entry, or none
        value if isinstance(value, tuple) else (value,)
        for value in (c["ve_layers"], c["recur_layers"]))
    with np.load(made[1] / "tiny.meta.npz") as meta:
        boundary = meta["is_boundary_token"]
    stream = np.concatenate([np.fromfile(path, "<u2", offset=1024)
                             for path in sorted(made[1].glob("fineweb_val_*.bin"))])
    ids = stream[: 10 * 32 + 1].astype(np.int64)  # ten windows of EVAL_SEQ_LEN
    logits = ref.scores(tensors, SimpleNamespace(**c), boundary, ids[:-1].reshape(10, 32),
                        bool(c["recur_layers"])).reshape(320, vocab)
    top = logits.max(-1)
    nats = top + np.log(np.exp(logits - top[:, None]).sum(-1)) - logits[np.arange(320), ids[1:]]
    dumped = h.score_files(tmp_path / "s")["roundtrip"]["nats"][:320]
    assert np.abs(nats - dumped).max() < 1e-4 and dumped.std() > 0.01

# ---------------------------------------------------------------------------- whole runs and faults


LOG_LINES = [  # STYLE.md, "Log lines are an API", in the order of a run
    r"model_params:\d+", r"seed:\d+", r"world_size:\d+ grad_accum_steps:\d+",
    r"step:\d+/\d+ train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms( \w+:\S+)*",
    r"step:\d+/\d+ val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
    r"peak memory allocated: \d+ MiB reserved: \d+ MiB",
    r"DIAGNOSTIC post_ema val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} eval_time:\d+ms",
    r"Code size: \d+ bytes", SERIALIZED, r"Total submission size: \d+ bytes",
    r"final_int6_roundtrip val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} eval_time:\d+ms",
    r"final_int6_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}",
    r"final_int6_sliding_window val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} stride:\d+ eval_time:\d+ms",
    r"final_int6_sliding_window_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}",
    r"ttt_chunk \[1/1\] bpb=\d+\.\d{6} time=\d+\.\ds",
    r"legal_ttt val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} eval_time:\d+ms",
    r"legal_ttt_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}",
    r"final_int8_zlib_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}",
]  # fmt: skip


def test_log_lines_are_the_public_patterns(script_run):
    """Every line of STYLE.md, to the letter, in order, the train line once for each early step."""
    lines = script_run[1].splitlines()
    places = []
    for pattern in LOG_LINES:
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
    assert "byte_audit:exact bytes:" in script_run[1] and "\r" not in script_run[1]


def test_runs_are_deterministic(made, script_run):
    """Two processes, one with validations on the way: same losses, artifact and scores, exactly."""
    assert h.losses(made[0]) == h.losses(script_run[0])
    assert made[2].read_bytes() == (script_run[0] / "made.ptz").read_bytes()
    exact = r"final_\S+_exact val_loss:\S+ val_bpb:\S+"
    assert re.findall(exact, made[3]) == re.findall(exact, script_run[1])


def test_two_ranks_are_one(tmp_path, data):
    """30 steps, recurrence inside: losses within 1e-5 relative, artifact within 0.2 %."""
    h.compare_ranks(tmp_path, data, 2)


@pytest.mark.parametrize("step", [8, 21])
def test_a_signal_checkpoints_and_resume_goes_on(step, tmp_path, data, undisturbed):
    """SIGTERM or SIGINT: exit code 75 at the next boundary; RESUME=1 ends bit-identical.

    At the switch to recurrence and under QAT; with other logging and validations on the way.
    """
    number = signal.SIGINT if step == 8 else signal.SIGTERM
    with h.after_step(step, lambda trainer: os.kill(os.getpid(), number)):
        code, console = h.run_switching(tmp_path, data, val_loss_every=5, train_log_every=2)
    assert code == 75 and f"stopping_early: {number.name} " in console
    (kept,) = (tmp_path / "checkpoints/k").iterdir()
    assert kept.name == f"step{h.events(tmp_path, 'stop')[0]['step']:08d}"
    assert step < int(kept.name[4:]) <= step + 3
    assert not (tmp_path / "k.ptz").exists()
    code, console = h.run_switching(tmp_path, data, resume=True, checkpoint_every=1e-6,
                                    val_loss_every=7)
    assert code == 0 and "resumed: 1" in console
    assert [e["step"] for e in h.events(tmp_path, "resume")] == [int(kept.name[4:])]
    assert len(h.events(tmp_path, "checkpoint")) >= 2
    assert len(list((tmp_path / "checkpoints/k").iterdir())) == 2  # CHECKPOINT_KEEP
    logged = {e["step"] for e in h.events(tmp_path, "train")}
    assert (tmp_path / "k.ptz").read_bytes() == (undisturbed[0] / "k.ptz").read_bytes()
    assert h.state_of(tmp_path, 24) == undisturbed[1] and 24 in logged


def flip_a_bit(path):
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


CHECKPOINT_DAMAGE = {  # what is done to the newest checkpoint, and whether the log names it
    "bit in the shard": (lambda folder: flip_a_bit(folder / "rank0"), True),
    "bit in the commit": (lambda folder: flip_a_bit(next(folder.glob("commit.*"))), True),
    "truncated": (lambda folder: os.truncate(folder / "rank0", 99), True),
    "no shard": (lambda folder: (folder / "rank0").unlink(), True),
    "another's shard": (lambda folder: shutil.copy(
        min(folder.parent.iterdir()) / "rank0", folder / "rank0"), True),
    "no commit": (lambda folder: next(folder.glob("commit.*")).unlink(), False),
    "torn file": (lambda folder: [next(folder.glob("commit.*")).unlink(), (
        folder / "rank0").rename(folder / "rank0.77.tmp")], False),
}


@pytest.mark.parametrize("damage", CHECKPOINT_DAMAGE)
def test_the_one_before_a_damaged_checkpoint(damage, tmp_path):
    """Whatever is wrong with the newest one, the one before is loaded, and the log says so."""
    runtime, passed_over = h.runtime(), []
    runtime.log.event = lambda *_, reason: passed_over.append(reason)
    kept = t.Checkpoints(h.config(checkpoint_path=str(tmp_path)), runtime, "data")
    for steps in (3, 6):
        kept.write({"weight": np.full(99, steps, np.float32)}, dict(steps=steps))
    assert kept.load()[0] == dict(steps=6)
    action, named = CHECKPOINT_DAMAGE[damage]
    action(kept.root / "step00000006")
    state, arrays = kept.load()
    assert state == dict(steps=3) and (arrays["weight"] == 3).all()
    assert [kept.root.name in reason for reason in passed_over] == [True] * named
    assert t.Checkpoints(h.config(checkpoint_path=str(tmp_path / "x")), runtime, "").load() == (
        {}, {})


@pytest.mark.parametrize("wrong, lag", [("loss", 1), ("gradient", 2)])
def test_non_finite_keeps_the_last_checkpoint(wrong, lag, tmp_path, data, monkeypatch, capsys):
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
    code, _ = h.run_switching(tmp_path, data, checkpoint_every=1e-6)
    error = capsys.readouterr().err
    assert code == 1 and "at step 10: the run diverged" in error
    assert not (tmp_path / "k.ptz").exists()
    newest = max((tmp_path / "checkpoints/k").iterdir()).name
    assert newest == "step00000009" and "the last checkpoint is of step 9" in error
    for kind, _, raw in h.state_of(tmp_path, 9).values():
        if kind == np.float32:
            assert np.isfinite(np.frombuffer(raw, np.float32)).all()
    if wrong == "loss":
        monkeypatch.setattr(t.Trainer, "backward", backward)
        assert h.run_switching(tmp_path, data, resume=True)[0] == 0


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path, data, monkeypatch, undisturbed):
    """The run goes on with a warning, and the last checkpoint stays; a later one succeeds."""
    fsync, seen, looks = os.fsync, [], []

    def failing(descriptor):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        if name.startswith(("rank", "commit")):
            seen.append(name.partition(".")[0])
            if 4 <= len(seen) <= 6:  # the second commit, then shards
                raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with h.after_step(3, lambda trainer: looks.extend(
            sorted(p.name for p in trainer.checkpoints.root.iterdir()))):
        code, console = h.run_switching(tmp_path, data, checkpoint_every=1e-6)
    assert code == 0 and console.count("warning: no checkpoint at step:") == 3
    assert seen[3:6] == ["commit", "rank0", "rank0"]
    assert "No space left on device; nothing was replaced" in console
    assert len(looks) == 1 and not list(tmp_path.rglob("*.tmp"))
    h.check_same_run(tmp_path, undisturbed, resumed=False)

# ---------------------------------------------------------- the ten published checks, at full width


def test_preflight_01_imports(tmp_path):
    """The import needs torch and numpy only: no network, file, output, thread or seed."""
    code = """
import os, socket, sys, threading
import numpy, torch
def refuse(*a, **k): raise SystemExit("network at import")
socket.socket.connect = refuse
def state(): return (threading.active_count(), torch.initial_seed(), dict(os.environ),
                     torch.get_num_threads(), torch.get_float32_matmul_precision(),
                     torch.cuda.is_initialized(), torch.distributed.is_initialized())
modules, before = set(sys.modules), state()
import train_gpt
assert state() == before
new = {name.partition(".")[0] for name in set(sys.modules) - modules}
print(sorted(new - set(sys.stdlib_module_names) - {"train_gpt", "torch", "numpy"}))
assert not {"sentencepiece", "numba", "zstandard", "resource"} & set(sys.modules)
"""
    done = h.python(["-c", code], tmp_path, dict(PYTHONPATH=str(h.ROOT), OMP_WAIT_POLICY="passive"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
    assert not list(tmp_path.iterdir())


def test_preflight_02_hyperparameters():
    """The defaults are the record run's, value by value; presets contradict nothing."""
    c = t.Config.from_env({}, cuda=True)
    assert {name: (value, type(value)) for name, value in asdict(c).items()} == {
        name: (value, type(value)) for name, value in h.RECORD.items()}
    assert t.Config.from_env({"PRESET": "record"}, cuda=True) == c
    assert t.Config.from_env({"PRESET": "published"}, cuda=True) == h.config(h.PUBLISHED)
    assert (c.head_dim, c.kv_dim, c.hidden_dim) == (64, 256, 1536)
    assert c.train_batch_tokens // c.train_seq_len % 8 == 0 == c.val_batch_size % (8 * 2048)
    for preset in t.PRESETS:
        assert t.contradictions(t.Config.from_env({"PRESET": preset}, cuda=True)) == []


@pytest.fixture(scope="module")
def full():
    """The record model at full width: its initial weights, then two steps on a tiny batch."""
    c = h.config(h.RECORD, compressor="zlib", quant="rtn", n_int6_layers=4)
    model = t.GPT(c, h.table(1254).is_boundary, h.runtime())
    model.set_phase(t.Phase(recur=True))
    with torch.no_grad():
        for base, repeat in model.repeats():
            repeat.copy_(base)
    initial = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = t.Optimizer(model, c, h.runtime())
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


def test_preflight_03_model_creation(full):
    """The record model has SPEC's 30,290,797 parameters, 11 layers, two repeats, and gates."""
    assert sum(p.numel() for p in full.model.parameters()) == 30_290_797 + 5 * 512
    assert len(full.model.blocks) == 11 and len(full.model.repeat_mlps) == 2
    assert all(p.dtype == torch.float32 for p in full.model.parameters())


def test_preflight_04_forward_and_backward(full, capsys):
    """Full width: loss starts at log V, is finite, and falls on a repeated batch."""
    h.report(capsys, f"losses {full.losses} gradient norms {full.norms}")
    assert all(map(math.isfinite, full.losses + full.norms))
    assert abs(full.losses[0] - math.log(1254)) < 0.1
    assert full.losses[2] < full.losses[1] < full.losses[0]
    for name, p in full.model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert torch.isfinite(p).all(), name


def test_preflight_05_code_size(capsys):
    """The bytes of code that a run counts are those of its file."""
    size = h.SCRIPT.stat().st_size
    h.report(capsys, f"train_gpt.py {size} bytes; a record counts the packed file")
    assert t.CODE_BYTES == size < h.RECORD["size_limit"]


def test_preflight_06_artifact_size(full, tmp_path, capsys, monkeypatch):
    """Full width: every byte of the file is accounted for; the reloaded model is the stored one."""
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda w: w.fill_(math.nan))  # overwritten
    c = replace(full.config, size_limit=1 << 40)
    total, _, events = h.export(full.model, c, tmp_path)
    path = tmp_path / "x.ptz"
    streams = [values for kind, values in events if kind == "stream"]
    head = path.read_bytes()[:46]
    header = 46 + int.from_bytes(head[42:46], "little")
    code = Path(t.__file__).stat().st_size
    assert path.stat().st_size == header + sum(s["bytes"] for s in streams)
    assert total == code + path.stat().st_size
    size = dict(events)["size"]
    assert (size["code"], size["artifact"], size["total"]) == (code, total - code, total)
    rows = {n: p.size(0) for n, p in full.model.named_parameters()
            if t.param_spec(n, full.config).bits <= 8}
    assert sum(s["weights"] for s in streams) == 30_293_357 + sum(rows.values())
    assert size["floor"] <= size["artifact"] < 1.05 * size["floor"]
    h.report(capsys, f"artifact {size} over 16,000,000: {total - 16_000_000}",
             *(f"{s['name']} {s['bytes']} bytes" for s in streams))
    state = {n: p.detach() for n, p in full.model.named_parameters()}
    stored = t.quantize(state, full.config)
    val = SimpleNamespace(vocab_sha256="5" * 64)
    loaded = t.load_model(str(path), val, h.table(1254), h.runtime(), c)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, stored[name].restore()), name
    assert loaded.recur and not list(tmp_path.glob("*.tmp"))


def operations(c, vocab_size, recur):
    """Of a token's forward and backward, by DRY_RUN's cost model; a model without memory."""
    costs = cost_model.step_costs(cost_model.record_model(c, vocab_size), 1, recur, 1)
    return sum(operations for part, (operations, _) in costs.items() if part != "optimizer")


def test_preflight_07_step_time_projection(capsys):
    """24 and 28 ms at 989 TFLOP/s; the rest is a report.

    SPEC section 10 has 23 and 27: without the scores that attention's backward computes again.
    """
    c, lines = h.config(h.RECORD), []
    for recur, at_peak in ((False, 24), (True, 28)):
        work = 98_304 * operations(c, 1254, recur)
        ms = {use: 1e3 * work / (use * 989e12) for use in (0.28, 0.38, 0.45, 1.0)}
        shown = " ".join(f"{use:.0%}:{value:.1f}ms" for use, value in ms.items())
        lines.append(f"8xH100 step, recurrence {int(recur)}: {shown}")
        assert round(ms[1.0]) == at_peak
    h.report(capsys, *lines)


def test_preflight_08_quantization_error(full, capsys):
    """Relative RMS error of each class is that of its bits on Gaussian rows, not more."""
    bounds = {8: (0.003, 0.012), 6: (0.015, 0.045), 5: (0.03, 0.085), 16: (0, 5e-4), 32: (0, 0)}
    g = torch.Generator().manual_seed(0)
    sums: dict[tuple[str, int], list[float]] = {}
    for name, p in full.initial.items():
        w = torch.randn(p.shape, generator=g) * 0.04
        (stored,) = t.quantize({name: w}, full.config).values()
        both = sums.setdefault((stored.kind, stored.bits), [0.0, 0.0])
        both[0] += float((stored.restore() - w).double().square().sum())
        both[1] += float(w.double().square().sum())
    lines = []
    for (kind, bits), (error, power) in sums.items():
        relative = math.sqrt(error / power)
        lines.append(f"{kind} {bits} bits: relative RMS error {relative:.5f}")
        low, high = bounds[bits]
        assert low <= relative <= high, (kind, bits, relative)
    h.report(capsys, *lines)
    assert {k for k, _ in sums} == {"embed", "attn", "mlp", "repeat", "projection", "vector"}


def test_preflight_09_scaling(capsys):
    """Operations at the record shape, and how they grow with width, depth and length."""
    c = h.config(h.RECORD)
    off, on = (98_304 * operations(c, 1254, r) / 1e12 for r in (False, True))
    assert off == pytest.approx(23.7, rel=0.003) and on == pytest.approx(27.9, rel=0.003)
    plain = replace(c, bigram_vocab_size=0, ve_enabled=False, recur_layers=())
    head = 6 * 512 * 8  # of eight ids, the fewest that are computed
    base = operations(plain, 8, False) - head
    wide = {d: operations(replace(plain, model_dim=d, train_seq_len=2), 1, False)
            for d in (512, 1024)}
    assert wide[1024] / wide[512] == pytest.approx(4, rel=0.01)  # matrices: quadratic in width
    assert operations(replace(plain, num_layers=22), 8, False) - head == 2 * base
    long = operations(replace(plain, train_seq_len=4096), 8, False) - head
    assert long - base == 7 * 11 * 2048 * 512
    lines = []
    for width, depth in ((32, 4), (64, 4), (128, 4), (64, 8)):
        k = h.config(h.DEEP, model_dim=width, num_layers=depth, parallel_start_layer=depth,
                     ve_layers=(1,), recur_layers=(), train_seq_len=64)
        model, ids = h.random_model(k), h.ids((4, 65))
        times = []
        for _ in range(3):
            start = torch.tensor(0.0), t.time.perf_counter()
            model(ids[:, :-1], ids[:, 1:]).mean().backward()
            times.append(1e3 * (t.time.perf_counter() - start[1]))
        lines.append(f"width {width} depth {depth}: {min(times):.1f} ms forward and backward")
    h.report(capsys, *lines)


def test_preflight_10_weight_distribution(full):
    """Initial spreads at full width, and after two steps: finite, moved, in range."""
    orthogonal = {"q": 512**-0.5, "k": 512**-0.5, "v": 512**-0.5, "up": 1536**-0.5}
    for name, p in full.initial.items():
        leaf = name.removesuffix(".weight").split(".")[-1]
        if leaf in orthogonal:
            assert float(p.std()) == pytest.approx(orthogonal[leaf], rel=0.02), name
    assert float(full.initial["embed.weight"].std()) == pytest.approx(0.005, rel=0.01)
    assert float(full.initial["value.table.weight"].std()) == pytest.approx(0.01, rel=0.01)
    for name, p in full.model.named_parameters():
        moved = (p.detach() - full.initial[name]).abs()
        assert torch.isfinite(p).all() and moved.max() < 0.2, name
        spec = t.param_spec(name, full.config)
        if spec.optimizer == "muon":  # a step's RMS is lr * sqrt(max(1, rows/cols) / max side)
            rms, sides = float(moved.square().mean().sqrt()), sorted(p.shape)
            step = full.config.matrix_lr * math.sqrt(max(1, p.size(0) / p.size(1)) / sides[1])
            assert 0.2 * step < rms < 2.5 * step, (name, rms / step)  # the batch has low rank
            assert 2e-4 < p.std() < 0.1, name
