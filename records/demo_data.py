"""The demo's data, made from documentation that is installed: train_gpt.py without settings.

Text -> SentencePiece shards -> a vocabulary of its own, with capitals as marks -> exact shards of
it, all with retokenize_scylla.py, as for PRESET=frontier.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import io
import json
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

import retokenize_scylla as tool
from records import vocabulary
from records.documents import DocumentReader, shard_documents
from records.other_tokenizers import SentencePieceTokenizer

DEMO = {
    "version": 1, "pieces": 1024, "vocabulary_ids": 1024, "case": "ascii",
    "sample_bytes": 1_500_000, "val_bytes": 170_000, "largest_val_document": 20_000,
    "smallest_text": 40,
    "packages": ["numpy", "networkx", "torch/nn", "torch/optim", "torch/distributions",
                 "torch/_tensor_docs.py", "torch/_torch_docs.py", "torch/functional.py"],
}
DEMO_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


def demo_sources() -> list[tuple[str, Path]]:
    """(document name, Python file) of the standard library and of installed packages, sorted."""
    roots = [("", Path(sysconfig.get_paths()["stdlib"]))]
    for package in DEMO["packages"]:
        spec = importlib.util.find_spec(package.split("/")[0])
        if spec is not None and spec.origin:
            roots.append((package, Path(spec.origin).parent.parent / package))
    found = {}
    for prefix, root in roots:
        for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
            inside = path.relative_to(root).parts
            if path.is_file() and not DEMO_SKIPPED & set(inside):
                found["/".join((*prefix.split("/"), *inside)).strip("/")] = path
    return sorted(found.items())


def module_texts(path: Path) -> list[str]:
    """Docstrings and other texts of several lines in a Python file, parsed but never imported."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    texts = [inspect.cleandoc(value) for value in values if isinstance(value, str)
             and "\n" in value and len(value) >= DEMO["smallest_text"]]
    return [text for text in texts if text.translate({10: 32, 9: 32}).isprintable()]


def demo_documents(sources: list[tuple[str, Path]], workers: int) -> dict[str, list[bytes]]:
    """Documents of the train and val splits, one for each module; no text occurs twice.

    Validation documents are chosen by a hash of their name, and lose no text to training.
    """
    with contextlib.closing(tool.process_map(module_texts, [path for _, path in sources],
                                             workers)) as results:
        texts = dict(zip((name for name, _ in sources), results, strict=True))
    order = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    seen: set[str] = set()
    splits: dict[str, list[bytes]] = {"val": [], "train": []}
    held = 0
    for name in order:
        size = sum(map(len, texts[name]))
        wanted = held < DEMO["val_bytes"] and size <= DEMO["largest_val_document"]
        fresh = [text for text in dict.fromkeys(texts[name]) if text not in seen]
        seen.update(fresh)
        if fresh:
            document = "\n\n".join(fresh).encode()
            splits["val" if wanted else "train"].append(document)
            held += len(document) * wanted
    return splits


def train_sentencepiece(documents: list[bytes], pieces: int) -> bytes:
    """A SentencePiece BPE model with byte fallback and the ids of the published SP1024."""
    import sentencepiece

    lines = (line.strip() for document in documents for line in document.decode().split("\n"))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in lines if line), model_writer=model, model_type="bpe",
        vocab_size=pieces, byte_fallback=True, character_coverage=0.999, pad_id=0, bos_id=1,
        eos_id=2, unk_id=3, num_threads=1, minloglevel=2)
    return model.getvalue()


def write_documents(path: Path, documents: Iterable[bytes]) -> None:
    """Write documents as JSON lines."""
    with open(path, "w", encoding="ascii") as file:
        for document in documents:
            file.write(json.dumps({"text": document.decode()}) + "\n")


def build_demo(folder: Path, log: Callable[[str], None] = print) -> dict[str, Path]:
    """Demo data made from documentation that is installed; returns the paths the trainer needs.

    Idempotent (a stamp holds the settings and the sources) and atomic.
    """
    sources = demo_sources()
    beside = ("demo_data.py", "documents.py", "other_tokenizers.py", "vocabulary.py")
    code = [tool.file_sha256(path) for path in (
        Path(tool.__file__), *map(Path(__file__).with_name, beside))]
    sizes = [(name, path.stat().st_size) for name, path in sources]
    stamp = hashlib.sha256(repr((sorted(DEMO.items()), sys.version, code, sizes)).encode()
                           ).hexdigest()
    folder = Path(folder)
    if not ((folder / "stamp").is_file() and (folder / "stamp").read_text() == stamp):
        begin = time.monotonic()
        building = folder.with_name(folder.name + ".building")
        with tool.file_errors(f"write the demo data {folder}"):
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
            _build_demo(building, sources, log)
            (building / "stamp").write_text(stamp)
            shutil.rmtree(folder, ignore_errors=True)
            building.rename(folder)
        log(f"demo: built {folder} in {time.monotonic() - begin:.1f} s")
    return _demo_paths(folder)


def _demo_paths(folder: Path) -> dict[str, Path]:
    """Where the parts of the demo data are."""
    return {"data_path": folder / "scylla", "tokenizer_path": folder / "scylla" / "demo.yaml",
            "meta_path": folder / "scylla" / tool.META_NAME, "train_text": folder / "train.jsonl",
            "val_text": folder / "val.jsonl", "sp_data_path": folder / "sp",
            "sp_model": folder / "sp" / "demo.model"}


def _build_demo(folder: Path, sources: list[tuple[str, Path]], log: Callable[[str], None]) -> None:
    """Text -> SentencePiece shards -> vocabulary -> exact Scylla shards, as the tool does it."""
    paths, workers = _demo_paths(folder), min(2, tool.default_workers())
    splits = demo_documents(sources, workers)
    log("demo: " + ", ".join(f"{sum(map(len, documents)) / 1e6:.2f} MB of {split} text"
                             for split, documents in splits.items()))
    shards = tool.OutputFolder(paths["sp_data_path"])
    sample = vocabulary.first_bytes(splits["train"], DEMO["sample_bytes"])
    shards.put(paths["sp_model"].name, train_sentencepiece(sample, DEMO["pieces"]))
    model = tool.SentencePieceModel(paths["sp_model"])
    tokenizer = SentencePieceTokenizer(model)
    for split, documents in splits.items():
        path = paths[f"{split}_text"]
        write_documents(path, documents)
        tool.DocumentJob(shards, tokenizer, DocumentReader([path]), split).run(workers)
        made = [shards.path / f"fineweb_{split}_000000.bin"]
        write_documents(path, shard_documents(made, model))
    shards.publish(tokenizer)
    texts = DocumentReader([paths["train_text"]]).documents()
    data = vocabulary.build_vocab(vocabulary.first_bytes(texts, DEMO["sample_bytes"]),
                                  DEMO["vocabulary_ids"], case=DEMO["case"])
    segmenter = tool.Segmenter(tool.load_vocabulary(data, "demo.yaml"))
    output = tool.OutputFolder(paths["data_path"])
    inputs = tool.find_shards([str(shards.path / "fineweb_*.bin")])
    tool.ShardJob(output, segmenter, inputs, model).run(workers)
    output.publish(segmenter)
    log(f"demo: {np.count_nonzero(segmenter.base_bytes)} tokens, byte-exact")


def byte_model_bpb(train_text: Path, val_text: Path) -> float:
    """Bits per byte of an order-2 byte model of one text on the other: the demo's yardstick.

    Witten-Bell interpolation of orders 2, 1 and 0 with the uniform distribution. Both files are
    JSON lines; a document begins after two zero bytes, which are not scored.
    """
    seen, text = (np.frombuffer(b"".join(b"\0\0" + document for document in
                                         DocumentReader([path]).documents()), np.uint8)
                  for path in (train_text, val_text))
    probability = np.full(text.size - 2, 1 / 256)
    for order in range(3):
        grams, wanted = (sum(t[2 - i:t.size - i].astype(np.int64) << 8 * i
                             for i in range(order + 1)) for t in (seen, text))
        counts = np.bincount(grams, minlength=256 ** (order + 1)).reshape(-1, 256)
        total, kinds = counts.sum(1)[wanted >> 8], (counts > 0).sum(1)[wanted >> 8]
        mixed = (counts.ravel()[wanted] + kinds * probability) / np.maximum(total + kinds, 1)
        probability = np.where(total > 0, mixed, probability)
    return float(-np.log2(probability[text[2:] > 0]).mean())
