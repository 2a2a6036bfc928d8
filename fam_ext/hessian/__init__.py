"""Relative flatness of any layer from products with the Hessian of the loss, or with positive forms of it."""
