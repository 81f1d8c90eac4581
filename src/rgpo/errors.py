"""The one exception that a user of the command line is meant to read."""


class RgpoError(Exception):
    """Bad input or a run that cannot go on: one sentence that says what is wrong and what to do.

    The command line prints the sentence alone and exits with status 1 (traceback with `--debug`).
    """
