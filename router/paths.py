"""The paths of completions, and what is told in the scope of the way by which one came."""

COMPLETIONS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"})
DIRECT = "triad_direct"
"""The key, in the scope of a request that router.direct has brought, of the server's own `send`. Nothing of
Serve's answers such a request with its id."""
