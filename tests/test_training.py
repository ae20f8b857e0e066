"""Training: Muon and AdamW, schedules and the clock, the loop, compilation."""

from __future__ import annotations

import functools
import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import harness as h
import train_gpt as t

STOP_LINE = r"stopping_early: wallclock_cap train_time:\d+ms step:\d+/\d+"


def test_training_learns_and_the_gap_is_small(script_run):
    """Losses fall, and the artifact scores like the model before quantization."""
    losses = [float(x) for x in re.findall(r"train_loss:(\S+)", script_run[1])]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.1
    assert abs(losses[0] - math.log(h.VOCAB)) < 0.1
    values = dict(re.findall(r"(\w+_bpb): (\S+)", script_run[1]))
    assert abs(float(values["roundtrip_bpb"]) - float(values["post_ema_bpb"])) < 0.05


def test_the_wallclock_cap_stops_early(made, tmp_path):
    """The line of STYLE.md, fewer steps than asked for, all later stages as ever."""
    config = h.config(data_path=str(made[1]), max_wallclock_seconds=0.6, iterations=100000)
    with h.inside(tmp_path) as console:
        t.run(config)
    lines = console.getvalue().splitlines()
    stops = [line for line in lines if re.fullmatch(STOP_LINE, line)]
    assert len(stops) == 1 and "stopping_early" not in made[3]
    step, total = map(int, re.search(r"step:(\d+)/(\d+)", stops[0]).groups())
    assert 0 < step < total == 100000
    assert f"steps: {step}" in lines
    assert any(line.startswith(f"step:{step}/100000 val_loss:") for line in lines)


def test_a_run_that_diverges_says_so(made, tmp_path):
    """A loss that is not finite stops the run, naming the step."""
    config = h.config(data_path=str(made[1]), scalar_lr=1e30, grad_clip_norm=0.0)
    with h.inside(tmp_path), pytest.raises(t.RunError, match=r"at step \d+: the run diverged"):
        t.run(config)
    assert not (tmp_path / config.artifact_path).exists()


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96), (16, 128)])
def test_newton_schulz(shape):
    """Five steps bring singular values near 1 and keep the vectors; batched is one by one."""
    stack = torch.stack(h.matrices(shape, shape, shape))
    out = t.newton_schulz(stack, 5)
    for g, x in zip(stack, out, strict=True):
        u, s, v = torch.linalg.svd(g.double(), full_matrices=False)
        values = torch.linalg.svdvals(x.double())
        big = int((s / s.norm() > 0.01).sum())  # five steps do not lift vanishing values
        assert values.max() < 1.3 and values[:big].min() > 0.6
        inside = u.T @ x.double() @ v.T
        assert (inside - torch.diag(inside.diagonal())).abs().max() < 1e-3
        torch.testing.assert_close(t.newton_schulz(g[None], 5)[0], x, atol=1e-5, rtol=0)
    polar = t.newton_schulz(stack, 5, "polar")
    torch.testing.assert_close(polar, t.newton_schulz(stack.mT, 5, "polar").mT, atol=1e-5, rtol=0)
    scaled = t.newton_schulz(1e4 * stack, 5)
    torch.testing.assert_close(scaled, out, atol=1e-4, rtol=0)
    assert torch.isfinite(t.newton_schulz(torch.zeros(1, 8, 8), 5)).all()


def test_polar_triples_are_minimax():
    """Each leaves the smallest largest distance from 1, by Chebyshev's alternation of four errors.

    On what the triples before it have made of 0.001..1; all are divided by powers of 1.01.
    """
    low, high = 1e-3, 1.0
    for a, b, c in t.COEFFICIENTS["polar"]:
        a, b, c = a * 1.01, b * 1.01**3, c * 1.01**5
        inner = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a])))  # extremes of a x + b x^3 + c x^5
        assert low < inner[0] < inner[1] < high
        x = np.array([low, *inner, high])
        errors = 1 - (a * x + b * x**3 + c * x**5)
        np.testing.assert_allclose(errors, errors[0] * np.array([1, -1, 1, -1]), rtol=2e-4)
        low, high = 1 - errors[0], 1 + errors[0]
    assert 0.88 < low < 0.89 and len(t.COEFFICIENTS["polar"]) == 5


def conditioned(rows: int, columns: int, exponent: int) -> torch.Tensor:
    """A matrix whose singular values fall evenly, in logarithms, from 1 to 10 ** -exponent."""
    random = torch.Generator().manual_seed(exponent)
    left, right = (torch.linalg.qr(torch.randn(n, rows, generator=random))[0]
                   for n in (rows, columns))
    return (left * torch.logspace(0, -exponent, rows)) @ right.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_polar_orthogonalises_better(dtype):
    """Singular values end nearer to 1 than by five steps of the quintic, and none runs away."""
    (random, wide, thin) = h.matrices((256, 256), (128, 512), (256, 64))
    row = torch.outer(random[0], random[1]) + 1e-3 * random  # nearly of rank 1: rounding matters
    for g in (random, wide, thin, *(conditioned(128, 256, n) for n in (1, 2, 3, 4)), row):
        distance = {}
        for name in ("quintic", "polar"):
            out = t.newton_schulz(g[None].to(dtype), 5, name)[0]
            values = torch.linalg.svdvals(out.double())
            distance[name] = float((values - 1).square().mean().sqrt())
            assert values.max() < 1.3
        assert distance["polar"] < distance["quintic"], (tuple(g.shape), distance)


@pytest.mark.parametrize("momentum", [0.5, 0.95])
def test_muon_equals_torch(momentum):
    """torch.optim.Muon, which iterates in bfloat16: updates agree to 4 % of their norm."""
    c = h.config(h.DEEP, matrix_lr=0.02, muon_wd=0.1)
    for dtype in (torch.bfloat16, torch.float32):
        start, grads, ours = h.run_muon(c, dtype, 1.0, momentum, 4)
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


def test_muon_group_without_gradients():
    """Parameters without gradients are neither moved nor decayed, nor is their momentum."""
    params = [torch.nn.Parameter(w) for w in h.matrices((8, 8), (8, 8))]
    muon = t.Muon([params[:1], params[1:]], h.config(h.DEEP, muon_wd=0.5), h.runtime())
    before = params[1].detach().clone()
    params[0].grad = torch.ones(8, 8)
    h.muon_step(muon, 1.0, 0.9)
    momentum = h.momentum(muon)
    assert torch.equal(params[1], before) and not momentum[params[1]].any()
    assert momentum[params[0]].any()


def test_optimizer_step_rates_and_betas():
    """Peaks are scaled, not compounded; the first AdamW update is lr * sign, plus decay."""
    c = h.config(h.DEEP, scalar_lr=0.01, tied_embed_lr=0.02, adam_wd=0.5, beta1=0.8, beta2=0.9)
    model = h.random_model(c)
    optimizer = t.Optimizer(model, c, h.runtime())
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


def test_train_clock():
    """Finished steps only, never waiting; pauses are excluded; the slowest step is expected."""
    runtime = h.Device(1000.0)
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


@pytest.mark.parametrize("documents", [False, True])
def test_non_finite_loss(make_trainer, documents):
    """The run stops at the step whose loss is not finite, naming it and what may be the cause."""
    trainer = make_trainer(iterations=8, doc_attention=documents)
    forward, calls = trainer.forward, []

    def broken(x, y):
        calls.append(1)
        return forward(x, y) * (math.nan if len(calls) == 5 else 1.0)

    trainer.forward = broken
    with pytest.raises(t.RunError, match=r"loss nan.* at step 5:") as caught:
        trainer.run()
    assert len(calls) == 5 and ("set ATTENTION=flex" in str(caught.value)) == documents


class HostReads(TorchDispatchMode):
    """Names every operation that hands a tensor's value to the host."""

    asking = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.seen += [name] if name in self.asking else []
        return operation(*args, **(kwargs or {}))


SWITCHES = dict(**h.SHALLOW, iterations=10, warmup_steps=4, recur_start_step=3.0,
                warmdown_iters=6, late_qat_threshold=0.5, micro_batch_tokens=32)


def around_steps(trainer, monkeypatch, around) -> None:
    """Run to the end with every step launched by `around(launch, step)`."""
    launch = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda step: around(launch, step))
    trainer.run()
    assert trainer.phase == t.Phase(True, True) and trainer.accumulation > 1
    assert trainer.steps == 10


@pytest.mark.slow
def test_steps_compile_nothing_that_warm_up_has_not(make_trainer, monkeypatch):
    """One graph for each phase that the schedule visits, all of them before the first step."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, counts = CompileCounter(), []
    monkeypatch.setattr(t.Runtime, "compile", lambda self, module: torch.compile(
        module, fullgraph=True, dynamic=False, backend=counter))

    def around(launch, step):
        launch(step)
        counts.append(counter.frame_count)

    trainer = make_trainer(**SWITCHES)
    around_steps(trainer, monkeypatch, around)
    assert set(counts) == {len(trainer.phases())} == {3}


@pytest.mark.slow
def test_nothing_compiles_after_warm_up(make_trainer, monkeypatch):
    """Validation in every phase, the averaged weights and all scores of the artifact's kind."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, counts = CompileCounter(), []
    monkeypatch.setattr(t.Runtime, "compile", lambda self, module: torch.compile(
        module, fullgraph=True, dynamic=False, backend=counter))
    trainer = make_trainer(**SWITCHES, val_loss_every=2)
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


def test_phases_are_those_that_can_occur():
    """Without a clock those of the schedule, in order; with one, all that the settings allow."""
    def phases(**settings):
        trainer = SimpleNamespace(config=h.config(h.DEEP, **settings))
        return [tuple(map(int, phase)) for phase in t.Trainer.phases(trainer)]

    late = dict(iterations=20, warmdown_iters=10, late_qat_threshold=0.3)
    assert phases(**late, recur_start_step=5.0) == [(0, 0), (1, 0), (1, 1)]
    assert phases(**late, recur_start_step=19.0) == [(0, 0), (0, 1), (1, 1)]
    assert phases(**late, recur_start_step=0.0) == [(1, 0), (1, 1)]
    late |= dict(max_wallclock_seconds=9.0)
    assert phases(**late, recur_start_step=5.0) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert phases(**late, recur_start_step=0.0) == [(1, 0), (1, 1)]
    assert phases(**late | dict(late_qat_threshold=0.0), recur_layers=()) == [(0, 0)]
    assert phases(**late | dict(late_qat_threshold=0.0), recur_passes=1) == [(0, 0)]
    shares = dict(recur_start_step=0.35, warmdown_iters=0.85, late_qat_threshold=0.3)
    assert phases(iterations=20, **shares) == [(0, 0), (1, 0), (1, 1)]
    late |= shares  # by the clock: all are primed before it starts
    assert phases(**late) == [(0, 0), (1, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize("world, nodes", [(1, 1), (3, 1), (8, 2)])
def test_each_job_runs_on_one_rank_of_a_node_first(world, nodes):
    """Before the ranks meet every job has run once in each node, then on all the other ranks."""
    ran, local = {}, world // nodes
    for rank in range(world):
        runtime, order = h.runtime(), ran.setdefault(rank, [])
        runtime.local_rank, runtime.local_world = rank % local, local
        runtime.gather = lambda value, order=order: order.append("meet") or [value]
        runtime.in_turns([functools.partial(order.append, job) for job in range(5)])
    for node in range(nodes):
        orders = [ran[rank] for rank in range(node * local, (node + 1) * local)]
        first = [job for order in orders for job in order[: order.index("meet")]]
        assert sorted(first) == [*range(5)]
        assert all(sorted(job for job in order if job != "meet") == [*range(5)]
                   and order.count("meet") == 2 and order[-1] == "meet" for order in orders)


def test_handicaps_are_named(monkeypatch):
    """A record's machine has none; each other GPU, attention or lack of a compiler is one."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    runtime = h.runtime()
    runtime.compiles, runtime.compiler, runtime.cuda = True, "inductor", True
    for name in ("flash_attention_3 (installed)", "cudnn (flash_attention_3: none)",
                 "flash_attention_3, document_bounds (installed)", "flex, block_mask (timed)"):
        runtime.attention_name = name
        assert runtime.handicaps() == []
    runtime.attention_name = "cudnn, dense_mask (flex: none)"
    assert [text.split(" (")[0] for text in runtime.handicaps()] == [
        "attention is cudnn, dense_mask"]
    runtime.attention_name = "flash (cudnn: none)"
    assert [text.split(",")[0] for text in runtime.handicaps()] == [
        "attention is flash (cudnn: none)"]
    runtime.attention_name, runtime.compiles, runtime.compiler = "cudnn", False, "no Triton"
    assert runtime.handicaps() == ["nothing is compiled (no Triton)"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    assert runtime.handicaps()[0] == "it runs on NVIDIA A100, not on an H100"
    runtime.cuda = False
    assert runtime.handicaps() == ["it runs on a CPU"]


def test_steps_never_wait_for_a_value(make_trainer, monkeypatch):
    """No operation of a step hands a value of the device to the host."""
    watch, adam_step = HostReads(), torch.optim.AdamW.step

    def unwatched(adam):  # its step count lives on the host; on CUDA it is fused and has none
        with torch.utils._python_dispatch._disable_current_modes():
            adam_step(adam)

    def around(launch, step):
        monkeypatch.setattr(torch.optim.AdamW, "step", unwatched)
        with watch:
            launch(step)

    around_steps(make_trainer(**SWITCHES), monkeypatch, around)
    assert not watch.seen


def test_a_broken_compiler_means_eager_with_the_reason(monkeypatch):
    """Inductor is probed once on the GPU; the log says what it answered."""
    gpu = torch.device("meta")  # stands for a device that is no CPU

    def broken(function):
        def compiled(x):
            raise RuntimeError("Python.h: no such file\nand a long trace")
        return compiled

    monkeypatch.setattr(torch, "compile", broken)
    works, reason = t.select_compiler(gpu, h.config(h.DEEP))
    assert not works and reason == "inductor is broken: Python.h: no such file"
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert t.select_compiler(gpu, h.config(h.DEEP)) == (True, "inductor")
    disabled = h.config(h.DEEP, torch_compile_disable=True)
    assert t.select_compiler(gpu, disabled) == (False, "TORCH_COMPILE_DISABLE=1")
    assert t.select_compiler(torch.device("cpu"), h.config(h.DEEP)) == (False, "no CUDA")


@pytest.mark.slow
def test_compilations_of_a_whole_run_fit_the_limit():
    """Training phases, validations in every phase and the reloaded model: no limit is hit."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    c = h.config(h.DEEP, **h.SHALLOW)
    model, ids, val = h.random_model(c), h.ids((2, 17)), h.ids((3, 17), bos=())
    forward = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for phase in h.PHASES:  # warm-up
        model.set_phase(phase)
        forward(ids[:, :-1], ids[:, 1:]).mean().backward()
    for phase in h.PHASES:  # validation in any phase, post_ema
        model.set_phase(phase)
        with torch.inference_mode():
            forward(val[:, :-1], val[:, 1:])
    loaded = h.random_model(c)
    again = torch.compile(loaded, fullgraph=True, dynamic=False, backend=counter)
    with torch.inference_mode():
        again(val[:, :-1], val[:, 1:])
    assert counter.frame_count <= 9


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor_equals_eager():
    """The real compiler on the CPU: losses and gradients of all phases within rounding."""
    eager, compiled = h.compile_phases("inductor")
    for (a, ga), (b, gb) in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ga, gb, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("bits", [5, 6, 8])
def test_inductor_keeps_the_export_grid(bits):
    """Compiled fake quantization is the stored grid bit for bit: fp16 scales are not fused away."""
    weight = h.matrices((96, 64))[0]
    scales = t.row_scales(weight, bits)
    stored = t.round_to_grid(weight, scales, bits) * scales
    fake = t.Runtime.compile(SimpleNamespace(compiles=True),
                             lambda w: t.fake_quantize(w, bits))  # fmt: skip
    assert torch.equal(fake(weight), stored)


def test_weights_start_as_rank_0s(monkeypatch):
    """With several ranks every tensor is broadcast from rank 0; with one nothing is sent."""
    sent = []
    monkeypatch.setattr(t.dist, "broadcast", lambda tensor, src: sent.append((tensor, src)))
    weights = [torch.ones(2, requires_grad=True), torch.zeros(3, requires_grad=True)]
    h.runtime().broadcast(weights)
    assert not sent
    h.runtime(rank=1, world=2).broadcast(weights)
    assert [(x.data_ptr(), src) for x, src in sent] == [(w.data_ptr(), 0) for w in weights]


def test_matrices_are_dealt_by_cost():
    """Every item has one owner; loads differ by one item at most; the record's are even."""
    for seed in range(20):
        costs = np.random.default_rng(seed).integers(1, 9, 40).astype(float)
        for ranks in (1, 2, 3, 8):
            owners = np.array(t.deal(list(costs), ranks))
            loads = [costs[owners == rank].sum() for rank in range(ranks)]
            assert sum(loads) == costs.sum() and max(loads) - min(loads) <= max(costs)
    c, runtime = h.config(h.RECORD), h.runtime(device="meta")
    with torch.device("meta"):
        model = t.GPT(c, np.zeros(1254, bool), runtime)
    runtime.world = 8
    muon = t.Optimizer(model, c, runtime).muon
    assert {stack.owner for stack in muon.stacks} == set(range(8))
    matrices = [p for stack in muon.stacks for p in stack.params]
    assert muon.grads.numel() < 1.12 * sum(p.numel() for p in matrices)  # little padding


def test_momentum_is_copied_across_owners():
    """What a repeat's owner gets is the momentum that the base's owner has, bit for bit."""
    params, muons = h.muons_of(h.config(h.DEEP), 3, [])
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


def test_a_loss_spike_is_an_event(make_trainer):
    """With step, loss and the median it is measured by; ordinary losses are none."""
    trainer = make_trainer(iterations=16)
    backward = trainer.backward
    trainer.backward = lambda x, y: backward(x, y) * (2.0 if trainer.steps == 12 else 1.0)
    trainer.run()
    (spike,) = h.trainer_events(trainer, "spike")
    assert spike["step"] == 13 and spike["loss"] > t.SPIKE * spike["usual"]
    losses = h.trainer_losses(trainer)
    assert losses[12] == spike["loss"] and spike["usual"] == np.median(losses[:12])


def test_lr_scale():
    """Constant, then linear to MIN_LR, by steps or by the clock, whichever ends first."""
    c = h.config(h.PUBLISHED, iterations=1000, warmdown_iters=100, max_wallclock_seconds=0)
    for step, expected in ((0, 1), (500, 1), (900, 1), (925, 0.75), (950, 0.5), (1000, 0)):
        assert t.lr_scale(step, 9e9, 50.0, c) == pytest.approx(expected)
    assert t.lr_scale(950, 0, 0, replace(c, min_lr=0.1)) == pytest.approx(0.55)
    assert t.lr_scale(1000, 0, 0, replace(c, warmdown_iters=0)) == 1
    c = h.config(h.PUBLISHED, iterations=10**6)
    usable = 600_000 - t.CLOCK_RESERVE_MS
    assert t.lr_scale(10, 1e3, 0.0, c) == 1  # no step time known yet
    assert t.lr_scale(10, usable - 3500 * 100, 100.0, c) == pytest.approx(1)
    assert t.lr_scale(10, usable - 1750 * 100, 100.0, c) == pytest.approx(0.5)
    assert t.lr_scale(10, usable - 1750 * 100, 200.0, c) == pytest.approx(0.25)
    assert t.lr_scale(10, 601e3, 100.0, replace(c, min_lr=0.2)) == pytest.approx(0.2)
    c = h.config(h.PUBLISHED, iterations=1000, warmdown_iters=0.8)  # a share of the run
    for over, expected in ((0, 1), (0.2, 1), (0.4, 0.75), (0.6, 0.5), (1, 0)):
        for step, elapsed in ((1000 * over, 0), (0, usable * over), (100 * over, usable * over)):
            assert t.lr_scale(step, elapsed, 50.0, c) == pytest.approx(expected, abs=1e-9)
    assert t.lr_scale(600, 9e9, 0, replace(c, max_wallclock_seconds=0)) == pytest.approx(0.5)
    assert 0 < t.CLOCK_RESERVE_MS < 1000


def test_muon_taper():
    """Whole up to a share of the run, then linear to a part of it; that is what is applied."""
    c = h.config(h.RECORD, iterations=1000, max_wallclock_seconds=10.0)
    assert t.muon_taper(999, 9e9, c) == 1
    c, usable = replace(c, muon_wd_taper=(0.7, 0.5)), 10_000 - t.CLOCK_RESERVE_MS
    for over, expected in ((0, 1), (0.7, 1), (0.85, 0.75), (1, 0.5), (1.01, 0.5)):
        for step, elapsed in ((1000 * over, 0), (3, usable * over)):
            assert t.muon_taper(step, elapsed, c) == pytest.approx(expected), (step, elapsed)
    assert t.muon_taper(999, 0, replace(c, muon_wd_taper=(1.0, 0.0))) == 1
    assert t.muon_taper(500, 0, replace(c, muon_wd_taper=(0.0, 0.0))) == pytest.approx(0.5)
    moved = {}
    for wd, taper in ((0.0, 1.0), (0.5, 0.25)):
        c = h.config(h.DEEP, muon_wd=wd, matrix_lr=0.1)
        model = h.random_model(c)
        optimizer, weight = t.Optimizer(model, c, h.runtime()), model.blocks[0].attn.q.weight
        before = weight.detach().clone()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(torch.zeros(1), 0.8, 0.9, taper)
        moved[wd] = weight.detach() - before * (1 - 0.8 * 0.1 * wd * taper)
    torch.testing.assert_close(moved[0.5], moved[0.0])  # the update itself does not taper
    assert moved[0.0].abs().max() > 1e-3


def test_muon_momentum():
    """Linear from start to peak over the warm-up steps, then constant."""
    c = h.config(h.RECORD)
    for step, expected in ((0, 0.92), (750, 0.955), (1500, 0.99), (9999, 0.99)):
        assert t.muon_momentum(step, c) == pytest.approx(expected)
    assert t.muon_momentum(0, replace(c, muon_momentum_warmup_steps=0)) == 0.99


def test_recurrence_due():
    """A step, a share of steps or of time, from the first step, or never."""
    c = h.config(h.RECORD)
    assert [t.recurrence_due(s, 9e9, c) for s in (0, 2999, 3000, 3001)] == [0, 0, 1, 1]
    c = h.config(h.RECORD, recur_start_step=0.5, iterations=100, max_wallclock_seconds=0)
    assert [t.recurrence_due(s, 9e9, c) for s in (0, 49, 50)] == [False, False, True]
    c = replace(c, max_wallclock_seconds=10.0)
    half = (10_000 - t.CLOCK_RESERVE_MS) / 2  # of the time that training may take
    assert [t.recurrence_due(1, ms, c) for ms in (0, half - 1, half)] == [False, False, True]
    assert t.recurrence_due(50, 0, c)
    assert t.recurrence_due(0, 0, replace(c, recur_start_step=0.0))
    for never in (dict(recur_layers=()), dict(recur_passes=1)):
        assert not t.recurrence_due(99, 9e9, replace(c, recur_start_step=0.0, **never))


def test_repeats_untouched_without_gradients():
    """Before recurrence the optimizer moves every parameter except the repeats' MLPs."""
    c = h.config(h.DEEP, muon_wd=0.3)
    model = h.random_model(c, recur=False)
    optimizer = t.Optimizer(model, c, h.runtime())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = h.ids((4, 17))
    for _ in range(2):
        model.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).mean().backward()
        optimizer.step(torch.zeros(1), 1.0, 0.9)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("repeat_mlps"), name


def test_calibration_reads_on(make_trainer):
    """Hessians of the averaged weights, on the sequences after the last step; none for rtn."""
    trainer = make_trainer(iterations=3, recur_start_step=1.0, gptq_calibration_seqs=8)
    trainer.run()
    last = [p.clone() for p in trainer.params]
    weights, hessians = trainer.finish()
    assert weights == "ema" and len(hessians) == 6 * 6 + 2 * 2 + 1
    assert not any(torch.equal(old, new) for old, new in zip(last, trainer.params, strict=True)
                   if new.numel() > 1)
    (event,) = h.trainer_events(trainer, "calibration")
    assert event["train_ms"] == trainer.clock.elapsed_ms
    ids = np.stack([trainer.loader.sequence(4 * 3 + i)[:-1] for i in range(8)])
    want = t.input_hessians(trainer.model, (torch.from_numpy(ids.astype(np.int64)),),
                            trainer.runtime)
    for name in want:
        torch.testing.assert_close(hessians[name], want[name], rtol=1e-4, atol=1e-4)
    plain = make_trainer(max_wallclock_seconds=60.0, iterations=1, quant="rtn")
    plain.run()
    assert plain.reserve_ms == 0 and plain.finish() == ("ema", {})

# ------------------------------------------------------------------------------------- quantization
