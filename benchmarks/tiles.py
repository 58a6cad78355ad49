"""Candidate tiles of the fused matmul + activation kernels, for `python -m benchmarks tune`."""

from ffn.ops.kernels.tilings import Tiling

# Major compute capabilities whose shared memory holds these tiles.
CAPABILITIES = (9, 10)

# By (forward, gated). The first of each is the guess without a measurement: two of its programs share a
# processor, but for the two sums of the gated forward, so that one multiplies while the other finishes. On
# compute capability 9, with and without biases and dropout, none spills in Triton 3.6 and 3.7, and none makes
# its matrix instructions wait for one another: tried with gelu, gelu_tanh, relu2, geglu and swiglu.
CANDIDATES = {
    (True, False): [
        Tiling(128, 128, 64, 8, 4, 8, 3),
        Tiling(128, 256, 64, 8, 8, 8, 4),
        Tiling(256, 128, 64, 8, 4, 8, 3),
        Tiling(128, 128, 64, 8, 4, 8, 4),
        Tiling(128, 128, 64, 8, 4, 4, 3),
        Tiling(64, 256, 64, 8, 4, 4, 4),
        Tiling(128, 64, 64, 8, 2, 4, 3),
    ],
    (True, True): [
        Tiling(128, 128, 64, 8, 4, 8, 4),
        Tiling(128, 128, 64, 8, 4, 8, 3),
        Tiling(256, 64, 64, 8, 4, 8, 3),
        Tiling(128, 64, 64, 8, 2, 8, 3),
        Tiling(128, 64, 64, 8, 4, 4, 4),
        Tiling(64, 128, 64, 8, 4, 4, 4),
        Tiling(64, 64, 64, 8, 2, 4, 3),
    ],
    (False, False): [
        Tiling(128, 128, 64, 8, 8, 8, 3),
        Tiling(128, 256, 64, 8, 8, 8, 4),
        Tiling(256, 128, 64, 8, 8, 8, 3),
        Tiling(128, 128, 64, 8, 4, 8, 4),
        Tiling(128, 64, 64, 8, 4, 4, 4),
        Tiling(64, 128, 64, 8, 4, 4, 4),
        Tiling(128, 128, 64, 8, 4, 8, 3),
        Tiling(64, 128, 64, 8, 4, 4, 3),
    ],
    (False, True): [
        Tiling(128, 128, 64, 8, 8, 8, 3),
        Tiling(128, 256, 64, 8, 8, 8, 3),
        Tiling(128, 128, 64, 8, 4, 8, 4),
        Tiling(256, 64, 64, 8, 4, 8, 4),
        Tiling(128, 64, 64, 8, 4, 4, 4),
        Tiling(64, 128, 64, 8, 4, 4, 4),
        Tiling(128, 128, 64, 8, 4, 8, 3),
        Tiling(64, 128, 64, 8, 4, 4, 3),
    ],
}
