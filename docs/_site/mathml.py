"""A Markdown extension that writes equations as MathML when the site is built: no script and no font at reading."""

import re
import textwrap
from collections.abc import Iterator

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

# Equations stand in `math` fences on pages, as GitHub reads them too, and in directives in docstrings.
_FENCE = re.compile(r"^```math\n(?P<latex>.*?)^```$|^(?P<mark>```+)[^`\n]*\n.*?^(?P=mark)$", re.MULTILINE | re.DOTALL)
_DIRECTIVE = re.compile(r"^\.\. math:: (.*(?:\n[ ]+\S.*)*)", re.MULTILINE)
_INLINE = re.compile(r"\$`([^`]+)`\$|:math:`([^`]+)`")


class MathML(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Equations(md), "equations", 28)  # before code fences are read


class _Equations(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        return "".join(self._parts("\n".join(lines))).split("\n")

    def _parts(self, text: str) -> Iterator[str]:
        """Code is left as it is; elsewhere each equation is replaced."""
        at = 0
        for fence in _FENCE.finditer(text):
            yield self._replaced(text[at : fence.start()])
            yield fence[0] if fence["latex"] is None else self._block(fence["latex"])
            at = fence.end()
        yield self._replaced(text[at:])

    def _replaced(self, text: str) -> str:
        text = _DIRECTIVE.sub(lambda found: self._block(found[1]), text)
        return _INLINE.sub(lambda found: self._stored(convert(found[1] or found[2])), text)

    def _block(self, latex: str) -> str:
        latex = " ".join(textwrap.dedent(latex).split())
        return "\n" + self._stored(f'<div class="equation">{convert(latex, display="block")}</div>') + "\n"

    def _stored(self, html: str) -> str:
        return self.md.htmlStash.store(html)
