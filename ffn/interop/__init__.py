"""The outside world: other libraries' checkpoints and modules. Only here are their names known."""
