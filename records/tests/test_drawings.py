"""records/drawings.py: the pictures say what the code says, and can be read."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path
from PIL import Image

import drawings
import harness as h
import train_gpt as t

CONFIGS = {
    "record": {}, "demo": t.PRESETS["demo"], "no recurrence": dict(recur_layers=()),
    "early recurrence": dict(recur_layers=(2, 3), recur_untie_mlp=False),
    "recurrence across the turn": dict(recur_layers=(3, 4, 5, 6), parallel_start_layer=8),
    "one lane": dict(parallel_start_layer=11, xsa_last_n=2), "even": dict(num_layers=12),
    "plain": dict(ve_enabled=False, smear_enabled=False, bigram_vocab_size=0, xsa_last_n=0,
                  tie_embeddings=False)}


@pytest.fixture(params=CONFIGS)
def drawn(request) -> tuple[t.Config, drawings.Architecture]:
    """A configuration and its picture."""
    c = t.Config(**CONFIGS[request.param])
    return c, drawings.Architecture(c)


def test_the_architecture_is_that_of_the_code(drawn):
    """Passes, their order, second passes, lanes, skips, XSA, value embeddings."""
    c, picture = drawn
    plan = t.layer_plan(c, bool(c.recur_layers))
    cells = picture.left[::-1] + picture.right
    assert [cell.run for cell in cells] == plan
    assert [cell.run.layer for cell in cells if cell.again] == [*c.recur_layers]
    for side in (picture.left, picture.right):
        rows = [cell.row for cell in side]
        assert rows == sorted({*rows})
    stored = [cell.row for cell in picture.left if cell.run.store]
    skips = [cell.row for cell in picture.right if cell.run.skip is not None]
    assert skips == stored and len(skips) == c.num_layers // 2
    said = drawings.words(picture.canvas.figure)
    text = " ".join(said)
    assert f"{c.num_layers} layers in {len(plan)} passes, width {c.model_dim}" in text
    start = "40 % of the run" if c.model_dim == 64 else "step 3000"
    again = f"From {start} on, layers {str(c.recur_layers)[1:-1]} run again"
    assert (again in text) == ("run again" in text) == bool(c.recur_layers)
    last = c.num_layers - c.xsa_last_n
    assert text.count("+ XSA") == sum(run.layer >= last for run in plan)
    assert text.count("own MLP") == len(c.recur_layers) * c.recur_untie_mlp
    assert said.count("MLP") == sum(run.lanes for run in plan)
    for name, there in (("SmearGate", c.smear_enabled), ("bigram", c.bigram_vocab_size),
                        ("two lanes", c.parallel_start_layer < c.num_layers),
                        ("tied", c.tie_embeddings), ("value\nembedding", c.ve_enabled)):
        assert (name in text) == bool(there), name
    arrows = Counter(to_hex(a.get_edgecolor()) for a in picture.canvas.axes.patches
                     if isinstance(a, FancyArrowPatch))
    assert arrows[drawings.SKIP] == len(skips)
    assert arrows[drawings.COLOURS["table"][1]] == c.ve_enabled * sum(
        run.layer in c.ve_layers for run in plan)


def check_legible(canvas: drawings.Canvas) -> None:
    """No text leaves the picture, meets another or is crossed by a line; none is small."""
    figure, axes = canvas.figure, canvas.axes
    figure.canvas.draw()
    boxes = {text: text.get_window_extent().transformed(axes.transData.inverted())
             for text in axes.texts if text.get_text()}
    lines = [Path(points) for patch in axes.patches
             for points in patch.get_path().to_polygons(closed_only=False)]
    for text, box in boxes.items():
        assert box.x0 > 0 < box.y1 and box.x1 < drawings.WIDTH and box.y0 < axes.get_ylim()[0]
        assert text.get_fontsize() * figure.dpi / 72 >= 28, text
        for line in lines:
            assert not line.intersects_bbox(box, filled=False), text
    for (one, a), (other, b) in combinations(boxes.items(), 2):
        assert not a.overlaps(b), (one, other)


def test_pictures_can_be_read(drawn):
    """With any configuration."""
    c, picture = drawn
    check_legible(picture.canvas)
    check_legible(drawings.pipeline(c))


def test_the_documents_have_todays_pictures(tmp_path):
    """The script writes them, the same each time and small; those in docs/ say the same."""
    for folder in ("a", "b"):
        assert drawings.main(["--output", str(tmp_path / folder)]) == 0
    for name in ("architecture.png", "pipeline.png"):
        data = (tmp_path / "a" / name).read_bytes()
        assert data == (tmp_path / "b" / name).read_bytes() and len(data) < 120_000
        ours, theirs = (Image.open(folder / name) for folder in (tmp_path / "a", h.ROOT / "docs"))
        assert ours.size == theirs.size and ours.width == drawings.WIDTH
        assert json.loads(ours.text["Description"]) == json.loads(theirs.text["Description"])


def test_the_pipeline_names_the_run():
    """Its numbers are the configuration's."""
    c = t.Config(max_wallclock_seconds=60.0, eval_stride=32, size_limit=8_000_000)
    text = " ".join(drawings.words(drawings.pipeline(c).figure))
    assert "60 s" in text and "stride 32" in text and "8,000,000 bytes" in text
