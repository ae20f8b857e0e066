"""What only a GPU can show: `python -m pytest -m gpu tests/test_gpu.py`, some minutes on an H100.

The model is small, but its heads are of 64 dimensions as the record's and every feature is on. What
starts at zero is filled, so that every gradient is there to be compared.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import harness as h
import train_gpt as t

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine")]

V = 640
SMALL = h.RECORD | dict(
    num_layers=4, model_dim=256, num_heads=4, num_kv_heads=2, bigram_vocab_size=512, bigram_dim=64,
    ve_dim=64, ve_layers=(2, 3), xsa_last_n=2, parallel_start_layer=3, recur_layers=(1, 2),
    train_seq_len=512, eval_seq_len=512, train_batch_tokens=8192, val_batch_size=8192,
    iterations=12, warmup_steps=6, recur_start_step=4.0, warmdown_iters=8, late_qat_threshold=0.6,
    max_wallclock_seconds=0.0, val_loss_every=5, train_log_every=1, eval_stride=128,
    ttt_chunk_tokens=2048, gptq_calibration_seqs=8, n_int6_layers=2)
PHASES = [t.Phase(), t.Phase(recur=True), t.Phase(recur=True, qat=True)]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """A runtime on the GPU; its log is in a scratch folder."""
    folder, config = tmp_path_factory.mktemp("gpu"), t.Config(**SMALL)
    with contextlib.chdir(folder), contextlib.closing(t.Runtime(config)) as runtime:
        assert runtime.cuda and runtime.compiles, runtime.compiler
        yield runtime


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A folder with a train and a val shard of random ids, two of which follow each other often."""
    folder, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for split, count in (("train", 200_000), ("val", 9_000)):
        ids = random.integers(1, V, count).astype("<u2")
        ids[1::2] = ids[::2] % 50 + 1  # something to learn
        ids[::777] = 0
        h.write_shard(folder / f"fineweb_{split}_000000.bin", ids)
    np.savez(folder / "toy.meta.npz", base_bytes=np.full(V, 3), vocab_size=V,
             has_leading_space=np.zeros(V, bool), is_boundary_token=np.arange(V) == 0)
    return folder


def filled_model(runtime: t.Runtime, dtype: torch.dtype = torch.bfloat16) -> t.GPT:
    """The small model with every parameter away from zero, and the same values for every dtype."""
    torch.manual_seed(0)
    before, runtime.dtype = runtime.dtype, dtype
    model = t.GPT(t.Config(**SMALL), np.arange(V) == 0, runtime)
    runtime.dtype, noise = before, torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            width = p.size(-1) if name.endswith("weight") else 100
            p.add_((torch.randn(p.shape, generator=noise) / width**0.5).to(p.device))
    return model


def some_ids(rows: int = 16, length: int = 513) -> torch.Tensor:
    """Random ids with document starts."""
    ids = torch.randint(1, V, (rows, length), generator=torch.Generator().manual_seed(2))
    ids[:, length // 3] = 0
    return ids.cuda()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Distance of a from b over the norm of b."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def train_once(gpu: t.Runtime, phase: t.Phase, dtype: torch.dtype, compiled: bool) -> tuple:
    """Nats, and the gradients of their mean by name."""
    model = filled_model(gpu, dtype)
    model.set_phase(phase)
    forward, ids = gpu.compile(model) if compiled else model, some_ids()
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain if dtype == torch.float32 else contextlib.nullcontext():
        nats = forward(ids[:, :-1], ids[:, 1:])
        nats.mean().backward()
    return nats.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("phase", PHASES, ids=["off", "on", "on with QAT"])
def test_compiled_is_as_near_to_fp32_as_eager(gpu, phase):
    """Nats and the gradient of every parameter, in bf16, against eager fp32 without TF32."""
    fast, fast_grads = train_once(gpu, phase, torch.bfloat16, True)
    eager, eager_grads = train_once(gpu, phase, torch.bfloat16, False)
    torch.set_float32_matmul_precision("highest")
    exact, exact_grads = train_once(gpu, phase, torch.float32, False)
    torch.set_float32_matmul_precision("high")
    assert fast_grads.keys() == eager_grads.keys() == exact_grads.keys()
    assert abs(fast.mean() - exact.mean()) < 3e-3
    assert error(fast, exact) < min(2 * error(eager, exact), 0.02)
    whole = [torch.cat([g.flatten() for g in grads.values()])
             for grads in (fast_grads, eager_grads, exact_grads)]
    print(f"{phase}: nats {error(fast, exact):.2e} {error(eager, exact):.2e}, gradient "
          f"{error(whole[0], whole[2]):.2e} {error(whole[1], whole[2]):.2e} (compiled, eager)")
    assert error(whole[0], whole[2]) < 0.05
    for name, g in exact_grads.items():  # the last term is for scalars whose parts cancel
        most = 3 * (eager_grads[name] - g).norm() + 0.02 * g.norm() + 1e-4 * whole[2].norm()
        assert (fast_grads[name] - g).norm() < most, name


@pytest.mark.parametrize("rows", [98304, 8077, 1])
def test_mlp_kernel_is_the_mlp(gpu, rows):
    """Values and gradients at the record's widths, also where the last tile is not full."""
    def plain(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, slope: float) -> torch.Tensor:
        return torch.nn.functional.leaky_relu(x @ up.T, slope).square() @ down.T

    shapes, results = [(rows, 512), (1536, 512), (512, 1536), (rows, 512)], []
    *leaves, dy = (torch.randn(s, device="cuda") / s[1] ** 0.5 for s in shapes)
    for mlp in (lambda *inputs: t.fused_mlp(*inputs)[0], plain):
        inputs = [leaf.bfloat16().requires_grad_() for leaf in leaves]
        y = mlp(*inputs, 0.5)
        y.backward(dy.bfloat16())
        results.append([y, *(x.grad for x in inputs)])
    for got, wanted in zip(*results, strict=True):
        assert error(got, wanted) < 6e-3


def test_the_fastest_is_chosen_by_time(gpu):
    """The log has a time for each; what is chosen took the least."""
    for name in (gpu.attention_name, gpu.mlp_name):
        chosen, times = name.split()[0], dict(re.findall(r"(\w+) ([\d.]+) ms", name))
        assert len(times) >= 2, name
        assert float(times[chosen]) <= 1.06 * min(map(float, times.values())), name


@pytest.mark.parametrize("name", ["flash_attention_3", "cudnn", "flash", "mem_efficient"])
def test_attention_backends_agree_with_plain_fp32(gpu, name):
    """Outputs and gradients, at the record's head shape."""
    backends = dict(cudnn="CUDNN_ATTENTION", flash="FLASH_ATTENTION",
                    mem_efficient="EFFICIENT_ATTENTION")
    if name == "flash_attention_3":
        pytest.importorskip("flash_attn_interface", reason="FlashAttention-3 is not installed")
    *values, grad = (torch.randn(2, 2048, heads, 64, device="cuda") for heads in (8, 4, 4, 8))
    results = []
    for dtype, backend in ((torch.bfloat16, backends.get(name)), (torch.float32, "MATH")):
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in values)
        which = getattr(torch.nn.attention.SDPBackend, backend or "MATH")
        attend = t.sdpa if backend else t.flash_attention_3
        try:
            with torch.nn.attention.sdpa_kernel(which):
                y = attend(q, k, v)
        except RuntimeError as reason:  # mem_efficient has no grouped queries
            pytest.skip(f"{name}: {t.first_line(reason)}")
        y.backward(grad.to(dtype))
        results.append([y, q.grad, k.grad, v.grad])
    errors = [error(a, b) for a, b in zip(*results, strict=True)]
    print(name, " ".join(f"{e:.1e}" for e in errors))
    assert max(errors) < 0.02


@pytest.mark.parametrize("length", [2048, 2560])  # of flex's blocks 16, a power of two, and 20
@pytest.mark.parametrize("name", ["flash_attention_3", "flex", "cudnn", "mem_efficient", "math"])
def test_document_attention_agrees_with_plain_fp32(gpu, name, length):
    """Outputs and gradients of tokens that attend to their own document, at the record's heads.

    Mask and attention are compiled together, as a model's are: for training, and for scoring.
    """
    if name == "flash_attention_3":
        pytest.importorskip("flash_attn_interface", reason="FlashAttention-3 is not installed")
    *values, grad = (torch.randn(4, length, heads, 64, device="cuda") for heads in (8, 4, 4, 8))
    starts = torch.zeros(4, length, dtype=torch.bool, device="cuda")
    starts[:, 0] = starts[0, 700:710] = starts[1, [1, 1500, 2047]] = starts[2, 512] = True
    results, kernels = [], [getattr(torch.backends.cuda, f"{k}_sdp_enabled")()
                            for k in t.SDPA_KERNELS]
    for dtype, backend in ((torch.bfloat16, name), (torch.float32, "math")):
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in values)
        attend, mask = t.use_attention(backend)

        def attention(*qkv, attend=attend, mask=mask):
            return attend(*qkv, mask(starts))

        try:
            attention = torch.compile(attention) if attend is t.flex else attention
            y = attention(q, k, v)
            with torch.inference_mode():
                scored = attention(q, k, v)
        except RuntimeError as reason:  # a kernel that takes no mask, or no grouped queries
            pytest.skip(f"{name}: {t.first_line(reason)}")
        finally:
            for kernel, enabled in zip(t.SDPA_KERNELS, kernels, strict=True):
                getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(enabled)
        y.backward(grad.to(dtype))
        results.append([y, scored, q.grad, k.grad, v.grad])
    errors = [error(a, b) for a, b in zip(*results, strict=True)]
    print(name, "by document", length, " ".join(f"{e:.1e}" for e in errors))
    assert max(errors) < 0.02


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_compiled_qat_has_the_grid_of_the_export(gpu, bits):
    """Fake quantization under the compiler gives the very values of the export's rounding."""
    class Values(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = t.Linear(1536, 512).cuda()
            self.matrix.qat_bits, self.matrix.qat_step = bits, 0.4

        def forward(self) -> torch.Tensor:
            return self.matrix.values()

    module = Values()
    weight = module.matrix.weight.detach()
    scales = t.row_scales(weight, bits, 0.4)
    stored, compiled = t.round_to_grid(weight, scales, bits), gpu.compile(module)().detach()
    differ = (compiled - stored * scales).abs() > 1e-6 * scales
    rows = differ.float().mean(1)  # another order of summation moves a scale to the next fp16,
    print(f"INT{bits}: {differ.sum()} values in {(rows > 0).sum()} of {len(rows)} rows differ")
    assert (rows > 0.01).sum() <= 2 and differ.float().mean() < 4e-3  # and ties may round apart


def test_gptq_on_the_gpu_gives_the_codes_of_the_cpu(gpu):
    """All but one code in a thousand (ties of rounding)."""
    torch.manual_seed(3)
    weight, x = torch.randn(2, 256, 512), torch.randn(2, 4096, 512) * torch.rand(512).add(0.1)
    hessian, bits = x.mT @ x, torch.tensor([6.0, 5.0]).view(2, 1, 1)
    scales = torch.stack([t.row_scales(w, 5, 0.5) for w in weight])
    host = t.gptq(weight.clone(), hessian, scales, bits)
    device = t.gptq(*(part.cuda() for part in (weight, hessian, scales, bits))).cpu()
    assert (host != device).float().mean() < 1e-3


def test_later_tokens_change_no_score_before_them(gpu):
    """The compiled scoring pass is causal, bit for bit."""
    model, ids = filled_model(gpu), some_ids()
    model.set_phase(t.Phase(recur=True))
    forward, other = gpu.compile(model), ids.clone()
    other[:, 300:] = other[:, 300:].roll(1, 1)
    with torch.inference_mode():
        a, b = (forward(x[:, :-1], x[:, 1:]) for x in (ids, other))
    assert torch.equal(a[:, :298], b[:, :298]) and not torch.equal(a[:, 301:], b[:, 301:])


def test_steps_never_wait_for_the_gpu(gpu, shards, monkeypatch):
    """Launching a step makes no call that synchronises, in any phase."""
    c = t.Config(**SMALL | dict(data_path=str(shards)))
    table = t.load_byte_table(c)
    evaluator = t.Evaluator(gpu, c, t.load_validation(c, table))
    loader = t.Loader(t.find_shards(c, "train"), c, gpu, V)
    trainer = t.Trainer(t.GPT(c, table.is_boundary, gpu), loader, evaluator)
    launch, seen = trainer.train_step, []

    def watched(step: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if step not in (4, 8) else "default")
        try:  # a phase switches at those
            launch(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        seen.append(trainer.phase)

    monkeypatch.setattr(trainer, "train_step", watched)
    trainer.run()
    assert list(dict.fromkeys(seen)) == PHASES


@pytest.mark.parametrize("levers", [{}, h.LEVERS], ids=["off", "levers"])
def test_whole_run_and_its_artifact_in_another_process(gpu, shards, tmp_path, levers):
    """Every phase, export, scores; a second process scores alike, and TTT_LR=0 is sliding."""
    text = {k.upper(): t.show(v) for k, v in (SMALL | levers).items()} | dict(
        DATA_PATH=str(shards), ARTIFACT_PATH="a.ptz", SIZE_LIMIT="16000000")

    def run(run_id: str, **settings: str) -> dict[str, np.ndarray]:
        done = subprocess.run(
            [sys.executable, h.SCRIPT], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | text | dict(RUN_ID=run_id, SCORES_PATH=run_id) | settings)
        print(done.stdout[-3000:], done.stderr[-3000:])
        assert done.returncode == 0
        return {mode: np.load(tmp_path / run_id / f"{mode}.npz")["nats"]
                for mode in ("roundtrip", "sliding", "ttt")}

    first, (machine,) = run("first"), h.events(tmp_path, "machine", "first")
    text |= dict(ATTENTION=re.match(r"\w+", machine["attention"])[0],
                 MLP_KERNEL=machine["mlp"].split()[0])
    again = run("again", LOAD_ARTIFACT="a.ptz", TTT_LR="0")
    for mode in ("roundtrip", "sliding"):
        np.testing.assert_allclose(first[mode], again[mode], rtol=0, atol=2e-2)
        assert abs(first[mode].mean() - again[mode].mean()) < 1e-4
    assert np.array_equal(again["ttt"], again["sliding"])
    assert not np.array_equal(first["ttt"], first["sliding"])
    assert first["roundtrip"].mean() < np.log(V) - 0.3  # it has learned something
    adapters = dict(LOAD_ARTIFACT="a.ptz", TTT_KIND="document", TTT_LORA_RANK="8", TTT_LR="0.01",
                    TTT_LORA_LR="1e-3", TTT_GLOBAL_DOCS="5")
    documents, alone, plain, eager = (run(name, **(adapters | more))["ttt"] for name, more in dict(
        documents={}, alone=dict(TTT_DOC_BATCH="1"), plain=dict(TTT_LORA_LR="0"),
        eager=dict(TORCH_COMPILE_DISABLE="1", ATTENTION="mem_efficient")).items())
    for other in (alone, eager):  # bf16, and a step for each sign of a gradient
        assert abs(other.mean() - documents.mean()) < 0.02
    assert np.isfinite(documents).all() and np.abs(plain - documents).max() > 0.05
