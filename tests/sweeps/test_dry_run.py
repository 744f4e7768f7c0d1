"""What a dry run says a trial will take."""

from collections.abc import Callable

import pytest

from pipeline.config import RunConfig
from pipeline.data import load
from sweeps.dry_run import _seconds

pytestmark = pytest.mark.usefixtures("tensorflow")

Configure = Callable[..., RunConfig]


def test_distortions_take_their_time_in_the_estimate(configure: Configure) -> None:
    plain, distorted = configure("data=digits"), configure("data=digits", "augmentation=elastic")
    data = load(plain.data)

    more = _seconds(distorted, data, 1e10) - _seconds(plain, data, 1e10)

    pixels = len(data.train) * 64 * plain.training.epochs
    assert 1e-8 < more / pixels < 1e-7  # seconds, on one thread of any processor of today
