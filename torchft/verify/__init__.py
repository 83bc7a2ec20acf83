"""One strategy in every runtime, compared bit for bit: simulated nodes, real replica groups, a
parameter server and its workers.
"""
