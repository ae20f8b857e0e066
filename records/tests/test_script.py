"""run_8xh100.sh and records/fetch.py, from a bare machine to a folder."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

import harness as h
import retokenize_scylla as R


class HubHandler(http.server.BaseHTTPRequestHandler):
    """A Hugging Face hub with one dataset repository, on loopback."""

    files: dict[str, bytes] = {}
    cut: set[str] = set()  # files whose first answer breaks off in the middle
    asked: list[str] = []
    starts: list[int] = []  # where the answers to `asked` begin

    def log_message(self, *_):
        """Silence."""

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def listing(self, name_key):
        """Every file as the hub lists it, its name under `name_key`; shards are large files."""
        for name, data in sorted(self.files.items()):
            entry = {name_key: name, "type": "file", "size": len(data), "oid": "0" * 40}
            if name.endswith(".bin"):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = dict(oid=sha256, sha256=sha256, size=len(data), pointerSize=1)
            yield entry

    def do_GET(self):
        path = urllib.parse.unquote(self.path.split("?")[0])
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(/(revision|tree)/\w+)?", path):
            body = [*self.listing("path")] if match[3] == "tree" else dict(
                id=match[1], sha="c" * 40, siblings=[*self.listing("rfilename")])
            return self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        name = re.fullmatch(r"/datasets/[^/]+/[^/]+/resolve/[^/]+/(.+)", path)
        if not name or name[1] not in self.files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = self.files[name[1]]
        start = int(re.match(r"bytes=(\d+)", self.headers.get("Range") or "bytes=0")[1])
        if self.command == "GET":
            self.asked.append(name[1])
            self.starts.append(start)
        tags = {"ETag": f'"{hashlib.sha256(self.files[name[1]]).hexdigest()}"',
                "X-Repo-Commit": "c" * 40, "Accept-Ranges": "bytes"}
        if self.command == "GET" and name[1] in self.cut:
            self.cut.discard(name[1])
            self.send_response(200)
            for key, value in (tags | {"Content-Length": str(len(data))}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return None
        if start:
            tags["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.answer(206 if start else 200, data[start:], tags)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    """A hub that serves SentencePiece shards of a tiny text: (environment, handler)."""
    model, shards = tmp_path / "fineweb_1024_bpe.model", tmp_path / "sp"
    model.write_bytes(h.sentencepiece_model())
    for seed, (split, count) in enumerate((("train", 200), ("val", 12))):
        documents = h.write_documents(tmp_path / f"{split}.jsonl", h.texts(count, seed))
        h.retokenized(documents, model, split, shards, "--shard-tokens", "5000")
    hub = type("Hub", (HubHandler,), dict(cut=set(), asked=[], starts=[], files={
        f"datasets/datasets/fineweb10B_sp1024/{p.name}": p.read_bytes()
        for p in shards.glob("*.bin")} | {
        "datasets/tokenizers/fineweb_1024_bpe.model": model.read_bytes()}))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path / "hf"),
               NO_PROXY="127.0.0.1", HF_HUB_DISABLE_TELEMETRY="1"), hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_fetch_resumes_and_checks(hub, tmp_path):
    """A broken download goes on, nothing is fetched twice, half a file does not pass for one."""
    environ, hub = hub
    first = "datasets/datasets/fineweb10B_sp1024/fineweb_train_000000.bin"
    hub.files[first] = bytes(range(256)) * 100_000  # more than one read of its library
    hub.cut.add(first)
    command = [h.ROOT / "records" / "fetch.py", "--output", tmp_path / "got", "--shards", "1"]
    away = environ | dict(HF_ENDPOINT=environ["HF_ENDPOINT"] + "/nothing")
    done = h.python(command, tmp_path, environ)
    assert done.returncode == 0, done.stderr
    for name, data in hub.files.items():
        there = tmp_path / "got" / name
        assert there.exists() == ("train" not in name or name == first)
        assert not there.exists() or there.read_bytes() == data
    starts = [start for name, start in zip(hub.asked, hub.starts, strict=True) if name == first]
    assert len(starts) == 2 and starts[0] == 0 < starts[1]  # it went on where it broke off
    done = h.python(command, tmp_path, away)
    assert done.returncode == 0 and "all 3 files are in" in done.stdout
    (tmp_path / "got" / first).write_bytes(hub.files[first][:1000])
    done = h.python(command, tmp_path, away)
    assert done.returncode == 1 and "check the network and HF_ENDPOINT" in done.stderr
    assert hub.asked.count(first) == 2
    assert h.python(command, tmp_path, environ).returncode == 0
    assert (tmp_path / "got" / first).read_bytes() == hub.files[first]
    asked = len(hub.asked)
    done = h.python([*command[:-1], "80"], tmp_path, environ)
    assert done.returncode == 1 and re.search(r"has \d of 80 training shards", done.stderr)
    assert len(hub.asked) == asked


def test_fetch_asks_for_room_before_it_fetches(hub, tmp_path):
    """Both figures and the remedy; nothing is downloaded."""
    environ, hub = hub
    small = "shutil.disk_usage = lambda path: types.SimpleNamespace(free=1000)"
    program = f"import runpy, shutil, sys, types; {small}; sys.argv = sys.argv[1:]; " \
              "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = h.python(["-c", program, h.ROOT / "records" / "fetch.py", "--output", tmp_path / "got",
                     "--shards", "1"], tmp_path, environ)
    assert done.returncode == 1 and "has 0.0 GB free" in done.stderr and "SHARDS" in done.stderr
    assert not hub.asked


def run_script(**environ: str) -> subprocess.CompletedProcess:
    """The script of this repository; all of its output is in stdout."""
    return subprocess.run(["bash", h.ROOT / "run_8xh100.sh"], stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.STDOUT, env=h.clean_environ(**environ))


def for_own_shards(hub: type[HubHandler], folder: Path) -> dict[str, str]:
    """Settings of the script up to the pre-flight, two shards of the challenge's folder "data"."""
    for name, data in hub.files.items():
        path = folder / "data" / name.removeprefix("datasets/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return dict(PRESET="demo", AUTHOR="A", GITHUB_ID="a", PYTHON=sys.executable, SHARDS="2",
                DATA_DIR=str(folder / "work"), SP1024=str(folder / "data"),
                PREFLIGHT="--no-such-option")


@pytest.mark.slow
def test_script_takes_the_shards_of_the_challenge(hub, tmp_path):
    """As many as SHARDS of the folder that its download script fills; the hub is not asked."""
    environ, hub = hub
    (tmp_path / "tiny.yaml").write_bytes(h.vocabulary())
    environ |= for_own_shards(hub, tmp_path) | dict(VOCAB=str(tmp_path / "tiny.yaml"))
    done = run_script(**environ)
    assert done.returncode == 1 and "tiny.yaml has sha256" in done.stdout, done.stdout
    environ["VOCAB_SHA256"] = hashlib.sha256(h.vocabulary()).hexdigest()
    done = run_script(**environ | dict(VOCAB=environ["HF_ENDPOINT"] + "/nothing"))
    assert done.returncode == 1 and "cannot download VOCAB=http" in done.stdout, done.stdout
    done = run_script(**environ)
    assert done.returncode == 1 and "the pre-flight failed" in done.stdout, done.stdout
    made = sorted(p.stem for p in (tmp_path / "work" / "tiny").glob("*.bin"))
    assert made == ["fineweb_train_000000", "fineweb_train_000001", "fineweb_val_000000"]
    assert not hub.asked
    done = run_script(**environ | dict(SHARDS="1"))
    assert done.returncode == 1 and "holds 2 training shards" in done.stdout, done.stdout


@pytest.mark.slow
def test_script_builds_the_frontiers_vocabulary(hub, tmp_path):
    """With lossless case, once; its shards stand apart from those of a given one."""
    environ, hub = hub
    documents = h.write_documents(tmp_path / "more.jsonl", h.texts(1500, 2))
    more = h.retokenized(documents, tmp_path / "fineweb_1024_bpe.model", "train", tmp_path / "more")
    hub.files["datasets/datasets/fineweb10B_sp1024/fineweb_train_000000.bin"] = (
        more / "fineweb_train_000000.bin").read_bytes()
    environ |= for_own_shards(hub, tmp_path) | dict(PRESET="frontier,demo")
    for _ in range(2):
        done = run_script(**environ)
        assert done.returncode == 1 and "the pre-flight failed" in done.stdout, done.stdout
    assert done.stdout.count("vocabulary round") == 0
    made = tmp_path / "work" / "case1254"
    vocabulary = R.load_vocabulary(made.with_suffix(".yaml"))
    assert vocabulary.marked and vocabulary.vocab_size == 1254 and not vocabulary.lossy
    assert json.loads((made / "manifest.json").read_text())["tokenizer"]["sha256"] == (
        vocabulary.sha256)
    assert len([*made.glob("fineweb_*.bin")]) == 3
    (tmp_path / "tiny.yaml").write_bytes(h.vocabulary())
    done = run_script(**environ | dict(
        VOCAB=str(tmp_path / "tiny.yaml"), VOCAB_SHA256=R.file_sha256(tmp_path / "tiny.yaml")))
    assert "the pre-flight failed" in done.stdout, done.stdout
    assert (tmp_path / "work" / "tiny" / "manifest.json").exists()


@pytest.mark.slow
def test_script_from_bare_machine_to_folder(hub, tmp_path):
    """Fetch shards and vocabulary, re-tokenize, pre-flight, smoke, two seeds on two ranks, folder.

    The vocabulary is one with case: capitals are marks.
    A second run does nothing again, and ends in the same folder.
    """
    environ, hub = hub
    hub.files["tiny.yaml"] = h.vocabulary(case="ascii")
    tiny = {name: value for name, value in h.environ().items() if name not in (
        "TRAIN_LOG_EVERY", "RUN_ID", "DATA_PATH", "ARTIFACT_PATH")}  # the script's own business
    environ |= tiny | dict(
        PRESET="demo", AUTHOR="A", GITHUB_ID="a", SHARDS="2", SEEDS="7 8", NPROC="2",
        DATA_DIR=str(tmp_path / "work"), RECORDS=str(tmp_path / "records"), PYTHON=sys.executable,
        VOCAB=environ["HF_ENDPOINT"] + "/datasets/a/b/resolve/main/tiny.yaml",
        VOCAB_SHA256=hashlib.sha256(hub.files["tiny.yaml"]).hexdigest(),
        PREFLIGHT="-k preflight_05", RECUR_START_STEP="0.3", ITERATIONS="6", OMP_NUM_THREADS="1")

    def script(**more):
        return run_script(**environ | more)

    done = script()
    assert done.returncode == 0, done.stdout[-6000:]
    folder = next((tmp_path / "records" / "track_non_record_16mb").iterdir())
    about = json.loads((folder / "submission.json").read_text())
    assert about["seeds"] == [7, 8] and about["hardware"].startswith("2 x cpu")
    assert about["compliance"]["byte_audit_exact"]
    assert re.search("(no fault found|valid).*\n-- 8 record folder: .*\n\nTime of each stage:\n"
                     "(?: +\\d+ min \\d+ s  .*\n){9}All of this output is in .*\n$", done.stdout)
    assert re.search("recurrence on.*: a step .* ms\n", done.stdout)
    assert re.search("all_reduce of .* GB/s\nGO: there is no yardstick", done.stdout)

    def made():
        return {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.[lbp][oit][gnz]")
                if not p.name.startswith("run_")}  # every start has a log of its own

    times, asked = made(), len(hub.asked)
    again = script()
    assert again.returncode == 0 and len(times) > 5, again.stdout
    assert asked == len(hub.asked)
    assert times == made()
    smoke = next(tmp_path.rglob("smoke.txt")).read_text()  # every mode that the seeds are scored in
    modes = [set(re.findall(r"\n(\w+)_exact ", text)) for text in (
        smoke, next(tmp_path.rglob("logs/seed7.txt")).read_text())]
    assert modes[0] == modes[1] >= {"legal_ttt"}
    more = script(SEEDS="7 8 9")  # a third seed: the folder is in its way
    assert more.returncode == 1 and "exists" in more.stdout and "RECORD_NAME" in more.stdout
    shutil.rmtree(folder)
    more = script(SEEDS="7 8 9")
    assert more.returncode == 0, more.stdout
    assert json.loads((folder / "submission.json").read_text())["seeds"] == [7, 8, 9]
    shard = next((tmp_path / "work" / "tiny").glob("fineweb_train_*.bin"))
    shard.unlink()  # other data: no finished seed counts
    other = script(DATA_PATH=str(shard.parent), PREFLIGHT="--help", RECORD_NAME="Other")
    assert other.returncode == 0, other.stdout
    assert len([*(tmp_path / "work" / "runs").iterdir()]) == 2
