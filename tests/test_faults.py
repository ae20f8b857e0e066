"""Faults: signals, kills, checkpoints, dead ranks, full disks, memory."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import harness as h
import train_gpt as t


def ranks_of(process):
    """{rank: process id} of the workers that a torchrun has started."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            values = dict(x.split("=", 1) for x in path.read_text().split("\0") if "=" in x)
            parent = re.search(r"PPid:\s*(\d+)", (path.parent / "status").read_text())
            if "RANK" in values and parent and int(parent[1]) == process.pid:
                found[int(values["RANK"])] = int(path.parent.name)
    return found


def test_out_of_memory_names_the_settings(monkeypatch, capsys):
    """Exit code 1 and the settings to lower, no traceback."""
    def fail(config):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(t, "run", fail)
    assert t.main([]) == 1
    error = capsys.readouterr().err
    assert all(n in error for n in ("MICRO_BATCH_TOKENS", "TRAIN_BATCH_TOKENS", "VAL_BATCH_SIZE"))


@pytest.mark.slow
def test_four_and_eight_ranks_are_one(tmp_path, data):
    """The same; and with micro-batches that are larger on few ranks than on many."""
    h.compare_ranks(tmp_path, data, 4, 8)
    h.compare_ranks(tmp_path / "accumulated", data, 2, 8, micro_batch_tokens=32)


def test_a_fault_after_training_loses_nothing(tmp_path, data, undisturbed, monkeypatch):
    """The checkpoint at the end of training: RESUME=1 goes on to the export without a step."""
    with monkeypatch.context() as patch:
        patch.setattr(t, "export_model", lambda *_: t.require(False, "no export today"))
        code, _ = h.run_switching(tmp_path, data)
    assert code == 1 and not (tmp_path / "k.ptz").exists()
    with h.after_step(0, lambda _: pytest.fail("trained again")):
        code, console = h.run_switching(tmp_path, data, resume=True)
    assert code == 0 and "resumed step:24 of checkpoints/k" in console
    h.check_same_run(tmp_path, undisturbed)


def test_signals_outside_training_stop_too(tmp_path, data, monkeypatch, capsys):
    """In evaluation SIGTERM ends with 75 as well, and the handlers are put back."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(t, "evaluate_artifact", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    code, _ = h.run_switching(tmp_path, data, iterations=2)
    assert code == 75 and "RESUME=1" in capsys.readouterr().err
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


@pytest.mark.parametrize("changes, named", [
    (dict(matrix_lr=0.01), "MATRIX_LR=0.025 (now 0.01)"),
    (dict(seed=4), "SEED=1337 (now 4)"),
    (dict(iterations=99), "ITERATIONS=24 (now 99)"),
    (dict(micro_batch_tokens=32), "MICRO_BATCH_TOKENS=0 (now 32)"),
    (dict(n_int6_layers=0), "N_INT6_LAYERS=2 (now 0)"),
    (dict(data_path="other"), "DATA="),
    (dict(), "WORLD_SIZE=1 (now 2)"),
    (dict(), "CHECKPOINT_FORMAT=2 (now 3)"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_foreign_checkpoints_are_refused_by_name(changes, named, two_checkpoints, data,
                                                 tmp_path, monkeypatch, capsys):
    """Another configuration, data, rank count or format: an error that names what differs."""
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    if "data_path" in changes:
        changes = {"data_path": str(h.dataset(tmp_path / "other", val=(500, 300)))}
        manifest = tmp_path / "other/manifest.json"
        manifest.write_text(manifest.read_text().replace("5" * 64, "6" * 64))
    if "FORMAT" in named:
        monkeypatch.setattr(t, "CHECKPOINT_FORMAT", 3)
    if "WORLD" in named:
        init = t.Checkpoints.__init__

        def as_two(self, *arguments):
            init(self, *arguments)
            self.bound["WORLD_SIZE"] = 2

        monkeypatch.setattr(t.Checkpoints, "__init__", as_two)
    files = {p: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()}
    code, console = h.run_switching(folder, **({"data": data, "resume": True} | changes
                                               if "data_path" not in changes else
                                               {"data": changes["data_path"], "resume": True}))
    error = capsys.readouterr().err
    assert code == 1 and named in error and error.count("(now ") == 1
    assert files == {p: p.read_bytes() for p in files} and "train_loss" not in console


def test_resume_without_a_checkpoint_starts(tmp_path, data, undisturbed):
    """And says so; the result is that of a run without RESUME."""
    code, console = h.run_switching(tmp_path, data, resume=True)
    assert code == 0 and "resumed step:0 of nothing: no checkpoint" in console
    h.check_same_run(tmp_path, undisturbed, resumed=False)


def test_checkpoints_of_another_run_are_not_mixed_with(make_trainer):
    """A fresh run under a name whose checkpoints are still there is refused, nothing is removed."""
    trainer = make_trainer(iterations=2)
    trainer.run()
    kept = sorted(trainer.checkpoints.root.rglob("*"))
    assert kept
    with pytest.raises(t.RunError, match="holds checkpoints of another run; set another RUN_ID"):
        t.Trainer(trainer.model, trainer.loader, trainer.evaluator).run()
    assert sorted(trainer.checkpoints.root.rglob("*")) == kept


def clocked_run(folder, data, stop_after=-1):
    """A run to a cap of 3 s in which steps take what a fake clock says; its exit code."""
    now, train_step = [0.0], t.Trainer.train_step

    def timed_step(trainer, step):
        now[0] += (12 if step == 12 else 5 + step % 3) / 64  # s, exact in binary; one is slow
        train_step(trainer, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Runtime, "event", lambda self: t.HostEvent(now[0]))
        patch.setattr(t.Trainer, "train_step", timed_step)
        with h.after_step(stop_after, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
            return h.run_switching(folder, data, max_wallclock_seconds=3.0, iterations=1000,
                                   recur_start_step=0.5, warmup_steps=0, quant="rtn",
                                   compressor="zlib", resume=True)[0]


def test_a_resumed_run_goes_by_the_clock_of_the_whole_run(tmp_path, data):
    """Under a cap: rates, phases and the last step are those of a run without interruption."""
    calm, cut = tmp_path / "calm", tmp_path / "cut"
    assert clocked_run(calm, data) == 0
    assert [clocked_run(cut, data, stop_after=step) for step in (8, 17, -1)] == [75, 75, 0]
    assert len({e["step"] for e in h.events(cut, "resume")}) == 3
    for kind in ("train", "phase", "clock"):
        first, second = (h.events(folder, kind) for folder in (calm, cut))
        assert first == [e for e in second if e.get("reason", "wallclock_cap") == "wallclock_cap"]
    assert h.events(calm, "clock")[0]["train_ms"] > 2400 and len(h.events(calm, "phase")) == 2
    assert (calm / "k.ptz").read_bytes() == (cut / "k.ptz").read_bytes()


def on_two_ranks(patch, work):
    """What `work(runtime)` returns on each of two ranks: threads, with the runtime's own logic."""
    barrier, values, mine = threading.Barrier(2, timeout=30), [None, None], threading.local()

    def exchange(value):
        values[mine.rank] = value
        barrier.wait()
        every = list(values)
        barrier.wait()
        return every

    def all_gather_object(out, value):
        out[:] = exchange(value)

    def broadcast_object_list(out):
        out[:] = exchange(list(out))[0]

    def as_rank(rank):
        mine.rank = rank
        return work(h.runtime(rank, 2))

    patch.setattr(t.dist, "all_gather_object", all_gather_object)
    patch.setattr(t.dist, "broadcast_object_list", broadcast_object_list)
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(as_rank, range(2)))


@pytest.mark.parametrize("damaged", [0, 1])
def test_a_shard_damaged_on_one_rank_is_damage_for_all(damaged, tmp_path, monkeypatch):
    """Every rank passes over the checkpoint and says whose shard it was; none is left behind."""
    c, refused = h.config(checkpoint_path=str(tmp_path)), []

    def write(runtime):
        for step in (3, 7):
            t.Checkpoints(c, runtime, "data").write(
                dict(own=np.full(9, 10 * step + runtime.rank)), dict(steps=step))
            runtime.gather(step)  # as the steps between two checkpoints do, it waits for both

    def load(runtime):
        runtime.log.event = lambda kind, *_, reason: refused.append((runtime.rank, kind, reason))
        state, arrays = t.Checkpoints(c, runtime, "data").load()
        return state["steps"], arrays["own"].tolist()

    on_two_ranks(monkeypatch, write)
    path = tmp_path / "none" / "step00000007" / f"rank{damaged}"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert on_two_ranks(monkeypatch, load) == [(3, [30] * 9), (3, [31] * 9)]
    assert sorted(refused) == [(rank, "refused", f"{path} is damaged (CRC)") for rank in (0, 1)]
    assert sorted(folder.name for folder in path.parents[1].iterdir()) == [
        "step00000003", "step00000007.damaged"]


def test_a_run_id_is_used_once(tmp_path, data, capsys):
    """Not while another run has it, not when it is finished; RESUME=1 appends."""
    first = t.RunLog("x")
    with h.inside(tmp_path):
        first.open(False)
        first.line("kept")
        for append in (False, True):
            with pytest.raises(t.RunError, match="logs/x.txt: another run is writing it; "):
                t.RunLog("x").open(append)
        first.close()
        with pytest.raises(t.RunError, match="RUN_ID=x has been used; set another one, or RESUME"):
            t.RunLog("x").open(False)
        again = t.RunLog("x")
        again.open(True)
        again.line("added")
        again.close()
    (tmp_path / "elsewhere").mkdir()
    with h.inside(tmp_path / "elsewhere"), pytest.raises(t.RunError, match="logs/x.txt: .*logs/"):
        Path("logs").touch()
        t.RunLog("x").open(False)
    assert (tmp_path / "logs/x.txt").read_text() == "kept\nadded\n"
    assert h.run_switching(tmp_path, data, run_id="x", iterations=1)[0] == 1
    assert "RUN_ID=x has been used" in capsys.readouterr().err


def test_a_signal_without_room_is_an_error(tmp_path, data, monkeypatch, capsys):
    """Exit code 1, not 75: there is nothing newer to go on from."""
    def full(*_):
        raise t.RunError("cannot write: No space left on device")

    monkeypatch.setattr(t, "write_atomic", full)
    with h.after_step(3, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
        code, console = h.run_switching(tmp_path, data)
    assert code == 1 and "no checkpoint could be written" in capsys.readouterr().err
    assert "warning: no checkpoint" in console and not (tmp_path / "checkpoints/k").exists()


def test_a_signal_that_the_compiler_wraps_is_a_signal():
    """Exit code 75: dynamo hands on what a handler raises in it as an error of its own."""
    runtime = h.runtime()
    with pytest.raises(t.Stopped, match="stopped by signal 15: wrapped") as caught:
        with runtime.guarded():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except t.Stopped as error:
                raise RuntimeError("wrapped") from error
    assert caught.value.code == 75
    with pytest.raises(RuntimeError, match="no signal"), h.runtime().guarded():
        raise RuntimeError("no signal")


def test_out_of_memory_on_a_cpu_names_the_settings(monkeypatch, capsys):
    """As on a GPU: exit code 1 and what to lower."""
    monkeypatch.setattr(t, "run", lambda config: torch.empty(1 << 60))
    assert t.main([]) == 1
    error = capsys.readouterr().err
    assert "MICRO_BATCH_TOKENS" in error and "TRAIN_BATCH_TOKENS" in error


BLOCKED = """
import ctypes, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import train_gpt as t
runtime, libc = t.Runtime(t.Config(run_id="blocked")), ctypes.CDLL(None)
with runtime.guarded():
    runtime.defer_signals = True
    if runtime.rank == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # the second waits for ever, and no signal ends that
        libc.pthread_mutex_lock(mutex)
"""


def launcher_names(text: str) -> list[str]:
    """The rank and exit code that torchrun gives as the root cause."""
    cause = text.partition("Root Cause")[2]
    return re.findall(r" (?:rank|exitcode) +: (-?\d+)", cause)[:2]


@pytest.mark.slow
def test_a_dying_rank_is_named(tmp_path, data):
    """SIGKILL to rank 1 of 2: rank 0 ends within seconds, and the launcher names rank 1."""
    environ = h.switching(data, iterations=100000, run_id="dying")
    process = h.start_script(tmp_path, environ, *h.TORCHRUN, "--nproc_per_node=2")
    try:
        h.wait_for(tmp_path, r"step:9/", process)
        os.kill(ranks_of(process)[1], signal.SIGKILL)
        assert process.wait(30) == 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert launcher_names((tmp_path / "console").read_text()) == ["1", "-9"]
    assert not (tmp_path / "k.ptz").exists() and not list(tmp_path.rglob("commit.*"))


@pytest.mark.slow
def test_a_rank_that_waits_in_the_driver_ends_with_a_dead_one(tmp_path):
    """As under NCCL: rank 0 hears no SIGTERM; the launcher ends it after 30 s and names rank 1."""
    (tmp_path / "blocked.py").write_text(BLOCKED)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *h.TORCHRUN, "--nproc_per_node=2", "blocked.py", h.ROOT], cwd=tmp_path,
        capture_output=True, text=True, timeout=90,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and 25 < time.monotonic() - began < 60
    assert launcher_names(done.stderr) == ["1", "-9"]


@pytest.mark.slow
def test_killed_at_random_moments_ends_bit_identical(tmp_path, data, undisturbed):
    """SIGKILL six times in one run, with a checkpoint being written at every step."""
    environ = h.switching(data, checkpoint_every=1e-6, resume=True)
    rng, kills = random.Random(6), 0
    while True:
        process = h.start_script(tmp_path, environ)
        if kills == 6:
            break
        before = len((tmp_path / "console").read_text())
        while "train_time" not in (tmp_path / "console").read_text()[before:]:
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.15))
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    process.wait(60)
    assert process.returncode == 0, (tmp_path / "console").read_text()
    resumed = [e["step"] for e in h.events(tmp_path, "resume")]
    assert len(set(resumed)) > 3 and resumed == sorted(resumed)
    h.check_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_two_ranks_restart_and_resume_by_themselves(tmp_path, data):
    """torchrun --max-restarts: one rank after the other is killed; the run ends bit-identical."""
    environ = h.switching(data, checkpoint_every=1e-6, iterations=120, warmdown_iters=80)
    del environ["LOAD_ARTIFACT"]  # named at all, even as nothing, it is what to evaluate
    (tmp_path / "calm").mkdir()
    calm = h.run_ranks(tmp_path / "calm", 2, environ)
    assert calm.returncode == 0, calm.stderr
    launch = (*h.TORCHRUN, "--nproc_per_node=2", "--max-restarts=3")
    process = h.start_script(tmp_path, environ, *launch)
    try:
        for rank, step in ((1, 20), (0, 60)):
            h.wait_for(tmp_path, rf"step:{step}/120 train", process)
            os.kill(ranks_of(process)[rank], signal.SIGKILL)
            h.wait_for(tmp_path, rf"resumed step:\d+ of checkpoints/k\n(.*\n)*step:{step + 10}/",
                       process)
        assert process.wait(120) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "k.ptz").read_bytes() == (tmp_path / "calm/k.ptz").read_bytes()
    for rank in (0, 1):
        assert h.state_of(tmp_path, 120, rank) == h.state_of(tmp_path / "calm", 120, rank)
    assert len(h.events(tmp_path, "resume")) == 2


@pytest.mark.slow
def test_a_signal_to_torchrun_checkpoints_all_ranks(tmp_path, data):
    """SIGTERM to the launcher: one checkpoint of both ranks at one step; RESUME=1 goes on."""
    environ = h.switching(data, iterations=100000)
    process = h.start_script(tmp_path, environ, *h.TORCHRUN, "--nproc_per_node=2")
    h.wait_for(tmp_path, r"step:9/", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(40) != 0
    (kept,) = (tmp_path / "checkpoints/k").iterdir()
    names = sorted(path.name.split(".")[0] for path in kept.iterdir())
    assert names == ["commit", "rank0", "rank1"]
    process = h.start_script(tmp_path, environ | {"RESUME": "1"}, *h.TORCHRUN, "--nproc_per_node=2")
    h.wait_for(tmp_path, rf"resumed step:{int(kept.name[4:])} ", process)
    h.wait_for(tmp_path, rf"step:{int(kept.name[4:]) + 1}/100000 train", process)
    process.send_signal(signal.SIGTERM)
    process.wait(40)


@pytest.mark.slow
def test_nodes_may_have_disks_of_their_own(tmp_path, data):
    """Each rank in a folder of its own: old checkpoints go from both, and RESUME=1 goes on."""
    (tmp_path / "node.py").write_text(
        "import os, runpy, sys\nfolder = 'node' + os.environ['RANK']\n"
        "os.makedirs(folder, exist_ok=True)\nos.chdir(folder)\ndel sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n")
    environ = h.switching(data, iterations=100000, checkpoint_every=1e-6)
    launch = (*h.TORCHRUN, "--nproc_per_node=2", "node.py")
    resumed = "step:9/"
    for _ in range(2):
        process = h.start_script(tmp_path, environ, *launch)
        h.wait_for(tmp_path, resumed, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) != 0
        kept = [sorted((tmp_path / f"node{rank}/checkpoints/k").iterdir()) for rank in (0, 1)]
        names = [[path.name for path in folders] for folders in kept]
        assert names[0] == names[1] and len(names[0]) == 2  # CHECKPOINT_KEEP
        assert [path.name for path in kept[1][-1].iterdir()] == ["rank1"]
        step = int(names[0][-1][4:])
        environ["RESUME"], resumed = "1", rf"resumed step:{step} (.*\n)*step:{step + 3}/"


@pytest.mark.slow
def test_two_ranks_stop_before_the_cap_at_one_step(tmp_path, data):
    """The log proves it: the slowest rank's clock is under the cap, all ranks at one step."""
    environ = h.switching(data, iterations=100000, max_wallclock_seconds=4.0)
    done = h.run_ranks(tmp_path, 2, environ)
    assert done.returncode == 0, done.stderr
    (clock,), (stop,) = h.events(tmp_path, "clock"), h.events(tmp_path, "stop")
    assert clock["cap_ms"] == 4000 and clock["reserve_ms"] >= t.CLOCK_RESERVE_MS
    assert 500 < clock["train_ms"] < 4000 and stop["step"] == clock["step"] < 100000
    assert re.search(r"train_clock slowest_rank:\d+ms cap:4000ms reserve:\d+ms all_ranks_at_step:"
                     rf"{clock['step']}\n", done.stdout)


@pytest.mark.slow
def test_memory_is_constant(tmp_path, data):
    """400 steps, checkpoints on the way: the resident size does not grow after the first 100."""
    environ = h.switching(data, iterations=400, warmdown_iters=100, recur_start_step=40.0,
                          checkpoint_every=0.5)
    process, sizes = h.start_script(tmp_path, environ), []
    h.wait_for(tmp_path, "step:100/", process)
    while process.poll() is None and "post_ema" not in (tmp_path / "console").read_text():
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            sizes += [int(kib) for kib in re.findall(r"VmRSS:\s+(\d+)", status)]
        time.sleep(0.05)
    assert process.wait(60) == 0 and len(sizes) > 10
    assert max(sizes[len(sizes) // 2 :]) < 1.03 * max(sizes[: len(sizes) // 4])


def test_a_run_goes_on_from_the_one_before_a_damaged_checkpoint(two_checkpoints, data, tmp_path,
                                                               undisturbed):
    """It says so, keeps CHECKPOINT_KEEP checkpoints, and ends as if nothing had happened."""
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    before, newest = sorted((folder / "checkpoints/k").iterdir())
    h.replace_file(newest / "rank0", (newest / "rank0").read_bytes()[:-9])
    code, console = h.run_switching(folder, data, resume=True, checkpoint_keep=1)
    assert code == 0 and f"resumed step:{int(before.name[4:])} " in console
    assert f"passed over: checkpoints/k/{newest.name}" in console
    assert [path.name for path in (folder / "checkpoints/k").iterdir()] == ["step00000024"]
    h.check_same_run(folder, undisturbed)


@pytest.mark.slow
def test_the_clock_stands_still_and_goes_on(make_trainer, monkeypatch):
    """A slow checkpoint costs no training time; elapsed time and step times are carried over."""
    write, written = t.Checkpoints.write, []

    def slow(self, arrays, state):
        time.sleep(0.6)
        write(self, arrays, state)
        written.append(state)

    monkeypatch.setattr(t.Checkpoints, "write", slow)
    trainer = make_trainer(iterations=6, checkpoint_every=1e-6)
    trainer.run()
    assert len(written) == 6 and trainer.clock.elapsed_ms < 600 * 5
    assert written[-1]["elapsed_ms"] == trainer.clock.elapsed_ms
    again = t.Trainer(trainer.model, trainer.loader, trainer.evaluator)
    again.checkpoints, again.optimizer = trainer.checkpoints, t.Optimizer(
        trainer.model, trainer.config, trainer.runtime)
    again.resume()
    assert again.clock.elapsed_ms == trainer.clock.elapsed_ms and again.clock.steps == 6
    assert list(again.clock.recent) == list(trainer.clock.recent)
    assert (again.phase, again.average.snapshots) == (trainer.phase, trainer.average.snapshots)
