"""Find out what this machine has, and measure what it does.

May import stores and every room below them."""
