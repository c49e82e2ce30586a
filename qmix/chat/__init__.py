"""A conversation with a model: what is said becomes token ids, answers are kept as they were generated.

format        a turn to ids, by the model's chat template or as plain continuation
conversation  turns and their ids; the oldest go when the context is full
session       a model, a conversation and settings: ask, regenerate, undo
record        a session as JSON
kept          a file for each chat while it goes on
slash         /commands
reader        lines from a terminal, or from a pipe
loop          reads, asks, shows
"""
