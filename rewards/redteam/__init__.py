"""Red team: does any trick earn more than an honest answer? `reasonknee rewards redteam` runs it."""

from rewards.redteam.cases import Case, cases, honest_answer
from rewards.redteam.exploits import EXPLOITS, Exploit
from rewards.redteam.priors import PRIORS
from rewards.redteam.report import HONEST_BAR, Earned, Finding, RedTeamReport, red_team

__all__ = [
    "EXPLOITS",
    "HONEST_BAR",
    "PRIORS",
    "Case",
    "Earned",
    "Exploit",
    "Finding",
    "RedTeamReport",
    "cases",
    "honest_answer",
    "red_team",
]
