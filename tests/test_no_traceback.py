"""Whatever a user writes on a command line is accepted, or refused in one line.

The real commands, in process. `EXAMPLES=10000 pytest -n0 tests/test_no_traceback.py` tries as many
command lines a property, other ones each time; else the same few.
"""

import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from pipeline.compose import CONF
from pipeline.config import TrackingConfig
from pipeline.run import console
from tests.commands import Ended, content_of, fuzzed, start

SECRET = "hunter2"
MODULES = {
    "run": "pipeline.run",
    "sweep": "sweeps.run",
    "leaderboard": "sweeps.leaderboard",
    "promote": "sweeps.promote",
    "predict": "pipeline.predict",
    "repeat": "pipeline.repeat",
    "ui": "pipeline.ui",
}
# What a command must have, and that a sweep shows its plan and trains nothing.
ALWAYS = {"sweep": ["sweep.dry_run=true"], "repeat": ["run=0123"], "predict": ["missing.npz"]}
CLASS_NAME = re.compile(r"^Error: \w*(Error|Exception|Exit|Interrupt): ")


# --- what is there to write --------------------------------------------------------------


def leaves_of(settings: Any, prefix: str = "") -> Iterator[str]:
    for name, value in settings.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from leaves_of(value, f"{prefix}{name}.")


def keys_of(root: str) -> list[str]:
    """Dotted names of every value and section of a root, with whatever option."""
    own = yaml.safe_load((CONF / f"{root}.yaml").read_text("utf-8"))
    defaults = own.pop("defaults")
    own.pop("hydra")
    found = {*leaves_of(own)}
    for group in (group for each in defaults if isinstance(each, dict) for group in each):
        for path in (CONF / group).glob("*.yaml"):
            option = yaml.safe_load(path.read_text("utf-8"))
            option.pop("defaults", None)
            found |= {group, *leaves_of(option, f"{group}.")}
    return sorted(found - {"sweep.dry_run"})


KEYS = {root: keys_of(root) for root in MODULES}
OPTIONS = {
    group.name: sorted(path.stem for path in group.glob("*.yaml"))
    for group in CONF.iterdir()
    if group.is_dir()
}
# No NUL, which no command line can hold; bytes that are no UTF-8 arrive as surrogates.
TEXTS = st.text(
    st.characters(exclude_characters="\x00", exclude_categories=())
    | st.sampled_from("[]{}()'\"\\$,:=@~+-./ ${}")
    | st.integers(0x80, 0xFF).map(lambda byte: chr(0xDC00 + byte)),
    max_size=12,
).filter(lambda text: not any(0xD800 <= ord(char) < 0xDC80 for char in text))
NUMBERS = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.integers(0, 5000).map("9".__mul__),
    st.sampled_from(["-1", "0", "1e400", "-0.0", "4294967296", "0x10", "1_000", "1e-400", "NaN"]),
)
WORDS = st.sampled_from(
    [
        "",
        "null",
        "true",
        "no",
        "???",
        "many",
        "relu",
        "None",
        "../../etc/passwd",
        "a" * 300,
        "..",
        "１",  # noqa: RUF001  # full width
        "аdam",  # noqa: RUF001  # Cyrillic
        f"postgresql://me:{SECRET}@host/db",
        f"postgresql//me:{SECRET}@host/db",
        f"postgres:/me:{SECRET}@host",
        f"me:{SECRET}@host",
        f"http://host?password={SECRET}",
        f"sqlite:///x?token={SECRET}",
        "sqlite:///x.db",
        "${seed}",
        "${",
        "${}",
        "${oc.env:NO_SUCH_VARIABLE}",
        "${oc.env:HOME}",
        "${oc.decode:'\"a\\0b\"'}",
        "${tracking.directory}",
        "${hydra:job.name}",
        "${data.name}",
        "${nosuch:1}",
        "$${seed}",
        "[" * 200 + "]" * 200,
        "(" * 200,
        "{a:" * 100 + "1" + "}" * 100,
        "{}",
        "[]",
        "[null]",
        "[[]]",
        "{a: 1}",
        "{a: {b: [1]}}",
        "glob(*)",
        "extend_list(1)",
        "json_str({})",
        "int(x)",
        "1,2",
        "choice()",
        "interval(0, 1)",
        "'",
        '"',
        "\\",
        "a=b=c",
        "a\nb",
        "a\u2028b",
        "\x1b[31m",
        "#",
        "!",
        "%",
        "*",
        "&a",
    ]
)
QUOTED = st.builds(
    lambda text, quote: f"{quote}{text}{quote}", TEXTS | WORDS, st.sampled_from(["'", '"'])
)
PLAIN = st.one_of(WORDS, WORDS, WORDS, NUMBERS, NUMBERS, QUOTED, TEXTS)
FUNCTIONS = st.sampled_from(
    ["interval", "range", "choice", "tag", "int", "float", "str", "bool", "sort", "shuffle"]
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda each: f"[{','.join(each)}]"),
        st.lists(st.tuples(inner, inner), max_size=2).map(
            lambda pairs: "{" + ",".join(f"{key}: {value}" for key, value in pairs) + "}"
        ),
        st.builds(
            lambda name, each: f"{name}({', '.join(each)})", FUNCTIONS, st.lists(inner, max_size=3)
        ),
        st.lists(inner, min_size=2, max_size=3).map(",".join),
    ),
    max_leaves=4,
)
FINDINGS = st.sampled_from(["", "", "", "", "", "+", "++", "~"])


def arguments_of(root: str) -> st.SearchStrategy[str]:
    """An argument with a real key or group: most of what a user gets wrong is its value."""
    keys = st.sampled_from(KEYS[root])
    groups = [group for group in OPTIONS if group in KEYS[root]]
    return st.one_of(
        st.builds(lambda sign, key, value: f"{sign}{key}={value}", FINDINGS, keys, VALUES),
        st.builds(lambda key: f"~{key}", keys),
        st.sampled_from(groups).flatmap(
            lambda group: st.builds(
                lambda sign, option: f"{sign}{group}={option}",
                FINDINGS,
                st.sampled_from(OPTIONS[group]) | PLAIN,
            )
        ),
    )


COMMANDS = st.sampled_from([*MODULES]).flatmap(
    lambda root: st.tuples(st.just(root), st.lists(arguments_of(root), min_size=1, max_size=3))
)


# --- the property ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty, and to stay so."""
    return tmp_path_factory.mktemp("empty")


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def check(ended: Ended, arguments: list[str]) -> None:
    """Accepted, or refused in one readable line that names one of the arguments."""
    assert SECRET not in ended.out + ended.err
    if ended.status in (None, 0):
        return
    assert ended.err.count("\n") == 1
    assert ended.err.startswith("Error: ")
    assert ended.err[:-1].isprintable()
    assert not CLASS_NAME.match(ended.err)
    keys = " ".join(argument.partition("=")[0] for argument in arguments)
    assert words_of(keys) & words_of(ended.err) or "${" in ended.err


def check_command(root: str, arguments: list[str], folder: Path) -> Ended:
    arguments = [*arguments, *ALWAYS.get(root, [])]

    ended = start(MODULES[root], *arguments, folder=folder)

    check(ended, arguments)
    assert content_of(folder) == {}
    return ended


@fuzzed(30)
@given(COMMANDS)
@example(("predict", [f"tracking.directory={'a' * 300}"]))
@example(("run", [f"seed={'9' * 5000}"]))
@example(("sweep", [f"model.hidden_units=choice({'9' * 5000})"]))
@example(("sweep", [f"seed={'9' * 5000}"]))
@example(("run", [f"seed={'[' * 300}{']' * 300}"]))
@example(("run", ["data=1"]))
@example(("promote", ["executor=[0.0]"]))
@example(("ui", ["tracking=[[]]"]))
@example(("run", [f"tracking.uri=postgresql//me:{SECRET}@host/db"]))
@example(("sweep", [f"study.storage=postgres:/me:{SECRET}@host"]))
@example(("run", ["seed=\x1b[31m"]))
@example(("run", ["data.path='\udcff.npz'"]))
def test_a_command_line_with_any_values_is_accepted_or_refused_in_one_line(
    folder: Path, command: tuple[str, list[str]]
) -> None:
    root, arguments = command

    check_command(root, [each for each in arguments if not each.startswith("-")], folder)


# --- names -------------------------------------------------------------------------------

SAFE = re.compile(r"[A-Za-z0-9._-]{1,64}")
NAMED = [
    ("run", "data.name"),
    ("run", "tracking.experiment"),
    ("sweep", "sweep.name"),
    ("leaderboard", "sweep.name"),
    ("promote", "sweep.name"),
    ("promote", "name"),
    ("ui", "tracking.experiment"),
]
SAFE_CHARACTERS = string.ascii_letters + string.digits + "._-"
ODD_NAMES = st.one_of(
    st.text(SAFE_CHARACTERS, min_size=1, max_size=66),
    st.text(".", max_size=3),
    st.builds(
        lambda before, odd, after: f"{before}{odd}{after}",
        st.text(SAFE_CHARACTERS, max_size=5),
        st.sampled_from(
            ["/", "\\", " ", "\n", "\t", "%2e", "é", "ｅ", "\u202e", "\u0430", "~", "?", "#", "'"]  # noqa: RUF001
        )
        | st.sampled_from(["${seed}", "$", "{", "*", ",", ":", ";", "=", "\x7f", "\u2028", "🙂"]),
        st.text(SAFE_CHARACTERS, max_size=5),
    ),
    st.sampled_from(
        ["../../x", "/etc/passwd", "a" * 64, "a" * 65, "a" * 300, "a.", ".a", "-", "a/.."]
    ),
    TEXTS,
)


def quoted(text: str) -> str:
    """As a string of Hydra's grammar, whatever it holds."""
    escaped = re.sub(
        r"(\\*)('|\$\{|$)", lambda found: found[1] * 2 + "\\" * bool(found[2]) + found[2], text
    )
    return f"'{escaped}'"


@fuzzed(25)
@given(place=st.sampled_from(NAMED), name=ODD_NAMES)
@example(place=("run", "data.name"), name="a\\")
def test_whatever_becomes_a_path_has_a_safe_name_or_is_refused_with_its_key(
    folder: Path, place: tuple[str, str], name: str
) -> None:
    root, key = place

    ended = check_command(root, [f"{key}={quoted(name)}"], folder)

    is_safe = bool(SAFE.fullmatch(name)) and name.strip(".") != ""
    assert (ended.status is None) == is_safe
    assert is_safe or key in ended.err


# --- what no property found by itself -----------------------------------------------------


@pytest.mark.parametrize(
    ("root", "argument", "told"),
    [
        # MLflow would try for minutes, or say something that names no key.
        *[
            ("ui", f"tracking.uri='{uri}'", "tracking.uri must be null or an address")
            for uri in ("foo://bar", "://", "http://", "file:///runs", "sqlite:///", "sqlite:///.")
        ],
        ("sweep", "study.storage=sqlite:///", "study.storage must be null, sqlite:///FILE or"),
        ("sweep", "study.storage=postgresqlx", "study.storage must be null, sqlite:///FILE or"),
        # The run would be created, and left RUNNING: no database takes this.
        ("run", "data.class_names=['\udcff',b]", "not UTF-8"),
    ],
)
def test_what_would_fail_late_is_refused_at_once(
    folder: Path, root: str, argument: str, told: str
) -> None:
    ended = check_command(root, [argument], folder)

    assert ended.status == 1
    assert told in ended.err


@pytest.mark.parametrize("name", ["what?", "a%41", "{a}", "a\nb"])
def test_a_folder_that_no_address_of_a_database_can_name_is_refused(
    folder: Path, name: str
) -> None:
    ended = start(
        "sweeps.leaderboard", f"tracking.directory={quoted(name)}", folder=folder, trapped=False
    )

    assert ended.status == 1
    assert ended.err.startswith("Error: tracking.directory must lead to a printable path without ")
    assert ended.err.count("\n") == 1
    assert content_of(folder) == {}


@pytest.mark.parametrize("command", ["data.class_names=[a,b]", "data.path=[/x]"])
def test_a_run_prints_the_command_that_repeats_it_whole(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console.print(f"Repeat: {command}")

    assert capsys.readouterr().out == f"Repeat: {command}\n"


# --- flags -------------------------------------------------------------------------------

FLAGS = [
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--info",
    "-i",
    "--config-name",
    "-cn",
    "--config-dir",
    "-cd",
]
FLAGS += ["--config-path", "-cp", "--shell-completion", "-sc", "--nosuch", "--run", "--resolve"]


@fuzzed(15)
@given(
    root=st.sampled_from([*MODULES]),
    flag=st.sampled_from(FLAGS),
    value=st.sampled_from(["job", "all", "", "run", "data", "model.hidden_units", "..", "config"])
    | WORDS.filter(lambda word: SECRET not in word),
)
def test_no_flag_of_hydra_s_ends_in_a_traceback(
    folder: Path, root: str, flag: str, value: str
) -> None:
    ended = start(MODULES[root], flag, value, folder=folder)

    assert "Traceback" not in ended.err
    assert ended.status is None or ended.status in (0, 1, 2)
    assert content_of(folder) == {}


# --- what is looked for in a store -------------------------------------------------------

SOUGHT = [
    ("leaderboard", "sweep.name", []),
    ("promote", "sweep.name", []),
    ("promote", "run", []),
    ("promote", "name", ["rollback=true"]),
    ("promote", "name", ["history=true"]),
    ("repeat", "run", []),
    ("predict", "name", []),
    ("ui", "run", []),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, which has a registered model without versions and no runs."""
    from mlflow import MlflowClient

    from pipeline.store import open_store

    folder = tmp_path_factory.mktemp("store")
    tracking = TrackingConfig(
        uri=None,
        directory=str(folder / "mlruns"),
        experiment="digits",
        run_name=None,
        system_metrics=False,
        figures=False,
    )
    open_store(tracking)
    MlflowClient().create_registered_model("digits")
    Image.new("L", (9, 9)).save(folder / "seven.png")
    return folder


def kept(folder: Path) -> set[str]:
    """Files of a store, without those that SQLite keeps while it is open."""
    return {name for name in content_of(folder) if not name.endswith(("-wal", "-shm"))}


@fuzzed(15)
@given(place=st.sampled_from(SOUGHT), name=ODD_NAMES.filter(bool))
def test_what_is_not_in_a_store_is_missed_in_one_line_and_nothing_is_written(
    store: Path, place: tuple[str, str, list[str]], name: str
) -> None:
    root, key, more = place
    files = ["seven.png"] * (root == "predict")
    before = kept(store)

    ended = start(
        MODULES[root], *files, f"{key}={quoted(name)}", *more, folder=store, trapped=False
    )

    check(ended, [key])
    assert ended.status in (1, 3)
    assert kept(store) == before
