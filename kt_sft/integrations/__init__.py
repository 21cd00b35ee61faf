"""Every place where kt_sft attaches to a library above it."""
