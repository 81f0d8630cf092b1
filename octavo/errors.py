"""The exceptions a user is meant to read."""


class OctavoError(Exception):
    """A mistake in the input, the options or the surroundings, told in one paragraph.

    The message names the file or tensor, what was found, what was expected and what to do next.
    The command line prints it without a traceback and exits with code 2. Notes (PEP 678) are further
    paragraphs: what is left of an interrupted run.
    """


class WriteError(OctavoError):
    """The system refused a write. Nothing is wrong with the input, so what is finished is kept where a
    run can be resumed."""


def not_finite(tensor: str) -> OctavoError:
    """The error for a tensor of the input that holds NaN or infinity."""
    return OctavoError(
        f"tensor {tensor!r} of the input holds NaN or infinity; expected finite weights. "
        "The checkpoint is damaged or its training diverged: get an intact copy."
    )


def one_line(error: BaseException) -> str:
    """What another library's exception says, folded into a clause of our own sentence."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
