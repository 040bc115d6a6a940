"""Certificates: changes of a rewrite, extracted as a region and evaluated before and after."""
