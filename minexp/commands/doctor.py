"""`minexp doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from .base import DONE, Command


@dataclass(frozen=True, kw_only=True)
class Doctor(Command):
    """Versions, device, threads, and which operators are compiled."""

    example = "minexp doctor"

    def run(self) -> int:
        from ..doctor import describe, examine

        facts = examine()
        self.show(facts, describe(facts))
        return DONE
