"""What all tests share: tiny settings, models, data and trainers, and whole runs of the script.

It is loaded as a plugin (.pytest.ini), so its fixtures are known in every test. Elsewhere
`import harness as h`. Nothing here takes a value from the defaults of a record run: `TINY` gives
every setting, so a changed default changes no test but the test of the defaults.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import retokenize_scylla as R
import train_gpt as t
from records.demo_data import train_sentencepiece
from records.vocabulary import FIRST, vocabulary_yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_gpt.py"
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no reference data in {SHARED}")

torch.set_num_threads(1)  # tiny tensors: threads only cost, and much where cores are shared

# ------------------------------------------------------------------------------- settings

PLAIN = dict(  # without the levers of PRESET=frontier
    recur_passes=2, attn_gate_dims=0, skip_gate=False, doc_attention=False, asym_softcap=False,
    muon_coefficients="quintic", muon_wd_taper=(), ttt_kind="chunk", ttt_doc_chunk=48,
    ttt_doc_batch=0, ttt_global_docs=0, ttt_lora_rank=80, ttt_lora_alpha=144.0, ttt_lora_lr=1e-4,
    ttt_lora_wd=1.0,
)  # fmt: skip
PUBLISHED = dict(  # SPEC section 1, and the settings that it leaves open
    preset=("published",), run_id="", seed=1337, data_seed=0,
    data_path="./data/datasets/fineweb10B_scylla", tokenizer_path="", tokenizer_meta_path="",
    vocab_size=0, dry_run=False,
    num_layers=11, model_dim=512, num_heads=8, num_kv_heads=4, mlp_mult=3.0, tie_embeddings=True,
    rope_base=10000.0, rope_dims=16, logit_softcap=30.0, qk_gain_init=1.5, ln_scale=True,
    xsa_last_n=4, smear_enabled=True, bigram_vocab_size=2048, bigram_dim=128, ve_enabled=True,
    ve_dim=128, ve_layers=(9, 10), activation_neg_slope=0.5, parallel_start_layer=7,
    recur_layers=(4, 5), recur_start_step=3000.0, recur_untie_mlp=True, **PLAIN,
    train_batch_tokens=786432, micro_batch_tokens=0, train_seq_len=2048, iterations=20000,
    warmdown_iters=3500.0, warmup_steps=20, max_wallclock_seconds=600.0, matrix_lr=0.025,
    scalar_lr=0.025, tied_embed_lr=0.035, embed_lr=0.6, head_lr=0.008, tied_embed_init_std=0.005,
    min_lr=0.0, muon_momentum=0.99, muon_momentum_warmup_start=0.92,
    muon_momentum_warmup_steps=1500, muon_backend_steps=5, muon_wd=0.04, muon_row_norm=False,
    adam_wd=0.04, beta1=0.9, beta2=0.95, adam_eps=1e-8, grad_clip_norm=0.3, ema_decay=0.997,
    swa_enabled=False, swa_every=50, late_qat_threshold=0.15, quant="rtn",
    gptq_calibration_seqs=64, n_int6_layers=4, class_bits="", compressor="auto",
    size_limit=16_000_000, artifact_path="final_model.int6.ptz", load_artifact="",
    eval_seq_len=2048, eval_stride=64, eval_modes=("roundtrip", "sliding", "ttt", "ngram", "slot"),
    ttt_enabled=True, ttt_lr=0.005, ttt_epochs=3, ttt_chunk_tokens=32768, ttt_freeze_blocks=2,
    ttt_momentum=0.9, ttt_batch_seqs=32, ttt_grad_clip=1.0, ngram_enabled=False, ngram_order=5,
    ngram_weight=0.05, slot_enabled=False, slot_steps=8, slot_lr=0.005, val_batch_size=524288,
    val_loss_every=4000, val_tokens_limit=0, scores_path="", train_log_every=500,
    checkpoint_every=0.0, checkpoint_keep=2, checkpoint_path="checkpoints", resume=False,
    attention="auto", mlp_kernel="auto", torch_compile_disable=False,
)  # fmt: skip
VOCAB, BOS = 300, 299  # of the tiny data; its last id is the boundary
RECORD = PUBLISHED | dict(  # docs/studies.md says why
    preset=("record",), skip_gate=True, matrix_lr=0.026, scalar_lr=0.02, tied_embed_lr=0.03,
    min_lr=0.1, muon_row_norm=True, beta2=0.99, quant="gptq", n_int6_layers=None,
)  # fmt: skip
TINY = dict(
    preset=("record",), run_id="", seed=1337, data_seed=0,
    data_path="./data/datasets/fineweb10B_scylla", tokenizer_path="", tokenizer_meta_path="",
    vocab_size=0, dry_run=False,
    num_layers=4, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=3.0, tie_embeddings=True,
    rope_base=10000.0, rope_dims=8, logit_softcap=30.0, qk_gain_init=1.5, ln_scale=True,
    xsa_last_n=2, smear_enabled=True, bigram_vocab_size=64, bigram_dim=8, ve_enabled=True, ve_dim=8,
    ve_layers=(2, 3), activation_neg_slope=0.5, parallel_start_layer=3, recur_layers=(1, 2),
    recur_start_step=3.0, recur_untie_mlp=True, **PLAIN, train_batch_tokens=256,
    micro_batch_tokens=0, train_seq_len=32, iterations=8, warmdown_iters=20.0, warmup_steps=2,
    max_wallclock_seconds=0.0,
    matrix_lr=0.025, scalar_lr=0.025, tied_embed_lr=0.035, embed_lr=0.6, head_lr=0.008,
    tied_embed_init_std=0.005, min_lr=0.0, muon_momentum=0.95, muon_momentum_warmup_start=0.85,
    muon_momentum_warmup_steps=4, muon_backend_steps=5, muon_wd=0.04, muon_row_norm=False,
    adam_wd=0.04, beta1=0.9, beta2=0.95, adam_eps=1e-8, grad_clip_norm=0.3, ema_decay=0.9,
    swa_enabled=False, swa_every=1, late_qat_threshold=0.25, quant="gptq",
    gptq_calibration_seqs=64, n_int6_layers=2, class_bits="", compressor="auto",
    size_limit=16_000_000, artifact_path="final_model.int6.ptz", load_artifact="",
    eval_seq_len=32, eval_stride=8, eval_modes=("roundtrip", "sliding", "ttt", "ngram", "slot"),
    ttt_enabled=True, ttt_lr=0.005, ttt_epochs=3, ttt_chunk_tokens=32768, ttt_freeze_blocks=1,
    ttt_momentum=0.9, ttt_batch_seqs=32, ttt_grad_clip=1.0, ngram_enabled=False, ngram_order=5,
    ngram_weight=0.05, slot_enabled=False, slot_steps=8, slot_lr=0.005, val_batch_size=512,
    val_loss_every=0, val_tokens_limit=0, scores_path="", train_log_every=1, checkpoint_every=0.0,
    checkpoint_keep=2, checkpoint_path="checkpoints", resume=False, attention="auto",
    mlp_kernel="auto", torch_compile_disable=False,
)  # fmt: skip
DEEP = TINY | dict(  # six layers: lanes, recurrence and skips apart from each other
    num_layers=6, num_heads=4, num_kv_heads=2, mlp_mult=2.0, rope_dims=4, logit_softcap=5.0,
    xsa_last_n=3, bigram_vocab_size=50, ve_layers=(1, 4), parallel_start_layer=4,
    recur_layers=(2, 3), train_seq_len=16, eval_seq_len=16, train_batch_tokens=64,
    val_batch_size=256, warmdown_iters=4, warmup_steps=0, muon_momentum_warmup_steps=4,
    ema_decay=0.98, swa_every=10, late_qat_threshold=0.15, compressor="zlib", ttt_lr=0.03,
    ttt_chunk_tokens=2048,
)  # fmt: skip
LEVERS = dict(  # those that change what the model computes, all on
    recur_passes=3, recur_untie_mlp=False, attn_gate_dims=12, skip_gate=True, doc_attention=True,
    asym_softcap=True,
)  # fmt: skip
SHALLOW = dict(num_layers=2, parallel_start_layer=1, recur_layers=(0,), ve_layers=(0, 1),
               xsa_last_n=1)  # fmt: skip
PHASES = [t.Phase(recur, qat) for qat in (False, True) for recur in (False, True)]


def config(base: dict = TINY, **changes) -> t.Config:
    """A Config that contradicts nothing."""
    c = t.Config(**(base | changes))
    assert t.contradictions(c) == []
    return c


def environ(**changes) -> dict[str, str]:
    """The tiny settings as environment variables."""
    return {name.upper(): t.show(value) for name, value in (TINY | changes).items()}


def problems(variables: dict, cuda: bool = True) -> str:
    """Text of the RunError that an environment raises."""
    with pytest.raises(t.RunError) as caught:
        t.Config.from_env(variables, cuda)
    return str(caught.value)


def report(capsys, *lines: str) -> None:
    """Print lines past pytest's capture."""
    with capsys.disabled():
        print("", *lines, sep="\n    ")


# ------------------------------------------------------------------------- runtime, model


def runtime(rank: int = 0, world: int = 1, device: str = "cpu") -> t.Runtime:
    """A Runtime without log, process group or files; its collectives do nothing."""
    made = object.__new__(t.Runtime)
    made.rank, made.world, made.cuda, made.compiles = rank, world, False, False
    made.local_rank, made.local_world = rank, world
    made.device, made.dtype = torch.device(device), torch.float32
    made.attention, made.document_mask, made.fused_mlp = t.sdpa, t.dense_mask, False
    made.attention_name = "sdpa"
    made.signal, made.defer_signals = 0, False
    made.log = types.SimpleNamespace(line=lambda *_, **__: None, event=lambda *_, **__: None,
                                     run_id="none")
    made.all_reduce = lambda tensor: tensor
    return made


def on_ranks(world: int, work: Callable[[t.Runtime], Any]) -> list[Any]:
    """What `work` returns on each of `world` threads, which stand for ranks: all_reduce sums."""
    barrier, sums, results = threading.Barrier(world), {}, {}

    def run(rank: int) -> None:
        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            sums[rank] = tensor.clone()
            barrier.wait(60)
            total = sum(sums[other] for other in range(world))
            barrier.wait(60)
            return total

        on = runtime(rank, world)
        on.all_reduce = all_reduce
        results[rank] = work(on)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return [results[rank] for rank in range(world)]


def choices(patch: pytest.MonkeyPatch, c: t.Config, attention: list, mlp: list,
            compiles: bool = False) -> tuple:  # fmt: skip
    """What a runtime on CUDA chooses and says, if candidates take so long or raise an error."""
    def timed(results):
        left = iter(results)

        def device_ms(work):
            if isinstance(ms := next(left), Exception):
                raise ms
            return ms

        patch.setattr(t, "device_ms", device_ms)
        return on, c, 1

    on = runtime()
    on.cuda, on.compiles, on.compile = True, compiles, lambda module: module
    patch.setattr(torch, "compile", lambda function, **_: function)
    patch.setattr(t, "use_attention", lambda name: (lambda *_: None, t.dense_mask))
    return *t.select_attention(*timed(attention)), *t.select_mlp(*timed(mlp))


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Noise on every tensor, by its name, so that no path of the model is dead."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            random = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))


def random_model(c: t.Config, recur: bool = True, seed: int | None = 0, vocab: int = VOCAB
                 ) -> t.GPT:  # fmt: skip
    """A model on the CPU in the given phase; with `seed` None it has its initial values."""
    model = t.GPT(c, table(vocab).is_boundary, runtime())
    if seed is not None:
        randomize(model, seed)
    model.set_phase(t.Phase(recur=recur and bool(c.recur_layers)))
    return model


def ids(shape: tuple = (2, 16), seed: int = 3, bos: tuple = ((0, 5), (1, 1), (1, 9))
        ) -> torch.Tensor:  # fmt: skip
    """Random ids without boundaries except at `bos`."""
    out = torch.randint(0, BOS, shape, generator=torch.Generator().manual_seed(seed))
    for row, place in bos:
        out[row, place] = BOS
    return out


def matrices(*shapes: tuple, seed: int = 2) -> list[torch.Tensor]:
    """Random matrices."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random) for shape in shapes]


def digest(tensors) -> list[tuple]:
    """Names, shapes and bits of tensors as one comparable value."""
    return [(n, tuple(p.shape), hashlib.sha256(p.detach().numpy().tobytes()).hexdigest())
            for n, p in tensors]


# ----------------------------------------------------------------------------------- data


def table(vocab: int = VOCAB, path: Path = Path("none")) -> t.ByteTable:
    """A byte table: 1 to 3 bytes, every third id with a leading space, the last id a boundary."""
    each = np.arange(vocab)
    boundary = each == vocab - 1
    return t.ByteTable(np.where(boundary, 0, 1 + each % 3), (each % 3 == 0) & ~boundary, boundary,
                       path)


def write_meta(path: Path, about: t.ByteTable, **changes) -> Path:
    """Write a byte table as the re-tokenizer does; an array of None is left out."""
    arrays = dict(base_bytes=about.base_bytes.astype(np.int16), vocab_size=len(about.base_bytes),
                  has_leading_space=about.has_leading_space, is_boundary_token=about.is_boundary)
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
    return path


def replace_file(path: Path, data: bytes) -> Path:
    """Put a new file in the place of one that a loader's thread may still have mapped.

    Truncating a mapped file under its reader is a bus error, whoever does it.
    """
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def write_shard(path: Path, tokens, magic: int = 20240520, version: int = 1,
                count: int | None = None) -> Path:
    """Write a shard as SCYLLA.md section 3 says; a wrong header on request."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.parent.mkdir(parents=True, exist_ok=True)
    return replace_file(path, header.tobytes() + np.asarray(tokens).astype("<u2").tobytes())


def read_shard(path: Path) -> list[int]:
    """Ids of a shard, its header checked."""
    header, tokens = np.fromfile(path, "<i4", 256), np.fromfile(path, "<u2", offset=1024)
    assert header[:3].tolist() == [20240520, 1, tokens.size] and not header[3:].any()
    return tokens.tolist()


def stream(count: int, seed: int, vocab: int = VOCAB) -> np.ndarray:
    """Ids with structure to learn: documents of 5 to 60 ids, each after the boundary id."""
    random, out = np.random.default_rng(seed), []
    while len(out) < count:
        length = int(random.integers(5, 60))
        out += [vocab - 1, *((random.zipf(1.5, length) * 7 + np.arange(length)) % (vocab - 1))]
    return np.array(out[:count])


def source_bytes(tokens, about: t.ByteTable) -> int:
    """Bytes of a shard, counted one id at a time."""
    total, previous = 0, None
    for i in tokens:
        total += int(about.base_bytes[i])
        after_text = previous is not None and not about.is_boundary[previous]
        total += bool(about.has_leading_space[i]) and after_text
        previous = i
    return total


def dataset(folder: Path, vocab: int = VOCAB, val: tuple = (400, 300), byte_exact: bool = True
            ) -> Path:  # fmt: skip
    """Shards, byte table and manifest in a folder, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    write_meta(folder / "tiny.meta.npz", table(vocab))
    entries = {}
    for split, sizes in (("train", (3000, 2000)), ("val", val)):
        for n, size in enumerate(sizes):
            tokens = stream(size, seed=17 * n + (split == "val"), vocab=vocab)
            path = write_shard(folder / f"fineweb_{split}_{n:06d}.bin", tokens)
            entries[path.name] = dict(source_bytes=source_bytes(tokens, table(vocab)),
                                      bad_documents=0)
    about = dict(tokenizer=dict(byte_exact=byte_exact, sha256="5" * 64), shards=entries)
    (folder / "manifest.json").write_text(json.dumps(about))
    return folder


def read_manifest(folder: Path) -> dict:
    """The manifest of a dataset."""
    return json.loads((folder / "manifest.json").read_text())


def edit_manifest(folder: Path, change: Callable[[dict], Any]) -> None:
    """Rewrite the manifest of a dataset through `change`."""
    about = read_manifest(folder)
    change(about)
    (folder / "manifest.json").write_text(json.dumps(about))


def audit(folder: Path, **settings) -> t.Validation:
    """Validation data of a dataset."""
    c = config(data_path=str(folder), **settings)
    return t.load_validation(c, t.load_byte_table(c))


def evaluator(folder: Path, rank: int = 0, world: int = 1, **settings) -> t.Evaluator:
    """An Evaluator on the validation data of a dataset."""
    c = config(data_path=str(folder), **settings)
    return t.Evaluator(runtime(rank, world), c, audit(folder, **settings))


def loader(folder: Path, rank: int = 0, world: int = 1, **changes) -> t.Loader:
    """A Loader over shards in which every id occurs once, so that ids tell where they are from."""
    if not list(folder.glob("*.bin")):
        for n, (start, size) in enumerate([(0, 1000), (1000, 531), (1531, 40), (1571, 33)]):
            write_shard(folder / f"fineweb_train_{n}.bin", np.arange(start, start + size))
    c = config(**(dict(data_path=str(folder)) | changes))
    return t.Loader(t.find_shards(c, "train"), c, runtime(rank, world), 65536)


# --------------------------------------------------------------------------- re-tokenizer

TOKENS = [b" the", b"the", b"th", b"he", b" t", b"in", b"ing", b" and", b"and", b", ", b". ",
          b" a", b"er", b"on", b"\xc3\xa9", b"123", b"12", b"ation", b"at", b" of the", b" of"]
WORDS = ("the cat and the hat, 123 things of the nation. caf\u00e9 \u201cquoted\u201d "
         "\u65e5\u672c other moaning rings 42 Zebra_x UN's The").split()


def texts(count: int, seed: int = 0) -> list[str]:
    """Random documents of a few words each."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, 60))) for _ in range(count)]


def write_documents(path: Path, documents: list[str]) -> Path:
    """Documents as JSON lines."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def vocabulary(extra: list[bytes] = TOKENS, case: str = "none") -> bytes:
    """A byte-exact vocabulary of all bytes and some longer tokens, as YAML.

    With case "ascii" there are no capitals, and four of the tokens hold marks.
    """
    marked = [b"\xffz", b"\xfe u", b" \xff", b"d\xff t"] if case == "ascii" else []
    return vocabulary_yaml([*FIRST[case], *extra, *marked], case)


@functools.cache
def sentencepiece_model() -> bytes:
    """A small SentencePiece model of the same kind as SP1024."""
    return train_sentencepiece([text.encode() for text in texts(200)], 300)


def retokenized(documents: Path, source: Path, split: str, output: Path, *more: str) -> Path:
    """Shards of documents, made by the re-tokenizer; `source` is a vocabulary or a model."""
    flag = "--sp-model" if source.suffix == ".model" else "--vocab"
    assert R.main(["--docs", str(documents), flag, str(source), "--split", split, "--output-dir",
                   str(output), "--workers", "1", *more]) == 0
    return output


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included."""
    return {str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(folder.rglob("*")) if file.is_file()}


class Case:
    """A folder with a model, a vocabulary and input shards whose documents cross borders."""

    def __init__(self, folder: Path, documents: int = 40, shards: int = 4, case: str = "none"):
        self.folder, self.output = folder, folder / "out"
        (folder / "in").mkdir(parents=True)
        self.model, self.vocab = folder / "sp.model", folder / "toy.yaml"
        self.model.write_bytes(sentencepiece_model())
        self.vocab.write_bytes(vocabulary(case=case))
        self.processor = R.SentencePieceModel(self.model).processor
        self.documents = [[1, *tokens] for tokens in self.processor.encode(texts(documents, 1))]
        joined = [k for tokens in self.documents for k in tokens]
        cuts = [round(k * len(joined) / shards) for k in range(shards + 1)]
        starts = np.cumsum([0] + [len(tokens) for tokens in self.documents])
        for k in range(shards):
            cuts[k] += int(cuts[k] in starts) if k else 0
        for k in range(shards):
            write_shard(self.shard(k), joined[cuts[k]:cuts[k + 1]])
        self.first_of_shard = np.searchsorted(starts[:-1], cuts)

    def shard(self, k: int) -> Path:
        """An input shard."""
        return self.folder / "in" / f"fineweb_train_{k:06d}.bin"

    def arguments(self, *more: str) -> list[str]:
        """A command line that re-tokenizes the input."""
        return ["--sp-shards", str(self.folder / "in" / "*.bin"), "--sp-model", str(self.model),
                "--vocab", str(self.vocab), "--output-dir", str(self.output), "--workers", "1",
                *more]

    def source(self, k: int) -> list[bytes]:
        """Source text of the documents that begin in a shard, by sp.decode."""
        chosen = self.documents[self.first_of_shard[k]:self.first_of_shard[k + 1]]
        return [self.processor.decode(tokens).encode() for tokens in chosen]


@pytest.fixture
def case(tmp_path) -> Case:
    """A Case of its own."""
    return Case(tmp_path / "case")


@pytest.fixture
def retokenize(monkeypatch, capsys) -> Callable[[list], tuple[int, str]]:
    """The tool in this process, without its signal handlers: arguments -> exit code, output."""
    monkeypatch.setattr(R, "on_signals", lambda _: None)

    def run(arguments: list) -> tuple[int, str]:
        code = R.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


# ------------------------------------------------------------------- whole runs, processes

TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
SWITCHING = dict(  # switches inside: recurrence at step 8, QAT from step 20 on, SWA beside the EMA
    iterations=24, recur_start_step=8.0, warmdown_iters=16, late_qat_threshold=0.3,
    swa_enabled=True, swa_every=2, eval_modes=("roundtrip",), run_id="k", artifact_path="k.ptz",
)  # fmt: skip


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[io.StringIO]:
    """Work in a folder, as a CPU without ranks, with stdout captured; gives the capture."""
    old, captured = os.getcwd(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(captured):
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # on a machine with GPUs too
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        os.chdir(folder)
        try:
            yield captured
        finally:
            os.chdir(old)


def tool(name: str) -> types.ModuleType:
    """A script of records/ as a module."""
    return importlib.import_module(name)


def run_main(folder: Path, module=t, **settings) -> tuple[int, str]:
    """`main` of the script in this process, as if started in a folder: (exit code, console)."""
    folder.mkdir(exist_ok=True, parents=True)
    with pytest.MonkeyPatch.context() as patch, inside(folder) as console:
        for name, value in environ(**settings).items():
            patch.setenv(name, value)
        code = module.main([])
    return code, console.getvalue()


def run_switching(folder: Path, data: Path, **settings) -> tuple[int, str]:
    """A tiny run through all phases: (exit code, console)."""
    return run_main(folder, **(SWITCHING | dict(data_path=str(data)) | settings))


def switching(data: Path, **settings) -> dict[str, str]:
    """The environment of such a run, for a process of its own."""
    return environ(**(SWITCHING | dict(data_path=str(data)) | settings)) | {"OMP_NUM_THREADS": "1"}


def clean_environ(**more: str) -> dict[str, str]:
    """This process's environment without CUDA, settings and ranks, and more."""
    names = {f.name.upper() for f in fields(t.Config)} | {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    kept = {k: v for k, v in os.environ.items() if k not in names}
    return kept | dict(CUDA_VISIBLE_DEVICES="", PYTHONDONTWRITEBYTECODE="1") | more


def start(command: list, folder: Path, variables: dict = {}, **options  # noqa: B006
          ) -> subprocess.Popen:  # fmt: skip
    """Python with a clean environment in a folder, in a session of its own; output to pipes."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=folder,
                            env=clean_environ(**variables), start_new_session=True, **options)


def python(command: list, folder: Path, variables: dict = {}, timeout: float = 120  # noqa: B006
           ) -> subprocess.CompletedProcess:  # fmt: skip
    """The same, waited for; a process that takes longer is killed with all that it has started."""
    process = start(command, folder, variables)
    try:
        out, error = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def run_ranks(folder: Path, ranks: int, variables: dict) -> subprocess.CompletedProcess:
    """A finished run of the script under torchrun."""
    return python([*TORCHRUN, f"--nproc_per_node={ranks}", SCRIPT], folder, variables)


def start_script(folder: Path, variables: dict, *launch: str) -> subprocess.Popen:
    """A running script, whose output goes to `console` in its folder."""
    with open(folder / "console", "ab") as console:
        return start(["-u", *launch, SCRIPT], folder, variables, stdout=console,
                     stderr=subprocess.STDOUT)


def wait_for(folder: Path, pattern: str, process: subprocess.Popen, seconds: float = 60) -> None:
    """Wait until the console of a running script matches; its end before that is a failure."""
    deadline = time.monotonic() + seconds
    while not re.search(pattern, (text := (folder / "console").read_text())):
        assert process.poll() is None and time.monotonic() < deadline, text
        time.sleep(0.005)


def events(folder: Path, kind: str, run_id: str = "k") -> list[dict]:
    """The events of a kind in a run's .jsonl."""
    lines = (folder / f"logs/{run_id}.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def losses(folder: Path, run_id: str = "made", key: str = "loss") -> list[float]:
    """Losses, or gradient norms, of a run's steps, to the last digit."""
    return [event[key] for event in events(folder, "train", run_id)]


def score_files(folder: Path) -> dict[str, dict]:
    """SCORES_PATH as {mode: arrays}."""
    return {p.stem: dict(np.load(p, allow_pickle=False)) for p in sorted(folder.glob("*.npz"))}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A tiny dataset that nobody changes."""
    return dataset(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def made(data, tmp_path_factory) -> tuple:
    """A tiny run in this process: (folder, data folder, artifact, console)."""
    folder = tmp_path_factory.mktemp("made")
    with inside(folder) as console:
        t.run(config(data_path=str(data), artifact_path="made.ptz", run_id="made"))
    return folder, data, folder / "made.ptz", console.getvalue()


@pytest.fixture(scope="session")
def script_run(data, tmp_path_factory) -> tuple:
    """The same run as a user starts it, in a process of its own: (folder, console)."""
    folder = tmp_path_factory.mktemp("process")
    variables = environ(data_path=str(data), artifact_path="made.ptz", run_id="made")
    variables |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "VAL_LOSS_EVERY": "4"}
    done = python([SCRIPT], folder, variables)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return folder, done.stdout


@contextlib.contextmanager
def after_step(step: int, action: Callable) -> Iterator[None]:
    """Do something in the training loop when a step has been launched."""
    train_step = t.Trainer.train_step

    def spy(trainer, number):
        train_step(trainer, number)
        if number == step:
            action(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Trainer, "train_step", spy)
        yield


def state_of(folder: Path, step: int, rank: int = 0, run_id: str = "k") -> dict[str, tuple]:
    """Names and bits of the arrays in a rank's share of a checkpoint."""
    path = folder / "checkpoints" / run_id / f"step{step:08d}" / f"rank{rank}"
    with np.load(path, allow_pickle=False) as shard:
        return {n: (a.dtype, a.shape, a.tobytes()) for n, a in shard.items()}


def check_same_run(folder: Path, undisturbed: tuple, resumed: bool = True) -> None:
    """The artifact, all state and all losses are bit for bit those of the undisturbed run."""
    assert (folder / "k.ptz").read_bytes() == (undisturbed[0] / "k.ptz").read_bytes()
    assert state_of(folder, 24) == undisturbed[1]
    seen = [{e["step"]: (e["loss"], e["grad_norm"]) for e in events(path, "train")}
            for path in (folder, undisturbed[0])]
    assert seen[0] == seen[1]
    assert events(folder, "summary")[-1]["resumed"] == resumed


@pytest.fixture(scope="session")
def undisturbed(data, tmp_path_factory) -> tuple:
    """A switching run without faults or checkpoints on the way: (folder, its last state)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, console = run_switching(folder, data)
    assert code == 0 and "resumed: 0" in console and "phase recur:on step:8" in console
    assert "phase qat:on" in console
    state = state_of(folder, 24)
    assert {name.rstrip("0123456789") for name in state} == {
        "weight", "ema", "swa", "step", "exp_avg", "exp_avg_sq", "momentum"}
    return folder, state


@pytest.fixture(scope="session")
def two_checkpoints(data, tmp_path_factory) -> Path:
    """The folder of a switching run that was stopped with two checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    with after_step(13, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
        assert run_switching(folder, data, checkpoint_every=1e-6)[0] == 75
    assert len(list((folder / "checkpoints/k").iterdir())) == 2
    return folder


# ------------------------------------------------------------------------------- training


def build_trainer(c: t.Config, on: t.Runtime) -> t.Trainer:
    """A Trainer on the data of its configuration."""
    about = t.load_byte_table(c)
    model = t.GPT(c, about.is_boundary, on)
    batches = t.Loader(t.find_shards(c, "train"), c, on, model.vocab_size)
    return t.Trainer(model, batches, t.Evaluator(on, c, t.load_validation(c, about)))


@pytest.fixture
def make_trainer(tmp_path, monkeypatch, data) -> Iterator[Callable[..., t.Trainer]]:
    """A function that builds a Trainer of six layers, with a log, in a folder of the test's own."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    made = []

    def make(**settings) -> t.Trainer:
        c = config(DEEP, data_path=str(data), run_id=f"run{len(made)}",
                   artifact_path=str(tmp_path / "model.ptz"), **settings)
        made.append(t.Runtime(c))
        return build_trainer(c, made[-1])

    yield make
    for each in made:
        each.close()


class DeviceEvent(NamedTuple):
    """An event of a fake device, and when it is done."""

    device: Device
    done: float

    def query(self) -> bool:
        """Whether the device has passed the event."""
        return self.device.now >= self.done

    def elapsed_time(self, later: DeviceEvent) -> float:
        """Milliseconds between two events."""
        return later.done - self.done

    def synchronize(self) -> None:
        """Wait for it."""
        self.device.wait(self.done)


class Device:
    """A fake device that works behind the host: times in ms, and how often the host has waited."""

    def __init__(self, now: float = 0.0) -> None:
        self.now, self.done, self.waits = now, now, 0

    def work(self, ms: float) -> None:
        """Queue work."""
        self.done = max(self.now, self.done) + ms

    def event(self) -> DeviceEvent:
        """An event after all that is queued."""
        return DeviceEvent(self, max(self.now, self.done))

    def wait(self, until: float) -> None:
        """Let the host wait."""
        self.waits, self.now = self.waits + 1, max(self.now, until)

    def synchronize(self) -> None:
        """Wait for all that is queued."""
        self.wait(self.done)


def trainer_events(trainer: t.Trainer, kind: str) -> list[dict]:
    """The events of a kind that a Trainer has logged."""
    return events(Path(), kind, trainer.log.run_id)


def trainer_losses(trainer: t.Trainer) -> list[float]:
    """The losses that it has logged, every digit."""
    return [event["loss"] for event in trainer_events(trainer, "train")]


def momentum(muon: t.Muon) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The momentum of each matrix, with one rank."""
    params = [p for stack in muon.stacks for p in stack.params]
    return dict(zip(params, muon.matrices(muon.momentum[None], muon.stacks), strict=True))


SHAPES = [(24, 24), (48, 16), (16, 48), (24, 24), (16, 48)]


def run_muon(c: t.Config, dtype: torch.dtype, scale: float, momentum: float, steps: int) -> tuple:
    """Muon over SHAPES for some steps; returns (initial weights, gradients, final weights)."""
    params = [torch.nn.Parameter(w) for w in matrices(*SHAPES)]
    first = [p.detach().clone() for p in params]
    grads = [matrices(*SHAPES, seed=10 + step) for step in range(steps)]
    on = runtime()
    on.dtype = dtype
    muon = t.Muon([params[:2], params[2:]], c, on)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        muon_step(muon, scale, momentum)
    return first, grads, [p.detach() for p in params]


def muon_step(muon: t.Muon, scale: float, momentum: float) -> None:
    """One unclipped update at `scale` times MATRIX_LR."""
    muon.reduce()
    muon.start(torch.ones(1), momentum)
    muon.finish(scale * muon.config.matrix_lr)


def muons_of(c: t.Config, world: int, calls: list) -> tuple[list, list[t.Muon]]:
    """Muon on several ranks in this one thread, whose collectives read each other's rows."""
    params = [[torch.nn.Parameter(w) for w in matrices(*SHAPES)] for _ in range(world)]
    runtimes = [runtime(rank, world) for rank in range(world)]
    muons = [t.Muon([p[:2], p[2:]], c, r) for p, r in zip(params, runtimes, strict=True)]

    def reduced(rank, rows):
        calls.append("reduce")
        return sum(muon.grads[rank] for muon in muons)

    def gathered(rank, rows):
        calls.append("gather")
        return lambda: [rows[r].copy_(muons[r].updates[r]) for r in range(world)]

    for rank, each in enumerate(runtimes):
        each.reduce_scatter = functools.partial(reduced, rank)
        each.all_gather = functools.partial(gathered, rank)
    return params, muons


def compile_phases(backend) -> tuple[list, list]:
    """(eager, compiled) losses and gradients of two passes over the four phases."""
    torch._dynamo.reset()
    model = random_model(config(DEEP, **SHALLOW))
    if backend == "inductor":  # as a run on CUDA compiles
        compiled = t.Runtime.compile(types.SimpleNamespace(compiles=True), model)
    else:
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    tokens, results = ids((2, 17)), ([], [])
    for phase in PHASES * 2:
        model.set_phase(phase)
        for out, forward in zip(results, (model, compiled), strict=True):
            model.zero_grad()
            loss = forward(tokens[:, :-1], tokens[:, 1:]).mean()
            loss.backward()
            out.append((loss.detach(), model.blocks[0].attn.q.weight.grad.clone()))
    return results


def compare_ranks(folder: Path, data: Path, *rank_counts: int, **settings) -> None:
    """Check losses and artifact sizes of runs on several ranks against one rank's."""
    settings |= dict(iterations=30, swa_enabled=False, late_qat_threshold=0.0)
    assert run_switching(folder / "ranks1", data, **settings)[0] == 0
    for ranks in rank_counts:
        other = folder / f"ranks{ranks}"
        other.mkdir()
        done = run_ranks(other, ranks, switching(data, **settings))
        assert done.returncode == 0 and "all_ranks_at_step:30\n" in done.stdout, done.stderr
        alone, together = (losses(path, "k") for path in (folder / "ranks1", other))
        assert len(alone) == 30
        np.testing.assert_allclose(together, alone, rtol=1e-5)
        sizes = [(path / "k.ptz").stat().st_size for path in (folder / "ranks1", other)]
        assert max(sizes) < 1.002 * min(sizes)


# ----------------------------------------------------------------- quantization, artifact

CODES = {  # kind of codes -> (how many, generator) -> codes
    "gaussian": lambda n, r: np.clip(np.round(r.normal(0, 5, n)), -31, 31),
    "constant": lambda n, r: np.full(n, -3), "two": lambda n, r: r.integers(0, 2, n),
    "every symbol": lambda n, r: np.resize(np.arange(-128, 128), n),
    "rare": lambda n, r: (r.random(n) < 1e-4) * 100,
    "mixed": lambda n, r: np.round(r.normal(0, np.repeat([1, 40], -(-n // 2))[:n]).clip(-127, 127)),
}  # fmt: skip


def hard_rows(columns: int = 700) -> torch.Tensor:
    """Rows that are Gaussian, heavy-tailed, one-sided, with outliers, tiny, large, or zero."""
    rows = torch.randn(12, columns, generator=torch.Generator().manual_seed(0))
    rows[1] = rows[1] ** 5
    rows[2] = rows[2].abs()
    rows[3, 17] = 1000.0
    rows[4] *= 1e-9
    rows[5] *= 3000
    rows[6] = 0
    rows[7] = 0
    rows[7, 3] = -2.5
    rows[8, :3] = torch.tensor([50.0, -70.0, 90.0])
    rows[9] = 0.25
    rows[10] *= 1e-6
    return rows


def gptq_problem(n: int = 2, rows: int = 20, columns: int = 150) -> tuple:
    """Weights, Hessians, scales, 5 bits and correlated inputs of n matrices, wider than a block."""
    inputs = []
    for seed in range(n):
        random = torch.Generator().manual_seed(seed)
        mixed = torch.randn(columns, columns, generator=random) * torch.linspace(0.05, 2, columns)
        inputs.append(torch.randn(1500, columns, generator=random) @ mixed)
    x, (weight,) = torch.stack(inputs), matrices((n, rows, columns), seed=9)
    scales = torch.stack([t.row_scales(w, 5, 0.4) for w in weight])
    return weight, x.mT @ x, scales, torch.full((n, 1, 1), 5.0), x


def artifact(path: Path, compressor: str = "auto", **settings) -> tuple[t.Config, dict]:
    """An artifact of a random tiny model; returns (config, stored tensors)."""
    c = config(**settings)
    stored = t.quantize({n: p.detach() for n, p in random_model(c).named_parameters()}, c)
    shape = {name.upper(): t.show(getattr(c, name)) for name in t.MODEL_FIELDS}
    header = dict(model=shape, vocab_size=VOCAB, vocab_sha256="5" * 64)
    t.write_artifact(path, header, stored, compressor)
    return c, stored


def codecs() -> list[str]:
    """Codecs that are installed."""
    return [c for c in t.CODECS if c != "zstd" or t.zstandard_module()]


def parts(path: Path) -> tuple[dict, bytes]:
    """(header, streams) of an artifact, read without the code under test."""
    data = path.read_bytes()
    assert data[:10] == b"PROTEUS 4\n"
    end = 46 + struct.unpack("<I", data[42:46])[0]
    return json.loads(zlib.decompress(data[46:end])), data[end:]


def forge(path: Path, header: dict | bytes, body: bytes, sha256: bytes | None = None) -> None:
    """Write an artifact with any header; its digest is right for zlib streams, unless given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    packed = zlib.compress(text)
    rest, raw, left = struct.pack("<I", len(packed)) + packed + body, b"", body
    with contextlib.suppress(zlib.error):
        while left:
            part = zlib.decompressobj(-15)
            raw, left = raw + part.decompress(left), part.unused_data
    path.write_bytes(b"PROTEUS 4\n" + (sha256 or hashlib.sha256(rest + raw).digest()) + rest)


def refused(path: Path, action: Callable[[], Any]) -> str:
    """The text of the ArtifactError that `action` raises; it must name the file."""
    with pytest.raises(t.ArtifactError) as caught:
        action()
    assert str(path) in str(caught.value)
    return str(caught.value)


def load_tiny(path: Path, **settings) -> t.GPT:
    """Load a model as an evaluation does."""
    about = types.SimpleNamespace(vocab_sha256="5" * 64)
    return t.load_model(str(path), about, table(), runtime(), config(**settings))


SMALLEST = dict(model_dim=16, num_layers=2, ve_layers=(1,), recur_layers=(0,), mlp_mult=0.5,
                parallel_start_layer=1, n_int6_layers=0, bigram_dim=2, ve_dim=2)


@pytest.fixture(scope="session")
def small_artifact(tmp_path_factory) -> Path:
    """Path of a small artifact, packed by zlib."""
    path = tmp_path_factory.mktemp("small") / "small.ptz"
    artifact(path, "zlib", **SMALLEST)
    return path


@pytest.fixture(scope="session")
def all_codecs(tmp_path_factory) -> tuple[Path, dict, bytes]:
    """A small artifact whose streams use every codec: (path, header, body)."""
    path = tmp_path_factory.mktemp("codecs") / "small.ptz"
    turn = iter(["rans", "zlib", "lzma", *(["zstd"] if t.zstandard_module() else []),
                 *9 * ["rans"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t, "smallest", lambda raw, _: (c := next(turn), t.coder(c)[0](raw)))
        artifact(path, "auto", **SMALLEST)
    header, body = parts(path)
    assert len({s[1] for s in header["streams"]}) >= 3
    return path, header, body


def export(model: t.GPT, c: t.Config, folder: Path, hessians: dict = {}  # noqa: B006
           ) -> tuple[int, list[str], list[tuple]]:  # fmt: skip
    """(total bytes, log lines, events) of an export to x.ptz."""
    lines, seen, on = [], [], runtime()
    on.on_first_rank = lambda work: work()
    on.log = types.SimpleNamespace(line=lambda text, *_: lines.append(text),
                                   event=lambda kind, template="", **v: seen.append((kind, v)))
    c = replace(c, artifact_path=str(folder / "x.ptz"))
    about = types.SimpleNamespace(vocab_sha256="5" * 64)
    total = t.export_model(model, hessians, about, on, c)
    assert total == Path(c.artifact_path).stat().st_size + SCRIPT.stat().st_size
    return total, lines, seen


@pytest.fixture(scope="session")
def fit_model() -> tuple:
    """A model of middle size, all its matrices random: (config, model, Hessians, code size)."""
    c = config(DEEP, num_layers=4, parallel_start_layer=2, ve_layers=(1,), recur_layers=(1,),
               mlp_mult=3.0, compressor="rans", n_int6_layers=None)
    model = random_model(c)
    tokens = torch.randint(300, (16, 16), generator=torch.Generator().manual_seed(2))
    return c, model, t.input_hessians(model, (tokens,), runtime()), SCRIPT.stat().st_size


# ----------------------------------------------------- evaluation, watched: nats and events

SHORT_VOCAB = 24  # its last id is the boundary
SHORT = TINY | dict(
    num_layers=3, model_dim=16, rope_dims=4, xsa_last_n=1, bigram_vocab_size=16, bigram_dim=4,
    ve_dim=4, ve_layers=(2,), parallel_start_layer=2, recur_layers=(1,), eval_seq_len=16,
    eval_stride=4, val_batch_size=64, ttt_chunk_tokens=24, ttt_lr=0.5, ttt_epochs=2,
    ttt_batch_seqs=1, ngram_weight=0.3, ngram_order=3, scores_path="kept by the harness",
    slot_lr=0.1, ttt_doc_chunk=3, ttt_doc_batch=3, ttt_lora_rank=2, ttt_lora_alpha=4.0,
    ttt_lora_lr=0.05,
)  # fmt: skip
DOCUMENTS = dict(eval_modes=("ttt",), ttt_kind="document")
MODES = {  # name: settings of a run whose last mode is the one meant
    "roundtrip": dict(eval_modes=("roundtrip",)),
    "sliding": dict(eval_modes=("sliding",)),
    "ttt": dict(eval_modes=("ttt",)),
    "documents": DOCUMENTS,
    "documents_global": DOCUMENTS | dict(ttt_global_docs=3),
    "ngram_sliding": dict(eval_modes=("ngram",), ngram_enabled=True, ttt_enabled=False),
    "ngram_ttt": dict(eval_modes=("ngram",), ngram_enabled=True),
}
PLANS = [dict(), dict(eval_stride=16, ttt_chunk_tokens=16), dict(
    eval_seq_len=8, eval_stride=3, ttt_chunk_tokens=20, ttt_batch_seqs=2)]


def short_stream(count: int = 75, seed: int = 0) -> np.ndarray:
    """Random ids in documents of 4 to 12; no two windows are alike."""
    random, out = np.random.default_rng(seed), []
    while len(out) < count:
        out += [SHORT_VOCAB - 1,
                *random.integers(0, SHORT_VOCAB - 1, int(random.integers(4, 12)))]
    return np.array(out[:count], np.uint16)


def short_evaluator(c: t.Config, tokens: np.ndarray, on: t.Runtime | None = None) -> t.Evaluator:
    """An Evaluator of a stream in which every target has one byte."""
    return t.Evaluator(on or runtime(), c, t.Validation(
        tokens, np.ones(len(tokens) - 1, np.int16), "unverified", ""))


def record_chunks(patch: pytest.MonkeyPatch, seen: list, targets: int) -> None:
    """Note plans of windows, reads and counts of the cache and steps of SGD in `seen`."""
    def recorded(kind, function):
        def wrapped(self, part):
            result = function(self, part)
            counted = int(self.levels[0][2].sum())  # all targets that any count holds
            seen.append((kind, list(range(*part.indices(targets))), counted))
            return result
        return wrapped

    def plan(*arguments, original=t.plan_windows):
        windows = original(*arguments)
        seen.append(("plan", windows))
        return windows

    step = torch.optim.SGD.step
    patch.setattr(t, "plan_windows", plan)
    patch.setattr(t.NgramCache, "probabilities", recorded("read", t.NgramCache.probabilities))
    patch.setattr(t.NgramCache, "update", recorded("count", t.NgramCache.update))
    patch.setattr(torch.optim.SGD, "step", lambda self: seen.append(("update",)) or step(self))


def record_documents(patch: pytest.MonkeyPatch, seen: list) -> None:
    """Note what document TTT gives to the model, its nats, and steps of AdamW in `seen`."""
    def nats_of(self, *inputs, original=t.DocumentTTT.nats_of):
        nats = original(self, *inputs)
        seen.append(("chunk", *(x.detach().clone() for x in (*inputs, nats))))
        return nats

    def adamw(*arguments, original=t.adamw):
        seen.append(("adapt", arguments[3].flatten().tolist()))
        original(*arguments)

    patch.setattr(t.DocumentTTT, "nats_of", nats_of)
    patch.setattr(t, "adamw", adamw)


def score(mode: str, tokens: np.ndarray, on: t.Runtime | None = None, watch: bool = True,
          **settings) -> tuple[np.ndarray, list[tuple], dict]:
    """Run evaluate_artifact itself on a random model: (last nats dumped, events, scores).

    Events, in order: ("plan", windows), ("score" or "train", starts, nats), ("update",), ("read" or
    "count", targets, n); of document TTT ("chunk", ids, targets, places, A, B, nats) and ("adapt",
    rates). Rows that are no window of the stream are left out, n is the number of targets in the
    counts. What happens before the evaluation's clock starts is not recorded.
    """
    c = config(**(SHORT | MODES[mode] | settings))
    seen, dumps, model = [], {}, random_model(c, vocab=SHORT_VOCAB)
    judge = short_evaluator(c, tokens, on)
    places = {tuple(tokens[i : i + judge.length].tolist()): i
              for i in range(len(tokens) - judge.length)}

    def begin(to_come, start=judge.start_clock):
        seen.clear()
        start(to_come)

    def hook(module, inputs, outputs):
        if len(inputs) > 2:
            return  # of documents
        kind = "score" if torch.is_inference_mode_enabled() else "train"
        starts = [places.get(tuple(row)) for row in inputs[0].tolist()]
        rows = [i for i, start in enumerate(starts) if start is not None]
        seen.append((kind, [starts[i] for i in rows], outputs.detach().numpy()[rows].copy()))

    with pytest.MonkeyPatch.context() as patch:
        if watch:
            judge.start_clock, _ = begin, model.register_forward_hook(hook)
            record_documents(patch, seen)
        record_chunks(patch, seen, len(tokens) - 1)
        judge.save_scores = lambda label, nats: dumps.update({label: nats.copy()})
        patch.setattr(t, "load_model", lambda *_: model)
        scores = t.evaluate_artifact("", judge, table(SHORT_VOCAB))
    return list(dumps.values())[-1], seen, scores


def ttt_trainer(tokens: np.ndarray | None = None, on: t.Runtime | None = None, **settings
                ) -> tuple[t.TTT, t.Config]:  # fmt: skip
    """A TTT on a random model and stream, with its optimizer, and its configuration."""
    c = config(**(SHORT | settings))
    judge = short_evaluator(c, short_stream() if tokens is None else tokens, on)
    ttt = t.TTT(random_model(c, vocab=SHORT_VOCAB), judge)
    ttt.optimizer, ttt.began = torch.optim.SGD(ttt.params, c.ttt_lr, c.ttt_momentum), 0.0
    return ttt, c
