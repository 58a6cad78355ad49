"""Faster inference on the CPU from packed copies of the weights, in their own precision or in int8."""
