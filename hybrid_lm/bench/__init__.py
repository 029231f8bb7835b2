"""Time and memory of ours beside the installed peers, on this machine: `hybrid-lm bench ops|train|generate`.

All candidates of a case run in one process, round robin: a ratio inside one invocation is steadier than a
time across invocations. Each candidate is compared with float64 before it is timed, and a wrong one is not
timed.
"""
