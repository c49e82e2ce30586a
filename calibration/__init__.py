"""Run a model on text and measure what the plan, the quantiser and the pool use.

corpus       texts: the bundled ones, or a user's file
measure      one pass of the texts through a checkpoint
routing      the record of which experts each token takes
sensitivity  the error from quantising each expert
report       the findings, put together for a terminal and for a file
tables       the map of expert use and tables, on a terminal
plot         maps and curves in one figure, in a file

May import the engine, the terminal and the rooms below them; only commands import it.
"""
