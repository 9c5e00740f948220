"""`quire bench`: drives any OpenAI-compatible server and says how fast it answered.

    options    what the user asked, from the command line
    workload   which requests to send, and when
    wire       HTTP/1.1 and server-sent events over one asyncio connection
    client     one request: send it, time its tokens, name its error
    drive      closed and open loops over many requests
    report     percentiles, the table, the JSON

It stands alone: it knows URLs and tokens per second; it does not know this server or its engine.
"""

from server.bench.drive import main

__all__ = ["main"]
