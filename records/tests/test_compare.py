"""Results beside one another: statistics, miscounted bytes, curves."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from test_record import FIELD_LOG, LONE, field_folder

import denominator
import harness as h
import make_record
import runs as reader
import welch


def test_student_t_is_exact():
    """Tails as their closed forms, or known digits, give them; quantiles as tables print them."""
    for x in (-1.2, 0.3, 2.0, 5.0, 30.0):
        angle, sine = math.atan2(math.sqrt(3), x), x / math.sqrt(x * x + 4)
        for freedom, exact in ((1, math.atan2(1, x) / math.pi), (4, (1 - sine)**2 * (2 + sine) / 4),
                               (2, 1 / (x * x + 2 + x * math.sqrt(x * x + 2))),
                               (3, (angle - math.sin(2 * angle) / 2) / math.pi)):
            assert welch.t_tail(x, freedom) == pytest.approx(exact, rel=1e-11), (x, freedom)
    for x, freedom, exact in ((-1.2, 3.7, 0.84935381092406037), (30.0, 2.2, 3.2201283910672572e-4)):
        assert welch.t_tail(x, freedom) == pytest.approx(exact, rel=1e-12)  # by mpmath, 17 digits
    for freedom, value in ((1, 12.7062), (2, 4.30265), (4, 2.77645), (30, 2.04227)):
        assert welch.t_quantile(0.025, freedom) == pytest.approx(value, abs=1e-5)


def test_welch_by_hand():
    """Mean, deviation, interval, t, degrees of freedom and the bar, worked out by hand."""
    ours, theirs = welch.sample([1.0, 2.0, 3.0]), welch.sample([4.0, 8.0, 12.0, 8.0])
    assert (ours.mean, ours.std, ours.n) == (2.0, 1.0, 3)
    assert ours.interval == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)
    assert theirs.interval == pytest.approx(3.18245 * math.sqrt(8 / 3), abs=1e-4)
    test = welch.welch(ours, theirs, 1.0)
    assert test.difference == 6.0 and test.t == pytest.approx(5.0 / math.sqrt(1 / 3 + 8 / 3))
    assert test.freedom == pytest.approx(3.0**2 / ((1 / 3) ** 2 / 2 + (8 / 3) ** 2 / 3))
    assert test.p == welch.t_tail(test.t, test.freedom) < 0.5
    one, flat = welch.sample([5.0]), welch.sample([5.0, 5.0])
    assert one == (5.0, None, 1) and one.interval is None and welch.welch(ours, one) is None
    for some in ((ours, flat), (flat, ours), (ours, ours)):  # equal spreads are spread, too
        assert welch.welch(*some).t is not None
    assert welch.welch(flat, flat) is None


def test_compare_stats_and_plot(made_folder, runs, tmp_path, capsys):
    """One table of stages, the settings that differ, the bar; refusals are messages."""
    tool, logs = make_record, [str(log) for log in runs[2]]
    assert tool.main(["compare", str(made_folder), logs[0]]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n| 2030-01-02_Tiny | 3 | 8 |") == 1 and "| seed42 | 1 |" in printed
    assert "not on FineWeb's validation text" in printed
    assert tool.main(["stats", *logs[:2], "--against", logs[2]]) == 0
    bpb = float(re.search(r"The bar: 0.005 nats x (\S+) BPB", capsys.readouterr().out)[1])
    run = reader.read_run(runs[2][2])
    assert bpb == pytest.approx(run.headline.bpb / run.headline.loss, abs=1e-5)
    assert tool.main(["stats", *logs, "--against", "2026-03-31_ParallelResiduals"]) == 0
    assert "not the same text" in capsys.readouterr().out
    output = tmp_path / "curves.png"
    assert tool.main(["plot", str(made_folder), "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG") and output.stat().st_size > 30_000
    for wrong in (["compare", "nothing"], ["plot", "2026-03-31_ParallelResiduals"],
                  ["compare", logs[0], logs[0]], ["compare", "2026-04"],
                  ["stats", "2026-03-31_ParallelResiduals", "2026-03-25_ValCalib"],
                  ["plot", logs[0], "--output", "/no/such/x.png"],
                  ["plot", logs[0], "--output", str(tmp_path / "curves.svg")]):
        assert tool.main(wrong) == 1 and "error: " in capsys.readouterr().err
    assert tool.main(["compare", str(made_folder), "2026-03-31_ParallelResiduals"]) == 0
    row = re.search(r"\n\| 2026-03-31_Par.*", capsys.readouterr().out)[0]  # SPEC section 10's
    assert "| 3 | 6243 | 96.1 | 1.1228 | 1.1308 | 1.1063 | - |" in row
    assert tool.main(["verify", str(made_folder)]) == 0
    other = tmp_path / "other" / Path(logs[0]).name  # the same file name, another setting
    other.parent.mkdir()
    other.write_text(re.sub(r"(?m)^MATRIX_LR=.*", "MATRIX_LR=9", Path(logs[0]).read_text()))
    assert tool.main(["compare", logs[0], str(other)]) == 0
    printed = capsys.readouterr().out
    assert f"| {logs[0]} | 1 |" in printed and f"| {other} | 1 |" in printed
    assert tool.main(["stats", logs[0], str(other)]) == 1
    assert "MATRIX_LR" in capsys.readouterr().err


def test_step_times_are_not_of_roundings():
    """A log that shows the first steps one by one, in whole ms, has no step time for them."""
    run = reader.Run(Path("x"), train=[reader.Point(step, 1.0, ms=ms) for step, ms in (
        (1, 9.0), (2, 9.0), (500, 40_000.0), (1000, 80_000.0))])
    steps, pace = make_record.figures.step_times(run)
    assert steps == [500, 1000] and pace == pytest.approx([39991 / 498, 80.0])


def test_a_run_without_a_score_is_a_dash(made_folder, runs, tmp_path, capsys):
    """compare goes on and tells why; stats and plot refuse; one seed has no deviation."""
    torn, empty = tmp_path / "torn.txt", tmp_path / "empty"
    torn.write_text(runs[2][0].read_text()[:-300])
    empty.mkdir()
    (empty / "submission.json").write_text("{}")
    assert make_record.main(["compare", str(made_folder), str(torn), str(empty)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("| torn | 1 | 8 |")
    assert re.fullmatch(r"\| empty \| 0( \| -){12} \|", lines[4])
    assert "torn.txt: no final score, so it has no score." in "\n".join(lines)
    assert "empty: no log of a seed that it claims, so it has no score." in lines
    for command in ("stats", "plot"):
        assert make_record.main([command, str(torn)]) == 1
        assert "give logs of finished runs" in capsys.readouterr().err
    assert make_record.main(["stats", str(runs[2][0])]) == 0
    assert re.search(r"\| seed42 \| 1 \| [\d.]+ \| - \| ", capsys.readouterr().out)


def test_a_closed_pipe_is_no_error():
    """What reads the output may stop at any time, as head does."""
    process = h.subprocess.Popen(
        [h.sys.executable, "records/make_record.py", "compare", "2026-03-31_Par"], cwd=h.ROOT,
        stdout=h.subprocess.PIPE, stderr=h.subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() != 1


def test_miscounted_runs_are_corrected_however_they_are_named(tmp_path, monkeypatch):
    """A log, a folder and a published name give BPB over the true bytes, curves and stages too."""
    lines = "2000/20000 val_loss:2.0 val_bpb:1.2 train_time:5ms\n" + LONE
    field_folder(tmp_path, [lines + FIELD_LOG, lines + FIELD_LOG])
    factor = 158633352 / 151080891
    for name, seeds in ((tmp_path, 2), (tmp_path / "train_seed7.log", 1)):
        group = make_record.find_group(str(name))
        assert group.name.endswith(" (bytes corrected)") and group.bpb.n == seeds
        assert group.bpb.mean == pytest.approx(1.15 * factor)
        for run in group.runs:
            assert run.val[0].bpb == pytest.approx(1.2 * factor)
            assert run.scores["sliding"].bpb == pytest.approx(1.15 * factor)
            assert run.counted_bytes == pytest.approx(151080891)
        assert f"{1.15 * factor:.4f} BPB, " in make_record.comparison([str(name)])
        assert make_record.one_group([str(name)]).bpb == group.bpb
    both = make_record.find_groups([str(tmp_path), f"{tmp_path}/"])
    assert all(group.name.endswith(" (bytes corrected)") for group in both)
    drawn = {}
    monkeypatch.setattr(make_record.figures, "plot", lambda groups, *_: drawn.update(groups))
    assert make_record.main(["plot", str(tmp_path)]) == 0
    (run, _), = drawn.values()
    assert run.val[0].bpb == pytest.approx(1.2 * factor)
    (row,) = [row for row in denominator.results() if row["name"].startswith("2026-03-30_tm")]
    raw = next(r for r in denominator.published()["results"] if r["name"] == row["name"])
    factor = raw["counted_over_true"]
    assert row["label"] == raw["name"] + " (bytes corrected)"
    assert row["stages"]["sliding"] == factor * raw["stages"]["sliding"] > row["val_bpb"]
    assert row["val_bpb"] == factor * raw["val_bpb"]


def test_an_audited_miscount_is_corrected(tmp_path):
    """The bytes of a corrected run are the true ones, by whatever the log told them."""
    field_folder(tmp_path, ["byte_audit:lossy bytes:158633352\n" + FIELD_LOG])
    (run,) = make_record.find_group(str(tmp_path)).runs
    assert run.counted_bytes == pytest.approx(151080891)


def test_a_place_is_among_the_others():
    """A published result does not stand beside itself, nor beside those that do not count."""
    rows = [row for row in denominator.results() if row["track"] == make_record.TRACKS[0]]
    counted = [row for row in rows if not row.get("excluded")]
    assert len(counted) < len(rows)
    best = min(counted, key=lambda row: row["val_bpb"])
    text = make_record.standing(make_record.find_group(best["name"]))
    assert f", 0 of {len(counted) - 1} published are better." in text


def test_other_texts_are_not_corrected(runs):
    """A run whose bytes are proven, or far from FineWeb's, is of another text."""
    group = make_record.find_group(str(runs[2][0]))
    assert group.name == "seed42" and group.bpb.mean == reader.read_run(
        runs[2][0]).headline.bpb
    assert denominator.counted(group.runs, {}).other_text


@h.needs_shared
def test_the_scylla_folder_is_corrected(capsys):
    """Its path shows what its name shows: 1.14831, not 1.08760."""
    name = "2026-04-02_Scylla_ParallelResiduals_DepthRecurrence_TTT"
    folder = h.SHARED / "data" / "public_records" / name
    for given in (str(folder), name):
        for command in ("compare", "stats"):
            assert make_record.main([command, given]) == 0
            out = capsys.readouterr().out
            assert "1.14831" in out and "1.08760" not in out and "(bytes corrected)" in out


def test_published_results_take_the_bar():
    """Stats of two published results: the test of #1204 over #1019 as its numbers give it."""
    tool = h.tool("make_record")
    ours, theirs = map(tool.find_group, ("2026-03-31_Parallel", "2026-03-25_ValCalib"))
    text = tool.statistics_text(ours, theirs)
    assert "0.00296 BPB" in text and "\n0.00848 BPB better" in text and "does NOT pass" in text
    assert "\n0.00848 BPB worse" in tool.statistics_text(theirs, ours)
    assert tool.statistics_text(ours, theirs, 0.003).endswith("passes at p < 0.01.")
    assert "(bytes corrected)" in tool.find_group("2026-04-02_PROTEUS").name
    assert tool.find_group("2026-04-02_PROTEUS").bpb.mean == pytest.approx(1.1423, abs=1e-4)


def test_curves_are_labelled(runs, tmp_path, monkeypatch):
    """Five panels with title, units on both axes, a legend and a line for every run."""
    import matplotlib.pyplot as plt

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    runs = [h.tool("runs").read_run(log) for log in runs[2]]
    h.tool("figures").plot({f"seed {r.seed}": [r] for r in runs}, tmp_path / "c.png", "Tiny")
    monkeypatch.undo()
    *panels, rest = kept[0].axes
    assert [panel.get_title() for panel in panels] == [
        "Training loss", "Validation while training", "Final stages", "Learning rate", "Step time"]
    for panel in panels:
        assert panel.get_xlabel() in ("step", "stage") and panel.get_ylabel()
        assert len(panel.get_lines()) >= 3
        assert all(len(line.get_xdata()) for line in panel.get_lines())
    names = [text.get_text() for text in rest.get_legend().get_texts()]
    assert names == ["seed 42", "seed 1337", "seed 2024"]
    stages = [text.get_text() for text in panels[2].get_xticklabels()]
    assert stages == ["post-ema", "roundtrip", "sliding", "ttt"]
    for run, line in zip(runs, panels[2].get_lines(), strict=True):
        assert line.get_ydata()[-1] == run.headline.bpb
    plt.close(kept[0])
