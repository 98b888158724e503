"""HTTP: a server's endpoints."""
