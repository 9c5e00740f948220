"""The engine in a process of its own: typed frames over a local socket, never pickle.

    frames.py     what the two sides say, and how it becomes bytes
    loop.py       the thread that owns the core (the in-process client runs the same one)
    child.py      the engine's side of the socket
    spawn.py      a new child, before anything that takes long to import
    launcher.py   the server's side: talk to a child, end it

Neither side trusts the other to be quick or even alive: sizes are bounded, silence has a limit, and a closed
socket means the other is gone.
"""
