"""A small fleet of simulated engines that publish genuine KV events, for the demo, tests and benchmarks."""
