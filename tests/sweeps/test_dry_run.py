"""What a dry run says a trial will take."""

from collections.abc import Callable

import pytest

from pipeline.config import RunConfig
from pipeline.data import load
from sweeps.dry_run import _seconds

pytestmark = pytest.mark.usefixtures("tensorflow")

Configure = Callable[..., RunConfig]


def test_a_trial_takes_longer_where_its_images_are_distorted(configure: Configure) -> None:
    plain = configure("data=digits")
    distorted, same = (
        configure("data=digits", f"augmentation.shift={shift}") for shift in (0.1, 0.0)
    )
    data = load(plain.data)

    assert _seconds(distorted, data, 1e10) > _seconds(plain, data, 1e10)
    assert _seconds(same, data, 1e10) == _seconds(plain, data, 1e10)
