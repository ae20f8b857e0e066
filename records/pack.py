"""Pack train_gpt.py into one small self-extracting train_gpt.py.

    python records/pack.py train_gpt.py --output packed/train_gpt.py
    python records/pack.py --unpack packed/train_gpt.py          prints the source that it runs

The package python-minifier takes away comments, docstrings, annotations and blanks and shortens the
names of variables, functions, classes and of parameters that nobody gives by name; the help texts
of the settings go too. Settings, attributes and messages stay as they are. The standard library's
bz2 compresses the rest into a string literal, which a few lines extract and run. The log shows that
source, whose lines a traceback numbers, and nothing is written to disk. The same source gives the
same bytes with the same versions of Python and python-minifier; other versions may give another
file, which does the same. The size that counts is that of the packed file, and the log prints it.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import bz2
import collections
import functools
import re
import sys
from importlib.util import decode_source
from pathlib import Path

import python_minifier

LARGEST = 32_000  # bytes of a packed file: our aim for a record
LONGEST = 1 << 20  # bytes of source that are unpacked from a stranger's file
COOKIE = b"#PROTEUS coding:l1\n"  # latin-1
HEAD = COOKIE + b'''import bz2,linecache
S=bz2.decompress("""'''
TAIL = b'''""".encode("l1")).decode()
N=__file__+" (unpacked)"
linecache.cache[N]=len(S),None,S.splitlines(True),N
exec(compile(S,N,"exec"))
'''
ESCAPES = ((rb"\\", rb"\\\\"), (rb"\r", rb"\\r"), (rb'""(?=")', rb'"\\"'),
           (rb"\0(?=[0-7])", rb"\\x00"), (rb"\0", rb"\\0"))  # pattern, what stands in the literal
STAND_FOR = {rb"\\": b"\\", rb"\r": b"\r", rb'\"': b'"', rb"\x00": b"\0", rb"\0": b"\0"}
# names that a log tells, or a test asks for
KEPT = ("main", "dense_mask", "block_mask", "document_bounds", "mlp_kernel", "MLP_TILE")
ABOUT = "PROTEUS, packed; README.md explains the settings."  # what --help begins with


class PackError(ValueError):
    """A source that cannot be packed, or a file that is not packed; the message says why."""


class Shorter(ast.NodeTransformer):
    """A program without the texts that only its --help prints."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """ABOUT in the place of the module's docstring."""
        return ast.Constant(ABOUT) if node.id == "__doc__" else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        """Not the table of the settings with their texts."""
        return None if node.name == "settings_table" else self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        """Without `from __future__ import annotations`: those that are left are texts."""
        return None if node.module == "__future__" else node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """Annotations as texts: the program reads those of settings, and names become shorter."""
        node.annotation = ast.Constant(ast.unparse(node.annotation))
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """`setting(default, help text, ...)` without the text; a list in the table's place."""
        if ast.unparse(node) == "settings_table()":
            return ast.parse("settings_listing(Config())").body[0].value
        if ast.unparse(node.func) == "setting" and len(node.args) > 1:
            if isinstance(node.args[1], ast.Constant):
                node.args[1] = ast.Constant("")
        return self.generic_visit(node)


def keywords(tree: ast.AST) -> dict[str, set[str]]:
    """Arguments that are given by name, by the function that they are given to.

    Under "" are those of calls that may be of any function: neither of one that the program
    defines, by its name or in a partial, nor of Python's or a library's.
    """
    nodes, given = list(ast.walk(tree)), collections.defaultdict(set)
    own = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    others = {*dir(builtins)} | {a.asname or a.name.partition(".")[0] for n in nodes
                                 if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
    for call in (n for n in nodes if isinstance(n, ast.Call)):
        called = ast.unparse(call.args[0] if ast.unparse(call.func) == "functools.partial"
                             else call.func)
        name = called.rpartition(".")[2]
        if name in own or called.partition(".")[0] not in others:
            given[name if name in own else ""] |= {k.arg for k in call.keywords}
    return given


def by_position(tree: ast.AST) -> None:
    """Mark parameters that nobody gives by name as such, so that they can be renamed.

    Functions that a library reads the parameters of (a Triton kernel's are in capitals) keep them,
    and those that are themselves given by name: a library may call them so.
    """
    given = keywords(tree)
    named_themselves = {ast.unparse(n.value) for n in ast.walk(tree) if isinstance(n, ast.keyword)}
    for owner in ast.walk(tree):
        for f in ast.iter_child_nodes(owner):
            if not isinstance(f, ast.FunctionDef) or f.name in named_themselves or any(
                    "library" in ast.unparse(d) for d in f.decorator_list):
                continue
            named = given[""] | given[owner.name if f.name == "__init__" else f.name]
            names = [a.arg for a in f.args.args]
            if not any(name.isupper() for name in names):
                count = next((i for i, name in enumerate(names) if name in named), len(names))
                f.args.posonlyargs, f.args.args = f.args.args[:count], f.args.args[count:]


def minify(source: str) -> str:
    """The same program without what only a reader needs.

    A Triton kernel is compiled from its source. Its parameters in capitals keep their names: a
    constant that is assigned to another name is a constant no more. So does `tl`: Triton looks for
    it among the names of the module first, where a short one may be something else.
    """
    tree = Shorter().visit(ast.parse(source))
    kernel = {a.arg for a in ast.walk(tree) if isinstance(a, ast.arg) and a.arg.isupper()} | {"tl"}
    by_position(tree)
    return python_minifier.minify(
        ast.unparse(tree), remove_literal_statements=True, hoist_literals=False,
        rename_globals=True, preserve_locals=sorted(kernel), preserve_globals=list(KEPT))


def packed(stream: bytes) -> bytes:
    """The file that runs the source in a bz2 stream."""
    for pattern, escaped in ESCAPES:
        stream = re.sub(pattern, escaped, stream)
    return HEAD + stream + TAIL


@functools.cache
def pack(source: str) -> bytes:
    """The packed file of a source; SyntaxError if the source is no Python."""
    return packed(bz2.compress(minify(source).encode()))  # on text 2 % smaller than lzma


@functools.cache
def unpack(data: bytes) -> str:
    """The source that a file runs, packed or not; nothing of it is executed.

    PackError if Python cannot read it, or if it is packed but damaged, absurdly large, or not byte
    for byte a file of `packed`.
    """
    if not data.startswith(COOKIE):
        try:
            return decode_source(data)
        except (SyntaxError, UnicodeError) as error:
            raise PackError(f"no source that Python can read: {error}") from error
    if not (data.startswith(HEAD) and data.endswith(TAIL)):
        raise PackError("packed, but not by this version of pack.py: what it runs cannot be told")
    literal = data[len(HEAD) : -len(TAIL)]
    stream = re.sub(rb'\\(x00|[0r"\\])', lambda match: STAND_FOR[match[0]], literal)
    try:
        extract = bz2.BZ2Decompressor()
        source = extract.decompress(stream, LONGEST + 1).decode()
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise PackError(f"a damaged packed file: {error}") from error
    if len(source.encode()) > LONGEST:
        raise PackError(f"packed, and its source is over {LONGEST} bytes long")
    if not extract.eof or extract.unused_data or packed(stream) != data:
        raise PackError("packed, but it is cut off, or holds more than pack.py writes")
    return source


def main(arguments: list[str] | None = None) -> int:
    """Pack or unpack a file; 0, or 2 after a message if it cannot be packed or unpacked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--output", type=Path, help="the packed file; it appears only when whole")
    parser.add_argument("--unpack", action="store_true", help="print the source of a packed file")
    options = parser.parse_args(arguments)
    if not options.unpack and not options.output:
        parser.error("--output says where the packed file goes")
    if options.output and options.output.resolve() == options.source.resolve():
        parser.error(f"--output {options.output} is the source; give it another name")
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
    print(f"{options.output}: {len(data)} bytes, of {options.source.stat().st_size}")
    if len(data) > LARGEST:
        print(f"warning: {len(data)} bytes are more than our own aim of {LARGEST} for the code; a "
              "record counts code and artifact together, at most 16,000,000", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
