"""The option that keeps what the heavy tests measured."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vllm-record", help="file for the figures of the tests with vLLM")
