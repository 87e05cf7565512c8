"""The page of each kind of run, in a module of its name; `load` is that of bench-serve."""
