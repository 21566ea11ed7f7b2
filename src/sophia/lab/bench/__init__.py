"""What an optimizer costs on this machine: ``sophia bench``.

subject     what is trained: a built-in GPT, or the user's own model
methods     the optimizers, a row each, and how each is called in a loop
timing      ratios of time, taken turn about in one process
memory      peak memory, in a process of its own
measuring   all of it, to one record
showing     the record as a table and as a picture
"""
