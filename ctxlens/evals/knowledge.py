"""Questions of general knowledge, which need no text: what steering must not cost."""

from __future__ import annotations

from ctxlens.evals.needle.needles import Needle

_ANSWERS = (
    ("What is the capital of France?", "The capital of France is", "Paris"),
    ("What is the capital of Japan?", "The capital of Japan is", "Tokyo"),
    ("What is the capital of Italy?", "The capital of Italy is", "Rome"),
    ("What is the capital of Germany?", "The capital of Germany is", "Berlin"),
    ("What is the capital of Egypt?", "The capital of Egypt is", "Cairo"),
    ("Which planet do we live on?", "The planet that we live on is", "Earth"),
    ("Which star does the Earth go around?", "The star that the Earth goes around is the", "Sun"),
    ("Which gas do plants take in from the air?", "The gas that plants take in from the air is carbon",
     "dioxide"),
    ("Which metal is attracted by magnets?", "A metal that is attracted by magnets is", "iron"),
    ("At how many degrees Celsius does water boil?", "In degrees Celsius, water boils at", "100"),
    ("How many days does a week have?", "The number of days in a week is", "seven"),
    ("How many months does a year have?", "The number of months in a year is", "twelve"),
    ("Which ocean lies between Europe and America?", "The ocean between Europe and America is the",
     "Atlantic"),
    ("Who wrote the play Hamlet?", "The play Hamlet was written by William", "Shakespeare"),
    ("Who painted the Mona Lisa?", "The Mona Lisa was painted by Leonardo da", "Vinci"),
    ("Who developed the theory of relativity?", "The theory of relativity was developed by Albert",
     "Einstein"),
    ("Which animal is called man's best friend?", "The animal that is called man's best friend is the",
     "dog"),
    ("What do bees make?", "The sweet food that bees make is called", "honey"),
    ("What is the frozen form of water called?", "The frozen form of water is called", "ice"),
    ("Which organ pumps blood through the body?", "The organ that pumps blood through the body is the",
     "heart"),
    ("Which colour do you get from blue and yellow?", "Mixing blue and yellow paint gives the colour",
     "green"),
    ("What is the largest animal in the sea?", "The largest animal in the sea is the blue", "whale"),
    ("Which language is spoken in Brazil?", "The language that is spoken in Brazil is", "Portuguese"),
    ("On which continent does Kenya lie?", "Kenya lies on the continent of", "Africa"),
    ("Which season comes after summer in North America?", "In North America, the season after summer is",
     "fall"),
    ("What is two plus two?", "Two plus two is", "four"),
    ("What do cows give us to drink?", "What cows give us to drink is", "milk"),
    ("Who was the first president of the United States?",
     "The first president of the United States was George",
     "Washington"),
    ("Which sense do we use our ears for?", "The sense that we use our ears for is", "hearing"),
    ("What is the opposite of hot?", "The opposite of hot is", "cold"),
)  # fmt: skip
KNOWLEDGE: tuple[Needle, ...] = tuple(
    Needle(f"knowledge-{number}", f"{prefix} {answer}.", question, (answer.lower(),), prefix)
    for number, (question, prefix, answer) in enumerate(_ANSWERS)
)
"""General knowledge; each answer is one word."""

__all__ = ["KNOWLEDGE"]
