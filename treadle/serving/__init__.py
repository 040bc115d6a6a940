"""`treadle serve`: models behind the HTTP interface that OpenAI's clients speak.

refusals.py      what a caller is told who asked for what cannot be: a status and an error object
fields.py        one field of a request's body: its form, and where it is not so, an error with its name
requests.py      the bodies of requests, read
answers.py       the bodies of answers
models.py        what is served: a model that writes, on a scheduler; a model that embeds
answering.py     a request's texts, from the scheduler's thread to the server's
application.py   routes, limits, keys, metrics
"""
