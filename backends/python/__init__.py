"""The common part of the backends that emit Python: code generation, code for axes and attention, and the
executable.
"""
