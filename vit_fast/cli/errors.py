"""How a command ends where it cannot do what it was asked."""

from vit_fast.bench.errors import BenchError

INTERRUPTED = 130  # exit status after Ctrl-C, as of a shell


class CommandError(BenchError):
    """A failure of a command that the user can mend: its text is all that is printed."""
