"""Hold experts in RAM under a budget: slots, eviction, prefetch, counters, and the replay of recorded routing.

May import stores and every room below them."""
