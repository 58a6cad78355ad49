"""Faster inference on the CPU from copies of the weights in oneDNN's layout, as they are or in int8."""
