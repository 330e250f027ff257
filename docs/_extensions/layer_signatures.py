"""Signatures of the layers of ``jdrop.adapters``, as their ``__init__`` has them.

Symptom without it: Sphinx shows ``(*args, **kwargs)`` for layers of Flax nnx, whose metaclass has a ``__call__``, and
Flax's own fields ``parent`` and ``name``, with the address of a sentinel, for layers of Flax linen.
"""

import inspect
from typing import Any

from sphinx.application import Sphinx

OF_FLAX = ("self", "parent", "name")


def signature_of_layer(
    app: Sphinx, kind: str, name: str, found: Any, options: Any, signature: str, result: str
) -> tuple[str, str] | None:
    if kind != "class" or not name.startswith("jdrop.adapters."):
        return None
    parameters = inspect.signature(found.__init__).parameters.values()
    shown = [p.replace(annotation=p.empty) for p in parameters if p.name not in OF_FLAX]
    return str(inspect.Signature(shown)), ""


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-signature", signature_of_layer)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
