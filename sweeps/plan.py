"""What a sweep will do, checked whole before anything is stored: trials as configurations."""

import itertools
import logging
import random
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from pipeline.compose import Composer, Value
from pipeline.config import RunConfig, flatten, without_password
from sweeps.config import VARIANTS, GridConfig, SweepConfig
from sweeps.space import Parameter, Space, Values, build_space, run_overrides

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A sweep that can be run.

    Attributes:
        config: The sweep, and the run it varies.
        space: What is searched.
        known: Configurations that come first, in this order; of a grid, all.
        baseline: Which of them is the configuration as it stands, but for what the space fixes;
            that trial is never pruned.
        configured: Value of each name a condition looks at, where it is not searched.
        overrides: Of the command line, those of the run.
        composer: Makes a trial's configuration.
    """

    config: SweepConfig
    space: Space
    known: list[Values]
    baseline: int | None
    configured: Values
    overrides: list[str]
    composer: Composer[SweepConfig]

    @property
    def trials(self) -> int:
        """Trials until the sweep is done."""
        if isinstance(self.config.sampler, GridConfig):
            return min(self.config.sweep.trials, len(self.known))
        return self.config.sweep.trials

    def needs_more(self, finished: int, failed: int) -> bool:
        """Whether another trial is to be started, given how many were or are being run."""
        if isinstance(self.config.sampler, GridConfig) and finished + failed >= len(self.known):
            return False
        return finished < self.trials

    @property
    def workers(self) -> int | None:
        """Trials at once; None where the cluster decides."""
        count = self.config.executor.count(self.config.training.threads)
        return count and min(count, self.trials)

    @property
    def declarations(self) -> dict[str, str]:
        """What each name is searched over, as it was written, and when."""
        return {
            parameter.name: parameter.declaration
            + (f" when {parameter.condition.declaration}" if parameter.condition else "")
            for parameter in self.space.parameters
        }

    @property
    def fixed_text(self) -> str:
        """What the space fixes, in a sentence; empty where that is nothing."""
        fixed = " ".join(to_override(*item) for item in self.space.fixed.items())
        return f"The space fixes {fixed}." if fixed else ""

    def trial_config(self, values: Mapping[str, Value]) -> RunConfig:
        """The run of a trial.

        Raises:
            ValueError: The values are refused, alone or together.
        """
        return self.composer({**self.space.fixed, **values}).run

    def command(self, values: Mapping[str, Value], *more: str) -> str:
        """The command line of the run of a trial, without passwords."""
        chosen = {**self.space.fixed, **values}
        overrides = [to_override(name, value) for name, value in chosen.items()]
        line = shlex.join(["python", "-m", "pipeline.run", *self.overrides, *overrides, *more])
        return without_password(line)

    def corners(self, *, most: int) -> list[Values]:
        """Every combination of extreme values, or a random choice of so many."""
        count = 1
        for parameter in self.space.parameters:
            count *= len(parameter.ends)
        if count <= most:
            return self.space.combinations(lambda parameter: parameter.ends, self.configured)
        rng = random.Random(0)
        return [
            self.space.assign(lambda parameter: rng.choice(parameter.ends), self.configured)
            for _ in range(most)
        ]

    @property
    def identity(self) -> dict[str, str]:
        """All that must be the same when the sweep is gone on with, but its data."""
        base = self.composer(self.space.fixed).run
        searched = {p.name for p in self.space.parameters if p.condition is None}
        settings = {
            name: value
            for name, value in flatten(asdict(base))
            if not name.startswith(("data.", "tracking.")) and name not in searched
        }
        space = {f"search.space['{name}']": text for name, text in self.declarations.items()}
        # A trial's number tells which known configuration it is: the baseline, a point of the grid.
        known = {"sweep.first": str(self.config.sweep.first)}
        if isinstance(self.config.sampler, GridConfig):
            known["sampler"] = f"grid of {self.config.sampler.points} points"
            known["sweep.seed"] = str(self.config.sweep.seed)
        objectives = ", ".join(self.config.sweep.objectives)
        return {"sweep.objective": objectives, **space, **known, **settings}


def build_plan(config: SweepConfig, overrides: Sequence[str], searched: Mapping[str, str]) -> Plan:
    """Reads the search space and checks it: each name, each extreme value, each condition.

    Args:
        config: The sweep.
        overrides: The command line, without what it searches.
        searched: What the command line searches.

    Raises:
        ValueError: A declaration, or a value it leads to, is refused.
    """
    composer = Composer("sweep", overrides, SweepConfig, VARIANTS)
    space = build_space(config.search, searched, overrides)
    configured = {
        parameter.condition.name: composer.value(parameter.condition.name)
        for parameter in space.parameters
        if parameter.condition
    } | space.fixed
    for values in _probes(space, configured):
        _check(space, values, composer)
    known = _first(config, space, configured, composer)
    as_configured = space.assign(lambda parameter: composer.value(parameter.name), configured)
    baseline = known.index(as_configured) if as_configured in known else None
    if isinstance(config.sampler, GridConfig):
        known += _grid(config.sampler, config.sweep.seed, space, configured, known)
    return Plan(
        config=config,
        space=space,
        known=known,
        baseline=baseline,
        configured=configured,
        overrides=run_overrides(overrides),
        composer=composer,
    )


def to_override(name: str, value: Value) -> str:
    """A value as on the command line; a string is quoted where Hydra's grammar needs it."""
    if value is None or isinstance(value, bool):
        return f"{name}={str(value).lower() if value is not None else 'null'}"
    plain = f"{name}={value}"
    if isinstance(value, str):
        try:
            if OverridesParser.create().parse_override(plain).value() != value:
                raise HydraException
        except HydraException:
            return f"{name}={QuotedString(text=value, quote=Quote.single).with_quotes()}"
    return plain


def _probes(space: Space, configured: Values) -> list[Values]:
    """Each extreme value of each parameter at least once, with the first one of the others."""
    probes = []
    for parameter in space.parameters:
        varied = {parameter.name, *_ancestors(parameter, space)}
        probes += space.combinations(
            lambda each, varied=varied: each.ends if each.name in varied else each.ends[:1],  # type: ignore[misc]
            configured,
        )
    return list({tuple(probe.items()): probe for probe in probes}.values())


def _ancestors(parameter: Parameter, space: Space) -> set[str]:
    """Names that decide, through conditions, whether a parameter is searched."""
    if parameter.condition is None:
        return set()
    parents = [each for each in space.parameters if each.name == parameter.condition.name]
    above = itertools.chain.from_iterable(_ancestors(each, space) for each in parents)
    return {parameter.condition.name, *above}


def _check(space: Space, values: Values, composer: Composer[SweepConfig]) -> None:
    try:
        composer({**space.fixed, **values})
    except ValueError as error:
        name = _culprit(str(error), space, values)
        hint = " Write int(interval(...))." if "to Integer" in str(error) else ""
        raise ValueError(f"{name}: {error}{hint}") from error


def _culprit(message: str, space: Space, values: Values) -> str:
    """The declaration a message is about, else all values."""
    for parameter in space.parameters:
        if message.startswith((f"{parameter.name} ", f"{parameter.name}:", f"{parameter.name}=")):
            return parameter.where
    for name, value in space.fixed.items():
        if message.startswith((f"{name} ", f"{name}:", f"{name}=")):
            return f"search.space['{name}']: {value}"
    return "search.space, at " + " ".join(to_override(*item) for item in values.items())


def _first(
    config: SweepConfig, space: Space, configured: Values, composer: Composer[SweepConfig]
) -> list[Values]:
    """The configurations of `sweep.first`, each completed by the values as configured."""
    names = [parameter.name for parameter in space.parameters]
    known: list[Values] = []
    for number, given in enumerate(config.sweep.first):
        where = f"sweep.first[{number}]"
        if strange := [name for name in given if name not in names]:
            raise ValueError(
                f"{where}: {strange[0]} is not searched; the searched names are {', '.join(names)}."
            )

        def choose(parameter: Parameter, given: Mapping[str, Any] = given) -> Value:
            name = parameter.name
            return given[name] if name in given else composer.value(name, given)

        values = space.assign(choose, configured)
        outside = [
            p for p in space.parameters if p.name in values and not p.contains(values[p.name])
        ]
        for parameter in outside:
            text = f"{where}: {to_override(parameter.name, values[parameter.name])}"
            if parameter.name in given:
                raise ValueError(f"{text} lies outside {parameter.declaration}.")
            log.warning(
                "%s, as configured, lies outside %s: left out, so there is no such baseline",
                text,
                parameter.declaration,
            )
        if not outside and values not in known:
            _check(space, values, composer)
            known.append(values)
    return known


def _grid(
    config: GridConfig, seed: int, space: Space, configured: Values, known: Sequence[Values]
) -> list[Values]:
    size = 1
    for parameter in space.parameters:
        size *= len(parameter.points(config.points))
    if size > 100_000:
        raise ValueError(f"sampler=grid: {size:,} combinations; use fewer names or sampler.points.")
    grid = space.combinations(lambda parameter: parameter.points(config.points), configured)
    random.Random(seed).shuffle(grid)
    return [values for values in grid if values not in known]
