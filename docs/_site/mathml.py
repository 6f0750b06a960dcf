"""A Markdown extension that writes equations as MathML when the site is built: no script and no font at reading."""

import re
import textwrap
from collections.abc import Iterator

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

_FENCE = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # pages, as GitHub reads it too
_DIRECTIVE = re.compile(r"^\.\. math:: (.*(?:\n[ ]+\S.*)*)", re.MULTILINE)  # docstrings
_INLINE = re.compile(r"\$`([^`]+)`\$|:math:`([^`]+)`")
_OTHER_FENCE = re.compile(r"^(```+)(?!math\n).*?^\1$", re.MULTILINE | re.DOTALL)


class MathML(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Equations(md), "equations", 28)  # before code fences are read


class _Equations(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        return "".join(self._parts("\n".join(lines))).split("\n")

    def _parts(self, text: str) -> Iterator[str]:
        """Code is left as it is; between code blocks each equation is replaced."""
        at = 0
        for code in _OTHER_FENCE.finditer(text):
            yield self._replaced(text[at : code.start()])
            yield code[0]
            at = code.end()
        yield self._replaced(text[at:])

    def _replaced(self, text: str) -> str:
        for pattern in (_FENCE, _DIRECTIVE):
            text = pattern.sub(self._block, text)
        return _INLINE.sub(lambda found: self._stored(convert(found[1] or found[2])), text)

    def _block(self, found: re.Match[str]) -> str:
        latex = " ".join(textwrap.dedent(found[1]).split())
        return "\n" + self._stored(f'<div class="equation">{convert(latex, display="block")}</div>') + "\n"

    def _stored(self, html: str) -> str:
        return self.md.htmlStash.store(html)
