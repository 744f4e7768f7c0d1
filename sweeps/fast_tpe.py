"""Optuna's TPE, whose time hardly grows with a study of one objective without conditions."""

import copy
import heapq
from collections.abc import Container
from typing import Any, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe import _truncnorm
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.special import log_ndtr

GOOD = 25  # trials, at most, that Optuna's TPE takes for good


class FastTPESampler(TPESampler):
    """Models at most so many finished trials of one objective, and is Optuna's own up to there.

    It compares the density of the few good trials with that of all others, each of which Optuna
    reads again for each draw: 0.1 s a trial after 10,000. The density of others is as well known
    from some of them.

    Args:
        n_modelled_trials: The good ones, and an even choice in the order of their numbers.
        settings: Of Optuna's.
    """

    def __init__(self, *, n_modelled_trials: int, **settings: Any) -> None:
        use_scipy()
        super().__init__(**settings)
        self._most = n_modelled_trials

    def _sample(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        thinned = cast(optuna.Study, _Thinned(study, self._most))
        return super()._sample(thinned, trial, search_space)


class _Thinned:
    """A study, of which a sampler is shown some trials."""

    def __init__(self, study: optuna.Study, most: int) -> None:
        self._study, self._most = study, most

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        trials = self._study._get_trials(deepcopy=False, states=states, use_cache=use_cache)
        if len(self.directions) == 1:
            trials = thin(trials, self.direction, self._most)
        return copy.deepcopy(trials) if deepcopy else trials


def thin(trials: list[FrozenTrial], direction: StudyDirection, most: int) -> list[FrozenTrial]:
    """Trials in their order, at most so many of the finished ones, the best among them."""
    finished = [trial for trial in trials if trial.state.is_finished()]
    if len(finished) <= most:
        return trials
    complete = [trial for trial in finished if trial.state == TrialState.COMPLETE]
    pick = heapq.nlargest if direction == StudyDirection.MAXIMIZE else heapq.nsmallest
    best = pick(GOOD, complete, key=lambda trial: trial.value or 0.0)
    even = np.linspace(0, len(finished) - 1, most - len(best)).round().astype(int)
    kept = {trial.number for trial in [*best, *(finished[index] for index in even)]}
    return [trial for trial in trials if trial.number in kept or not trial.state.is_finished()]


def use_scipy() -> None:
    """Has every TPE sampler of this process use SciPy's logarithm of the normal distribution.

    Optuna 5.0 has one in Python, called once a number: 34,000 times for a trial after 2,000, four
    fifths of what asking takes. It is a private function of Optuna's, so this is all that knows of
    it.
    """
    if hasattr(_truncnorm, "_log_ndtr"):  # else this version has another way
        _truncnorm._log_ndtr = log_ndtr
