"""The steps of `make quickstart`, each a module of its own; `scripts/quickstart.py` runs them in order."""
