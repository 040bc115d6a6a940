"""`treadle serve`: an HTTP server for models, with OpenAI's API.

refusals.py      HTTP error responses in OpenAI's format
fields.py        checked fields of a request's body; errors name the field
requests.py      parsing of requests' bodies
answers.py       bodies of responses
models.py        served models: a language model with a scheduler, or an embedding model
answering.py     generation for a request: tokens pass from the scheduler's thread to the server's event loop
application.py   routes, limits, API key, metrics
"""
