"""How ops and values read to a person: signatures, words of other libraries, what Python asks of a tensor."""
