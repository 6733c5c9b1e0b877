"""What a sharded memory costs: bytes a rank, bytes on the wire, time a step, and the best size of its groups.

Counts are exact for what the sharded runtime sends; times are those bytes over given rates. Nothing here needs a GPU,
and `import memcompile` does not import it.
"""
