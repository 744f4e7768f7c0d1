"""The search space: Hydra's sweep grammar, read into Optuna's distributions."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from pipeline.compose import Value
from sweeps.config import SearchConfig

Values = dict[str, Value]
Distribution = CategoricalDistribution | FloatDistribution | IntDistribution

# What no trial may change: trials of one experiment are compared on the same images, with one seed.
NEVER_SEARCHED = ("experiment", "seed", "evaluate_test", "data", "tracking", "training.threads")
# Sections of a sweep that are not those of its runs.
OWN_SECTIONS = ("search", "sampler", "pruner", "executor", "study", "sweep", "hydra")


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A parameter is searched only where another has one of these values.

    Attributes:
        name: The other one.
        declaration: As written, for messages.
        allows: Whether a value of the other one is among them.
    """

    name: str
    declaration: str
    allows: Callable[[Value], bool]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One searched name.

    Attributes:
        name: Dotted name of the configuration, or a config group.
        declaration: What it is searched over, as written.
        where: The same with its place, for messages.
        distribution: What its values are drawn from.
        is_range: Whether a grid takes each of its values.
        condition: When it is searched; None: always.
    """

    name: str
    declaration: str
    where: str
    distribution: Distribution
    is_range: bool
    condition: Condition | None

    @property
    def ends(self) -> Sequence[Value]:
        """Its extreme values; of a choice, all."""
        if isinstance(self.distribution, CategoricalDistribution):
            return list(self.distribution.choices)
        return sorted({self.distribution.low, self.distribution.high})

    def points(self, count: int) -> list[Value]:
        """Values of a grid: all of a choice or a range, else `count`, ends included."""
        spread = self.distribution
        if isinstance(spread, CategoricalDistribution):
            return list(spread.choices)
        low, high = spread.low, spread.high
        if self.is_range:
            return _stepped(low, high, spread.step or 1)
        shares = [i / (count - 1) for i in range(1, count - 1)]
        if spread.log:
            inner = [low * (high / low) ** share for share in shares]
        else:
            inner = [low + share * (high - low) for share in shares]
        if isinstance(spread, IntDistribution):
            inner = [round(value) for value in inner]
        return list(dict.fromkeys([low, *(min(value, high) for value in inner), high]))

    def contains(self, value: Value) -> bool:
        return _contains(self.distribution, value)


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a sweep searches.

    Attributes:
        parameters: The searched names, each after those its condition looks at.
        fixed: Names of the space with a plain value.
    """

    parameters: tuple[Parameter, ...]
    fixed: Values

    def assign(self, choose: Callable[[Parameter], Value], configured: Values) -> Values:
        """Chooses a value for each parameter that is searched, given those before it.

        Args:
            choose: Gives a parameter its value.
            configured: Value of each name that a condition looks at, where it is not searched.
        """
        values: Values = {}
        for parameter in self.parameters:
            condition = parameter.condition
            if condition is None or condition.allows(
                values[condition.name]
                if condition.name in values
                else configured.get(condition.name)
            ):
                values[parameter.name] = choose(parameter)
        return values

    def combinations(
        self, points: Callable[[Parameter], Sequence[Value]], configured: Values
    ) -> list[Values]:
        """Every combination of the points of the parameters, each once."""
        every = itertools.product(*(points(parameter) for parameter in self.parameters))
        names = [parameter.name for parameter in self.parameters]
        found = {}
        for combination in every:
            values = dict(zip(names, combination, strict=True))
            chosen = self.assign(lambda parameter, v=values: v[parameter.name], configured)  # type: ignore[misc]
            found[tuple(chosen.items())] = chosen
        return list(found.values())


def split_command_line(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Takes the overrides with sweep syntax out of a command line, for Hydra refuses them.

    Returns:
        What is left, and what each searched name is searched over.
    """
    rest, searched = [], {}
    for argument in arguments:
        try:
            override = OverridesParser.create().parse_override(argument)
            is_sweep = not argument.startswith("-") and override.is_sweep_override()
        except (HydraException, ValueError, RecursionError):  # a flag, or a mistake told later
            is_sweep = False
        if is_sweep:
            searched[override.key_or_group] = argument.split("=", maxsplit=1)[1]
        else:
            rest.append(argument)
    return rest, searched


def run_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides of a sweep's command line that belong to its runs."""
    return [
        override for override in overrides if _section(override.lstrip("+~")) not in OWN_SECTIONS
    ]


def _section(override: str) -> str:
    return re.split(r"[=./@]", override, maxsplit=1)[0]


def build_space(search: SearchConfig, searched: Mapping[str, str], given: Sequence[str]) -> Space:
    """Reads a search space.

    Args:
        search: From the configuration.
        searched: From the command line: replaces or adds.
        given: Overrides of the command line with a value: a name among them is not searched.

    Raises:
        ValueError: A declaration is not one, or there is nothing to search.
    """
    named = {override.lstrip("+").split("=")[0] for override in given}
    declared = {name: _spelt(text) for name, text in search.space.items() if name not in named}
    declared |= searched
    parameters: list[Parameter] = []
    fixed: Values = {}
    for name, text in declared.items():
        key = name if name in searched else f"search.space['{name}']"
        where = f"{key}={text}" if name in searched else f"{key}: {text}"
        if any(name == never or name.startswith(f"{never}.") for never in NEVER_SEARCHED):
            raise ValueError(f"{where}: {name} is the same in every trial, it is not searched.")
        if _section(name) in OWN_SECTIONS:
            raise ValueError(f"{where}: {name} is not of the run, so it cannot be searched.")
        override = _parse(name, text, where)
        if not override.is_sweep_override():
            fixed[name] = override.value()  # type: ignore[assignment]
            continue
        condition = None
        if name in search.when:
            undecided = declared.keys() - fixed.keys() - {each.name for each in parameters}
            condition = _condition(name, search.when[name], undecided)
            _check_possible(name, condition, parameters)
        distribution = _distribution(override, where)
        parameters.append(
            Parameter(
                name=name,
                declaration=text,
                where=where,
                distribution=distribution,
                is_range=isinstance(override.value(), RangeSweep),
                condition=condition,
            )
        )
    if not parameters:
        raise ValueError(
            "search.space must have a name to search: choose search=mlp, or write one on the "
            "command line, such as 'model.dropout_rate=interval(0.0, 0.5)'."
        )
    return Space(parameters=tuple(parameters), fixed=fixed)


def _spelt(value: object) -> str:
    """A value of YAML as it would stand on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _parse(name: str, text: str, where: str) -> Override:
    try:
        return OverridesParser.create().parse_override(f"{name}={text}")
    except (HydraException, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error


def _condition(name: str, text: str, undecided: Set[str]) -> Condition:
    where = f"search.when['{name}']: {text}"
    other, equals, among = text.partition("=")
    if not equals:
        raise ValueError(f"{where}: must be an override, such as optimizer=adam.")
    if other in undecided:
        raise ValueError(f"{where}: {other} must stand before {name} in search.space.")
    override = _parse(other, among, where)
    if not override.is_sweep_override():
        return Condition(
            name=other, declaration=text, allows=lambda v: _is_same(v, override.value())
        )
    distribution = _distribution(override, where)
    return Condition(name=other, declaration=text, allows=lambda v: _contains(distribution, v))


def _check_possible(name: str, condition: Condition, before: Sequence[Parameter]) -> None:
    for parameter in before:
        spread = parameter.distribution
        if parameter.name != condition.name or not isinstance(spread, CategoricalDistribution):
            continue
        if not any(map(condition.allows, spread.choices)):
            raise ValueError(
                f"search.when['{name}']: {condition.declaration}: never holds, {parameter.name} "
                f"is searched over {parameter.declaration}."
            )


def _contains(spread: Distribution, value: Value) -> bool:
    """Whether a value may be drawn from a distribution."""
    if isinstance(spread, CategoricalDistribution):
        return any(_is_same(value, choice) for choice in spread.choices)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if not spread.low <= value <= spread.high:
        return False
    steps = (value - spread.low) / spread.step if spread.step else 0
    return abs(steps - round(steps)) < 1e-8  # as Optuna


def _is_same(value: object, other: object) -> bool:
    """`0` and `0.0` are, `0` and `false` are not."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _stepped(low: float, high: float, step: float) -> list[Value]:
    count = round((high - low) / step)
    return [*(min(round(low + i * step, 12), high) for i in range(count)), high]


def _distribution(override: Override, where: str) -> Distribution:
    try:
        return _read(override)
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{where}: {error}") from error


def _read(override: Override) -> Distribution:
    match override.value():
        case IntervalSweep(start=int(low), end=int(high), tags=tags):
            return IntDistribution(low, high, log="log" in tags)
        case IntervalSweep(start=low, end=high, tags=tags) if low is not None and high is not None:
            _check_finite(low, high)
            return FloatDistribution(float(low), float(high), log="log" in tags)
        case RangeSweep() as stepped:
            return _range(stepped)
        case ChoiceSweep(list=choices, tags=tags):
            if "log" in tags:
                raise ValueError("log is for interval and range, not for choice.")
            values = [_choice(choice) for choice in choices]
            if any(_is_same(*pair) for pair in itertools.combinations(values, 2)):
                raise ValueError("a choice has each value once.")
            return CategoricalDistribution(values)
    raise ValueError("not supported here: write interval, range or choice.")


def _range(stepped: RangeSweep) -> Distribution:
    """Hydra's range, as Python's, does not reach its stop."""
    start, stop, step = stepped.start, stepped.stop, stepped.step
    if start is None or stop is None or step <= 0:
        raise ValueError("a range needs a start, a stop and a positive step.")
    _check_finite(start, stop, step)
    if start >= stop:
        raise ValueError("`start < stop` must hold for a range.")
    log = "log" in stepped.tags
    if isinstance(start, int) and isinstance(stop, int) and isinstance(step, int):
        return IntDistribution(start, range(start, stop, step)[-1], log=log, step=step)
    count = math.ceil(round((stop - start) / step, 9))
    if log:
        raise ValueError("log is for interval, or a range of whole numbers with step 1.")
    high = round(start + (count - 1) * step, 12)
    return FloatDistribution(float(start), high, step=float(step))


def _check_finite(*ends: float) -> None:
    if not all(map(math.isfinite, ends)):
        raise ValueError("its ends must be finite.")


def _choice(choice: object) -> Value:
    text = getattr(choice, "text", choice)  # of a QuotedString
    if text is None or isinstance(text, str | int | float | bool):
        return text
    raise ValueError(f"each choice must be a string, a number, true, false or null, got {choice}.")
