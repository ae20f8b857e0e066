"""Pack train_gpt.py into one small self-extracting train_gpt.py, deterministically.

    python records/pack.py train_gpt.py --output packed/train_gpt.py
    python records/pack.py --unpack packed/train_gpt.py          prints the source that it runs

Comments, docstrings, help texts of settings, blank lines and annotations of functions go, and so do
line breaks within statements and indentation beyond a blank a level; names, statements and settings
stay. (A program that reads annotations of functions as it runs is none for this packer.) The rest
is compressed by context mixing (mixing.py) to characters that a Latin-1 string
literal can hold; its decoder comes first, compressed by zlib. Starting takes some 6 s more.
Tracebacks and the log's source dump show the source through `linecache`; nothing is written to
disk. The size that counts is that of the packed file, and the log prints it.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixing

LARGEST = 32_000  # bytes of a packed file: our aim for a record
LONGEST = 1 << 20  # characters of a source that are unpacked from a stranger's file
STUB = '''# coding: latin-1
# packed by PROTEUS; records/pack.py --unpack prints the source
import linecache,sys,traceback,zlib
D={}
S=zlib.decompress("%s".encode("latin-1")).decode()
exec(S,D)
S=D["decode"]("%s".encode("latin-1"),%d,S)
assert zlib.crc32(S.encode())==%d,"this packed file is damaged"
N=__file__+" (unpacked)"
linecache.cache[N]=len(S),None,S.splitlines(True),N
sys.excepthook=traceback.print_exception
exec(compile(S,N,"exec"))
'''
ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\0": "\\x00"}
ABOUT = '"""PROTEUS, packed; README.md explains the settings."""'  # what --help begins with


class PackError(ValueError):
    """A source that cannot be packed, or a file that is not packed; the message says why."""


class Bare(ast.NodeTransformer):
    """A program without what only a reader needs; classes keep the types of their fields."""

    field_type: Callable[[ast.expr], ast.expr] | None = None  # in a class: what becomes of types

    def visit_Module(self, node: ast.Module) -> ast.Module:
        """ABOUT in the place of the docstring."""
        if ast.get_docstring(node):
            node.body[0] = ast.parse(ABOUT).body[0]
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        """No docstring, no type of the result."""
        return self.inside(node, None)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        """No docstring; what a NamedTuple says of its fields is 0."""
        named = [*map(ast.unparse, node.bases)] == ["NamedTuple"]
        return self.inside(node, lambda given: ast.Constant(0) if named else given)

    def inside(self, node: Any, field_type: Callable[[ast.expr], ast.expr] | None) -> Any:
        """A function or class without docstring and result, its body visited as one."""
        node.body = node.body[bool(ast.get_docstring(node)) :] or [ast.Pass()]
        if hasattr(node, "returns"):
            node.returns = None
        outer, self.field_type = self.field_type, field_type
        self.generic_visit(node)
        self.field_type = outer
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """A variable without its type, a field of a class with it."""
        if self.field_type:
            node.annotation = self.field_type(node.annotation)
        elif node.value:
            node = ast.Assign([node.target], node.value, lineno=node.lineno)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        """A parameter without its type."""
        node.annotation = None
        return node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        """`setting(default, help text, ...)` without the text."""
        if ast.unparse(node.func) == "setting" and len(node.args) > 1:
            if isinstance(node.args[1], ast.Constant):
                node.args[1] = ast.Constant("")
        return self.generic_visit(node)


def bare(source: str) -> ast.Module:
    """What a program does: the syntax tree of what is packed of it."""
    return Bare().visit(ast.parse(source))


def written(tree: ast.Module) -> str:
    """A program as text, in ASCII, with a blank for each level."""
    text = ast.unparse(tree).encode("ascii", "backslashreplace").decode() + "\n"
    return re.sub("(?m)^(    )+", lambda blanks: " " * (len(blanks[0]) // 4), text)


def minify(source: str) -> str:
    """The same program, a statement a line, without what only a reader needs."""
    small = written(bare(source))
    if ast.dump(bare(small)) != ast.dump(bare(source)):
        raise PackError("the packed program is not the same program; this is a defect of pack.py")
    return small


def decoder() -> str:
    """What a packed file needs of mixing.py."""
    source = Path(mixing.__file__).read_text(encoding="utf-8")
    return minify(source[: source.index("def encode")]).partition("\n")[2]


def literal(data: bytes) -> str:
    """Bytes as they stand in a string literal of the stub."""
    return "".join(ESCAPES.get(c, c) for c in data.decode("latin-1"))


@functools.cache
def pack(source: str) -> bytes:
    """The packed file of a source; equal sources give equal files."""
    small, known = minify(source), decoder()
    texts = zlib.compress(known.encode(), 9), mixing.encode(small, known)
    parts = (*map(literal, texts), len(small), zlib.crc32(small.encode()))
    return (STUB % parts).encode("latin-1")


@functools.cache
def unpack(data: bytes) -> str:
    """The source that a file runs, packed or not; nothing of it is executed."""
    if not data.startswith(STUB.splitlines()[0].encode()):
        return re.sub("\r\n?", "\n", data.decode("utf-8", "replace"))
    string, number = r'((?:[^"\\]|\\.)*)', r"(\d{1,10})"  # such literals run nothing
    pattern = re.escape(STUB).replace("%s", string).replace("%d", number)
    parts = re.fullmatch(pattern, data.decode("latin-1"))
    if not parts or int(parts[3]) > LONGEST:
        raise PackError("packed, but not by this version of pack.py")
    try:
        known, text = (ast.literal_eval(f'"{part}"') for part in parts.group(1, 2))
        stream = zlib.decompressobj()
        carried = stream.decompress(known.encode("latin-1"), 1 << 16).decode()
        if not stream.eof or ast.dump(ast.parse(carried)) != ast.dump(ast.parse(decoder())):
            raise PackError("its decoder is not that of mixing.py: what it runs cannot be told")
        source = mixing.decode(text.encode("latin-1"), int(parts[3]), carried)
    except (ValueError, SyntaxError, zlib.error) as error:
        raise PackError(f"a damaged packed file: {error}") from error
    if zlib.crc32(source.encode()) != int(parts[4]):
        raise PackError("a damaged packed file: its source has another CRC-32")
    return source


def main(arguments: list[str] | None = None) -> int:
    """Pack or unpack a file; 1 if the packed file is larger than a record's code should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--output", type=Path, help="the packed file; it appears only when whole")
    parser.add_argument("--unpack", action="store_true", help="print the source of a packed file")
    options = parser.parse_args(arguments)
    if not options.unpack and not options.output:
        parser.error("--output says where the packed file goes")
    try:
        if options.unpack:
            sys.stdout.write(unpack(options.source.read_bytes()))
            return 0
        data = pack(options.source.read_text(encoding="utf-8"))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        part = options.output.with_name(options.output.name + ".part")
        part.write_bytes(data)
        part.replace(options.output)
    except (PackError, SyntaxError, UnicodeDecodeError, OSError) as error:
        print(f"error: {options.source}: {error}", file=sys.stderr)
        return 2
    before = options.source.stat().st_size
    print(f"{options.output}: {len(data)} bytes, of {before}; at most {LARGEST} are wanted")
    return int(len(data) > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
