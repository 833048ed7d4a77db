"""Objects in S3 or in a local folder, and the results of tasks among them.

store    the interface of every store, and what a key may be
open     the store that the settings name
local    a folder
s3       S3 and what speaks its API
watch    whether the store can be used, without waiting for it
results  results, failures and artifacts by task; each result is written once
"""
