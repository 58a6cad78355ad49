"""Measurements: ``python -m benchmarks NAME`` runs one, prints a table and keeps its rows in ``results/``.

block           FeedForward beside plain torch modules
training_step   a whole training step beside the plain GPT of ``baseline.py``
generation      tokens a second of GPT-2 small's sizes beside transformers and the plain GPT
shakespeare     validation loss in equal wall-clock beside nanoGPT's published CPU recipe
gpu             FeedForward on a GPU beside plain torch, torch.compile, Liger and quack: time and memory
tune            which products a GPU should fuse, in which tiles: writes ffn/ops/kernels/tilings.json
readme          writes the README's tables from the rows
compare         what got faster or slower between two files of rows

Absolute times belong to one machine in one hour. Quote the ratios: what one table compares runs interleaved.
"""
