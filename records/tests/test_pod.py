"""A rented machine: GPUs that torch does not see, its own torch, what a record run refuses.

Made-up commands (nvidia-smi, python3, pip, torchrun) stand for the machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import harness as h
import smoke
import train_gpt as t

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
SEES_GPUS = """
find_gpu = lambda environ: True
Runtime.handicaps = lambda self: [w for w in [os.environ.get("HANDICAP")] if w]
"""
PACK = """
import os, pathlib, sys
pathlib.Path(sys.argv[3]).write_text('''
import os, pathlib
log = pathlib.Path("logs", os.environ["RUN_ID"])
log.with_suffix(".txt").write_text("final_int8_zlib_roundtrip_exact 1" + chr(10))
print("run", log.name, os.environ.get("WARMUP_STEPS"))
''')
"""
SMOKE = """
import os, sys
print("smoke.py", sys.argv[1])
sys.exit(sys.argv[1] == "report" and os.environ["VERDICT"] == "NO GO")
"""


def command(path: Path, text: str) -> None:
    """A shell script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def nvidia_smi(folder: Path, count: int, name: str = H100, driver: str = "570.86.10") -> None:
    """A made-up nvidia-smi of `count` GPUs in a folder; of none, it fails."""
    listing = "".join(f"GPU {i}: {name} (UUID: GPU-{i:036d})\n" for i in range(count))
    about = f"Driver Version : {driver}\nCUDA Version : 12.8\nAttached GPUs : {count}\n"
    command(folder / "nvidia-smi", "exit 9\n" if not count else
            f"[ $1 = -L ] && cat <<'E' || cat <<'F'\n{listing}E\n{about}F\n")


def clean(folder: Path, **environ: Any) -> dict[str, str]:
    """The environment without settings and ranks from outside; commands of a folder come first."""
    names = ("CUDA_VISIBLE_DEVICES LOCAL_WORLD_SIZE NPROC NNODES NODE_RANK RDZV_ENDPOINT TRACK "
             "SEEDS SHARDS SP1024 VOCAB VOCAB_SHA256 RECORD_NAME RECORDS ABOUT AGAINST PRICE "
             "PREFLIGHT PYTHON FA3_INDEX SSH_CONNECTION TMUX STY").split()
    kept = {k: v for k, v in h.clean_environ().items() if k not in names}
    return kept | dict(PATH=f"{folder}:{os.environ['PATH']}") | environ


class Pod:
    """A copy of run_8xh100.sh with made-up commands around it; CALLS is what they were asked."""

    def __init__(self, folder: Path, count: int = 8, name: str = H100, **smi: str) -> None:
        self.root, self.bin, self.calls = folder / "root", folder / "bin", folder / "calls"
        self.data = folder / "shards"
        (self.root / "records").mkdir(parents=True)
        self.data.mkdir()
        (self.data / "fineweb_train_000000.bin").write_bytes(b"")
        for kept in ("run_8xh100.sh", "requirements.txt"):
            shutil.copy(h.ROOT / kept, self.root)
        (self.root / "train_gpt.py").write_text(h.SCRIPT.read_text() + SEES_GPUS)
        nvidia_smi(self.bin, count, name, **smi)
        self.environ = clean(self.bin, AUTHOR="A", GITHUB_ID="a", DATA_DIR=str(folder / "work"),
                             DATA_PATH=str(self.data), PYTHON=sys.executable)

    def run(self, root: Path | None = None, code: int = 1, **environ: str) -> str:
        """All output of the script, which ends with an error where something is not made up."""
        done = subprocess.run(["bash", (root or self.root) / "run_8xh100.sh"], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=self.environ | environ)
        assert done.returncode == code, done
        return done.stdout

    def python3(self, version: str | None) -> None:
        """A python3 with a torch that says this version, or none; its pip only notes its task."""
        real = (f'case "$*" in *"-m pip"*) echo "$@" >> {self.calls}; exit 1;; esac\n'
                f'exec {sys.executable} "$@"\n')
        command(self.root / "python", real)
        command(self.root / "pip", f'echo pip >> {self.calls}; cat "$4" >> {self.calls}\n')
        make = (f'-m\\ venv*) echo "$@" >> {self.calls}; mkdir -p .venv/bin; '
                "cp python pip .venv/bin;;")
        says = "raise ImportError" if version is None else (
            f"import torch; torch.__version__ = type(torch.__version__)('{version}')")
        asks = f'-c\\ import\\ torch\\;*) exec {sys.executable} -c "{says}\n$2";;'
        command(self.bin / "python3", f'case "$*" in {make} {asks} *) exec {sys.executable} "$@";; '
                "esac\n")
        del self.environ["PYTHON"]

    def asked(self) -> str:
        """What the made-up commands were asked."""
        return self.calls.read_text() if self.calls.exists() else ""


# --- find_gpu -----------------------------------------------------------


@pytest.fixture
def unseen(tmp_path, monkeypatch):
    """A machine whose torch sees no GPU: a folder for its commands, which hold no nvidia-smi."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    nvidia_smi(tmp_path, 0)
    return tmp_path


@pytest.mark.parametrize("named", [True, False])
def test_gpus_that_torch_does_not_see_stop(unseen, named):
    """Both versions and both remedies; without nvidia-smi the device files tell."""
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (unseen / name).touch()
    if named:
        nvidia_smi(unseen, 2)
    with pytest.raises(t.RunError) as caught:
        t.find_gpu({}, str(unseen))
    assert caught.value.code == 1
    parts = ["has 2 GPUs", torch.__version__, f"CUDA {torch.version.cuda}", "torch>=2.9,<2.11",
             "newer driver", "CUDA_VISIBLE_DEVICES= "]
    parts += ["driver 570.86.10", "CUDA 12.8 at most"] if named else ["driver unknown"]
    assert not [part for part in parts if part not in str(caught.value)]


def test_a_list_that_names_no_gpu_is_named(unseen):
    """It may be the list that is wrong, not torch."""
    nvidia_smi(unseen, 2)
    with pytest.raises(t.RunError, match="none of them with CUDA_VISIBLE_DEVICES=9"):
        t.find_gpu({"CUDA_VISIBLE_DEVICES": "9"}, str(unseen))


def test_a_machine_without_gpus_is_a_cpu(unseen):
    """Nothing found is no error, nor is an nvidia-smi that answers something else."""
    command(unseen / "nvidia-smi", "echo 'Driver Version : 1'\n")
    assert t.find_gpu({}, str(unseen)) is False
    nvidia_smi(unseen, 0)
    assert t.find_gpu({}, str(unseen)) is False
    assert t.find_gpu({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, str(unseen)) is False


@pytest.mark.parametrize("by_name", ["", "-1"])
def test_the_cpu_can_be_asked_for(unseen, by_name):
    """Also where there are GPUs, whatever torch sees of them."""
    nvidia_smi(unseen, 2)
    environ = {"CUDA_VISIBLE_DEVICES": by_name, "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
    assert t.find_gpu(environ, str(unseen)) is False
    assert environ["CUDA_VISIBLE_DEVICES"] == by_name


def test_more_ranks_than_gpus_stop(unseen, monkeypatch):
    """Told by nvidia-smi, or by the list that is set."""
    nvidia_smi(unseen, 2)
    ranks = {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
    with pytest.raises(t.RunError, match="4 ranks, .* 2 GPUs; .*--nproc_per_node=2"):
        t.find_gpu(dict(ranks), str(unseen))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(t.RunError, match="CUDA_VISIBLE_DEVICES=4,5,6 lists 3 GPUs"):
        t.find_gpu(ranks | {"CUDA_VISIBLE_DEVICES": "4,5,6"}, str(unseen))


@pytest.mark.parametrize(("listed", "own"), [(None, "2"), ("4,5,6,7", "6"), ("GPU-a,b,c,d", "c")])
def test_a_rank_sees_its_own_gpu_only(monkeypatch, listed, own):
    """Its entry of the list; without ranks nothing is changed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    environ = given | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}
    assert t.find_gpu(environ) is True and environ["CUDA_VISIBLE_DEVICES"] == own
    alone = dict(given)
    assert t.find_gpu(alone) is True and alone == given


cpu_torch = pytest.mark.skipif(torch.version.cuda, reason="this torch may see a GPU")


@cpu_torch
def test_train_gpt_never_falls_back_on_the_cpu(tmp_path):
    """A GPU machine and a torch for CPUs: the message, exit code 1, and nothing is written."""
    nvidia_smi(tmp_path / "bin", 1)
    (tmp_path / "work").mkdir()
    done = subprocess.run([sys.executable, h.SCRIPT], cwd=tmp_path / "work",
                          env=clean(tmp_path / "bin", PRESET="demo"), capture_output=True,
                          text=True)
    assert done.returncode == 1 and "sees none of them" in done.stderr and not done.stdout
    assert not [*(tmp_path / "work").iterdir()]


@pytest.mark.slow
@cpu_torch
@pytest.mark.parametrize("given", [True, False])
def test_the_script_never_falls_back_on_the_cpu(tmp_path, given):
    """Neither with PYTHON nor with the torch of python3; nothing is fetched or built."""
    pod = Pod(tmp_path, 2, A100)
    shutil.copy(h.SCRIPT, pod.root)
    if not given:
        pod.python3(torch.__version__)
    done = pod.run(PRESET="demo")
    assert torch.__version__ in done and "570.86.10" in done
    assert "a newer driver" in done and "'torch>=2.9,<2.11'" in done
    assert not pod.asked() and not (pod.root / ".venv").exists()
    assert only_a_log(tmp_path)


# --- run_8xh100.sh: log, times, estimate ----------------------------------


def only_a_log(folder: Path) -> bool:
    """Whether the script's folder holds the log of one start and nothing else."""
    return [p.name[:4] for p in (folder / "work").iterdir()] == ["run_"]


def test_all_output_is_in_a_log(tmp_path):
    """Word for word, also the error at the end; its place stands first and last."""
    pod = Pod(tmp_path)
    done = pod.run(PYTHON="/bin/false")
    log = next((tmp_path / "work").iterdir())
    assert log.read_text() == done and only_a_log(tmp_path)
    first, *_, last = done.splitlines()
    assert first == f"This output also goes to {log}" and last == f"All of this output is in {log}"
    assert re.search("error: /bin/false lacks.*\n-- 2 environment \\(stopped here\\): 0 min . s\n"
                     "\nTime of each stage:\n +0 min . s  1 machine and settings\n"
                     " +0 min . s  2 environment \\(stopped here\\)\n", done)


def until_begun(process: subprocess.Popen) -> list[str]:
    """The lines of a script up to "begun"."""
    lines = []
    while "begun\n" not in lines:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    return lines


@pytest.mark.slow
def test_a_signal_to_the_script_ends_the_ranks(tmp_path):
    """SIGTERM to the script alone: torchrun is ended before the script is, and no rank lives on."""
    pod = Pod(tmp_path)
    (pod.root / "records" / "pack.py").write_text(PACK)
    (pod.root / "test_cpu.py").write_text("def test(): pass\n")
    command(pod.bin / "python", f"""[ "$2" = torch.distributed.run ] || exec {sys.executable} "$@"
trap 'kill $!; echo ended; exit 1' TERM
sleep 60 & sleep 1; echo begun; wait
""")
    process = subprocess.Popen(["bash", pod.root / "run_8xh100.sh"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=pod.environ | dict(PYTHON=str(pod.bin / "python")))
    until_begun(process)
    process.terminate()
    rest = process.communicate(timeout=30)[0]
    assert process.returncode == -signal.SIGTERM
    assert re.match(r"ended\n-- 6 smoke test: .* \(stopped here\): ", rest)


def test_a_signal_ends_the_script_with_its_log(tmp_path):
    """The child that runs gets it too, as with Ctrl-C; the exit status is that of the signal."""
    pod = Pod(tmp_path)
    command(pod.bin / "python", "echo begun; exec sleep 60\n")
    process = subprocess.Popen(["bash", pod.root / "run_8xh100.sh"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=pod.environ | dict(PYTHON=str(pod.bin / "python")),
                               start_new_session=True)
    lines = until_begun(process)
    os.killpg(process.pid, signal.SIGINT)
    rest = process.communicate(timeout=30)[0]
    assert process.returncode == -signal.SIGINT
    assert "2 environment (stopped here)" in rest and "All of this output is in" in rest
    assert next((tmp_path / "work").iterdir()).read_text() == "".join(lines) + rest


@pytest.mark.parametrize(("environ", "texts"), [
    (dict(), ["72 min  3 seeds, each 24 minutes", "84 min  in all", "34 dollars: 8 GPUs at 3.00"]),
    (dict(PRICE="2.5"), ["28 dollars: 8 GPUs at 2.5 an hour"]),
    (dict(NPROC="1", SEEDS="1", TRACK="track_non_record_16mb"), [
        "94 min  1 seeds, each 94 minutes", "106 min  in all", "5 dollars: 1 GPUs at 3.00"]),
    (dict(VOCAB=str(h.SCRIPT), DATA_PATH=""), [" 6 min  download of shards", "re-tokenizing, on"]),
    (dict(PRESET="demo"), ["18 min  3 seeds, each 6 minutes (on two", "21 min  in all\n"])])
def test_an_estimate_comes_first(tmp_path, environ, texts):
    """Minutes of each stage and the dollars of the GPUs, called an estimate; the demo is free."""
    done = Pod(tmp_path).run(PYTHON="/bin/false", **environ)
    assert done.index("An estimate of the time, not a measurement") < done.index("2 environment")
    assert not [text for text in texts if text not in done], done
    assert ("dollars" in done) == ("PRESET" not in environ)


def test_tmux_is_advised_over_ssh_only(tmp_path):
    """In a terminal over ssh that is not in tmux already; it is a line, not a stop."""
    pod = Pod(tmp_path)
    ours, theirs = os.openpty()
    for environ, terminal, advised in ((dict(SSH_CONNECTION="a"), theirs, True),
                                       (dict(SSH_CONNECTION="a"), subprocess.DEVNULL, False),
                                       (dict(SSH_CONNECTION="a", TMUX="b"), theirs, False),
                                       (dict(), theirs, False)):
        done = subprocess.run(["bash", pod.root / "run_8xh100.sh"], stdin=terminal, text=True,
                              capture_output=True, env=pod.environ | dict(PYTHON="false") | environ)
        assert ("started inside tmux" in done.stdout) == advised
        assert "lacks a package" in done.stdout
    os.close(ours)
    os.close(theirs)


def test_another_system_is_named(tmp_path):
    """On macOS the script says so, and makes nothing."""
    pod = Pod(tmp_path)
    command(pod.bin / "uname", "echo Darwin\n")
    assert "needs Linux and bash 4.4 or newer, not Darwin" in pod.run()
    assert not (tmp_path / "work").exists()


# --- run_8xh100.sh: GPUs, environment -------------------------------------


def test_the_script_counts_the_gpus_to_use(tmp_path):
    """As nvidia-smi and CUDA_VISIBLE_DEVICES say; eight ranks on H100s go on for a record."""
    pod = Pod(tmp_path)
    for environ, text in (
            (dict(), "8 GPUs, 8 processes on 1 machines"),
            (dict(NPROC="4", NNODES="2", RDZV_ENDPOINT="a:1", NODE_RANK="1"), "4 processes on 2"),
            (dict(CUDA_VISIBLE_DEVICES="", PRESET="demo"), "0 GPUs, 1 processes"),
            (dict(CUDA_VISIBLE_DEVICES="-1", PRESET="demo"), "0 GPUs, 1 processes"),
            (dict(CUDA_VISIBLE_DEVICES="4,5", PRESET="demo"), "2 GPUs, 2 processes")):
        done = pod.run(PYTHON="/bin/false", **environ)
        assert text in done, (environ, done)
        assert "lacks a package; /bin/false -m pip install -r requ" in done, (environ, done)


@pytest.mark.slow
def test_the_script_says_what_is_missing(tmp_path):
    """It stops before any work, with the remedy."""
    pod = Pod(tmp_path)
    fetch = dict(TRACK="track_non_record_16mb", DATA_PATH="", SHARDS="1", VOCAB=str(h.SCRIPT))
    machine = "a record runs on 8 ranks on H100s, not on {}.* set TRACK=track_non_record_16mb"
    refusals = [
        (dict(SHARDS="abc"), "SHARDS=abc: must be a whole number"),
        (dict(SEEDS="1,2"), "SEEDS=1,2: must be different numbers"),
        (dict(SEEDS="1 2 1"), "SEEDS=1 2 1: must be different numbers"),
        (dict(TRACK="10min"), "TRACK=10min: must be"),
        (dict(DATA_PATH="/no/such"), "DATA_PATH=/no/such: there is no such file"),
        (dict(VOCAB="/no/such"), "VOCAB=/no/such: there is no such file"),
        (dict(DATA_DIR="/dev/null/x"), "DATA_DIR=/dev/null/x cannot be made"),
        (dict(SP1024="/no/such"), "SP1024=/no/such: there is no such file"),
        (dict(ABOUT="/no/such"), "ABOUT=/no/such: there is no such file"),
        (dict(SP1024="/", DATA_PATH=""), "SP1024=/ has 0 training shards .* SHARDS=80 are"),
        (dict(PRICE="cheap"), "PRICE=cheap: must be dollars"),
        (dict(DATA_PATH=""), "VOCAB is not set: .*1254 ids, sha256 a0177241.*pull request 1314"),
        (dict(AUTHOR=""), "AUTHOR and GITHUB_ID are not set"),
        (dict(GITHUB_ID=""), "AUTHOR and GITHUB_ID are not set"),
        (dict(CUDA_VISIBLE_DEVICES=""), "nvidia-smi shows no GPU to use.* PRESET=demo"),
        (dict(NPROC="9"), "NPROC=9, but there are 8 GPUs"),
        (dict(NPROC="3", CUDA_VISIBLE_DEVICES="4,5"), "NPROC=3, but there are 2 GPUs"),
        (dict(NNODES="2", NODE_RANK="0"), "RDZV_ENDPOINT=host:port"),
        (dict(NNODES="2", RDZV_ENDPOINT="a:1"), "its NODE_RANK"),
        (dict(NPROC="4"), machine.format("4 on GPU 0: NVIDIA H100")),
        (dict(fetch, SHARDS="10000000"), "GB free, about 4200001 are needed"),
        (dict(MATRIX_LR="abc", **fetch), "MATRIX_LR=abc: expected a finite number")]
    for environ, message in refusals:
        assert re.search(message, pod.run(**environ)), environ
    done = pod.run(h.ROOT, AGAINST="2026-0", PRESET="demo", CUDA_VISIBLE_DEVICES="", **fetch)
    assert "AGAINST=2026-0 names no result" in done, done
    nvidia_smi(pod.bin, 8, A100)
    assert re.search(machine.format("8 on GPU 0: NVIDIA A100"), pod.run())


@pytest.mark.slow
@pytest.mark.parametrize(("version", "driver", "wanted"), [
    ("2.14.1+cu130", "580.95.05", None), ("2.9.0a0+abc", "570.86.10", None),
    ("2.8.0+cu128", "570.86.10", "torch>=2.9,<=2.13.0,<2.11"),
    (None, "580.95.05", "torch>=2.9,<=2.13.0"), (None, "", "torch>=2.9,<=2.13.0")])
def test_the_torch_of_the_machine_is_used(tmp_path, version, driver, wanted):
    """A torch that serves is not replaced; else one that fits the driver is asked for."""
    pod = Pod(tmp_path, 8 if driver else 0, A100, driver=driver)
    pod.python3(version)
    done = pod.run(PRESET="demo", AGAINST="none")  # names no result: the end of the environment
    assert "AGAINST=none" in done, done
    venv, pip, *packages = pod.asked().splitlines()
    assert ("--system-site-packages" in venv) == (not wanted) and pip == "pip"
    assert "--clear" in venv  # what an earlier .venv held would win over the machine's torch
    assert [p for p in packages if p.startswith("torch")] == ([wanted] if wanted else [])
    assert "numba>=0.61" in packages
    assert ("the torch of python3 is used" in done) == (not wanted)
    assert not wanted or f"for driver {driver[:3] or 'none'} goes" in done
    pod.run(PRESET="demo", AGAINST="none")
    assert pod.asked().count("-m venv") == 1  # what is done is skipped


@pytest.mark.slow
def test_an_environment_that_serves_is_kept(tmp_path):
    """What the README's commands put into .venv stays, torch with it; the rest is added."""
    pod = Pod(tmp_path, 0)
    pod.python3(None)
    for name in ("python", "pip"):
        (pod.root / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
        (pod.root / name).rename(pod.root / ".venv" / "bin" / name)
    assert "what .venv lacks is added to it" in pod.run(PRESET="demo", AGAINST="none")
    pip, *packages = pod.asked().splitlines()
    assert pip == "pip" and "numba>=0.61" in packages
    assert not [p for p in packages if p.startswith("torch")]


def test_help_is_the_table_of_variables(tmp_path):
    """--help prints the head of the script and starts nothing; so does any other argument."""
    for argument, code in (("--help", 0), ("seeds", 1)):
        done = subprocess.run(["bash", h.ROOT / "run_8xh100.sh", argument], capture_output=True,
                              text=True, env=clean(tmp_path, DATA_DIR=str(tmp_path / "d")))
        assert done.returncode == code and done.stdout.startswith("From a bare machine to a")
        assert "\n  VOCAB_SHA256  Scylla's" in done.stdout and "set -" not in done.stdout
    assert not (tmp_path / "d").exists()


@pytest.mark.slow
def test_flash_attention_3_is_tried_and_not_needed(tmp_path):
    """The page of our torch and CUDA, or FA3_INDEX; only on Hopper; the script goes on."""
    pod = Pod(tmp_path)
    pod.python3(torch.__version__)
    here = torch.__version__.split("+")[0].replace(".", "")
    cuda = str(torch.version.cuda).replace(".", "")
    for environ, pages in ((dict(), [f"/whl/cu{cuda}/flash-attn-3/", f"/cu{cuda}_torch{here}"]),
                           (dict(FA3_INDEX="file:///x"), ["file:///x"]),
                           (dict(CUDA_VISIBLE_DEVICES="", PRESET="demo"), [])):
        pod.calls.unlink(missing_ok=True)
        done = pod.run(code=2, TRACK="track_non_record_16mb", **environ)
        tried = re.findall(r"--no-deps .*--find-links (\S+) flash_attn_3", pod.asked())
        assert len(tried) == len(pages)
        assert all(map(str.endswith, tried, pages))
        assert done.count("note: no FlashAttention-3 from") == len(pages)
        assert "records/pack.py" in done  # it went on to packing
    nvidia_smi(pod.bin, 8, A100)
    pod.calls.unlink(missing_ok=True)
    pod.run(code=2, TRACK="track_non_record_16mb")
    assert not pod.asked()


# --- run_8xh100.sh: what a record run refuses ------------------------------


@pytest.mark.slow
def test_a_record_run_refuses_a_handicap(tmp_path):
    """With the reason and the override, before anything is made; without one it goes on."""
    pod, why = Pod(tmp_path), "attention is slow"
    done = pod.run(HANDICAP=why)
    assert why in done and "TRACK=track_non_record_16mb" in done
    assert only_a_log(tmp_path) and not (pod.root / "logs").exists()
    for environ in (dict(), dict(HANDICAP=why, TRACK="track_non_record_16mb")):
        assert "records/pack.py" in pod.run(code=2, **environ)  # the packer is missing here


@pytest.mark.slow
@pytest.mark.parametrize(("pack", "code"), [
    (PACK + "print('warning: too large')", 0), (PACK + "sys.exit(2)", 2), ("raise ValueError", 1)])
def test_an_error_of_the_packer_ends_the_script(tmp_path, pack, code):
    """With its exit code, also where there is a file; a packer that only warns does not."""
    pod = Pod(tmp_path, 1, A100)
    (pod.root / "records" / "pack.py").write_text(pack)
    done = pod.run(code=code or 1, TRACK="track_non_record_16mb")
    assert ("4 settings, data and code (stopped here)" in done) == bool(code)
    assert ("the pre-flight failed" in done) == (not code)
    about = next((tmp_path / "work" / "runs").glob("*/nvidia-smi.txt")).read_text()
    assert "Driver Version : 570.86.10" in about


@pytest.mark.slow
def test_no_go_stops_a_record_only(tmp_path):
    """Before the seeds; the next try measures again, another track goes on to the seeds."""
    pod = Pod(tmp_path)
    (pod.root / "records" / "pack.py").write_text(PACK)
    (pod.root / "records" / "smoke.py").write_text(SMOKE)
    (pod.root / "test_cpu.py").write_text("def test(): pass\n")
    command(pod.bin / "python", f"""case "$2" in
torch.distributed.run) while [ $1 != --nproc_per_node=8 ]; do shift; done; shift;; esac
exec {sys.executable} "$@"
""")
    pod.environ["PYTHON"] = str(pod.bin / "python")
    for verdict, track, seeds in (("NO GO", "10min", 0), ("GO", "10min", 3),
                                  ("NO GO", "non_record", 0)):
        done = pod.run(VERDICT=verdict, TRACK=f"track_{track}_16mb")
        stopped = "no seed is run for a record" in done
        assert stopped == (verdict == "NO GO" and track == "10min")
        assert ("TRACK=track_non_record_16mb" in done) == stopped
        measured = "smoke.py collectives\nrun smoke 16\n" in done
        assert measured == (track == "10min") and "smoke.py report" in done
        assert done.count("run seed") == seeds
        assert stopped or "no folder was made" in done


# --- records/smoke.py -------------------------------------------------------


def events(step_ms: tuple[float, float], device: str = H100, preset: str = "record",
           handicaps: tuple[str, ...] = (), slower: float = 1.0,
           mib: int = 40_000) -> list[dict[str, Any]]:
    """Of a log of the smoke test on eight GPUs."""
    primed = [dict(event="primed", recur=recur, qat=qat, compile_s=31.5, peak_mib=mib,
                   step_ms=step_ms[recur] * slower)
              for qat in (False, True) for recur in (False, True)]
    return [dict(event="config", train_batch_tokens=8 * 98304),
            dict(event="machine", device=device, preset=preset, attention="cudnn (installed)",
                 compiler="inductor", world_size=8, handicaps=[*handicaps]), *primed]


def verdict(folder, capsys, gb_s=300.0, **changes) -> tuple[int, str]:
    """Exit code of the report and what it printed."""
    links = {name: dict(mb=9.5, ms=0.25, gb_s=gb_s)
             for name in ("reduce_scatter", "all_gather", "all_reduce")}
    (folder / "links.json").write_text(json.dumps(links))
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, events(
        smoke.YARDSTICKS["H100"].step_ms, **changes))))
    code = smoke.main(["report", str(folder / "log.jsonl"), str(folder / "links.json")])
    return code, capsys.readouterr().out


def test_the_report_shows_every_figure(tmp_path, capsys):
    """Each phase and collective with its yardstick; the last line is the verdict."""
    code, text = verdict(tmp_path, capsys)
    assert code == 0 and text.splitlines()[-1] == "GO"
    off, on = smoke.YARDSTICKS["H100"].step_ms
    for line in (f"recurrence off: a step +{off:.1f} ms +at most {1.25 * off:.1f}",
                 f"recurrence on, QAT: a step +{on:.1f} ms +at most {1.25 * on:.1f}",
                 "recurrence on: memory +40000.0 MiB +at most",
                 "recurrence off, QAT: compilation +31.5 s\n",
                 "all_gather of 9.5 MB in 0.25 ms +300.0 GB/s +at least"):
        assert re.search(line, text), line
    assert "attention cudnn (installed), compiler inductor" in text


@pytest.mark.parametrize(("changes", "reason"), [
    (dict(slower=1.3), "recurrence on: a step"),
    (dict(mib=80_000), "memory 80000.0 MiB"), (dict(gb_s=30.0), "reduce_scatter of 9.5 MB"),
    (dict(handicaps=("nothing is compiled",)), "nothing is compiled")])
def test_each_yardstick_can_say_no(tmp_path, capsys, changes, reason):
    """NO GO with the reason and exit code 1; nothing of it where there is no yardstick."""
    code, text = verdict(tmp_path, capsys, **changes)
    assert code == 1 and text.splitlines()[-1].startswith("NO GO: ")
    assert reason in text.splitlines()[-1]
    for other in (dict(device=A100), dict(preset="demo"), dict(preset="frontier,demo"),
                  dict(preset="frontier")):
        code, text = verdict(tmp_path, capsys, **changes | other)
        assert code == 0 and text.splitlines()[-1].startswith("GO: there is no yardstick")


def test_a_log_without_phases_is_no_go(tmp_path, capsys):
    """A smoke test that ended early proves nothing."""
    (tmp_path / "log.jsonl").write_text(json.dumps(dict(event="config")))
    assert smoke.main(["report", str(tmp_path / "log.jsonl")]) == 1
    assert capsys.readouterr().out.startswith("NO GO")


@pytest.mark.slow
def test_the_smoke_test_on_two_ranks(tmp_path):
    """Collectives at the sizes of the step's buffers, for real; one rank sends nothing."""
    for ranks in (1, 2):
        done = h.python([*h.TORCHRUN, f"--nproc_per_node={ranks}", smoke.__file__, "collectives",
                         "c.json"], tmp_path, dict(PRESET="demo", VOCAB_SIZE="300",
                                                   OMP_NUM_THREADS="1"))
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "c.json").read_text())
        assert len(found) == (3 if ranks == 2 else 0)
    c = t.Config(**t.PRESETS["demo"], vocab_size=300)
    assert found["all_gather"]["mb"] == found["reduce_scatter"]["mb"] > 1  # fp32 on a CPU
    assert found["all_reduce"]["mb"] >= 4 * 300 * c.model_dim / 1e6
    for name, link in found.items():
        passes = 1 + (name == "all_reduce")
        assert link["gb_s"] == pytest.approx(passes / 2 * link["mb"] / link["ms"])
