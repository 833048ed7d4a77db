"""The scale-in guard: keeps Kubernetes from removing busy workers while idle ones exist. `inferq scale-in-guard`.

costs      deletion costs: pure functions from facts to the patches to make
hearing    what workers say in their heartbeats, and how far that is to be trusted
pods       the workers' pods, listed and watched
api        the connection to the API server, and its errors
lease      one guard works at a time
guard      reads, decides and patches, round by round
metrics, settings, cli
"""
