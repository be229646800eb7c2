"""This process among others: how many there are, what they add up to, and whether all of them are still well.

A single process answers for itself and pays nothing. Several talk through a process group of PyTorch's.

Choices:
- Every exchange begins with one all-reduce of a fixed size. In it each rank says in slots of its own where it is
  ("step 4", "evaluate") and whether it has failed. Where ranks are at different places all of them raise, and the
  error names the places. A rank that fails anywhere says so in the next exchange, whatever the others call there:
  they raise, and nobody waits for the dead. An error that the others know of is told once, however many functions it
  passes.
- Allocate, vote, then communicate: what a collective needs is allocated before the exchange that leads to it, so that
  nothing that can fail stands between the two.
- Large tensors are reduced where they lie, all of them in flight together; only small ones are packed, so that many
  cost one message.
"""

from autoaccum.ranks.joining import ends_all, here, join, leave, ranks_given, sharing
from autoaccum.ranks.places import LostRankError, bytes_of, digest, told, was_told
from autoaccum.ranks.together import Flight, Ranks

__all__ = [
    "Flight", "LostRankError", "Ranks", "bytes_of", "digest", "ends_all", "here", "join", "leave", "ranks_given",
    "sharing", "told", "was_told",
]  # fmt: skip
