"""records/generated.py: what a folder tells of its runs, and whom it credits."""

from __future__ import annotations

import re

import pytest
from conftest import NAME, make

import generated
import rules
import runs as reader
import train_gpt as t


def test_a_folder_tells_its_idea(made_folder, runs, tmp_path):
    """The author's text, which verify leaves alone, or a paragraph on what was switched on."""
    text = (made_folder / "README.md").read_text()
    idea = text.partition("\n## The idea\n\n")[2].partition("\n\n## Results")[0]
    for part in ("4 layers of width 32", "two parallel lanes", "layers 1 and 2 run twice, the "
                 "second time with MLPs of their own", "(XSA)", "bigram hash table", "SmearGate",
                 "layers 2 and 3 get value embeddings", "(EMA)", "(QAT)", "GPTQ", "(TTT)"):
        assert part in idea, part
    assert "SWA" not in idea and "n-grams" not in idea and "MuonEq-R" not in idea
    own = tmp_path / "own.md"
    own.write_text("Mine alone.\n\nIn two paragraphs.\n")
    assert make(*runs[::2], tmp_path, "--track", "track_non_record_16mb", "--about", str(own)) == 0
    folder = tmp_path / "track_non_record_16mb" / NAME
    text = (folder / "README.md").read_text()
    assert "\n## The idea\n\nMine alone.\n\nIn two paragraphs.\n\n## Results\n" in text
    (folder / "README.md").write_text(text.replace("Mine alone.", "Mine and yours."))
    assert rules.verify(folder, strict=True) == []


@pytest.mark.parametrize(("change", "said", "unsaid"), [
    (dict(SWA_ENABLED="1"), "(SWA)", "(EMA)"), (dict(RECUR_LAYERS=""), "layers", "run twice"),
    (dict(RECUR_PASSES="1"), "layers", "run twice"), (dict(RECUR_PASSES="4"), "run 4 times, each "
    "time after the first with MLPs of their own", "twice"), (dict(RECUR_UNTIE_MLP="0"),
    "layers 1 and 2 run twice.", "of their own"), (dict(RECUR_START_STEP="0"), "From the start on",
    "step 0"), (dict(XSA_LAST_N="4"), "All layers use", "last 4"), (dict(XSA_LAST_N="3"),
    "The last 3 layers use", "All"), (dict(MUON_COEFFICIENTS="polar"), "matrices, with the "
    "coefficients of Polar Express, and", "MuonEq-R"), (dict(EMA_DECAY="0.0"),
    "weights of the last step", "(EMA)"), (dict(QUANT="rtn"), "nearest",
    "GPTQ"), (dict(MUON_ROW_NORM="1"), "MuonEq-R", "  "), (dict(RECUR_LAYERS="4"), "layer 4 run",
    "layers 4"), (dict(RECUR_START_STEP="0.35"), "From 35% of", "step 0"),
    (dict(PARALLEL_START_LAYER="11"), "layers", "lanes"), (dict(XSA_LAST_N="0"), "layers", "XSA"),
    (dict(TTT_KIND="document", TTT_GLOBAL_DOCS="0"), "adapters of rank 80 learn every chunk of 48 "
    "tokens once it is scored", "train the model itself"), (dict(TTT_KIND="document",
    TTT_GLOBAL_DOCS="2500"), "The first 2,500 documents train the model itself", "chunk of 32768"),
    (dict(VE_ENABLED="0"), "layers", "value emb"), (dict(SMEAR_ENABLED="0"), "layers", "Smear"),
    (dict(LATE_QAT_THRESHOLD="0.0"), "layers", "QAT"), (dict(BIGRAM_VOCAB_SIZE="0"), "", "bigram")])
def test_the_idea_follows_the_settings(change, said, unsaid, runs):
    """Every feature is told where it is on, and not where it is off."""
    run = reader.read_run(runs[2][0])
    run.settings |= change
    text = generated.idea([run])
    assert said in text and unsaid not in text, text


FRONTIER = dict(  # what PRESET=frontier logs of its levers, with an embedding at 7 bits
    PRESET="frontier", NUM_LAYERS="11", XSA_LAST_N="11", MLP_MULT="4", MUON_WD="0.095",
    MUON_WD_TAPER="0.7,0.5",
    MUON_ROW_NORM="1", MUON_COEFFICIENTS="polar", QK_GAIN_INIT="5.25", MATRIX_LR="0.026",
    TIED_EMBED_LR="0.03", SCALAR_LR="0.02", BETA2="0.99", MIN_LR="0.1", EMA_DECAY="0.9965",
    MUON_MOMENTUM="0.97", WARMDOWN_ITERS="0.85", RECUR_LAYERS="3,4,5", RECUR_PASSES="3",
    RECUR_UNTIE_MLP="0", RECUR_START_STEP="0.35", PARALLEL_START_LAYER="8", ATTN_GATE_DIMS="12",
    SKIP_GATE="1", DOC_ATTENTION="1", ASYM_SOFTCAP="1", GPTQ_CALIBRATION_SEQS="256",
    EVAL_SEQ_LEN="2560", QUANT="gptq", CLASS_BITS="mlp=5,embed=7", TTT_KIND="document",
    TTT_GLOBAL_DOCS="2500")
NEW = ("RECUR_PASSES", "MUON_WD_TAPER", "MUON_COEFFICIENTS", "ATTN_GATE_DIMS", "SKIP_GATE",
       "DOC_ATTENTION", "ASYM_SOFTCAP", "TTT_KIND")  # settings that logs of older runs do not name
OFF = dict(zip(NEW, ("2", "", "quintic", "0", "0", "0", "0", "chunk"), strict=True))


@pytest.mark.parametrize("older", [False, True])
def test_the_frontier_is_told_and_credited(older, runs):
    """A run with all levers names each of them; one with none, or from before them, names none."""
    run = reader.read_run(runs[2][0])
    levers = {row["technique"] for row in generated.credits()
              if {*row.get("when", {})} - {"QUANT"}}
    run.settings |= FRONTIER
    text = generated.idea([run])
    for part in ("From 35% of the run on, layers 3, 4 and 5 run three times.", "All layers use",
                 "normalised rows (MuonEq-R) and the coefficients of Polar Express, and AdamW",
                 "From 70% of the run on, Muon's weight decay falls to 50% of its value.",
                 "attends to its own document only", "reads the first 12 dimensions",
                 "skips pass through learned gates", "negative logits have a softcap each",
                 "reads each document by itself"):
        assert part in text, part
    assert levers and levers <= {*generated.attribution([run])}
    run.settings = reader.read_run(runs[2][0]).settings | OFF | dict(
        PRESET="record", QK_GAIN_INIT="1.5")
    if older:
        run.settings = {k: v for k, v in run.settings.items() if k not in NEW}
    assert not levers & {*generated.attribution([run])}
    text = generated.idea([run])
    assert "run twice, the second time with MLPs of their own." in text
    assert not re.search("document|gate |gates|Polar|decay falls|softcap", text), text


def test_later_presets_win(runs, monkeypatch):
    """Of "published,other" the settings that differ are those that both presets do not say."""
    monkeypatch.setitem(t.PRESETS, "other", dict(n_int6_layers=6, min_lr=0.5))
    defaults = t.PRESETS["published"] | t.PRESETS["other"]
    run = reader.read_run(runs[2][0])
    run.settings = dict(line.split("=", 1) for line in t.settings_listing(
        t.Config(**defaults)).splitlines()) | dict(PRESET="published,other")
    assert generated.changed_settings(run) == dict(PRESET="published,other")
    run.settings |= dict(QUANT="gptq", N_INT6_LAYERS="4", MATRIX_LR="0.5")
    assert generated.changed_settings(run) == dict(
        PRESET="published,other", QUANT="gptq", N_INT6_LAYERS="4", MATRIX_LR="0.5")


def test_a_seed_has_no_score_that_has_looked_ahead(runs):
    """A stage that is not compliant is left out of submission.json."""
    run = reader.read_run(runs[2][0])
    assert "sliding_bpb" in generated.seed_result(run, None)
    run.scores["sliding"] = run.scores["sliding"]._replace(compliant=False)
    assert "sliding_bpb" not in generated.seed_result(run, None)


def test_attribution_is_of_what_ran(runs):
    """Score-first TTT is credited where it has a score, not where a setting allows it."""
    run = reader.read_run(runs[2][0])
    assert "score-first TTT" in generated.attribution([run])
    del run.scores["ttt"]
    assert run.settings["TTT_ENABLED"] == "1"
    assert "score-first TTT" not in generated.attribution([run])
    run.settings["QUANT"] = "rtn"
    assert not [name for name in generated.attribution([run]) if "GPTQ with self" in name]
