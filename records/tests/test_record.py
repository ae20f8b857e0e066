"""Record folders: made and verified; every rule is broken once."""

from __future__ import annotations

import functools
import json
import re
import shutil

import numpy as np
import pytest
from conftest import NAME, make

import denominator
import generated
import harness as h
import make_record
import pack
import rules
import runs as reader
import train_gpt as t

LOG, *_ = LOGS = [f"train_seed{seed}.log" for seed in (42, 1337, 2024)]
LAST = r"(?<=val_bpb:)\S+(?=\n\Z)"  # the score at the end of a log


def edit(path, pattern, new):
    """Replace a pattern in a file; it must be there."""
    text, count = re.subn(pattern, new, path.read_text())
    assert count, (path, pattern)
    path.write_text(text)


def claim(**changes):
    """A fault: submission.json says else; a__b is b inside a, None removes, a function sees all."""
    def act(folder):
        about = json.loads((folder / "submission.json").read_text())
        for name, value in changes.items():
            *inside, last = name.split("__")
            place = functools.reduce(dict.__getitem__, inside, about)
            place[last] = value(about) if callable(value) else value
            if value is None:
                del place[last]
        (folder / "submission.json").write_text(json.dumps(about))
    return act


@pytest.fixture
def record(made_folder, tmp_path, monkeypatch):
    """A copy of the folder as if it had run on 8xH100 and its text were all of FineWeb's."""
    folder = shutil.copytree(made_folder, tmp_path / "track_10min_16mb" / NAME)
    for each in folder.glob("*.log"):
        edit(each, "\nworld_size:1 ", "\nworld_size:8 ")
        edit(each, r"device:cpu x\d+ ", "device:NVIDIA H100 80GB HBM3 ")
    claim(track="track_10min_16mb", hardware="8 x NVIDIA H100 80GB HBM3")(folder)
    edit(folder / "README.md", "track_non_record_16mb", "track_10min_16mb")
    edit(folder / "README.md", r"1 x cpu x\d+", "8 x NVIDIA H100 80GB HBM3")
    known = denominator.published()
    known["facts"]["validation_bytes"] = json.loads(
        (folder / "submission.json").read_text())["compliance"]["scored_bytes"]
    monkeypatch.setattr(denominator, "published", lambda: known)
    return folder


def test_reader_knows_both_dialects(runs, tmp_path):
    """Our log and two published dialects give the same kinds of facts."""
    run = reader.read_run(runs[2][0])
    assert run.ours and run.finished and run.seed == 42 and not run.resumed
    assert run.settings["MODEL_DIM"] == "32" and run.steps == 8 and len(run.train) == 8
    assert run.headline == run.scores["ttt"]._replace(eval_ms=None)
    assert run.audit == "exact" and run.total_bytes == run.artifact_bytes + run.code_bytes
    first = tmp_path / "first.txt"  # of the demo, which has built its data before it says its code
    first.write_text("demo: built\ndemo: 1023 tokens\n" + runs[2][0].read_text())
    assert reader.read_run(first).source == run.source
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
                     "tiny.yaml", "scylla.meta.npz", LOG, "model_seed42.ptz"}
    assert "other.yaml" not in names, "the ledger does not name it"
    scores = [float(re.search(r"exact val_loss:\S+ val_bpb:(\S+)\n\Z", log.read_text())[1])
              for log in runs[2]]
    assert [about["seed_results"][k]["val_bpb"] for k in ("42", "1337", "2024")] == scores
    assert about["val_bpb"] == pytest.approx(np.mean(scores), abs=1e-8)
    assert about["val_bpb_std"] == pytest.approx(np.std(scores, ddof=1), abs=1e-8)
    assert about["bytes_code"] == runs[0].stat().st_size
    assert about["bytes_total"] == about["bytes_code"] + max(
        path.stat().st_size for path in made_folder.glob("model_seed*.ptz"))
    assert about["attribution"]["Muon"] == "@KellerJordan, Keller Jordan et al."
    assert "MuonEq-R with depth recurrence" not in about["attribution"]
    text = (made_folder / "README.md").read_text()
    assert f"**{np.mean(scores):.5f} BPB**" in text
    command = re.search(r"\nDATA_PATH=<shards> (.*) SEED=<seed> torchrun", text)[1]
    changed = {k: v for k, v in h.environ(ttt_chunk_tokens=64).items()
               if t.show(getattr(t.Config(), k.lower())) != v}
    assert dict(re.findall(r"(\w+)='(.*?)'", command)) == changed | {"PRESET": "record"}
    assert rules.verify(made_folder, strict=True) == []


@pytest.mark.slow
def test_committed_folders_are_right():
    """Every record folder of this repository breaks no rule."""
    folders = [path for path in (h.ROOT / "records").glob("track_*/*") if path.is_dir()]
    assert folders
    for path in folders:
        assert rules.verify(path, strict=True) == [], path


def test_make_refuses(runs, tmp_path, capsys):
    """Other code, a missing artifact, one seed twice, a run cut short: an error and no folder."""
    code, _, logs = runs
    copy = shutil.copytree(code.parent / "logs", tmp_path / "run" / "logs")
    (copy / "torn.txt").write_text(logs[0].read_text()[:-300])
    (copy.parent / "seed1337.ptz").write_bytes(b"x")
    cases = (([logs[0], logs[0]], code, "one log for each seed"),
             (logs, h.ROOT / "retokenize_scylla.py", "give the file that ran with --code"),
             ([copy / "seed42.txt"], code, "ARTIFACT_PATH of its own"),
             ([copy / "seed1337.txt"], code, "seed1337.ptz: 1 bytes, but"),
             ([copy / "torn.txt"], code, "run the seed again"))
    for some, code, message in cases:
        assert make(code, some, tmp_path / "records") == 1
        assert message in capsys.readouterr().err
    assert make(code, logs, tmp_path / "records") == 1  # on a CPU it is no record
    assert "hardware" in capsys.readouterr().out
    assert not [p for p in (tmp_path / "records").rglob("*") if p.is_file()]


def log(pattern, new, name=LOG):
    """A fault: a log, or another file of a folder, says something else."""
    return lambda f: edit(f / name, pattern, new)


def gone(*names):
    """A fault: files are missing."""
    return lambda f: [(f / name).unlink() for name in names]


def every(*faults):
    """Several faults as one."""
    return lambda f: [fault(f) for fault in faults]


def table(**changes):
    """A fault: arrays of the byte table are others."""
    def act(folder):
        with np.load(folder / "scylla.meta.npz") as meta:
            arrays = {**meta}
        np.savez(folder / "scylla.meta.npz", **arrays | {
            name: change(arrays[name]) for name, change in changes.items()})
    return act


def twin(pattern, new):
    """A fault: the log of seed 42, edited, as that of another seed."""
    return every(lambda f: shutil.copy(f / LOG, f / LOGS[1]), log(pattern, new, LOGS[1]),
                 log(r"\n(seed:|SEED=)42\n", r"\n\g<1>1337\n", LOGS[1]))


BROKEN = {  # what is wrong: what is done to the folder, the rule, a part of what it finds
    "no author": (claim(author=" "), "files", "submission.json: no author"),
    "no JSON": (lambda f: (f / "submission.json").write_text("{"), "files",
                "submission.json: submission.json is missing"),
    "no README": (gone("README.md"), "files", "README.md: no README"),
    "no code": (gone("train_gpt.py"), "files", "train_gpt.py: no train"),
    "empty code": (lambda f: (f / "train_gpt.py").write_text(""), "files",
                   "train_gpt.py: train_gpt.py is empty"),
    "no logs": (gone(*LOGS), "files", "train_seed<k>.log: no"),
    "missing log": (gone(LOGS[1]), "seeds", "submission.json: no log of seed 1337"),
    "two seeds": (every(gone(LOGS[1]), claim(seeds=[42, 2024], seed_results__1337=None)), "seeds",
                  "train_seed<k>.log: 2 of 3 seeds"),
    "a log under another seed's name": (lambda f: (f / LOG).rename(f / "train_seed7.log"), "seeds",
                                        "train_seed7.log: its name says seed 7"),
    "log of a seed that is not claimed": (claim(seed_results__1337=None, seeds=[42, 2024]), "seeds",
                                          f"{LOGS[1]}: of seed 1337"),
    "another seed's log at other times": (twin("time:[0-9]+", "time:7"), "seeds",
                                          f"{LOG}: holds the same losses"),
    "that log with one loss altered": (twin("(step:4/.*loss:).", r"\g<1>3"), "seeds",
                                       f"{LOG}: has the score of"),
    "one artifact for two seeds": (claim(seed_results__42__artifact_sha256=lambda said: (
        said["seed_results"]["1337"]["artifact_sha256"])), "seeds", f"{LOG}: has the artifact of"),
    "a fourth log, hidden": (lambda f: (f / "worse").mkdir() or shutil.copy(
        f / LOG, f / "worse" / "seed7.log"), "seeds", "seed7.log: its name says seed 7"),
    **{f"another {name} in a log": (log(pattern, new), "configuration", f"{LOG}: {name} is")
       for name, pattern, new in (
           ("MATRIX_LR", "\nMATRIX_LR=", r"\g<0>9"), ("device", "device:NVIDIA", "device:a"),
           ("cuda", "\nseed:", r"\ncuda 12.8 _CudaDeviceProperties\g<0>"),
           ("params", "\nmodel_params:", r"\g<0>9"), ("world", "\nworld_size:", r"\g<0>1"),
           ("SEED", "\nseed:42\n", "\n"), ("LOAD_ARTIFACT", "\nLOAD_ARTIFACT=", r"\g<0>x.ptz"))},
    "another torch": (log(" torch 2", " torch 9", LOGS[2]), "configuration", f"{LOGS[2]}: torch"),
    "more steps than settings": (every(*(log("\nITERATIONS=8", "\nITERATIONS=7", each)
                                         for each in LOGS)), "configuration", f"{LOG}: 8 steps"),
    "more after the end": (log(r"\Z", "more\n"), "complete", f"{LOG}: does not end"),
    **{f"resumed, says {line!r}": (log("\nresumed: 0", line), "complete", f"{LOG}: resumed")
       for line in ("\nresumed: 1", "\nresumed step:3 of x")},
    "two audits": (log("\nbyte_audit:", r"\nbyte_audit:no\g<0>"), "complete", f"{LOG}: says"),
    **{f"another {name} in the summary": (log(rf"\n{name}: ", r"\g<0>9"), "complete", (
        f"{LOG}: says two things: {name}")) for name in ("bytes_total", "bytes_artifact", "steps")},
    **{f"{name} twice": (log(r"\nresumed: ", rf"\n{name}9\g<0>"), "complete", (
        f"{LOG}: says two things: {name[:5]}")) for name in ("MATRIX_LR=", "weights: ")},
    "a score that is not the rounded one": (log("(sliding_window_exact val_loss:).", r"\g<1>1"),
                                            "complete", f"{LOG}: says two things: final_int6_sl"),
    **{f"{name} of a seed": (claim(**{f"seed_results__42__{name}": value}), "scores",
                             f"submission.json seed 42: {name}") for name, value in (
        ("val_bpb", lambda said: said["seed_results"]["42"]["val_bpb"] - 1e-6), ("val_loss", 1.5),
        ("artifact_bytes", 5))},
    "another mode's score": (claim(seed_results__42__val_bpb=lambda said: (
        said["seed_results"]["42"]["sliding_bpb"])), "scores", "submission.json seed 42: val_bpb"),
    "mean": (claim(val_bpb=1.0), "scores", "submission.json: val_bpb 1.0"),
    "deviation": (claim(val_bpb_std=0.5), "scores", "submission.json: val_bpb_std 0.5"),
    "artifact of another size": (lambda f: (f / "model_seed42.ptz").write_bytes(b"x"), "sizes",
                                 "model_seed42.ptz: 1 bytes"),
    "no total": (log("\nTotal submission size", "\nTotal"), "complete", f"{LOG}: says"),
    **{f"a total of {total}": (log(r"(Total submission size: )\d+", rf"\g<1>{total}"), "sizes", (
        f"{LOG}: {what}")) for total, what in (
        (9, "total 9 is not artifact"), (16_000_001, "1 bytes over 16,000,000"))},
    **{f"{name} over the limit": (claim(**{name: 16_000_001}), "sizes", "submission.json: claims 1")
       for name in ("bytes_total", "seed_results__42__artifact_bytes")},
    "bytes_total": (claim(bytes_total=5), "scores", "submission.json: bytes_total 5 is in no log"),
    "not the largest total": (claim(bytes_total=lambda said: said["bytes_code"] + min(
        seed["artifact_bytes"] for seed in said["seed_results"].values())), "generated",
        "submission.json: bytes_total"),
    "code of another size": (log("\nCode size: ", r"\g<0>1"), "code", LOG),
    "bytes_code": (claim(bytes_code=5), "code", "submission.json: bytes_code 5"),
    **{f"600.201 s on a line: {line}": (log(rf"(\n{line})\d+", r"\g<1>600201"), "clock",
                                        f"{LOG}: +0.201 s") for line in (
        "step:5/.*train_time:", "step:8/.* val_bpb.* train_time:", "train_clock slowest_rank:",
        "gptq_calibration train_time:", "train_ms: ")},
    **{f"601 s on a line: {line}": (log(rf"(\n{line})[\d.]+", r"\g<1>601000"), "evaluation clock",
                                    f"{LOG}: +") for line in (
        "seconds_eval: ", "final_int6_sliding_window .*eval_time:")},
    "another GPU": (log("NVIDIA H100", "NVIDIA A100"), "hardware", f"{LOG}: on NVIDIA A100"),
    "no ranks": (log("\nworld_size:8 ", "\n"), "hardware", f"{LOG}: None ranks"),
    "a chunk scored again": (log(r"\nttt_chunk \[3/.*", r"\g<0>\g<0>"), "order", f"{LOG}: chunk 3"),
    "a chunk too many": (log(r"(\nttt_chunk \[)31(/31.*)", r"\g<0>\g<1>33\2"), "order",
                         f"{LOG}: chunk 33 of 31"),
    "a chunk out of order": (log(r"(\nttt_chunk \[3/.*)(\nttt_chunk.*)", r"\2\1"), "order",
                             f"{LOG}: chunk 3 of 31"),
    **{f"chunk {n} left out": (log(rf"\nttt_chunk \[{n}/.*", ""), "order", f"{LOG}: the chunks of")
       for n in (5, 31)},
    **{f"SLOT's {name}": (every(claim(**{name: 0.9}), log(
        "\nlegal_ttt ", r"\nslot non_compliant val_loss:1 val_bpb:0.9\g<0>")), "compliance", (
        f"{LOG}: a non_compliant score")) for name in ("val_bpb", "seed_results__42__val_bpb")},
    "SLOT's headline": (log(r"(?s)\nlegal_ttt .* (val_loss:\S+ val_bpb:\S+\n)\Z", (
        r"\nslot non_compliant \1\g<0>")), "compliance", f"{LOG}: a non_compliant score"),
    "SLOT in the claims": (claim(seed_results__42__slot_bpb=1.0), "compliance", "submission.json"),
    "counted bytes": (log("\nbyte_audit:exact bytes:", r"\g<0>9"), "denominator",
                      "val_bpb: of another text"),
    "a promise in compliance": (claim(compliance__code="TBD"), "generated", (
        "submission.json: compliance.code TBD")),
    "a promise not kept": (claim(compliance__code=False), "generated", (
        "submission.json: compliance.code False")),
    "no hash, and no artifact": (every(gone("model_seed42.ptz"), claim(
        seed_results__42__artifact_sha256="0")), "generated", "submission.json: seed_results.42."),
    **{f"no {name}": (gone(name), "evidence", f"{name}: no {name}")
       for name in ("requirements.txt", "curves.png", "manifest.json")},
    "a copy's source.json": (every(gone("curves.png"), lambda f: (f / "source.json").write_text(
        '{"other_files": ["curves.png"]}')), "evidence", "source.json: a copy"),
    "empty curves": (lambda f: (f / "curves.png").write_text(""), "evidence",
                     "curves.png: curves.png is"),
    "another vocabulary": (lambda f: edit(f / "tiny.yaml", "a", "b"), "vocabulary", "manifest"),
    "a byte table of another vocabulary beside": (every(
        lambda f: shutil.copy(f / "tiny.yaml", f / "a.yaml"), log("a", "b", "tiny.yaml"),
        lambda f: edit(f / "manifest.json", r'(?<="sha256": ")\w+(?=",\s+"vocab_size")',
                       rules.sha256(f / "tiny.yaml"))), "vocabulary", "scylla.meta.npz: counts"),
    "marks of capitals counted as bytes": (every(
        lambda f: edit(f / "tiny.yaml", "case: ascii\n", ""),
        lambda f: edit(f / "manifest.json", r'(?<="sha256": ")\w+(?=",\s+"vocab_size")',
                       rules.sha256(f / "tiny.yaml"))), "vocabulary", "scylla.meta.npz: counts"),
    "no vocabulary": (gone("tiny.yaml"), "vocabulary", "manifest.json: names tiny.yaml"),
    "no vocabulary, and none in the ledger": (lambda f: [(f / "tiny.yaml").unlink(), edit(
        f / "manifest.json", '"sha256"', '"digest"')], "vocabulary", "manifest.json"),
    "a lossy vocabulary": (lambda f: edit(f / "manifest.json", '"byte_exact": true',
                                          '"byte_exact": false'), "ledger", "manifest.json"),
    "a bad document": (log('"bad_documents": 0', '"bad_documents": 7', "manifest.json"), "ledger",
                       "manifest.json: totals of"),
    "other bytes in all": (log(r'("val": {[^}]*"source_bytes": )', r"\g<1>9", "manifest.json"),
                           "ledger", "manifest.json: totals of val"),
    "other ids in all": (log(r'("train": {[^}]*"tokens": )', r"\g<1>9", "manifest.json"),
                         "ledger", "manifest.json: totals of train"),
    "no shard of training": (every(
        log("_train_", "_other_", "manifest.json"), log(
            r'("train": {[^}]*"source_bytes": )\d+(,\s+"tokens": )\d+', r"\g<1>0\g<2>0",
            "manifest.json")), "ledger", "manifest.json: totals of train"),
    "no totals": (log('"totals"', '"total"', "manifest.json"), "ledger", "manifest.json: totals"),
    "no byte table": (gone("scylla.meta.npz"), "vocabulary", "*.meta.npz: no byte table"),
    **{f"another {name} in the byte table": (table(**{name: change}), "vocabulary", (
        "scylla.meta.npz: counts other bytes")) for name, change in (
        ("base_bytes", lambda a: a + 1), ("has_leading_space", np.ones_like),
        ("is_boundary_token", np.ones_like))},
    "TTT's headline without TTT": (log(r"\nlegal_ttt.*", ""), "complete", f"{LOG}: says"),
    "an invented headline": (log(LAST, "1.00000000"), "complete", f"{LOG}: says"),
    "another mode's headline": (log("\n(headline_mode:) ttt", r"\n\1 sliding"), "complete",
                                f"{LOG}: says"),
    "log of other code": (log("\ncode_sha256:", r"\g<0>0"), "code", f"{LOG}: of code with"),
    **{f"{name} beside code that is not packed": (lambda f, name=name: (f / name).write_text("1"),
        "generated", f"{name}: code that no") for name in ("lzma.py", generated.READABLE)},
    "damaged code": (lambda f: (f / "train_gpt.py").write_bytes(pack.pack("a = 1\n") + b"#"),
                     "generated", "train_gpt.py: "),
    "other source in the log": (log(r"def main\(", "def man("), "generated", f"{LOG}: begins with"),
    "bytes not proven": (log("\nbyte_audit:exact", "\nbyte_audit:no"), "ledger", f"{LOG}: byte_"),
    "bytes of another text": (log('"source_bytes": ', r"\g<0>1", "manifest.json"), "ledger", LOG),
    "score a little off those bytes": (log(LAST, lambda m: f"{float(m[0]) + 2e-6:.8f}"), "ledger",
                                       f"{LOG}: val_bpb"),
    "bytes differ by seed": (log("\nbyte_audit:exact bytes:", r"\g<0>1"), "ledger",
                             "train_seed<k>"),
    **{f"another {name}": (claim(**{name: value}), "generated", "submission.json: " + name.replace(
        "__", ".")) for name, value in {
        "val_loss_std": 0.5, "seeds": [42], "extra": 1, "headline_mode": None,
        "track": "track_non_record_16mb", "compliance__training_seconds_max": 599.0,
        "seed_results__42__ttt_bpb": 1.25, "seed_results__42__artifact_sha256": "0",
        "seed_results__42__roundtrip_bpb": 1.5, "seed_results__42__sliding_bpb": 1.5,
        "seed_results__42__steps": 10, "seed_results__42__step_avg_ms": 9.0}.items()},
    "another number under a name in two parts": (every(claim(compliance__seeds=9), claim(
        **{"compliance.seeds": 3})), "generated", "submission.json: compliance.seeds 9"),
    "an empty README": (lambda f: (f / "README.md").write_text(""), "generated", "README.md: "),
    "no date": (claim(date="2030-01-02x"), "generated", "submission.json: date and name make"),
    "another name": (claim(name="Huge"), "generated", "submission.json: date and name make"),
    **{f"no line {line} in README": (log(rf"\n{re.escape(line)}.*", "", "README.md"), "generated", (
        f"README.md: README.md lacks the line '{line}")) for line in (
            "**", "| mean", "## The idea", "## Attri")},
    "no attribution": (claim(attribution={}), "generated", "submission.json: attribution"),
    "another's credit": (claim(attribution=lambda said: said["attribution"] | {
        next(iter(said["attribution"])): "me"}), "generated", "submission.json: attribution"),
}


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.name)
def test_verify_names_each_fault(rule, record, tmp_path, capsys):
    """Of a folder that was right, verify names rule, place and remedy, and exits 1.

    Faults by the challenge's rules are named without --strict.
    """
    missed = {}
    for case, (fault, broken, found) in BROKEN.items():
        if broken == rule.name:
            folder = shutil.copytree(record, tmp_path / "faulty" / record.parent.name / NAME)
            fault(folder)
            code = make_record.main(["verify", str(folder), *["--strict"] * rule.strict])
            missed[case] = capsys.readouterr().out
            line = rf"(?m)^{NAME}\b.*: not valid: .*\n(?:  .*\n)*  {broken}: {re.escape(found)}.*"
            if code == 1 and re.search(rf"{line} Remedy: {re.escape(rule.remedy)}$", missed[case]):
                del missed[case]
            shutil.rmtree(folder)
    assert not missed, missed


def test_no_field_is_optional(record):
    """Of a submission.json that says nothing each field that a folder of ours needs is named."""
    (record / "submission.json").write_text('{"seed_results": {"42": {}}}')
    text = "\n".join(map(str, rules.verify(record, strict=True)))
    assert {*re.findall("submission.json: (\\w+) missing, but the logs give", text)} == {*(
        "bytes_total val_loss val_loss_std val_bpb val_bpb_std headline_mode bytes_code seeds "
        "model_params hardware pytorch_version cuda_version").split()}
    assert "no author, github_id, name, date, val_bpb in submission.json" in text
    for name in ("track None,", "seed_results.42.val_bpb missing", "attribution.Muon missing"):
        assert f"submission.json: {name}" in text


FIELD_LOG = (
    "model_params:123\nworld_size:8 grad_accum_steps:1\nseed:7\nCode size: 100 bytes\n"
    "stopping_early: wallclock_cap train_time:599000ms step:4000/20000\n"
    "Serialized model int6+zlib: 15000000 bytes\nTotal submission size int6+zlib: 15000100 bytes\n"
    "final_int6_sliding_window_exact val_loss:1.95000000 val_bpb:1.15000000\n"
    "final_int6_sliding_window val_loss:1.9500 val_bpb:1.1500 eval_time:90000ms\n")


def field_folder(folder, logs, **claims):
    """A record folder in the field's dialect: logs of seeds 7, 8, ..., and what it claims."""
    for seed, log in enumerate(logs, 7):
        (folder / f"train_seed{seed}.log").write_text(log.replace("seed:7", f"seed:{seed}"))
    (folder / "train_gpt.py").write_text("#" * 100)
    (folder / "README.md").write_text("A record.\n")
    about = dict(author="A", github_id="a", name="B", date="2026-04-01", val_bpb=1.15,
                 val_loss=1.95, bytes_total=15_000_100, track="10min_16mb", blurb="")
    (folder / "submission.json").write_text(json.dumps(about | claims))


@pytest.mark.parametrize(("rule", "old", "new", "claims"), [
    (None, "", "", {}), ("sizes", "zlib: 15000100", "zlib: 25000100", {}),
    (None, "599000ms", "600200ms", {}), ("clock", "599000ms", "600201ms", {}),
    ("code", "Code size: 1", "Code size: 2", {}), ("complete", "sliding_window", "x", {}),
    ("evaluation clock", "90000ms", "601000ms", {}),
    ("hardware", "size:8", "size:4", {}), (None, "size:8", "size:4", dict(track="non-record_16mb")),
    ("seeds", "seed:7", "seed:8", dict(track="track_non_record_16mb")),
    ("clock", "", "", dict(seed_results={"9": dict(train_time_ms=600_201)})),
    ("scores", "", "", dict(val_bpb=1.148)), ("sizes", "", "", dict(bytes_total=16_000_001)),
    ("files", "", "", dict(author=None)), ("compliance", "", "", dict(blurb="two-pass")),
    (None, "", "", dict(blurb="not two-pass, no full-rescore")), (None, "", "", dict(seeds=["7"])),
    ("sizes", "15000000 bytes\nTotal submission size int6+zlib: 15000100", "15999901", {}),
    ("scores", "seed:7\n", "seed:7\nDIAGNOSTIC post_ema val_loss:1.9 val_bpb:1.1\n",
     dict(val_bpb=1.1)),
])
def test_rules_bind_everybody(rule, old, new, claims, tmp_path):
    """A folder in the field's dialect is valid without our evidence; a fault breaks its rule."""
    field_folder(tmp_path, [FIELD_LOG.replace(old, new)], **claims)
    found = {f.rule.name for f in rules.verify(tmp_path) if not f.note
             and "of 3 seeds" not in f.what}
    assert found >= {rule} if rule else not found, found


COUNTED = "val_loader:shards pattern=./val_*.bin tokens:{}\n"  # each 1.95 / (ln 2 x 1.15) bytes
TRUE, LONE = map(COUNTED.format, (61758000, 64846000))  # 5 % more: lone bytes counted as three


@pytest.mark.parametrize(("lines", "claims", "said"), [
    ([TRUE, TRUE], {}, None), ([""], {}, None), ([""], dict(tokenizer="Scylla, 998 ids"), None),
    ([TRUE, LONE], {}, "val_bpb over 158,633,352 of 151,080,891 bytes: +5.00% bytes, truly "
     "1.20749 BPB"),
    (["byte_audit:lossy bytes:151383053\n"], {}, "val_bpb over 151,383,053 of 151,080,891 bytes: "),
    (["byte_audit:exact bytes:151383053\n"], {}, "val_bpb: of another text, 151,383,053 bytes"),
    (["byte_audit:lossy bytes:1000000\n"], {}, "val_bpb: of another text, 1,000,000 bytes"),
    ([COUNTED.format(63779840)], {}, "val_bpb: of another text, 63,779,840 SP1024 tokens"),
    ([""], dict(tokenizer="Scylla, 998 ids", val_bpb=1.0952), "bytes per token: +5.02% bytes, "),
])
def test_miscounted_bytes_are_flagged(lines, claims, said, tmp_path):
    """BPB over 5 % too many bytes is told with the true one, from logs or else from claims."""
    field_folder(tmp_path, [line + FIELD_LOG for line in lines], **claims)
    found = [f for f in rules.verify(tmp_path) if f.rule.name == "denominator"]
    assert len(found) == bool(said) and (not said or said in str(found[0])), found
    assert not [f for f in found if f.note != ("63,779,840" in f.what)]  # was the challenge's text


@pytest.mark.parametrize("change", [
    dict(compliance=["x"]), dict(compliance=7), dict(seeds=[[42]]), dict(seed_results="none"),
    dict(seed_results__42__steps="many"), dict(attribution=3)])
def test_verify_reads_what_strangers_write(change, record):
    """Values of any kind, and files that are no text: a finding, never a traceback."""
    claim(**change)(record)
    (record / "README.md").write_bytes(b"\xff\xfe")
    (record / "manifest.json").write_text('{"tokenizer": "scylla", "totals": {"val": 3}}')
    names = {finding.rule.name for finding in rules.verify(record, strict=True)}
    assert names >= {"ledger", "vocabulary", "generated"}


def test_limits_are_inclusive(record, made_folder, capsys):
    """Exactly 600 s and 16,000,000 bytes break no rule of them; the worst folder counts."""
    assert rules.verify(record, strict=True) == []  # what the cases above break is right
    about = json.loads((record / "submission.json").read_text())
    for pattern, limit in ((r"(val_bpb:\S+ train_time:)\d+", 600_000),
                           (r"(Total submission size: )\d+", 16_000_000),
                           (r"(Serialized model \S+: )\d+", 16_000_000 - about["bytes_code"])):
        edit(record / LOG, pattern, rf"\g<1>{limit}")
    texts = [str(f) for f in rules.verify(record) if f.rule.name in ("clock", "sizes")]
    assert not [text for text in texts if "s. Remedy" in text or " over " in text]
    assert make_record.main(["verify", str(record), str(made_folder)]) == 1
    assert capsys.readouterr().out.endswith(
        f"\n{NAME}: valid: 3 seeds, {about['val_bpb']:.5f} BPB, {about['bytes_total']:,} bytes\n")
    edit(record / LOG, r"(val_bpb:\S+ train_time:)\d+", r"\g<1>600200")
    (note,) = [f for f in rules.verify(record) if f.rule.name == "clock"]
    assert note.note and note.what == "+0.200 s"  # late, as the challenge accepted it


def test_one_line_says_what_a_folder_is(tmp_path, capsys):
    """Valid with seeds, score, bytes and notes, or not valid and why; faults are indented."""
    logs = [FIELD_LOG.replace("599000ms", f"60000{n}ms") for n in (0, 7, 9)]
    field_folder(tmp_path, [log.replace("val_loss:1.95", f"val_loss:1.95{n}")
                            for n, log in enumerate(logs)], val_loss=1.950)
    assert make_record.main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path.name}: valid: 3 seeds, 1.15000 BPB, 15,000,100 bytes; clock +0.009 s (note, "
        "and 1 more)\n")
    claim(bytes_total="15 MB")(tmp_path)  # what is no number is none
    assert make_record.main(["verify", str(tmp_path)]) == 0
    assert "15,000,100 bytes" in capsys.readouterr().out
    claim(author=None, bytes_total=16_000_007, val_bpb=1.0)(tmp_path)
    (tmp_path / "train_seed9.log").unlink()
    assert make_record.main(["verify", str(tmp_path)]) == 1
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == (f"{tmp_path.name}: not valid: files: no author in submission.json; seeds: 2 "
                     "of 3 seeds (and 2 more)")
    assert all(line.startswith("  ") for line in rest)
    assert [line.split(":")[0].strip() for line in rest] == [
        "files", "seeds", "scores", "scores", "sizes", "notes"]


def test_logs_that_a_copy_leaves_out_are_no_fault(tmp_path):
    """What may be in a log that source.json names, and the folder lacks, is a note."""
    field_folder(tmp_path, [FIELD_LOG.replace("_bpb:1.15", "_bpb:1.14")] * 2, seeds={
        str(seed): dict(val_bpb=1.15) for seed in (7, 8, 9)}, bytes_total=15_000_101)
    for names, note in ([], False), (["train_seed10.log"], False), (["log_s9.txt"], True):
        (tmp_path / "source.json").write_text(json.dumps(dict(other_files=names)))
        found = {f.what: f.note for f in rules.verify(tmp_path) if f.rule.name != "scores"
                 and "same losses" not in f.what}
        assert found == {"no log of seed 9": note, "2 of 3 seeds": bool(names)}
        notes = {f.note for f in rules.verify(tmp_path) if f.rule.name == "scores"}
        assert notes == {bool(names)}
        said = make_record.verdict(tmp_path, rules.verify(tmp_path))
        assert said.startswith(f"{tmp_path.name} (a copy without all files; its source.json is")


def test_a_survey_counts_folders_of_one_name(tmp_path):
    """Each has its row."""
    for place in "ab":
        (tmp_path / place / NAME).mkdir(parents=True)
        field_folder(tmp_path / place / NAME, [FIELD_LOG])
    text = make_record.survey_text([tmp_path / place / NAME for place in "ab"])
    assert "from 2 folders" in text and text.count(f"\n| {NAME} |") == 2


@pytest.mark.parametrize("day", ["2030-13-02", "2030-01-32"])
def test_a_date_is_one(day, record):
    """No 13th month and no 32nd day."""
    folder = record.rename(record.with_name(f"{day}_Tiny"))
    claim(date=day)(folder)
    assert "YYYY-MM-DD" in "".join(map(str, rules.verify(folder, strict=True)))


def test_a_copy_of_a_log_is_no_other_run(tmp_path):
    """train.log beside the log that it is a copy of is read once, with a seed line or without."""
    for line in ("seed:7\n", ""):
        folder = tmp_path / f"copy{len(line)}"
        folder.mkdir()
        field_folder(folder, [FIELD_LOG] * 3)
        (folder / "train.log").write_text(FIELD_LOG.replace("seed:7\n", line))
        assert len(rules.Folder(folder).runs) == 3


def test_every_rule_is_broken_by_a_test(capsys):
    """No rule without a folder that breaks it and a line of verify's help; no rule twice."""
    names = [rule.name for rule in rules.RULES]
    with pytest.raises(SystemExit):
        make_record.main(["verify", "--help"])
    text = capsys.readouterr().out
    assert re.findall(r"(?m)^  (\w[\w ]+?)(?: \((?:record|strict)\))?: .*\.$", text) == names
    assert len(set(names)) == len(names)
    assert {rule for _, rule, _ in BROKEN.values()} == set(names)


@pytest.mark.slow
def test_a_packed_folder_holds_its_source(packed, tmp_path, capsys):
    """The readable source is beside packed code, proven by packing; another one is refused."""
    code, _, run_log = packed
    options = ("--track", "track_non_record_16mb")
    assert make(code, [run_log], tmp_path, *options) == 0
    folder = tmp_path / "track_non_record_16mb" / NAME
    readable = folder / generated.READABLE
    assert readable.read_bytes() == h.SCRIPT.read_bytes()
    assert rules.verify(folder, strict=True) == []
    about = json.loads((folder / "submission.json").read_text())
    assert about["bytes_code"] == code.stat().st_size and about["val_bpb_std"] is None
    assert f"of one seed, {about['seeds'][0]}." in (folder / "README.md").read_text()
    readable.write_text(h.SCRIPT.read_text() + "a = 1\n")
    (found,) = rules.verify(folder, strict=True)
    assert found.where == generated.READABLE and "python-minifier" in found.what
    readable.unlink()
    assert "README.md" in {found.where for found in rules.verify(folder, strict=True)}
    assert generated.READABLE in {found.where for found in rules.verify(folder, strict=True)}
    assert rules.verify(folder) == []
    shutil.rmtree(folder)
    other = tmp_path / "other.py"
    other.write_text("a = 1\n")
    assert make(code, [run_log], tmp_path, *options, "--source", str(other)) == 1
    assert f"{other} packs to" in capsys.readouterr().err and not folder.exists()


@h.needs_shared
def test_public_folders(tmp_path, capsys):
    """All 63 are read; those with miscounted bytes are flagged; the data and the table are ours."""
    folders = sorted((h.SHARED / "data" / "public_records").iterdir())
    rules, output = h.tool("rules"), tmp_path / "published.json"
    assert len(folders) == 63
    assert h.tool("make_record").main(["survey", *map(str, folders), "--json", str(output)]) == 0
    committed = h.ROOT / "records" / "published.json"
    assert json.loads(output.read_text()) == json.loads(committed.read_text())
    assert capsys.readouterr().out == (h.ROOT / "records" / "SURVEY.md").read_text()
    wrong = {f.name for f in folders if any(
        x.rule.name == "denominator" and not x.note for x in rules.verify(f))}
    assert wrong == {"2026-03-30_tm0054_AutoresearchTokenizer_LegalTTT",
                     "2026-04-02_PROTEUS_v16_Scylla",
                     "2026-04-02_Scylla_ParallelResiduals_DepthRecurrence_TTT"}
