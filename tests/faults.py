"""Faults that befall a sweep under way, drawn at random: what, whom, when, for how long."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Each with how often it is drawn, in proportion.
ANYWHERE = {
    "kill a worker": 4,
    "kill the launcher": 3,
    "kill both": 2,
    "SIGTERM a worker": 1,
    "SIGTERM the launcher": 1,
    "pause a worker": 1,
    "pause the launcher": 1,
}
ON_SMALL_DISK = {"fill the disk": 1}
ON_SQLITE = {"lock optuna.db": 1}
WITHOUT_SERVER = {"lock mlflow.db": 1}
ON_POSTGRESQL = {"restart PostgreSQL": 2, "take PostgreSQL away": 1}
WITH_SERVER = {"kill the server": 3}
USUAL = 10.0  # seconds that two of three lasting faults last at most


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        kind: What happens.
        worker: Which one, as a fraction of those there are.
        seconds: For how long, if it lasts.
        after: Seconds since the fault before, at most.
        epochs: Epochs recorded since then, at which it happens; 0 where the seconds alone count.
        pause: Seconds from then on, so that it may be any moment of an epoch or between trials.
    """

    kind: str
    worker: float
    seconds: float
    after: float
    epochs: int
    pause: float


def kinds_of(*, small_disk: bool, postgresql: bool, server: bool) -> dict[str, int]:
    """What may befall a sweep that is run so."""
    kinds = ANYWHERE | (ON_SMALL_DISK if small_disk else {})
    kinds |= ON_POSTGRESQL if postgresql else ON_SQLITE
    if server:
        return kinds | WITH_SERVER
    return kinds if postgresql else kinds | WITHOUT_SERVER


def draw(seed: int, count: int, kinds: Mapping[str, int], longest: float) -> list[Fault]:
    """So many faults; the same for the same seed.

    Args:
        seed: Of the draw.
        count: Of the faults.
        kinds: How often each is drawn, in proportion.
        longest: Seconds that a fault lasts at most.
    """
    rng = random.Random(seed)
    return [_draw(rng, kinds, longest) for _ in range(count)]


def _draw(rng: random.Random, kinds: Mapping[str, int], longest: float) -> Fault:
    (kind,) = rng.choices(list(kinds), list(kinds.values()))
    usual = min(USUAL, longest)
    most = rng.choice([usual, usual, longest])
    after, epochs = rng.choice([(rng.uniform(0.0, 8.0), 0), (60.0, rng.randint(1, 60))])
    return Fault(
        kind=kind,
        worker=rng.random(),
        seconds=rng.uniform(1.0, most),
        after=after,
        epochs=epochs,
        pause=rng.uniform(0.0, 0.5),
    )


def counts(kinds: Sequence[str]) -> str:
    """How many of each."""
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
