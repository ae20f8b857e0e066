"""The one-H100 protocol: one eighth of the record batch on one GPU, part after part.

    python records/one_h100/run.py --out DIR                   every part below, in this order
    python records/one_h100/run.py --out DIR --only profile    this part alone
    python records/one_h100/run.py --out DIR --rehearse        the same on a CPU, tiny, no numbers
    python records/one_h100/run.py report DIR                  summary.json -> README.md

    data        shards of the documents in --source, else of the demo's text
    tests       pytest -m gpu: compiled against eager, bf16 against fp32, attention, GPTQ, TTT
    steps       60 steps of the full model without and with recurrence, artifact, reload
    train       120 s against the clock with recurrence and late QAT, artifact, reload, every score
    profile     ms a step, and where they go, without and with recurrence
    frontier    40 steps of PRESET=frontier without and with recurrence, artifact, reload, the score
                and the time of TTT_KIND=document

Each part has the GPU to itself, and finds in the compiler's cache what the parts before it have
compiled. With --limit SECONDS, the part that runs then is ended, and no other starts. As each part
ends, --out has its entry in summary.json and its logs in logs.tar.gz.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import train_gpt as t  # noqa: E402

BATCH_TOKENS = 98304  # one eighth of the record batch: what one of eight GPUs does
PEAK_TFLOPS = 989.0  # dense bf16 of an H100, datasheet
MOST_EPOCHS = 4  # over the training shards
NO_LIMIT = dict(SIZE_LIMIT=64_000_000, MAX_WALLCLOCK_SECONDS=0)
PARTS = {  # settings of train_gpt.py beside those of `settings`
    "steps": NO_LIMIT | dict(ITERATIONS=60, RECUR_START_STEP=30, WARMDOWN_ITERS=40,
                             LATE_QAT_THRESHOLD=0, TRAIN_LOG_EVERY=1, WARMUP_STEPS=20,
                             EVAL_MODES="roundtrip", VAL_TOKENS_LIMIT=65537),
    "train": dict(SIZE_LIMIT=64_000_000, MAX_WALLCLOCK_SECONDS=120, RECUR_START_STEP=0,
                  WARMDOWN_ITERS=800, TRAIN_LOG_EVERY=50, VAL_LOSS_EVERY=500),
    "frontier": NO_LIMIT | dict(PRESET="frontier", ITERATIONS=40, RECUR_START_STEP=0.5,
                                LATE_QAT_THRESHOLD=0, TRAIN_LOG_EVERY=1,
                                EVAL_MODES="roundtrip,ttt", VAL_TOKENS_LIMIT=131073),
}
REHEARSAL = dict(  # demo width, four layers: every part and every phase in seconds
    PRESET="demo", NUM_LAYERS=4, RECUR_LAYERS=1, PARALLEL_START_LAYER=3, VE_LAYERS="2,3",
    XSA_LAST_N=2, TRAIN_BATCH_TOKENS=1024, TRAIN_SEQ_LEN=128, EVAL_SEQ_LEN=128,
    VAL_BATCH_SIZE=2048, EVAL_STRIDE=32, TTT_CHUNK_TOKENS=512)


class Protocol:
    """One run of it: its folder, until when it may take, and what it has found."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.out, self.work = options, options.out.resolve(), work
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "profile.json").unlink(missing_ok=True)  # of an earlier run
        self.deadline = time.monotonic() + options.limit
        self.shards = self.work / "shards"
        code = Path(t.__file__).read_bytes()
        self.summary: dict[str, Any] = dict(
            date=time.strftime("%Y-%m-%d", time.gmtime()), rehearsal=options.rehearse,
            train_gpt_sha256=hashlib.sha256(code).hexdigest(), machine=machine(), parts={})

    def settings(self, **own: Any) -> dict[str, str]:
        """Settings of a part: the record at one eighth of the batch, the part's, the user's."""
        base: dict[str, Any] = dict(PRESET="record", TRAIN_BATCH_TOKENS=BATCH_TOKENS)
        if self.options.rehearse:
            clock = min(6, own.get("MAX_WALLCLOCK_SECONDS", 0))
            own |= dict(VAL_TOKENS_LIMIT=3000, WARMUP_STEPS=6, MAX_WALLCLOCK_SECONDS=clock)
            base = REHEARSAL
            own["PRESET"] = ",".join(filter(None, (own.get("PRESET"), base["PRESET"])))
        given = dict(pair.split("=", 1) for pair in self.options.set)
        return {k: str(v) for k, v in (base | own | dict(DATA_PATH=self.shards) | given).items()}

    def run(self, name: str, command: list[str], settings: dict[str, str]) -> None:
        """Run a part until it ends or time is up, and keep what it has said.

        What it prints goes to work/<name>.log.
        """
        if time.monotonic() > self.deadline:
            print(f"[{name}] not started: time is up", flush=True)
            return
        names = {field.name.upper() for field in fields(t.Config)}
        kept = {k: v for k, v in os.environ.items() if k not in names}  # a stray one cannot matter
        if self.options.rehearse:
            kept |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        print(f"[{name}] started", flush=True)
        part = self.summary["parts"][name] = dict[str, Any](settings=settings)
        began = time.monotonic()
        with open(self.work / f"{name}.log", "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=self.work, process_group=0,
                env=kept | {"PYTHONUNBUFFERED": "1"} | settings)
            try:
                process.wait(self.deadline - began)
            except subprocess.TimeoutExpired:
                part["timed_out"] = True
            finally:  # after Ctrl-C too
                end(process)
        text = (self.work / f"{name}.log").read_text("utf-8", "replace")
        exit_code, seconds = process.returncode, round(time.monotonic() - began, 1)
        part |= dict(exit_code=exit_code, seconds=seconds, last_lines=text.splitlines()[-12:])
        events = self.work / "logs" / f"{name}.jsonl"
        if events.exists():
            part |= digest([json.loads(line) for line in events.read_text("utf-8").splitlines()])
        self.save()
        print(f"[{name}] exit code {exit_code} after {seconds} s", flush=True)
        if exit_code:
            print(*text.splitlines()[-30:], sep="\n", flush=True)

    def save(self) -> None:
        """Write summary.json and the logs, without this machine's folder names."""
        def named(text: str) -> bytes:
            return text.replace(str(self.work), "WORK").replace(str(ROOT), ".").encode()

        t.write_atomic(self.out / "summary.json", named(json.dumps(self.summary, indent=1)))
        with tarfile.open(self.out / "logs.tar.gz", "w:gz") as archive:
            for path in sorted([*self.work.glob("*.log"), *self.work.glob("logs/*.jsonl")]):
                entry, data = tarfile.TarInfo(path.name), named(path.read_text("utf-8", "replace"))
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))

    def train_gpt(self, name: str) -> None:
        """Run train_gpt.py as a part of PARTS."""
        own = PARTS[name] | dict(RUN_ID=name, ARTIFACT_PATH=f"{name}.ptz")
        if name == "train":
            tokens = sum(len(t.open_shard(path)) for path in self.shards.glob("*_train_*.bin"))
            own["ITERATIONS"] = MOST_EPOCHS * tokens // int(self.settings()["TRAIN_BATCH_TOKENS"])
        self.run(name, [sys.executable, str(ROOT / "train_gpt.py")], self.settings(**own))

    def data(self) -> None:
        """Shards for the other parts: of the documents in --source, else of the demo's text."""
        source, script = self.options.source, str(ROOT / "retokenize_scylla.py")
        code = (f"import sys, pathlib; sys.path.insert(0, {str(ROOT)!r})\n"
                "from records import demo_data; demo_data.build_demo(pathlib.Path('demo'))")
        commands = [[sys.executable, "-c", code]]
        if source:
            source = source.resolve()
            commands = [[sys.executable, script, "--docs", str(source / docs), "--vocab",
                         str(source / "scylla.yaml"), "--split", split, "--output-dir",
                         str(self.shards), "--workers", str(os.cpu_count())]
                        for split, docs in (("train", "proxy_train.jsonl.xz"),
                                            ("val", "fineweb_docs.jsonl"))]
        for number, command in enumerate(commands):
            self.run(f"data{number}", command, {})
        if not source:
            self.shards = self.work / "demo" / "scylla"


def end(process: subprocess.Popen) -> None:
    """End a process that still runs, with the processes that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)


def machine() -> dict[str, Any]:
    """What this runs on, without touching the GPU."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        gpu = "none"
    return dict(gpu=gpu, cpus=os.cpu_count(), python=sys.version.split()[0],
                torch=torch.__version__, cuda=torch.version.cuda)


def digest(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What summary.json keeps of a run's events; each kind is one that train_gpt.py documents."""
    wanted = ("machine", "bytes", "primed", "phase", "spike", "val", "clock", "calibration",
              "post_ema", "size", "final", "summary")
    found: dict[str, Any] = {kind: [e for e in events if e["event"] == kind] for kind in wanted}
    steps = [e for e in events if e["event"] == "train"]
    return {k: v for k, v in found.items() if v} | dict(
        losses=[[e["step"], round(e["loss"], 4), round(e["train_ms"])] for e in steps])


# --- the profile, in a process of its own ---


KERNEL_CLASSES = (  # first match wins
    ("attention", r"flash|fmha|sdpa|attention|cudnn"),
    ("matmul", r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|wgmma"),
    ("triton", r"^triton_"),
    ("optimizer", r"adam|multi_tensor_apply|foreach"),
)


def profile(out: Path, *inductor: str) -> None:
    """Times and profiles of steps of the run that the environment configures, to profile.json.

    `inductor` holds settings of the compiler, NAME=VALUE, to try what they change.
    """
    from torch._inductor import config as compiler

    for pair in inductor:
        name, value = pair.split("=")
        setattr(compiler, name, json.loads(value))
    c = t.Config.from_env(os.environ, t.find_gpu(os.environ))
    runtime, table, found = t.Runtime(c), t.load_byte_table(c), dict[str, Any](inductor=inductor)
    evaluator = t.Evaluator(runtime, c, t.load_validation(c, table))
    model = t.GPT(c, table.is_boundary, runtime)
    loader = t.Loader(t.find_shards(c, "train"), c, runtime, model.vocab_size)
    trainer = t.Trainer(model, loader, evaluator)
    trainer.optimizer = t.Optimizer(model, c, runtime)
    trainer.clock.resume()
    for name, phase in (("off", t.Phase()), ("on", t.Phase(recur=True))):
        trainer.enter(phase, trainer.steps)
        began = time.perf_counter()
        launch_steps(trainer, 1)
        found[name] = dict(first_step_s=round(time.perf_counter() - began, 1))
        times = launch_steps(trainer, 40)[10:]
        found[name] |= dict(median_ms=round(statistics.median(times), 2), fastest_ms=min(times))
        with torch.profiler.profile() as profiler:
            launch_steps(trainer, 2)
        profiler.export_chrome_trace(str(out / f"profile.{name}.trace.json.gz"))
        found[name] |= classes_of(profiler.key_averages(), 2)
        print(name, profiler.key_averages().table(
            sort_by="self_device_time_total", row_limit=60, max_name_column_width=90))
        t.write_atomic(out / "profile.json", json.dumps(found, indent=1).encode())


def launch_steps(trainer: t.Trainer, count: int) -> list[float]:
    """Milliseconds of `count` steps, from events of the device between them."""
    marks = [trainer.runtime.event()]
    for _ in range(count):
        trainer.train_step(trainer.steps)
        trainer.steps += 1
        trainer.read_facts(trainer.steps - trainer.lag)
        marks.append(trainer.runtime.event())
    trainer.runtime.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]


def classes_of(averages: Any, steps: int) -> dict[str, Any]:
    """Milliseconds a step and launches of kernels by class, and of the 40 longest kernels."""
    rows = [(e.key, e.count / steps, e.self_device_time_total / 1e3 / steps) for e in averages
            if e.self_device_time_total and e.device_type != torch.autograd.DeviceType.CPU]
    classes: dict[str, list[float]] = {}
    for name, count, ms in rows:
        kind = next((k for k, pattern in KERNEL_CLASSES if re.search(pattern, name, re.I)), "other")
        total = classes.setdefault(kind, [0.0, 0.0])
        total[0], total[1] = total[0] + ms, total[1] + count
    top = sorted(rows, key=lambda row: -row[2])[:40]
    return dict(busy_ms=round(sum(row[2] for row in rows), 2),
                classes={k: [round(ms, 2), n] for k, (ms, n) in classes.items()},
                top=[[name[:110], count, round(ms, 3)] for name, count, ms in top])


# --- report and command line ---


def report(folder: Path) -> None:
    """Write README.md of a folder from its summary.json, and print it."""
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    parts, lines = summary["parts"], [f"# One H100, {summary['date']}", ""]
    lines += [f"Machine: `{json.dumps(summary['machine'])}`. train_gpt.py has SHA-256 "
              f"{summary['train_gpt_sha256'][:12]}. Made by `run.py report` from summary.json.", "",
              "| part | exit code | seconds |", "|--|--|--|"]
    lines += [f"| {name} | {part['exit_code']}" + ", time was up" * part.get("timed_out", False)
              + f" | {part['seconds']} |" for name, part in parts.items()]
    if "tests" in parts:
        lines += ["", "Tests: " + parts["tests"]["last_lines"][-1]]
    lines += ["", "| run | recurrence | QAT | compile s | ms a step | peak MiB |",
              "|--|--|--|--|--|--|"]
    lines += [f"| {name} | {e['recur']:d} | {e['qat']:d} | {e['compile_s']:.1f} | "
              f"{e['step_ms']:.2f} | {e['peak_mib']} |"
              for name, part in parts.items() for e in part.get("primed", [])]
    lines += ["", "| run | mode | BPB | tokens | seconds | us a token |", "|--|--|--|--|--|--|"]
    lines += [f"| {name} | {e['mode']} | {e['val_bpb']:.4f} | {e['tokens']} | {e['seconds']:.2f} | "
              f"{1e6 * e['seconds'] / e['tokens']:.2f} |"
              for name, part in parts.items() for e in part.get("final", [])]
    for name, p in parts.get("profile", {}).get("profile", {}).items():
        if isinstance(p, dict):
            lines += ["", f"Profile, recurrence {name}: {p['median_ms']} ms a step, busy "
                      f"{p['busy_ms']} ms.", "", "| class | ms a step | launches |", "|--|--|--|"]
            lines += [f"| {k} | {ms} | {n:.0f} |" for k, (ms, n) in p["classes"].items()]
            lines += ["", "| kernel | launches | ms a step |", "|--|--|--|"]
            lines += [f"| `{k}` | {n:.0f} | {ms} |" for k, n, ms in p["top"][:20]]
    if "summary" in parts.get("train", {}):
        lines += ["", "| the 120 s run | |", "|--|--|"]
        lines += [f"| {k} | {v} |" for k, v in parts["train"]["summary"][-1].items()]
    (folder / "README.md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


def run(options: argparse.Namespace) -> int:
    """Run the wanted parts in a scratch folder; 0 if all ended well."""
    with tempfile.TemporaryDirectory(prefix="one_h100_") as work:
        return run_parts(Protocol(options, Path(work)), options)


def run_parts(protocol: Protocol, options: argparse.Namespace) -> int:
    """The parts in turn."""
    protocol.data()
    if "tests" in options.only:
        protocol.run("tests", [
            sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rs",
            "-rP", "--durations=10", str(ROOT / "tests" / "test_gpu.py")], {})
    for name in ("steps", "train"):
        if name in options.only:
            protocol.train_gpt(name)
    if "profile" in options.only:
        command = [sys.executable, __file__, "profile", str(protocol.out), *options.inductor]
        protocol.run("profile", command, protocol.settings(
            ITERATIONS=1000, WARMDOWN_ITERS=0, RECUR_START_STEP=900, RUN_ID="profile"))
        found = protocol.out / "profile.json"
        if found.exists():
            protocol.summary["parts"]["profile"]["profile"] = json.loads(found.read_text("utf-8"))
    if "frontier" in options.only:
        protocol.train_gpt("frontier")
    protocol.save()
    report(protocol.out)
    return int(any(part["exit_code"] for part in protocol.summary["parts"].values()))


def main(arguments: list[str]) -> int:
    """The command line."""
    if arguments[:1] == ["profile"]:
        profile(Path(arguments[1]), *arguments[2:])
        return 0
    if arguments[:1] == ["report"]:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
        report(Path(arguments[1]))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["tests", "steps", "train", "profile", "frontier"]
    add = parser.add_argument
    add("--only", nargs="+", choices=every, default=every, metavar="PART", help="these parts")
    add("--rehearse", action="store_true", help="run on the CPU with a tiny model")
    add("--out", type=Path, default=ROOT / "data" / "one_h100",
        help="folder of the results (data/one_h100)")
    add("--limit", type=float, default=math.inf, metavar="SECONDS",
        help="for all parts together (no limit)")
    add("--source", type=Path, help="folder of proxy_train.jsonl.xz, fineweb_docs.jsonl and "
        "scylla.yaml; without it the demo's text is used")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of train_gpt.py")
    add("--inductor", nargs="+", default=[], metavar="NAME=VALUE", help="profile: of the compiler")
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
