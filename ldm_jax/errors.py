"""How a run may end other than well, and the exit codes for it."""

OK, FAILED, BAD_INPUT, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130


class UserError(Exception):
    """Bad input from the user: a front door prints it on one line and exits with 2."""


class TrainingFailed(Exception):
    """The run cannot go on (losses that are not finite, storage that does not answer); a front door prints one line and exits with 1."""


class NotJoined(Exception):
    """The processes of a run have not found each other, and may when they are started again; a front door prints it on one line and exits
    with 1."""


class Stopped(BaseException):
    """The run was asked to stop and goes on when it is started again; a front door exits with 75.

    As of KeyboardInterrupt, no clause for errors may take hold of it.
    """


def first_line(error: Exception) -> str:
    """Of what an error says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
