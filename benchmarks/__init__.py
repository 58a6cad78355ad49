"""Measurements: ``python -m benchmarks [NAME]`` prints a table; rows and pictures go to runs/benchmarks/.

quick           a minute's look at the block; what runs when nothing is named and there is no GPU
ffn             the block at the shapes of real models, beside every peer
gpu             the same on a GPU, in nine minutes; what runs when nothing is named and there is one
decoder         whole models: a step of training, and generation, beside plain torch and transformers
shakespeare     validation loss in equal wall-clock beside nanoGPT's published CPU recipe
classification  reviews and titles sorted, beside transformers by the same recipe and scikit-learn
coverage        in how many models of transformers swap takes every feed-forward block
loading         memory that loading a gigabyte of weights takes, beside transformers
tune            which products a GPU should fuse, in which tiles: writes ffn/ops/kernels/tilings.json
readme          writes the tables of README.md and docs/measured.md from the rows in benchmarks/results/
compare         what got faster or slower between two files of rows

Absolute times belong to one machine in one hour. Quote the ratios: what one table compares runs interleaved.
"""
