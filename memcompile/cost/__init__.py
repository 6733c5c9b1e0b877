"""What a sharded memory costs: bytes a rank, bytes on the wire, time a step, and the best size of its groups.

Counts of what the sharded runtime sends are exact; times are those bytes over given rates. No GPU is needed, and
`import memcompile` does not import it.
"""
