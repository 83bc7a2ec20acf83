"""What the benchmarks share.

figures     what a benchmark found: a value, the floor beside it, their ratio
goals       what the figures are held to, all in one place
cli         a benchmark as a command: options from a dataclass, a table or JSON out
show        tables for people
spread      the minimum, median and tail of many timings
machine     what a run was taken on; CPU seconds and memory of a process
floors      what the machine itself takes
threads     many threads that begin together
workers     functions in processes of their own
lighthouse  a lighthouse in a process of its own
group       the manager of a replica group, in a worker; torch's own group of two
training    a replica group that trains and tells of each step
small_work  models and data that train on one CPU thread
simulating  a simulated run in turns with the plain loop
"""
