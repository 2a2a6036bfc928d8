"""Layers as linear maps of their weight: Linear, ConvNd, ConvTransposeNd and low-rank adapters, and finding them by name."""
