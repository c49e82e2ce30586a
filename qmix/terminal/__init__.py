"""Lines, tables, progress and figures for people.

May import only the ground: errors, units, progress and files."""
