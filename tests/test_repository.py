"""The repository: its documents, the shape of its code, what it imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import fields

import pytest

import harness as h
import train_gpt as t


def test_readme_holds_the_settings_table():
    """The README's table is the code's, line for line."""
    lines = (h.ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    table = t.settings_table().splitlines()
    assert table[0] in lines
    start = lines.index(table[0])
    assert lines[start : start + len(table)] == table
    assert not lines[start + len(table)].startswith("|")


def test_the_documents_name_tests_that_exist():
    """Every `-k NAME` in a README selects a test."""
    files = [h.ROOT / "test_cpu.py", *h.ROOT.glob("tests/test_*.py"),
             *h.ROOT.glob("records/tests/test_*.py")]
    names = [name for path in files
             for name in re.findall(r"(?m)^def test_(\w+)", path.read_text())]
    for path in (h.ROOT / "README.md", *h.ROOT.glob("docs/*.md"), *h.ROOT.glob("records/*.md")):
        for wanted in re.findall(r"pytest [^`|]*-k (\w+)", path.read_text("utf-8")):
            assert any(wanted in name for name in names), (path.name, wanted)


def test_the_preflight_opens_with_what_it_proves():
    """The table in its first lines names every test of the file once, and no other."""
    path = h.ROOT / "test_cpu.py"
    tree = ast.parse(path.read_text())
    table = re.findall(r"(?m) -> (\w+)$", ast.get_docstring(tree, clean=False))
    tests = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    assert table == [name.removeprefix("test_") for name in tests if name.startswith("test_")]


def test_imports_are_torch_numpy_and_the_standard_library():
    """At module level; optional packages only inside the function that needs them."""
    tree = ast.parse((h.ROOT / "train_gpt.py").read_text(encoding="utf-8"))
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"torch", "numpy"}
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    inner = {(n.module if isinstance(n, ast.ImportFrom) else n.names[0].name) for n in imports
             if n not in tree.body}
    assert {name.split(".")[0] for name in inner} <= {
        "fcntl", "sentencepiece", "zstandard", "flash_attn_interface", "retokenize_scylla",
        "resource", "torch", "triton"}


def test_what_is_imported_is_required():
    """requirements.txt names every package that a test or a tool imports."""
    required = set(re.findall(r"(?m)^(\w+)", (h.ROOT / "requirements.txt").read_text()))
    paths = [path for pattern in ("*.py", "tests/*.py", "records/*.py", "records/*/*.py")
             for path in h.ROOT.glob(pattern) if not path.stem.endswith("_run")]  # stand-in's torch
    known = required | sys.stdlib_module_names | {path.stem for path in paths} | {
        "functorch", "triton", "flash_attn_interface", "tokenmonster"}  # torch's, and optional
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [
                alias.name for alias in getattr(node, "names", ()) if isinstance(node, ast.Import)]
            assert {name.split(".")[0] for name in names} <= known, (path.name, names)


def test_the_file_keeps_its_shape():
    """100 columns, ASCII; no function over 50 lines."""
    data = (h.ROOT / "train_gpt.py").read_bytes()
    assert max(map(len, data.decode("ascii").splitlines())) <= 100
    long = {}
    for node in ast.walk(ast.parse(data)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            size = node.end_lineno - node.lineno + 1
            if size > 50:
                long[node.name] = size
    assert not long


def test_import_is_light():
    """retokenize_scylla.py loads its packages where they are used."""
    code = ("import sys, retokenize_scylla; print([name for name in ('numba', 'sentencepiece', "
            "'tokenmonster', 'zstandard', 'torch') if name in sys.modules])")
    assert subprocess.check_output([sys.executable, "-c", code], cwd=h.ROOT, text=True) == "[]\n"


@pytest.mark.slow
def test_packed_code_is_small():
    """At most 32,000 bytes, stub and decoder with them."""
    pack = h.tool("pack")
    assert len(pack.pack((h.ROOT / "train_gpt.py").read_text())) <= pack.LARGEST == 32_000


def test_every_python_writes_the_packed_program_alike():
    """No f-string has a string in its braces, which Python 3.12 alone quotes otherwise."""
    for path in ("train_gpt.py", "records/mixing.py"):
        for node in ast.walk(ast.parse((h.ROOT / path).read_text())):
            held = [c.value for part in getattr(node, "values", ()) for c in ast.walk(part)
                    if isinstance(part, ast.FormattedValue) and isinstance(c, ast.Constant)
                    and c not in ast.walk(part.format_spec or ast.Pass())]
            assert not any(isinstance(value, str) for value in held), ast.unparse(node)


def test_credits_are_one_table():
    """records/credits.json holds the README's table, and CREDITS.md's where that is there."""
    rows = [f"| {row['technique']} | {row['where']} | {row['who']} |"
            for row in h.tool("generated").credits()]
    for path in (h.ROOT / "README.md", h.SHARED / "CREDITS.md"):
        text = path.read_text() if path.exists() else "\n".join(rows)
        found = text[text.index("| PROTEUS v1.6: the combination") :].split("\n\n")[0]
        assert [line for line in found.splitlines() if line.startswith("|")] == rows, path
    names = {f.name.upper() for f in fields(t.Config)}
    for row in h.tool("generated").credits():
        for name in row.get("when", {}):
            assert name in names, name


def test_loading_executes_nothing():
    """No pickle, no torch.load, no eval or exec anywhere in the file."""
    tree = ast.parse((h.ROOT / "train_gpt.py").read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imported = {alias.name for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert not {"eval", "exec", "__import__"} & names
    assert not {"pickle", "marshal", "shelve", "dill"} & (names | imported)
    calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert not {"torch.load", "torch.save"} & calls and "eval" not in attributes
    pickles = [k.value.value for n in ast.walk(tree) if isinstance(n, ast.Call)
               for k in n.keywords if k.arg == "allow_pickle"]
    assert pickles and not any(pickles)
