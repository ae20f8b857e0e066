"""Draw the two pictures of the documents: the model, and the way from text to a record.

    python records/drawings.py --output docs      writes architecture.png and pipeline.png

What the code can say is taken from the code: the layers, their order, lanes, recurrence and skips
from `layer_plan`, numbers from `Config`. Coordinates are pixels; y grows downwards.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Line
from PIL import Image
from PIL.PngImagePlugin import PngInfo

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t  # noqa: E402

WIDTH = 1600
FONT = 29  # pixels; a page that shows the picture 900 pixels wide shows 16, as its text has
ROW = 116  # pixels from a layer to the next
INK, SKIP = "#263238", "#b0413e"
COLOURS = {  # kind -> face, edge
    "plain": ("#f5f7f8", "#90a4ae"), "layer": ("#dbe9f6", "#3b6ea5"),
    "attention": ("#d9efdf", "#2e7d4f"), "mlp": ("#fde8cf", "#c46a12"),
    "again": ("#e9def5", "#6a4ba3"), "table": ("#fff4c2", "#8a6d1d")}
LEFT, RIGHT, LANE, MARGIN = 250, 945, 165, 1455  # middles of columns; lanes are beside RIGHT

REMARKS = (
    "Each sublayer reads a learned mix of its stream and of the state that enters layer 0.",
    "A skip adds a stored state, times learned weights and gates, to the stream or to both lanes.",
    "XSA takes from a head's output its component along the token's own value.")


class Canvas:
    """A picture of boxes, arrows and lines of text."""

    def __init__(self, height: int) -> None:
        self.figure = Figure((WIDTH / 100, height / 100), dpi=100, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.set_axis_off()

    def text(self, x: float, y: float, text: str, **style: str) -> None:
        """Lines of text; (x, y) is their middle unless `style` says otherwise."""
        usual = dict(ha="center", va="center", color=INK)
        self.axes.text(x, y, text, fontsize=FONT * 0.72, linespacing=1.25, **usual | style)

    def box(self, x: float, y: float, w: float, h: float, text: str, kind: str) -> None:
        """A rounded rectangle with its middle at (x, y), in the colours of its kind."""
        face, edge = COLOURS[kind]
        self.axes.add_patch(FancyBboxPatch(
            (x - w / 2, y - h / 2), w, h, boxstyle="round,pad=0,rounding_size=12",
            facecolor=face, edgecolor=edge, linewidth=2))
        self.text(x, y, text)

    def arrow(self, *points: tuple[float, float], colour: str = INK) -> None:
        """A line through the points, with a head at the last."""
        self.axes.add_patch(FancyArrowPatch(
            path=Line(points), arrowstyle="-|>,head_length=0.5,head_width=0.22", linewidth=2.5,
            mutation_scale=30, color=colour, joinstyle="miter", capstyle="butt"))


class Cell(NamedTuple):
    """A pass of a layer and its place."""

    run: t.LayerPass
    again: bool  # the layer's second pass
    row: int  # from the bottom


def columns(c: t.Config) -> tuple[list[Cell], list[Cell]]:
    """The passes before the first that adds a skip, which go down, and the others, which go up.

    Both from the bottom. A pass that stores its output is in one row with the pass that adds it.
    """
    plan = t.layer_plan(c, bool(c.recur_layers))
    known = [(run, run.layer in [earlier.layer for earlier in plan[:n]])
             for n, run in enumerate(plan)]
    turn = next(n for n, run in enumerate(plan) if run.skip is not None)
    down, up, row = known[:turn][::-1], known[turn:], 0
    left, right = [], []
    while down or up:
        alone = not (down and up) or down[0][0].store != (up[0][0].skip is not None)
        go_down = bool(down) and not (alone and up and down[0][0].store)
        if go_down:
            left.append(Cell(*down.pop(0), row))
        if up and not (alone and go_down):
            right.append(Cell(*up.pop(0), row))
        row += 1
    return left, right


class Architecture:
    """The picture of a configuration's model."""

    def __init__(self, c: t.Config) -> None:
        self.config = c
        self.left, self.right = columns(c)
        self.top = 1 + max(cell.row for cell in self.left + self.right)
        self.canvas = Canvas(round(self.y(-1) + 240))
        self.title()
        for cell in self.left:
            self.layer(cell, LEFT)
        for cell in self.right:
            self.layer(cell, RIGHT)
        self.stream()
        self.skips()
        self.ends()
        self.notes()

    def y(self, row: float) -> float:
        """The middle of a row."""
        return 150 + (self.top + 2 - row) * ROW

    def title(self) -> None:
        """The model in a line."""
        c, passes = self.config, len(self.left + self.right)
        self.canvas.text(WIDTH / 2, 50, f"The model: {c.num_layers} layers in {passes} passes, "
                         f"width {c.model_dim}", weight="bold")

    def layer(self, cell: Cell, x: float) -> None:
        """One pass of a layer: a box, or a frame around a box for each lane."""
        run, c, y = cell.run, self.config, self.y(cell.row)
        mlp = "MLP" if run.repeat is None else "own MLP"
        attention = "attention" + " + XSA" * (run.layer >= c.num_layers - c.xsa_last_n)
        kind = "again" if cell.again else "layer"
        if not run.lanes:
            name = f"{run.layer} again" if cell.again else f"{run.layer}"
            wide = 450 if x == LEFT else 520
            self.canvas.box(x, y, wide, 64, f"{name}:  {attention} \u2192 {mlp}", kind)
            return
        self.canvas.box(x, y, 4 * LANE, 64, "", kind)
        self.canvas.text(x - 2 * LANE + 16, y, f"{run.layer}", ha="left")
        self.canvas.box(x - LANE, y, 190, 48, mlp, "mlp")
        self.canvas.box(x + LANE, y, 290, 48, attention, "attention")

    def stream(self) -> None:
        """From each pass to the next: one stream, or two lanes that write to each other."""
        arrow, y = self.canvas.arrow, self.y
        for above, below in zip(self.left[1:], self.left, strict=False):
            arrow((LEFT, y(above.row) + 32), (LEFT, y(below.row) - 32))
        low = y(0) + 75
        arrow((LEFT, y(0) + 32), (LEFT, low), (RIGHT, low), (RIGHT, y(self.right[0].row) + 32))
        for below, above in zip(self.right, self.right[1:], strict=False):
            start, end = y(below.row) - 32, y(above.row) + 32
            for side in (-LANE, LANE) if above.run.lanes else (0,):
                arrow((RIGHT + side, start), (RIGHT + side, end))
                if below.run.lanes:
                    arrow((RIGHT + side, start), (RIGHT - 0.88 * side, end))

    def skips(self) -> None:
        """From what is stored to what adds it."""
        rows = {cell.row for cell in self.right if cell.run.skip is not None}
        lanes = {cell.row for cell in self.right if cell.run.lanes}
        for row in rows & {cell.row for cell in self.left}:
            end = RIGHT - (2 * LANE if row in lanes else 260)
            self.canvas.arrow((LEFT + 225, self.y(row)), (end, self.y(row)), colour=SKIP)
        self.canvas.text((LEFT + 225 + RIGHT - 2 * LANE) / 2, self.y(max(rows)) - 24, "skip",
                         color=SKIP)

    def ends(self) -> None:
        """What comes before the first layer and after the last."""
        canvas, y, c, first = self.canvas, self.y, self.config, self.left[-1].row
        steps = ["token ids", "embedding" + " + bigram hash" * bool(c.bigram_vocab_size),
                 "RMSNorm" + " \u2192 SmearGate" * c.smear_enabled]
        rows = (self.top + 2, self.top + 1, self.top)
        for row, text, kind in zip(rows, steps, ("plain", "table", "plain"), strict=True):
            canvas.box(LEFT, y(row), 450, 64, text, kind)
        for row, end in zip(rows, (*rows[1:], first), strict=True):
            canvas.arrow((LEFT, y(row) + 32), (LEFT, y(end) - 32))
        last, lanes = y(self.right[-1].row), self.right[-1].run.lanes
        for side in (-LANE, LANE) if lanes else (0,):
            canvas.arrow((RIGHT + side, last - 32), (RIGHT + side, y(self.top) + 32))
        merge = "lanes merged \u2192 RMSNorm" if lanes else "RMSNorm"
        head = "tied head" if c.tie_embeddings else "head"
        for row, text in ((self.top, merge), (self.top + 1, f"{head}, softcap "
                          f"{t.show(c.logit_softcap)}"), (self.top + 2, "nats of the next token")):
            kind = "table" if row == self.top + 1 else "plain"
            canvas.box(RIGHT, y(row), 520, 64, text, kind)
            if row > self.top:
                canvas.arrow((RIGHT, y(row - 1) - 32), (RIGHT, y(row) + 32))

    def notes(self) -> None:
        """Value embeddings beside the layers, and remarks."""
        canvas, c = self.canvas, self.config
        valued = [self.y(cell.row) for cell in self.left + self.right
                  if c.ve_enabled and cell.run.layer in c.ve_layers]
        if valued:
            middle, high = (min(valued) + max(valued)) / 2, max(valued) - min(valued) + 64
            canvas.box(MARGIN, middle, 250, max(high, 110), "value\nembedding\nof the token",
                       "table")
        for y in valued:
            canvas.arrow((MARGIN - 125, y), (RIGHT + LANE + 145, y), colour=COLOURS["table"][1])
        lanes = [self.y(cell.row) for cell in self.right if cell.run.lanes]
        if lanes:
            canvas.text(MARGIN, lanes[0], "two lanes: each\nsublayer writes\nto both")
        start = (f"step {t.show(c.recur_start_step)}" if c.recur_start_step >= 1 else
                 f"{100 * c.recur_start_step:g} % of the run")
        layers = ", ".join(map(str, c.recur_layers))
        again = (f"From {start} on, layers {layers} run again as one block"
                 + ", with MLPs of their own" * c.recur_untie_mlp + ".")
        for n, text in enumerate((*REMARKS, *[again] * bool(c.recur_layers))):
            canvas.text(25, self.y(-1) + 60 + 45 * n, text, ha="left")


def stages(c: t.Config) -> list[tuple[str, str, list[str]]]:
    """The way from text to a record: (what does it, colours, its four steps) for each part."""
    seconds, stride, limit = t.show(c.max_wallclock_seconds), c.eval_stride, f"{c.size_limit:,}"
    return [
        ("retokenize_scylla.py", "table", [
            "FineWeb shards\nof SentencePiece\nids",
            "new ids, compared\nwith the text\nbyte for byte",
            "shards of ids of\nthe Scylla\nvocabulary",
            "ledger: the source\nbytes of every\nshard"]),
        ("train_gpt.py: training and export", "mlp", [
            f"training, {seconds} s:\nMuon and AdamW,\nEMA, late QAT",
            "GPTQ: weights\nto INT5 and INT6", "entropy coding:\nrANS, or lzma\nwhere smaller",
            f"artifact + packed\ncode: at most\n{limit} bytes"]),
        ("train_gpt.py: evaluation", "attention", [
            "model reloaded\nfrom the artifact",
            f"roundtrip, then\nsliding window,\nstride {stride}",
            "test-time training:\nscore a chunk,\nthen train on it",
            "bits per byte:\nbits of all tokens /\nsource bytes"]),
        ("records/make_record.py", "layer", [
            "logs of three\nseeds", "make: tables,\ncurves, statistics", "record folder",
            "verify: the rules\nof the challenge"])]


def pipeline(c: t.Config) -> Canvas:
    """The picture of that way: a band for each part."""
    canvas, top = Canvas(1290), 245
    canvas.text(WIDTH / 2, 50, "From text to a record", weight="bold")
    at = [245 + 372 * n for n in range(4)]
    for n, (name, kind, steps) in enumerate(stages(c)):
        y = top + 300 * n
        canvas.box(WIDTH / 2 + 3, y - 22, 1490, 230, "", "plain")
        canvas.text(at[0] - 155, y - 105, name, ha="left", weight="bold")
        for x, step in zip(at, steps, strict=True):
            canvas.box(x, y, 310, 150, step, kind)
        for left, right in zip(at, at[1:], strict=False):
            canvas.arrow((left + 155, y), (right - 155, y))
        if n:
            start, gap = at[2 if n == 1 else 3], y - 172
            canvas.arrow((start, y - 225), (start, gap), (20, gap), (20, y), (at[0] - 155, y))
    ledger, score = (at[3] + 155, top), (at[3] + 155, top + 600)
    canvas.arrow(ledger, (1582, top), (1582, top + 600), score)
    return canvas


def words(figure: Figure) -> list[str]:
    """The texts of a picture in the order in which they were drawn."""
    return [text.get_text() for text in figure.axes[0].texts]


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of 64 colours, which is a quarter of one with all; it also holds the words."""
    figure.canvas.draw()
    pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    about = PngInfo()
    about.add_text("Description", json.dumps(words(figure)))
    pixels.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True, pnginfo=about)


def main(arguments: list[str] | None = None) -> int:
    """Write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    folder = parser.parse_args(arguments).output
    folder.mkdir(parents=True, exist_ok=True)
    save(Architecture(t.Config()).canvas.figure, folder / "architecture.png")
    save(pipeline(t.Config()).figure, folder / "pipeline.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
