"""Draws the pictures of the pages as SVG: `python docs/_site/drawings.py` writes them into docs/assets/drawings."""

from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "assets" / "drawings"

# A page of the site sets these colors for its scheme; elsewhere the reader's own scheme decides.
_STYLE = """
.d-text{font:13px system-ui,sans-serif;fill:var(--drawing-ink,#1f2933);text-anchor:middle;dominant-baseline:central}
.d-small{font-size:11px;fill:var(--drawing-soft,#6b7687)}
.d-left{text-anchor:start}
.d-line{stroke:var(--drawing-soft,#6b7687);stroke-width:1.5;fill:none}
.d-head{fill:var(--drawing-soft,#6b7687)}
.d-frozen{fill:var(--drawing-frozen,#e6ebf2);stroke:var(--drawing-soft,#8a94a6)}
.d-trained{fill:var(--drawing-trained,#f6b26b);stroke:var(--drawing-trained-ink,#7a3e00)}
.d-trained-text{fill:var(--drawing-trained-ink,#7a3e00)}
.d-ghost{fill:none;stroke:var(--drawing-soft,#8a94a6);stroke-dasharray:4 3}
.d-sum{fill:var(--drawing-ground,#fff);stroke:var(--drawing-soft,#6b7687);stroke-width:1.5}
"""
_DARK = """@media (prefers-color-scheme:dark){:root{--drawing-ink:#e4e8ef;--drawing-soft:#8a94a6;
--drawing-frozen:#333b4d;
--drawing-trained:#b4691a;--drawing-trained-ink:#ffe3c2;--drawing-ground:#1e2129}}
"""


class Drawing:
    """Shapes on a canvas of a fixed size; gray is frozen, orange is trained."""

    def __init__(self, title: str, width: int, height: int) -> None:
        self.title, self.width, self.height = title, width, height
        self.parts: list[str] = []

    def text(self, x: float, y: float, text: str, style: str = "") -> None:
        self.parts.append(f'<text class="d-text {style}" x="{x:g}" y="{y:g}">{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, text: str = "", kind: str = "frozen") -> None:
        size = f'width="{width:g}" height="{height:g}"'
        self.parts.append(f'<rect class="d-{kind}" x="{x:g}" y="{y:g}" {size} rx="5"/>')
        self.text(x + width / 2, y + height / 2, text, f"d-{kind}-text")

    def shape(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        corners = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polygon class="d-{kind}" points="{corners}"/>')

    def funnel(self, x: float, y: float, width: float, left: float, right: float, text: str) -> None:
        """A trained matrix from `left` features to `right`, centered on the height y."""
        corners = [(x, y - left / 2), (x + width, y - right / 2), (x + width, y + right / 2), (x, y + left / 2)]
        self.shape(corners, "trained")
        self.text(x + width / 2, y, text, "d-trained-text")

    def line(self, *points: tuple[float, float]) -> None:
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path class="d-line" d="M{path}"/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        self.line(*points)
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        wings = [(x - 8 * dx - 4 * side * dy, y - 8 * dy - 4 * side * dx) for side in (1, -1)]
        self.shape([(x, y), *wings], "head")

    def sum(self, x: float, y: float, text: str = "+") -> None:
        self.parts.append(f'<circle class="d-sum" cx="{x:g}" cy="{y:g}" r="11"/>')
        self.text(x, y, text)

    def svg(self, style: str = _STYLE + _DARK) -> str:
        """A file of its own, which follows the reader's scheme."""
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        body = "\n".join(self.parts)
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(self.title)}">'
        return f"{head}\n<style>{style}</style>\n{body}\n</svg>\n"

    def inline(self) -> str:
        """For a page of the site, whose style sheet has the colors; on one line, as Markdown needs it."""
        return self.svg(_STYLE).replace("\n", " ")


def block(drawing: Drawing, trained: str) -> None:
    """A small transformer, from tokens to head, at the left; the modules in `trained` carry an adapter."""
    chosen = trained.split()

    def module(name: str, x: float, y: float, width: float) -> None:
        drawing.box(x, y, width, 26, name.split(":")[0], "trained" if name.split(":")[-1] in chosen else "frozen")

    drawing.box(26, 62, 168, 248, kind="ghost")
    drawing.text(208, 186, "× N", "d-small d-left")
    for name, y in (("embedding", 22), ("norm:norm1", 72), ("attention", 140), ("out", 174), ("norm:norm2", 210),
                    ("up", 244), ("down", 278), ("head", 322)):  # fmt: skip
        module(name, 40, y, 140)
    for name, x in (("q", 40), ("k", 89), ("v", 138)):
        module(name, x, 106, 42)
    for above, below in ((48, 72), (98, 106), (132, 140), (166, 174), (200, 210), (236, 244), (270, 278), (304, 322)):
        drawing.line((110, above), (110, below))
    drawing.line((232, 22), (232, 348))


def typed(title: str, trained: str, detail: Callable[[Drawing], None]) -> Drawing:
    """The picture of an adapter type: where it sits, and what it does there."""
    drawing = Drawing(title, 700, 370)
    block(drawing, trained)
    detail(drawing)
    return drawing


def linear_with_branch(drawing: Drawing) -> None:
    """x through the frozen weight, and through A and B beside it."""
    drawing.text(262, 130, "x")
    drawing.arrow((272, 130), (340, 130))
    drawing.box(340, 80, 110, 100, "W")
    drawing.text(395, 68, "frozen [out, in]", "d-small")
    drawing.arrow((450, 130), (529, 130))
    drawing.arrow((300, 130), (300, 260), (340, 260))
    drawing.funnel(340, 260, 46, 90, 26, "A")
    drawing.arrow((386, 260), (404, 260))
    drawing.funnel(404, 260, 46, 26, 90, "B")
    drawing.text(395, 322, "trained [rank, in], [out, rank]; B starts at zero", "d-small")
    drawing.arrow((450, 260), (540, 260), (540, 141))
    drawing.text(500, 248, "× s", "d-small")
    drawing.sum(540, 130)


def lora(drawing: Drawing) -> None:
    linear_with_branch(drawing)
    drawing.arrow((551, 130), (640, 130))
    drawing.text(652, 130, "y")


def dora(drawing: Drawing) -> None:
    linear_with_branch(drawing)
    drawing.arrow((551, 130), (570, 130))
    drawing.box(570, 105, 72, 50, "m / ‖V‖", "trained")
    drawing.text(606, 92, "length of each row", "d-small")
    drawing.text(606, 170, "V = W + s·B·A", "d-small")
    drawing.arrow((642, 130), (670, 130))
    drawing.text(682, 130, "y")


def ia3(drawing: Drawing) -> None:
    drawing.text(262, 180, "x")
    drawing.arrow((272, 180), (340, 180))
    drawing.box(340, 130, 110, 100, "W")
    drawing.text(395, 118, "frozen [out, in]", "d-small")
    drawing.arrow((450, 180), (529, 180))
    drawing.sum(540, 180, "⊙")
    drawing.box(528, 80, 24, 60, "l", "trained")
    drawing.text(540, 66, "trained, one factor for each feature; starts at one", "d-small")
    drawing.text(480, 270, 'on="input": the factor multiplies x instead', "d-small")
    drawing.arrow((540, 140), (540, 169))
    drawing.arrow((551, 180), (640, 180))
    drawing.text(652, 180, "y")


def bottleneck(drawing: Drawing) -> None:
    drawing.text(262, 110, "x")
    drawing.arrow((272, 110), (300, 110))
    drawing.box(300, 80, 100, 60, "module")
    drawing.text(350, 68, "frozen", "d-small")
    drawing.arrow((400, 110), (609, 110))
    drawing.arrow((430, 110), (430, 240), (450, 240))
    drawing.funnel(450, 240, 46, 90, 26, "down")
    drawing.arrow((496, 240), (508, 240))
    drawing.sum(519, 240, "σ")
    drawing.arrow((530, 240), (542, 240))
    drawing.funnel(542, 240, 46, 26, 90, "up")
    drawing.arrow((588, 240), (620, 240), (620, 121))
    drawing.text(632, 180, "× s", "d-small d-left")
    drawing.text(520, 302, "trained; up starts at zero", "d-small")
    drawing.sum(620, 110)
    drawing.arrow((631, 110), (665, 110))
    drawing.text(678, 110, "y")
    drawing.line((285, 110), (285, 330), (430, 330))
    drawing.text(440, 330, 'position="parallel": the branch starts at x', "d-small d-left")


def cells(drawing: Drawing, x: float, y: float, learned: int, tokens: int, size: float = 34) -> None:
    for at in range(learned + tokens):
        text = f"P{at + 1}" if at < learned else f"t{at - learned + 1}"
        drawing.box(x + at * (size + 4), y, size, size, text, "trained" if at < learned else "frozen")


def prefix(drawing: Drawing) -> None:
    for y, name in ((110, "K"), (160, "V")):
        drawing.text(275, y + 17, name)
        cells(drawing, 295, y, 3, 5)
    drawing.text(352, 92, "trained", "d-small")
    drawing.text(505, 92, "of the tokens", "d-small")
    drawing.text(275, 257, "Q")
    cells(drawing, 409, 240, 0, 5)
    drawing.arrow((502, 240), (502, 200))
    drawing.text(514, 219, "each token attends to all of a row", "d-small d-left")
    drawing.text(447, 310, "in each attention; no position, in no cache", "d-small")


def prompt(drawing: Drawing) -> None:
    cells(drawing, 295, 110, 3, 5)
    drawing.text(352, 92, "trained", "d-small")
    drawing.text(505, 92, "embedded tokens", "d-small")
    drawing.arrow((445, 144), (445, 190))
    drawing.box(295, 190, 300, 60, "the model, frozen")
    drawing.arrow((445, 250), (445, 290))
    drawing.text(445, 306, "outputs at the tokens", "d-small")


def full(drawing: Drawing) -> None:
    drawing.text(262, 180, "x")
    drawing.arrow((272, 180), (360, 180))
    drawing.box(360, 130, 110, 100, "W′", "trained")
    drawing.text(415, 246, "trained copy, used in place of W", "d-small")
    drawing.box(360, 40, 110, 60, "W")
    drawing.text(480, 70, "frozen, kept", "d-small d-left")
    drawing.line((415, 100), (415, 130))
    drawing.arrow((470, 180), (620, 180))
    drawing.text(634, 180, "y")


def merging() -> Drawing:
    drawing = Drawing("merge adds the low-rank product to the weight; unmerge puts the old weight back", 660, 190)
    drawing.box(20, 50, 90, 90, "W")
    drawing.text(128, 95, "+ s ·")
    drawing.box(150, 50, 26, 90, "B", "trained")
    drawing.box(182, 50, 90, 26, "A", "trained")
    drawing.arrow((290, 80), (390, 80))
    drawing.text(340, 68, "merge", "d-small")
    drawing.arrow((390, 112), (290, 112))
    drawing.text(340, 126, "unmerge", "d-small")
    drawing.box(405, 50, 90, 90, "W′")
    drawing.text(450, 158, "one matrix: the cost of the base", "d-small")
    drawing.box(540, 60, 70, 70, "W", "ghost")
    drawing.text(575, 46, "backup", "d-small")
    return drawing


def rows() -> Drawing:
    """A batch of five rows, each through adapters of its own, beside one product with the frozen weight."""
    drawing = Drawing("rows of one batch go through adapters of their own, beside one base", 700, 230)
    drawing.text(62, 22, "one batch", "d-small")
    drawing.text(285, 22, "the base, once for all rows", "d-small")
    drawing.text(470, 22, "each row's own adapters", "d-small")
    drawing.box(240, 36, 90, 170, "W")
    for at, names in enumerate((["ben"], ["anna"], [], ["anna", "ben"], ["ben"])):
        y = 36 + 35 * at
        drawing.box(20, y, 84, 30, f"row {at}")
        drawing.line((104, y + 15), (240, y + 15))
        drawing.line((330, y + 15), (400, y + 15))
        for place, name in enumerate(names):
            drawing.box(400 + 74 * place, y, 66, 30, name, "trained")
        drawing.arrow((400 + 74 * len(names) - 8 * bool(names), y + 15), (620, y + 15))
        drawing.text(634, y + 15, f"y{at}")
    drawing.text(220, 222, 'route(model, ["ben", "anna", None, ("anna", "ben"), "ben"])', "d-small d-left")
    return drawing


def journey() -> Drawing:
    """The whole idea in a row: inject, train, then save, merge or eject."""
    drawing = Drawing("inject adapters, train them alone, then save, merge or eject them", 740, 210)

    def model(x: float, title: str, adapters: bool, weight: str = "W") -> None:
        for layer in range(3):
            drawing.box(x, 44 + 46 * layer, 70, 36, weight)
            if adapters:
                drawing.box(x + 76, 48 + 46 * layer, 22, 28, "", "trained")
        drawing.text(x + 35, 22, title)

    model(10, "your model", adapters=False)
    drawing.arrow((90, 108), (150, 108))
    drawing.text(120, 94, "inject", "d-small")
    model(160, "train", adapters=True)
    drawing.arrow((270, 108), (330, 62), (400, 62))
    drawing.text(345, 48, "save", "d-small")
    drawing.box(405, 50, 22, 24, "", "trained")
    drawing.text(436, 62, "task.safetensors, a few hundred kB", "d-small d-left")
    drawing.arrow((270, 108), (400, 108))
    drawing.text(345, 96, "merge", "d-small")
    drawing.box(405, 92, 70, 32, "W′")
    drawing.text(484, 108, "same outputs, the cost of the base", "d-small d-left")
    drawing.arrow((270, 108), (330, 154), (400, 154))
    drawing.text(345, 142, "eject", "d-small")
    drawing.box(405, 138, 70, 32, "W")
    drawing.text(484, 154, "the model that you began with, to the bit", "d-small d-left")
    drawing.text(205, 196, "gray: frozen · orange: trained", "d-small")
    return drawing


def staircase() -> Drawing:
    drawing = Drawing("gradual unfreezing: the head trains first, then one more layer at a time", 560, 250)
    names = ["head", "layer 3", "layer 2", "layer 1", "embedding"]
    for row, name in enumerate(names):
        drawing.text(88, 42 + 34 * row, name, "d-small")
        for stage in range(5):
            drawing.box(130 + 80 * stage, 28 + 34 * row, 76, 28, "", "trained" if stage >= row else "frozen")
    for stage in range(5):
        drawing.text(130 + 80 * stage, 212, f"step {100 * stage}", "d-small")
    drawing.text(330, 234, "schedules.every(100)", "d-small")
    return drawing


def all_drawings() -> dict[str, Drawing]:
    return {
        "journey": journey(),
        "merge": merging(),
        "rows": rows(),
        "unfreezing": staircase(),
        "lora": typed("LoRA: a low-rank branch beside frozen weights", "q v", lora),
        "dora": typed("DoRA: LoRA, and a trained length for each row", "q v", dora),
        "ia3": typed("IA3: a trained factor for each feature", "k v down", ia3),
        "bottleneck": typed("A bottleneck after a module, or in parallel with it", "attention down", bottleneck),
        "prefix": typed("Prefix: learned keys and values in front of those of the tokens", "attention", prefix),
        "prompt": typed("Prompt: learned vectors in front of the embedded tokens", "embedding", prompt),
        "full": typed("Full: a trained copy in place of a frozen weight", "norm1 norm2 head", full),
    }


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, drawing in all_drawings().items():
        (FOLDER / f"{name}.svg").write_text(drawing.svg())
