"""torchapp: an app of Flower's, which knows nothing of atoll."""
