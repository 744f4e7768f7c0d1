"""Mean and spread over the seeds of a multirun."""

import io
from collections.abc import Mapping

import pytest

from pipeline.console import open_console
from pipeline.summary import Job, summary_table


def job(*settings: str, seed: int, metrics: Mapping[str, float] | None = None) -> Job:
    measured = {"test_accuracy": 0.5, "fit_seconds": 2.0, "parameters": 7.0, **(metrics or {})}
    return Job(overrides=[*settings, f"seed={seed}"], seed=seed, metrics=measured)


def rows(*jobs: Job) -> list[list[str]]:
    """Cells of each line, as they are written into a file."""
    file = io.StringIO()
    open_console(file).print(summary_table(jobs))
    return [line.split() for line in file.getvalue().splitlines()]


def test_mean_and_standard_deviation_are_those_of_the_seeds() -> None:
    jobs = [
        job(seed=seed, metrics={"test_accuracy": 0.97 + seed / 100, "fit_seconds": 3 + seed})
        for seed in range(3)
    ]

    assert rows(*jobs) == [
        ["seeds", "test_accuracy", "seconds"],
        ["0,", "1,", "2", "0.9800", "±0.0100", "4.0", "±1.0"],
    ]


def test_equal_settings_have_one_row_that_names_what_is_their_own() -> None:
    jobs = [
        job("data=digits", rate, seed=seed, metrics={"test_accuracy": 0.5 + seed / 10})
        for rate in ("model.dropout_rate=0.1", "model.dropout_rate=0.2")
        for seed in (1, 3)
    ]

    assert rows(*jobs) == [
        ["settings", "seeds", "test_accuracy", "seconds"],
        ["model.dropout_rate=0.1", "1,", "3", "0.7000", "±0.1414", "2.0", "±0.0"],
        ["model.dropout_rate=0.2", "1,", "3", "0.7000", "±0.1414", "2.0", "±0.0"],
    ]


def test_settings_of_one_seed_have_no_spread_and_a_seed_counts_once() -> None:
    jobs = [job("a=1", seed=0), job("a=1", seed=1), job("a=1", seed=1), job("a=2", seed=0)]

    _, two, one = rows(*jobs)

    assert two[:3] == ["a=1", "0,", "1"]
    assert one == ["a=2", "0", "0.5000", "2.0"]


def test_a_figure_that_some_settings_lack_is_left_empty_there() -> None:
    held_out = [job("a=1", seed=s, metrics={"saved_val_accuracy": 0.9}) for s in (0, 1)]
    whole = [job("a=2", seed=s) for s in (0, 1)]

    heading, first, second = rows(*held_out, *whole)

    assert heading == ["settings", "seeds", "val_accuracy", "test_accuracy", "seconds"]
    assert first[3:] == ["0.9000", "±0.0000", "0.5000", "±0.0000", "2.0", "±0.0"]
    assert second[3:] == ["0.5000", "±0.0000", "2.0", "±0.0"]


def test_many_settings_are_shown_whole_in_a_file() -> None:
    settings = [f"section.of_a_rather_long_name_{i}=0.123456789" for i in range(9)]

    _, row, _ = rows(job(*settings, seed=0), job(*settings, seed=1), job("a=1", seed=0))

    assert row[: len(settings)] == settings


def test_settings_show_no_password_and_can_be_copied() -> None:
    jobs = [
        job(f"tracking.uri=http://me:{word}@host/", "data.name=a b", seed=seed)
        for word in ("hunter2", "hunter3")
        for seed in (0, 1)
    ]
    jobs.append(job(seed=0))

    _, row, *_ = rows(*jobs)

    assert "hunter" not in str(row)
    assert row[:3] == ["tracking.uri=http://me:***@host/", "'data.name=a", "b'"]


@pytest.mark.parametrize("override", ["seed=7", "+seed=7", "++seed=7"])
def test_the_seed_is_no_setting_however_it_is_given(override: str) -> None:
    assert Job(overrides=["a=1", override], seed=7, metrics={}).settings == ("a=1",)


def test_settings_of_one_seed_each_have_a_row_each() -> None:
    jobs = [job(f"a={number}", seed=3, metrics={"fit_seconds": number}) for number in (1, 2)]

    assert rows(*jobs) == [
        ["settings", "seeds", "test_accuracy", "seconds"],
        ["a=1", "3", "0.5000", "1.0"],
        ["a=2", "3", "0.5000", "2.0"],
    ]


@pytest.mark.parametrize("jobs", [[], [job(seed=0)], [job(seed=0), job(seed=0)]], ids=len)
def test_jobs_of_which_none_differ_have_no_summary(jobs: list[Job]) -> None:
    assert summary_table(jobs) is None
