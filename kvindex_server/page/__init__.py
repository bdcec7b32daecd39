"""The page for people on the metrics port: the fleet, live charts, and what each pod holds of a prompt."""
