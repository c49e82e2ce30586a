"""Compare plans of several models, precisions and machines, as tables and plots.

May import the engine, the terminal and every room below them."""
