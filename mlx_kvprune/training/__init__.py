"""Training of gates: read texts with the full cache, fit what was useful, then distil through the output.

``texts``      excerpts of the user's files, and what is held out of them.
``reading``    a text as the full cache reads it: inputs of every attention, keys, values, what later tokens attended to.
``pool``       the readings that a training holds.
``methods``    which gates a method has, and its stages; ``plan`` what one training was asked for; ``recipe`` of its steps.
``utility``    fit gates to what was attended to: forward passes only (``descent``, ``stages``).
``student``    the model over a context whose slots are gated.
``objective``  what the student's output is to be, and what its gates may hold; ``objectives/`` one file a method.
``distill``    train gates end to end against the full cache; ``joint`` the model with them.
``calibrate``  thresholds, and quality on held-out texts.
``checkpoint`` a training on the disk.
``fit``        the stages, and the gate file (``about`` its card).
"""
