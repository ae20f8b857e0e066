"""Pack train_gpt.py into one small self-extracting train_gpt.py, deterministically.

    python records/pack.py train_gpt.py --output packed/train_gpt.py
    python records/pack.py --unpack packed/train_gpt.py          prints the source that it runs

Comments, docstrings (the module's excepted: it is the text of --help), blank lines and annotations
of functions go, and so does indentation beyond a blank a level; names, lines and settings stay. The
rest is compressed (bzip2: 2 % smaller here than LZMA) and stands in one Latin-1 string literal,
which costs 2 % where base 85 would cost 25 %. Tracebacks and the log's source dump show the source
through `linecache`; nothing is written to disk. The size that counts is that of the packed file,
and the log prints it.
"""

from __future__ import annotations

import argparse
import ast
import bz2
import io
import sys
import tokenize
from pathlib import Path

LARGEST = 25_000  # bytes of a packed file: our aim for a record
STUB = '''# coding: latin-1
# packed by records/pack.py of PROTEUS; records/pack.py --unpack prints the source
import bz2,linecache,sys,traceback
N=__file__+" (unpacked)"
S=bz2.decompress("%s".encode("latin-1")).decode()
linecache.cache[N]=len(S),None,S.splitlines(True),N
sys.excepthook=traceback.print_exception
exec(compile(S,N,"exec"))
'''
ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\0": "\\x00"}
Span = tuple[tuple[int, int], tuple[int, int], str]  # (row, column), end, what stands there instead


class PackError(ValueError):
    """A source that cannot be packed, or a file that is not packed; the message says why."""


def docstring_spans(tree: ast.Module) -> list[Span]:
    """Docstrings of functions and classes; a body of nothing else becomes `pass`."""
    spans = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            text, rest = node.body[0], "" if len(node.body) > 1 else "pass"
            spans.append(((text.lineno, text.col_offset),
                          (text.end_lineno, text.end_col_offset), rest))
    return spans


def annotation_spans(tree: ast.Module, lines: list[str]) -> list[Span]:
    """Annotations of parameters and results; those of fields stay, as dataclasses read them."""
    spans = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation:
            end = node.annotation.end_lineno, node.annotation.end_col_offset
            spans.append(((node.lineno, node.col_offset + len(node.arg)), end, ""))
        elif isinstance(node, ast.FunctionDef) and node.returns:
            row, column = node.returns.lineno, node.returns.col_offset
            arrow = lines[row - 1].rindex("->", 0, column)
            start = len(lines[row - 1][:arrow].rstrip())
            spans.append(((row, start), (node.returns.end_lineno, node.returns.end_col_offset), ""))
    return spans


def cut(lines: list[str], spans: list[Span]) -> list[str]:
    """The lines without the spans, which do not overlap; rows stay where they are."""
    for (row, column), (end_row, end_column), instead in sorted(spans, reverse=True):
        head, tail = lines[row - 1][:column], lines[end_row - 1][end_column:]
        lines[row - 1 : end_row] = [head + instead + tail, *[""] * (end_row - row)]
    return lines


def minify(source: str) -> str:
    """The same program, line by line, without what only a reader needs; names are kept."""
    if not source.isascii():
        raise PackError("the source is not ASCII; columns would be miscounted")
    tree, lines = ast.parse(source), source.splitlines()
    lines = cut(lines, docstring_spans(tree) + annotation_spans(tree, lines))
    tokens = list(tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline))
    cut(lines, [(t.start, t.end, "") for t in tokens if t.type == tokenize.COMMENT])
    depths, depth, inside = {}, 0, set()
    for token in tokens:
        depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
        if token.type not in (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE, tokenize.NL):
            depths[token.start[0]] = depth
            inside.update(range(token.start[0] + 1, token.end[0] + 1))  # of a long string
    statement_rows = first_rows(tokens)
    kept = []
    for row, line in enumerate(lines, 1):
        if row in inside:
            kept.append(line)
        elif line.strip():
            kept.append(" " * (depths[row] + (row not in statement_rows)) + line.strip())
    small = "\n".join(kept) + "\n"
    if meaning(small) != meaning(source):
        raise PackError("the packed program is not the same program; this is a defect of pack.py")
    return small


def first_rows(tokens: list[tokenize.TokenInfo]) -> set[int]:
    """Rows on which a statement starts; the others continue one."""
    rows, fresh = set(), True
    for token in tokens:
        if token.type == tokenize.NEWLINE:
            fresh = True
        elif fresh and token.type not in (tokenize.NL, tokenize.COMMENT, tokenize.INDENT,
                                          tokenize.DEDENT):
            rows.add(token.start[0])
            fresh = False
    return rows


def meaning(source: str) -> str:
    """What a program does: its syntax tree without docstrings and annotations of functions."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def pack(source: str) -> bytes:
    """The packed file of a source; equal sources give equal files."""
    data = bz2.compress(minify(source).encode(), 9)
    return (STUB % "".join(ESCAPES.get(c, c) for c in data.decode("latin-1"))).encode("latin-1")


def unpack(data: bytes) -> str:
    """The source that a file runs, packed or not; nothing of it is executed."""
    if not data.startswith(STUB.splitlines()[0].encode()):
        return data.decode("utf-8")
    texts = [node.value for node in ast.walk(ast.parse(data)) if isinstance(node, ast.Constant)
             and isinstance(node.value, str)]
    try:
        return bz2.decompress(max(texts, key=len).encode("latin-1")).decode()
    except (OSError, ValueError) as error:
        raise PackError(f"not a file of pack.py: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """Pack or unpack a file; 1 if the packed file is larger than a record's code should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--output", type=Path, help="the packed file; it appears only when whole")
    parser.add_argument("--unpack", action="store_true", help="print the source of a packed file")
    options = parser.parse_args(arguments)
    if options.unpack:
        sys.stdout.write(unpack(options.source.read_bytes()))
        return 0
    if not options.output:
        parser.error("--output says where the packed file goes")
    data = pack(options.source.read_text(encoding="utf-8"))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    part = options.output.with_name(options.output.name + ".part")
    part.write_bytes(data)
    part.replace(options.output)
    before = options.source.stat().st_size
    print(f"{options.output}: {len(data)} bytes, of {before}; at most {LARGEST} are wanted")
    return int(len(data) > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
