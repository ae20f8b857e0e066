"""records/design.py: designs whose runs differ in many levers, and the effects of these."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest

import ablate
import design
import harness as h
from welch import Sample, t_quantile

PLAN = dict(
    base={"ITERATIONS": 5}, seeds=[1, 2, 3], runs=40, share=0.25,
    ends=dict(near={"PRESET": "record,demo"}, far={"PRESET": "frontier,demo"}),
    levers=dict(xsa={"four": {"XSA_LAST_N": 4}, "none": {"XSA_LAST_N": 0},
                     "all": {"XSA_LAST_N": 11}},
                smear={"on": {}, "off": {"SMEAR_ENABLED": 0}},
                gain={"low": {"QK_GAIN_INIT": 1.5}, "high": {"QK_GAIN_INIT": 5}}),
    at=dict(far=dict(xsa="all", gain="high")))
KEYS = [("xsa", "four -> none"), ("xsa", "four -> all"), ("smear", "on -> off"),
        ("gain", "low -> high")]


def measured(plan: dict, worth: dict, seeds: np.ndarray, chance: np.ndarray) -> dict:
    """Results of a plan whose levers are worth so much, a tenth of it before the artifact.

    `chance` is that of each run, on both scores.
    """
    results = {}
    for (name, settings), luck in zip(plan["variants"].items(), chance, strict=True):
        gains = sum(worth.get((lever, level), 0.0) for lever, level in plan["levels"][name].items())
        rest = 2.5 + seeds[settings["SEED"]] + luck
        results[name] = [dict(post_ema_bpb=rest + gains / 10, roundtrip_bpb=rest + gains,
                              train_ms=3.6e6, seconds_eval=0)]
    return results


def test_every_lever_leaves_its_end_in_as_many_runs():
    """A quarter of the runs at each end, all other levels alike, whatever else they have."""
    plan = design.expand(PLAN)
    assert len(plan["variants"]) == 80 and plan["seeds"] == [1]
    for end, own in (("near", ("four", "on", "low")), ("far", ("all", "on", "high"))):
        runs = {name: levels for name, levels in plan["levels"].items() if name.startswith(end)}
        for lever, level in zip(PLAN["levers"], own, strict=True):
            counts = Counter(levels[lever] for levels in runs.values())
            assert counts.pop(level) == 30 and {*counts.values()} == {10 // len(counts)}
        both = sum(levels["smear"] == "off" and levels["gain"] != own[2]
                   for levels in runs.values())
        assert 0 < both < 8  # one does not tell the other
        assert Counter(plan["variants"][name]["SEED"] for name in runs) == {1: 14, 2: 13, 3: 13}
    assert plan["variants"]["far_000"]["PRESET"] == "frontier,demo"
    for name, levels in plan["levels"].items():
        settings = plan["variants"][name]
        assert settings["XSA_LAST_N"] == dict(four=4, none=0, all=11)[levels["xsa"]]
        assert ("SMEAR_ENABLED" in settings) == (levels["smear"] == "off")
    assert design.expand(PLAN) == plan  # the same runs tomorrow
    assert design.expand(dict(variants={})) == dict(variants={})


def test_effects_without_chance_are_exact():
    """Seeds and other levers are taken out; each end has its own effects."""
    plan = design.expand(PLAN)
    worth = {("xsa", "none"): 0.02, ("xsa", "all"): -0.01, ("smear", "off"): 0.005,
             ("gain", "high"): -0.003}
    results = measured(plan, worth, np.array([0, 0.1, -0.2, 0.3]), np.zeros(80))
    for end in PLAN["ends"]:
        found = design.fit(results, plan, end)
        assert [*found.effects] == KEYS and found.runs == 40
        means = [effect.mean for effect in found.effects.values()]
        assert means == pytest.approx([*worth.values()])
        assert found.deviation == pytest.approx(0, abs=1e-12)
        rounding = design.fit(results, plan, end, "post_ema_bpb").effects.values()
        assert [effect.mean for effect in rounding] == pytest.approx(
            [0.9 * gain for gain in worth.values()])
    few = dict(list(results.items())[:10])
    assert design.fit(few, plan, "near") == design.Fit({}, 5, 5.0, None)
    assert design.table(few, plan).count("\n") == 1
    assert "\n| near far | 5 | 5.0 | - | - | - | - |\n" in design.power_table(few, plan)


def test_effects_over_both_ends():
    """Their mean, and errors that add up in squares; a simulation says that 19 of 20 hold it."""
    plan, random, inside = design.expand(dict(PLAN, runs=20)), np.random.default_rng(3), []
    for _ in range(300):
        noise = random.normal(size=40) * np.resize([1.0, 3.0], 40)  # both ends side by side
        fits = design.fits_of(measured(plan, {}, random.normal(size=4), noise), plan)
        near, far, both = fits.values()
        assert [*fits] == ["near near", "near far", "mean of them"] and both.runs == 40
        for key in KEYS:
            ends = near.effects[key], far.effects[key]
            assert both.effects[key].mean == pytest.approx((ends[0].mean + ends[1].mean) / 2)
            errors = [e.std / math.sqrt(e.n) for e in (*ends, both.effects[key])]
            assert errors[2] == pytest.approx(math.hypot(*errors[:2]) / 2)
        inside += [abs(both.effects[key].mean) <= both.effects[key].interval for key in KEYS]
    assert 0.935 < np.mean(inside) < 0.965


BOTH = {("smear", "off"): 0.005, ("gain", "high"): -0.003}


def test_a_pair_that_does_not_add_up():
    """It is found, of all pairs; named in the plan, it leaves the levers' own effects."""
    plan = design.expand(PLAN)
    results = measured(plan, BOTH, np.array([0, 0.1, -0.2, 0.3]), np.zeros(80))
    for name, (run,) in results.items():
        run["roundtrip_bpb"] += 0.04 * (plan["levels"][name]["smear"] == "off") * (
            plan["levels"][name]["gain"] == "high")
    named = plan | dict(pairs=[["smear", "gain"]])
    for end in PLAN["ends"]:
        pairs = design.pairs_of(results, plan, end)
        assert len(pairs) == 5  # each change of xsa with both others, and these with each other
        gain, half = pairs["smear on -> off, gain low -> high"]
        assert (gain, half) == (pytest.approx(0.04), pytest.approx(0, abs=1e-9))
        effects = design.fit(results, named, end).effects
        assert [*effects] == [*KEYS, ("smear with gain", "off with high, beyond their sum")]
        assert [effect.mean for effect in effects.values()] == pytest.approx(
            [0, 0, 0.005, -0.003, 0.04])
        assert len(design.pairs_of(results, named, end)) == 4
        assert design.fit(results, plan, end).effects[KEYS[2]].mean > 0.01  # an average over both


def test_of_many_pairs_that_add_up_one_stands_out_in_one_of_twenty_plans():
    """By simulation: the intervals are those of the strongest."""
    random, false = np.random.default_rng(4), []
    plan = design.expand(PLAN)
    for _ in range(400):
        results = measured(plan, BOTH, random.normal(size=4), random.normal(size=80))
        for end in PLAN["ends"]:
            pairs = design.pairs_of(results, plan, end).values()
            false.append(any(abs(gain) > half for gain, half in pairs))
    assert 0.03 < np.mean(false) < 0.065


def test_runs_for_the_goal():
    """Of 30 runs 20 fix other effects: only what is beyond these makes the error smaller."""
    effect = Sample(0.0, 0.005 * math.sqrt(11), 11)  # an error of 0.005 with 10 to measure it
    runs = design.runs_for_goal(effect, 30)
    halves = [t_quantile(0.025, n - 20) * 0.005 * math.sqrt(10 / (n - 20))
              for n in (runs, runs - 1)]
    assert halves[0] <= design.GOAL < halves[1]
    assert design.runs_for_goal(effect, 31) == runs + 1


def test_intervals_of_effects_hold_the_truth_as_often_as_they_say():
    """19 of 20, by simulation of few runs; with many they are as narrow as the design promises."""
    random, inside, halves, worth = np.random.default_rng(0), [], [], {("smear", "off"): 0.005}
    for runs in [20] * 300 + [40] * 100:
        plan = design.expand(dict(PLAN, runs=runs))
        results = measured(plan, worth, random.normal(size=4), random.normal(size=2 * runs))
        for end in PLAN["ends"]:
            effects = design.fit(results, plan, end).effects
            inside += [abs(effects[key].mean - worth.get((key[0], key[1].split(" -> ")[1]), 0))
                       <= effects[key].interval for key in KEYS]
            if runs == 40:
                halves.append(effects["smear", "on -> off"].interval)
    assert 0.935 < np.mean(inside) < 0.965
    assert np.mean(halves) == pytest.approx(2.03 / math.sqrt(40 * 0.25 * 0.75), rel=0.1)


def test_table_and_power_of_a_design(tmp_path, monkeypatch, capsys):
    """By the command line, of the runs so far; bold where the interval leaves out zero."""
    plan, random = design.expand(PLAN), np.random.default_rng(1)
    results = measured(plan, {("xsa", "none"): 0.02}, np.zeros(4), 0.004 * random.normal(size=80))
    path, out = tmp_path / "plan.json", tmp_path / "out"
    path.write_text(json.dumps(PLAN))
    for name, (run,) in results.items():
        log = out / f"{name}_seed1" / "logs" / "run.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text(json.dumps(run | dict(event="summary")))
    monkeypatch.setattr("sys.argv", ["ablate", str(path), "--out", str(out), "--so-far", "--table",
                                     "--power", "--figure", str(tmp_path / "x.png")])
    assert ablate.main() == 0
    lines = capsys.readouterr().out.splitlines()
    found = design.fit(results, plan, "near")
    effect, text = found.effects[KEYS[0]], lines[2].split(" | ")
    assert lines[0] == ("| lever | change | near near, 40 runs | near far, 40 runs | "
                        "mean of them, 80 runs | rounding alone, mean of them, 80 runs |")
    assert text[:3] == ["| xsa", "four -> none", f"**{effect.mean:+.4f} +- {effect.interval:.4f}**"]
    assert lines[6].startswith("| effects |") and len(lines) == 6 + 5 + 1 + 2 + 6
    cells = dict(zip(lines[6].split(" | "), lines[8].split(" | "), strict=True))
    assert cells["runs"] == "40" and cells["hours of all runs"] == "40.0"
    assert cells["deviation of chance"] == f"{found.deviation:.4f}"
    assert lines[10].startswith("| mean of them | 80 | 80.0 | - | ")
    assert text[5] == "**+0.0180 +- 0.0000** |"
    gain, half = (found := design.pairs_of(results, plan, "near"))[
        pair := max(found, key=lambda name: abs(found[name][0]) / found[name][1])]
    assert lines[14].startswith(f"| near near, of 5 | {pair} | ")
    assert lines[14].endswith(f"{gain:+.4f} +- {half:.4f} |") and abs(gain) < half
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_kept_design_can_see_its_goal():
    """With the chance that its runs had, 0.0062 BPB, half an interval is within the goal."""
    plan = design.expand(json.loads((h.ROOT / "records" / "plans" / "levers.json").read_text()))
    random = np.random.default_rng(2)
    results = measured(plan, {}, np.zeros(9), 0.0062 * random.normal(size=len(plan["variants"])))
    effects = design.fits_of(results, plan)["mean of them"].effects
    halves = sorted(effect.interval for effect in effects.values())
    assert halves[len(halves) // 2] < 0.75 * design.GOAL
