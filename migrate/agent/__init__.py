"""The process that a move starts on each host: it serves one coordinator over stdin and stdout, and one move.

    python -m migrate.agent     on this host, as a child
    ssh HOST migrate agent      on another host: one for control, and for bulk data a second one

It has a single thread and one call at a time; what can be asked of it stands in `table.VERBS`, and nothing else can. When its
stream ends, whoever was there is gone: what is undecided is let go, and what was prepared here is discarded. Only a target that
is prepared stays as it is, and waits to be told what was decided.
"""
