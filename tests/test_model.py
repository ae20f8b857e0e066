"""The model: its shape, its references, its attention."""

from __future__ import annotations

import itertools
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

import harness as h
import references as ref
import train_gpt as t


def count_parameters(c: t.Config, vocab: int) -> int:
    """Parameters of a model, built without memory."""
    with torch.device("meta"):
        model = t.GPT(c, np.zeros(vocab, bool), h.runtime(device="meta"))
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("vocab, expected", [(1254, 30_290_797), (998, 30_126_957)])
def test_parameter_count(vocab, expected, monkeypatch):
    """SPEC section 3: the exact counts, and 1,028 more for each further lane layer."""
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda w: w)
    c = h.config(h.PUBLISHED)
    for changes, more in ((dict(), 0), (dict(parallel_start_layer=6), 1028),
                          (dict(parallel_start_layer=5), 2 * 1028),
                          (dict(recur_untie_mlp=False), -4 * 512 * 1536),
                          (dict(recur_passes=1), -4 * 512 * 1536),
                          (dict(recur_passes=4), 8 * 512 * 1536),
                          (dict(attn_gate_dims=12), 11 * 96), (dict(skip_gate=True), 5 * 512),
                          (dict(asym_softcap=True), 2), (dict(doc_attention=True), 0)):
        assert count_parameters(replace(c, **changes), vocab) == expected + more


def test_every_tensor_in_one_row():
    """Each parameter matches exactly one row of PARAM_TABLE; a stranger is refused."""
    import re

    model = h.random_model(h.config(h.DEEP, tie_embeddings=False, **h.LEVERS))
    for name, _ in model.named_parameters():
        rows = [r[0] for r in t.PARAM_TABLE if re.fullmatch(r[0], name)]
        assert len(rows) == 1, (name, rows)
    with pytest.raises(AssertionError, match="stranger"):
        t.param_spec("stranger.weight", model.config)


@pytest.mark.parametrize("layers", [2, 3, 4, 7, 12])
def test_layer_plan_depths(layers):
    """Any depth: each stored output is added once; no lanes at NUM_LAYERS; recurrence in lanes."""
    c = h.config(h.DEEP, num_layers=layers, parallel_start_layer=layers, recur_layers=(),
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
    h.random_model(c).logits(h.ids())  # runs: recurrence inside the lanes


def test_bigram_rows_int32():
    """The hash wraps as int32 does, for ids whose products pass 2^31."""
    c = h.config(h.DEEP, bigram_vocab_size=2048)
    bigram = t.BigramHash(c)
    ids = torch.tensor([[1, 1253, 65535, 60000, 0, 59137, 65535, 65534]])
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[0, [0, 4]] = True
    boundary = np.arange(65536) == 0
    expected = ref.bigram_rows(ids.numpy(), boundary, 2048)
    assert bigram.rows(ids, starts).tolist() == expected.tolist()
    assert expected[0, 0] == expected[0, 4] == 2047 and expected[0, 1] < 2047


@pytest.mark.parametrize("settings", [dict(), dict(parallel_start_layer=3, recur_layers=(3, 4))])
def test_silent_repeats_change_nothing(settings):
    """Zero out and down projections and mixes (1, 0): the repeats are the identity, exactly."""
    model = h.random_model(h.config(h.DEEP, **settings))
    with torch.no_grad():
        for layer in model.config.recur_layers:
            block = model.blocks[layer]
            for mix in [n for n in ("resid_mix", "resid_mix_mlp") if hasattr(block, n)]:
                getattr(block, mix)[0], getattr(block, mix)[1] = 1, 0
            block.attn.out.weight.zero_()
            block.mlp.down.weight.zero_()
        for base, repeat in model.repeats():
            repeat.copy_(base)
        on = model.logits(h.ids())
        model.set_phase(t.Phase(recur=False))
        assert torch.equal(model.logits(h.ids()), on)
        model.repeat_mlps[1].down.weight.normal_()
        assert torch.equal(model.logits(h.ids()), on)  # off: the repeats' MLPs are not used
        model.set_phase(t.Phase(recur=True))
        assert not torch.equal(model.logits(h.ids()), on)


@pytest.mark.parametrize("change", [
    dict(parallel_start_layer=6), dict(parallel_start_layer=5), dict(recur_layers=()),
    dict(recur_layers=(2,)), dict(recur_untie_mlp=False), dict(xsa_last_n=0), dict(xsa_last_n=2),
    dict(bigram_vocab_size=0), dict(smear_enabled=False), dict(ve_enabled=False),
    dict(ve_layers=(1, 5)), dict(ln_scale=False), dict(logit_softcap=6.0),
    dict(activation_neg_slope=0.4), dict(tie_embeddings=False), dict(rope_base=5000.0),
    dict(rope_dims=6), dict(recur_passes=3), dict(recur_passes=3, recur_untie_mlp=False),
    dict(attn_gate_dims=12), dict(skip_gate=True), dict(asym_softcap=True),
], ids=str)  # fmt: skip
def test_every_switch_changes_the_output(change):
    """Each feature switch is felt at every position that it can reach."""
    c = h.config(h.DEEP)
    model, other = h.random_model(c), h.random_model(replace(c, **change), seed=9)
    state = model.state_dict()
    other.load_state_dict({n: state.get(n, x) for n, x in other.state_dict().items()})
    ids = h.ids(bos=())
    with torch.no_grad():
        gap = (model.logits(ids) - other.logits(ids)).abs().amax(-1)
    assert (gap[:, 2:] > 1e-5).all(), gap


def documents(T: int = 32) -> torch.Tensor:
    """Where documents begin: in the first tokens, in a row, at the last token, or nowhere."""
    starts = torch.zeros(4, T, dtype=torch.bool)
    starts[:, 0] = True
    starts[0, [1, 5, 6, 7]] = starts[1, T - 1] = starts[2, [3, T // 2]] = True
    return starts


def varlen_contract(  # noqa: PLR0913
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
    """FlashAttention-3's call for documents in a row: (tokens, heads, K), int32 bounds.

    Each attends to itself; what lies beyond the last bound is not written.
    """
    assert causal and cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
    bounds, out = cu_seqlens_q.tolist(), torch.full_like(q, 7.0)  # any memory
    assert bounds[0] == 0 and bounds == sorted(bounds) and bounds[-1] <= len(q)
    for begin, end in itertools.pairwise(bounds):
        assert end - begin <= max_seqlen_q == max_seqlen_k
        if begin < end:
            part = (x[None, begin:end] for x in (q, k, v))
            out[begin:end] = ref.softmax_attention(*part)[0]
    return out, None


@pytest.mark.parametrize("attend, mask", [
    (t.sdpa, t.dense_mask), (t.flash_attention_3, t.document_bounds), (t.flex, t.block_mask)])
def test_document_attention_equals_softmax(attend, mask, monkeypatch):
    """Dense mask, FlashAttention-3's call by its contract, FlexAttention: values and gradients."""
    stub = SimpleNamespace(flash_attn_varlen_func=varlen_contract)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", stub)
    starts, inputs = documents(), h.matrices((4, 32, 4, 16), (4, 32, 2, 16), (4, 32, 2, 16))
    trains, results = attend is not t.flex, []  # which has no backward on a CPU
    with torch.no_grad():
        made = mask(starts)
    for function, context in ((attend, made), (ref.softmax_attention, starts)):
        leaves = [x.clone().requires_grad_(trains) for x in inputs]
        with warnings.catch_warnings(action="ignore"):  # it is not compiled
            out = function(*leaves, context)
        results.append([out, *(torch.autograd.grad(out, leaves, out.detach().cos())
                               if trains else ())])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_block_masks_have_a_stride_of_heads():
    """FlexAttention's kernel goes from sequence to sequence by it; of 32 it is not padded."""
    starts = documents()
    mask, (document, T) = t.block_mask(starts), (starts.cumsum(1), starts.size(1))
    made = create_block_mask(lambda b, _, query, key: (query >= key)
                             & (document[b, query] == document[b, key]),
                             len(starts), None, T, T, device="cpu")
    for part in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
                 "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"):
        ours, theirs = getattr(mask, part), getattr(made, part)
        assert torch.equal(ours, theirs.expand_as(ours)) and ours.size(1) == 32
        assert ours.is_contiguous() and ours.stride(0) == 32 * ours.stride(1)


@pytest.mark.parametrize("attend, mask", [
    (t.flash_attention_3, t.document_bounds), (t.flex, t.block_mask)])
def test_a_model_is_the_same_with_each_attention(attend, mask, monkeypatch):
    """All passes and lanes, as the runtime gives attention and mask to it."""
    stub = SimpleNamespace(flash_attn_varlen_func=varlen_contract)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", stub)
    c, on = h.config(h.DEEP, **h.LEVERS, model_dim=64, train_seq_len=32), h.runtime()
    dense = h.random_model(c)
    on.attention, on.document_mask = attend, mask
    other = t.GPT(c, h.table().is_boundary, on)
    other.load_state_dict(dense.state_dict())
    other.set_phase(t.Phase(recur=True))
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        ids = h.ids((2, 32))
        torch.testing.assert_close(other.logits(ids), dense.logits(ids), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["embed.weight", "blocks.3.attn.gate", "skip_gates"])
def test_gradients_are_those_of_the_loss(name):
    """Along its gradient a parameter changes the loss as central differences say."""
    model, ids = h.random_model(h.config(h.DEEP, **h.LEVERS)), h.ids()
    parameter = dict(model.named_parameters())[name]
    (gradient,) = torch.autograd.grad(model(ids, ids.roll(-1, 1)).mean(), parameter)
    step, losses = 1e-2 * gradient / gradient.norm(), []
    with torch.no_grad():
        for sign in (1, -2):
            parameter += sign * step
            losses.append(model(ids, ids.roll(-1, 1)).double().mean())
    assert float(losses[0] - losses[1]) / 2e-2 == pytest.approx(float(gradient.norm()), rel=2e-3)


def test_bounds_have_room_or_say_so(monkeypatch):
    """One length for each shape; documents that find no room get NaN, and never each other."""
    monkeypatch.setitem(sys.modules, "flash_attn_interface",
                        SimpleNamespace(flash_attn_varlen_func=varlen_contract))
    sizes = {}
    for grad in (True, False):
        room = 2 + 2 * 256 // (128 if grad else 16)
        for count in (2, 3, room, room + 1):
            starts = torch.zeros(512, dtype=torch.bool)
            starts[[0, 256]] = True  # each row begins one
            starts[torch.arange(1, count - 1)] = True
            assert starts.sum() == count
            with torch.set_grad_enabled(grad):
                bounds = t.document_bounds(starts.view(2, 256))
            sizes.setdefault(grad, set()).add(len(bounds))
            places = starts.nonzero().flatten().tolist()
            assert bounds.tolist() == (places + [512] * (room + 1))[: room + 1]
            q, k, v = h.matrices((2, 256, 2, 4), (2, 256, 1, 4), (2, 256, 1, 4))
            out = t.flash_attention_3(q, k, v, bounds)
            lost = out.isnan().flatten(1).any(1)
            assert lost.tolist() == ([False, False] if count <= room else [False, True])
            wanted = ref.softmax_attention(q, k, v, starts.view(2, 256))
            kept = ~out.isnan()
            torch.testing.assert_close(out[kept], wanted[kept], atol=1e-5, rtol=1e-5)
    assert sizes == {True: {7}, False: {35}}


def test_softcaps_are_those_of_their_signs():
    """Positive and negative logits by a cap each; equal ones are as one, bit for bit."""
    models = [h.random_model(h.config(h.DEEP, asym_softcap=asym)) for asym in (False, True)]
    plain, two = (model.state_dict() for model in models)
    models[1].load_state_dict(plain | dict(softcap=torch.tensor([5.0, 5.0])))
    ids = h.ids()
    with torch.no_grad():
        before = models[0].logits(ids)
        assert torch.equal(models[1].logits(ids), before)
        assert torch.equal(models[1](ids, ids), models[0](ids, ids))
        models[1].softcap.copy_(torch.tensor([7.0, 3.0]))
        after = models[1].logits(ids)
        inner = 5 * torch.atanh(before.double() / 5)
    wanted = torch.where(inner > 0, 7 * torch.tanh(inner / 7), 3 * torch.tanh(inner / 3))
    torch.testing.assert_close(after.double(), wanted, atol=1e-3, rtol=1e-3)
    assert two["softcap"].shape == (2,) and not models[1].softcap.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("levers", [{}, h.LEVERS], ids=["off", "levers"])
def test_backward_keeps_the_logits_once_in_bf16(levers):
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
    runtime = h.runtime()
    runtime.dtype = torch.bfloat16
    model = t.GPT(h.config(h.DEEP, **h.SHALLOW, **levers), h.table().is_boundary, runtime)
    forward = torch.compile(model, fullgraph=True, dynamic=False, backend=aot_autograd(
        fw_compiler=keep_saved, bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition, decompositions=select_decomp_table()))
    ids = h.ids((3, 17), bos=())
    forward(ids[:, :-1], ids[:, 1:]).mean().backward()
    logits = [x.dtype for x in saved if x.numel() == 3 * 16 * len(model.padding)]
    assert logits == [torch.bfloat16]


@pytest.mark.parametrize("name", ["embed", "bigram.table", "value.table"])
def test_tables_sum_their_gradients_in_fp32(name):
    """A row that every token reads: in bf16 the sum of its gradients would stop growing."""
    runtime = h.runtime()
    runtime.dtype = torch.bfloat16
    table = t.GPT(h.config(h.DEEP), h.table().is_boundary, runtime).get_submodule(name)
    out = table(torch.full((4, 1000), 3))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert table.weight.grad.dtype == torch.float32
    assert (table.weight.grad[3] == 4000).all() and table.weight.grad.sum() == 4000 * out.size(-1)


def plain_rotate(x, base, dims):
    """Rotate-half RoPE by slices."""
    angles = torch.outer(torch.arange(x.size(1)), base ** (-torch.arange(0, dims, 2) / dims))
    cos, sin = angles.cos()[:, None].to(x), angles.sin()[:, None].to(x)
    a, b, rest = x.split((dims // 2, dims // 2, x.size(-1) - dims), dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), dim=-1)


def plain_exclusion(y, v):
    """XSA by directions of length 1."""
    direction = F.normalize(v, dim=-1).repeat_interleave(y.size(2) // v.size(2), dim=2)
    return y - (y * direction).sum(-1, keepdim=True) * direction


def folds():
    """Name -> (as the model computes it, as one would write it down, shapes of their inputs)."""
    c, linear = h.config(h.DEEP, rope_dims=6, model_dim=40), t.Linear(8, 12).double()
    rope = t.rope_table(5, c).double().unbind()
    model = t.GPT(h.config(h.DEEP, **h.SHALLOW), h.table().is_boundary, h.runtime()).double()
    torch.nn.init.normal_(model.embed.weight)
    targets, cap = h.ids((2, 5), bos=()), model.config.logit_softcap

    def plain_loss(h):
        logits = cap * torch.tanh(h @ model.embed.weight.T / cap)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")

    return dict(
        scale=(linear, lambda x, scale: scale * linear(x), ((2, 5, 8), (12,))),
        scalars=(lambda x, r: x * t.per_token(r, x), lambda x, r: x * r[:, None],
                 ((2, 5, 3, 8), (3,))),
        rotate=(lambda x: t.rotate(x, rope, 3), lambda x: plain_rotate(x, 1e4, 6),
                ((2, 5, 3, 10),)),
        exclusion=(t.exclude_own_value, plain_exclusion, ((2, 5, 4, 8), (2, 5, 2, 8))),
        loss=(lambda h: model(targets, targets, h).flatten(), plain_loss,
              ((2, 5, model.config.model_dim),)))


@pytest.mark.parametrize("name", ["scale", "scalars", "rotate", "exclusion", "loss"])
def test_folds_equal_what_they_stand_for(name):
    """What is written so that a GPU moves fewer bytes: same values, same gradients."""
    folded, plain, shapes = folds()[name]
    assert name != "loss" or h.VOCAB % 8  # its last columns are padding
    results = []
    for function in (folded, plain):
        inputs = [x.double().requires_grad_() for x in h.matrices(*shapes)]
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, out.detach().cos())])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)  # tables and norms are fp32


@pytest.mark.parametrize("train, evaluation", [(2048, 4096), (4096, 2048)])
def test_rope_is_the_formula_at_every_length(train, evaluation):
    """Up to the longer of both lengths, beyond 1,024 too, each angle is its position's alone."""
    seen, on = [], h.runtime()
    on.attention = lambda q, k, v: seen.append((q, k)) or torch.zeros_like(q)
    c = h.config(train_seq_len=train, train_batch_tokens=train, eval_seq_len=evaluation,
                 smear_enabled=False, bigram_vocab_size=0)  # then equal ids have equal q and k
    model = t.GPT(c, h.table().is_boundary, on)
    for length in (1024, 2048, 4096):
        seen.clear()
        with torch.no_grad():
            model.hidden(torch.full((1, length), 7))
        for x in seen[0]:
            turned = plain_rotate(x[:, :1].expand_as(x), c.rope_base, c.rope_dims)
            torch.testing.assert_close(x, turned, atol=1e-3, rtol=0)
            assert x.size(1) == length and (x - x[:, :1]).abs().max() > 0.1


def test_exclusive_attention_is_orthogonal():
    """XSA leaves nothing of a head's output along its own value, and nothing else is touched."""
    y, v = h.matrices((2, 5, 4, 8), (2, 5, 2, 8))
    out = t.exclude_own_value(y, v)
    own = F.normalize(v, dim=-1).repeat_interleave(2, dim=2)
    assert (out * own).sum(-1).abs().max() < 1e-5
    removed = y - out
    along = (removed * own).sum(-1, keepdim=True) * own
    torch.testing.assert_close(removed, along, atol=1e-5, rtol=0)


def test_layer_plan_record():
    """The record plan, run by run: order, stores, skips in reverse, lanes."""
    c = h.config(h.RECORD)
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


def test_layer_plan_frontier():
    """17 passes: layers 3, 4, 5 three times in a row, with their own MLPs or a repeat's each."""
    c = h.config(h.RECORD, **t.PRESETS["frontier"] | dict(preset=("frontier",)))
    plan = t.layer_plan(c, True)
    assert [r.layer for r in plan] == [0, 1, 2, *3 * (3, 4, 5), 6, 7, 8, 9, 10]
    assert {r.repeat for r in plan} == {None} and not any(
        r.store or r.skip is not None for r in plan[6:12])
    assert [r.layer for r in plan if r.lanes] == [8, 9, 10]
    untied = t.layer_plan(replace(c, recur_untie_mlp=True), True)
    assert [r.repeat for r in untied] == [None] * 6 + [*range(6)] + [None] * 5
    for one_pass in (t.layer_plan(c, False), t.layer_plan(replace(c, recur_passes=1), True)):
        assert [r.layer for r in one_pass] == [*range(11)]


@pytest.mark.parametrize("changes", [
    dict(bigram_vocab_size=0), dict(recur_untie_mlp=False), dict(mlp_mult=4.0), dict(data_seed=7),
    dict(ve_enabled=False, smear_enabled=False), dict(parallel_start_layer=4), dict(seed=7)])
def test_runs_begin_alike_where_shapes_agree(changes):
    """Whatever else differs, but for SEED; so a comparison by seeds is one of pairs."""
    first, second = ({n: p.detach() for n, p in h.random_model(
        h.config(h.DEEP, **changed), seed=None).named_parameters()} for changed in ({}, changes))
    common = [n for n in first if n in second and first[n].shape == second[n].shape]
    alike = [n for n in common if torch.equal(first[n], second[n])]
    drawn = [n for n in common if n.endswith((".q.weight", "embed.weight", ".table.weight"))
             and first[n].any()]
    assert len(common) > 40 and drawn
    assert not {*alike} & {*drawn} if "seed" in changes else alike == common


def test_initial_values():
    """The table of GPT's docstring, and orthogonality of q, k, v and up."""
    c = h.config(h.DEEP, tie_embeddings=False, tied_embed_init_std=0.005, qk_gain_init=1.7,
                 **h.LEVERS)
    model = h.random_model(c, seed=None, vocab=4000)
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
        elif leaf in ("out", "down", "gate", "skip_gates", "head") or name == "value.proj.weight":
            assert not x.any(), name
        elif leaf in ("attn_scale", "mlp_scale", "route", "skip_weights", "layer_scale"):
            assert torch.equal(x, torch.ones_like(x)), name
        elif leaf in ("resid_mix", "resid_mix_mlp"):
            assert x[0].eq(1).all() and x[1].eq(0).all(), name
        elif leaf == "lane_merge":
            assert x.item() == 0.5
        elif leaf == "softcap":
            assert x.tolist() == [5.0, 5.0]
        elif leaf == "q_gain":
            assert torch.equal(x, torch.full_like(x, 1.7))
        else:
            assert name.startswith(("embed", "bigram", "value")), name
    assert len({x.sum().item() for n, x in p.items() if n.endswith("attn.q.weight")}) == len(
        model.blocks)  # no two matrices are alike
    ids = h.ids()
    starts = torch.from_numpy(h.table().is_boundary)[ids]
    assert not model.bigram(ids, starts).any()  # adds nothing at the start of training
    assert all(x.dtype == torch.float32 for x in p.values())
