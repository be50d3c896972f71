"""The command line: arguments of recipes, and how they are read."""
