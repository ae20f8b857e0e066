"""records/pack.py: the packed script runs the same and is read without running it."""

from __future__ import annotations

import ast
import bz2
import linecache
import math
import re
import zlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import harness as h
import mixing
import pack
import train_gpt as t


@pytest.mark.slow
def test_packed_code_runs_the_same(runs, packed):
    """Losses, scores and artifact of the packed script are those of the readable one."""
    ours, theirs = packed[2], runs[2][0]
    folders = [log.parent.parent for log in (ours, theirs)]
    assert len({tuple(h.losses(folder, "seed42")) for folder in folders}) == 1
    assert len({(folder / "seed42.ptz").read_bytes() for folder in folders}) == 1
    exact = r"\w+_exact val_loss:[\d.]+ val_bpb:[\d.]+"
    assert re.findall(exact, ours.read_text()) == re.findall(exact, theirs.read_text()) != []


@pytest.mark.slow
def test_packed_code_is_complete(packed):
    """The same program and settings."""
    packed, small, _ = packed
    source = h.SCRIPT.read_text()
    readable = "".join(linecache.getlines(f"{packed} (unpacked)"))
    assert ast.dump(pack.bare(readable)) == ast.dump(pack.bare(source))
    assert vars(small).keys() >= {n for n in vars(t) if not n.startswith("__")}
    assert [(f.name, f.type, f.default) for f in fields(small.Config)] == [
        (f.name, f.type, f.default) for f in fields(t.Config)]


def test_pack_is_a_command(tmp_path, monkeypatch):
    """A file packed whole, an exit code; what is not packed is read as it is."""
    source = h.SCRIPT.read_text()
    assert pack.unpack(source.encode()) == source
    (tmp_path / "tiny.py").write_text(SOURCE)
    assert pack.main([str(tmp_path / "tiny.py"), "--output", str(tmp_path / "a" / "p.py")]) == 0
    assert (tmp_path / "a" / "p.py").read_bytes() == pack.pack(SOURCE)
    for wrong in (["none.py", "--output", "x"], ["--unpack", str(tmp_path / "none.py")]):
        assert pack.main(wrong) == 2
    monkeypatch.setattr(pack, "LARGEST", 1000)  # the file is there, and the code says so
    assert pack.main([str(tmp_path / "tiny.py"), "--output", str(tmp_path / "a" / "p.py")]) == 1


SOURCE = ('"""Doc."""\n\n\nclass A(NamedTuple):\n    """Gone."""\n\n    x: int = 1  # gone\n\n'
            '    def f(self, a: int = 2, *b: str) -> dict[str, int]:\n        """Gone."""\n'
            '        text: str = """kept # here\n            and indented\n        """\n'
            '        if a:\n            return {"->": "#\\u2581",\n                    text: a}\n'
            '        return b\n\n    def g(self):\n        """All of it."""\n\n\n'
            '@dataclass\nclass B(A):\n    y: int = setting(3, "help", 1)  # an int\n'
            '    if A:\n        z: int\n\n'
            'async def h(a: int):\n    b: int\n    return A.setting(a, "kept", c=setting(4))\n')


def test_minify_keeps_strings_types_of_dataclasses_and_nesting(monkeypatch):
    """Comments, docstrings, help and other annotations go; text that looks like them stays."""
    assert pack.minify(SOURCE) == (
        f"{pack.ABOUT}\n\nclass A(NamedTuple):\n x: 0 = 1\n\n def f(self, a=2, *b):\n"
        "  text = 'kept # here\\n            and indented\\n        '\n"
        "  if a:\n   return {'->': '#\\u2581', text: a}\n  return b\n\n"
        " def g(self):\n  pass\n\n@dataclass\nclass B(A):\n y: int = setting(3, '', 1)\n"
        " if A:\n  z: int\n\n"
        "async def h(a):\n b: int\n return A.setting(a, 'kept', c=setting(4))\n")
    monkeypatch.setattr(pack, "written", lambda tree: ast.unparse(tree).replace("3", "4"))
    with pytest.raises(pack.PackError, match="not the same"):
        pack.minify(SOURCE)


def test_packed_file_is_read_without_running_it(tmp_path):
    """Its source comes back; damage, another decoder and another stub are named, never run."""
    good = pack.pack(SOURCE)
    assert pack.unpack(good) == pack.minify(SOURCE)
    (tmp_path / "packed.py").write_bytes(good)
    assert pack.main([str(tmp_path / "packed.py"), "--unpack"]) == 0
    place = good.index(b'S=D["decode"]("') + 60
    digit = good[place : place + 1]
    bad_digit = good[:place] + (b"a" if digit != b"a" else b"b") + good[place + 1 :]
    marker = tmp_path / "ran"
    evil = zlib.compress(f"open({str(marker)!r}, 'w')\ndecode = lambda d, n: ''".encode())
    other = good.replace(pack.literal(zlib.compress(pack.decoder().encode(), 9)).encode("latin-1"),
                         pack.literal(evil).encode("latin-1"))
    assert other != good
    digit_0 = chr(mixing.DIGITS[0]).encode("latin-1")
    more = b'12 * x".encode("latin-1"),1,S);open("ran","w");("'.replace(b"12 * x", 12 * digit_0)
    text_end = good.index(b'".encode("latin-1"),%d,S)' % len(pack.minify(SOURCE)))
    injected = good[:text_end] + more + good[text_end:]
    long = pack.decoder() + "\n" * (1 << 16) + "open('ran', 'w')\n"
    deep = pack.decoder().replace("32700", "32701")

    def carrying(text, size=None):
        """The packed file with another decoder, or another number of characters."""
        small, data = pack.minify(SOURCE), zlib.compress(text.encode(), 9)
        parts = data, mixing.encode(small, pack.decoder())
        return (pack.STUB % (*map(pack.literal, parts), size or len(small),
                             zlib.crc32(small.encode()))).encode("latin-1")

    assert carrying(pack.decoder()) == good and deep != pack.decoder()
    for data, reason in ((bad_digit, "CRC-32"), (other, "decoder is not"),
                         (injected, "this version"), (carrying(long), "decoder is not"),
                         (carrying(deep), "decoder is not"), (carrying("def ("), "damaged"),
                         (carrying(pack.decoder(), 9_999_999_999), "this version"),
                         (carrying("#" * (1 << 27)), "decoder is not"),
                         (good + b"import os\n", "this version"),
                         (good.replace(b"exec(compile", b"exit(compile"), "this version"),
                         (good.replace(b"\nS=", b"\nimport os\nS="), "this version"),
                         (good.replace(b'S=zlib.decompress("x', b'S=zlib.decompress("y'),
                          "damaged")):
        with pytest.raises(pack.PackError, match=reason):
            pack.unpack(data)
    assert not marker.exists() and pack.unpack(b"\xff") == "\ufffd"  # somebody else's packer
    assert pack.unpack(b"a = 1\r\nb = 2\r\n") == "a = 1\nb = 2\n"  # as Python reads it
    pairs = bytes(value for a in range(256) for b in range(256) for value in (a, b))
    assert ast.literal_eval(f'"{pack.literal(pairs)}"').encode("latin-1") == pairs


def test_mixing_gives_every_text_back():
    """Empty, short, repetitive and random texts; only characters that a literal can hold."""
    noise = "".join(map(chr, np.random.default_rng(0).integers(0, 128, 300)))
    texts = ("", "a", "\0", "\x7f" * 500, noise, "def f(x):\n    return {x: ['(']}\n" * 20)
    for text in texts:
        data = mixing.encode(text, "known")
        assert mixing.decode(data, len(text), "known") == text, text
        assert not set(data) & set(b'\0\n\r"\\') and len(data) <= 1.1 * len(text) + 6
    alone, twice = (len(mixing.encode(texts[-1], known)) for known in ("", texts[-1]))
    assert twice < alone / 2 < len(texts[-1]) / 24
    with pytest.raises(ValueError, match="section not found"):
        mixing.decode(b"\n", 5, "")


def test_mixing_rounds_alike_everywhere():
    """No entry of its two tables is near enough to a tie for another libm to round it otherwise."""
    source = Path(mixing.__file__).read_text()
    tables = re.findall(r"round\((.*)\) for (\w) in (\w+|range\(.*?\))[ \]]", source)
    assert len(tables) == source.count("math.") == 2  # nothing else asks the libm
    for formula, name, places in tables:
        for value in eval(places, dict(odds=range(1, 4096))):
            exact = eval(formula, {"math": math, name: value})
            assert abs(exact % 1 - 0.5) > 1e-8, (formula, value)


@pytest.mark.slow
def test_mixing_is_arithmetic_coding():
    """The file is as long as the model's probabilities say, and shorter than bzip2 by a quarter."""
    text, nats = pack.minify(h.SCRIPT.read_text()), 0.0
    told = mixing.bits_of(text)

    def choose(p):
        nonlocal nats
        bit = next(told)
        nats -= math.log((p if bit else 65536 - p) / 65536)
        return bit

    assert mixing.model(choose, len(text)) == text
    size = len(mixing.encode(text, ""))
    assert abs(size - nats / math.log(251)) < 10
    assert size < 0.8 * len(bz2.compress(text.encode(), 9))


@pytest.mark.slow
def test_packed_code_names_itself(packed):
    """The log begins with the source that runs and names the file's hash and size."""
    packed, _, log = packed
    text = log.read_text()
    assert text.startswith("".join(linecache.getlines(f"{packed} (unpacked)")))
    assert f"\ncode_sha256:{t.sha256_file(packed)} bytes:{packed.stat().st_size}\n" in text
    assert f"\nCode size: {packed.stat().st_size} bytes\n" in text


@pytest.mark.slow
def test_packed_code_starts_as_a_script(packed):
    """A line for a user's error, a traceback with source for its own; packed alike elsewhere."""
    packed = packed[0]
    again = packed.with_name("again.py")
    h.python([pack.__file__, h.SCRIPT, "--output", again],
             packed.parent, dict(PYTHONHASHSEED="7"))
    assert again.read_bytes() == packed.read_bytes()
    done = h.python([packed], packed.parent, dict(PRESET="demo", DATA_PATH="nowhere"))
    assert done.returncode == 1 and done.stderr.startswith("error: no shards match")
    assert "QK_GAIN_INIT" in h.python([packed, "--help"], packed.parent, {}).stdout
    code = ("import runpy, sys\nsys.argv = ['train_gpt.py']\nimport torch\n"
            f"torch.manual_seed = None\nrunpy.run_path({str(packed)!r}, run_name='__main__')")
    broken = h.python(["-c", code], packed.parent, dict(PRESET="demo"))
    assert "torch.manual_seed(c.seed)" in broken.stderr, broken.stderr
