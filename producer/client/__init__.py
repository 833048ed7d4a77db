"""The Python client of the HTTP gateway.

async_client  `AsyncClient`
sync_client   `Client`, generated from async_client.py
requests      the calls of the API as requests and replies, without a network
events        the event stream of a task, across connections
async_io      pauses and file access of `AsyncClient`
sync_io       the same for `Client`
transfers     files to upload and to download
connection    the gateway's address and the API key, as arguments of httpx
settings      INFERQ_API_URL and INFERQ_API_KEY
errors        `ApiError` and what derives from it

Applications import the clients and the errors from `inferq`. Nothing is imported here, so that a command loads
only what it uses.
"""
