"""TTT_KIND=document: adapters on each document, in batches that no score can tell."""

from __future__ import annotations

import functools
import math
import re
import types
from collections import Counter

import numpy as np
import pytest
import torch

import harness as h
import references as ref
import train_gpt as t

LAST = h.SHORT_VOCAB - 1


def trainer(tokens=None, on=None, **settings) -> tuple[t.DocumentTTT, t.Config]:
    """A DocumentTTT on a random model and a short stream, and its configuration."""
    c = h.config(**(h.SHORT | h.DOCUMENTS | settings))
    judge = h.short_evaluator(c, h.short_stream() if tokens is None else tokens, on)
    return t.DocumentTTT(h.random_model(c, vocab=h.SHORT_VOCAB), judge), c


def document_nats(model, ids, c):
    """Nats by one document and one chunk at a time, by PyTorch's AdamW and SGD."""
    found, cut = np.zeros(len(ids) - 1, np.float32), ref.documents(ids)
    saved = {n: p.detach().clone() for n, p in model.named_parameters()}
    tensor, outputs = torch.from_numpy(ids.astype(np.int64))[None], model.adapter_outputs()
    for d, (begin, length) in enumerate(cut):
        if d == c.ttt_global_docs > 0:
            global_phase(model, tensor, begin, c)
        random, shape = torch.Generator().manual_seed(c.seed), (c.ttt_lora_rank, c.model_dim)
        a = 2 * torch.rand((len(outputs), *shape), generator=random) - 1
        pair = [(a[None] / math.sqrt(c.model_dim)).requires_grad_(),
                torch.zeros(1, sum(outputs), c.ttt_lora_rank, requires_grad=True)]
        adam = torch.optim.AdamW(pair, c.ttt_lora_lr, (0.0, 0.99), 1e-10, c.ttt_lora_wd)
        for first in range(0, length, c.ttt_doc_chunk):
            end = min(first + c.ttt_doc_chunk, length)
            start = max(0, first + c.ttt_doc_chunk - c.eval_seq_len)
            text, adapters = tensor[:, begin + start : begin + end + 1], model.adapters(*pair)
            hidden = model.hidden(text[:, :-1], adapters)
            nats = model(text[:, :-1], text[:, 1:], hidden, adapters)[0, first - start :]
            found[begin + first : begin + end] = nats.detach().numpy()
            if end < length:
                adam.zero_grad()
                nats.mean().backward()
                adam.step()
    model.load_state_dict(saved, strict=False)
    return found


def global_phase(model, ids, end, c):
    """One pass of SGD over the targets before `end`, in windows, at a cosine from TTT_LR."""
    params = [p for n, p in model.named_parameters()
              if t.first_layer(n, c) >= c.ttt_freeze_blocks]
    sgd, length = torch.optim.SGD(params, c.ttt_lr, c.ttt_momentum), c.eval_seq_len
    ends = [*range(length, end, length), end]
    batches = [ends[i : i + c.ttt_batch_seqs] for i in range(0, len(ends), c.ttt_batch_seqs)]
    for i, batch in enumerate(batches):
        losses = []
        for stop in batch:
            start, new = max(0, stop - length), stop - length * ((stop - 1) // length)
            losses.append(model(ids[:, start:stop], ids[:, start + 1 : stop + 1])[0, -new:])
        model.zero_grad()
        torch.cat(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(params, c.ttt_grad_clip or math.inf)
        sgd.param_groups[0]["lr"] = c.ttt_lr * (1 + math.cos(math.pi * i / len(batches))) / 2
        sgd.step()


CASES = {
    "plain": {}, "levers": h.LEVERS, "global": dict(ttt_global_docs=3, ttt_lr=0.1),
    "levers, global": h.LEVERS | dict(ttt_global_docs=2, ttt_lr=0.1, ttt_batch_seqs=2),
    "one at a time": dict(ttt_doc_batch=1), "all": dict(ttt_doc_batch=99),
    "windows": dict(eval_seq_len=5, eval_stride=5, ttt_doc_batch=2, ttt_lora_lr=0.01),
    "chunks of two": dict(ttt_doc_chunk=2, ttt_lora_lr=0.01),
    "a chunk as long as the window": dict(ttt_doc_chunk=8, eval_seq_len=8),
    "a head of its own": dict(tie_embeddings=False, ttt_lora_wd=5.0, ttt_lora_rank=5),
    "fewer global tokens than a window": dict(ttt_global_docs=1, ttt_lr=0.1),
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_it_is_its_definition(settings):
    """Equal to one document and one chunk at a time."""
    ttt, c = trainer(**settings)
    before = h.digest(ttt.model.named_parameters())
    score, nats = ttt.score()
    assert h.digest(ttt.model.named_parameters()) == before
    wanted = document_nats(ttt.model, ttt.evaluator.val.ids, c)
    np.testing.assert_allclose(nats, wanted, rtol=2e-4, atol=2e-4)
    assert score.tokens == len(nats) and score.nats == float(nats.astype(np.float64).sum())
    if settings == CASES["global"]:  # where others are, far more than these may differ
        for other in dict(ttt_lora_lr=0.0), dict(ttt_global_docs=0), dict(ttt_doc_chunk=4):
            other = document_nats(ttt.model, ttt.evaluator.val.ids, h.config(
                **(h.SHORT | h.DOCUMENTS | settings | other)))
            assert np.abs(other - wanted).max() > 0.01


def test_adapters_are_in_the_matrices():
    """W + B A at q, v, out and the head; at the MLP from input to output. Each layer pass has its
    own, each row of a batch too."""
    c = h.config(**(h.DEEP | dict(parallel_start_layer=6, recur_layers=(), recur_passes=1,
                                  tie_embeddings=False, ttt_lora_alpha=6.0)))
    model, ids = h.random_model(c), h.ids()
    a, b = h.matrices((2, 25, 3, c.model_dim), (2, sum(model.adapter_outputs()), 3))
    adapters = model.adapters(a, b)
    hidden = model.hidden(ids, adapters)
    got = model(ids, ids, hidden, adapters)
    for row in range(2):
        one, pairs = h.random_model(c), iter(zip(a[row], b[row].split(model.adapter_outputs()),
                                                 strict=True))
        with torch.no_grad():
            for block in one.blocks:
                for name in ("q", "v", "out"):
                    down, up = next(pairs)
                    change = 2.0 * up @ down  # alpha / rank
                    if name == "out":  # its rows are scaled, the adapter is not
                        change = change / block.attn_scale.unsqueeze(1)
                    getattr(block.attn, name).weight += change
                down, up = next(pairs)
                block.mlp.register_forward_hook(functools.partial(
                    lambda change, m, inputs, y: y + inputs[0] @ change.T, 2.0 * up @ down))
            down, up = next(pairs)
            one.head.weight += (2.0 * up @ down)[: h.VOCAB]
        wanted = one(ids[row : row + 1], ids[row : row + 1])[0]
        torch.testing.assert_close(got[row], wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("levers", [{}, h.LEVERS])
def test_every_adapter_counts(levers):
    """Each of all layer passes changes the scores of its row, and of no other one."""
    ttt, _ = trainer(**levers)
    model, ids = ttt.model, torch.from_numpy(h.short_stream(33).astype(np.int64))[:32].view(2, 16)
    passes = len(model.plans[True])
    assert passes == (5 if levers else 4) and len(model.adapter_outputs()) == 4 * passes + 1
    a, b = h.matrices((2, 4 * passes + 1, 2, 16), (2, sum(model.adapter_outputs()), 2))

    def nats(b):
        adapters = model.adapters(a, b)
        return model(ids, ids, model.hidden(ids, adapters), adapters)

    before = nats(b)
    edges = np.cumsum([0, *model.adapter_outputs()])
    for begin, end in zip(edges, edges[1:], strict=False):
        other = b.clone()
        other[1, begin:end] *= 2
        after = nats(other)
        assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


@pytest.mark.parametrize("settings", [
    dict(ttt_doc_chunk=2, ttt_doc_batch=1), dict(ttt_doc_chunk=4, ttt_doc_batch=99),
    dict(ttt_doc_chunk=7, ttt_doc_batch=2, eval_seq_len=8, eval_stride=8)])
@pytest.mark.parametrize("mode", ["documents", "documents_global"])
def test_chunks_windows_and_batches_are_legal(mode, settings):
    """Conditions 1, 3 and 4; one and two ranks and the sums are in the tests of every mode."""
    ids, c = h.short_stream(), h.config(**(h.SHORT | h.MODES[mode] | settings))
    nats, events, _ = h.score(mode, ids, **settings)
    ref.conditions_of_documents([(nats, events)], ids, c)
    ref.condition_1(functools.partial(h.score, mode, **settings), ids, (37,))


@pytest.mark.parametrize("mode", ["documents", "documents_global"])
def test_nothing_passes_between_documents(mode):
    """No token of a document changes a bit of another's score; the first ones' change the rest."""
    ids = h.short_stream()
    before = h.score(mode, ids)[0]
    for d, (begin, length) in [*enumerate(ref.documents(ids))][::2]:
        other = ids.copy()
        other[begin + 2] = (ids[begin + 2] + 1) % LAST
        after, early = h.score(mode, other)[0], mode == "documents_global" and d < 3
        moved = np.flatnonzero(after != before)
        assert moved[0] == begin + 1
        assert moved[-1] < begin + length or early
        rest = after[ref.documents(ids)[3][0] :] != before[ref.documents(ids)[3][0] :]
        assert not early or rest.mean() > 0.9


@pytest.mark.parametrize("mode", ["documents", "documents_global"])
def test_where_a_document_ends_tells_its_scores_nothing(mode):
    """A boundary more changes no score before it but by rounding, also where windows are full."""
    ids = np.array([LAST, 1, 2, LAST, *(k % LAST for k in range(40)), LAST, 3, 4], np.uint16)
    score = functools.partial(h.score, mode, ttt_doc_chunk=6, eval_seq_len=8, eval_stride=8,
                              ttt_global_docs=int(mode != "documents"))
    before = score(ids)[0]
    for place in (13, 21, 40):
        other = ids.copy()
        other[place] = LAST
        np.testing.assert_allclose(score(other)[0][: place - 1], before[: place - 1], atol=2e-5)
    ref.condition_2(score, ids, (22,))


@pytest.mark.parametrize("settings", [{}, h.LEVERS | dict(eval_seq_len=8, eval_stride=8)])
def test_padding_reaches_no_score(settings):
    """Another id in the place of what is not read: not a bit changes."""
    ttt, _ = trainer(**settings)
    assert ttt.padding == 0
    before = ttt.score()[1]
    for padding in (5, LAST):
        ttt.padding = padding
        assert ttt.score()[1].tobytes() == before.tobytes()


def test_batches_know_lengths_only():
    """Other tokens in documents of the same lengths: the same plan, step by step."""
    ids = h.short_stream(200)
    other = np.where(ids == LAST, ids, (ids + 7) % LAST).astype(np.uint16)
    plans = [[(size, rows.tolist()) for plan in trainer(text, ttt_global_docs=3)[0].plans
              for size, rows in plan] for text in (ids, other)]
    assert plans[0] == plans[1] and len(plans[0]) > 10


@pytest.mark.parametrize("settings", [{}, h.LEVERS, dict(eval_seq_len=8, ttt_doc_chunk=5)])
def test_without_learning_rate_it_is_plain_scoring(settings, monkeypatch):
    """TTT_LORA_LR=0: bit for bit what the model without adapters gives for the same windows."""
    ttt, _ = trainer(**(settings | dict(ttt_lora_lr=0.0)))
    with_adapters = ttt.score()[1]

    def plain(ids, targets, places, *pair):
        hidden = ttt.model.hidden(ids).take_along_dim(places.unsqueeze(-1), dim=1)
        return ttt.model(ids, targets, hidden) + 0 * sum(p.sum() for p in pair)

    monkeypatch.setattr(ttt, "score_chunk", plain)
    assert ttt.score()[1].tobytes() == with_adapters.tobytes()
    for begin, length in ref.documents(ttt.evaluator.val.ids):  # each from its own first id
        text = torch.from_numpy(ttt.evaluator.val.ids[begin : begin + length + 1].astype(np.int64))
        chunk = ttt.config.ttt_doc_chunk
        if math.ceil(length / chunk) * chunk <= ttt.config.eval_seq_len:
            nats = ttt.model(text[None, :-1], text[None, 1:])[0].detach().numpy()
            np.testing.assert_allclose(with_adapters[begin : begin + length], nats, rtol=1e-4)


B = [LAST]
STREAMS = {
    "one target": B + [3], "no boundary": [1, 2, 3], "first id no boundary": [1, 2, *B, 3, 4],
    "empty documents": B * 4 + [1], "documents of one token": [*B, 1, *B, 2, *B, 3],
    "ends with a boundary": [*B, 1, 2, 3, *B], "ends inside a document": [*B, 1, 2, *B, 3],
    "longer than the window": B + [k % LAST for k in range(40)] + [*B, 1],
    "nothing but boundaries": B * 3,
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("mode", ["documents", "documents_global"])
def test_any_stream(mode, stream):
    """Each token is scored once, whatever the documents are."""
    ids = np.array(stream, np.uint16)
    nats, events, scores = h.score(mode, ids, ttt_global_docs=int(mode != "documents"))
    c = h.config(**(h.SHORT | h.MODES[mode] | dict(ttt_global_docs=int(mode != "documents"))))
    ref.conditions_of_documents([(nats, events)], ids, c)
    assert len(nats) == len(ids) - 1 == scores["ttt"].tokens == scores["ttt"].bytes
    assert np.isfinite(nats).all() and (nats > 0).all()
    trained = Counter(kind for kind, *_ in events)["update"]
    assert bool(trained) == (mode != "documents" and len(ref.documents(ids)) > 1)


@pytest.mark.parametrize("world", [2, 3, 9])
@pytest.mark.parametrize("settings", [{}, dict(ttt_global_docs=3, ttt_lr=0.1, ttt_batch_seqs=2)])
def test_ranks_do_not_matter(world, settings):
    """Each chunk is scored on one rank; all have the scores of one process, within rounding."""
    ids = h.short_stream()
    alone, c = trainer(ids, **settings)
    wanted = alone.score()[1]
    ttts = [trainer(ids, h.runtime(rank, world), **settings)[0] for rank in range(world)]
    rows = [row for ttt in ttts for plan in ttt.plans for _, step in plan for row in step.tolist()
            if row[1]]
    assert sorted(map(tuple, rows)) == sorted(
        (begin, length, n) for begin, length in ref.documents(ids)
        for n in range(-(-length // c.ttt_doc_chunk)))

    def work(runtime):
        ttt = ttts[runtime.rank]
        ttt.runtime = ttt.evaluator.runtime = runtime
        return ttt.score()[1]

    results = h.on_ranks(world, work)
    assert len({nats.tobytes() for nats in results}) == 1
    np.testing.assert_allclose(results[0], wanted, rtol=1e-3, atol=1e-3)


def test_plan_of_documents():
    """Each chunk once and in order, every window large enough, and little that is read in vain."""
    random = np.random.default_rng(0)
    for slots, chunk, full in ((1, 3, 16), (4, 48, 256), (7, 48, 1000), (64, 48, 2048)):
        sizes = [full // 4, full // 2, 3 * full // 4, full]
        for count in (0, 1, 5, 300):
            lengths = -np.sort(-np.ceil(np.exp(random.normal(6, 1.2, count))).astype(int))
            steps, seen, at = t.plan_documents(lengths, slots, chunk, sizes), [], {}
            for size, rows in steps:
                assert size in sizes and len(rows) == slots
                for slot, (d, n) in enumerate(rows.tolist()):
                    if d >= 0:
                        assert n == 0 or at[slot] == (d, n - 1)
                        at[slot] = d, n
                        seen.append((d, n))
                        assert min((n + 1) * chunk, full) <= size
            begin = max((i for i, (_, rows) in enumerate(steps) if (rows == (count - 1, 0)).all(1)
                         .any()), default=0)
            for size, rows in steps[:begin]:  # while documents wait, no slot is free at full size
                assert size < full or rows[:, 0].min() >= 0 or (rows[:, 1].max() + 1) * chunk < full
            chunks = -(-lengths // chunk)
            assert sorted(seen) == [(d, n) for d in range(count) for n in range(chunks[d])]
            read = slots * sum(size for size, _ in steps)
            needed = sum(min((n + 1) * chunk, full) for _, n in seen)
            if count == 300 and chunks.max() * slots < chunks.sum():
                assert read < 1.5 * needed, (slots, read / needed)


def test_slots_follow_from_memory():
    """TTT_DOC_BATCH at most; else as many as fit beside their adapters, and as can be busy."""
    ids = h.short_stream(4000)

    def slots(memory=None, **settings):
        on = h.runtime()
        with pytest.MonkeyPatch.context() as patch:
            if memory:
                on.cuda = True
                patch.setattr(torch.cuda, "get_device_properties",
                              lambda _: types.SimpleNamespace(total_memory=memory))
            return trainer(ids, on, **(dict(ttt_doc_batch=0) | settings))[0].slots

    busy = slots(ttt_doc_batch=10**6)
    assert 100 < busy == slots() and slots(ttt_doc_batch=7) == 7
    assert slots(80e9) == busy and 1 < slots(1e6) < slots(2e6) < busy
    assert slots(2e6, ttt_lora_rank=200) < slots(2e6) and slots(1e3) == 1
    one, _ = trainer(np.array([*B, *[1] * 2000, *B, 2], np.uint16), ttt_doc_batch=50)
    assert one.slots == 2  # more would wait for the long one


def test_memory_and_shapes_are_logged():
    """How many at once, in windows of which tokens, and what the adapters take."""
    on, lines = h.runtime(), []
    on.log.line = lambda text, *_: lines.append(text)
    ttt, _ = trainer(None, on)
    ttt.score()
    found = re.fullmatch(r"ttt documents:8 at_once:3 windows:4,8,12,16 adapters:(\d+)MiB", lines[0])
    assert found
    ttt.allocate()
    values = sum(p.numel() for p in ttt.pair)
    assert int(found[1]) == values * 16 >> 20
    assert ttt.pair[0].shape == (3, 17, 2, 16) and not ttt.pair[1].any()


def test_lines_are_the_score_so_far():
    """ttt_chunk: the BPB of what this rank has scored, at equal distances and at the end."""
    on, lines = h.runtime(), []
    on.log.line = lambda text, *_: lines.append(text)
    nats, _, _ = h.score("documents_global", h.short_stream(500), on)
    shown = [re.fullmatch(r"ttt_chunk \[(\d+)/(\d+)\] bpb=(\d+\.\d{6}) time=\d+\.\ds", line)
             for line in lines if line.startswith("ttt_chunk")]
    numbers, count = [int(m[1]) for m in shown], int(shown[0][2])
    every = math.ceil((count + 1) / 20)
    assert numbers == sorted({*range(1, count + 1, every), count}) and 15 < len(numbers) < 22
    assert shown[-1][3] == f"{nats.astype(float).mean() / math.log(2):.6f}"
    assert len({m[3] for m in shown}) == len(shown)
    targets = ref.documents(h.short_stream(500))[3][0]
    assert lines.index(f"ttt global_phase targets:{targets} steps:{-(-targets // 16)}") > 1


def test_a_line_before_any_byte():
    """Targets without bytes, such as boundaries, may come first: no division by zero."""
    ttt, _ = trainer(np.array([LAST, LAST, 1, 2, 3], np.uint16), ttt_global_docs=1)
    ttt.evaluator.val.bytes[0] = 0
    assert ttt.score()[0].bytes == 3


@pytest.mark.parametrize("modes, sizes", [
    (dict(), 4), (dict(eval_modes=("roundtrip", "sliding")), 0), (dict(ttt_enabled=False), 0),
    (dict(eval_modes=("ngram",), ngram_enabled=True), 4),
    (dict(eval_modes=("ngram",), ngram_enabled=True, ttt_enabled=False), 0)])
def test_nothing_is_primed_in_vain(modes, sizes):
    """The graphs of documents only where their score is computed, the global phase's too."""
    ttt, _ = trainer(**(dict(eval_modes=("roundtrip", "ttt"), ttt_global_docs=2) | modes))
    seen = []
    ttt.model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    for job in ttt.jobs:
        job()
    assert len(ttt.jobs) == 1 + sizes and sum(seen) == sizes + bool(sizes)


def test_progress_and_the_work_to_come(monkeypatch):
    """In windows that are as much work as scoring one: all slots, and three times for training."""
    now, lines, seen, on = [0.0], [], [], h.runtime()
    start = t.Evaluator.start_clock
    monkeypatch.setattr(t.Evaluator, "start_clock", lambda self, to_come: seen.append(
        dict(to_come)) or start(self, to_come))
    monkeypatch.setattr(t.time, "perf_counter", lambda: now.__setitem__(0, now[0] + 30) or now[0])
    on.log.line = lambda text, *_: lines.append(text)
    h.score("documents_global", h.short_stream(), on)
    to_come, (ttt, c) = seen[-1], trainer(ttt_global_docs=3)
    read = sum(size for plan in ttt.plans for size, _ in plan)
    first = ref.documents(h.short_stream())[3][0]
    assert to_come == {"ttt": pytest.approx(3 * (3 * read + first) / c.eval_seq_len)}
    form = r"eval ttt windows:(\d+)/(\d+) eta:\d+s( warning: evaluation will pass 600 s)?"
    shown = [re.fullmatch(form, line) for line in lines if line.startswith("eval ")]
    assert {m[2] for m in shown} == {str(math.ceil(9 * read / 16))}
    assert shown[-1][1] == shown[-1][2] and any(m[3] for m in shown)


def test_documents_are_primed_on_other_tokens(make_trainer, monkeypatch):
    """Random ids in every shape of scoring and training; all weights are as before."""
    monkeypatch.setattr(t.Runtime, "compile", lambda self, module: module)
    trainer = make_trainer(ttt_kind="document", ttt_doc_chunk=5, ttt_global_docs=1,
                           ttt_lora_rank=2, ttt_doc_batch=3)
    seen, model = [], trainer.model
    before = h.digest(model.named_parameters()), [p.requires_grad for p in model.parameters()]
    model.embed.register_forward_pre_hook(lambda _, ids: seen.append(
        (torch.is_inference_mode_enabled(), *ids)))
    for job in trainer.ttt_jobs():
        job()
    evaluator = trainer.evaluator
    ttt = t.DocumentTTT(model, evaluator)
    assert {(scoring, tuple(ids.shape)) for scoring, ids in seen} == {
        (True, (evaluator.batch_windows, 16)), (False, (ttt.rank_seqs, 16)),
        *((False, (3, size)) for size in (5, 8, 12, 16))}
    assert len(seen) == 6 and ttt.sizes == [5, 8, 12, 16]
    stream = evaluator.val.ids.astype(int)
    windows = {tuple(stream[i : i + 5]) for i in range(len(stream) - 5)}
    assert not windows & {tuple(row[:5].tolist()) for _, ids in seen for row in ids}
    model.train_only(model.is_trained)
    assert before == (h.digest(model.named_parameters()),
                      [p.requires_grad for p in model.parameters()])


@pytest.mark.slow
def test_all_is_compiled_before_the_clock(monkeypatch):
    """A graph for each size of window, AdamW's two, the modes' one and the global phase's."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, on, frames = CompileCounter(), h.runtime(), []
    on.compile = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend=counter)
    monkeypatch.setattr(t.Evaluator, "start_clock", lambda self, to_come: (
        frames.append(counter.frame_count), setattr(self, "to_come", to_come),
        setattr(self, "began", 0.0), setattr(self, "reported", math.inf)))
    nats, _, _ = h.score("documents_global", h.short_stream(), on, watch=False,
                         eval_modes=("roundtrip", "sliding", "ttt"))
    assert frames == [0, counter.frame_count] and counter.frame_count == 4 + 2 + 1 + 1
    assert not torch._dynamo.utils.counters["graph_break"]
    eager = h.score("documents_global", h.short_stream())[0]
    np.testing.assert_allclose(nats, eager, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


def test_documents_in_bf16():
    """Computed in bf16, adapters in fp32: learns on documents that repeat themselves."""
    on, document = h.runtime(), [LAST, 3, 1, 4, 1, 5, 9, 2, 6]
    on.dtype = torch.bfloat16
    ids = np.array([LAST, *(document[1:] * 12), LAST, *(document[:0:-1] * 12)], np.uint16)
    scores = []
    for rate in (0.0, 0.01):
        c = h.config(**(h.SHORT | h.DOCUMENTS | dict(ttt_lora_lr=rate)))
        model = t.GPT(c, h.table(h.SHORT_VOCAB).is_boundary, on)
        model.load_state_dict(h.random_model(c, vocab=h.SHORT_VOCAB).state_dict())
        model.set_phase(t.Phase(recur=True))
        ttt = t.DocumentTTT(model, h.short_evaluator(c, ids, on))
        scores.append(ttt.score()[0].nats)
    assert scores[1] < 0.9 * scores[0]


def test_too_high_a_rate_is_no_result():
    """The message names the setting."""
    with pytest.raises(t.RunError, match="legal_ttt: .*TTT_LORA_LR"):
        h.score("documents", h.short_stream(), ttt_lora_lr=1e30)
