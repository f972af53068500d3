"""The errors that ctxlens raises for bad input: each message is one clear sentence for the user.

A message says what was given, what was expected and what to do; the command line prints it and
exits with code 2, without a traceback.
"""


class CtxlensError(Exception):
    """Base of everything that ctxlens raises on purpose."""


class InputError(CtxlensError, ValueError):
    """An argument, file or conversation that ctxlens cannot work with."""


class MissingPackageError(InputError):
    """A package that only some work needs, and that an extra of this distribution installs."""


EXTRAS: dict[str, str] = {
    "bitsandbytes": "lora",
    "dash": "explore",
    "gguf": "gguf",
    "immutabledict": "eval",
    "kaleido": "png",
    "langdetect": "eval",
    "lm_eval": "eval",
    "nltk": "eval",
    "peft": "lora",
    "transformer_lens": "lens",
}
"""The extra of `pyproject.toml` that installs each module that the bare installation lacks."""


def missing_package(asked: str, module: str, otherwise: str = "") -> MissingPackageError:
    """The error for a package of an extra that is not installed.

    Args:
        asked: what needs the package, as the subject of a sentence.
        module: the name under which the package is imported; a key of `EXTRAS`.
        otherwise: what else the user can do, as the end of a sentence.
    """
    extra = EXTRAS[module]
    return MissingPackageError(
        f"{asked} needs the package {module.replace('_', '-')}, which the extra {extra} installs; in a clone "
        f'of ctxlens, run pip install -c constraints.txt -e ".[{extra}]"{otherwise}.'
    )


def require_package(asked: str, module: str, otherwise: str = "") -> None:
    """Refuse work whose package is not installed; nothing is imported.

    Raises:
        MissingPackageError: `module` is not installed; see `missing_package`.
    """
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise missing_package(asked, module, otherwise)


class Problems:
    """Collects what is wrong with an input, so that everything is said at once.

    ```python
    problems = Problems()
    with problems:
        check_model(name)
    with problems:
        check_data(path)
    problems.report()
    ```

    Attributes:
        found: the errors, in the order in which they were found.
    """

    def __init__(self) -> None:
        self.found: list[InputError] = []

    def __enter__(self) -> "Problems":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, InputError):
            self.add(error)
            return True
        return False

    def add(self, error: InputError) -> None:
        """Take note of an error; the same message is kept once."""
        if str(error) not in map(str, self.found):
            self.found.append(error)

    def report(self) -> None:
        """Raise what was found; nothing happens if nothing was.

        Raises:
            InputError: the error itself if there is one, or one message with the numbered messages of all.
        """
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            told = " ".join(f"({number}) {error}" for number, error in enumerate(self.found, start=1))
            raise InputError(f"{len(self.found)} things are wrong. {told}")


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
