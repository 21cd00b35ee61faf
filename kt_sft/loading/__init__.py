"""From a checkpoint to the engine's weight store."""
