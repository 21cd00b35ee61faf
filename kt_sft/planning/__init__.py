"""What a training run needs and how long its steps take, found before any weight is loaded.

setup -> model -> activations -> memory -> plan: a recipe, its model on the meta device with the checkpoint's headers,
one step on tensors without values, the sums, and what follows from them for a machine.
"""
