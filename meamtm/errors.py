"""The user's mistakes. Each message names the key, the value, the rule and the remedy; the commands print it as one
line and exit with 2. Our own mistakes are assertions."""

import errno

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of a disk, a quota or a file that takes no more."""
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
"""What it says of a place that this user may not read or write."""


class MeamtmError(Exception):
    """Something that the user can put right."""


def remedy(error: OSError) -> str | None:
    """Says what a user can do about a file that the system refuses; None where that is not for a user to put right."""
    if error.errno in FULL_DISK:
        return "make room, and run the same command again"
    if error.errno in DENIED and error.filename is not None:
        return "give this user the right to it, or name another place"
    return None


class ConfigError(MeamtmError):
    """A configuration key or value that cannot be used."""


class TooLargeError(ConfigError):
    """A configuration whose training cannot fit into memory; `excess` says by which fraction of what there is."""

    def __init__(self, message: str, excess: float) -> None:
        super().__init__(message, excess)  # both, so that it can be pickled
        self.excess = excess

    def __str__(self) -> str:
        return str(self.args[0])


class DataError(MeamtmError):
    """Audio, labels or a data set that cannot be used."""


class CheckpointError(MeamtmError):
    """A checkpoint that is damaged, incomplete or made for something else."""


class ServiceError(MeamtmError):
    """A tracking server or a Ray cluster that does not answer."""


class BusyError(MeamtmError):
    """A folder in which another process is at work."""
