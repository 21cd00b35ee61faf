"""The steps of `make quickstart` and `make example`, each a module of its own; the scripts beside run them in order."""
