"""The forms in which a model can be stored or passed: one file for each, and the choice between them."""
