"""Relative flatness in closed form, where the layer's output is what the criterion receives."""
