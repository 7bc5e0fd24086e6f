"""What every test needs around it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Statistics that tests collect do not go into the user's cache, nor come from there. Subprocesses inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERRATA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
