"""Training of gates: read texts with the full cache, fit what was useful, then distil through the output.

``texts``     excerpts of the user's files.
``reading``   a text as the full cache reads it: inputs of every attention, keys, values, what later tokens attended to.
``utility``   fit gates to that: forward passes only.
``student``   the model over a context whose slots are gated.
``objective`` what the student's output is to be, and what its gates may hold.
``distill``   train gates end to end against the full cache.
``fit``       the stages, checkpoints, the gate file.
"""
