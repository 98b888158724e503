"""Site: the agent that works beside the data."""
