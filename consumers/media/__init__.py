"""Input files for engines.

sniff            a file's kind by its first bytes
pictures         pictures as upright RGB pixels
decoder          decodes files in a process of their own, with limits on memory and CPU time
decoder_process  that process
"""
