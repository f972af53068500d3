"""`python -m experiments.real_cure MODEL --instruct DIR …`; see README.md for hypotheses and rules."""

from experiments.real_cure.run import main

if __name__ == "__main__":
    main()
