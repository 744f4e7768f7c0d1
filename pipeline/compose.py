"""From the command line to a checked `RunConfig`: the one module that knows Hydra and OmegaConf."""

import atexit
import difflib
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from types import FrameType
from typing import cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from pipeline.config import OPTIMIZERS, RunConfig, check_choice, without_password

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


class Terminated(KeyboardInterrupt):
    """SIGTERM: an interruption like Ctrl-C, with an exit status of its own."""


class Reported(Exception):
    """An error of one job of several that was already shown to the user."""


def to_config(cfg: DictConfig) -> RunConfig:
    """Types and checks a composed configuration.

    Raises:
        ValueError: A key is unknown or missing, or its value has the wrong type or range.
    """
    try:
        check_choice("optimizer.name", cfg.optimizer.name, tuple(OPTIMIZERS))
        schema = OmegaConf.structured(RunConfig)
        # Nodes made from frozen dataclasses are read-only, and merging writes.
        OmegaConf.set_readonly(schema, False)
        for name, field in RunConfig.__dataclass_fields__.items():
            if is_dataclass(field.type):
                schema[name] = OPTIMIZERS[cfg.optimizer.name] if name == "optimizer" else field.type
                OmegaConf.set_readonly(schema[name], False)
        return cast(RunConfig, OmegaConf.to_object(OmegaConf.merge(schema, cfg)))
    except (OmegaConfBaseException, OverflowError) as error:
        raise ValueError(explain(error)) from error


def run_cli(config_name: str, task: Callable[[RunConfig, str], None]) -> None:
    """Composes `conf/<config_name>.yaml` with the command line and calls `task`.

    Every error ends in one line on standard error and a non-zero exit; `HYDRA_FULL_ERROR=1`
    shows its traceback instead.

    Args:
        config_name: Root of the configuration.
        task: Receives the configuration and the overrides as they were given, quoted for a
            shell; called once a job of a multirun.
    """
    tracebacks = bool(os.environ.get("HYDRA_FULL_ERROR"))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints errors its own way and exits
    OmegaConf.register_new_resolver("scratch_dir", _scratch_dir, use_cache=True, replace=True)
    signal.signal(signal.SIGTERM, _raise_terminated)

    logging.getLogger("hydra").setLevel(logging.WARNING)  # it logs overrides with their passwords
    failed: list[Reported] = []

    def job(cfg: DictConfig) -> None:
        # As given: read one by one, their interpolations (${oc.env:SECRET}) would be resolved.
        given = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        overrides = shlex.join(cast(list[str], given))
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            log.info("job %d: %s", HydraConfig.get().job.num, without_password(overrides))
        try:
            with _errors_in_one_line(config_name, tracebacks):
                task(to_config(cfg), overrides)
        except Reported as error:
            failed.append(error)  # raised, Hydra would add lines of its own

    with _errors_in_one_line(config_name, tracebacks):
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
    if failed:
        sys.exit(1)


def _raise_terminated(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def _scratch_dir() -> str:
    """A folder that lasts as long as the process, for what Hydra insists on writing."""
    path = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@contextmanager
def _errors_in_one_line(config_name: str, tracebacks: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interruption:
        print("Interrupted: a run that was under way is kept, as KILLED.", file=sys.stderr)
        terminated = isinstance(interruption, Terminated)
        sys.exit(128 + (signal.SIGTERM if terminated else signal.SIGINT))
    except Exception as error:
        if tracebacks:
            raise
        print(f"Error: {without_password(explain(error, config_name))}", file=sys.stderr)
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            raise Reported from error  # the other jobs go on
        sys.exit(1)


def explain(error: BaseException, config_name: str = "run") -> str:
    """One line that tells a user what was wrong, with the nearest valid name where one is near."""
    return " ".join(line.strip() for line in _explain(error, config_name).splitlines())


def _explain(error: BaseException, config_name: str) -> str:
    text = str(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value: set {error.full_key}=..."
    if isinstance(error, OmegaConfBaseException):
        rule = " ".join(text.split("\n    full_key", maxsplit=1)[0].split())
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
            names = _known_names(config_name)
            if alias := _ALIASES.get(key[1].rpartition(".")[2]):
                return f"{key[1]}: no such key; it is {alias} here."
            if key[1] not in names:
                return f"{key[1]}: no such key{_nearest(key[1], names)}"
            if "." in key[1]:
                return f"{key[1]}: no such key with the options chosen, only with others."
        if added := re.search(r"use (\+\S+=\S+)", text):
            return f"write {added[1]}: it is added to the defaults."
        return text
    if isinstance(error, ValueError | OSError) and text:
        return text
    return f"{type(error).__name__}: {' '.join(text.split())}"


def _nearest(name: str, names: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else "."


def _known_names(config_name: str) -> list[str]:
    """Dotted names of every value and group, whatever the option chosen."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        loader = GlobalHydra.instance().config_loader()
        groups = [group for group in loader.list_groups("") if group != "hydra"]
        names = set(groups)
        for group in groups:
            for option in loader.get_group_options(group):
                plus = "+" if group == "experiment" else ""
                cfg = hydra.compose(config_name, [f"{plus}{group}={option}"])
                names.update(_leaves(cfg))
    return sorted(names)


def _leaves(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in map(str, cfg):
        node = cfg._get_node(name)
        yield f"{prefix}{name}"
        if isinstance(node, DictConfig):
            yield from _leaves(node, f"{prefix}{name}.")
