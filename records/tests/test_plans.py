"""records/ablate.py, its plans and what documents say of them; the cost model; --help."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ablate
import cost_model as cost
import design
import document_ttt as documents
import harness as h
import noise
import train_gpt as t

RECORDS = h.ROOT / "records"
PLANS = {path.stem for path in RECORDS.glob("plans/*.json")}
STUDIES = h.ROOT / "docs" / "studies.md"
DOCUMENTS = [h.ROOT / "README.md", *sorted(h.ROOT.glob("docs/*.md")), *sorted(
    path for pattern in ("*.md", "studies/*.md", "one_h100/README.md")
    for path in RECORDS.glob(pattern))]
SCRIPTS = [path for pattern in ("*.py", "one_h100/*.py", "studies/*.py")
           for path in sorted(RECORDS.glob(pattern)) if "__main__" in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_has_help(script, tmp_path):
    """From any folder, without a path to find modules."""
    done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True,
                          text=True, check=True)
    assert done.stdout.startswith(f"usage: {script.name}") and not done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    ["studies/cost_model.py"], ["ablate.py", "plans/slopes.json", "--table"]], ids=" ".join)
def test_a_reader_that_leaves_is_no_error(command):
    """`| head` ends a script that prints tables, and nothing is said of it."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, *command], cwd=RECORDS, stdout=write,
                          stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert not done.stderr


@pytest.mark.parametrize("recur", [False, True])
def test_costs_are_those_of_the_model(recur):
    """Matmuls and their operands as run, chains as traced, Newton-Schulz by hand."""
    c = h.config(h.RECORD)
    model = cost.record_model(c, 1254)
    costs = cost.step_costs(model, 98304, recur, 8)
    assert sum(costs[part][0] for part in ("matrices", "head", "attention")) == pytest.approx(
        27.91e12 if recur else 23.69e12, rel=2e-3)
    seen = []

    def spy(x, weight):
        seen.append(weight.shape)
        return torch.empty(*x.shape[:-1], len(weight), device="meta", dtype=x.dtype)

    model.set_phase(t.Phase(recur))
    for block in model.blocks:
        block.attn.attend = lambda q, k, v: torch.empty_like(q)
    model.register_buffer("rope", torch.empty(3, 2048, 1, 64, device="meta", dtype=torch.bfloat16))
    model.is_boundary = torch.empty(1254, dtype=torch.bool, device="meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.F, "linear", spy)
        model.logits(torch.zeros(1, 4, dtype=torch.long, device="meta"))
    for part, shapes in (("matrices", seen[:-1]), ("head", seen[-1:])):
        assert costs[part] == (98304 * sum(6 * a * b for a, b in shapes),
                               98304 * sum(6 * (a + b) for a, b in shapes))
    specs = [(p, t.param_spec(name, c).optimizer) for name, p in model.named_parameters()]
    assert costs["optimizer"][0] * 8 == pytest.approx(sum(
        10 * min(p.shape) ** 2 * (2 * max(p.shape) + min(p.shape))
        for p, role in specs if role == "muon"))
    assert costs["average"][1] == 12 * sum(p.numel() for p, _ in specs)


def test_cost_of_a_chain_counts_reads_and_writes():
    """By hand: x * y + x of width 6, bf16; fused 3 x inputs + 2 x outputs, eager by operation."""
    chain = cost.Chain("by hand", 5, lambda x, y: x * y + x, (6, 6))
    assert chain.fused_bytes() == 5 * 2 * (3 * 12 + 2 * 6)
    # forward: 3 + 3; backward: two products of 3; one addition of gradients of 3
    assert chain.eager_bytes() == 5 * 2 * 6 * (3 + 3 + 3 + 3 + 3)
    assert all(c.eager_bytes() > c.fused_bytes() > 0 or "add" in c.name or "skip" in c.name
               for c in cost.chains(cost.record_model(h.config(h.RECORD), 1254), True))


def test_cost_model_report_stands():
    """The report's sums are the sums of its rows, and its page quotes the script's own output."""
    lines = cost.report(cost.record_model(h.config(h.RECORD), 1254), 98304, 8)
    rows = [line.split(" | ") for line in lines if re.match(r"\| [a-zE\*]", line)]
    floors = [float(row[3]) for row in rows if len(row) == 5 and re.match(r"[\d.]+$", row[3])]
    sums = [float(row[3].strip("*")) for row in rows if row[0] == "| **sum**"]
    assert len(sums) == 2 and sum(floors) == pytest.approx(sum(sums), abs=0.2)
    assert "\n".join(lines) in (RECORDS / "studies" / "cost_model.md").read_text("utf-8")


def test_operations_of_document_ttt():
    """As many as the matrix products have, run forward on a meta device; backward twice or once."""
    c = h.config(h.RECORD | h.LEVERS, ttt_kind="document")
    model = cost.record_model(c, 1254)
    model.set_phase(t.Phase(recur=True))
    model.document_mask = None
    for block in model.blocks:
        block.attn.attend = lambda q, k, v: torch.empty_like(q)
    model.register_buffer("rope", torch.empty(3, 2048, 1, 64, device="meta", dtype=torch.bfloat16))
    model.is_boundary = torch.empty(1254, dtype=torch.bool, device="meta")
    outputs, (tokens, chunk) = model.adapter_outputs(), (512, c.ttt_doc_chunk)
    ids = torch.zeros(3, tokens, dtype=torch.long, device="meta")
    adapters = model.adapters(torch.empty(3, len(outputs), 80, 512, device="meta"),
                              torch.empty(3, sum(outputs), 80, device="meta"))
    with FlopCounterMode(display=False) as counted:
        hidden = model.hidden(ids, adapters)[:, :chunk]
        model.padded_logits(ids, hidden, adapters)
    parts = documents.operations(model, {tokens: 3})
    forward = parts["matrices"] / 2 + parts["adapters"] / 3 + parts["head"] / 2
    gates = 2 * 3 * tokens * len(model.plans[True]) * c.num_heads * c.attn_gate_dims
    assert counted.get_total_flops() == forward + gates
    assert parts["attention"] == 3 * 7 * len(model.plans[True]) * 512 * tokens**2


def test_windows_of_document_ttt():
    """Every chunk reads its whole window, in one of four sizes, free slots too; by hand."""
    def read(*lengths, **of):
        model = cost.record_model(h.config(h.RECORD, ttt_kind="document", ttt_doc_batch=2), 1254)
        ids = np.zeros(sum(lengths) + 1, np.uint16)
        ids[np.cumsum(lengths) - lengths] = 1
        return documents.windows(documents.document_ttt(model, ids, 1, **of))

    assert read(1000) == {512: 10, 1024: 11, 1536: 0, 2048: 0}
    assert read(100, 100) == {512: 6, 1024: 0, 1536: 0, 2048: 0}
    assert read(100, 100, world=2) == {512: 3, 1024: 0, 1536: 0, 2048: 0}
    assert read(100, 30) == {512: 3 + 1 + 2, 1024: 0, 1536: 0, 2048: 0}  # a slot waits


def test_ablation_table_and_plans():
    """Means, spread and change against the first variant; every plan names only settings."""
    runs = {"base": [dict(post_ema_bpb=1.0, roundtrip_bpb=r, bytes_total=10, steps=4, train_ms=40,
                          ttt_bpb=1.9, seconds_eval=3.0)
                     for r in (2.0, 2.2)],
            "less": [dict(post_ema_bpb=1.5, roundtrip_bpb=2.5, bytes_total=8, steps=5,
                          train_ms=100)]}
    rows = ablate.table(runs, {}).splitlines()
    assert rows[2] == "| base | 2 | 1.0000 | 2.1000 | 1.9000 | 0.2000 | - | - | 10 | 4 | 10 | 3 |"
    assert rows[3] == "| less | 1 | 1.5000 | 2.5000 | - | - | +0.5000 | base | 8 | 5 | 20 | - |"
    runs["more"] = [dict(run, roundtrip_bpb=r) for run, r in zip(
        runs["base"], (2.4, 2.8), strict=True)]
    change = ablate.table(runs, {}).splitlines()[4].split("|")[7]  # +0.4 and +0.6: 0.5 +- t * 0.1
    assert change.strip() == f"+0.5000 +- {12.7062 * 0.1:.4f}"
    rows = ablate.table(runs, dict(against={"more": ["less"]})).splitlines()
    assert "| -0.1000 | less |" in rows[4] and "| +0.5000 | base |" in rows[3]
    rows = ablate.table(runs, dict(against={"more": ["less", "gone", "base"]})).splitlines()
    assert f"| -0.1000; {change.strip()} | less; base |" in rows[4]
    part = {name: runs[name] for name in ("less", "more")}  # their baseline was not run
    rows = ablate.table(part, dict(against=dict(less=["base"], more=["base"]))).splitlines()[2:4]
    assert len(rows) == 2 and all(" | - | - | " in row for row in rows)
    assert ablate.table(json.loads(ablate.results_text(runs)), {}) == ablate.table(runs, {})
    loaded = {name: [dict(ttt_bpb=score, val_bpb=score)] for name, score in dict(a=2, b=1).items()}
    kept = json.loads(ablate.results_text(loaded))
    rows = ablate.table(kept, dict(change="val_bpb")).splitlines()
    assert rows[3] == "| b | 1 | 1.0000 | - | -1.0000 | a | - | - | - | - |"  # without training
    plans = sorted((h.ROOT / "records" / "plans").glob("*.json"))
    assert plans
    for path in plans:
        plan = design.expand(json.loads(path.read_text()))
        assert set(plan.get("seeds_of", {})) <= set(plan["variants"])
        for names in (plan.get("against", {}), plan.get("alike", {})):
            assert {*names, *itertools.chain(*names.values())} <= set(plan["variants"])
        for changes in plan["variants"].values():
            texts = {k: str(v).format(root=h.ROOT, out="out", seed=1)
                     for k, v in (plan["base"] | changes).items()}
            t.Config.from_env(texts, cuda=True)


def test_power_of_a_plan():
    """By hand: seeds move both alike; what differs between them decides what could be seen."""
    rows = {"base": [2.0, 2.1, 2.2], "less": [2.3, 2.402, 2.498], "one": [2.0]}
    runs = {name: [dict(roundtrip_bpb=score, train_ms=3.6e6, seconds_eval=1800) for score in row]
            for name, row in rows.items()}
    head, _, base, row = ablate.power_table(runs, {}).splitlines()  # one seed says nothing
    assert base == "| base | - | 3 | 0.1000 | - | - | - | - | - |"
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    deviation = np.std([0.3, 0.302, 0.298], ddof=1)  # 0.002
    half = 4.30265 * deviation / np.sqrt(3)
    assert cells["| variant"] == "| less" and cells["seeds"] == "3"
    assert cells["deviation over seeds"] == f"{np.std(rows['less'], ddof=1):.4f}"
    assert cells["deviation of the difference"] == f"{deviation:.4f}"
    assert cells["half a 95 % interval"] == f"{half:.4f}"
    seen = float(cells["seen 19 times in 20"])
    assert seen == pytest.approx(half * (1 + 2.91999 / 4.30265), abs=6e-5)
    # 0.002 t / sqrt(n): 0.0032 with four seeds, 0.0025 with five
    assert cells["seeds for 0.003"] == "5" and cells["hours for 0.003 |"] == "7.5 |"


def saved_run(folder, name, nats, scores):
    """A finished run of two documents, of 3 and 2 tokens after their first; its folder."""
    (folder / name / "logs").mkdir(parents=True)
    (folder / name / "scores").mkdir()
    np.savez(folder / name / "scores" / "roundtrip.npz", ids=np.arange(6), nats=np.float32(nats),
             bytes=np.array([2, 2, 2, 0, 3, 1]))
    events = [dict(event=stage, val_bpb=9.9) for stage in noise.STAGES]  # the last one counts
    events += [dict(event=stage, val_bpb=s, train_ms=1.8e6, seconds_eval=900)
               for stage, s in zip(noise.STAGES, scores, strict=True)]
    (folder / name / "logs" / "run.jsonl").write_text("\n".join(map(json.dumps, events)))
    return folder / name


def noise_groups(folder, against):
    """What `noise.groups_of` finds of a plan with seeds 1 to 3."""
    return noise.groups_of(folder, {"seeds": [1, 2, 3], "variants": against, "against": against})


def test_study_of_the_noise(tmp_path, monkeypatch):
    """Documents, deviations over seeds and over documents, by hand."""
    bits = np.log(2) * np.array([[1, 2, 3, 99, 4, 5], [1, 2, 4, 99, 4, 6], [1, 2, 3, 99, 4, 5]])
    for seed in (1, 2, 3):
        run = saved_run(tmp_path, f"w64_seed{seed}", bits[seed - 1], [1 + seed, 2 * seed, 3 * seed])
    saved_run(tmp_path, "w96_seed1", bits[0], [1, 1, 1])  # one run has no deviation
    (tmp_path / "w96_seed2" / "logs").mkdir(parents=True)  # has only begun
    groups = noise_groups(tmp_path, {"w96": [], "w64": []})
    assert [*groups] == ["w64"]
    assert np.allclose(noise.documents_of(run, None), [[3, 6, 6], [2, 9, 4]])
    assert np.allclose(noise.documents_of(run, 1), [[1, 1, 2], [1, 4, 3]])
    low, high = noise.spread_interval(3.0, 3)  # of a table of chi-square: 7.378 and 0.0506
    assert (low, high) == pytest.approx([3 * (2 / x) ** 0.5 for x in (7.378, 0.0506)], rel=5e-3)
    rows = noise.spread_table(groups).splitlines()
    assert rows[2].startswith(f"| w64 | 3 | 6.0000 | 1.0000 | 2.0000 | 3.0000 | {low:.4f} to ")
    # seeds 1 and 2, and 2 and 3, differ by a bit on 6 bytes and a bit on 4: 0.2 of each byte
    by_documents = ((1 - 6 * 0.2) ** 2 + (1 - 4 * 0.2) ** 2) * 2 / 10**2 * 2 / 3
    by_runs = 0.2**2 * 2 / 3 - by_documents
    monkeypatch.setattr(noise, "LENGTHS", (1, None))
    monkeypatch.setattr(design, "GOAL", 0.3)
    cut, whole = noise.document_table(groups).splitlines()[2:]
    deviations = f"{by_documents**0.5:.4f} | - | {by_runs**0.5:.4f}"
    assert whole.startswith(f"| w64 | all | 5 | 2 | {deviations} |")
    # 0.2 sqrt(2/3) t / sqrt(n) is 0.41 with three seeds and 0.26 with four; a run takes 0.75 hours
    assert whole.endswith(" | 4 | 6.0 |")
    # first tokens do not differ: two seeds; two of five tokens are scored in 0.25 * 2 / 5 hours
    assert cut.endswith(" | 0.0000 | - | 0.0000 | 2 | 2.4 |")
    with pytest.raises(SystemExit, match="no two finished runs"):
        noise_groups(tmp_path / "w64_seed1", {"w64": []})
    with pytest.raises(SystemExit, match="needs SCORES_PATH=scores"):
        noise.scores_of(tmp_path)


def test_study_of_the_noise_of_differences(tmp_path, monkeypatch):
    """By hand: what both runs of a seed share falls out; a difference counts once, not twice."""
    nats = np.log(2) * np.array([1, 2, 3, 99, 4, 5])
    for seed, shared in enumerate((0, 7, 1), 1):
        saved_run(tmp_path, f"base_seed{seed}", nats + shared, [1 + shared] * 3)
        own = np.log(2) * np.array([0, 0, 0, 0, 0, seed])  # bits of the second document
        saved_run(tmp_path, f"less_seed{seed}", nats + shared + own, [1 + shared + seed] * 3)
    groups = noise_groups(tmp_path, {"base": [], "less": ["base"]})
    assert [*groups] == ["base", "less", "less - base"]
    rows = noise.spread_table(groups).splitlines()
    assert rows[4].startswith("| less - base | 3 | 2.0000 | 1.0000 | 1.0000 | 1.0000 |")
    monkeypatch.setattr(noise, "LENGTHS", (None,))
    monkeypatch.setattr(design, "GOAL", 0.3)
    row = noise.document_table(groups).splitlines()[4]
    # 1, 2 and 3 bits of 10 bytes deviate by 0.1 over the seeds; t is 4.3 with three seeds
    assert 4.30265 * 0.1 / 3**0.5 < 0.3 < 12.7062 * 0.1 / 2**0.5
    one_bit = ((6 * 0.1) ** 2 + (1 - 4 * 0.1) ** 2) * 2 / 10**2  # what other documents change of it
    deviations = f"{((1 + 1 + 4) / 3 / 2 * one_bit)**0.5:.4f} | {2 * one_bit**0.5:.4f} | 0.0000"
    assert row == f"| less - base | all | 5 | 2 | {deviations} | 3 | 4.5 |"


def test_study_of_the_noise_of_repeated_tokens(tmp_path):
    """Same two tokens before, same document; runs and baselines are matched by their seeds."""
    ids = np.array([1, 2, 3, 0, 1, 2, 3, 5, 1, 2, 3, 2, 3])
    sizes = np.where(ids == 0, 0, 2)
    assert np.flatnonzero(noise.repeated(ids, sizes)).tolist() == [10]
    for name, nats in {"base_seed1": 1, "base_seed2": 2, "base_seed3": 9,
                       "less_seed3": 8.5, "less_seed2": 2}.items():
        run = saved_run(tmp_path, name, [0], [1, 1, 1])
        values = np.where(np.arange(13) == 10, nats * 24 * np.log(2), 2 * np.log(2))
        np.savez(run / "scores" / "roundtrip.npz", ids=ids, nats=values, bytes=sizes)
    rows = noise.repeat_table(noise_groups(tmp_path, {"base": [], "less": ["base"]}))
    base, less, difference = rows.splitlines()[2:]
    assert base == f"| base | 3 | 4.0000 | {np.std([1, 2, 9], ddof=1):.4f} | 1.0000 | 0.0000 |"
    assert less == f"| less | 2 | 5.2500 | {np.std([2, 8.5], ddof=1):.4f} | 1.0000 | 0.0000 |"
    assert difference == "| less - base | 2 | -0.2500 | 0.3536 | 0.0000 | 0.0000 |"


@pytest.mark.parametrize("effect, power", [(0.0, 0.05), (1.0, 0.95)])
def test_what_power_promises(effect, power):
    """Of 4,000 experiments with that true difference so many have zero outside their interval."""
    random = np.random.default_rng(0)
    seen = ablate.detectable(ablate.Sample(0, 1.0, 6))
    changes = [ablate.sample(row) for row in random.normal(effect * seen, 1.0, size=(4000, 6))]
    told = np.mean([abs(change.mean) > change.interval for change in changes])
    assert told == pytest.approx(power, abs=0.015)


def test_changes_from_score_to_score():
    """Where there are several modes, a second table: seed by seed, a dash where a score is not."""
    runs = {"full": [dict(post_ema_bpb=1.0, roundtrip_bpb=1.25, ttt_bpb=tuned, bytes_total=1,
                          steps=1, train_ms=1) for tuned in (1.0, 0.75)]}
    runs["half"] = [{k: v for k, v in run.items() if k != "ttt_bpb"} for run in runs["full"][:1]]
    second = ablate.table(runs, {}).split("\n\n")[1].splitlines()
    assert second[0] == ("| variant | roundtrip against post-ema, 95 % "
                         "| ttt against roundtrip, 95 % |")
    assert second[2:] == [
        f"| full | **+0.2500 +- 0.0000** | -0.3750 +- {12.7062 * 0.125:.4f} |",
        "| half | +0.2500 | - |"]
    assert "\n\n" not in ablate.table({"half": runs["half"]}, {})


def printed(plan: str, capsys, monkeypatch, report: str = "--table") -> str:
    """What a report prints of a plan's kept results; empty without any."""
    if not (RECORDS / "plans" / "results" / f"{plan}.json").exists():
        return ""
    monkeypatch.setattr(sys, "argv", ["ablate", str(RECORDS / "plans" / f"{plan}.json"),
                                      report])
    assert ablate.main() == 0
    return capsys.readouterr().out


def sections(text: str) -> dict[str, str]:
    """Heading -> text of every `## ` section of a document."""
    return dict(part.split("\n", 1) for part in re.split(r"(?m)^## ", text)[1:])


def test_every_plan_has_a_section(capsys, monkeypatch):
    """docs/studies.md has its command, and its table as `--table` prints it of kept results."""
    kept = {path.stem: path for path in RECORDS.glob("plans/results/*.json")}
    assert kept and {*kept} <= PLANS
    found = sections(STUDIES.read_text("utf-8"))
    for plan in PLANS:
        assert f"records/ablate.py records/plans/{plan}.json" in found[plan]
        assert printed(plan, capsys, monkeypatch) in found[plan], plan
    for path in kept.values():
        plan = design.expand(json.loads((RECORDS / "plans" / path.name).read_text()))
        variants = plan["variants"]
        results = [*json.loads(path.read_text())]  # of all variants, or of those of --only
        assert results and results == [name for name in variants if name in results]


def test_the_plan_to_copy_is_one(tmp_path):
    """The plan of one lever that docs/studies.md shows: six pairs, of settings that there are."""
    plan = json.loads(re.search(r"```json\n(.*?)```", STUDIES.read_text("utf-8"), re.S)[1])
    first, other = (settings for _, _, settings in ablate.tasks_of(plan, tmp_path)[-2:])
    assert {*other.items()} - {*first.items()} == {("XSA_LAST_N", "11")}
    assert first["SEED"] == "6" and first["DATA_PATH"].endswith("/data/vocabularies/scylla_starts")


def passages(text: str) -> Iterator[tuple[set[str], str]]:
    """(plans that it names, what it says) of every passage of a document that names a plan.

    A passage is a plan's own section, a row of a table without its first cell, which is a claim,
    or a paragraph with the table after it. `plans/NAME.json` and a link to `#NAME` name a plan.
    """
    def named(passage: str) -> set[str]:
        return {*re.findall(r"plans/(\w+)\.json", passage),
                *re.findall(r"#(\w+)\)", passage)} & PLANS

    for section in re.split(r"(?m)^## ", text):
        own = {section.split("\n", 1)[0]} & PLANS
        for block in [section] if own else re.split(r"\n\n(?!\|)", section):
            rows = [line for line in block.splitlines() if line.startswith("|")]
            if own or not any(map(named, rows)):
                yield own | named(block), block
            else:
                yield from ((named(row), row.split("|", 2)[2]) for row in rows)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(h.ROOT)))
def test_figures_of_plans_are_kept_results(document, capsys, monkeypatch):
    """Figures (three decimals or more) beside a plan's name are `--table`'s or `--power`'s of it.

    A plan without kept results has no figures. Sentences with the number of a pull request quote
    figures of others.
    """
    for plans, passage in passages(document.read_text("utf-8")):
        tables = "".join(printed(plan, capsys, monkeypatch, report)
                         for plan in plans for report in ("--table", "--power"))
        ours = [sentence for sentence in re.split(r"(?<=[.;:])\s", passage)
                if not re.search(r"#\d", sentence)]
        figures = {*re.findall(r"\d\.\d{3,}", " ".join(ours))} if plans else set()
        assert not {figure for figure in figures if figure not in tables}, (plans, passage)


@pytest.mark.slow
def test_ablation_runs_and_resumes(tmp_path):
    """Two variants of a tiny run, and one that scores what they trained; a second call repeats none
    of them and gives the same table."""
    out, data = tmp_path / "out", tmp_path / "data"
    documents = h.write_documents(tmp_path / "documents.jsonl", h.texts(300))
    vocabulary = tmp_path / "v.yaml"
    vocabulary.write_bytes(h.vocabulary())
    for split in ("train", "val"):
        h.retokenized(documents, vocabulary, split, data)
    base = dict(PRESET="demo", DATA_PATH=str(data), ITERATIONS=3, VAL_TOKENS_LIMIT=2000,
                MODEL_DIM=16, TRAIN_BATCH_TOKENS=256, EVAL_MODES="roundtrip", ROPE_DIMS=4)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(dict(base=base, seeds=[1, 2], seeds_of={"flat": 1}, variants={
        "all": {}, "scored": {"LOAD_ARTIFACT": "{out}/all_seed{seed}/data/demo.int6.ptz"},
        "flat": {"PARALLEL_START_LAYER": 11}})))
    command = [sys.executable, h.ROOT / "records" / "ablate.py", plan, "--out", out, "--jobs", "2"]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    times = {p: p.stat().st_mtime_ns for p in out.glob("*/console.txt")}
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(times) == 5 and times == {p: p.stat().st_mtime_ns for p in times}
    assert first.splitlines()[-5:] == again.splitlines()[-5:]
    assert (out / "table.md").read_text().splitlines() == again.splitlines()[-5:]
    runs = json.loads((out / "results.json").read_text())
    assert [*runs] == ["all", "scored", "flat"]
    assert [[run["roundtrip_bpb"] for run in runs[name]] for name in ("all", "scored")] == [
        [run["val_bpb"] for run in runs["all"]]] * 2
    assert {run["train_gpt"] for run in sum(runs.values(), [])} == {
        hashlib.sha256((out / "train_gpt.py").read_bytes()).hexdigest()[:12]}
    kept = next(out.glob("flat_*")) / "settings.json"
    kept.write_text(kept.read_text().replace("11", "10"))
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "other settings" in refused.stderr
    (out / "train_gpt.py").write_text("another version")
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "another train_gpt.py" in refused.stderr


def test_ablation_slots_and_list(tmp_path, monkeypatch, capsys):
    """One GPU for each run where there are any; --list runs nothing and tells what is left."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [slot.gpu for slot in ablate.slots(2)] == [0, 1]
    with pytest.raises(SystemExit, match="2 GPUs"):
        ablate.slots(3)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(dict(base={}, seeds=[1, 2], variants={"a": {}, "b": {"SEED": 3}})))
    done = tmp_path / "out" / "a_seed2" / "logs" / "run.jsonl"
    done.parent.mkdir(parents=True)
    done.write_text(json.dumps(dict(event="summary", train_ms=5.4e6, seconds_eval=1800,
                                    roundtrip_bpb=2.0, steps=1, bytes_total=1)))
    monkeypatch.setattr(sys, "argv", ["ablate", str(plan), "--out", str(tmp_path / "out"),
                                      "--list"])
    monkeypatch.setattr(ablate, "run_one", None)
    assert ablate.main() == 0
    *states, left = capsys.readouterr().out.splitlines()
    states = [line.split(",")[0] for line in states]
    assert states == ["a_seed1: to run", "b_seed1: to run", "a_seed2: done", "b_seed2: to run"]
    assert left == "1 of 4 runs are done; 3 are to come, 6.0 hours one at a time"
    for names, wanted in (("b", states[1::2]), ("b,a", states)):
        monkeypatch.setattr(sys, "argv", ["ablate", str(plan), "--out", str(tmp_path / "out"),
                                          "--list", "--only", names])
        assert ablate.main() == 0
        listed = capsys.readouterr().out.splitlines()[:-1]
        assert [line.split(",")[0] for line in listed] == wanted
    so_far = ["ablate", str(plan), "--out", str(tmp_path / "out"), "--so-far", "--table"]
    monkeypatch.setattr(sys, "argv", so_far)
    with pytest.raises(SystemExit, match="no run of the plan is done"):
        ablate.main()  # a second seed without the first cannot be compared
    shutil.copytree(done.parent.parent, tmp_path / "out" / "a_seed1")
    assert ablate.main() == 0
    assert "| a | 2 | 2.0000 |" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out" / "a_seed1")
    monkeypatch.setattr(sys, "argv", ["ablate", str(plan), "--list", "--only", "a,c"])
    with pytest.raises(SystemExit, match="--only c: the plan has a, b"):
        ablate.main()
    misspelt = tmp_path / "misspelt.json"
    misspelt.write_text(json.dumps(dict(base={}, seeds=[1], variants={"a": {"SMEAR_ENABLE": 0}})))
    monkeypatch.setattr(sys, "argv", ["ablate", str(misspelt), "--list"])
    with pytest.raises(SystemExit, match="(?s)variant a: .*SMEAR_ENABLED"):
        ablate.main()
    with pytest.raises(SystemExit, match="--jobs 0"):
        ablate.slots(0)
    monkeypatch.setattr(sys, "argv", ["ablate", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match="none.json: nothing to read"):
        ablate.main()
    code = tmp_path / "out" / "train_gpt.py"
    code.write_text("another")
    with pytest.raises(SystemExit, match="another train_gpt.py"):
        ablate.keep_code(code.parent)
    shutil.rmtree(done.parent)  # nothing has begun: the copy may be replaced
    digest = ablate.keep_code(code.parent)
    assert code.read_bytes() == (h.ROOT / "train_gpt.py").read_bytes()
    assert hashlib.sha256(code.read_bytes()).hexdigest().startswith(digest) and len(digest) == 12
