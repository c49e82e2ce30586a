"""What is learned from running a model on text, for the plan and the pool to use.

corpus       the texts themselves: those that come with the package, or a user's own file
run          a checkpoint calibrated, in one pass of them
routing      what is recorded of where tokens go
sensitivity  what quantising each expert costs
report       what was found, put together for people
trace        which experts a run routed to
replay       a trace through caches of any size: each policy of the pool, and the best that any cache could do
stack        how one walk along a trace tells that of every size
pictures     use of experts, hit rates, error against bytes: in a terminal
plot         the same as one figure in a file
chart        lines and marks on a terminal
palette      names, colours and scales that both kinds of picture have
"""
