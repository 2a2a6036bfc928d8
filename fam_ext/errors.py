"""Exceptions raised by fam_ext."""


class UnsupportedError(RuntimeError):
    """A request that cannot be answered with a number whose value and gradient are right.

    The message names what is unsupported and at least one way out.

    Example:
        >>> import fam_ext, torch
        >>> try:
        ...     fam_ext.FAMLoss(torch.nn.CrossEntropyLoss(), torch.nn.ReLU(), 0.1)
        ... except fam_ext.UnsupportedError as error:
        ...     print(str(error)[:32])
        FAMLoss: layer must be nn.Linear
    """


class NoClosedForm(UnsupportedError):
    """The closed form does not apply: the criterion's input is not the layer's output, or the criterion has none."""


class LayerNotCalled(UnsupportedError):
    """No loss can be taken of a layer that the forward pass did not call."""
