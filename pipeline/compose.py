"""From the command line to a checked configuration: the module that knows Hydra and OmegaConf."""

import atexit
import difflib
import gc
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar, cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from pipeline.config import LATER, OPTIMIZERS, RunConfig, check_choice, without_password

log = logging.getLogger(__name__)

# What others call a key, where no likeness leads from one to the other.
_ALIASES = {
    "lr": "optimizer.learning_rate",
    "wd": "optimizer.weight_decay",
    "dropout": "model.dropout_rate",
    "patience": "training.early_stopping_patience",
    "units": "model.hidden_units",
    "layers": "model.hidden_layers",
}

CONF = Path(__file__).resolve().parents[1] / "conf"


# What to do about an error that says what failed alone, by a part of it.
_REMEDIES = {
    "no password supplied": "Set PGPASSWORD, or write ~/.pgpass.",
    "password authentication failed": "PGPASSWORD or ~/.pgpass has another password.",
    "403 != 200": "The user of MLFLOW_TRACKING_USERNAME needs EDIT there, which an administrator "
    "or the owner grants.",
}


T = TypeVar("T")
Value = str | int | float | bool | None

_MISSING = object()


class Terminated(KeyboardInterrupt):
    """SIGTERM: an interruption like Ctrl-C, with an exit status of its own."""


class Reported(Exception):
    """An error of one job of several that was already shown to the user."""


Variants = Mapping[str, Mapping[str, type]]

# Sections whose type their `name` decides.
VARIANTS: Variants = {"optimizer": OPTIMIZERS}


def to_config(cfg: DictConfig) -> RunConfig:
    """Types and checks the composed configuration of a run, as `to_typed` does."""
    return to_typed(cfg, RunConfig, VARIANTS)


def from_settings(settings: Mapping[str, Any]) -> RunConfig:
    """Types and checks the configuration of a run as it was recorded.

    Raises:
        ValueError: It does not fit this version: a key is unknown or missing, or its value has the
            wrong type or range; or it refers to something else.
    """
    if "${" in str(settings):  # of the environment, say: a record has values alone
        raise ValueError("it has an interpolation (${...}), which no run records.")
    settings = dict(settings)
    for section, later in LATER.items():
        given = settings.get(section, {})
        if isinstance(given, Mapping):  # else it is refused
            settings[section] = {**later, **given}
    try:
        return to_config(OmegaConf.create(settings))
    except ValueError as error:
        raise ValueError(str(error).partition(": set ")[0]) from error


def to_typed(cfg: DictConfig, schema: type[T], variants: Variants) -> T:
    """Types and checks a composed configuration.

    Args:
        cfg: As Hydra composed it.
        schema: Dataclass of the whole.
        variants: Section -> the types it may have, by its `name`.

    Raises:
        ValueError: A key is unknown or missing, or its value has the wrong type or range.
    """
    try:
        return cast(T, OmegaConf.to_object(_typed(cfg, schema, variants)))
    except (OmegaConfBaseException, OverflowError) as error:
        raise ValueError(explain(error)) from error


def _typed(cfg: DictConfig, schema: type, variants: Variants) -> DictConfig:
    typed = OmegaConf.structured(schema)
    # Nodes made from frozen dataclasses are read-only, and merging writes.
    OmegaConf.set_readonly(typed, False)
    for field in fields(cast(Any, schema)):
        if is_dataclass(field.type):
            if not isinstance(cfg[field.name], DictConfig):
                keys = ", ".join(f"{field.name}.{each.name}" for each in fields(field.type))
                raise ValueError(f"{field.name} is a section, of {keys}: set one of these.")
            typed[field.name] = field.type
            if types := variants.get(field.name):
                check_choice(f"{field.name}.name", cfg[field.name].name, tuple(types))
                typed[field.name] = types[cfg[field.name].name]
            OmegaConf.set_readonly(typed[field.name], False)
    return cast(DictConfig, OmegaConf.merge(typed, cfg))


class Composer(Generic[T]):
    """Composes variations of one configuration, in a Hydra that is initialized.

    Args:
        config_name: Root of the configuration.
        overrides: What all variations share, as on the command line.
        schema: Dataclass of the whole.
        variants: As in `to_typed`.
    """

    def __init__(
        self, config_name: str, overrides: Sequence[str], schema: type[T], variants: Variants
    ) -> None:
        self.config_name, self.overrides = config_name, list(overrides)
        self.schema, self.variants = schema, variants
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._typed: dict[tuple[str, ...], DictConfig] = {}
        self._choices: dict[str, str] = {}
        self._groups = set(GlobalHydra.instance().config_loader().list_groups(""))

    def __call__(self, values: Mapping[str, Value]) -> T:
        """The configuration with other values by dotted name, and options by group.

        Raises:
            ValueError: A name is unknown, or a value is refused.
        """
        groups = self._options(values)
        try:
            cfg = self._type(groups).copy()
            for name, value in values.items():
                if name not in groups:
                    before = OmegaConf.select(cfg, name, default=_MISSING)
                    if before is _MISSING:
                        raise ValueError(_unknown(name, self.config_name))
                    if name.removesuffix(".name") in self.variants and value != before:
                        group = name.removesuffix(".name")
                        raise ValueError(f"{name} goes with its group: set {group}={value}.")
                    OmegaConf.update(cfg, name, value)
            return cast(T, OmegaConf.to_object(cfg))
        except (OmegaConfBaseException, HydraException, OverflowError) as error:
            raise ValueError(explain(error, self.config_name)) from error

    def value(self, name: str, values: Mapping[str, Value] | None = None) -> Value:
        """What a dotted name or group is as configured, with the options among the values.

        Raises:
            ValueError: The name is unknown.
        """
        cfg = self._compose(self._options(values or {}))
        if self.is_group(name):
            return self._choices.get(name)
        value = OmegaConf.select(cfg, name, default=_MISSING)
        if value is _MISSING:
            raise ValueError(_unknown(name, self.config_name))
        return cast(Value, value)

    def is_group(self, name: str) -> bool:
        return name in self._groups

    def _options(self, values: Mapping[str, Value]) -> dict[str, str]:
        groups = {}
        for name, value in values.items():
            if self.is_group(name):
                if not isinstance(value, str):
                    shown = "null" if value is None else value
                    raise ValueError(f"{name}={shown}: {name} is a group, it needs an option.")
                groups[name] = value
        return groups

    def _type(self, groups: Mapping[str, str]) -> DictConfig:
        """Typed once a choice of options: it takes OmegaConf 40 ms."""
        cfg, options = self._compose(groups), _overrides(groups)
        if options not in self._typed:
            self._typed[options] = _typed(cfg, self.schema, self.variants)
        return self._typed[options]

    def _compose(self, groups: Mapping[str, str]) -> DictConfig:
        """Composed once a choice of options: it takes Hydra 80 ms."""
        options = _overrides(groups)
        if options not in self._composed:
            cfg = hydra.compose(
                self.config_name, [*self.overrides, *options], return_hydra_config=True
            )
            if not options:
                self._choices = dict(cfg.hydra.runtime.choices)
            with open_dict(cfg):
                del cfg["hydra"]
            self._composed[options] = cfg
        return self._composed[options]


def _overrides(groups: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{name}={value}" for name, value in groups.items())


def run_cli(
    config_name: str,
    schema: type[T],
    task: Callable[[T, list[str]], None],
    variants: Variants = VARIANTS,
    *,
    interrupted: str = "Interrupted: a run that was under way is kept, as KILLED.",
    at_end: Callable[[], None] = lambda: None,
) -> None:
    """Composes `conf/<config_name>.yaml` with the command line and calls `task`.

    Every error ends in one line on standard error and a non-zero exit, of the error's
    `exit_status` where it has one; `HYDRA_FULL_ERROR=1` shows its traceback instead.

    Args:
        config_name: Root of the configuration.
        schema: Dataclass of the whole.
        task: Receives the configuration and the overrides as they were given; called once a job
            of a multirun.
        variants: As in `to_typed`.
        interrupted: Said of an interruption that says nothing itself.
        at_end: Called after the last job, also where one failed or was interrupted.
    """
    tracebacks = bool(os.environ.get("HYDRA_FULL_ERROR"))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints errors its own way and exits
    OmegaConf.register_new_resolver("scratch_dir", _scratch_dir, use_cache=True, replace=True)
    signal.signal(signal.SIGTERM, _raise_terminated)

    logging.raiseExceptions = False  # as when a reader of the log has gone
    logging.getLogger("hydra").setLevel(logging.WARNING)  # it logs overrides with their passwords
    failed: list[bool] = []  # of each job

    def job(cfg: DictConfig) -> None:
        # As given: read one by one, their interpolations (${oc.env:SECRET}) would be resolved.
        given = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        overrides = cast(list[str], given)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            shown = without_password(shlex.join(overrides))
            log.info("job %d: %s", HydraConfig.get().job.num, shown)
        try:
            with _errors_in_one_line(config_name, tracebacks, interrupted):
                task(to_typed(cfg, schema, variants), overrides)
        except Reported:  # raised, Hydra would add lines of its own
            failed.append(True)
        else:
            failed.append(False)

    atexit.register(gc.freeze)  # or the interpreter collects all it has at its end: 0.8 s
    with _errors_in_one_line(config_name, tracebacks, interrupted):
        _check_overrides(sys.argv[1:])
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
        finally:
            at_end()
    if any(failed):
        print(f"{sum(failed)} of {len(failed)} jobs failed.", file=sys.stderr)
        sys.exit(1)


def _check_overrides(arguments: Sequence[str]) -> None:
    """Names what Hydra refuses without its name.

    Raises:
        ValueError: A number has too many digits, brackets are too deep, a group has no option, or
            it is not UTF-8.
    """
    for argument in arguments:
        if not argument.isascii() and argument != argument.encode(errors="replace").decode():
            raise ValueError(f"{argument}: not UTF-8, which no store records.")
        try:
            override = OverridesParser.create().parse_override(argument)
            value, name = override.value(), override.key_or_group
        except HydraException:  # a flag, or a mistake that Hydra tells itself
            continue
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{argument.partition('=')[0]}: {error}") from error
        options = value if isinstance(value, list) else [value]
        is_option = override.is_sweep_override() or all(isinstance(each, str) for each in options)
        is_group = not name.startswith("/") and (CONF / name).is_dir()
        if is_group and not is_option and not override.is_delete():
            raise ValueError(f"{argument}: {name} is a group, it needs an option.")


def _raise_terminated(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def _scratch_dir() -> str:
    """A folder that lasts as long as the process, for what Hydra insists on writing."""
    path = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@contextmanager
def _errors_in_one_line(config_name: str, tracebacks: bool, interrupted: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interruption:
        print(str(interruption) or interrupted, file=sys.stderr)
        terminated = isinstance(interruption, Terminated)
        sys.exit(128 + (signal.SIGTERM if terminated else signal.SIGINT))
    except BrokenPipeError:  # of `| head`: its reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or its end fails again
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if tracebacks:
            print(without_password(traceback.format_exc()), file=sys.stderr, end="")
            sys.exit(getattr(error, "exit_status", 1))
        # A password shows also in what was to be an address, and is refused as none.
        shown = re.sub(r":(?!//)\S+@", ":***@", without_password(explain(error, config_name)))
        in_job = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
        job = f"job {HydraConfig.get().job.num}: " if in_job else ""
        print(f"Error: {job}{shown}", file=sys.stderr)
        if in_job:
            raise Reported from error  # the other jobs go on
        sys.exit(getattr(error, "exit_status", 1))


def explain(error: BaseException, config_name: str = "run") -> str:
    """One line that tells a user what was wrong, with the nearest valid name where one is near."""
    line = " ".join(line.strip() for line in _explain(error, config_name).splitlines())
    line = re.sub(r" \(Background on this error at: \S+\)", "", line)  # of SQLAlchemy
    remedies = (remedy for sign, remedy in _REMEDIES.items() if sign in line)
    line = " ".join([line, *remedies])
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)


def _explain(error: BaseException, config_name: str) -> str:
    text = str(error)
    if isinstance(error, RecursionError):
        key = re.search(r"full_key: ([A-Za-z_][\w.]*)", text)
        return f"{key[1] if key else 'the command line'}: its brackets are too deep."
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value: set {error.full_key}=..."
    if isinstance(error, OmegaConfBaseException):
        rule = " ".join(text.split("\n    full_key", maxsplit=1)[0].split()).rstrip(".")
        if "is not a ListConfig" in rule:
            return f"{error.full_key} must be a list, as {error.full_key}=[1,2]."
        return f"{error.full_key}: {rule}." if error.full_key else rule
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        options = ", ".join(error.options)
        return f"{group}={option}: no such option among {options}{_nearest(option, error.options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not in Hydra's grammar, quote what is special in it. {text}"
    if isinstance(error, HydraException):
        key = re.search(r"Could not (?:override|append to config) '\+*([^'=@]+)", text)
        if key and "already at" not in text:
            known = _unknown(key[1], config_name)
            if known:
                return known
        if key and key[1] == "model" and "name" in (names := _known_names(config_name)):
            return f"model: no such key{_nearest('name', names)}"
        if added := re.search(r"use (\+\S+=\S+)", text):
            return f"write {added[1]}: it is added to the defaults."
        return text
    if isinstance(error, ValueError | OSError) and text:
        return text
    return f"{type(error).__name__}: {' '.join(text.split())}"


def _unknown(name: str, config_name: str) -> str:
    """Why there is no such key, and what may have been meant."""
    if alias := _ALIASES.get(name.rpartition(".")[2]):
        return f"{name}: no such key; it is {alias} here."
    names = _known_names(config_name)
    if name not in names:
        return f"{name}: no such key{_nearest(name, names)}"
    return f"{name}: no such key with the options chosen, only with others." if "." in name else ""


def _nearest(name: str, names: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else "."


def _known_names(config_name: str) -> list[str]:
    """Dotted names of every value and group, whatever the option chosen."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        loader = GlobalHydra.instance().config_loader()
        names = {group for group in loader.list_groups("") if group != "hydra"}
        root = hydra.compose(config_name, return_hydra_config=True)
        ours = names & {*root.hydra.runtime.choices}
        options = {group: loader.get_group_options(group) for group in ours}
        for number in range(max(map(len, options.values()), default=1)):  # of one option a group
            chosen = [f"{group}={each[number % len(each)]}" for group, each in options.items()]
            names.update(_leaves(hydra.compose(config_name, chosen)))
    return sorted(names)


def _leaves(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in map(str, cfg):
        node = cfg._get_node(name)
        yield f"{prefix}{name}"
        if isinstance(node, DictConfig):
            yield from _leaves(node, f"{prefix}{name}.")
