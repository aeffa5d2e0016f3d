"""Quality against the full cache: one file per task, each giving rows that a table, JSON and plots share.

``conditions``  what is compared: policies at equal slots, and the controls
``texts``       where texts come from
``fidelity``    KL, change of NLL and top-1 agreement on a text
``needles``     a sentence to be found again
``regret``      the full cache's attention to what was evicted

A row is a dict of ``task``, what names its condition (``policy, allocator, budget, seed``), its figures, and what
was held (``slots_held, kv_bytes, kv_bytes_peak, kv_bytes_full``).
"""
