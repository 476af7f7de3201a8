"""Settings of all tests: the same examples on every run, and no deadline on a busy machine."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("ernieq", derandomize=True, deadline=None, database=None)
settings.load_profile("ernieq")
