"""What loading can refuse: a damaged checkpoint, a model it cannot take, a machine too small."""


class CheckpointError(ValueError):
    """A checkpoint file is damaged, incomplete or of the wrong shape; the message names file and tensor."""


class UnsupportedModelError(ValueError):
    """A model's routed experts cannot run on the engine; the message names the module's class."""


class NotEnoughMemoryError(RuntimeError):
    """The experts do not fit in this machine's memory; the message names what is needed and what is there."""


class SharedLoadError(RuntimeError):
    """The process that loads the experts for all processes of this machine failed; the message says with what."""
