"""Models written elsewhere: find their feed-forward blocks, prove them equal to the op, reroute them.

Words used in this folder:

    product   a module that computes a matmul: an nn.Linear, or transformers' Conv1D
    chain     the statements of a method from the first products to the call of the last one
    plan      how to reroute one chain: where it is, what it computes, with which options the op runs

`in_place` is ffn.swap and ffn.unswap, `from_module` is ffn.from_module. Both ask `discover` for plans.
`source` (with `statements` and `syntax`) finds chains in a module's source; `probe` (with `standin`) runs a
chain on chosen values to learn what it computes; `proof` compares it with the op; `reroute` applies a plan.
"""
