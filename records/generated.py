"""What a record folder says of its runs: submission.json and README.md, from their logs alone.

`make` writes them, and `verify` writes them again to compare.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator
from importlib import machinery, metadata
from pathlib import Path
from typing import Any

import figures
import pack
from figures import markdown
from folders import Folder, sha256
from runs import PER_RUN, Run
from welch import sample

HERE = Path(__file__).resolve().parent
CAP_BYTES, CAP_MS, CAP_EVAL_SECONDS, RECORD_SEEDS = 16_000_000, 600_000, 600, 3
READABLE = "train_gpt_readable.py"  # the source of a packed train_gpt.py
DAY = r"\d{4}-(0[1-9]|1[0-2])-([0-2]\d|3[01])_"  # what the name of a folder begins with
Found = Iterator[tuple[str, str]]
TYPED = ("author", "github_id", "name", "date", "track")  # all else comes from logs and files


def credits() -> list[dict[str, Any]]:
    """Who found what: technique, where, who, and patterns of the settings of runs that use it."""
    return json.loads((HERE / "credits.json").read_text(encoding="utf-8"))


def attribution(runs: list[Run]) -> dict[str, str]:
    """technique -> who, where: those that the settings switch on and, for scores, the logs show."""
    def used(row: dict[str, Any]) -> bool:
        return all(re.fullmatch("|".join(patterns), runs[0].settings.get(name, ""))
                   for name, patterns in row.get("when", {}).items()) and (
            "stage" not in row or any(row["stage"] in run.scores for run in runs))

    return {row["technique"]: f"{row['who']}, {row['where']}" for row in credits() if used(row)}


def submission(runs: list[Run], typed: dict[str, Any], artifacts: dict[int, str]) -> dict[str, Any]:
    """submission.json of finished runs; `artifacts` are the SHA-256 of each seed's."""
    first = runs[0]
    bpb, loss = (sample([getattr(run.headline, key) for run in runs]) for key in ("bpb", "loss"))
    compliance = dict(
        training_seconds_max=max(run.train_ms for run in runs) / 1e3,
        evaluation_seconds_max=max(run.eval_seconds for run in runs),
        total_bytes_max=max(run.total_bytes for run in runs), seeds=len(runs),
        byte_audit_exact=all(run.audit == "exact" for run in runs),
        scored_bytes=first.audited_bytes, runs_resumed=sum(run.resumed for run in runs))
    return typed | dict(
        val_loss=round(loss.mean, 8), val_bpb=round(bpb.mean, 8),
        val_loss_std=rounded(loss.std), val_bpb_std=rounded(bpb.std),
        headline_mode=first.mode, seeds=[run.seed for run in runs],
        seed_results={str(run.seed): seed_result(run, artifacts.get(run.seed)) for run in runs},
        bytes_total=max(run.total_bytes for run in runs), bytes_code=first.code_bytes,
        model_params=first.params, hardware=f"{first.world} x {first.device}",
        pytorch_version=first.torch, cuda_version=first.cuda or "none (CPU)",
        compliance=compliance, attribution=attribution(runs))


def rounded(deviation: float | None) -> float | None:
    """A deviation with the digits that a log has; None, of one seed, stays."""
    return None if deviation is None else round(deviation, 8)


def seed_result(run: Run, artifact: str | None) -> dict[str, Any]:
    """What submission.json says of a seed."""
    result = dict(val_loss=run.headline.loss, val_bpb=run.headline.bpb)
    for stage in ("roundtrip", "sliding", "ttt", "ngram"):
        if stage in run.scores and run.scores[stage].compliant:
            result[f"{stage}_bpb"] = run.scores[stage].bpb
    return result | dict(
        artifact_bytes=run.artifact_bytes, artifact_sha256=artifact, steps=run.steps,
        step_avg_ms=round(run.step_avg_ms, 2), train_ms=run.train_ms,
        eval_seconds=run.eval_seconds)


def headline(about: dict[str, Any]) -> str:
    """The lines of README.md that give the score."""
    seeds, deviation = about["seeds"], about["val_bpb_std"]
    spread = f"the mean of {len(seeds)} seeds with a standard deviation of {deviation:.5f}" if (
        deviation is not None) else f"of one seed, {seeds[0]}"
    return (f"**{about['val_bpb']:.5f} BPB** ({about['headline_mode']}), {spread}. This is "
            f"{about['val_loss']:.5f} nats per token. The largest seed takes "
            f"{about['bytes_total']:,} bytes, {about['bytes_code']:,} of them code.")


def layers(numbers: str) -> str:
    """Layers of a setting as words: "4,5" is "layers 4 and 5"."""
    *first, last = numbers.split(",")
    return f"layers {', '.join(first)} and {last}" if first else f"layer {last}"


def recurrence(s: dict[str, str]) -> str:
    """The sentence on the layers that run several times; empty if none do."""
    passes = int(s.get("RECUR_PASSES", 2))  # logs of older runs do not name it
    if not s["RECUR_LAYERS"] or passes < 2:
        return ""
    late = float(s["RECUR_START_STEP"])
    start = (f"step {late:g}" if late >= 1 else f"{late:.0%} of the run") if late else "the start"
    times = {2: "twice", 3: "three times"}.get(passes, f"{passes} times")
    several = "," in s["RECUR_LAYERS"]
    again = "the second time" if passes == 2 else "each time after the first"
    own = f", {again} with {'MLPs of their own' if several else 'an MLP of its own'}"
    return (f"From {start} on, {layers(s['RECUR_LAYERS'])} run{'' if several else 's'} {times}"
            f"{own if s['RECUR_UNTIE_MLP'] == '1' else ''}.")


def taper(start_and_end: str) -> str:
    """The sentence on MUON_WD_TAPER; empty where that is."""
    if not start_and_end:
        return ""
    start, end = map(float, start_and_end.split(","))
    return f"From {start:.0%} of the run on, Muon's weight decay falls to {end:.0%} of its value."


def test_time_training(s: dict[str, str]) -> str:
    """The sentence on TTT; logs of older runs do not name its kind."""
    if s.get("TTT_KIND") != "document":
        return (f"Test-time training (TTT) scores each chunk of {s['TTT_CHUNK_TOKENS']} tokens "
                "first and trains on it only afterwards.")
    first = int(s["TTT_GLOBAL_DOCS"])
    phase = (f" The first {first:,} documents train the model itself once they are scored." if first
             else "")
    return (f"Test-time training (TTT) reads each document by itself: adapters of rank "
            f"{s['TTT_LORA_RANK']} learn every chunk of {s['TTT_DOC_CHUNK']} tokens once it is "
            f"scored, and are forgotten at the document's end.{phase}")


def idea(runs: list[Run]) -> str:
    """A paragraph on what the runs had switched on, for authors who write none themselves."""
    s, stages = runs[0].settings, {stage for run in runs for stage in run.scores}
    on = {name for name, value in s.items() if value not in ("", "0", "0.0")}
    snapshots = "the mean of snapshots taken at the end of training (SWA)"
    average = f"an exponential moving average of the weights with decay {s['EMA_DECAY']} (EMA)"
    last = "the weights of the last step"
    exclusive = ("All layers" if int(s["XSA_LAST_N"]) >= int(s["NUM_LAYERS"]) else
                 f"The last {s['XSA_LAST_N']} layers")
    muon = [text for text, there in (
        ("normalised rows (MuonEq-R)", "MUON_ROW_NORM" in on),
        ("the coefficients of Polar Express", s.get("MUON_COEFFICIENTS") == "polar")) if there]
    again, tapered = recurrence(s), taper(s.get("MUON_WD_TAPER", ""))
    sentences = (
        (True, f"The model has {s['NUM_LAYERS']} layers of width {s['MODEL_DIM']} with "
               f"{s['NUM_HEADS']} heads for queries and {s['NUM_KV_HEADS']} for keys and values, "
               f"and MLPs {float(s['MLP_MULT']):g} times as wide with a squared leaky ReLU."),
        (int(s["PARALLEL_START_LAYER"]) < int(s["NUM_LAYERS"]),
         f"From layer {s['PARALLEL_START_LAYER']} on, attention and MLP work in two parallel "
         "lanes, which learned weights merge."),
        (again, again),
        ("XSA_LAST_N" in on, f"{exclusive} use exclusive self-attention (XSA)."),
        ("DOC_ATTENTION" in on, "A token attends to its own document only."),
        ("ATTN_GATE_DIMS" in on, "A learned gate scales what each head gives out; it reads the "
         f"first {s.get('ATTN_GATE_DIMS')} dimensions of the layer's input."),
        ("SKIP_GATE" in on, "The skips pass through learned gates."),
        ("ASYM_SOFTCAP" in on, "Positive and negative logits have a softcap each."),
        ("BIGRAM_VOCAB_SIZE" in on, f"A bigram hash table of {s['BIGRAM_VOCAB_SIZE']} rows adds to "
                                    "the embedding."),
        ("SMEAR_ENABLED" in on, "SmearGate blends in the embedding of the previous token."),
        ("VE_ENABLED" in on, f"The values of {layers(s['VE_LAYERS'])} get value embeddings."),
        (True, "Muon trains the matrices" + (", with " if muon else "") + " and ".join(muon)
         + ", and AdamW trains everything else."),
        (tapered, tapered),
        (True, "What is exported is " + (snapshots if "SWA_ENABLED" in on else average if
                                         "EMA_DECAY" in on else last) + "."),
        ("LATE_QAT_THRESHOLD" in on, "Quantization is simulated in training (QAT) once the "
         f"learning rate is under {float(s['LATE_QAT_THRESHOLD']):g} of its peak."),
        (True, "The matrices are rounded " + ("by GPTQ" if s["QUANT"] == "gptq" else
               "to the nearest step") + " and compressed, so that code and artifact fit into "
               f"{int(s['SIZE_LIMIT']):,} bytes."),
        ("sliding" in stages, "A window that moves by "
         f"{s['EVAL_STRIDE']} tokens gives every token a long context (sliding evaluation)."),
        ("ttt" in stages, test_time_training(s)),
        ("ngram" in stages, f"A cache of n-grams up to order {s['NGRAM_ORDER']}, made of text "
                            "that was scored before, is mixed into the last score."))
    return " ".join(sentence for there, sentence in sentences if there)


def changed_settings(run: Run) -> dict[str, str]:
    """The presets of a run and the settings in which it differs from them, its names apart.

    Of several presets ("frontier,demo") the later ones win.
    """
    import train_gpt

    preset = run.settings["PRESET"]
    defaults = train_gpt.preset_values(tuple(train_gpt.split_list(preset)))
    base = train_gpt.settings_listing(train_gpt.Config(**defaults))
    changed = {name: value for name, value in run.settings.items()
               if name not in PER_RUN | {"PRESET"} and f"{name}={value}" not in base.splitlines()}
    return {"PRESET": preset} | changed


def readme(runs: list[Run], about: dict[str, Any], packed: bool, statistics: str, text: str
           ) -> str:
    """README.md of the folder.

    `packed` says whether train_gpt.py is; `statistics` is the text on means, tests and published
    results, and `text` that on the idea.
    """
    each = {f"seed {run.seed}": [run] for run in runs}
    command = " ".join([*(f"{name}='{value}'" for name, value in changed_settings(runs[0]).items()),
                        "SEED=<seed>", "torchrun --standalone --nproc_per_node="
                        + str(runs[0].world), "train_gpt.py"])
    limits = dict(training_seconds_max=CAP_MS // 1000, seeds=f"at least {RECORD_SEEDS}",
                  evaluation_seconds_max=CAP_EVAL_SECONDS, total_bytes_max=f"{CAP_BYTES:,}",
                  byte_audit_exact=True, runs_resumed=0)
    code = "`train_gpt.py` is the file that ran, and its size counts." + (
        f" It is packed; `{READABLE}` is the source that it was packed from." if packed else "")
    parts = (
        f"# {about['name']}",
        f"{about['author']} (@{about['github_id']}), {about['date']}, {about['track']}. "
        "`records/make_record.py` wrote this file, and every number in it, from the logs beside "
        "it.", headline(about), "## The idea", text.strip(), "## Results",
        figures.stage_table(each | {"mean": runs}), "## Statistics", statistics, "## Curves",
        "![loss, BPB, learning rate, step time](curves.png)", "## Rules",
        markdown(["rule", "measured", "limit of a record"],
                 [[key.replace("_", " "), value, limits.get(key)]
                  for key, value in about["compliance"].items()]),
        "## Run it", code, "`DATA_PATH` is a folder of shards that retokenize_scylla.py wrote with "
        "the tokenizer beside this file (manifest.json is its ledger).",
        f"```bash\npip install -r requirements.txt\nDATA_PATH=<shards> {command}\n```",
        f"Hardware (ranks x device) {about['hardware']}, torch {about['pytorch_version']}, CUDA "
        f"{about['cuda_version']}. Settings not named have their defaults.", "## Attribution",
        markdown(["technique", "who, where"], about["attribution"].items()))
    return "\n\n".join(parts) + "\n"


# --- the same again, to compare -------------------------------------------------------------


def is_packed(data: bytes) -> bool:
    """Whether train_gpt.py is a packed file; raises pack.PackError for a damaged one."""
    pack.unpack(data)
    return data.startswith(pack.COOKIE)


def packing_fault(data: bytes, source: str) -> str:
    """Why a packed file is not that of a source; empty if it is."""
    try:
        found = pack.pack(source)
    except (pack.PackError, SyntaxError) as error:
        return f"cannot be packed ({error})"
    try:
        minifier = f"python-minifier {metadata.version('python-minifier')}"
    except metadata.PackageNotFoundError:
        minifier = "no python-minifier"
    return "" if found == data else (
        f"packs to {len(found):,} bytes that are not the {len(data):,} of train_gpt.py: it is "
        "another source, or it was packed with another version of Python or python-minifier "
        f"(here Python {platform.python_version()}, {minifier})")


def flat(value: Any, name: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """A JSON object's values by the names that lead to them."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part, inner in value.items()
            for key, leaf in flat(inner, (*name, part)).items()}


def code_differences(folder: Folder, runs: list[Run]) -> Found:
    """Where the logs do not begin with the source that train_gpt.py runs, or that is not there."""
    try:
        data = (folder.path / "train_gpt.py").read_bytes()
        source, packed = pack.unpack(data).rstrip(), is_packed(data)
    except (pack.PackError, OSError) as error:
        yield "train_gpt.py", str(error)
        return
    counted = {folder.path / name for name in ("train_gpt.py", *[READABLE] * packed)}
    for path in sorted({*folder.path.rglob("*")} - counted):
        if path.name.endswith((*machinery.all_suffixes(),)):
            yield path.name, "code that no size counts, and that train_gpt.py may import"
    for run in runs:
        if run.source.rstrip() != source:
            yield run.path.name, "begins with other source than train_gpt.py runs"
    if packed and not folder.has(READABLE):
        yield READABLE, f"no {READABLE}: train_gpt.py is packed, and nobody can read it"
    elif packed and (fault := packing_fault(data, (folder.path / READABLE).read_text("utf-8"))):
        yield READABLE, fault


def differences(folder: Folder) -> Found:
    """submission.json, README.md and the code are, to the letter, what the logs give.

    Yields (file, what) for each difference. README.md may say more; its statistics, its command
    and its text on the idea are not compared.
    """
    runs = sorted(folder.runs, key=lambda run: run.seed or 0)
    unfit = [run.path.name for run in runs if not (run.ours and run.finished and run.headline)]
    if unfit or not runs:
        yield (", ".join(unfit) or "train_seed<k>.log",
               "no finished run of train_gpt.py, so nothing can be made from it again")
        return
    yield from code_differences(folder, runs)
    typed = {key: folder.submission.get(key) for key in TYPED}
    place = folder.path.resolve().parent.name
    if place.startswith("track_") and typed["track"] != place:
        yield "submission.json", f"track {typed['track']!r}, but the folder is in {place}"
    name = f"{typed['date']}_{typed['name']}".replace(" ", "_")
    if folder.path.resolve().name != name or not re.match(DAY, name):
        yield "submission.json", (f"date and name make {name}, the folder is "
                                  f"{folder.path.resolve().name}, YYYY-MM-DD_Name is wanted")
    models = {run.seed: folder.path / f"model_seed{run.seed}.ptz" for run in runs}
    given = {seed: claim.get("artifact_sha256") for seed, claim in folder.claims.items()
             if re.fullmatch("[0-9a-f]{64}", str(claim.get("artifact_sha256")))}
    about = submission(runs, typed, {
        seed: sha256(path) if path.is_file() else given.get(seed)
        for seed, path in models.items()})
    expected, found = flat(about), flat(folder.submission)
    for name in dict.fromkeys((*expected, *found)):
        if expected.get(name) != found.get(name):
            yield "submission.json", (f"{'.'.join(name)} {found.get(name, 'missing')}, but the "
                                      f"logs give {expected.get(name, 'nothing')}")
    if folder.has("README.md"):
        text = (folder.path / "README.md").read_text(encoding="utf-8", errors="replace")
        for line in readme(runs, about, folder.has(READABLE), "", "").splitlines():
            if line not in text.splitlines() and not line.startswith("DATA_PATH="):
                yield "README.md", f"README.md lacks the line {line!r}"
