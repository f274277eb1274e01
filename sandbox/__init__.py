"""One file for each process that judging a program takes."""
