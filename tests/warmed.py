"""All that tests of trainings import sooner or later, for the process that others are forked from (warm.py).

It is set aside from the collection of garbage, which a probe asks for before each trial: a look at a whole interpreter
with PyTorch and SymPy takes longer than most tests, and in a fork it copies every page that it looks at.
"""

import gc

import hypothesis
import pytest
import sklearn.datasets
import torch._dynamo  # by the first step of any optimizer

import autoaccum

__all__ = ["hypothesis", "pytest", "sklearn", "torch"]

for name in autoaccum.__all__:  # each imports what it needs when it is first asked for
    getattr(autoaccum, name)

gc.collect()
gc.freeze()
