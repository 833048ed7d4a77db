"""Model weights: listed in a manifest, fetched once, and verified before each load.

manifest  names, versions, sources and checksums of files, and the signature
cache     the cache that the processes of a machine share
stamps    which files of the cache were verified, so that a start need not read them again
cli       the command `inferq weights`
"""
