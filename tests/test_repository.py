"""The repository: its documents, the shape of its code, what it imports."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest

import harness as h
import train_gpt as t

DOCUMENTS = [h.ROOT / "README.md", *sorted(h.ROOT.glob("docs/*.md")),
             *sorted(h.ROOT.glob("records/*.md")), *sorted(h.ROOT.glob("records/*/*.md"))]
SETTINGS = {f.name.upper() for f in fields(t.Config)}
OTHERS = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "LOCAL_WORLD_SIZE",
          "WORLD_SIZE", "HF_ENDPOINT", "HF_TOKEN"}  # read by libraries


def test_the_documents_hold_the_settings():
    """docs/settings.md has the code's table, line for line; README's rows are some of it."""
    table = t.settings_table().splitlines()
    assert [line for line in (h.ROOT / "docs/settings.md").read_text().splitlines()
            if line.startswith("|")] == table
    rows = (h.ROOT / "README.md").read_text().partition(table[0] + "\n")[2].split("\n\n")[0]
    assert rows and set(rows.splitlines()) <= set(table)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(h.ROOT)))
def test_a_document_names_what_there_is(path):
    """Settings in backquotes, files and anchors of links, tests after `-k`."""
    text = path.read_text(encoding="utf-8")
    script = (h.ROOT / "run_8xh100.sh").read_text()
    for name in re.findall(r"`([A-Z][A-Z0-9]*_[A-Z0-9_]+)[=`]", text):
        assert name in SETTINGS | OTHERS or re.search(rf"\b{name}\b", script) or re.search(
            rf"(?m)^{name} = ", (h.ROOT / "train_gpt.py").read_text()), name
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        heads = re.findall(r"(?m)^#+ (.+)$", file.read_text()) if anchor else []
        assert not anchor or anchor in [head.lower().replace(" ", "-") for head in heads], target
    files = [h.ROOT / "test_cpu.py", *h.ROOT.glob("tests/test_*.py"),
             *h.ROOT.glob("records/tests/test_*.py")]
    names = re.findall(r"(?m)^def test_(\w+)", "\n".join(file.read_text() for file in files))
    for wanted in re.findall(r"pytest [^`|]*-k (\w+)", text):
        assert any(wanted in name for name in names), wanted


def test_the_documents_hold_the_rules():
    """records/README.md has a row for each rule of `verify`, and no other."""
    binds = {(0, 0): "everybody", (1, 0): "records", (0, 1): "`--strict`"}
    rows = [f"| {rule.name} | {binds[rule.record, rule.strict]} | {rule.asks} |"
            for rule in h.tool("rules").RULES]
    text = (h.ROOT / "records" / "README.md").read_text(encoding="utf-8")
    assert text.partition("| rule | binds |")[2].split("\n\n")[0].splitlines()[2:] == rows


def commands(text: str) -> list[list[str]]:
    """The words of every command of a Markdown text, in a bash block or in backquotes."""
    lines = "\n".join(re.findall(r"(?ms)^```bash\n(.*?)^```", text)).replace("\\\n", " ")
    inline = re.findall(r"`((?:\.venv/|records/\S+\.py|[A-Z][A-Z0-9_]+=)[^`\n]*)`", text)
    found = []
    for line in [*lines.splitlines(), *inline]:
        words = shlex.split(line, comments=True)
        while "&&" in words:
            found.append(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        found += [words] * bool(words)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(h.ROOT)))
def test_the_commands_of_a_document_are_the_code_s(path):
    """Variables are settings, programs are files, and options are in their source."""
    for words in commands(path.read_text(encoding="utf-8")):
        program = next((i for i, word in enumerate(words) if "=" not in word), len(words))
        names = {word.partition("=")[0] for word in words[:program]}
        script = (h.ROOT / "run_8xh100.sh").read_text()
        is_script = words[program:][:1] in (["./run_8xh100.sh"], [])
        assert all(name in SETTINGS | OTHERS or is_script and re.search(rf"\b{name}\b", script)
                   for name in names), words
        files = [word for word in words[program:] if word.endswith((".py", ".sh"))]
        for file in files:
            assert (h.ROOT / file).is_file() or "packed/" in file, words
        options = [word.partition("=")[0] for word in words[program:] if word.startswith("--")]
        files += ["records/vocabulary.py"] * ("--build-vocab" in options)
        known = "".join((h.ROOT / file).read_text() for file in files if (h.ROOT / file).is_file())
        outer = {"--standalone", "--nproc_per_node", "--max-restarts"}  # torchrun's
        assert not files or all(re.search(rf"{option}\b", known) for option in options
                                if option not in outer), words


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
        "fcntl", "sentencepiece", "zstandard", "flash_attn_interface", "records",
        "resource", "torch", "triton"}


def test_what_is_imported_is_required():
    """requirements.txt names every package that a test or a tool imports."""
    packages = re.findall(r"(?m)^[\w-]+", (h.ROOT / "requirements.txt").read_text())
    required = {{"pyyaml": "yaml"}.get(name, name.replace("-", "_")) for name in packages}
    paths = [path for pattern in ("*.py", "tests/*.py", "records/*.py", "records/*/*.py")
             for path in h.ROOT.glob(pattern) if not path.stem.endswith("_run")]  # stand-in's torch
    known = required | sys.stdlib_module_names | {path.stem for path in paths} | {
        "records", "PIL", "functorch", "triton", "flash_attn_interface",
        "tokenmonster"}  # ours, others', optional
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
            "'tokenmonster', 'zstandard', 'torch', 'yaml') if name in sys.modules])")
    assert subprocess.check_output([sys.executable, "-c", code], cwd=h.ROOT, text=True) == "[]\n"


def test_credits_are_one_table():
    """README's table is records/credits.json; CREDITS.md, where that is there, is its beginning."""
    rows = [f"| {row['technique']} | {row['where']} | {row['who']} |"
            for row in h.tool("generated").credits()]

    def table(path):
        text = path.read_text()
        return text[text.index("| PROTEUS v1.6: the combination") :].split("\n\n")[0].splitlines()

    assert table(h.ROOT / "README.md") == rows
    if (h.SHARED / "CREDITS.md").exists():
        first = [line for line in table(h.SHARED / "CREDITS.md") if line.startswith("|")]
        assert first and rows[: len(first)] == first
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
