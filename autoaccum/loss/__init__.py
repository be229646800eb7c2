"""A batch becomes a loss, and what that loss was divided by. `objective.py` is what the rooms above call.

What a loss divides by stands in its graph: `graph.py` reads it; `asking.py` runs the loss on a few samples, `settle.py`
decides what the numbers read there mean, `divisor.py` is what one is, and `reading.py` reads on at each micro-batch;
`mean.py` weighs the terms.

Where somebody declared it, torch's own loss says it beforehand (`torch_losses.py`), or the graph cannot be read,
`reduction.py` counts it in the batch (`counts.py`). `returned.py` takes what a step returned apart, `coupled.py` has
losses that are no means, `call.py` makes the model's call of a batch, and `misuse.py` says what was meant where it
raised.
"""
