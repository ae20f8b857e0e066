"""The demo's data and its yardstick."""

from __future__ import annotations

import json

import numpy as np
import pytest

import harness as h
import references as ref
import retokenize_scylla as R
from records import demo_data as D


@pytest.mark.slow
def test_demo_is_built_once_and_is_honest(tmp_path, monkeypatch):
    monkeypatch.setitem(D.DEMO, "packages", [])
    monkeypatch.setitem(D.DEMO, "val_bytes", 30_000)
    monkeypatch.setitem(D.DEMO, "sample_bytes", 100_000)
    monkeypatch.setitem(D.DEMO, "vocabulary_ids", 400)
    sources = D.demo_sources()
    assert ("pydoc_data/topics.py" in dict(sources)) and not any(
        {"test", "tests"} & set(name.split("/")) for name, _ in sources)
    monkeypatch.setattr(D, "demo_sources", lambda: [source for source in sources
                                                    if source[0][0] in "abcdefg"])
    lines: list[str] = []
    paths = D.build_demo(tmp_path / "demo", lines.append)
    assert lines and all(path.exists() for path in paths.values())
    before = h.contents(tmp_path / "demo")
    assert D.build_demo(tmp_path / "demo", lines.clear) == paths
    texts = {}
    for split in ("train", "val"):
        texts[split] = [json.loads(line)["text"] for line in open(paths[f"{split}_text"])]
        size = sum(len(text.encode()) for text in texts[split])
        for folder in (paths["data_path"], paths["sp_data_path"]):
            totals = h.read_manifest(folder)["totals"][split]
            assert (totals["source_bytes"], totals["decoded_bytes"], totals["bad_documents"]) == (
                size, size, 0)
        vocabulary = R.load_vocabulary(paths["tokenizer_path"])
        ids = h.read_shard(paths["data_path"] / f"fineweb_{split}_000000.bin")
        documents = R.Documents.after_bos(ids, vocabulary.bos_id).split()
        assert texts[split] == [ref.restored(b"".join(
            vocabulary.tokens[k] for k in document)).decode() for document in documents]
        assert vocabulary.marked and ids[0] == vocabulary.bos_id
    assert not set(texts["train"]) & set(texts["val"]) and len(texts["val"]) > 3
    model = R.SentencePieceModel(paths["sp_model"])
    assert [model.processor.id_to_piece(k) for k in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert model.vocab_size == 1024 and model.processor.piece_to_id("\u2581") > 258
    monkeypatch.setitem(D.DEMO, "version", 2)
    D.build_demo(tmp_path / "demo", lines.append)
    after = h.contents(tmp_path / "demo")
    assert {name for name in before if before[name] != after[name]} == {"stamp"}


def test_demo_texts_are_never_in_both_splits(tmp_path):
    sources = []
    for k in range(60):
        path = tmp_path / f"m{k}.py"
        shared = f"A docstring that several modules have,\nas number {k % 20} shows to readers."
        path.write_text(f'"""Module {k} with a text of its own,\nwhich is long enough."""\n'
                        f'def f():\n    """{shared}"""\n')
        sources.append((path.name, path))
    splits = D.demo_documents(sources, 1)
    texts = [text for split in splits.values() for document in split
             for text in document.decode().split("\n\n")]
    assert len(texts) == len(set(texts)) == 80


def test_byte_model_is_witten_bell(tmp_path):
    """The yardstick's closed form, by hand on a few bytes: contexts, orders, what is scored."""
    train, val = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    train.write_text(json.dumps({"text": "ab"}) + "\n" + json.dumps({"text": "ac"}) + "\n")
    val.write_text(json.dumps({"text": "ab"}) + "\n")

    def mixed(count, total, kinds, lower):
        return (count + kinds * lower) / (total + kinds)

    # counted symbols after the two leading zeros: a b 0 0 a c; in contexts of 0, 1 and 2 bytes
    a0, b0 = mixed(2, 6, 4, 1 / 256), mixed(1, 6, 4, 1 / 256)
    a1 = mixed(2, 3, 2, a0)  # after 0: a, 0, a
    b1 = mixed(1, 2, 2, b0)  # after a: b, c
    a2 = mixed(2, 2, 1, a1)  # after 0 0: a, a
    b2 = mixed(1, 2, 2, b1)  # after 0 a: b, c
    expected = -np.log2([a2, b2]).mean()
    assert D.byte_model_bpb(train, val) == pytest.approx(expected, abs=1e-12)
