"""The artifact: its streams and codecs, what is refused, the limit of its size."""

from __future__ import annotations

import os
import types
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

import harness as h
import train_gpt as t


def test_auto_is_the_smallest_stream_by_stream(tmp_path):
    """No codec alone beats auto in any stream; sizes are those of the file."""
    _, stored = h.artifact(tmp_path / "x.ptz")
    auto = t.pack_streams(stored, "auto")
    for codec in h.codecs():
        for best, other in zip(auto, t.pack_streams(stored, codec), strict=True):
            assert best.name == other.name and len(best.data) <= len(other.data)
    assert len({t.smallest(raw, "auto")[0] for raw in (
        bytes(5000), np.random.default_rng(0).normal(0, 5, 20000).astype("i1").tobytes())}) == 2


def test_sizes_stay_near_the_floor():
    """Gaussian codes at full row width: at most 0.3 % above their entropy."""
    random = torch.Generator().manual_seed(0)
    state = {f"blocks.{i}.mlp.up.weight": torch.randn(512, 512, generator=random) for i in (1, 2)}
    streams = t.pack_streams(t.quantize(state, h.config()), "auto")
    assert {s.name for s in streams} == {"mlp.int5", "scales"}
    size, floor = sum(len(s.data) for s in streams), sum(s.floor for s in streams)
    assert floor <= size * 1.01 and size <= 1.003 * floor


def test_a_truncated_or_longer_artifact_is_damage(small_artifact, tmp_path):
    """At every length of the head, at 60 others, and with bytes appended."""
    data, path = small_artifact.read_bytes(), tmp_path / "cut.ptz"
    for size in [*range(30), *np.linspace(30, len(data) - 1, 60).astype(int)]:
        path.write_bytes(data[:size])
        h.refused(path, lambda: t.read_artifact(str(path)))
    path.write_bytes(data + b"\0")
    h.refused(path, lambda: t.read_artifact(str(path)))
    h.refused(tmp_path / "none.ptz", lambda: t.read_artifact(str(tmp_path / "none.ptz")))
    h.refused(tmp_path, lambda: t.read_artifact(str(tmp_path)))


def test_foreign_files_are_refused(small_artifact, tmp_path):
    """Wrong magic, another format, another script's pickle."""
    path = tmp_path / "foreign.ptz"
    torch.save({"a": 1}, path)
    assert "not an artifact of this script" in h.refused(path, lambda: t.read_artifact(str(path)))
    header, body = h.parts(small_artifact)
    h.forge(path, header, body)
    t.read_artifact(str(path))  # a forger who changes nothing is not noticed
    for magic in (b"PROTEUS 1\n", b"PROTEUS 4\n", b"PROTEUS\nxy"):
        path.write_bytes(magic + small_artifact.read_bytes()[10:])
        message = h.refused(path, lambda: t.read_artifact(str(path)))
        assert f"begins with {magic}, not {b'PROTEUS 3' + bytes([10])}" in message


def changed(where, value):
    """A change of one place in a header, such as ('tensors', 0, 3, 0)."""
    def change(header):
        for key in where[:-1]:
            header = header[key]
        header[where[-1]] = value
    return change


TAMPERED = [
    (("tensors", 0, 3, 0), 7), (("tensors", 0, 3, 0), 0), (("tensors", 0, 3, 0), -300),
    (("tensors", 0, 3, 0), 2**23), (("tensors", 0, 3, 0), 10**18), (("tensors", 0, 3, 0), 3.5),
    (("tensors", 0, 3, 0), "300"), (("tensors", 0, 3, 0), None), (("tensors", 0, 3, 0), [300]),
    (("tensors", 0, 3), [300]), (("tensors", 0, 3), []), (("tensors", 0, 3), 300),
    (("tensors", 0, 3), [300, 4, 4]), (("tensors", 0, 3), [600, 8]), (("tensors", 0, 3), [16, 300]),
    (("tensors", 0, 2), 5), (("tensors", 0, 2), 9), (("tensors", 0, 2), 16), (("tensors", 0, 2), 0),
    (("tensors", 0, 2), -1), (("tensors", 0, 2), "8"), (("tensors", 0, 2), None),
    (("tensors", 0, 2), 4.0), (("tensors", 0, 1), "attn"), (("tensors", 0, 1), "scales"),
    (("tensors", 0, 1), None), (("tensors", 0, 0), "blocks.0.attn.q.weight"),
    (("tensors", 0, 0), None), (("tensors", 0, 0), ["x"]), (("tensors", 0, 0), "unknown"),
    (("tensors", 0), []), (("tensors", 0), None), (("tensors",), []), (("tensors",), {}),
    (("tensors",), None), (("tensors",), 3), (("streams",), []), (("streams",), None),
    (("streams", 0), []), (("streams", 0), None), (("streams", 0, 0), "x"),
    (("streams", 0, 1), "lzma"), (("streams", 0, 1), "brotli"), (("streams", 0, 1), None),
    (("streams", 0, 1), ["zlib"]), (("streams", 0, 2), 1), (("streams", 0, 2), -1),
    (("streams", 0, 2), 10**18), (("streams", 0, 2), "5"), (("streams", 0, 2), 2.5),
    (("streams", 0, 3), 0), (("streams", 0, 3), None), (("streams", 0, 3), -1),
    (("streams", 0, 3), 2**40), (("streams", 0, 3), "9"), (("streams", 0, 3), 2.5),
    (("streams", 0, 3), 1), (("streams", 0, 4), 0), (("streams", 0, 4), None),
    (("tensors", 0, 3, 0), 2**70), (("model",), None), (("model",), []),
    (("model",), {}), (("model", "NUM_LAYERS"), 3), (("model", "NUM_LAYERS"), 0),
    (("model", "NUM_LAYERS"), -2), (("model", "NUM_LAYERS"), 4), (("model", "NUM_LAYERS"), 2.5),
    (("model", "MODEL_DIM"), 2**21), (("model", "MODEL_DIM"), 0), (("model", "MODEL_DIM"), 24),
    (("model", "MODEL_DIM"), -16), (("model", "NUM_HEADS"), 0), (("model", "NUM_HEADS"), None),
    (("model", "NUM_KV_HEADS"), 0), (("model", "MLP_MULT"), 1e300), (("model", "MLP_MULT"), "x"),
    (("model", "MLP_MULT"), None), (("model", "MLP_MULT"), -1.0), (("model", "ROPE_BASE"), "x"),
    (("model", "ROPE_BASE"), 0), (("model", "ROPE_DIMS"), -4), (("model", "LOGIT_SOFTCAP"), "x"),
    (("model", "LOGIT_SOFTCAP"), 0), (("model", "LOGIT_SOFTCAP"), None),
    (("model", "ACTIVATION_NEG_SLOPE"), "x"), (("model", "TIE_EMBEDDINGS"), False),
    (("model", "BIGRAM_VOCAB_SIZE"), 10**12), (("model", "BIGRAM_VOCAB_SIZE"), -3),
    (("model", "BIGRAM_DIM"), 10**12), (("model", "VE_DIM"), "x"), (("model", "VE_LAYERS"), [0, 1]),
    (("model", "VE_LAYERS"), ["x"]), (("model", "VE_LAYERS"), [9]), (("model", "XSA_LAST_N"), "x"),
    (("model", "PARALLEL_START_LAYER"), 9), (("model", "PARALLEL_START_LAYER"), "x"),
    (("model", "RECUR_LAYERS"), [5]), (("model", "RECUR_LAYERS"), [0, 1]),
    (("model", "ARTIFACT_PATH"), "/etc/passwd"), (("model", "NO_SUCH"), 1),
    (("vocab_size",), 299), (("vocab_size",), None), (("vocab_sha256",), "6" * 64),
]  # fmt: skip


TAMPERED += [  # the same as texts, which is how a header states the model's settings
    (where, t.show(tuple(value) if isinstance(value, list) else value))
    for where, value in TAMPERED if where[0] == "model" and len(where) == 2
]


@pytest.mark.parametrize("where, value", TAMPERED, ids=str)
def test_a_tampered_header_is_refused(where, value, small_artifact, tmp_path):
    """With the digest recomputed: only ArtifactError, whatever the header claims."""
    path = tmp_path / "tampered.ptz"
    header, body = h.parts(small_artifact)
    changed(where, value)(header)
    h.forge(path, header, body)
    validation = types.SimpleNamespace(vocab_sha256="5" * 64)
    h.refused(path, lambda: t.load_model(str(path), validation, h.table(), h.runtime(), h.config()))


@pytest.mark.parametrize("text", [b"", b"[]", b"7", b"null", b"{}", b"{", b"\xff\xfe", b"NaN",
                                  b"[" * 200000, b'{"a":' * 200000, b" " * (1 << 25)],
                         ids=lambda text: repr(text[:6]))  # fmt: skip
def test_a_header_that_is_no_header_is_refused(text, tmp_path):
    """Not JSON, not an object, nested without end, or a decompression bomb."""
    path = tmp_path / "forged.ptz"
    h.forge(path, text, b"")
    h.refused(path, lambda: t.read_artifact(str(path)))


@pytest.mark.parametrize("codec", ["rans", "lzma", "zlib", "zstd"])
def test_streams_that_do_not_decompress_are_refused(codec, tmp_path):
    """Garbage, and streams that end early."""
    if codec not in h.codecs():
        pytest.skip(f"{codec} is not installed")
    path, raw = tmp_path / "forged.ptz", bytes(range(100)) * 3
    for data in (b"", b"garbage" * 9, t.coder(codec)[0](raw[:-1]),
                 t.coder(codec)[0](raw)[:-9]):
        header = dict(model={}, vocab_size=h.VOCAB, vocab_sha256="",
                      tensors=[["w", "v", 32, [75]]],
                      streams=[["v.fp32", codec, len(data), 300, zlib.crc32(data)]])
        h.forge(path, header, data)
        assert "SHA-256" not in h.refused(path, lambda: t.read_artifact(str(path)))
    assert t.decompress(t.coder(codec)[0](raw), codec, 300) == raw
    with pytest.raises(t.ArtifactError):
        t.decompress(b"", "rot13", 4)


@pytest.mark.parametrize("broken", ["fsync", "replace", "open"])
def test_writing_is_atomic(broken, tmp_path, monkeypatch):
    """A failure at any point leaves the old file, no temporary one, and names the path."""
    path = tmp_path / "new" / "x.ptz"
    t.write_atomic(path, b"old")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if broken == "open":
            patch.setattr("builtins.open", fail)
        else:
            patch.setattr(os, broken, fail)
        with pytest.raises(t.RunError, match=r"cannot write .*x\.ptz: No space left on device"):
            t.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["x.ptz"]
    t.write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in path.parent.iterdir()] == ["x.ptz"]


def test_load_model_restores_what_was_stored(tmp_path):
    """Names, values and recurrence; the reloaded weights quantize to the same codes."""
    config, stored = h.artifact(tmp_path / "x.ptz")
    validation = types.SimpleNamespace(vocab_sha256="5" * 64)
    other = t.Config()  # the artifact's shape wins over the settings of the run
    model = t.load_model(str(tmp_path / "x.ptz"), validation, h.table(), h.runtime(), replace(
        other, train_seq_len=32, eval_seq_len=32, eval_stride=32))
    assert model.recur and model.config.model_dim == 32
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name].restore())


def test_the_limit_itself_is_allowed(tmp_path):
    """A total equal to SIZE_LIMIT passes; one byte less does not, and the weights stay beside."""
    c = h.config(quant="rtn", compressor="zlib")  # plain rounding: nothing to fit
    model = h.random_model(c)
    total, _, _ = h.export(model, c, tmp_path)
    assert h.export(model, replace(c, size_limit=total), tmp_path)[0] == total
    assert not (tmp_path / "x.ptz.fp32").exists()
    with pytest.raises(t.RunError, match=f"is 1 bytes over SIZE_LIMIT={total - 1}"):
        h.export(model, replace(c, size_limit=total - 1), tmp_path)
    _, kept = t.read_artifact(str(tmp_path / "x.ptz.fp32"))
    for name, parameter in model.named_parameters():
        assert torch.equal(kept[name].restore(), parameter)


def test_freezing_all_layers_of_a_loaded_artifact_is_refused(made):
    """The artifact decides the number of layers, so it is asked too."""
    c = h.config(data_path=str(made[1]), num_layers=6, ttt_freeze_blocks=5)
    table = t.load_byte_table(c)
    val = t.load_validation(c, table)
    with pytest.raises(t.ArtifactError, match="TTT_FREEZE_BLOCKS=5: leaves none of 4 layers"):
        t.load_model(str(made[2]), val, table, h.runtime(), c)


def test_rans_is_at_the_entropy():
    """Half a million Gaussian codes: at most 0.3 % above order 0; under it where rows differ."""
    r = np.random.default_rng(2)
    for kind, low, high in (("gaussian", 0.999, 1.003), ("mixed", 0.8, 0.97)):
        codes = h.CODES[kind](500_000, r).astype(np.int8)
        assert low < len(t.rans_encode(codes.tobytes())) / t.entropy_bytes(codes) < high


def test_rans_refuses_what_it_cannot_have_made():
    """Claims of absurd sizes, models and lengths end at once, without memory."""
    raw = h.CODES["gaussian"](40_000, np.random.default_rng(3)).astype(np.int8).tobytes()
    data = t.rans_encode(raw)
    for size in (1 << 29, 1 << 40):
        with pytest.raises(t.ArtifactError, match="a rans stream is damaged"):
            t.decompress(data, "rans", size)
    for bad in (b"", data[:4], data[:40], data[:-2], data + b"\0\0", b"\xff" + data[1:],
                data[:1] + b"\xff\xff\xff\xff" + data[5:], b"\0" + data[1:]):
        with pytest.raises(t.ArtifactError):
            t.decompress(bad, "rans", 40_000)


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_corruptions(all_codecs, tmp_path, count):
    """Bytes changed, cut out, inserted, swapped, and truncations: ArtifactError every time."""
    path, data = tmp_path / "broken.ptz", all_codecs[0].read_bytes()
    random = np.random.default_rng(4)
    assert h.load_tiny(all_codecs[0]).recur
    for n in range(count):
        a, b = sorted(random.integers(0, len(data), 2).tolist())
        broken = [data[:a], data[:a] + data[b:] if b > a else data[:-1],
                  data[:a] + random.bytes(1 + n % 7) + data[a:],
                  data[:a] + bytes([data[a] ^ int(random.integers(1, 256))]) + data[a + 1 :],
                  data[:a] + random.bytes(b - a + 1) + data[b + 1 :]][n % 5]
        if broken == data:
            continue
        path.write_bytes(broken)
        with pytest.raises(t.ArtifactError, match=r"broken\.ptz"):
            t.read_artifact(str(path))
