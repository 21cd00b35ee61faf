"""The Python face of the native engine: the engine itself, its weight store and its facts."""
