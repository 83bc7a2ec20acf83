"""PURE: rounds, members and rules, and what server and worker agree on: shapes, chunks, options,
refusals.
"""
