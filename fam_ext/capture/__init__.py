"""The forward calls of a layer: kept by a hook, found again from the loss, and how the criterion's input is laid out."""
