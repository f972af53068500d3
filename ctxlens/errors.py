"""The errors that ctxlens raises for bad input: each message is one clear sentence for the user.

A message says what was given, what was expected and what to do; the command line prints it and
exits with code 2, without a traceback.
"""


class CtxlensError(Exception):
    """Base of everything that ctxlens raises on purpose."""


class InputError(CtxlensError, ValueError):
    """An argument, file or conversation that ctxlens cannot work with."""


class RenderError(InputError):
    """A conversation that a chat template refuses, or whose roles cannot be located exactly."""


class RunExistsError(InputError):
    """An output folder that already holds another run."""


class UnsupportedModelError(InputError):
    """A model whose attention cannot be read or steered exactly."""


class ModelFailureError(CtxlensError, RuntimeError):
    """A model that raises, or whose output cannot be used, where it should answer."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, to be quoted in another message.

    An error without a message gives the name of its class.
    """
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:300] if lines else type(error).__name__
