"""What a model does with its context: needles, reading comprehension, chat, closed-book questions."""
