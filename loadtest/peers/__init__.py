"""The sides of `make bench`: each is started once, and only the one whose turn it is computes."""
