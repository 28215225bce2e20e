"""Reordering from data: what `NestedAdapter.reorder` does for ``"learned"`` and ``"trained"``.

Three calls are all that the adapter needs:

* ``rows.read_data(model, data, tokenizer=None) -> Rows`` refuses bad data, and touches nothing.
* ``learned.learn(adapter, rows, count=None, seed=0) -> bool``
* ``trained.train_ranks(adapter, rows, count=None, seed=0, checkpoint=None) -> bool``

The last two take an adapter that was just reordered by SVD. They write other factors into it and
return True, or leave its factors and return False where held-out rows lose more. After any exception
the factors are those of the call. Both ask the adapter for ``model``, ``nesting``, ``factors()``,
``put_factors(mapping)``, ``parameters()`` and ``standing(q)``, and for nothing else.
"""
