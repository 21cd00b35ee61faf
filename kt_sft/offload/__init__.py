"""The accelerator's side: what runs there while the CPU computes the routed experts."""
