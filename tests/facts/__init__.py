"""One regression test for each fact that the design stands on."""
