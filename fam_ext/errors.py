"""Exceptions raised by fam_ext."""


class UnsupportedError(RuntimeError):
    """A request that cannot be answered with a number whose value and gradient are right.

    The message names what is unsupported and at least one way out.
    """


class NotAHead(UnsupportedError):
    """The closed form does not apply: the criterion's input is not the layer's output, or the criterion has none."""
