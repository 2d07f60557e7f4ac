"""The error of a command that cannot do what was asked, and exit statuses."""

from vit_fast.bench.errors import BenchError

INTERRUPTED = 130  # exit status after Ctrl-C, as in a shell


class CommandError(BenchError):
    """A failure of a command that the user can fix; only its text is printed."""
