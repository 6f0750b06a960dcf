"""A griffe extension: what the docstrings of peftlib need to be read as Google-style Markdown."""

import re
from typing import Any

from griffe import Extension, Object

_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            prose, *rest = _EXAMPLE.split(obj.docstring.value, maxsplit=1)
            # Two shapes in a row would be a link; and griffe knows the section by its plural.
            obj.docstring.value = "Examples:".join([prose.replace("] [", "] \\["), *rest])
