"""Callbacks: signed, sent, retried for days, and never delayed by another receiver's dead server."""
