"""Callbacks: signed, sent, tried again for days, and never held up by somebody else's dead server."""
