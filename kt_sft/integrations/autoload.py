"""The entry point that torch calls at the end of `import torch`."""


def arm() -> None:
    """Prepares the hooks that make the `kt_sft:` key of a recipe known; cheap, and never raises."""
