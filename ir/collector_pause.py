"""Pausing the cyclic garbage collector while a graph is made.

A graph is many small objects that all live on. A collection in the middle finds nothing, and looks at each of them
again: 7 % of the time that a deep model's trace takes. Reference counting goes on as ever.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """No cyclic collection inside; afterwards as it was before."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
