"""How a model uses its context, measured while it is trained.

`callback` is the `TrainerCallback`; `budget` keeps its share of the time, `questions` holds what is asked and
asks it, `trainee` finds the model inside a trainer and leaves it as it was, `record` keeps the readings with
the run, and `rules` decides which reading is the best and when the training stops.
"""
