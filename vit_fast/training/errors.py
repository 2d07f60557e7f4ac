"""The error of a training run that its user can fix; its text is all that the command line prints."""

from vit_fast.bench.errors import BenchError


class TrainingError(BenchError):
    """Data, a checkpoint, a folder or a setting that cannot be used, or a loss that is not finite."""
