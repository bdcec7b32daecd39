"""The doctor: judges every known reason for which a cache hit is missed without an error; facts in, findings out."""
