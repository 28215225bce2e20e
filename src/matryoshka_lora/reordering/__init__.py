"""Reordering from data: the orders ``"learned"`` and ``"trained"`` of `NestedAdapter.reorder`.

* ``rows.read_data(model, data, tokenizer=None) -> Rows`` refuses bad data, and touches nothing.
* ``learned.learn(adapter, rows, count=None, seed=0) -> bool``
* ``trained.train_ranks(adapter, rows, count=None, seed=0, checkpoint=None) -> bool``

The last two take an adapter that was just reordered by SVD. They write other factors into it and
return True, or leave it as it was and return False if held-out rows lose more. After any exception
the factors are as before. Of the adapter they use ``model``, ``nesting``, ``factors``,
``put_factors``, ``parameters`` and ``standing``.
"""
