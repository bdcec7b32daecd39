"""An index that many replicas share, kept in Valkey or Redis."""
