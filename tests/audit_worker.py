"""`ctxlens audit` with a tiny plan and a log of its batches: `python audit_worker.py LOG audit ...`."""

import sys
from dataclasses import replace
from pathlib import Path

from ctxlens.auditing import asking, measure, run
from ctxlens.cli import main
from ctxlens.evals.needle import run as needle_run
from ctxlens.runs import digest

log = Path(sys.argv.pop(1))


def write_down(*batch):
    """One line per batch, before it is computed, so that a batch that a kill interrupts counts."""
    with log.open("a") as file:
        file.write(digest(batch) + "\n")


def plan(frame, lengths=None):
    return replace(frame.plan([140], 8, alphas=(0.5, 0.2), draws=1), role_texts=4)


def ask(work, setting, batch, *, is_first):
    cells = [f"{work.jobs[index][0].number}-{work.jobs[index][1].name}" for index in work.batches[batch]]
    write_down("ask", setting.columns, cells)
    return ask_batch(work, setting, batch, is_first=is_first)


def read(model, chat, cell):
    write_down("read", cell.number, chat.text)
    return read_chat(model, chat, cell)


def answer(model, questions, **options):
    write_down("closed book", [steering.describe() for steering in model._steerings])
    return answer_questions(model, questions, **options)


ask_batch, read_chat, answer_questions = needle_run._Work._ask, asking.read_with_fact, measure.run_closed_book
needle_run._Work._ask, asking.read_with_fact, measure.run_closed_book = ask, read, answer
run.make_plan = plan
main()
