"""What a run says of input that it cannot use."""


class InputError(ValueError):
    """What the user gave cannot be used. The command line shows the message alone, without a traceback."""
