"""The re-tokenizer: shards, restarts, workers, bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

import harness as h
import references as ref
import retokenize_scylla as R
from records.documents import DocumentReader
from records.other_tokenizers import SentencePieceTokenizer
from records.retokenizer_bench import CAPITALS


def retokenizer(arguments: list[str], prelude: str = "") -> subprocess.Popen:
    """The tool in a process of its own, after some statements that disturb it."""
    code = ("import hashlib, os, signal, sys, time, resource\nimport retokenize_scylla as R\n"
            f"{prelude}\nsys.exit(R.main(sys.argv[1:]))")
    return h.start(["-c", code, *arguments], h.ROOT)


def check_output(case: h.Case, shards: int = 4) -> None:
    """Every output shard decodes to the documents that begin in its input shard, and so counts."""
    vocabulary = R.load_vocabulary(case.vocab)
    slow = ref.Segmenter(vocabulary.tokens)
    form = ref.marked if vocabulary.marked else bytes
    manifest, total = h.read_manifest(case.output), dict.fromkeys(R.COUNTS, 0)
    assert sorted(manifest["shards"]) == [case.shard(k).name for k in range(shards)]
    base = np.load(case.output / "scylla.meta.npz")["base_bytes"]
    for k in range(shards):
        path, source = case.output / case.shard(k).name, case.source(k)
        ids = h.read_shard(path)
        assert ids == [i for text in source for i in [vocabulary.bos_id, *slow.encode(form(text))]]
        entry, size = manifest["shards"][path.name], sum(map(len, source))
        assert entry["sha256"] == R.file_sha256(path) and entry["status"] == "exact"
        counts = {"tokens": len(ids), "documents": len(source), "source_bytes": size,
                  "decoded_bytes": size, "bad_documents": 0}
        assert {key: entry[key] for key in R.COUNTS} == counts
        assert size == base[ids].sum(dtype=np.int64)
        total = {key: total[key] + counts[key] for key in R.COUNTS}
    assert manifest["totals"]["all"] == manifest["totals"]["train"] == total


def test_shards_with_documents_across_borders(case, retokenize, monkeypatch):
    monkeypatch.setattr(R, "BLOCK_IDS", 97)
    code, text = retokenize(case.arguments())
    assert code == 0 and "4 made" in text and "exact" in text
    assert all(h.read_shard(case.shard(k))[0] != 1 for k in (1, 2, 3)), "must cross"
    check_output(case)
    manifest = h.read_manifest(case.output)
    assert manifest["tokenizer"] == {
        "kind": "tokenmonster", "path": "toy.yaml", "sha256": R.file_sha256(case.vocab),
        "vocab_size": 278, "byte_exact": True, "bos_id": 277}
    assert manifest["source"] == {"kind": "sp-shards",
                                  "model_sha256": R.file_sha256(case.model)}
    meta = np.load(case.output / "scylla.meta.npz")
    assert meta["is_boundary_token"].nonzero()[0].tolist() == [277]
    assert not meta["has_leading_space"].any() and meta["base_bytes"].dtype == np.int16
    assert (int(meta["format_version"]), str(meta["tokenizer_kind"]), int(meta["vocab_size"])) == (
        1, "tokenmonster", 278)
    assert (case.output / "toy.yaml").read_bytes() == case.vocab.read_bytes()


def test_shards_of_a_vocabulary_with_case(tmp_path, retokenize, monkeypatch):
    """Capitals as marks, with documents across shards and blocks; the trainer's audit is exact."""
    monkeypatch.setattr(R, "BLOCK_IDS", 97)
    case = h.Case(tmp_path / "marks", case="ascii")
    assert retokenize(case.arguments())[0] == 0
    check_output(case)
    every = {k for shard in range(4) for k in h.read_shard(case.output / case.shard(shard).name)}
    tokens = R.load_vocabulary(case.vocab).tokens
    assert {tokens.index(token) for token in (b"\xff", b"\xfe u", b"\xffz")} < every
    for shard in range(4):
        name = case.shard(shard).name
        (case.output / name).rename(case.output / name.replace("train", "val"))
    manifest = case.output / "manifest.json"
    manifest.write_text(manifest.read_text().replace("train", "val"))
    val = h.audit(case.output)
    assert val.audit == "exact" and int(val.bytes.sum()) == sum(
        len(text) for shard in range(4) for text in case.source(shard))


def test_document_longer_than_a_shard(tmp_path, retokenize):
    case = h.Case(tmp_path / "long", documents=1, shards=3)
    assert retokenize(case.arguments())[0] == 0
    check_output(case, shards=3)
    assert h.read_shard(case.output / case.shard(1).name) == []


def test_invalid_utf8_documents_take_the_slow_way(case, retokenize):
    case.documents = [[1, 4 + 0xE2, 4 + 0x80, 290], [1, 291, 4 + 0xFF, 292], [1], [1, 290]]
    for path in (case.folder / "in").iterdir():
        path.unlink()
    h.write_shard(case.shard(0), [k for ids in case.documents for k in ids])
    case.first_of_shard = [0, 4]
    assert retokenize(case.arguments())[0] == 0
    check_output(case, shards=1)
    assert b"\xef\xbf\xbd" in case.source(0)[0]


@h.needs_shared
@pytest.mark.parametrize("case", ["none", "ascii"])
def test_real_documents_are_exact_to_the_byte(tmp_path, retokenize, case):
    """Through the tool, in shards that cut documents, with Scylla and with capitals as marks."""
    data = h.SHARED / "data"
    vocabulary = data / "scylla.yaml"
    if case == "ascii":
        vocabulary = tmp_path / "case.yaml"
        vocabulary.write_bytes(h.vocabulary(case=case))
    model = ["--sp-model", data / "fineweb_1024_bpe.model"]
    code, _ = retokenize(["--docs", data / "fineweb_docs.jsonl", "--split", "val", *model,
                          "--output-dir", tmp_path / "sp", "--workers", "1"])
    assert code == 0
    ids = h.read_shard(tmp_path / "sp" / "fineweb_val_000000.bin")
    for k, cut in enumerate([0, 100_001, 250_003]):
        end = [100_001, 250_003, len(ids)][k]
        (tmp_path / "in").mkdir(exist_ok=True)
        h.write_shard(tmp_path / "in" / f"fineweb_val_{k:06d}.bin", ids[cut:end])
    code, _ = retokenize(["--sp-shards", tmp_path / "in" / "*.bin", *model, "--vocab",
                          vocabulary, "--output-dir", tmp_path / "out", "--workers", "1"])
    totals = h.read_manifest(tmp_path / "out")["totals"]["val"]
    base = np.load(tmp_path / "out" / "scylla.meta.npz")["base_bytes"]
    counted = sum(int(base[h.read_shard(path)].sum(dtype=np.int64))
                  for path in (tmp_path / "out").glob("*.bin"))
    processor = R.SentencePieceModel(model[1]).processor
    texts = [json.loads(line)["text"]
             for line in (data / "fineweb_docs.jsonl").read_text().splitlines()]
    source = sum(len(processor.decode(ids).encode()) for ids in processor.encode(texts))
    assert code == 0 and totals["documents"] == 120 and totals["bad_documents"] == 0
    assert totals["source_bytes"] == totals["decoded_bytes"] == counted == source
    sp_totals = h.read_manifest(tmp_path / "sp")["totals"]["val"]
    assert sp_totals["source_bytes"] == sp_totals["decoded_bytes"] == source


@pytest.mark.parametrize("capitals", ["none", "ascii"])
def test_wrong_segmentation_is_never_published(tmp_path, retokenize, monkeypatch, capitals):
    case, original = h.Case(tmp_path / "case", case=capitals), R.Segmenter.segment

    def damaged(self, text):
        ids = original(self, text)
        ids.values[np.flatnonzero(ids.values < 230)[-1]] ^= 1  # another token of the same length
        return ids

    monkeypatch.setattr(R.Segmenter, "segment", damaged)
    code, text = retokenize(case.arguments())
    assert code == 1 and "does not decode to its source" in text
    assert not list(case.output.glob("*.bin"))


def test_wrong_byte_counts_are_never_published(tmp_path, retokenize, monkeypatch):
    """With marks every document's bytes are those that the byte table has for its ids."""
    case, original = h.Case(tmp_path / "case", case="ascii"), R.Vocabulary.__init__

    def damaged(self, *arguments):
        original(self, *arguments)
        self.base_bytes[230] += 1  # " the"

    monkeypatch.setattr(R.Vocabulary, "__init__", damaged)
    code, text = retokenize(case.arguments())
    assert code == 1 and "is not counted so" in text
    assert not list(case.output.glob("*.bin"))


def test_restart_skips_what_is_finished_and_redoes_the_rest(case, retokenize):
    assert retokenize(case.arguments())[0] == 0
    before = h.contents(case.output)
    stamps = {path.name: path.stat().st_ino for path in case.output.glob("*.bin")}
    code, text = retokenize(case.arguments())
    assert code == 0 and "0 made, 4 skipped" in text
    assert stamps == {path.name: path.stat().st_ino for path in case.output.glob("*.bin")}
    shards = [case.output / case.shard(k).name for k in range(4)]
    data = bytearray(shards[0].read_bytes())
    data[2000] ^= 1
    shards[0].write_bytes(data)
    shards[1].unlink()
    (case.output / ".ledger" / f"{shards[2].name}.json").write_text("torn {")
    code, text = retokenize(case.arguments())
    assert code == 0 and "3 made, 1 skipped" in text
    assert h.contents(case.output) == before


def test_restart_redoes_changed_sources(case, retokenize):
    retokenize(case.arguments())
    last = h.read_shard(case.shard(3))
    h.write_shard(case.shard(3), last[:-1])
    assert "1 made, 3 skipped" in retokenize(case.arguments())[1]
    h.write_shard(case.shard(3), [last[0] - 1, *last[1:]])
    assert "1 made, 3 skipped" not in retokenize(case.arguments())[1], "2 has its tail there"


KILL = """
def kill_at(owner, name, number, after=False):
    original, calls = getattr(owner, name), []
    def patched(*arguments, **options):
        calls.append(1)
        if len(calls) == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if len(calls) == number and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, patched)
"""


POINTS = [
    'R.Encoded, "counts", 1', 'hashlib, "file_digest", 1', 'os, "fsync", 1', 'os, "replace", 1',
    'os, "replace", 1, True', 'os, "replace", 2', 'os, "replace", 3, True', 'os, "replace", 6',
    'R.OutputFolder, "publish", 1']


@pytest.mark.slow
def test_killed_at_any_point_ends_byte_identical(case, retokenize):
    retokenize(case.arguments())
    undisturbed = h.contents(case.output)
    for number, point in enumerate(POINTS):
        case.output = case.folder / f"killed{number}"
        process = retokenizer(case.arguments(), KILL + f"kill_at({point})")
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, point
        assert h.contents(case.output) != undisturbed, point
        if (case.output / "manifest.json").exists():
            for name, entry in h.read_manifest(case.output)["shards"].items():
                assert R.file_sha256(case.output / name) == entry["sha256"], point
        assert retokenize(case.arguments())[0] == 0, point
        assert h.contents(case.output) == undisturbed, point


def test_manifest_is_right_when_a_redo_is_killed(case, retokenize):
    retokenize(case.arguments())
    h.write_shard(case.shard(3), h.read_shard(case.shard(3))[:-1] + [290])
    point = 'kill_at(os, "replace", 1, True)'  # the shard is there, its entry and manifest are not
    process = retokenizer(case.arguments(), KILL + point)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (case.output / "manifest.json").exists() and len(R.OutputFolder(
        case.output).entries()) == 3
    assert "1 made, 3 skipped" in retokenize(case.arguments())[1]
    assert len(h.read_manifest(case.output)["shards"]) == 4


SLOW_APPEND = """
original = R.Encoded.counts
def slow(self):
    print("appended", file=sys.stderr, flush=True)
    while not R.Worker.given_up.is_set():
        time.sleep(0.01)
    return original(self)
R.Encoded.counts = slow
"""


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stop_leaves_no_partial_output(case, retokenize, signum):
    for workers in "12":
        case.output = case.folder / f"by{workers}"
        process = retokenizer(case.arguments("--workers", workers), SLOW_APPEND)
        assert "appended" in process.stderr.readline()
        if signum == signal.SIGINT:
            os.killpg(process.pid, signum)
        else:
            process.send_signal(signum)
        _, error = process.communicate(timeout=30)
        assert not list(case.output.glob("*.bin"))
        if signum == signal.SIGKILL:
            assert process.returncode == -signum
        else:
            assert process.returncode == 128 + signum and "stopped" in error
            assert "Traceback" not in error
            assert not list((case.output / ".ledger").iterdir())
        assert retokenize(case.arguments())[0] == 0
        assert not list((case.output / ".ledger").glob("*.part"))
        check_output(case)


def test_stop_between_making_and_guarding(case, retokenize, monkeypatch):
    """A partial file that nothing guards yet is cleared by the stop itself."""
    original = R.tempfile.mkstemp

    def stopped(*arguments):
        os.close(original(*arguments)[0])
        raise R.Stopped(int(signal.SIGTERM))

    monkeypatch.setattr(R.tempfile, "mkstemp", stopped)
    assert retokenize(case.arguments("--workers", "1"))[0] == 128 + signal.SIGTERM
    assert not list((case.output / ".ledger").glob("*.part"))


def test_workers_and_ranks_make_the_same_folder(case, retokenize, monkeypatch):
    retokenize(case.arguments())
    alone = h.contents(case.output)
    case.output = case.folder / "workers"
    assert retokenize(case.arguments("--workers", "3"))[0] == 0
    assert h.contents(case.output) == alone
    case.output = case.folder / "ranks"
    for rank in ("1", "0"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        code, text = retokenize(case.arguments())
        assert code == 0 and "2 made, 0 skipped" in text
    assert h.contents(case.output) == alone
    monkeypatch.setenv("RANK", "2")
    code, text = retokenize(case.arguments())
    assert code == 1 and "RANK=2" in text


def test_manifest_grows_over_invocations(case, retokenize):
    source = case.folder / "val.jsonl"
    h.write_documents(source, h.texts(5))
    documents = ["--docs", source, "--split", "val", "--vocab", case.vocab, "--workers", "1",
                 "--output-dir", case.output]
    assert retokenize(documents)[0] == 0 and retokenize(case.arguments())[0] == 0
    manifest = h.read_manifest(case.output)
    assert len(manifest["shards"]) == 5 and manifest["source"]["kind"] == "mixed"
    totals = manifest["totals"]
    assert totals["val"]["documents"] == 5 and totals["train"]["documents"] == 40
    assert all(totals["all"][key] == totals["val"][key] + totals["train"][key] for key in R.COUNTS)


def test_what_was_made_otherwise_is_kept_unless_told(case, retokenize):
    """Another vocabulary, or another kind of source, for shards that are finished."""
    assert retokenize(case.arguments())[0] == 0
    before, old = h.contents(case.output), R.file_sha256(case.vocab)
    documents = ["--docs", h.write_documents(case.folder / "d.jsonl", h.texts(5)), "--output-dir",
                 case.output, "--workers", "1"]
    code, text = retokenize([*documents, "--vocab", case.vocab])
    assert code == 1 and "fineweb_train_000000.bin was made otherwise: kind sp-shards" in text
    other = case.folder / "other.yaml"
    other.write_bytes(h.vocabulary(h.TOKENS[:5]))
    case.vocab = other
    for arguments in (case.arguments(), [*documents, "--vocab", other, "--split", "val"]):
        code, text = retokenize(arguments)
        assert code == 1 and f"toy.yaml ({old}), now other.yaml ({R.file_sha256(other)})" in text
        assert "--overwrite" in text and h.contents(case.output) == before
    assert "4 made, 0 skipped" in retokenize(case.arguments("--overwrite"))[1]
    assert h.read_manifest(case.output)["tokenizer"]["path"] == "other.yaml"
    assert "0 made, 4 skipped" in retokenize(case.arguments("--overwrite"))[1]
    (case.output / "notes.txt").write_text("mine")
    code, text = retokenize([*documents, "--sp-model", case.model, "--overwrite"])
    assert code == 0 and [p.name for p in case.output.glob("*.bin")] == ["fineweb_train_000000.bin"]
    assert {path.name for path in case.output.iterdir() if path.suffix in (".txt", ".yaml")} == {
        "notes.txt", "toy.yaml", "other.yaml"}, "they may be the only copies"


def test_shards_are_named_by_paths_or_patterns(case, retokenize):
    """As the shell has expanded a pattern, as a quoted pattern, or both."""
    retokenize(case.arguments())
    expected = h.contents(case.output)
    paths = [str(case.shard(k)) for k in (2, 0, 3, 1)]
    for number, given in enumerate((paths, [str(case.folder / "in" / "*[13].bin"), *paths[:3]])):
        case.output = case.folder / f"out{number}"
        assert retokenize(["--sp-shards", *given, *case.arguments()[2:]])[0] == 0
        assert h.contents(case.output) == expected
    code, text = retokenize(["--sp-shards", *paths, "no/*.bin", *case.arguments()[2:]])
    assert code == 1 and "--sp-shards no/*.bin: empty source: no file matches" in text


def progress_of(text: str) -> list[tuple[float, int]]:
    """Percent and documents of every progress line."""
    return [(float(line.split()[1][:-1]), int(line.split()[4])) for line in text.splitlines()
            if line.startswith("progress: ")]


def test_progress_is_of_the_shards_that_are_left(case, retokenize, monkeypatch):
    """Skipped shards are told of once; percent, rate and ETA are of the others."""
    monkeypatch.setattr(R.Progress, "interval", 0.0)
    lines = progress_of(retokenize(case.arguments())[1])
    assert len(lines) == 5 and lines[-1] == (100.0, 40) and lines == sorted(lines)
    text = retokenize(case.arguments())[1]
    assert text.count("skipped: 4 finished shard(s)\n") == 1 and progress_of(text) == []
    for k in (1, 2):
        (case.output / case.shard(k).name).unlink()
    text = retokenize(case.arguments())[1]
    (first, _), *_, last = progress_of(text)
    assert text.count("skipped: 2 finished shard(s)") == 1 and 30 < first < 70
    assert last == (100.0, sum(len(case.source(k)) for k in (1, 2)))


def test_progress_is_of_the_documents_that_are_left(case, retokenize, monkeypatch):
    """What is passed over to get to the first missing shard is no progress."""
    monkeypatch.setattr(R.Progress, "interval", 0.0)
    monkeypatch.setattr(R, "BLOCK_BYTES", 3000)
    path = h.write_documents(case.folder / "d.jsonl", h.texts(200))
    arguments = ["--docs", path, "--vocab", case.vocab, "--shard-tokens", "9000", "--output-dir",
                 case.output, "--workers", "2"]
    lines = progress_of(retokenize(arguments)[1])
    assert len(lines) > 5 and lines == sorted(lines) and lines[-1] == (100.0, 200)
    *_, before_last, last = sorted(case.output.glob("*.bin"))
    last.unlink()
    done = 200 - h.read_manifest(case.output)["shards"][last.name]["documents"]
    text = retokenize(arguments)[1]
    (first, _), *_, end = progress_of(text)
    assert before_last.exists() and first < 100 and end == (100.0, 200 - done)


def test_partial_files_of_live_runs_are_spared(tmp_path, monkeypatch):
    """Another run clears the folder while a file is open, or just before it is locked."""
    folder, original = R.OutputFolder(tmp_path), R.fcntl.flock
    with folder.atomic(tmp_path / "x") as file:
        file.write(b"data")
        R.OutputFolder(tmp_path)
    assert (tmp_path / "x").read_bytes() == b"data"
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644
    monkeypatch.setattr(R.fcntl, "flock", lambda *arguments: (
        monkeypatch.undo(), [part.unlink() for part in folder.ledger.glob("*.part")],
        original(*arguments)))
    folder.put("y", b"more")
    assert (tmp_path / "y").read_bytes() == b"more" and not list(folder.ledger.glob("*.part"))


def test_a_cut_shard_is_not_in_the_manifest_of_a_later_job(case, retokenize):
    """Nor does a name that merely contains "val" make a shard one of validation."""
    assert retokenize(case.arguments())[0] == 0
    first, second = (case.output / case.shard(k).name for k in (0, 1))
    os.truncate(first, 1500)
    segmenter = R.Segmenter(R.load_vocabulary(case.vocab))
    folder = R.OutputFolder(case.output)
    folder.publish(segmenter)
    assert sorted(h.read_manifest(case.output)["shards"]) == [case.shard(k).name for k in (1, 2, 3)]
    totals = R.build_manifest(segmenter, {"interval_0.bin": folder.entry(second.name)})["totals"]
    assert totals["train"] == totals["all"] != totals["val"]


def test_other_documents_are_refused(case, retokenize):
    """The second of two files has changed."""
    paths = [h.write_documents(case.folder / name, h.texts(9)) for name in ("a.jsonl", "b.jsonl")]
    arguments = ["--docs", *paths, "--vocab", case.vocab, "--output-dir", case.output]
    assert retokenize(arguments)[0] == 0
    h.write_documents(paths[1], h.texts(8))
    code, text = retokenize(arguments)
    assert code == 1 and "was made otherwise: source_sha256" in text


def test_bad_documents_make_a_lossy_shard(case):
    """The trainer's table counts one piece wrongly."""
    tokenizer = SentencePieceTokenizer(R.SentencePieceModel(case.model))
    tokenizer.counting = R.PieceTable([b"?"] * tokenizer.vocab_size)
    path = h.write_documents(case.folder / "d.jsonl", h.texts(3))
    job = R.DocumentJob(R.OutputFolder(case.output), tokenizer, DocumentReader([path]), "val")
    assert job.run(1) == (1, 0)
    entry = job.folder.entry("fineweb_val_000000.bin")
    assert entry["status"] == "lossy" and entry["bad_documents"] == 3


def test_workers_and_threads_are_bounded(monkeypatch):
    """Ranks on a machine share its cores, and documents are drawn as they are needed."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert R.default_workers() == 4
    drawn: list[int] = []
    answers = R.thread_map(str, (drawn.append(k) or k for k in range(99)), 2)
    assert next(answers) == "0" and len(drawn) == 3 and list(answers)[-1] == "98"


def test_shards_are_in_the_order_of_their_names(case, retokenize):
    """Whatever folders they lie in, links included."""
    assert retokenize(case.arguments())[0] == 0
    before = h.contents(case.output)
    for k in range(4):
        folder = case.folder / f"{3 - k}"
        folder.mkdir()
        case.shard(k).rename(folder / case.shard(k).name)
    arguments = case.arguments()
    arguments[1] = str(case.folder / "[0-3]" / "*.bin")
    assert retokenize([*arguments, "--overwrite"])[0] == 0 and h.contents(case.output) == before


def test_manifest_sees_entries_that_come_while_it_is_written(tmp_path, monkeypatch):
    folder = R.OutputFolder(tmp_path / "out")
    segmenter = R.Segmenter(R.load_vocabulary(h.vocabulary()))
    entry = {**dict.fromkeys(R.COUNTS, 0), "identity": {
        "kind": "docs", "model_sha256": None, "tokenizer_sha256": segmenter.sha256}}
    original = R.OutputFolder.put

    def late(self, target, data):
        original(self, target, data)
        if target == "manifest.json" and not (self.path / "b.bin").exists():
            h.write_shard(self.path / "b.bin", [])
            original(self, ".ledger/b.bin.json", entry)

    monkeypatch.setattr(R.OutputFolder, "put", late)
    folder.publish(segmenter)
    assert list(h.read_manifest(folder.path)["shards"]) == ["b.bin"]
    with pytest.raises(R.InputError, match="b.bin: was made with another vocabulary meanwhile"):
        folder.publish(R.Segmenter(R.load_vocabulary(h.vocabulary(h.TOKENS[:3]))))


def test_a_dying_worker_is_reported(case):
    prelude = "R.Encoded.counts = lambda _: os.kill(os.getpid(), signal.SIGKILL)"
    process = retokenizer(case.arguments("--workers", "2"), prelude)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "one of 2 worker processes died" in error
    assert not list(case.output.glob("*.bin"))


IDLE = """
original = R.ShardJob.make
def make(self, index):
    if index == 0:
        time.sleep(1)
        print(os.getpid(), file=sys.stderr, flush=True)
        while not R.Worker.given_up.is_set():
            time.sleep(0.01)
    return original(self, index)
R.ShardJob.make = make
"""


def test_an_idle_worker_that_dies_is_reported(case):
    """While it waits for a task it holds a lock that the other idle one needs."""
    process = retokenizer(case.arguments("--workers", "3"), IDLE)
    busy = process.stderr.readline().strip()
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    idle = [int(child) for child in children.stdout.split() if child != busy]
    reads = [pid for pid in idle if Path(f"/proc/{pid}/wchan").exists()
             and "pipe" in Path(f"/proc/{pid}/wchan").read_text()]
    os.kill((reads or idle)[0], signal.SIGKILL)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1 and "one of 3 worker processes died" in error


def append_to(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


DAMAGE = {
    "truncated": (lambda case: os.truncate(case.shard(1), 1500),
                  "fineweb_train_000001.bin: truncated"),
    "no header": (lambda case: os.truncate(case.shard(1), 100), "100 bytes are less than the 1024"),
    "magic": (lambda case: h.write_shard(case.shard(1), [1, 5], magic=7), "magic 7"),
    "count": (lambda case: h.write_shard(case.shard(1), [1, 5], count=1),
              "too long: the header counts 1 tokens, 2 bytes, the file holds 4 bytes"),
    "odd length": (lambda case: append_to(case.shard(0), b"x"), "too long"),
    "range": (lambda case: h.write_shard(case.shard(3), [1, 5, 300]),
              "fineweb_train_000003.bin: id 300 is out of range: the model has 300 ids"),
    "no BOS": (lambda case: case.shard(0).unlink(), "fineweb_train_000001.bin: the first id is"),
    "gap": (lambda case: case.shard(2).unlink(),
            "fineweb_train_000003.bin: the shard before it is missing"),
    "empty shard": (lambda case: h.write_shard(case.shard(0), []), "empty source"),
    "no shard": (lambda case: [case.shard(k).unlink() for k in range(4)],
                 "empty source: no file matches"),
    "no model": (lambda case: case.model.unlink(), "sp.model: no such SentencePiece model"),
    "bad model": (lambda case: case.model.write_bytes(b"x"), "not a SentencePiece model"),
    "no vocabulary": (lambda case: case.vocab.unlink(), "toy.yaml: no such vocabulary"),
    "output": (lambda case: case.output.write_text("a file"), "cannot write the output folder"),
    "duplicate": (lambda case: ((case.folder / "in" / "x.bin").mkdir(), h.write_shard(
        case.folder / "in" / "x.bin" / case.shard(0).name, [1])), "duplicate shard name"),
    "series": (lambda case: (h.write_shard(case.folder / "in" / "a_0.bin", [1, 5]), h.write_shard(
        case.folder / "in" / "b_0.bin", [5, 1])), "b_0.bin: the first id is 5, not BOS"),
    "in place, by a link": (lambda case: case.output.symlink_to(case.folder / "in"),
                            "is the folder of the input"),
    "in place, by links": (lambda case: (
        case.shard(0).rename(case.folder / case.shard(0).name),
        case.shard(0).symlink_to(case.folder / case.shard(0).name),
        setattr(case, "output", case.folder)), "is the folder of the input"),
    "in place": (lambda case: (case.shard(0).rename(case.folder / "a_0.bin"), setattr(
        case, "output", case.folder / "in")), "is the folder of the input"),
}


def test_bad_shards_are_refused_by_name_(tmp_path, retokenize):
    for kind, (damage, message) in DAMAGE.items():
        case = h.Case(tmp_path / kind)
        damage(case)
        arguments = case.arguments()
        if kind == "duplicate":
            arguments[1] = str(case.folder / "in" / "**" / "fineweb*.bin")
            (case.folder / "in" / "y").mkdir()
            h.write_shard(case.folder / "in" / "y" / case.shard(0).name, [1])
        before = h.contents(case.folder / "in")
        code, text = retokenize(arguments)
        assert code == 1 and message in text and text.startswith("error: "), (kind, text)
        assert before.items() <= h.contents(case.folder / "in").items(), "input is never touched"
        if kind == "output" or kind.startswith("in place"):
            continue
        ledger = case.output / ".ledger"
        assert not list(ledger.glob("*.part")), kind
        finished = {path.name for path in case.output.glob("*.bin")}
        assert finished == {path.name[:-5] for path in ledger.glob("*.json")}, kind
        assert not finished or kind == "range", kind


def test_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    case = h.Case(tmp_path / "case", documents=200)
    prelude = "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))"
    process = retokenizer(case.arguments(), prelude)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "make room and run again" in error
    assert "cannot write" in error and "fineweb_train_000000.bin" in error
    assert [path.name for path in case.output.iterdir()] == [".ledger"]
    assert not list((case.output / ".ledger").iterdir())


@pytest.mark.parametrize("capitals", ["none", "ascii"])
def test_bench_reports_the_yardstick(tmp_path, retokenize, capitals):
    case = h.Case(tmp_path / "case", case=capitals)
    code, text = retokenize(case.arguments("--bench"))
    assert code == 0 and "sp.decode:" in text and "x sp.decode" in text
    shares = re.findall(r"(.*)% of one worker's time\n", text.replace(f"{CAPITALS}: ", ""))
    assert len(shares) == (capitals == "ascii") and all(0 <= float(share) < 100 for share in shares)
    assert not list(case.output.glob("*.bin"))


@pytest.mark.slow
def test_memory_is_bounded_for_a_full_shard(case):
    ids = np.array([k for ids in case.documents for k in ids], dtype=np.uint16)
    for k in (1, 2, 3):
        case.shard(k).unlink()
    h.write_shard(case.shard(0), np.resize(ids, 100_000_000))
    prelude = ("import atexit, re\natexit.register(lambda: print(re.search("
               "r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]))")
    process = retokenizer(case.arguments(), prelude)
    output, error = process.communicate(timeout=300)
    peak = int(output.split()[-1]) / 1024
    print(f"peak {peak:.0f} MiB; {error.splitlines()[-1]}")
    assert process.returncode == 0 and peak < 1000
