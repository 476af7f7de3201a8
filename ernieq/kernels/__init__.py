"""One folder per operation: ``reference.py`` is the slow truth, C++ beside it has the same meaning.

Every operation takes a ``backend``; ``backend.py`` says which there are and which can run here.
"""

from ernieq.kernels.backend import Backend, default_threads, resolve_backend

__all__ = ["Backend", "default_threads", "resolve_backend"]
