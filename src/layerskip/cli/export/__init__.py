"""`layerskip export`: one module for each subcommand, and `main`, which finds it."""
