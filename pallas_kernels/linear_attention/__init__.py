"""The additive family: linear attention with every kind of decay."""
