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
import urllib.error
import urllib.parse

import pytest

import harness as h
import train_gpt as t


class HubHandler(http.server.BaseHTTPRequestHandler):
    """A Hugging Face hub with one dataset repository, on loopback."""

    files: dict[str, bytes] = {}
    cut: set[str] = set()  # files whose first answer breaks off in the middle
    wrong: set[str] = set()  # files whose bytes are not those of the listing
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

    def tree(self, folder):
        """The listing of a folder, as the hub gives it; shards are large files."""
        for name in sorted(self.files):
            data = self.files[name]
            if name.startswith(folder + "/"):
                entry = dict(type="file", path=name, size=len(data), oid=hashlib.sha1(
                    b"blob %d\0" % len(data) + data).hexdigest())
                if name.endswith(".bin"):
                    entry["lfs"] = dict(oid=hashlib.sha256(data).hexdigest(), size=len(data),
                                        pointerSize=1)
                yield entry

    def do_GET(self):
        path = urllib.parse.unquote(self.path.split("?")[0])
        if match := re.fullmatch(r"/api/datasets/[^/]+/[^/]+/tree/main/(.+)", path):
            body = json.dumps(list(self.tree(match[1]))).encode()
            return self.answer(200, body, {"Content-Type": "application/json"})
        name = re.fullmatch(r"/datasets/[^/]+/[^/]+/resolve/[^/]+/(.+)", path)
        if not name or name[1] not in self.files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = self.files[name[1]]
        start = int(re.match(r"bytes=(\d+)", self.headers.get("Range") or "bytes=0")[1])
        if self.command == "GET":
            self.asked.append(name[1])
            self.starts.append(start)
            data = data[::-1] if name[1] in self.wrong else data
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
    hub = type("Hub", (HubHandler,), dict(cut=set(), wrong=set(), asked=[], starts=[], files={
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


def test_fetch_resumes_and_checks(hub, tmp_path):
    """A broken download goes on, nothing is fetched twice, wrong bytes are refused."""
    environ, hub = hub
    first = "datasets/datasets/fineweb10B_sp1024/fineweb_train_000000.bin"
    hub.files[first] = bytes(range(256)) * 100_000  # more than one read of its library
    hub.cut.add(first)
    command = [h.ROOT / "records" / "fetch.py", "--output", tmp_path / "got", "--shards", "1"]
    done = h.python(command, tmp_path, environ)
    assert done.returncode == 0, done.stderr
    for name, data in hub.files.items():
        there = tmp_path / "got" / name
        assert there.exists() == ("train" not in name or name == first)
        assert not there.exists() or there.read_bytes() == data
    starts = [start for name, start in zip(hub.asked, hub.starts, strict=True) if name == first]
    assert len(starts) == 2 and starts[0] == 0 < starts[1]  # it went on where it broke off
    away = environ | dict(HF_ENDPOINT=environ["HF_ENDPOINT"] + "/nothing")
    assert "0 of them fetched now" in h.python(command, tmp_path, away).stdout
    assert hub.asked.count(first) == 2
    second = first.replace("000000", "000001")
    hub.wrong.add(second)
    done = h.python([*command[:-1], "2"], tmp_path, environ)
    assert done.returncode == 1 and "size or hash" in done.stderr and second in done.stderr
    assert not (tmp_path / "got" / second).exists()
    done = h.python([*command[:-1], "80"], tmp_path, environ)
    assert done.returncode == 1 and "of 80 training shards" in done.stderr
    (tmp_path / "got" / first).unlink()
    done = h.python(command, tmp_path, away)
    assert done.returncode == 1 and "check the network" in done.stderr


@pytest.mark.slow
def test_script_from_bare_machine_to_folder(hub, tmp_path):
    """Fetch, find the vocabulary, re-tokenize, pre-flight, smoke, two seeds on two ranks, folder.

    A second run does nothing again, and ends in the same folder.
    """
    environ, hub = hub
    vocabulary = tmp_path / "repo" / "deep" / "tiny.yaml"
    vocabulary.parent.mkdir(parents=True)
    vocabulary.write_bytes(h.vocabulary())
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(tmp_path / "repo")]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "v"],
                    ["update-ref", "refs/pull/1/head", "HEAD"]):
        subprocess.run([*git, *command], check=True)
    tiny = {name: value for name, value in h.environ().items() if name not in (
        "TRAIN_LOG_EVERY", "RUN_ID", "DATA_PATH", "ARTIFACT_PATH")}  # the script's own business
    environ |= tiny | dict(
        PRESET="demo", AUTHOR="A", GITHUB_ID="a", SHARDS="2", SEEDS="7 8", NPROC="2",
        DATA_DIR=str(tmp_path / "work"), RECORDS=str(tmp_path / "records"), PYTHON=sys.executable,
        VOCAB_REPO=str(tmp_path / "repo"), VOCAB_REF="refs/pull/1/head",
        VOCAB_SHA256=t.sha256_file(vocabulary), PREFLIGHT="-k preflight_05",
        RECUR_START_STEP="0.3", ITERATIONS="6", OMP_NUM_THREADS="1")

    def script(**more):
        return subprocess.run(["bash", h.ROOT / "run_8xh100.sh"], capture_output=True, text=True,
                              env=h.clean_environ(**environ | more))

    done = script()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = next((tmp_path / "records" / "track_non_record_16mb").iterdir())
    about = json.loads((folder / "submission.json").read_text())
    assert about["seeds"] == [7, 8] and about["hardware"].startswith("2 x cpu")
    assert about["compliance"]["byte_audit_exact"]
    assert done.stdout.rstrip().endswith("no fault found")
    assert re.search("recurrence on.*: a step .* ms\n", done.stdout)
    assert re.search("all_reduce of .* GB/s\nGO: there is no yardstick", done.stdout)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.[lbp][oit][gnz]")}
    asked = len(hub.asked)
    again = script()
    assert again.returncode == 0 and len(times) > 5, again.stderr
    assert asked == len(hub.asked)
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.[lbp][oit][gnz]")}
    smoke = next(tmp_path.rglob("smoke.txt")).read_text()  # every mode that the seeds are scored in
    modes = [set(re.findall(r"\n(\w+)_exact ", text)) for text in (
        smoke, next(tmp_path.rglob("logs/seed7.txt")).read_text())]
    assert modes[0] == modes[1] >= {"legal_ttt"}
    more = script(SEEDS="7 8 9")  # a third seed: the folder is in its way
    assert more.returncode == 1 and "exists" in more.stderr and "RECORD_NAME" in more.stderr
    shutil.rmtree(folder)
    more = script(SEEDS="7 8 9")
    assert more.returncode == 0, more.stderr
    assert json.loads((folder / "submission.json").read_text())["seeds"] == [7, 8, 9]
    shard = next((tmp_path / "work" / "scylla").glob("fineweb_train_*.bin"))
    shard.unlink()  # other data: no finished seed counts
    other = script(DATA_PATH=str(shard.parent), PREFLIGHT="--help", RECORD_NAME="Other")
    assert other.returncode == 0, other.stderr
    assert len([*(tmp_path / "work" / "runs").iterdir()]) == 2
