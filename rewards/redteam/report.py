"""Runs the red team against a suite: every exploit beside honest answers, and priors in a table apart."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from rewards.redteam.cases import Mix, cases, honest_answer
from rewards.redteam.exploits import EXPLOITS, Exploit
from rewards.redteam.priors import PRIORS
from rewards.suite import RewardError, RewardSuite

HONEST_LEVELS = ((0.4, 0.15), (0.6, 0.3), (0.8, 0.5), (1.0, 1.0))
"""(accuracy, IoU) of the honest answers shown."""
HONEST_BAR = (0.6, 0.3)
"""No exploit may earn more than honest answers of this accuracy and IoU. Fixed: not for a suite to adjust."""
SLOWEST_SECONDS = 1.0
"""No completion may take longer to score."""
MIXES: tuple[Mix, ...] = ("natural", "balanced")
_TRAIN_KNEES = 20


@dataclass(frozen=True, slots=True)
class Earned:
    """What a kind of completion earned, one for each case."""

    mean: float
    """Mean total; NaN when the suite failed."""
    slowest_seconds: float
    problem: str
    """Why the suite could not score them; empty when it could."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What an exploit earned."""

    exploit: Exploit
    earned: Earned
    problem: str
    """Why the suite fails the red team because of it; empty when it does not."""


@dataclass(frozen=True, slots=True)
class RedTeamReport:
    """Worst findings first."""

    findings: Sequence[Finding]
    honest: Mapping[tuple[float, float], Earned]
    """(accuracy, IoU) -> what such honest answers earn on the balanced mix."""
    priors: Mapping[str, Mapping[Mix, Earned]]

    @property
    def problems(self) -> list[str]:
        """Why the suite fails, worst first; none when it passes. Priors are shown, not judged."""
        honest = [f"honest answers: {earned.problem}" for earned in self.honest.values() if earned.problem]
        return honest + [f"{f.exploit.name}: {f.problem}" for f in self.findings if f.problem]


def red_team(suite: RewardSuite) -> RedTeamReport:
    """Attack a suite with every exploit. Deterministic but for the times.

    Each completion is scored in one group with an honest answer at the bar, as it would be in training: a component
    that leaves a bad answer out instead of scoring it is found that way.
    """
    attacked = {mix: _Cases(mix, suite) for mix in MIXES}
    balanced = attacked["balanced"]
    rng = np.random.default_rng(2)
    honest = {
        level: balanced.earned([honest_answer(case, *level, rng) for case in balanced.cases])
        for level in HONEST_LEVELS
    }
    findings = [_attack(exploit, balanced, honest[HONEST_BAR].mean) for exploit in EXPLOITS]
    findings.sort(key=lambda f: (not f.problem, -math.inf if math.isnan(f.earned.mean) else -f.earned.mean))
    priors = {
        name: {mix: cases_of_mix.earned_by_prior(name) for mix, cases_of_mix in attacked.items()}
        for name in PRIORS
    }
    return RedTeamReport(findings, honest, priors)


class _Cases:
    """The cases of one mix, and what completions earn on them."""

    def __init__(self, mix: Mix, suite: RewardSuite) -> None:
        self.suite = suite
        self.cases = cases(mix, suite.reasoning)
        self.train = cases(mix, suite.reasoning, knees=_TRAIN_KNEES, seed=1)
        rng = np.random.default_rng(4)
        self.beside = [honest_answer(case, *HONEST_BAR, rng) for case in self.cases]

    def earned(self, completions: Sequence[str]) -> Earned:
        """One completion for each case."""
        totals, slowest = [], 0.0
        for case, completion, honest in zip(self.cases, completions, self.beside, strict=True):
            started = time.perf_counter()
            try:
                totals.append(self.suite.score_group(case.example, [completion, honest])[0].total)
            except RewardError as error:
                return Earned(math.nan, slowest, str(error)[:300])
            slowest = max(slowest, time.perf_counter() - started)
            if slowest > SLOWEST_SECONDS:
                break
        return Earned(fmean(totals), slowest, "")

    def earned_by_prior(self, name: str) -> Earned:
        """What a prior earns that has seen other knees of the same mix."""
        return self.earned(PRIORS[name](self.train, self.cases, np.random.default_rng(3)))


def _attack(exploit: Exploit, balanced: _Cases, bar: float) -> Finding:
    earned = balanced.earned([exploit.attack(case) for case in balanced.cases])
    problem = earned.problem
    if not problem and earned.slowest_seconds > SLOWEST_SECONDS:
        problem = f"takes {earned.slowest_seconds:.1f} s to score"
    elif earned.mean > bar:
        accuracy, overlap = HONEST_BAR
        problem = f"earns {earned.mean:.3f}, honest accuracy {accuracy:.2f} with IoU {overlap:.2f} {bar:.3f}"
    return Finding(exploit, earned, problem)
