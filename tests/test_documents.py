"""The re-tokenizer on documents, plain and compressed, and on vocabularies that lose bytes."""

from __future__ import annotations

import functools
import gzip
import json
import lzma
import sys
import types
import urllib.error
import urllib.parse
from pathlib import Path

import numpy as np
import pytest

import harness as h
import references as ref
import retokenize_scylla as R

BAD_DOCUMENTS = {
    "": "empty source: no documents", "{\"text\": 3}\n": "bad.jsonl:1: no string \"text\"",
    "{\"text\": \"a\"}\n\n{\"body\": \"a\"}\n": "bad.jsonl:3: no string \"text\"",
    "{\"text\": \"a\n": "bad.jsonl:1: not JSON",
    "[" * 100000: "bad.jsonl:1: not JSON (maximum", "[1]\n": "no string \"text\"",
    "{\"text\": \"a\\ud800\"}\n": "lone surrogate at character 1"}


def test_bad_documents_are_refused_by_line(case, retokenize):
    path = case.folder / "bad.jsonl"
    for lines, message in BAD_DOCUMENTS.items():
        path.write_text(lines)
        for workers in "12":
            code, text = retokenize(["--docs", path, "--vocab", case.vocab, "--output-dir",
                                     case.output, "--workers", workers])
            assert code == 1 and message in text, (lines, text)
            assert not list(case.output.glob("*.bin"))


def compressed(data: bytes, suffix: str) -> bytes:
    """Data as a file of that suffix would hold it, in two concatenated parts."""
    if suffix == ".zst":
        pack = pytest.importorskip("zstandard").ZstdCompressor().compress
    else:
        pack = {"": bytes, ".gz": functools.partial(gzip.compress, mtime=0), ".xz": lzma.compress}[
            suffix]
    return pack(data[:1000]) + bytes(4 * (suffix == ".xz")) + pack(data[1000:])


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_compressed_documents_and_shard_size(case, retokenize, suffix, monkeypatch):
    monkeypatch.setattr(R, "BLOCK_BYTES", 3000)
    texts = [*h.texts(60, 3), "", "caf\u00e9\n\x00 raw"]
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path = case.folder / f"docs.jsonl{suffix}"
    path.write_bytes(compressed(data, suffix))
    arguments = ["--docs", path, "--split", "val", "--vocab", case.vocab, "--shard-tokens",
                 "1500", "--output-dir", case.output, "--workers", "2"]
    code, text = retokenize(arguments)
    shards = sorted(case.output.glob("fineweb_val_*.bin"))
    assert code == 0 and len(shards) > 2 and shards[0].name == "fineweb_val_000000.bin"
    slow = ref.Segmenter([bytes([k]) for k in range(256)] + h.TOKENS)
    expected, stream = [[277, *slow.encode(text.encode())] for text in texts], []
    for shard in shards:
        ids = h.read_shard(shard)
        stream += ids
        last_bos = len(ids) - 1 - ids[::-1].index(277)
        assert ids[0] == 277 and last_bos < 1500, "a shard ends with the document that fills it"
        assert shard == shards[-1] or len(ids) >= 1500
    assert stream == [k for ids in expected for k in ids]
    totals = h.read_manifest(case.output)["totals"]["val"]
    size = sum(len(text.encode()) for text in texts)
    assert [totals[key] for key in ("documents", "source_bytes", "decoded_bytes")] == [
        62, size, size]
    before = h.contents(case.output)
    assert f"0 made, {len(shards)} skipped" in retokenize(arguments)[1]
    shards[1].unlink()
    assert f"{len(shards) - 1} made, 1 skipped" in retokenize(arguments)[1]
    assert h.contents(case.output) == before
    arguments[arguments.index("1500")] = "1000000"
    code, text = retokenize(arguments)
    assert code == 1 and "shard_tokens 1500, now 1000000" in text
    assert h.contents(case.output) == before
    assert "1 made, 0 skipped" in retokenize([*arguments, "--overwrite"])[1]
    assert [path.name for path in case.output.glob("*.bin")] == ["fineweb_val_000000.bin"]


def test_truncated_archives_are_refused(case, retokenize):
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in h.texts(50))
    for suffix in (".gz", ".xz", ".zst"):
        path, whole = case.folder / f"docs.jsonl{suffix}", compressed(data, suffix)
        for damaged in (whole[:-20], b"not an archive" * 9, whole + b"not an archive" * 9):
            path.write_bytes(damaged)
            code, text = retokenize(["--docs", path, "--vocab", case.vocab, "--output-dir",
                                     case.output, "--workers", "1"])
            assert code == 1 and f"{path.name}: damaged or truncated" in text
            assert not list(case.output.glob("*.bin"))


def test_documents_to_sentencepiece_shards(case, retokenize):
    path = case.folder / "docs.jsonl"
    texts = [*h.texts(30, 4), " two  spaces\nand a line", "\u2581\u00ff"]
    h.write_documents(path, texts)
    code, _ = retokenize(["--docs", path, "--sp-model", case.model, "--output-dir",
                          case.output, "--workers", "1"])
    parts = [[1, *ids] for ids in case.processor.encode(texts)]
    assert h.read_shard(case.output / "fineweb_train_000000.bin") == sum(parts, [])
    manifest = h.read_manifest(case.output)
    source = sum(len(case.processor.decode(ids).encode()) for ids in parts)
    assert code == 0 and manifest["tokenizer"]["kind"] == "sentencepiece"
    assert manifest["source"] == {"kind": "docs", "model_sha256": R.file_sha256(case.model)}
    assert manifest["totals"]["train"]["source_bytes"] == source
    assert manifest["totals"]["train"]["decoded_bytes"] == source


class Tokenmonster(types.ModuleType):
    """A stand-in for the tokenmonster package: UTF-8, one id per byte, non-ASCII bytes dropped."""

    def __init__(self, error: Exception | None = None):
        super().__init__("tokenmonster")
        self.error, self.loaded = error, None

    def load(self, path: str):
        if self.error:
            raise self.error
        self.loaded = Path(path).read_bytes()
        return self

    def __len__(self) -> int:
        return 998

    def tokenize(self, text: bytes):
        assert isinstance(text, bytes)
        return np.array([k for k in text if k < 128], dtype=np.uint16) if text else None

    def decode(self, ids):
        return "".join(map(chr, (k if k < 128 else 63 for k in ids))) if len(ids) else None


def lossy_arguments(case: h.Case, *more: str) -> list[str]:
    case.vocab = case.folder / "candidate.vocab"
    header = bytes.fromhex("0201010130000000ffffffe60300e60300cd040025000e01")
    case.vocab.write_bytes(header + bytes(100))
    return case.arguments(*more)


def test_lossy_vocabulary_is_refused_by_its_header(case, retokenize):
    code, text = retokenize(lossy_arguments(case))
    assert code == 1 and "candidate.vocab: refused: not byte-exact" in text
    assert "998 tokens with capcode 2, charset UTF-8, normalization NFD" in text
    assert "--allow-lossy" in text and not case.output.exists()


def test_allow_lossy_needs_the_package_and_its_helper(case, retokenize, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenmonster", None)
    code, text = retokenize(lossy_arguments(case, "--allow-lossy"))
    assert code == 1 and "pip install tokenmonster" in text
    error = urllib.error.URLError(OSError(-2, "Name or service not known"))
    monkeypatch.setitem(sys.modules, "tokenmonster", Tokenmonster(error))
    code, text = retokenize(lossy_arguments(case, "--allow-lossy"))
    assert code == 1 and "cannot load its helper" in text and "needs a network once" in text
    assert "Name or service not known" in text and not case.output.exists()


def test_allow_lossy_states_what_is_wrong(case, retokenize, monkeypatch):
    module = Tokenmonster()
    monkeypatch.setitem(sys.modules, "tokenmonster", module)
    code, text = retokenize(lossy_arguments(case, "--allow-lossy", "--workers", "2"))
    assert code == 0 and "NOT EXACT" in text and module.loaded == case.vocab.read_bytes()
    manifest = h.read_manifest(case.output)
    assert manifest["tokenizer"]["byte_exact"] is False
    assert (manifest["tokenizer"]["bos_id"], manifest["tokenizer"]["vocab_size"]) == (998, 999)
    source = [text for k in range(4) for text in case.source(k)]
    kept = [bytes(k for k in text if k < 128) for text in source]
    bad = sum(a != b for a, b in zip(source, kept, strict=True))
    totals = manifest["totals"]["all"]
    assert (totals["bad_documents"], totals["source_bytes"], totals["decoded_bytes"]) == (
        bad, sum(map(len, source)), sum(map(len, kept)))
    assert 0 < bad and totals["source_bytes"] > totals["decoded_bytes"]
    assert all(entry["status"] == "lossy" for entry in manifest["shards"].values())
