"""A discrete-event model of a fleet of engines and a router, for benchmarks/routing.py; see docs/routing.md."""
