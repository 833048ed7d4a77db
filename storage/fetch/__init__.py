"""Fetches inputs by URL to files, from permitted addresses and buckets only.

fetcher    a URL to a file, by its scheme
http       http and https, redirects included
addresses  which addresses may be connected to
pool       kept connections
urls       data: URLs, and URLs as they may be shown
"""
