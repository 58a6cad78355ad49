"""Measurements: ``python -m benchmarks [NAME]`` prints a table; rows and pictures go to runs/benchmarks/.

quick           the block in one minute; the default without a GPU
ffn             the block at the shapes of real models, against every other library
gpu             the same on a GPU in nine minutes; the default with a GPU
decoder         whole models: a training step and generation, against plain torch and transformers
shakespeare     validation loss for equal time, against nanoGPT's published CPU recipe
classification  film reviews and titles, against transformers with the same recipe and scikit-learn
coverage        the number of transformers' models in which swap takes every feed-forward block
loading         memory to load a gigabyte of weights, against transformers
tune            measure which matmuls a GPU should fuse, and the tiles; writes ffn/ops/kernels/tilings.json
readme          writes the tables of README.md and docs/measured.md from the rows in benchmarks/results/
compare         list what got faster or slower between two files of rows

Quote ratios, not times: times depend on the machine and the hour, but the rows of one table ran interleaved.
"""
