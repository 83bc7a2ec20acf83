"""The two demos: replica groups, or a parameter server and its workers, on this machine. One of
them is killed and comes back, and what that cost is summed up.
"""
