"""Record folders: made, verified, compared; every rule is broken once."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import harness as h
import train_gpt as t


def make_record(code, logs, records, *more):
    """Exit code of `make` on runs."""
    return h.tool("make_record").main(
        ["make", "--name", "Tiny", "--author", "A. Nobody", "--github-id", "nobody", "--date",
         "2030-01-02", "--code", str(code), "--records", str(records), *more, *map(str, logs)])


@pytest.fixture(scope="module")
def made_folder(runs, tmp_path_factory):
    """A record folder made of the tiny runs, artifacts included."""
    records = tmp_path_factory.mktemp("records")
    assert make_record(runs[0], runs[2], records, "--track", "track_non_record_16mb",
                       "--artifacts") == 0
    return records / "track_non_record_16mb" / "2030-01-02_Tiny"


def edit(path, old, new):
    """Replace text in a file; it must be there."""
    text = path.read_text()
    assert old in text, (path, old)
    path.write_text(text.replace(old, new))


def submission(folder, **changes):
    """Change submission.json; a dotted name goes inside, None removes."""
    path = folder / "submission.json"
    about = json.loads(path.read_text())
    for name, value in changes.items():
        *inside, last = name.split("__")
        place = about
        for key in inside:
            place = place[key]
        place[last] = value
        if value is None:
            del place[last]
    path.write_text(json.dumps(about))


@pytest.fixture
def record(made_folder, tmp_path, monkeypatch):
    """A copy of the folder as if it had run on 8xH100 and its text were all of FineWeb's."""
    folder = tmp_path / "track_10min_16mb" / "2030-01-02_Tiny"
    shutil.copytree(made_folder, folder)
    for log in folder.glob("*.log"):
        edit(log, "\nworld_size:1 ", "\nworld_size:8 ")
        log.write_text(re.sub(r"device:cpu x\d+ ", "device:NVIDIA H100 80GB HBM3 ",
                              log.read_text()))
    submission(folder, track="track_10min_16mb", hardware="8 x NVIDIA H100 80GB HBM3")
    edit(folder / "README.md", "track_non_record_16mb", "track_10min_16mb")
    (folder / "README.md").write_text(re.sub(r"1 x cpu x\d+", "8 x NVIDIA H100 80GB HBM3",
                                             (folder / "README.md").read_text()))
    rules = h.tool("rules")
    known = rules.published()
    known["facts"]["validation_bytes"] = json.loads(
        (folder / "submission.json").read_text())["compliance"]["scored_bytes"]
    monkeypatch.setattr(rules, "published", lambda: known)
    return folder


def test_student_t_is_exact():
    """Tails and quantiles against mpmath's incomplete beta function and the printed tables."""
    import mpmath  # comes with torch

    welch = h.tool("welch")
    for tail, freedom in ((0.3, 1.5), (2.0, 2.0), (-1.2, 3.7), (5.0, 40.0), (30.0, 2.2)):
        x = mpmath.mpf(freedom) / (freedom + tail * tail)
        half = mpmath.betainc(freedom / 2, 0.5, 0, x, regularized=True) / 2
        exact = float(half if tail >= 0 else 1 - half)
        assert welch.t_tail(tail, freedom) == pytest.approx(exact, rel=1e-12)
    for freedom, value in ((1, 12.7062), (2, 4.30265), (4, 2.77645), (30, 2.04227)):
        assert welch.t_quantile(0.025, freedom) == pytest.approx(value, abs=1e-5)


def test_welch_by_hand():
    """Mean, deviation, interval, t, degrees of freedom and the bar, worked out by hand."""
    welch = h.tool("welch")
    ours, theirs = welch.sample([1.0, 2.0, 3.0]), welch.sample([5.0, 9.0])
    assert (ours.mean, ours.std, ours.n) == (2.0, 1.0, 3)
    assert ours.interval == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)
    test = welch.welch(ours, theirs, 1.0)
    error = 1 / 3 + 8 / 2
    assert test.difference == 5.0 and test.t == pytest.approx(4.0 / math.sqrt(error))
    assert test.freedom == pytest.approx(error**2 / ((1 / 3) ** 2 / 2 + 4.0**2 / 1))
    assert test.p == welch.t_tail(test.t, test.freedom) < 0.5
    assert welch.welch(ours, welch.sample([5.0])) is None and welch.sample([5.0]).interval is None


def test_reader_knows_both_dialects(runs, tmp_path):
    """Our log and two published dialects give the same kinds of facts."""
    reader = h.tool("runs")
    run = reader.read_run(runs[2][0])
    assert run.ours and run.finished and run.seed == 42 and not run.resumed
    assert run.settings["MODEL_DIM"] == "32" and run.steps == 8 and len(run.train) == 8
    assert run.headline == run.scores["ttt"]._replace(eval_ms=None)
    assert run.audit == "exact" and run.total_bytes == run.artifact_bytes + run.code_bytes
    field = tmp_path / "train_seed7.log"
    field.write_text(
        "1/20000 train_loss: 9.0087 train_time: 0.5m tok/s: 17\nseed:7\n"
        "4945/20000 val_loss: 2.3539 val_bpb: 1.0756\nmodel_params:123\n"
        "stopping_early: wallclock_cap train_time: 599592ms step: 4945/20000\n"
        "diagnostic pre-quantization post-ema val_loss:2.3284 val_bpb:1.0639 eval_time:6718ms\n"
        "Code size (uncompressed): 157868 bytes\nCode size (compressed): 31999 bytes\n"
        "Serialized model: 135417533 bytes\nSerialized model quantized+x: 15865260 bytes\n"
        "Total submission size quantized+x: 15897259 bytes\n"
        "final_sliding_window_eval stride:64 val_loss:1.9511 val_bpb:1.1556 eval_time:75096ms\n"
        "final_sliding_window_eval_exact stride:64 val_loss:1.95110428 val_bpb:1.15555486\n"
        "quantized_ttt_phased val_loss:2.31944212 val_bpb:1.05989454 eval_time:508785ms\n")
    run = reader.read_run(field)
    assert (run.seed, run.steps, run.train_ms, run.params) == (7, 4945, 599592.0, 123)
    assert run.train[0] == reader.Point(1, 9.0087, None, 30000.0)
    assert (run.code_bytes, run.artifact_bytes, run.total_bytes) == (31999, 15865260, 15897259)
    assert run.scores["sliding"] == (1.95110428, 1.15555486, 75096.0, True)
    assert run.headline.bpb == 1.05989454 and run.eval_seconds == pytest.approx(583.881)
    assert not run.ours and run.audit is None
    with pytest.raises(reader.RecordError, match="nothing"):
        reader.find_run_log("nothing")


def test_made_folder_is_right(made_folder, runs):
    """All files are there, every number is the logs', and nothing is wrong with it."""
    about = json.loads((made_folder / "submission.json").read_text())
    names = {p.name for p in made_folder.iterdir()}
    assert names >= {"README.md", "requirements.txt", "train_gpt.py", "manifest.json", "curves.png",
                     "tiny.yaml", "scylla.meta.npz", "train_seed42.log", "model_seed42.ptz"}
    scores = [float(re.search(r"exact val_loss:\S+ val_bpb:(\S+)\n\Z", log.read_text())[1])
              for log in runs[2]]
    assert [about["seed_results"][k]["val_bpb"] for k in ("42", "1337", "2024")] == scores
    assert about["val_bpb"] == pytest.approx(np.mean(scores), abs=1e-8)
    assert about["val_bpb_std"] == pytest.approx(np.std(scores, ddof=1), abs=1e-8)
    assert about["bytes_code"] == runs[0].stat().st_size
    assert about["bytes_total"] == max(
        (made_folder / f"model_seed{k}.ptz").stat().st_size for k in about["seeds"]) + about[
            "bytes_code"]
    assert about["attribution"]["Muon"] == "@KellerJordan, Keller Jordan et al."
    assert "MuonEq-R with depth recurrence" not in about["attribution"]
    text = (made_folder / "README.md").read_text()
    assert f"**{np.mean(scores):.5f} BPB**" in text
    command = re.search(r"\nDATA_PATH=<shards> (.*) SEED=<seed> torchrun", text)[1]
    changed = {k: v for k, v in h.environ(ttt_chunk_tokens=64).items()
               if t.show(getattr(t.Config(), k.lower())) != v}
    assert dict(re.findall(r"(\w+)='(.*?)'", command)) == changed | {"PRESET": "record"}
    assert h.tool("rules").verify(made_folder) == []


@pytest.mark.slow
def test_committed_folders_are_right():
    """Every record folder of this repository breaks no rule."""
    folders = [path for path in (h.ROOT / "records").glob("track_*/*") if path.is_dir()]
    assert folders
    for path in folders:
        assert h.tool("rules").verify(path) == [], path


def test_make_refuses(runs, tmp_path, capsys):
    """Other code, a missing artifact, one seed twice, a run cut short: an error and no folder."""
    code, _, logs = runs
    cases = [([logs[0], logs[0]], code, "one log for each seed"),
             (logs, h.ROOT / "retokenize_scylla.py", "give the file that ran with --code")]
    copy = tmp_path / "run"
    shutil.copytree(code.parent / "logs", copy / "logs")
    cases.append(([copy / "logs" / "seed42.txt"], code, "ARTIFACT_PATH of its own"))
    torn = copy / "logs" / "torn.txt"
    torn.write_text(logs[0].read_text()[:-300])
    cases.append(([torn], code, "run the seed again"))
    for some, code, message in cases:
        assert make_record(code, some, tmp_path / "records") == 1
        assert message in capsys.readouterr().err
    assert make_record(code, logs, tmp_path / "records") == 1  # on a CPU it is no record
    assert "hardware" in capsys.readouterr().out
    assert not [p for p in (tmp_path / "records").rglob("*") if p.is_file()]


def edit_meta(folder, more):
    """Count one id's bytes otherwise."""
    with np.load(folder / "scylla.meta.npz") as meta:
        arrays = dict(meta)
    arrays["base_bytes"][65] += more
    np.savez(folder / "scylla.meta.npz", **arrays)


def edit_log(folder, old, new, seed=42):
    edit(folder / f"train_seed{seed}.log", old, new)


def add_chunks(folder, *chunks):
    edit_log(folder, "\nfinal_int6_roundtrip ", "".join(
        f"\nttt_chunk [{n}/9] bpb=1.0 time=1.0s" for n in chunks) + "\nfinal_int6_roundtrip ")


def headline_of(folder, seed=42):
    return re.search(r"exact val_loss:(\S+) val_bpb:(\S+)\n\Z",
                     (folder / f"train_seed{seed}.log").read_text())


def set_train_time(folder, ms):
    path = folder / "train_seed42.log"
    path.write_text(re.sub(r"(val_bpb:\S+ train_time:)\d+ms", rf"\g<1>{ms}ms", path.read_text()))


def set_time_on(line, folder):
    path = folder / "train_seed42.log"
    text, count = re.subn(rf"(?m)^({line})\d+", r"\g<1>600100", path.read_text())
    path.write_text(text)
    assert count == 1


def substitute(folder, pattern, text):
    """Replace a pattern in the first log."""
    path = folder / "train_seed42.log"
    altered, count = re.subn(pattern, text, path.read_text())
    assert count == 1, count
    path.write_text(altered)


def claims_of(folder):
    return json.loads((folder / "submission.json").read_text())["seed_results"]


def least_total(folder):
    about = json.loads((folder / "submission.json").read_text())
    return about["bytes_code"] + min(c["artifact_bytes"] for c in claims_of(folder).values())


def take_credit(folder):
    """Take the first credit for oneself."""
    path = folder / "submission.json"
    about = json.loads(path.read_text())
    about["attribution"][next(iter(about["attribution"]))] = "me"
    path.write_text(json.dumps(about))


def scale_totals(folder, factor):
    """Totals of the validation text that are not the sum of its shards."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["totals"]["val"]["source_bytes"] *= factor
    path.write_text(json.dumps(manifest))


def over_the_cap(folder):
    log = folder / "train_seed42.log"
    total = 16_000_001
    artifact = total - json.loads((folder / "submission.json").read_text())["bytes_code"]
    log.write_text(re.sub(r"(Total submission size:) \d+", rf"\1 {total}", re.sub(
        r"(Serialized model \S+:) \d+", rf"\1 {artifact}", log.read_text())))
    (folder / "model_seed42.ptz").unlink()
    submission(folder, bytes_total=total, seed_results__42__artifact_bytes=artifact)


BROKEN = {  # what is done to the folder -> rule, and a part of where it is found
    "altered val_bpb of a seed": (lambda f: submission(
        f, seed_results__42__val_bpb=float(headline_of(f)[2]) - 1e-6), "scores", "seed 42"),
    "altered roundtrip": (lambda f: submission(f, seed_results__42__roundtrip_bpb=1.5),
                          "scores", "seed 42"),
    "altered mean": (lambda f: submission(f, val_bpb=1.0), "means", "submission.json"),
    "altered deviation": (lambda f: submission(f, val_bpb_std=0.5), "means", "submission.json"),
    "missing log": (lambda f: (f / "train_seed1337.log").unlink(), "seeds", "submission.json"),
    "two seeds": (lambda f: [(f / "train_seed1337.log").unlink(), submission(
        f, seeds=[42, 2024], seed_results__1337=None)], "seeds", "train_seed"),
    "a log under another seed's name": (lambda f: (f / "train_seed42.log").rename(
        f / "train_seed7.log"), "seeds", "train_seed7.log"),
    "steps of another run": (lambda f: submission(f, seed_results__42__steps=10), "scores",
                             "seed 42"),
    "log of a seed that is not claimed": (lambda f: submission(
        f, seed_results__1337=None, seeds=[42, 2024]), "seeds", "train_seed1337.log"),
    "duplicated log": (lambda f: shutil.copy(f / "train_seed42.log", f / "train_seed1337.log"),
                       "duplicates", "train_seed"),
    "the log of another seed": (lambda f: (f / "train_seed1337.log").write_text(
        (f / "train_seed42.log").read_text().replace("\nseed:42\n", "\nseed:1337\n").replace(
            "\nSEED=42\n", "\nSEED=1337\n")), "duplicates", "train_seed"),
    "a log with one loss altered": (lambda f: (f / "train_seed1337.log").write_text(re.sub(
        r"(step:4/.*loss:)\S+", r"\g<1>3.0", (f / "train_seed42.log").read_text())), "duplicates",
        "train_seed"),
    "one artifact for two seeds": (lambda f: submission(
        f, seed_results__42__artifact_sha256=claims_of(f)["1337"]["artifact_sha256"]), "duplicates",
        "train_seed"),
    "a log with other times only": (lambda f: (f / "train_seed1337.log").write_text(re.sub(
        r"time:\d+", "time:7", (f / "train_seed42.log").read_text())), "duplicates", "train_seed"),
    "a seed with another setting": (lambda f: edit_log(f, "\nMATRIX_LR=", "\nMATRIX_LR=9"),
                                    "configuration", "train_seed"),
    "a seed with another torch": (lambda f: edit_log(f, " torch 2", " torch 9", 2024),
                                  "configuration", "train_seed2024.log"),
    "a seed on another GPU": (lambda f: edit_log(f, "device:NVIDIA H100", "device:a H100"),
                              "configuration", "train_seed"),
    "no seed in the log": (lambda f: edit_log(f, "\nseed:42\n", "\n"), "configuration",
                           "train_seed42.log"),
    "an artifact that was there": (lambda f: substitute(
        f, "\nLOAD_ARTIFACT=", "\nLOAD_ARTIFACT=x.ptz"), "configuration", "train_seed42.log"),
    "more steps than settings": (lambda f: [edit_log(f, "\nITERATIONS=8", "\nITERATIONS=7", seed)
                                            for seed in (42, 1337, 2024)], "configuration",
                                 "train_seed42.log"),
    "another seed in the settings": (lambda f: edit_log(f, "\nSEED=42\n", "\nSEED=1337\n"),
                                     "configuration", "train_seed42.log"),
    "log of other code": (lambda f: edit_log(f, "\ncode_sha256:", "\ncode_sha256:0" * 1),
                          "code text", "train_seed42.log"),
    "other source in the log": (lambda f: edit_log(f, "def main(", "def man("), "code text",
                                "train_seed42.log"),
    "code of another size": (lambda f: edit_log(f, "\nCode size: ", "\nCode size: 1"), "code",
                             "train_seed42.log"),
    "bytes_code": (lambda f: submission(f, bytes_code=5), "code", "submission.json"),
    "over the cap": (over_the_cap, "sizes", "train_seed42.log"),
    "a total that does not add up": (lambda f: substitute(
        f, r"(Total submission size: )\d+", r"\g<1>9"), "sizes", "train_seed42.log"),
    "artifact of another size": (lambda f: (f / "model_seed42.ptz").write_bytes(b"x"), "sizes",
                                 "model_seed42.ptz"),
    "bytes_total": (lambda f: submission(f, bytes_total=5), "sizes", "submission.json"),
    "not the largest total": (lambda f: submission(f, bytes_total=least_total(f)), "sizes",
                              "submission.json"),
    "training for 600.1 s": (lambda f: set_train_time(f, 600100), "clock", "train_seed42.log"),
    "a step at 600.1 s": (lambda f: substitute(
        f, r"(\nstep:5/.*train_time:)\d+", r"\g<1>600100"), "clock", "train_seed42.log"),
    **{f"{line} at 600.1 s": (functools.partial(set_time_on, line), "clock", "train_seed42.log")
       for line in ("train_clock slowest_rank:", "gptq_calibration train_time:", "train_ms: ")},
    "evaluation for 601 s": (lambda f: (f / "train_seed42.log").write_text(re.sub(
        r"seconds_eval: \S+", "seconds_eval: 601.0", (f / "train_seed42.log").read_text())),
        "evaluation clock", "train_seed42.log"),
    "a chunk scored again": (lambda f: substitute(f, r"(\nttt_chunk \[3/.*)", r"\1\1"), "order",
                             "train_seed42.log"),
    "a chunk too many": (lambda f: substitute(
        f, r"(\nttt_chunk \[)31(/31.*)", r"\g<1>31\2\g<1>33\2"), "order", "train_seed42.log"),
    "601 s on the line of a stage": (lambda f: substitute(
        f, r"(\nfinal_int6_sliding_window .*eval_time:)\d+", r"\g<1>601000"), "evaluation clock",
        "train_seed42.log"),
    "a chunk left out": (lambda f: (f / "train_seed42.log").write_text(re.sub(
        r"(\nttt_chunk.*)\nttt_chunk.*", r"\1", (f / "train_seed42.log").read_text(), count=1)),
        "order", "train_seed42.log"),
    "the last chunk left out": (lambda f: (f / "train_seed42.log").write_text(re.sub(
        r"\nttt_chunk \[(\d+)/\1\]", "\nchunk", (f / "train_seed42.log").read_text())), "order",
        "train_seed42.log"),
    "a chunk out of order": (lambda f: add_chunks(f, 2, 1), "order", "train_seed42.log"),
    "TTT's headline without TTT": (lambda f: (f / "train_seed42.log").write_text(re.sub(
        r"\nlegal_ttt.*", "", (f / "train_seed42.log").read_text())), "headline", "train_seed42"),
    "an invented headline": (lambda f: substitute(f, r"exact (\S+) val_bpb:\S+\n\Z", (
        r"exact \1 val_bpb:1.00000000\n")), "headline", "train_seed42.log"),
    "another mode's headline": (lambda f: substitute(
        f, "\nheadline_mode: ttt", "\nheadline_mode: sliding"), "headline", "train_seed42.log"),
    "another mode's score": (lambda f: submission(f, seed_results__42__val_bpb=json.loads(
        (f / "submission.json").read_text())["seed_results"]["42"]["sliding_bpb"]), "scores",
        "submission.json seed 42"),
    "bytes not proven": (lambda f: edit_log(f, "\nbyte_audit:exact", "\nbyte_audit:unverified"),
                         "audit", "train_seed42.log"),
    "bytes of another text": (lambda f: edit(f / "manifest.json", '"source_bytes": ',
                                             '"source_bytes": 1'), "audit", "train_seed42"),
    "score a little off those bytes": (lambda f: edit_log(
        f, headline_of(f)[2], f"{float(headline_of(f)[2]) + 2e-6:.8f}"), "audit", "train_seed42"),
    "bytes that differ by seed": (lambda f: substitute(
        f, r"(\nbyte_audit:exact bytes:)", r"\g<1>1"), "audit", "train_seed<k>.log"),
    "score not over those bytes": (lambda f: edit_log(
        f, headline_of(f)[2], f"{float(headline_of(f)[2]) * 0.95:.8f}"), "audit", "train_seed42"),
    "no attribution": (lambda f: submission(f, attribution={}), "attribution", "submission"),
    "the first credit": (take_credit, "attribution", "submission.json"),
    "wrong credit": (lambda f: submission(f, attribution__Muon="me"), "attribution",
                     "submission.json"),
    "resumed, says the summary": (lambda f: substitute(f, "\nresumed: 0", "\nresumed: 1"),
                                  "complete", "train_seed42.log"),
    "more after the end": (lambda f: (f / "train_seed42.log").write_text(
        (f / "train_seed42.log").read_text() + "more\n"), "complete", "train_seed42.log"),
    "two audits": (lambda f: substitute(f, "\nbyte_audit:exact", "\nbyte_audit:unverified bytes:1"
                                        "\nbyte_audit:exact"), "complete", "train_seed42.log"),
    "another total in the summary": (lambda f: substitute(f, r"\nbytes_total: \d+",
                                                          "\nbytes_total: 17000000"), "complete",
                                     "train_seed42.log"),
    "resumed run": (lambda f: edit_log(f, "\nseed:42\n", (
        "\nseed:42\nresumed step:3 of checkpoints/seed42\n")), "complete", "train_seed42.log"),
    "log cut short": (lambda f: (f / "train_seed42.log").write_text(
        (f / "train_seed42.log").read_text().rsplit("\n", 2)[0]), "complete", "train_seed42.log"),
    "a fourth log, hidden": (lambda f: (f / "worse").mkdir() or shutil.copy(
        f / "train_seed42.log", f / "worse" / "seed7.log"), "duplicates", "seed7.log"),
    "another GPU": (lambda f: edit_log(f, "NVIDIA H100", "NVIDIA A100"), "hardware",
                    "train_seed42"),
    "no ranks": (lambda f: substitute(f, r"\nworld_size:8 ", "\n"), "hardware", "train_seed42.log"),
    "four ranks": (lambda f: edit_log(f, "\nworld_size:8", "\nworld_size:4"), "hardware",
                   "train_seed42.log"),
    "its score in the claims": (lambda f: [substitute(f, "\nfinal_int6_roundtrip ", (
        "\nslot non_compliant val_loss:1.0 val_bpb:0.9\nfinal_int6_roundtrip ")), submission(
            f, seed_results__42__val_bpb=0.9)], "compliance", "train_seed42.log"),
    "a score that saw its targets": (lambda f: edit_log(f, "\nfinal_int6_roundtrip ", (
        f"\nslot non_compliant val_loss:{headline_of(f)[1]} val_bpb:{headline_of(f)[2]}"
        "\nfinal_int6_roundtrip ")), "compliance", "train_seed42.log"),
    "its name in the claims": (lambda f: submission(f, seed_results__42__slot_bpb=1.0),
                               "compliance", "submission.json"),
    "no README": (lambda f: (f / "README.md").unlink(), "files", "README.md"),
    "no requirements": (lambda f: (f / "requirements.txt").unlink(), "evidence", "requirements"),
    "empty requirements": (lambda f: (f / "requirements.txt").write_text(""), "evidence", "requi"),
    "no curves": (lambda f: (f / "curves.png").unlink(), "evidence", "curves.png"),
    "another vocabulary": (lambda f: edit(f / "tiny.yaml", "a", "b"), "ledger", "manifest"),
    "no vocabulary": (lambda f: (f / "tiny.yaml").unlink(), "ledger", "manifest.json"),
    "no vocabulary, and none in the ledger": (lambda f: [(f / "tiny.yaml").unlink(), edit(
        f / "manifest.json", '"sha256"', '"digest"')], "ledger", "manifest.json"),
    "a lossy vocabulary": (lambda f: edit(f / "manifest.json", '"byte_exact": true',
                                          '"byte_exact": false'), "ledger", "manifest.json"),
    "a bad document": (lambda f: edit(f / "manifest.json", '"bad_documents": 0',
                                      '"bad_documents": 7'), "ledger", "manifest.json"),
    "totals of other shards": (lambda f: scale_totals(f, 2), "ledger", "manifest.json"),
    "no totals": (lambda f: edit(f / "manifest.json", '"totals"', '"total"'), "ledger",
                  "manifest.json"),
    "no byte table": (lambda f: (f / "scylla.meta.npz").unlink(), "byte table", "meta.npz"),
    "another byte table": (lambda f: edit_meta(f, 1), "byte table", "scylla.meta.npz"),
    "a promise in compliance": (lambda f: submission(
        f, compliance__artifact_under_16mb="TBD"), "schema", "compliance"),
    "no author": (lambda f: submission(f, author=""), "submission", "submission.json"),
    "no JSON": (lambda f: (f / "submission.json").write_text("{"), "submission", "submission"),
    "a promise not kept": (lambda f: submission(f, compliance__byte_audit_exact=False), "schema",
                           "compliance"),
    "no hash of the artifact": (lambda f: submission(f, seed_results__42__artifact_sha256="0"),
                                "schema", "seed 42"),
    "no number": (lambda f: submission(f, model_params=None), "schema", "submission.json"),
    **{f"altered {name}": (functools.partial(submission, **{name: value}), "generated",
                           "submission.json") for name, value in {
        "val_bpb": 2, "val_loss_std": 0.5, "headline_mode": "ngram", "seeds": [42], "extra": 1,
        "hardware": "8 x NVIDIA B200", "model_params": 5, "pytorch_version": "9",
        "cuda_version": "9", "date": "2030-01-02x", "track": "track_non_record_16mb",
        "compliance__training_seconds_max": 599.0, "seed_results__42__ttt_bpb": 1.25,
        "seed_results__42__train_ms": 1, "seed_results__42__artifact_sha256": "0"}.items()},
    "another name": (lambda f: submission(f, name="Huge"), "generated", "submission.json"),
    "altered table in the README": (lambda f: edit(f / "README.md", "| mean | 3 | 8 ", (
        "| mean | 3 | 9 ")), "generated", "README.md"),
    "no credits in the README": (lambda f: (f / "README.md").write_text(
        (f / "README.md").read_text().partition("## Attribution")[0]), "generated", "README.md"),
    "altered deviation in the README": (lambda f: edit(f / "README.md", ", deviation 0.", (
        ", deviation 9.")), "generated", "README.md"),
    "altered score in the README": (lambda f: (f / "README.md").write_text(re.sub(
        r"\*\*\d", "**0", (f / "README.md").read_text())), "generated", "README.md"),
    "counted bytes": (lambda f: edit(f / "train_seed42.log", "\nbyte_audit:exact bytes:",
                                     "\nbyte_audit:exact bytes:9"), "denominator", "val_bpb"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_verify_names_each_fault(case, record, capsys):
    """Of a folder that was right, verify names rule, place and remedy, and exits 1."""
    action, rule, where = BROKEN[case]
    (remedy,) = (each.remedy for each in h.tool("rules").RULES if each.name == rule)
    action(record)
    assert h.tool("make_record").main(["verify", str(record)]) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"(?m)^2030-01-02_Tiny: {rule}( \(our rule\))?: [^:]*{re.escape(where)}"
                     rf"[^:]*: .* Remedy: {re.escape(remedy)}$", printed), printed


FIELD_LOG = (
    "model_params:123\nworld_size:8 grad_accum_steps:1\nseed:7\n"
    "stopping_early: wallclock_cap train_time:599000ms step:4000/20000\n"
    "Code size: 100 bytes\nSerialized model int6+zlib: 15000000 bytes\n"
    "Total submission size int6+zlib: 15000100 bytes\n"
    "final_int6_sliding_window_exact val_loss:1.95000000 val_bpb:1.15000000\n"
    "final_int6_sliding_window val_loss:1.9500 val_bpb:1.1500 eval_time:90000ms\n")


@pytest.mark.parametrize(("rule", "log", "claims"), [
    (None, ("", ""), {}),
    ("means", ("", ""), dict(val_bpb=1.148)), ("sizes", ("", ""), dict(bytes_total=16_000_001)),
    ("sizes", ("Total submission size int6+zlib: 1", "Total submission size int6+zlib: 2"), {}),
    ("code", ("Code size: 1", "Code size: 2"), {}), ("seeds", ("seed:7", "seed:8"), {}),
    ("clock", ("599000ms", "600001ms"), {}), ("evaluation clock", ("90000ms", "601000ms"), {}),
    ("hardware", ("world_size:8", "world_size:4"), {}),
    ("complete", ("sliding_window", "x"), {}),
    ("compliance", ("", ""), dict(blurb="scored by two-pass evaluation")),
    ("submission", ("", ""), dict(author=None)),
])
def test_rules_bind_everybody(rule, log, claims, tmp_path):
    """A folder in the field's dialect: only our own rules break; a fault breaks its rule too."""
    (tmp_path / "train_seed7.log").write_text(FIELD_LOG.replace(*log) if log[0] else FIELD_LOG)
    (tmp_path / "train_gpt.py").write_text("#" * 100)
    (tmp_path / "README.md").write_text("A record.\n")
    about = dict(author="A", github_id="a", name="B", date="2026-04-01", val_bpb=1.15,
                 val_loss=1.95, bytes_total=15_000_100, track="10min_16mb", blurb="")
    (tmp_path / "submission.json").write_text(json.dumps(about | claims))
    found = {f.rule.name for f in h.tool("rules").verify(tmp_path) if not f.rule.ours
             and "at least 3" not in f.what}  # seeds
    assert found >= {rule} if rule else not found, found


@pytest.mark.parametrize("change", [
    dict(compliance=["x"]), dict(compliance=7), dict(seeds=[[42]]), dict(seed_results="none"),
    dict(seed_results__42__steps="many"), dict(attribution=3)])
def test_verify_reads_what_strangers_write(change, record):
    """Values of any kind, and files that are no text: a finding, never a traceback."""
    submission(record, **change)
    (record / "README.md").write_bytes(b"\xff\xfe")
    (record / "manifest.json").write_text('{"tokenizer": "scylla", "totals": {"val": 3}}')
    names = {finding.rule.name for finding in h.tool("rules").verify(record)}
    assert names >= {"ledger", "audit", "generated"}


def test_limits_are_inclusive(record, made_folder, capsys):
    """Exactly 600 s and 16,000,000 bytes break no rule of them; the worst folder counts."""
    verify = h.tool("rules").verify
    assert verify(record) == []  # what the cases above break is right
    set_train_time(record, 600000)
    size = 16_000_000 - json.loads((record / "submission.json").read_text())["bytes_code"]
    substitute(record, r"(Total submission size:) \d+", r"\1 16000000")
    substitute(record, r"(Serialized model \S+:) \d+", rf"\1 {size}")
    texts = [str(f) for f in verify(record) if f.rule.name in ("clock", "sizes")]
    assert not [text for text in texts if "at most" in text or " over " in text]
    assert h.tool("make_record").main(["verify", str(record), str(made_folder)]) == 1
    assert capsys.readouterr().out.endswith("2030-01-02_Tiny: no fault found\n")


def test_every_rule_is_broken_by_a_test():
    """No rule without a folder that breaks it and a row of records/README.md; no rule twice."""
    rules = h.tool("rules").RULES
    names = [rule.name for rule in rules]
    rows = [f"| {rule.name} | {'record: ' * rule.record}{'ours: ' * rule.ours}"
            f"{rule.check.__doc__.splitlines()[0]} |" for rule in rules]
    text = (h.ROOT / "records" / "README.md").read_text()
    assert "\n|--|--|\n" + "\n".join(rows) + "\n\n" in text
    assert len(set(names)) == len(names)
    assert {rule for _, rule, _ in BROKEN.values()} == set(names)


def test_compare_stats_and_plot(made_folder, runs, tmp_path, capsys):
    """One table of stages, the settings that differ, the bar; refusals are messages."""
    tool, logs = h.tool("make_record"), [str(log) for log in runs[2]]
    assert tool.main(["compare", str(made_folder), logs[0]]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n| 2030-01-02_Tiny | 3 | 8 |") == 1 and "| seed42 | 1 |" in printed
    assert "not on FineWeb's validation text" in printed
    assert tool.main(["stats", *logs[:2], "--against", logs[2]]) == 0
    bpb = float(re.search(r"The bar: 0.005 nats x (\S+) BPB", capsys.readouterr().out)[1])
    run = h.tool("runs").read_run(runs[2][2])
    assert bpb == pytest.approx(run.headline.bpb / run.headline.loss, abs=1e-5)
    assert tool.main(["stats", *logs, "--against", "2026-03-31_ParallelResiduals"]) == 0
    assert "not the same text" in capsys.readouterr().out
    output = tmp_path / "curves.png"
    assert tool.main(["plot", str(made_folder), "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG") and output.stat().st_size > 30_000
    for wrong in (["compare", "nothing"], ["plot", "2026-03-31_ParallelResiduals"],
                  ["compare", logs[0], logs[0]], ["compare", "2026-04"],
                  ["plot", logs[0], "--output", "/no/such/x.png"]):
        assert tool.main(wrong) == 1 and "error: " in capsys.readouterr().err
    assert tool.main(["compare", str(made_folder), "2026-03-31_ParallelResiduals"]) == 0
    row = re.search(r"\n\| 2026-03-31_Par.*", capsys.readouterr().out)[0]  # SPEC section 10's
    assert "| 3 | 6243 | 96.1 | 1.1228 | 1.1308 | 1.1063 | - |" in row
    assert tool.main(["verify", str(made_folder)]) == 0
    other = tmp_path / "other" / Path(logs[0]).name  # the same file name, another setting
    other.parent.mkdir()
    other.write_text(re.sub(r"(?m)^MATRIX_LR=.*", "MATRIX_LR=9", Path(logs[0]).read_text()))
    assert tool.main(["compare", logs[0], str(other)]) == 0
    printed = capsys.readouterr().out
    assert f"| {logs[0]} | 1 |" in printed and f"| {other} | 1 |" in printed
    assert tool.main(["stats", logs[0], str(other)]) == 1
    assert "MATRIX_LR" in capsys.readouterr().err


def test_published_results_take_the_bar():
    """Stats of two published results: the test of #1204 over #1019 as its numbers give it."""
    tool = h.tool("make_record")
    ours, theirs = map(tool.find_group, ("2026-03-31_Parallel", "2026-03-25_ValCalib"))
    text = tool.statistics_text(ours, theirs)
    assert "0.00296 BPB" in text and "\n0.00848 BPB better" in text and "does NOT pass" in text
    assert "\n0.00848 BPB worse" in tool.statistics_text(theirs, ours)
    assert tool.statistics_text(ours, theirs, 0.003).endswith("passes at p < 0.01.")
    assert "(bytes corrected)" in tool.find_group("2026-04-02_PROTEUS").name
    assert tool.find_group("2026-04-02_PROTEUS").bpb.mean == pytest.approx(1.1423, abs=1e-4)


def test_curves_are_labelled(runs, tmp_path, monkeypatch):
    """Five panels with title, units on both axes, a legend and a line for every run."""
    import matplotlib.pyplot as plt

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    runs = [h.tool("runs").read_run(log) for log in runs[2]]
    h.tool("figures").plot({f"seed {r.seed}": [r] for r in runs}, tmp_path / "c.png", "Tiny")
    monkeypatch.undo()
    *panels, rest = kept[0].axes
    assert [panel.get_title() for panel in panels] == [
        "Training loss", "Validation while training", "Final stages", "Learning rate", "Step time"]
    for panel in panels:
        assert panel.get_xlabel() in ("step", "stage") and panel.get_ylabel()
        assert len(panel.get_lines()) >= 3
        assert all(len(line.get_xdata()) for line in panel.get_lines())
    names = [text.get_text() for text in rest.get_legend().get_texts()]
    assert names == ["seed 42", "seed 1337", "seed 2024"]
    stages = [text.get_text() for text in panels[2].get_xticklabels()]
    assert stages == ["post-ema", "roundtrip", "sliding", "ttt"]
    for run, line in zip(runs, panels[2].get_lines(), strict=True):
        assert line.get_ydata()[-1] == run.headline.bpb
    plt.close(kept[0])


@h.needs_shared
def test_public_folders(tmp_path, capsys):
    """All 63 are read; those with miscounted bytes are flagged; the data and the table are ours."""
    folders = sorted((h.SHARED / "data" / "public_records").iterdir())
    rules, output = h.tool("rules"), tmp_path / "published.json"
    assert len(folders) == 63
    assert h.tool("make_record").main(["survey", *map(str, folders), "--json", str(output)]) == 0
    committed = h.ROOT / "records" / "published.json"
    assert json.loads(output.read_text()) == json.loads(committed.read_text())
    assert capsys.readouterr().out.strip() in (h.ROOT / "records" / "SURVEY.md").read_text()
    wrong = {f.name for f in folders if any(
        x.rule.name == "denominator" and "counts" in x.what for x in rules.verify(f))}
    assert wrong == {"2026-03-30_tm0054_AutoresearchTokenizer_LegalTTT",
                     "2026-04-02_PROTEUS_v16_Scylla",
                     "2026-04-02_Scylla_ParallelResiduals_DepthRecurrence_TTT"}
