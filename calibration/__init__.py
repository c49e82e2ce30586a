"""What is learned from running a model on text, for the plan and the pool to use.

corpus    the texts themselves: those that come with the package, or a user's own file
trace     which experts a run routed to
replay    a trace through caches of any size: each policy of the pool, and the best that any cache could do
stack     how one walk along a trace tells that of every size
"""
