"""A batch becomes a loss, and each term of it is scaled by its share of what the window's terms divide by.

`objective.py` is what the rooms above call. What a term divides by is a `Divisor` (a count, a constant or a penalty,
and what counts it in a batch); a `Reading` holds those of one loss and says how they are known: declared, or as torch's
own loss has it (`reduction.py`); read off the graph (`graph.py`) or shown by values over parts of a batch, which a few
samples settle (`asking.py`, `settle.py`); or the step returns it. `counts.py` counts in a batch, `mean.py` weighs the
terms, `coupled.py` has losses that are no means, `call.py` makes the model's call of a batch, and `misuse.py` says what
was meant where it raised.
"""
