"""The `kt-sft` command: what a user runs beside LLaMA-Factory's own command."""
