"""Certificates: what a rewrite changed, cut out and evaluated before and after."""
