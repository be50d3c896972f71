"""The recipes, each a `main` that reads arguments and calls the package; installed as `clipmap_hf.recipes`."""
