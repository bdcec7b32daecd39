"""What benchmarks/peers.py runs in processes of their own."""
