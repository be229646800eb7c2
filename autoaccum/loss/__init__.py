"""A batch becomes a loss, and what that loss was divided by. `objective.py` is what the rooms above call.

What a loss divides by stands in its graph: `graph.py` reads it; `asking.py` runs the loss on a few samples, `settle.py`
decides what the numbers read there mean, and `divisor.py` is what was decided; `reading.py` reads on at each
micro-batch, with what each term came to (`values.py`); `mean.py` weighs the terms. `compared.py` holds what somebody
declared against it.

Where a graph cannot be read, or torch's own loss says it beforehand, `reduction.py` has the rule: by what the batch
offers to count (`counts.py`, `counting.py`) and by torch's losses (`torch_losses.py`). `coupled.py` has losses that are
no means. `call.py` makes the model's call of a batch, and `misuse.py` says what was meant where it raised.
"""
