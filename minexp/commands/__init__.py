"""The commands of the command line, a module each."""

from .base import Command
from .bench import Bench
from .circuit import Circuit
from .convert import Convert
from .demo import Demo
from .doctor import Doctor
from .explain import Explain
from .export import Export
from .fit import Fit
from .report import Report
from .verify import Verify

COMMANDS: dict[str, type[Command]] = {
    "demo": Demo,
    "fit": Fit,
    "explain": Explain,
    "export": Export,
    "circuit": Circuit,
    "report": Report,
    "verify": Verify,
    "convert": Convert,
    "bench": Bench,
    "doctor": Doctor,
}
