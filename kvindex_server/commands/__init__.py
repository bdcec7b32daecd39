"""The console command `kvindex`: asks a running server, records and plays streams, and runs the server itself."""
