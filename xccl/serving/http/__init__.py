"""The HTTP server of ``xccl serve --http``: OpenAI's completions, metrics, and a page for people.

The launcher (:mod:`.launcher`) forks the front, one process that runs uvicorn, and then the ranks. The front turns
text into tokens, gives each request to a rank, and turns the tokens that come back into text, so no rank ever waits
for a client.
"""
