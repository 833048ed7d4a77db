"""Inputs by URL: fetched to a file, from nowhere that the settings do not allow.

fetcher    a URL to a file, by its scheme
http       http and https, redirects included
addresses  which addresses may be connected to
pool       kept connections
urls       data: URLs, and URLs as they may be shown
"""
