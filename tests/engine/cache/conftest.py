"""Fixtures of packed caches."""

import pytest

from tq.engine.cache import hook


@pytest.fixture
def reference(monkeypatch):
    """Caches in plain mx, also where the CPU kernels are."""
    monkeypatch.setenv("TQ_BACKEND", "reference")


@pytest.fixture(autouse=True)
def no_hooks():
    yield
    hook.uninstall()
