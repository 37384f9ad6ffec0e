"""The tree search over workflows: see `mcts.MCTSOptimizer`.

Nothing is imported here, since `awf.search.compact` is also used without the rest.
"""
