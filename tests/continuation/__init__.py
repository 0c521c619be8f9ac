"""Training that goes on after a load as if nothing had happened."""
