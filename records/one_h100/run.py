"""The one-H100 protocol: one eighth of the record batch on one GPU, in pieces under 9 minutes.

    python records/one_h100/run.py preflight             does everything work at full width?
    python records/one_h100/run.py speed                 step times, memory, evaluation, profile
    python records/one_h100/run.py data proxy            shards from documents, then a 240 s run
    python records/one_h100/run.py report --from DIR     summaries -> a folder of tables
    python records/one_h100/run.py PIECE --rehearse      the same code on a CPU, tiny, no numbers

Each piece writes <piece>.json (summary), <piece>.log (output of its processes) and, where it
trains, <piece>.jsonl (events) to --out. Work that touches the GPU runs in child processes that
are ended when the time is up; what was measured by then is in the summary.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402

PIECES = ("preflight", "speed", "data", "proxy")
LIMIT_SECONDS = 540.0  # of one command, all of its pieces together
BATCH_TOKENS = 98304  # one eighth of the record batch: what one of eight GPUs does
PEAK_TFLOPS = 989.0  # dense bf16 of an H100, datasheet
BARS = {"off": (60.0, 51.0), "on": (72.0, 60.0)}  # ms/step: bar, goal
EVAL_BAR = (62e6, 8, 250.0)  # validation tokens, GPUs, seconds of the whole evaluation
MOST_EPOCHS = 4
PROXY_SECONDS = 240.0
FIRST_RECUR_STEP = {False: 30, True: 6}  # preflight, by rehearse
ATTENTION = ("auto", "flash_attention_3", "cudnn", "flash", "mem_efficient", "math")
NOT_COMPARABLE = "CPU: not comparable"
REHEARSAL = dict(  # demo width, fewer layers: every feature on and every phase traced in seconds
    PRESET="demo", NUM_LAYERS="4", RECUR_LAYERS="1", PARALLEL_START_LAYER="3", VE_LAYERS="2,3",
    XSA_LAST_N="2", N_INT6_LAYERS="2",
    TRAIN_BATCH_TOKENS="1024", TRAIN_SEQ_LEN="128", EVAL_SEQ_LEN="128", VAL_BATCH_SIZE="2048",
    VAL_TOKENS_LIMIT="6000", EVAL_STRIDE="32", TRAIN_LOG_EVERY="1", WARMUP_STEPS="4",
    TTT_CHUNK_TOKENS="512",
)  # fmt: skip


# ------------------------------------------------------------------------------------------
# 1 a piece: its options, clock, child processes and summary
# ------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    train_gpt.write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_events(path: Path) -> list[dict[str, Any]]:
    """Events of a run's .jsonl; a last line that was cut off is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    events = []
    for line in lines:
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


def of_kind(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The events of one kind, in order."""
    return [event for event in events if event["event"] == kind]


@dataclass
class Piece:
    """One piece of the protocol: where it writes, until when it may run, what it found."""

    name: str
    options: argparse.Namespace
    work: Path
    deadline: float  # of time.monotonic()
    summary: dict[str, Any]

    @property
    def rehearse(self) -> bool:
        """Whether this is a rehearsal on a CPU."""
        return self.options.rehearse

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def pick(self, real: Any, rehearsed: Any) -> Any:
        """The value for a GPU, or the tiny one for a rehearsal."""
        return rehearsed if self.rehearse else real

    def path(self, suffix: str) -> Path:
        """A file of this piece in the output folder."""
        return self.options.out / f"{self.name}.{suffix}"

    def save(self) -> None:
        """Write the summary as it is now, without the machine's folder names."""
        text = json.dumps(self.summary)
        names = {self.work: "WORK", self.options.out: "OUT", self.options.data: "DATA", ROOT: "."}
        for folder in filter(None, names):
            text = text.replace(str(folder), names[folder])
        write_json(self.path("json"), json.loads(text))

    def start(self, label: str, command: list[str], settings: dict[str, str]) -> Child:
        """Start a child process in the work folder; its output goes to the piece's log."""
        print(f"[{self.name}] {label}: started, {self.left:.0f} s left", flush=True)
        with open(self.path("log"), "a", encoding="utf-8") as log:
            print(f"--- {label}: {' '.join(command)} {settings}", file=log, flush=True)
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=self.work, process_group=0,
                env=environment(settings, hide_gpu=self.rehearse))
        return Child(label, process, time.monotonic())

    def wait(self, child: Child, limit: float) -> bool:
        """Wait until a child ends or its time is up; whether it ended well, noted in the summary.

        `limit` counts in seconds from its start; the piece's deadline holds too.
        """
        until = min(child.started + limit, self.deadline)
        try:
            code = child.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            child.end()
        seconds = round(time.monotonic() - child.started, 1)
        self.summary["children"][child.label] = dict(
            exit_code=code, seconds=seconds, timed_out=code is None)
        self.save()
        print(f"[{self.name}] {child.label}: "
              f"{'time is up' if code is None else f'exit code {code}'} after {seconds} s",
              flush=True)
        return code == 0

    def run(self, label: str, command: list[str], settings: dict[str, str],
            limit: float = LIMIT_SECONDS) -> bool:
        """Start a child and wait for it."""
        return self.wait(self.start(label, command, settings), limit)

    def inner(self, task: str, *arguments: str) -> list[str]:
        """Command line of this script's own child `task`."""
        return [sys.executable, str(Path(__file__).resolve()), "inner", task,
                str(int(self.rehearse)), *arguments]

    def train(self, label: str, settings: dict[str, str], limit: float = LIMIT_SECONDS
              ) -> tuple[bool, list[dict[str, Any]], dict[str, Any]]:
        """Run train_gpt in a child: (ended well, its events, facts of its compiler)."""
        run_id, facts = f"{self.name}_{label}", self.work / f"{label}.facts.json"
        command = self.inner("train", self.options.attention[0], str(facts))
        good = self.run(label, command, settings | {"RUN_ID": run_id}, limit)
        return good, read_events(self.work / "logs" / f"{run_id}.jsonl"), read_json(facts)


@dataclass
class Child:
    """A running child process, the first of its own process group."""

    label: str
    process: subprocess.Popen
    started: float

    def end(self) -> None:
        """End the process and its children, if they still run."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, sign)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(5)


def environment(settings: dict[str, str], hide_gpu: bool) -> dict[str, str]:
    """This process's environment without any setting of train_gpt but `settings`."""
    names = {field.name.upper() for field in fields(train_gpt.Config)}
    kept = {name: value for name, value in os.environ.items() if name not in names}
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if hide_gpu else {}
    return kept | {"PYTHONUNBUFFERED": "1"} | hidden | settings


def record_settings(piece: Piece, **settings: Any) -> dict[str, str]:
    """The record model at one eighth of the batch; then the piece's settings, then the user's."""
    base = REHEARSAL if piece.rehearse else dict(
        PRESET="record", TRAIN_BATCH_TOKENS=str(BATCH_TOKENS))
    if piece.options.micro_batch[0] and piece.name != "speed":
        base = base | {"MICRO_BATCH_TOKENS": str(piece.options.micro_batch[0])}
    own = {name: str(value) for name, value in settings.items()}
    return base | own | dict(pair.split("=", 1) for pair in piece.options.set)


def machine() -> dict[str, Any]:
    """What the piece ran on, without touching the GPU."""
    gpu = ""
    with contextlib.suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version",
                 "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return dict(gpu=gpu or "none", cpus=os.cpu_count(), python=sys.version.split()[0],
                torch=torch.__version__, cuda=torch.version.cuda)


def run_piece(name: str, options: argparse.Namespace, deadline: float) -> bool:
    """Run one piece; whether its summary says ok. Its summary is written whatever happens."""
    start = time.time()
    code = Path(train_gpt.__file__).read_bytes()
    summary = dict(
        piece=name, ok=False, rehearsal=options.rehearse, timed_out=False, error="",
        date=time.strftime("%Y-%m-%d", time.gmtime(start)), machine=machine(),
        numbers="of a CPU rehearsal: not comparable with anything" if options.rehearse
        else "measured on the machine named here",
        train_gpt_sha256=hashlib.sha256(code).hexdigest(), settings={}, children={})
    with tempfile.TemporaryDirectory(prefix="one_h100_") as work:
        piece = Piece(name, options, Path(work), deadline, summary)
        for suffix in ("json", "log", "jsonl"):
            piece.path(suffix).unlink(missing_ok=True)
        try:
            RUN[name](piece)
        except Exception as error:
            summary["error"] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        finally:
            events = sorted(Path(work).glob("logs/*.jsonl"))
            if events:
                text = "".join(path.read_text(encoding="utf-8") for path in events)
                piece.path("jsonl").write_text(text, encoding="utf-8")
            children = summary["children"].values()
            summary["timed_out"] = any(child["timed_out"] for child in children)
            summary["ok"] = bool(summary["ok"] and not summary["error"])
            summary["seconds"] = round(time.time() - start, 1)
            piece.save()
    show_end(piece)
    return summary["ok"]


def show_end(piece: Piece) -> None:
    """The summary as tables, and the end of the log if something went wrong."""
    print("\n".join(TABLES[piece.name](piece.summary)), flush=True)
    if not piece.summary["ok"] and piece.path("log").exists():
        lines = piece.path("log").read_text(encoding="utf-8", errors="replace").splitlines()
        print(f"[{piece.name}] NOT ok {piece.summary['error']}; its log ends:", *lines[-25:],
              sep="\n", flush=True)
    print(f"[{piece.name}] ok:{piece.summary['ok']} seconds:{piece.summary['seconds']} "
          f"summary:{piece.path('json')}", flush=True)


# ------------------------------------------------------------------------------------------
# 2 data: shards from documents
# ------------------------------------------------------------------------------------------


def retokenize(piece: Piece, label: str, *arguments: Any) -> None:
    """Run retokenize_scylla.py; raises RunError unless it ended well."""
    command = [sys.executable, str(ROOT / "retokenize_scylla.py"), *map(str, arguments)]
    train_gpt.require(piece.run(label, command, {}), f"{label} failed; the log says why")


def write_documents(path: Path, texts: list[str]) -> None:
    """Documents as JSON lines."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")


def installed_text(limit: int) -> list[str]:
    """Source files of Python's standard library, up to `limit` characters: text without a net."""
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="ignore"))
        if sum(map(len, texts)) > limit:
            break
    return texts


def stand_in_data(piece: Piece) -> Path:
    """Shards of the standard library's source under a vocabulary of Scylla's size."""
    folder, texts = piece.work / "stand_in", installed_text(piece.pick(6_000_000, 400_000))
    folder.mkdir()
    parts = {"train": texts, "val": texts[::8], "sample": texts[::4]}
    for name, part in parts.items():
        write_documents(folder / f"{name}.jsonl", part)
    vocab = folder / "stand_in.yaml"
    retokenize(piece, "build_vocab", "--build-vocab", piece.pick(1254, 400),
               "--docs", folder / "sample.jsonl", "--output", vocab)
    for split in ("train", "val"):
        retokenize(piece, f"stand_in_{split}", "--docs", folder / f"{split}.jsonl", "--vocab",
                   vocab, "--split", split, "--output-dir", folder / "shards")
    return folder / "shards"


def text_data(piece: Piece) -> Path:
    """The folder of --data, or stand-in shards."""
    piece.summary["data"] = "--data" if piece.options.data else "standard library source"
    return piece.options.data or stand_in_data(piece)


def proxy_folder(options: argparse.Namespace) -> Path:
    """Where `data` writes and `proxy` reads."""
    parent = options.out if options.rehearse else ROOT / "data"
    return options.data or parent / f"proxy_{options.tokenizer}"


def rehearsal_documents(piece: Piece) -> tuple[Path, Path, list[Any]]:
    """Small stand-ins for both document files, and the tokenizer's arguments."""
    texts = installed_text(600_000)
    train, val = piece.work / "train.jsonl", piece.work / "val.jsonl"
    write_documents(train, texts[2:])
    write_documents(val, texts[:2])
    if piece.options.tokenizer == "sp1024":
        import sentencepiece  # only where SentencePiece shards are asked for

        prefix = piece.work / "rehearsal"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("".join(texts).splitlines()), model_prefix=str(prefix),
            vocab_size=400, byte_fallback=True, model_type="bpe", minloglevel=2,
            user_defined_symbols=["\u2581"])
        return train, val, ["--sp-model", f"{prefix}.model"]
    vocab = piece.work / "rehearsal.yaml"
    retokenize(piece, "build_vocab", "--build-vocab", 400, "--docs", val, "--output", vocab)
    return train, val, ["--vocab", vocab]


def carried_documents(piece: Piece) -> tuple[Path, Path, list[Any]]:
    """The proxy corpus, the FineWeb documents and the tokenizer's arguments, in --source."""
    source = piece.options.source.resolve()
    train, val = source / "proxy_train.jsonl.xz", source / "fineweb_docs.jsonl"
    tokenizer = {"scylla": ["--vocab", source / "scylla.yaml"],
                 "sp1024": ["--sp-model", source / "fineweb_1024_bpe.model"]}
    arguments = tokenizer[piece.options.tokenizer]
    for path in (train, val, arguments[1]):
        train_gpt.require(path.is_file(), f"{path}: no such file; carry it in --source")
    return train, val, arguments


def run_data(piece: Piece) -> None:
    """Shards of the proxy corpus (train) and of the FineWeb documents (val)."""
    make = rehearsal_documents if piece.rehearse else carried_documents
    train, val, tokenizer = make(piece)
    folder = proxy_folder(piece.options)
    for split, docs in (("train", train), ("val", val)):
        retokenize(piece, f"data_{split}", "--docs", docs, *tokenizer, "--split", split,
                   "--output-dir", folder, "--workers", os.cpu_count() or 1)
    config = train_gpt.Config(data_path=str(folder))
    tokens = {split: sum(shard_tokens(config, split)) for split in ("train", "val")}
    audit = train_gpt.load_validation(config, train_gpt.load_byte_table(config)).audit
    piece.summary |= dict(ok=audit == "exact", tokens=tokens, byte_audit=audit,
                          tokenizer=piece.options.tokenizer)


def shard_tokens(config: train_gpt.Config, split: str) -> list[int]:
    """Tokens of each shard of a split."""
    return [len(train_gpt.open_shard(path)) for path in train_gpt.find_shards(config, split)]


# ------------------------------------------------------------------------------------------
# 3 preflight: does everything work at full width?
# ------------------------------------------------------------------------------------------


def run_preflight(piece: Piece) -> None:
    """CPU tests beside 60 full-width steps with recurrence and QAT; artifact, reload."""
    tests = start_tests(piece)
    try:
        try_everything(piece)
    except BaseException:
        if tests:
            tests.end()
        raise
    key = "tests_are_collected" if piece.rehearse else "cpu_tests_pass"
    passed = tests is not None and piece.wait(tests, piece.options.test_seconds)
    piece.summary["answers"][key] = passed
    if tests is None:
        piece.summary["evidence"][key] = "test_cpu.py is not there"
    piece.summary["ok"] = all(piece.summary["answers"].values())


def try_everything(piece: Piece) -> None:
    """Train through every phase, export, reload in another process; answers to the summary."""
    settings = record_settings(
        piece, DATA_PATH=text_data(piece), ITERATIONS=piece.pick(60, 12),
        WARMDOWN_ITERS=piece.pick(40, 20), RECUR_START_STEP=FIRST_RECUR_STEP[piece.rehearse],
        MAX_WALLCLOCK_SECONDS=0, TRAIN_LOG_EVERY=1, SIZE_LIMIT=64_000_000, WARMUP_STEPS=4,
        VAL_TOKENS_LIMIT=piece.pick(131072, 3000), ARTIFACT_PATH=piece.work / "model.ptz")
    piece.summary["settings"] = settings
    good, events, facts = piece.train("train", settings, piece.left - 60)
    again = settings | {"LOAD_ARTIFACT": settings["ARTIFACT_PATH"], "EVAL_MODES": "roundtrip"}
    reloaded, after, _ = piece.train("reload", again, 120) if good else (False, [], {})
    answers, evidence = training_answers(piece, events, facts)
    more, evidence["roundtrip"] = roundtrip_answers(events, after)
    answers |= {"training_ends_well": good, "artifact_reloads": reloaded} | more
    piece.summary |= dict(answers=answers, evidence=evidence)
    piece.save()


def start_tests(piece: Piece) -> Child | None:
    """Start the CPU tests beside the GPU's work; a rehearsal only collects them."""
    tests = ROOT / "test_cpu.py"
    if not tests.exists():
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests),
               *piece.pick([], ["--collect-only"])]
    return piece.start("pytest", command, {"CUDA_VISIBLE_DEVICES": ""})


def training_answers(piece: Piece, events: list[dict[str, Any]], facts: dict[str, Any]
                     ) -> tuple[dict[str, bool], dict[str, Any]]:
    """(answers, evidence) from the events of the run and the facts of its compiler."""
    losses = [event["loss"] for event in of_kind(events, "train")]
    switched = {event["name"]: event["step"] for event in of_kind(events, "phase")}
    first, last = losses[:5], losses[-5:]
    means = [round(statistics.mean(part), 4) if part else None for part in (first, last)]
    answers = dict(
        compiles_without_graph_breaks=bool(facts.get("graphs")) and not facts["graph_breaks"]
        and not facts["limit_hits"],
        recurrence_switches_on=switched.get("recur") == FIRST_RECUR_STEP[piece.rehearse],
        qat_switches_on="qat" in switched,
        loss_is_falling=len(losses) >= 10 and means[1] < means[0] - 0.3)
    evidence = dict(compiler=facts, phases_from_step=switched, steps=len(losses),
                    mean_loss_of_first_and_last_5_steps=means,
                    sizes=(of_kind(events, "size") or [{}])[-1],
                    summary=(of_kind(events, "summary") or [{}])[-1])
    return answers, evidence


def roundtrip_answers(events: list[dict[str, Any]], after: list[dict[str, Any]]
                      ) -> tuple[dict[str, bool], dict[str, Any]]:
    """Whether a second process gets the first one's score from the artifact."""
    scores = [event for part in (events, after) for event in of_kind(part, "final")
              if event["mode"] == "roundtrip"]
    nats = [score["nats"] for score in scores]
    both = len(nats) == 2
    close = both and abs(nats[1] / nats[0] - 1) < 1e-5
    return {"roundtrip_is_the_same": close}, dict(
        nats=nats, identical=both and nats[0] == nats[1],
        bpb=[score["val_bpb"] for score in scores],
        tolerance="1e-5 of the nats: kernels may differ from process to process")


# ------------------------------------------------------------------------------------------
# 4 speed: step times, memory, evaluation, profile
# ------------------------------------------------------------------------------------------


def utilisation(operations: float, tokens_per_second: float) -> float:
    """Share of the H100's bf16 peak."""
    return operations * tokens_per_second / (PEAK_TFLOPS * 1e12)


WITHOUT = dict(  # the settings that turn a feature off: its price is the difference in step time
    none={}, lanes=dict(PARALLEL_START_LAYER="NUM_LAYERS"), xsa=dict(XSA_LAST_N=0),
    bigram=dict(BIGRAM_VOCAB_SIZE=0), value_embeddings=dict(VE_ENABLED=0),
    smear=dict(SMEAR_ENABLED=0),
)


def run_speed(piece: Piece) -> None:
    """Times of every variant of attention, micro-batch and features; the first one in full."""
    data = text_data(piece)
    variants = [(a, m, w) for a in piece.options.attention for m in piece.options.micro_batch
                for w in piece.options.without]
    piece.summary["variants"] = []
    for number, (attention, micro, without) in enumerate(variants):
        facts = piece.work / f"variant{number}.json"
        micro_setting = {"MICRO_BATCH_TOKENS": micro} if micro else {}
        layers = record_settings(piece).get("NUM_LAYERS", train_gpt.Config().num_layers)
        off = {k: layers if v == "NUM_LAYERS" else v for k, v in WITHOUT[without].items()}
        settings = record_settings(
            piece, DATA_PATH=data, ITERATIONS=1_000_000, WARMDOWN_ITERS=0, MAX_WALLCLOCK_SECONDS=0,
            RECUR_START_STEP=1_000_000, TRAIN_LOG_EVERY=1000, RUN_ID=f"speed_{number}",
            **micro_setting, **off)
        command = piece.inner("speed", attention, str(facts), "all" if number == 0 else "steps")
        good = piece.run(f"{attention}_{micro or 'auto'}_without_{without}", command, settings)
        found = read_json(facts) | dict(complete=good, settings=settings, without=without)
        piece.summary["variants"].append(found)
        piece.save()
    for trace in piece.work.glob("*.trace.json.gz"):
        shutil.copyfile(trace, piece.path(trace.name))
    first = piece.summary["variants"][0]
    piece.summary["settings"] = first["settings"]
    piece.summary["ok"] = {"off", "on"} <= set(first.get("phases", {}))


class Speed:
    """Measures one variant inside its own process; results reach the file stage by stage."""

    def __init__(self, path: Path, rehearse: bool) -> None:
        self.path, self.rehearse = path, rehearse
        self.config = c = train_gpt.Config.from_env(os.environ, torch.cuda.is_available())
        self.runtime = runtime = train_gpt.Runtime(c)
        table = train_gpt.load_byte_table(c)
        self.evaluator = train_gpt.Evaluator(runtime, c, train_gpt.load_validation(c, table))
        model = train_gpt.GPT(c, table.is_boundary, runtime)
        loader = train_gpt.Loader(train_gpt.find_shards(c, "train"), c, runtime, model.vocab_size)
        self.trainer = trainer = train_gpt.Trainer(model, loader, self.evaluator)
        trainer.optimizer = train_gpt.Optimizer(model, c, runtime)
        for owner, method, stage in ((trainer, "backward", "model"),
                                     (trainer.optimizer, "step", "optimizer"),
                                     (trainer.average, "update", "average")):
            annotate(owner, method, stage)
        trainer.clock.resume()
        self.result: dict[str, Any] = dict(
            attention=runtime.attention_name, compiles=runtime.compiles, dtype=str(runtime.dtype),
            micro_batch_tokens=trainer.micro_seqs * c.train_seq_len,
            batch_tokens=c.train_batch_tokens, vocab_size=model.vocab_size,
            parameters=sum(p.numel() for p in trainer.params), phases={}, profiles={})

    def measure(self, everything: bool) -> None:
        """Recurrence off, then on, with profiles; evaluation; QAT; TTT last, in order of worth."""
        for name, phase in (("off", train_gpt.Phase()), ("on", train_gpt.Phase(recur=True))):
            self.time_phase(name, phase)
            if everything:
                self.profile(name)
        if everything:
            self.result["evaluation"] = self.evaluation()
            self.time_phase("on_with_qat", train_gpt.Phase(recur=True, qat=True))
            self.trainer.enter(train_gpt.Phase(recur=True), self.trainer.steps)
            self.result["evaluation"]["ttt"] = self.test_time_training()
        self.result["compiler"] = compiler_facts()
        self.save()

    def save(self) -> None:
        """Write what is known by now."""
        write_json(self.path, self.result)

    def steps(self, count: int) -> list[float]:
        """Milliseconds of `count` steps, from events of the device between them."""
        trainer, marks = self.trainer, [self.runtime.event()]
        for _ in range(count):
            trainer.train_step(trainer.steps)
            trainer.steps += 1
            trainer.read_facts(trainer.steps - trainer.lag)
            marks.append(self.runtime.event())
        self.runtime.synchronize()
        return [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]

    def time_phase(self, name: str, phase: train_gpt.Phase) -> None:
        """Enter a phase, compile it in its first step, warm up and time its steps."""
        c, trainer = self.config, self.trainer
        if self.runtime.cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.enter(phase, trainer.steps)
        start = time.perf_counter()
        self.steps(1)
        first = time.perf_counter() - start
        self.steps(2 if self.rehearse else 8)
        times = self.steps(5 if self.rehearse else 60)
        mean = statistics.mean(times)
        rate = 1e3 * c.train_batch_tokens / mean
        costs = train_gpt.step_costs(trainer.model, 1, phase.recur, 1)
        work = sum(operations for part, (operations, _) in costs.items() if part != "optimizer")
        allocated, reserved = self.runtime.peak_memory_mib()
        self.result["phases"][name] = dict(
            steps=len(times), ms_per_step=round(mean, 3),
            median_ms=round(statistics.median(times), 3),
            fastest_ms=round(min(times), 3), slowest_ms=round(max(times), 3),
            tokens_per_second=round(rate),
            tflop_per_step=round(c.train_batch_tokens * work / 1e12, 4),
            utilisation=NOT_COMPARABLE if self.rehearse else round(utilisation(work, rate), 4),
            first_step_seconds=round(first, 2), compile_seconds=round(first - mean / 1e3, 2),
            peak_allocated_mib=NOT_COMPARABLE if self.rehearse else allocated,
            peak_reserved_mib=NOT_COMPARABLE if self.rehearse else reserved)
        self.save()

    def short_evaluator(self, limit: int) -> train_gpt.Evaluator:
        """An evaluator of the first `limit` targets; fewer in a rehearsal."""
        val = self.evaluator.val
        targets = min(self.evaluator.targets, 1200 if self.rehearse else limit)
        return train_gpt.Evaluator(self.runtime, self.config, val._replace(
            ids=val.ids[: targets + 1], bytes=val.bytes[:targets]))

    def cost(self, stride: int, seconds: float, targets: int) -> dict[str, Any]:
        """A mode's seconds over `targets` scored targets, and over all of them on eight GPUs."""
        tokens, gpus, _ = EVAL_BAR
        each = seconds / targets
        return dict(stride=stride, seconds=round(seconds, 3), targets=targets,
                    microseconds_per_scored_token=round(1e6 * each, 5),
                    scaled_seconds=NOT_COMPARABLE if self.rehearse
                    else round(each * tokens / gpus, 1))

    def evaluation(self) -> dict[str, Any]:
        """Cost of plain and sliding evaluation in microseconds per forward and scored token."""
        c, forward, evaluator = self.config, self.trainer.forward, self.short_evaluator(131072)
        if self.runtime.cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        evaluator.score(forward, c.eval_seq_len)  # compiles
        found: dict[str, Any] = dict(first_call_seconds=round(time.perf_counter() - start, 2))
        for mode, stride in (("plain", c.eval_seq_len), ("sliding", c.eval_stride)):
            windows = len(train_gpt.plan_windows(evaluator.targets, evaluator.length, stride))
            batches = -(-windows // evaluator.batch_windows)
            start = time.perf_counter()
            evaluator.score(forward, stride)
            seconds = time.perf_counter() - start
            passed = batches * evaluator.batch_windows * evaluator.length
            found[mode] = self.cost(stride, seconds, evaluator.targets) | dict(
                microseconds_per_forward_token=round(1e6 * seconds / passed, 5))
        tokens, gpus, bar = EVAL_BAR
        found["scaled_to"] = f"{tokens:.0f} tokens on {gpus} GPUs, goal of all modes {bar:.0f} s"
        found["peak_allocated_mib"] = (NOT_COMPARABLE if self.rehearse
                                       else self.runtime.peak_memory_mib()[0])
        return found

    def test_time_training(self) -> dict[str, Any]:
        """Cost of score-first TTT over eight chunks, scoring included; seven are trained on."""
        ttt = train_gpt.TTT(self.trainer.model, self.short_evaluator(8 * 32768))
        ttt.forward = self.trainer.forward  # its graphs are compiled
        start = time.perf_counter()
        ttt.prime()
        first = time.perf_counter() - start
        start = time.perf_counter()
        ttt.score()
        seconds = time.perf_counter() - start
        return self.cost(self.config.eval_stride, seconds, ttt.evaluator.targets) | dict(
            first_call_seconds=round(first, 2), epochs=self.config.ttt_epochs)

    def profile(self, name: str) -> None:
        """Where the time of a phase's steps goes, by class and kernel."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] * self.runtime.cuda
        count = 2 if self.rehearse else 4
        with torch.profiler.profile(activities=activities) as profiler:
            times = self.steps(count)
        path = self.path.parent / f"recurrence_{name}.trace.json.gz"
        profiler.export_chrome_trace(str(path))
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            events = json.load(stream)["traceEvents"]
        table = kernel_table(kernels_of(events), count)
        table["step_ms_under_profiler"] = round(sum(times) / count, 3)
        self.result["profiles"][name] = table
        self.save()


def annotate(owner: Any, method: str, stage: str) -> None:
    """Mark the calls of a bound method in profiles."""
    inner = getattr(owner, method)

    def marked(*arguments: Any) -> Any:
        with torch.profiler.record_function(f"stage:{stage}"):
            return inner(*arguments)

    setattr(owner, method, marked)


KERNEL_CLASSES = (  # first match wins
    ("elementwise", r"^triton_(?!tem|mm)"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("copy", r"memcpy|memset|copy|catarray|aten::(to|clone|contiguous|cat|stack|fill_|zero_)\b"),
    ("matmul", r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|wgmma|triton_tem|triton_mm"
               r"|aten::(mm|bmm|addmm|baddbmm|matmul|linear)\b"),
    ("optimizer", r"adam|multi_tensor_apply|foreach"),
    ("elementwise", r"elementwise|vectorized|reduce|softmax|norm|nll|embedding|index|scatter|gather"
                    r"|aten::"),
)  # fmt: skip


def kernel_class(name: str, stage: str = "") -> str:
    """Class of a kernel; what the optimizer launches is its own, matrix products apart."""
    found = next((label for label, pattern in KERNEL_CLASSES
                  if re.search(pattern, name, re.IGNORECASE)), "other")
    if stage in ("optimizer", "average"):
        return "optimizer matmul" if found == "matmul" else "optimizer other"
    return "optimizer other" if found == "optimizer" else found


def kernels_of(events: list[dict[str, Any]]) -> list[tuple[str, str, float]]:
    """(name, stage, microseconds) of every device kernel; without a GPU, of every operator.

    A kernel belongs to the annotated stage during which the host launched it.
    """
    events = [event for event in events if event.get("ph") == "X"]
    stages = [(e["ts"], e["ts"] + e["dur"], e["name"].removeprefix("stage:")) for e in events
              if e.get("cat") == "user_annotation" and e["name"].startswith("stage:")]
    launched = {e["args"]["correlation"]: e["ts"] for e in events
                if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e["args"]}
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    times = [launched.get(e["args"].get("correlation"), e["ts"]) for e in kernels]
    if not kernels:
        kernels = own_times([e for e in events if e.get("cat") == "cpu_op"])
        times = [e["ts"] for e in kernels]

    def stage_at(moment: float) -> str:
        return next((name for begin, end, name in stages if begin <= moment <= end), "")

    return [(e["name"], stage_at(t), e["dur"]) for e, t in zip(kernels, times, strict=True)]


def own_times(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The operators with `dur` less the operators that they call on their thread."""
    events = [dict(e) for e in sorted(events, key=lambda e: (e["tid"], e["ts"], -e["dur"]))]
    open_: list[tuple[dict[str, Any], float]] = []
    for event in events:
        while open_ and (open_[-1][0]["tid"] != event["tid"] or open_[-1][1] <= event["ts"]):
            open_.pop()
        if open_:
            open_[-1][0]["dur"] -= event["dur"]
        open_.append((event, event["ts"] + event["dur"]))
    return events


def kernel_table(kernels: list[tuple[str, str, float]], steps: int) -> dict[str, Any]:
    """Milliseconds a step by class, by stage and of the top kernels."""
    classes: dict[str, float] = {}
    stages: dict[str, float] = {}
    names: dict[tuple[str, str], list[float]] = {}
    for name, stage, microseconds in kernels:
        label = kernel_class(name, stage)
        classes[label] = classes.get(label, 0.0) + microseconds
        stages[stage or "outside"] = stages.get(stage or "outside", 0.0) + microseconds
        names.setdefault((label, name), []).append(microseconds)
    total = sum(classes.values()) or 1.0
    top = sorted(names.items(), key=lambda item: -sum(item[1]))[:25]
    return dict(
        busy_ms_per_step=round(total / 1e3 / steps, 3), launches_per_step=len(kernels) / steps,
        classes=[dict(name=label, ms=round(t / 1e3 / steps, 3), share=round(t / total, 4))
                 for label, t in sorted(classes.items(), key=lambda item: -item[1])],
        stages={label: round(t / 1e3 / steps, 3) for label, t in stages.items()},
        top=[{"name": name[:100], "class": label, "calls": len(times) / steps,
              "ms": round(sum(times) / 1e3 / steps, 3), "share": round(sum(times) / total, 4)}
             for (label, name), times in top])


# ------------------------------------------------------------------------------------------
# 5 proxy: a 240 s run with artifact and scores
# ------------------------------------------------------------------------------------------


def most_steps(tokens: int, batch_tokens: int, epochs: float = MOST_EPOCHS) -> int:
    """Steps that read at most `epochs` times `tokens`; raises RunError if that is none."""
    steps = int(epochs * tokens // batch_tokens)
    train_gpt.require(steps, f"{tokens} training tokens are less than one step of {batch_tokens}")
    return steps


def run_proxy(piece: Piece) -> None:
    """Train against the clock on the proxy corpus; score the artifact on FineWeb documents."""
    folder = proxy_folder(piece.options)
    base = train_gpt.Config(data_path=str(folder))
    tokens = sum(shard_tokens(base, "train"))
    batch = int(record_settings(piece)["TRAIN_BATCH_TOKENS"])
    cap = min(most_steps(tokens, batch), piece.pick(20000, 400))
    artifact = piece.work / "model.ptz"
    pace = piece.pick({}, dict(RECUR_START_STEP=0.4, WARMDOWN_ITERS=100, LATE_QAT_THRESHOLD=0.5))
    settings = record_settings(
        piece, DATA_PATH=folder, ITERATIONS=cap, SIZE_LIMIT=64_000_000, ARTIFACT_PATH=artifact,
        MAX_WALLCLOCK_SECONDS=piece.pick(PROXY_SECONDS, 6), TRAIN_LOG_EVERY=piece.pick(50, 5),
        VAL_LOSS_EVERY=piece.pick(1000, 0), **pace)
    train_gpt.require(int(settings["ITERATIONS"]) * batch <= MOST_EPOCHS * tokens,
                      f"ITERATIONS={settings['ITERATIONS']} reads more than {MOST_EPOCHS} epochs "
                      f"of {tokens} tokens; it may be {cap} at most")
    piece.summary |= dict(settings=settings, train_tokens=tokens, most_steps=cap,
                          tokenizer=piece.options.tokenizer)
    good, events, facts = piece.train("train", settings)
    piece.summary |= proxy_result(events, tokens, batch) | dict(compiler=facts)
    if artifact.exists():
        shutil.copyfile(artifact, piece.path("ptz"))
    piece.summary["ok"] = good and piece.summary["epochs"] <= MOST_EPOCHS


def proxy_result(events: list[dict[str, Any]], tokens: int, batch: int) -> dict[str, Any]:
    """What the run's events say; scores are missing where it did not come so far."""
    summary = (of_kind(events, "summary") or [{}])[-1]
    size = (of_kind(events, "size") or [{}])[-1]
    train = of_kind(events, "train")
    steps = summary.get("steps", train[-1]["step"] if train else 0)
    keys = ("train_ms", "post_ema_bpb", "roundtrip_bpb", "sliding_bpb", "weights", "byte_audit",
            "peak_memory_mib", "seconds_train", "seconds_export", "seconds_eval")
    found = {key: summary.get(key) for key in keys}
    gap = None
    if found["roundtrip_bpb"] and found["post_ema_bpb"]:
        gap = round(found["roundtrip_bpb"] - found["post_ema_bpb"], 6)
    return found | dict(
        steps=steps, epochs=round(steps * batch / tokens, 3), roundtrip_gap=gap,
        ms_per_step=round(found["train_ms"] / steps, 2) if found["train_ms"] and steps else None,
        phases_from_step={e["name"]: e["step"] for e in of_kind(events, "phase")},
        artifact_bytes=size.get("artifact"), code_bytes=size.get("code"),
        bytes_total=size.get("total"), fits_16_mb=size.get("total", 1 << 30) <= 16_000_000,
        evaluations={e["mode"]: dict(loss=e["loss"] if "loss" in e else e["val_loss"],
                                     bpb=e["val_bpb"], seconds=round(e["eval_ms"] / 1e3, 2),
                                     tokens=e["tokens"]) for e in of_kind(events, "final")},
        curve=[[e["step"], round(e["loss"], 4)] for e in train])


# ------------------------------------------------------------------------------------------
# 6 report: tables from the summaries
# ------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """A Markdown table; None is a dash."""
    lines = [head, ["--"] * len(head), *rows]
    return ["| " + " | ".join("-" if cell is None else str(cell) for cell in line) + " |"
            for line in lines]


def preflight_tables(summary: dict[str, Any]) -> list[str]:
    """Answers, and what they rest on."""
    rows = [[name.replace("_", " "), "yes" if yes else "NO"]
            for name, yes in summary.get("answers", {}).items()]
    evidence = [f"- {key}: `{json.dumps(value)[:900]}`"
                for key, value in summary.get("evidence", {}).items()]
    return ["## Pre-flight", "", *table(["question", "answer"], rows), "", *evidence, ""]


def speed_tables(summary: dict[str, Any]) -> list[str]:
    """Step times beside the bars, evaluation, and the profile of the first variant."""
    head = ["attention", "micro-batch", "without", "phase", "ms/step", "median", "bar", "goal",
            "tokens/s", "utilisation", "peak MiB", "compile s"]
    rows = []
    for variant in summary.get("variants", []):
        for name, p in variant.get("phases", {}).items():
            bar, goal = (None, None) if summary["rehearsal"] else BARS.get(name, (None, None))
            rows.append([variant["attention"].split(" ")[0], variant["micro_batch_tokens"],
                         variant.get("without"), f"recurrence {name.replace('_', ' ')}",
                         p["ms_per_step"], p["median_ms"],
                         bar, goal, p["tokens_per_second"], p["utilisation"],
                         p["peak_allocated_mib"], p["compile_seconds"]])
    lines = ["## Speed", "", *table(head, rows), ""]
    first = (summary.get("variants") or [{}])[0]
    lines += evaluation_tables(first.get("evaluation", {}))
    for name, profile in first.get("profiles", {}).items():
        lines += profile_tables(name, profile)
    return lines


def evaluation_tables(evaluation: dict[str, Any]) -> list[str]:
    """Cost of each mode of evaluation."""
    rows = [[mode, e["stride"], e.get("microseconds_per_forward_token"),
             e["microseconds_per_scored_token"], e["scaled_seconds"]]
            for mode, e in evaluation.items() if isinstance(e, dict)]
    head = ["evaluation", "stride", "us per forward token", "us per scored token", "s scaled"]
    peak = evaluation.get("peak_allocated_mib")
    note = f"Scaled to {evaluation.get('scaled_to')}; peak MiB {peak}."
    return [*table(head, rows), "", note, ""] if rows else []


def profile_tables(name: str, profile: dict[str, Any]) -> list[str]:
    """Classes and top kernels of one profile."""
    classes = [[c["name"], c["ms"], f"{c['share']:.1%}"] for c in profile["classes"]]
    top = [[f"`{k['name'].replace('|', '/')}`", k["class"], round(k["calls"], 1), k["ms"],
            f"{k['share']:.1%}"] for k in profile["top"][:15]]
    return [f"### Profile, recurrence {name}", "",
            f"Busy {profile['busy_ms_per_step']} ms of {profile['step_ms_under_profiler']} ms a "
            f"step under the profiler, {profile['launches_per_step']:.0f} launches; by stage "
            f"{profile['stages']}.", "",
            *table(["class", "ms/step", "share"], classes), "",
            *table(["kernel", "class", "calls", "ms/step", "share"], top), ""]


def data_tables(summary: dict[str, Any]) -> list[str]:
    """What the shards hold."""
    keys = ("tokenizer", "tokens", "byte_audit", "seconds")
    return ["## Data", "", *table(list(keys), [[summary.get(key) for key in keys]]), ""]


def proxy_tables(summary: dict[str, Any]) -> list[str]:
    """The run's result, one line a number."""
    keys = ("tokenizer", "steps", "epochs", "ms_per_step", "phases_from_step", "post_ema_bpb",
            "roundtrip_bpb", "roundtrip_gap", "sliding_bpb", "artifact_bytes", "code_bytes",
            "bytes_total", "fits_16_mb", "byte_audit", "peak_memory_mib", "seconds_train",
            "seconds_export", "seconds_eval", "evaluations")
    rows = [[key, summary.get(key)] for key in keys]
    return ["## Proxy run", "", *table(["quantity", "value"], rows), ""]


TABLES = {"preflight": preflight_tables, "speed": speed_tables, "data": data_tables,
          "proxy": proxy_tables}
ROW_HEAD = ["date", "commit", "GPU", "ms/step off / on", "utilisation off / on", "peak MiB",
            "tokenizer", "proxy steps", "post-EMA", "roundtrip", "sliding", "bytes", "folder"]


def commit_of(sha256: str) -> str:
    """Short hash of the newest commit whose train_gpt.py has this SHA-256, else 'uncommitted'."""
    git = ["git", "-C", str(ROOT)]
    with contextlib.suppress(OSError):
        log = subprocess.run([*git, "log", "--format=%h", "-100", "--", "train_gpt.py"],
                             capture_output=True, text=True, check=False)
        for commit in log.stdout.split():
            blob = subprocess.run([*git, "show", f"{commit}:train_gpt.py"], capture_output=True,
                                  check=False).stdout
            if hashlib.sha256(blob).hexdigest() == sha256:
                return commit
    return "uncommitted"


def table_row(summaries: dict[str, dict[str, Any]], date: str, commit: str) -> list[Any]:
    """The row of records/one_h100/README.md."""
    proxy = summaries.get("proxy", {})
    variants = summaries.get("speed", {}).get("variants") or [{}]
    phases = [variants[0].get("phases", {}).get(name, {}) for name in BARS]

    def both(key: str) -> str:
        return " / ".join(str(phase.get(key, "-")) for phase in phases)

    return [date, commit, next(iter(summaries.values()))["machine"]["gpu"], both("ms_per_step"),
            both("utilisation"), phases[1].get("peak_allocated_mib"),
            *(proxy.get(key) for key in ("tokenizer", "steps", "post_ema_bpb", "roundtrip_bpb",
                                         "sliding_bpb", "bytes_total")), f"{date}_{commit}/"]


def find_summaries(folders: list[Path]) -> dict[str, dict[str, Any]]:
    """Summaries by piece; raises RunError if there are none or they are of different code."""
    paths = {path.stem: path for folder in folders for path in folder.glob("*.json")}
    found = {name: read_json(paths[name]) for name in PIECES if name in paths}
    train_gpt.require(found, f"no summaries in {', '.join(map(str, folders))}; name the folders "
                      "that the pieces wrote to with --from")
    codes = {summary["train_gpt_sha256"] for summary in found.values()}
    train_gpt.require(len(codes) == 1, "the summaries are of different versions of train_gpt.py; "
                      "report each version by itself")
    return found


def run_report(options: argparse.Namespace) -> Path:
    """Write <date>_<commit>/ with README.md and the summaries; returns the folder.

    A rehearsal's folder goes under --out and says that its numbers mean nothing.
    """
    found = find_summaries(options.sources or [options.out])
    rehearsal = any(summary["rehearsal"] for summary in found.values())
    train_gpt.require(options.rehearse or not rehearsal,
                      "these summaries are of a rehearsal; only --rehearse reports them")
    first = next(iter(found.values()))
    date = max(summary["date"] for summary in found.values())
    commit = commit_of(first["train_gpt_sha256"])
    parent = options.out if rehearsal else Path(__file__).resolve().parent
    folder = parent / f"{date}_{commit}"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"# One H100, {date}, train_gpt.py of {commit}", ""]
    if rehearsal:
        lines += ["**A rehearsal: no number below is comparable with anything.**", ""]
    lines += [f"Machine: {json.dumps(first['machine'])}", "",
              "Made by `run.py report` from the summaries beside this file.", ""]
    for name, summary in found.items():
        lines += TABLES[name](summary)
        state = "ok" if summary["ok"] else f"NOT ok {summary['error']}"
        cut = "; cut off by its time limit" if summary["timed_out"] else ""
        lines += [f"Piece {name}: {state}{cut}, {summary.get('seconds')} s, settings "
                  f"`{json.dumps(summary['settings'])}`", ""]
        write_json(folder / f"{name}.json", summary)
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(table(ROW_HEAD, [table_row(found, date, commit)])))
    print(f"wrote {folder}/README.md; the row above belongs into records/one_h100/README.md")
    return folder


# ------------------------------------------------------------------------------------------
# 7 inner processes and the command line
# ------------------------------------------------------------------------------------------


def compiler_facts() -> dict[str, Any]:
    """Graphs, graph breaks and recompilations of this process, from the compiler's counters."""
    from torch._dynamo import utils

    counters = {name: dict(value) for name, value in utils.counters.items()}
    seconds = utils.calculate_time_spent().get("total_wall_time", 0.0)
    return dict(graphs=counters.get("stats", {}).get("unique_graphs", 0),
                graph_breaks=sum(counters.get("graph_break", {}).values()),
                limit_hits=sum(counters.get("recompile_limit", {}).values()),
                compile_seconds=round(seconds, 1))


def force_attention(name: str) -> None:
    """Make train_gpt use one attention backend, and say so in its log."""
    attend = (train_gpt.flash_attention_3 if name == "flash_attention_3" else train_gpt.sdpa)

    def select(device: torch.device, config: train_gpt.Config) -> tuple[Callable, str]:
        if device.type == "cuda" and name != "flash_attention_3":
            for backend in ("cudnn", "flash", "mem_efficient", "math"):
                getattr(torch.backends.cuda, f"enable_{backend}_sdp")(backend == name)
        return attend, f"{name} (forced)"

    train_gpt.select_attention = select


@contextlib.contextmanager
def traced_on_cpu() -> Iterator[None]:
    """Trace every graph of a rehearsal, without generating code: finds graph breaks."""
    compile_, runtime = torch.compile, train_gpt.Runtime

    class TracingRuntime(runtime):
        def __init__(self, config: train_gpt.Config) -> None:
            super().__init__(config)
            self.compiles = not config.torch_compile_disable

    def trace(module: torch.nn.Module, **options: Any) -> Callable:
        return compile_(module, **options | {"backend": "aot_eager"})

    torch.compile, train_gpt.Runtime = trace, TracingRuntime
    try:
        yield
    finally:
        torch.compile, train_gpt.Runtime = compile_, runtime


def inner(arguments: list[str]) -> int:
    """A child process: `train` or `speed` REHEARSE ATTENTION FILE [all|steps]."""
    task, rehearse, attention, path = arguments[0], arguments[1] == "1", *arguments[2:4]
    if attention != "auto":
        force_attention(attention)
    with traced_on_cpu() if rehearse else contextlib.nullcontext():
        if task == "speed":
            Speed(Path(path), rehearse).measure(arguments[4] == "all")
            return 0
        try:
            return train_gpt.main([])
        finally:
            write_json(Path(path), compiler_facts())


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = Path(os.environ.get("OUT") or Path(__file__).resolve().parent / "out")
    add = parser.add_argument
    add("pieces", nargs="+", choices=(*PIECES, "report"), metavar="PIECE",
        help="preflight, speed, data, proxy, report; run in the order given")
    add("--rehearse", action="store_true", help="run on the CPU with a tiny model and tiny data")
    add("--out", type=Path, default=out, help="folder of the results ($OUT, else ./out)")
    add("--limit", type=float, default=LIMIT_SECONDS, help="seconds for all pieces (540 at most)")
    add("--data", type=Path, help="folder of shards; preflight and speed make stand-ins without")
    add("--source", type=Path, default=ROOT / ".carry", help="folder of the documents (.carry)")
    add("--tokenizer", choices=("scylla", "sp1024"), default="scylla", help="of data and proxy")
    add("--attention", nargs="+", choices=ATTENTION, default=["auto"],
        help="backend; speed takes several")
    add("--without", nargs="+", choices=list(WITHOUT), default=["none"], metavar="FEATURE",
        help=f"speed: variants without a feature: {', '.join(WITHOUT)}")
    add("--micro-batch", nargs="+", type=int, default=[0], metavar="TOKENS",
        help="tokens per forward pass, 0 by memory; speed takes several")
    add("--test-seconds", type=float, default=400, help="limit of preflight's pytest (400)")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of train_gpt")
    add("--from", nargs="+", type=Path, dest="sources", help="report: folders of summaries")
    options = parser.parse_args(arguments)
    if not all("=" in pair for pair in options.set):
        parser.error("--set takes NAME=VALUE")
    if not 0 < options.limit <= LIMIT_SECONDS:
        parser.error(f"--limit is at most {LIMIT_SECONDS:.0f}")
    needs_gpu = {"preflight", "speed", "proxy"} & set(options.pieces)
    if needs_gpu and not options.rehearse and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here; --rehearse runs the same code on the CPU")
    options.out = options.out.resolve()
    options.data = options.data.resolve() if options.data else None
    return options


RUN = {"preflight": run_preflight, "speed": run_speed, "data": run_data, "proxy": run_proxy}


def main(arguments: list[str]) -> int:
    """Run the pieces in turn; 0 if all of them are ok."""
    if arguments[:1] == ["inner"]:
        return inner(arguments[1:])
    options = parse(arguments)
    deadline = time.monotonic() + options.limit
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended too
    good = True
    for name in options.pieces:
        if name != "report":
            good = run_piece(name, options, deadline) and good
            continue
        try:
            run_report(options)
        except train_gpt.RunError as error:
            print(f"error: {error}", file=sys.stderr)
            good = False
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
