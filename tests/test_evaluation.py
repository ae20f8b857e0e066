"""Evaluation: legal scores, test-time training, the n-gram cache, labels and clocks."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pickle
import re
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

import harness as h
import references as ref
import train_gpt as t


def test_evaluation_batches_have_one_shape(made):
    """The last batch is filled up, so that one compiled graph serves; rows are not lost."""
    shapes = set()

    def forward(x, y):
        shapes.add(tuple(x.shape))
        return y.float()

    evaluator = h.evaluator(made[1], val_batch_size=160)
    score, nats = evaluator.score(forward, 7)
    assert shapes == {(5, 32)} and nats.tolist() == evaluator.val.ids[1:].tolist()


def test_score_arithmetic():
    """Mean nats per token, bits per byte; none where a lone mark of a capital was scored."""
    score = t.Score(nats=200 * math.log(2), tokens=50, bytes=100)
    assert score.bpb == pytest.approx(2.0, abs=1e-15)
    assert score.loss == pytest.approx(4 * math.log(2), abs=1e-15)
    assert math.isnan(score._replace(bytes=0).bpb)


def test_plain_equals_sliding_with_full_stride(made, tmp_path):
    """EVAL_STRIDE=EVAL_SEQ_LEN: bit for bit the same nats, and the same score."""
    config = h.config(data_path=str(made[1]), load_artifact=str(made[2]), scores_path="s",
                      eval_stride=32)
    with h.inside(tmp_path):
        t.run(config)
    files = h.score_files(tmp_path / "s")
    assert files["roundtrip"]["nats"].tobytes() == files["sliding"]["nats"].tobytes()


def test_the_headline_is_fixed_by_the_settings(made, tmp_path):
    """The last mode of the design's order, whatever order was asked for and whoever is better."""
    for modes, name in ((("sliding", "roundtrip"), "sliding_window"), (("roundtrip",), "roundtrip"),
                        (("sliding",), "sliding_window")):
        with h.inside(tmp_path) as console:
            t.run(h.config(data_path=str(made[1]), load_artifact=str(made[2]),
                           eval_modes=modes))
        lines = console.getvalue().splitlines()
        exact = next(line for line in lines if line.startswith(f"final_int6_{name}_exact"))
        assert lines[-1] == exact.replace(f"final_int6_{name}", "final_int8_zlib_roundtrip")
        ran = {line.split("_")[2] for line in lines if re.match(r"final_int6_\w+_exact", line)}
        assert ran == {mode.split("_")[0] for mode in modes}


def test_a_better_score_is_no_headline():
    """Even if the plain score is the better one, sliding is what the settings fixed."""
    lines, runtime = [], h.runtime()
    runtime.log.line = lambda text, *_: lines.append(text)
    t.summarize(runtime, {}, {"sliding": t.Score(200.0, 50, 100), "roundtrip": t.Score(
        100.0, 50, 100)})
    assert lines[-1] == (
        f"final_int8_zlib_roundtrip_exact val_loss:4.00000000 val_bpb:{2 / math.log(2):.8f}")
    assert "headline_mode: sliding" in lines


def test_an_enabled_mode_that_does_not_run_is_an_error(made, tmp_path, monkeypatch):
    """A mode that settings know but evaluation does not: never a run without its score."""
    monkeypatch.setattr(t, "EVAL_MODES", ("roundtrip", "sliding", "future"))
    config = h.config(data_path=str(made[1]), load_artifact=str(made[2]),
                      eval_modes=("roundtrip", "future"))
    with h.inside(tmp_path) as console, pytest.raises((KeyError, AssertionError, t.RunError)):
        t.run(config)
    assert "final_int8_zlib_roundtrip_exact" not in console.getvalue()


def test_loading_says_what_it_evaluates(made, tmp_path):
    """LOAD_ARTIFACT trains and writes nothing; the scores are those of the run that wrote it."""
    with h.inside(tmp_path) as console:
        t.run(h.config(data_path=str(made[1]), load_artifact=str(made[2]), run_id="load"))
    pattern = r"final_\S+_exact val_loss:\S+ val_bpb:\S+"
    assert re.findall(pattern, console.getvalue()) == re.findall(pattern, made[3])
    assert not re.search(r"train_loss|Serialized", console.getvalue())
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["load.jsonl", "load.txt"]
    assert re.search(r"byte_audit: ?exact", console.getvalue())


def test_modes_differ():
    """Training and counting do change scores, or the conditions would say nothing of them."""
    nats = [h.score(mode, h.short_stream())[0] for mode in h.MODES]
    for i, one in enumerate(nats):
        assert all(not np.array_equal(one, other) for other in nats[:i])


def two_pass(patch):
    def init(self, *arguments, original=t.NgramCache.__init__):
        original(self, *arguments)
        self.update(slice(0, len(arguments[0]) - 1))
    patch.setattr(t.NgramCache, "__init__", init)


def count_one_more(patch):
    def update(self, part, original=t.NgramCache.update):
        original(self, slice(part.start, min(part.stop + 1, 74)))
    patch.setattr(t.NgramCache, "update", update)


def count_first(patch):
    def probabilities(self, part, original=t.NgramCache.probabilities):
        self.update(part)
        return original(self, part)
    patch.setattr(t.NgramCache, "probabilities", probabilities)


def train_first(patch):
    def learn(self, number, edges, nats, original=t.TTT.learn):
        if number + 2 < len(edges):
            original(self, number + 1, edges, nats)
    patch.setattr(t.TTT, "learn", learn)


def tail_twice(patch):
    def plan(*arguments, original=t.plan_windows):
        windows = original(*arguments)
        windows[-1, 1] = 0
        return windows
    patch.setattr(t, "plan_windows", plan)


def score_again(patch):
    def score(self, original=t.TTT.score):
        first, nats = original(self)
        with torch.no_grad():
            self.params[-1].add_(0.1)
        return self.evaluator.score(self.forward, self.config.eval_stride)
    patch.setattr(t.TTT, "score", score)


def unnormalised(patch):
    def probabilities(self, part, original=t.NgramCache.probabilities):
        return np.maximum(original(self, part), 0.1)
    patch.setattr(t.NgramCache, "probabilities", probabilities)


@pytest.mark.parametrize("mode, mutant, condition", [
    ("ngram_sliding", two_pass, "1"), ("ngram_sliding", two_pass, "3"),
    ("ngram_ttt", count_one_more, "2"), ("ngram_ttt", count_one_more, "3"),
    ("ngram_sliding", count_first, "2"), ("ngram_sliding", unnormalised, "2"),
    ("ttt", train_first, "1"), ("ttt", train_first, "2"), ("ttt", train_first, "3"),
    ("ttt", score_again, "3"), ("sliding", tail_twice, "4"),
    ("ttt", tail_twice, "4"),
])  # fmt: skip
def test_mutants_are_caught(mode, mutant, condition, monkeypatch):
    """Each illegal procedure breaks the condition that forbids it."""
    mutant(monkeypatch)
    ids, score = h.short_stream(), functools.partial(h.score, mode)
    with pytest.raises(AssertionError, match=f"condition {condition}"):
        if condition == "1":
            ref.condition_1(score, ids, range(20, 70, 7))
        if condition == "2":
            ref.condition_2(score, ids, (25,))  # the first target of a chunk
        ranks = [score(ids)[:2]]
        if condition == "3":
            ref.condition_3(ranks, 16, 74)
        if condition == "4":
            ref.condition_4(ranks, 74)


@pytest.mark.parametrize("condition", [ref.condition_1, ref.condition_2])
def test_slot_is_caught(condition):
    """SLOT fits what it scores: later targets of a batch and the target itself move a score."""
    def score(ids):
        return h.score("roundtrip", ids, eval_modes=("slot", "roundtrip"), slot_enabled=True)
    number = condition.__name__[-1]
    with pytest.raises(AssertionError, match=f"condition {number}"):
        condition(score, h.short_stream(), (58,))


def check_documents(mode, **settings):
    """A document's tokens change no score of another's; without DOC_ATTENTION, attention muted."""
    ids = h.short_stream()
    starts = np.flatnonzero(ids == h.SHORT_VOCAB - 1)

    def random_model(c, *arguments, original=h.random_model, **more):
        model = original(c, *arguments, **more)
        with torch.no_grad():
            for block in model.blocks if not c.doc_attention else ():
                block.attn.out.weight.zero_()  # SmearGate and bigram are what is left
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(h, "random_model", random_model)
        before = h.score(mode, ids, **settings)[0]
        for begin in starts[2:6]:
            other = ids.copy()
            other[begin - 1] = (ids[begin - 1] + 1) % (h.SHORT_VOCAB - 1)
            after = h.score(mode, other, **settings)[0]
            assert after[begin:].tobytes() == before[begin:].tobytes(), "documents leak"
            assert after[begin - 1] != before[begin - 1]  # the boundary is predicted from inside


@pytest.mark.parametrize("mode", ["roundtrip", "sliding"])
@pytest.mark.parametrize("broken", [None, t.SmearGate, t.BigramHash])
def test_documents_do_not_leak(mode, broken, monkeypatch):
    """SmearGate and bigram stop at boundaries in scoring; one that does not is caught."""
    if broken is None:
        return check_documents(mode)
    method = "forward" if broken is t.SmearGate else "rows"
    original = getattr(broken, method)

    def crossing(self, x, starts):
        edge = torch.zeros_like(starts)
        edge[:, 0] = True  # a window's first position has no previous one
        return original(self, x, edge)

    monkeypatch.setattr(broken, method, crossing)
    with pytest.raises(AssertionError, match="documents leak"):
        check_documents(mode)


@pytest.mark.parametrize("mode", ["roundtrip", "sliding"])
def test_nothing_leaks_with_document_attention(mode, monkeypatch):
    """Every layer, pass and gate as it is; a mask that is merely causal is caught."""
    check_documents(mode, **h.LEVERS)
    mask = t.dense_mask
    monkeypatch.setattr(h, "runtime", lambda *_, runtime=h.runtime: vars(on := runtime()).update(
        document_mask=lambda starts: mask(torch.zeros_like(starts))) or on)
    with pytest.raises(AssertionError, match="documents leak"):
        check_documents(mode, **h.LEVERS)


def test_ttt_alone_trains_the_softcaps(make_trainer):
    """Training leaves both as they are, also after TTT was compiled; a chunk of TTT moves both."""
    trainer = make_trainer(asym_softcap=True, iterations=2)
    for job in trainer.ttt_jobs():
        job()
    assert [n for n, p in trainer.model.named_parameters() if not p.requires_grad] == ["softcap"]
    trainer.run()
    assert trainer.model.softcap.tolist() == [5.0, 5.0]
    ttt, _ = h.ttt_trainer(asym_softcap=True)
    before = ttt.model.softcap.detach().clone()
    ttt.learn(0, [0, 24, 48, 74], torch.zeros(74))
    moved = ttt.model.softcap - before
    assert moved.ne(0).all() and moved[0] != moved[1]


RANK_CODE = """
import json, os, pickle, sys
import numpy as np
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import harness as h
import train_gpt as t
runtime = t.Runtime(h.config(run_id="rank"))
runtime.on_first_rank = lambda work: work()  # every rank keeps what it would dump
jobs, out = json.load(open("jobs.json")), []
for mode, seed, altered, settings in jobs:
    ids = h.short_stream(seed=seed)
    if altered:
        last = h.SHORT_VOCAB - 1
        ids[altered + 1 :] = np.where(ids == last, ids, (ids + 5) % last)[altered + 1 :]
    nats, events, scores = h.score(mode, ids, runtime, **settings)
    out.append((nats, events))
with open("rank%d.pickle" % runtime.rank, "wb") as file:
    pickle.dump(out, file)
runtime.close()
sys.stdout.flush()
os._exit(0)  # as train_gpt.py ends a rank: gloo's threads can abort Python's teardown
"""


@pytest.mark.slow
def test_two_ranks_are_legal_and_equal_one(tmp_path):
    """One pair of gloo processes: the conditions, equal scores on both, those of one process."""
    plans = [h.PLANS[0] | dict(ttt_batch_seqs=2), h.PLANS[2], h.PLANS[2] | dict(ttt_lr=0.0)]
    jobs = [(mode, 0, place, plan) for plan in plans for mode in h.MODES for place in (0, 37)]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    environ = dict(MASTER_ADDR="127.0.0.1", WORLD_SIZE="2", OMP_NUM_THREADS="1",
                   CUDA_VISIBLE_DEVICES="")
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        environ["MASTER_PORT"] = str(free.getsockname()[1])
    names = {f.name.upper() for f in fields(t.Config)}
    clean = {k: v for k, v in os.environ.items() if k not in names}
    processes = [subprocess.Popen(
        [sys.executable, "-c", RANK_CODE.format(root=str(h.ROOT))], cwd=tmp_path, text=True,
        env=clean | environ | dict(RANK=str(rank), LOCAL_RANK="0"), stderr=subprocess.PIPE)
        for rank in range(2)]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    ranks = [pickle.loads((tmp_path / f"rank{rank}.pickle").read_bytes()) for rank in range(2)]
    results = {}
    for (mode, _, place, plan), *both in zip(jobs, *ranks, strict=True):
        nats = both[0][0]
        assert nats.tobytes() == both[1][0].tobytes()
        c = h.config(**(h.SHORT | h.MODES[mode] | plan))
        if c.ttt_kind == "document" and not place:
            ref.conditions_of_documents(both, h.short_stream(), c)
        elif c.ttt_kind == "chunk":
            ref.condition_3(both, c.eval_seq_len, len(nats))
            ref.condition_4(both, len(nats))
        results[mode, place, plan["ttt_batch_seqs"], plan.get("ttt_lr")] = nats
        if not place:
            alone = h.score(mode, h.short_stream(), **plan)[0]
            np.testing.assert_allclose(nats, alone, rtol=1e-3, atol=1e-3)
            untrained = h.score("sliding", h.short_stream(), **plan)[0]
            if mode == "ttt" and plan.get("ttt_lr") is None:
                assert np.abs(nats - untrained).max() > 0.02  # far more than ranks differ
    for (mode, place, *plan), nats in results.items():
        assert nats[:place].tobytes() == results[mode, 0, *plan][:place].tobytes(), "condition 1"
    assert results["ttt", 0, 2, 0.0].tobytes() == results["sliding", 0, 2, 0.0].tobytes()


def test_chunk_line_is_the_score_so_far():
    """ttt_chunk: the BPB of the targets up to the chunk's end, though windows reach beyond it."""
    runtime, lines, ids = h.runtime(), [], h.short_stream()
    runtime.log.line = lambda text, *_: lines.append(text)
    nats, _, _ = h.score("ttt", ids, runtime)
    shown = [re.match(r"ttt_chunk \[(\d)/4\] bpb=(\d+\.\d{6}) time=\d+\.\ds$", line)
             for line in lines if line.startswith("ttt_chunk")]
    ends = [24, 48, 72, 74]
    assert [match[1] for match in shown] == list("1234")
    assert [match[2] for match in shown] == [  # the harness counts one byte a target
        f"{nats[:end].astype(float).sum() / math.log(2) / end:.6f}" for end in ends]


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_training_is_the_formula(world, clip, monkeypatch):
    """Plain SGD on the mean over each batch's targets, however many ranks share the sequences."""
    settings = dict(ttt_chunk_tokens=40, ttt_batch_seqs=2, ttt_grad_clip=clip,
                    ttt_freeze_blocks=int(world == 2), ttt_lr=0.5 if clip else 0.02)
    edges, ids = [0, 40, 80, 99], h.short_stream(100)
    ttt, c = h.ttt_trainer(ids, **settings)
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
                trained = [p for p in model.parameters() if p.grad is not None]  # not frozen
                norm = torch.sqrt(sum(p.grad.square().sum() for p in trained))
                factor = min(1.0, clip / float(norm)) if clip else 1.0
                with torch.no_grad():
                    for p in trained:
                        momentum[p] = c.ttt_momentum * momentum.get(p, 0) + factor * p.grad
                        p -= lr * momentum[p]
    wanted = {n: p.detach() for n, p in model.named_parameters()}
    shapes, steps = set(), Counter()

    def work(runtime):
        mine = ttts[runtime.rank]
        mine.runtime = mine.evaluator.runtime = runtime
        mine.model.register_forward_hook(lambda m, x, y: shapes.add(tuple(x[0].shape)) or
                                         steps.update([runtime.rank]))
        for chunk in (0, 1, 2):
            mine.learn(chunk, edges, torch.zeros(99))
        return h.digest(mine.model.named_parameters())

    ttts = [h.ttt_trainer(ids, h.runtime(rank, world), **settings)[0] for rank in range(world)]
    assert len({str(result) for result in h.on_ranks(world, work)}) == 1
    assert set(steps.values()) == {2 * 2 * c.ttt_epochs}  # the same on every rank
    assert shapes == {(math.ceil(2 / world), 16)}
    for name, parameter in ttts[0].model.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name], rtol=1e-4, atol=2e-5)


def test_modes_do_not_influence_each_other():
    """Each mode alone, and all in one evaluation: the same nats, bit for bit."""
    alone = {mode: h.score(mode, h.short_stream())[0] for mode in ("roundtrip", "sliding", "ttt")}
    for last in alone:
        order = dict(eval_modes=tuple(mode for mode in alone if mode != last) + (last,))
        both, _, scores = h.score("ttt", h.short_stream(), **(order | dict(ngram_enabled=True)))
        assert set(scores) == set(alone) and both.tobytes() == alone["ttt"].tobytes()
        for mode, nats in alone.items():
            assert scores[mode].nats == float(nats.astype(np.float64).sum())


def test_bf16():
    """Computed in bf16, trained in fp32: learns on a stream that repeats itself."""
    runtime, ids = h.runtime(), np.tile(h.short_stream(25), 8).astype(np.uint16)
    runtime.dtype = torch.bfloat16
    ttt, _ = h.ttt_trainer(ids, runtime, ttt_freeze_blocks=0, ttt_chunk_tokens=50, ttt_lr=0.1)
    model = t.GPT(ttt.config, h.table(h.SHORT_VOCAB).is_boundary, runtime)
    model.load_state_dict(ttt.model.state_dict())
    ttt = t.TTT(model, ttt.evaluator)
    plain, _ = ttt.evaluator.score(model, 4, chunk=50)
    ttt.config = ttt.evaluator.config = replace(ttt.config, ttt_epochs=4)
    learned, nats = ttt.score()
    assert learned.nats < 0.97 * plain.nats and nats.dtype == np.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.slow
def test_everything_is_compiled_before_the_clock(monkeypatch):
    """One graph for scoring, one for training, both on random tokens; none after the clock."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, runtime, frames = CompileCounter(), h.runtime(), []
    runtime.compile = functools.partial(torch.compile, fullgraph=True, dynamic=False,
                                        backend=counter)
    monkeypatch.setattr(t.Evaluator, "start_clock", lambda self, to_come: (
        frames.append(counter.frame_count), setattr(self, "to_come", to_come),
        setattr(self, "began", 0.0), setattr(self, "reported", math.inf)))
    nats, _, _ = h.score("ttt", h.short_stream(), runtime, watch=False,
                         eval_modes=("roundtrip", "sliding", "ttt"))
    assert frames == [0, counter.frame_count] and counter.frame_count == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    eager = h.score("ttt", h.short_stream())[0]
    np.testing.assert_allclose(nats, eager, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_priming_sees_no_validation_token_and_moves_nothing():
    """Random ids in the shapes of scoring and training; weights as they were."""
    ttt, _ = h.ttt_trainer()
    seen, before = [], h.digest(ttt.model.named_parameters())
    ttt.model.register_forward_hook(lambda m, x, y: seen.append(x[0]))
    ttt.prime()
    assert [tuple(x.shape) for x in seen] == [
        (ttt.evaluator.batch_windows, 16), (ttt.rank_seqs, 16)]
    stream = ttt.evaluator.val.ids.astype(int)
    windows = {tuple(stream[i : i + 16]) for i in range(len(stream) - 16)}
    assert not windows & {tuple(row.tolist()) for x in seen for row in x}
    assert h.digest(ttt.model.named_parameters()) == before and len(stream) == 75


def test_warm_up_sees_no_validation_token(make_trainer, monkeypatch):
    """All that it compiles and primes, of training and of evaluation, runs on other ids."""
    monkeypatch.setattr(t.Runtime, "compile", lambda self, module: module)
    trainer = make_trainer(max_wallclock_seconds=60.0, warmup_steps=4, micro_batch_tokens=32,
                           gptq_calibration_seqs=2)
    trainer.runtime.compiles = True
    seen, evaluator = [], trainer.evaluator
    trainer.model.register_forward_pre_hook(
        lambda _, batch: seen.append((torch.is_inference_mode_enabled(), *batch)))
    trainer.model.embed.register_forward_pre_hook(  # GPTQ's calibration asks for no loss
        lambda _, ids: seen.append((torch.is_inference_mode_enabled(), *ids)))
    trainer.warm_up()
    shapes = {(scoring, tuple(ids.shape)) for scoring, *batch in seen for ids in batch}
    assert shapes == {(False, (2, 16)), (True, (evaluator.batch_windows, 16)),
                      (False, (t.TTT(trainer.model, evaluator).rank_seqs, 16))}
    assert len(shapes) == 3
    stream = evaluator.val.ids.astype(int)
    windows = {tuple(stream[i : i + 16]) for i in range(len(stream) - 15)}
    assert not windows & {tuple(row.tolist()) for _, *batch in seen for ids in batch for row in ids}


def test_ngram_mixture():
    """The log of the weighted sum; weight 0 is the base, weight 1 the cache alone."""
    ids = h.short_stream(200)
    base, _, _ = h.score("sliding", ids)
    p = ref.witten_bell(ids, np.arange(h.SHORT_VOCAB) == h.SHORT_VOCAB - 1, 3, 24, h.SHORT_VOCAB)
    for weight in (0.0, 0.3, 1.0):
        nats, _, scores = h.score("ngram_sliding", ids, ngram_weight=weight)
        wanted = -np.log((1 - weight) * np.exp(-base.astype(float)) + weight * p)
        np.testing.assert_allclose(nats, wanted, rtol=1e-5)
        assert set(scores) == {"ngram"} and scores["ngram"].tokens == 199


def test_slot_is_labelled_everywhere(made, tmp_path):
    """Every line, event, file and key that it makes says so; it is no headline."""
    with h.inside(tmp_path) as console:
        t.run(h.config(data_path=str(made[1]), load_artifact=str(made[2]), run_id="x",
                       slot_enabled=True, scores_path="s", slot_lr=0.5))
    lines = console.getvalue().splitlines()
    slot = [line for line in lines if "slot" in line.lower()]
    assert len(slot) == 5 and all("non_compliant" in line for line in slot)
    assert sorted(h.score_files(tmp_path / "s")) == [
        "non_compliant_slot", "roundtrip", "sliding", "ttt"]
    bpb = {line.split(": ")[0]: line.split(": ")[1] for line in lines if "_bpb: " in line}
    assert float(bpb["non_compliant_slot_bpb"]) < float(bpb["ttt_bpb"]) == float(bpb["val_bpb"])
    assert set(bpb) - {"val_bpb"} <= set(h.tool("ablate").SCORES)  # its table shows them all
    events = map(json.loads, (tmp_path / "logs/x.jsonl").read_text().splitlines())
    for event in events:
        if event["event"] == "final" and "slot" in json.dumps(event):
            assert event["mode"] == event["line"] == "non_compliant_slot"


def test_slot_fits_the_last_stride_of_its_batch():
    """Targets before the last EVAL_STRIDE ones of a window move no other score; those there do."""
    c = h.config(h.SHORT, slot_enabled=True)
    slot = t.slot_forward(h.random_model(c, vocab=h.SHORT_VOCAB), h.runtime(), c)
    ids = torch.from_numpy(h.short_stream().astype(np.int64))[:34].view(2, 17)
    before = slot(ids[:, :-1], ids[:, 1:])
    for row, place in np.ndindex(2, 16):
        targets = ids[:, 1:].clone()
        targets[row, place] = (targets[row, place] + 5) % h.SHORT_VOCAB
        moved = slot(ids[:, :-1], targets) != before
        assert moved[row, place]
        moved[row, place] = False
        fitted = place >= 16 - c.eval_stride
        assert moved.any(1).all() if fitted else not moved.any(), (row, place)


def test_an_evaluation_over_600_s_is_announced():
    """By the first line of progress, counting the modes to come at the rate of this one."""
    ttt, _ = h.ttt_trainer()
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


@pytest.mark.parametrize("mode", ["ttt", "documents", "documents_global"])
def test_progress_of_a_slow_evaluation(mode, monkeypatch):
    """A clock that jumps: lines with windows done and left for each mode, and the warning."""
    now, lines, runtime = [0.0], [], h.runtime()
    monkeypatch.setattr(t.time, "perf_counter", lambda: now.__setitem__(0, now[0] + 30) or now[0])
    runtime.log.line = lambda text, *_: lines.append(text)
    h.score(mode, h.short_stream(), runtime, eval_modes=("roundtrip", "sliding", "ttt"))
    shown = [line for line in lines if line.startswith("eval ")]
    assert {line.split()[1] for line in shown} == {"roundtrip", "sliding", "ttt"}
    for line in shown:
        form = r"eval \w+ windows:(\d+)/(\d+) eta:\d+s( warning: evaluation will pass 600 s)?"
        done, total = map(int, re.fullmatch(form, line).groups()[:2])
        assert 0 < done <= total and (total in (5, 16) or mode != "ttt")
    assert any("warning" in line for line in shown)


def test_work_to_come_is_that_of_the_modes(monkeypatch):
    """Windows of each mode; training on a sequence costs three windows."""
    seen, start = [], t.Evaluator.start_clock
    monkeypatch.setattr(t.Evaluator, "start_clock", lambda self, to_come: seen.append(
        dict(to_come)) or start(self, to_come))
    h.score("ttt", h.short_stream(), eval_modes=("roundtrip", "sliding", "ttt", "ngram"),
            ngram_enabled=True)
    assert seen[-1] == {"roundtrip": 74 / 16, "sliding": 74 / 4, "ngram": 0,
                        "ttt": 74 / 4 + 3 * 2 * 74 / 16}


@pytest.mark.parametrize("count", [2, 3, 10, 17, 18])
def test_short_validation_works(count):
    """One token, less than a window, a window and one more: every mode scores each target."""
    for mode in h.MODES:
        nats, _, _ = h.score(mode, h.short_stream(count))
        assert len(nats) == count - 1 and (nats > 0).all()


def test_scores_that_are_not_finite_are_no_result():
    """A learning rate that destroys the model ends the run, naming the setting."""
    for documents in (False, True):
        with pytest.raises(t.RunError, match="legal_ttt: .*lower TTT_LR") as caught:
            h.score("ttt", h.short_stream(), ttt_lr=1e30, ttt_grad_clip=0.0,
                    doc_attention=documents)
        assert ("set ATTENTION=flex" in str(caught.value)) == documents


def test_the_documented_lines_recompute_the_score(made, tmp_path):
    """Those of docs/evaluation.md, on the dump of a run, print what the run logged."""
    with h.inside(tmp_path) as console:
        t.run(h.config(data_path=str(made[1]), load_artifact=str(made[2]),
                       scores_path="scores", ttt_chunk_tokens=128, ttt_lr=0.1))
    text = (h.ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S)
                if "np.load" in block)
    assert len(code.strip().splitlines()) <= 10
    done = h.python(["-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    logged = dict(re.findall(r"(\w+)_exact (val_loss:\S+ val_bpb:\S+)", console.getvalue()))
    for mode, line in (("roundtrip", "final_int6_roundtrip"), ("ttt", "legal_ttt"),
                       ("sliding", "final_int6_sliding_window")):
        assert f"{mode} {logged[line]}" in done.stdout.splitlines()


def test_load_artifact_reproduces_the_run_bit_for_bit(made, tmp_path):
    """The training run's dumps and those of its artifact, evaluated later, are the same bytes."""
    more = dict(data_path=str(made[1]), scores_path="scores", ttt_chunk_tokens=128, ttt_lr=0.1,
                ngram_enabled=True, iterations=3)
    dumps = []
    for name in ("", str(tmp_path / "0" / "x.ptz")):
        folder = tmp_path / str(len(dumps))
        folder.mkdir()
        with h.inside(folder):
            t.run(h.config(artifact_path="x.ptz", load_artifact=name, **more))
        dumps.append(h.score_files(folder / "scores"))
    assert set(dumps[0]) == set(dumps[1]) == {"roundtrip", "sliding", "ttt", "ngram"}
    for mode, arrays in dumps[0].items():
        for name, array in arrays.items():
            assert array.tobytes() == dumps[1][mode][name].tobytes(), (mode, name)
