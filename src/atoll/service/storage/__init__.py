"""Storage: what a server keeps; tables, blobs, folders."""
