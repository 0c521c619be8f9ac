"""Measurements that are run by hand; pytest collects what holds some of them to their word."""
