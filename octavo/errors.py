"""The one exception a user is meant to read."""


class OctavoError(Exception):
    """A mistake in the input, the options or the surroundings, told in one paragraph.

    The message names the file or tensor, what was found, what was expected and what to do next.
    The command line prints it without a traceback and exits with code 2.
    """
