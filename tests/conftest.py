"""What several test modules share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def mnist_npz() -> Path:
    """The real MNIST, where `MNIST_NPZ` says; in CI its absence is a failure, not a skip."""
    path = os.environ.get("MNIST_NPZ")
    reason = "MNIST_NPZ is not set: it names the real mnist.npz, which this test reads."
    if not path and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if not path:
        pytest.skip(reason)
    return Path(path)
