"""Quantization: grids, bits, late QAT, GPTQ, the fit to SIZE_LIMIT."""

from __future__ import annotations

import math
import re
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import harness as h
import train_gpt as t

BITS = {"embed": 8, "attn": 6, "mlp": 5, "repeat": 6, "projection": 16, "vector": 32}


@pytest.mark.parametrize("columns", [1, 2, 3, 32, 700, 1999])
def test_row_quantiles_are_torch_quantiles(columns):
    """Without a full sort, for every candidate."""
    magnitudes = h.hard_rows(columns + 99)[:, 99 * (columns < 99) :][:, :columns].abs()
    quantiles = torch.tensor(t.QUANTILES, dtype=torch.float64)
    want = torch.quantile(magnitudes.double(), quantiles, dim=1).T.float()
    torch.testing.assert_close(t.row_quantiles(magnitudes), want, rtol=3e-5, atol=0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_row_scales_are_the_least_squares_candidates(bits):
    """Each row takes the quantile with the smallest error, as it will be stored: in fp16."""
    weight, largest = h.hard_rows(), 2 ** (bits - 1) - 1
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


def test_a_model_under_qat_is_the_reloaded_model(made):
    """Logits with fake quantization equal those of the weights restored from codes."""
    config = h.config()
    model, ids = h.random_model(config, seed=4), torch.from_numpy(h.stream(64, 3)).view(2, 32)
    plain = model.logits(ids)
    stored = t.quantize({n: p.detach() for n, p in model.named_parameters()}, config)
    model.set_phase(t.Phase(recur=True, qat=True))
    faked = model.logits(ids)
    assert not torch.equal(faked, plain)
    other = h.random_model(config, seed=5)
    codes = {n: s.restore() if s.bits <= 8 else model.state_dict()[n] for n, s in stored.items()}
    other.load_state_dict(codes)
    torch.testing.assert_close(other.logits(ids), faked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count, at6", [(0, ""), (2, "0 3"), (4, "0 1 2 3")])
def test_n_int6_layers(count, at6):
    """Half of them first, half last."""
    config = h.config(n_int6_layers=count)
    bits = {i: t.param_spec(f"blocks.{i}.mlp.up.weight", config).bits for i in range(4)}
    assert bits == {i: 6 if str(i) in at6.split() else 5 for i in range(4)}
    assert t.param_spec("repeat_mlps.0.up.weight", config).bits == 6


def test_class_bits():
    """Each class follows CLASS_BITS, all its tensors, and no other does."""
    names = {"embed": ("embed.weight", "value.table.weight"), "attn": ("blocks.1.attn.k.weight",),
             "mlp": ("blocks.0.mlp.up.weight", "blocks.1.mlp.down.weight"),
             "repeat": ("repeat_mlps.1.down.weight",), "projection": ("bigram.proj.weight",),
             "vector": ("blocks.0.resid_mix",)}
    plain = h.config(n_int6_layers=0)
    for kind in ("embed", "attn", "mlp", "repeat"):
        for bits in range(2, 9):
            config = replace(plain, class_bits=f"{kind}={bits}")
            for other, members in names.items():
                want = bits if other == kind else BITS[other]
                assert all(t.param_spec(n, config).bits == want for n in members)


def test_values_that_are_not_finite_are_not_exported():
    """The message names the tensor."""
    for bad in (math.nan, math.inf):
        with pytest.raises(t.RunError, match="embed.weight is not finite"):
            t.quantize({"embed.weight": torch.tensor([[1.0, bad]])}, h.config())


def test_param_table_bits():
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


def test_qat_bits_only_where_codes_are_stored():
    """Fake quantization touches each tensor stored as codes with its bits, and no other."""
    c = h.config(h.DEEP, tie_embeddings=False)
    model = h.random_model(c)
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
def test_straight_through(bits):
    """The value is on the grid, the gradient is the identity's; bits 0 is no operation."""
    (w,), (g,) = h.matrices((6, 40)), h.matrices((6, 40), seed=8)
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


def output_error(weight, codes, scales, x):
    """Squared error of the outputs on the inputs, one number for each matrix."""
    return (x @ (codes * scales - weight).mT).double().square().sum((1, 2))


def test_gptq_beats_rounding_at_equal_steps():
    """Less than half of the output error of plain rounding, on fresh inputs too."""
    weight, hessian, scales, bits, x = h.gptq_problem()
    codes, plain = t.gptq(weight, hessian, scales, bits), t.round_to_grid(weight, scales, 5)
    assert codes.abs().max() <= t.largest_code(5) and torch.equal(codes, codes.round())
    ratio = output_error(weight, codes, scales, x) / output_error(weight, plain, scales, x)
    assert ratio.max() < 0.5, ratio


@pytest.mark.parametrize("hessian", ["identity", "diagonal", "zero"])
def test_gptq_without_correlation_is_plain_rounding(hessian):
    """Nothing to make up for: independent inputs, and matrices that never ran."""
    weight, _, scales, bits, _ = h.gptq_problem()
    diagonal = {"identity": torch.ones(150), "zero": torch.zeros(150),
                "diagonal": torch.arange(150.0)}[hessian]
    codes = t.gptq(weight, torch.diag(diagonal).expand(2, -1, -1), scales, bits)
    assert torch.equal(codes, t.round_to_grid(weight, scales, 5))


def test_dead_inputs_and_rows_of_zeros():
    """A dead input's weights are rounded to the nearest, a row of zeros stays one."""
    weight, _, _, bits, x = h.gptq_problem()
    x[:, :, 7], weight[:, 3] = 0, 0
    scales = torch.stack([t.row_scales(w, 5, 0.4) for w in weight])
    codes = t.gptq(weight, x.mT @ x, scales, bits)
    assert torch.isfinite(codes).all() and not codes[:, 3].any()
    assert torch.equal(codes[..., 7], t.round_to_grid(weight, scales, 5)[..., 7])


def test_ranks_share_the_matrices():
    """What the ranks make adds up to what one makes, each matrix on one rank only."""
    c = h.config(h.DEEP)
    model = h.random_model(c)
    state = {n: p.detach() for n, p in model.named_parameters()}
    hessians = t.input_hessians(model, (h.ids((3, 16)),), h.runtime())
    whole = t.quantize(state, c, 0.4, hessians, h.runtime())
    parts = [t.quantize(state, c, 0.4, hessians, h.runtime(rank, 3)) for rank in range(3)]
    for name in hessians:
        made = [part[name].values.any() for part in parts]
        assert sum(made) == 1
        total = sum(part[name].values.astype(int) for part in parts)
        assert (total != whole[name].values).mean() < 2e-3
    plain = t.quantize(state, c, 0.4)
    differ = {n for n in state if not np.array_equal(plain[n].values, whole[n].values)}
    assert differ <= set(hessians) and len(differ) > len(hessians) // 2


def test_fixed_bits_are_honoured(fit_model, tmp_path):
    """CLASS_BITS and N_INT6_LAYERS stay under a limit that binds; auto goes to INT5 by itself."""
    c, model, hessians, code = fit_model
    loosest = h.export(model, c, tmp_path, hessians)[0] - code
    limit = code + loosest * 2 // 3
    for settings, names in (
            ({}, {"attn.int6", "mlp.int6", "repeat.int5", "embed.int8"}),
            (dict(n_int6_layers=2), {"attn.int6", "mlp.int5", "mlp.int6", "repeat.int6"}),
            (dict(class_bits="attn=4,repeat=6"), {"attn.int4", "repeat.int6"})):
        total, _, events = h.export(model, replace(c, size_limit=limit, **settings), tmp_path,
                                    hessians)
        streams = {values["name"] for kind, values in events if kind == "stream"}
        assert total <= limit and names <= streams, settings
    tight = replace(c, size_limit=limit, quant="rtn", n_int6_layers=2)
    with pytest.raises(t.RunError, match="over SIZE_LIMIT"):  # nothing to solve: over is over
        h.export(model, tight, tmp_path)


def test_the_log_measures_what_is_stored(fit_model, tmp_path):
    """Bits per weight, entropy, k and error of a class, from the file, by hand."""
    c, model, hessians, code = fit_model
    limit = code + 40_000
    _, _, events = h.export(model, replace(c, size_limit=limit), tmp_path, hessians)
    by_name = {values["name"]: values for kind, values in events if kind == "stream"}
    _, stored = t.read_artifact(str(tmp_path / "x.ptz"))
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


def test_late_qat_trains_on_the_coarse_grid():
    """At the coarseness that the run expects, QAT computes with the values of the export."""
    c = h.config(h.DEEP, n_int6_layers=None)
    model, other = h.random_model(c), h.random_model(c, seed=4)
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
        torch.testing.assert_close(model.logits(h.ids()), other.logits(h.ids()), atol=2e-5, rtol=0)


def test_the_run_expects_the_limit(made, tmp_path, monkeypatch):
    """Before training, the coarseness is the predictor's for SIZE_LIMIT."""
    seen = []
    monkeypatch.setattr(t.Trainer, "run", lambda self: seen.append(self.model.coarseness) or 1 / 0)
    code = Path(t.__file__).stat().st_size
    for room in (10**6, 30_000):
        c = h.config(data_path=str(made[1]), size_limit=code + room, n_int6_layers=None)
        with h.inside(tmp_path), pytest.raises(ZeroDivisionError):
            t.run(c)
    assert seen[0] == 0 < seen[1] < t.COARSEST
    model = t.GPT(c, h.table().is_boundary, h.runtime())
    predicted = sum(t.predicted_bytes(model, c, seen[1]).values())
    assert 0.99 * 30_000 < predicted <= 30_000


@pytest.mark.slow
def test_full_width_export(tmp_path, capsys):
    """30.3 million parameters, fitted by GPTQ: inside 16,000,000 bytes, 10 minutes and 6 GB."""
    code = textwrap.dedent(f"""
        import sys, time, resource, types
        sys.path[:0] = [{str(h.ROOT)!r}, {str(h.ROOT / 'tests')!r}]
        import numpy as np, torch, train_gpt as t, harness as h
        torch.set_num_threads(2)
        c = t.Config(artifact_path="full.ptz", train_seq_len=256, eval_seq_len=256)
        V = 1254
        runtime = h.runtime()
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
    done = h.python(["-c", code], tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print("", done.stdout)
    pattern = r"result total:(\S+) export:(\S+) load:(\S+) kib:(\S+)"
    total, exported, loaded, kib = map(float, re.search(pattern, done.stdout).groups())
    assert 16_000_000 - 100_000 <= total <= 16_000_000
    assert exported < 600 and loaded < 20 and kib < 6e6
    above = float(re.search(r"above_floor:(\S+)%", done.stdout)[1])
    assert above <= 0.3
