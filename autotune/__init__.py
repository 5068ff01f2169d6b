"""How fast: search spaces, the search (the only importer of optuna), timing, the store and the command line."""
