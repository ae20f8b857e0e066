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


def test_row_quantiles_are_torch_quantiles():
    """Without a full sort, for every candidate."""
    quantiles = torch.tensor(t.QUANTILES, dtype=torch.float64)
    for columns in (1, 2, 3, 32, 700, 1999):
        magnitudes = h.hard_rows(columns + 99)[:, 99 * (columns < 99) :][:, :columns].abs()
        want = torch.quantile(magnitudes.double(), quantiles, dim=1).T.float()
        torch.testing.assert_close(t.row_quantiles(magnitudes), want, rtol=3e-5, atol=0)


def test_row_scales_are_the_least_squares_candidates():
    """Each row takes the quantile with the smallest error in fp16, or a given step of its own."""
    weight = h.hard_rows()
    for bits in range(2, 9):
        largest, best = 2 ** (bits - 1) - 1, np.full(len(weight), np.inf)
        assert largest == t.largest_code(bits)
        scales = t.row_scales(weight, bits)
        assert torch.equal(scales, scales.half().float()) and (scales > 0).all()
        for q in (1.0, 0.99999, 0.9999, 0.9995, 0.999):
            clip = np.quantile(weight.abs().double().numpy(), q, axis=1)
            step = np.maximum(clip / largest, 2.0**-24).astype(np.float16).astype(np.float64)
            codes = np.clip(np.round(weight.double().numpy() / step[:, None]), -largest, largest)
            best = np.minimum(best, ((codes * step[:, None] - weight.double().numpy()) ** 2).sum(1))
        have = (t.round_to_grid(weight, scales, bits) * scales - weight).double().square().sum(1)
        np.testing.assert_allclose(have.numpy(), best, rtol=1e-3, atol=1e-30)
        assert torch.equal(t.round_to_grid(weight, scales, bits)[6], torch.zeros(700))
        wider = (0.3 * weight.std(1, correction=0, keepdim=True)).half().float()
        assert torch.equal(t.row_scales(weight, bits, 0.3), scales.maximum(wider))


def test_settings_change_the_bits_of_what_they_name():
    """N_INT6_LAYERS: MLPs of the first half and the last, auto: all; CLASS_BITS: one class."""
    def bits(**settings):
        c = h.config(h.DEEP, **settings)
        return {n: t.param_spec(n, c).bits for n, _ in model.named_parameters()}

    def changed(pattern, to):
        return {n: to if re.fullmatch(pattern, n) else old for n, old in plain.items()}

    model = h.random_model(h.config(h.DEEP, tie_embeddings=False))
    plain = bits(n_int6_layers=0)
    for count, at6 in ((2, "05"), (4, "0145"), (6, "012345"), (None, "012345")):
        assert bits(n_int6_layers=count) == changed(rf"blocks\.[{at6}]\.mlp\.\w+\.weight", 6)
    for kind, pattern in dict(
            embed=r"(embed|head|\w+\.table)\.weight", attn=r"blocks\.\d\.attn\.(q|k|v|out)\.weight",
            mlp=r"blocks\.\d\.mlp\.(up|down)\.weight", repeat=r"repeat.*\.weight").items():
        for to in range(2, 9):
            assert bits(n_int6_layers=0, class_bits=f"{kind}={to}") == changed(pattern, to)


def test_qat_computes_with_what_is_stored():
    """At the run's coarseness; what is not stored as codes, and all without QAT, is as it is."""
    c = h.config(h.DEEP, n_int6_layers=None, tie_embeddings=False)
    model = h.random_model(c)
    state = {n: p.detach() for n, p in model.named_parameters()}
    for model.coarseness, bits in ((0.0, 6), (0.5, 5)):
        stored = t.quantize(state, c, model.coarseness)
        assert {s.bits for s in stored.values() if s.kind == "repeat"} == {bits}
        for qat in (True, False):
            model.set_phase(t.Phase(recur=True, qat=qat))
            for name, module in model.named_modules():
                if isinstance(module, t.Matrix):
                    codes = stored[f"{name}.weight"]
                    want = codes.restore() if qat and codes.bits <= 8 else module.weight
                    assert torch.equal(module.values(), want), (name, qat)


def test_values_that_are_not_finite_are_not_exported():
    """The message names the tensor."""
    for bad in (math.nan, math.inf):
        with pytest.raises(t.RunError, match="embed.weight is not finite"):
            t.quantize({"embed.weight": torch.tensor([[1.0, bad]])}, h.config())


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


def test_gptq_without_correlation_is_plain_rounding():
    """Nothing to make up for: independent inputs, and matrices that never ran."""
    weight, _, scales, bits, _ = h.gptq_problem()
    for diagonal in (torch.ones(150), torch.arange(150.0), torch.zeros(150)):
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


@pytest.mark.slow
def test_fixed_bits_are_honoured(fit_model, tmp_path):
    """CLASS_BITS and N_INT6_LAYERS stay under a limit that binds; auto goes to INT5 by itself."""
    c, model, hessians, code = fit_model
    with torch.no_grad():
        limit = code + int(t.sampled_bytes(dict(model.named_parameters()), c, 0.0) * 2 / 3)
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


@pytest.mark.slow
def test_the_log_measures_what_is_stored(fit_model, tmp_path):
    """Bits per weight and error of a class, from the file, by hand."""
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
@pytest.mark.parametrize("preset, vocab, compressor", [
    ("record", 1254, "auto"), *(("frontier", vocab, "rans") for vocab in (1024, 1254, 8192))])
def test_full_width_export(preset, vocab, compressor, tmp_path, capsys):
    """27 to 37 million parameters, fitted by GPTQ: inside 16,000,000 bytes and 6 GB."""
    code = textwrap.dedent(f"""
        import sys, time, resource, types
        sys.path[:0] = [{str(h.ROOT)!r}, {str(h.ROOT / 'tests')!r}]
        import numpy as np, torch, train_gpt as t, harness as h
        torch.set_num_threads(2)
        c = h.config(h.RECORD | t.PRESETS["{preset}"] | dict(
            artifact_path="full.ptz", train_seq_len=256, eval_seq_len=256,
            compressor="{compressor}"))
        V = {vocab}
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
    total, kib = map(int, re.search(r"result total:(\d+) .* kib:(\d+)", done.stdout).groups())
    assert 16_000_000 - 100_000 <= total <= 16_000_000 and kib < 6e6
    above = float(re.search(r"above_floor:(\S+)%", done.stdout)[1])
    assert above <= 0.3
