"""Quantization: a plan of the weights to quantize, their encodings and the reasons; a checker of the plan; and its
application.
"""
