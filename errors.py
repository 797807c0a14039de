"""The one exception for a user's mistake."""


class UserError(Exception):
    """A mistake that its reader can mend: the message says what is wrong, where, and what to do.

    The command line prints the message alone and exits with code 2; every other exception is a defect of ours and
    keeps its traceback.
    """
