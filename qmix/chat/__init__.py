"""A conversation with a model: `qmix chat`. May import every room up to `engine`.

format        turns to ids, by the model's chat template or as plain continuation
conversation  turns and their ids; the oldest are dropped when the context is full
session       a model, a conversation and settings: ask, regenerate, undo
settings      settings of the answers, typed and saved
record        a session as JSON
kept          a file for each running chat
slash         /commands
first_turn    the turn that is typed while the model is loaded
reader        lines from a terminal or from a pipe
loop          reads, asks, shows
"""
