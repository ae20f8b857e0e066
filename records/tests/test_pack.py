"""records/pack.py: the packed script runs the same and is read without running it."""

from __future__ import annotations

import ast
import bz2
import linecache
import re
import symtable
from dataclasses import fields, is_dataclass

import pytest

import harness as h
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
    """As many functions and classes, and the same settings, but for the help."""
    small = packed[1]
    counts = [sum(isinstance(node, ast.FunctionDef | ast.ClassDef)
                  for node in ast.walk(ast.parse(source)))
              for source in (pack.unpack(packed[0].read_bytes()), h.SCRIPT.read_text())]
    assert counts[0] == counts[1] - 1  # the table of --help
    config = next(value for value in vars(small).values() if is_dataclass(value))
    about = [[(f.name, f.type, f.default, f.metadata | dict(help="")) for f in fields(c)]
             for c in (config, t.Config)]
    assert about[0] == about[1]


def test_packed_code_is_small():
    """At most 32,000 bytes, all in all."""
    assert len(pack.pack(h.SCRIPT.read_text())) <= pack.LARGEST == 32_000


def test_a_packed_kernel_means_the_same():
    """Names that are not the kernel's own are none of the module's, where Triton looks first."""
    source = pack.unpack(pack.pack(h.SCRIPT.read_text()))
    (kernel,) = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)
                 and any("jit" in ast.unparse(d) for d in n.decorator_list))
    names = [n for part in kernel.body for n in ast.walk(part) if isinstance(n, ast.Name)]
    own = {a.arg for a in kernel.args.args} | {n.id for n in names if isinstance(n.ctx, ast.Store)}
    assert {n.id for n in names} - own == {"tl"}
    assert "tl" not in symtable.symtable(source, "packed", "exec").get_identifiers()


SOURCE = '''"""Doc."""
from __future__ import annotations
import functools
from typing import NamedTuple


def setting(default, text, low=None):
    """Gone."""
    return default, text, low


class A(NamedTuple):
    """Gone."""
    x: int = 1  # gone

    def f(self, value: int = 2, *rest: str) -> dict[str, int]:
        """Gone."""
        long_name: str = """kept # here
            and indented
        """
        return {"->": "#\\u2581", long_name: value}


class Config:
    """Gone."""
    y: int | None = setting(3, "help", 1)  # an int
    z = A(4).x, setting("kept", str(2), low=2)


def kernel(value, ROWS, SIZE_2):
    """Gone."""
    total = value + value + ROWS + ROWS + ROWS + SIZE_2 + SIZE_2 + SIZE_2
    return total + total


class B:
    """Gone."""

    def __init__(self, placed_1, named_1=0):
        self.sum = placed_1 + placed_1 + named_1

    def method(self, placed_2, named_2, after_2=0):
        return self.sum + placed_2 + placed_2 + named_2 + named_2 + after_2

    def __call__(self, placed_3, unknown_3=0):
        return placed_3 + placed_3 + unknown_3 + unknown_3


def partly(placed_4, named_4=0):
    return placed_4 + placed_4 + named_4


def handed(given_5):
    return given_5 + given_5


def called():
    b = B(1, named_1=2)
    some = functools.partial(partly, named_4=4)
    other = dict(function=handed)["function"](given_5=1)
    return b.method(1, named_2=2), b(1, unknown_3=3), some(1), dict(placed_4=5), other


if __name__ == "__main__":
    print(__doc__, A().f(), Config.__annotations__, Config.y, Config.z, kernel(1, ROWS=2, SIZE_2=3))
    print(called())
'''


def test_a_packed_file_does_the_same(tmp_path):
    """Fields keep their types, kernels their constants, what is given by name its name; comments,
    help and docstrings go."""
    small = pack.minify(SOURCE)
    words = set(re.findall(r"\w+", small))
    assert "gone" not in small.lower()
    assert "(value,ROWS,SIZE_2)" in small and "=ROWS" not in small
    assert not {"total", "long_name", "help", "called", "partly", "placed_1", "placed_2",
                "placed_3"} & words
    assert {"named_1", "named_2", "unknown_3", "named_4", "given_5"} <= words
    # torch.library calls what it is given as setup_context by these names
    assert "(ctx,inputs,output)" in pack.minify(h.SCRIPT.read_text())
    (tmp_path / "plain.py").write_text(SOURCE.replace('"help"', '""'))
    (tmp_path / "packed.py").write_bytes(pack.pack(SOURCE))
    outputs = [h.python([tmp_path / f"{name}.py"], tmp_path).stdout
               for name in ("plain", "packed")]
    assert outputs[1] == outputs[0].replace("Doc.", pack.ABOUT) != ""


def test_pack_is_a_command(tmp_path, monkeypatch, capsys):
    """A file packed whole; size is a warning, only what cannot be packed is an error."""
    (tmp_path / "tiny.py").write_text(SOURCE)
    (tmp_path / "wrong.py").write_text("def (")
    out = tmp_path / "a" / "p.py"
    assert pack.main([str(tmp_path / "tiny.py"), "--output", str(out)]) == 0
    assert out.read_bytes() == pack.pack(SOURCE) and "warning" not in capsys.readouterr().err
    monkeypatch.setattr(pack, "LARGEST", 100)
    assert pack.main([str(tmp_path / "tiny.py"), "--output", str(out)]) == 0
    assert "warning" in capsys.readouterr().err
    assert pack.main([str(out), "--unpack"]) == 0
    assert capsys.readouterr().out == pack.minify(SOURCE)
    for name in ("none.py", "wrong.py"):
        assert pack.main([str(tmp_path / name), "--output", str(tmp_path / "b.py")]) == 2
        assert name in capsys.readouterr().err and not (tmp_path / "b.py").exists()
    with pytest.raises(SystemExit):
        pack.main([str(out), "--output", str(out)])
    assert "is the source" in capsys.readouterr().err
    out.write_bytes(out.read_bytes() + b"#")
    assert pack.main([str(out), "--unpack"]) == 2


def stream(text: str | bytes) -> bytes:
    """A bz2 stream of a text, as a packed file holds one."""
    return bz2.compress(text.encode() if isinstance(text, str) else text)


GOOD, HIDDEN = pack.pack(SOURCE), b"open('ran', 'w')\n"
WHOLE = stream("".join(f"{n} = {n}\n" for n in range(100)))
END = len(GOOD) - len(pack.TAIL)
REFUSED = {
    "a byte after it": (GOOD + b"\n", "this version"),
    "code after it": (GOOD + HIDDEN, "this version"),
    "code before it": (GOOD.replace(b"\nS=", b"\n" + HIDDEN + b"S="), "this version"),
    "another call": (GOOD.replace(b"exec(compile", b"exit(compile"), "this version"),
    "no stub": (pack.COOKIE + HIDDEN, "this version"),
    "a call in the literal": (GOOD[:END] + b'"""+open("ran","w").name+"""' + GOOD[END:], "more"),
    "a second literal": (GOOD[:END] + b'""" """' + GOOD[END:], "more"),
    "another escape": (GOOD.replace(rb"\0", rb"\x00", 1), "more"),
    "a second stream": (pack.packed(stream("a = 1\n") + stream(HIDDEN)), "more"),
    "bytes after the stream": (pack.packed(stream("a = 1\n") + HIDDEN), "more"),
    "half a stream": (pack.packed(stream("a = 1\n")[:-8]), "more"),
    "a damaged byte": (pack.packed(bytes([*WHOLE[:40], WHOLE[40] ^ 1, *WHOLE[41:]])), "damaged"),
    "no stream": (pack.packed(b"open('ran', 'w')"), "damaged"),
    "no Unicode": (pack.packed(stream(b"a = '\xff'\n")), "damaged"),
    "a bomb": (pack.packed(stream("#" * (1 << 27))), "over 1048576"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unpack_refuses(name, tmp_path, monkeypatch):
    """What is not ours to the byte, damaged or absurdly large is named and never run."""
    monkeypatch.chdir(tmp_path)
    data, reason = REFUSED[name]
    assert data != GOOD
    with pytest.raises(pack.PackError, match=reason):
        pack.unpack(data)
    assert not list(tmp_path.iterdir())


def test_unpack_gives_the_source_that_a_file_runs():
    """Packed or not."""
    assert pack.unpack(GOOD) == pack.minify(SOURCE)
    assert pack.unpack(pack.packed(stream("a = 1\n"))) == "a = 1\n"
    assert pack.unpack(SOURCE.encode()) == SOURCE
    assert pack.unpack(b"a = 1\r\nb = 2\r\n") == "a = 1\nb = 2\n"  # as Python reads it
    assert pack.unpack(b"# coding: unicode_escape\n# \\na = 1\n").endswith("# \na = 1\n")
    for wrong in (b"a = 1\n" * 3 + b"\xff", b"# coding: none\n"):
        with pytest.raises(pack.PackError, match="no source that Python can read"):
            pack.unpack(wrong)


def test_a_literal_holds_every_byte():
    """Whatever comes after it, and however many quotes."""
    pairs = bytes(value for a in range(256) for b in range(256) for value in (a, b))
    for data in (pairs, b'"""" """ """""""""x', b"\0\0\0001\0x41\\x41\\\r\n\n\r", bytes(9)):
        file = pack.packed(data + b"YZ")
        assert b"\r" not in file and b"\0" not in file
        held = [node.value for node in ast.walk(ast.parse(file)) if isinstance(node, ast.Constant)]
        assert (data + b"YZ").decode("latin-1") in held


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
    """A line for a user's error, a traceback for its own; packed alike elsewhere."""
    packed = packed[0]
    again = packed.with_name("again.py")
    h.python([pack.__file__, h.SCRIPT, "--output", again],
             packed.parent, dict(PYTHONHASHSEED="7"))
    assert again.read_bytes() == packed.read_bytes()
    done = h.python([packed], packed.parent, dict(PRESET="demo", DATA_PATH="nowhere"))
    assert done.returncode == 1 and done.stderr.startswith("error: no shards match")
    assert "QK_GAIN_INIT" in h.python([packed, "--help"], packed.parent, {}).stdout
    code = ("import runpy, sys\nsys.argv = ['train_gpt.py']\nimport torch\n"
            f"torch.device = None\nrunpy.run_path({str(packed)!r}, run_name='__main__')")
    broken = h.python(["-c", code], packed.parent, dict(PRESET="demo"))
    assert f'File "{packed} (unpacked)", line' in broken.stderr, broken.stderr
