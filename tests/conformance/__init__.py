"""Every case of exact accumulation, as one test each, on autoaccum and on the trainers that people use today."""
