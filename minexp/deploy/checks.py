"""The checks of an explainer as the columns of one table, and which of them a predicate still has to ask."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .ops import Value, constant
from .pictures import Pictures
from .plan import DEFAULT, Check, Plan, Sets

Flags = npt.NDArray[np.bool_]


class Table:
    """Columns: the whole image, the predicate's checks (first the mask on the default background), the certificate's.

    Of each column: what it shows, where its background lies, and which draw of it is asked.
    """

    image, kept = 0, 1

    def __init__(self, plan: Plan, pictures: Pictures) -> None:
        self.checks = (Check("image"), *plan.predicate, *plan.certificate)
        self.certificate = 1 + len(plan.predicate)
        self.fresh_draws = len(self.checks) - len(plan.families) * plan.fresh
        self.draws = 1 + len(plan.plain)
        fresh = [n >= self.certificate for n in range(len(self.checks))]
        self.fresh = np.array(
            [f and c.background != DEFAULT for f, c in zip(fresh, self.checks, strict=True)]
        )
        purposes = ["certificate" if f else "predicate" for f in fresh]
        self.row = np.array(
            [pictures.first.get((p, c.background), 0) for p, c in zip(purposes, self.checks, strict=True)]
        )
        self.number = np.array([check.number for check in self.checks])

    def __len__(self) -> int:
        return len(self.checks)

    def where(self, **wanted: str) -> Flags:
        """Which columns have these fields."""
        return np.array([all(getattr(c, k) == v for k, v in wanted.items()) for c in self.checks])

    def only(self, start: int, stop: int) -> Flags:
        """Which columns lie there."""
        return (np.arange(len(self.checks)) >= start) & (np.arange(len(self.checks)) < stop)


class Verdict:
    """What a predicate's checks say by now, `minexp.judge.Judge` on a table: outcome [B,columns] -1, 0 or 1.

    allowed [attempts,1]: misses of a set, of a robust predicate. bad, good [B,1]: the mask has failed, has passed;
    open [B,columns]: checks that can still change that.
    """

    def __init__(
        self, plan: Plan, table: Table, outcome: Value, attempt: Value, allowed: Value | None
    ) -> None:
        asked, passed, missed = outcome >= 0, outcome.equals(1), outcome.equals(0)
        plain = constant(table.only(1, table.draws)[None])
        self.bad = (plain & missed).any(1)
        self.good = ~(plain & ~passed).any(1)
        self.open = plain & ~asked
        if plan.kind == "robust":
            most = max(sets.repeats for sets in plan.sets)
            members = [_members(table, sets, most) for sets in plan.sets]
            # [attempts,columns,sets]: which column is a draw of which set, and among its first, early ones
            member, early = (_chosen(np.stack([m[place] for m in members]), attempt) for place in (0, 1))
            assert allowed is not None
            misses = allowed.take(attempt)

            def count(flags: Value, of: Value) -> Value:
                return (flags.cast(np.float32).unsqueeze(1) @ of).squeeze(1)

            everything = constant(np.ones((1, len(table)), bool))
            early_missed, some_missed = count(missed, early) > 0, count(missed, member)
            failed = early_missed & (some_missed > misses)
            clean = count(passed, early) >= count(everything, early)
            enough = (count(asked, member) >= count(everything, member)) & (some_missed <= misses)
            passing = clean | enough  # a set that an attempt does not have holds no draws, and passes
            back = member.transpose(0, 2, 1)
            undecided = count(~(passing | failed), back) > 0
            later = count(early_missed, back) > 0  # draws behind the early ones are for sets with a miss
            first = early.any(2).squeeze(2)
            self.open = self.open | (undecided & ~asked & (first | later))
            self.bad = self.bad | failed.any(1)
            self.good = self.good & ~(~passing).any(1)
        self.open = self.open & ~self.bad
        self.good = self.good & ~self.bad


def _members(table: Table, sets: Sets, most: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """[columns,most] of one attempt: is the column a draw of the set; and among its first ``early``?"""
    member = np.zeros((2, len(table), most), np.float32)
    for n in range(sets.repeats * sets.draws):
        member[0, table.draws + n, n // sets.draws] = 1
        member[1, table.draws + n, n // sets.draws] = n % sets.draws < sets.early
    return member[0], member[1]


def _chosen(values: npt.NDArray[np.float32], attempt: Value) -> Value:
    return constant(values).take(attempt)
