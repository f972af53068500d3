"""The explorer: a page in the browser that shows one model at work (`ctxlens explore MODEL`).

How it is built, for whoever adds to it:

* **`state.State`** is everything that a person has chosen: one frozen, checked value. It lives in the
  browser and in the link, never in a module. A group of settings belongs to each screen (`ChatPart`,
  `WherePart`, ...).
* **Controls** have the id `parts.control_id("group.setting")` and the property `value`; the helpers in
  `parts` (`choice`, `entry`, `area`, `flag`, `slider`) make them. Whatever has such an id is part of the
  state: the link, undo and redo, and *copy as Python* work for it without a further line. A new setting is
  a field of its group in `state.py` and a control on the screen.
* **`lab.Lab`** holds the models and the cache. A method returns a `Task` (its key, how it is computed, how
  many bytes it takes), or a result that is cheap. Analysis is done by the functions that everybody else
  calls.
* **`work.Worker`** computes tasks one after the other in a thread for each model. Callbacks never wait for
  it.
* **A screen** is a module with `layout(lab, state)` and `register(app, lab)`, listed in `layout.SCREENS`.
  It asks with `parts.want(lab, task, page=page, name=slot)` and writes that into `parts.wanted(slot)`; a
  callback with the input `parts.arrived(slot)` shows the result, which it takes from `lab.cache`.
  `parts.partial(slot)` gives what there is so far. Each slot is declared once in the layout by
  `parts.slots(name)`.
* **`direct`** answers what must be fast and would cost Dash an update of its whole tree: how far
  computations are (asked for ten times a second), and the row of attention after a click.
* **Triggers** are stores that `explore.js` derives from the state and that change only when their part
  does: `conversation` (a `ChatPart`), `view`, `look-map`, `look-row` (a `WherePart`), `steering` and
  `comparing` (these only while their screen is shown). A screen that computes adds its own in `derive`.
* **Figures** come from `report/plots`. `parts.figure(name, ...)` declares one; a callback writes
  `parts.show_figure(figure)` into the store `{"type": "figure", "name": name}`. It is then coloured for
  light and dark, and saved as SVG and PNG; `parts.FRAMES[name]` gives the table of its CSV file.
* **Copying**: `copying.as_python` and `as_command` have one function per screen; tests run what they give.
* **Text from people** is only ever a child of a Dash component or `textContent`, never markup.
* **Scripts**: `assets/explore.js` holds what Dash has nothing for. Nothing is loaded from elsewhere, and
  the Content-Security-Policy in `server.py` forbids it.
"""

from __future__ import annotations

from ctxlens.explore.lab import Lab
from ctxlens.explore.notebook import notebook_view
from ctxlens.explore.state import State

__all__ = ["Lab", "State", "notebook_view"]
