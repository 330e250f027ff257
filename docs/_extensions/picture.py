"""The directive ``picture``: a picture of ``docs/pictures`` in its light or its dark version, as the theme asks.

    ```{picture} family
    One feature map under every function of the family.
    ```

The content is the text for readers who do not see the picture.
"""

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Picture(SphinxDirective):
    """Two images, of which each theme shows one."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        name, text = self.arguments[0], " ".join(self.content)
        if not text:
            raise self.error(f"picture {name} needs a text that describes it")
        found: list[nodes.Node] = []
        for theme in ("light", "dark"):
            path = Path(self.env.srcdir, "pictures", f"{name}-{theme}.svg")
            if not path.exists():
                raise self.error(f"no picture {path.name}: draw it with scripts/plot_docs.py")
            self.env.note_dependency(str(path))
            found.append(nodes.image(uri=f"/pictures/{path.name}", alt=text, classes=["picture", f"only-{theme}"]))
        return found


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("picture", Picture)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
