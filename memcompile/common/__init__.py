"""What every room of the package shares: the words for a site and for token-wise code."""
