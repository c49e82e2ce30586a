"""Lines, tables, progress, figures and the live screen for people.

May import the ground (errors, units, progress and files), and of the engine only its figures, which load no torch."""
