"""What holds for every test: no network, and the same hypothesis examples in every run."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # As many tests run at once as there are cores: a second thread in each would only stand in line.
    os.environ["OMP_NUM_THREADS"] = "1"

# Machines that run tests are shared and slow; a deadline would only measure them.
settings.register_profile("medvision", deadline=None, derandomize=True)
settings.load_profile("medvision")

_LOCAL = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Refuse every connection that leaves this machine; pip in a subprocess is not affected."""

    def refuse_unless_local(original: Any) -> Any:
        def connect(self: socket.socket, address: Any, *rest: Any) -> Any:
            inside = self.family == socket.AF_UNIX or address[0] in _LOCAL
            if not inside:
                raise AssertionError(f"A test tried to reach {address} over the network.")
            return original(self, address, *rest)

        return connect

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, refuse_unless_local(getattr(socket.socket, name)))
        yield


@pytest.fixture(scope="session")
def phantom_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of six labelled phantoms; to be read, not changed."""
    from medvision.sample_data.phantoms import write_phantom_dataset

    folder = tmp_path_factory.mktemp("phantom_data")
    write_phantom_dataset(folder, 6)
    return folder
