"""What is said to a user whose input is wrong."""


class UserError(Exception):
    """Bad input from the user: a front door prints it on one line and exits with code 2."""
