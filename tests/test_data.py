"""Data: shards -> batches, ids -> source bytes, the audit of the bytes."""

from __future__ import annotations

import functools
import json
import re
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

import harness as h
import train_gpt as t


def test_document_attention_needs_boundaries(tmp_path):
    """Without a document's start in the text it is refused, whatever boundaries the table has."""
    data, about = h.dataset(tmp_path, byte_exact=False), h.table()
    h.audit(data, doc_attention=True)
    for boundary in (np.zeros(h.VOCAB, bool), np.arange(h.VOCAB) == h.VOCAB - 2):
        h.write_meta(tmp_path / "tiny.meta.npz", about._replace(is_boundary=boundary))
        for path in data.glob("fineweb_val_*.bin"):
            ids = np.array(h.read_shard(path))
            h.write_shard(path, np.where(ids == h.VOCAB - 2, 1, ids))
        h.audit(data)
        with pytest.raises(t.RunError, match=r"DOC_ATTENTION=1, but by .*tiny\.meta\.npz no .*=0"):
            h.audit(data, doc_attention=True)


def test_bad_shards_are_refused_by_name(tmp_path):
    """Wrong magic, version or count: the file, what is wrong, what to do."""
    path = tmp_path / "bad_shard.bin"
    for change, message in (
            (dict(magic=1), "magic 1 version 1, expected 20240520 version 1"),
            (dict(version=7), "magic 20240520 version 7, expected 20240520 version 1"),
            (dict(count=99), "1224 bytes, but the 99 tokens of its header take 1222"),
            (dict(count=101), "1224 bytes, but the 101 tokens of its header take 1226"),
            (dict(count=-100), "1224 bytes, but the -100 tokens")):
        h.write_shard(path, range(100), **change)
        with pytest.raises(t.RunError, match=re.escape(message)) as caught:
            t.open_shard(path)
        assert str(path) in str(caught.value)


def test_empty_shards_change_nothing(tmp_path):
    """A shard without tokens is passed over; a split without tokens is refused."""
    data = h.dataset(tmp_path)
    config = h.config(data_path=str(data))
    load = functools.partial(t.Loader, c=config, runtime=h.runtime(), vocab_size=h.VOCAB)
    table, before = t.load_byte_table(config), h.audit(data)
    steps = [load(t.find_shards(config, "train")).read(step) for step in range(40)]
    for name in ("train_0000005", "val_0000005"):
        h.write_shard(data / f"fineweb_{name}.bin", [])
    h.edit_manifest(data, lambda m: m["shards"].update(
        {"fineweb_val_0000005.bin": {"source_bytes": 0}}))
    loader = load(t.find_shards(config, "train"))
    assert all(torch.equal(loader.read(step), want) for step, want in enumerate(steps))
    assert t.load_validation(config, table).ids.tolist() == before.ids.tolist()
    for split in ("train", "val"):
        for path in data.glob(f"fineweb_{split}_*.bin"):
            h.write_shard(path, [])
    with pytest.raises(t.RunError, match="fineweb_val"):
        t.load_validation(config, table)
    with pytest.raises(t.RunError, match="train"):
        load(t.find_shards(config, "train"))


def test_no_shards_is_an_error_with_the_pattern(tmp_path):
    """An empty glob says which, and what to do; shards are sorted by name."""
    with pytest.raises(t.RunError, match=r"fineweb_train_\*\.bin; set DATA_PATH"):
        t.find_shards(h.config(data_path=str(tmp_path)), "train")
    for n in (2, 10, 1):
        h.write_shard(tmp_path / f"fineweb_val_{n:06d}.bin", [1, 2])
    names = [p.name[-6:-4] for p in t.find_shards(h.config(data_path=str(tmp_path)), "val")]
    assert names == ["01", "02", "10"]


def test_the_next_batch_is_read_ahead_on_a_thread(tmp_path):
    """After a batch is handed out, the next one is already on its way."""
    loader = h.loader(tmp_path)
    loader.batch(0)
    assert loader.ahead[0] == 1 and loader.ahead[1].result().shape == (8, 33)
    loader.read = None  # the coming batch must not be read again
    loader.pool = types.SimpleNamespace(submit=lambda *_: None)
    assert loader.batch(1)[0].shape == (8, 32)


def test_a_batch_may_span_the_border_of_epochs(tmp_path):
    """The last blocks of an epoch and the first of the next share a batch; nothing is dropped."""
    loader = h.loader(tmp_path)
    blocks = int(loader.ends[-1])
    step = blocks // 8
    assert blocks % 8
    want = np.stack([loader.sequence(i) for i in range(8 * step, 8 * step + 8)])
    assert loader.read(step).tolist() == want.tolist()
    first = [int(row[0]) for row in want[: blocks % 8]]
    seen = [int(loader.sequence(i)[0]) for i in range(8 * step)]
    assert not set(first) & set(seen)


def test_batches_that_ranks_cannot_share_are_refused(tmp_path):
    """The message says which batch size would do."""
    with pytest.raises(t.RunError, match=r"WORLD_SIZE=3 does not divide the 8 sequences of a step; "
                       "make TRAIN_BATCH_TOKENS a multiple of 96"):
        h.loader(tmp_path, 0, 3)
    with pytest.raises(t.RunError, match="lower TRAIN_SEQ_LEN or add shards"):
        h.loader(tmp_path, train_seq_len=1024, train_batch_tokens=1024, eval_seq_len=1024)


def test_micro_batches_divide_the_step_of_a_rank():
    """Automatic ones by memory, given ones exactly or not at all."""
    c, cpu = h.config(), h.runtime()
    assert t.micro_batch_seqs(8, c, cpu) == 8
    assert t.micro_batch_seqs(600, h.config(train_seq_len=256), cpu) == 60  # at most 16384 tokens
    assert t.micro_batch_seqs(8, h.config(micro_batch_tokens=64), cpu) == 2
    with pytest.raises(t.RunError, match="MICRO_BATCH_TOKENS=96 does not divide the 256 tokens"):
        t.micro_batch_seqs(8, h.config(micro_batch_tokens=96), cpu)


def test_byte_table_from_meta(tmp_path):
    """The table of the file, and bytes that depend on the previous id."""
    table = t.table_from_meta(h.write_meta(tmp_path / "x.meta.npz", h.table()))
    for have, want in zip(table[:3], h.table()[:3], strict=True):
        assert have.tolist() == want.tolist()
    assert table.base_bytes.dtype == np.int64 and table.is_boundary.dtype == bool
    previous, ids = np.array([h.BOS, 1, 1, 5, 3]), np.array([3, 3, 4, h.BOS, 2])
    assert table.count(previous, ids).tolist() == [1, 2, 2, 0, 3]


def test_bad_meta_is_refused_by_name(tmp_path):
    """A missing array, lengths that do not fit, garbage, and a file cut or changed anywhere."""
    path, about = tmp_path / "bad.meta.npz", h.table()
    data = bytearray(h.write_meta(path, about).read_bytes())
    damaged = [b"", b"garbage", bytes(data[:-30]), bytes(data[: len(data) // 2])]
    data[400] ^= 255  # within the values of base_bytes: the CRC of the zip member
    for change in (
            dict(base_bytes=None), dict(has_leading_space=None), dict(is_boundary_token=None),
            dict(vocab_size=None), dict(vocab_size=h.VOCAB - 1),
            dict(base_bytes=np.ones(h.VOCAB + 1))):
        damaged.append(h.write_meta(path, about, **change).read_bytes())
    for bad in (*damaged, bytes(data)):
        path.write_bytes(bad)
        with pytest.raises(t.RunError, match="bad.meta.npz"):
            t.table_from_meta(path)


def test_missing_or_ambiguous_tokenizers_are_refused(tmp_path):
    """Which files were found and which setting decides."""
    for n, (settings, files, message) in enumerate([
            ({}, [], "no single tokenizer: none in"),
            ({}, ["a.meta.npz", "b.meta.npz"], "a.meta.npz,.*b.meta.npz"),
            (dict(tokenizer_path="no.model"), [], "no.model; set TOKENIZER_PATH"),
            (dict(tokenizer_path="no.vocab"), [], "no.meta.npz; set TOKENIZER_PATH"),
            (dict(vocab_size=301), ["a.meta.npz"], "VOCAB_SIZE=301 but .*a.meta.npz has 300 ids")]):
        folder = tmp_path / str(n)
        folder.mkdir()
        for name in files:
            h.write_meta(folder / name, h.table())
        with pytest.raises(t.RunError, match=message):
            t.load_byte_table(h.config(data_path=str(folder), **settings))


def test_tokenizers_are_found_where_the_settings_say(tmp_path):
    """TOKENIZER_META_PATH, then TOKENIZER_PATH (table beside the vocabulary), then DATA_PATH."""
    paths = {n: h.write_meta(tmp_path / n / "v.meta.npz", h.table())
             for n in "abc" if not (tmp_path / n).mkdir()}
    config = h.config(data_path=str(tmp_path / "a"), vocab_size=h.VOCAB)
    assert t.load_byte_table(config).path == paths["a"]
    (tmp_path / "b" / "v.vocab").touch()
    config = replace(config, tokenizer_path=str(tmp_path / "b" / "v.vocab"))
    assert t.load_byte_table(config).path == paths["b"]
    config = replace(config, tokenizer_path=str(paths["b"]))
    assert t.load_byte_table(config).path == paths["b"]
    assert t.load_byte_table(replace(config, tokenizer_meta_path=str(paths["c"]))).path == (
        paths["c"])


def test_the_manifest_says_which_tokenizer_the_shards_have(tmp_path):
    """Where a .model and a .meta.npz lie, the ledger decides; without one, neither is taken."""
    data, model = h.dataset(tmp_path), tmp_path / "sp.model"
    model.write_bytes(h.sentencepiece_model())
    table, = data.glob("*.meta.npz")
    model = model.rename(data / model.name)
    c = h.config(data_path=str(data))
    for kind, path in (("tokenmonster", table), ("sentencepiece", model)):
        h.edit_manifest(data, lambda m, kind=kind: m["tokenizer"].update(kind=kind))
        assert t.load_byte_table(c).path == path
    h.edit_manifest(data, lambda m: m["tokenizer"].pop("kind"))
    with pytest.raises(t.RunError, match="no single tokenizer"):
        t.load_byte_table(c)


TEXT = ["The cat sat on the mat, and the dog was not amused at all.",
        "Numbers 12 345 and   runs of spaces; na\u00efve caf\u00e9 \u4f60\u597d \U0001f600 end",
        " leading and trailing ", "line", "a b c d e f g h i j", "don't stop 3.14159 %"] * 20


def trained_sentencepiece(folder, lone_space=True):
    """A SentencePiece model trained on a few lines, with a piece for a lone space or without."""
    spm = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    text, prefix = folder / f"text{lone_space}.txt", folder / f"sp{int(lone_space)}"
    kept = [line if lone_space else line.replace(" ", "") for line in TEXT]
    text.write_text("\n".join(kept), encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(prefix), vocab_size=400, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, character_coverage=0.98,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, add_dummy_prefix=lone_space)
    path = prefix.with_suffix(".model")
    return path, spm.SentencePieceProcessor(model_file=str(path))


def test_byte_table_of_a_sentencepiece_model(tmp_path):
    """Byte pieces 1, control and unknown 0 and boundary; counts equal the decoded text."""
    path, sp = trained_sentencepiece(tmp_path)
    table = t.table_from_sentencepiece(path)
    for i in range(sp.vocab_size()):
        if i < 4:
            assert table.is_boundary[i] and not table.base_bytes[i]
        elif sp.is_byte(i):
            assert table.base_bytes[i] == 1 and not table.is_boundary[i]
        else:
            assert table.base_bytes[i] + table.has_leading_space[i] == len(
                sp.id_to_piece(i).replace("\u2581", " ").encode())
    lone = sp.piece_to_id("\u2581")
    assert table.base_bytes[lone] == 0 and table.has_leading_space[lone]
    encoded = [[sp.bos_id(), *sp.encode(text)] for text in TEXT if text == text.strip()]
    sizes = [len(sp.decode(ids).encode("utf-8")) for ids in encoded]
    for ids, size in zip(map(np.array, encoded), sizes, strict=True):
        assert int(table.count(ids[:-1], ids[1:]).sum()) == size
    shard = h.write_shard(tmp_path / "fineweb_val_000000.bin", np.concatenate(encoded))
    (tmp_path / "manifest.json").write_text(json.dumps(dict(
        tokenizer=dict(byte_exact=True), shards={shard.name: dict(source_bytes=sum(sizes))})))
    val = t.load_validation(h.config(data_path=str(tmp_path), tokenizer_path=str(path)), table)
    assert val.audit == "exact" and int(val.bytes.sum()) == sum(sizes)


def test_useless_sentencepiece_models_are_refused_by_name(tmp_path):
    """Without a piece for a lone U+2581 their counts would be wrong; a file that is no model."""
    path, _ = trained_sentencepiece(tmp_path, lone_space=False)
    with pytest.raises(t.RunError, match=r"sp0\.model: has no piece for a lone U\+2581"):
        t.table_from_sentencepiece(path)
    path = tmp_path / "bad.model"
    path.write_bytes(b"this is no model")
    with pytest.raises(t.RunError, match="bad.model"):
        t.table_from_sentencepiece(path)


@h.needs_shared
def test_published_byte_tables_load():
    """The byte tables that circulate are read as they are."""
    for name, ids in (("scylla", 1254), ("candidate", 998)):
        assert len(t.table_from_meta(h.SHARED / "data" / f"{name}.meta.npz").base_bytes) == ids


def test_bad_documents_and_bad_manifests_stop_the_run(tmp_path):
    """A document that does not decode back, or a manifest that is not JSON."""
    data = h.dataset(tmp_path)
    h.edit_manifest(data, lambda m: m["shards"]["fineweb_val_000001.bin"].update(bad_documents=1))
    with pytest.raises(t.RunError, match="byte audit failed.*1 bad documents"):
        h.audit(data)
    entry = '{"shards": {"fineweb_val_000000.bin": {"x": 1}, "fineweb_val_000001.bin": {"x": 1}}, '
    for text in ("{", "[]", '{"tokenizer": 3}', '{"shards": 3, "tokenizer": {"byte_exact": true}}',
                 entry + '"tokenizer": {"byte_exact": true}}'):
        (data / "manifest.json").write_text(text)
        with pytest.raises(t.RunError, match=r"manifest\.json: no manifest of retokenize_scylla"):
            h.audit(data)


@h.needs_shared
@pytest.mark.parametrize("engine", ["scylla.yaml", "fineweb_1024_bpe.model"])
def test_bytes_of_every_real_document_are_exact(engine, tmp_path):
    """retokenize --docs, load, score, dump: per document, dumped bytes are its source bytes."""
    documents, source = h.SHARED / "data" / "fineweb_docs.jsonl", h.SHARED / "data" / engine
    h.retokenized(documents, source, "val", tmp_path / "out")
    c = h.config(data_path=str(tmp_path / "out"), eval_stride=32, val_batch_size=1 << 16,
                 scores_path=str(tmp_path))
    table = t.load_byte_table(c)
    evaluator = t.Evaluator(h.runtime(), c, t.load_validation(c, table))
    evaluator.save_scores("x", evaluator.score(lambda x, y: y.float(), 32)[1])
    dump = np.load(tmp_path / "x.npz")
    assert evaluator.val.audit == "exact" and np.array_equal(dump["ids"], dump["nats"])
    ids = np.append(evaluator.val.ids[0], dump["ids"])  # the first id is context only
    begins = np.flatnonzero(table.is_boundary[ids])
    texts = [json.loads(line)["text"] for line in documents.read_text(
        encoding="utf-8").splitlines()]
    assert begins[0] == 0 and len(begins) == len(texts) == 120
    if source.suffix == ".model":  # its source text is what it decodes to
        sp = pytest.importorskip("sentencepiece").SentencePieceProcessor(
            model_file=str(source))
        texts = [sp.decode(ids[a + 1 : b].tolist()) for a, b in zip(
            begins, [*begins[1:], len(ids)], strict=True)]
    counted = np.add.reduceat(np.append(0, dump["bytes"]), begins)
    assert counted.tolist() == [len(text.encode()) for text in texts]


def test_first_id_is_context_only(tmp_path):
    """If the stream does not start with a boundary, its first bytes are not in the denominator."""
    data = h.dataset(tmp_path)
    path = data / "fineweb_val_000000.bin"
    ids = np.fromfile(path, "<u2")[512:]
    ids[0] = 5  # three bytes
    h.write_shard(path, ids)
    source = h.source_bytes(ids, h.table())
    h.edit_manifest(data, lambda m: m["shards"][path.name].update(source_bytes=source))
    second = np.fromfile(data / "fineweb_val_000001.bin", "<u2")[512:]
    total = source + h.source_bytes(second, h.table())
    audited = h.audit(data)
    assert audited.audit == "exact" and int(audited.bytes.sum()) == total - 3
    with h.inside(tmp_path) as console:
        t.run(h.config(data_path=str(data), iterations=1, eval_modes=("roundtrip",)))
    assert f"byte_audit:exact bytes:{total - 3} (the first id is context only" in console.getvalue()
