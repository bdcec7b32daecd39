"""Finds the engines' pods while running: by Kubernetes, by DNS, or by a file, and registers what is found."""
