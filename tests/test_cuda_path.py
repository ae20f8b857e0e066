"""What only a GPU shows, on a CPU: dtypes, kernels, devices, memory, the host ahead of the device.

CUDA's answers are made up (`gpu`), its kernels and events are stubs, and bf16 is the CPU's own.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask

import harness as h
import references as ref
import train_gpt as t

KERNELS = t.SDPA_KERNELS
SETTLED = dict(  # nothing is left to be compiled or timed
    attention="math", mlp_kernel="torch", torch_compile_disable=True)


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> Iterator[types.SimpleNamespace]:
    """torch as if there were a GPU of `gib`: what is made on it is made on the CPU.

    `devices` are those that were made the current one.
    """
    gpu, ones = types.SimpleNamespace(gib=80, devices=[]), torch.ones
    for name, answer in dict(
            is_available=lambda: True, set_device=gpu.devices.append,
            get_device_name=lambda: "NVIDIA H100 80GB HBM3",
            get_device_properties=lambda _: types.SimpleNamespace(total_memory=gpu.gib << 30),
    ).items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch, "ones", lambda *shape, device=None, **how: ones(*shape, **how))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    with sdpa_kernel(SDPBackend.MATH):  # puts back which kernels PyTorch may use
        yield gpu


# --------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize(("cuda", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_cuda_computes_in_bf16_and_a_cpu_in_fp32(gpu, monkeypatch, cuda, dtype):
    """The dtype of a run and of what every layer passes on; the weights are fp32 on both."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    with contextlib.closing(t.Runtime(h.config(**SETTLED))) as runtime:
        assert (runtime.cuda, runtime.dtype) == (cuda, dtype)
    runtime.device, seen = torch.device("cpu"), set()
    model = t.GPT(h.config(), h.table().is_boundary, runtime)
    for module in model.modules():
        if isinstance(module, (t.Linear, t.Table, t.MLP, t.SmearGate)):
            module.register_forward_hook(lambda _, inputs, out: seen.add(out.dtype))
    model(h.ids(), h.ids())
    assert seen == {dtype} and {p.dtype for p in model.parameters()} == {torch.float32}


def test_softcap_and_loss_are_computed_in_fp32():
    """From the head's bf16 on, both are as near to float64 as fp32 is."""
    runtime, ids = h.runtime(), h.ids(bos=())
    runtime.dtype = torch.bfloat16
    model = t.GPT(h.config(h.DEEP, logit_softcap=5.0), h.table().is_boundary, runtime)
    h.randomize(model)
    states = 16 * torch.eye(32, dtype=torch.bfloat16).view(2, 16, 32)  # products are exact
    model.hidden = lambda _: states
    z = 16 * model.embed.weight.detach().bfloat16().double().T.view(2, 16, h.VOCAB)
    wanted = 5 * torch.tanh(z / 5)
    assert z.abs().max() > 10 and (wanted.bfloat16() - wanted).abs().max() > 5e-3
    nats = F.cross_entropy(wanted.flatten(0, 1), ids.flatten(), reduction="none").view(2, 16)
    for got, exact in ((model.logits(ids), wanted), (model(ids, ids), nats)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------- kernels


NAMED = [(name, documents, asked) for name in t.ATTENTIONS for documents in (False, True)
         for asked in (True, False) if name != ("flash" if documents else "flex")
         and (name, asked) != ("flex", False)]  # it is not chosen where nothing is compiled


def watch_attention(monkeypatch, documents: bool) -> list[str]:
    """The reference in the place of every kernel; the list gets the name of each that is called.

    Each must be called as its documents, or the lack of them, ask for.
    """
    called = []

    def attention(kernel, q, k, v):
        called.append(kernel)
        return ref.softmax_attention(q, k, v)

    def flash_attn_func(q, k, v, causal):
        assert causal and not documents
        return attention("flash_attention_3", q, k, v)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, causal, **_):
        assert causal and documents and cu_seqlens_q.dtype == torch.int32
        return attention("flash_attention_3", q[None], k[None], v[None])[0]

    def flex_attention(q, k, v, block_mask, enable_gqa):
        assert documents and enable_gqa and isinstance(block_mask, BlockMask)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attention("flex", q, k, v).transpose(1, 2)

    def scaled_dot_product_attention(q, k, v, mask, is_causal, enable_gqa):
        assert is_causal != documents and (mask is not None) == documents
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attention("+".join(kernel for kernel in KERNELS if getattr(
            torch.backends.cuda, f"{kernel}_sdp_enabled")()), q, k, v).transpose(1, 2)

    stub = types.SimpleNamespace(flash_attn_func=flash_attn_func,
                                 flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", stub)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "flex_attention", flex_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled_dot_product_attention)
    return called


@pytest.mark.parametrize("name, documents, asked", NAMED)
def test_the_attention_that_is_named_is_called(gpu, monkeypatch, name, documents, asked):
    """What the log names is what runs in the model, and what was timed under that name.

    Asked for by ATTENTION, or chosen because no other one works. With DOC_ATTENTION each is given
    a mask of its kind, which the log names too.
    """
    called = watch_attention(monkeypatch, documents)
    masks = dict(flash_attention_3="document_bounds", flex="block_mask")

    def device_ms(work):
        called.clear()
        work()
        assert called == [name]  # an error means that it does not work
        return 1.0

    monkeypatch.setattr(t, "device_ms", device_ms)
    c = h.config(**SETTLED | dict(attention=name if asked else "auto", run_id="k",
                                  doc_attention=documents))
    with contextlib.closing(t.Runtime(c)) as runtime:
        t.log_start(runtime, c, t.Validation(np.zeros(2, np.uint16), np.ones(1), "exact", ""),
                    h.table())
    (machine,), called[:] = h.events(Path(), "machine"), []
    why = "as ATTENTION says" if asked else f"{name} 1.00 ms"
    kind = f", {masks.get(name, 'dense_mask')}" * documents
    assert machine["attention"].startswith(f"{name}{kind} (") and why in machine["attention"]
    assert machine["dtype"] == str(runtime.dtype)
    runtime.device = torch.device("cpu")
    t.GPT(c, h.table().is_boundary, runtime)(h.ids(), h.ids())
    assert called == [name] * c.num_layers


def test_flex_is_compiled_for_what_runs_eagerly(gpu, monkeypatch):
    """GPTQ's hooks need a model that is not compiled; FlexAttention alone is, in it."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(f) or f)
    monkeypatch.setattr(t, "select_compiler", lambda *_: (True, "inductor"))
    for name, wanted in (("flex", [t.flex]), ("cudnn", [])):
        c = h.config(mlp_kernel="torch", attention=name, doc_attention=True, run_id=name)
        compiled.clear()
        t.Runtime(c).close()
        assert compiled == wanted


def test_select_attention_on_cpu():
    """Without CUDA the choice is sdpa, and the log's name says why."""
    assert t.select_attention(h.runtime(), h.config(), 8) == ("sdpa", "no CUDA")
    assert t.use_attention("sdpa") == (t.sdpa, t.dense_mask)


def test_the_fastest_kernels_are_chosen(monkeypatch):
    """Of those that work the one with the least time; the log's text has every time and reason."""
    missing, c = ImportError("no FA3\nmore"), h.config()
    chosen = functools.partial(h.choices, monkeypatch, c)
    assert chosen([missing, 2.3, 3.6], [1.8, 1.5]) == (
        "cudnn", "flash_attention_3: no FA3; cudnn 2.30 ms; flash 3.60 ms",
        "triton", "torch 1.80 ms; triton 1.50 ms")
    assert chosen([2.0, 2.5, 1.5], [1.8, 1.9])[::2] == ("flash", "torch")
    assert chosen([2.0, 1.92, 1.95], [1.8, 1.72])[::2] == ("flash_attention_3", "torch")  # noise
    assert chosen([missing] * 3 + [9.0], [1.8, RuntimeError("sm_80")]) == (
        "mem_efficient", "flash_attention_3: no FA3; cudnn: no FA3; flash: no FA3; "
        "mem_efficient 9.00 ms", "torch", "torch 1.80 ms; triton: sm_80")
    with pytest.raises(t.RunError, match="no attention works on this GPU: .*; math: no FA3"):
        chosen([missing] * 5, [])
    chosen = functools.partial(h.choices, monkeypatch, h.config(doc_attention=True))
    assert chosen([missing, 2.3], [1.8, 1.5], compiles=True)[:2] == (
        "flex", "flash_attention_3: no FA3; flex 2.30 ms")  # a dense mask is not even tried
    assert chosen([1.5, 2.3], [1.8, 1.5], compiles=True)[0] == "flash_attention_3"
    assert chosen([missing, 9.0], [1.8, 1.5])[:2] == (
        "cudnn", "flash_attention_3: no FA3; flex: nothing is compiled; cudnn 9.00 ms")


@pytest.mark.parametrize("as_tuple", [False, True])
def test_flash_attention_3_dispatch(monkeypatch, as_tuple):
    """Dispatch only, the kernel is not executed: a stub module is called, causally."""
    calls = []

    def flash_attn_func(q, k, v, causal=False):
        calls.append(causal)
        out = ref.softmax_attention(q, k, v)
        return (out, None) if as_tuple else out

    stub = types.ModuleType("flash_attn_interface")
    stub.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", stub)
    q, k, v = h.matrices((2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8))
    torch.testing.assert_close(t.flash_attention_3(q, k, v), t.sdpa(q, k, v), atol=1e-5, rtol=0)
    assert calls == [True]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(ImportError):
        t.flash_attention_3(q, k, v)


def test_only_training_goes_by_the_mlp_kernel(monkeypatch):
    """Without gradients, as in scores and GPTQ's hooks, PyTorch's operations; in bf16 only."""
    monkeypatch.setattr(t, "fused_mlp", lambda x, up, down, slope: [x @ up.T @ down.T])
    runtime = h.runtime()
    runtime.fused_mlp, runtime.dtype = True, torch.bfloat16
    model = t.GPT(h.config(h.DEEP), h.table().is_boundary, runtime)
    mlp, (x,) = model.blocks[0].mlp, h.matrices((2, 5, 32))
    torch.nn.init.normal_(mlp.down.weight)
    seen, scale = [], torch.ones(32)
    mlp.down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    linear = mlp(x, scale)
    assert not seen and all(m.fused for m in model.modules() if isinstance(m, t.MLP))
    with torch.no_grad():
        squared = mlp(x, scale)
    assert len(seen) == 1 and not torch.allclose(linear, squared)
    runtime.dtype = torch.float32
    assert not t.GPT(h.config(h.DEEP), h.table().is_boundary, runtime).blocks[0].mlp.fused


# ----------------------------------------------------------------- devices, memory, clock


def test_a_rank_computes_on_the_gpu_of_its_local_rank(gpu, monkeypatch):
    """Rank 5 of two nodes with 4 GPUs each: the second of those that its node may use."""
    variables = dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4",
                     CUDA_VISIBLE_DEVICES="4,5,6,7")
    for name, value in (h.environ(**SETTLED) | variables).items():
        monkeypatch.setenv(name, value)
    groups, made = [], []
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(dist.HashStore(), 0, 8)]))
    monkeypatch.setattr(dist, "init_process_group", lambda kind, **how: groups.append((kind, how)))
    monkeypatch.setattr(t.Runtime, "on_first_rank", lambda _, work: work())
    monkeypatch.setattr(t, "run", lambda c: made.append(t.Runtime(c)))
    assert t.main([]) == 0
    (runtime,), ((kind, how),) = made, groups
    runtime.close()
    visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    for device in (runtime.device, how["device_id"], *map(torch.device, gpu.devices)):
        assert device.type == "cuda" and visible[device.index] == "5"
    assert len(gpu.devices) == 1 and kind == "nccl"
    assert (runtime.rank, runtime.world) == (how["rank"], how["world_size"]) == (5, 8)
    assert (runtime.local_rank, runtime.local_world) == (1, 4)


def test_micro_batches_fit_the_memory_of_a_gpu(gpu):
    """A rank's step goes at once on 80 GB; on less memory, or wider, in the parts that fit."""
    def parts(gib: int, width: int = 512, seqs: int = 48, **settings) -> int:
        gpu.gib, runtime = gib, h.runtime()
        runtime.cuda = True
        c = h.config(model_dim=width, train_seq_len=2048, train_batch_tokens=786432, **settings)
        return t.micro_batch_seqs(seqs, c, runtime)

    assert [parts(gib) for gib in (80, 40, 24, 16, 8, 1)] == [48, 24, 16, 8, 4, 1]
    assert [parts(gib, 1024) for gib in (80, 40, 24)] == [24, 12, 8]
    assert parts(80, seqs=384) == parts(141, seqs=384) == 48  # more than that gains nothing
    assert parts(24, seqs=7) == 7 and parts(24, seqs=17) == 1
    assert parts(24, micro_batch_tokens=49152) == 24  # as asked


class Late:
    """An event of a device that finishes nothing before somebody waits for it.

    What the device then gives to the host is not there until then.
    """

    def __init__(self, before: list[Late]) -> None:
        self.done, self.before, self.give = False, [*before], lambda: None
        before.append(self)

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        for event in [e for e in [*self.before, self] if not e.done]:
            event.done = True
            event.give()

    def elapsed_time(self, later: Late) -> float:
        assert self.done and later.done
        return 1.0


def test_two_steps_at_most_are_in_flight(gpu, make_trainer, monkeypatch):
    """And two are: the host never runs away from the device, nor does the device wait for it."""
    trainer, events, ends, ahead = make_trainer(**h.SHALLOW, val_loss_every=4), [], [], []
    runtime, launch = trainer.runtime, t.Trainer.train_step
    trainer.evaluator.runtime = copy.copy(runtime)
    trainer.evaluator.runtime.cuda = True  # so much ahead as on CUDA
    trainer.__init__(trainer.model, trainer.loader, trainer.evaluator)
    trainer.runtime = trainer.clock.runtime = trainer.evaluator.runtime = runtime
    runtime.event, runtime.synchronize = lambda: Late(events), lambda: events[-1].synchronize()

    def train_step(step: int) -> None:
        launch(trainer, step)
        ends.append(events[-1])
        ahead.append(sum(not end.done for end in ends))
        host = trainer.unread[-1][2]
        ends[-1].give = functools.partial(host.copy_, host.clone())
        host.fill_(torch.nan)

    monkeypatch.setattr(trainer, "train_step", train_step)
    trainer.run()
    assert ahead == [1, 2, 2, 2, 1, 2, 2, 2]  # a validation has waited
