"""The artifact: its streams and codecs, what is refused, the limit of its size."""

from __future__ import annotations

import functools
import json
import operator
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import harness as h
import train_gpt as t


@pytest.mark.slow
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


def not_refused(path, cases, read=t.read_artifact):
    """The cases of a file, (what, bytes), whose reading does not end in an ArtifactError of it."""
    wrong = {}
    for what, data in cases:
        path.write_bytes(data)
        try:
            wrong[what] = f"gave {read(str(path))}"
        except Exception as error:
            if not isinstance(error, t.ArtifactError) or str(path) not in str(error):
                wrong[what] = repr(error)
    return wrong


def forged(path, header, body):
    """Bytes of an artifact with this header, its digest made right."""
    h.forge(path, header, body)
    return path.read_bytes()


def test_what_is_no_artifact_is_refused(small_artifact, tmp_path):
    """Cut anywhere, longer, missing, a folder, of another format or kind, without a header."""
    data, path = small_artifact.read_bytes(), tmp_path / "bad.ptz"
    h.forge(path, *h.parts(small_artifact))
    t.read_artifact(str(path))  # a forger who changes nothing is not noticed
    cuts = [*range(30), *np.linspace(30, len(data) - 1, 60).astype(int)]
    header, body = h.parts(small_artifact)
    bomb = b" " * (1 << 25) + json.dumps(header).encode()
    headers = [b"", b"[]", b"7", b"null", b"{}", b"{", b"\xff\xfe", b"NaN", b"[" * 200000,
               b'{"a":' * 200000, bomb]
    assert not_refused(path, [*((size, data[:size]) for size in cuts), ("longer", data + b"\0"),
                              *((text[:6], forged(path, text, body)) for text in headers)]) == {}
    for magic in (b"PROTEUS 1\n", b"PROTEUS 3\n", b"PROTEUS\nxy", b"PK\3\4......"):
        path.write_bytes(magic + data[10:])
        message = h.refused(path, lambda: t.read_artifact(str(path)))
        assert f"begins with {magic}, not {b'PROTEUS 4' + bytes([10])}: not an artifact" in message
    for other in (tmp_path / "none.ptz", tmp_path):
        assert "exists" in h.refused(other, lambda other=other: t.read_artifact(str(other)))


TAMPERED = {  # place in the header: values that it may not have
    "tensors": [[], {}, None, 3], "tensors.0": [[], None],
    "tensors.0.0": ["blocks.0.attn.q.weight", None, ["x"], "unknown"],
    "tensors.0.1": ["attn", "scales", None], "tensors.0.2": [5, 9, 16, 0, -1, "8", None, 4.0],
    "tensors.0.3": [[300], [], 300, [300, 4, 4], [600, 8], [16, 300]],
    "tensors.0.3.0": [7, 0, -300, 2**23, 10**18, 2**70, 3.5, "300", None, [300]],
    "streams": [[], None], "streams.0": [[], None], "streams.0.0": ["x"],
    "streams.0.1": ["lzma", "brotli", None, ["zlib"]], "streams.0.2": [1, -1, 10**18, "5", 2.5],
    "streams.0.3": [0, None, -1, 2**40, "9", 2.5, 1], "streams.0.4": [0, None],
    "vocab_size": [299, None], "vocab_sha256": ["6" * 64],
    "model": [None, [], {}], "model.ARTIFACT_PATH": ["/etc/passwd"], "model.NO_SUCH": ["1"],
    "model.NUM_LAYERS": ["3", "0", "-2", "4", "2.5", 2, None],
    "model.MODEL_DIM": ["2097152", "0", "24", "-16"], "model.NUM_HEADS": ["0", "None"],
    "model.NUM_KV_HEADS": ["0"], "model.MLP_MULT": ["1e+300", "x", "-1"],
    "model.ROPE_BASE": ["x", "0"], "model.ROPE_DIMS": ["-4"], "model.LOGIT_SOFTCAP": ["x", "0"],
    "model.ACTIVATION_NEG_SLOPE": ["x"], "model.TIE_EMBEDDINGS": ["0", "2"],
    "model.BIGRAM_VOCAB_SIZE": ["1000000000000", "-3"], "model.BIGRAM_DIM": ["1000000000000"],
    "model.VE_DIM": ["x"], "model.VE_LAYERS": ["0,1", "x", "9"], "model.XSA_LAST_N": ["x", "-1"],
    "model.PARALLEL_START_LAYER": ["9", "x"], "model.RECUR_LAYERS": ["5", "0,1"],
    "model.RECUR_PASSES": ["1", "3", "0", "17", "1000000000", "x"],
    "model.ATTN_GATE_DIMS": ["4", "17", "-1", "x"], "model.SKIP_GATE": ["1", "2"],
    "model.ASYM_SOFTCAP": ["1", "x"], "model.DOC_ATTENTION": ["1", "2", "x"],
}  # fmt: skip


def test_a_tampered_header_is_refused(small_artifact, tmp_path):
    """With the digest recomputed: only ArtifactError, whatever the header claims."""
    path, cases = tmp_path / "tampered.ptz", []
    for place, values in TAMPERED.items():
        for value in values:
            header, body = h.parts(small_artifact)
            *outer, last = (int(key) if key.isdigit() else key for key in place.split("."))
            functools.reduce(operator.getitem, outer, header)[last] = value
            cases.append(((place, repr(value)), forged(path, header, body)))
    assert not_refused(path, cases, lambda _: h.load_tiny(path)) == {}


def test_an_artifact_names_its_attention(tmp_path):
    """Another DOC_ATTENTION than the environment's, for which attention was chosen, is refused."""
    path = tmp_path / "x.ptz"
    h.artifact(path, "zlib", **h.SMALLEST, doc_attention=True)
    about = SimpleNamespace(vocab_sha256="5" * 64)
    for attention in ("auto", "flash"):
        c = h.config(attention=attention)
        with pytest.raises(t.ArtifactError, match=r"x\.ptz: its model has DOC_ATTENTION=1; set"):
            t.load_model(str(path), about, h.table(), h.runtime(), c)
    t.load_model(str(path), about, h.table(), h.runtime(), h.config(doc_attention=True))


def test_streams_that_do_not_decompress_are_refused(tmp_path):
    """Garbage, and streams that end early, of every codec; and a codec that there is not."""
    path, raw = tmp_path / "forged.ptz", bytes(range(100)) * 3
    for codec in h.codecs():
        whole, short = (t.coder(codec)[0](text) for text in (raw, raw[:-1]))
        assert t.decompress(whole, codec, 300) == raw
        for data in (b"", b"garbage" * 9, short, whole[:-9]):
            header = dict(model={}, vocab_size=h.VOCAB, vocab_sha256="",
                          tensors=[["w", "v", 32, [75]]],
                          streams=[["v.fp32", codec, len(data), 300, zlib.crc32(data)]])
            h.forge(path, header, data)
            message = h.refused(path, lambda: t.read_artifact(str(path)))
            assert f"a {codec} stream is damaged" in message, (codec, data)
        for size in (0, -1, 1 << 32):  # before anything is unpacked
            header["streams"][0][2:] = len(whole), size, zlib.crc32(whole)
            h.forge(path, header, whole)
            assert f"not of {size} bytes" in h.refused(path, lambda: t.read_artifact(str(path)))
    with pytest.raises(t.ArtifactError, match="'rot13' is unknown or not installed"):
        t.decompress(b"", "rot13", 4)


def test_writing_is_atomic(tmp_path, monkeypatch):
    """A failure at any point leaves the old file, no temporary one, and names the path."""
    path = tmp_path / "new" / "x.ptz"
    t.write_atomic(path, b"old")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    for broken in ("os.fsync", "os.replace", "builtins.open"):
        with monkeypatch.context() as patch:
            patch.setattr(broken, fail)
            with pytest.raises(t.RunError, match=r"cannot write .*x\.ptz: No space left on device"):
                t.write_atomic(path, b"new")
        assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path], broken
    t.write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]


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
    short = t.rans_encode(b"\1\2\1\2")  # it ends with the state of its lane
    with pytest.raises(t.ArtifactError, match="its end does not fit"):
        t.decompress(short[:-4] + bytes([short[-4] ^ 1]) + short[-3:], "rans", 4)
    for bad in (b"", data[:4], data[:40], data[:-2], data + b"\0\0", b"\xff" + data[1:],
                data[:1] + b"\xff\xff\xff\xff" + data[5:], b"\0" + data[1:]):
        with pytest.raises(t.ArtifactError):
            t.decompress(bad, "rans", 40_000)


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_corruptions(all_codecs, tmp_path, count):
    """Bytes changed, cut out, inserted, swapped, and truncations: ArtifactError every time."""
    data, random, cases = all_codecs[0].read_bytes(), np.random.default_rng(4), []
    assert h.load_tiny(all_codecs[0]).recur
    for n in range(count):
        a, b = sorted(random.integers(0, len(data), 2).tolist())
        broken = [data[:a], data[:a] + data[b:] if b > a else data[:-1],
                  data[:a] + random.bytes(1 + n % 7) + data[a:],
                  data[:a] + bytes([data[a] ^ int(random.integers(1, 256))]) + data[a + 1 :],
                  data[:a] + random.bytes(b - a + 1) + data[b + 1 :]][n % 5]
        cases += [((n, a, b), broken)] * (broken != data)
    assert not_refused(tmp_path / "broken.ptz", cases) == {}


def forged_header(header, random):
    """A header with one thing wrong, and what it was."""
    header = json.loads(json.dumps(header))
    numbers = [0, -1, 1, 2**31, 2**40, 10**18, 2.5, None, "7", [], {}, True]
    values = [*numbers, "rans", "lzma", "zlib", "zstd", "attn", "scales", "../x", "\x00"]
    spot = header
    path = []
    while isinstance(spot, (dict, list)) and spot:
        keys = sorted(spot) if isinstance(spot, dict) else range(len(spot))
        path.append((spot, keys[int(random.integers(len(keys)))]))
        spot = spot[path[-1][1]]
        if random.random() < 0.08:
            break
    holder, key = path[-1]
    holder[key] = values[int(random.integers(len(values)))]
    return header, f"{[k for _, k in path]} = {holder[key]!r}"


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_forgeries(all_codecs, tmp_path, count):
    """Changed headers, and changed streams with their CRC made right: under the old digest none
    is ever scored."""
    whole, header, body = all_codecs
    path, random = tmp_path / "forged.ptz", np.random.default_rng(5)
    digest, done = whole.read_bytes()[10:42], 0
    while done < count:
        changed, data = header, bytearray(body)
        if done % 3:
            changed, what = forged_header(header, random)
            if json.dumps(changed) == json.dumps(header):
                continue
        else:
            what, changed = "stream", json.loads(json.dumps(header))
            sizes = [s[2] for s in changed["streams"]]
            which = int(random.integers(len(sizes)))
            start, size = sum(sizes[:which]), sizes[which]
            data[start + int(random.integers(size))] ^= 1 << int(random.integers(8))
            changed["streams"][which][4] = zlib.crc32(data[start : start + size])
        done += 1
        h.forge(path, changed, bytes(data), digest)
        with pytest.raises(t.ArtifactError, match=r"forged\.ptz"):
            h.load_tiny(path)
            pytest.fail(what)
