"""The command line: what people type and see."""

import gc

# Imports make many objects and no garbage: a look through them after each 700 takes a tenth of the
# time until a command answers.
gc.set_threshold(50_000)
