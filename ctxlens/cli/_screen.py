"""Output for the user: results on stdout; progress, notes and errors on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ctxlens.cli._wrong_words import explain, explain_verb
from ctxlens.errors import CtxlensError, InputError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import Progress

    from ctxlens.chat.roles import RenderedChat

_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)
STOPPED = "stopped; run the same command again to continue"
_SHOWN_CONTROLS = {i: f"\\x{i:02x}" for i in (*range(9), *range(11, 32), *range(127, 160))}
_ROLE_COLOURS = {
    "bos": "grey62", "system": "magenta", "user": "green", "assistant": "cyan", "tool": "blue",
    "template": "grey50", "indicator": "bold yellow",
}  # fmt: skip


class _ShortHelpOption:
    """Show `--help` without the placeholder of a value, which flags do not take."""

    def get_help_option(self, ctx: Any) -> Any:
        """The option `--help`."""
        option = super().get_help_option(ctx)  # pyright: ignore[reportAttributeAccessIssue]
        if option is not None:
            option.metavar = ""
        return option


class Verb(_ShortHelpOption, TyperCommand):
    """One verb. An option shown as `[FILE]` may stand without its value, which is then `-`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of a command.

        Raises:
            InputError: words that this verb does not know, in one sentence.
        """
        optional = {name for one in self.params if one.metavar == "[FILE]" for name in one.opts}
        words: list[str] = []
        for i, word in enumerate(args):
            words.append(word)
            following = args[i + 1] if i + 1 < len(args) else "--"
            if word in optional and following.startswith("-") and following != "-":
                words.append("-")
        try:
            return super().parse_args(ctx, list(words))
        except Exception as error:
            sentence = explain(error, str(self.name), words, self.params)
            if sentence is None:
                raise
            raise InputError(sentence) from None


class Verbs(_ShortHelpOption, TyperGroup):
    """The command group: errors of ctxlens are printed as one sentence, with exit code 2."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The options of the group; the two that typer adds for completion are flags, too."""
        params = super().get_params(ctx)
        for one in params:
            if one.name in ("install_completion", "show_completion"):
                one.metavar = ""
        return params

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words before the verb; options that are not known are told in one sentence."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            sentence = explain(error, "", args, self.params)
            if sentence is None:
                raise
            _say_error(sentence)
            raise typer.Exit(2) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the verb.

        Raises:
            InputError: it does not exist.
        """
        try:
            return super().resolve_command(ctx, args)
        except Exception as error:
            if type(error).__name__ != "UsageError" or not args:
                raise
            raise InputError(explain_verb(args[0], list(self.commands))) from None

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; exceptions other than `CtxlensError` keep their traceback."""
        try:
            return super().invoke(ctx)
        except CtxlensError as error:
            _say_error(str(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print(f"\n{STOPPED}", file=sys.stderr)
            raise typer.Exit(130) from None
        except Exception as error:
            sentence = explain(error, "", (), self.params)
            if sentence is None:
                raise
            _say_error(sentence)
            raise typer.Exit(2) from None


def _say_error(sentence: str) -> None:
    print(f"error: {printable(' '.join(sentence.split()))}", file=sys.stderr)


def examples(*commands: str) -> str:
    """An epilog with commands to copy."""
    return "\n\n".join(("[b]Examples[/b]", *(f"  [cyan]$ {command}[/cyan]" for command in commands)))


def printable(text: str) -> str:
    """Text with visible control characters, so that data cannot control the terminal."""
    return text.translate(_SHOWN_CONTROLS)


def silence_libraries() -> None:
    """Silence other libraries without loading any of them."""
    import logging
    import os
    import warnings

    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    quiet = {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


@contextmanager
def quieted(quiet: bool) -> Iterator[None]:
    """Print no remarks and no progress inside; errors are printed."""
    token = _QUIET.set(quiet)
    try:
        yield
    finally:
        _QUIET.reset(token)


def is_quiet() -> bool:
    """Whether remarks and progress are left out."""
    return _QUIET.get()


@contextmanager
def stage(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show one progress bar with the time left; yields a function to call with (done, total)."""
    with stages({title: title}) as progress:
        yield lambda done, total: progress(title, done, total)


@contextmanager
def stages(titles: Mapping[str, str]) -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar for each stage when it begins; yields a function (stage, done, total).

    A total of 0 means that the total is not known. If stderr is not a terminal, lines are printed instead:
    one for each stage that takes long, with the time left as its first batch shows it, and then at most one
    every ten seconds. A stage that `titles` does not name is shown by its own name. Inside `quieted`,
    nothing is shown.
    """
    if is_quiet() or not sys.stderr.isatty():
        yield (lambda stage, done, total: None) if is_quiet() else _Lines(titles)
        return
    with _progress() as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(titles.get(stage, stage), total=total or None)
            bars.update(tasks[stage], completed=done, total=total or None)

        yield progress


class _Lines:
    """Progress as lines; a stage that takes less than ten seconds is not mentioned."""

    EVERY = 10.0

    def __init__(self, titles: Mapping[str, str]) -> None:
        self.titles, self.told = titles, time.monotonic()
        self.began: dict[str, tuple[float, int]] = {}
        self.mentioned: set[str] = set()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        begun, at_first = self.began.setdefault(stage, (now, done))
        left = (now - begun) / (done - at_first) * (total - done) if total > done > at_first else None
        is_long = left is not None and now - begun + left >= self.EVERY and stage not in self.mentioned
        if is_long or now - self.told >= self.EVERY:
            self.told = now
            self.mentioned.add(stage)
            so_far = f"{self.titles.get(stage, stage)}: {done:,}" + (f" of {total:,}" if total else "")
            note(so_far + (f", about {describe_seconds(left)} left" if left else ""))


def describe_seconds(seconds: float | int) -> str:
    """A time in words, as exact as an estimate can be: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds, -1 if seconds >= 20 else 0)):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class TimeColumn(TimeRemainingColumn):
        def render(self, task: Task) -> Text:
            return Text("took " if task.finished else "left ", "dim") + super().render(task)

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeColumn(elapsed_when_finished=True),
        console=console,
    )


def say(text: str) -> None:
    """Print a line to stdout."""
    print(text)


def note(text: str) -> None:
    """Print a remark to stderr, unless remarks are left out (`quieted`)."""
    if not is_quiet():
        print(printable(text), file=sys.stderr)


def note_texts(chosen: str) -> None:
    """Print which haystack and needles were chosen by default, if any were."""
    if chosen:
        note(f"texts: {chosen}")


def say_wrapped(lines: Sequence[str]) -> None:
    """Print paragraphs to stdout, wrapped at the width of the terminal; unwrapped if stdout is not one."""
    import shutil
    import textwrap

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for line in map(printable, lines):
        indent = line[: len(line) - len(line.lstrip())]
        print(textwrap.fill(line, width, subsequent_indent=indent) if width else line)


def say_where(folder: Path) -> None:
    """Print where the results are and the command that draws them."""
    note(f"results are in {folder}; draw them with: ctxlens report {folder}")


def say_answers(answers: Sequence[str]) -> None:
    """Print answers to stdout unchanged; on a terminal, control characters are made visible."""
    for i, answer in enumerate(answers):
        if len(answers) > 1:
            note(f"--- conversation {i}")
        print(printable(answer) if sys.stdout.isatty() else answer, flush=True)


def note_truncated(chats: Sequence[RenderedChat]) -> None:
    """Print a note if conversations were truncated."""
    cut = [(i, chat.truncated) for i, chat in enumerate(chats) if chat.truncated]
    if cut:
        note(
            f"{len(cut)} of {len(chats)} conversations were truncated; conversation {cut[0][0]}: {cut[0][1]}"
        )


def note_left_out(chats: Sequence[RenderedChat]) -> dict[str, int]:
    """Print what the chat template leaves out of conversations; returns it, with the number of messages."""
    from ctxlens.chat.roles.left_out import count_left_out, describe_left_out

    counts = count_left_out(chats)
    for line in describe_left_out(counts):
        note(line)
    return counts


def show_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    texts: bool = False,
    n_labels: int = 1,
) -> None:
    """Print a small table.

    Long labels that make the table wider than the screen get lines of their own (`show_lines`), unbroken.

    Args:
        title: the line above the table.
        columns: names of the columns.
        rows: the cells.
        texts: whether the cells are long texts, shown side by side.
        n_labels: number of label columns on the left; all others hold numbers.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not texts and n_labels == 1 and _only_labels_overflow([columns, *rows]):
        show_lines(title, columns, rows)
        return
    table = Table(
        box=box.HORIZONTALS if texts else None, pad_edge=False, show_lines=texts, show_header=any(columns)
    )
    for i, name in enumerate(columns):
        if texts:
            table.add_column(Text(name), ratio=1, overflow="fold")
        else:
            table.add_column(Text(name), justify="left" if i < n_labels else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console(highlight=False)
    console.print(Text(printable(title), style="bold"))
    console.print(table)


def _only_labels_overflow(rows: Sequence[Sequence[str]]) -> bool:
    """Whether rows of a label and numbers are too wide for the screen, but fit without their labels."""
    from rich.cells import cell_len
    from rich.console import Console

    label, *widths = [max(cell_len(printable(cell)) for cell in column) for column in zip(*rows, strict=True)]
    numbers, width = sum(one + 2 for one in widths), Console().width
    return label + numbers > width >= numbers + 2


def show_lines(title: str, columns: Sequence[str], lines: Sequence[str | Sequence[str]]) -> None:
    """Print rows of a label and numbers, with headings between them.

    If the rows are too wide for the screen, the numbers of each row stand on a line below its label.

    Args:
        title: the line above the table.
        columns: names of the columns.
        lines: the rows; a plain text is a heading.
    """
    from rich.cells import cell_len, set_cell_size
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    rows = [columns, *(line for line in lines if not isinstance(line, str))]
    label, *widths = [max(cell_len(printable(row[i])) for row in rows) for i in range(len(columns))]
    beside = label + sum(width + 2 for width in widths) <= console.width

    def put(row: Sequence[str], style: str = "") -> None:
        first, *cells = [printable(cell) for cell in row]
        numbers = "".join(
            " " * (2 + width - cell_len(cell)) + cell for cell, width in zip(cells, widths, strict=True)
        ).rstrip()
        if beside:
            text = set_cell_size(first, label) + numbers
        else:
            text = "\n".join(filter(None, (first.rstrip(), "  " + numbers if numbers else "")))
        console.print(Text(text.rstrip(), style=style))

    console.print(Text(printable(title), style="bold"))
    put(columns, "bold")
    for line in lines:
        if isinstance(line, str):
            console.print(Text(printable(line)))
        else:
            put(line)


def _runs(names: Sequence[str], tokens: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The role and the text of each run of tokens of one role; a line break is shown as a sign."""
    from itertools import groupby

    pairs = groupby(zip(names, tokens, strict=True), key=lambda pair: pair[0])
    for name, run in pairs:
        yield name, printable("".join(token for _, token in run)).replace("\n", "⏎")


def show_roles(chat: RenderedChat) -> None:
    """Print a rendered conversation with every token in its role's colour, and the tokens per role."""
    from rich.console import Console
    from rich.text import Text

    from ctxlens.chat.roles import Role

    names = [Role(int(value)).label for value in chat.role]
    console = Console(highlight=False)
    if not console.is_terminal or console.no_color:
        for name, said in _runs(names, chat.token_strings()):
            print(f"{name}: {said}")
        print()
    text = Text()
    for token, name in zip(chat.token_strings(), names, strict=True):
        said = printable(token)
        text.append(said.replace("\n", "⏎\n") if name == "template" else said, _ROLE_COLOURS.get(name, "red"))
    if console.is_terminal and not console.no_color:
        console.print(text)
    legend = Text("\n")
    for name in dict.fromkeys(names):
        legend.append(f"{name} {names.count(name)}  ", style=_ROLE_COLOURS.get(name, "red"))
    console.print(legend.append(f"{len(names)} tokens"))
    for turn, position in chat.stops.items():
        note(f"turn {turn} ends at token {position}")
    if chat.spoofed_special_tokens:
        note(f"special tokens typed by a speaker: {', '.join(chat.spoofed_special_tokens)}")
    if chat.left_out_turns():
        note(f"the template leaves out the content of turn {', '.join(map(str, chat.left_out_turns()))}")
    note_left_out([chat])
    if chat.truncated:
        note(chat.truncated)
