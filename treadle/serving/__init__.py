"""`treadle serve`: an HTTP server for models, with OpenAI's API.

refusals.py      HTTP error responses in OpenAI's format
fields.py        fields of a request's body, checked, with errors that name the field
requests.py      parsing of requests' bodies
answers.py       bodies of responses
models.py        served models: a language model on a scheduler, or an embedding model
answering.py     the texts of a request, passed from the scheduler's thread to the server's
application.py   routes, limits, keys, metrics
"""
