"""Protocol: what a server and a site say to each other, and who they are."""
