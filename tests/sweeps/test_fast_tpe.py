"""Optuna's TPE with SciPy's function in place of its own, and of a large study with a part."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.samplers._tpe import _truncnorm
from optuna.samplers._tpe.sampler import default_gamma
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy.special import log_ndtr

from sweeps.fast_tpe import GOOD, FastTPESampler, thin, use_scipy

RANGE: dict[str, BaseDistribution] = {"x": FloatDistribution(0.0, 1.0)}


def ask(number: int, sampler: BaseSampler | None = None) -> dict[str, float]:
    """The trial of this number of a study whose first ones are always the same."""
    study = optuna.create_study(sampler=sampler or TPESampler(seed=3, multivariate=True))
    for _ in range(number):
        trial = study.ask()
        x, y = trial.suggest_float("x", 1e-4, 1e-2, log=True), trial.suggest_int("y", 1, 1000)
        study.tell(trial, (math.log10(x) + 3) ** 2 + y / 1000)
    return study.trials[-1].params


def test_scipy_has_the_values_of_optuna() -> None:
    numbers = np.concatenate([np.linspace(-40, 10, 2001), [-1e3, 0.0, 1e3, math.inf]])
    single = np.array([_truncnorm._log_ndtr_single(number) for number in numbers])

    assert log_ndtr(numbers) == pytest.approx(single, rel=1e-10)


def test_a_study_is_asked_the_same_with_either(monkeypatch: pytest.MonkeyPatch) -> None:
    own = np.vectorize(_truncnorm._log_ndtr_single, otypes=[float])
    monkeypatch.setattr(_truncnorm, "_log_ndtr", own)
    before = ask(30)

    use_scipy()

    assert _truncnorm._log_ndtr is log_ndtr
    assert ask(30) == pytest.approx(before, rel=1e-9)


def finished(values: Sequence[float]) -> list[FrozenTrial]:
    """A complete trial of each value, but every tenth one, which was pruned."""
    trials = []
    for number, value in enumerate(values):
        state = TrialState.PRUNED if number % 10 == 9 else TrialState.COMPLETE
        x = {"x": number / len(values)}
        reported = {1: value}
        trial = create_trial(
            state=state, value=value, params=x, distributions=RANGE, intermediate_values=reported
        )
        trial.number = number
        trials.append(trial)
    return trials


def running(count: int, *, after: int) -> list[FrozenTrial]:
    trials = [create_trial(state=TrialState.RUNNING) for _ in range(count)]
    for number, trial in enumerate(trials, start=after):
        trial.number = number
    return trials


@pytest.mark.parametrize("direction", [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE])
def test_a_part_of_a_study_has_its_best_trials_an_even_choice_and_all_that_run(
    direction: StudyDirection,
) -> None:
    values = np.random.default_rng(0).random(2000)
    trials = [*finished(list(values)), *running(7, after=2000)]

    part = thin(trials, direction, 300)

    numbers = [trial.number for trial in part]
    sign = 1 if direction == StudyDirection.MAXIMIZE else -1
    complete = [number for number in range(2000) if number % 10 != 9]
    best = sorted(complete, key=lambda number: sign * values[number])[-GOOD:]
    assert numbers == sorted(set(numbers))
    assert 275 <= len(numbers) - 7 <= 300
    assert set(best) <= set(numbers)
    assert set(range(2000, 2007)) <= set(numbers)
    assert max(np.diff([0, *numbers])) <= 8  # 2000 / 275, rounded up
    assert any(trial.state == TrialState.PRUNED for trial in part)


def test_a_study_of_few_finished_trials_is_whole() -> None:
    trials = [*finished([0.5] * 250), *running(400, after=250)]

    assert thin(trials, StudyDirection.MAXIMIZE, 250) is trials


def test_the_best_are_as_many_as_optuna_takes_for_good() -> None:
    assert default_gamma(100_000) == default_gamma(250) == GOOD


def test_a_small_study_is_asked_as_by_optuna() -> None:
    own = FastTPESampler(n_modelled_trials=250, seed=3, multivariate=True)

    assert ask(60, own) == ask(60)


class Asked(FastTPESampler):
    """Notes how many trials there are to model."""

    modelled = 0

    def _build_parzen_estimator(
        self,
        study: optuna.Study,
        search_space: dict[str, BaseDistribution],
        trials: list[FrozenTrial],
        handle_below: bool,
    ) -> Any:
        self.modelled += len(trials)
        return super()._build_parzen_estimator(study, search_space, trials, handle_below)


@pytest.mark.parametrize("liar", [True, False])
@pytest.mark.parametrize("objectives", [1, 2])
def test_a_large_study_of_one_objective_is_modelled_in_part(objectives: int, liar: bool) -> None:
    sampler = Asked(n_modelled_trials=250, seed=0, multivariate=True, constant_liar=liar)
    study = optuna.create_study(sampler=sampler, directions=["maximize"] * objectives)
    for trial in finished(list(np.linspace(0, 1, 600))):
        values = [trial.params["x"]] * objectives
        study.add_trial(create_trial(values=values, params=trial.params, distributions=RANGE))

    x = study.ask(RANGE).params["x"]

    assert 0 <= x <= 1
    if objectives == 1:
        assert 225 <= sampler.modelled <= 250
        assert x > 0.9  # where the good ones are
    else:
        assert sampler.modelled == 600
