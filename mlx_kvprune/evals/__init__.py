"""Quality against the full cache: one file per task, each giving rows that a table, JSON and plots share.

``conditions``  what is compared: policies, allocators, precisions, budgets, and the controls; ``equal``: at equal bytes
``texts``       where texts come from; ``hay``, ``facts``: what is hidden in them
``job``         a run: tasks x items x conditions; ``store``: its finished units, so that it can go on after a kill
``tasks``       the table of tasks; a new one joins by one file and one line:
``fidelity``    KL, change of NLL and top-1 agreement on a text
``regret``      the full cache's attention to what was evicted
``needles``, ``paraphrase``, ``multikey``, ``multivalue``, ``tracking``, ``qa``  questions about a text, by way of
                ``questions`` (trials), ``asking`` (one answer) and ``judge`` (rows)
``documents_asked``  questions known before reading: ``aware``, ``ask``
``turns``       a conversation, and questions back to its start
``generation``  length, loops and the first other token of a greedy answer
``density``     what each head keeps, by kind and length of text
``tables``, ``frontier``, ``findings``, ``results``  rows as tables, as pictures, as sentences, as the page of results

A row is a dict of ``task``, what names its condition (``policy, allocator, budget, seed``, and ``kv_bits``, ``share`` if they
are not the default), its figures, and what was held (``slots_held, kv_bytes, kv_bytes_peak, kv_bytes_full``).
"""
